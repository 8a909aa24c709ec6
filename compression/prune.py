"""Remove experts; their samples go to their next choice, as where the gate may not choose them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from common.errors import UserError, one_line
from compression.state import Build, kept_state
from config.config import Config
from model.moe_vit import AnyMoE


@dataclass(frozen=True)
class Removal:
    """A step of automatic pruning: what was removed, numbered as in the run, and the validation macro-F1 after it."""

    experts: tuple[int, ...]
    macro_f1: float


def kept_config(config: Config, kept: Sequence[int]) -> Config:
    """The configuration of a run with but some of its experts. Raises UserError where that is impossible."""
    experts, router, count = config.experts, config.router, len(config.experts.sizes)

    def chosen(values: Any, shared: bool = False) -> Any:
        """The entries of the kept experts, and of the shared ones behind them, where there is a list."""
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
        raise UserError(f"without the others experts {_listed(kept)} make no model: {one_line(error)}") from error


def _grown(grown: Sequence[int], kept: Sequence[int]) -> list[int]:
    """The numbers of experts before each addition, of those that are kept."""
    counts = [sum(expert < before for expert in kept) for before in grown]
    return [count for count in dict.fromkeys(counts) if 0 < count < len(kept)]


def prune(config: Config, model: AnyMoE, kept: Sequence[int], build: Build) -> tuple[Config, AnyMoE]:
    """The model with but the experts `kept`, in ascending order, in evaluation mode on the same device.

    Its answers are those of `model` under allowed_E. Raises UserError where fewer would be left than see a sample, or
    a rule does without none of them.
    """
    smaller_config = kept_config(config, kept)
    smaller = build(smaller_config)
    smaller.load_state_dict(kept_state(model, smaller, kept))
    return smaller_config, smaller.to(next(model.parameters()).device).eval()


def check_prune(config: Config, removed: Sequence[int]) -> list[int]:
    """The experts that are left without some. Raises UserError for one that is not there, or too few left."""
    count, top_k = len(config.experts.sizes), config.router.top_k
    for expert in removed:
        if not 0 <= expert < count:
            raise UserError(f"--prune names expert {expert}: this run has experts 0 to {count - 1}")
    kept = [expert for expert in range(count) if expert not in removed]
    if not kept:
        raise UserError(f"--prune names all {count} experts: leave at least router.top_k {top_k}")
    if len(kept) < top_k:
        raise UserError(
            f"--prune leaves {len(kept)} of {count} experts, and each sample goes to router.top_k {top_k}: remove "
            f"{count - top_k} at most"
        )
    kept_config(config, kept)
    return kept


def prune_to_budget(
    config: Config, model: AnyMoE, build: Build, score: Callable[[AnyMoE], float], least: float
) -> tuple[list[int], list[Removal]]:
    """The experts that are left when those have gone one by one that are missed least, and each step.

    score: validation macro-F1. least: what it may fall to. Greedy: each step removes the expert (under hierarchical
    routing the group) without which the score is highest; the last one above `least` counts.
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
    """What can go in one step: each expert, or under hierarchical routing each whole group."""
    if config.router.kind != "hierarchical":
        return [(expert,) for expert in kept]
    groups = [tuple(e for e in kept if e // _members(config) == group) for group in range(config.router.groups)]
    groups = [group for group in groups if group]
    return groups if len(groups) > config.router.top_groups else []


def _members(config: Config) -> int:
    """Experts of a group."""
    return len(config.experts.sizes) // config.router.groups


def _groups(config: Config, kept: Sequence[int]) -> dict[str, int]:
    """Under hierarchical routing the number of groups that are left. Raises UserError where one is left in part."""
    if config.router.kind != "hierarchical":
        return {}
    members = _members(config)
    left = sorted({expert // members for expert in kept})
    if [group * members + place for group in left for place in range(members)] != list(kept):
        raise UserError(
            f"router.kind hierarchical has groups of {members} experts in their order: remove whole groups, since a "
            "group's gate counts all of its experts"
        )
    return {"groups": len(left)}


def _listed(experts: Sequence[int]) -> str:
    return ", ".join(map(str, experts))
