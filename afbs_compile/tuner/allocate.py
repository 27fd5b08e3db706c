"""Choose every head's operating point together: least live work within one budget (a multiple-choice knapsack)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linprog
from scipy.sparse import csr_array, eye_array, kron

Floats = NDArray[np.float64]


def allocate(work: Floats, cost: Floats, budget: float) -> NDArray[np.intp]:
    """The point of each head that makes ``sum(work)`` least while ``sum(cost) <= budget``.

    Solved as a linear program over the convex combinations of each head's points. Its optimum splits at most one head
    between two points; that head gets the one that costs less, so the answer is within one head's step of the optimum.

    Args:
        work: ``[heads, points]``, any unit; not finite where a point must not be used.
        cost: ``[heads, points]``, at least 0, in the unit of the budget; not finite where a point must not be used.
        budget: at least 0.

    Returns:
        ``[heads]``: a point of each head.

    Raises:
        ValueError: some head has no point without cost, so that the budget may be out of reach.
    """
    usable = np.isfinite(work) & np.isfinite(cost)
    if not (usable & (cost <= 0)).any(1).all():
        raise ValueError("cost: every head needs a point that costs nothing; accepted: DENSE among its points")
    heads, points = work.shape
    # minimise sum x w  subject to  sum x c <= budget,  sum over a head's x = 1,  0 <= x, and x = 0 where not usable
    solution = linprog(
        np.where(usable, work, 0.0).ravel(),
        A_ub=csr_array(np.where(usable, cost, 0.0).reshape(1, -1)),
        b_ub=[budget],
        A_eq=kron(eye_array(heads), np.ones((1, points)), format="csr"),
        b_eq=np.ones(heads),
        bounds=np.stack([np.zeros(heads * points), usable.ravel().astype(float)], 1),
        method="highs",
    )
    share = solution.x.reshape(heads, points)
    taken = np.where(share > 1e-6, np.where(usable, cost, np.inf), np.inf)
    chosen: NDArray[np.intp] = taken.argmin(1)
    return chosen
