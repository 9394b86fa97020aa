"""Rows of image columns as PNG, without a library for images: a PNG is a header and the rows of pixels, compressed by zlib."""

from __future__ import annotations

import struct
import zlib

import numpy as np

MIN_SIDE = 8
"""Fewest pixels of a side: a smaller array is a vector of bytes."""

COMPRESSION = 3
"""Level of zlib: about the size of the default, in half of the time."""


def is_image(dtype: np.dtype, shape: tuple[int, ...]) -> bool:
    """Returns whether rows of a column are images: uint8, [H, W], [C, H, W] or [H, W, C], or a stack of these along a first axis."""
    return dtype == np.uint8 and _channel_axis(shape) is not None


def newest_frame(row: np.ndarray) -> np.ndarray:
    """Returns the picture in a row of an image column: of a stack of frames, the last one.

    A number of channels that 3 divides is a stack of RGB frames, any other one a stack of grey frames.

    Args:
        row: uint8, a shape of :func:`is_image`.

    Returns:
        [H, W] or [H, W, 3] uint8, a view.
    """
    while row.ndim == 4:
        row = row[-1]
    if row.ndim == 2:
        return row
    axis = _channel_axis(row.shape)
    assert axis is not None, "the shape of an image"
    pixels = np.moveaxis(row, axis, 2)
    return pixels[:, :, -3:] if pixels.shape[2] % 3 == 0 else pixels[:, :, -1]


def thin_out(pixels: np.ndarray, max_side: int) -> np.ndarray:
    """Returns every k-th pixel of a picture [H, W, ...], so that no side is longer than ``max_side``."""
    step = -(-max(pixels.shape[:2]) // max_side)
    return pixels[::step, ::step]


def encode_png(pixels: np.ndarray) -> bytes:
    """Returns a picture, [H, W] or [H, W, 3] uint8, as a PNG (ISO/IEC 15948) of 8 bits a sample."""
    height, width = pixels.shape[:2]
    colour = 2 if pixels.ndim == 3 else 0
    lines = np.zeros((height, 1 + width * (3 if colour else 1)), np.uint8)  # each line begins with its filter: none
    lines[:, 1:] = pixels.reshape(height, -1)
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes(), COMPRESSION)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


def _channel_axis(shape: tuple[int, ...]) -> int | None:
    """Returns the axis of the channels, -1 for a grey picture without one; None if the shape is not an image's."""
    if len(shape) == 4 and shape[0]:
        return _channel_axis(shape[1:])
    if len(shape) == 2:
        return -1 if min(shape) >= MIN_SIDE else None
    if len(shape) != 3 or not min(shape):
        return None
    for axis in (0, 2):
        sides = [side for at, side in enumerate(shape) if at != axis]
        if min(sides) >= MIN_SIDE and shape[axis] < min(sides):
            return axis
    return None
