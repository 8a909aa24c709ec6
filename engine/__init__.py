"""How it is trained: configuration, loop, checkpoints, metrics, tracking."""
