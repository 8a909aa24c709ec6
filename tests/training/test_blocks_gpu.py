"""Steps through a ViT with experts on a GPU: recomputed activations, and copies of an FFN in one grouped product."""

import pytest
import torch
from block_helpers import moe_vit, plain_ffn, spread, tiny_vit

from config.optim import OptimConfig
from model import dispatch
from model.backbone import Backbone
from model.balance import BalanceConfig
from model.experts import ExpertsConfig
from model.experts.ffn import UpcycledFFN
from model.moe_vit import MoEViT
from model.routing import Assignments
from training.graph import GraphedStep, worth_capturing
from training.optim import build_optimizer
from training.step import TrainingStep

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
COPIES = {"kind": "ffn", "sizes": [[64]] * 4}
ADAPTERS = {"norm": "own", "activation": "silu"}


def on_gpu(experts: dict, half: bool = False, **router) -> MoEViT:
    """A model in training on the GPU, its ViT in bfloat16 if half."""
    model = spread(moe_vit(tiny_vit(), experts=experts, norm="none", **router))
    backbone = Backbone(model.backbone.vit, ["mean:1", "mean:2"], torch.bfloat16 if half else torch.float32)
    return model.on(backbone.to("cuda")).train()


def trained(model: MoEViT, graphed: bool, steps: int = 8) -> tuple[list[float], dict[str, torch.Tensor], int]:
    """Losses, weights, and the most memory that a step needs."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (256, 3, 8, 8), dtype=torch.uint8, generator=generator).cuda()
    labels = torch.randint(0, 5, (256,), generator=generator).cuda()
    step = TrainingStep(model, build_optimizer(model, OptimConfig()), BalanceConfig(), 0.1, 0.0, "auto")
    run = GraphedStep(step, 256) if graphed else step
    run(images, labels, warmup=False)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    losses = []
    for _ in range(steps):
        result = run(images, labels, warmup=False)
        assert result is not None
        losses.append(float(result.loss))
    return losses, {k: v.clone() for k, v in model.state_dict().items()}, torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("how", ["plain", "compiled", "captured"])
@pytest.mark.parametrize("experts", [ADAPTERS, COPIES | {"dispatch": "dense"}])
def test_recomputed_activations_give_the_same_training_with_less_memory(experts, how):
    found = []
    for recompute in (False, True):
        model = on_gpu(experts, kind="mixtral")
        model.recompute = recompute
        if how == "compiled":
            model.compile({256}, pytest.fail)
        found.append(trained(model, how == "captured"))
    (losses, weights, memory), (again, their_weights, less) = found
    assert again == pytest.approx(losses, rel=1e-3)
    for name, value in weights.items():
        torch.testing.assert_close(their_weights[name].float(), value.float(), rtol=2e-2, atol=2e-3)
    if how == "plain":  # a graph keeps its memory from call to call
        assert less < (0.9 if experts is ADAPTERS else 1) * memory  # copies of an FFN, all dense, keep most of it


def test_grouped_copies_of_an_ffn_equal_sequential_ones():
    ffn, found = plain_ffn(16, 64), []
    torch.manual_seed(0)
    x_BTD, chosen_NK, weights_NK = torch.randn(4, 17, 16), torch.randn(68, 4).topk(2).indices, torch.rand(68, 2)
    assignments = Assignments.of_each(chosen_NK.cuda(), weights_NK.cuda(), 4)
    for way, dtype in (("sorted", torch.float32), ("grouped", torch.bfloat16), ("auto", torch.bfloat16)):
        copies = UpcycledFFN(16, ExpertsConfig(place="blocks", kind="ffn", sizes=[[64]] * 4, dispatch=way), ffn).cuda()
        rows = x_BTD.to("cuda", dtype).detach().requires_grad_()
        out = copies(rows, torch.zeros_like(rows), assignments)
        out.float().square().sum().backward()
        found.append((out.float(), rows.grad.float(), copies.copies[1].linears[0].weight.grad))
    for other in found[1:]:
        for value, expected in zip(other, found[0], strict=True):
            torch.testing.assert_close(value, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


@pytest.mark.parametrize("kind, top_k, level", [("vmoe", 2, "token"), ("switch", 1, "token"), ("vmoe", 2, "image")])
@pytest.mark.parametrize("experts", [ADAPTERS, COPIES])
def test_rules_and_levels_are_captured_and_learn_in_bfloat16(experts, kind, top_k, level, monkeypatch):
    monkeypatch.setattr(dispatch, "DENSE_WORK_IN_A_GRAPH", (0, 0))  # so that many copies are grouped, as large ones are
    model = on_gpu(experts, half=True, kind=kind, top_k=top_k, level=level)
    assert worth_capturing("auto", model, 256)
    losses, _, _ = trained(model, graphed=True, steps=30)
    assert losses[-1] < losses[0] and all(torch.isfinite(torch.tensor(losses)))
