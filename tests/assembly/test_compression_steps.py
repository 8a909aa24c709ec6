"""Automatic steps of a compression after one another: the budget they share, and what is left of the other steps."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from compression_helpers import Mixture, behind, inside

from assembly import compression_steps
from assembly.compression_steps import AUTO, STEPS, Plan, Work, shared_rows
from assembly.distilling import Student, note
from common.errors import UserError

WORTH = {3: 0.010, 5: 0.100, 4: 0.002, 6: 0.020}
"""What an expert adds to the score, by its hidden units."""
UNITS = list(enumerate(WORTH))


class OfWorth(Work):
    """A compression of the mixture of the helpers, whose score is the sum of what its experts are worth."""

    @classmethod
    def of(cls, plan: Plan, mixture: Mixture | None = None) -> "OfWorth":
        config, model, build = mixture or behind()
        rows: list[dict[str, Any]] = [{"expert": str(index), "done": [], "becomes": index} for index in range(4)]
        opened: Any = SimpleNamespace(build=build)
        whole: Any = SimpleNamespace(scores={"macro_f1": sum(WORTH.values())})
        return cls(opened, plan, config, model, whole, whole, rows, shared_rows(config, "shared"))

    def build(self, config):
        return self.opened.build(config)  # type: ignore[attr-defined]

    def score(self, model):
        return sum(WORTH[expert[0].out_features] for expert in model.moe.experts)

    def take(self, config, model, step, **values):
        self.config, self.model = config, model
        load_LE = torch.full((len(model.mixtures), len(config.experts.sizes)), 0.25).numpy()
        self.validated: Any = SimpleNamespace(scores={"macro_f1": self.score(model)}, load_LE=load_LE)


def test_automatic_steps_share_the_budget():
    work = OfWorth.of(Plan(prune=AUTO, budget=0.5))
    assert work.least == pytest.approx(0.132 - 0.005)
    STEPS["prune"](work, print)  # removes the expert that is worth 0.2 points, and no other
    assert [row["becomes"] for row in work.experts] == [0, 1, None, 2]
    assert work.spent == pytest.approx(0.2) and work.least == pytest.approx(0.130 - 0.003)


def test_named_steps_use_nothing_of_the_budget():
    work = OfWorth.of(Plan(prune=[1], budget=0.5))
    STEPS["prune"](work, print)
    assert work.spent == 0 and work.least == pytest.approx(0.032 - 0.005)


def test_nothing_is_merged_if_automatic_removal_leaves_no_more_experts(capsys):
    work = OfWorth.of(Plan(prune=AUTO, merge=3, budget=5.0))
    for step in ("prune", "merge"):
        STEPS[step](work, print)
    assert "merge        --prune auto left 2 experts: nothing to merge" in capsys.readouterr().out
    assert [row["becomes"] for row in work.experts] == [None, 0, None, 1]


def test_an_expert_that_automatic_removal_has_not_left_cannot_be_protected():
    work = OfWorth.of(Plan(prune=AUTO, quantise="int8", protect=[3], budget=0.5))
    with pytest.raises(UserError, match=r"--quantise\.protect names expert 3: only experts 0 to 2 remain"):
        STEPS["prune"](work, print)


def test_experts_that_each_block_merges_with_others_have_rows_of_their_own(monkeypatch):
    groups = [[[0, 1], [2, 3]], [[0, 2], [1, 3]]]
    monkeypatch.setattr(compression_steps, "choose_groups", lambda *_: groups)
    monkeypatch.setattr(compression_steps, "similarity_of_gates", lambda *_: [])
    monkeypatch.setattr(OfWorth, "training", lambda _: iter(()))
    monkeypatch.setattr(OfWorth, "score", lambda *_: 0.5)
    work = OfWorth.of(Plan(merge=2), inside({}, {"sizes": [[4]] * 4}))
    STEPS["merge"](work, print)
    assert [row["done"] for row in work.experts[:4]] == [["merged, in each block with others"]] * 4
    merged = [{"expert": f"merged {e} · 4", "load": 0.25, "done": [], "becomes": e} for e in range(2)]
    assert [row["becomes"] for row in work.experts[:4]] == [None] * 4 and work.experts[4:] == merged


def test_shared_experts_are_replaced_or_taught_like_the_others():
    mixture = behind({}, {"shared": [[7]]})
    work = OfWorth.of(Plan(distil="sparse"), mixture)
    note(work, Student(work.config, {}))
    assert [row["done"] for row in work.experts + work.shared] == [["taught"]] * 5
    work = OfWorth.of(Plan(distil="sparse"), mixture)
    work.take(work.config, work.model, "distil")
    note(work, Student(work.config, None))
    assert [row["expert"] for row in work.experts[4:]] == ["shared 7", *(f"student {e} · {u}" for e, u in UNITS)]
    assert [row["done"] for row in work.experts] == [["replaced by the student"]] * 5 + [["taught"]] * 4
    assert [(row["expert"], row["done"]) for row in work.shared] == [("student shared 7", ["taught"])]
