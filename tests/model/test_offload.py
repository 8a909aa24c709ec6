"""Offloaded experts: the same outputs, copied when they are chosen; the most used ones stay within the memory limit."""

import copy
from typing import Any

import pytest
import torch
from block_helpers import images, moe_vit, spread
from torch import nn

from model.classifier import NeckConfig, VisionMoE
from model.experts import ExpertsConfig
from model.offload import Stays, offload
from model.quantised import store
from model.routers import RouterConfig
from model.routing import Assignments

CPU = torch.device("cpu")
SIZES = [[4], [8], [6, 5], []]


def head(usage=(5, 40, 10, 20), top_k=1, **experts):
    """Four unequal experts behind a ViT, on 6 features and 3 classes, with their usage in training."""
    torch.manual_seed(0)
    parts = (RouterConfig(kind="noisy_topk", top_k=top_k, norm="none"), ExpertsConfig(sizes=SIZES, **experts))
    model = VisionMoE((6,), 3, NeckConfig(norm="none"), *parts).eval()
    model.moe.usage_E.copy_(torch.tensor(usage))
    return model


def only(model, expert, count=3):
    """Features that the gate sends to one expert."""
    with torch.no_grad():
        model.moe.router.gate.weight.copy_(torch.eye(6)[:4])
        model.moe.router.gate.bias.zero_()
    return 5 * torch.eye(6)[expert].repeat(count, 1) + 0.1


def sizes(model):
    return [sum(p.nbytes for p in expert.parameters()) for expert in model.moe.experts]


@pytest.mark.parametrize("memory", [0, 400, 10**9])
@pytest.mark.parametrize("experts", [{}, {"shared": [[4]], "kind": "glu"}, {"combine": "probabilities"}])
@torch.no_grad()
def test_experts_behind_the_vit_give_the_same_outputs(experts, memory):
    model = head(top_k=2, **experts)
    features = torch.randn(40, 6)
    expected, (routing,) = model(features)
    traffic = offload(model, CPU, memory)
    logits, (after,) = model(features)
    torch.testing.assert_close(logits, expected)
    assert torch.equal(after.expert_A, routing.expert_A)
    assert (traffic.copies == 0) == (traffic.offloaded == 0) == (memory == 10**9)


@torch.no_grad()
def test_an_expert_is_fetched_when_a_batch_chooses_it_and_only_then():
    model = head()
    bytes_E = sizes(model)
    traffic = offload(model, CPU)
    assert (traffic.offloaded, traffic.offloaded_bytes, traffic.kept) == (4, sum(bytes_E), 0)
    model(only(model, 2))
    assert (traffic.copies, traffic.copied_bytes) == (1, bytes_E[2])
    model(torch.cat([only(model, 0), only(model, 2)]))
    assert (traffic.copies, traffic.copied_bytes) == (3, bytes_E[0] + 2 * bytes_E[2])


@torch.no_grad()
def test_the_most_used_experts_that_fit_are_kept():
    model = head(usage=(5, 40, 10, 20))
    bytes_E = sizes(model)  # of hand: 28 + 15, 56 + 27, 42 + 35 + 18, 21 numbers
    assert bytes_E == [4 * n for n in ((6 * 4 + 4) + 8 + (4 * 3 + 3), 56 + 16 + 27, 42 + 12 + 35 + 10 + 18, 21)]
    traffic = offload(model, CPU, bytes_E[1] + bytes_E[3] + bytes_E[0])  # 2 is used more than 0, and is too large
    assert (traffic.kept, traffic.kept_bytes) == (3, bytes_E[1] + bytes_E[3] + bytes_E[0])
    for expert in (0, 1, 3):
        model(only(model, expert))
    assert traffic.copies == 0
    model(only(model, 2))
    assert traffic.copies == 1


@torch.no_grad()
def test_offloaded_experts_stay_in_host_memory_and_in_the_parameter_count():
    model = head()
    number = sum(parameter.numel() for parameter in model.parameters())
    offload(model, CPU)
    model.to("meta")  # replaces a GPU: shows everything that moves
    where = {name: parameter.device.type for name, parameter in model.named_parameters()}
    assert any(".experts." in name for name in where)
    assert all(device == ("cpu" if ".experts." in name else "meta") for name, device in where.items())
    assert sum(parameter.numel() for parameter in model.parameters()) == number


@pytest.mark.parametrize("kind", ["adapter", "ffn"])
@pytest.mark.parametrize("level", ["token", "image"])
@torch.no_grad()
def test_experts_inside_the_vit_give_the_same_outputs(kind, level):
    sizes = [[2], [4], [6]] if kind == "adapter" else [[64]] * 3
    own = {"norm": "own", "activation": "silu"} if kind == "adapter" else {}
    model = spread(moe_vit(experts={"kind": kind, "sizes": sizes, **own}, level=level)).eval()
    for mixture in model.mixtures:
        mixture.usage_E.copy_(torch.tensor([1, 3, 2]))
    expected, routings = copy.deepcopy(model)(images())
    one = 4 * model.mixtures[0].experts.parameters_of(1)
    traffic = offload(model, CPU, 2 * one)  # the first two blocks' most used
    logits, after = model(images())
    torch.testing.assert_close(logits, expected)
    assert all(torch.equal(a.expert_A, b.expert_A) for a, b in zip(after, routings, strict=True))
    assert (traffic.kept, traffic.offloaded) == (2, 7)
    chosen = [set(routing.expert_A.tolist()) for routing in routings]
    assert traffic.copies == sum(map(len, chosen)) - sum(1 in chosen[block] for block in (0, 1))


@torch.no_grad()
def test_adapters_that_no_token_chooses_are_not_fetched():
    model = spread(moe_vit(top_k=1)).eval()
    traffic = offload(model, CPU)
    bytes_E = [4 * model.mixtures[0].experts.parameters_of(expert) for expert in range(3)]
    allowed_E = torch.tensor([False, True, False])
    model(images(), allowed_E=allowed_E)
    assert traffic.copies == 3 and traffic.copied_bytes == 3 * bytes_E[1]


def test_an_unknown_kind_of_expert_is_rejected():
    model = moe_vit()
    model.mixtures[0].experts = nn.Identity()
    model.mixtures[0].experts.parameters_of = lambda expert: 1
    with pytest.raises(ValueError, match="Identity cannot be offloaded"):
        offload(model, CPU)


@pytest.mark.parametrize("number_format", ["int8", "fp8"])
@torch.no_grad()
def test_experts_in_fewer_bits_are_copied_as_stored(number_format):
    model = head(top_k=2)
    store(model.moe.experts.matrices(), [number_format] * 4)
    features = torch.randn(40, 6)
    expected, _ = model(features)
    number = sum(p.nbytes for p in model.moe.experts[0].parameters())
    traffic = offload(model, CPU)
    torch.testing.assert_close(model(features)[0], expected)
    before = traffic.copied_bytes
    model(only(model, 0), allowed_E=torch.tensor([True, True, False, False]))
    assert traffic.copied_bytes - before == sum(sizes(model)[:2]) and number == sizes(model)[0]
    block = moe_vit()
    store(block.mixtures[0].experts.matrices(), [number_format] * 3)
    with pytest.raises(ValueError, match="fewer bits cannot be offloaded"):
        offload(block, CPU)


@torch.no_grad()
def test_a_batch_without_adapters_is_computed_only_by_the_vit():
    model = moe_vit()
    traffic = offload(model, CPU)
    x_BTD, dense_BTD, none = torch.randn(2, 4, 16), torch.randn(2, 4, 16), torch.zeros(0, dtype=torch.int64)
    assignments = Assignments.listed(none, none, torch.zeros(0), (8, 3))
    assert torch.equal(model.mixtures[0].experts(x_BTD, dense_BTD, assignments), dense_BTD)
    assert traffic.copies == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("inside", [False, True])
@torch.no_grad()
def test_on_a_gpu_weights_come_from_page_locked_memory(inside):
    # With preferences: a new gate's scores are all equal, and a GPU breaks ties differently from a CPU.
    device = torch.device("cuda")
    made: Any = moe_vit() if inside else head(top_k=2)
    model = spread(made).eval()
    samples = images(40) if inside else torch.randn(40, 6)
    copied = copy.deepcopy(model)
    resident = copied.on(copy.deepcopy(model.backbone).to(device)) if inside else copied.to(device)
    expected, routings = resident(samples.to(device))
    if inside:
        model.backbone.to(device)
    traffic = offload(model, device, 400)
    for _ in range(3):
        logits, after = model(samples.to(device))
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
        assert all(torch.equal(a.expert_A, b.expert_A) for a, b in zip(after, routings, strict=True))
    assert traffic.kept and traffic.copies
    stays = [part for part in model.modules() if isinstance(part, Stays)]
    assert stays and all(p.is_pinned() for part in stays for p in part.parameters())
