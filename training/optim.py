"""The optimizer, its schedule, and its state for stacked parameters."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from config.optim import OptimConfig
from model.parts import class_rows, part_of
from model.stacked import Stack


def lr_factor(step: int, total_steps: int, config: OptimConfig) -> float:
    """Learning rate of a step (0-based) relative to the peak.

    Linear from 1/w to 1 over the w warm-up steps, then constant, or half a cosine down to 0 at `total_steps`
    (Loshchilov 2017, SGDR, without restarts).
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: torch.optim.Optimizer, step: int, total_steps: int, config: OptimConfig) -> None:
    """Set the learning rate of a step (0-based) in every parameter group."""
    peak = config.lr * lr_factor(step, total_steps, config)
    for group in optimizer.param_groups:
        lr = peak * group.get("multiple", 1.0)
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW or Adam for the trained parameters, on a GPU as one fused kernel that a CUDA graph can replay."""
    from timm.optim import param_groups_weight_decay  # here, because importing timm takes seconds

    groups = param_groups_weight_decay(model, config.weight_decay)
    if config.lr_of:
        groups = _by_rate(model, groups, config.multiples)
    kinds = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}
    device = next(model.parameters()).device
    if device.type != "cuda":
        return kinds[config.kind](groups, lr=config.lr)
    for group in groups:  # one tensor each, which a captured step reads
        group["lr"] = torch.tensor(config.lr, device=device)
    optimizer = kinds[config.kind](groups, fused=True, capturable=True)
    optimizer._warned_capturable_if_run_uncaptured = True  # the first steps are not captured, and PyTorch would warn
    return optimizer


def _by_rate(model: nn.Module, groups: list[dict[str, Any]], multiples: dict[str, float]) -> list[dict[str, Any]]:
    """The parameter groups, split by parts with a separate learning rate."""
    rows = class_rows(model)
    multiple = {value: multiples.get(part_of(name, rows) or "", 1.0) for name, value in model.named_parameters()}
    return [
        {**group, "params": chosen, "multiple": times}
        for group in groups
        for times in dict.fromkeys([1.0, *multiples.values()])
        if (chosen := [value for value in group["params"] if multiple[value] == times])
    ]


def can_stack(parts: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> bool:
    """Whether parameters have one shape and dtype, all are trained, and one group of the optimizer has all of them."""
    groups = {id(value): index for index, group in enumerate(optimizer.param_groups) for value in group["params"]}
    kinds = {(value.shape, value.dtype, value.requires_grad, groups.get(id(value))) for value in parts}
    return len(kinds) == 1 and parts[0].requires_grad and id(parts[0]) in groups


def train_stack(stack: Stack, optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer train a stack instead of its parts, which are in one of its groups."""
    numbers = {id(value) for value in stack.parts}
    for group in optimizer.param_groups:
        if id(stack.parts[0]) in map(id, group["params"]):
            group["params"] = [stack.whole, *(value for value in group["params"] if id(value) not in numbers)]
    states = [optimizer.state.pop(part) for part in stack.parts if part in optimizer.state]
    if states:
        optimizer.state[stack.whole] = merged_state(states)


def merged_state(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The optimizer state of a stack from those of its parts; that of a single parameter is unchanged."""
    if len(states) == 1:
        return states[0]
    moments = {kind: torch.cat([state[kind] for state in states]) for kind in states[0] if kind != "step"}
    return {"step": states[0]["step"], **moments}
