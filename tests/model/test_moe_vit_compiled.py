"""Blocks with experts, compiled and recomputed."""

import copy

import pytest
import torch
from block_helpers import images, moe_vit, spread, tiny_vit
from torch.nn import functional as F

from model.balance import BalanceConfig, balance_losses
from model.moe_vit import run_block
from model.routers import ROUTERS

TOKEN_RULES = sorted(kind for kind, rule in ROUTERS.items() if rule.token_choice)


@pytest.mark.slow
@pytest.mark.parametrize("experts", [{}, {"kind": "ffn", "sizes": [[64]] * 4, "dispatch": "dense"}])
def test_a_block_is_one_static_graph(experts):
    torch._dynamo.reset()
    block, x_BTD = tiny_vit().blocks[1].requires_grad_(False), torch.randn(4, 17, 16)
    mixture = spread(moe_vit(kind="vmoe", noise_std=1e-6, experts={"blocks": [1], **experts})).mixtures[0].train()
    compiled = torch.compile(run_block, backend="eager", fullgraph=True, dynamic=False)
    found = {}
    for name, run, keep in (("eager", run_block, True), ("compiled", compiled, True), ("recomputed", compiled, False)):
        mixture.zero_grad()
        out_BTD, routing = run(block, x_BTD, None, mixture, False, None, keep)
        (out_BTD.square().sum() + balance_losses(routing, BalanceConfig())["switch"]).backward()
        gradients = [parameter.grad for parameter in mixture.parameters() if parameter.grad is not None]
        found[name] = [out_BTD, routing.counts_E, routing.logits_BE, *gradients]
    for name in ("compiled", "recomputed"):
        torch.testing.assert_close(found[name], found["eager"], rtol=1e-3, atol=1e-4)


def test_blocks_that_cannot_be_compiled_run_eagerly(monkeypatch):
    def no_compiler(*_):
        raise RuntimeError("no compiler\nfound")

    model, lines = spread(moe_vit()).eval(), []
    expected = model(images())[0]
    monkeypatch.setattr(torch, "compile", lambda *_, **__: no_compiler)
    model.compile({6}, lines.append)
    torch.testing.assert_close(model(images())[0], expected)
    assert lines == ["the ViT's blocks cannot be compiled (no compiler found): continuing without"]
    assert copy.deepcopy(model)._compiled is model._compiled


@pytest.mark.parametrize("rule", TOKEN_RULES)
def test_evaluation_is_compiled_once_for_all_experts_and_for_some(rule, monkeypatch):
    """One compiled block has the outputs of the eager model, bit for bit if all experts are allowed."""
    forms = []

    def compiler(run, **_):
        def compiled(*block):
            forms.append([value if isinstance(value, bool | None) else type(value) for value in block])
            return run(*block)

        return compiled

    experts = {"blocks": [1], "sizes": [[2], [4], [6], [8]]}
    top_k = ROUTERS[rule].only_top_k or 2
    model = spread(moe_vit(kind=rule, top_k=top_k, experts=experts, features=("mean:2",))).eval()
    without_E = torch.tensor([True, False, True, True])
    expected = [model(images())[0], model(images(), allowed_E=without_E)[0]]
    monkeypatch.setattr(torch, "compile", compiler)
    model.compile({6}, pytest.fail)
    asked = [None, without_E, without_E[None]]
    with torch.no_grad():
        found = [model(images(), allowed_E=allowed_E)[0] for allowed_E in asked]
    for logits, of_this in zip(found, [0, 1, 1], strict=True):
        assert torch.equal(logits, expected[of_this])
    assert len(forms) == 9 and forms[:3] == forms[3:6] == forms[6:]


def test_in_training_the_first_block_with_experts_is_not_compiled_separately(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda run, **_: lambda *block: compiled.append(block[0]) or run(*block))
    model = spread(moe_vit(experts={"blocks": [1, 2]})).train()
    model.compile({6}, pytest.fail)
    model(images())
    blocks = list(model.backbone.vit.blocks)
    assert [blocks.index(block) for block in compiled] == [0, 2]


def test_recomputing_changes_no_gradient():
    model, found = spread(moe_vit(kind="mixtral", norm="none")).train(), []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        logits_BC, _ = model(images())
        F.cross_entropy(logits_BC, torch.tensor([0, 1, 2, 3, 4, 0])).backward()
        found.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*found, rtol=0, atol=0)
