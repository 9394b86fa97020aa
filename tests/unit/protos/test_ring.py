"""The shared-memory ring on its own: both ends in one process."""

from __future__ import annotations

import ctypes
import fcntl
import gc
import os
import select
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from touchline_protos.shm import ring as ring_module
from touchline_protos.shm import ring_control, sealed_memory
from touchline_protos.shm.ring import RingError, RingGeometry, RingReader, RingWriter, shared_memory_id, sweep_dead_rings
from touchline_protos.shm.ring_slots import PAGE

pytestmark = pytest.mark.skipif(not shared_memory_id(), reason="rings need Linux on x86-64")

GEOMETRY = RingGeometry.of(4, 1000)


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of shared memory for one test's rings: other servers on this machine neither see nor sweep it."""
    with tempfile.TemporaryDirectory(prefix="rings-", dir=ring_module.SHARED_MEMORY_DIR) as name:
        monkeypatch.setattr(ring_module, "SHARED_MEMORY_DIR", Path(name))
        yield Path(name)


@pytest.fixture
def writer(folder: Path) -> Iterator[RingWriter]:
    writer = RingWriter(GEOMETRY)
    yield writer
    writer.close()


def attach(writer: RingWriter, **changes: object) -> RingReader:
    """Attaches while a thread hands over the memory, as the server's event loop does."""
    offer = {"path": str(writer.path), "token": writer.token, "geometry": GEOMETRY, "size_bytes": GEOMETRY.size_bytes} | changes
    done = threading.Event()

    def hand_over() -> None:
        while not done.is_set():
            if select.select([writer.handover], [], [], 0.01)[0]:
                writer.handover.serve()

    thread = threading.Thread(target=hand_over)
    thread.start()
    try:
        return RingReader(**offer)  # type: ignore[arg-type]
    finally:
        done.set()
        thread.join()


def test_ring_batches_arrive_whole_and_in_order(writer: RingWriter) -> None:
    reader = attach(writer)
    batches = 2000
    received = []

    def write() -> None:
        written = 0
        while written < batches:
            for slot in writer.control.free_slots()[: batches - written]:
                np.frombuffer(writer.slots.array(slot), np.int64)[:] = written
                writer.control.publish(slot, 0)
                written += 1

    thread = threading.Thread(target=write)
    thread.start()
    while len(received) < batches:
        taken = reader.control.take()
        if taken is not None:
            values = np.frombuffer(reader.slots.array(taken[0]), np.int64)
            assert (values == values[0]).all()
            received.append(int(values[0]))
            reader.control.free(taken[0])
    thread.join()

    assert received == list(range(batches))


def test_ring_held_slot_is_not_written_while_others_go_round(writer: RingWriter) -> None:
    reader = attach(writer)
    slot = writer.control.free_slots()[0]
    writer.control.publish(slot, 0)
    held = reader.control.take()

    used = set()
    for _ in range(20):
        free = writer.control.free_slots()[0]
        writer.control.publish(free, 0)
        taken = reader.control.take()
        assert taken is not None
        used.add(taken[0])
        reader.control.free(taken[0])

    assert held is not None and held[0] not in used
    assert reader.control.held == 1


def test_ring_full_gives_no_slot_until_one_is_freed(writer: RingWriter) -> None:
    reader = attach(writer)
    for _ in range(GEOMETRY.slots):
        slot = writer.control.free_slots()[0]
        writer.control.publish(slot, 0)
    assert writer.control.free_slots() == []

    taken = [reader.control.take() for _ in range(GEOMETRY.slots)]
    assert taken[2] is not None
    reader.control.free(taken[2][0])

    assert writer.control.free_slots() == [taken[2][0]]


def test_ring_empty_gives_nothing_and_interrupt_ends_the_wait(writer: RingWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = attach(writer)
    assert reader.control.take() is None

    monkeypatch.setattr(ring_control, "MAX_SLEEP_S", 60.0)  # without the interrupt this would outlast the test's limit
    thread = threading.Thread(target=reader.control.take)
    thread.start()
    while thread.is_alive():
        reader.control.interrupt()
        thread.join(0.01)

    assert reader.control.take() is None


def test_ring_publish_carries_the_number_of_names_that_a_batch_needs(writer: RingWriter) -> None:
    reader = attach(writer)
    slot = writer.control.free_slots()[0]

    writer.control.publish(slot, 7)

    assert reader.control.take() == (slot, 7)


def test_ring_socket_is_private_and_gone_after_the_handover_while_the_memory_stays(writer: RingWriter) -> None:
    assert writer.path.stat().st_mode & 0o777 == 0o600
    assert os.fstat(writer._file).st_blocks * 512 >= GEOMETRY.size_bytes

    reader = attach(writer)
    writer.handover.close()

    assert not writer.path.exists()
    slot = writer.control.free_slots()[0]
    writer.control.publish(slot, 0)
    assert reader.control.take() is not None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"path": "/etc/passwd"}, "is not the name of a ring"),
        ({"path": "{folder}/../etc/passwd"}, "is not the name of a ring"),
        ({"path": "{folder}/touchline-" + "0" * 32}, "No such file"),
        ({"size_bytes": GEOMETRY.size_bytes + PAGE}, "bytes offered"),
        ({"geometry": RingGeometry(3, PAGE), "size_bytes": RingGeometry(3, PAGE).size_bytes}, "is not 16384 bytes that cannot shrink"),
        ({"geometry": RingGeometry(1, PAGE)}, "1 slots"),
        ({"geometry": RingGeometry(4, 100)}, "slots of 100 bytes"),
        ({"geometry": RingGeometry(1 << 40, PAGE)}, "slots"),
        ({"token": bytes(16)}, "not the ring that was offered"),
    ],
)
def test_reader_refuses_an_offer_that_does_not_fit(writer: RingWriter, folder: Path, changes: dict[str, object], words: str) -> None:
    changes = {name: value.format(folder=folder) if isinstance(value, str) else value for name, value in changes.items()}
    with pytest.raises(RingError, match=words):
        attach(writer, **changes)


def test_reader_refuses_a_link(writer: RingWriter, folder: Path) -> None:
    link = folder / f"touchline-{'a' * 31}0"
    link.symlink_to(writer.path)
    try:
        with pytest.raises(RingError):
            attach(writer, path=str(link))
    finally:
        link.unlink()


def test_reader_refuses_a_slot_that_is_out_of_range(writer: RingWriter) -> None:
    reader = attach(writer)
    writer.control.publish(0, 0)
    reader.control._words[ring_control._ORDER] = 99

    with pytest.raises(RingError, match="slot 99"):
        reader.control.take()


def test_writer_without_memory_raises_and_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, offset: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    files = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr("touchline_protos.shm.sealed_memory.os.posix_fallocate", full)

    with pytest.raises(RingError, match=r"no memory for a ring of 20480 bytes: No space left on device"):
        RingWriter(GEOMETRY)

    assert list(folder.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == files


def test_writer_without_the_folder_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    files = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(ring_module, "SHARED_MEMORY_DIR", Path("/dev/shm/none-here"))

    with pytest.raises(RingError, match=r"no ring in /dev/shm/none-here: No such file"):
        RingWriter(GEOMETRY)

    assert len(os.listdir("/proc/self/fd")) == files


# What a malicious learner can do to the memory


def received(writer: RingWriter) -> int:
    """Returns the file descriptor that a learner gets, and can write to."""
    done = threading.Thread(target=lambda: (select.select([writer.handover], [], []), writer.handover.serve()))
    done.start()
    [file] = sealed_memory.receive(str(writer.path), [GEOMETRY.size_bytes])
    done.join()
    return file


@pytest.mark.parametrize(
    "harm",
    [
        lambda file: os.ftruncate(file, 0),
        lambda file: os.ftruncate(file, PAGE),
        lambda file: os.ftruncate(file, GEOMETRY.size_bytes + PAGE),
        lambda file: os.truncate(f"/proc/self/fd/{file}", 0),
        lambda file: os.close(os.open(f"/proc/self/fd/{file}", os.O_RDWR | os.O_TRUNC)),
        lambda file: os.posix_fallocate(file, GEOMETRY.size_bytes, PAGE),
        lambda file: os.pwrite(file, b"beyond", GEOMETRY.size_bytes),
        lambda file: fcntl.fcntl(file, 1033, 8),  # F_SEAL_WRITE: would leave the server unable to write
    ],
    ids=["empty", "one page", "grown", "by path", "opened anew", "allocated", "written beyond", "sealed"],
)
def test_memory_handed_over_cannot_be_resized(writer: RingWriter, harm: Callable[[int], object]) -> None:
    file = received(writer)

    with pytest.raises(OSError):
        harm(file)

    assert os.fstat(file).st_size == GEOMETRY.size_bytes
    np.frombuffer(writer.slots.whole_array(), np.uint8)[:] = 7  # a missing page would end this process
    os.close(file)


def test_memory_with_holes_and_overwritten_stays_usable(writer: RingWriter) -> None:
    file = received(writer)
    libc = ctypes.CDLL(None, use_errno=True)
    keep_size, punch_hole = 1, 2

    assert libc.fallocate(file, keep_size | punch_hole, ctypes.c_long(0), ctypes.c_long(GEOMETRY.size_bytes)) == 0
    np.frombuffer(writer.slots.whole_array(), np.uint8)[:] = 7
    os.pwrite(file, b"\xff" * GEOMETRY.size_bytes, 0)

    assert writer.control.free_slots() == []  # no slot is ever free again, which only hurts this learner
    os.close(file)


def test_reader_refuses_memory_that_can_shrink(folder: Path) -> None:
    """The learner is protected from its server in the same way."""
    path = folder / f"touchline-{'a' * 32}"
    with tempfile.TemporaryFile() as file:
        file.truncate(GEOMETRY.size_bytes)
        handover = sealed_memory.Handover(path, [file.fileno()])
        thread = threading.Thread(target=lambda: (select.select([handover], [], []), handover.serve()))
        thread.start()
        with pytest.raises(RingError, match=r"cannot shrink|Invalid argument"):
            RingReader(str(path), bytes(16), GEOMETRY, GEOMETRY.size_bytes)
        thread.join()
        handover.close()


def test_reader_without_an_answer_gives_up(writer: RingWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealed_memory, "ANSWER_S", 0.05)

    with pytest.raises(RingError, match="no memory received within"):
        RingReader(str(writer.path), writer.token, GEOMETRY, GEOMETRY.size_bytes)


def test_free_in_a_forked_child_leaves_the_parents_slot_alone(writer: RingWriter) -> None:
    reader = attach(writer)
    slot = writer.control.free_slots()[0]
    writer.control.publish(slot, 0)
    assert reader.control.take() == (slot, 0)

    child = os.fork()
    if child == 0:
        reader.control.free(slot)
        os._exit(0)
    os.waitpid(child, 0)

    assert reader.control.held == 1
    assert slot not in writer.control.free_slots()


def test_ring_that_was_dropped_leaves_no_class(writer: RingWriter) -> None:
    """A class is part of a reference cycle, so only the garbage collector frees it."""

    def classes() -> int:
        return sum(issubclass(type(one), type) for one in gc.get_objects())

    attach(writer)
    gc.collect()
    gc.disable()
    try:
        before = classes()
        for _ in range(5):
            attach(writer)
        assert classes() == before
    finally:
        gc.enable()


def test_sweep_removes_the_rings_of_killed_servers_only(writer: RingWriter, folder: Path) -> None:
    code = (
        "import os, pathlib, signal, sys; from touchline_protos.shm import ring; ring.SHARED_MEMORY_DIR = pathlib.Path(sys.argv[1]); "
        "w = ring.RingWriter(ring.RingGeometry.of(2, 10)); print(w.path, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    left = Path(killed.stdout.strip())
    assert left.exists()

    assert sweep_dead_rings() == 1

    assert not left.exists()
    assert writer.path.exists()
