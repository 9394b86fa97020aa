"""Errors survive what multiprocessing, concurrent.futures and copies do to them: all of them, with everything that they carry."""

from __future__ import annotations

import copy
import importlib
import inspect
import multiprocessing
import pickle
import pkgutil
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import cloudpickle
import numpy as np
import pytest

import touchline
import touchline_protos
import touchline_server
from support.service_calls import make_config
from touchline import LoadError, NotReadyError, OverLimitError, ReplayClient, UnacknowledgedError
from touchline._cli.doctor.findings import Finding, Level
from touchline.errors import EpisodeResult
from touchline_protos import Counts
from touchline_protos.codec import EpisodeKey
from touchline_server.service.app import ServerThread

COUNTS = Counts(**{name: number for number, name in enumerate(inspect.signature(Counts).parameters)})
RESULTS = (
    EpisodeResult(EpisodeKey("player", 1, 2), error=touchline.InvalidEpisodeError("obs: 3 rows, expected 4")),
    EpisodeResult(EpisodeKey("player", 1, 3), episode_id=7, duplicate=True),
)
ARGUMENTS: dict[str, Any] = {
    "message": "what was wrong, actual, expected",
    "results": RESULTS,
    "counts": COUNTS,
    "retry_after_s": 2.5,
    "reason": ValueError("the reason"),
    "key": EpisodeKey("player", 1, 2),
    "fatal": True,
    "version": 7,
    "finding": Finding("address", Level.FAILED, "what was wrong", "what to do"),
}
"""Arguments of the errors' constructors, by parameter name."""
COPIES: list[Callable[[Any], Any]] = [
    *(lambda error, protocol=protocol: pickle.loads(pickle.dumps(error, protocol)) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)),
    lambda error: pickle.loads(cloudpickle.dumps(error)),
    copy.copy,
    copy.deepcopy,
]


def modules(package: ModuleType) -> Iterator[ModuleType]:
    yield package
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not found.name.endswith("__main__"):
            try:
                yield importlib.import_module(found.name)
            except ImportError as error:  # an extra that is not installed here
                assert error.name is None or not error.name.startswith("touchline"), error


ERRORS = sorted(
    {
        thing
        for package in (touchline, touchline_protos, touchline_server)
        for module in modules(package)
        for thing in vars(module).values()
        if isinstance(thing, type) and issubclass(thing, BaseException) and thing.__module__.startswith("touchline")
    },
    key=lambda error: f"{error.__module__}.{error.__qualname__}",
)


def make(kind: type[BaseException]) -> BaseException:
    """An error in its real shape: with an argument for every parameter of its constructor, attributes and a note."""
    if kind.__init__ in (BaseException.__init__, Exception.__init__, ValueError.__init__, OSError.__init__):
        error = kind(ARGUMENTS["message"])
    else:
        given: tuple[list[Any], dict[str, Any]] = [], {}
        for name, parameter in inspect.signature(kind).parameters.items():
            if parameter.kind is parameter.KEYWORD_ONLY:
                given[1][name] = ARGUMENTS[name]
            else:
                given[0].append(ARGUMENTS[name])
        error = kind(*given[0], **given[1])
    error.add_note("after 3 of 7 episodes")
    return error


def shape(value: object) -> object:
    """An error with all that is in it, comparable: exceptions themselves are only equal to themselves."""
    if isinstance(value, BaseException):
        return (type(value), str(value), shape(value.args), {name: shape(part) for name, part in vars(value).items()})
    if isinstance(value, list | tuple):
        return [shape(part) for part in value]
    if isinstance(value, EpisodeResult):
        return [value.key, value.episode_id, value.duplicate, shape(value.error)]
    return value


def test_errors_of_all_three_distributions_are_looked_at() -> None:
    names = {f"{error.__module__}.{error.__qualname__}" for error in ERRORS}

    assert {"touchline.errors.LoadError", "touchline.datasets.errors.DatasetError", "touchline_protos.shm.ring_control.RingError"} <= names
    assert {"touchline_server.errors.StoreInUseError", "touchline_server.config.source.ConfigError"} <= names
    assert len(names) > 40


@pytest.mark.parametrize("kind", ERRORS, ids=lambda kind: f"{kind.__module__}.{kind.__qualname__}")
def test_error_survives_pickling_and_copying(kind: type[BaseException]) -> None:
    error = make(kind)

    for made in COPIES:
        assert shape(made(error)) == shape(error)


def test_shapes_of_errors_differ_where_something_is_lost() -> None:
    full = LoadError("message", RESULTS)

    assert shape(LoadError("message", RESULTS)) == shape(full)
    assert shape(LoadError("message", RESULTS[:1])) != shape(full)
    assert shape(NotReadyError("message")) != shape(NotReadyError("message", COUNTS))
    assert shape(OverLimitError("message")) != shape(OverLimitError("message", 2.5))
    assert shape(UnacknowledgedError("message", RESULTS)) != shape(LoadError("message", RESULTS))


def load_refused(address: str) -> int:
    columns = {"obs": np.zeros((5, 3), np.float32), "action": np.zeros((5, 2), np.float32), "reward": np.zeros(5, np.float32)}
    with ReplayClient(address) as client:
        return client.load([columns, {**columns, "obs": np.zeros((4, 3), np.float32)}])


def sample_nothing(address: str) -> None:
    with ReplayClient(address) as client:
        client.clear()
        client.sample(as_numpy=True)


def test_errors_of_real_calls_come_out_of_a_pool_of_processes() -> None:
    """The parent of a worker whose error cannot be unpickled waits forever."""
    with ServerThread(make_config()) as server, multiprocessing.get_context("spawn").Pool(1) as pool:
        with pytest.raises(LoadError, match="1 of 2 episodes were refused") as refused:
            pool.apply_async(load_refused, (server.address,)).get(timeout=120)
        with pytest.raises(NotReadyError) as empty:
            pool.apply_async(sample_nothing, (server.address,)).get(timeout=120)

    assert [result.error is None for result in refused.value.results] == [True, False]
    assert "obs" in str(refused.value.results[1].error)
    assert empty.value.counts is not None and empty.value.counts.episodes_stored == 0
