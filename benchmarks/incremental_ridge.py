"""Heads of benchmarks/incremental.py that need no gradient: class means and ridge regression, by sums over images."""

import time
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.common import synchronise
from benchmarks.incremental_scores import Stream, by_step, scored

PENALTIES = tuple(10.0**power for power in range(-1, 8))
CHUNK = 4096  # rows of random features at once


def normalised(features_NF: Tensor, groups: int) -> Tensor:
    """Each of the equally wide features by itself: mean 0, variance 1; float32. A function of the sample alone."""
    parts = features_NF.float().unflatten(1, (groups, -1))
    return F.layer_norm(parts, parts.shape[2:]).flatten(1)


def class_means(stream: Stream, data: Any) -> dict[str, Any]:
    """Nearest class mean by cosine, of all views."""
    began, accuracy_TT, means = time.perf_counter(), [], {}
    for step, classes in enumerate(stream.classes):
        for label in classes:
            rows = torch.nonzero(data.labels_N == label).flatten()
            views = [normalised(view_NF[rows], data.groups).mean(dim=0) for view_NF in data.train_VNF]
            means[label] = F.normalize(torch.stack(views).mean(dim=0), dim=0)
        seen = stream.seen(step)
        rows = stream.among("test", seen).to(data.labels_N.device)
        scores_MC = normalised(data.test[0][rows], data.groups) @ torch.stack([means[label] for label in seen]).T
        accuracy_TT.append(by_step(stream, step, named(scores_MC, seen), rows.cpu()))
    synchronise(data.labels_N.device)
    return scored(stream, accuracy_TT, time.perf_counter() - began)


def named(scores_MC: Tensor, seen: list[int]) -> Tensor:
    """The class of the highest score. seen: the class of each column."""
    return torch.tensor(seen)[scores_MC.argmax(dim=1).cpu()]


class Projection:
    """relu(x W) with a fixed random W of normal numbers (RanPAC, McDonnell 2023); x itself where 0 are asked for."""

    def __init__(self, width: int, number: int, seed: int, device: torch.device):
        self.matrix_FM = None
        if number:
            generator = torch.Generator().manual_seed(seed)
            self.matrix_FM = (torch.randn(width, number, generator=generator) / width**0.5).to(device)

    def __call__(self, x_NF: Tensor) -> Tensor:
        return x_NF if self.matrix_FM is None else F.relu(x_NF @ self.matrix_FM)


def ridge(stream: Stream, data: Any, random_features: int, seed: int) -> dict[str, Any]:
    """Ridge regression onto one-hot classes, (G + penalty I)^-1 Q, with G = sum h h' and Q = sum h y' over the images.

    Each step adds its images of all views to the sums, and needs no old one. The penalty is that of the least squared
    error on validation images of the step's own classes.
    """
    began, device, accuracy_TT, chosen = time.perf_counter(), data.labels_N.device, [], []
    project = Projection(data.train_VNF.shape[2], random_features, seed, device)
    count, width = len(stream.seen(len(stream.classes))), random_features or data.train_VNF.shape[2]
    gram_MM = torch.zeros(width, width, dtype=torch.float64, device=device)
    sums_MC = torch.zeros(width, count, dtype=torch.float64, device=device)
    for step, classes in enumerate(stream.classes):
        seen = stream.seen(step)
        for view_NF in data.train_VNF:
            for rows in stream.rows[step].to(device).split(CHUNK):
                hidden_BM = project(normalised(view_NF[rows], data.groups))
                target_BC = F.one_hot(data.labels_N[rows], count).float()
                # Products of a few thousand rows in float32, sums of them in float64.
                gram_MM += (hidden_BM.T @ hidden_BM).double()
                sums_MC += (hidden_BM.T @ target_BC).double()
        own = stream.among("validation", classes).to(device)
        held_BM = project(normalised(data.validation[0][own], data.groups)).double()
        target_BC = F.one_hot(data.validation[1][own], count).double()
        errors, weights = {}, {}
        for penalty in PENALTIES:
            weights[penalty] = solve(gram_MM, sums_MC, penalty)
            errors[penalty] = float((held_BM @ weights[penalty] - target_BC).square().mean())
        best = min(errors, key=errors.__getitem__)
        chosen.append(best)
        rows = stream.among("test", seen).to(device)
        weight_MC = weights[best][:, torch.tensor(seen, device=device)].float()
        scores_MC = [project(normalised(data.test[0][part], data.groups)) @ weight_MC for part in rows.split(CHUNK)]
        accuracy_TT.append(by_step(stream, step, named(torch.cat(scores_MC), seen), rows.cpu()))
    synchronise(device)
    return scored(stream, accuracy_TT, time.perf_counter() - began, penalties=chosen)


def solve(gram_MM: Tensor, sums_MC: Tensor, penalty: float) -> Tensor:
    """(G + penalty I)^-1 Q."""
    damped_MM = gram_MM.clone()
    damped_MM.diagonal().add_(penalty)
    return torch.cholesky_solve(sums_MC, torch.linalg.cholesky(damped_MM))
