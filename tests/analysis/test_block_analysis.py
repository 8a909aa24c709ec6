"""Experts inside blocks: hand-worked arrays, and the measure of `routing` as a brute-force reference."""

import math

import numpy as np
import pytest

from analysis import routing
from analysis.blocks import block_specialisation, evenly_spaced, most_specialised, patch_choices, position_shares

# Four images of classes 0, 1, 0, 1; two blocks, two experts, four tokens per image.
LABELS = [0, 1, 0, 1]
WEIGHT = np.array([[[2, 2], [4, 0]], [[2, 2], [0, 4]], [[2, 2], [4, 0]], [[2, 2], [0, 4]]])


def test_a_block_whose_experts_determine_the_class_has_maximal_information():
    none, all_of_it = block_specialisation(LABELS, WEIGHT, 2, permutations=50)
    assert none["mutual_information"] == 0 and none["null_mean"] == 0 and none["z_score"] is None
    assert all_of_it["mutual_information"] == pytest.approx(math.log(2)) and all_of_it["normalised"] == pytest.approx(1)
    # Of the six ways to label four images two give ln 2, the other four 0.
    assert all_of_it["null_mean"] == pytest.approx(math.log(2) / 3, abs=0.1)
    assert all_of_it["p_value"] == pytest.approx(1 / 3, abs=0.15)
    assert most_specialised([none, all_of_it]) == [1, 0]


def test_with_one_token_per_image_it_equals_the_measure_on_assignments():
    rng = np.random.default_rng(0)
    labels_N, expert_NL = rng.integers(0, 5, 60), rng.integers(0, 3, (60, 2))
    expert_NL[:, 1] = labels_N % 3
    found = block_specialisation(labels_N, np.eye(3)[expert_NL], 7)
    for place, expert_N in enumerate(expert_NL.T):
        reference = routing.specialisation(labels_N, np.arange(60), expert_N, 7, 3)
        for key in ("mutual_information", "normalised"):
            assert found[place][key] == pytest.approx(reference[key])
        for key in ("null_mean", "null_deviation"):
            assert found[place][key] == pytest.approx(reference[key], rel=0.2)
    assert found[0]["p_value"] > 0.02 and found[1]["p_value"] < 0.01


@pytest.mark.parametrize(
    ("labels", "weight", "message"),
    [
        ([0, 1, 0, 2], WEIGHT, "labels_N must lie in 0 .. 1"),
        ([0, 1], WEIGHT, "weight_NLE has shape"),
        (LABELS, -WEIGHT, "finite and not negative"),
    ],
)
def test_tables_that_do_not_fit_are_rejected(labels, weight, message):
    with pytest.raises(ValueError, match=message):
        block_specialisation(labels, weight, 2)


def test_patches_are_the_last_tokens_row_by_row():
    first = np.array([[[9, 0, 1, 2, 3, 4, 5]]], dtype=np.uint8)  # one class token before six patches
    assert patch_choices(first, 2, 3).tolist() == [[[[0, 1, 2], [3, 4, 5]]]]
    assert patch_choices(first, 1, 7)[0, 0, 0, 0] == 9
    with pytest.raises(ValueError, match="do not hold 2 x 4 patches"):
        patch_choices(first, 2, 4)


def test_shares_of_positions_are_counted_by_hand():
    choice = np.array([[[[0, 1]], [[2, 2]]], [[[0, 0]], [[1, 2]]]])  # two images, two blocks, one row of two patches
    share = position_shares(choice, 3)
    assert share.shape == (2, 3, 1, 2)
    assert share[0].tolist() == [[[1, 0.5]], [[0, 0.5]], [[0, 0]]]
    assert share[1].tolist() == [[[0, 0]], [[0.5, 0]], [[0.5, 1]]]
    with pytest.raises(ValueError, match="choice_MLHW"):
        position_shares(choice, 2)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((12, 4), [0, 4, 7, 11]),
        ((12, 4, 9), [0, 4, 9, 11]),
        ((12, 4, 11), [0, 4, 7, 11]),
        ((3, 4), [0, 1, 2]),
        ((1, 4, 0), [0]),
        ((12, 2, 5), [0, 5]),
    ],
)
def test_blocks_are_chosen_from_first_to_last(arguments, expected):
    assert evenly_spaced(*arguments) == expected


def test_blocks_are_ordered_by_information_beyond_chance():
    found = [{"mutual_information": 0.5, "null_mean": 0.45}, {"mutual_information": 0.3, "null_mean": 0.1}]
    assert most_specialised(found) == [1, 0]
