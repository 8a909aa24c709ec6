"""Tuning: search options with Optuna, selected on the validation images."""
