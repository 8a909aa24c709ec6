"""Training steps of several processes against those of one: the same logits, gradients, losses, counters and states."""

import copy
from functools import cache

import pytest
import torch
from block_helpers import images, moe_vit, spread
from distributed_helpers import in_processes

from common.distributed import ALONE, World
from model.balance import BalanceConfig
from model.classifier import NeckConfig, VisionMoE
from model.experts import ExpertsConfig
from model.moe_vit import AnyMoE
from model.routers import RouterConfig
from training.parallel import Shares
from training.step import TrainingStep

CPU = torch.device("cpu")
FEATURES, CLASSES, SAMPLES = 12, 5, 28
BATCH = 12
# The last batch has 4 samples, which is not divisible by three processes; the next one has too few samples.
EPOCH = torch.arange(SAMPLES).split(BATCH)
BATCHES = [*EPOCH, torch.arange(2), EPOCH[0]]
ALL = {"switch": 0.1, "importance": 0.1, "entropy_local": 0.1, "entropy_global": 0.1, "p_penalty": 0.1, "z_loss": 0.01}

HEADS = {
    "mixtral": {"kind": "mixtral"},
    "noisy_topk": {"kind": "noisy_topk", "balance": {"load": 0.1}},
    "noise, warm-up": {"kind": "noisy_topk", "warmup": True},
    "loss-free bias": {"kind": "deepseek", "bias_rate": 0.1},
    "capacity": {"kind": "vmoe", "capacity_factor": 0.7, "balance": {"load": 0.1}},
    "priority, next best": {
        "kind": "vmoe",
        "capacity_factor": 0.8,
        "capacity_order": "priority",
        "overflow": "next_best",
    },
    "residual": {"kind": "switch", "top_k": 1, "capacity_factor": 0.6, "overflow": "residual"},
    "expert_choice": {"kind": "expert_choice"},
    "sinkhorn": {"kind": "sinkhorn"},
    "top_p": {"kind": "top_p"},
    "gshard": {"kind": "gshard", "capacity_factor": 1.0},
    "hash": {"kind": "hash", "balance": {"z_loss": 0.0}},
    "hierarchical": {"kind": "hierarchical", "experts": {"sizes": [[4], [6], [8], [8]]}, "balance": {"load": 0.1}},
    "article": {"kind": "article", "neck": {"norm": "batch"}},
    "one expert that nobody chooses": {"kind": "mixtral", "shut": True},
    "probabilities": {"kind": "mixtral", "experts": {"combine": "probabilities"}},
}


def head(kind="mixtral", neck=None, experts=None, **router) -> VisionMoE:
    """A head of three unequal experts on vectors."""
    torch.manual_seed(1)
    router = RouterConfig(**{"kind": kind, "top_k": 2, "norm": "batch", "warmup_steps": 0, **router})
    experts = ExpertsConfig(**{"sizes": [[4], [6], [8, 4]], "shared": [[4]], "dropout": 0.0, **(experts or {})})
    model = VisionMoE((FEATURES,), CLASSES, NeckConfig(**(neck or {})), router, experts)
    for parameter in model.moe.router.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def built(blocks: bool, shut: bool = False, **options) -> AnyMoE:
    """A model without dropout, which each process draws itself; shut: the last expert is never chosen."""
    model = spread(moe_vit(**options)) if blocks else head(**options)
    for layer in model.modules():
        if isinstance(layer, torch.nn.Dropout):
            layer.p = 0.0
    for mixture in model.mixtures if shut else []:
        mixture.router.gate.bias.data[-1] = -1000.0
    return model


def data(blocks: bool) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    labels_N = torch.randint(0, CLASSES, (SAMPLES,), generator=generator)
    if blocks:
        return images(SAMPLES), labels_N
    return 2 * torch.randn(SAMPLES, FEATURES, generator=generator) + 1, labels_N


def train(world: World, options: dict, blocks: bool = False) -> dict:
    """Steps on each of the batches: the results of each, and the final model."""
    options = copy.deepcopy(options)
    balance = BalanceConfig(**{**ALL, **options.pop("balance", {})})
    warmup, forward = options.pop("warmup", False), options.pop("forward", {})
    model = built(blocks, **options)
    # Not Adam, which turns a gradient that is zero up to rounding into a step of full size.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    step = TrainingStep(model.train(), optimizer, balance, 0.1, 0.5, "float32")
    features_N, labels_N = data(blocks)
    torch.manual_seed(7)
    shares, found = Shares(world, 7, CPU), []
    for number, index_B in enumerate(BATCHES):
        share = shares.of(len(index_B))
        own_B = index_B if share is None else share.own(index_B)
        logits = []
        hook = model.register_forward_hook(lambda *call, logits=logits: logits.append(call[2][0].detach()))
        with shares.random_numbers(share, number):
            result = step(features_N[own_B], labels_N[own_B], warmup and number < 2, share=share, **forward)
        hook.remove()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        split = share is not None and share.split
        found.append({"result": vars(result), "logits": logits[0], "gradients": gradients, "split": split})
    return {"steps": found, "state": {name: value.clone() for name, value in model.state_dict().items()}}


def train_each(world: World, cases: dict, blocks: bool) -> dict:
    """The result of `train` for each case, by name."""
    return {name: train(world, options, blocks) for name, options in cases.items()}


@pytest.fixture(scope="module")
def trained():
    """The results of `train_each` with this number of processes, started once for all cases."""
    return cache(in_processes_of)


def size_of(name: str) -> int:
    """The number of processes for a case with experts in the blocks: two and three in turn."""
    return 2 + list(BLOCKS).index(name) % 2


def in_processes_of(size: int, blocks: bool) -> list[dict]:
    cases = {name: options for name, options in BLOCKS.items() if size_of(name) == size} if blocks else HEADS
    return in_processes(size, train_each, cases, blocks)


def compare(each: list[dict], options: dict, blocks: bool = False) -> None:
    """each: the results of every process."""
    alone = train(ALONE, options, blocks)
    for number, step in enumerate(alone["steps"]):
        for found in (other["steps"][number] for other in each):
            close(found["gradients"], step["gradients"])
            close(found["result"], step["result"])
        logits = [other["steps"][number]["logits"] for other in each]
        same = torch.cat(logits) if each[0]["steps"][number]["split"] else logits[0]
        close({"logits": same}, {"logits": step["logits"]})
    for found in each:
        assert all(torch.equal(value, each[0]["state"][name]) for name, value in found["state"].items())
        close(found["state"], alone["state"])
    require_empty(alone, options)


def require_empty(found: dict, options: dict) -> None:
    """The expert that nobody chooses has no samples, and all others have some."""
    if options.get("shut"):
        for name, used_E in found["state"].items():
            assert not name.endswith("usage_E") or "warmup" in name or (used_E[-1] == 0 and used_E[:-1].all())


def close(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if isinstance(value, dict):
            close(found[name], value)
        else:
            wanted, got = torch.as_tensor(value), torch.as_tensor(found[name])
            if wanted.is_floating_point():
                assert torch.allclose(got.double(), wanted.double(), rtol=1e-5, atol=1e-5), (name, got, wanted)
            else:
                assert torch.equal(got.to(wanted.dtype), wanted), (name, got, wanted)


BLOCKS = {
    "tokens": {"kind": "mixtral", "norm": "none"},
    "images, batch norm": {"kind": "noisy_topk", "level": "image", "norm": "batch"},
    "capacity": {"kind": "vmoe", "capacity_factor": 0.7, "norm": "none", "balance": {"load": 0.1}},
    "warm-up, dropped patches and paths": {
        "kind": "mixtral",
        "norm": "none",
        "warmup": True,
        "experts": {"drop_path": 0.3},
        "forward": {"patch_dropout": 0.4},
    },
    "an expert that nobody chooses": {"kind": "mixtral", "norm": "none", "shut": True},
    "copies of the FFN": {"kind": "mixtral", "norm": "none", "experts": {"kind": "ffn", "sizes": [[64], [64], [64]]}},
    "mixture on top": {"kind": "mixtral", "norm": "none", "experts": {"head": [[4], [6], [8]]}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_experts_behind_the_vit(name, trained):
    compare([found[name] for found in trained(3, False)], HEADS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_experts_in_the_blocks(name, trained):
    size = size_of(name)
    compare([found[name] for found in trained(size, True)], BLOCKS[name], blocks=True)
