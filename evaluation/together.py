"""Prediction for a split with several processes: each computes its part, and all receive all predictions."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from common.distributed import world
from evaluation.block_routing import BlockRouting
from evaluation.predictions import Predictions, Removals


def own_part(samples: int) -> Tensor:
    """The samples that this process predicts, int64: all of them if there are fewer samples than processes."""
    everything = torch.arange(samples)
    return everything if samples < world().size else everything[world().part(samples)]


def batches_lacking(samples: int, batch_size: int) -> int:
    """How many more batches another process has than this one for its part of a split."""
    if samples < world().size:
        return 0
    counts = [-(-size // batch_size) for size in world().sizes(samples)]
    return max(counts) - counts[world().rank]


def together(own: Predictions, samples: int) -> Predictions:
    """The predictions of all processes for a split, in every process; `own` are those for `own_part`."""
    if not world().several or samples < world().size:
        return own
    return join(world().gather(own))


def join(parts: Sequence[Predictions]) -> Predictions:
    """Predictions for the samples of one part after those of another."""
    ends = np.cumsum([len(part.labels_N) for part in parts])
    starts = ends - [len(part.labels_N) for part in parts]
    removals = [part.removals for part in parts if part.removals is not None]
    blocks = [part.blocks for part in parts if part.blocks is not None]
    return Predictions(
        np.concatenate([part.logits_NC for part in parts]),
        np.concatenate([part.labels_N for part in parts]),
        np.concatenate([part.sample_A + start for part, start in zip(parts, starts, strict=True)]),
        np.concatenate([part.expert_A for part in parts]),
        np.concatenate([part.weight_A for part in parts]),
        np.concatenate([part.gate_NE for part in parts]),
        _join_removals(removals) if removals else None,
        _join_blocks(blocks) if blocks else None,
    )


def _join_removals(parts: list[Removals]) -> Removals:
    return Removals(
        np.concatenate([part.predicted_EN for part in parts], axis=1),
        np.sum([part.before_EE for part in parts], axis=0),
        np.sum([part.after_EE for part in parts], axis=0),
    )


def _join_blocks(parts: list[BlockRouting]) -> BlockRouting:
    whole = [len(part.first_MLT) == len(part.count_NLE) for part in parts]
    first = whole.index(False) + 1 if False in whole else len(parts)  # those of the first images, without a gap
    return BlockRouting(
        parts[0].places,
        np.concatenate([part.count_NLE for part in parts]),
        np.concatenate([part.weight_NLE for part in parts]),
        np.concatenate([part.entropy_NL for part in parts]),
        np.concatenate([part.first_MLT for part in parts[:first]]),
    )
