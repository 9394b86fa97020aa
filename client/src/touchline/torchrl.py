"""TorchRL's replay buffer on a Touchline server: collectors write to it, training loops sample flat TensorDicts from it.

::

    buffer = RemoteReplayBuffer("replay-host:50051", batch_size=256, slice_len=4)
    for data in collector:  # [envs, time]
        buffer.extend(data)
        sample = buffer.sample()  # TensorDict [256]: 64 slices of 4 transitions, one slice after another

A trajectory of T transitions is stored in T + 1 rows, one more than there are transitions:

==========================================  ====================================================================================
keys of the TensorDict                      column
==========================================  ====================================================================================
an observation, ``k`` and ("next", k)       ``obs`` (``obs.<k>`` for several): rows 0..T, the last row being the last "next"
any other key in both (``done``, ...)       ``both.<k>``, in the same way
the action                                  ``action``
("next", reward)                            ``reward``
("next", "terminated")                      also ``done``, for other readers (("next", "done") if it is missing)
any other key of the root (traj_ids, ...)   ``root.<k>``
any other key of "next"                     ``next.<k>``
==========================================  ====================================================================================

Nested keys are joined by dots. The values of a transition t are stored in the row that the server's row convention assigns to them: row
t + 1 if it is "incoming", row t if it is "outgoing". So other readers of the server find episodes in the form that they expect. The spare
row holds NaN, or zero, and never reaches a sample.

An observation is stored once instead of twice because ("next", k) of a step is ``k`` of the next step. At a step where the two differ, if
only in one bit, the trajectory is cut: every transition is kept as it is, and no slice crosses the cut.
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

from touchline._learner.flat_samples import by_path, leaves_of, sample_info, set_flat, updates_of, with_spare_row
from touchline._learner.stream import BatchStream
from touchline._learner.torch_batch import check_one_agent
from touchline._learner.trajectories import Trajectories, check_transitions, path_of
from touchline._rpc.convert import check_mix_argument, check_table
from touchline._rpc.dropping import when_dropped
from touchline.client import ReplayClient
from touchline.errors import ClosedError, InvalidArgumentError, InvalidEpisodeError
from touchline.types import SampleOptions
from touchline_protos import Batch
from touchline_protos.types.mix import Mix

Key = str | tuple[str, ...]

logger = get_logger(__name__)


class RemoteReplayBuffer:
    """A TorchRL replay buffer on a Touchline server: the methods of ``torchrl.data.ReplayBuffer`` that training loops use.

    A trajectory is sent as a whole when ("next", "done") ends it. Until then it is collected in this process, across calls of
    :meth:`extend`, by its ("collector", "traj_ids"). ``max_steps`` sends long ones in pieces; ``flush`` and ``close`` send what there is.

    The buffer can be passed to the processes of a collector (``MultiSyncCollector(..., replay_buffer=buffer)``), pickled and copied: the
    copy has a connection of its own, and starts without the unfinished trajectories of the original. When a collector is shut down, the
    unfinished trajectories of its workers are lost; ``max_steps`` limits that.

    Samples follow the law of TorchRL's ``SliceSampler``: a trajectory uniformly, then a start in it uniformly; with ``law="step"`` all
    starts are equally likely; docs/laws.md has the others. The next batches are fetched while the learner uses this one. One thread
    samples, one thread extends.

    Args:
        server: address ``"host:50051"``, or a client, which the caller closes.
        table: table on the server; None takes the client's, the default one for an address.
        batch_size: number of transitions in a sample, a multiple of ``slice_len``.
        slice_len: number of consecutive transitions in a slice.
        observation_keys: keys, both in the root and in "next", that are stored as ``obs``.
        action_key: key of the action, in the root.
        reward_key: key of the reward [..., 1], in "next".
        transform: transform of every sample; its ``inv``, if it has one, transforms everything that is added, as in TorchRL.
        truncated_key: key that marks the last transition of each slice as truncated and done, for value estimators that run over flat
            samples; SliceSampler's default is ``("next", "truncated")``. None changes nothing.
        max_steps: number of transitions after which a trajectory is sent in pieces; None never splits one.
        max_trajectories: limit on unfinished trajectories; beyond it the one that has waited longest for its next step is sent as it is.
        law: sampling law: ``"episode"``, ``"step"``, ``"recent"``, ``"prioritized"``, ``"fresh_first"`` or ``"task"``.
        recent_steps: newest rows that ``"recent"`` draws from.
        recent_half_life: rows after which a start is half as likely under ``"recent"``.
        beta: exponent of the weights of ``"prioritized"``; None takes the table's.
        pad: ``"end"`` if slices may run over their trajectory's end; samples have a ``valid`` then, False for transitions that repeat.
        mix: share of each table in a sample; None: that of ``table``, which :meth:`extend` adds to in either case.
        when_empty: rule for a table of the mix that has nothing to sample; see :class:`~touchline.types.SampleOptions` for both.
        device: device of the samples; None for host memory.
        timeout_s: longest wait for a sample.

    Raises:
        InvalidArgumentError: an argument is out of range.
    """

    def __init__(
        self,
        server: str | ReplayClient,
        *,
        table: str | None = None,
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
        recent_steps: int | None = None,
        recent_half_life: float | None = None,
        beta: float | None = None,
        pad: str = "none",
        mix: Mix | None = None,
        when_empty: str = "wait",
        device: Any = None,
        timeout_s: float = 60.0,
    ) -> None:
        if slice_len < 1:
            raise InvalidArgumentError(f"slice_len: {slice_len}, expected at least 1")
        if not observation_keys:
            raise InvalidArgumentError("observation_keys: none, expected at least one")
        self._client = ReplayClient(server) if isinstance(server, str) else server
        self._owns_client = isinstance(server, str)
        self._table = self._client.table if table is None else check_table(table)
        self._slice_len = slice_len
        self._batch_size = batch_size
        if batch_size is not None:
            self._slices_of(batch_size)
        self._observations = [path_of(key) for key in observation_keys]
        self._action, self._reward = path_of(action_key), path_of(reward_key)
        self._transforms: list[Callable[[TensorDict], TensorDict]] = [] if transform is None else [transform]
        self._truncated_key = truncated_key
        self._device, self._timeout_s = device, timeout_s
        self._options: SampleOptions = {"horizon": slice_len, "law": law, "pad": pad, "when_empty": when_empty}
        self._options |= {"recent_steps": recent_steps, "recent_half_life": recent_half_life, "beta": beta}
        self._tables = [self._table] if mix is None else [name for name, _ in check_mix_argument(mix, when_empty)]
        self._options |= {"table": self._table} if mix is None else {"mix": dict(check_mix_argument(mix, when_empty))}
        self._new_trajectories = partial(Trajectories, max_steps=max_steps, max_open=max_trajectories)
        self._trajectories = self._new_trajectories()
        self._incoming: dict[str | None, bool] = {}
        self._stream: tuple[int, BatchStream] | None = None
        self._closed = False
        when_dropped(self, _log_loss, self._trajectories)

    # Adding.

    def extend(self, data: TensorDict) -> None:
        """Adds transitions, and stores the trajectories that they complete; returns when the server has acknowledged those.

        Args:
            data: TensorDict [..., time], as a collector returns it; or [transitions] of one or several trajectories, each in its order.
                Trajectories are distinguished by ("collector", "traj_ids") or, if that is missing, by their place in the other dimensions.
                Transitions that ("collector", "mask") masks are left out. Not changed.

        Raises:
            InvalidEpisodeError: a key is missing or cannot be a column. Nothing is added.
            LoadError: the server refused some trajectories; the others are stored.
            UnavailableError, DeadlineError: the trajectories that these transitions complete may or may not be stored.
            ClosedError: the buffer was closed.
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
        """Adds one transition []; see :meth:`extend`."""
        self.extend(data.unsqueeze(0))

    def flush(self) -> None:
        """Stores the unfinished trajectories as they are; later transitions of theirs begin new ones."""
        self._send(self._trajectories.end_all())

    def empty(self) -> None:
        """Empties the server's table, and discards the unfinished trajectories."""
        self._trajectories.end_all()
        self._client.clear(table=self._table)

    # Sampling.

    def sample(self, batch_size: int | None = None, return_info: bool = False) -> Any:
        """Returns ``batch_size`` transitions, flat: one slice after another, each of ``slice_len`` transitions in their order.

        Args:
            batch_size: number of transitions; None takes the buffer's.
            return_info: also return a dict of ``episode_id``, ``start``, ``probability`` and, of a mix, ``table`` of each slice; by the law
                ``"prioritized"`` also ``index`` and ``priority_weight`` of each transition, as TorchRL's samplers return them.

        Returns:
            A TensorDict [batch_size] with the keys that were added, which is the caller's; with ``return_info`` also the dict.

        Raises:
            NotReadyError: nothing could be sampled within ``timeout_s``; unfinished trajectories are not on the server yet.
            InvalidArgumentError: there is no batch size, it is not a multiple of ``slice_len``, or there is a reward per agent (lockstep).
            ClosedError: the buffer was closed.
        """
        batch = self._next_batch(self._slices_of(batch_size if batch_size is not None else self._batch_size))
        data = self._unpack(batch)
        for transform in self._transforms:
            data = transform(data)
        if not return_info:
            return data
        return data, sample_info(batch, self._slice_len)

    def update_priority(self, index: Any, priority: Any) -> None:
        """Sets priorities of transitions that were sampled by the law ``"prioritized"``. Returns before they are sent.

        Args:
            index: ``info["index"]`` of ``sample(return_info=True)``, or the rows of some slices of it, all ``slice_len`` of each.
            priority: priority of each of these transitions, [n] or [n, 1]: finite, at least 0.

        Raises:
            InvalidArgumentError: a shape or a number is wrong.
            TouchlineError: an earlier update failed; this one was taken all the same.
        """
        self._client.priorities.put(updates_of(index, priority, self._slice_len, self._tables))

    def __iter__(self) -> Iterator[TensorDict]:
        """Yields samples without end."""
        while True:
            yield self.sample()

    def __len__(self) -> int:
        """Returns the number of transitions on the server, which does not include unfinished trajectories."""
        counts = self._client.counts(table=self._table)
        return counts.steps_stored - counts.episodes_stored

    @property
    def batch_size(self) -> int | None:
        """Number of transitions in a sample."""
        return self._batch_size

    def append_transform(self, transform: Callable[[TensorDict], TensorDict]) -> RemoteReplayBuffer:
        """Appends a transform, and returns the buffer."""
        self._transforms.append(transform)
        return self

    def close(self) -> None:
        """Stores the unfinished trajectories, and closes the client unless the caller passed it. Closing again does nothing."""
        if self._closed:
            return
        try:
            self.flush()
        finally:
            self._end()

    def __enter__(self) -> RemoteReplayBuffer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Closes the buffer. If the body failed, discards the unfinished trajectories."""
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
        when_dropped(self, _log_loss, self._trajectories)

    @property
    def shared(self) -> bool:
        """True, as all processes share what is on the server."""
        return True

    @property
    def write_count(self) -> int:
        """Number of transitions that were ever stored on the server."""
        counts = self._client.counts(table=self._table)
        return counts.steps_added - counts.episodes_added

    @property
    def _storage(self) -> RemoteReplayBuffer:
        """The buffer itself: a multi-process collector reads its ``initialized`` to see that its workers can write to it."""
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

    def _is_incoming(self, table: str | None = None) -> bool:
        """Returns whether a table's row convention is "incoming"; None is the buffer's table."""
        if table not in self._incoming:
            info = self._client.info(table=self._table if table is None else table)
            self._incoming[table] = info.row_convention == "incoming"
        return self._incoming[table]

    def _send(self, trajectories: Sequence[TensorDict]) -> None:
        if not trajectories:
            return
        incoming = self._is_incoming()
        episodes = [self._pack(trajectory, incoming) for trajectory in trajectories]
        if len(episodes) == 1:
            self._client.add(episodes[0], table=self._table)
        else:
            self._client.load(episodes, table=self._table)

    def _pack(self, trajectory: TensorDict, incoming: bool) -> dict[str, torch.Tensor]:
        """Returns the columns [T + 1] of an episode for a trajectory [T]."""
        root, after = by_path(trajectory)
        columns = {}
        for path, value in root.items():
            name = self._column(path, both=path in after)
            if path in after:
                columns[name] = torch.cat([value, after[path][-1:]])
            else:
                columns[name] = with_spare_row(value, incoming)
        for path, value in after.items():
            if path not in root:
                columns["reward" if path == self._reward else f"next.{path}"] = with_spare_row(value, incoming)
        columns["done"] = with_spare_row(after.get("terminated", after["done"]), incoming)
        return columns

    def _check_roles(self, data: TensorDict) -> None:
        """Raises InvalidEpisodeError if the key of an observation, the action or the reward is missing or has the wrong form."""
        root, after = by_path(data)
        for path in self._observations:
            if path not in root or path not in after:
                raise InvalidEpisodeError(
                    f"{path}: expected in the root and in next, as an observation; found {sorted(root)} and {sorted(after)} "
                    "(set observation_keys to other keys)"
                )
        if self._action not in root or self._action in after:
            raise InvalidEpisodeError(
                f"{self._action}: expected only in the root, as the action; found {sorted(root)} (set action_key to another key)"
            )
        if self._reward not in after or self._reward in root:
            raise InvalidEpisodeError(
                f"{self._reward}: expected only in next, as the reward; found {sorted(after)} (set reward_key to another key)"
            )
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
            options: SampleOptions = {**self._options, "batch_size": slices}
            stream = self._client.batches(device=self._device, as_numpy=False, timeout_s=self._timeout_s, **options)
            self._stream = slices, stream
        try:
            return next(self._stream[1])
        except StopIteration:
            raise ClosedError("the buffer was closed") from None

    def _unpack(self, batch: Batch) -> TensorDict:
        """Returns the transitions of a batch, [slices * slice_len]. Raises InvalidArgumentError if it has a reward per agent."""
        check_one_agent(batch, "RemoteReplayBuffer")
        incoming = self._is_incoming(batch.table_names[0] if batch.table_names else None)
        data = TensorDict({}, batch_size=[batch.action.shape[1] * self._slice_len], device=batch.action.device)
        # A single observation is `obs` itself; episodes of other writers may have several, under names of their own.
        observations = leaves_of(batch.obs) if isinstance(batch.obs, dict) else {self._observations[0]: batch.obs}
        both = observations | {name.removeprefix("both."): rows for name, rows in batch.extra.items() if name.startswith("both.")}
        for path, rows in both.items():
            set_flat(data, path, rows[:-1])
            set_flat(data, f"next.{path}", rows[1:])
        set_flat(data, self._action, batch.action)
        set_flat(data, f"next.{self._reward}", batch.reward)
        for name, rows in batch.extra.items():
            if not name.startswith("both."):
                set_flat(data, name.removeprefix("root."), rows[1:] if incoming else rows[:-1])
        if batch.valid is not None:
            set_flat(data, "valid", batch.valid)
        if batch.task is not None:
            data["task"] = batch.task.repeat_interleave(self._slice_len)
        if ("next", "done") not in data.keys(True):  # an episode of another writer
            for flag in ("done", "terminated"):
                set_flat(data, f"next.{flag}", batch.done.bool())
        if self._truncated_key is not None:
            self._mark_ends(data, self._truncated_key, batch.valid)
        return data

    def _mark_ends(self, data: TensorDict, truncated_key: tuple[str, ...], valid: torch.Tensor | None) -> None:
        done_key = (*truncated_key[:-1], "done")
        last = torch.zeros_like(data[done_key])
        slices = last.view(-1, self._slice_len, *last.shape[1:])
        slices[:, -1] = True
        if valid is not None:  # the last real transition, and all that repeat it
            slices[:, :-1] |= ~valid[1:].transpose(0, 1)
        data[truncated_key] = last
        data[done_key] = data[done_key] | last


def _log_loss(trajectories: Trajectories) -> None:
    lost = trajectories.end_all()
    if lost:
        logger.warning(
            "a RemoteReplayBuffer was dropped without being closed: %d unfinished trajectories are lost; flush() would send them", len(lost)
        )
