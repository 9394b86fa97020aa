"""The store as a ``torchrl.data.ReplayBuffer``: the one room that knows TorchRL's private state."""
