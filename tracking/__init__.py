"""Tracking of a run: JSON lines and ClearML."""
