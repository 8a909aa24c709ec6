"""What a run leaves on the disk: its folder, checkpoints, the exported model, and how it resumes."""
