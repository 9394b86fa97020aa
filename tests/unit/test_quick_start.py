"""The README's quick start, line by line."""

from __future__ import annotations


def test_quick_start_as_written_gives_a_batch() -> None:
    import torch
    from tensordict import TensorDict

    from touchline_server import ReplayBuffer, read_cfg

    buffer = ReplayBuffer(read_cfg())
    episode = TensorDict(
        {"obs": torch.randn(100, 64), "action": torch.randn(100, 8), "reward": torch.randn(100), "done": torch.zeros(100)}, batch_size=[100]
    )
    buffer.add(episode)
    if buffer.ready():
        obs, action, reward, done = buffer.sample()

    assert obs.shape == (4, 256, 64)
    assert action.shape == (3, 256, 8)
    assert reward.shape == done.shape == (3, 256, 1)
    assert {obs.dtype, action.dtype, reward.dtype, done.dtype} == {torch.float32}
    assert buffer.num_eps == 1
    assert buffer.size == 100
    assert buffer.capacity == 1_000_000
