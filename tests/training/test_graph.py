"""Captured training steps: when they are used, and that they equal eager steps."""

from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from block_helpers import moe_vit

from assembly.pipeline import pick_device
from common.errors import UserError
from config.optim import OptimConfig
from model import dispatch
from model.balance import BalanceConfig
from model.classifier import NeckConfig, VisionMoE
from model.experts import ExpertsConfig
from model.old_gate import hold_old_gates
from model.routers import RouterConfig
from model.transfer import Frozen, Shared
from training.graph import EAGER_STEPS, Captured, GraphedStep, worth_capturing
from training.memory import bytes_per_image
from training.optim import build_optimizer, set_learning_rate
from training.step import TrainingStep

NAMES = ("a", "b", "c", "d", "e")
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: CUDA graphs cannot be captured")


def model(**router):
    torch.manual_seed(0)
    experts = ExpertsConfig(sizes=[[8], [8], [16], [32]], shared=[[16]], dropout=0.0)
    return VisionMoE((24,), 5, NeckConfig(), RouterConfig(**{"kind": "mixtral", **router}), experts)


def test_shapes_that_depend_on_the_batch_are_not_static():
    assert model().moe.router.static_shapes
    assert not model(capacity_factor=1.0).moe.router.static_shapes
    assert not model(kind="gshard").moe.router.static_shapes  # the second expert runs by chance


def test_nothing_is_captured_on_a_cpu():
    assert not worth_capturing("auto", model(), 1)


@pytest.mark.parametrize(
    ("parameters", "batch", "how", "static", "expected"),
    [
        (40_000_000, 1024, "auto", True, True),
        (40_000_000, 1024, "dense", True, True),
        (40_000_000, 1024, "sorted", True, False),  # waits for the device
        (40_000_000, 1024, "auto", False, False),
        (40_000_000, 65_536, "auto", True, False),  # its kernels take longer than their launches
        (600_000_000, 128, "auto", True, False),
    ],
)
def test_a_small_head_with_static_shapes_is_captured_on_a_gpu(parameters, batch, how, static, expected, monkeypatch):
    weight = SimpleNamespace(numel=lambda: parameters, is_cuda=True)
    head = model()
    head.parameters = lambda: [weight]
    head.moe.dispatch_mode = how
    monkeypatch.setattr(type(head.moe.router), "static_shapes", static)
    assert worth_capturing("auto", head, batch) is expected
    assert not worth_capturing("off", head, batch)


class Pretended:
    """Replace streams and graphs on a CPU: a graph repeats the operations that were captured."""

    def __init__(self, monkeypatch):
        self.log = []
        for name, value in (("Stream", lambda device: self), ("current_stream", lambda device: self)):
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=None, pool=lambda: "pool"))
        monkeypatch.setattr(torch.cuda, "graph", self.graph)

    def wait_stream(self, stream):
        self.log.append("wait")

    @contextmanager
    def graph(self, graph, pool, stream):
        self.log.append(f"capture in {pool}")
        yield
        graph.replay = lambda: self.log.append("replay")


def test_a_call_is_captured_after_a_few_eager_ones_for_each_kind(monkeypatch):
    pretended = Pretended(monkeypatch)
    captured = Captured(torch.device("cpu"))

    def run(warmup):
        pretended.log.append(f"run {warmup}")
        return f"of {warmup}"

    eager = ["wait", "run True", "wait"]
    assert [captured(run, True) for _ in range(5)] == ["of True"] * 5
    assert pretended.log == [*eager * EAGER_STEPS, "capture in None", "run True", "replay", "replay"]
    pretended.log.clear()
    assert [captured(run, False) for _ in range(4)] == ["of False"] * 4
    eager = ["wait", "run False", "wait"]
    assert pretended.log == [*eager * EAGER_STEPS, "capture in pool", "run False", "replay"]


class Recorded:
    """The arguments of each step and their addresses."""

    def __init__(self):
        self.model, self.device, self.read, self.options = model(), torch.device("cpu"), [], []

    def __call__(self, features, labels_B, warmup, static, **options):
        assert static
        self.options.append(options)
        self.read.append((features.data_ptr(), features.clone(), labels_B.clone()))


def test_a_captured_step_reads_every_full_batch_from_the_same_address(monkeypatch):
    Pretended(monkeypatch)
    step = Recorded()
    run = GraphedStep(step, 4)
    batches = [(torch.full((n, 2), float(n + i)), torch.arange(n) + i) for i, n in enumerate((4, 3, 4))]
    for features, labels_B in batches:
        run(features, labels_B, False)
    for (_, features, labels_B), batch in zip(step.read, batches, strict=True):
        assert torch.equal(features, batch[0]) and torch.equal(labels_B, batch[1])
    places = [place for place, *_ in step.read]
    assert places[0] == places[2] != places[1]
    assert step.model.moe.dispatch_mode == "auto"  # passed along, not changed


def test_each_combination_of_options_has_a_separate_graph(monkeypatch):
    pretended = Pretended(monkeypatch)
    step = Recorded()
    run = GraphedStep(step, 4)
    batch = (torch.zeros(4, 2), torch.arange(4))
    for options in ({}, {"patch_dropout": 0.5}):
        for _ in range(EAGER_STEPS + 2):
            run(*batch, False, **options)
    assert step.options == [{}] * (EAGER_STEPS + 1) + [{"patch_dropout": 0.5}] * (EAGER_STEPS + 1)
    assert pretended.log.count("replay") == 4
    assert pretended.log.count("capture in pool") == 1


@pytest.mark.parametrize(("configured", "used"), [("auto", "static"), ("dense", "dense")])
def test_automatic_dispatch_becomes_static_in_a_graph(configured, used, monkeypatch):
    head = model()
    head.moe.dispatch_mode = configured
    seen = []
    monkeypatch.setattr(
        "model.moe.run_experts",
        lambda received, experts, how: seen.append(how) or dispatch.run_experts(received, experts, how),
    )
    head(torch.zeros(3, 24), static=True)
    head(torch.zeros(3, 24))
    assert seen == [used, configured]


@ON_GPU
@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("kind", ["mixtral", "deepseek", "hierarchical", "hash", "noisy_topk"])
def test_captured_steps_train_like_eager_steps(kind, held):
    """held: experts are frozen, and the gate is kept close to its old weights."""
    device, batch = torch.device("cuda"), 64
    x_NF = torch.randn(12 * batch + 10, 24, device=device)
    labels_N = torch.randint(5, (len(x_NF),), device=device)
    found = []
    for captured in (False, True):
        head = model(kind=kind).to(device).train()
        if kind == "noisy_topk":  # its noise would be another one
            head.moe.router.noise.weight.data.fill_(-1e4)
        frozen, compares = None, held and kind != "hash"
        if held:
            frozen = Frozen(head, ["experts"], Shared.by_name(NAMES, NAMES), len(NAMES))
        if compares:
            hold_old_gates(head)
        optim = OptimConfig(warmup_steps=4)
        optimizer = build_optimizer(head, optim)
        step = TrainingStep(head, optimizer, BalanceConfig(old_gate=float(compares)), 0.1, 1.0, "float32", frozen)
        run = GraphedStep(step, batch) if captured else step
        losses = []
        for index, (x_BF, labels_B) in enumerate(zip(x_NF.split(batch), labels_N.split(batch), strict=True)):
            set_learning_rate(optimizer, index, 13, optim)
            losses.append(float(run(x_BF, labels_B, warmup=False).loss))
        found.append((losses, {k: v.clone() for k, v in head.state_dict().items()}))
    (losses, weights), (graphed, graphed_weights) = found
    assert graphed == pytest.approx(losses, rel=1e-4)
    for name, value in weights.items():
        assert torch.allclose(value.float(), graphed_weights[name].float(), rtol=1e-3, atol=1e-5), name


@ON_GPU
@pytest.mark.parametrize("experts", [{}, {"norm": "own", "activation": "silu"}, {"head": [[8], [8], [8]]}])
@pytest.mark.parametrize("kind, level", [("mixtral", "token"), ("deepseek", "image")])
def test_captured_steps_through_a_vit_train_like_eager_steps(experts, kind, level):
    """Counting the activations first, as a run does, must not prevent the capture of the steps."""
    images_NCHW = torch.randint(256, (12 * 8, 3, 8, 8), dtype=torch.uint8, device="cuda")
    labels_N = torch.randint(5, (len(images_NCHW),), device="cuda")
    found = []
    for captured in (False, True):
        vit = moe_vit(kind=kind, level=level, norm="none", experts=experts).to("cuda").train()
        vit.backbone.vit.to("cuda")
        bytes_per_image(vit, images_NCHW[:1])
        step = TrainingStep(vit, build_optimizer(vit, OptimConfig()), BalanceConfig(), 0.1, 1.0, "float32")
        assert worth_capturing("auto", vit, 8)
        run = GraphedStep(step, 8) if captured else step
        pairs = zip(images_NCHW.split(8), labels_N.split(8), strict=True)
        losses = [float(run(images, labels, warmup=False).loss) for images, labels in pairs]
        found.append((losses, {k: v.clone() for k, v in vit.state_dict().items()}))
    (losses, weights), (graphed, graphed_weights) = found
    assert graphed == pytest.approx(losses, rel=1e-4)
    for name, value in weights.items():
        assert torch.allclose(value.float(), graphed_weights[name].float(), rtol=1e-3, atol=1e-5), name


@ON_GPU
def test_captured_steps_group_many_experts_and_train_like_eager_steps(monkeypatch):
    used = []
    monkeypatch.setattr(dispatch, "DENSE_WORK_IN_A_GRAPH", (0, 0))
    monkeypatch.setitem(
        dispatch.DISPATCHERS, "grouped", lambda *args: used.append("grouped") or dispatch.run_grouped(*args)
    )
    x_BF, labels_B = torch.randn(64, 24, device="cuda"), torch.randint(5, (64,), device="cuda")
    losses = []
    for captured in (False, True):
        torch.manual_seed(0)
        experts = ExpertsConfig(sizes=[[16]] * 8, dropout=0.0, dispatch="auto" if captured else "sorted")
        head = VisionMoE((24,), 5, NeckConfig(), RouterConfig(kind="mixtral"), experts).to("cuda").train()
        optimizer = build_optimizer(head, OptimConfig())
        step = TrainingStep(head, optimizer, BalanceConfig(), 0.1, 1.0, "bfloat16")
        run = GraphedStep(step, 64) if captured else step
        losses.append([float(run(x_BF, labels_B, warmup=False).loss) for _ in range(12)])
    assert used == ["grouped"] * (EAGER_STEPS + 1)
    assert losses[1] == pytest.approx(losses[0], rel=2e-2) and losses[1][-1] < losses[1][0]


@pytest.mark.parametrize(("name", "index"), [("cuda:1", 1), ("cuda", 0), ("auto", 0)])
def test_the_chosen_gpu_becomes_the_current_one(monkeypatch, name, index):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert pick_device(name) == torch.device("cuda", index)
    assert current == [torch.device("cuda", index)]
    with pytest.raises(UserError, match="PyTorch finds 2"):
        pick_device("cuda:2")
    assert pick_device("cpu") == torch.device("cpu") and len(current) == 1
