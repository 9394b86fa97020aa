"""The gate at which a fork waits, and the channel and the identity of a child."""

from __future__ import annotations

import threading

import pytest

from touchline import ForkError
from touchline._actor.keys import Identity
from touchline._rpc import fork
from touchline._rpc.channel import ServerChannel
from touchline._rpc.fork import ForkGate


def test_gate_lets_a_fork_wait_until_calls_are_out() -> None:
    gate = ForkGate()
    inside, leave, shut = threading.Event(), threading.Event(), threading.Event()

    def call() -> None:
        with gate:
            inside.set()
            leave.wait(60)

    def fork() -> None:
        gate.shut()
        shut.set()

    caller, forker = threading.Thread(target=call), threading.Thread(target=fork)
    caller.start()
    assert inside.wait(60)
    forker.start()
    assert not shut.wait(0.1)

    leave.set()

    assert shut.wait(60)
    caller.join(60)
    forker.join(60)


def test_gate_keeps_calls_out_until_it_is_reopened() -> None:
    gate = ForkGate()
    inside = threading.Event()

    def call() -> None:
        with gate:
            inside.set()

    gate.shut()
    caller = threading.Thread(target=call)
    caller.start()
    assert not inside.wait(0.1)

    gate.reopen()

    assert inside.wait(60)
    caller.join(60)


def test_gate_lets_a_fork_go_on_after_its_longest_wait(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(fork, "GATE_WAIT_S", 0.05)
    gate = ForkGate()

    with gate:
        gate.shut()
        gate.reopen()

    assert "forking while 1 calls are still in gRPC" in caplog.text


def test_channel_in_a_child_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork, "SUPPORTED", True)  # whatever this test process loaded first
    channel = ServerChannel("127.0.0.1:1", max_message_bytes=1 << 20)
    parents = channel.method("unary_unary", "Ready")

    channel.after_fork_in_child()

    assert channel.method("unary_unary", "Ready") is not parents
    channel.close()


def test_channel_in_a_child_without_fork_support_raises_instead_of_hanging(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork, "SUPPORTED", False)
    channel = ServerChannel("127.0.0.1:1", max_message_bytes=1 << 20)
    channel.method("unary_unary", "Ready")

    channel.after_fork_in_child()

    with pytest.raises(ForkError, match="GRPC_ENABLE_FORK_SUPPORT=1"):
        channel.method("unary_unary", "Ready")


def test_channel_unused_in_the_parent_works_in_a_child_without_fork_support(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork, "SUPPORTED", False)
    channel = ServerChannel("127.0.0.1:1", max_message_bytes=1 << 20)

    channel.after_fork_in_child()

    assert callable(channel.method("unary_unary", "Ready"))
    channel.close()


@pytest.mark.parametrize("given", [None, "robot"])
def test_identity_in_a_child_gives_other_keys(given: str | None) -> None:
    identity = Identity(given)
    parents = identity.next_key()

    identity.after_fork_in_child()

    childs = identity.next_key()
    assert childs.sequence == 0
    assert childs.incarnation != parents.incarnation
    assert (childs.client_id == parents.client_id) is (given is not None)
