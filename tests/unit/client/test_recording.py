"""Recording, the sending side of recorders, without an environment."""

from __future__ import annotations

import grpc
import numpy as np
import pytest

from support.client_faults import ScriptedServer, failing
from support.serving import Config, ServerThread
from touchline import ReplayClient, UnacknowledgedError
from touchline.recorders.recording import Recording
from touchline.recorders.track import Step


def play(recording: Recording, tracks: int = 3) -> None:
    """Records two rows on each track and leaves the episodes unfinished."""
    for number in range(tracks):
        track = recording.new_track(np.float32, number)
        track.begin(lambda: [1.0])
        track.add(lambda: Step([2.0], np.zeros(1, np.float32), 0.5, False), ended=False)


def test_close_with_a_time_limit_ends_the_episodes_and_waits_for_all_tracks() -> None:
    config = Config(config={"buffer_size": 100, "min_history": 0}, storage={"device": "cpu"}, server={"port": 0})
    with ServerThread(config) as server, ReplayClient(server.address, actor="arm") as client:
        recording = Recording(client)
        play(recording)

        recording.close(30.0)

        assert recording.counters.acknowledged == 3
        assert [episode.actor for episode in client.episodes(actor="arm/1")] == ["arm/1"]


def test_close_without_an_answer_in_time_reports_every_track_and_does_not_wait_again() -> None:
    absent = failing(grpc.StatusCode.UNAVAILABLE)
    with ScriptedServer(AddEpisode=absent) as server, ReplayClient(server.address, actor="arm", timeout_s=0.2) as client:
        recording = Recording(client)
        play(recording)

        with pytest.raises(UnacknowledgedError) as report:
            recording.close(0.3)
        recording.close()
        recording.close_on_exit(None, None, None)

    assert len({result.key for result in report.value.results}) == 3
    assert str(report.value).count("1 episodes are not acknowledged") == 3
