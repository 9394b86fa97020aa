"""Makes docs/images/status.svg, top.svg and doctor.svg: what these commands show while the soccer demo's server, actors and learner run.

.venv/bin/python docs/make_terminal_pictures.py [SECONDS]
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

from touchline import ReplayClient
from touchline._cli.status_feed import StatusFeed
from touchline._cli.top_screen import TopScreen

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
WIDTH, HEIGHT = 116, 24
SHOWN = "replay-host:50051"
"""Address in the pictures."""

sys.path.insert(0, str(ROOT / "examples"))
from processes import Children  # noqa: E402


def save(console: Console, name: str) -> None:
    svg = console.export_svg(title=f"touchline {name}", unique_id=name)
    # The fonts of rich's template come from the network; a reader's own monospace font does as well.
    while "@font-face" in svg:
        begin = svg.index("@font-face")
        svg = svg[:begin] + svg[svg.index("}", begin) + 1 :]
    svg = "\n".join(line.rstrip() for line in svg.splitlines() if line.strip()) + "\n"
    (IMAGES / f"{name}.svg").write_text(svg, encoding="utf-8")


def draw(address: str, name: str) -> None:
    """Draws what a command prints that ends by itself."""
    environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(WIDTH), "TERM": "xterm-256color"}
    command = [sys.executable, "-m", "touchline", name, "--address", address]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=name != "doctor")
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(Text.from_ansi(f"$ touchline {name}\n{found.stdout.rstrip().replace(address, SHOWN)}"))
    save(console, name)


def draw_top(address: str) -> None:
    console = Console(record=True, width=WIDTH, height=HEIGHT, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    changed = threading.Event()
    with ReplayClient(address) as client, StatusFeed(client, (), 1.0, changed.set) as feed:
        changed.wait(30)
        console.print(TopScreen(SHOWN).draw(feed, console))
    save(console, "top")


def main(seconds: float) -> None:
    with tempfile.TemporaryDirectory() as folder, Children(Path(folder)) as children:
        serve = (sys.executable, "-m", "touchline_server", "serve", "--config", str(ROOT / "cfg" / "demo.toml"), "--port", "0")
        server = children.start("server", *serve, variables={"TOUCHLINE_HTTP__ENABLED": "off"})
        address = server.wait_for_line("listening on ", timeout_s=120)
        examples = ROOT / "examples"
        for number in range(2):
            actor = (sys.executable, str(examples / "actor.py"), "--address", address, "--actor-name", f"actor-{number}")
            children.start(f"actor-{number}", *actor, "--seed", str(number), "--match-seconds", "5")
        learner = (sys.executable, str(examples / "learner.py"), "--address", address, "--metrics", str(Path(folder, "learner.jsonl")))
        children.start("learner", *learner)
        time.sleep(seconds)
        for name in ("status", "doctor"):
            draw(address, name)
        draw_top(address)


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 60.0)
