"""Scores of predictions, beside numbers worked out by hand."""

import numpy as np
import pytest

from evaluation.metrics import per_class_scores, scores


def test_scores_are_those_worked_out_by_hand():
    labels_N, predicted_N = np.array([0, 0, 1]), np.array([0, 1, 1])  # the third class is neither present nor predicted
    assert scores(labels_N, predicted_N, 3) == {"accuracy": pytest.approx(2 / 3), "macro_f1": pytest.approx(4 / 9)}
    assert per_class_scores(labels_N, predicted_N, ("a", "b", "c")) == {
        "a": {"precision": 1.0, "recall": 0.5, "f1": pytest.approx(2 / 3), "support": 2},
        "b": {"precision": 0.5, "recall": 1.0, "f1": pytest.approx(2 / 3), "support": 1},
        "c": {"precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0},
    }
