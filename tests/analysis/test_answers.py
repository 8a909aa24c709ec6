"""Tables of predictions, gate and experts against numbers worked out by hand, brute force and scikit-learn."""

import math

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, f1_score

from analysis import answers, experts, gate


def test_confusion_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    labels_N, predicted_N = rng.integers(0, 5, (2, 100))
    expected = confusion_matrix(labels_N, predicted_N, labels=range(6))
    assert answers.confusion(labels_N, predicted_N, 6).tolist() == expected.tolist()


def test_confused_pairs_by_hand():
    table = [[9, 1, 0, 0], [4, 9, 2, 0], [0, 1, 9, 0], [0, 0, 0, 9]]
    # b is predicted as a 4 times, a as b once: 5; b as c twice, c as b once: 3; nothing else.
    assert answers.confused_pairs(table, "abcd") == [("b", "a", 4, 1), ("b", "c", 2, 1)]
    assert answers.confused_pairs(table, "abcd", n=1) == [("b", "a", 4, 1)]
    assert answers.confused_pairs(np.eye(3), "abc") == []


def test_calibration_by_hand():
    # Confidences .6 (right), .55 (wrong), .9 (right), .8 (right); two bins: (0, .5] empty, (.5, 1] holds all four.
    probs = [[0.6, 0.4], [0.45, 0.55], [0.9, 0.1], [0.2, 0.8]]
    result = answers.calibration(probs, [0, 0, 0, 1], bins=2)
    assert result["count_B"].tolist() == [0, 4]
    np.testing.assert_allclose(result["confidence_B"], [np.nan, 0.7125])
    np.testing.assert_allclose(result["accuracy_B"], [np.nan, 0.75])
    assert result["error"] == pytest.approx(0.0375)
    # Four bins: (.5, .75] holds .6 right and .55 wrong: |.5 - .575|; (.75, 1] holds .9 and .8 right: |1 - .85|.
    assert answers.calibration(probs, [0, 0, 0, 1], bins=4)["error"] == pytest.approx((2 * 0.075 + 2 * 0.15) / 4)


def test_a_confidence_on_a_bin_edge_counts_in_the_lower_bin():
    # (0, .5] holds .5 twice, (.5, 1] holds 1.
    result = answers.calibration([[0.5, 0.5], [0.5, 0.5], [1.0, 0.0]], [0, 1, 0], bins=2)
    assert result["count_B"].tolist() == [2, 1]
    assert result["accuracy_B"].tolist() == [0.5, 1.0] and result["error"] == 0.0


def test_calibration_agrees_with_a_loop():
    rng = np.random.default_rng(0)
    probs, labels = rng.dirichlet(np.full(4, 0.3), 300), rng.integers(0, 4, 300)
    error = 0.0
    for low in np.arange(15) / 15:
        inside = [i for i, row in enumerate(probs) if low < row.max() <= low + 1 / 15 + 1e-12]
        if inside:
            accuracy = np.mean([probs[i].argmax() == labels[i] for i in inside])
            error += len(inside) / 300 * abs(accuracy - np.mean([probs[i].max() for i in inside]))
    assert answers.calibration(probs, labels)["error"] == pytest.approx(error)


def test_gate_entropy_by_hand():
    # Even: log E of log E. Weights 1/2, 1/4, 1/4: 1.5 log 2 of log 3. One certain: 0. A barred one counts in log E.
    rows = [[2.0, 2.0, 2.0], np.log([0.5, 0.25, 0.25]), [0.0, -1e4, -1e4], [1.0, 1.0, -math.inf]]
    expected = [1.0, 1.5 * math.log(2) / math.log(3), 0.0, math.log(2) / math.log(3)]
    np.testing.assert_allclose(gate.gate_entropy(rows), expected, atol=1e-12)
    assert gate.gate_entropy([[3.0], [1.0]]).tolist() == [0.0, 0.0]


def test_boundary_margin_by_hand():
    logits = [[3.0, 1.0, 0.5], [0.0, 2.0, 1.5], [1.0, 1.0, 1.0], [5.0, 4.0, 3.0]]
    # Two experts each for samples 0 and 1, none for 2, all for 3; for 1 the rule chose against the logits.
    sample, expert = [0, 0, 1, 1, 3, 3, 3], [0, 1, 0, 1, 0, 1, 2]
    np.testing.assert_allclose(gate.boundary_margin(logits, sample, expert), [0.5, -1.5, np.nan, np.nan])


def test_boundary_margin_of_top_k_is_the_gap_after_the_kth():
    logits = np.random.default_rng(0).normal(size=(50, 6))
    order = np.argsort(-logits, axis=1)
    ranked = np.take_along_axis(logits, order, axis=1)
    for k in (1, 2, 5):
        margin = gate.boundary_margin(logits, np.repeat(np.arange(50), k), order[:, :k].ravel())
        np.testing.assert_allclose(margin, ranked[:, k - 1] - ranked[:, k])


def test_gate_summary_by_hand():
    # Margins .05 (right), 2 (wrong), 3 (right); the last sample has no expert.
    logits = [[0.05, 0.0], [2.0, 0.0], [0.0, 3.0], [0.0, 0.0]]
    result = gate.gate_summary(logits, [0, 1, 2], [0, 0, 1], [1, 0, 1, 1])
    assert result["margin_median"] == pytest.approx(2.0)
    assert result["boundary_share"] == pytest.approx(1 / 3)
    assert (result["boundary_accuracy"], result["elsewhere_accuracy"]) == (1.0, 0.5)
    assert result["nearest_samples"] == [0, 1, 2]
    alone = gate.gate_summary([[1.0], [2.0]], [0, 1], [0, 0], [1, 1])
    assert alone == dict.fromkeys(alone) | {"entropy_mean": 0.0, "nearest_samples": []}


def test_a_choice_far_against_the_logits_is_not_near_the_boundary():
    # Margins -2, .05, -.04 and 3: the rule chose against the logits twice, once by far.
    logits = [[0.0, 2.0], [0.05, 0.0], [0.0, 0.04], [3.0, 0.0]]
    result = gate.gate_summary(logits, [0, 1, 2, 3], [0] * 4, [1, 1, 0, 1])
    assert result["boundary_share"] == 0.5 and result["boundary_accuracy"] == 0.5
    assert result["elsewhere_accuracy"] == 1.0
    assert result["nearest_samples"] == [2, 1, 0, 3]


def test_co_activation_agrees_with_sets():
    rng = np.random.default_rng(0)
    sample, expert = rng.integers(0, 30, 90), rng.integers(0, 4, 90)
    served = [set(sample[expert == e]) for e in range(4)]
    expected = [[len(a & b) for b in served] for a in served]
    assert experts.co_activation(sample, expert, 30, 4).tolist() == expected


def test_hardest_classes_by_hand():
    # Expert 0: class a right 1 of 3, class b right 1 of 3 and once more in another sample (2 of 4), class c all right.
    labels = [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]
    correct = [1, 0, 0, 1, 0, 0, 1, 1, 1, 1]
    table = experts.hardest_classes(correct, labels, np.arange(10), np.zeros(10, int), "abc", 2, at_least=3)
    assert table == [[("a", pytest.approx(1 / 3), 3), ("b", 0.5, 4)], []]
    assert experts.hardest_classes(correct, labels, np.arange(10), [0] * 10, "abc", 1, at_least=4) == [[("b", 0.5, 4)]]


def test_among_equally_hard_classes_the_larger_one_comes_first():
    table = experts.hardest_classes([1, 0, 1, 0, 1, 0], [0, 0, 1, 1, 1, 1], np.arange(6), [0] * 6, "ab", 1, at_least=2)
    assert table == [[("b", 0.5, 4), ("a", 0.5, 2)]]


def test_the_deviation_of_a_removal_depends_only_on_its_resamples():
    labels, predicted, without = [0, 0, 1, 1], [0, 0, 1, 0], [[1, 0, 1, 0]]
    result = experts.removal(labels, predicted, without, 2, resamples=1)  # one resample does not deviate from itself
    assert result["macro_f1_deviation"].tolist() == [0.0] and result["macro_f1_change"][0] < 0


def test_removal_agrees_with_scikit_learn():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 6, 400)
    predicted = np.where(rng.random(400) < 0.8, labels, rng.integers(0, 7, 400))
    without = np.stack([np.where(rng.random(400) < keep, predicted, rng.integers(0, 7, 400)) for keep in (1, 0.9, 0.3)])
    result = experts.removal(labels, predicted, without, 7, resamples=50)

    def macro_f1(answers_N, rows=slice(None)):
        return f1_score(labels[rows], answers_N[rows], average="macro", labels=range(7), zero_division=0)

    np.testing.assert_allclose(result["macro_f1_change"], [macro_f1(row) - macro_f1(predicted) for row in without])
    accuracy = [(row == labels).mean() - (predicted == labels).mean() for row in without]
    np.testing.assert_allclose(result["accuracy_change"], accuracy)
    np.testing.assert_allclose(result["answers_changed"], [(row != predicted).mean() for row in without])
    # The deviation is that of a plain paired bootstrap, here with other draws.
    rows = rng.integers(0, 400, (100, 400))
    plain = np.std([macro_f1(without[2], draw) - macro_f1(predicted, draw) for draw in rows])
    assert result["macro_f1_deviation"][0] == 0
    assert result["macro_f1_deviation"][2] == pytest.approx(plain, rel=0.35)


def test_reassigned_samples_and_saved_cost_by_hand():
    # Expert 0 has 4 samples, of which 3 go to expert 1 as well and 1 to expert 2. Without expert 0, 3 more go to
    # expert 2 and 1 to expert 1: from (4, 3, 1) to (0, 4, 4).
    before, after = np.zeros((2, 3, 3))
    before[0], after[0] = [4, 3, 1], [0, 4, 4]
    np.testing.assert_allclose(experts.reassigned(before, after), [[0, 0.25, 0.75], [0, 0, 0], [0, 0, 0]])
    # Costs 10, 20, 40 a visit: 40 + 60 + 40 = 140 before, 80 + 160 = 240 after; 100 more over 5 samples.
    np.testing.assert_allclose(experts.cost_saved(before, after, [10, 20, 40], 5), [-20, 0, 0])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: answers.confusion([0, 1], [0], 2), "2 samples"),
        (lambda: answers.confusion([0], [2], 2), "predicted_N"),
        (lambda: answers.calibration([[0.5, 0.1]], [0]), "probabilities"),
        (lambda: answers.calibration([[1.0]], [0], bins=0), "bins"),
        (lambda: gate.gate_entropy([1.0]), "samples by experts"),
        (lambda: gate.gate_entropy([[-math.inf, -math.inf]]), "finite"),
        (lambda: gate.gate_entropy([[math.nan, 1.0]]), "finite"),
        (lambda: gate.boundary_margin([[1.0, 2.0]], [0], [2]), "expert_A"),
        (lambda: experts.removal([0, 1], [0, 1], [[0]], 2), "shape"),
        (lambda: experts.removal([0, 1], [0, 1], [[0, 2]], 2), "without_EN"),
    ],
)
def test_bad_input_is_rejected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
