"""The training loop: step, captured step, optimizer, health, progress."""
