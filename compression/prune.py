"""Remove experts; their samples go to their next choice, as if the gate were not allowed to choose them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from common.errors import UserError, one_line
from compression.state import Build, kept_state
from config.config import Config
from model.moe_vit import AnyMoE
from model.routers import ROUTERS


@dataclass(frozen=True)
class Removal:
    """A step of automatic pruning: what was removed, numbered as in the run, and the validation macro-F1 after it."""

    experts: tuple[int, ...]
    macro_f1: float


def kept_config(config: Config, kept: Sequence[int]) -> Config:
    """The configuration of a run with only some of its experts. Raises UserError if that is impossible."""
    experts, router, count = config.experts, config.router, len(config.experts.sizes)

    def chosen(values: Any, shared: bool = False) -> Any:
        """The entries of the kept experts, and of the shared ones after them, if there is a list."""
        return [values[e] for e in kept] + (values[count:] if shared else []) if isinstance(values, list) else values

    try:
        return replace(
            config,
            experts=replace(
                experts,
                sizes=chosen(experts.sizes),
                grown=_grown(experts.grown, kept),
                add=[],
                head=chosen(experts.head) if experts.head else [],
                dropout=chosen(experts.dropout, shared=True),
                inputs=chosen(experts.inputs, shared=True),
            ),
            router=replace(router, target_load=chosen(router.target_load), **_groups(config, kept)),
        )
    except ValueError as error:
        raise UserError(f"experts {_listed(kept)} alone do not make a valid model: {one_line(error)}") from error


def _grown(grown: Sequence[int], kept: Sequence[int]) -> list[int]:
    """The number of kept experts before each addition."""
    counts = [sum(expert < before for expert in kept) for before in grown]
    return [count for count in dict.fromkeys(counts) if 0 < count < len(kept)]


def prune(config: Config, model: AnyMoE, kept: Sequence[int], build: Build) -> tuple[Config, AnyMoE]:
    """The model with only the experts `kept`, in ascending order, in evaluation mode on the same device.

    Its outputs are those of `model` under allowed_E. Raises UserError if fewer experts would remain than each sample
    uses, or if the rule cannot work without the removed ones.
    """
    smaller_config = kept_config(config, kept)
    smaller = build(smaller_config)
    smaller.load_state_dict(kept_state(model, smaller, kept))
    return smaller_config, smaller.to(next(model.parameters()).device).eval()


def check_prune(config: Config, removed: Sequence[int]) -> list[int]:
    """The remaining experts. Raises UserError for an expert that does not exist, or if too few remain."""
    count, top_k = len(config.experts.sizes), config.router.top_k
    for expert in removed:
        if not 0 <= expert < count:
            raise UserError(f"--prune names expert {expert}: this run has experts 0 to {count - 1}")
    kept = [expert for expert in range(count) if expert not in removed]
    if count == 1 and not kept:
        raise UserError("--prune names the only expert of this run: one must remain")
    if not kept:
        raise UserError(f"--prune names all {count} experts: leave at least router.top_k {top_k}")
    if len(kept) < top_k:
        raise UserError(
            f"--prune leaves {len(kept)} of {count} experts, but each sample uses router.top_k {top_k}: remove at most "
            f"{count - top_k}"
        )
    kept_config(config, kept)
    return kept


def prune_to_budget(
    config: Config, model: AnyMoE, build: Build, score: Callable[[AnyMoE], float], least: float
) -> tuple[list[int], list[Removal]]:
    """Remove the least useful experts one by one; returns the remaining experts, and each step.

    score: validation macro-F1. least: its lower limit. Greedy: each step removes the expert (if the rule has
    groups, the group) without which the score is highest; the last step above `least` counts.
    """
    kept, steps = list(range(len(config.experts.sizes))), []
    while True:
        candidates = []
        for gone in _removable(config, kept):
            left = [expert for expert in kept if expert not in gone]
            if len(left) >= config.router.top_k:
                candidates.append((score(prune(config, model, left, build)[1]), gone))
        if not candidates:
            return kept, steps
        best, gone = max(candidates, key=lambda candidate: candidate[0])
        if best < least:
            return kept, steps
        kept = [expert for expert in kept if expert not in gone]
        steps.append(Removal(gone, best))


def _removable(config: Config, kept: Sequence[int]) -> list[tuple[int, ...]]:
    """What one step can remove: each expert, or each whole group if the rule has groups."""
    if not ROUTERS[config.router.kind].has_groups:
        return [(expert,) for expert in kept]
    groups = [tuple(e for e in kept if e // _members(config) == group) for group in range(config.router.groups)]
    groups = [group for group in groups if group]
    return groups if len(groups) > config.router.top_groups else []


def _members(config: Config) -> int:
    """Number of experts in a group."""
    return len(config.experts.sizes) // config.router.groups


def _groups(config: Config, kept: Sequence[int]) -> dict[str, int]:
    """The number of remaining groups, if the rule has groups. Raises UserError if part of a group remains."""
    if not ROUTERS[config.router.kind].has_groups:
        return {}
    members = _members(config)
    left = sorted({expert // members for expert in kept})
    if [group * members + place for group in left for place in range(members)] != list(kept):
        raise UserError(
            f"router.kind {config.router.kind} has groups of {members} consecutive experts: remove whole groups, "
            "because the gate of a group covers all of its experts"
        )
    return {"groups": len(left)}


def _listed(experts: Sequence[int]) -> str:
    return ", ".join(map(str, experts))
