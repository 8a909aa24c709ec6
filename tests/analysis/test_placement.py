"""Placements of experts, against placements worked out by hand and against all possible ones."""

from itertools import product

import numpy as np
import pytest

from analysis.placement import aligned, even, greedy, imbalance, optimal, places, total_imbalance


def owners(share_EM) -> list[int]:
    assert set(np.unique(share_EM)) <= {0, 1}
    assert (share_EM.sum(axis=1) == 1).all()
    return share_EM.argmax(axis=1).tolist()


def test_even_gives_equal_counts_in_order():
    assert owners(even(4, 2)) == [0, 0, 1, 1]
    assert owners(even(5, 3)) == [0, 0, 1, 1, 2]
    assert owners(even(3, 3)) == [0, 1, 2]


def test_greedy_places_the_most_work_first():
    # 6 to the first; 3, 2 and 1 to the second: 6 and 6, where equal counts have 9 and 3.
    assert owners(greedy([6, 3, 2, 1], 2)) == [0, 1, 1, 1]
    assert imbalance(even(4, 2), [6, 3, 2, 1]) == 1.5
    assert imbalance(greedy([6, 3, 2, 1], 2), [6, 3, 2, 1]) == 1.0
    # 5 and 4; 3 to the 4, then 3 to the 5, then 3 to the 4 again: 8 and 10, though 9 and 9 is possible.
    assert owners(greedy([5, 4, 3, 3, 3], 2)) == [0, 1, 1, 0, 1]


def test_greedy_gives_every_process_at_least_one_expert_and_not_too_many():
    assert places(8, 4) == 3
    share_EM = greedy([9, 0, 0, 0, 0, 0, 0, 0], 4)
    counts_M = share_EM.sum(axis=0)
    assert counts_M.min() == 1
    assert counts_M.max() == 3


def test_the_program_finds_what_greedy_misses():
    share_EM = optimal([5, 4, 3, 3, 3], 2)
    assert imbalance(share_EM, [5, 4, 3, 3, 3]) == pytest.approx(1.0)
    assert (share_EM > 0).sum() == 5  # 5 + 4 and 3 + 3 + 3: no copy is needed


def test_the_program_copies_an_expert_that_is_too_much_for_one_process():
    # 10 of 12 on one process: 10 / 6. With half of the second process's work from it, 6 and 6.
    share_EM = optimal([10, 1, 1], 2)
    assert imbalance(greedy([10, 1, 1], 2), [10, 1, 1]) == pytest.approx(10 / 6)
    assert imbalance(share_EM, [10, 1, 1]) == pytest.approx(1.0)
    assert (share_EM > 0).sum(axis=1).tolist() == [2, 1, 1]
    np.testing.assert_allclose(share_EM.sum(axis=1), 1)


def test_a_copy_that_saves_almost_nothing_is_not_made():
    share_EM = optimal([1.005, 1.0], 2)  # a copy would save 0.25 % of the mean
    assert (share_EM > 0).sum() == 2


@pytest.mark.parametrize("seed", range(4))
def test_the_program_is_at_least_as_good_as_every_placement_without_copies(seed):
    work_E = np.random.default_rng(seed).exponential(size=6)
    best = min(
        imbalance(np.eye(3)[list(owner_E)], work_E)
        for owner_E in product(range(3), repeat=6)
        if max(np.bincount(owner_E, minlength=3)) <= places(6, 3)
    )
    share_EM = optimal(work_E, 3)
    copies = (share_EM > 0).sum() - 6
    assert imbalance(share_EM, work_E) + 0.01 * copies <= best + 2e-3
    assert (share_EM > 0).sum(axis=0).max() <= places(6, 3)
    assert (share_EM > 0).sum(axis=0).min() >= 1


def test_no_work_and_one_process():
    assert (optimal([0, 0, 0], 2).sum(axis=1) == 1).all()
    assert owners(optimal([3, 1], 1)) == [0, 0]
    assert imbalance(even(3, 2), [0, 0, 0]) == 1.0


def test_processes_are_renumbered_so_that_few_experts_move():
    before = np.eye(2)[[0, 0, 1, 1]]
    assert owners(aligned(np.eye(2)[[1, 1, 1, 0]], before)) == [0, 0, 0, 1]


def test_each_place_waits_for_its_slowest_process():
    share_LEM = np.stack([np.eye(2), np.eye(2)])
    # 3 and 1, then 1 and 3: every place takes 3 instead of 2, though both processes have 4 in total.
    assert total_imbalance(share_LEM, [[3, 1], [1, 3]]) == 1.5
    assert total_imbalance(share_LEM, [[0, 0], [0, 0]]) == 1.0
