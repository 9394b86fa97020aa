"""Many threads on one real server, with rows that carry their own checksum: no batch mixes rows, and the counts add up."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from support.service_calls import Caller, key, serving
from touchline_protos import Batch
from touchline_protos.codec import Episode, encode_load

ADDERS = 3
EPISODES = 80
HORIZON = 3
OBS = 40
SENDER = 100_000
"""Distance between the episode numbers of two senders."""


def rows_of(number: np.ndarray, step: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the rows of an episode: number, step, and a checksum of both in every further element."""
    checksum = (number * 31 + step * 7) % 8191
    obs = np.stack([number, step, *[checksum + column for column in range(OBS - 2)]], axis=-1).astype(np.int64)
    return obs, np.stack([checksum, -checksum], axis=-1).astype(np.float32), checksum.astype(np.float64)


def checksummed(number: int) -> Episode:
    rows = 5 + number % 60
    obs, action, reward = rows_of(np.full(rows, number), np.arange(rows))
    return Episode({"obs": obs, "action": action, "reward": reward}, actor=f"actor {number // SENDER}", policy_version=number)


def check(batch: Batch) -> int:
    """Checks every row of a batch; returns its number of slices."""
    number = batch.policy_version
    steps = batch.start + np.arange(HORIZON + 1)[:, None]
    obs, action, reward = rows_of(np.broadcast_to(number, steps.shape), steps)
    assert np.array_equal(batch.obs, obs)
    assert np.array_equal(batch.action, action[1:])
    assert np.array_equal(batch.reward[..., 0], reward[1:])
    assert (steps[-1] < 5 + number % 60).all()
    assert [batch.actor_names[actor] for actor in batch.actor.tolist()] == [f"actor {n // SENDER}" for n in number.tolist()]
    return len(number)


def test_batches_are_whole_while_many_add_load_and_sample() -> None:
    done = threading.Event()
    # Ten episodes fit, so nearly every add evicts while gathers are in progress.
    with serving(config={"buffer_size": 350, "batch_size": 64, "min_history": 0, "horizon": HORIZON}) as (server, first):

        def add(sender: int) -> int:
            with Caller(server.address) as caller:
                for sequence in range(EPISODES):
                    episode = checksummed(sender * SENDER + sequence)
                    keyed = Episode(episode.columns, key(sequence, client_id=f"sender {sender}"), episode.actor, episode.policy_version)
                    assert not caller.add(keyed).duplicate
            return EPISODES

        def load(sender: int) -> int:
            with Caller(server.address) as caller:
                episodes = (checksummed(sender * SENDER + sequence) for sequence in range(EPISODES))
                answer = caller.load(message for episode in episodes for message in encode_load(episode, chunk_bytes=3000))
                return len(answer.results)

        def stream(batch_size: int) -> int:
            slices = 0
            with Caller(server.address) as caller:
                learner = caller.stream().open(credits=8, batch_size=batch_size, max_batches_per_frame=4)
                while not done.is_set():
                    slices += sum(map(check, learner.read(4)))
                    learner.grant(4)
                learner.close()
                return slices + sum(map(check, learner.rest()))

        def sample() -> int:
            slices = 0
            with Caller(server.address) as caller:
                while not slices or not done.is_set():
                    slices += check(caller.sample(wait_s=60))
            return slices

        with ThreadPoolExecutor(8) as pool:
            learners = [pool.submit(stream, 64), pool.submit(stream, 1500), pool.submit(sample)]
            senders = [pool.submit(add, sender) for sender in range(ADDERS)] + [pool.submit(load, ADDERS)]
            try:
                added = sum(sender.result() for sender in senders)
            finally:
                done.set()
            sampled = [learner.result() for learner in learners]

        counts = first.counts()
        assert added == (ADDERS + 1) * EPISODES == counts.episodes_added
        assert counts.episodes_added == counts.episodes_stored + counts.episodes_evicted
        assert counts.steps_added == counts.steps_stored + counts.steps_evicted
        assert counts.steps_stored <= 350
        assert (counts.episodes_refused, counts.episodes_duplicate) == (0, 0)
        assert min(sampled) > 0
        assert check(first.sample()) == 64
