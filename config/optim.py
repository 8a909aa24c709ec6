"""OptimConfig: step size, decay, schedule."""

from dataclasses import dataclass, field
from typing import Literal

from model.parts import PARTS

LARGEST = 1e6  # largest factor on weights and gradients, far inside the range of float32
SMALLEST_NORM = 1e-6


@dataclass
class OptimConfig:
    """Optimizer: learning rate, weight decay, schedule."""

    kind: Literal["adamw", "adam"] = "adamw"
    """adamw (decoupled weight decay, Loshchilov 2019) or adam."""
    lr: float = 1e-3
    """Peak learning rate, reached at the end of its warm-up."""
    lr_of: list[str] = field(default_factory=list)
    """Learning rates of single parts, as multiples of lr, such as [router:0.1, head:2]. The parts are neck, router,
    experts, shared, and head (the class rows)."""
    weight_decay: float = 0.05
    """Weight decay of matrices; biases and norm layers have none."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after its warm-up: cosine decay to zero, or constant."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly."""
    clip_norm: float = 1.0
    """Clip the gradient to this norm; 0: no clipping."""

    @property
    def multiples(self) -> dict[str, float]:
        """The multiple of lr of each part in lr_of. Raises ValueError for an entry that is not PART:NUMBER."""
        found = {}
        for text in self.lr_of:
            part, _, number = text.partition(":")
            try:
                found[part] = float(number)
            except ValueError:
                found[part] = -1.0
            if part not in PARTS or not 0 < found[part] <= LARGEST:
                raise ValueError(
                    f"optim.lr_of has '{text}': write PART:NUMBER, such as router:0.1, with a part of "
                    f"{', '.join(PARTS)} and a number above 0 (use freeze to keep a part unchanged)"
                )
        return found

    def __post_init__(self):
        _ = self.multiples
        if not 0 < self.lr <= LARGEST:
            raise ValueError(f"optim.lr is {self.lr}: it must be above 0, and at most {LARGEST:g}")
        for name in ("weight_decay", "clip_norm"):
            if not 0 <= getattr(self, name) <= LARGEST:
                raise ValueError(f"optim.{name} is {getattr(self, name)}: it must be from 0 to {LARGEST:g}")
        if 0 < self.clip_norm < SMALLEST_NORM:
            raise ValueError(
                f"optim.clip_norm is {self.clip_norm}: too small to train with; it must be at least "
                f"{SMALLEST_NORM:g}, or 0 for no clipping"
            )
        if self.warmup_steps < 0:
            raise ValueError(f"optim.warmup_steps is {self.warmup_steps}: it cannot be negative")
