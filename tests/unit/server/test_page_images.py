"""Images of the episode browser: which columns are images, which picture of a stack is shown, and the PNG, read by another decoder."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from touchline_server.http.images import encode_png, is_image, newest_frame, thin_out


def pixels_of(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("shape", [(64, 64), (3, 64, 64), (64, 48, 3), (9, 64, 64), (4, 84, 84), (84, 84, 4), (3, 64, 64, 3), (2, 8, 9)])
def test_bytes_in_the_shape_of_a_picture_are_an_image(shape: tuple[int, ...]) -> None:
    assert is_image(np.dtype(np.uint8), shape)


@pytest.mark.parametrize("shape", [(), (3,), (64,), (7, 64), (3, 4, 4), (0, 64, 64), (64, 64, 64), (1, 1, 64, 4)])
def test_other_shapes_are_not(shape: tuple[int, ...]) -> None:
    assert not is_image(np.dtype(np.uint8), shape)


def test_other_dtypes_are_not() -> None:
    assert not is_image(np.dtype(np.float32), (3, 64, 64))


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((64, 48), lambda row: row),
        ((1, 64, 48), lambda row: row[0]),
        ((3, 64, 48), lambda row: row.transpose(1, 2, 0)),
        ((9, 64, 48), lambda row: row[6:].transpose(1, 2, 0)),
        ((4, 64, 48), lambda row: row[3]),
        ((64, 48, 3), lambda row: row),
        ((64, 48, 12), lambda row: row[:, :, 9:]),
        ((64, 48, 4), lambda row: row[:, :, 3]),
        ((5, 64, 48, 3), lambda row: row[4]),
        ((5, 3, 64, 48), lambda row: row[4].transpose(1, 2, 0)),
    ],
)
def test_newest_picture_of_a_stack_is_shown(shape: tuple[int, ...], expected: object) -> None:
    row = pixels_of(*shape)

    np.testing.assert_array_equal(newest_frame(row), expected(row))  # type: ignore[operator]


@settings(max_examples=25)
@given(height=st.integers(1, 40), width=st.integers(1, 40), colour=st.booleans(), seed=st.integers(0, 2**32 - 1))
def test_another_decoder_reads_the_same_pixels(height: int, width: int, colour: bool, seed: int) -> None:
    shape = (height, width, 3) if colour else (height, width)
    pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)

    image = Image.open(io.BytesIO(encode_png(pixels)))

    assert image.mode == ("RGB" if colour else "L")
    np.testing.assert_array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize(("side", "shape"), [(64, (64, 48, 3)), (63, (32, 24, 3)), (20, (16, 12, 3)), (1, (1, 1, 3))])
def test_thinned_picture_keeps_within_the_side(side: int, shape: tuple[int, ...]) -> None:
    assert thin_out(pixels_of(64, 48, 3), side).shape == shape
