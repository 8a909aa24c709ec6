"""The frozen teacher, its targets, and the bank of views with targets."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from distillation.views import random_views, to_model_input

Say = Callable[[str], None]


@dataclass
class Bank:
    """V views of the N training images with the teacher's targets; view 0 is the clean images."""

    images_VNCHW: Tensor  # uint8
    targets_VNSK: Tensor  # float16; S slots (class token and patch mean of each block), K components


def load_teacher(name: str, weights: Path | None, device: torch.device) -> nn.Module:
    """The timm model of that name, frozen, bfloat16 on a GPU; weights None leaves it random (tests only)."""
    model = timm.create_model(name, pretrained=False, num_classes=0)
    if weights is not None:
        state = {key: tensor.float() for key, tensor in load_file(weights).items()}
        model.load_state_dict(state, strict=True)
    if model.num_prefix_tokens < 1:
        raise ValueError(f"{name} has no class token to distil")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return model.eval().requires_grad_(False).to(device, dtype)


def default_blocks(depth: int) -> list[int]:
    """The last three blocks and one a little earlier: 7, 9, 10, 11 of 12."""
    return [block for block in (depth - 5, depth - 3, depth - 2, depth - 1) if block >= 0]


class Teacher:
    """Maps images to targets: the raw tokens of several blocks, and after `fit` their damped components."""

    def __init__(self, model: nn.Module, blocks: list[int], batch: int, compiled: bool, say: Say):
        """blocks: 0-based, the last one last. batch: images in every forward pass."""
        config = timm.data.resolve_model_data_config(model)
        self.model, self.blocks, self.batch = model, blocks, batch
        weight = next(model.parameters())
        self.device, self.dtype = weight.device, weight.dtype
        self.size = config["input_size"][-1]
        self.mean_C = torch.tensor(config["mean"], device=self.device)
        self.std_C = torch.tensor(config["std"], device=self.device)
        self.forward = self._tokens
        if compiled:
            self.forward = self._compile(say)

    def _compile(self, say: Say) -> Callable[[Tensor], Tensor]:
        compiled = torch.compile(self._tokens)
        try:
            with torch.no_grad():
                example = torch.zeros(self.batch, 3, self.size, self.size, device=self.device)
                compiled(example.to(self.dtype))
        except Exception as error:  # a failed speed-up must not end the run
            say(f"teacher: torch.compile failed, continuing without it: {type(error).__name__}: {str(error)[:200]}")
            return self._tokens
        return compiled

    def _tokens(self, x_BCHW: Tensor) -> Tensor:
        """Class token and mean patch token after each block and the final norm: (B, S, D) float32."""
        levels = self.model.forward_intermediates(
            x_BCHW,
            indices=self.blocks,
            return_prefix_tokens=True,
            norm=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
        slots = []
        for patches_BTD, prefix_BPD in levels:
            slots += [prefix_BPD[:, 0].float(), patches_BTD.float().mean(1)]
        return torch.stack(slots, dim=1)

    @torch.no_grad()
    def raw(self, images_BCHW: Tensor) -> Tensor:
        """uint8 images -> (B, S, D) float32. Short batches are padded: compiled code sees one shape."""
        results = []
        for part_BCHW in images_BCHW.split(self.batch):
            short = self.batch - len(part_BCHW)
            full_BCHW = torch.cat([part_BCHW, part_BCHW[:1].expand(short, -1, -1, -1)]) if short else part_BCHW
            x_BCHW = to_model_input(full_BCHW, self.size, self.mean_C, self.std_C).to(self.dtype)
            results.append(self.forward(x_BCHW)[: len(part_BCHW)].clone())
        return torch.cat(results)

    def fit(self, raw_NSD: Tensor, components: int, whiten: float, say: Say) -> None:
        """Learn the map to targets from the raw tokens of clean training images.

        Each feature is standardised, because a few of CLIP's features have very large variances. Then each slot is
        rotated to its principal components, which are divided by their standard deviation to the power `whiten` (0: not
        at all, so the first few dominate the loss; 1: fully, so noise counts as much as signal). The result has mean
        variance 1 in every slot. Components beyond `components` are dropped.
        """
        components = min(components, len(raw_NSD) - 1)
        bases, means = [], []
        for slot in range(raw_NSD.shape[1]):
            x_ND = raw_NSD[:, slot].double()
            mean_D, std_D = x_ND.mean(0), x_ND.std(0)
            std_D = std_D.clamp_min(0.1 * std_D.median()).clamp_min(1e-6)
            x_ND = (x_ND - mean_D) / std_D
            # LAPACK on the CPU: the matrix is small, and no GPU solver is needed
            values_D, vectors_DD = torch.linalg.eigh((x_ND.T @ x_ND / len(x_ND)).cpu())
            values_K = values_D[-components:].clamp_min(1e-4)
            vectors_DK = vectors_DD[:, -components:] * values_K ** (-whiten / 2)
            vectors_DK /= (values_K ** (1 - whiten)).mean().sqrt()
            bases.append(vectors_DK.to(std_D.device) / std_D[:, None])
            means.append(mean_D)
            kept = (values_D[-components:].sum() / values_D.sum()).item()
            say(f"targets: slot {slot} keeps {100 * kept:.1f} % of the variance in {len(values_K)} components")
        self.basis_SDK = torch.stack(bases).float()
        self.offset_SD = torch.stack(means).float()

    def project(self, raw_BSD: Tensor) -> Tensor:
        """(B, S, D) raw tokens -> (B, S, K) float16 targets; clamped at 30, about 30 standard deviations."""
        targets_BSK = torch.einsum("bsd,sdk->bsk", raw_BSD.float() - self.offset_SD, self.basis_SDK)
        return targets_BSK.clamp(-30, 30).half()


def fill_bank(
    teacher: Teacher,
    images_NCHW: Tensor,
    raw_clean_NSD: Tensor,
    views: int,
    seed: int,
    time_left: Callable[[], float],
    say: Say,
) -> Bank:
    """The clean view and up to views - 1 random ones: complete views, as many as fit into time_left() seconds.

    images_NCHW: uint8 on the teacher's device. At least one random view is made, regardless of the time.
    """
    count, device = len(images_NCHW), images_NCHW.device
    images_VNCHW = torch.empty(views, *images_NCHW.shape, dtype=torch.uint8, device=device)
    slots, _, components = teacher.basis_SDK.shape
    targets_VNSK = torch.empty(views, count, slots, components, dtype=torch.float16, device=device)
    images_VNCHW[0] = images_NCHW
    for start in range(0, count, teacher.batch):
        part = slice(start, start + teacher.batch)
        targets_VNSK[0, part] = teacher.project(raw_clean_NSD[part])
    generator = torch.Generator(device).manual_seed(seed)
    filled, begin = 1, time_left()
    for view in range(1, views):
        cost = (begin - time_left()) / max(1, view - 1)
        if view > 1 and time_left() < cost:
            break
        order_N = torch.randperm(count, generator=generator, device=device)
        for start in range(0, count, teacher.batch):
            part = slice(start, start + teacher.batch)
            images_VNCHW[view, part] = random_views(images_NCHW[order_N[part]], generator)
            targets_VNSK[view, part] = teacher.project(teacher.raw(images_VNCHW[view, part]))
        if not torch.isfinite(targets_VNSK[view]).all():  # also waits for the GPU, so that the time is correct
            raise FloatingPointError(f"the teacher gave targets that are not finite in view {view}")
        filled += 1
        if view % 2 == 0:
            rate = count * view / (begin - time_left())
            say(f"bank: {filled} views, {rate:,.0f} images/s, {time_left():.0f} s left")
    return Bank(images_VNCHW[:filled], targets_VNSK[:filled])
