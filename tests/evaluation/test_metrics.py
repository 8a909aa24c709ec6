"""Scores of predictions, compared with scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

from evaluation.metrics import per_class_scores, scores


@pytest.mark.parametrize("classes, samples, present", [(5, 200, 5), (6, 20, 3), (3, 1, 1)])
def test_scores_are_those_of_scikit_learn(classes, samples, present):
    random = np.random.RandomState(classes)
    labels_N, predicted_N = random.randint(present, size=samples), random.randint(classes, size=samples)
    every = {"labels": np.arange(classes), "zero_division": 0}
    found = scores(labels_N, predicted_N, classes)
    assert found["accuracy"] == pytest.approx(accuracy_score(labels_N, predicted_N), abs=1e-12)
    assert found["macro_f1"] == pytest.approx(f1_score(labels_N, predicted_N, average="macro", **every), abs=1e-12)
    names = tuple("abcdef"[:classes])
    rows = per_class_scores(labels_N, predicted_N, names)
    expected = precision_recall_fscore_support(labels_N, predicted_N, **every)
    for row, columns in zip((rows[name] for name in names), zip(*expected, strict=True), strict=True):
        assert list(row.values()) == pytest.approx(columns, abs=1e-12) and isinstance(row["support"], int)
