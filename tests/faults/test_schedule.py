"""All faults together, overlapping, in an order that a seed decides: servers killed, stopped and started, networks that cut, stall
and lose, disks that are full or fail, second servers, snapshots, clears, actors killed with their spools. Nothing acknowledged is lost,
nothing is doubled.
"""

from __future__ import annotations

import contextlib
import ctypes
import random
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import grpc
import pytest

from support import failing_disk, scheduled_actor
from support.durable_cases import assert_whole, client_of, contents, durable_config, keyed_episode, stored_keys
from support.fault_tally import SCHEDULED, SEED, note
from support.service_calls import DEADLINE_S, SERVICE, Caller, ServerProcess
from support.tcp_proxy import Line, TcpProxy
from touchline_protos.codec import encode_add_episode
from touchline_protos.v1 import replay_pb2 as pb
from touchline_server import ReplayBuffer
from touchline_server.durability import maintenance, recovery
from touchline_server.durability.database import FILE_NAME, OLDEST_KEY, Database

CALLERS = 3
SPOOLED = 7
"""Client number of the actor with a spool; lower numbers are the callers'."""
CAPACITY = 12_000
LONGEST = 50
DISK_BYTES = 160 << 20
TESTS = Path(__file__).parents[1]
LIBC = ctypes.CDLL(None, use_errno=True)
ANSWER_S = 5.0
"""The longest wait for an answer: a silent network would otherwise hold up a test that waits for a caller to finish."""
TRY_AGAIN = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.CANCELLED,
)
"""Statuses after which a call is retried, as the client does: a stopping server cancels the last calls that reach it."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path | None]:
    """A small file system of its own; None if none may be mounted, in which case no disk is filled."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if LIBC.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, f"size={DISK_BYTES}".encode()) != 0:
        yield None
        return
    yield folder
    assert LIBC.umount2(bytes(folder), 2) == 0


class Callers:
    """Actors that add without end and resend what was not acknowledged. A context manager."""

    def __init__(self, address: str) -> None:
        self._address = address
        self.acknowledged: dict[tuple[int, int], int] = {}
        """Episode id by client and sequence number, without cleared episodes."""
        self.cleared_below = 0
        """Lowest id that can be stored; an episode whose answer was lost may be acknowledged as a duplicate after it was cleared."""
        self.total = 0
        self.refusals = 0
        self.sent_again = 0
        self.stopping = threading.Event()
        self._pool = ThreadPoolExecutor(CALLERS)
        self._acting: list[Future[None]] = []
        self._turns = [threading.Lock() for _ in range(CALLERS)]
        self._news = threading.Condition()

    def wait_for(self, more: int) -> None:
        """Waits for ``more`` further acknowledgements."""
        with self._news:
            wanted = self.total + more
            assert self._news.wait_for(lambda: self.total >= wanted or self._fault() is not None, DEADLINE_S), "nothing is acknowledged"
        fault = self._fault()
        if fault is not None:
            raise fault

    def wait_for_refusal(self, timeout_s: float = 5.0) -> None:
        """Waits until an add is refused, or is not answered."""
        with self._news:
            before = self.refusals
            self._news.wait_for(lambda: self.refusals > before, timeout_s)

    @contextlib.contextmanager
    def resting(self) -> Iterator[None]:
        """Pauses the actors for the block, with no call in progress."""
        with contextlib.ExitStack() as stack:
            for turn in self._turns:
                stack.enter_context(turn)
            yield

    def __enter__(self) -> Self:
        self._acting = [self._pool.submit(self._act, client) for client in range(CALLERS)]
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stopping.set()
        self._pool.shutdown()

    def _fault(self) -> BaseException | None:
        return next((acting.exception() for acting in self._acting if acting.done()), None)

    def _act(self, client: int) -> None:
        sequence = 0
        with Caller(self._address) as caller:
            while True:
                episode, attempts, answer = encode_add_episode(keyed_episode(client, sequence)), 0, None
                # Finish a call that has begun: otherwise it would be unknown whether its episode is stored.
                while answer is None:
                    with self._turns[client]:
                        answer = self._try(caller, episode)
                        if answer is not None:
                            with self._news:
                                if answer.episode_id >= self.cleared_below:
                                    self.acknowledged[client, sequence] = answer.episode_id
                                self.total += 1
                                self.sent_again += attempts > 0
                                self._news.notify_all()
                    if answer is None:
                        attempts += 1
                        threading.Event().wait(0.05)
                sequence += 1
                if self.stopping.is_set():
                    return

    def _try(self, caller: Caller, episode: bytes) -> pb.AddEpisodeResponse | None:
        try:
            answer = caller.channel.unary_unary(f"{SERVICE}AddEpisode")(episode, timeout=ANSWER_S)
            return pb.AddEpisodeResponse.FromString(answer)
        except grpc.RpcError as error:
            if error.code() not in TRY_AGAIN:
                raise
            with self._news:
                self.refusals += 1
                self._news.notify_all()
            return None


class SpoolingActor:
    """An actor in a process of its own. The episodes that it has ended are in its spool or on the server."""

    def __init__(self, address: str, spool_dir: Path) -> None:
        self._address, self._spool_dir = address, spool_dir
        self.ended = 0
        self._process = self._start()

    def play(self, episodes: int) -> None:
        """Plays episodes and waits until each has ended."""
        assert self._process.stdin is not None and self._process.stdout is not None
        for _ in range(episodes):
            self._process.stdin.write("\n")
            self._process.stdin.flush()
            assert self._process.stdout.readline() == f"ended {self.ended}\n"
            self.ended += 1

    def kill(self) -> None:
        """Kills the actor while it sends any remaining episodes, and starts it again."""
        self._process.kill()
        self._process.communicate()
        self._process = self._start()

    def finish(self) -> str:
        """Sends everything; returns the actor's report."""
        out, _ = self._process.communicate(timeout=2 * scheduled_actor.CLOSING_S)
        assert self._process.returncode == 0
        return out.strip()

    def end(self) -> None:
        """Ends the actor, whatever it does."""
        self._process.kill()
        self._process.communicate()

    def _start(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "support.scheduled_actor", self._address, str(SPOOLED), str(self.ended), str(self._spool_dir)]
        return subprocess.Popen(command, cwd=TESTS, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)


class Schedule:
    """A random schedule of faults, in sequence and at the same time. A context manager that stops what it started."""

    def __init__(self, folder: Path, disk: Path | None, rng: random.Random) -> None:
        self._rng = rng
        self._folder = folder
        self._disk = disk
        self.data_dir = (disk or folder) / "data"
        self.durability = rng.choice(["sync", "batch"])
        self.counts: dict[str, int] = {}
        """Number of faults of each kind."""
        self._full = False
        self._rules = folder / "rules.json"
        self._can_fail = failing_disk._library() is not None
        self.server = self._serve()
        self.proxy = TcpProxy(self.server.address, seed=rng.randrange(1 << 30))
        self.proxy.__enter__()
        self.callers = Callers(self.proxy.address)
        self.callers.__enter__()
        self.actor = SpoolingActor(self.proxy.address, folder / "spool")
        self._sudden: dict[str, Callable[[], None]] = {
            "kill": self._kill,
            "restart": self._restart,
            "reset": self.proxy.reset,
            "snapshot": self._snapshot,
            "check": self._check,
            "second_server": self._second_server,
            "recovery_of_a_store_in_use": self._recover,
            "clear": self._clear,
            "actor_kill": self.actor.kill,
        }
        if self._can_fail:
            self._sudden["disk_failure"] = self._fail_disk
        self._lasting: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
            "stop": self._stopped,
            "cut": self._cut,
            "silence": self._silent,
            "loss": self._lossy,
        }
        if disk is not None:
            self._lasting["full_disk"] = self._full_disk

    def go_wrong(self) -> None:
        """Causes one fault, sometimes another within it, and adds some episodes after it."""
        rng = self._rng
        lasting = rng.choice(list(self._lasting)) if rng.random() < 0.55 else ""
        # Faults that need an answer from the server cannot happen while it is stopped.
        quick = ["kill", "reset", "actor_kill"]
        sudden = rng.choice(quick if lasting == "stop" else list(self._sudden)) if not lasting or rng.random() < 0.4 else ""
        print(f"{self.faults + 1}: {' with '.join(filter(None, (lasting, sudden)))}, {self.callers.total} acknowledged", flush=True)
        with contextlib.ExitStack() as stack:
            if lasting:
                self._count(lasting)
                stack.enter_context(self._lasting[lasting]())
            if sudden:
                self._count(sudden)
                self.actor.play(rng.randint(0, 3))
                self._sudden[sudden]()
            if lasting:
                threading.Event().wait(rng.uniform(0.05, 0.6))
        self.actor.play(rng.randint(0, 3))
        self.callers.wait_for(rng.randint(3, 20))

    @property
    def faults(self) -> int:
        """Faults so far."""
        return sum(self.counts.values())

    def finish(self) -> pb.Counts:
        """Waits until everything has arrived and stops all processes cleanly; returns the server's last counts."""
        assert self.actor.finish() == "left 0 refused 0 dropped 0"
        self.callers.__exit__(None, None, None)
        self.callers.wait_for(0)
        with Caller(self.server.address) as caller:
            counts = caller.counts()
        self.server.signal(signal.SIGTERM)
        assert self.server.wait() == 0, self.server.log
        return counts

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            print(f"the server's log ends with\n{self.server.log[-5000:]}")
            if self.server.process.poll() is None:
                self.server.signal(signal.SIGCONT)
        self.callers.__exit__(kind, error, trace)
        self.actor.end()
        self.proxy.__exit__(kind, error, trace)
        self.server.__exit__(kind, error, trace)

    @property
    def _locked(self) -> bool:
        """Whether the server, having started on a full disk, holds the store exclusively, as it reports."""
        return "cannot look into the store before the server's next start" in self.server.log

    # Sudden ones

    def _kill(self) -> None:
        self.server.signal(signal.SIGKILL)
        self.server.wait()
        self._start()

    def _restart(self) -> None:
        self.server.signal(signal.SIGTERM)
        assert self.server.wait() == 0, self.server.log
        self._start()

    def _fail_disk(self) -> None:
        """Makes a system call fail, once or for good; as an operator would, kills the server, repairs the disk and starts it again."""
        rng = self._rng
        fault = failing_disk.Fault(
            rng.choice(["write", "sync"]), rng.choice(["-wal", "db"]), done=rng.random() < 0.3, times=rng.choice([1, 1, 1 << 30])
        )
        failing_disk.write_rules(self._rules, fault)
        self.callers.wait_for_refusal(2.0)  # a failure without an add counts, too
        self.server.signal(rng.choice([signal.SIGKILL, signal.SIGTERM]))
        self.server.wait()
        failing_disk.write_rules(self._rules)
        self._start()

    def _snapshot(self) -> None:
        with self.callers.resting():
            before = dict(self.callers.acknowledged)
        if self._locked:
            return
        target = self._folder / "snapshot"
        maintenance.snapshot(self.data_dir, target)
        check_store(target, before)
        shutil.rmtree(target)

    def _check(self) -> None:
        if not self._locked:
            assert maintenance.check(self.data_dir).damage == []

    def _second_server(self) -> None:
        (self._folder / "second").mkdir(exist_ok=True)
        with self._serve(self._folder / "second") as second:
            assert second.wait() == 1
            assert "is in use by another touchline-server" in second.log

    def _recover(self) -> None:
        with pytest.raises(Exception, match="is in use by another touchline-server"):
            recovery.recover(self.data_dir, accept_loss=True)

    def _clear(self) -> None:
        # The actor with a spool continues; the counts include what it stores meanwhile.
        with self.callers.resting(), Caller(self.server.address) as caller:
            if self._full or self._locked:
                return  # refused, as adds are; or it would be unknown what was cleared
            caller.stub.Clear(pb.ClearRequest(), timeout=DEADLINE_S)
            self.callers.acknowledged.clear()
            with contextlib.closing(Database(self.data_dir / FILE_NAME, read_only=True)) as database:
                self.callers.cleared_below = int(str(database.meta(OLDEST_KEY, 0)))

    # Lasting ones

    @contextlib.contextmanager
    def _stopped(self) -> Iterator[None]:
        server = self.server
        server.signal(signal.SIGSTOP)
        yield
        if server is self.server:
            server.signal(signal.SIGCONT)

    @contextlib.contextmanager
    def _cut(self) -> Iterator[None]:
        self.proxy.cut()
        yield
        self.proxy.restore()

    @contextlib.contextmanager
    def _silent(self) -> Iterator[None]:
        self.proxy.pause()
        yield
        self.proxy.resume()

    @contextlib.contextmanager
    def _lossy(self) -> Iterator[None]:
        self.proxy.shape(Line(delay_s=0.005, stall_share=0.05, stall_s=0.1, reset_share=0.05))
        yield
        self.proxy.shape(Line())

    @contextlib.contextmanager
    def _full_disk(self) -> Iterator[None]:
        assert self._disk is not None
        ballast = self._disk / "ballast"
        self._full = True
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 16))
        self.callers.wait_for_refusal()
        yield
        ballast.unlink(missing_ok=True)
        self._full = False

    # Servers

    def _start(self) -> None:
        self.server.__exit__(None, None, None)
        self.server = self._serve()
        if self._full and not self._listens():
            # A server may refuse to start on a full disk, and says so.
            assert "full" in self.server.log or "space" in self.server.log, self.server.log
            assert self._disk is not None
            (self._disk / "ballast").unlink(missing_ok=True)
            self._count("starts_refused_on_a_full_disk")
            self.server.__exit__(None, None, None)
            self.server = self._serve()
        self.proxy.target = self.server.address

    def _listens(self) -> bool:
        try:
            return bool(self.server.address)
        except AssertionError:
            return False

    def _serve(self, folder: Path | None = None) -> ServerProcess:
        return ServerProcess(
            folder or self._folder,
            program=(failing_disk.__file__,) if self._can_fail else ("-m", "touchline_server"),
            FAILING_DISK_RULES=str(self._rules),
            TOUCHLINE_CONFIG__BUFFER_SIZE=str(CAPACITY),
            TOUCHLINE_STORAGE__DATA_DIR=str(self.data_dir),
            TOUCHLINE_STORAGE__DURABILITY=self.durability,
        )

    def _count(self, name: str) -> None:
        self.counts[name] = self.counts.get(name, 0) + 1


def check_store(data_dir: Path, acknowledged: dict[tuple[int, int], int]) -> None:
    """Asserts that every acknowledged episode that was not evicted is stored under its id, bit for bit, and none twice."""
    keys = [key for key in stored_keys(data_dir / "touchline.db").values() if key is not None]
    assert len(keys) == len(set(keys))
    buffer = ReplayBuffer(durable_config(data_dir, capacity=CAPACITY))
    found, counts = contents(buffer), buffer.counts()
    buffer.close()
    assert_whole(found)
    oldest = min(found, default=0)
    expected = {episode_id: name for name, episode_id in acknowledged.items() if episode_id >= oldest}
    there = {episode_id: (client_of(found[episode_id][0]), found[episode_id][1]) for episode_id in expected if episode_id in found}
    assert there == expected, f"lost: {sorted(expected.keys() - there.keys())}"
    evicted_early = [episode_id for episode_id in acknowledged.values() if episode_id < oldest]
    assert not evicted_early or counts.steps_stored > CAPACITY - LONGEST, "more was evicted than had to be"


@pytest.mark.slow
@pytest.mark.timeout(900 + 30 * SCHEDULED)
def test_all_faults_together_lose_and_double_nothing(tmp_path: Path, disk: Path | None) -> None:
    seed = SEED if SEED is not None else random.SystemRandom().randrange(1 << 30)
    print(f"FAULT_SEED={seed} FAULT_SCHEDULE={SCHEDULED}", flush=True)
    with Schedule(tmp_path, disk, random.Random(seed)) as schedule:
        schedule.callers.wait_for(5)
        while schedule.faults < SCHEDULED:
            schedule.go_wrong()
        counts = schedule.finish()

        check_store(schedule.data_dir, schedule.callers.acknowledged)
        # What was cleared or evicted meanwhile counts too: each episode was stored once, however often and by whichever actor it was sent.
        assert counts.episodes_added == schedule.callers.total + schedule.actor.ended
    kinds = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in sorted(schedule.counts.items()))
    print(
        f"seed {seed}, {schedule.durability}: {schedule.faults} faults ({kinds}), "
        f"{counts.episodes_added} stored, {schedule.callers.sent_again + counts.episodes_duplicate} sent again, 0 lost, 0 doubled"
    )
    note(
        scheduled_faults=schedule.faults,
        episodes_acknowledged=schedule.callers.total,
        episodes_spooled=schedule.actor.ended,
        sent_again=schedule.callers.sent_again,
        lost=0,
        doubled=0,
    )


def test_schedule_notices_what_is_lost_or_doubled(tmp_path: Path) -> None:
    buffer = ReplayBuffer(durable_config(tmp_path, capacity=CAPACITY))
    acknowledged = {(0, number): buffer.add_episode(keyed_episode(0, number)).episode_id for number in range(5)}
    buffer.close()
    check_store(tmp_path, acknowledged)

    with pytest.raises(AssertionError, match="lost"):
        check_store(tmp_path, acknowledged | {(0, 5): 5})
