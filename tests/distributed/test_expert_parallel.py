"""Training with experts on several processes against that of one: logits, gradients, losses, counters, moments."""

import copy
from functools import cache

import numpy as np
import pytest
import timm.optim  # noqa: F401, which a fork would import for a fifth of a second
import torch
from block_helpers import images, moe_vit
from distributed_helpers import in_processes
from test_equivalence import ALL, BATCHES, CPU, built, close, data, head, require_empty

from common.distributed import ALONE, World
from config.optim import OptimConfig
from model.balance import BalanceConfig
from training.expert_parallel import ExpertParallel
from training.memory import bytes_per_image
from training.optim import build_optimizer
from training.parallel import Shares
from training.step import TrainingStep

OPTIM = OptimConfig(lr=0.01, weight_decay=0.01)
ALIKE = [[4]] * 3
COPIES = [[0.5, 0.5], [0, 1], [1, 0]]

# Of each: options of the model, and of the processes. moved: shares from the fourth step on.
HEADS = {
    "mixtral": ({"kind": "mixtral"}, {"processes": 2}),
    "three processes": ({"kind": "noisy_topk", "balance": {"load": 0.1}}, {"processes": 3}),
    "two groups of two": ({"kind": "vmoe"}, {"processes": 4, "members": 2}),
    "capacity": ({"kind": "vmoe", "capacity_factor": 0.7, "overflow": "next_best"}, {"processes": 2}),
    "residual, top 1": (
        {"kind": "switch", "top_k": 1, "capacity_factor": 0.6, "overflow": "residual"},
        {"processes": 2},
    ),
    "every expert": ({"kind": "mixtral", "top_k": 3}, {"processes": 2}),
    "top_p": ({"kind": "top_p"}, {"processes": 2}),
    "hierarchical": ({"kind": "hierarchical", "experts": {"sizes": [[4], [6], [8], [8]]}}, {"processes": 2}),
    "warm-up": ({"kind": "noisy_topk", "warmup": True}, {"processes": 2}),
    "hash": ({"kind": "hash", "balance": {"z_loss": 0.0}}, {"processes": 3}),
    "loss-free bias": ({"kind": "deepseek", "bias_rate": 0.1}, {"processes": 2}),
    "gshard": ({"kind": "gshard", "capacity_factor": 1.0}, {"processes": 2}),
    "sinkhorn": ({"kind": "sinkhorn"}, {"processes": 2}),
    "article": ({"kind": "article", "neck": {"norm": "batch"}}, {"processes": 2}),
    "an expert that nobody chooses": ({"kind": "mixtral", "shut": True}, {"processes": 3}),
    "probabilities": ({"kind": "mixtral", "experts": {"combine": "probabilities"}}, {"processes": 2}),
    "grouped": ({"kind": "mixtral", "experts": {"sizes": ALIKE, "dispatch": "grouped"}}, {"processes": 2}),
    "moved": ({"kind": "mixtral", "experts": {"sizes": ALIKE}}, {"processes": 2, "moved": [[0, 1], [1, 0], [0, 1]]}),
    "moved, grouped": (
        {"kind": "mixtral", "experts": {"sizes": ALIKE, "dispatch": "grouped"}},
        {"processes": 2, "moved": [[0, 1], [1, 0], [0, 1]]},
    ),
    "copied": ({"kind": "mixtral"}, {"processes": 2, "moved": COPIES}),
    "copied in two groups": (
        {"kind": "mixtral", "experts": {"sizes": ALIKE}},
        {"processes": 4, "members": 2, "moved": COPIES},
    ),
}
BLOCKS = {
    "tokens": ({"kind": "mixtral", "norm": "none"}, {"processes": 2, "moved": [[0, 1], [1, 0], [0, 1]]}),
    "images": ({"kind": "noisy_topk", "level": "image", "norm": "batch"}, {"processes": 3}),
    "warm-up": ({"kind": "noisy_topk", "norm": "none", "warmup": True}, {"processes": 2}),
    "capacity": ({"kind": "vmoe", "capacity_factor": 0.7, "norm": "none"}, {"processes": 2, "moved": COPIES}),
    "dropped paths": ({"kind": "mixtral", "norm": "none", "experts": {"drop_path": 0.3}}, {"processes": 2}),
    "an expert that nobody chooses": ({"kind": "mixtral", "norm": "none", "shut": True}, {"processes": 3}),
    "copies of the FFN": (
        {"kind": "mixtral", "norm": "none", "experts": {"kind": "ffn", "sizes": [[64]] * 3}},
        {"processes": 2},
    ),
    "mixture on top": ({"kind": "mixtral", "norm": "none", "experts": {"head": [[4], [6], [8]]}}, {"processes": 2}),
}


def train(world: World, options: dict, blocks: bool, members: int = 1, moved=None) -> dict:
    """Steps on each of the batches, with the experts on several processes if members > 1; complete on rank 0."""
    options = copy.deepcopy(options)
    balance = BalanceConfig(**{**ALL, **options.pop("balance", {})})
    warmup = options.pop("warmup", False)  # without gradients of gates
    model = built(blocks, **options)
    experts = ExpertParallel(model, members, "even", OPTIM, CPU) if members > 1 else None
    optimizer = momentum(model)
    step = TrainingStep(model.train(), optimizer, balance, 0.1, 0.5, "float32", experts=experts)
    features_N, labels_N = data(blocks)
    torch.manual_seed(7)
    shares, found = Shares(world, 7, CPU), []
    for number, index_B in enumerate(BATCHES):
        if number == 3 and experts and moved is not None:
            optimizer = move(experts, [moved] * len(model.mixtures), model, optimizer)
            step.use(optimizer)
        share = shares.of(len(index_B))
        own_B = index_B if share is None else share.own(index_B)
        logits = []
        hook = model.register_forward_hook(lambda *call, logits=logits: logits.append(call[2][0].detach()))
        with shares.random_numbers(share, number):
            result = step(features_N[own_B], labels_N[own_B], warmup, share=share)
        hook.remove()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        if experts:
            gradients |= {name: value.clone() for name, value in experts.gradients().items()}
            names = [name for name in experts.trained if name in gradients or name in experts.spread.parts]
            gradients = experts.spread.whole(gradients, names)
        split = share is not None and share.split
        found.append({"result": vars(result), "logits": logits[0], "gradients": gradients, "split": split})
    state = experts.spread.whole(model.state_dict()) if experts else model.state_dict()
    moments = experts.optimizer_state(optimizer, model) if experts else optimizer.state_dict()
    if experts:  # what is stored comes back to where it was
        here = experts.local_optimizer_state(world.broadcast(moments), optimizer, model)
        close(here["state"], optimizer.state_dict()["state"])
    return {"steps": found, "state": {name: value.clone() for name, value in state.items()}, "moments": moments}


def momentum(model) -> torch.optim.Optimizer:
    """AdamW that does not turn a gradient that is zero up to rounding into a step of full size."""
    groups = build_optimizer(model, OPTIM).param_groups
    return torch.optim.AdamW([{**group, "eps": 0.1} for group in groups])


def move(experts: ExpertParallel, shares, model, optimizer) -> torch.optim.Optimizer:
    fresh = experts.move(shares, [model], optimizer)
    for group in fresh.param_groups:
        group["eps"] = 0.1
    return fresh


def train_each(world: World, cases: dict, blocks: bool) -> dict:
    each = {}
    for name, (options, processes) in cases.items():
        if processes["processes"] == world.size:
            members = processes.get("members", world.size)
            each[name] = train(world, options, blocks, members, processes.get("moved"))
    return each


@pytest.fixture(scope="module")
def trained():
    """The results of `train_each` with this number of processes, started once for all cases."""
    return cache(lambda size, blocks: in_processes(size, train_each, BLOCKS if blocks else HEADS, blocks))


def compare(each: list[dict], options: dict, blocks: bool) -> None:
    alone = train(ALONE, options, blocks)
    for number, step in enumerate(alone["steps"]):
        close(each[0]["steps"][number]["gradients"], step["gradients"])
        for found in (other["steps"][number] for other in each):
            close(found["result"], step["result"])
        logits = [other["steps"][number]["logits"] for other in each]
        same = torch.cat(logits) if each[0]["steps"][number]["split"] else logits[0]
        close({"logits": same}, {"logits": step["logits"]})
    close(each[0]["state"], alone["state"])
    found, expected = each[0]["moments"], alone["moments"]
    assert [group["params"] for group in found["param_groups"]] == [g["params"] for g in expected["param_groups"]]
    close(found["state"], expected["state"])
    require_empty(alone, options)


@pytest.mark.slow
@pytest.mark.parametrize("name", HEADS)
def test_experts_behind_the_vit(name, trained):
    options, processes = HEADS[name]
    compare([found[name] for found in trained(processes["processes"], False)], options, False)


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_experts_in_the_blocks(name, trained):
    options, processes = BLOCKS[name]
    compare([found[name] for found in trained(processes["processes"], True)], options, True)


def solve(world: World) -> list:
    """Placements for loads dominated by one expert."""
    model = head("mixtral", experts={"sizes": [[8]] * 4})
    experts = ExpertParallel(model, 2, "lp" if world.size == 2 else "even", OPTIM, CPU)
    assert sorted(experts.spread.dispatchers[0].mine) == ([0, 1] if world.rank == 0 else [2, 3])
    return list(experts.solved(np.array([[60, 20, 10, 10]])))


def test_new_shares_are_computed_from_the_load_of_an_epoch():
    shares, numbers = in_processes(2, solve)[0]
    # 80 and 20 of 100, where 50 is the mean; with a share of 10 of the first expert on the second process 50 and 50.
    assert numbers == {"placement/measured": pytest.approx(1.6), "placement/predicted": pytest.approx(1.0)}
    assert np.array(shares)[0].sum(axis=1) == pytest.approx(np.ones(4))


def count_activations(world: World) -> tuple[int, int]:
    """Bytes of activations per image with half of the experts in each process, and the tokens that came for them."""
    model, came = moe_vit(kind="mixtral", norm="none", experts={"sizes": [[4]] * 4}), []
    ExpertParallel(model, 2, "even", OPTIM, CPU)
    for mixture in model.mixtures:
        dispatch = mixture.experts.dispatcher.dispatch

        def counted(*inputs, dispatch=dispatch):
            received = dispatch(*inputs)
            came.append(len(received.x_RD))
            return received

        mixture.experts.dispatcher.dispatch = counted
    return bytes_per_image(model, images(1)), sum(came[: len(model.mixtures)])


def test_activations_are_counted_with_tokens_of_other_processes():
    (first, many), (second, few) = in_processes(2, count_activations)
    # Of a token: its 16 numbers, 8 hidden units before and after the activation and whether they are used, an index.
    assert many > few and first - second == (many - few) * (4 * (16 + 3 * 8) + 8)
