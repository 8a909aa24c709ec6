"""Baselines for experts inside a frozen ViT: full fine-tuning, or LoRA in all of its blocks."""

import copy
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from assembly.pipeline import Inputs, build_bank
from config.config import Config
from evaluation.metrics import scores
from features.images import ImageBank
from model.backbone import Backbone
from model.classifier import NECKS, NeckConfig
from model.moe_vit import run_block
from model.preparation import prepare
from model.vit_parts import drop_patches, embed, pool
from storage.checkpoint import seed_everything
from training.length import steps_per_epoch
from training.optim import build_optimizer, set_learning_rate

LORA_TARGETS = r"blocks\.\d+\.(attn\.(qkv|proj)|mlp\.fc[12])"  # every matrix of a block


class AdaptedViT(nn.Module):
    """Images (B, 3, H, W) -> class logits (B, C): a ViT without experts, with the neck and linear head of MoEViT.

    rank: of LoRA (Hu 2022) in every matrix of the blocks, by peft, with alpha = rank and a frozen ViT; 0: all weights
    of the ViT are trained. The ViT is a copy of the backbone's, in float32 under bfloat16 autocast on a GPU.
    """

    def __init__(self, backbone: Backbone, num_classes: int, neck: NeckConfig, rank: int):
        super().__init__()
        vit: Any = copy.deepcopy(backbone.vit).float().requires_grad_(rank == 0)
        if rank:
            from peft import LoraConfig, inject_adapter_in_model  # imported here, because no other part needs it

            vit = inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=LORA_TARGETS), vit)
        self.vit, self.blocks, self.features = vit, backbone.blocks, backbone.features
        self.size, self.mean, self.std = backbone.image_size, backbone.mean, backbone.std
        count = len(backbone.features)
        self.neck = NECKS[neck.kind]((count * vit.embed_dim,), neck, count)
        self.head = nn.Linear(self.neck.out_features, num_classes)
        self.run: Any = run_block

    def compile(self) -> None:
        """Compile the blocks, with one result for all, at the first batch."""
        torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, 64)
        self.run = torch.compile(run_block, dynamic=False)

    def forward(self, images_BCHW: Tensor, patch_dropout: float = 0.0) -> Tensor:
        """images_BCHW: uint8. patch_dropout: fraction of the patches dropped from each image."""
        prefix = int(self.vit.num_prefix_tokens)
        x_BTD, ropes = embed(self.vit, prepare(images_BCHW, self.size, self.mean, self.std))
        x_BTD = drop_patches(x_BTD, prefix, patch_dropout) if patch_dropout else x_BTD
        normed = {}
        for index in range(self.blocks[-1] + 1):
            x_BTD, _ = self.run(self.vit.blocks[index], x_BTD, ropes[index], None, False, None)
            if index in self.blocks:
                normed[index] = self.vit.norm(x_BTD)
        pooled = torch.cat([pool(pooling, normed[index], prefix) for pooling, index in self.features], dim=-1)
        return self.head(self.neck(pooled)).float()


def lora_rank(config: Config, backbone: Backbone) -> int:
    """The rank for which LoRA has as many trained weights as the adapters of a configuration."""
    per_rank = sum(
        module.in_features + module.out_features
        for module in backbone.vit.blocks[0].modules()
        if isinstance(module, nn.Linear)
    )
    units = sum(config.experts.hidden(expert)[0] for expert in range(len(config.experts.sizes)))
    return max(1, round(2 * units * backbone.vit.embed_dim / per_rank))


def train_adapted(config: Config, inputs: Inputs, rank: int, split: str) -> dict:
    """Train an AdaptedViT with the schedule, views and batches of a configuration, and score it on a split.

    rank: of LoRA; 0: full fine-tuning.
    """
    from timm.utils import ModelEmaV3

    device, train, optim = inputs.device, config.train, config.optim
    seed_everything(train.seed, train.deterministic)
    bank = build_bank(config, inputs.splits, inputs.backbone, device)
    assert isinstance(bank, ImageBank)
    model = AdaptedViT(inputs.backbone, inputs.splits.train.num_classes, config.neck, rank).to(device)
    if device.type == "cuda":
        model.compile()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, half = build_optimizer(model, optim), device.type == "cuda"
    ema = ModelEmaV3(model, decay=train.ema_decay, use_warmup=True) if train.ema_decay else None
    steps = steps_per_epoch(train, len(inputs.splits.train))
    total, step, began = steps * train.epochs, 0, time.perf_counter()
    for epoch in range(1, train.epochs + 1):
        generator = torch.Generator().manual_seed(train.seed * 1_000_003 + epoch)
        order_N = torch.randperm(len(inputs.splits.train), generator=generator)
        model.train()
        for images_BCHW, labels_B in bank.batches("train", train.batch_size, order_N, view=epoch - 1):
            set_learning_rate(optimizer, step, total, optim)
            dropped = train.patch_dropout if step < (1 - train.all_patches) * total else 0.0
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                logits_BC = model(images_BCHW, dropped)
            optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(logits_BC, labels_B, label_smoothing=train.label_smoothing).backward()
            if optim.clip_norm:
                nn.utils.clip_grad_norm_(trained, optim.clip_norm)
            optimizer.step()
            step += 1
            if ema:
                ema.update(model, step=step)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    found = _scores(ema.module if ema else model, bank, split, config.features.batch_size, half)
    return {**found, "seconds": seconds, "trained": sum(parameter.numel() for parameter in trained)}


@torch.inference_mode()
def _scores(model: nn.Module, bank: ImageBank, split: str, batch: int, half: bool) -> dict:
    model.eval()
    logits, labels = [], []
    with torch.autocast(bank.device.type, torch.bfloat16, enabled=half):
        for images_BCHW, labels_B in bank.batches(split, batch):
            logits.append(model(images_BCHW))
            labels.append(labels_B)
    logits_NC, labels_N = torch.cat(logits), torch.cat(labels)
    loss = float(F.cross_entropy(logits_NC, labels_N))
    predicted_N = logits_NC.argmax(dim=1).cpu().numpy()
    return {**scores(labels_N.cpu().numpy(), predicted_N, logits_NC.shape[1]), "loss": loss}
