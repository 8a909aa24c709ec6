"""The adapters and mixtures in the study inside the ViT; all have the same cost per token."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.study_heads import mixture

WIDTHS = (4, 8, 16, 32, 64, 128)
RATIO = (1, 2, 4, 8)  # ratio of the widths of unequal experts
EXPERTS = len(RATIO)
GATE = EXPERTS // 2
"""Hidden units with the same cost per token as the gate: D * E multiply-adds, compared with 2 * D for a unit."""
RULES_AT = 16  # the width at which all rules are compared
RULES = ("vmoe", "deepseek", "hash", "top_p")
BY_IMAGE = (4, 16, 64)  # the widths at which routing by image is also tested
DENSE = "dense"


@dataclass(frozen=True)
class Method:
    """The adapter or mixture in parallel to the FFN of each block, at one width.

    name: the same at all widths. width: active hidden units of a mixture whose gate reads every token. sizes: hidden
    units of each expert. static: whether shapes are the same in all batches; otherwise steps are never captured.
    """

    name: str
    width: int
    rule: str
    sizes: tuple[int, ...]
    top_k: int = 1
    level: str = "token"

    @property
    def parts(self) -> dict[str, Any]:
        """Sections router and balance of the configuration: those of the rule's paper."""
        found = mixture("", self.rule, list(self.sizes), self.top_k, norm="none", level=self.level)
        return {name: found[name] for name in ("router", "balance")}

    @property
    def kind(self) -> str:
        """The key shared by methods with the same kind of steps."""
        return f"{self.rule}, k {self.top_k}, {self.level}"

    @property
    def label(self) -> str:
        """Name and width."""
        return f"{self.name}, r {self.width}"


def unequal(active: int, top_k: int) -> tuple[int, ...]:
    """Widths in the ratio 1 : 2 : 4 : 8, of which top_k have `active` units on average under an even load.

    Widths are whole numbers, at least 1; the largest remainders are rounded up.
    """
    total = EXPERTS * active // top_k
    exact = [total * share / sum(RATIO) for share in RATIO]
    sizes = [max(1, int(size)) for size in exact]
    order = sorted(range(EXPERTS), key=lambda e: sizes[e] - exact[e])
    for step in range(total - sum(sizes)):
        sizes[order[step % EXPERTS]] += 1
    return tuple(sizes)


def equal(active: int, top_k: int) -> tuple[int, ...]:
    """Experts of equal width, of which top_k have `active` units in total."""
    return (active // top_k,) * EXPERTS


def routed(width: int, shape: str, top_k: int, rule: str = "noisy_topk", level: str = "token") -> Method:
    """A mixture of `shape` (equal, unequal). Routing by image costs almost nothing, so it gets GATE more units."""
    active = width + (GATE if level == "image" else 0)
    sizes = {"equal": equal, "unequal": unequal}[shape](active, top_k)
    return Method(f"{shape}, k {top_k}, {level}, {rule}", width, rule, sizes, top_k, level)


def dense(width: int) -> Method:
    """One adapter with the same cost per token as the mixtures of this width, including their gates."""
    return Method(DENSE, width, "hash", (width + GATE,))


def methods(widths: Sequence[int] = WIDTHS) -> list[Method]:
    """All methods, the most important ones first, so that a study that ends early has complete comparisons."""
    middle = min(widths, key=lambda width: abs(width - RULES_AT))
    # The middle first, then the ends, so that the shape of the curve is known early.
    order = [middle, *sorted((width for width in widths if width != middle), key=lambda w: (w not in (4, 64), w))]
    found = []
    for width in order:
        found += [dense(width), routed(width, "unequal", 2), routed(width, "unequal", 1), routed(width, "equal", 1)]
    found += [routed(middle, "unequal", 2, rule) for rule in RULES]
    found += [routed(middle, "unequal", 1, rule) for rule in RULES if rule != "top_p"]
    found += [routed(width, "equal", 2) for width in order]
    found += [routed(width, "unequal", k, level="image") for width in order if width in BY_IMAGE for k in (2, 1)]
    return found
