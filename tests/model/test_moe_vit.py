"""Experts inside a frozen ViT: against numbers by hand, brute force, and the original ViT."""

import copy
import hashlib

import pytest
import torch
from block_helpers import SIZES, images, moe_vit, spread, tiny_vit
from conftest import mostly_slow
from torch.nn import functional as F

from model.backbone import Backbone
from model.experts import ExpertsConfig
from model.moe_vit import resolve_blocks
from model.routers import ROUTERS

TOKEN_RULES = sorted(kind for kind, rule in ROUTERS.items() if rule.token_choice)


@pytest.mark.parametrize("vit", ["plain", "no_class", "registers", "layer_scale", "eva"])
@pytest.mark.parametrize("kind", ["adapter", "ffn"])
def test_training_starts_from_the_pretrained_vit(vit, kind):
    vit = tiny_vit(vit)
    sizes = SIZES if kind == "adapter" else [[vit.blocks[0].mlp.fc2.in_features]] * 3
    features = ("mean:1", "mean:2")
    model = moe_vit(vit, features, {"kind": kind, "sizes": sizes}, {"norm": "none"}, kind="switch", top_k=1).eval()
    x_BCHW = model.prepare(images())
    features_BF, _ = model._features(x_BCHW, warmup=False, allowed_E=None)
    close = {"rtol": 0, "atol": 0} if kind == "adapter" else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(features_BF, model.backbone(x_BCHW), **close)


def test_layer_scale_applies_to_the_experts():
    """Twice the layer scale and half the FFN and experts is the same block."""
    model = spread(moe_vit(tiny_vit("layer_scale"), ("mean:0",))).eval()
    logits_BC, _ = model(images())
    block, experts = model.backbone.vit.blocks[0], model.mixtures[0].experts
    block.ls2.gamma.data *= 2
    block.mlp.fc2.weight.data /= 2
    block.mlp.fc2.bias.data /= 2
    experts.up.data /= 2
    torch.testing.assert_close(model(images())[0], logits_BC)
    experts.up.data *= 3
    assert not torch.allclose(model(images())[0], logits_BC, atol=1e-3)


def fingerprint(model) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(model.backbone.vit.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def train(model, steps: int = 3, warmup: bool = False, seed: int = 0):
    """A few steps of AdamW; the last routings."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    model.train()
    torch.manual_seed(seed)
    for step in range(steps):
        logits_BC, routings = model(images(seed=step), warmup=warmup)
        optimizer.zero_grad()
        F.cross_entropy(logits_BC, torch.tensor([0, 1, 2, 3, 4, 0])).backward()
        optimizer.step()
        model.after_step(routings)
    return routings


@pytest.mark.parametrize("level", ["token", "image"])
@pytest.mark.parametrize("rule", mostly_slow(TOKEN_RULES, ["noisy_topk", "deepseek"]))
def test_every_rule_trains_and_does_not_change_the_vit(rule, level):
    experts = {"sizes": [[2], [2], [4], [4]]}
    top_k = ROUTERS[rule].only_top_k or 2
    model = spread(moe_vit(experts=experts, kind=rule, top_k=top_k, level=level, bias_rate=0.01))
    before, frozen = copy.deepcopy(model.state_dict()), fingerprint(model)
    routings = train(model)
    assert fingerprint(model) == frozen
    samples = 6 if level == "image" else 6 * 17
    assert [routing.num_samples for routing in routings] == [samples] * 3
    after = model.state_dict()
    learned = [name for name, _ in model.named_parameters() if not torch.equal(before[name], after[name])]
    gates = [name for name in learned if "router" in name]
    assert len(gates) >= 3 * ROUTERS[rule].learns
    assert len([name for name in learned if ".experts." in name]) == 9  # down, its bias and up, in three blocks
    assert all(int(mixture.usage_E.sum()) > 0 for mixture in model.mixtures)
    assert any(mixture.router.bias_E.any() for mixture in model.mixtures)  # even loads move none


@pytest.mark.parametrize("options", [{"capacity_factor": 0.5}, {"capacity_factor": 0.5, "overflow": "next_best"}])
def test_capacity_holds_in_training_only(options):
    model = spread(moe_vit(**options))
    routings = train(model, steps=1)
    assert all(int(routing.counts_E.max()) <= 34 + 1 for routing in routings)  # 102 tokens * 2 * 0.5 / 3
    _, routings = model.eval()(images())
    assert all(int(routing.counts_E.sum()) == 2 * 102 for routing in routings)


def test_warmup_is_random_and_counted_separately():
    model = moe_vit()
    routings = train(model, steps=2, warmup=True)
    assert not any(routing.learned for routing in routings)
    for mixture in model.mixtures:
        assert int(mixture.warmup_usage_E.sum()) == 2 * 2 * 102 and int(mixture.usage_E.sum()) == 0


def test_gradients_end_at_the_first_block_with_experts():
    model = moe_vit(experts={"blocks": [1]})
    reached = {}
    for index, block in enumerate(model.backbone.vit.blocks):
        block.norm2.register_forward_hook(lambda _m, _i, out, index=index: reached.update({index: out.requires_grad}))
    logits_BC, routings = model.train()(images())
    assert reached == {0: False, 1: False, 2: True}
    assert len(routings) == 1
    logits_BC.sum().backward()
    assert model.mixtures[0].experts.up.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in model.backbone.vit.parameters())


def test_evaluation_does_not_depend_on_the_batch():
    model = spread(moe_vit(kind="vmoe", capacity_factor=0.5)).eval()
    whole_BC = model(images(64))[0]
    for size in (1, 7):
        parts_BC = torch.cat([model(part)[0] for part in images(64).split(size)])
        torch.testing.assert_close(parts_BC, whole_BC, rtol=1e-5, atol=1e-5)


def test_an_expert_that_is_not_allowed_is_not_chosen_in_one_block_or_in_all():
    model = spread(moe_vit()).eval()
    allowed_LE = torch.ones(3, 3, dtype=torch.bool)
    allowed_LE[1, 2] = False
    counts = torch.stack([routing.counts_E for routing in model(images(), allowed_E=allowed_LE)[1]])
    assert (counts > 0).tolist() == allowed_LE.tolist()
    counts = torch.stack([routing.counts_E for routing in model(images(), allowed_E=allowed_LE[1])[1]])
    assert (counts[:, 2] == 0).all() and (counts[:, :2] > 0).all()


def test_the_state_is_the_trained_part_and_copies_share_the_vit():
    model = moe_vit(experts={"blocks": [-1]})
    assert {name.split(".")[0] for name in model.state_dict()} == {"mixtures", "neck", "head"}
    trained = sum(parameter.numel() for parameter in model.parameters())
    assert (
        trained == 12 * (16 + 1 + 16) + 2 * (16 * 3) + 3 + 2 * 32 + 32 * 5 + 5
    )  # adapters, gate and noise, norm, head
    twin = copy.deepcopy(model)
    assert twin.backbone is model.backbone
    assert twin.mixtures[0].experts.up is not model.mixtures[0].experts.up


def test_the_image_level_reads_the_class_token():
    model = spread(moe_vit(level="image", norm="none")).eval()
    mixture, x_BTD = model.mixtures[0], torch.randn(4, 17, 16)
    _, routing = mixture(x_BTD, x_BTD)
    torch.testing.assert_close(routing.logits_BE, mixture.router.gate(x_BTD[:, 0]))


def test_blocks_are_resolved_from_the_end_and_by_the_features():
    model = moe_vit(features=("mean:1",))
    assert model.blocks == [0, 1]
    assert moe_vit(features=("mean:-1",), experts={"blocks": [-1, 0]}).blocks == [0, 2]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"experts": {"blocks": [3]}}, "names block 3: this ViT has blocks 0 to 2"),
        ({"experts": {"blocks": [2, -1]}}, "names a block twice"),
        ({"experts": {"blocks": [2]}, "features": ("mean:1",)}, "whose output nothing reads"),
        ({"experts": {"sizes": [[2, 2]]}, "top_k": 1}, "one hidden layer"),
        ({"experts": {"sizes": ["small", "large"]}}, "one hidden layer"),
        ({"experts": {"kind": "ffn", "sizes": [[3], [3]]}}, "have 64 hidden units"),
        (
            {"experts": {"kind": "ffn", "sizes": [[64], [64]], "norm": "own"}},
            "norm own does not work with experts.kind ffn",
        ),
        ({"experts": {"kind": "mlp"}}, "is a class head"),
        ({"experts": {"shared": [[4]]}}, "the frozen FFN is the shared expert"),
        ({"experts": {"inputs": [[0], [0], [0]]}}, "does not apply"),
        ({"inputs": [0]}, "does not apply"),
        ({"experts": {"combine": "probabilities"}}, "is for a class head"),
        ({"kind": "expert_choice"}, "each token or image chooses"),
        ({"kind": "soft_moe"}, "each token or image chooses"),
        ({"capacity_factor": 1.0, "overflow": "residual"}, "adds a linear head"),
        ({"top_k": 4}, "larger than the number of experts"),
        ({"neck": {"kind": "flatten"}}, "reads pooled features"),
        ({"features": ("tokens:2",)}, "need experts.place head"),
    ],
)
def test_unsuitable_parts_are_reported_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as raised:
        moe_vit(**options)
    assert "\n" not in str(raised.value)


def test_a_vit_with_other_blocks_is_rejected():
    vit = tiny_vit()
    del vit.blocks[1].norm2
    with pytest.raises(ValueError, match="not Block"):
        moe_vit(vit)


def test_resolve_blocks_reads_no_weights():
    assert resolve_blocks(ExpertsConfig(place="blocks", kind="adapter"), moe_vit().backbone) == [0, 1, 2]


def test_a_mixture_on_top_is_one_more_place():
    model = spread(moe_vit(experts={"blocks": [1, 2], "head": [[4], [8], []]}))
    assert model.places == ("block_1", "block_2", "head")
    assert model.head is None and [expert.linears[0].in_features for expert in model.mixtures[-1].experts] == [32] * 3
    before = copy.deepcopy(model.state_dict())
    routings = train(model)
    assert [routing.num_samples for routing in routings] == [102, 102, 6]
    assert [int(mixture.usage_E.sum()) for mixture in model.mixtures] == [3 * 2 * 102] * 2 + [3 * 2 * 6]
    after = model.state_dict()
    assert not torch.equal(before["mixtures.2.experts.0.0.weight"], after["mixtures.2.experts.0.0.weight"])
    # Experts excluded in the blocks are not excluded there.
    _, routings = model.eval()(images(), allowed_E=torch.tensor([True, True, False]))
    assert [bool(routing.logits_BE[:, 2].isfinite().all()) for routing in routings] == [False, False, True]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"head": [[4]], "sizes": SIZES, "place": "blocks", "kind": "adapter"}, "needs 3 entries"),
        ({"head": [[4]] * 4}, r"needs experts\.place blocks"),
    ],
)
def test_a_mixture_on_top_that_does_not_fit_is_reported_in_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        ExpertsConfig(**options)


@pytest.mark.parametrize("kind, sizes", [("adapter", SIZES), ("ffn", [[64]] * 3)])
def test_half_precision_also_starts_from_the_vit_and_trains_float32_weights(kind, sizes):
    """As on a GPU: the ViT in bfloat16, gates and logits in float32."""
    model = moe_vit(experts={"kind": kind, "sizes": sizes}, neck={"norm": "none"}, kind="switch", top_k=1)
    backbone = Backbone(model.backbone.vit, ["mean:1", "mean:2"], torch.bfloat16)
    model._frozen.part = backbone
    close = {"rtol": 0, "atol": 0} if kind == "adapter" else {"rtol": 0.05, "atol": 0.05}
    features_BF, routings = model.eval()._features(model.prepare(images()), warmup=False, allowed_E=None)
    torch.testing.assert_close(features_BF, backbone(model.prepare(images())), **close)
    assert {routing.logits_BE.dtype for routing in routings} == {torch.float32}
    before = copy.deepcopy(model.state_dict())
    with torch.autocast("cpu", torch.bfloat16):
        train(model, steps=2)
    after = model.state_dict()
    assert {value.dtype for value in after.values() if value.is_floating_point()} == {torch.float32}
    assert sum(not torch.equal(before[name], after[name]) for name in before if ".experts." in name) >= 9
    assert model(images())[0].dtype == torch.float32
