"""The plane that separates experts: it separates samples that it was not fitted to, and reports its limits."""

import numpy as np
import pytest

from analysis.gate import discriminant_plane


def three_groups(count, distance, features=40, seed=0):
    """Groups that differ in features 1 and 2 of unit variance, with an uninformative feature 0 of large variance."""
    rng = np.random.default_rng(seed)
    group_N = np.arange(count) % 3
    x_ND = rng.normal(size=(count, features))
    x_ND[:, 0] *= 100
    x_ND[:, 1:3] += distance * np.array([[1, 0], [-1, 0], [0, 1]])[group_N]
    return x_ND, group_N


def test_it_separates_groups_that_differ_in_low_variance_directions():
    shown_ND, shown_N = three_groups(300, 4, seed=1)
    plane = discriminant_plane(*three_groups(600, 4), shown_ND, shown_N)
    assert plane.accuracy > 0.97 and plane.chance == pytest.approx(1 / 3)
    assert plane.points_N2.shape == (300, 2) and plane.explained_2.sum() == pytest.approx(1)
    # Centres (4, 0), (-4, 0), (0, 4): sums of squares 32 along the first feature, 32 / 3 along the second.
    assert plane.explained_2[0] == pytest.approx(0.75, abs=0.04)


def test_groups_keep_their_numbers_and_axes_their_share_of_the_variance():
    # The same groups as experts 0, 3 and 5, and two samples of expert 1, too few to count.
    fit_MD, fit_M = three_groups(600, 4)
    shown_ND, shown_N = three_groups(300, 4, seed=1)
    number_G = np.array([0, 3, 5])
    fit_M = number_G[fit_M]
    fit_M[:2] = 1
    plane = discriminant_plane(fit_MD, fit_M, shown_ND[::2], number_G[shown_N[::2]])
    assert plane.accuracy > 0.97
    # A fourth group apart along a third axis as far as the others: two axes hold two thirds.
    rng = np.random.default_rng(0)
    group_M = np.arange(800) % 4
    x_MD = rng.normal(size=(800, 10))
    x_MD[:, :3] += 8 * np.array([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]])[group_M]
    few_M = group_M[:400]
    plane = discriminant_plane(x_MD, group_M, x_MD[:300], np.minimum(few_M[:300], 2))
    assert plane.explained_2.sum() == pytest.approx(2 / 3, abs=0.04)
    assert plane.chance == pytest.approx(0.5)  # of what is shown: group 2 is half of it


def test_groups_that_do_not_differ_are_at_chance_level():
    fit_MD, fit_M = three_groups(60, 0, features=200)
    shown_ND, shown_N = three_groups(300, 0, features=200, seed=1)
    assert discriminant_plane(fit_MD, fit_M, shown_ND, shown_N).accuracy < 0.45


def test_groups_of_few_samples_span_no_plane():
    x_ND, group_N = three_groups(30, 4)
    assert discriminant_plane(x_ND, np.minimum(group_N, 1), x_ND, group_N) is None
    assert discriminant_plane(x_ND, np.where(group_N == 2, -1, group_N), x_ND, group_N) is None
    few_N = np.where((group_N == 2) & (np.arange(30) > 12), 0, group_N)  # four of the third group
    assert discriminant_plane(x_ND, few_N, x_ND, group_N) is None
