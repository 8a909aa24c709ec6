"""Parameters and FLOPs of a sample under every routing rule, against counts by hand."""

import pytest
import timm
import torch
from torch import nn

from evaluation.cost import cost, flops, head_cost
from model.backbone import Backbone
from model.classifier import NeckConfig, VisionMoE
from model.experts import ExpertsConfig
from model.routers import RouterConfig


class Eye(nn.Module):
    """A backbone without cost."""

    image_size = 1

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images):
        return images


def cost_of(router, sizes, shared=(), shape=(10,), neck="pooled"):
    experts = ExpertsConfig(sizes=[list(size) for size in sizes], shared=[list(size) for size in shared])
    model = VisionMoE(shape, 3, NeckConfig(kind=neck, norm="none"), router, experts)
    return cost(model, Eye(), shape), model


# An expert of h units on 10 features and 3 classes: 10 h + h weights and biases, 2 h of its norm, 3 h + 3 of the
# output: 16 h + 3 parameters; 2 (10 h + 3 h) FLOPs.
def expert_parameters(units):
    return 16 * units + 3


def expert_flops(units):
    return 26 * units


GATE = 2 * 10 * 4  # FLOPs of a linear gate on 10 features for 4 experts


@pytest.mark.parametrize(
    ("router", "experts_a_sample"),
    [
        (RouterConfig(kind="vmoe", top_k=2), 2),
        (RouterConfig(kind="switch", top_k=1, capacity_factor=1.0), 1),
        (RouterConfig(kind="hash", top_k=2), 2),
        (RouterConfig(kind="expert_choice", top_k=2), 2),
        (RouterConfig(kind="expert_choice", top_k=1, capacity_factor=1.5), 1.5),
    ],
)
def test_active_cost_is_that_of_the_chosen_and_the_shared_experts(router, experts_a_sample):
    found, model = cost_of(router, [[4], [8], [8], [4]], shared=[[5]])
    gate = sum(p.numel() for p in model.moe.router.parameters())
    mean = (expert_parameters(4) + expert_parameters(8)) / 2
    assert found.trainable_parameters == gate + 4 * mean + expert_parameters(5)
    assert found.active_parameters == round(gate + experts_a_sample * mean + expert_parameters(5))
    assert found.head_flops == GATE + experts_a_sample * expert_flops(6) + expert_flops(5)


def test_a_measured_load_weights_the_experts():
    _, model = cost_of(RouterConfig(kind="vmoe", top_k=1), [[4], [8]])
    assert head_cost(model, (10,), [0.25, 0.75]).flops == GATE / 2 + expert_flops(7)


def test_soft_routing_counts_every_slot_and_every_weight_once():
    found, _ = cost_of(RouterConfig(kind="soft_moe", slots=2), [[4], [8]], shape=(5, 10), neck="tokens")
    assert found.active_parameters == found.trainable_parameters
    # 5 tokens, 4 slots: logits 2 * 5 * 10 * 4, slots the same; each expert runs twice.
    assert found.head_flops == 2 * (2 * 5 * 10 * 4) + 2 * (expert_flops(4) + expert_flops(8))


def test_the_head_for_dropped_choices_is_not_active():
    router = RouterConfig(kind="switch", top_k=1, capacity_factor=1.0, overflow="residual")
    found, model = cost_of(router, [[4], [4]])
    gate = sum(p.numel() for p in model.moe.router.parameters())
    assert found.trainable_parameters == gate + 2 * expert_parameters(4) + 33
    assert found.active_parameters == gate + expert_parameters(4)


def test_the_cost_of_the_gate_depends_on_its_inputs():
    experts = ExpertsConfig(sizes=[[4], [4]])
    model = VisionMoE((10,), 3, NeckConfig(norm="none"), RouterConfig(top_k=1, kind="vmoe", inputs=[0]), experts, 2)
    assert cost(model, Eye(), (10,)).head_flops == 2 * 5 * 2 + expert_flops(4)


@pytest.mark.parametrize(
    ("options", "tokens", "hidden"),
    [
        ({"depth": 2, "num_heads": 2, "mlp_ratio": 4}, 5, 96),
        ({"depth": 3, "num_heads": 4, "mlp_ratio": 2, "class_token": False, "global_pool": "avg"}, 4, 48),
        ({"depth": 1, "num_heads": 3, "mlp_ratio": 3, "reg_tokens": 4, "qk_norm": True, "init_values": 0.1}, 9, 72),
    ],
)
def test_flops_of_a_vit_by_hand(options, tokens, hidden):
    width = 24
    vit = timm.models.VisionTransformer(img_size=32, patch_size=16, embed_dim=width, num_classes=0, **options)
    # A block: queries, keys, values and output, the scores and what they mix, and the two layers of the MLP.
    projections, attention = 4 * tokens * width * width, 2 * tokens * tokens * width
    block = projections + attention + 2 * tokens * width * hidden
    patches = 4 * (3 * 16 * 16) * width  # 2 x 2 of 16 x 16 pixels
    expected = 2 * (patches + options["depth"] * block)
    images = torch.zeros(1, 3, 32, 32)
    assert flops(vit, images) == expected
    backbone = Backbone(vit, ["mean:0"])  # what lies behind the last block that is read does not run
    assert flops(backbone, images) == 2 * (patches + block)
