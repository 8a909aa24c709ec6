"""Health checks of training: numbers that are not finite, and experts that are hardly used."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from analysis.routing import underused
from common.errors import UserError, warn
from model.balance import BalanceConfig
from model.norm import Standardise
from model.routers import Router

OUTPUT = "output of the backbone"
REMEDIES = {
    OUTPUT: "it overflows --features.storage or --backbone.precision: use float32",
    "gradient": "lower --optim.lr, or set --optim.clip_norm",
}
COLLAPSED = 0.999  # share of the assignments on as many experts as one sample uses


class NumberWatch:
    """Records the first step with a number that is not finite, on the device, so that no step has to wait.

    terms: names of the numbers, causes before effects. From that step on `found_inf` is 1.0, which makes the fused
    optimizer on a GPU skip its updates; the host notices at its next `check`: when the progress bar is drawn, and
    before anything is validated, saved or logged. On a CPU every step checks.
    """

    def __init__(self, terms: Iterable[str], device: torch.device, processes: int = 1):
        self.terms = list(terms)
        self.bad_P = torch.zeros(processes, device=device)  # above 0: processes in which it occurred first
        self.bad_T = torch.zeros(len(self.terms), dtype=torch.bool, device=device)
        self.good_steps = torch.zeros((), dtype=torch.int64, device=device)
        self.found_inf = torch.zeros((), device=device)
        self._zero = torch.zeros((), device=device)

    def reset(self) -> None:
        """Restart the count of steps, in place, because a captured step writes to the same tensors."""
        for tensor in (self.bad_T, self.bad_P, self.good_steps, self.found_inf):
            tensor.zero_()

    def record(self, values: dict[str, Tensor], bad_P: Tensor | None = None) -> None:
        """Record a step's scalars; a missing term counts as finite. bad_P: from training.exchange."""
        values_T = torch.stack([values.get(term, self._zero).detach().float() for term in self.terms])
        now_T = ~torch.isfinite(values_T)
        if bad_P is not None:
            self.bad_P.copy_(torch.where(self.bad_T.any(), self.bad_P, bad_P))
        self.bad_T.copy_(torch.where(self.bad_T.any(), self.bad_T, now_T))
        self.found_inf.copy_(self.bad_T.any())
        self.good_steps += self.found_inf == 0

    def check(self) -> tuple[int, str] | None:
        """(good steps before the first bad one, its first bad term), or None; waits for a GPU."""
        if not float(self.found_inf):
            return None
        return int(self.good_steps), self.terms[int(self.bad_T.to(torch.uint8).argmax())]

    def where(self) -> str:
        """The process in which it occurred, as " on rank 1", if there are several; waits for a GPU."""
        return f" on rank {int(self.bad_P.argmax())}" if self.bad_P.any() else ""


def not_finite(term: str, step: int, epoch: int, kept: str, where: str = "") -> UserError:
    """The error that ends training. kept: the last good checkpoint, in words. where: the process, of several."""
    kind, _, name = term.rpartition(" ")
    weight = f" or --balance.{name}" if kind == "auxiliary loss" else ""
    remedy = REMEDIES.get(term, f"lower --optim.lr{weight}")
    if step == 1 and term != OUTPUT:  # no weight has changed yet, so the learning rate cannot be the cause
        cause = f"set --balance.{name} to 0 or" if weight else "lower the weights of --balance, or"
        remedy = f"no weight has changed yet, so {cause} set --router.temperature and --router.noise_std closer to 1"
    return UserError(
        f"the {term} is not finite{where} at step {step}, in epoch {epoch}: {remedy} (last good checkpoint: {kept})"
    )


class RoutingWatch:
    """Warns once if the gate has collapsed, and once per expert that is hardly used.

    router, balance: determine which option helps. warned: warnings already given, stored in checkpoints.
    """

    def __init__(self, router: Router, balance: BalanceConfig, warmup_steps: int):
        self.top_k, self.target_E, self.warned = router.top_k, router.target_E.cpu().numpy(), []
        self.remedy = _remedy(router, balance, warmup_steps)

    def check(self, load_E: np.ndarray, epoch: int, split: str, where: str = "") -> None:
        """Check the load after an epoch of the learned gate. load_E: assignments or shares per expert on a split.

        where: the block of the gate, in words, if there are several.
        """
        if len(load_E) <= self.top_k or not load_E.sum():
            return
        order_E = np.argsort(-load_E, kind="stable")
        busy = sorted(order_E[: self.top_k].tolist())
        if load_E[busy].sum() >= COLLAPSED * load_E.sum():
            if "collapse" not in self.warned:
                self.warned += ["collapse", *(f"expert {expert}" for expert in range(len(load_E)))]
                what = f"all {split} images of epoch {epoch} went{where} to {_experts(busy)}"
                warn(f"routing has collapsed: {what}; {self.remedy}")
            return
        idle = np.flatnonzero(underused(load_E, self.target_E))
        idle = [expert for expert in idle.tolist() if f"expert {expert}" not in self.warned]
        if idle:
            self.warned += [f"expert {expert}" for expert in idle]
            share = 100 * load_E[idle].max() / load_E.sum()
            most = f"{share:.1f} %" if len(idle) == 1 else f"at most {share:.1f} % each"
            warn(f"{_experts(idle)} received {most} of the {split} assignments of epoch {epoch}{where}; {self.remedy}")


def _experts(numbers: list[int]) -> str:
    """ "expert 3", "experts 0, 1 and 3"."""
    *first, last = map(str, numbers)
    return f"experts {', '.join(first)} and {last}" if first else f"expert {last}"


def _remedy(router: Router, balance: BalanceConfig, warmup_steps: int) -> str:
    """The option that balances the load under this rule."""
    if not router.learns:
        return "this rule is fixed, so use fewer --experts.sizes"
    loss = f"raise --balance.switch (now {balance.switch:g}), by ten times or more"
    rate = getattr(router, "bias_rate", None)
    options = [f"raise --router.bias_rate (now {rate:g})"] if rate else [loss]
    if rate == 0:
        options = ["set --router.bias_rate 0.001", loss]
    options.append(f"raise --router.warmup_steps (now {warmup_steps})")
    if not any(isinstance(layer, Standardise) for layer in router.trunk):
        options.append("set --router.norm batch")
    return ", or ".join(options)
