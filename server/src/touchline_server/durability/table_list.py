"""The tables that were created at run time, as a data_dir remembers them, and the folders of dropped tables."""

from __future__ import annotations

import os
import shutil
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from touchline_protos.files.locks import lock, open_private, release, sync
from touchline_protos.log_lines import get_logger
from touchline_server.config.sections import check_table_name
from touchline_server.config.settings import to_toml
from touchline_server.config.source import why_unwritable
from touchline_server.durability.data_dir import LOCK_NAME, MARK_NAME
from touchline_server.durability.database import FILE_NAME
from touchline_server.errors import DamagedStoreError, StorageFailedError, StoreInUseError

logger = get_logger(__name__)

LIST_NAME = "tables.toml"
"""File of the list. With a dot, as the other names here: no table can have it."""

DROPPED_SUFFIX = ".dropped"
"""End of the name of a folder whose table was dropped; what is left of it is removed at the next start."""


class TableList:
    """The list of a data_dir: names of tables and their keys. For one thread at a time of the server that holds the data_dir.

    Args:
        data_dir: the folder.
        hold: whether to take the folder's lock: the default table has it unless that is not durable.

    Raises:
        StoreInUseError: another server holds the folder.
        StorageFailedError: it cannot be created or written.
    """

    def __init__(self, data_dir: str | Path, *, hold: bool) -> None:
        self._folder = Path(data_dir)
        self._lock: int | None = None
        self._owner = os.getpid()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            if hold:
                self._lock = open_private(self._folder / LOCK_NAME)
                lock(self._lock)
        except BlockingIOError:
            self.close()
            raise StoreInUseError(f"storage.data_dir: {self._folder} is in use by another touchline-server") from None
        except OSError as error:
            raise StorageFailedError(f"storage.data_dir: {self._folder}: {why_unwritable(error)}") from None
        for folder in self._folder.glob(f"*{DROPPED_SUFFIX}"):
            shutil.rmtree(folder, ignore_errors=True)

    def read(self) -> dict[str, dict[str, Any]]:
        """Returns the keys of each table by its name.

        Raises:
            DamagedStoreError: the file is not what was written.
            StorageFailedError: it cannot be read.
        """
        return read_table_list(self._folder)

    def write(self, tables: Mapping[str, Mapping[str, Any]]) -> None:
        """Replaces the list, on the disk when this returns.

        Raises:
            StorageFailedError: it cannot be written; the old list is still there.
        """
        unfinished = self._folder / f"{LIST_NAME}.unfinished"
        text = "\n".join(to_toml(name, keys) for name, keys in tables.items())
        try:
            unfinished.write_text(text, encoding="utf-8")
            sync(unfinished)
            unfinished.rename(self._folder / LIST_NAME)
            with suppress(OSError):  # some file systems cannot sync a folder
                sync(self._folder)
        except OSError as error:
            raise StorageFailedError(f"{self._folder / LIST_NAME}: {error.strerror}; nothing was changed") from None

    def has_folder(self, name: str) -> bool:
        """Returns whether there is a folder with the name of a table."""
        return (self._folder / name).exists()

    def orphans(self, names: set[str]) -> list[str]:
        """Returns the names of folders that hold a table's episodes, other than those of the named tables."""
        return sorted(file.parent.name for file in self._folder.glob(f"*/{FILE_NAME}") if file.parent.name not in names)

    def mark_dropped(self, name: str) -> Path | None:
        """Renames the folder of a dropped table, so that no start finds it again. Returns its new path; None if there is no folder.

        Raises:
            StorageFailedError: it cannot be renamed.
        """
        folder, aside = self._folder / name, self._folder / f"{name}{DROPPED_SUFFIX}"
        try:
            if not folder.exists():
                return None
            if aside.exists():
                shutil.rmtree(aside)
            folder.rename(aside)
            with suppress(OSError):
                sync(self._folder)
        except OSError as error:
            raise StorageFailedError(f"{folder}: {error.strerror}; the table's episodes are still there") from None
        return aside

    def close(self) -> None:
        """Releases the folder's lock."""
        if self._lock is not None:
            release(self._lock, owner=self._owner)
            self._lock = None


def stores_of(data_dir: Path) -> dict[str, Path]:
    """Returns the folder of each table that has a durable store in a data_dir, by the table's name: the default table's first."""
    try:
        folders = sorted(file.parent for name in (FILE_NAME, MARK_NAME) for file in data_dir.glob(f"*/{name}"))
        default = {"": data_dir} if any((data_dir / name).exists() for name in (FILE_NAME, MARK_NAME)) else {}
    except OSError as error:
        raise StorageFailedError(f"{data_dir}: {error.strerror}") from None
    return default | {folder.name: folder for folder in folders if _is_table_name(folder.name)}


def _is_table_name(name: str) -> bool:
    try:
        return bool(check_table_name(name))
    except ValueError:
        return False


def read_table_list(data_dir: Path) -> dict[str, dict[str, Any]]:
    """Returns what :meth:`TableList.read` does, for a folder that another process may hold."""
    file = data_dir / LIST_NAME
    try:
        tables = tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise StorageFailedError(f"{file}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DamagedStoreError(f"{file}: not what was written ({error}); restore a copy, or write its tables by hand") from None
    return {str(name): dict(keys) for name, keys in tables.items()}
