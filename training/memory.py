"""Whether the activations of a training step through the ViT fit into the GPU's memory."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from common.errors import UserError
from model.moe_vit import MoEViT

SHARE = 0.85  # share of the free memory for activations; gradients, optimizer and workspaces need the rest


def bytes_per_image(model: MoEViT, image_1CHW: Tensor, recompute: bool = False) -> int:
    """Bytes of activations that a training step stores per image; the model is not changed.

    recompute: the backward pass recomputes attention and FFNs, those of one block at a time.
    """
    stored = _stored(model, image_1CHW, False)
    if not recompute:
        return stored
    kept, blocks = _stored(model, image_1CHW, True), model.backbone.blocks[-1] - model.blocks[0]
    return kept + (stored - kept) // max(1, blocks)  # the first block with experts has nothing to recompute


def _stored(model: MoEViT, image_1CHW: Tensor, recompute: bool) -> int:
    """Bytes per image of all tensors that autograd saves for the backward pass."""
    before = model.training, model.recompute
    model.eval()
    model.recompute = recompute
    sizes = []
    for count in (1, 2):
        kept: dict[int, torch.UntypedStorage] = {}  # held until all has been counted, or an address would come twice

        def keep(value: Tensor, kept=kept) -> None:
            if isinstance(value, AsyncCollectiveTensor):  # rows of other processes: only the tensor inside has memory
                value = value.elem
            # Not the tensor itself: an output that its own node holds is never freed, nor is its graph.
            kept[value.untyped_storage().data_ptr()] = value.untyped_storage()

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda _: None):
            model(image_1CHW.expand(count, -1, -1, -1))
        sizes.append(sum(storage.nbytes() for storage in kept.values()))
    model.train(before[0])
    model.recompute = before[1]
    return sizes[1] - sizes[0]


def must_recompute(choice: str, needed: Callable[[bool], int], batch_size: int, free: int, processes: int = 1) -> bool:
    """Whether a step recomputes the frozen parts of the blocks, from train.recompute (auto, on, off).

    needed: returns the bytes per image, with recomputing (True) or without; see `bytes_per_image`. batch_size: images
    of a step of all processes. free: free bytes of a device. Raises UserError, which names a batch size that fits, if
    the batch does not.
    """
    recompute, each = choice == "on", needed(choice == "on")
    fits = processes * int(SHARE * free // each)
    if choice == "auto" and batch_size > fits:
        recompute, each = True, needed(True)
        fits = processes * int(SHARE * free // each)
    if batch_size > fits:
        need = -(-batch_size // processes) * each
        less = " or --train.recompute on" if choice == "off" else ""
        raise UserError(
            f"a step of train.batch_size {batch_size} needs about {need / 1e9:.0f} GB for activations, and the GPU has "
            f"{free / 1e9:.0f} GB free: set --train.batch_size {max(1, fits)}{less}"
        )
    return recompute
