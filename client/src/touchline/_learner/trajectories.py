"""Assembles the trajectories that TorchRL's collectors deliver in pieces. Needs torch and tensordict."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from tensordict import TensorDict, is_non_tensor, is_tensor_collection

from touchline.errors import InvalidArgumentError, InvalidEpisodeError
from touchline_protos.log_lines import get_logger
from touchline_protos.types.dtypes import to_wire
from touchline_protos.types.flatten import to_array

TRAJECTORY_KEY = ("collector", "traj_ids")
MASK_KEY = ("collector", "mask")
DONE_KEY = ("next", "done")

logger = get_logger(__name__)


def path_of(key: Any) -> str:
    """Returns the parts of a (nested) key joined by dots.

    Raises:
        InvalidEpisodeError: a part is empty, not a str, or contains a dot, so the result could not be split again.
    """
    parts = (key,) if isinstance(key, str) else tuple(key)
    for part in parts:
        if not isinstance(part, str) or not part or "." in part:
            raise InvalidEpisodeError(f"{key!r}: cannot be the name of a column, expected names without dots")
    return ".".join(parts)


@dataclass
class _Open:
    """An unfinished trajectory."""

    pieces: list[TensorDict] = field(default_factory=list)
    steps: int = 0


class Trajectories:
    """Collects transitions by trajectory until each trajectory ends. For one thread.

    Args:
        max_steps: number of transitions after which a trajectory is returned in pieces; None never splits one.
        max_open: limit on unfinished trajectories; beyond it the one that has waited longest for its next step is returned as it is.
    """

    def __init__(self, *, max_steps: int | None, max_open: int) -> None:
        for name, value in (("max_steps", max_steps), ("max_trajectories", max_open)):
            if value is not None and value < 1:
                raise InvalidArgumentError(f"{name}: {value}, expected at least 1")
        self._max_steps = max_steps
        self._max_open = max_open
        self._open: OrderedDict[Any, _Open] = OrderedDict()
        self._cut_logged = False

    def extend(self, data: TensorDict) -> list[TensorDict]:
        """Adds transitions, and returns the trajectories [T] that they complete, as copies in host memory.

        Args:
            data: TensorDict [..., time] that passed :func:`check_transitions`; not changed.

        Raises:
            InvalidEpisodeError: it continues a trajectory with other keys, dtypes or shapes. Nothing is added.
        """
        if not data.batch_size.numel():
            return []
        lanes = data.reshape(-1, data.batch_size[-1]).cpu().contiguous()
        follows = _follows(lanes)
        ids = lanes.get(TRAJECTORY_KEY, None)
        complete: list[TensorDict] = []
        steps = lanes.batch_size[1]
        names_of = [[("lane", lane)] * steps if ids is None else ids[lane].reshape(steps, -1)[:, 0].tolist() for lane in range(len(lanes))]
        self._check_alike(lanes, {name for names in names_of for name in names})
        for lane, names in enumerate(names_of):
            for first, last, broken in self._runs(lanes[lane], names, follows[lane].tolist()):
                if broken and names[first] in self._open:
                    self._log_cut_once(names[first])
                    complete.append(self._end(names[first]))
                # Not TensorDict.clone(): if the TensorDict has a device, that adds 0, which turns -0 into 0.
                self._continue(names[first], lanes[lane, first:last].apply(torch.clone), complete)
        while len(self._open) > self._max_open:
            complete.append(self._end(next(iter(self._open))))
        return complete

    def _check_alike(self, lanes: TensorDict, names: set[Any]) -> None:
        """Raises InvalidEpisodeError unless the transitions have the keys, dtypes and shapes of the trajectories that they continue."""
        # Checked before anything is added: torch.cat would widen dtypes, and fail on other keys only after pieces were removed.
        found = _specs(lanes, dims=2)
        for name in names & self._open.keys():
            expected = _specs(self._open[name].pieces[-1], dims=1)
            for path in [*expected, *found]:
                if found.get(path) != expected.get(path):
                    raise InvalidEpisodeError(
                        f"{path}: {found.get(path, 'missing')}, expected {expected.get(path, 'no such key')} as in the earlier steps of "
                        f"trajectory {name}; call flush() to end that one"
                    )

    def end_all(self) -> list[TensorDict]:
        """Removes and returns all unfinished trajectories, as they are."""
        return [self._end(name) for name in list(self._open)]

    def _runs(self, lane: TensorDict, names: list[Any], follows: list[bool]) -> Iterator[tuple[int, int, bool]]:
        """Yields the runs of consecutive steps of one trajectory in a lane.

        Args:
            lane: transitions [time].
            names: trajectory of each step.
            follows: whether each step begins with what the one before it ended with.

        Yields:
            ``first`` and ``last + 1`` of the run, and whether the run breaks with the unfinished trajectory that it continues.
        """
        done = lane[DONE_KEY].reshape(len(names), -1).any(-1).tolist()
        mask = lane.get(MASK_KEY, None)
        kept = [True] * len(names) if mask is None else mask.reshape(len(names), -1)[:, 0].tolist()
        first = 0
        while first < len(names):
            if not kept[first]:
                first += 1
                continue
            last = first + 1
            while last < len(names) and kept[last] and names[last] == names[first] and not done[last - 1] and follows[last]:
                last += 1
            before = self._open.get(names[first])
            yield first, last, before is not None and not _follows_piece(before.pieces[-1], lane[first])
            first = last

    def _continue(self, name: Any, piece: TensorDict, complete: list[TensorDict]) -> None:
        ended = bool(piece[DONE_KEY][-1].any())
        while len(piece):
            trajectory = self._open.setdefault(name, _Open())
            room = len(piece) if self._max_steps is None else self._max_steps - trajectory.steps
            trajectory.pieces.append(piece[:room])
            trajectory.steps += len(trajectory.pieces[-1])
            piece = piece[room:]
            self._open.move_to_end(name)
            if trajectory.steps == self._max_steps or (ended and not len(piece)):
                complete.append(self._end(name))

    def _end(self, name: Any) -> TensorDict:
        return torch.cat(self._open.pop(name).pieces)

    def _log_cut_once(self, name: Any) -> None:
        if not self._cut_logged:
            self._cut_logged = True
            logger.warning(
                "trajectory %s is cut at a transition that does not begin with what the one before it ended with (logged once); "
                "slices never cross the cut",
                name,
            )


def check_transitions(data: Any) -> None:
    """Raises InvalidEpisodeError unless the data are transitions [..., time] of tensors that mark the ends of their trajectories."""
    keys = set(data.keys()) if hasattr(data, "batch_size") else set()
    if "next" not in keys or not data.batch_size:
        raise InvalidEpisodeError(f"data: {type(data).__name__}, expected a TensorDict [..., time] of transitions with ('next', ...) keys")
    try:
        _check_values(data, "")
    except RuntimeError:
        if not hasattr(data, "tensordicts"):
            raise
        raise InvalidEpisodeError(
            "data: a lazy stack whose parts differ in shape, expected one shape; call extend() with each part"
        ) from None
    if "done" not in set(data["next"].keys()):
        raise InvalidEpisodeError(f"{DONE_KEY}: missing, expected a flag that marks the end of a trajectory")
    if data.batch_size.numel():
        _check_flag(DONE_KEY, data[DONE_KEY])
        _check_marks(data)


def _check_flag(key: tuple[str, ...], values: torch.Tensor) -> None:
    if not bool(((values == 0) | (values == 1)).all()):
        raise InvalidEpisodeError(f"{'.'.join(key)}: a value that is neither 0 nor 1, expected bool")


def _check_marks(data: TensorDict) -> None:
    """Raises InvalidEpisodeError unless the mask is a flag, and mask and trajectory id have one value a transition."""
    mask, ids = data.get(MASK_KEY, None), data.get(TRAJECTORY_KEY, None)
    if mask is not None:
        _check_flag(MASK_KEY, mask)
    for key, values in ((MASK_KEY, mask), (TRAJECTORY_KEY, ids)):
        if values is not None:
            each = values.reshape(data.batch_size.numel(), -1)
            if not bool((each == each[:, :1]).all()):  # False for NaN as well
                raise InvalidEpisodeError(f"{'.'.join(key)}: several values a transition, or NaN, expected one")


def _check_values(level: Any, prefix: str) -> None:
    for key, value in level.items():  # level by level: items(True, True) leaves out values that are not tensors
        path = f"{prefix}{path_of(key)}"
        if is_tensor_collection(value) and not is_non_tensor(value):
            _check_values(value, f"{path}.")
        elif not isinstance(value, torch.Tensor):
            raise InvalidEpisodeError(f"{path}: {type(value).__name__}, expected a tensor; exclude it first")
        else:
            _check_dtype(path, value)


def _check_dtype(path: str, value: torch.Tensor) -> None:
    try:
        to_wire(to_array(path, value.reshape(-1)[:0] if value.layout == torch.strided else value).dtype)
    except ValueError as error:
        message = str(error) if str(error).startswith(f"{path}:") else f"{path}: {error}"
        raise InvalidEpisodeError(f"{message}; exclude it or cast it first") from None


def _specs(data: TensorDict, *, dims: int) -> dict[str, str]:
    """Returns the dtype and the shape of one step of each value, by dotted path; the first ``dims`` dimensions are batch dimensions."""
    return {path_of(key): f"{value.dtype} {tuple(value.shape[dims:])}" for key, value in data.items(True, True)}


def _shared_keys(data: TensorDict) -> list[Any]:
    after = set(data["next"].keys(True, True))
    return [key for key in data.exclude("next").keys(True, True) if key in after]


def _next(key: Any) -> tuple[str, ...]:
    return ("next", key) if isinstance(key, str) else ("next", *key)


def _follows(lanes: TensorDict) -> torch.Tensor:
    """Returns bool [lanes, time]: whether a transition begins, bit for bit, with what the one before it ended with."""
    same = torch.ones(lanes.batch_size, dtype=torch.bool)
    for key in _shared_keys(lanes):
        same[:, 1:] &= _equal(lanes[_next(key)][:, :-1], lanes[key][:, 1:], dims=2)
    return same


def _follows_piece(piece: TensorDict, transition: TensorDict) -> bool:
    return all(bool(_equal(piece[_next(key)][-1:], transition[key][None], dims=1)) for key in _shared_keys(piece))


def _equal(before: torch.Tensor, after: torch.Tensor, *, dims: int) -> torch.Tensor:
    """Returns bool [first ``dims`` dimensions]: whether all values are the same bits. So NaN equals itself, and 0 differs from -0."""
    if before.shape != after.shape or before.dtype != after.dtype:
        return torch.zeros(after.shape[:dims], dtype=torch.bool)
    if before.is_floating_point():
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[before.element_size()]
        before, after = before.contiguous().view(bits), after.contiguous().view(bits)
    same = before == after
    return same.flatten(dims).all(-1) if same.ndim > dims else same
