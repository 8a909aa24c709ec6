"""Whether the activations of a training step through the ViT fit into the GPU's memory."""

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor

from common.errors import UserError
from model.moe_vit import MoEViT

SHARE = 0.85  # share of the free memory for activations; gradients, optimizer and workspaces need the rest
KEPT = 1 / 3  # share of the activations that recomputing keeps: inputs of experts, gates and norms


def bytes_per_image(model: MoEViT, image_1CHW: Tensor) -> int:
    """Bytes of activations that a training step stores per image; the model is not changed."""
    was_training = model.training
    model.eval()
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
    model.train(was_training)
    return sizes[1] - sizes[0]


def must_recompute(choice: str, per_image: int, batch_size: int, free: int, processes: int = 1) -> bool:
    """Whether a step recomputes the frozen parts of the blocks, from train.recompute (auto, on, off).

    per_image: bytes from `bytes_per_image`, without recomputing. batch_size: images of a step of all processes. free:
    free bytes of a device. Raises UserError, which names a batch size that fits, if the batch does not.
    """
    room = SHARE * free
    fits_kept, fits_recomputed = (processes * int(room // (part * per_image)) for part in (1, KEPT))
    if choice == "on" or (choice == "auto" and batch_size > fits_kept):
        fits, recompute = fits_recomputed, True
    else:
        fits, recompute = fits_kept, False
    if batch_size > fits:
        need = -(-batch_size // processes) * per_image * (KEPT if recompute else 1)
        less = " or --train.recompute on" if choice == "off" else ""
        raise UserError(
            f"a step of train.batch_size {batch_size} needs about {need / 1e9:.0f} GB for activations, and the GPU has "
            f"{free / 1e9:.0f} GB free: set --train.batch_size {max(1, fits)}{less}"
        )
    return recompute
