"""Results for each block with experts, and the ablation of experts in single blocks."""

from typing import Any

import numpy as np
import torch

from analysis import experts, routing
from analysis.blocks import block_specialisation, most_specialised
from common.distributed import world
from common.meter import meter
from data.image_set import ImageSet
from evaluation.block_routing import BlockRouting
from evaluation.predictions import Predictions
from evaluation.together import own_part
from features.images import ImageBank
from model.moe_vit import MoEViT

WORTH_IMAGES = 2048  # images for the ablation of experts in single blocks, on a GPU


def block_results(
    predictions: Predictions, test: ImageSet, target_E: np.ndarray, without_LEM: np.ndarray | None = None
) -> dict[str, Any]:
    """The part of metrics.json on single blocks; empty if the experts are behind the ViT.

    `specialisation` is that of the most specialised block. target_E: target load of each expert. without_LEM:
    predictions for the first M test images without an expert in one block (None: not computed).
    """
    found = predictions.blocks
    if found is None:
        return {}
    labels_N, group_C = predictions.labels_N, test.superclass_of_class()
    special = block_specialisation(labels_N, found.weight_NLE, test.num_classes)
    rows: list[dict[str, Any]] = [
        {
            "block": int(place.removeprefix("block_")),
            "expert_load": load_E.tolist(),
            "expert_importance": importance_E.tolist(),
            "expert_underused": routing.underused(load_E, target_E).tolist(),
            "specialisation": specialisation,
        }
        for place, load_E, importance_E, specialisation in zip(
            found.places, found.load_LE, found.importance_LE, special, strict=True
        )
    ]
    _add_shares(rows, "expert_by_class_weight", found, labels_N, test.num_classes)
    if group_C is not None:
        _add_shares(rows, "expert_by_superclass_weight", found, group_C[labels_N], len(test.coarse_names))
    for row, without_EM in zip(rows, () if without_LEM is None else without_LEM, strict=False):
        count = without_EM.shape[1]
        answers = (labels_N[:count], predictions.predicted_N[:count], without_EM)
        columns = experts.removal(*answers, test.num_classes)
        row["expert_worth"] = {key: values_E.tolist() for key, values_E in columns.items()} | {"images": count}
    first = rows[most_specialised(special)[0]]
    return {"blocks": rows, "most_specialised_block": first["block"], "specialisation": first["specialisation"]}


def _add_shares(rows: list[dict[str, Any]], key: str, found: BlockRouting, labels_N: np.ndarray, count: int) -> None:
    """Add the distribution of each class's weight over the experts to each block's row."""
    for row, table_CE in zip(rows, found.by_class(labels_N, count), strict=True):
        row[key] = (table_CE / table_CE.sum(axis=1, keepdims=True).clip(min=1e-30)).tolist()


def hardly_used(results: dict[str, Any]) -> list[str]:
    """For each expert "below 1 % of the load", with the affected blocks, or an empty text."""
    said = []
    for expert, mark in enumerate(results["expert_underused"]):
        blocks = [str(row["block"]) for row in results.get("blocks", []) if row["expert_underused"][expert]]
        where = f" in block{'s' * (len(blocks) > 1)} {', '.join(blocks)}" if blocks else ""
        said.append(f"below 1 % of the load{where}" if mark or blocks else "")
    return said


@torch.no_grad()
def without_each_in_one_block(model: MoEViT, bank: ImageBank, split: str, images: int) -> np.ndarray:
    """The predictions (L, E, M) for the first M images of a split without expert e in block l.

    model: in evaluation mode. images: minimum M, rounded up to whole batches, at most the split.
    """
    blocks, num_experts = len(model.blocks), model.mixtures[0].router.num_experts
    size = bank.evaluation_batch
    count = min(len(bank.splits[split]), -(-images // size) * size)
    order_M, batches = own_part(count), []
    with meter("without each expert of each block", len(order_M)) as done:
        for inputs, _ in bank.batches(split, size, order_M):
            batch_LE = []
            for place in np.ndindex(blocks, num_experts):
                allowed_LE = torch.ones(blocks, num_experts, dtype=torch.bool, device=inputs.device)
                allowed_LE[place] = False
                batch_LE.append(model(inputs, allowed_E=allowed_LE)[0].argmax(dim=1))
            batches.append(torch.stack(batch_LE))
            done(len(inputs))
    own_LEM = torch.cat(batches, dim=1).view(blocks, num_experts, -1).cpu().numpy()
    return own_LEM if len(order_M) == count else np.concatenate(world().gather(own_LEM), axis=2)


def patch_grid(model: MoEViT) -> tuple[int, int]:
    """Rows and columns of the patches of an image."""
    rows, columns = model.backbone.vit.patch_embed.grid_size
    return int(rows), int(columns)
