"""The files of a run: folder, checkpoints, exported model, resume."""
