"""TrainConfig: length, batches, precision and checkpoints of training."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class TrainConfig:
    """Training: length, batches, precision, checkpoints."""

    epochs: int = 40
    """Passes over the training images."""
    batch_size: int = 1024
    """Samples per training step."""
    label_smoothing: float = 0.1
    """Label smoothing: fraction of each target spread evenly over all classes (Szegedy 2016)."""
    ema_decay: float = 0.999
    """Decay of the exponential moving average of the weights, which is validated and saved; 0: no average."""
    patience: int = 0
    """Stop after this many epochs without a better validation macro-F1; 0: run all epochs."""
    keep: Literal["best", "last"] = "best"
    """Which weights are evaluated and exported: those of the epoch with the best validation macro-F1, or those of the
    last epoch, which suits a cosine schedule and few validation images."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of the experts in training (the gate is always float32); auto: bfloat16 on a GPU."""
    seed: int = 0
    """Seed of weights, sample order, dropout and routing noise."""
    save_every: int = 5
    """Epochs between checkpoints (checkpoints/{last,best}.pt). A killed run loses at most this many epochs; Ctrl-C and
    SIGTERM also write checkpoints."""
    graph: Literal["auto", "off"] = "auto"
    """auto: on a GPU, capture the training step of a small head, or of a ViT with experts inside it, as a CUDA graph,
    which saves kernel launches; off: never."""
    compile: Literal["auto", "always", "never"] = "auto"
    """experts.place blocks: compile the ViT's blocks, in training and in evaluation; auto: on a GPU."""
    recompute: Literal["auto", "on", "off"] = "auto"
    """experts.place blocks: recompute attention and FFNs in the backward pass, which is slower but stores fewer
    activations (57 % in the default recipe); auto: on a GPU, if they would not fit into its memory."""
    patch_dropout: float = 0.0
    """experts.place blocks: fraction of the patch tokens dropped at random from each training image in each step
    (PatchDropout, Liu 2022), for less work and less overfitting. Evaluation uses all patches."""
    all_patches: float = 0.1
    """Fraction of the steps, at the end of training, that use all patches despite patch_dropout."""
    deterministic: bool = False
    """Use only deterministic algorithms of PyTorch on a GPU, which is slower; a CPU is deterministic without it."""

    @property
    def idle(self) -> list[str]:
        """One line for each option that is set but has no effect."""
        if self.patch_dropout or self.all_patches == TrainConfig.all_patches:
            return []
        return [f"train.all_patches {self.all_patches} has no effect without train.patch_dropout"]

    def __post_init__(self):
        for name in ("epochs", "batch_size", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} is {getattr(self, name)}: it must be at least 1")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"train.label_smoothing is {self.label_smoothing}: it must be at least 0 and below 1")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"train.ema_decay is {self.ema_decay}: it must be at least 0 and below 1 (0: off)")
        if not 0 <= self.patch_dropout < 1:
            raise ValueError(f"train.patch_dropout is {self.patch_dropout}: it must be at least 0 and below 1 (0: off)")
        if not 0 <= self.all_patches <= 1:
            raise ValueError(
                f"train.all_patches is {self.all_patches}: it must be a fraction of the steps, from 0 to 1"
            )
        if self.patience < 0:
            raise ValueError(
                f"train.patience is {self.patience}: it must be a number of epochs, or 0 for no early stopping"
            )
        if self.patience and self.keep == "last":
            raise ValueError(
                f"train.patience {self.patience} stops after the best epoch, but train.keep last uses a later one: "
                "set patience to 0, or keep to best"
            )
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"train.seed is {self.seed}: it must be at least 0 and below 2^32")
