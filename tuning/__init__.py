"""Tuning: options searched by Optuna, selected on validation images alone."""
