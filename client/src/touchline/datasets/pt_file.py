"""What a ``.pt`` file says that it holds, looked at before torch reads it: torch takes the memory that a file asks for.

torch.save writes a zip file of records that are not compressed, so that they can be mapped; before torch 1.6 it wrote pickles and values
one behind the other. What the pickles call is named in them, and needs nothing to be run to be read.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from touchline.datasets.errors import DatasetError

PICKLE_BYTES = 64 << 20
"""Most that a file's pickle may have: it names tensors, and holds none."""
LEGACY_PICKLES = 5
"""Before the values, in the layout that was there before zip files."""
HARMLESS = re.compile(
    r"torch ([A-Za-z0-9]+Storage|[a-z]+\d*|Size)|torch\.storage (Typed|Untyped)Storage|collections OrderedDict|(__builtin__|builtins) set"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|tensor_v3|parameter)"
    r"|tensordict\._td TensorDict|tensordict\.tensordict TensorDict|tensordict\._reductions _make_td"
)
"""What tensors and TensorDicts are pickled with. Some others that torch lets through (bytearray, say) take memory for a mere number."""


def check_file(path: Path) -> None:
    """Raises DatasetError where reading a file could take much more memory than the file has bytes.

    Args:
        path: of the file; one that torch did not write is left to torch to say so.
    """
    try:
        with path.open("rb") as file:
            names = set(_of_zip(path, file) if zipfile.is_zipfile(file) else _of_pickles(file))
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, IndexError, NotImplementedError, RuntimeError) as error:
        raise DatasetError(f"{path}: no file of torch.save, or a damaged one ({error})") from None
    others = sorted(name.replace(" ", ".") for name in names if not HARMLESS.fullmatch(name))
    if others:
        raise DatasetError(
            f"{path}: it holds {', '.join(others[:5])}, expected a TensorDict or a dict of tensors. If you trust whoever made the file, "
            "--trust-pickle (trust_pickle=True) unpickles anything, which runs whatever code is in it"
        )


def _of_zip(path: Path, file: IO[bytes]) -> Iterator[str]:
    """Yields what the pickle of a zip file names."""
    size_bytes = path.stat().st_size
    with zipfile.ZipFile(file) as records:
        announced = 0
        for record in records.infolist():
            announced += record.file_size
            if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size or announced > size_bytes:
                raise DatasetError(
                    f"{path}: {record.filename}: {record.file_size:,} bytes in {record.compress_size:,}, in a file of {size_bytes:,}, "
                    "expected records that are not compressed, as torch.save writes them; save it anew"
                )
            if record.filename.endswith("/data.pkl"):
                if record.file_size > PICKLE_BYTES:
                    raise DatasetError(f"{path}: {record.filename}: {record.file_size:,} bytes, expected at most {PICKLE_BYTES:,}")
                with records.open(record) as pickled:
                    yield from _named(pickled)


def _of_pickles(file: IO[bytes]) -> Iterator[str]:
    """Yields what the pickles at the beginning of a file name."""
    file.seek(0)
    for _ in range(LEGACY_PICKLES):
        yield from _named(file)


def _named(file: IO[bytes]) -> Iterator[str]:
    for operation, argument, _ in pickletools.genops(file):
        if operation.name == "GLOBAL":
            yield str(argument)
