"""The quality of frozen features: logistic regression and k nearest neighbours. Only this file uses labels."""

import torch
import torch.nn.functional as F
from torch import Tensor

L2_GRID = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


def probe(train_ND: Tensor, train_N: Tensor, test_MD: Tensor, test_M: Tensor, seed: int) -> dict[str, float]:
    """Scores in percent of both probes on the test features, and the selected L2 weight.

    train_ND, test_MD: features, standardised here with the train statistics. train_N, test_M: int64 labels.
    """
    classes = int(max(train_N.max(), test_M.max())) + 1
    mean_D, std_D = train_ND.float().mean(0), train_ND.float().std(0).clamp_min(1e-6)
    train_ND, test_MD = ((x.float() - mean_D) / std_D for x in (train_ND, test_MD))
    l2 = _choose_l2(train_ND, train_N, classes, seed)
    weight_DC, bias_C = _fit_logistic(train_ND, train_N, classes, l2, iterations=200)
    linear_M = (test_MD @ weight_DC + bias_C).argmax(1)
    neighbour_M = _nearest_neighbours(train_ND, train_N, test_MD, classes)
    return {
        "logistic_accuracy": _accuracy(linear_M, test_M),
        "logistic_macro_f1": _macro_f1(linear_M, test_M, classes),
        "knn_accuracy": _accuracy(neighbour_M, test_M),
        "knn_macro_f1": _macro_f1(neighbour_M, test_M, classes),
        "logistic_l2": l2,
        "features": train_ND.shape[1],
    }


def _fit_logistic(x_ND: Tensor, y_N: Tensor, classes: int, l2: float, iterations: int) -> tuple[Tensor, Tensor]:
    """Weights (D, C) and bias (C,) minimising mean cross-entropy + l2 / 2 * |W|^2, by L-BFGS from zero."""
    weight_DC = torch.zeros(x_ND.shape[1], classes, device=x_ND.device, requires_grad=True)
    bias_C = torch.zeros(classes, device=x_ND.device, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight_DC, bias_C], max_iter=iterations, history_size=10, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x_ND @ weight_DC + bias_C, y_N) + l2 / 2 * weight_DC.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight_DC.detach(), bias_C.detach()


def _choose_l2(x_ND: Tensor, y_N: Tensor, classes: int, seed: int) -> float:
    """The L2 weight of the grid with the best accuracy on a random tenth of the training samples."""
    order_N = torch.randperm(len(x_ND), generator=torch.Generator().manual_seed(seed)).to(x_ND.device)
    held, rest = order_N[: len(x_ND) // 10], order_N[len(x_ND) // 10 :]
    scores = []
    for l2 in L2_GRID:
        weight_DC, bias_C = _fit_logistic(x_ND[rest], y_N[rest], classes, l2, iterations=100)
        scores.append(_accuracy((x_ND[held] @ weight_DC + bias_C).argmax(1), y_N[held]))
    return L2_GRID[scores.index(max(scores))]


def _nearest_neighbours(train_ND: Tensor, train_N: Tensor, test_MD: Tensor, classes: int, k: int = 20) -> Tensor:
    """Predicted classes (M,): cosine similarity; the k nearest vote with weight exp(similarity / 0.07)."""
    train_ND = F.normalize(train_ND, dim=1)
    predictions = []
    for chunk_BD in F.normalize(test_MD, dim=1).split(1000):
        similarity_BK, index_BK = (chunk_BD @ train_ND.T).topk(min(k, len(train_ND)), dim=1)
        votes_BC = torch.zeros(len(chunk_BD), classes, device=chunk_BD.device)
        votes_BC.scatter_add_(1, train_N[index_BK], (similarity_BK / 0.07).exp())
        predictions.append(votes_BC.argmax(1))
    return torch.cat(predictions)


def _accuracy(predicted_N: Tensor, true_N: Tensor) -> float:
    return 100 * (predicted_N == true_N).float().mean().item()


def _macro_f1(predicted_N: Tensor, true_N: Tensor, classes: int) -> float:
    """Mean over the classes of 2 TP / (2 TP + FP + FN), in percent; a class that never occurs counts as 0."""
    hits_C = torch.bincount(true_N[predicted_N == true_N], minlength=classes).float()
    total_C = torch.bincount(predicted_N, minlength=classes) + torch.bincount(true_N, minlength=classes)
    return 100 * (2 * hits_C / total_C.clamp_min(1)).mean().item()
