"""OptimConfig: step size, decay, schedule."""

import math
from dataclasses import dataclass
from typing import Literal


@dataclass
class OptimConfig:
    """Optimizer: step size, decay, schedule."""

    kind: Literal["adamw", "adam"] = "adamw"
    """adamw (decoupled weight decay, Loshchilov 2019) or adam."""
    lr: float = 1e-3
    """Peak learning rate."""
    weight_decay: float = 0.05
    """Weight decay of matrices; biases and norms have none."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after its warm-up: half a cosine towards zero, or constant."""
    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly."""
    clip_norm: float = 1.0
    """Largest norm of the gradient; 0: no clipping."""

    def __post_init__(self):
        if not 0 < self.lr < math.inf:
            raise ValueError(f"optim.lr is {self.lr}: it must be finite and above 0")
        for name in ("weight_decay", "warmup_steps", "clip_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optim.{name} is {getattr(self, name)}: it must be finite and not negative")
