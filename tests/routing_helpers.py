"""A Routing from plain lists of assignments."""

from torch import Tensor

from model.routing import Assignments, Gate, Routing


def listed_routing(
    sample_A: Tensor, expert_A: Tensor, weight_A: Tensor, logits_BE: Tensor, top_k: int | None = None, **gate
) -> Routing:
    """gate: other parts of a Gate, at temperature 1."""
    listed = Assignments.listed(sample_A, expert_A, weight_A, tuple(logits_BE.shape), top_k)
    return Routing(listed, Gate(logits_BE, logits_BE, **gate))
