"""Placement of E unequal experts on M processes, so that all processes have similar work.

work_E: the work of each expert, load times cost. A placement is share_EM, the share of each expert's work that each
process does; rows sum to 1. A process with a share of an expert stores its weights: two shares are two copies.
Processes wait for the slowest one, so the ratio of the largest to the mean work shows how much longer a step takes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from analysis.arrays import FloatArray

COPY = 0.01  # penalty of a copy, relative to the mean work of a process
GAP, SECONDS = 1e-3, 2.0  # the solver stops at this relative gap to the optimum, or after this time


def even(experts: int, processes: int) -> FloatArray:
    """Equal counts, in order: the first experts on the first process. The first processes may have one more."""
    share_EM = np.zeros((experts, processes))
    for process, numbers in enumerate(np.array_split(np.arange(experts), processes)):
        share_EM[numbers, process] = 1
    return share_EM


def places(experts: int, processes: int) -> int:
    """How many experts a process may store: one more than with equal counts, to limit memory."""
    return math.ceil(experts / processes) + 1


def greedy(work_E: ArrayLike, processes: int) -> FloatArray:
    """Experts in descending order of work, each to the process with the least work that has room (Graham 1969)."""
    work_E = np.asarray(work_E, dtype=np.float64)
    share_EM = np.zeros((len(work_E), processes))
    most = places(len(work_E), processes)
    for expert in np.argsort(-work_E, kind="stable"):
        count_M, done_M = share_EM.sum(axis=0), work_E @ share_EM
        free = [process for process in range(processes) if count_M[process] < most]
        share_EM[expert, min(free, key=lambda process: (done_M[process], count_M[process]))] = 1
    return share_EM


def optimal(work_E: ArrayLike, processes: int) -> FloatArray:
    """Minimise the largest work by a mixed-integer program, with copies of experts if they reduce it.

    Minimise t + COPY * mean work * copies over shares y and indicators x in {0, 1} of whether a process stores an
    expert: sum_m y_em = 1, y_em <= x_em, sum_e work_e y_em <= t, and between one and `places` experts per process.
    Never worse than `greedy`, which is the fallback if the solver finds no solution in time.
    """
    work_E = np.asarray(work_E, dtype=np.float64)
    first = greedy(work_E, processes)
    if processes == 1 or not work_E.any():
        return first
    found_EM = _program(work_E / work_E.sum() * processes, processes)
    if found_EM is None:
        return first
    share_EM = np.where(found_EM < 1e-6, 0, found_EM)
    share_EM /= share_EM.sum(axis=1, keepdims=True)
    idle = bool((share_EM.sum(axis=0) == 0).any())  # a process that stores an expert but gets no work from it
    return first if idle or _worth(first, work_E) <= _worth(share_EM, work_E) else share_EM


def _program(work_E: FloatArray, processes: int) -> FloatArray | None:
    """Solve the program of `optimal`, for work with mean 1 per process (None: no solution in time)."""
    from scipy.optimize import LinearConstraint, milp  # here, because it takes a fifth of a second
    from scipy.sparse import coo_array, eye, hstack, kron, vstack

    experts, pairs = len(work_E), len(work_E) * processes
    unit, of_expert, of_process = eye(pairs), kron(eye(experts), np.ones((1, processes))), eye(processes)

    def zeros(rows: int, columns: int = pairs) -> Any:
        return coo_array((rows, columns))

    held = kron(np.ones((1, experts)), of_process)
    # Variables: y (E, M), x (E, M), t. Each row: matrix, lower limit, upper limit.
    rows: list[Any] = [
        (hstack([of_expert, zeros(experts), zeros(experts, 1)]), 1, 1),
        (hstack([unit, -unit, zeros(pairs, 1)]), -np.inf, 0),
        (hstack([kron(work_E[None], of_process), zeros(processes), -np.ones((processes, 1))]), -np.inf, 0),
        (hstack([zeros(processes), held, zeros(processes, 1)]), 1, places(experts, processes)),
    ]
    low, high = ([np.full(row[0].shape[0], row[side]) for row in rows] for side in (1, 2))
    limits: Any = (np.concatenate(low), np.concatenate(high))
    is_x, is_t = np.repeat([0.0, 1.0, 0.0], [pairs, pairs, 1]), np.repeat([0.0, 0.0, 1.0], [pairs, pairs, 1])
    most: Any = np.where(is_t > 0, np.inf, 1)
    found = milp(
        c=COPY * is_x + is_t,
        integrality=is_x,
        bounds=(0, most),
        constraints=LinearConstraint(vstack([row[0] for row in rows]).tocsr(), *limits),
        options={"time_limit": SECONDS, "mip_rel_gap": GAP},
    )
    return None if found.x is None else found.x[:pairs].reshape(experts, processes)


def _worth(share_EM: FloatArray, work_E: FloatArray) -> float:
    """The objective of the program, in units of the mean work."""
    return imbalance(share_EM, work_E) + COPY * float((share_EM > 0).sum() - len(share_EM))


def aligned(share_EM: ArrayLike, before_EM: ArrayLike) -> FloatArray:
    """The same placement with processes renumbered so that as few experts as possible move."""
    from scipy.optimize import linear_sum_assignment

    share_EM, before_EM = np.asarray(share_EM), np.asarray(before_EM)
    stays_MM = (before_EM > 0).T.astype(float) @ (share_EM > 0)
    order_M = linear_sum_assignment(stays_MM, maximize=True)[1]
    return share_EM[:, order_M]


def imbalance(share_EM: ArrayLike, work_E: ArrayLike) -> float:
    """The ratio of the largest to the mean work of a process; 1 is even. 1 if there is no work."""
    done_M = np.asarray(work_E, dtype=np.float64) @ np.asarray(share_EM)
    return float(done_M.max() / done_M.mean()) if done_M.any() else 1.0


def total_imbalance(share_LEM: ArrayLike, work_LE: ArrayLike) -> float:
    """The ratio over several places in sequence, each of which waits for its slowest process."""
    done_LM = np.einsum("le,lem->lm", np.asarray(work_LE, dtype=np.float64), np.asarray(share_LEM))
    return float(done_LM.max(axis=1).sum() / done_LM.mean(axis=1).sum()) if done_LM.any() else 1.0


RULES = {"work": greedy, "lp": optimal}
