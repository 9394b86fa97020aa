"""A block of episodes whose tensors stay on their device: checked there, with small copies to the host for all of them together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from touchline_protos.codec import Episode
from touchline_protos.types.flatten import ColumnError
from touchline_server.errors import InvalidEpisodeError
from touchline_server.store.episode_block import EpisodeBlock, Origin, kept_rows
from touchline_server.store.inserts import AddRequest
from touchline_server.store.tensors import as_array, numpy_dtype

FIRST_ROWS = ("action", "task")
"""Columns of which the host needs the first row of each episode: for the warning about actions in row 0, and for the law ``task``."""


def common_device(columns: Mapping[str, object]) -> torch.device | None:
    """Returns the CUDA device on which all of the columns are; None if there is no such."""
    devices = {value.device if isinstance(value, torch.Tensor) else None for value in columns.values()}
    device = devices.pop()
    return device if not devices and device is not None and device.type == "cuda" else None


def device_block(
    columns: Mapping[str, torch.Tensor], lengths: Sequence[int], origins: Sequence[Origin], *, incoming: bool, allow_non_finite: bool
) -> EpisodeBlock:
    """Returns a block of episodes on a device, whose values are checked. Waits for the current stream.

    Args:
        columns: [episodes, T, ...] by dotted name, on one device, checked to fit each other.
        lengths: rows of each episode, the first of its T.
        origins: what else each episode carries.
        incoming: the row convention.
        allow_non_finite: whether NaN and infinity are allowed in defined values.

    Raises:
        ColumnError: a column has a dtype that cannot be stored.
        InvalidEpisodeError: a defined value is not finite; the message names episode and row.
    """
    episodes, rows = next(iter(columns.values())).shape[:2]
    keep = kept_rows(lengths, rows)
    device = next(iter(columns.values())).device
    index = None if keep is None else torch.from_numpy(keep).to(device)
    packed, dtypes = {}, {}
    for name, column in columns.items():
        flat = column.detach().reshape(episodes * rows, *column.shape[2:])
        packed[name] = flat if index is None else flat.index_select(0, index)
        try:
            dtypes[name] = numpy_dtype(column.dtype)
        except KeyError:
            raise ColumnError(f"{name}: dtype {column.dtype}, expected one of numbers that a column can have") from None
    firsts = {name: columns[name].detach()[:, 0] for name in FIRST_ROWS if name in columns}
    bad = {} if allow_non_finite else _bad_rows(packed, lengths, incoming=incoming)
    on_host = {name: as_array(tensor.cpu()) for name, tensor in firsts.items()}
    if bad:
        _refuse(dict(zip(bad, torch.stack(list(bad.values())).tolist(), strict=True)), lengths)
    requests = []
    for number, (length, origin) in enumerate(zip(lengths, origins, strict=True)):
        episode = {}
        for name, column in packed.items():
            # All rows share the memory of one, so this costs nothing; only dtype, shape and first row are looked at.
            row = on_host[name][number] if name in on_host else np.zeros(column.shape[1:], dtypes[name])
            episode[name] = np.broadcast_to(row, (length, *column.shape[1:]))
        made = Episode(episode, actor=origin.actor, policy_version=origin.policy_version)
        requests.append(AddRequest(made, 0, values_checked=True))
    return EpisodeBlock(packed, requests, device)


def _bad_rows(packed: Mapping[str, torch.Tensor], lengths: Sequence[int], *, incoming: bool) -> dict[str, torch.Tensor]:
    """Returns, on the device, the first row with a defined value that is not finite, or -1, of each column that is checked.

    The same values are defined as for :func:`touchline_protos.types.rules.check_finite`.
    """
    ends = np.cumsum(lengths)
    undefined = ends - np.asarray(lengths) if incoming else ends - 1
    found = {}
    for name, column in packed.items():
        transition = name in ("action", "reward", "done")
        if not column.is_floating_point() or not (transition or name == "obs" or name.startswith("obs.")):
            continue
        bad = ~torch.isfinite(column).reshape(len(column), -1).all(dim=1)
        if transition:
            bad[torch.from_numpy(undefined).to(column.device)] = False
        found[name] = torch.where(bad.any(), bad.to(torch.uint8).argmax(), -1)
    return found


def _refuse(first_bad: Mapping[str, int], lengths: Sequence[int]) -> None:
    """Raises InvalidEpisodeError if any column has a bad row."""
    ends = np.cumsum(lengths)
    for name, row in first_bad.items():
        if row >= 0:
            number = int(np.searchsorted(ends, row, side="right"))
            begin = int(ends[number]) - lengths[number]
            raise InvalidEpisodeError(
                f"episode {number}: {name}: a value that is not finite in row {row - begin}, expected finite values "
                "(storage.allow_non_finite = true accepts them)"
            )
