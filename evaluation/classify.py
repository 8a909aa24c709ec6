"""Classification of images with a trained run: the most likely classes, and the chosen experts."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis.blocks import patch_choices
from evaluation.block_routing import BlockRouting, BlockRoutingSums
from evaluation.blocks import patch_grid
from evaluation.trained import TrainedRun
from features.bank import FeatureBank
from features.images import ImageBank
from model.moe_vit import AnyMoE, MoEViT
from model.preparation import prepare
from model.routers import Routing


@dataclass(frozen=True)
class ClassScore:
    """A class and its probability."""

    name: str
    probability: float


@dataclass(frozen=True)
class Vote:
    """The contribution of one expert to a prediction.

    expert: its index. name: index and hidden units. weight: gate weight; inside the ViT its share of the gate weight
    over all tokens and blocks. alone: the most likely class with this expert only, plus the shared experts, if any,
    which process every image.
    """

    expert: int
    name: str
    weight: float
    alone: ClassScore


@dataclass(frozen=True)
class PatchMap:
    """The expert with the largest gate weight for each patch of the image in one block: rows from top to bottom."""

    block: int
    experts: list[list[int]]


@dataclass(frozen=True)
class Answer:
    """The most likely classes and the image's experts, each sorted by decreasing value.

    patches: a map for each block with experts, if each token chooses its experts.
    """

    classes: list[ClassScore]
    experts: list[Vote]
    patches: list[PatchMap] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, for JSON; without patches if there are no maps."""
        values = asdict(self)
        return values if self.patches else {key: value for key, value in values.items() if key != "patches"}


@torch.no_grad()
def classify(trained: TrainedRun, images_BCHW: Tensor, top: int = 5) -> list[Answer]:
    """Predictions for uint8 images (B, 3, H, W), prepared as in training; at most `top` classes each."""
    inputs = _inputs(trained, images_BCHW.to(trained.device))
    logits_BC, routings = trained.model(inputs)
    values_BT, classes_BT = logits_BC.softmax(dim=-1).topk(min(top, logits_BC.shape[1]))
    found = _block_routing(trained.model, routings, len(inputs))
    votes_B = _votes(trained, inputs, routings, found)
    answers = []
    for values_T, classes_T, votes, patches in zip(
        values_BT.tolist(), classes_BT.tolist(), votes_B, _patches(trained.model, found, len(inputs)), strict=True
    ):
        scores = [ClassScore(trained.class_names[c], value) for c, value in zip(classes_T, values_T, strict=True)]
        answers.append(Answer(scores, votes, patches))
    return answers


def _inputs(trained: TrainedRun, images_BCHW: Tensor) -> Tensor:
    """The model's input: the images if the ViT is part of it, else the backbone's features."""
    backbone = trained.backbone
    if isinstance(trained.model, MoEViT):
        return images_BCHW
    return backbone(prepare(images_BCHW, backbone.image_size, backbone.mean, backbone.std))


def _block_routing(model: AnyMoE, routings: Sequence[Routing], images: int) -> BlockRouting | None:
    """The routing in each block, if the experts are inside the ViT."""
    if not isinstance(model, MoEViT):
        return None
    sums = BlockRoutingSums(model.block_places)
    sums.add(routings[: len(model.blocks)], images)
    return sums.result()


def _patches(model: AnyMoE, found: BlockRouting | None, images: int) -> list[list[PatchMap]]:
    """The maps of each image, if there are any."""
    if found is None or found.first_MLT.shape[2] == 1:
        return [[] for _ in range(images)]
    choice_BLHW = patch_choices(found.first_MLT, *patch_grid(model)).tolist()
    return [
        [PatchMap(block, choice_HW) for block, choice_HW in zip(model.blocks, choice_LHW, strict=True)]
        for choice_LHW in choice_BLHW
    ]


def _weights(routings: Sequence[Routing], found: BlockRouting | None, images: int) -> list[dict[int, float]]:
    """The gate weight of each expert of each image; inside the ViT its share over all tokens and blocks."""
    weights: list[dict[int, float]] = [{} for _ in range(images)]
    if found is not None:
        table_NE = found.weight_NLE.sum(axis=1)
        shares_NE = table_NE / table_NE.sum(axis=1, keepdims=True)
        return [{e: float(share) for e, share in enumerate(shares_E) if share > 0} for shares_E in shares_NE]
    (routing,) = routings
    flat = (routing.sample_A.tolist(), routing.expert_A.tolist(), routing.weight_A.tolist())
    for sample, expert, weight in zip(*flat, strict=True):
        weights[sample][expert] = weights[sample].get(expert, 0.0) + weight
    return weights


def _votes(
    trained: TrainedRun, inputs: Tensor, routings: Sequence[Routing], found: BlockRouting | None
) -> list[list[Vote]]:
    """The experts of each sample, largest weight first; weights of repeated experts are summed."""
    weights = _weights(routings, found, len(inputs))
    asked = sorted(
        set().union(*weights)
    )  # only experts that are used, because others might have to be copied from host memory
    tables = (table.tolist() for table in alone_probabilities(trained.model, inputs, asked).max(dim=-1))
    alone_EB, said_EB = (dict(zip(asked, table, strict=True)) for table in tables)
    labels, names = trained.config.experts.labels(), trained.class_names
    votes = []
    for sample, chosen in enumerate(weights):
        alone = {e: ClassScore(names[said_EB[e][sample]], alone_EB[e][sample]) for e in chosen}
        order = sorted(chosen, key=lambda expert: -chosen[expert])
        votes.append([Vote(e, labels[e], chosen[e], alone[e]) for e in order])
    return votes


@torch.no_grad()
def alone_probabilities(model: AnyMoE, inputs: Tensor, experts: Sequence[int] | None = None) -> Tensor:
    """Class probabilities (E, B, C) if every gate may choose only one expert; `model` in evaluation mode.

    experts: the experts to evaluate (None: all). Shared experts are included in every case.
    """
    each_EE = torch.eye(model.mixtures[0].router.num_experts, dtype=torch.bool, device=inputs.device)
    each_EE = each_EE if experts is None else each_EE[list(experts)]
    return torch.stack([model(inputs, allowed_E=allowed_E)[0].softmax(dim=-1) for allowed_E in each_EE])


def answers_alone(model: AnyMoE, bank: FeatureBank | ImageBank, split: str) -> tuple[np.ndarray, np.ndarray]:
    """The prediction of each expert alone for each image of a split: classes (E, N) int64, probabilities (E, N)."""
    parts = [
        alone_probabilities(model, features).max(dim=-1) for features, _ in bank.batches(split, bank.evaluation_batch)
    ]
    values, classes = (torch.cat(column, dim=1).cpu().numpy() for column in zip(*parts, strict=True))
    return classes, values
