"""The heads in the study: definition, inputs and cost."""

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import width_of_cost
from evaluation.cost import flops, head_cost
from model.classifier import NeckConfig, VisionMoE
from model.experts import ExpertsConfig
from model.routers import ROUTERS, RouterConfig

SETTINGS = {"batch": 1024, "ema": 0.999, "smoothing": 0.1, "warmup": 0.125}
"""Settings of every head; warmup: share of steps with random routing."""


@dataclass(frozen=True)
class Features:
    """The inputs of every head: train_VNF in V views, one evaluation split, labels, and the number of groups in F.

    For tokens, F means (T, D). digest: identifies the data. plain_NF: the original training images, for logistic
    regression (None: the first view).
    """

    train_VNF: Tensor
    labels_N: Tensor
    held_MF: Tensor
    held_labels_M: Tensor
    groups: int
    classes: int
    digest: str = ""
    plain_NF: Tensor | None = None


@dataclass
class Job:
    """One head, trained once. head: sections of the configuration as plain values. stage: which Features it reads."""

    method: str
    head: dict[str, Any]
    seed: int
    stage: str
    epochs: int
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The job as one line, which identifies a finished one."""
        return json.dumps(asdict(self), sort_keys=True)


def dense(*width: int, against: str | None = None) -> dict[str, Any]:
    """An MLP with a hidden layer of `width` units; without a width, a linear head. against: the paired head."""
    return {
        "router": {"kind": "noisy_topk", "top_k": 1, "warmup_steps": 0},
        "experts": {"sizes": [list(width)]},
        "against": against,
    }


def mixture(against: str, kind: str, sizes: list[int], top_k: int, shared: int = 0, **router) -> dict[str, Any]:
    """A mixture of experts with one hidden layer each, paired with the dense head `against`.

    Losses and capacities are those of the rule's paper; by default the Switch loss at 0.01.
    """
    experts = {"sizes": [[width] for width in sizes], "shared": [[shared]] if shared else []}
    balance = {"switch": 0.01}
    for name, value in ROUTERS[kind].paper.items():
        section, _, option = name.partition(".")
        (router if section == "router" else balance)[option] = value
    router |= {"kind": kind, "top_k": top_k}
    return {"router": router, "experts": experts, "balance": balance, "against": against}


def rule_methods(against: str, equal: list[int], half: list[int]) -> dict[str, dict[str, Any]]:
    """Every rule that reads one vector per sample, with two experts of `equal` per sample, or one of `half`."""
    found = {}
    for kind, rule in ROUTERS.items():
        if rule.only_top_k == 1:
            found[f"{kind}, {len(half)} experts"] = mixture(against, kind, half, 1)
        elif not rule.reads_tokens:
            found[kind] = mixture(against, kind, equal, 2)
    return found


def router_methods(width: int) -> dict[str, dict[str, Any]]:
    """Every routing rule with eight experts of `width` units, two of them active, and the matching dense heads.

    Dense heads of equal total size have as many hidden units as all experts of a mixture.
    """
    equal, half = [width] * 8, [2 * width] * 4
    unequal = [width // 4, width // 2, width, 9 * width // 4] * 2
    active = f"dense, {2 * width} units (active)"
    noisy = mixture(active, "noisy_topk", equal, 2)
    found = {
        "logistic regression": {"logistic": "plain images", "against": active},
        "linear head": dense(against=active),
        active: dense(2 * width),
        **rule_methods(active, equal, half),
        "noisy_topk, unequal": mixture(active, "noisy_topk", unequal, 2),
        "noisy_topk, probabilities": {**noisy, "combine": "probabilities"},
        "deepseek, shared": mixture(active, "deepseek", equal, 1, shared=width),
        "shared + 16 small": mixture(active, "noisy_topk", [width // 4] * 16, 2, shared=3 * width // 2, inputs=[-1]),
    }
    sums = sorted({units_of(head) for head in found.values() if is_mixture(head)})
    return found | {f"dense, {units} units (total)": dense(units, against=active) for units in sums}


def is_mixture(head: dict[str, Any]) -> bool:
    """Whether a head has experts to choose among."""
    return len(head.get("experts", {}).get("sizes", [])) > 1


def has_seed(head: dict[str, Any]) -> bool:
    """Whether a seed matters: not for logistic regression, which is trained to convergence."""
    return "logistic" not in head


def units_of(head: dict[str, Any]) -> int:
    """Hidden units of all experts, including shared ones."""
    return sum(sum(size) for size in head["experts"]["sizes"] + head["experts"].get("shared", []))


def totals(heads: dict[str, dict[str, Any]]) -> dict[str, str]:
    """For each mixture, the dense head with the same total number of hidden units, if there is one."""
    dense_heads = {name.rpartition(", ")[2]: name for name in heads if name.endswith("units (total)")}
    wanted = {name: f"{units_of(head)} units (total)" for name, head in heads.items() if is_mixture(head)}
    return {name: dense_heads[units] for name, units in wanted.items() if units in dense_heads}


def token_methods(width: int, features: Features) -> dict[str, dict[str, Any]]:
    """Soft MoE with as many experts as `router_methods`, and heads behind one slot.

    A slot is a weighted mean of the tokens. The dense heads have the cost of Soft MoE, or the size of its experts
    together; one head is linear.
    """

    def one_slot(*units: int) -> dict[str, Any]:
        head = mixture("", "soft_moe", [], 1)
        return {**head, "experts": {"sizes": [list(units)], "shared": []}, "against": None}

    soft = mixture("", "soft_moe", [width] * 8, 1)
    goal = flops_of(build(soft, features, 0.0), features)
    units = width_of_cost(lambda units: flops_of(build(one_slot(units), features, 0.0), features), goal)
    name = f"dense behind one slot, {units} units"
    return {
        name: one_slot(units),
        "soft_moe, 8 experts": {**soft, "against": name},
        f"dense behind one slot, {8 * width} units (total)": {**one_slot(8 * width), "against": name},
        "linear behind one slot": {**one_slot(), "against": name},
    }


FAMILIES = ("dense", "all routed, top-1 of 8", "shared + top-1 of 16", "shared + top-2 of 32")
"""The families of `width_methods`, each with a head for every possible width."""


def family_and_width(method: str) -> tuple[str, int]:
    """The two parts of a name such as `dense, 64 units`."""
    family, _, width = method.removesuffix(" units").rpartition(", ")
    return family, int(width)


def width_methods(widths: list[int], groups: int) -> dict[str, dict[str, Any]]:
    """For each width, a dense head, and mixtures with at most the same cost per sample, including their gates.

    The gate reads one of several feature groups, so its cost in hidden units is the number of experts divided by the
    number of groups. A quarter of the units, at most 128, is routed in addition to a shared expert; or, up to 512, all
    units belong to one of eight experts.
    """

    def gate(experts: int) -> int:
        return math.ceil(experts / groups)

    found: dict[str, dict[str, Any]] = {}
    for width in widths:
        name = f"{FAMILIES[0]}, {width} units"
        found[name] = dense(width)
        if width <= 512:
            sizes = [width - gate(8)] * 8
            found[f"{FAMILIES[1]}, {width} units"] = mixture(name, "noisy_topk", sizes, 1, inputs=[-1])
        routed = max(4, min(width // 4, 128))
        for family, experts, top_k in ((FAMILIES[2], 16, 1), (FAMILIES[3], 32, 2)):
            shared, sizes = width - routed - gate(experts), [routed // top_k] * experts
            if shared > 0:
                mixed = mixture(name, "noisy_topk", sizes, top_k, shared=shared, inputs=[-1])
                found[f"{family}, {width} units"] = mixed
    return found


def grid(head: dict[str, Any]) -> list[dict[str, Any]]:
    """The settings that every method can choose from on validation images; the same number for all."""
    if "logistic" in head:
        return [{"weight_decay": 10.0**exponent} for exponent in range(-7, 3)]
    rates = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
    return [{"lr": lr, "weight_decay": 1.0, "dropout": dropout} for lr in rates for dropout in (0.0, 0.2)]


def build(head: dict[str, Any], features: Features, dropout: float) -> VisionMoE:
    """The model of a head; a gate input of -1 means the last feature group."""
    router = dict(head["router"])
    if router.get("inputs"):
        router["inputs"] = [group % features.groups for group in router["inputs"]]
    combine = head.get("combine", "logits")
    # Every expert on every sample has static shapes for any number of experts, which a CUDA graph needs.
    experts = ExpertsConfig(**head["experts"], dropout=dropout, combine=combine, dispatch="dense")
    shape = tuple(features.train_VNF.shape[2:])
    neck = NeckConfig(kind="pooled" if len(shape) == 1 else "tokens", norm=head.get("norm", "layer"))
    return VisionMoE(shape, features.classes, neck, RouterConfig(**router), experts, features.groups)


def flops_of(model: VisionMoE, features: Features, visits_E: np.ndarray | None = None) -> int:
    """FLOPs per sample, with the mean visits of each expert (None: even); a single expert needs no gate."""
    shape = tuple(features.held_MF.shape[1:])
    router = model.moe.router
    cost = head_cost(model, shape, None if visits_E is None else visits_E / router.experts_per_sample).flops
    if len(model.moe.experts) == 1 and not router.reads_tokens:
        cost -= flops(router, torch.zeros(1, *shape, device=features.held_MF.device))
    return cost
