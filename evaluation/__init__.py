"""Predictions, scores, what experts are worth, cost, report and comparison."""
