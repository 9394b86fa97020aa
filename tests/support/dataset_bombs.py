"""Small files that announce gigabytes, or hold them compressed; with a good episode before and after if the format permits."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from PIL import Image

from support.dataset_cases import make_episode

MIB = 1 << 20
BOMB_BYTES = 512 * MIB
LONG_BYTES = 128 * MIB
HUGE = 10**12


def deflated_zeros(size_bytes: int) -> bytes:
    """Returns a zlib stream of ``size_bytes`` zeros, a multiple of 16 MiB: one flushed block, repeated."""
    compressor = zlib.compressobj(9)
    begin = compressor.compress(b"") + compressor.flush(zlib.Z_FULL_FLUSH)
    block = compressor.compress(bytes(16 * MIB)) + compressor.flush(zlib.Z_FULL_FLUSH)
    ends = zlib.compressobj(9, wbits=-15).flush()
    checksum = struct.pack(">HH", size_bytes % 65521, 1)  # Adler-32 of zeros
    return begin + block * (size_bytes // (16 * MIB)) + ends + checksum


# NPZ.


def npy(shape: tuple[int, ...]) -> bytes:
    """Returns the header of an ``.npy`` of float32."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode() + b"\n"
    return b"\x93NUMPY" + bytes([1, 0]) + struct.pack("<H", len(header)) + header


def write_npz(path: Path, name: str, *content: bytes) -> Path:
    """Writes a deflated member with this content between two good episodes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        _add_npz(file, 0)
        with file.open(f"1/{name}", "w") as member:
            for piece in content:
                member.write(piece)
        _add_npz(file, 2)
    return path


def _add_npz(file: zipfile.ZipFile, number: int) -> None:
    for name, column in make_episode(number).items():
        content = io.BytesIO()
        np.save(content, column)
        file.writestr(f"{number}/{name}.npy", content.getvalue())


def npz_announcing(path: Path) -> Path:
    return write_npz(path, "obs.npy", npy((HUGE,)))


def npz_zeros(path: Path) -> Path:
    """Writes zeros, really contained in the file, of four times an episode's limit."""
    return write_npz(path, "obs.npy", npy((LONG_BYTES // 4,)), *[bytes(16 * MIB)] * (LONG_BYTES // (16 * MIB)))


def npz_lying_about_a_member(path: Path) -> Path:
    """Writes a header that announces an episode within the limit, with only 100 bytes after it."""
    return write_npz(path, "obs.npy", npy((2 * MIB,)), bytes(100))


def npz_long_text(path: Path) -> Path:
    return write_npz(path, "episode.json", b" " * LONG_BYTES)


def npz_rows_of_nothing(path: Path) -> Path:
    return write_npz(path, "obs.npy", npy((HUGE, 0)))


# HDF5.


def write_hdf5(path: Path, bomb: Callable[[Any], Any]) -> Path:
    """Writes two good episodes, and between them one that ``bomb`` writes into its group."""
    with h5py.File(path, "w") as file:
        for number in (0, 2):
            for name, column in make_episode(number).items():
                file[f"episodes/{number}/{name}"] = column
        bomb(file.create_group("episodes/1"))
    return path


def hdf5_without_storage(path: Path) -> Path:
    return write_hdf5(path, lambda group: group.create_dataset("obs", (HUGE,), "f4", chunks=(1024,), fillvalue=1.0))


def hdf5_zeros(path: Path) -> Path:
    chunk = deflated_zeros(16 * MIB)

    def bomb(group: Any) -> None:
        dataset = group.create_dataset("obs", (BOMB_BYTES,), "u1", chunks=(16 * MIB,), compression="gzip")
        for first in range(0, BOMB_BYTES, 16 * MIB):
            dataset.id.write_direct_chunk((first,), chunk)

    return write_hdf5(path, bomb)


def hdf5_filter_of_another_kind(path: Path) -> Path:
    return write_hdf5(path, lambda group: group.create_dataset("obs", data=np.zeros(11, np.int32), scaleoffset=0))


def hdf5_values_of_any_length(path: Path) -> Path:
    return write_hdf5(path, lambda group: group.create_dataset("obs", (11,), h5py.vlen_dtype(np.float32)))


def hdf5_group_in_itself(path: Path) -> Path:
    def bomb(group: Any) -> None:
        group["obs/again"] = group

    return write_hdf5(path, bomb)


def hdf5_groups_of_groups(path: Path) -> Path:
    """Writes four levels of nine links each, all to the same group of the next level: 6,561 groups by name."""

    def bomb(group: Any) -> None:
        below = group.create_group("level")
        for _ in range(4):
            level = group.file.create_group(None)
            for number in range(9):
                level[str(number)] = below
            below = level
        group["obs"] = below

    return write_hdf5(path, bomb)


# .pt: all episodes of a file have the same size, so a file is refused as a whole.


def pt_expanded(path: Path) -> Path:
    torch.save({"obs": torch.zeros(1).expand(3, 10**6, 10**6), "action": torch.zeros(3, 10**6), "reward": torch.zeros(3, 10**6)}, path)
    return path


def pt_sparse(path: Path) -> Path:
    sparse = torch.sparse_coo_tensor(torch.zeros(3, 1, dtype=torch.int64), torch.ones(1), (3, 10**6, 10**3), check_invariants=True)
    torch.save({"obs": sparse, "action": torch.zeros(3, 10**6), "reward": torch.zeros(3, 10**6)}, path)
    return path


# Minari.


def jpeg_announcing(width: int, height: int) -> np.ndarray:
    """Returns a JPEG of 64 by 64 pixels whose header announces another size."""
    content = io.BytesIO()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(content, format="JPEG")
    true, false = struct.pack(">HH", 64, 64), struct.pack(">HH", height, width)
    assert content.getvalue().count(b"\xff\xc0\x00\x11\x08" + true) == 1
    return np.frombuffer(content.getvalue().replace(b"\xff\xc0\x00\x11\x08" + true, b"\xff\xc0\x00\x11\x08" + false), np.uint8)


def change_minari(folder: Path, number: int, name: str, **dataset: Any) -> Path:
    """Replaces a dataset of an episode by another one."""
    with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
        group = file[f"episode_{number}"]
        del group[name]
        group.create_dataset(name, **dataset)
    return folder
