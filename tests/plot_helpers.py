"""Figures of synthetic runs, of usual and of extreme sizes."""

import math
from functools import cache

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg

from analysis import plots
from analysis.gate import Plane

CIFAR_100_SUPERCLASSES = """aquatic mammals, fish, flowers, food containers, fruit and vegetables,
household electrical devices, household furniture, insects, large carnivores, large man-made outdoor things,
large natural outdoor scenes, large omnivores and herbivores, medium-sized mammals, non-insect invertebrates,
people, reptiles, small mammals, trees, vehicles 1, vehicles 2""".replace("\n", " ").split(", ")


def labels(experts):
    return [f"{e} · {('256-128', '512', '2048-1024-512-256-128')[e % 3]}" for e in range(experts)]


def shares(rows, experts, seed=0):
    return np.random.default_rng(seed).dirichlet(np.full(experts, 0.4), rows)


def history(epochs):
    rows = [{"epoch": t, "loss/train": 4 / t, "accuracy/validation": 1 - 1 / t} for t in range(1, epochs + 1)]
    rows[0]["loss/validation"] = math.inf
    rows[-1] |= {"macro_f1/validation": 0.5, "learning_rate/train": 1e-3, "loss/train": None}
    return rows


def by_class(classes, experts, groups=None, long=False):
    names = [("a_class_of_a_very_long_name_$x$_" if long else "class ") + str(c) for c in range(classes)]
    group = {"load_CE": shares(classes, experts, 1)}
    group |= {"group_C": np.arange(classes) % groups} if groups else {}
    group |= {"group_names": [CIFAR_100_SUPERCLASSES[g % 20] for g in range(groups)]} if groups else {}
    return plots.expert_by_class(shares(classes, experts), names, labels(experts), **group)


def confusion(names):
    counts = np.random.default_rng(0).poisson(1.0, (names, names)) + 50 * np.eye(names)
    counts[0] = 0
    return plots.superclass_confusion(counts, [CIFAR_100_SUPERCLASSES[g % 20] for g in range(names)])


def worth(experts, parameters=None):
    rng = np.random.default_rng(0)
    parameters = 50_000 * 2 ** np.arange(experts) if parameters is None else parameters
    return plots.expert_worth(
        rng.normal(0.02, 0.02, experts), [0.004] * experts, parameters, shares(1, experts)[0], labels(experts)
    )


def gate_map(samples, experts, groups):
    rng = np.random.default_rng(0)
    group_N = np.arange(samples) % max(1, groups)
    points = rng.normal(size=(samples, 2)) + 0.5 * rng.normal(size=(max(1, groups), 2))[group_N]
    names = [CIFAR_100_SUPERCLASSES[g] for g in range(groups)]
    plane = Plane(points, np.array([0.6, 0.3]), 0.8, 0.4)
    return plots.gate_map(plane, rng.integers(-1, experts, samples), labels(experts), group_N, names)


def pairs(count):
    return plots.confused_pairs(
        [(f"a_rather_long_class {i}", f"class {i}", 40 - i, i // 2) for i in range(count)], 2000
    )


def reliability(counts):
    bins = len(counts)
    middle = np.where(np.array(counts) > 0, (np.arange(bins) + 0.6) / bins, np.nan)
    return plots.reliability(middle, middle**2, counts, 0.0812)


def comparison(runs, name="cifar100-20260101-12000{}", panels=4):
    rng = np.random.default_rng(0)
    values = {f"panel {p}": {"macro-F1": rng.random(runs)} for p in range(panels)}
    if panels:
        values["panel 0"]["accuracy"] = np.where(np.arange(runs) % 2, np.nan, 0.7)
    return plots.comparison([name.format(run) for run in range(runs)], values, from_zero=["panel 1"])


def pictures(count, experts, channels=3, size=32):
    images = np.random.default_rng(0).integers(0, 256, (count, size, size, channels), dtype=np.uint8)
    chosen = [list(zip(labels(experts), [1 / experts] * experts, strict=True)) for _ in range(count)]
    if count > 1:
        chosen[1] = []
    names = [f"a very long class name indeed {i}" for i in range(count)]
    return plots.samples(images, names, names[::-1], chosen)


def searched(trials):
    """A search with this number of trials, every third of them pruned, over options of every kind."""
    scores = [None if trial % 3 == 1 else 0.9 + 0.002 * trial for trial in range(trials)]
    sizes = [[[16], [32], [64], [128]], [[64]] * 4, ["small", "large"]]
    options = {
        "optim.lr": [10.0 ** -(1 + trial % 4) for trial in range(trials)],
        "experts.sizes": [sizes[trial % 3] for trial in range(trials)],
        "router.top_k": [1 + trial % 2 for trial in range(trials)],
    }
    curves = [[0.5, 0.8, 0.9][: 3 - (score is None)] for score in scores]
    return plots.search(scores, curves, options, logarithmic=["optim.lr"])


MAIN = {
    "curves": lambda: plots.training_curves(history(30)),
    "time": lambda: plots.load_over_time(np.arange(1, 31), shares(30, 4), labels(4), 3),
    "load": lambda: plots.expert_load(shares(1, 4)[0], shares(1, 4, 1)[0], labels(4)),
    "class 10": lambda: by_class(10, 4),
    "class 100": lambda: by_class(100, 8, groups=20),
    "confusion": lambda: confusion(20),
    "samples": lambda: pictures(10, 2),
    "worth": lambda: worth(4),
    "gate": lambda: gate_map(300, 4, 20),
    "pairs": lambda: pairs(30),
    "reliability": lambda: reliability([0, 3, 9, 0, 70] * 3),
    "comparison": lambda: comparison(3),
    "12 compared": lambda: comparison(12),
    "search": lambda: searched(24),
}

EDGE = {
    "no epochs": lambda: plots.training_curves([]),
    "one epoch": lambda: plots.training_curves(history(1)),
    "nothing known": lambda: plots.training_curves([{"epoch": 1, "loss/train": math.nan}]),
    "no load": lambda: plots.load_over_time([], np.zeros((0, 4)), labels(4)),
    "one load": lambda: plots.load_over_time([1], shares(1, 2), labels(2), 5),
    "16 over time": lambda: plots.load_over_time([1, 2], shares(2, 16), labels(16)),
    "64 over time": lambda: plots.load_over_time(np.arange(9), shares(9, 64), labels(64), 1.5),
    "one expert": lambda: plots.expert_load([1.0], [1.0], labels(1)),
    "unused": lambda: plots.expert_load(np.zeros(4), np.zeros(4), labels(4)),
    "64 experts": lambda: plots.expert_load(shares(1, 64)[0], shares(1, 64, 1)[0], labels(64)),
    "one class": lambda: by_class(1, 1),
    "no assignment": lambda: plots.expert_by_class(np.zeros((3, 2)), list("abc"), labels(2)),
    "long names": lambda: by_class(101, 2, groups=101, long=True),
    "1000 classes": lambda: by_class(1000, 64, groups=12),
    "two names": lambda: confusion(2),
    "60 names": lambda: confusion(60),
    "no pictures": lambda: pictures(0, 2),
    "grey picture": lambda: pictures(1, 1, channels=1, size=8),
    "equal experts": lambda: worth(24, [1000] * 24),
    "one sample": lambda: gate_map(1, 1, 0),
    "64 mapped": lambda: gate_map(200, 64, 3),
    "no pairs": lambda: pairs(0),
    "one bin": lambda: reliability([4]),
    "nothing compared": lambda: comparison(1, panels=0),
    "60 compared": lambda: comparison(
        80, panels=1, name="a run of a name that is far too long to be shown in full, $x$ {}"
    ),
    "soft routing": lambda: pictures(7, 64, size=224),
    "one trial": lambda: searched(1),
}


@cache
def drawn(name):
    figure = MAIN[name]()
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return figure, canvas


def texts(figure):
    return [text for text in figure.findobj(matplotlib.text.Text) if text.get_visible() and text.get_text()]
