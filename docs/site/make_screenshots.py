#!/usr/bin/env python3
"""Takes the screenshots of the web page for the documentation: ``docs/images/page-*.png``.

Starts a server with a durable store, actors that play a small ball game with images, and two learners, opens the page in a headless
Chromium and takes a picture of what it shows. Needs Debian's packages ``chromium`` and ``chromium-driver``, and Selenium
(``pip install selenium``).

    python docs/site/make_screenshots.py --seconds 90
"""

from __future__ import annotations

import argparse
import base64
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from touchline import InvalidEpisodeError, ReplayClient, TouchlineError

IMAGES = Path(__file__).parents[1] / "images"
MAX_BYTES = 250_000
SIDE = 64
ENVIRONMENT = {
    "TOUCHLINE_CONFIG__BUFFER_SIZE": "60000",
    "TOUCHLINE_CONFIG__BATCH_SIZE": "32",
    "TOUCHLINE_CONFIG__MIN_HISTORY": "1000",
    "TOUCHLINE_RATE__SAMPLES_PER_INSERT": "4",
    "TOUCHLINE_RATE__MIN_STEPS": "1000",
    "TOUCHLINE_STORAGE__DEVICE": "cpu",
    "TOUCHLINE_TABLES__DEMOS__BUFFER_SIZE": "20000",
    "TOUCHLINE_HTTP__ENABLED": "on",
    "TOUCHLINE_HTTP__PORT": "0",
}


def play(rng: np.random.Generator, skill: float) -> dict[str, np.ndarray]:
    """Returns an episode of a player who follows a ball on a pitch: state, images, actions and rewards, [rows, ...] each."""
    rows = int(rng.integers(60, 121))
    ball, speed = rng.uniform(16, 48, 2), rng.uniform(-2.2, 2.2, 2)
    player = rng.uniform(12, 52, 2)
    state, action, reward = (np.zeros((rows, width), np.float32) for width in (8, 2, 1))
    images = np.zeros((rows, 3, SIDE, SIDE), np.uint8)
    for row in range(rows):
        speed = np.where((ball + speed < 4) | (ball + speed > SIDE - 4), -speed, speed)
        ball = ball + speed
        push = np.clip(skill * (ball - player) * 0.12 + rng.normal(0, 0.4, 2), -2.5, 2.5)
        player = np.clip(player + push, 3, SIDE - 3)
        state[row] = [*ball / SIDE, *speed / 3, *player / SIDE, *(ball - player) / SIDE]
        action[row], reward[row] = push / 2.5, np.exp(-np.linalg.norm(ball - player) / 12)
        images[row] = draw_pitch(ball, player)
    action[0] = reward[0] = np.nan  # undefined: nothing led to the first observation
    return {"obs.state": state, "obs.image": images, "action": action, "reward": reward[:, 0]}


def draw_pitch(ball: np.ndarray, player: np.ndarray) -> np.ndarray:
    """Returns an image, [3, 64, 64] uint8."""
    y, x = np.mgrid[:SIDE, :SIDE]
    pitch = np.stack([np.full_like(x, 30), 104 + 12 * (x // 8 % 2), np.full_like(x, 48)]).astype(np.uint8)
    pitch[:, (abs(x - 31.5) < 1) | (abs(np.hypot(x - 31.5, y - 31.5) - 10) < 0.7)] = 150
    pitch[:, np.hypot(x - player[0], y - player[1]) < 4.2] = np.array([[224], [66], [58]], np.uint8)
    pitch[:, np.hypot(x - ball[0], y - ball[1]) < 2.6] = 245
    return pitch


def act(address: str, name: str, seed: int, over: threading.Event) -> None:
    """Adds episodes until ``over`` is set; one actor in six sends a malformed one now and then."""
    rng = np.random.default_rng(seed)
    with ReplayClient(address, actor=name) as client, suppress(TouchlineError):
        version = 0
        while not over.wait(rng.uniform(0.4, 1.2)):
            version += 1
            episode = play(rng, skill=min(1.0, 0.2 + version / 60))
            if seed % 6 == 5 and version % 12 == 11:
                episode["obs.state"] = episode["obs.state"][:, :7]
            with suppress(InvalidEpisodeError):
                client.add(episode, policy_version=version)


def learn(address: str, over: threading.Event, *, ring: bool) -> None:
    """Takes batches until ``over`` is set: through the ring 20 a second, otherwise 10."""
    with ReplayClient(address, as_numpy=True) as client, suppress(TouchlineError):
        for _ in client.batches(ring=ring):
            if over.wait(0.05 if ring else 0.1):
                return


@contextmanager
def serving() -> Iterator[tuple[str, str]]:
    """Runs a server with its load; yields the server's address and the page's."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | ENVIRONMENT | {"TOUCHLINE_STORAGE__DATA_DIR": str(Path(folder, "episodes"))}
        command = [sys.executable, "-m", "touchline_server", "serve", "--port", "0", "--log-level", "warning"]
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        address, page = (server.stdout.readline().rpartition(" ")[2].strip() for _ in range(2))
        played, learnt = threading.Event(), threading.Event()
        actors = [threading.Thread(target=act, args=(address, f"robot-{number:02d}", number, played)) for number in range(6)]
        learners = [threading.Thread(target=learn, args=(address, learnt), kwargs={"ring": ring}) for ring in (True, False)]
        for thread in (*actors, *learners):
            thread.start()
        try:
            yield address, page
        finally:
            # Actors first: the rate limit would hold them back without learners.
            for over, threads in ((played, actors), (learnt, learners)):
                over.set()
                for thread in threads:
                    thread.join()
            server.terminate()
            server.wait()


@contextmanager
def browsing(width: int, height: int, *, dark: bool) -> Iterator[webdriver.Chrome]:
    """A headless Chromium with a window of this size."""
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    driver = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    scheme = {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
    try:
        yield driver
    finally:
        driver.quit()


def save(driver: Any, name: str, width: int, height: int, *, top: int = 0) -> None:
    """Saves a part of the page as a PNG, and prints its size."""
    clip = {"x": 0, "y": top, "width": width, "height": height, "scale": 1}
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True, "clip": clip})
    path = IMAGES / f"page-{name}.png"
    path.write_bytes(base64.b64decode(shot["data"]))
    Image.open(path).convert("RGB").save(path, optimize=True)
    size = path.stat().st_size
    print(f"{path.name}: {width} x {height}, {size / 1000:.0f} kB")
    assert size <= MAX_BYTES, f"{size} bytes, expected at most {MAX_BYTES}"


def open_page(driver: Any, page: str) -> None:
    """Opens the page and waits until it shows episodes."""
    driver.get(page)
    WebDriverWait(driver, 60).until(lambda browser: browser.find_elements(By.CSS_SELECTOR, "#episodes .link"))
    time.sleep(2)  # a few snapshots, for the charts


def take(page: str) -> None:
    """Takes all screenshots."""
    for dark in (False, True):
        with browsing(1280, 860, dark=dark) as driver:
            open_page(driver, page)
            save(driver, "dark" if dark else "light", 1280, 860)
            if not dark:
                top = driver.execute_script("return document.querySelector('#flows-title').getBoundingClientRect().top + scrollY")
                save(driver, "tables", 1280, 860, top=int(top) - 12)
                driver.find_element(By.CSS_SELECTOR, "#episodes .link").click()
                WebDriverWait(driver, 60).until(lambda browser: browser.find_elements(By.CSS_SELECTOR, "#episode-plots .u-over"))
                driver.execute_script("document.querySelectorAll('.strip button')[9].click()")
                time.sleep(1)
                save(driver, "episode", 1280, 860, top=int(driver.execute_script("return scrollY")))
    with browsing(390, 844, dark=False) as driver:
        open_page(driver, page)
        save(driver, "phone", 390, 844)


def main() -> None:
    """Reads the command line, runs the load, and takes the screenshots."""
    parser = argparse.ArgumentParser(description="Takes the screenshots of the web page, docs/images/page-*.png.")
    parser.add_argument("--seconds", type=float, default=90, help="time that the load runs before the page is opened; default 90")
    parser.add_argument("--serve", action="store_true", help="only run server and load, until Ctrl-C")
    arguments = parser.parse_args()
    with serving() as (address, page):
        print(f"server on {address}, page on {page}", flush=True)
        if arguments.serve:
            with suppress(KeyboardInterrupt):
                threading.Event().wait()
            return
        time.sleep(arguments.seconds)
        take(page)


if __name__ == "__main__":
    main()
