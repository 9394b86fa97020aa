"""Actors fork: a child must add and sample by its own channel while its parent's client goes on working. What was open at the fork stays
the parent's: the child gets a ForkError, whatever lock a thread of the parent held.

The parents are scripts in processes of their own: a test process with a server and several channels in it is no place to fork in.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

COMMON = """
import os, sys, threading
import numpy as np
from touchline import EpisodeWriter, ForkError, ReplayClient

def episode():
    return {"obs": np.zeros((10, 2), np.float32), "action": np.zeros((10, 1), np.float32), "reward": np.zeros(10, np.float32)}

def wait(pid):
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 0, f"the child ended with {code}"

def run_child(act):
    pid = os.fork()
    if pid == 0:
        try:
            act()
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    return pid

def refuses(use, advice):
    try:
        use()
    except ForkError as error:
        assert advice in str(error), error
    else:
        raise AssertionError("no ForkError")

client = ReplayClient(sys.argv[1], as_numpy=True, timeout_s=20, client_id="family")
client.add(episode())
"""

SCRIPTS = {
    "os-fork": """
def act():
    client.add(episode())
    client.sample()
    with client.batches() as stream:
        next(stream)

for _ in range(3):
    pid = run_child(act)
    client.add(episode())
    client.sample()
    wait(pid)
    client.sample()
assert client.num_eps == 7, client.num_eps
assert client.counts().episodes_duplicate == 0
""",
    "child-exits-normally": """
stream = client.batches()
next(stream)
pid = os.fork()
if pid == 0:
    client.add(episode())
    refuses(lambda: next(stream), "call batches() there")
    sys.exit(0)
wait(pid)
next(stream)
assert client.num_eps == 2
""",
    "child-leaves-the-blocks-of-its-parent": """
writer = EpisodeWriter(client)
row = {name: value[0] for name, value in episode().items()}
with client.batches() as stream, client.episodes() as episodes, writer:
    for _ in range(3):
        next(stream)
        writer.append(row)
    pid = os.fork()
    if pid:
        wait(pid)
        next(stream)
        assert len(list(episodes)) == 1
        writer.append(row)
if pid == 0:
    sys.exit(0)  # which runs the handlers at exit
assert client.num_eps == 2, client.num_eps
assert client.counts().steps_stored == 14, client.counts()
""",
    "multiprocessing": """
import multiprocessing

def act(number):
    with EpisodeWriter(client, actor=f"child-{number}") as writer:
        for _ in range(5):
            writer.append({name: value[0] for name, value in episode().items()})
    client.sample()

children = [multiprocessing.get_context("fork").Process(target=act, args=(number,)) for number in range(3)]
for child in children:
    child.start()
    client.sample()
for child in children:
    child.join()
assert [child.exitcode for child in children] == [0, 0, 0]
assert client.num_eps == 4
assert client.add(episode()) == 5
""",
    "open-stream": """
def act():
    refuses(lambda: next(stream), "call batches() there")
    stream.close()
    with client.batches() as mine:
        assert len([next(mine) for _ in range(50)]) == 50

with client.batches() as stream:
    next(stream)
    pid = run_child(act)
    for _ in range(200):
        next(stream)
    wait(pid)
    for _ in range(200):
        next(stream)
""",
    "open-episodes": """
def act():
    for use in (lambda: next(episodes), lambda: episodes.total, lambda: episodes.total_steps):
        refuses(use, "call episodes() there")
    episodes.close()
    assert len(list(client.episodes())) == 3

for _ in range(2):
    client.add(episode())
episodes = client.episodes()
next(episodes)
wait(run_child(act))
assert len(list(episodes)) == 2
""",
    "thread-that-waits-for-the-server": """
from touchline import UnavailableError
from touchline._learner import stream as module

real, failures, inside, parent = module.StreamSession, [1, 1], threading.Event(), os.getpid()

def open_session(*arguments, **options):
    if failures and os.getpid() == parent:
        failures.pop()
        raise UnavailableError("as the test wants")
    return real(*arguments, **options)

def delays():
    yield 0.0
    inside.set()
    threading.Event().wait()

module.StreamSession = open_session
client._rpc.delays = delays
batches = client.batches()
threading.Thread(target=lambda: next(batches), daemon=True).start()
assert inside.wait(20)

def act():
    refuses(lambda: next(batches), "call batches() there")
    next(client.batches())

wait(run_child(act))
os._exit(0)
""",
    "thread-that-holds-every-lock": """
# A thread of the parent is caught holding the locks that each of them uses.
writer = EpisodeWriter(client)
batches, episodes = client.batches(ring=False), client.episodes()
next(batches)
next(episodes)
held, parent = threading.Event(), os.getpid()

def hold():
    with writer._state.sender._status.changed, client._channel._lock, batches._source._closed._cond, episodes._source._closed._cond:
        held.set()
        threading.Event().wait()

threading.Thread(target=hold, daemon=True).start()
assert held.wait(20)

def act():
    global writer, batches, episodes
    # gRPC's destructor of a call takes a lock that its threads in the parent take as well.
    type(batches._source._session._call).__del__ = lambda call: os._exit(2)
    for use in (lambda: writer.append({}), lambda: writer.end_episode(), lambda: writer.flush(), lambda: writer.counters):
        refuses(use, "make a writer there")
    refuses(lambda: next(batches), "call batches() there")
    refuses(lambda: next(episodes), "call episodes() there")
    for thing in (writer, batches, episodes):
        thing.close()
    writer = batches = episodes = None
    client.add(episode())
    client.sample()

pid = os.fork()
if pid == 0:
    act()
    sys.exit(0)  # by all handlers, and by the end of the interpreter
wait(pid)
os._exit(0)
""",
    "busy-writer": """
row = {name: value[0] for name, value in episode().items()}
writer = EpisodeWriter(client)
stop = threading.Event()
def ask():
    while not stop.is_set():
        client.counts()
asker = threading.Thread(target=ask)
asker.start()

def act():
    client.add(episode())
    refuses(lambda: writer.append(row), "make a writer there")
    writer.close()
    with EpisodeWriter(client) as mine:
        for _ in range(2):
            mine.append(row)
    assert mine.counters.acknowledged == 1

pids = []
for number in range(10):
    for _ in range(5):
        writer.append(row)
    writer.end_episode()
    pids.append(run_child(act))
for pid in pids:
    wait(pid)
stop.set()
asker.join()
writer.close(20)
assert writer.counters.acknowledged == 10
assert client.num_eps == 31, client.num_eps
assert client.counts().episodes_duplicate == 0
""",
    "while-waiting": """
waiter = threading.Thread(target=lambda: client.wait_until_ready(1_000_000), daemon=True)
waiter.start()
wait(run_child(lambda: client.add(episode())))
client.sample()
assert client.num_eps == 2
os._exit(0)
""",
}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    environment = os.environ | {"TOUCHLINE_CONFIG__BUFFER_SIZE": "100000", "TOUCHLINE_STORAGE__DEVICE": "cpu"}
    server = subprocess.Popen(
        [sys.executable, "-m", "touchline_server", "serve", "--port", "0"],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=tmp_path_factory.mktemp("server"),
    )
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        assert line.startswith("listening on ")
        yield line.split()[-1]
    finally:
        server.terminate()
        assert server.wait(60) == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.parametrize("name", list(SCRIPTS))
def test_child_and_parent_both_go_on(address: str, tmp_path: Path, name: str) -> None:
    script = tmp_path / "parent.py"
    script.write_text(f"import sys\nfrom touchline import ReplayClient\nReplayClient(sys.argv[1]).clear()\n{COMMON}{SCRIPTS[name]}")
    plain = {key: value for key, value in os.environ.items() if key != "GRPC_ENABLE_FORK_SUPPORT"}

    ended = subprocess.run([sys.executable, str(script), address], capture_output=True, text=True, timeout=300, env=plain, check=False)

    assert ended.returncode == 0, ended.stderr


def test_child_of_a_parent_that_loaded_grpc_first_gets_an_error_and_does_not_hang(address: str, tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        f"import grpc\n{COMMON}\n"
        "from touchline import ForkError\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    try:\n"
        "        client.sample()\n"
        "        os._exit(1)\n"
        "    except ForkError:\n"
        "        os._exit(0)\n"
        "wait(pid)\n"
        "client.sample()\n"
    )
    plain = {key: value for key, value in os.environ.items() if key != "GRPC_ENABLE_FORK_SUPPORT"}

    ended = subprocess.run([sys.executable, str(script), address], capture_output=True, text=True, timeout=300, env=plain, check=False)

    assert ended.returncode == 0, ended.stderr
