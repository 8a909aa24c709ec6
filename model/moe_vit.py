"""MoEViT: a frozen ViT with mixtures of experts in its blocks, and a linear head."""

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .backbone import Backbone
from .blocks import BlockMixture, check_block_parts
from .classifier import NECKS, NeckConfig, VisionMoE
from .errors import one_line
from .experts import ExpertsConfig
from .moe import MixtureOfExperts
from .preparation import prepare
from .quantised import linear_matrices, store
from .routers import RouterConfig, Routing
from .spread import is_spread
from .vit_parts import add_ffn, attend, check_vit, drop_patches, embed, pool


class MoEViT(nn.Module):
    """Images (B, 3, H, W) -> class logits (B, C), through a frozen ViT with experts in some of its blocks.

    In each of experts.blocks a gate sends every token, or every image, to k of E experts in parallel to the block's
    frozen FFN, which processes every token (V-MoE, Riquelme 2021, on a frozen ViT): y = x + ffn(norm x) +
    sum_e g_e expert_e(norm x), with the ViT's layer scale on both parts. The head reads backbone.features after the
    final norm of the ViT. It consists of the neck and one linear layer, or a mixture with the sizes of experts.head,
    whose routing comes last.

    The ViT is that of `backbone`, and is shared by all copies of this model: it is not among the parameters, the
    buffers or the state. Gradients flow back to the first block with experts. Raises ValueError if the parts do not
    fit each other.

    recompute: whether the backward pass recomputes attention and FFNs, to store fewer activations.
    """

    def __init__(
        self, backbone: Backbone, num_classes: int, neck: NeckConfig, router: RouterConfig, experts: ExpertsConfig
    ):
        super().__init__()
        check_block_parts(neck, router, experts)
        self._frozen = _Shared(backbone)
        self.first_new = experts.first_new
        self.blocks = resolve_blocks(experts, backbone)
        self.places = tuple(f"block_{block}" for block in self.blocks)
        self._compiled, self._compiled_for = run_block, frozenset()
        self.recompute = False
        vit = backbone.vit
        self.width, self.num_tokens = vit.embed_dim, vit.patch_embed.num_patches + vit.num_prefix_tokens
        prefix = int(vit.num_prefix_tokens)
        parts = (vit.embed_dim, router, experts)
        self.mixtures: Any = nn.ModuleList(
            BlockMixture(*parts, vit.blocks[block].mlp, backbone.has_class_token, prefix) for block in self.blocks
        )
        self.neck = NECKS[neck.kind]((len(backbone.features) * vit.embed_dim,), neck, len(backbone.features))
        self.dropout = nn.Dropout(neck.dropout)
        self.head = None if experts.head else nn.Linear(self.neck.out_features, num_classes)
        if self.head is not None:
            store(linear_matrices(self.head, 0), [experts.head_weights])
        if experts.head:
            new = [] if self.first_new is None else experts.head[self.first_new :]
            on_top = ExpertsConfig(sizes=experts.head, weights=experts.weights, grown=experts.grown, add=new)
            self.mixtures.append(MixtureOfExperts(self.neck.out_features, num_classes, router, on_top))
            self.places += ("head",)

    @property
    def backbone(self) -> Backbone:
        """The frozen ViT with its preprocessing."""
        return self._frozen.part

    @property
    def static_shapes(self) -> bool:
        """Whether a training step never waits to know how many tokens an expert has."""
        return all(mixture.static_shapes for mixture in self.mixtures)

    def forward(
        self,
        images_BCHW: Tensor,
        warmup: bool = False,
        allowed_E: Tensor | None = None,
        patch_dropout: float = 0.0,
        static: bool = False,
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """Logits (B, C) in float32, and the routing at each of `places`.

        images_BCHW: uint8 of any size, or floating-point numbers from `prepare`. warmup: route at random.
        allowed_E: bool, the experts that may be chosen in all blocks, or (L, E) in each (None: all). patch_dropout:
        fraction of the patch tokens that are dropped at random from each image (PatchDropout, Liu 2022); raises
        ValueError if the ViT has rotary embeddings. static: the mixture on top uses a dispatch mode for CUDA graphs.
        """
        images_BCHW = self.prepare(images_BCHW)
        # Autocast would normalise in float32; the experts use the ViT's number format too. Gates are always float32.
        own = self.backbone.dtype != torch.float32
        with torch.autocast(images_BCHW.device.type, enabled=False) if own else nullcontext():
            features_BF, routings = self._features(images_BCHW, warmup, allowed_E, patch_dropout)
        if self.training:
            for mixture, routing in zip(self.mixtures, routings, strict=False):
                mixture.count(routing)
        features_BF = self.dropout(self.neck(features_BF))
        if self.head is not None:
            return self.head(features_BF).float(), routings
        logits_BC, routing = self.mixtures[-1](features_BF, warmup, static=static or features_BF.is_cuda)
        return logits_BC, (*routings, routing)

    def on(self, backbone: Backbone) -> "MoEViT":
        """An uncompiled copy of this model on the device of `backbone`, which becomes its frozen ViT."""
        other = copy.deepcopy(self).to(next(backbone.parameters()).device)
        other._frozen, other._compiled, other._compiled_for = _Shared(backbone), run_block, frozenset()
        return other

    @property
    def block_places(self) -> tuple[str, ...]:
        """The places inside the ViT, whose routings come first."""
        return self.places[: len(self.blocks)]

    def prepare(self, images_BCHW: Tensor) -> Tensor:
        """uint8 images resized and normalised for the ViT, float32; other images are returned unchanged."""
        if images_BCHW.dtype != torch.uint8:
            return images_BCHW
        return prepare(images_BCHW, self.backbone.image_size, self.backbone.mean, self.backbone.std)

    def _features(
        self, images_BCHW: Tensor, warmup: bool, allowed_E: Tensor | None, patch_dropout: float = 0.0
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        """The input of the head, float32 (B, F), and the routings."""
        backbone = self.backbone
        vit = backbone.runner(images_BCHW.device)
        # Where nothing is compiled the number of images must not be looked at: an export is for any number.
        whole = bool(self._compiled_for) and len(images_BCHW) in self._compiled_for
        compiled = self._compiled if whole else run_block
        x_BTD, ropes = embed(vit, images_BCHW.to(backbone.dtype))
        if patch_dropout:
            if ropes[0] is not None:
                raise ValueError("train.patch_dropout does not work for a ViT with rotary embeddings: set it to 0")
            x_BTD = drop_patches(x_BTD, int(vit.num_prefix_tokens), patch_dropout)
        mixtures = dict(zip(self.blocks, self.mixtures, strict=False))
        allowed = self._allowed(allowed_E, always=whole and not self.training)
        routings, normed = [], {}
        for index in range(backbone.blocks[-1] + 1):
            mixture, keep = mixtures.get(index), not (self.recompute and x_BTD.requires_grad)
            options = (None, False, None) if mixture is None else (mixture, warmup, allowed[len(routings)])
            # In training the first block with experts is a separate kind, because nothing before it has a gradient:
            # to compile that kind takes longer than the block does without.
            first = mixture is not None and torch.is_grad_enabled() and not x_BTD.requires_grad
            run = run_block if first else compiled
            x_BTD, routing = run(vit.blocks[index], x_BTD, ropes[index], *options, keep)
            routings += [] if routing is None else [routing]
            if index in backbone.blocks:
                normed[index] = vit.norm(x_BTD)
        prefix = int(vit.num_prefix_tokens)
        pooled = [pool(how, normed[index], prefix) for how, index in backbone.features]
        return torch.cat(pooled, dim=-1), tuple(routings)

    def _allowed(self, allowed_E: Tensor | None, always: bool) -> list[Tensor | None]:
        """The experts that may be chosen in each block with experts, (E,) each; None for all.

        always: never None, so that the same compiled block works with all experts and without some.
        """
        blocks, experts = len(self.blocks), self.mixtures[0].router.num_experts
        if allowed_E is None:
            device = self.mixtures[0].usage_E.device
            return [torch.ones(experts, dtype=torch.bool, device=device) if always else None] * blocks
        return [allowed_E] * blocks if allowed_E.ndim == 1 else [each_E.clone() for each_E in allowed_E]

    def compile(self, batch_sizes: set[int], say: Callable[[str], None] = warnings.warn) -> None:
        """Compile the blocks for these batch sizes at their first use; other batches run eagerly.

        Blocks are compiled one at a time: all blocks of a kind share the result, so this takes seconds, not minutes.
        say: receives one line if compilation fails; then all batches run eagerly.
        """
        self._compiled = CompiledBlock(say, whole=not is_spread(self))
        self._compiled_for = frozenset(batch_sizes)

    def after_step(self, routings: tuple[Routing, ...]) -> None:
        """Call once after each optimizer step: updates the loss-free biases, if there are any."""
        for mixture, routing in zip(self.mixtures, routings, strict=True):
            mixture.after_step(routing)


def run_block(
    block: Any,
    x_BTD: Tensor,
    rope: Tensor | None,
    mixture: BlockMixture | None,
    warmup: bool,
    allowed_E: Tensor | None,
    keep: bool = True,
) -> tuple[Tensor, Routing | None]:
    """One block of the ViT, with its mixture of experts if it has one: tokens (B, T, D), and the routing.

    keep: store the activations of attention and FFN for the backward pass, instead of recomputing them.
    """
    x_BTD = attend(block, x_BTD, rope) if keep else _again(attend, block, x_BTD, rope)
    h_BTD = block.norm2(x_BTD)
    out_BTD, routing = block.mlp(h_BTD) if keep else _again(block.mlp, h_BTD), None
    if mixture is not None:
        out_BTD, routing = mixture(mixture.normalise(x_BTD, h_BTD), out_BTD, warmup, allowed_E)
    return add_ffn(block, x_BTD, out_BTD), routing


def _again(frozen: Callable[..., Tensor], *inputs: Any) -> Tensor:
    """A frozen part that is recomputed in the backward pass (Chen 2016). It draws no random numbers."""
    return checkpoint(frozen, *inputs, use_reentrant=False, preserve_rng_state=False)


class CompiledBlock:
    """`run_block`, compiled for each kind of block and each mode; eager if compilation fails."""

    def __init__(self, say: Callable[[str], None], whole: bool = True, function: Callable = run_block):
        """whole: as one graph, which is not possible with experts on several processes. function: what to compile."""
        self.say, self.function = say, function
        # First, middle or last of the blocks with experts, warm-up or not, training or not, for two sizes. The limit is
        # now called recompile_limit; torch 2.6 has only this name.
        dynamo = torch._dynamo.config
        dynamo.cache_size_limit = max(dynamo.cache_size_limit, 64)
        warnings.filterwarnings("ignore", module=r"torch\._inductor")  # advice for its developers, once per graph
        self.run: Callable = torch.compile(function, dynamic=False, fullgraph=whole)

    def __call__(self, *block) -> Any:
        try:
            return self.run(*block)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler can raise any exception
            if self.run is self.function:
                raise
            self.say(f"the ViT's blocks cannot be compiled ({one_line(error, 160)}): continuing without")
            self.run = self.function
            return self.function(*block)

    def __deepcopy__(self, memo: dict) -> "CompiledBlock":
        return self


class _Shared:
    """A frozen part that is not part of a model's state, and is shared by copies of the model."""

    def __init__(self, part: Any):
        self.part = part

    def __deepcopy__(self, memo: dict) -> "_Shared":
        return self


def resolve_blocks(experts: ExpertsConfig, backbone: Backbone) -> list[int]:
    """The blocks in experts.blocks, counted from 0, in order.

    Raises ValueError for a block that the ViT does not have, or whose output no feature reads.
    """
    check_vit(backbone.vit)
    if any(how == "tokens" for how, _ in backbone.features):
        raise ValueError("backbone.features tokens:BLOCK need experts.place head: with blocks use cls and mean")
    depth, last = len(backbone.vit.blocks), backbone.blocks[-1]
    if experts.blocks == "all":
        return list(range(last + 1))
    for block in experts.blocks:
        if not -depth <= block < depth:
            raise ValueError(f"experts.blocks names block {block}: this ViT has blocks 0 to {depth - 1}")
    blocks = sorted({block % depth for block in experts.blocks})
    if len(blocks) < len(experts.blocks):
        raise ValueError(f"experts.blocks {experts.blocks} names a block twice: -1 is block {depth - 1}")
    if blocks[-1] > last:
        raise ValueError(
            f"experts.blocks names block {blocks[-1]}, whose output nothing reads: backbone.features end at {last}"
        )
    return blocks


AnyMoE = VisionMoE | MoEViT
"""Experts behind the frozen ViT, or inside it: the same interface, with `mixtures`, `places` and `after_step`."""
