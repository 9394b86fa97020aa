"""Actors fork: a child must add and sample by its own channel while its parent's client goes on working.

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
from touchline import EpisodeWriter, ReplayClient

def episode():
    return {"obs": np.zeros((10, 2), np.float32), "action": np.zeros((10, 1), np.float32), "reward": np.zeros(10, np.float32)}

def wait(pid):
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code == 0, f"the child ended with {code}"

client = ReplayClient(sys.argv[1], as_numpy=True, timeout_s=20, client_id="family")
client.add(episode())
"""

SCRIPTS = {
    "os-fork": """
for _ in range(3):
    pid = os.fork()
    if pid == 0:
        try:
            client.add(episode())
            client.sample()
            with client.batches() as stream:
                next(stream)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
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
    next(stream)
    sys.exit(0)
wait(pid)
next(stream)
assert client.num_eps == 2
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
with client.batches() as stream:
    next(stream)
    pid = os.fork()
    if pid == 0:
        try:
            batches = [next(stream) for _ in range(50)]  # by a session of the child's own
            stream.close()
            os._exit(0 if len(batches) == 50 else 2)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    for _ in range(200):
        next(stream)
    wait(pid)
    for _ in range(200):
        next(stream)
""",
    "thread-that-waits-for-the-server": """
from touchline import UnavailableError
from touchline._learner import stream as module

real, failures, inside = module._Session, [1, 1], threading.Event()

def open_session(*arguments, **options):
    if failures:
        failures.pop()
        raise UnavailableError("as the test wants")
    return real(*arguments, **options)

def delays():
    yield 0.0
    inside.set()
    threading.Event().wait()

module._Session = open_session
client._calls.delays = delays
batches = client.batches()
threading.Thread(target=lambda: next(batches), daemon=True).start()
assert inside.wait(20)
pid = os.fork()
if pid == 0:
    try:
        failures.append(1)
        next(batches)
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
wait(pid)
os._exit(0)
""",
    "thread-that-takes-episodes-over": """
from touchline._learner import episodes as module

class Halting(list):
    def __iter__(self):
        inside.set()
        threading.Event().wait()

feed, inside, parent = module.EpisodeDecoder.feed, threading.Event(), os.getpid()

def feed_and_halt(decoder, message):
    found = feed(decoder, message)
    return Halting(found) if found and os.getpid() == parent else found

module.EpisodeDecoder.feed = feed_and_halt
for _ in range(3):
    client.add(episode())
episodes = client.episodes(newest=4)
threading.Thread(target=lambda: next(episodes), daemon=True).start()
assert inside.wait(20)
pid = os.fork()
if pid == 0:
    try:
        os._exit(0 if len(list(episodes)) == 4 else 2)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
wait(pid)
os._exit(0)
""",
    "busy-writer": """
writer = EpisodeWriter(client)
stop = threading.Event()
def ask():
    while not stop.is_set():
        client.counts()
asker = threading.Thread(target=ask)
asker.start()
pids = []
for number in range(10):
    for _ in range(5):
        writer.append({name: value[0] for name, value in episode().items()})
    writer.end_episode()
    pid = os.fork()
    if pid == 0:
        try:
            client.add(episode())
            for _ in range(2):
                writer.append({name: value[0] for name, value in episode().items()})
            writer.close(20)
            os._exit(0 if writer.counters.appended == 1 else 2)
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    pids.append(pid)
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
pid = os.fork()
if pid == 0:
    try:
        client.add(episode())
        os._exit(0)
    except BaseException as error:
        print(repr(error), file=sys.stderr, flush=True)
        os._exit(1)
wait(pid)
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
