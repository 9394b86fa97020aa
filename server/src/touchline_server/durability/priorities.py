"""The priorities of a durable store: a file beside the database, rewritten now and then, without which a start only loses priorities."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np

from touchline_protos.files.locks import sync
from touchline_protos.log_lines import get_logger
from touchline_server.selectors.prioritized import SavedPriorities
from touchline_server.store.episode_store import EpisodeStore

FILE_NAME = "priorities"
"""Name of the file in the store's folder."""

SAVE_INTERVAL_S = 60.0
"""Longest time from an update of a priority until it is in the file, while the disk takes it: a crash loses as much."""

FORMAT = 1
"""Version of the file's format."""

MAX_HEADER_BYTES = 4096

logger = get_logger(__name__)


class PriorityKeeper:
    """Loads a table's priorities, and saves them every :data:`SAVE_INTERVAL_S` and at the end if they have changed.

    The file is a help, not a promise: if it cannot be read or written, a line is logged and the table goes on.

    Args:
        store: the store, restored already.
        folder: the folder of the durable store, which this process has locked.
    """

    def __init__(self, store: EpisodeStore, folder: Path) -> None:
        self._store = store
        self._path = folder / FILE_NAME
        self._process = os.getpid()
        self._saved_changes = 0
        self._stop = threading.Event()
        self._load()
        self._thread = threading.Thread(target=self._run, name="touchline-priorities", daemon=True)
        self._thread.start()

    def close(self, *, save: bool = True) -> None:
        """Ends the thread, and saves what has changed. Does nothing in a forked child, or the second time.

        Args:
            save: False if the folder is to be deleted.
        """
        if self._process != os.getpid() or self._stop.is_set():
            return
        self._stop.set()
        self._thread.join()
        if save:
            self.save()

    def save(self) -> None:
        """Writes the priorities if they have changed since they were last written."""
        saved = self._store.save_priorities(self._saved_changes)
        if saved is None:
            return
        try:
            write_priorities(self._path, saved, self._store.store_generation)
        except OSError as error:
            logger.warning("%s: priorities were not saved, trying again later: %s", self._path, error.strerror)
        else:
            self._saved_changes = saved.changes

    def _run(self) -> None:
        while not self._stop.wait(SAVE_INTERVAL_S):
            self.save()

    def _load(self) -> None:
        try:
            saved = read_priorities(self._path, self._store.store_generation)
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:
            self._saved_changes = -1  # replace it at the next save
            reason = error.strerror if isinstance(error, OSError) else error
            logger.warning("%s: priorities are not restored, every step is new again: %s", self._path, reason)
            return
        episodes = self._store.load_priorities(saved)
        logger.info("%s: priorities of %d episodes are restored", self._path, episodes)


def write_priorities(path: Path, saved: SavedPriorities, store_generation: int) -> None:
    """Writes priorities to a file, all or nothing: a line of JSON, ids and lengths of the episodes (int64), priorities (float32).

    Raises:
        OSError: the file cannot be written.
    """
    body = saved.episodes.astype("<i8").tobytes() + saved.priorities.astype("<f4").tobytes()
    header = {
        "touchline_priorities": FORMAT,
        "store_generation": store_generation,
        "highest": saved.highest,
        "episodes": len(saved.episodes),
        "steps": len(saved.priorities),
        "sha256": hashlib.sha256(body).hexdigest(),
    }
    unfinished = path.with_name(f"{path.name}.unfinished")
    with open(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
        file.write(json.dumps(header).encode() + b"\n" + body)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    sync(path.parent)


def read_priorities(path: Path, store_generation: int) -> SavedPriorities:
    """Returns the priorities in a file.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be read.
        ValueError: it is damaged, of another format, or of another store.
    """
    with open(path, "rb") as file:
        line = file.readline(MAX_HEADER_BYTES)
        body = file.read()
    header = _header(line)
    if header.get("touchline_priorities") != FORMAT:
        raise ValueError(f"format {header.get('touchline_priorities')}, expected {FORMAT}")
    if header.get("store_generation") != store_generation:
        raise ValueError("they belong to another store")
    if hashlib.sha256(body).hexdigest() != header.get("sha256"):
        raise ValueError("the file is damaged")
    # The checksum proves that the rest is as it was written.
    ids_bytes = 16 * int(header["episodes"])
    episodes = np.frombuffer(body[:ids_bytes], "<i8").reshape(-1, 2)
    priorities = np.frombuffer(body[ids_bytes:], "<f4")
    return SavedPriorities(0, float(header["highest"]), episodes, priorities)


def _header(line: bytes) -> dict[str, Any]:
    try:
        header = json.loads(line)
    except ValueError:
        header = None
    if not isinstance(header, dict):
        raise ValueError("the file is damaged")
    return header
