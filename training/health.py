"""What goes wrong while training: numbers that are not finite, and experts that nothing reaches."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError, warn
from model.balance import BalanceConfig

OUTPUT = "output of the backbone"
REMEDIES = {
    OUTPUT: "it overflows --features.storage or --backbone.precision: use float32",
    "gradient": "lower --optim.lr, or set --optim.clip_norm",
}
COLLAPSED = 0.999  # share of the assignments on as many experts as one sample sees


class NumberWatch:
    """The first step of which a number is not finite, kept on the device so that no step has to wait for it.

    terms: names of what is watched, causes before effects. From that step on `refuse` is 1.0, by which the fused
    optimizer on a GPU leaves the weights as they are; the host learns of it when it next calls `look`: when the
    progress bar is drawn, and before anything is validated, saved or logged. On a CPU every step looks.
    """

    def __init__(self, terms: Iterable[str], device: torch.device):
        self.terms = list(terms)
        self.bad_T = torch.zeros(len(self.terms), dtype=torch.bool, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int64, device=device)
        self.refuse = torch.zeros((), device=device)
        self._zero = torch.zeros((), device=device)

    def reset(self) -> None:
        """Count steps from here; in place, because a captured step writes where it always did."""
        for tensor in (self.bad_T, self.good_steps, self.refuse):
            tensor.zero_()

    def see(self, values: dict[str, Tensor]) -> None:
        """Take note of a step's scalars; a term that the step has not counts as good."""
        values_T = torch.stack([values.get(term, self._zero).detach().float() for term in self.terms])
        now_T = ~torch.isfinite(values_T)
        self.bad_T.copy_(torch.where(self.bad_T.any(), self.bad_T, now_T))
        self.refuse.copy_(self.bad_T.any())
        self.good_steps += self.refuse == 0

    def look(self) -> tuple[int, str] | None:
        """(good steps before the first bad one, its offending term), or None where all is well; waits for a GPU."""
        if not float(self.refuse):
            return None
        return int(self.good_steps), self.terms[int(self.bad_T.to(torch.uint8).argmax())]


def not_finite(term: str, step: int, epoch: int, kept: str) -> UserError:
    """The error that ends training; kept: the last good checkpoint, in words."""
    kind, _, name = term.rpartition(" ")
    weight = f" or --balance.{name}" if kind == "auxiliary loss" else ""
    remedy = REMEDIES.get(term, f"lower --optim.lr{weight}")
    if step == 1 and term != OUTPUT:  # no weight has moved yet, so that the learning rate cannot be the cause
        cause = f"set --balance.{name} to 0 or" if weight else "lower the weights of --balance, or"
        remedy = f"no step was taken yet, so {cause} set --router.temperature and --router.noise_std nearer to 1"
    return UserError(
        f"the {term} is not finite at step {step}, in epoch {epoch}: {remedy} (last good checkpoint: {kept})"
    )


class RoutingWatch:
    """Says once each that the gate has collapsed, and that an expert went without a sample for an epoch.

    said: which of the two has been said, to be stored with a checkpoint.
    """

    def __init__(self, top_k: int, balance: BalanceConfig, bias_rate: float = 0.0):
        self.top_k, self.said = top_k, []
        self.remedy = f"raise --balance.switch (now {balance.switch:g}), or use --router.norm batch"
        if bias_rate:
            self.remedy = f"raise --router.bias_rate (now {bias_rate:g}), or use --router.norm batch"

    def look(self, usage_E: np.ndarray, epoch: int) -> None:
        """usage_E: samples that each expert received from the learned gate in an epoch without random routing."""
        if not self.collapsed(usage_E, f"in epoch {epoch} all samples"):
            self._look_for_unused(usage_E, epoch)

    def collapsed(self, usage_E: np.ndarray, who: str) -> bool:
        """Whether as few experts as one sample sees have all of the usage; says so, of `who`, the first time.

        usage_E: assignments of each expert, or shares.
        """
        if len(usage_E) <= self.top_k or not usage_E.sum():
            return False
        used = np.sort(usage_E)[::-1][: self.top_k].sum() / usage_E.sum()
        if used >= COLLAPSED and "collapse" not in self.said:
            self.said += ["collapse", "unused"]  # which follows from it
            busy = sorted(np.argsort(usage_E)[::-1][: self.top_k].tolist())
            warn(f"routing has collapsed: {who} went to the experts {busy}; {self.remedy}")
        return bool(used >= COLLAPSED)

    def _look_for_unused(self, usage_E: np.ndarray, epoch: int) -> None:
        unused = np.flatnonzero(usage_E == 0).tolist()
        if len(usage_E) <= self.top_k or not usage_E.sum() or not unused or "unused" in self.said:
            return
        self.said.append("unused")
        remedy = f"{self.remedy}, or more --router.warmup_steps"
        warn(f"no sample of epoch {epoch} went to the expert(s) {unused}; {remedy}")
