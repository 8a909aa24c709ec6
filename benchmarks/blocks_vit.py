"""The last blocks of a frozen ViT with mixtures, on stored inputs of the first of their mixtures."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.study_heads import Features
from common.errors import UserError
from features.images import ImageBank
from model.backbone import Backbone
from model.moe_vit import CompiledBlock, MoEViT, run_block
from model.preparation import prepare
from model.routers import Routing
from model.vit_parts import add_ffn, attend, embed, pool

EVALUATION_BATCH = 500


class LastBlocks(nn.Module):
    """The last blocks of a frozen ViT, as a ViT for MoEViT's constructor."""

    def __init__(self, vit: Any, first: int, patches: int):
        super().__init__()
        self.blocks, self.norm = nn.Sequential(*list(vit.blocks)[first:]), vit.norm
        self.embed_dim, self.num_prefix_tokens = vit.embed_dim, vit.num_prefix_tokens
        self.patch_embed = nn.Identity()
        self.patch_embed.num_patches = patches


class FrozenEnd:
    """`LastBlocks` as the backbone of an EndOfViT; it shares the blocks' weights with the whole backbone.

    between_mixtures: the function of that name; on a GPU it is compiled once for all methods. say: receives a line if
    compilation fails.
    """

    def __init__(
        self, backbone: Backbone, first: int, patches: int, device: torch.device, say: Callable[[str], None] = print
    ):
        self.vit: Any = LastBlocks(backbone.runner(device), first, patches)
        self.dtype, self.has_class_token = backbone.dtype, backbone.has_class_token
        self.features = [(pool, block - first) for pool, block in backbone.features if block >= first]
        self.blocks = sorted({block for _, block in self.features})
        self.between_mixtures: Callable = (
            CompiledBlock(say, function=between_mixtures) if device.type == "cuda" else between_mixtures
        )

    def runner(self, device: torch.device) -> Any:
        """The ViT used for the computation."""
        return self.vit


class EndOfViT(MoEViT):
    """A MoEViT of the last blocks; its input is the output of `before_mixture` for the first of them.

    Nothing before this input is trained, so it is the same for all methods and is computed once. The frozen part
    between two mixtures is one function, which all methods share.
    """

    def _features(
        self, images_BCHW: Tensor, warmup: bool, allowed_E: Tensor | None, patch_dropout: float = 0.0
    ) -> tuple[Tensor, tuple[Routing, ...]]:
        backbone: Any = self.backbone
        vit = backbone.vit
        x_BTD, dense_BTD = (half_BTD.contiguous() for half_BTD in images_BCHW.chunk(2, dim=-1))
        h_BTD, found, routings = vit.blocks[0].norm2(x_BTD), {}, []
        for index, mixture in enumerate(self.mixtures):
            out_BTD, routing = mixture(mixture.normalise(x_BTD, h_BTD), dense_BTD, warmup, allowed_E)
            routings.append(routing)
            poolings = tuple(pooling for pooling, block in backbone.features if block == index)
            next_block = vit.blocks[index + 1] if index + 1 < len(self.mixtures) else None
            frozen = (vit.blocks[index], next_block, vit.norm, poolings, int(vit.num_prefix_tokens))
            pooled, before = backbone.between_mixtures(*frozen, x_BTD, out_BTD)
            if before is not None:
                x_BTD, h_BTD, dense_BTD = before
            found |= {(pooling, index): features_BD for pooling, features_BD in zip(poolings, pooled, strict=True)}
        return torch.cat([found[feature] for feature in backbone.features], dim=-1), tuple(routings)


def before_mixture(block: Any, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A block up to its mixture: tokens after attention, the same normalised, and the output of the frozen FFN."""
    x_BTD = attend(block, x_BTD, None)
    h_BTD = block.norm2(x_BTD)
    return x_BTD, h_BTD, block.mlp(h_BTD)


def between_mixtures(
    block: Any, next_block: Any, norm: Any, poolings: tuple[str, ...], prefix: int, x_BTD: Tensor, out_BTD: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor, Tensor] | None]:
    """The frozen part from one mixture to the next one.

    next_block: None after the last one. poolings: how the block's output is pooled for the head. x_BTD: tokens after
    attention. out_BTD: the output of FFN and mixture. Returns the features of each pooling, (B, D), and the results of
    `before_mixture` in the next block.
    """
    x_BTD = add_ffn(block, x_BTD, out_BTD)
    normed_BTD = norm(x_BTD) if poolings else x_BTD
    pooled = tuple(pool(pooling, normed_BTD, prefix) for pooling in poolings)
    return pooled, None if next_block is None else before_mixture(next_block, x_BTD)


@torch.no_grad()
def tokens_below(backbone: Backbone, images_BCHW: Tensor, first: int) -> Tensor:
    """The input of block `first` for uint8 images: (B, T, D) in the ViT's precision."""
    vit = backbone.runner(images_BCHW.device)
    x_BCHW = prepare(images_BCHW, backbone.image_size, backbone.mean, backbone.std)
    x_BTD, ropes = embed(vit, x_BCHW.to(backbone.dtype))
    if ropes[0] is not None:
        raise UserError("the study does not support a ViT with rotary embeddings: choose another --backbone.name")
    for block in list(vit.blocks)[:first]:
        x_BTD, _ = run_block(block, x_BTD, None, None, False, None)
    return x_BTD


def averaged(x_BTD: Tensor, prefix: int, grid: tuple[int, int]) -> Tensor:
    """The tokens with patches averaged over 2 x 2 blocks. prefix: number of tokens before the patches."""
    rows, columns = grid
    if rows % 2 or columns % 2:
        raise UserError(f"the study averages 2 x 2 patches, but this ViT has {rows} x {columns}: choose another")
    patches_BR2C2D = x_BTD[:, prefix:].unflatten(1, (rows // 2, 2, columns // 2, 2))
    return torch.cat([x_BTD[:, :prefix], patches_BR2C2D.mean(dim=(2, 4)).flatten(1, 2)], dim=1)


@torch.no_grad()
def stored_input(block: Any, x_BTD: Tensor) -> Tensor:
    """The input of an EndOfViT, (B, T, 2D), from the input of its first block."""
    x_BTD, _, dense_BTD = before_mixture(block, x_BTD)
    return torch.cat([x_BTD, dense_BTD], dim=-1)


def stored_inputs(
    backbone: Backbone, bank: ImageBank, first: int, views: int, max_images: int | None = None
) -> dict[str, Features]:
    """The inputs for `views` augmented views of the training images, and for the validation and test images.

    max_images: maximum number of images of each split.
    """
    block = list(backbone.runner(bank.device).blocks)[first]
    grid, prefix = backbone.vit.patch_embed.grid_size, backbone.vit.num_prefix_tokens

    def whole(split: str, view: int | None) -> Tensor:
        order_N = torch.arange(len(bank.splits[split]))[:max_images]
        batches = bank.batches(split, EVALUATION_BATCH, order_N, view)
        each = (averaged(tokens_below(backbone, images, first), prefix, grid) for images, _ in batches)
        return torch.cat([stored_input(block, x_BTD) for x_BTD in each])

    train_VNTF: Tensor | None = None
    for view in range(views):
        tokens_NTF = whole("train", view)
        if train_VNTF is None:
            train_VNTF = tokens_NTF.new_empty(views, *tokens_NTF.shape)
        train_VNTF[view] = tokens_NTF
    assert train_VNTF is not None
    labels = {name: bank.splits[name].labels_N[:max_images].to(bank.device) for name in ("train", "validation", "test")}
    classes = bank.splits.train.num_classes
    return {
        name: Features(train_VNTF, labels["train"], whole(name, None), labels[name], groups=1, classes=classes)
        for name in ("validation", "test")
    }
