"""The shared-memory ring by itself: both ends in one process."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from touchline_protos import ring as ring_module
from touchline_protos.ring import PAGE, RingError, RingGeometry, RingReader, RingWriter, shared_memory_id, sweep_dead_rings

pytestmark = pytest.mark.skipif(not shared_memory_id(), reason="rings need Linux on x86-64")

GEOMETRY = RingGeometry.of(4, 1000)


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of shared memory for the rings of a test alone: servers that others run on this machine neither see nor sweep it."""
    with tempfile.TemporaryDirectory(prefix="rings-", dir=ring_module.SHARED_MEMORY_DIR) as name:
        monkeypatch.setattr(ring_module, "SHARED_MEMORY_DIR", Path(name))
        yield Path(name)


@pytest.fixture
def writer(folder: Path) -> Iterator[RingWriter]:
    writer = RingWriter(GEOMETRY)
    yield writer
    writer.close()


def attach(writer: RingWriter, **changes: object) -> RingReader:
    offer = {"path": str(writer.path), "token": writer.token, "geometry": GEOMETRY, "size_bytes": GEOMETRY.size_bytes} | changes
    return RingReader(**offer)  # type: ignore[arg-type]


def test_ring_batches_arrive_whole_and_in_order(writer: RingWriter) -> None:
    reader = attach(writer)
    batches = 2000
    received = []

    def write() -> None:
        written = 0
        while written < batches:
            for slot in writer.free_slots()[: batches - written]:
                np.frombuffer(writer.slot_array(slot), np.int64)[:] = written
                writer.publish(slot, 0)
                written += 1

    thread = threading.Thread(target=write)
    thread.start()
    while len(received) < batches:
        taken = reader.take()
        if taken is not None:
            values = np.frombuffer(reader.slot_array(taken[0]), np.int64)
            assert (values == values[0]).all()
            received.append(int(values[0]))
            reader.free(taken[0])
    thread.join()

    assert received == list(range(batches))


def test_ring_held_slot_is_not_written_while_others_go_round(writer: RingWriter) -> None:
    reader = attach(writer)
    slot = writer.free_slots()[0]
    writer.publish(slot, 0)
    held = reader.take()

    used = set()
    for _ in range(20):
        free = writer.free_slots()[0]
        writer.publish(free, 0)
        taken = reader.take()
        assert taken is not None
        used.add(taken[0])
        reader.free(taken[0])

    assert held is not None and held[0] not in used
    assert reader.held == 1


def test_ring_full_gives_no_slot_until_one_is_freed(writer: RingWriter) -> None:
    reader = attach(writer)
    for _ in range(GEOMETRY.slots):
        slot = writer.free_slots()[0]
        writer.publish(slot, 0)
    assert writer.free_slots() == []

    taken = [reader.take() for _ in range(GEOMETRY.slots)]
    assert taken[2] is not None
    reader.free(taken[2][0])

    assert writer.free_slots() == [taken[2][0]]


def test_ring_empty_gives_nothing_and_interrupt_ends_the_wait(writer: RingWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = attach(writer)
    assert reader.take() is None

    monkeypatch.setattr(ring_module, "NAP_S", 60.0)  # without the interrupt this would outlast the test's limit
    thread = threading.Thread(target=reader.take)
    thread.start()
    while thread.is_alive():
        reader.interrupt()
        thread.join(0.01)

    assert reader.take() is None


def test_ring_publish_tells_how_many_names_a_batch_needs(writer: RingWriter) -> None:
    reader = attach(writer)
    slot = writer.free_slots()[0]

    writer.publish(slot, 7)

    assert reader.take() == (slot, 7)


def test_ring_file_is_private_reserved_and_gone_after_unlink(writer: RingWriter) -> None:
    status = writer.path.stat()
    assert status.st_mode & 0o777 == 0o600
    assert status.st_blocks * 512 >= GEOMETRY.size_bytes

    reader = attach(writer)
    writer.unlink()

    assert not writer.path.exists()
    slot = writer.free_slots()[0]
    writer.publish(slot, 0)
    assert reader.take() is not None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"path": "/etc/passwd"}, "no ring's name"),
        ({"path": "{folder}/../etc/passwd"}, "no ring's name"),
        ({"path": "{folder}/touchline-" + "0" * 32}, "No such file"),
        ({"size_bytes": GEOMETRY.size_bytes + PAGE}, "bytes offered"),
        ({"geometry": RingGeometry(3, PAGE), "size_bytes": RingGeometry(3, PAGE).size_bytes}, "not a file of this user of"),
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
    writer.publish(0, 0)
    reader._words[ring_module._ORDER] = 99

    with pytest.raises(RingError, match="slot 99"):
        reader.take()


def test_writer_without_room_raises_and_leaves_no_file(folder: Path) -> None:
    status = os.statvfs(folder)
    too_much = status.f_blocks * status.f_frsize * 2

    with pytest.raises(RingError, match="no ring of"):
        RingWriter(RingGeometry(2, -(-too_much // PAGE) * PAGE))

    assert list(folder.iterdir()) == []


def test_free_in_a_forked_child_leaves_the_parents_slot_alone(writer: RingWriter) -> None:
    reader = attach(writer)
    slot = writer.free_slots()[0]
    writer.publish(slot, 0)
    assert reader.take() == (slot, 0)

    child = os.fork()
    if child == 0:
        reader.free(slot)
        os._exit(0)
    os.waitpid(child, 0)

    assert reader.held == 1
    assert slot not in writer.free_slots()


def test_ring_that_is_gone_leaves_no_class(writer: RingWriter) -> None:
    """Classes are circles of references: only the garbage collector frees them."""

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
        "import os, pathlib, signal, sys; from touchline_protos import ring; ring.SHARED_MEMORY_DIR = pathlib.Path(sys.argv[1]); "
        "w = ring.RingWriter(ring.RingGeometry.of(2, 10)); print(w.path, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    left = Path(killed.stdout.strip())
    assert left.exists()

    assert sweep_dead_rings() == 1

    assert not left.exists()
    assert writer.path.exists()
