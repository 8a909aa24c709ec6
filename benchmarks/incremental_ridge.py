"""Heads of benchmarks/incremental.py without gradients: class means and ridge regression, from sums over images."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import Limit
from benchmarks.incremental_scores import Scores, Stream

PENALTIES = tuple(10.0**power for power in range(-1, 8))
CHUNK = 4096  # rows of random features per chunk


def normalised(features_NF: Tensor, groups: int) -> Tensor:
    """Normalise each of the equally wide features to mean 0 and variance 1; float32. Depends only on the sample."""
    parts = features_NF.float().unflatten(1, (groups, -1))
    return F.layer_norm(parts, parts.shape[2:]).flatten(1)


def class_means(stream: Stream, data: Any, limit: Limit) -> dict[str, Any]:
    """Nearest class mean by cosine similarity, over all views."""
    scores, means, device = Scores(stream), {}, data.labels_N.device
    for step, classes in enumerate(stream.classes):
        limit.check()
        for label in classes:
            rows = torch.nonzero(data.labels_N == label).flatten()
            views = [normalised(view_NF[rows], data.groups).mean(dim=0) for view_NF in data.train_VNF]
            means[label] = F.normalize(torch.stack(views).mean(dim=0), dim=0)
        seen = stream.seen(step)
        means_CF = torch.stack([means[label] for label in seen])
        scores.add(lambda split, rows, to=means_CF, seen=seen: _answered(data, split, rows, to.T, seen, lambda x: x))
    return scores.result(device)


def _answered(data: Any, split: str, rows: Tensor, weight_MC: Tensor, seen: list[int], project: Any) -> Tensor:
    """The class with the highest product, for rows of a split."""
    features_NF = getattr(data, split)[0]
    parts = rows.to(features_NF.device).split(CHUNK)
    return named(torch.cat([project(normalised(features_NF[part], data.groups)) @ weight_MC for part in parts]), seen)


def named(scores_MC: Tensor, seen: list[int]) -> Tensor:
    """The class with the highest score. seen: the class of each column."""
    return torch.tensor(seen)[scores_MC.argmax(dim=1).cpu()]


class Projection:
    """relu(x W) with a fixed random normal W (RanPAC, McDonnell 2023); x itself if the number is 0."""

    def __init__(self, width: int, number: int, seed: int, device: torch.device):
        self.matrix_FM = None
        if number:
            generator = torch.Generator().manual_seed(seed)
            self.matrix_FM = (torch.randn(width, number, generator=generator) / width**0.5).to(device)

    def __call__(self, x_NF: Tensor) -> Tensor:
        return x_NF if self.matrix_FM is None else F.relu(x_NF @ self.matrix_FM)


def ridge(stream: Stream, data: Any, random_features: int, seed: int, limit: Limit) -> dict[str, Any]:
    """Ridge regression onto one-hot classes, (G + penalty I)^-1 Q, with G = sum h h' and Q = sum h y' over the images.

    Each step adds its images of all views to the sums, and needs no old images. The penalty is the one with the
    smallest squared error on validation images of the step's own classes.
    """
    scores, device, chosen = Scores(stream), data.labels_N.device, []
    project = Projection(data.train_VNF.shape[2], random_features, seed, device)
    count, width = len(stream.seen(len(stream.classes))), random_features or data.train_VNF.shape[2]
    gram_MM = torch.zeros(width, width, dtype=torch.float64, device=device)
    sums_MC = torch.zeros(width, count, dtype=torch.float64, device=device)
    for step, classes in enumerate(stream.classes):
        seen = stream.seen(step)
        for view_NF in data.train_VNF:
            limit.check()
            for rows in stream.rows[step].to(device).split(CHUNK):
                hidden_BM = project(normalised(view_NF[rows], data.groups)).double()
                gram_MM += hidden_BM.T @ hidden_BM
                sums_MC += hidden_BM.T @ F.one_hot(data.labels_N[rows], count).double()
        own = stream.among("validation", classes).to(device)
        held_BM = project(normalised(data.validation[0][own], data.groups)).double()
        target_BC = F.one_hot(data.validation[1][own], count).double()
        errors, weights = {}, {}
        for penalty in PENALTIES:
            weights[penalty] = solve(gram_MM, sums_MC, penalty)
            errors[penalty] = float((held_BM @ weights[penalty] - target_BC).square().mean().nan_to_num(nan=torch.inf))
        best = min(errors, key=errors.__getitem__)
        chosen.append(best)
        weight_MC = weights[best][:, torch.tensor(seen, device=device)].float()
        scores.add(lambda split, rows, to=weight_MC, seen=seen: _answered(data, split, rows, to, seen, project))
    return scores.result(device, penalties=chosen)


def solve(gram_MM: Tensor, sums_MC: Tensor, penalty: float) -> Tensor:
    """(G + penalty I)^-1 Q; NaN if the matrix is not positive definite because of rounding."""
    damped_MM = gram_MM.clone()
    damped_MM.diagonal().add_(penalty)
    factor_MM, fault = torch.linalg.cholesky_ex(damped_MM)
    return torch.full_like(sums_MC, torch.nan) if int(fault) else torch.cholesky_solve(sums_MC, factor_MM)
