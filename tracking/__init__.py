"""Where the numbers of a run go: JSON lines and ClearML."""
