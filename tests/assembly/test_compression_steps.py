"""Automatic steps of a compression after one another: the budget they share, and what is left of the other steps."""

from types import SimpleNamespace
from typing import Any

import pytest
from compression_helpers import behind

from assembly.compression_steps import AUTO, STEPS, Plan, Work
from common.errors import UserError

WORTH = {3: 0.010, 5: 0.100, 4: 0.002, 6: 0.020}
"""What an expert adds to the score, by its hidden units."""


class OfWorth(Work):
    """A compression of the mixture of the helpers, whose score is the sum of what its experts are worth."""

    @classmethod
    def of(cls, plan: Plan) -> "OfWorth":
        config, model, build = behind()
        rows: list[dict[str, Any]] = [{"expert": str(index), "done": [], "becomes": index} for index in range(4)]
        opened: Any = SimpleNamespace(build=build)
        whole: Any = SimpleNamespace(scores={"macro_f1": sum(WORTH.values())})
        return cls(opened, plan, config, model, whole, whole, rows)

    def build(self, config):
        return self.opened.build(config)  # type: ignore[attr-defined]

    def score(self, model):
        return sum(WORTH[expert[0].out_features] for expert in model.moe.experts)

    def take(self, config, model, step, **values):
        self.config, self.model = config, model
        self.validated: Any = SimpleNamespace(scores={"macro_f1": self.score(model)})


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
