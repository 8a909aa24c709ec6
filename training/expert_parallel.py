"""Training with experts on several processes: gradients, single-process checkpoints, a new placement per epoch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from analysis.placement import RULES, aligned, even, total_imbalance
from common.distributed import world
from config.optim import OptimConfig
from model.moe_vit import AnyMoE
from model.spread import Shares, Spread
from model.stacked import Stack, release
from training.optim import build_optimizer, can_stack, merged_state, train_stack

WORTH = 0.05  # a new placement must reduce the largest work by this much, because moving experts has a cost


class ExpertParallel:
    """The parts of training that differ if the experts of `model` are distributed over groups of processes.

    Create it in all processes, from the model with all experts; the model then keeps those of this process. rule: from
    parallel.placement. costs: those of the model with all experts.

    Placements start even; after each epoch `replace` recomputes them from the measured load.
    """

    def __init__(
        self, model: AnyMoE, members: int, rule: str, optim: OptimConfig, device: torch.device, costs: Any = None
    ):
        self.rule, self.optim, self.costs = rule, optim, costs
        self.work_LE = np.array([mixture.router.work for mixture in model.mixtures])
        experts = self.work_LE.shape[1]
        self.spread = Spread(model, members, [even(experts, members).tolist() for _ in model.mixtures], device)
        names = {id(value): name for name, value in model.named_parameters()}
        groups = build_optimizer(model, optim).param_groups
        self.names = [[names[id(value)] for value in group["params"]] for group in groups]
        self.options = [{key: value for key, value in group.items() if key != "params"} for group in groups]
        self.trained = [name for names in self.names for name in names]
        self.stacks: list[tuple[list[str], Stack]] = []
        self.single: dict[str, nn.Parameter] = {}
        self.spread.apply(model)

    # Gradients

    def split(
        self, model: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The trained parameters that all processes share, and those of experts.

        Those of experts of one shape are stacked. optimizer: that of the model's parameters; from now on it trains the
        stacks.
        """
        by_name = dict(model.named_parameters())
        self.stacks = []
        for names in self.spread.same_shape(model):
            parts = [by_name[name] for name in names]
            if can_stack(parts, optimizer):
                stack = Stack(parts)
                train_stack(stack, optimizer)
                self.stacks.append((names, stack))
        names = {name for names, _ in self.stacks for name in names}
        self.single = {n: value for n, value in by_name.items() if n in self.spread.parts and n not in names}
        for value in self.single.values():
            release(value)  # if the rest of its former stack is in another process now
        common = [value for name, value in by_name.items() if name not in self.spread.parts]
        return common, self.trained_here

    @property
    def trained_here(self) -> list[nn.Parameter]:
        """The trained parameters of this process's experts: stacks, and single ones."""
        return [*(stack.whole for _, stack in self.stacks), *self.single.values()]

    def collect(self) -> None:
        """Call after a backward pass, before anything that reads gradients."""
        for _, stack in self.stacks:
            stack.collect()

    def gradients(self) -> dict[str, Tensor]:
        """The gradients of this process's experts by parameter name; changes in place affect training."""
        found = {name: value.grad for name, value in self.single.items() if value.grad is not None}
        for names, stack in self.stacks:
            if stack.whole.grad is not None:
                found |= dict(zip(names, stack.split(stack.whole.grad), strict=True))
        return found

    @torch.no_grad()
    def add_up(self, divisor: float) -> None:
        """Turn gradients of experts into those of the whole batch, divided by a divisor.

        They already include all samples of the group; gradients from other groups and from copies are added.
        """
        spread, rest, copied = self.spread, [], {}
        if not (spread.has_peers or spread.copied) and divisor == 1:
            return
        gradients = self.gradients()
        for name, place, expert, view in spread.pieces(gradients):
            if len(spread.holders(place, expert)) > 1:
                copied[name, expert] = view
            else:
                rest.append(view)
        if rest and spread.has_peers:
            _sum_over(rest, spread.peers)
        if spread.copied:
            self._add_up_copies(copied)
        if divisor != 1:
            torch._foreach_div_(list(gradients.values()), divisor)

    def _add_up_copies(self, here: dict[tuple[str, int], Tensor]) -> None:
        """Sum the gradients of experts with copies over all processes; a process without a copy adds zeros."""
        spread, views = self.spread, []
        for name in (name for name in self.trained if name in spread.parts):
            for expert in spread.owners(name):
                if len(spread.holders(spread.parts[name][0], expert)) > 1:
                    zeros = torch.zeros(spread.shape_of(name, expert), device=spread.device)
                    views.append(here.get((name, expert), zeros))
        _sum_over(views, None)

    @torch.no_grad()
    def norm(self, common: list[Tensor]) -> Tensor:
        """The global norm of all gradients, with each expert counted once. common: those of shared parameters."""
        spread = self.spread
        if spread.copied:
            pieces = list(spread.pieces(self.gradients()))
            shares = [1 / len(spread.holders(place, expert)) for _, place, expert, _ in pieces]
            own = _square([view for *_, view in pieces], shares, spread.device)
        else:
            own = _square([v.grad for v in self.trained_here if v.grad is not None], None, spread.device)
        dist.all_reduce(own, group=spread.group)
        return (own + _square(common, None, spread.device)).sqrt()

    # Checkpoints

    def optimizer_state(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Any]:
        """The optimizer state as in a single process, complete on rank 0; all processes must call this."""
        by_name = self._by_name(optimizer, model)
        steps = self._steps(by_name)
        found: dict[str, dict[str, Tensor]] = {name: {} for name in steps}
        for kind in self._moments(by_name):
            moments = {name: values[kind] for name, values in by_name.items()}
            for name, value in self.spread.whole(moments, steps).items():
                found[name][kind] = value
        groups, first = [], 0
        for options, group in zip(self.options, self.names, strict=True):
            lr = optimizer.param_groups[0]["lr"]
            groups.append({**options, "lr": lr, "params": list(range(first, first + len(group)))})
            first += len(group)
        trained = enumerate(self.trained)
        state = {index: {"step": steps[name], **found[name]} for index, name in trained if name in steps}
        return {"state": state, "param_groups": groups}

    def local_optimizer_state(
        self, state: dict[str, Any], optimizer: torch.optim.Optimizer, model: nn.Module
    ) -> dict[str, Any]:
        """The part of a single-process optimizer state that belongs to this process."""
        entries = state["state"]
        by_name = {name: entries[index] for index, name in enumerate(self.trained) if index in entries}
        local: dict[str, dict[str, Tensor]] = {}
        for kind in ("step", *self._moments(by_name)):
            values = {name: entry[kind] for name, entry in by_name.items()}
            own = values if kind == "step" else self.spread.local(values)
            for name, value in own.items():
                local.setdefault(name, {})[kind] = value
        return self._as_optimizer_state(local, optimizer, model)

    def _as_optimizer_state(self, by_name, optimizer, model) -> dict[str, Any]:
        own, template = self._names(optimizer, model), optimizer.state_dict()
        state = {
            index: merged_state([by_name[n] for n in names]) for index, names in enumerate(own) if names[0] in by_name
        }
        return {"state": state, "param_groups": template["param_groups"]}

    def _names(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> list[list[str]]:
        """For each parameter of an optimizer of this model, its name, or those of the parts of a stack."""
        names = {id(value): [name] for name, value in model.named_parameters()}
        names |= {id(stack.whole): parts for parts, stack in self.stacks}
        return [names[id(value)] for group in optimizer.param_groups for value in group["params"]]

    def _by_name(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, dict[str, Tensor]]:
        """The optimizer state of each parameter of this model."""
        names, found = self._names(optimizer, model), {}
        rows = {parts[0]: stack.rows for parts, stack in self.stacks}
        for index, values in optimizer.state_dict()["state"].items():
            each = rows.get(names[index][0], [])
            for number, name in enumerate(names[index]):
                moments = {kind: values[kind].split(each)[number] for kind in values if kind != "step"} if each else {}
                found[name] = {**values, **moments}
        return found

    def _steps(self, by_name: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
        """The number of steps of each parameter that had a gradient, in any process: a gate has none in warm-up."""
        parts = self.spread.parts
        of_experts = [values["step"] for name, values in by_name.items() if name in parts][:1]
        steps = {name: of_experts[0] for name in parts if of_experts}
        steps |= {name: values["step"] for name, values in by_name.items()}
        # A separate tensor for each parameter, which the optimizer increments.
        return {name: steps[name].clone() for name in self.trained if name in steps}

    @staticmethod
    def _moments(by_name: dict[str, dict[str, Tensor]]) -> list[str]:
        return sorted(set(next(iter(by_name.values()), {})) - {"step"})

    # Placement

    def solved(self, load_LE: np.ndarray) -> tuple[Shares | None, dict[str, float]]:
        """New shares from the assignments of an epoch (None: experts stay), and the metrics to report.

        The metrics, by "title/series", are the largest over the mean work of a process: measured in this epoch, and
        predicted for the next epoch under the same loads.
        """
        work_LE, before = self.work_LE * load_LE, self.spread.shares
        if not load_LE.any():  # random routing
            return None, {}
        measured = total_imbalance(before, work_LE)
        unchanged = {"placement/measured": measured, "placement/predicted": measured}
        if self.rule not in RULES:
            return None, unchanged
        found = world().broadcast(self._solve(work_LE) if world().first else before)
        predicted = total_imbalance(found, work_LE)
        if predicted > (1 - WORTH) * measured:
            return None, unchanged
        return found, unchanged | {"placement/predicted": predicted}

    def _solve(self, work_LE: np.ndarray) -> Shares:
        members = self.spread.members
        pairs = zip(work_LE, self.spread.shares, strict=True)
        return [aligned(RULES[self.rule](work_E, members), before_EM).tolist() for work_E, before_EM in pairs]

    def start_from(self, shares: Shares | None, models: Sequence[nn.Module]) -> bool:
        """Give models the experts of these shares, before loading. False: no shares, or those of other processes."""
        spread = self.spread
        if shares is None or np.shape(shares) != np.shape(spread.shares) or shares == spread.shares:
            return False
        spread.set_shares(shares)
        for model in models:
            spread.apply(model)
        return True

    def move(
        self, shares: Shares, models: Sequence[nn.Module], optimizer: torch.optim.Optimizer
    ) -> torch.optim.Optimizer:
        """Move experts and their moments to the processes of these shares. Returns the optimizer of the first model."""
        spread, first = self.spread, models[0]
        by_name = self._by_name(optimizer, first)
        steps = self._steps(by_name)
        moments: dict[str, dict[str, Tensor]] = {}
        for kind in self._moments(by_name):
            moved = spread.moved({name: values[kind] for name, values in by_name.items()}, shares, self.trained)
            for name, value in moved.items():
                moments.setdefault(name, {"step": steps[name]})[kind] = value
        states = [spread.moved(model.state_dict(), shares) for model in models]
        spread.set_shares(shares)
        for model, state in zip(models, states, strict=True):
            spread.apply(model)
            model.load_state_dict(state)
        fresh = build_optimizer(first, self.optim)
        fresh.load_state_dict(self._as_optimizer_state(moments, fresh, first))
        return fresh


def moved_line(values: dict[str, float]) -> str:
    """The line that reports that experts move, and why."""
    measured, predicted = values["placement/measured"], values["placement/predicted"]
    return f"placement    largest over mean work of a process {measured:.2f}, predicted {predicted:.2f} after the move"


def _square(tensors: list[Tensor], factors: list[float] | None, device: torch.device) -> Tensor:
    """The sum of the squares of all numbers, each tensor's times its factor (None: 1)."""
    if not tensors:
        return torch.zeros((), device=device)
    squares = torch._foreach_pow(torch._foreach_norm(tensors, dtype=torch.float32), 2)
    return torch.stack(squares if factors is None else torch._foreach_mul(squares, factors)).sum()


def _sum_over(views: list[Tensor], group: Any) -> None:
    """Replace tensors by their sums over a group of processes."""
    flat = torch.cat([view.flatten() for view in views])
    dist.all_reduce(flat, group=group)
    parts = flat.split([view.numel() for view in views])
    torch._foreach_copy_(views, [part.view_as(view) for part, view in zip(parts, views, strict=True)])
