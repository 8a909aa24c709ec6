"""Properties of every routing rule, for random numbers of experts, choices and samples."""

import pytest
import torch
from routing_helpers import EVERY_LOSS

from model.balance import balance_losses, weighted_sum
from model.experts import ExpertsConfig
from model.moe import MixtureOfExperts
from model.routers import ROUTERS, RouterConfig, build_router

KINDS = sorted(ROUTERS)
CHOOSING = [kind for kind in KINDS if ROUTERS[kind].token_choice]
WEIGHTS_SUM_TO_ONE = {"article", "noisy_topk", "gshard", "mixtral", "deepseek", "hash"}  # for k >= 2
WIDTH = 6


def shapes(count, seed=0):
    """Random (experts, choices, samples), with the extremes among them."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [(1, 1, 1), (5, 5, 3), (4, 1, 1), (8, 2, 2)]
    while len(drawn) < count:
        experts = int(torch.randint(1, 9, (), generator=generator))
        top_k = int(torch.randint(1, experts + 1, (), generator=generator))
        drawn.append((experts, top_k, int(torch.randint(1, 70, (), generator=generator))))
    return drawn


def config_of(kind, experts, top_k, **options):
    """The rule's configuration closest to this number of choices; None if there is none."""
    fixed = {"switch": 1, "gshard": 2}
    if kind == "hierarchical":
        options["groups"] = 2 if experts % 2 == 0 and top_k <= experts // 2 else 1
    config = RouterConfig(kind=kind, top_k=fixed.get(kind, top_k), **options)
    try:
        ROUTERS[kind].check(config, experts)
    except ValueError:
        return None
    return config


def sharpened(router):
    """The router with logits that differ: some start at zero."""
    for name, parameter in router.named_parameters():
        if name.startswith(("gate.", "noise.")):
            torch.nn.init.normal_(parameter)
    return router


def inputs_of(kind, batch):
    return torch.randn(batch, 3, WIDTH) if ROUTERS[kind].reads_tokens else torch.randn(batch, WIDTH)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("capacity", [None, 0.5])
def test_a_routing_with_k_assignments_per_sample_has_them_in_order(kind, capacity):
    torch.manual_seed(0)
    for experts, top_k, batch in shapes(12):
        options = {} if capacity is None else {"capacity_factor": capacity}
        config = config_of(kind, experts, top_k, **options) if ROUTERS[kind].token_choice or not options else None
        if config is None:
            continue
        router = sharpened(build_router(config, WIDTH, experts)).train()
        for warmup in (False, True):
            routing = router(inputs_of(kind, batch), warmup)
            k = routing.assignments.top_k
            if k is not None:
                index_A = torch.arange(len(routing.sample_A))
                assert torch.equal(routing.sample_A, index_A // k), (kind, experts, top_k, batch)
                assert len(index_A) == batch * k


@pytest.mark.parametrize("kind", KINDS)
def test_a_routing_is_a_list_of_distinct_experts_with_sensible_weights(kind):
    torch.manual_seed(1)
    tried = 0
    for experts, top_k, batch in shapes(25):
        config = config_of(kind, experts, top_k)
        if config is None:
            continue
        tried += 1
        router = sharpened(build_router(config, WIDTH, experts))
        for training in (True, False):
            routing = router.train(training)(inputs_of(kind, batch))
            assert len(routing.sample_A) == len(routing.expert_A) == len(routing.weight_A) == routing.counts_E.sum()
            assert routing.logits_BE.shape == (batch, experts) and routing.weight_A.dtype == torch.float32
            pairs = set(zip(routing.sample_A.tolist(), routing.expert_A.tolist(), strict=True))
            assert len(pairs) == len(routing.sample_A)
            sums_B = torch.zeros(batch).index_add(0, routing.sample_A, routing.weight_A)
            assert torch.all(routing.weight_A >= 0) and torch.all(sums_B <= 1 + 1e-5)
            if kind in CHOOSING and ROUTERS[kind].fixed_k and not (training and kind == "gshard"):
                assert torch.all(torch.bincount(routing.sample_A, minlength=batch) == config.top_k)
                if kind in WEIGHTS_SUM_TO_ONE and config.top_k > 1:
                    torch.testing.assert_close(sums_B, torch.ones(batch))
    assert tried >= 10


@pytest.mark.parametrize("kind", CHOOSING)
@pytest.mark.parametrize("overflow", ["drop", "next_best", "residual"])
def test_capacity_holds_and_drops_are_counted(kind, overflow):
    torch.manual_seed(2)
    for experts, top_k, batch in shapes(15, seed=2):
        options = {"capacity_factor": float(torch.rand(())) + 0.2, "overflow": overflow}
        config = config_of(kind, experts, top_k, **options, capacity_order=("position", "priority")[batch % 2])
        if config is None:
            continue
        router = sharpened(build_router(config, WIDTH, experts)).train()
        routing = router(inputs_of(kind, batch))
        places = max(1, -int(-(batch * config.top_k * config.capacity_factor * (1 - 1e-6)) // experts))
        assert routing.counts_E.max() <= places
        assert routing.dropped == routing.demand_E.sum() - routing.counts_E.sum() >= 0
        pairs = set(zip(routing.sample_A.tolist(), routing.expert_A.tolist(), strict=True))
        assert len(pairs) == len(routing.sample_A)
        if (
            overflow == "next_best" and ROUTERS[kind].fixed_k
        ):  # no sample lacks an expert while there is a free slot for it
            asked = 1 if kind == "gshard" else config.top_k  # its second choice is drawn
            missing_B = asked - torch.bincount(routing.sample_A, minlength=batch)
            free = {e for e, n in enumerate(routing.counts_E.tolist()) if n < places}
            held = {b: {e for s, e in pairs if s == b} for b in range(batch)}
            assert all(free <= held[b] for b in range(batch) if missing_B[b] > 0)
        if overflow == "residual":
            assert torch.all(routing.drops.residual_B >= 0)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_does_not_depend_on_the_batch(kind):
    torch.manual_seed(3)
    top_k = {"switch": 1}.get(kind, 2)
    drops = {"capacity_factor": 0.5} if kind in CHOOSING else {}
    config = RouterConfig(kind=kind, top_k=top_k, **drops)
    moe = MixtureOfExperts(WIDTH, 3, config, ExpertsConfig(sizes=[[4], [5], [6, 3], [7]], shared=[[3]])).train()
    sharpened(moe.router)
    for _ in range(5):  # move running statistics and thresholds from their initial values
        moe(inputs_of(kind, 64))
    moe.eval()
    x = inputs_of(kind, 256)
    with torch.no_grad():
        whole_logits, whole = moe(x)
        assert torch.equal(moe(x)[1].expert_A, whole.expert_A)  # no noise either
        for batch, count in ((1, 40), (7, 256)):
            parts = [moe(part) for part in x[:count].split(batch)]
            found = torch.cat([logits for logits, _ in parts])
            torch.testing.assert_close(found, whole_logits[:count], atol=1e-5, rtol=1e-5)
            samples = [routing.sample_A + batch * index for index, (_, routing) in enumerate(parts)]
            among_A = whole.sample_A < count
            assert torch.equal(torch.cat(samples), whole.sample_A[among_A])
            assert torch.equal(torch.cat([routing.expert_A for _, routing in parts]), whole.expert_A[among_A])
            weights = torch.cat([routing.weight_A for _, routing in parts])
            torch.testing.assert_close(weights, whole.weight_A[among_A], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_training_steps_are_finite_and_reach_the_gate(kind):
    torch.manual_seed(4)
    reached = False
    for experts, top_k, batch in shapes(8, seed=4):
        config = config_of(kind, experts, top_k)
        if config is None:
            continue
        moe = MixtureOfExperts(WIDTH, 3, config, ExpertsConfig(sizes=[[4 + e] for e in range(experts)])).train()
        sharpened(moe.router)
        for warmup in (True, False):
            logits, routing = moe(inputs_of(kind, batch), warmup=warmup)
            losses = balance_losses(routing, EVERY_LOSS)
            assert all(loss.isfinite() and loss >= -1e-6 for loss in losses.values())
            moe.zero_grad()
            torch.nn.functional.cross_entropy(logits, torch.randint(3, (batch,))).backward(retain_graph=True)
            grads = [p.grad for p in moe.router.parameters() if p.grad is not None]
            reached |= not warmup and any(grad.abs().max() > 1e-6 for grad in grads)
            if weighted_sum(losses, EVERY_LOSS).requires_grad:
                weighted_sum(losses, EVERY_LOSS).backward()
            moe.after_step(routing)
            assert all(p.grad is None or p.grad.isfinite().all() for p in moe.parameters())
    assert reached == ROUTERS[kind].learns


@pytest.mark.parametrize("kind", CHOOSING)
def test_the_task_trains_the_gate_where_each_sample_has_one_expert(kind):
    config = config_of(kind, 4, 1)
    if config is None or config.top_k > 1 or kind == "hash":
        assert kind in ("mixtral", "gshard", "hash")  # refused, two experts by definition, no gate
        return
    moe = MixtureOfExperts(WIDTH, 3, config, ExpertsConfig(sizes=[[4]] * 4)).train()
    sharpened(moe.router)
    logits, _ = moe(torch.randn(64, WIDTH))
    torch.nn.functional.cross_entropy(logits, torch.randint(3, (64,))).backward()
    assert moe.router.gate.weight.grad.abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_weights_have_the_gradient_of_finite_differences(kind, top_k):
    config = config_of(kind, 4, top_k, norm="none")
    if config is None or kind == "hash":
        return
    torch.manual_seed(5)
    router = sharpened(build_router(config, WIDTH, 4)).double().eval()
    x = inputs_of(kind, 3).double().requires_grad_()

    def weights(x):
        if kind == "soft_moe":
            dispatch_BTP, combine_BTP = router.mixing(x)
            return dispatch_BTP, combine_BTP
        return router._route(*router._logits(x, noisy=False)).weight_A

    assert torch.autograd.gradcheck(weights, (x,))


@pytest.mark.parametrize("kind", ["noisy_topk", "vmoe", "hierarchical"])
def test_the_load_estimate_has_the_gradient_of_finite_differences(kind):
    torch.manual_seed(6)
    router = sharpened(build_router(RouterConfig(kind=kind, top_k=2, norm="none"), WIDTH, 4)).double().train()
    x = torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)

    def load(x):
        torch.manual_seed(7)  # the same noise each time
        return router._route(*router._logits(x, noisy=True)).gate.load_BE

    assert torch.autograd.gradcheck(load, (x,))


@pytest.mark.parametrize("kind", KINDS)
def test_an_excluded_expert_gets_no_weight_and_others_replace_it(kind):
    torch.manual_seed(8)
    router = sharpened(build_router(config_of(kind, 4, 2 if kind != "switch" else 1), WIDTH, 4))
    if "bias_E" in dict(router.named_buffers()):
        router.bias_E.copy_(torch.tensor([9.0, 0.0, 0.0, 0.0]))  # does not raise an excluded expert above the others
    x = inputs_of(kind, 40)
    for allowed in ([False, True, True, True], [False, True, False, True], [False, False, False, True]):
        allowed_E = torch.tensor(allowed)
        for warmup in (False, True):
            routing = router.eval()(x, warmup=warmup and sum(allowed) >= 2, allowed_E=allowed_E)
            assert routing.weight_A.isfinite().all()
            if sum(allowed) >= 2 and kind not in ("soft_moe", "hierarchical"):
                assert torch.all(allowed_E[routing.expert_A])
            assert torch.all(routing.weight_A[~allowed_E[routing.expert_A]] == 0)
            sums_B = torch.zeros(40).index_add(0, routing.sample_A, routing.weight_A)
            assert torch.all(sums_B > 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_gate_is_float32_under_autocast(kind):
    router = build_router(config_of(kind, 4, 2 if kind != "switch" else 1), WIDTH, 4)
    with torch.autocast("cpu", torch.bfloat16):
        routing = router.train()(inputs_of(kind, 5).bfloat16())
    assert routing.logits_BE.dtype == routing.weight_A.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "option, value",
    [
        ("noise_std", 3.0),
        ("jitter", 0.9),
        ("scores", "softmax"),
        ("groups", 4),
        ("top_groups", 2),
        ("slots", 2),
        ("p", 0.9),
        ("sinkhorn_iterations", 1),
    ],
)
def test_an_option_reported_without_effect_has_none(kind, option, value):
    def route(**options):
        torch.manual_seed(0)
        config = RouterConfig(kind=kind, top_k={"switch": 1}.get(kind, 2), norm="none", **options)
        router = sharpened(build_router(config, WIDTH, 8)).train()
        routing = router(inputs_of(kind, 40))
        return config.idle, (routing.sample_A.tolist(), routing.expert_A.tolist(), routing.weight_A.tolist())

    (told, plain), (changed, other) = route(), route(**{option: value})
    assert told == []
    reads = kind in ROUTERS.readers()[option]
    assert (plain == other) == (not reads)
    assert [f"router.{option} {value}" in line for line in changed] == ([] if reads else [True])
