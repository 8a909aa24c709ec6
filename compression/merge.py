"""Merge groups of experts into one expert each, following MC-SMoE (Li 2023, "Merge, then compress")."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from common.errors import UserError, one_line
from compression.align import Layers, align, average, layers_of, write_layers
from compression.observe import inputs_of, observe, output_of
from compression.state import Build, differing_axis, owner
from config.config import Config
from model.experts import ExpertKind
from model.experts.adapter import Adapters
from model.moe_vit import AnyMoE
from model.routers import ROUTERS

RIDGE = 1e-4  # ridge penalty of the fit, relative to the mean square of a hidden unit
FIT_ROWS = 65_536  # limit of rows for the fit at each place
Groups = list[list[list[int]]]
"""At each place, the members of each new expert; the first member of a group is the most used."""


def check_merge(config: Config, number: int, count: int | None = None) -> None:
    """Raise UserError if experts cannot be merged to this number. count: the number of remaining experts."""
    count = len(config.experts.sizes) if count is None else count
    rule = ROUTERS[config.router.kind]
    top_k = config.router.top_k
    if count == 1:
        raise UserError(f"--merge is {number}: there is only one expert, so nothing to merge")
    if count <= top_k:
        raise UserError(
            f"--merge is {number}: there are {count} experts, and each sample uses router.top_k {top_k}, so there is "
            "nothing to merge"
        )
    if not 1 <= number < count:
        raise UserError(f"--merge is {number}: there are {count} experts to merge, so give {top_k} to {count - 1}")
    if number < top_k:
        raise UserError(f"--merge {number} leaves fewer experts than each sample uses, router.top_k {top_k}")
    if rule.has_groups or not rule.learns:
        why = "its groups must stay equal in size" if rule.learns else "it has no gate whose columns could be merged"
        raise UserError(f"--merge does not work with router.kind {config.router.kind}: {why}; use --prune")
    if config.experts.inputs is not None:
        raise UserError("--merge does not work with experts.inputs: experts of one group would read different features")


@torch.no_grad()
def similarity_of_gates(model: AnyMoE, batches: Iterable[Tensor]) -> list[Tensor]:
    """At each place, the cosine similarity of the router logits of two experts, float64 (E, E) (Li 2023, eq. 2)."""
    products: list[Any] = [0.0] * len(model.mixtures)
    for inputs in batches:
        seen = observe(model, inputs)
        for place in range(len(products)):
            logits_BE = seen[place].logits_BE.double()  # type: ignore[union-attr]
            products[place] = products[place] + logits_BE.T @ logits_BE
    norms = [product_EE.diagonal().clamp_min(1e-30).sqrt() for product_EE in products]
    return [product_EE / norm_E / norm_E[:, None] for product_EE, norm_E in zip(products, norms, strict=True)]


def group(similarity_EE: Tensor, usage_E: Sequence[float], hidden: Sequence[list[int]], number: int) -> list[list[int]]:
    """The `number` most used experts, each with the other experts whose router logits are most similar.

    An expert joins one of its own size (`hidden`), if there is one among the most used. Groups are ordered by their
    first members.
    """
    order = sorted(range(len(usage_E)), key=lambda expert: (-usage_E[expert], expert))
    groups = {leader: [leader] for leader in sorted(order[:number])}
    for expert in order[number:]:
        same = [leader for leader in groups if hidden[leader] == hidden[expert]]
        nearest = max(same or groups, key=lambda leader: float(similarity_EE[expert, leader]))
        groups[nearest].append(expert)
    return list(groups.values())


def choose_groups(config: Config, model: AnyMoE, similarity: Sequence[Tensor], number: int) -> Groups:
    """The groups at each place. Unequal experts form the same groups everywhere, as they share one configuration."""
    experts = config.experts
    hidden = [experts.hidden(expert) for expert in range(len(experts.sizes))]
    usage = [_shares(mixture.usage_E.tolist()) for mixture in model.mixtures]
    alike = len({str(size) for size in hidden}) == 1 and len({str(size) for size in experts.head}) <= 1
    if alike:
        return [group(*pair, hidden, number) for pair in zip(similarity, usage, strict=True)]
    mean_E = [sum(column) / len(usage) for column in zip(*usage, strict=True)]
    return [group(torch.stack(list(similarity)).mean(dim=0), mean_E, hidden, number)] * len(usage)


def _shares(usage: Sequence[float]) -> list[float]:
    """Numbers divided by their sum; equal shares if all are zero."""
    total = sum(usage)
    return [value / total if total else 1 / len(usage) for value in usage]


def merged_config(config: Config, groups: list[list[int]]) -> Config:
    """The configuration after the merge: each group gets the units of its widest member, layer by layer."""
    experts, router = config.experts, config.router
    leaders = [_widest(group, [experts.hidden(expert) for expert in range(len(experts.sizes))]) for group in groups]
    count = len(experts.sizes)
    dropout: Any = experts.dropout
    if isinstance(dropout, list):
        dropout = [dropout[leader] for leader in leaders] + dropout[count:]
    target = router.target_load
    if isinstance(target, list):
        target = [sum(target[member] for member in group) for group in groups]
    hidden = [experts.hidden(expert) for expert in range(count)]
    on_top = replace(experts, place="head", blocks="all", kind="mlp", head=[], sizes=experts.head or [[]])
    head_hidden = [on_top.hidden(expert) for expert in range(len(experts.head))]
    try:
        return replace(
            config,
            experts=replace(
                experts,
                sizes=[_merged_size(experts.sizes, hidden, group) for group in groups],
                head=[_merged_size(experts.head, head_hidden, group) for group in groups] if experts.head else [],
                dropout=dropout,
            ),
            router=replace(router, target_load=target),
        )
    except ValueError as error:
        raise UserError(f"--merge {len(groups)} does not make a valid model: {one_line(error)}") from error


def _widest(group: Sequence[int], hidden: Sequence[list[int]]) -> int:
    """The member with the most hidden units; the first one in a tie."""
    return max(group, key=lambda expert: (sum(hidden[expert]), -group.index(expert)))


def _merged_size(sizes: Sequence[Any], hidden: Sequence[list[int]], group: Sequence[int]) -> Any:
    widest = _widest(group, hidden)
    members = [hidden[expert] for expert in group if len(hidden[expert]) == len(hidden[widest])]
    found = [max(units) for units in zip(*members, strict=True)]
    return sizes[widest] if found == hidden[widest] else found


@torch.no_grad()
def merge(config: Config, model: AnyMoE, groups: Groups, build: Build) -> tuple[Config, AnyMoE]:
    """The model with one expert for each group, in evaluation mode on the same device.

    Each is the mean of its members, weighted by their usage in training, after their hidden units have been matched to
    those of the widest member. Members with fewer units contribute to only some of them. Members with a different
    number of hidden layers contribute only in `fit`. The gate's columns, and all other router parameters per expert,
    also become the weighted mean; counters are summed.
    """
    smaller_config = merged_config(config, groups[0])
    smaller = build(smaller_config).to(next(model.parameters()).device)
    state, found = model.state_dict(), {}
    for name, like in smaller.state_dict().items():
        if not _is_expert(smaller, name):
            axis = differing_axis(state[name], like)
            found[name] = state[name] if axis is None else _merged_entries(model, groups, name, axis)
    smaller.load_state_dict(found, strict=False)
    for place, (mixture, small) in enumerate(zip(model.mixtures, smaller.mixtures, strict=True)):
        for index, members in enumerate(groups[place]):
            write_layers(_merged_layers(mixture.experts, members, mixture.usage_E.tolist()), small.experts, index)
    return smaller_config, smaller.eval()


def _is_expert(model: AnyMoE, name: str) -> bool:
    """Whether a tensor belongs to routed experts."""
    paths = [path for path, module in model.named_modules() if any(module is mixture for mixture in model.mixtures)]
    return any(name.startswith(f"{path}.experts.") for path in paths)


def _merged_entries(model: AnyMoE, groups: Groups, name: str, axis: int) -> Tensor:
    """A tensor of a router, or a counter, with the entries of each group combined."""
    mixture, _ = owner(model, name)
    value, usage = model.state_dict()[name], mixture.usage_E.tolist()
    place = next(index for index, each in enumerate(model.mixtures) if each is mixture)
    parts = []
    for members in groups[place]:
        weights = _shares([usage[member] for member in members]) if value.is_floating_point() else [1] * len(members)
        entries = [mixture.router.entries_of([member], value.shape[axis]) for member in members]
        each = [value.index_select(axis, torch.tensor(entry, device=value.device)) for entry in entries]
        parts.append(sum(weight * part for weight, part in zip(weights, each, strict=True)))
    return torch.cat(parts, dim=axis)


def _merged_layers(experts: Any, members: Sequence[int], usage: Sequence[float]) -> Layers:
    """The mean of the members with the same number of hidden layers as the widest one."""
    each = [layers_of(experts, member) for member in members]
    layers = [found for found in each if found is not None]
    if len(layers) < len(each):
        module = experts if isinstance(experts, ExpertKind) else experts[members[0]]
        kind = type(module).__name__
        raise UserError(f"{kind} does not consist of layers: its experts cannot be merged, use --prune")
    widest = max(range(len(layers)), key=lambda index: (sum(layers[index].hidden), -index))
    alike = [index for index, found in enumerate(layers) if len(found.hidden) == len(layers[widest].hidden)]
    hidden = [max(units) for units in zip(*(layers[index].hidden for index in alike), strict=True)]
    reference = layers[widest].widened(hidden)
    aligned = [reference if i == widest else align(layers[i].widened(hidden), reference) for i in alike]
    return average(aligned, _shares([usage[members[index]] for index in alike]))


@torch.no_grad()
def fit(model: AnyMoE, smaller: AnyMoE, groups: Groups, batches: Iterable[Tensor]) -> None:
    """Fit the last layer of experts merged from unequal members, so that their outputs match those of the members.

    Each fit is a small ridge regression: on the rows that `model` sends to any of the members, the output should be
    the mean of the members' outputs in proportion to their gate weights. Rows are weighted by the squared sum of these
    weights; the ridge penalty keeps the result close to the average.
    """
    uneven = [
        (place, index, members)
        for place, each in enumerate(groups)
        for index, members in enumerate(each)
        if len({tuple(found.hidden) for m in members if (found := layers_of(model.mixtures[place].experts, m))}) > 1
    ]
    sums: dict[tuple[int, int], list[Any]] = {(place, index): [0.0, 0.0, 0] for place, index, _ in uneven}
    for inputs in batches if uneven else ():
        seen = observe(model, inputs)
        for place, index, members in uneven:
            rows_ND, target_NC, weight_N1 = _targets(model, place, members, seen[place])
            read_NH = inputs_of(smaller, place, index, rows_ND)[-1].double() * weight_N1
            if _last_layer(smaller.mixtures[place].experts, index)[1] is not None:
                read_NH = torch.cat([read_NH, weight_N1], dim=1)
            total = sums[place, index]
            total[0] = total[0] + read_NH.T @ read_NH
            total[1] = total[1] + read_NH.T @ (target_NC.double() * weight_N1)
            total[2] += len(rows_ND)
        if all(rows >= FIT_ROWS for _, _, rows in sums.values()):
            break
    for (place, index), (square_HH, product_HC, rows) in sums.items():
        if rows:
            _solve(smaller.mixtures[place].experts, index, square_HH, product_HC)


def _targets(model: AnyMoE, place: int, members: Sequence[int], seen: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that go to any of the members, the members' outputs in proportion to their weights, and the sum of weights.

    Shapes (N, D), (N, C) and, float64, (N, 1).
    """
    weights_NE = seen.assignments.weights_BE[:, list(members)].double()
    mine_N = weights_NE.sum(dim=1) > 0
    weights_NE, rows_ND = weights_NE[mine_N], seen.rows_ND[mine_N]
    weight_N1 = weights_NE.sum(dim=1, keepdim=True)
    each = [output_of(model, place, member, rows_ND).double() for member in members]
    shares_NE = weights_NE / weight_N1
    target_NC = sum(shares_NE[:, column, None] * output_NC for column, output_NC in enumerate(each))
    return rows_ND, target_NC, weight_N1  # type: ignore[return-value]


def _last_layer(experts: Any, index: int) -> tuple[Tensor, Tensor | None]:
    """Weights (C, H) and bias (C,) of an expert's last layer; the bias is None if it has none."""
    if isinstance(experts, Adapters):
        return experts.up[:, list(experts.units_of(index))], None
    linear = (experts.copies if hasattr(experts, "copies") else experts)[index].linears[-1]
    return linear.weight, linear.bias


def _solve(experts: Any, index: int, square_HH: Tensor, product_HC: Tensor) -> None:
    """Set an expert's last layer to the ridge-regression solution around its present weights."""
    weight_CH, bias_C = _last_layer(experts, index)
    before_HC = weight_CH.T.double()
    if bias_C is not None:
        before_HC = torch.cat([before_HC, bias_C[None].double()])
    ridge_HH = RIDGE * square_HH.diagonal().mean() * torch.eye(len(square_HH), device=square_HH.device).double()
    after_HC = before_HC + torch.linalg.solve(square_HH + ridge_HH, product_HC - square_HH @ before_HC)
    found = layers_of(experts, index)
    assert found is not None
    found.matrices[-1] = after_HC[: weight_CH.shape[1]].T.to(weight_CH.dtype)
    found.out = None if bias_C is None else after_HC[-1].to(bias_C.dtype)
    write_layers(found, experts, index)
