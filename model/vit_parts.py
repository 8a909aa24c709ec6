"""A frozen timm ViT in parts: before its blocks, and before and after the FFN of a block.

A frozen ViT is in evaluation mode, so dropout and stochastic depth in its blocks have no effect. timm's ViTs have no
common type: they are Any here.
"""

from typing import Any

import torch
from torch import Tensor

from .distributed import rand_like

STANDARD = ("norm1", "attn", "ls1", "norm2", "mlp", "ls2")  # timm's Block: AugReg, DeiT, CLIP, DINOv2, SigLIP, ...
EVA = ("norm1", "attn", "gamma_1", "norm2", "mlp", "gamma_2")  # timm's EvaBlock: EVA-02, DINOv3, ...


def check_vit(vit: Any) -> None:
    """Raise ValueError unless each block of a ViT is attention and then an FFN, with residual connections."""
    for block in vit.blocks:
        if not any(all(hasattr(block, name) for name in names) for names in (STANDARD, EVA)):
            raise ValueError(
                f"experts.place blocks needs blocks of attention and an FFN, not {type(block).__name__}: choose "
                "another backbone, or experts.place head"
            )


def embed(vit: Any, images_BCHW: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """The input tokens (B, T, D) of the first block, and the rotary embedding of each block (None: no embedding)."""
    x, ropes = vit._pos_embed(vit.patch_embed(images_BCHW)), None
    if isinstance(x, tuple):
        x, ropes = x
    else:
        x = vit.patch_drop(x)
    depth = len(vit.blocks)
    each = list(ropes) if ropes is not None and getattr(vit, "rope_mixed", False) else [ropes] * depth
    return vit.norm_pre(x), each


def drop_patches(x_BTD: Tensor, prefix_tokens: int, share: float) -> Tensor:
    """The tokens without a random fraction `share` of each image's patches; at least one is kept, in any order.

    PatchDropout (Liu 2022). The tokens include position embeddings, so their order does not matter. The number of kept
    tokens depends only on the shape.
    """
    prefix_BRD, patches_BPD = x_BTD[:, :prefix_tokens], x_BTD[:, prefix_tokens:]
    _, patches, width = patches_BPD.shape
    kept = max(1, round((1 - share) * patches))
    index_BP = rand_like(patches_BPD[:, :, 0].float()).argsort(dim=1)[:, :kept]
    kept_BPD = patches_BPD.gather(1, index_BP[:, :, None].expand(-1, -1, width))
    return torch.cat([prefix_BRD, kept_BPD], dim=1)


def attend(block: Any, x_BTD: Tensor, rope: Tensor | None) -> Tensor:
    """The first half of a block: attention with its residual connection."""
    if hasattr(block, "ls1"):
        return x_BTD + block.ls1(block.attn(block.norm1(x_BTD)))
    added_BTD = block.attn(block.norm1(x_BTD), rope=rope)
    return x_BTD + (added_BTD if block.gamma_1 is None else block.gamma_1 * added_BTD)


def add_ffn(block: Any, x_BTD: Tensor, out_BTD: Tensor) -> Tensor:
    """The end of a block: add the output of the FFN, with the block's layer scale."""
    if hasattr(block, "ls2"):
        return x_BTD + block.ls2(out_BTD)
    return x_BTD + (out_BTD if block.gamma_2 is None else block.gamma_2 * out_BTD)


def pool(how: str, x_BTD: Tensor, prefix_tokens: int) -> Tensor:
    """One feature of a block's normalised tokens, float32 (B, D): cls (class token) or mean (of the patch tokens)."""
    if how == "cls":
        return x_BTD[:, 0].float()
    return x_BTD[:, prefix_tokens:].mean(dim=1, dtype=torch.float32)
