"""Fine-tune a mixture on a narrow domain, and measure the effect on its gate and on classes that it no longer sees.

python -m benchmarks.narrow --data.root DATA --backbone.weights FILE     CIFAR-100, then three of its superclasses
python -m benchmarks.narrow --tiny                                       a quick trial on a CPU, with digits

Options that are not listed below go to train.py's configuration; the default is the head recipe. For each seed the
mixture is trained on all classes, and then fine-tuned on the images of a few superclasses (without superclasses: the
first three classes), alone or with --replay images of every other class, once for each way to treat the gate:

free        trained, without an auxiliary loss
frozen      not trained, and neither is the norm before it
balance     trained with the switch loss at --balance_weight
z_loss      trained with the z-loss at --z_weight
distance    trained with the old_gate loss at --distance_weight

Gates read standardised features (--norms batch, the recipe's router.norm) or unchanged features (--norms none). Each
result is a line of narrow.jsonl in --out; finished results are not repeated. If one way fails, it reports the reason,
and the others continue.
"""

import argparse
import statistics
import sys
import time
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from analysis.routing import load_entropy
from assembly.pipeline import build_bank, build_model
from benchmarks.common import (
    Failure,
    Limit,
    Parser,
    append_line,
    attempt,
    captured,
    environment,
    header,
    read_lines,
    require_finite,
    start,
    table,
)
from benchmarks.incremental import head_words
from benchmarks.incremental_data import Data
from common.errors import exit_code_of, say
from common.network import reachable
from config.command_line import parse_command_line
from config.config import Config
from data.datasets import load_splits
from data.image_set import Splits
from model.backbone import load_backbone
from model.balance import BalanceConfig
from model.losses import LOSSES
from model.old_gate import hold_old_gates
from model.transfer import Frozen, Shared
from storage.checkpoint import seed_everything
from training.optim import build_optimizer, set_learning_rate
from training.step import TrainingStep

NORMS = ("batch", "none")
WAYS = ("free", "frozen", "balance", "z_loss", "distance")
SUPERCLASSES = 3
UNUSED = 0.01  # share of the load below which an expert counts as unused


def main(argv: list[str] | None = None) -> None:
    """Train the missing runs, and print the table."""
    tiny = {"seeds": [0, 1], "views": 1, "epochs": 3, "narrow_epochs": 3}
    parser = Parser("narrow", __doc__, seconds=900, tiny=tiny)
    parser.allow_abbrev = False
    parser.add_numbers("--seeds", [0, 1, 2, 3, 4], "seeds of weights and batches", least=0)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="ways to run (default: all)")
    parser.add_numbers("--replay", [0, 20], "images of each other class to add to the training", least=0)
    parser.add_argument("--norms", nargs="+", choices=NORMS, default=["batch"], help="router.norm (default batch)")
    parser.add_argument("--views", type=int, default=4, metavar="N", help="augmented views of each image (default 4)")
    parser.add_argument("--epochs", type=int, default=20, help="epochs on all classes (default 20)")
    parser.add_argument("--narrow_epochs", type=int, default=20, help="epochs on the superclasses (default 20)")
    parser.add_argument("--balance_weight", type=float, default=0.1, help="weight of the switch loss (default 0.1)")
    parser.add_argument("--z_weight", type=float, default=0.01, help="weight of the z-loss (default 0.01)")
    parser.add_argument("--distance_weight", type=float, default=1.0, help="weight of the old_gate loss (default 1)")
    options, rest = parser.parse_known_args(argv)
    limit = Limit(options.seconds)
    device = start(options)
    path = options.out / f"narrow{'_tiny' if options.tiny else ''}.jsonl"
    done = {key(row) for row in read_lines(path)}
    todo = [
        {"norm": norm, "replay": replay, "seed": seed, "way": way}
        for norm in options.norms
        for replay in options.replay
        for seed in options.seeds
        for way in options.ways
    ]
    todo = [row for row in todo if key(row) not in done]
    if todo:
        config = parse_command_line(head_words(options, rest)).config
        splits = load_splits(config.data)
        backbone = load_backbone(config.backbone, device, reachable)
        bank = build_bank(config, splits, backbone, device)
        data = Data.of(bank, options.views, len(config.backbone.features))
        started: dict[tuple, Narrow | Failure] = {}
        for count, row in enumerate(todo):
            if limit.over:
                left = f"{len(todo) - count} of {len(todo)} runs have no result"
                say(f"{left}: the {options.seconds:g} s of --seconds are over")
                break
            norm, seed = row["norm"], row["seed"]
            own = replace(config, router=replace(config.router, norm=norm))
            if (norm, seed) not in started:
                begin = partial(Narrow, own, splits, data, bank.feature_shape, seed, options, limit)
                started[norm, seed] = attempt(begin)
            narrow = started[norm, seed]
            found = narrow if isinstance(narrow, Failure) else attempt(partial(narrow.run, row["way"], row["replay"]))
            shown = ", ".join(f"{name} {value}" for name, value in row.items())
            if isinstance(found, Failure):
                say(f"{shown}: no result, {found.reason}")
                continue
            append_line(path, row | found | {"environment": environment(device)})
            say(f"{shown}: macro-F1 {_scores_of(found)}, {found['seconds']:.1f} s")
    print(header("Fine-tuned on a narrow domain: macro-F1 in %, shares of the load", environment(device)))
    print(table(*summary(read_lines(path))))


def key(row: dict[str, Any]) -> tuple:
    """The key of a result."""
    return row["norm"], row["replay"], row["seed"], row["way"]


class Narrow:
    """One seed: a mixture trained on all classes, and fine-tuned in several ways."""

    def __init__(
        self,
        config: Config,
        splits: Splits,
        data: Data,
        shape: tuple[int, ...],
        seed: int,
        options: argparse.Namespace,
        limit: Limit,
    ):
        self.config, self.data, self.shape, self.seed, self.options = config, data, shape, seed, options
        self.limit, self.device, self.names = limit, data.labels_N.device, splits.train.class_names
        groups_C = splits.train.superclass_of_class()
        groups_C = np.arange(len(self.names)) if groups_C is None else groups_C
        self.narrow = np.flatnonzero(groups_C < SUPERCLASSES).tolist()
        self.others = np.flatnonzero(groups_C >= SUPERCLASSES).tolist()
        self.classes = range(len(self.names))
        seed_everything(seed)
        model = self._build()
        everything = torch.arange(len(data.labels_N), device=self.device)
        steps = -(-len(everything) // self._batch(everything)) * options.epochs
        warmup = min(config.router.random_steps, steps // 4)
        self._train(model, everything, options.epochs, config.balance, None, warmup)
        self.weights = {name: value.clone() for name, value in model.state_dict().items()}
        self.before = self._scores(model)

    def run(self, way: str, replay: int) -> dict[str, Any]:
        """The scores before and after fine-tuning in one way. replay: additional images of each other class."""
        began = time.perf_counter()
        mine = torch.cat([self._of([label])[: None if label in self.narrow else replay] for label in self.classes])
        seed_everything(self.seed)
        model = self._build()
        model.load_state_dict(self.weights)
        shared = Shared.by_name(self.names, self.names)
        frozen = Frozen(model, ["neck", "router"], shared, len(self.names)) if way == "frozen" else None
        options = self.options
        losses = {"balance": ("switch", options.balance_weight), "z_loss": ("z_loss", options.z_weight)}
        losses["distance"] = ("old_gate", options.distance_weight)
        weights = dict.fromkeys(LOSSES, 0.0) | dict([losses[way]] if way in losses else [])
        if weights["old_gate"]:
            hold_old_gates(model)
        self._train(model, mine, options.narrow_epochs, BalanceConfig(**weights), frozen, 0)
        after = self._scores(model)
        return {"before": self.before, "after": after, "seconds": time.perf_counter() - began}

    def _of(self, classes: list[int], split: str = "train") -> Tensor:
        """The rows of some classes."""
        labels_N = self.data.labels_N if split == "train" else self.data.test[1]
        return torch.isin(labels_N, torch.tensor(classes, device=self.device)).nonzero().flatten()

    def _build(self) -> Any:
        return build_model(self.config, self.shape, len(self.names)).to(self.device)

    def _batch(self, rows: Tensor) -> int:
        return min(self.config.train.batch_size, max(32, len(rows) // 20))

    def _train(self, model, rows, epochs: int, balance: BalanceConfig, frozen, warmup: int) -> None:
        """Train on these training images."""
        batch, data = self._batch(rows), self.data
        total, done = -(-len(rows) // batch) * epochs, 0
        optim = replace(self.config.optim, warmup_steps=min(50, total // 5))
        optimizer = build_optimizer(model, optim)
        precision = self.config.train.precision
        step = TrainingStep(model, optimizer, balance, 0.1, optim.clip_norm, precision, frozen)
        run = captured(step, self.config.train.graph, batch)
        model.train()
        if frozen:
            frozen.hold()
        for epoch in range(epochs):
            view_NF = data.train_VNF[epoch % len(data.train_VNF)]
            for part in rows[torch.randperm(len(rows)).to(self.device)].split(batch):
                self.limit.check()
                set_learning_rate(optimizer, done, total, optim)
                run(view_NF[part].float(), data.labels_N[part], warmup=done < warmup)
                done += 1
        require_finite(step)

    @torch.no_grad()
    def _scores(self, model) -> dict[str, Any]:
        """Macro-F1 on the narrow classes and on the others, the load, and each expert's contribution.

        alone: where only these classes may be answered.
        """
        model.eval()
        features, labels_N = self.data.test
        number = model.moe.router.num_experts
        found: dict[str, Any] = {}
        for name, classes in (("narrow", self.narrow), ("others", self.others)):
            rows = self._of(classes, "test")
            logits_MC, load_E = self._answers(model, features[rows], None)
            f1 = macro_f1(labels_N[rows], logits_MC.argmax(dim=1), classes)
            own = torch.tensor(classes, device=self.device)
            alone = macro_f1(labels_N[rows], own[logits_MC[:, own].argmax(dim=1)], classes)
            share_E = load_E / load_E.sum()
            found[name] = {"macro_f1": f1, "alone": alone, "load": share_E.tolist(), "entropy": load_entropy(share_E)}
            if name == "narrow":
                allowed = ~torch.eye(number, dtype=torch.bool, device=self.device)
                without = [self._answers(model, features[rows], allowed_E)[0].argmax(dim=1) for allowed_E in allowed]
                found[name]["worth"] = [f1 - macro_f1(labels_N[rows], other, classes) for other in without]
        return found

    def _answers(self, model, features_MF: Tensor, allowed_E: Tensor | None) -> tuple[Tensor, np.ndarray]:
        """Logits (M, C), and how often each expert was chosen."""
        answered, load_E = [], np.zeros(model.moe.router.num_experts)
        for part in features_MF.split(1024):
            logits_BC, (routing,) = model(part.float(), allowed_E=allowed_E)
            answered.append(logits_BC)
            load_E += routing.counts_E.cpu().numpy()
        return torch.cat(answered), load_E


def _scores_of(row: dict[str, Any]) -> str:
    shown = (f"{name} {100 * row['after'][name]['macro_f1']:.2f} %" for name in ("narrow", "others"))
    return ", ".join(shown)


def macro_f1(labels_N: Tensor, predicted_N: Tensor, classes: list[int]) -> float:
    """Mean F1 of these classes, even if other classes are predicted."""
    from sklearn.metrics import f1_score

    true, answer = labels_N.cpu().numpy(), predicted_N.cpu().numpy()
    return float(f1_score(true, answer, labels=classes, average="macro", zero_division=0))


def summary(rows: list[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Names and cells of the table: before fine-tuning, then each way, means and deviations over seeds."""
    columns = ["router.norm", "old images per class", "gate", "seeds", "F1 narrow", "F1 others", "F1 others alone"]
    columns += ["entropy narrow", "entropy others", "smallest load", "unused", "contribution of each expert"]
    cells = []
    for norm in NORMS:
        of_norm = [row for row in rows if row["norm"] == norm]
        if before := list({row["seed"]: row["before"] for row in of_norm}.values()):
            cells.append([norm, "", "before", str(len(before)), *_cells(before)])
        for replay in sorted({row["replay"] for row in of_norm}):
            for way in WAYS:
                if found := [row["after"] for row in of_norm if (row["replay"], row["way"]) == (replay, way)]:
                    cells.append([norm, str(replay), way, str(len(found)), *_cells(found)])
    return columns, cells


def _cells(found: list[dict[str, Any]]) -> list[str]:
    def shown(values: list[float], factor: float = 100.0) -> str:
        mean = f"{factor * statistics.fmean(values):.2f}"
        return mean + (f" ± {factor * statistics.stdev(values):.2f}" if len(values) > 1 else "")

    narrow = [row["narrow"] for row in found]
    least = [min(row["load"]) for row in narrow]
    lost = [float(sum(share < UNUSED for share in row["load"])) for row in narrow]
    worth = np.array([sorted(row["worth"], reverse=True) for row in narrow]).mean(axis=0)
    asked = (("narrow", "macro_f1"), ("others", "macro_f1"), ("others", "alone"))
    scores = [shown([row[name][which] for row in found]) for name, which in asked]
    entropies = [shown([row[name]["entropy"] for row in found], 1.0) for name in ("narrow", "others")]
    return [*scores, *entropies, shown(least), shown(lost, 1.0), " ".join(f"{100 * value:+.2f}" for value in worth)]


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
