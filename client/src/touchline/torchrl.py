"""TorchRL's replay buffer, served by Touchline: what a collector gives goes in, flat TensorDicts of slices come out.

How a trajectory of T transitions is stored, in T + 1 rows, one more than transitions:

==========================================  ====================================================================================
keys of the TensorDict                      column
==========================================  ====================================================================================
an observation, ``k`` and ("next", k)       ``obs`` (``obs.<k>`` where there are several): rows 0..T, the last is the last "next"
another that is in both (``done``, ...)     ``both.<k>``, likewise
the action                                  ``action``
("next", reward)                            ``reward``
("next", "terminated")                      ``done`` besides, for other readers (("next", "done") where there is none)
another of the root (collector.traj_ids)    ``root.<k>``
another of "next"                           ``next.<k>``
==========================================  ====================================================================================

A nested key is joined by dots. What belongs to a transition is in the row that the server's row convention says (row t + 1 where it is
"incoming", row t where it is "outgoing"), so other readers of the server find episodes in the form that they expect, and nothing is lost
under either. The row that is left over holds NaN, or zero, and never reaches a sample.

That an observation is stored once and not twice rests on ("next", k) of a step being ``k`` of the step after it. Where that does not hold,
to the bit, the trajectory is cut: every transition is kept as it is, and no slice goes across.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import Any

from touchline.installing import install_command
from touchline_protos.log_lines import get_logger

try:
    import torch
    from tensordict import TensorDict
except ImportError as error:
    raise ImportError(f"touchline.torchrl needs torch and tensordict ({error}): {install_command('torchrl')}") from error

from touchline._learner.stream import BatchStream
from touchline._learner.trajectories import Trajectories, check_transitions, path_of
from touchline._rpc.dropping import when_dropped
from touchline.client import ReplayClient
from touchline.errors import ClosedError, InvalidArgumentError, InvalidEpisodeError
from touchline_protos import Batch

Key = str | tuple[str, ...]

logger = get_logger(__name__)


class RemoteReplayBuffer:
    """A TorchRL replay buffer on a Touchline server: the verbs of ``torchrl.data.ReplayBuffer`` that training loops use.

    A trajectory is sent, whole, when ("next", "done") ends it; until then it is collected here, across calls of ``extend``, by its
    ("collector", "traj_ids"). ``max_steps`` sends long ones in pieces, ``flush`` and ``close`` send what there is.

    It may be handed to the processes of a collector (``MultiSyncCollector(..., replay_buffer=buffer)``), pickled or copied: the copy has a
    connection of its own, and begins without the trajectories that are under way here. What a worker has collected of a trajectory when the
    collector is shut down is lost; ``max_steps`` bounds it.

    Samples are drawn as TorchRL's ``SliceSampler`` draws them: a trajectory uniformly, then a start uniformly (``law="step"``: every start
    equally likely). The next batches are under way while the learner uses this one. One thread samples, one extends.

    Args:
        server: ``"host:50051"``, or a client, which stays the caller's.
        batch_size: transitions of a sample, a multiple of ``slice_len``.
        slice_len: consecutive transitions of a slice.
        observation_keys: what is stored as ``obs``; in the root and in "next".
        action_key: in the root.
        reward_key: in "next"; [..., 1].
        transform: called with every sample; its ``inv``, if it has one, with everything that is added. As TorchRL's transforms.
        truncated_key: marks the last transition of each slice as truncated and done, for value estimators that run over flat samples;
            ``("next", "truncated")`` is SliceSampler's default. None changes nothing.
        max_steps: transitions after which a trajectory is sent in pieces; None never.
        max_trajectories: collected at a time; the one that was not continued for the longest is sent as it is.
        law: ``"episode"`` or ``"step"``.
        device: of the samples; None for host memory.
        timeout_s: the longest wait for a sample.

    Raises:
        InvalidArgumentError: an argument out of range.
    """

    def __init__(
        self,
        server: str | ReplayClient,
        *,
        batch_size: int | None = None,
        slice_len: int = 1,
        observation_keys: Sequence[Key] = ("observation",),
        action_key: Key = "action",
        reward_key: Key = "reward",
        transform: Callable[[TensorDict], TensorDict] | None = None,
        truncated_key: tuple[str, ...] | None = None,
        max_steps: int | None = None,
        max_trajectories: int = 1024,
        law: str = "episode",
        device: Any = None,
        timeout_s: float = 60.0,
    ) -> None:
        if slice_len < 1:
            raise InvalidArgumentError(f"slice_len: {slice_len}, expected at least 1")
        if not observation_keys:
            raise InvalidArgumentError("observation_keys: none, expected at least one")
        self._client = ReplayClient(server) if isinstance(server, str) else server
        self._owns_client = isinstance(server, str)
        self._slice_len = slice_len
        self._batch_size = batch_size
        if batch_size is not None:
            self._slices_of(batch_size)
        self._observations = [path_of(key) for key in observation_keys]
        self._action, self._reward = path_of(action_key), path_of(reward_key)
        self._transforms: list[Callable[[TensorDict], TensorDict]] = [] if transform is None else [transform]
        self._truncated_key = truncated_key
        self._law, self._device, self._timeout_s = law, device, timeout_s
        self._new_trajectories = partial(Trajectories, max_steps=max_steps, max_open=max_trajectories)
        self._trajectories = self._new_trajectories()
        self._incoming: bool | None = None
        self._stream: tuple[int, BatchStream] | None = None
        self._closed = False
        when_dropped(self, _say_what_is_lost, self._trajectories)

    # Adding.

    def extend(self, data: TensorDict) -> None:
        """Takes transitions in, and stores the trajectories that they complete; returns when those are acknowledged.

        Args:
            data: [..., time], as a collector gives it; or [transitions], of one or several trajectories, each in its order. Trajectories
                are told apart by ("collector", "traj_ids"), which a row of the other dimensions stands for where it is missing. What
                ("collector", "mask") masks is left out. Not changed.

        Raises:
            InvalidEpisodeError: a key is missing, or cannot be a column. Nothing is taken in.
            LoadError: the server refused some trajectories; the others are stored.
            UnavailableError, DeadlineError: the trajectories that these transitions complete are not known to be stored.
        """
        if self._closed:
            raise ClosedError("the buffer was closed")
        for transform in reversed(self._transforms):
            inverse = getattr(transform, "inv", None)
            if inverse is not None:
                data = inverse(data.clone(recurse=False))
        check_transitions(data)
        self._check_roles(data)
        self._send(self._trajectories.extend(data))

    def add(self, data: TensorDict) -> None:
        """Takes one transition [] in; see :meth:`extend`."""
        self.extend(data.unsqueeze(0))

    def flush(self) -> None:
        """Stores the trajectories that are under way as far as they are; what continues them later begins new ones."""
        self._send(self._trajectories.end_all())

    def empty(self) -> None:
        """Empties the server's table, and what is collected here."""
        self._trajectories.end_all()
        self._client.clear()

    # Sampling.

    def sample(self, batch_size: int | None = None, return_info: bool = False) -> Any:
        """Returns ``batch_size`` transitions, flat: slice after slice, each of ``slice_len`` transitions in their order.

        Args:
            batch_size: None takes the buffer's.
            return_info: also returns a dict: of each slice ``episode_id``, ``start`` and ``probability``.

        Returns:
            A TensorDict [batch_size] with the keys that were added, or (it, info).

        Raises:
            NotReadyError: nothing could be sampled within ``timeout_s``; unfinished trajectories are not on the server yet.
            InvalidArgumentError: no batch size, or none that slices divide.
            ClosedError: the buffer was closed.
        """
        batch = self._next_batch(self._slices_of(batch_size if batch_size is not None else self._batch_size))
        data = self._unpack(batch)
        for transform in self._transforms:
            data = transform(data)
        if not return_info:
            return data
        return data, {name: torch.as_tensor(getattr(batch, name)) for name in ("episode_id", "start", "probability")}

    def __iter__(self) -> Iterator[TensorDict]:
        """Samples without end."""
        while True:
            yield self.sample()

    def __len__(self) -> int:
        """Transitions on the server: what can be sampled, not what is still collected here."""
        counts = self._client.counts()
        return counts.steps_stored - counts.episodes_stored

    @property
    def batch_size(self) -> int | None:
        """Transitions of a sample."""
        return self._batch_size

    def append_transform(self, transform: Callable[[TensorDict], TensorDict]) -> RemoteReplayBuffer:
        """Adds a transform after the others, and returns the buffer."""
        self._transforms.append(transform)
        return self

    def close(self) -> None:
        """Stores what is under way and ends the connection, unless the client was given. Closing again does nothing."""
        if self._closed:
            return
        try:
            self.flush()
        finally:
            self._end()

    def __enter__(self) -> RemoteReplayBuffer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Closes. If the body failed, unfinished trajectories are discarded."""
        if kind is None:
            self.close()
            return
        discarded = self._trajectories.end_all()
        if discarded:
            logger.warning("discarded %d unfinished trajectories because of %s", len(discarded), kind.__name__)
        self._end()

    # In the processes of a collector.

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_stream": None, "_trajectories": None, "_owns_client": True}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._trajectories = self._new_trajectories()
        when_dropped(self, _say_what_is_lost, self._trajectories)

    @property
    def shared(self) -> bool:
        """True: what one process adds, all others sample."""
        return True

    @property
    def write_count(self) -> int:
        """Transitions that were ever stored on the server."""
        counts = self._client.counts()
        return counts.steps_added - counts.episodes_added

    @property
    def _storage(self) -> RemoteReplayBuffer:
        """Asked by collectors of several processes whether it is ``initialized``, so that its workers can write to it."""
        return self

    initialized = True

    # Inside.

    def _end(self) -> None:
        self._closed = True
        if self._stream is not None:
            self._stream[1].close()
        if self._owns_client:
            self._client.close()

    def _slices_of(self, batch_size: int | None) -> int:
        if batch_size is None or batch_size < 1 or batch_size % self._slice_len:
            raise InvalidArgumentError(f"batch_size: {batch_size}, expected a multiple of slice_len, {self._slice_len}")
        return batch_size // self._slice_len

    def _is_incoming(self) -> bool:
        if self._incoming is None:
            self._incoming = self._client.info().row_convention == "incoming"
        return self._incoming

    def _send(self, trajectories: Sequence[TensorDict]) -> None:
        if not trajectories:
            return
        incoming = self._is_incoming()
        episodes = [self._pack(trajectory, incoming) for trajectory in trajectories]
        if len(episodes) == 1:
            self._client.add(episodes[0])
        else:
            self._client.load(episodes)

    def _pack(self, trajectory: TensorDict, incoming: bool) -> dict[str, torch.Tensor]:
        """Returns a trajectory [T] as an episode's columns [T + 1]."""
        root, after = _by_path(trajectory)
        columns = {}
        for path, value in root.items():
            name = self._column(path, both=path in after)
            if path in after:
                columns[name] = torch.cat([value, after[path][-1:]])
            else:
                columns[name] = _with_spare_row(value, incoming)
        for path, value in after.items():
            if path not in root:
                columns["reward" if path == self._reward else f"next.{path}"] = _with_spare_row(value, incoming)
        columns["done"] = _with_spare_row(after.get("terminated", after["done"]), incoming)
        return columns

    def _check_roles(self, data: TensorDict) -> None:
        """Raises InvalidEpisodeError where a role has no key, or not the form that it needs."""
        root, after = _by_path(data)
        for path in self._observations:
            if path not in root or path not in after:
                raise InvalidEpisodeError(
                    f"{path}: expected in the root and in next, as an observation; found {sorted(root)} and {sorted(after)} "
                    "(observation_keys names others)"
                )
        if self._action not in root or self._action in after:
            raise InvalidEpisodeError(f"{self._action}: expected in the root alone, as the action; found {sorted(root)} (see action_key)")
        if self._reward not in after or self._reward in root:
            raise InvalidEpisodeError(f"{self._reward}: expected in next alone, as the reward; found {sorted(after)} (see reward_key)")
        shape = tuple(after[self._reward].shape)
        if shape[data.batch_dims :] != (1,):
            raise InvalidEpisodeError(f"next.{self._reward}: shape {shape}, expected {(*data.batch_size, 1)}")

    def _column(self, path: str, *, both: bool) -> str:
        if path == self._action:
            return "action"
        if not both:
            return f"root.{path}"
        if path in self._observations:
            return "obs" if len(self._observations) == 1 else f"obs.{path}"
        return f"both.{path}"

    def _next_batch(self, slices: int) -> Batch:
        if self._closed:
            raise ClosedError("the buffer was closed")
        if self._stream is None or self._stream[0] != slices:
            if self._stream is not None:
                self._stream[1].close()
            stream = self._client.batches(
                batch_size=slices, horizon=self._slice_len, law=self._law, device=self._device, as_numpy=False, timeout_s=self._timeout_s
            )
            self._stream = slices, stream
        try:
            return next(self._stream[1])
        except StopIteration:
            raise ClosedError("the buffer was closed") from None

    def _unpack(self, batch: Batch) -> TensorDict:
        """Returns the transitions of a batch, [slices * slice_len]."""
        incoming = self._is_incoming()
        data = TensorDict({}, batch_size=[batch.action.shape[1] * self._slice_len], device=batch.action.device)
        # A lone observation is `obs` itself; episodes of other writers may have several under names of their own.
        observations = _leaves(batch.obs) if isinstance(batch.obs, dict) else {self._observations[0]: batch.obs}
        both = observations | {name.removeprefix("both."): rows for name, rows in batch.extra.items() if name.startswith("both.")}
        for path, rows in both.items():
            _set(data, path, rows[:-1])
            _set(data, f"next.{path}", rows[1:])
        _set(data, self._action, batch.action)
        _set(data, f"next.{self._reward}", batch.reward)
        for name, rows in batch.extra.items():
            if not name.startswith("both."):
                _set(data, name.removeprefix("root."), rows[1:] if incoming else rows[:-1])
        if batch.task is not None:
            data["task"] = batch.task.repeat_interleave(self._slice_len)
        if ("next", "done") not in data.keys(True):  # an episode of another writer
            for flag in ("done", "terminated"):
                _set(data, f"next.{flag}", batch.done.bool())
        if self._truncated_key is not None:
            self._mark_ends(data, self._truncated_key)
        return data

    def _mark_ends(self, data: TensorDict, truncated_key: tuple[str, ...]) -> None:
        done_key = (*truncated_key[:-1], "done")
        last = torch.zeros_like(data[done_key])
        last.view(-1, self._slice_len, *last.shape[1:])[:, -1] = True
        data[truncated_key] = last
        data[done_key] = data[done_key] | last


def _say_what_is_lost(trajectories: Trajectories) -> None:
    lost = trajectories.end_all()
    if lost:
        logger.warning(
            "a RemoteReplayBuffer was dropped without being closed: %d unfinished trajectories are lost; flush() sends them", len(lost)
        )


def _by_path(data: TensorDict) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Returns the values of the root and of "next" by dotted path."""
    root = {path_of(key): value for key, value in data.exclude("next").items(True, True)}
    return root, {path_of(key): value for key, value in data["next"].items(True, True)}


def _with_spare_row(values: torch.Tensor, incoming: bool) -> torch.Tensor:
    """Returns [T, ...] with the row that belongs to no transition, NaN or zero: first where incoming, else last."""
    spare = torch.full_like(values[:1], torch.nan if values.is_floating_point() else 0)
    return torch.cat([spare, values] if incoming else [values, spare])


def _set(data: TensorDict, path: str, rows: torch.Tensor) -> None:
    """Sets [slice_len, slices, ...] as [slices * slice_len, ...] under a dotted path."""
    data[tuple(path.split("."))] = rows.transpose(0, 1).flatten(0, 1)


def _leaves(level: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, value in level.items():
        leaves |= _leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return leaves
