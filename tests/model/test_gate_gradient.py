"""Whether the task trains the whole gate: every rule, combination and number of choices."""

from itertools import product

import pytest
import torch

from model.classifier import NeckConfig, check_parts
from model.dispatch import COMBINE
from model.experts import ExpertsConfig
from model.moe import MixtureOfExperts
from model.routers import ROUTERS, RouterConfig


def gradients_of_rows(router, combine):
    """The largest gradient that a task loss gives each row of the gate."""
    moe = MixtureOfExperts(6, 3, router, ExpertsConfig(sizes=[[4]] * 6, combine=combine)).train()
    torch.nn.init.normal_(moe.router.gate.weight)
    logits, _ = moe(torch.randn(128, 6))
    torch.nn.functional.cross_entropy(logits, torch.randint(3, (128,))).backward()
    return moe.router.gate.weight.grad.abs().amax(dim=1)


@pytest.mark.parametrize("kind", sorted(set(ROUTERS) - {"hash", "soft_moe"}))
@pytest.mark.parametrize("combine", sorted(COMBINE))
def test_the_task_trains_every_row_of_the_gate_or_the_options_are_rejected(kind, combine):
    torch.manual_seed(0)
    tried = 0
    for top_k, (groups, top_groups) in product(
        (1, 2, 3, 4, 6), ((1, 1), (2, 1), (2, 2), (3, 1), (3, 2), (3, 3), (6, 2))
    ):
        if kind != "hierarchical" and groups > 1:
            continue
        router = RouterConfig(kind=kind, top_k=top_k, groups=groups, top_groups=top_groups, noise_std=0.0)
        experts = ExpertsConfig(sizes=[[4]] * 6, combine=combine)
        try:
            check_parts(NeckConfig(), router, experts)
        except ValueError as error:
            if "the gate no gradient" in str(error):
                assert top_k == 1 or top_groups == 1 < groups
            continue
        tried += 1
        gradient_R = gradients_of_rows(router, combine)
        # Softmax over one group, or over the one expert of a group, has nothing to learn.
        learning = torch.ones_like(gradient_R, dtype=torch.bool)
        if kind == "hierarchical":
            learning[:groups] = groups > 1
            learning[groups:] = groups < 6
        assert (gradient_R[learning] > 1e-5).all(), (top_k, groups, top_groups, gradient_R)
    assert tried or (kind, combine) == ("switch", "probabilities")


def test_a_group_gate_that_scales_all_weights_equally_is_rejected_with_probabilities():
    router = RouterConfig(kind="hierarchical", top_k=2, groups=2, top_groups=1)
    with pytest.raises(
        ValueError, match=r"probabilities with router\.top_groups 1 .* use logits, or router\.top_groups 2"
    ):
        check_parts(NeckConfig(), router, ExpertsConfig(sizes=[[4]] * 4, combine="probabilities"))
    check_parts(NeckConfig(), router, ExpertsConfig(sizes=[[4]] * 4, combine="logits"))
