import math

import numpy as np
import pytest

from analysis import routing

# Warnings from garbage of other tests that is collected during one of these tests do not belong to it.
pytestmark = pytest.mark.filterwarnings(
    "error", "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"
)

# Five samples of two classes, three experts; sample 3 is dropped, expert 2 is never chosen.
LABELS = [0, 0, 1, 1, 1]
SAMPLE = [0, 0, 1, 2, 4, 4]
EXPERT = [0, 1, 0, 1, 1, 0]
WEIGHT = [0.75, 0.25, 1.0, 1.0, 0.5, 0.5]


def random_routing(rng, samples=60, classes=5, experts=4, top_k=2):
    kept = rng.random((samples, top_k)) < 0.8
    sample_A = np.repeat(np.arange(samples), top_k)[kept.ravel()]
    expert_A = rng.integers(0, experts, len(sample_A))
    return rng.integers(0, classes, samples), sample_A, expert_A, rng.random(len(sample_A))


def test_load_and_importance_by_hand():
    # Expert 0 has 3 of 6 assignments and 0.75 + 1 + 0.5 = 2.25 of a weight of 4; expert 1 the rest.
    np.testing.assert_allclose(routing.expert_load(EXPERT, 3), [0.5, 0.5, 0.0])
    np.testing.assert_allclose(routing.expert_importance(EXPERT, WEIGHT, 3), [2.25 / 4, 1.75 / 4, 0.0])


def test_expert_by_class_by_hand():
    # Class 0: samples 0 and 1 go to experts 0, 1, 0. Class 1: samples 2 and 4 go to experts 1, 1, 0.
    share = routing.expert_by_class(LABELS, SAMPLE, EXPERT, 3, 3)
    np.testing.assert_allclose(share, [[2 / 3, 1 / 3, 0], [1 / 3, 2 / 3, 0], [0, 0, 0]])
    # By weight: class 0 gives 1.75 and 0.25 of 2, class 1 gives 0.5 and 1.5 of 2.
    share = routing.expert_by_class(LABELS, SAMPLE, EXPERT, 3, 3, WEIGHT)
    np.testing.assert_allclose(share, [[0.875, 0.125, 0], [0.25, 0.75, 0], [0, 0, 0]])


def test_balance_by_hand():
    # (1/2, 1/4, 1/4): entropy 0.5 log 2 + 0.5 log 4 = 1.5 log 2, of log 3.
    assert routing.load_entropy([0.5, 0.25, 0.25]) == pytest.approx(1.5 * math.log(2) / math.log(3))
    assert routing.load_entropy([2, 1, 1]) == pytest.approx(1.5 * math.log(2) / math.log(3))
    # Mean 1/3, deviations 1/6, -1/12, -1/12: variance (4 + 1 + 1) / 144 / 3 = 1/72; 3 / sqrt(72) = sqrt(1/8).
    assert routing.coefficient_of_variation([0.5, 0.25, 0.25]) == pytest.approx(math.sqrt(1 / 8))
    # All on one of four: entropy 0, variation sqrt(E - 1).
    assert routing.load_entropy([0, 1, 0, 0]) == 0.0
    assert routing.coefficient_of_variation([0, 1, 0, 0]) == pytest.approx(math.sqrt(3))
    assert routing.load_entropy([0.25] * 4) == pytest.approx(1.0)
    assert routing.coefficient_of_variation([0.25] * 4) == 0.0


def test_balance_of_one_expert_and_of_none_used():
    assert routing.load_entropy([1.0]) == 1.0
    assert routing.coefficient_of_variation([1.0]) == 0.0
    assert math.isnan(routing.load_entropy([0.0, 0.0]))
    assert math.isnan(routing.coefficient_of_variation([0.0, 0.0]))


def test_mutual_information_by_hand():
    # One expert per class: knowing the expert removes the whole entropy log 2 of the class.
    assert routing.mutual_information([[3, 0], [0, 3]]) == pytest.approx(math.log(2))
    # Independent: p(c, e) = p(c) p(e) everywhere.
    assert routing.mutual_information([[2, 4], [1, 2]]) == pytest.approx(0.0, abs=1e-12)
    # p = [[1/3, 1/6], [1/6, 1/3]], margins 1/2: 2/3 log(4/3) + 1/3 log(2/3).
    expected = 2 / 3 * math.log(4 / 3) + 1 / 3 * math.log(2 / 3)
    assert routing.mutual_information([[2, 1], [1, 2]]) == pytest.approx(expected)
    assert routing.mutual_information(np.zeros((2, 3))) == 0.0


def test_mutual_information_agrees_with_scikit_learn():
    from sklearn.metrics import mutual_info_score

    rng = np.random.default_rng(0)
    labels_N, sample_A, expert_A, _ = random_routing(rng)
    counts = np.zeros((5, 4))
    np.add.at(counts, (labels_N[sample_A], expert_A), 1)
    expected = mutual_info_score(labels_N[sample_A], expert_A)
    assert routing.mutual_information(counts) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(3))
def test_tables_agree_with_loops(seed):
    rng = np.random.default_rng(seed)
    labels_N, sample_A, expert_A, weight_A = random_routing(rng)
    table, correct_N = np.zeros((5, 4)), rng.random(60) < 0.7
    served = [set() for _ in range(4)]
    for sample, expert, weight in zip(sample_A, expert_A, weight_A, strict=True):
        table[labels_N[sample], expert] += weight
        served[expert].add(int(sample))
    share = routing.expert_by_class(labels_N, sample_A, expert_A, 5, 4, weight_A)
    np.testing.assert_allclose(share, table / table.sum(1, keepdims=True))
    np.testing.assert_allclose(routing.expert_importance(expert_A, weight_A, 4), table.sum(0) / weight_A.sum())
    accuracy_E, samples_E = routing.mean_by_expert(correct_N, sample_A, expert_A, 4)
    assert samples_E.tolist() == [len(samples) for samples in served]
    np.testing.assert_allclose(accuracy_E, [np.mean([correct_N[s] for s in group]) for group in served])


def test_mean_by_expert_by_hand():
    # Expert 0 processes 0, 1, 4 (right, wrong, right), expert 1 processes 0, 2, 4 (all right), expert 2 none.
    accuracy_E, samples_E = routing.mean_by_expert([1, 0, 1, 0, 1], SAMPLE, EXPERT, 3)
    np.testing.assert_allclose(accuracy_E, [2 / 3, 1.0, np.nan])
    assert samples_E.tolist() == [3, 3, 0]
    # The same expert drawn twice for sample 0 counts it once: right 1 of 2.
    accuracy_E, samples_E = routing.mean_by_expert([True, False], [0, 0, 1], [0, 0, 0], 1)
    assert (accuracy_E.tolist(), samples_E.tolist()) == ([0.5], [2])


def test_specialisation_finds_experts_that_follow_classes():
    labels_N = np.repeat(np.arange(4), 25)
    result = routing.specialisation(labels_N, np.arange(100), labels_N, 4, 4, permutations=99)
    assert result["mutual_information"] == pytest.approx(math.log(4))
    assert result["normalised"] == pytest.approx(1.0)
    assert result["p_value"] == pytest.approx(1 / 100)
    # The bias of an independent table is about (C - 1)(E - 1) / 2A = 9 / 200.
    assert result["null_mean"] == pytest.approx(9 / 200, rel=0.3)
    assert 0 < result["null_deviation"] < 0.05
    above = result["mutual_information"] - result["null_mean"]
    assert result["z_score"] == pytest.approx(above / result["null_deviation"]) and result["z_score"] > 50


def test_specialisation_of_random_routing_is_zero_and_reproducible():
    labels_N, sample_A, expert_A, _ = random_routing(np.random.default_rng(1), samples=500)
    result = routing.specialisation(labels_N, sample_A, expert_A, 5, 4)
    assert result["p_value"] > 0.05
    assert result == routing.specialisation(labels_N, sample_A, expert_A, 5, 4)


def test_specialisation_shuffles_the_labels_of_samples_that_have_an_expert():
    # Classes 0 and 1 have an expert each; two samples of class 2 have none, and may not enter the null.
    result = routing.specialisation([2, 2, 0, 1], [2, 3], [0, 1], 3, 2, permutations=9)
    assert result["mutual_information"] == pytest.approx(math.log(2))
    assert result["null_mean"] == pytest.approx(math.log(2)) and result["p_value"] == 1.0


def test_specialisation_keeps_the_assignments_of_a_sample_together():
    # Every sample has both experts, so no shuffling of labels can change the table: all trials tie.
    result = routing.specialisation([0, 0, 0, 1], np.repeat(np.arange(4), 2), [0, 1] * 4, 2, 2, permutations=20)
    assert result["p_value"] == 1.0
    assert result["z_score"] is None
    assert result["mutual_information"] == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("sample_A, expert_A, experts", [([], [], 3), ([0, 1, 2], [0, 0, 0], 1)])
def test_specialisation_without_choice(sample_A, expert_A, experts):
    result = routing.specialisation([0, 1, 1], sample_A, expert_A, 2, experts, permutations=5)
    assert (result["mutual_information"], result["normalised"], result["p_value"]) == (0.0, 0.0, 1.0)


def test_no_assignments_and_one_class():
    assert routing.expert_load([], 3).tolist() == [0, 0, 0]
    assert routing.expert_importance([], [], 2).tolist() == [0, 0]
    assert routing.expert_by_class([0, 1], [], [], 2, 2).tolist() == [[0, 0], [0, 0]]
    assert routing.expert_by_class([0, 0], [0, 1], [1, 1], 1, 2).tolist() == [[0, 1]]
    accuracy_E, samples_E = routing.mean_by_expert([], [], [], 2)
    assert np.isnan(accuracy_E).all() and samples_E.tolist() == [0, 0]


def test_top_classes():
    table = [[0.2, 0.8], [0.9, 0.1], [0.2, 0.8], [1.0, 0.0]]
    assert routing.top_classes(table, "abcd", 1, 2) == [("a", 0.8), ("c", 0.8)]
    assert [name for name, _ in routing.top_classes(table, "abcd", 1, 9)] == ["a", "c", "b"]
    with pytest.raises(ValueError, match="expert 2"):
        routing.top_classes(table, "abcd", 2, 1)
    with pytest.raises(ValueError, match="3 class names"):
        routing.top_classes(table, "abc", 0, 1)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: routing.expert_load([0, 3], 3), "0 .. 2"),
        (lambda: routing.expert_load([-1], 3), "0 .. 2"),
        (lambda: routing.expert_load([0.5], 3), "integers"),
        (lambda: routing.expert_load([[0]], 3), "one dimension"),
        (lambda: routing.expert_importance([0], [0.5, 0.5], 3), "shape"),
        (lambda: routing.expert_importance([0], [math.nan], 3), "finite"),
        (lambda: routing.expert_by_class([0, 1], [2], [0], 2, 1), "sample_A"),
        (lambda: routing.expert_by_class([0, 2], [0], [0], 2, 1), "labels_N"),
        (lambda: routing.expert_by_class([0, 1], [0, 1], [0], 2, 1), "assignments"),
        (lambda: routing.load_entropy([0.5, -0.5]), "finite fractions"),
        (lambda: routing.mutual_information([1, 2]), "table"),
        (lambda: routing.specialisation([0], [0], [0], 1, 1, permutations=0), "permutations"),
    ],
)
def test_bad_input_is_rejected(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("load", "target", "expected"),
    [
        ([99, 1, 0], None, [False, False, True]),
        ([0.5, 0.4911, 0.0089], None, [False, False, True]),
        ([0, 0], None, [False, False]),
        ([199] + 200 * [1], None, 201 * [False]),  # an even share of 201 is 0.5 %
        ([0.9, 0.0005, 0.0995], [0.9, 0.01, 0.09], [False, True, False]),  # below a tenth of its target
        ([0.9, 0.0015, 0.0985], [0.9, 0.01, 0.09], [False, False, False]),
    ],
)
def test_an_expert_is_hardly_used_below_one_percent_or_a_tenth_of_its_target(load, target, expected):
    assert routing.underused(load, target).tolist() == expected
