"""Status of a sender: what is pending follows from what was counted, and its states follow each other as documented."""

from __future__ import annotations

from pathlib import Path

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from support.client_faults import ScriptedServer, failing
from support.service_calls import eventually
from touchline import ClosedError, EpisodeResult, InvalidEpisodeError, ReplayClient, UnacknowledgedError
from touchline._actor.queue import MemoryQueue
from touchline._actor.sender import EpisodeSender
from touchline._actor.sender_status import SenderState, SenderStatus
from touchline._spool.queue import Spool
from touchline_protos.codec import Episode, EpisodeKey

KEY = EpisodeKey("keeper", 1, 0)
LIMIT = 4 << 20


def make_episode(sequence: int) -> Episode:
    columns = {name: np.zeros(2, np.float32) for name in ("obs", "action", "reward")}
    return Episode(columns, key=EpisodeKey("keeper", 1, sequence))


@given(st.lists(st.sampled_from(["put", "put and drop", "unstorable", "acknowledge", "refuse", "drop"]), max_size=40))
def test_pending_follows_from_any_sequence_of_outcomes(outcomes: list[str]) -> None:
    status = SenderStatus(MemoryQueue(max_pending=1, max_bytes=1), name="keeper")
    waiting = reported = 0
    refused = EpisodeResult(KEY, error=InvalidEpisodeError("obs"))
    for outcome in outcomes:
        if outcome == "put":
            waiting += 1
            status.count(appended=1)
        elif outcome == "put and drop":
            status.count(appended=1, dropped=1)
        elif outcome == "unstorable":
            reported += 1
            status.note_refused(refused, appended=1)
        elif waiting:
            waiting -= 1
            if outcome == "acknowledge":
                status.count(acknowledged=1)
            elif outcome == "drop":
                status.count(dropped=1)
            else:
                reported += 1
                status.note_refused(refused)

        assert (status.pending, status.done) == (waiting, not waiting)

    assert len(status.take_unreported()) == reported and status.take_unreported() == []


def test_sender_whose_client_is_closed_halts_and_closing_leaves_its_episodes_in_the_spool(tmp_path: Path) -> None:
    client = ReplayClient("127.0.0.1:1")
    client.close()
    sender = EpisodeSender(client, Spool(tmp_path, limit_bytes=LIMIT), name="keeper", when_full="block")

    assert sender.put(make_episode(0))
    eventually(lambda: sender._status.state is SenderState.HALTED, "the sender halts")
    assert isinstance(sender.error, ClosedError) and sender.wait(0) and not sender.closed
    sender.close()

    assert sender._status.state is SenderState.CLOSED and sender.counters.pending == 1
    with pytest.raises(ClosedError, match="1 episodes wait in"):
        sender.flush()
    left = Spool(tmp_path, limit_bytes=LIMIT)
    assert left.resumed == 1
    left.close()


def test_sender_in_memory_is_closed_only_once_nothing_is_pending() -> None:
    answers = [failing(grpc.StatusCode.UNAVAILABLE)]

    def answer(request: bytes, context: grpc.ServicerContext) -> bytes:
        return answers[0](request, context) if answers else b""

    with ScriptedServer(AddEpisode=answer) as server, ReplayClient(server.address, timeout_s=0.2) as client:
        sender = EpisodeSender(client, MemoryQueue(max_pending=8, max_bytes=LIMIT), name="keeper", when_full="block")
        sender.put(make_episode(0))
        with pytest.raises(UnacknowledgedError):
            sender.close(0.1)
        assert sender._status.state is SenderState.RUNNING

        answers.clear()
        sender.close(60)

        assert sender.closed and sender.counters.acknowledged == 1
