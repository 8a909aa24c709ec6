"""Statistics over runs with several seeds: mean, deviation, paired differences."""

import math
import statistics
from collections.abc import Sequence


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (divisor n - 1; None for a single value)."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def paired_interval(
    values: Sequence[float], others: Sequence[float], confidence: float = 0.95
) -> tuple[float, float | None, float | None]:
    """Mean of values - others, and the ends of its Student's t interval over the pairs (None for a single pair)."""
    from scipy.stats import t

    differences = [a - b for a, b in zip(values, others, strict=True)]
    mean, n = statistics.fmean(differences), len(differences)
    if n < 2:
        return mean, None, None
    half = float(t.ppf((1 + confidence) / 2, n - 1)) * statistics.stdev(differences) / math.sqrt(n)
    return mean, mean - half, mean + half
