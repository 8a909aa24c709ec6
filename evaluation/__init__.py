"""Predictions, scores, ablation of experts, cost, report and comparison."""
