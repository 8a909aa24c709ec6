"""Run a trained model over a split and keep what the scores and the figures need."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from features.bank import FeatureBank
from model.classifier import VisionMoE
from model.routers import Routing

BATCH_SIZE = 1024


@dataclass
class Removals:
    """What the model would do without each of its E experts.

    predicted_EN: the answers once the expert is barred and its samples go to their next choice. before_EE,
    after_EE: row e, the assignments of positive weight, to each expert, of the samples that expert e has a part
    in, with it and without it.
    """

    predicted_EN: np.ndarray
    before_EE: np.ndarray
    after_EE: np.ndarray


@dataclass
class Predictions:
    """A model's answers on N samples, in the order of the split, and its routing as a flat list of A assignments.

    logits_NC: float32. labels_N, sample_A, expert_A: int64. weight_A: float32 gate weights. gate_NE: float32, the
    router's clean logits at its temperature. removals: where they were asked for and there are two experts or more.
    """

    logits_NC: np.ndarray
    labels_N: np.ndarray
    sample_A: np.ndarray
    expert_A: np.ndarray
    weight_A: np.ndarray
    gate_NE: np.ndarray
    removals: Removals | None = None

    @property
    def predicted_N(self) -> np.ndarray:
        """The class of the largest logit."""
        return self.logits_NC.argmax(axis=1)

    @property
    def probs_NC(self) -> np.ndarray:
        """Class probabilities, float32."""
        return torch.from_numpy(self.logits_NC).softmax(dim=1).numpy()

    def loss(self) -> float:
        """Mean cross-entropy in nats, without label smoothing."""
        return float(F.cross_entropy(torch.from_numpy(self.logits_NC), torch.from_numpy(self.labels_N)))


@torch.no_grad()
def predict(model: VisionMoE, bank: FeatureBank, split: str, removals: bool = False) -> Predictions:
    """Answers for every image of a split as it is (no augmentation), with the learned gate and no noise.

    In float32 whatever training used, so that a sample's answer does not depend on its batch beyond rounding.
    removals: ask also what the answers would be without each expert, in the same pass over the features.
    """
    was_training = model.training
    model.eval()
    num_experts = model.moe.router.num_experts
    batches, without = [], []
    seen = 0
    for features, labels_B in bank.batches(split, BATCH_SIZE):
        logits_BC, routing = model(features)
        flat = (routing.sample_A + seen, routing.expert_A, routing.weight_A)
        batches.append((logits_BC, labels_B, *flat, routing.gate_logits_BE))
        if removals and num_experts > 1:
            without.append(_without_each(model, features, logits_BC, routing))
        seen += len(labels_B)
    model.train(was_training)
    columns = (torch.cat(column).cpu().numpy() for column in zip(*batches, strict=True))
    return Predictions(*columns, removals=_join(without) if without else None)


def _without_each(model: VisionMoE, features: Tensor, logits_BC: Tensor, routing: Routing) -> tuple[Tensor, ...]:
    """The columns of `Removals` for one batch. A sample that an expert has no part in keeps its answer."""
    experts_E = torch.arange(routing.num_experts, device=logits_BC.device)
    predicted_EB = logits_BC.argmax(dim=1).repeat(len(experts_E), 1)
    before_EE, after_EE = torch.zeros(2, len(experts_E), len(experts_E), dtype=torch.int64)
    for expert in range(len(experts_E)):
        served_B = torch.zeros(routing.num_samples, dtype=torch.bool, device=logits_BC.device)
        served_B[routing.sample_A[(routing.expert_A == expert) & (routing.weight_A > 0)]] = True
        if not served_B.any():
            continue
        logits_MC, rerouted = model(features[served_B], allowed_E=experts_E != expert)
        predicted_EB[expert, served_B] = logits_MC.argmax(dim=1)
        before_EE[expert] = _visits(routing, served_B[routing.sample_A])
        after_EE[expert] = _visits(rerouted, torch.ones_like(rerouted.expert_A, dtype=torch.bool))
    return predicted_EB, before_EE, after_EE


def _visits(routing: Routing, among_A: Tensor) -> Tensor:
    """Assignments of positive weight to each expert."""
    counted_A = routing.expert_A[among_A & (routing.weight_A > 0)]
    return torch.bincount(counted_A, minlength=routing.num_experts).cpu()


def _join(without: list[tuple[Tensor, ...]]) -> Removals:
    predicted_EB, before_EE, after_EE = zip(*without, strict=True)
    tables = (torch.cat(predicted_EB, dim=1), torch.stack(before_EE).sum(dim=0), torch.stack(after_EE).sum(dim=0))
    return Removals(*(table.cpu().numpy() for table in tables))
