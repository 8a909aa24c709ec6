"""Training the student on the bank: losses, schedule, loop."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from distillation.teacher import Bank, Say
from distillation.views import to_model_input
from model.vit_micro import IMAGE_SIZE, MEAN, STD

State = dict[str, Tensor]


@dataclass
class Schedule:
    """steps > 0 fixes the length and makes a run repeatable; else the cosine ends when `seconds` are over."""

    seconds: float
    steps: int = 0
    batch: int = 1024
    lr: float = 2e-3
    weight_decay: float = 0.05
    warmup: float = 0.05
    ema: float = 0.999
    clip: float = 1.0

    def rate(self, progress: float) -> float:
        """Learning rate at a progress in [0, 1]: linear warm-up, then cosine to 0."""
        if progress < self.warmup:
            return self.lr * max(progress, 1e-3) / self.warmup
        return self.lr / 2 * (1 + math.cos(math.pi * (progress - self.warmup) / (1 - self.warmup)))


class Distiller(nn.Module):
    """The student, the linear head that is discarded afterwards, and the loss."""

    def __init__(self, student: VisionTransformer, bank: Bank, relation: float, anchors: int, seed: int):
        """relation: weight of the neighbourhood loss. anchors: clean images that serve as its landmarks."""
        super().__init__()
        _, count, self.slots, self.components = bank.targets_VNSK.shape
        self.student, self.relation, self.temperature = student, relation, 0.07
        self.head = nn.Linear(2 * student.num_features, self.slots * self.components)
        # users of the teacher read the last block's class token and patch mean, so these have the largest weights
        weight_S = torch.ones(self.slots)
        weight_S[-2:] = 3
        self.register_buffer("weight_S", weight_S / weight_S.sum())
        chosen = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:anchors]
        anchors_AF = bank.targets_VNSK[0][chosen.to(bank.targets_VNSK.device)][:, -2:].float().flatten(1)
        self.register_buffer("anchors_AF", F.normalize(anchors_AF, dim=1))
        self.register_buffer("mean_C", torch.tensor(MEAN))
        self.register_buffer("std_C", torch.tensor(STD))

    def forward(self, images_BCHW: Tensor, target_BSK: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 images and their targets -> the scalar loss and its parts (3,): MSE, cosine, relation."""
        x_BCHW = to_model_input(images_BCHW, IMAGE_SIZE, self.mean_C, self.std_C)
        on_gpu = images_BCHW.is_cuda
        with torch.autocast(images_BCHW.device.type, dtype=torch.bfloat16, enabled=on_gpu):
            tokens_BTD = self.student.forward_features(x_BCHW)
            features_BF = torch.cat([tokens_BTD[:, 0], tokens_BTD[:, 1:].mean(1)], dim=1)
            predicted_BN = self.head(features_BF)
        predicted_BSK = predicted_BN.float().view(-1, self.slots, self.components)
        target_BSK = target_BSK.float()
        mse = ((predicted_BSK - target_BSK).square().mean((0, 2)) * self.weight_S).sum()
        similarity_BS = F.cosine_similarity(predicted_BSK, target_BSK, dim=2)
        cosine = ((1 - similarity_BS).mean(0) * self.weight_S).sum()
        relation = self._relation(predicted_BSK[:, -2:].flatten(1), target_BSK[:, -2:].flatten(1))
        loss = mse + cosine + self.relation * relation
        return loss, torch.stack([mse, cosine, relation]).detach()

    def _relation(self, predicted_BF: Tensor, target_BF: Tensor) -> Tensor:
        """KL divergence between the teacher's and the student's similarities to the anchors.

        The idea of SEED (Fang 2021) without its queue: it matches neighbourhoods, which determine what a linear
        classifier can separate, whereas the squared error weights all directions equally.
        """
        teacher_BA = F.normalize(target_BF, dim=1) @ self.anchors_AF.T / self.temperature
        student_BA = F.normalize(predicted_BF, dim=1) @ self.anchors_AF.T / self.temperature
        return F.kl_div(student_BA.log_softmax(1), teacher_BA.log_softmax(1), log_target=True, reduction="batchmean")


def bank_batches(bank: Bank, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches (images, targets); each pass over the bank is a new shuffle, and a batch has a single view.

    With one view per batch no image occurs twice in it, and every gather has fewer than 2^31 elements.
    """
    views, count = bank.images_VNCHW.shape[:2]
    device, chunks = bank.images_VNCHW.device, count // batch
    on_host, on_device = torch.Generator().manual_seed(seed), torch.Generator(device).manual_seed(seed)
    while True:
        order_VN = torch.rand(views, count, device=device, generator=on_device).argsort(dim=1)
        for item in torch.randperm(views * chunks, generator=on_host).tolist():
            view, chunk = divmod(item, chunks)
            index_B = order_VN[view, chunk * batch : (chunk + 1) * batch]
            yield bank.images_VNCHW[view][index_B], bank.targets_VNSK[view][index_B]


def compile_or_not(distiller: Distiller, example: tuple[Tensor, Tensor], say: Say) -> Callable:
    """The compiled module if one forward and backward pass of it works, else the module itself."""
    compiled = torch.compile(distiller, dynamic=False)
    try:
        compiled(*example)[0].backward()
    except Exception as error:  # a failed speed-up must not end the run
        say(f"student: torch.compile failed, continuing without it: {type(error).__name__}: {str(error)[:200]}")
        return distiller
    finally:
        distiller.zero_grad(set_to_none=True)
    return compiled


def _optimizer(distiller: Distiller, schedule: Schedule) -> torch.optim.AdamW:
    """AdamW; weight decay only on matrices."""
    groups: dict[bool, list[Tensor]] = {True: [], False: []}
    for name, parameter in distiller.named_parameters():
        groups[parameter.ndim >= 2 and not name.endswith(("pos_embed", "cls_token"))].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": schedule.weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=schedule.lr,
        betas=(0.9, 0.99),
        fused=next(distiller.parameters()).is_cuda,
    )


def train_student(
    distiller: Distiller,
    bank: Bank,
    schedule: Schedule,
    seed: int,
    compiled: bool,
    at_half: Callable[[State], None],
    say: Say,
) -> tuple[State, int]:
    """Train in place. Returns the student's averaged state dict (EMA, float32) and the number of steps.

    The schedule's seconds include compilation. at_half receives the averaged state once, in the middle.
    """
    deadline = time.monotonic() + schedule.seconds
    batch = min(schedule.batch, bank.images_VNCHW.shape[1])
    batches = bank_batches(bank, batch, seed)
    distiller.train()
    run = compile_or_not(distiller, next(batches), say) if compiled else distiller
    optimizer = _optimizer(distiller, schedule)
    weights = [parameter.detach() for parameter in distiller.student.parameters()]
    averages, average = [weight.clone() for weight in weights], get_ema_multi_avg_fn(schedule.ema)

    def averaged_state() -> State:
        names = [name for name, _ in distiller.student.named_parameters()]
        return distiller.student.state_dict() | dict(zip(names, averages, strict=True))

    begin = shown = time.monotonic()
    step = shown_step = 0
    half_saved = False
    total = torch.zeros(4, device=weights[0].device)
    while True:
        now = time.monotonic()
        progress = step / schedule.steps if schedule.steps else (now - begin) / max(deadline - begin, 1e-6)
        if now - shown > 10 or (progress >= 1 and step > shown_step):
            mean = (total / (step - shown_step)).tolist()
            rate = (step - shown_step) * batch / (time.monotonic() - shown)
            say(
                f"student: {100 * min(progress, 1):5.1f} %  step {step}  loss {mean[0]:.4f}"
                f" (mse {mean[1]:.4f} cosine {mean[2]:.4f} relation {mean[3]:.4f})  {rate:,.0f} images/s"
            )
            if not math.isfinite(mean[0]):
                raise FloatingPointError(f"the loss is not finite before step {step}")
            shown, shown_step = time.monotonic(), step
            total.zero_()
        if progress >= 0.5 and not half_saved:
            half_saved = True
            at_half(averaged_state())
        if progress >= 1 and step > 0:
            return averaged_state(), step
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(min(progress, 1))
        loss, parts = run(*next(batches))
        loss.backward()
        nn.utils.clip_grad_norm_(distiller.parameters(), schedule.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average(averages, weights, step)
        total += torch.cat([loss.detach()[None], parts])
        step += 1
