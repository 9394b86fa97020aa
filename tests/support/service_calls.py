"""The service through raw gRPC, as a client without our library sees it, and servers to call."""

from __future__ import annotations

import contextlib
import gc
import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np

from support.serving import Config, ServerThread
from touchline_protos import Batch
from touchline_protos.codec import BatchDecoder, Episode, EpisodeKey, encode_add_episode
from touchline_protos.v1 import replay_pb2 as pb
from touchline_protos.v1 import replay_pb2_grpc

if TYPE_CHECKING:
    from typing_extensions import Self


DEADLINE_S = 120.0
"""The longest wait for something that takes a moment: a machine may be many times slower than this one, and busy."""
SERVICE = "/touchline.v1.Replay/"
CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
)


def make_config(**tables: dict[str, Any]) -> Config:
    """Returns the configuration of a small host buffer on a free port; ``tables`` replaces or adds keys."""
    defaults: dict[str, dict[str, Any]] = {
        "config": {"buffer_size": 2000, "batch_size": 8, "min_history": 100, "horizon": 3},
        "storage": {"device": "cpu"},
        "server": {"port": 0},
    }
    return Config(**{table: defaults.get(table, {}) | tables.get(table, {}) for table in defaults.keys() | tables.keys()})


def make_episode(rows: int = 20, *, seed: int = 0, obs: int = 4, **origin: Any) -> Episode:
    """Returns an episode of random values, with NaN where row 0 is undefined."""
    rng = np.random.default_rng(seed)
    columns = {
        "obs": rng.standard_normal((rows, obs), dtype=np.float32),
        "action": rng.standard_normal((rows, 2), dtype=np.float32),
        "reward": rng.standard_normal(rows, dtype=np.float32),
    }
    if rows:
        columns["action"][0] = columns["reward"][0] = np.nan
    return Episode(columns, **origin)


def key(sequence: int, *, client_id: str = "player", incarnation: int = 1) -> EpisodeKey:
    return EpisodeKey(client_id, incarnation, sequence)


def flatten(batch: Batch) -> dict[str, np.ndarray]:
    """Every array of a batch by name, on the host as numpy."""
    named = {name: getattr(batch, name) for name in ("obs", "action", "reward", "done", "task")} | dict(batch.extra)
    named |= {name: getattr(batch, name) for name in ("episode_id", "start", "actor", "policy_version", "probability")}
    if isinstance(batch.obs, dict):
        named |= {f"obs.{name}": array for name, array in named.pop("obs").items()}
    return {name: np.asarray(array) for name, array in named.items() if array is not None}


def assert_same_batch(found: Batch, expected: Batch) -> None:
    """Asserts that two batches are equal bit for bit, dtypes and shapes included."""
    one, other = flatten(found), flatten(expected)
    assert one.keys() == other.keys()
    for name in one:
        assert (one[name].dtype, one[name].shape) == (other[name].dtype, other[name].shape), name
        assert one[name].tobytes() == other[name].tobytes(), name
    names = {int(actor) for actor in one["actor"]}
    assert {number: found.actor_names[number] for number in names} == {number: expected.actor_names[number] for number in names}


def eventually(
    condition: Callable[[], bool], what: str | Callable[[], str], *, timeout_s: float = DEADLINE_S, every_s: float = 0.0
) -> None:
    """Polls until a condition holds that another process or thread fulfils at a time of its own; else fails with ``what``."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"{what if isinstance(what, str) else what()}: not within {timeout_s} s"
        time.sleep(every_s)


def collected(condition: Callable[[], bool]) -> Callable[[], bool]:
    """Returns the condition with a collection before it, for what happens once the test has dropped an object.

    One collection before :func:`eventually` is not enough: it does nothing while another thread collects, and it leaves what a thread
    that is about to end still refers to.
    """

    def holds() -> bool:
        gc.collect()
        return condition()

    return holds


def private_bytes(process_id: int) -> int:
    """Returns the private memory of a process, without memory shared with others or through files."""
    status = Path(f"/proc/{process_id}/status").read_text(encoding="utf-8")
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon:"))


class Refusal:
    """Answer to a refused call."""

    def __init__(self, error: grpc.RpcError) -> None:
        self.code = error.code()
        self.details = error.details()
        trailing = dict(error.trailing_metadata() or ())
        self.reason = trailing.get("touchline-reason", "")
        self.retry_after_ms = trailing.get("grpc-retry-pushback-ms", "")

    def __repr__(self) -> str:
        return f"{self.code} {self.reason}: {self.details}"


def refused(call: Callable[..., Any], *arguments: Any, **options: Any) -> Refusal:
    """Makes a call that must fail; returns its refusal."""
    try:
        answer = call(*arguments, **options)
    except grpc.RpcError as error:
        return Refusal(error)
    raise AssertionError(f"answered: {answer!r}"[:500])


class Stream:
    """A sampling stream. Iterates over its messages; requests are sent by :meth:`send`."""

    def __init__(self, channel: grpc.Channel) -> None:
        self._requests: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.call = channel.stream_stream(SERVICE + "SampleStream")(iter(self._requests.get, None), timeout=DEADLINE_S)
        self._decoder = BatchDecoder()
        self.batch_counts: list[int] = []
        """Number of batches that each frame completed."""
        self.told_actors: list[pb.ActorName] = []

    def send(self, message: bytes) -> None:
        self._requests.put(message)

    def open(self, *, credits: int, max_batches_per_frame: int = 0, **sample: Any) -> Self:
        fields = pb.SampleStreamOpen(sample=pb.SampleRequest(**sample), credits=credits, max_batches_per_frame=max_batches_per_frame)
        self.send(pb.SampleStreamRequest(open=fields).SerializeToString())
        return self

    def grant(self, batches: int) -> None:
        self.send(pb.SampleStreamRequest(credit=pb.SampleStreamCredit(batches=batches)).SerializeToString())

    def close(self) -> None:
        """Half-closes the stream."""
        self._requests.put(None)

    def cancel(self) -> None:
        self.call.cancel()
        self.close()

    def read(self, batches: int) -> list[Batch]:
        """Reads frames until this many batches are complete; a frame's batches count together."""
        done: list[Batch] = []
        while len(done) < batches:
            done += self._feed(next(self.call))
        assert len(done) == batches
        return done

    def rest(self) -> list[Batch]:
        """Reads until the server ends the stream with OK."""
        return [batch for message in self.call for batch in self._feed(message)]

    def _feed(self, message: bytes) -> list[Batch]:
        response = pb.SampleStreamResponse.FromString(message)
        for batch in (*response.group.batches, response.chunk.header):
            self.told_actors += batch.actors
        batches = self._decoder.feed(message)
        self.batch_counts.append(len(batches))
        return batches


class Caller:
    """A caller with its own channel to a server, using the stubs and the codec. A context manager."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.channel = grpc.insecure_channel(address, options=CHANNEL_OPTIONS)
        self.stub = replay_pb2_grpc.ReplayStub(self.channel)
        self._streams: list[Stream] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for stream in self._streams:
            stream.cancel()
        self.channel.close()

    def add(self, episode: Episode | bytes) -> pb.AddEpisodeResponse:
        """Adds an episode, or sends the given bytes."""
        message = episode if isinstance(episode, bytes) else encode_add_episode(episode)
        return pb.AddEpisodeResponse.FromString(self.raw("AddEpisode", message))

    def load(self, messages: Iterable[bytes]) -> pb.LoadEpisodesResponse:
        answer = self.channel.stream_unary(SERVICE + "LoadEpisodes")(iter(messages), timeout=DEADLINE_S)
        return pb.LoadEpisodesResponse.FromString(answer)

    def sample(self, **fields: Any) -> Batch:
        return BatchDecoder().sample_response(self.raw("Sample", pb.SampleRequest(**fields).SerializeToString()))

    def stream(self) -> Stream:
        self._streams.append(Stream(self.channel))
        return self._streams[-1]

    def raw(self, method: str, message: bytes, **options: Any) -> bytes:
        """Calls a unary method with any bytes."""
        return self.channel.unary_unary(SERVICE + method)(message, timeout=DEADLINE_S, **options)

    def counts(self) -> pb.Counts:
        return self.stub.Info(pb.InfoRequest(), timeout=DEADLINE_S).counts


class ServerProcess:
    """``touchline-server serve`` in a process of its own. A context manager that kills the process at the end if it still runs."""

    def __init__(self, folder: Path, *options: str, program: Sequence[str] = ("-m", "touchline_server"), **environment: str) -> None:
        self._log = folder / "server.err"
        inherited = {name: value for name, value in os.environ.items() if not name.upper().startswith("TOUCHLINE_")}
        defaults = {
            "TOUCHLINE_CONFIG__BUFFER_SIZE": "100000",
            "TOUCHLINE_CONFIG__MIN_HISTORY": "100",
            "TOUCHLINE_CONFIG__BATCH_SIZE": "8",
            "TOUCHLINE_STORAGE__DEVICE": "cpu",
            "TOUCHLINE_HTTP__ENABLED": "off",
        }
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [os.environ.get("SERVER_PYTHON", sys.executable), *program, "serve", *(options or ("--port", "0"))],
                cwd=folder,
                env=inherited | defaults | environment,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        self._address = self._page_address = ""

    @property
    def address(self) -> str:
        """Address that it listens on; waits until it is printed."""
        if not self._address:
            assert self.process.stdout is not None
            line = self.process.stdout.readline()
            assert line.startswith("listening on "), f"printed {line!r}; stderr:\n{self.log}"
            self._address = line.removeprefix("listening on ").strip()
        return self._address

    @property
    def page_address(self) -> str:
        """Address of its web page, which it prints behind its own; ``TOUCHLINE_HTTP__ENABLED`` must be ``on``."""
        if not self._page_address:
            assert self.address and self.process.stdout is not None
            line = self.process.stdout.readline()
            assert line.startswith("web page on http://"), f"printed {line!r}; stderr:\n{self.log}"
            self._page_address = line.removeprefix("web page on http://").strip("/\n")
        return self._page_address

    @property
    def log(self) -> str:
        return self._log.read_text(encoding="utf-8")

    @property
    def threads(self) -> int:
        """Current number of its threads."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("Threads:"))

    @property
    def private_bytes(self) -> int:
        """Its current private memory."""
        return private_bytes(self.process.pid)

    @property
    def peak_bytes(self) -> int:
        """Its peak memory, including shared memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))

    @property
    def open_files(self) -> int:
        """Current number of its open files and sockets."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        """Waits for its end and returns its exit code."""
        return self.process.wait(timeout=DEADLINE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


@contextlib.contextmanager
def serving(**tables: dict[str, Any]) -> Iterator[tuple[Any, Caller]]:
    """A server in this process with :func:`make_config`, and a channel to it."""
    with ServerThread(make_config(**tables)) as server, Caller(server.address) as caller:
        yield server, caller
