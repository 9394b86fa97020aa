"""Small files that announce gigabytes, or hold them compressed; each has one good episode before and behind the bomb where it can."""

from __future__ import annotations

import io
import json
import pickle
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
TEXT_BYTES = LONG_BYTES + 0x1357
"""A number that occurs in a file only on purpose."""
HUGE = 10**12


def deflated_zeros(size_bytes: int) -> bytes:
    """Returns a zlib stream of ``size_bytes`` zeros, a multiple of 16 MiB: one flushed block, over and over."""
    compressor = zlib.compressobj(9)
    begin = compressor.compress(b"") + compressor.flush(zlib.Z_FULL_FLUSH)
    block = compressor.compress(bytes(16 * MIB)) + compressor.flush(zlib.Z_FULL_FLUSH)
    ends = zlib.compressobj(9, wbits=-15).flush()
    checksum = struct.pack(">HH", size_bytes % 65521, 1)  # Adler's, of zeros
    return begin + block * (size_bytes // (16 * MIB)) + ends + checksum


# NPZ.


def npy(shape: tuple[int, ...], *, version: int = 1, pad: int = 0) -> bytes:
    """Returns the header of an ``.npy`` of float32."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode() + b" " * pad + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(header)) + header


def write_npz(path: Path, name: str, *content: bytes) -> Path:
    """Writes a member of these pieces between two good episodes, deflated."""
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
    """All of it is there: zeros enough for four episodes."""
    return write_npz(path, "obs.npy", npy((LONG_BYTES // 4,)), *[bytes(16 * MIB)] * (LONG_BYTES // (16 * MIB)))


def npz_lying_about_a_member(path: Path) -> Path:
    """Its header announces what an episode may have, of which it has a hundred bytes."""
    return write_npz(path, "obs.npy", npy((2 * MIB,)), bytes(100))


def npz_long_header(path: Path) -> Path:
    return write_npz(path, "obs.npy", npy((4,), version=2, pad=LONG_BYTES))


def npz_long_text(path: Path) -> Path:
    return write_npz(path, "episode.json", b" " * TEXT_BYTES)


def npz_understated_text(path: Path) -> Path:
    """The directory says that the text has 20 bytes, of which a hundred million would come out."""
    content = npz_long_text(path).read_bytes()
    return _overwrite(path, content.replace(struct.pack("<I", TEXT_BYTES), struct.pack("<I", 20)))


def npz_rows_of_nothing(path: Path) -> Path:
    return write_npz(path, "obs.npy", npy((HUGE, 0)))


def _overwrite(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# HDF5.


def write_hdf5(path: Path, bomb: Callable[[Any], Any]) -> Path:
    """Writes two good episodes, and between them one that a function makes in its group."""
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


def hdf5_lying_chunk(path: Path) -> Path:
    def bomb(group: Any) -> None:
        group.create_dataset("obs", (1024,), "u1", chunks=(1024,), compression="gzip").id.write_direct_chunk(
            (0,), deflated_zeros(BOMB_BYTES)
        )

    return write_hdf5(path, bomb)


def hdf5_chunk_larger_than_its_dataset(path: Path) -> Path:
    def bomb(group: Any) -> None:
        dataset = group.create_dataset("obs", (4,), "u1", maxshape=(None,), chunks=(BOMB_BYTES,), compression="gzip")
        dataset.id.write_direct_chunk((0,), deflated_zeros(BOMB_BYTES))

    return write_hdf5(path, bomb)


def hdf5_twice_compressed(path: Path) -> Path:
    def bomb(group: Any) -> None:
        properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        properties.set_chunk((1024,))
        properties.set_deflate(9)
        properties.set_deflate(9)
        space = h5py.h5s.create_simple((1024,))
        dataset = h5py.h5d.create(group.id, b"obs", h5py.h5t.NATIVE_UINT8, space, properties)
        dataset.write_direct_chunk((0,), zlib.compress(deflated_zeros(BOMB_BYTES)))

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
    """Four levels of nine names each, all of them links to one group a level."""

    def bomb(group: Any) -> None:
        below = group.create_group("level")
        for _ in range(4):
            level = group.file.create_group(None)
            for number in range(9):
                level[str(number)] = below
            below = level
        group["obs"] = below

    return write_hdf5(path, bomb)


# .pt, of which one that is refused is refused whole: all its episodes are of one size.


def pt_expanded(path: Path) -> Path:
    torch.save({"obs": torch.zeros(1).expand(3, 10**6, 10**6), "action": torch.zeros(3, 10**6), "reward": torch.zeros(3, 10**6)}, path)
    return path


class _Bytes:
    def __reduce__(self) -> tuple[Any, ...]:
        return bytearray, (BOMB_BYTES,)


def pt_bytearray(path: Path) -> Path:
    torch.save({"obs": _Bytes()}, path)
    return path


def pt_bytearray_of_before_zip_files(path: Path) -> Path:
    torch.save({"obs": _Bytes()}, path, _use_new_zipfile_serialization=False)
    return path


def pt_deflated(path: Path) -> Path:
    torch.save({"obs": torch.zeros(2, 8 * MIB), "action": torch.zeros(2, 8 * MIB), "reward": torch.zeros(2, 8 * MIB)}, path)
    with zipfile.ZipFile(path) as stored, zipfile.ZipFile(path.with_suffix(".new"), "w", zipfile.ZIP_DEFLATED, compresslevel=1) as deflated:
        for record in stored.infolist():
            deflated.writestr(record.filename, stored.read(record))
    path.with_suffix(".new").replace(path)
    return path


def pt_sparse(path: Path) -> Path:
    sparse = torch.sparse_coo_tensor(torch.zeros(3, 1, dtype=torch.int64), torch.ones(1), (3, 10**6, 10**3), check_invariants=True)
    torch.save({"obs": sparse, "action": torch.zeros(3, 10**6), "reward": torch.zeros(3, 10**6)}, path)
    return path


def pt_storage_of_before_zip_files(path: Path) -> Path:
    """Its pickle announces a storage of 2 GiB; it has 24 bytes."""
    torch.save({name: torch.full((2, 3), 7.0) for name in ("obs", "action", "reward")}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    announced = pickle.BININT1 + bytes([6])
    assert content.count(announced) >= 3
    return _overwrite(path, content.replace(announced, pickle.BININT + struct.pack("<i", 1 << 29), 1))


# Minari.


def jpeg_announcing(width: int, height: int) -> np.ndarray:
    """Returns a JPEG of 64 by 64 whose header says something else."""
    content = io.BytesIO()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(content, format="JPEG")
    true, false = struct.pack(">HH", 64, 64), struct.pack(">HH", height, width)
    assert content.getvalue().count(b"\xff\xc0\x00\x11\x08" + true) == 1
    return np.frombuffer(content.getvalue().replace(b"\xff\xc0\x00\x11\x08" + true, b"\xff\xc0\x00\x11\x08" + false), np.uint8)


def change_minari(folder: Path, number: int, name: str, **dataset: Any) -> Path:
    """Replaces a dataset of an episode."""
    with h5py.File(folder / "data" / "main_data.hdf5", "a") as file:
        group = file[f"episode_{number}"]
        del group[name]
        group.create_dataset(name, **dataset)
    return folder


def announce_minari_episodes(folder: Path, count: int) -> Path:
    metadata = folder / "data" / "metadata.json"
    metadata.write_text(json.dumps(json.loads(metadata.read_text()) | {"total_episodes": count}))
    return folder
