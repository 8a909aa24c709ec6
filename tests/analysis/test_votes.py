"""Most typical samples and disagreements, against tables worked out by hand, and their galleries."""

import numpy as np
import pytest

from analysis.plots.pictures import gallery
from analysis.votes import clearest, disagreements

# Four samples of classes 0, 0, 1, 2; experts 0 and 1 see samples 0, 1, 2, experts 1 and 2 see sample 3.
SAMPLE = [0, 0, 1, 1, 2, 2, 3, 3]
EXPERT = [0, 1, 0, 1, 1, 0, 2, 1]
WEIGHT = [0.6, 0.4, 0.9, 0.1, 0.7, 0.3, 0.5, 0.5]
LABELS = [0, 0, 1, 2]


def test_the_most_typical_samples_have_the_largest_weight_of_each_class():
    # Expert 0: sample 1 (0.9, class 0), sample 0 (0.6, class 0 again), sample 2 (0.3, class 1).
    assert clearest(SAMPLE, EXPERT, WEIGHT, LABELS, 0, 8).tolist() == [1, 2]
    # Expert 1: sample 2 (0.7, class 1), sample 3 (0.5, class 2), sample 0 (0.4, class 0), sample 1 (class 0 again).
    assert clearest(SAMPLE, EXPERT, WEIGHT, LABELS, 1, 8).tolist() == [2, 3, 0]
    assert clearest(SAMPLE, EXPERT, WEIGHT, LABELS, 1, 2).tolist() == [2, 3]
    assert clearest(SAMPLE, EXPERT, WEIGHT, LABELS, 3, 8).tolist() == []
    assert clearest([], [], [], LABELS, 0, 8).tolist() == []


def test_disagreements_count_only_samples_of_both_experts():
    alone_EN = [
        [0, 1, 2, 0],  # expert 0: right on sample 0, wrong on 1 and 2; does not see 3
        [0, 0, 0, 2],  # expert 1: right on 0, 1 and 3, wrong on 2
        [1, 1, 1, 0],  # expert 2: processes only sample 3, and is wrong
    ]
    table = disagreements(alone_EN, LABELS, SAMPLE, EXPERT)
    as_lists = {pair: {name: rows.tolist() for name, rows in found.items()} for pair, found in table.items()}
    none = {"shared": [], "disagree": [], "first": [], "second": [], "neither": []}
    assert as_lists == {
        (0, 1): {"shared": [0, 1, 2], "disagree": [1, 2], "first": [], "second": [1], "neither": [2]},
        (0, 2): none,
        (1, 2): {"shared": [3], "disagree": [3], "first": [3], "second": [], "neither": []},
    }


def test_disagreements_match_a_loop_over_samples():
    random = np.random.default_rng(0)
    experts, samples = 4, 60
    labels_N = random.integers(0, 3, samples)
    alone_EN = random.integers(0, 3, (experts, samples))
    sample_A = np.repeat(np.arange(samples), 2)
    expert_A = np.concatenate([random.permutation(experts)[:2] for _ in range(samples)])
    table = disagreements(alone_EN, labels_N, sample_A, expert_A)
    for (a, b), found in table.items():
        shared = [n for n in range(samples) if {a, b} == set(expert_A[sample_A == n])]
        apart = [n for n in shared if alone_EN[a, n] != alone_EN[b, n]]
        assert found["shared"].tolist() == shared and found["disagree"].tolist() == apart
        assert found["first"].tolist() == [n for n in apart if alone_EN[a, n] == labels_N[n]]
        assert sum(len(found[name]) for name in ("first", "second", "neither")) == len(apart)
    with pytest.raises(ValueError, match="alone_EN has shape"):
        disagreements(alone_EN, labels_N[:-1], sample_A, expert_A)


def test_a_gallery_has_a_caption_over_each_image_and_a_label_for_each_row():
    images = np.zeros((5, 8, 8, 3), np.uint8)
    captions = ["oak_tree", "b\nsecond line", "c", "d", "$e"]
    figure = gallery(images, captions, "Title", columns=3, rows=["0 · 16", "1 · 32"])
    shown = [axes for axes in figure.axes if axes.images]
    assert [axes.get_title() for axes in shown] == ["oak tree", "b\nsecond line", "c", "d", r"\$e"]
    assert [axes.get_ylabel() for axes in figure.axes[::3]] == ["0 · 16", "1 · 32"]
    colours = {axes.yaxis.label.get_color() for axes in figure.axes[::3]}
    assert len(colours) == 2
