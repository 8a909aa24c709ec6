"""ExpertsConfig: where experts are, how many, how large, and how their outputs are put together."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..options import WIDEST, check_options
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

LIST_DROPOUT = 0.3  # of an expert given as a list of hidden sizes, unless experts.dropout says otherwise


@dataclass
class ExpertsConfig:
    """Experts: where they are, how many, how large, and how their outputs are put together.

    The choices of `kind`, and the options of some kinds alone, are those of the registered ones.
    """

    place: Literal["head", "blocks"] = "head"
    """head: behind the frozen ViT, on its stored features; blocks: inside its blocks, beside each one's frozen FFN,
    with a linear head on backbone.features."""
    blocks: Literal["all"] | list[int] = "all"
    """place blocks: the blocks that have experts, counted from 0, negative ones from the end; all: every one that
    backbone.features depend on."""
    head: list[Size] = field(default_factory=list)
    """place blocks: experts of a mixture on backbone.features, with a gate of the same rule, as many as there are sizes
    and given like them; none: one linear layer."""
    kind: str = "mlp"
    sizes: list[Size] = field(default_factory=lambda: ["small", "medium", "large", "very_large"])
    """One entry an expert: a named size, or its hidden layers such as [512, 256]; [] is a linear expert."""
    shared: list[Size] = field(default_factory=list)
    """Experts that every sample passes beside those it is routed to, as sizes; their logits are added to the mixture's
    (Dai 2024)."""
    dropout: float | list[float] | None = None
    """Dropout of every expert, or one number for each of sizes and then of shared; null: each named size's own (0.3,
    0.4, 0.5, 0.6), and 0.3 for a list."""
    inputs: list[list[int]] | None = None
    """For each of sizes, and then of shared, which of backbone.features it reads, counted from 0; null: all."""
    combine: Literal["logits", "probabilities"] = "logits"
    """Mix the experts' logits, or their class probabilities (a mixture distribution, Jacobs 1991)."""
    dispatch: Literal["auto", "sorted", "grouped", "dense"] = "auto"
    """How samples reach their experts, with equal results. sorted: one expert after the other; grouped: experts of one
    shape in one product; dense: every expert on every sample; auto: by size and device."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """An option that a kind has brought along."""

    def __post_init__(self):
        for name in ("sizes", "shared", "head"):
            for size in getattr(self, name) if isinstance(getattr(self, name), list) else ():
                _check_size(f"experts.{name}", size)
        check_options(self, "experts")
        if not self.sizes:
            raise ValueError("experts.sizes is empty: name at least one expert")
        if self.place == "head" and EXPERTS[self.kind].place != "head":
            heads = " or ".join(name for name, kind in EXPERTS.items() if kind.place == "head")
            raise ValueError(
                f"experts.kind {self.kind} is an expert inside the ViT: set experts.place blocks, or {heads}"
            )
        if self.place == "head" and self.blocks != "all":
            raise ValueError(f"experts.blocks {self.blocks} needs experts.place blocks: set it, or leave blocks out")
        if self.head and (self.place == "head" or len(self.head) != len(self.sizes)):
            rule = f"needs {len(self.sizes)} entries, as sizes"
            rule = "is for experts.place blocks" if self.place == "head" else rule
            raise ValueError(f"experts.head {self.head} {rule}: set that, or leave it out")
        if self.blocks == []:
            raise ValueError("experts.blocks is empty: name at least one block, or all")
        count = len(self.sizes) + len(self.shared)
        for name in ("dropout", "inputs"):
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
            raise ValueError("experts.dispatch grouped cannot serve experts.inputs: use auto, sorted or dense")
        for groups in self.inputs or []:
            if not groups or len(set(groups)) < len(groups):
                raise ValueError(f"experts.inputs has {groups}: an expert reads at least one feature, each once")

    def hidden(self, expert: int) -> list[int]:
        """Hidden units of each layer of one expert; the shared ones are counted after the others."""
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
        """Multiply-adds of each routed expert on one sample: what `router.target_load size` goes by."""
        costs = []
        for expert in range(len(self.sizes)):
            read = in_features if self.inputs is None else in_features // num_groups * len(self.inputs[expert])
            costs.append(float(EXPERTS[self.kind].work([read, *self.hidden(expert), num_classes])))
        return costs


def _check_size(name: str, size: Any) -> None:
    if isinstance(size, int):
        raise ValueError(
            f"{name} has {size}: an expert is the list of its hidden layers, such as [{size}], or one of "
            f"{', '.join(SIZES)}"
        )
    if isinstance(size, str) and size not in SIZES:
        raise ValueError(f"{name} has '{size}': known sizes are {', '.join(SIZES)}, or a list of ints")
    if isinstance(size, list) and not all(isinstance(width, int) and 1 <= width <= WIDEST for width in size):
        raise ValueError(f"{name} has {size}: hidden layers have from 1 to {WIDEST:,} units")


EXPERTS: "Registry[type[ExpertKind]]" = Registry("expert kind", ExpertsConfig, "kind")
"""The kinds of experts by name."""

register = EXPERTS.register
