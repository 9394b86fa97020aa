"""The store as a ``torchrl.data.ReplayBuffer``: the one package that uses TorchRL's private state."""
