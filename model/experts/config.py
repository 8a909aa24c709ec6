"""ExpertsConfig: place, number and sizes of the experts, and how their outputs are combined."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from ..options import WIDEST, check_options
from ..quantised import Format
from ..registry import Registry

if TYPE_CHECKING:
    from .base import ExpertKind

Size = Literal["small", "medium", "large", "very_large"] | list[int]

SIZES: dict[str, tuple[list[int], float]] = {
    "small": ([256, 128], 0.3),
    "medium": ([512, 256, 128], 0.4),
    "large": ([1024, 512, 256, 128], 0.5),
    "very_large": ([2048, 1024, 512, 256, 128], 0.6),
}
"""The named sizes: hidden units of each layer, and dropout."""

LIST_DROPOUT = 0.3  # dropout of an expert given as a list of hidden sizes, unless experts.dropout is set


@dataclass
class ExpertsConfig:
    """Experts: place, number, sizes, and how their outputs are combined.

    The registered kinds add the choices of `kind` and their own options.
    """

    place: Literal["head", "blocks"] = "head"
    """head: behind the frozen ViT, on its stored features; blocks: inside the ViT's blocks, in parallel to the frozen
    FFN, with a linear head on backbone.features."""
    blocks: Literal["all"] | list[int] = "all"
    """place blocks: the blocks with experts, counted from 0, negative numbers from the end; all: every block that
    backbone.features depend on."""
    add: list[Size] = field(default_factory=list)
    """With init: new experts, written like sizes, that are appended to those of the run that init names. At the start
    they change nothing; the gate opens to them over router.warmup_steps. In a stored configuration: the last of
    sizes."""
    grown: list[int] = field(default_factory=list)
    """Set by experts.add: the number of experts before each addition. Older experts are computed separately, so that
    their results stay the same bit for bit."""
    head: list[Size] = field(default_factory=list)
    """place blocks: sizes of a mixture on backbone.features that replaces the linear head, with the same routing rule
    and as many experts as sizes; none: a linear head."""
    kind: str = "mlp"
    sizes: list[Size] = field(default_factory=lambda: ["small", "medium", "large", "very_large"])
    """One entry per expert: a named size, or its hidden layers such as [512, 256]; [] is a linear expert."""
    shared: list[Size] = field(default_factory=list)
    """Sizes of shared experts, which process every sample; their logits are added to the mixture's (Dai 2024)."""
    dropout: float | list[float] | None = None
    """Dropout of all experts, or one number for each of sizes and then of shared; null: 0.3, 0.4, 0.5 and 0.6 for the
    named sizes, and 0.3 for a list."""
    inputs: list[list[int]] | None = None
    """The backbone.features that each of sizes, then of shared, reads, counted from 0; null: all."""
    combine: Literal["logits", "probabilities"] = "logits"
    """Mix the experts' logits, or their class probabilities (a mixture distribution, Jacobs 1991)."""
    dispatch: Literal["auto", "sorted", "grouped", "dense"] = "auto"
    """How experts are computed, with equal results. sorted: one expert after another; grouped: experts of the same
    shape in one product; dense: every expert on every sample; auto: by size and device."""
    weights: Format | list[Format] = "float32"
    """Number format of the experts' matrices, for all experts, or one for each of sizes and then of shared: float32, or
    in a run of `compress.py --quantise` float16, int8 or fp8, which are no longer trained."""
    head_weights: Format = "float32"
    """place blocks: the number format of the linear head, in the same way."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """An option that a kind has added."""

    def __post_init__(self):
        for name in ("add", "sizes", "shared", "head"):  # add first: its sizes are among the others
            for size in getattr(self, name) if isinstance(getattr(self, name), list) else ():
                _check_size(f"experts.{name}", size)
        check_options(self, "experts")
        if not self.sizes:
            raise ValueError("experts.sizes is empty: name at least one expert")
        bounds = [0, *self.grown, len(self.sizes)]
        if any(before >= after for before, after in pairwise(bounds)):
            raise ValueError(f"experts.grown is {self.grown}: it must increase, from 1 to below the number of experts")
        if self.add and (not self.grown or self.sizes[self.grown[-1] :] != self.add):
            raise ValueError(
                "experts.add adds experts to those of a run: name the run with --init, and leave experts.sizes out"
            )
        if self.place == "head" and EXPERTS[self.kind].place != "head":
            heads = " or ".join(name for name, kind in EXPERTS.items() if kind.place == "head")
            raise ValueError(
                f"experts.kind {self.kind} is an expert inside the ViT: set experts.place blocks, or {heads}"
            )
        if self.place == "head" and self.blocks != "all":
            raise ValueError(
                f"experts.blocks {self.blocks} needs experts.place blocks: set it, or leave out experts.blocks"
            )
        if self.head and (self.place == "head" or len(self.head) != len(self.sizes)):
            rule = f"needs {len(self.sizes)} entries, as sizes"
            rule = "needs experts.place blocks" if self.place == "head" else rule
            raise ValueError(f"experts.head {self.head} {rule}: set that, or leave it out")
        if self.place == "head" and self.head_weights != "float32":
            raise ValueError(f"experts.head_weights {self.head_weights} needs experts.place blocks: leave it out")
        if self.blocks == []:
            raise ValueError("experts.blocks is empty: name at least one block, or all")
        count = len(self.sizes) + len(self.shared)
        for name in ("dropout", "inputs", "weights"):
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != count:
                raise ValueError(
                    f"experts.{name} has {len(value)} entries for {count} experts ({len(self.sizes)} in experts.sizes, "
                    f"{len(self.shared)} in experts.shared): give one for each"
                )
        for rate in self.dropout if isinstance(self.dropout, list) else [self.dropout]:
            if rate is not None and not 0 <= rate < 1:
                raise ValueError(f"experts.dropout is {rate}: it must be at least 0 and below 1")
        if self.inputs is not None and self.dispatch == "grouped":
            raise ValueError("experts.dispatch grouped does not support experts.inputs: use auto, sorted or dense")
        for groups in self.inputs or []:
            if not groups or len(set(groups)) < len(groups):
                raise ValueError(
                    f"experts.inputs has {groups}: an expert must read at least one feature, and each only once"
                )

    @property
    def idle(self) -> list[str]:
        """One line for each option of other kinds of experts, which has no effect."""
        return EXPERTS.unread(self, "experts")

    @property
    def first_new(self) -> int | None:
        """The first of the experts that this run adds (None: it adds none)."""
        return self.grown[-1] if self.add else None

    @property
    def generation_bounds(self) -> list[tuple[int, int]]:
        """The first and the end index of each generation of experts that were added together."""
        return list(pairwise([0, *self.grown, len(self.sizes)]))

    @property
    def formats(self) -> list[str]:
        """The number format of each routed expert, then of each shared one."""
        count = len(self.sizes) + len(self.shared)
        return list(self.weights) if isinstance(self.weights, list) else [self.weights] * count

    @property
    def quantised(self) -> bool:
        """Whether any matrix is stored in fewer bits than it is trained in."""
        return set(self.formats) | {self.head_weights} != {"float32"}

    def hidden(self, expert: int) -> list[int]:
        """Hidden units of each layer of one expert; shared experts are numbered after the others."""
        size = (self.sizes + self.shared)[expert]
        return SIZES[size][0] if isinstance(size, str) else list(size)

    def dropout_of(self, expert: int) -> float:
        """Dropout of one expert."""
        if self.dropout is not None:
            return self.dropout[expert] if isinstance(self.dropout, list) else self.dropout
        size = (self.sizes + self.shared)[expert]
        return SIZES[size][1] if isinstance(size, str) else LIST_DROPOUT

    def labels(self) -> list[str]:
        """A name for each routed expert in figures: its index and hidden sizes."""
        return [f"{e} · {self._units(e)}" for e in range(len(self.sizes))]

    def shared_labels(self) -> list[str]:
        """The hidden sizes of each shared expert."""
        return [self._units(len(self.sizes) + e) for e in range(len(self.shared))]

    def _units(self, expert: int) -> str:
        return "-".join(map(str, self.hidden(expert))) or "linear"

    def work(self, in_features: int, num_classes: int, num_groups: int = 1) -> list[float]:
        """Multiply-adds of each routed expert on one sample, as `router.target_load size` uses them."""
        costs = []
        for expert in range(len(self.sizes)):
            read = in_features if self.inputs is None else in_features // num_groups * len(self.inputs[expert])
            costs.append(float(EXPERTS[self.kind].work([read, *self.hidden(expert), num_classes])))
        return costs


def _check_size(name: str, size: Any) -> None:
    if isinstance(size, int):
        raise ValueError(
            f"{name} has {size}: give the list of an expert's hidden layers, such as [{size}], or one of "
            f"{', '.join(SIZES)}"
        )
    if isinstance(size, str) and size not in SIZES:
        raise ValueError(f"{name} has '{size}': use one of {', '.join(SIZES)}, or a list of whole numbers")
    if isinstance(size, list) and not all(isinstance(width, int) and 1 <= width <= WIDEST for width in size):
        raise ValueError(f"{name} has {size}: hidden layers need 1 to {WIDEST:,} units")


EXPERTS: "Registry[type[ExpertKind]]" = Registry("expert kind", ExpertsConfig, "kind")
"""The kinds of experts by name."""

register = EXPERTS.register
