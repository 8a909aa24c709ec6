"""Features that contain the class, for the heads of a study."""

import torch

from benchmarks.study_heads import Features


def telling_features() -> Features:
    """Two views of 200 samples of four classes, and 60 held out: 32 numbers in two groups."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 32, generator=generator)
    labels_N = torch.arange(200) % 4
    train_VNF = torch.stack([centres[labels_N] + 0.3 * torch.randn(200, 32, generator=generator) for _ in range(2)])
    held_M = torch.arange(60) % 4
    held_MF = centres[held_M] + 0.3 * torch.randn(60, 32, generator=generator)
    return Features(train_VNF, labels_N, held_MF, held_M, groups=2, classes=4)
