"""Where experts live: which of M processes computes which of E unequal experts, so that none has much more to do.

work_E: what each expert has to do, load times cost. A placement is share_EM: of the work of each expert the share that
each process does; rows sum to 1. A process with a share of an expert holds its weights: two shares are two copies.
Processes wait for the slowest, so that the largest work over the mean is how much longer a step takes.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from analysis.arrays import FloatArray

COPY = 0.01  # of the mean work of a process that a copy must save to be worth its place
GAP, SECONDS = 1e-3, 2.0  # when the solver may stop: so near to the optimum, or after that time


def even(experts: int, processes: int) -> FloatArray:
    """Equal counts, in order: the first experts on the first process. The first processes have one more."""
    share_EM = np.zeros((experts, processes))
    for process, numbers in enumerate(np.array_split(np.arange(experts), processes)):
        share_EM[numbers, process] = 1
    return share_EM


def places(experts: int, processes: int) -> int:
    """How many experts a process may hold: one more than where counts are equal, for the sake of memory."""
    return math.ceil(experts / processes) + 1


def greedy(work_E: ArrayLike, processes: int) -> FloatArray:
    """The heaviest expert first, each to the process with the least work and a place (Graham 1969)."""
    work_E = np.asarray(work_E, dtype=np.float64)
    share_EM = np.zeros((len(work_E), processes))
    most = places(len(work_E), processes)
    for expert in np.argsort(-work_E, kind="stable"):
        count_M, done_M = share_EM.sum(axis=0), work_E @ share_EM
        free = [process for process in range(processes) if count_M[process] < most]
        share_EM[expert, min(free, key=lambda process: (done_M[process], count_M[process]))] = 1
    return share_EM


def optimal(work_E: ArrayLike, processes: int) -> FloatArray:
    """The least largest work, by a mixed-integer program, with copies of experts where they lower it.

    Minimise t + COPY * mean work * copies over shares y and whether a process holds an expert, x in {0, 1}:
    sum_m y_em = 1, y_em <= x_em, sum_e work_e y_em <= t, and at most `places` experts a process, at least one. Never
    worse than `greedy`, to which it falls back where the solver finds nothing in its time.
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
    idle = bool((share_EM.sum(axis=0) == 0).any())  # a process that holds an expert and has no work from it
    return first if idle or _worth(first, work_E) <= _worth(share_EM, work_E) else share_EM


def _program(work_E: FloatArray, processes: int) -> FloatArray | None:
    """The program of `optimal`, on work whose mean for a process is 1 (None: not solved in its time)."""
    from scipy.optimize import LinearConstraint, milp  # here, because it takes a fifth of a second
    from scipy.sparse import coo_array, eye, hstack, kron, vstack

    experts, pairs = len(work_E), len(work_E) * processes
    unit, of_expert, of_process = eye(pairs), kron(eye(experts), np.ones((1, processes))), eye(processes)

    def nothing(rows: int, columns: int = pairs) -> Any:
        return coo_array((rows, columns))

    held = kron(np.ones((1, experts)), of_process)
    # Variables: y (E, M), x (E, M), t. Each row: matrix, lower limit, upper limit.
    rows: list[Any] = [
        (hstack([of_expert, nothing(experts), nothing(experts, 1)]), 1, 1),
        (hstack([unit, -unit, nothing(pairs, 1)]), -np.inf, 0),
        (hstack([kron(work_E[None], of_process), nothing(processes), -np.ones((processes, 1))]), -np.inf, 0),
        (hstack([nothing(processes), held, nothing(processes, 1)]), 1, places(experts, processes)),
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
    """What the program minimises, in units of the mean work."""
    return imbalance(share_EM, work_E) + COPY * float((share_EM > 0).sum() - len(share_EM))


def aligned(share_EM: ArrayLike, before_EM: ArrayLike) -> FloatArray:
    """The same placement with its processes renumbered so that as few experts as possible move."""
    from scipy.optimize import linear_sum_assignment

    share_EM, before_EM = np.asarray(share_EM), np.asarray(before_EM)
    stays_MM = (before_EM > 0).T.astype(float) @ (share_EM > 0)
    order_M = linear_sum_assignment(stays_MM, maximize=True)[1]
    return share_EM[:, order_M]


def imbalance(share_EM: ArrayLike, work_E: ArrayLike) -> float:
    """The largest over the mean work of a process; 1 is even. 1 where there is no work."""
    done_M = np.asarray(work_E, dtype=np.float64) @ np.asarray(share_EM)
    return float(done_M.max() / done_M.mean()) if done_M.any() else 1.0


def total_imbalance(share_LEM: ArrayLike, work_LE: ArrayLike) -> float:
    """Of several places one after the other, each of which waits for its slowest process."""
    done_LM = np.einsum("le,lem->lm", np.asarray(work_LE, dtype=np.float64), np.asarray(share_LEM))
    return float(done_LM.max(axis=1).sum() / done_LM.mean(axis=1).sum()) if done_LM.any() else 1.0


RULES = {"work": greedy, "lp": optimal}
