"""What HDF5 would take to read a dataset, beside the values: a chunk at a time is inflated, to whatever length its bytes say.

HDF5 inflates a deflated chunk until its data ends, however small the chunk is said to be: 2 MB make 2 GB of a chunk of 1 kB. So what a
chunk could become is computed from the bytes that are stored of it, and where that is too much, they are inflated once and counted.
"""

from __future__ import annotations

import math
import zlib
from typing import Any

from touchline.datasets.errors import DatasetError
from touchline.datasets.size_limit import ADVICE

SPARE_BYTES = 256 << 20
"""That a chunk may have, where an episode may have less."""
PIECE_BYTES = 1 << 14
"""Of a deflated chunk, that are inflated at a time: to 16 MiB at most."""
DEFLATE, SHUFFLE, FLETCHER32, LZF = 1, 2, 3, 32000
"""Numbers of HDF5's filters; https://github.com/HDFGroup/hdf5_plugins/blob/master/docs/RegisteredFilterPlugins.md has all."""
MOST_OF = {DEFLATE: 1032, LZF: 264 // 3}
"""How many times its stored bytes a chunk can become: zlib's own figure; a reference of LZF is 3 bytes for up to 264."""
REPACK = "`h5repack -f SHUF -f GZIP=4 OLD NEW` makes a file of it that can be read"


def check_chunks(name: str, dataset: Any, max_bytes: int) -> None:
    """Raises DatasetError where reading a dataset could take much more memory than its values do.

    Args:
        name: of the dataset.
        dataset: an ``h5py.Dataset``.
        max_bytes: that an episode may have; a chunk may be as large, and of :data:`SPARE_BYTES` in any case.
    """
    if dataset.chunks is None:
        return
    chunk_bytes = math.prod(dataset.chunks) * dataset.id.get_type().get_size()
    most = max(max_bytes, SPARE_BYTES)
    if chunk_bytes > most:
        raise DatasetError(f"{name}: chunks of {chunk_bytes:,} bytes {dataset.chunks}, expected at most {most:,}; {ADVICE}")
    filters = _filters(name, dataset)
    compressor = next((code for code in filters if code in MOST_OF), None)
    # Of all chunks together: more than any one of them.
    if compressor is None or dataset.id.get_storage_size() * MOST_OF[compressor] <= most:
        return
    bit = 1 << filters.index(compressor)
    found: list[Any] = []
    dataset.id.chunk_iter(
        # One that the compressor was not used for is as long as it is.
        lambda chunk: found.append(chunk) if chunk.size * MOST_OF[compressor] > most and not chunk.filter_mask & bit else None
    )
    for chunk in found:
        if compressor != DEFLATE:
            raise DatasetError(f"{name}: a chunk of {chunk.size:,} bytes that cannot be checked, expected gzip or smaller chunks; {REPACK}")
        _check_deflated(name, dataset.id.read_direct_chunk(chunk.chunk_offset)[1], chunk_bytes)


def _filters(name: str, dataset: Any) -> list[int]:
    """Returns the numbers of a dataset's filters, of which one at most may make more of what is stored."""
    properties = dataset.id.get_create_plist()
    found = [properties.get_filter(number) for number in range(properties.get_nfilters())]
    for code, _, _, label in found:
        if code not in (DEFLATE, SHUFFLE, FLETCHER32, LZF):
            told = f"{code} ({label.decode(errors='replace')})"
            raise DatasetError(f"{name}: compressed by HDF5's filter {told}, expected gzip or lzf, whose sizes can be checked; {REPACK}")
    filters = [int(code) for code, *_ in found]
    compressors = [position for position, code in enumerate(filters) if code in MOST_OF]
    if compressors and (len(compressors) > 1 or any(code != FLETCHER32 for code in filters[compressors[0] + 1 :])):
        raise DatasetError(f"{name}: filters {filters} one after the other, expected one compressor, behind shuffle; {REPACK}")
    return filters


def _check_deflated(name: str, stored: bytes, chunk_bytes: int) -> None:
    inflater = zlib.decompressobj()
    size_bytes = 0
    try:
        for first in range(0, len(stored), PIECE_BYTES):
            size_bytes += len(inflater.decompress(stored[first : first + PIECE_BYTES]))
            if size_bytes > chunk_bytes:
                raise DatasetError(f"{name}: a chunk that inflates to more than {chunk_bytes:,} bytes, which is what it was said to have")
    except zlib.error as error:
        raise DatasetError(f"{name}: a chunk that cannot be inflated ({error})") from None
