"""The mixture: sparse dispatch against a dense reference, combination, counters, necks, experts."""

import pytest
import torch
from routing_helpers import listed_routing

from model.classifier import NeckConfig, VisionMoE
from model.dispatch import COMBINE, dispatch
from model.experts import SIZES, ExpertsConfig, build_experts
from model.moe import MixtureOfExperts
from model.routers import RouterConfig

UNEQUAL = [[5], [7, 6], [16], [9, 8, 7]]


def dense_reference(x_BD, routing, experts, combine):
    """Every expert on every sample, mixed by a (B, E) matrix of weights: slow and obvious."""
    weight_BE = torch.zeros(routing.num_samples, routing.num_experts)
    weight_BE = weight_BE.index_put((routing.sample_A, routing.expert_A), routing.weight_A, accumulate=True)
    outputs_BEC = torch.stack([expert(x_BD) for expert in experts], dim=1)
    if combine == "probabilities":
        return (weight_BE[..., None] * outputs_BEC.softmax(dim=-1)).sum(dim=1).log()
    return (weight_BE[..., None] * outputs_BEC).sum(dim=1)


def mixture(top_k, combine="logits", sizes=UNEQUAL, classes=3):
    torch.manual_seed(0)
    router = RouterConfig(kind="article", top_k=top_k)
    return MixtureOfExperts(6, classes, router, ExpertsConfig(sizes=sizes, combine=combine)).eval()


@pytest.mark.parametrize("combine", sorted(COMBINE))
@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_sparse_equals_dense_in_values_and_gradients(combine, top_k, batch):
    moe = mixture(top_k).double()
    moe.router.float()
    x = torch.randn(batch, 6, dtype=torch.float64, requires_grad=True)
    routing = moe.router(x)
    target = torch.randn(batch, 3)
    grads = []
    for sparse in (True, False):
        moe.zero_grad()
        x.grad = None
        if sparse:
            out = COMBINE[combine](*dispatch(x, routing.assignments, moe.experts), routing.assignments)
        else:
            out = dense_reference(x, routing, moe.experts, combine).float()
        (out * target).sum().backward(retain_graph=True)
        unused = [p.grad if p.grad is not None else torch.zeros_like(p) for p in moe.parameters()]
        grads.append([out.detach(), x.grad, *unused])
    for sparse, dense in zip(*grads, strict=True):
        torch.testing.assert_close(sparse, dense, atol=1e-5, rtol=1e-4)


def test_each_expert_runs_once_and_only_on_its_samples():
    moe = mixture(2)
    seen = {}
    for index, expert in enumerate(moe.experts):
        expert.register_forward_pre_hook(
            lambda _, inputs, index=index: seen.setdefault(index, []).append(len(inputs[0]))
        )
    _, routing = moe(torch.randn(50, 6))
    assert all(len(calls) == 1 for calls in seen.values())
    assert {e: calls[0] for e, calls in seen.items()} == dict(enumerate(routing.counts_E.tolist()))


@pytest.mark.parametrize("combine", sorted(COMBINE))
def test_a_sample_without_experts_gets_equal_logits(combine):
    experts = build_experts(ExpertsConfig(sizes=[[4], [4]]), 3, 5)[0]
    routing = listed_routing(torch.tensor([0]), torch.tensor([1]), torch.tensor([1.0]), torch.zeros(2, 2))
    out = COMBINE[combine](*dispatch(torch.randn(2, 3), routing.assignments, experts), routing.assignments)
    out.sum().backward()
    assert torch.all(out[1] == out[1, 0])
    assert torch.all(torch.isfinite(out))
    assert all(torch.all(torch.isfinite(p.grad)) for p in experts[1].parameters())


def test_combination_by_hand():
    routing = listed_routing(torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([0.25, 0.75]), torch.zeros(1, 2))
    outputs = torch.tensor([[0.0, 0.0], [torch.log(torch.tensor(3.0)), 0.0]])
    # Logits: 0.75 * log 3 = 0.823959. Probabilities (1/2, 1/2) and (3/4, 1/4) mix to (0.6875, 0.3125).
    order = torch.tensor([0, 1])
    summed = COMBINE["logits"](outputs, order, routing.assignments)[0].tolist()
    assert summed == pytest.approx([0.823959, 0.0], abs=1e-6)
    mixed = COMBINE["probabilities"](outputs, order, routing.assignments).exp()[0].tolist()
    assert mixed == pytest.approx([0.6875, 0.3125], abs=1e-6)


def test_probabilities_survive_extreme_logits():
    routing = listed_routing(torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([0.5, 0.5]), torch.zeros(1, 2))
    outputs = torch.tensor([[500.0, 0.0], [500.0, 0.0]], requires_grad=True)
    out = COMBINE["probabilities"](outputs, torch.tensor([0, 1]), routing.assignments)
    out[0, 1].backward()
    assert out[0].tolist() == pytest.approx([0.0, -500.0])
    assert torch.all(torch.isfinite(outputs.grad)) and outputs.grad.abs().sum() > 0


@pytest.mark.parametrize("batch", [1, 7])
def test_evaluation_does_not_depend_on_the_batch(batch):
    model = VisionMoE((6,), 3, NeckConfig(), RouterConfig(), ExpertsConfig(sizes=UNEQUAL))
    torch.nn.init.normal_(model.moe.router.gate.weight)
    model.eval()
    x = torch.randn(256, 6)
    whole = model(x)[0]
    parts = torch.cat([model(part)[0] for part in x.split(batch)])
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)


def test_counters_count_only_training_with_warm_up_separate():
    moe = mixture(2).train()
    x = torch.randn(10, 6)
    first = moe(x)[1].counts_E
    warm = moe(x, warmup=True)[1].counts_E
    second = moe(x)[1].counts_E
    moe.eval()(x)
    assert torch.equal(moe.usage_E, first + second)
    assert torch.equal(moe.warmup_usage_E, warm)
    assert moe.usage_E.dtype == torch.int64
    assert moe.usage_E.sum().item() == 2 * 10 * 2
    assert torch.equal(moe.state_dict()["usage_E"], moe.usage_E)


def test_counters_sum_to_the_known_routing():
    moe = mixture(1, sizes=[[4], [4], [4]]).train()
    fixed = listed_routing(torch.arange(5), torch.tensor([2, 0, 2, 2, 0]), torch.ones(5), torch.zeros(5, 3))
    moe.router.forward = lambda x, warmup=False, allowed_E=None: fixed
    moe(torch.randn(5, 6))
    moe(torch.randn(5, 6))
    assert moe.usage_E.tolist() == [4, 0, 6]


def test_named_sizes_are_those_of_the_reference_recipe():
    config = ExpertsConfig()
    experts = build_experts(config, 10, 100)[0]
    widths = [[layer.out_features for layer in expert if isinstance(layer, torch.nn.Linear)] for expert in experts]
    assert widths == [
        [256, 128, 100],
        [512, 256, 128, 100],
        [1024, 512, 256, 128, 100],
        [2048, 1024, 512, 256, 128, 100],
    ]
    drops = [{layer.p for layer in expert if isinstance(layer, torch.nn.Dropout)} for expert in experts]
    assert drops == [{0.3}, {0.4}, {0.5}, {0.6}]
    assert all(
        torch.all(layer.bias == 0) for expert in experts for layer in expert if isinstance(layer, torch.nn.Linear)
    )
    first = experts[0][0].weight
    # Xavier-uniform: |w| <= sqrt(6 / (10 + 256)) = 0.150188.
    assert first.abs().max().item() <= 0.150188
    assert first.abs().max().item() > 0.14
    assert len(SIZES) == 4


@pytest.mark.parametrize("kind", ["attention", "flatten"])
def test_token_necks_flatten_every_token(kind):
    model = VisionMoE((5, 8), 3, NeckConfig(kind=kind, heads=2), RouterConfig(), ExpertsConfig(sizes=[[4], [6]]))
    assert model.neck.out_features == 40
    logits, _ = model(torch.randn(2, 5, 8))
    assert logits.shape == (2, 3)


def test_attention_neck_mixes_tokens_and_flatten_does_not():
    x = torch.randn(1, 5, 8)
    changed = x.clone()
    changed[0, 0] += 1.0 * torch.randn(8)
    for kind, mixes in (("attention", True), ("flatten", False)):
        neck = VisionMoE(
            (5, 8), 3, NeckConfig(kind=kind, heads=2), RouterConfig(), ExpertsConfig(sizes=[[4], [6]])
        ).neck
        others = (neck(x) - neck(changed)).view(5, 8)[1:].abs().max().item()
        assert (others > 1e-6) == mixes


@pytest.mark.parametrize(
    ("shape", "neck", "words"),
    [
        ((6,), NeckConfig(kind="flatten"), "neck.kind flatten"),
        ((4, 6), NeckConfig(kind="pooled"), "neck.kind pooled"),
        ((4, 6), NeckConfig(kind="attention", heads=4), "neck.heads 4 does not divide"),
    ],
)
def test_parts_that_do_not_fit_are_named(shape, neck, words):
    with pytest.raises(ValueError, match=words):
        VisionMoE(shape, 3, neck, RouterConfig(), ExpertsConfig(sizes=[[4], [6]]))


@pytest.mark.parametrize(
    ("top_k", "combine"), [(1, "logits"), (2, "logits"), (2, "probabilities"), (3, "probabilities")]
)
def test_the_task_loss_reaches_the_gate(top_k, combine):
    moe = mixture(top_k, combine).train()
    logits, _ = moe(torch.randn(32, 6))
    torch.nn.functional.cross_entropy(logits, torch.randint(3, (32,))).backward()
    assert moe.router.gate.weight.grad.abs().max() > 1e-4


@pytest.mark.parametrize("combine", sorted(COMBINE))
def test_a_broken_expert_is_not_hidden(combine):
    moe = mixture(2, combine)
    with torch.no_grad():
        moe.experts[0][0].weight.fill_(torch.nan)
    logits, routing = moe(torch.randn(64, 6))
    hit = torch.zeros(64, dtype=torch.bool).index_fill(0, routing.sample_A[routing.expert_A == 0], True)
    assert hit.any()
    assert torch.equal(logits.isnan().any(dim=1), hit)


def test_a_weight_that_underflows_has_a_finite_gradient():
    scores = torch.tensor([[200.0, 0.0]], requires_grad=True)
    weight = scores.softmax(dim=-1).flatten()
    routing = listed_routing(torch.tensor([0, 0]), torch.tensor([0, 1]), weight, torch.zeros(1, 2))
    COMBINE["probabilities"](torch.randn(2, 3), torch.tensor([0, 1]), routing.assignments).sum().backward()
    assert torch.isfinite(scores.grad).all()


def test_an_expert_with_weight_zero_does_not_affect_any_class():
    sample_A, expert_A = torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1])
    routing = listed_routing(sample_A, expert_A, torch.tensor([1.0, 0.0, 0.0]), torch.zeros(2, 2))
    outputs_AC = torch.tensor([[200.0, 0.0], [0.0, 200.0], [0.0, 3.0]])
    mixed_BC = COMBINE["probabilities"](outputs_AC, torch.arange(3), routing.assignments)
    assert mixed_BC[0].tolist() == [0.0, -200.0]
    # The only expert of the other sample decides alone, regardless of its weight.
    assert (mixed_BC[1, 1] - mixed_BC[1, 0]).item() == pytest.approx(3.0, abs=1e-3)


def test_batch_norm_in_the_neck_takes_a_batch_of_one():
    model = VisionMoE((6,), 3, NeckConfig(norm="batch"), RouterConfig(), ExpertsConfig(sizes=UNEQUAL)).train()
    assert model(torch.randn(1, 6))[0].shape == (1, 3)


def test_an_excluded_expert_is_replaced_by_the_next_choice():
    model = MixtureOfExperts(6, 3, RouterConfig(top_k=2), ExpertsConfig(sizes=[[4], [5], [6], [7]])).eval()
    torch.nn.init.normal_(model.router.gate.weight)
    x_BD = torch.randn(20, 6)
    full = model(x_BD)[1]
    barred = int(full.counts_E.argmax())
    allowed_E = torch.arange(4) != barred
    logits_BC, routing = model(x_BD, allowed_E=allowed_E)
    ranked_BE = full.logits_BE.argsort(dim=-1, descending=True)
    expected = [[e for e in row if e != barred][:2] for row in ranked_BE.tolist()]
    assert routing.expert_A.reshape(20, 2).tolist() == expected
    assert torch.allclose(routing.weight_A.reshape(20, 2).sum(dim=1), torch.ones(20))
    assert logits_BC.isfinite().all()
