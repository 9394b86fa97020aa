"""Draws on the device of a buffer in process. Torch is imported when one is made."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from touchline_protos import Batch
from touchline_server.tables.table import SampleSpec, Table

if TYPE_CHECKING:
    from touchline_server.tables.device_sampler import DeviceSampler, DeviceSamplers


class DeviceDraws:
    """Base of :class:`touchline_server.ReplayBuffer`: batches that the columns' device draws."""

    table: Table
    _rng: np.random.Generator

    def device_sampler(
        self,
        *,
        batch_size: int | None = None,
        horizon: int | None = None,
        law: str | None = None,
        pad: str | None = None,
        seed: int | None = None,
    ) -> DeviceSampler:
        """Returns what draws and gathers batches on the columns' CUDA device, into the same tensors each time: also in a CUDA graph.

        The arguments are those of :meth:`sample`; ``seed`` is that of all its batches.

        Raises:
            NotReadyError: no stored episode has horizon + 1 rows.
            InvalidArgumentError: an argument is out of range, or the device cannot draw.
        """
        return self._device_samplers.make(self.table.spec(batch_size=batch_size, horizon=horizon, law=law, pad=pad), seed)

    def _sample_on_device(self, spec: SampleSpec, seed: int | None) -> Batch:
        """Returns a batch in fresh memory; see :meth:`DeviceSamplers.sample`."""
        return self._device_samplers.sample(spec, seed)

    @cached_property
    def _device_samplers(self) -> DeviceSamplers:
        from touchline_server.tables.device_sampler import DeviceSamplers

        return DeviceSamplers(self.table, self._rng.spawn(1)[0])
