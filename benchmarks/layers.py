"""The contestants of benchmarks/dispatch.py: mixture-of-experts layers with a common interface and equal FLOPs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from model.dispatch import DISPATCHERS
from model.experts import ExpertsConfig
from model.moe import MixtureOfExperts
from model.routers import RouterConfig

GRAPH = "ours: CUDA graph"
GROUP = 1024  # group size for libraries with a dispatch tensor, which grows with its square


@dataclass(frozen=True)
class Shape:
    """A layer: input features, hidden units of each expert, output classes, experts per sample."""

    features: int
    hidden: tuple[int, ...]
    classes: int
    top_k: int

    @property
    def equal(self) -> bool:
        return len(set(self.hidden)) == 1

    def square(self, matrices: int = 2) -> list[int]:
        """Hidden units of experts with `features` outputs and this number of matrices, at the same FLOPs."""
        scale = (self.features + self.classes) / (matrices * self.features)
        return [max(8, 8 * round(units * scale / 8)) for units in self.hidden]


Layer = tuple[nn.Module, Callable[[Tensor], Tensor]]


def ours(shape: Shape, mode: str = "auto") -> MixtureOfExperts:
    """This project's layer, including gate and norms."""
    experts = ExpertsConfig(sizes=[[units] for units in shape.hidden], dropout=0.0, dispatch=mode)
    router = RouterConfig(top_k=shape.top_k, norm="none")
    layer = MixtureOfExperts(shape.features, shape.classes, router, experts).train()
    nn.init.normal_(
        layer.router.gate.weight, std=shape.features**-0.5
    )  # initialised with zeros, it would send everything to one expert
    return layer


def contestants(shape: Shape, device: torch.device) -> Iterator[tuple[str, Callable[[], Layer]]]:
    """Name and constructor of each layer; a constructor raises if its library is missing or does not support this
    shape.

    GRAPH dispatches like the captured steps of train.py; the caller captures it.
    If a library's layer has as many outputs as inputs, its hidden layers are sized for equal FLOPs.
    """
    with torch.device(device):
        layer = ours(shape)
    for mode in ("auto", *DISPATCHERS):
        yield f"ours: {mode}", lambda mode=mode: (layer, _forced(layer, mode))
    if device.type == "cuda":
        yield GRAPH, lambda: (layer, _forced(layer, "static"))
    yield "article loop", lambda: (layer, lambda x_BD: article_loop(layer.experts, x_BD, *_gate(layer, x_BD)))
    yield "dense oracle", lambda: (layer, lambda x_BD: dense_oracle(layer, x_BD))
    yield "mixture-of-experts", lambda: mixture_of_experts(shape, device)
    yield "st-moe-pytorch", lambda: st_moe(shape, device)
    yield "Mixtral", lambda: mixtral(shape, device)
    yield "Mixtral grouped_mm", lambda: mixtral(shape, device, "grouped_mm")


def _forced(layer: MixtureOfExperts, mode: str) -> Callable[[Tensor], Tensor]:
    def forward(x_BD: Tensor) -> Tensor:
        layer.dispatch_mode = mode
        return layer(x_BD)[0]

    return forward


def _gate(layer: MixtureOfExperts, x_BD: Tensor) -> tuple[Tensor, Tensor]:
    routing = layer.router(x_BD)
    shape = (len(x_BD), layer.router.top_k)
    return routing.expert_A.view(shape), routing.weight_A.view(shape)


def article_loop(experts: nn.ModuleList, x_BD: Tensor, expert_BK: Tensor, weight_BK: Tensor) -> Tensor:
    """As in the reference recipe: a mask for each choice and each expert."""
    out_BC = None
    for choice in range(expert_BK.shape[1]):
        for expert in expert_BK[:, choice].unique():
            mask_B = expert_BK[:, choice] == expert
            answer = experts[int(expert)](x_BD[mask_B]).float() * weight_BK[mask_B, choice, None]
            out_BC = answer.new_zeros(len(x_BD), answer.shape[1]) if out_BC is None else out_BC
            out_BC[mask_B] += answer
    return out_BC


def dense_oracle(layer: MixtureOfExperts, x_BD: Tensor) -> Tensor:
    """Every expert on every sample, weighted by a matrix that is zero for experts that the gate did not choose."""
    expert_BK, weight_BK = _gate(layer, x_BD)
    zeros_BE = weight_BK.new_zeros(len(x_BD), len(layer.experts))
    weight_BE = zeros_BE.scatter(1, expert_BK, weight_BK)
    return sum(expert(x_BD).float() * weight_BE[:, e, None] for e, expert in enumerate(layer.experts))


def _in_groups(x_BD: Tensor) -> Tensor:
    return x_BD.reshape(-1, min(GROUP, len(x_BD)), x_BD.shape[1])


def mixture_of_experts(shape: Shape, device: torch.device) -> Layer:
    """PyPI `mixture-of-experts`: top-2, equal experts, drops samples above 1.25 times an even load."""
    from mixture_of_experts import MoE

    if shape.top_k != 2 or not shape.equal:
        raise ValueError("supports only top-2 of equal experts")
    with torch.device(device):
        layer = MoE(dim=shape.features, num_experts=len(shape.hidden), hidden_dim=shape.square()[0]).train()
    return layer, lambda x_BD: layer(_in_groups(x_BD))[0]


def st_moe(shape: Shape, device: torch.device) -> Layer:
    """PyPI `st-moe-pytorch`: top-k of at least 2, drops samples above 1.25 times an even load."""
    from st_moe_pytorch import MoE

    if shape.top_k < 2:
        raise ValueError("supports only top-2 and more")

    def expert(units: int) -> nn.Module:
        return nn.Sequential(nn.Linear(shape.features, units), nn.ReLU(), nn.Linear(units, shape.features))

    with torch.device(device):
        experts = nn.ModuleList(expert(units) for units in shape.square())
        layer = MoE(
            dim=shape.features,
            num_experts=len(experts),
            gating_top_n=shape.top_k,
            experts=experts,
            is_distributed=False,
        ).train()
    return layer, lambda x_BD: layer(_in_groups(x_BD)).outputs


def mixtral(shape: Shape, device: torch.device, implementation: str | None = None) -> Layer:
    """Hugging Face's Mixtral sparse block: equal experts of three matrices, weights in bfloat16 on a GPU."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    if not shape.equal:
        raise ValueError("supports only equal experts")
    config = MixtralConfig(
        hidden_size=shape.features,
        intermediate_size=shape.square(matrices=3)[0],
        num_local_experts=len(shape.hidden),
        num_experts_per_tok=shape.top_k,
    )
    if implementation is not None:
        if not hasattr(config, "_experts_implementation"):
            raise ValueError("this version of transformers has only one implementation")
        config._experts_implementation = implementation
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        layer = MixtralSparseMoeBlock(config).to(dtype).train()
    with torch.no_grad():
        for parameter in layer.parameters():  # some versions leave them uninitialised
            parameter.normal_(std=0.02)

    def forward(x_BD: Tensor) -> Tensor:
        with torch.autocast(device.type, enabled=False):
            out = layer(x_BD.to(dtype)[None])
        return out[0] if isinstance(out, tuple) else out

    return layer, forward
