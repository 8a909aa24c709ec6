"""Images of any source through a trained run: the likeliest classes, and the experts that decided."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from engine.loading import TrainedRun
from engine.pipeline import Extractor


@dataclass(frozen=True)
class ClassScore:
    """A class and its probability."""

    name: str
    probability: float


@dataclass(frozen=True)
class Vote:
    """What one expert contributed to an answer.

    expert: its index. name: index and hidden units. weight: of the gate, what its output counted. alone: the
    likeliest class if this expert had answered by itself.
    """

    expert: int
    name: str
    weight: float
    alone: ClassScore


@dataclass(frozen=True)
class Answer:
    """The likeliest classes, likeliest first, and the experts that saw the image, heaviest first."""

    classes: list[ClassScore]
    experts: list[Vote]

    def to_dict(self) -> dict[str, Any]:
        """Nested plain values, for JSON."""
        return asdict(self)


@torch.no_grad()
def classify(trained: TrainedRun, images_BCHW: Tensor, top: int = 5) -> list[Answer]:
    """Answers for uint8 images (B, 3, H, W), prepared as in training; at most `top` classes each."""
    features = Extractor(trained.backbone)(images_BCHW.to(trained.device))
    logits_BC, routing = trained.model(features)
    values_BT, classes_BT = logits_BC.softmax(dim=-1).topk(min(top, logits_BC.shape[1]))
    alone_BE = _alone(trained, features)
    votes: list[list[Vote]] = [[] for _ in images_BCHW]
    flat = (routing.sample_A.tolist(), routing.expert_A.tolist(), routing.weight_A.tolist())
    labels = trained.config.experts.labels()
    for sample, expert, weight in zip(*flat, strict=True):
        votes[sample].append(Vote(expert, labels[expert], weight, alone_BE[sample][expert]))
    answers = []
    for values_T, classes_T, mine in zip(values_BT.tolist(), classes_BT.tolist(), votes, strict=True):
        scores = [ClassScore(trained.class_names[c], value) for c, value in zip(classes_T, values_T, strict=True)]
        answers.append(Answer(scores, sorted(mine, key=lambda vote: -vote.weight)))
    return answers


def _alone(trained: TrainedRun, features: Tensor) -> list[list[ClassScore]]:
    """For each sample and expert, the likeliest class where the gate may choose that expert only."""
    per_expert = []
    for allowed_E in torch.eye(len(trained.model.moe.experts), dtype=torch.bool, device=trained.device):
        logits_BC, _ = trained.model(features, allowed_E=allowed_E)
        values_B, classes_B = logits_BC.softmax(dim=-1).max(dim=-1)
        pairs = zip(values_B.tolist(), classes_B.tolist(), strict=True)
        per_expert.append([ClassScore(trained.class_names[c], value) for value, c in pairs])
    return [list(row) for row in zip(*per_expert, strict=True)]
