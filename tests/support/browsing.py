"""The page as a test sees it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from selenium.common.exceptions import NoSuchElementException, StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.wait import WebDriverWait

T = TypeVar("T")

KEYS = Keys
AXE = Path(__file__).parents[1] / "browser/axe/axe.min.js"
SERIOUS = ("serious", "critical")

WAIT_S = 40.0
"""Longest wait for what the page shows a second or so later."""


class Page:
    """The page of a server in a browser.

    Args:
        browser: the driver.
        address: address of the page, ``HOST:PORT``.
    """

    def __init__(self, browser: Any, address: str) -> None:
        self.browser = browser
        self.address = address

    def open(self) -> None:
        """Opens the page and waits for its first snapshot."""
        self.browser.get(f"http://{self.address}/")
        self.wait(lambda: self.text("#connection") == "Live" and self.all("#tiles dt"), "the page is live")

    def wait(self, condition: Callable[[], T], what: str) -> T:
        """Waits until a condition holds, and returns its value."""
        ignored = (NoSuchElementException, StaleElementReferenceException)
        return WebDriverWait(self.browser, WAIT_S, 0.1, ignored).until(lambda _: condition(), f"{what}: not within {WAIT_S} s")

    def find(self, selector: str) -> Any:
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[Any]:
        found: list[Any] = self.browser.find_elements(By.CSS_SELECTOR, selector)
        return found

    def text(self, selector: str) -> str:
        text: str = self.find(selector).text
        return text

    def run(self, script: str) -> Any:
        return self.browser.execute_script(script)

    def fact(self, facts: str, name: str) -> float | None:
        """Returns the number behind an entry of a list of facts."""
        script = """
            const [list, name] = arguments;
            const entry = [...document.getElementById(list).children].find((one) => one.querySelector("dt").textContent === name);
            return entry?.querySelector(".main").dataset.value ?? null"""
        value = self.browser.execute_script(script, facts, name)
        return None if value is None else float(value)

    def column(self, table: str, column: str, inner: str = "") -> list[Any]:
        """Returns the values behind a column of a table, from the first row to the last: numbers if they are."""
        script = """
            const [table, column, inner] = arguments;
            return [...document.querySelectorAll(`#${table} tbody [data-column="${column}"] ${inner}`)].map((cell) => cell.dataset.value)"""
        return [_number(value) for value in self.browser.execute_script(script, table, column, inner)]

    def violations(self) -> list[str]:
        """Returns the rules of axe-core that the page violates seriously."""
        self.browser.execute_script(AXE.read_text("utf-8"))
        found = self.browser.execute_async_script("axe.run().then(arguments[0])")["violations"]
        return sorted(rule["id"] for rule in found if rule["impact"] in SERIOUS)


def _number(value: str) -> float | str:
    try:
        return float(value)
    except ValueError:
        return value


def show_as(driver: Any, *, width: int = 1280, height: int = 900, dark: bool = False) -> None:
    """Sets the size of the window, and whether the system is dark."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    scheme = {"features": [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
