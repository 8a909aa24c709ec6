"""The three dispatch modes: equal values and gradients, and no waiting for the device in those that promise it."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from model import grouped
from model.balance import BalanceConfig, balance_losses, weighted_sum
from model.classifier import NeckConfig, VisionMoE
from model.dispatch import COMBINE, DISPATCHERS, dispatch
from model.experts import Experts, ExpertsConfig, build_experts
from model.experts.mlp import MLPExpert
from model.routers import RouterConfig
from model.routing import Assignments

UNEQUAL = [[8], [16, 8], [24], [8, 8, 16]]
EQUAL = [[16, 8]] * 4
MIXED = [[8], [16], [8], [16], [8]]


def routing_of(batch, experts, top_k, seed=0, drop=0.0):
    """Random choices of distinct experts; with `drop`, a share of the assignments is missing."""
    generator = torch.Generator().manual_seed(seed)
    logits_BE = torch.randn(batch, experts, generator=generator)
    expert_A = logits_BE.topk(top_k, dim=-1).indices.flatten()
    sample_A = torch.arange(batch).repeat_interleave(top_k)
    kept_A = torch.rand(len(sample_A), generator=generator) >= drop
    weight_A = torch.rand(len(sample_A), generator=generator) + 0.1
    regular = None if drop else top_k
    return Assignments.listed(sample_A[kept_A], expert_A[kept_A], weight_A[kept_A], (batch, experts), regular)


def run(how, x_BD, routing, experts, combine="logits"):
    """Output, and gradients of the input, the weights and the gate's weights, with no gradient as zero."""
    experts.zero_grad()
    x_BD = x_BD.detach().requires_grad_()
    weight_A = routing.weight_A.detach().requires_grad_()
    routing = replace(routing, weight_A=weight_A)
    out = COMBINE[combine](*dispatch(x_BD, routing, experts, how), routing)
    target = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.device)
    (out * target).sum().backward()
    parameters = [torch.zeros_like(p) if p.grad is None else p.grad for p in experts.parameters()]
    return [out.detach(), x_BD.grad, weight_A.grad, *parameters]


@pytest.fixture
def kernel(monkeypatch):
    """The grouped kernel's path, on PyTorch's own implementation of it for a CPU."""
    if not hasattr(F, "grouped_mm"):
        pytest.skip("this PyTorch has no torch.nn.functional.grouped_mm")
    monkeypatch.setattr(grouped, "has_kernel", lambda x_BD: True)


@pytest.mark.parametrize("sizes", [UNEQUAL, EQUAL, MIXED], ids=["unequal", "equal", "mixed"])
@pytest.mark.parametrize(("batch", "top_k", "drop"), [(1, 1, 0.0), (7, 2, 0.0), (64, 4, 0.0), (50, 2, 0.4)])
@pytest.mark.parametrize("combine", sorted(COMBINE))
def test_the_three_modes_agree_in_values_and_gradients(sizes, batch, top_k, drop, combine):
    torch.manual_seed(0)
    experts = build_experts(ExpertsConfig(sizes=sizes, dropout=0.0), 8, 5)[0].double()
    routing = routing_of(batch, len(sizes), top_k, drop=drop)
    x_BD = torch.randn(batch, 8, dtype=torch.float64)
    expected = run("sorted", x_BD, routing, experts, combine)
    for how in ("grouped", "dense"):
        for value, reference in zip(run(how, x_BD, routing, experts, combine), expected, strict=True):
            torch.testing.assert_close(value, reference, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("sizes", [UNEQUAL, EQUAL, MIXED], ids=["unequal", "equal", "mixed"])
@pytest.mark.parametrize(("batch", "top_k", "drop"), [(7, 2, 0.0), (64, 3, 0.3)])
def test_the_grouped_kernel_agrees_too(kernel, sizes, batch, top_k, drop):
    torch.manual_seed(0)
    experts = build_experts(ExpertsConfig(sizes=sizes, dropout=0.0), 8, 5)[0]
    routing = routing_of(batch, len(sizes), top_k, drop=drop)
    x_BD = torch.randn(batch, 8)
    pairs = zip(run("grouped", x_BD, routing, experts), run("sorted", x_BD, routing, experts), strict=True)
    for value, reference in pairs:
        torch.testing.assert_close(value, reference, atol=1e-4, rtol=1e-4)


def test_uninitialised_rows_of_the_kernel_have_no_effect(kernel, monkeypatch):
    real = F.grouped_mm

    def poisoned(a, b, offs):
        out = real(a, b, offs=offs)
        if out.ndim == 2:
            out = torch.where(torch.arange(len(out))[:, None] < offs[-1], out, torch.nan)
        return out

    monkeypatch.setattr(F, "grouped_mm", Poisoned.through(poisoned))
    torch.manual_seed(0)
    experts = build_experts(ExpertsConfig(sizes=UNEQUAL, dropout=0.0), 8, 5)[0]
    routing, x_BD = routing_of(20, 4, 2), torch.randn(20, 8)
    for value, reference in zip(
        run("grouped", x_BD, routing, experts), run("sorted", x_BD, routing, experts), strict=True
    ):
        torch.testing.assert_close(value, reference, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("drop", [0.0, 0.4])
def test_on_a_deterministic_gpu_every_mode_agrees_and_is_reproducible(drop):
    torch.manual_seed(0)
    experts = build_experts(ExpertsConfig(sizes=[[16], [32], [16], [32]], dropout=0.0), 16, 5)[0].cuda()
    routing = routing_of(200, 4, 2, drop=drop)
    parts = {name: getattr(routing, name).cuda() for name in ("sample_A", "expert_A", "weight_A", "counts_E")}
    routing, x_BD, found = replace(routing, **parts), torch.randn(200, 16, device="cuda"), {}
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autocast("cuda", torch.bfloat16):
            for how in DISPATCHERS:
                found[how], again = run(how, x_BD, routing, experts), run(how, x_BD, routing, experts)
                assert all(map(torch.equal, found[how], again)), how
    finally:
        torch.use_deterministic_algorithms(False)
    for how in ("grouped", "dense"):
        for value, reference in zip(found[how], found["sorted"], strict=True):
            assert (value - reference).norm() < 0.02 * reference.norm() + 1e-6, how


class Poisoned(torch.autograd.Function):
    """A grouped product whose rows after the last end are NaN, forward and backward."""

    @staticmethod
    def forward(ctx, a, b, offs, product):
        ctx.save_for_backward(a, b, offs)
        ctx.product = product
        return product(a, b, offs)

    @staticmethod
    def backward(ctx, grad):
        a, b, offs = ctx.saved_tensors
        grad = grad.contiguous()
        return ctx.product(grad, b.transpose(1, 2).contiguous(), offs), ctx.product(a.T, grad, offs), None, None

    @classmethod
    def through(cls, product):
        return lambda a, b, offs: cls.apply(a, b, offs, product)


class Narrow(MLPExpert):
    """An expert that reads the first four features."""

    def forward(self, x_BD):
        return super().forward(x_BD[:, :4])


def test_experts_that_read_some_of_the_features_agree():
    torch.manual_seed(0)
    experts = Experts([MLPExpert(8, [8], 5, 0.0), Narrow(4, [8], 5, 0.0), MLPExpert(8, [8], 5, 0.0)])
    routing, x_BD = routing_of(20, 3, 2), torch.randn(20, 8)
    expected = run("sorted", x_BD, routing, experts)
    for how in ("grouped", "dense"):
        for value, reference in zip(run(how, x_BD, routing, experts), expected, strict=True):
            torch.testing.assert_close(value, reference, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("how", sorted(DISPATCHERS))
def test_half_precision_stays_near_float32(how):
    torch.manual_seed(0)
    experts = build_experts(ExpertsConfig(sizes=MIXED, dropout=0.0), 8, 5)[0]
    routing, x_BD = routing_of(64, len(MIXED), 2), torch.randn(64, 8)
    exact = run("sorted", x_BD, routing, experts)[0]
    with torch.autocast("cpu", torch.bfloat16):
        half, same = run(how, x_BD, routing, experts), run("sorted", x_BD, routing, experts)
    assert half[0].dtype == torch.float32 and (half[0] - exact).norm() < 0.03 * exact.norm()
    # Gradients are compared within one precision: rounding flips a unit of ReLU now and then.
    for value, reference in zip(half, same, strict=True):
        assert (value - reference).norm() < 0.02 * reference.norm() + 1e-6


class NoWaiting(TorchDispatchMode):
    """Raises where a value, or a shape that depends on values, would have to come from the device."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "bincount", "repeat_interleave.Tensor")

    def __enter__(self):
        self.patch = pytest.MonkeyPatch()
        for name in ("tolist", "cpu", "numpy"):  # a CPU tensor handles these without dispatching

            def refuse(*args, name=name):
                raise AssertionError(f"Tensor.{name} waits for the device")

            self.patch.setattr(torch.Tensor, name, refuse)
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.undo()
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(name in str(function) for name in self.FORBIDDEN):
            raise AssertionError(f"{function} waits for the device")
        return function(*args, **(kwargs or {}))


def step(model, features, labels, warmup):
    logits, (routing,) = model(features, warmup=warmup)
    config = BalanceConfig(switch=0.1, importance=0.1, load=0.1, z_loss=0.1)
    loss = F.cross_entropy(logits, labels) + weighted_sum(balance_losses(routing, config), config)
    loss.backward()


@pytest.mark.parametrize("combine", sorted(COMBINE))
@pytest.mark.parametrize("warmup", [False, True])
@pytest.mark.parametrize("how", ["grouped", "dense"])
def test_a_training_step_never_waits_for_the_device(how, warmup, combine, kernel, monkeypatch):
    def product(a, b, offs):
        """Of the right shapes; PyTorch's own for a CPU reads the offsets on the host, as the GPU's does not."""
        return a @ b.sum(0) if b.ndim == 3 else (a @ b)[None] + offs[:, None, None]

    monkeypatch.setattr(F, "grouped_mm", product)
    experts = ExpertsConfig(sizes=MIXED, combine=combine, dispatch=how)
    model = VisionMoE((8,), 5, NeckConfig(), RouterConfig(hidden=[4]), experts).train()
    features, labels = torch.randn(16, 8), torch.randint(5, (16,))
    step(model, features, labels, warmup)  # what is made once is made
    with NoWaiting():
        step(model, features, labels, warmup)


def test_the_check_for_waiting_detects_the_mode_that_waits():
    model = VisionMoE((8,), 5, NeckConfig(), RouterConfig(), ExpertsConfig(sizes=MIXED, dispatch="sorted")).train()
    with NoWaiting(), pytest.raises(AssertionError, match="tolist waits for the device"):
        step(model, torch.randn(16, 8), torch.randint(5, (16,)), False)
