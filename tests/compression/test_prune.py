"""Pruning: the smaller model equals the original one under a mask, for every rule, behind and inside the ViT."""

from types import SimpleNamespace

import pytest
import torch
from compression_helpers import behind, inputs_of, inside

from assembly.compression_steps import as_one, ungrown
from common.errors import UserError
from compression.prune import check_prune, prune, prune_to_budget
from model.routers import ROUTERS

KEPT = [0, 2, 3]
OPTIONS = {"gshard": {"overflow": "drop"}, "deepseek": {"bias_rate": 0.01}, "soft_moe": {"slots": 2}}


def without_the_others(model, inputs, kept):
    """The outputs and the routing if the gate may choose no other expert."""
    allowed_E = torch.zeros(model.mixtures[0].router.num_experts, dtype=torch.bool)
    allowed_E[kept] = True
    return model(inputs, allowed_E=allowed_E)


def assert_prunes_exactly(mixture, kept=KEPT):
    config, model, build = mixture
    smaller_config, smaller = prune(config, model, kept, build)
    inputs = inputs_of(model)
    with torch.no_grad():
        expected, routings = without_the_others(model, inputs, kept)
        found, smaller_routings = smaller(inputs)
    assert not torch.allclose(model(inputs)[0], expected, atol=1e-3)  # the mask has an effect
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    for before, after in zip(routings, smaller_routings, strict=True):
        visits_E, left_E = (
            torch.bincount(routing.expert_A[routing.weight_A > 0], minlength=routing.num_experts)
            for routing in (before, after)
        )
        assert visits_E[kept].tolist() == left_E.tolist()
    for before, after in zip(model.mixtures, smaller.mixtures, strict=True):
        assert torch.equal(before.usage_E[kept], after.usage_E)
    assert smaller_config.experts.sizes == [config.experts.sizes[e] for e in kept]


@pytest.mark.parametrize("kind", sorted(name for name, rule in ROUTERS.items() if not rule.has_groups))
@pytest.mark.parametrize("top_k", [1, 2])
def test_behind_the_vit_the_outputs_are_those_of_the_masked_model(kind, top_k):
    if ROUTERS[kind].only_top_k not in (None, top_k) or (kind, top_k) == ("mixtral", 1):
        pytest.skip(f"{kind} has another top_k")
    hidden = [4] if ROUTERS[kind].learns and not ROUTERS[kind].reads_tokens else []
    options = {"kind": kind, "top_k": top_k, "hidden": hidden} | OPTIONS.get(kind, {})
    assert_prunes_exactly(behind(options))


@pytest.mark.parametrize("kind", sorted(name for name, rule in ROUTERS.items() if rule.token_choice))
@pytest.mark.parametrize("level", ["token", "image"])
def test_inside_the_vit_too(kind, level):
    if ROUTERS[kind].has_groups:
        pytest.skip("removes whole groups: below")
    top_k = ROUTERS[kind].only_top_k or 2
    mixture = inside({"kind": kind, "top_k": top_k, "level": level})
    with torch.no_grad():
        counts_E = mixture[1](inputs_of(mixture[1]))[1][0].counts_E.tolist()
    kept = sorted(range(len(counts_E)), key=counts_E.__getitem__)[:-1]  # all but the most used
    assert_prunes_exactly(mixture, sorted(kept))


def test_hierarchical_routing_loses_only_whole_groups():
    mixture = behind({"kind": "hierarchical", "top_k": 2, "groups": 2, "top_groups": 1})
    assert_prunes_exactly(mixture, [2, 3])
    assert prune(mixture[0], mixture[1], [2, 3], mixture[2])[0].router.groups == 1
    assert_prunes_exactly(inside({"kind": "hierarchical", "top_k": 2, "groups": 2, "top_groups": 1}), [0, 1])
    with pytest.raises(UserError, match=r"kind hierarchical has groups of 2 .* remove whole groups"):
        check_prune(mixture[0], [0])


def test_a_rule_of_a_plugin_that_has_groups_loses_only_whole_groups(monkeypatch):
    config = behind({"kind": "hierarchical", "top_k": 2, "groups": 2, "top_groups": 1})[0]
    monkeypatch.setitem(ROUTERS, "toy_groups", ROUTERS["hierarchical"])
    config.router.kind = "toy_groups"
    with pytest.raises(UserError, match=r"kind toy_groups has groups of 2 .* remove whole groups"):
        check_prune(config, [0])


def test_copies_of_the_ffn_and_a_mixture_on_top_lose_the_same_experts():
    assert_prunes_exactly(inside(experts={"kind": "ffn", "sizes": [[64]] * 4}))
    mixture = inside(experts={"head": [[4], [3], [2], [5]]})
    config, model, build = mixture
    smaller_config, smaller = prune(config, model, KEPT, build)
    assert smaller_config.experts.head == [[4], [2], [5]]
    allowed_E = torch.tensor([e in KEPT for e in range(4)])
    masked = model.mixtures[-1].forward
    model.mixtures[-1].forward = lambda x, warmup, static: masked(x, warmup, allowed_E, static)
    inputs = inputs_of(model)
    torch.testing.assert_close(smaller(inputs)[0], model(inputs, allowed_E=allowed_E)[0], atol=1e-5, rtol=1e-5)


def test_lists_with_one_entry_per_expert_are_pruned_too():
    experts = {"shared": [[7]], "dropout": [0.1, 0.2, 0.3, 0.4, 0.5], "inputs": [[0], [1], [0, 1], [1], [0]]}
    mixture = behind({"target_load": [1.0, 2.0, 3.0, 4.0]}, experts)
    assert_prunes_exactly(mixture)
    config, _ = prune(*mixture[:2], KEPT, mixture[2])
    assert config.experts.dropout == [0.1, 0.3, 0.4, 0.5] and config.experts.inputs == [[0], [0, 1], [1], [0]]
    assert config.router.target_load == [1.0, 3.0, 4.0] and config.experts.shared == [[7]]


def test_added_experts_are_pruned_like_the_others():
    config, model, build = behind({}, {"grown": [3]})
    bank, test = SimpleNamespace(feature_shape=(8,)), SimpleNamespace(num_classes=5)
    inputs = SimpleNamespace(splits=SimpleNamespace(test=test), backbone=None)
    opened = SimpleNamespace(config=config, model=model, bank=bank, inputs=inputs)
    with pytest.raises(UserError, match="still opening"):
        as_one(opened, ungrown(config))
    model.moe.router.margin_E.zero_()
    whole = as_one(opened, ungrown(config))
    features = inputs_of(model)
    torch.testing.assert_close(whole(features)[0], model(features)[0], atol=1e-6, rtol=1e-5)
    assert_prunes_exactly((ungrown(config), whole, build))


def test_with_a_budget_the_least_useful_expert_is_removed_first():
    config, model, build = behind()
    worth = {3: 0.01, 5: 0.10, 4: 0.002, 6: 0.02}  # by hidden units, which tell the experts apart

    def score(smaller):
        return 0.5 + sum(worth[expert[0].out_features] for expert in smaller.moe.experts)

    whole = score(model)
    for budget, left, gone in ((0.001, [0, 1, 2, 3], []), (0.003, [0, 1, 3], [2]), (1.0, [1, 3], [2, 0])):
        kept, steps = prune_to_budget(config, model, build, score, whole - budget)
        assert kept == left and [step.experts for step in steps] == [(expert,) for expert in gone]
    assert steps[-1].macro_f1 == pytest.approx(0.5 + 0.10 + 0.02)


@pytest.mark.parametrize(
    "removed, message",
    [
        ([0, 1, 2, 3], r"names all 4 experts"),
        ([0, 1, 2], r"leaves 1 of 4 experts, but each sample uses router\.top_k 2: remove at most 2"),
        ([4], r"names expert 4: this run has experts 0 to 3"),
        ([-1], r"names expert -1"),
    ],
)
def test_impossible_removals_are_reported_in_one_line(removed, message):
    with pytest.raises(UserError, match=message) as raised:
        check_prune(behind()[0], removed)
    assert "\n" not in str(raised.value)


def test_the_only_expert_cannot_be_removed():
    with pytest.raises(UserError, match="--prune names the only expert of this run: one must remain"):
        check_prune(behind({"top_k": 1}, {"sizes": [[3]]})[0], [0])


def test_an_invalid_pruned_model_is_reported_in_one_line():
    config, *_ = behind({"kind": "expert_choice", "capacity_factor": 3.0})
    with pytest.raises(UserError, match=r"capacity_factor 3\.0 with kind expert_choice"):
        prune(config, *behind()[1:2], [0, 1], behind({"kind": "expert_choice"})[2])
