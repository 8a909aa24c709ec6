"""The study's arithmetic by hand, its methods' costs, and a head trained on features that contain the class."""

from pathlib import Path

import numpy as np
import pytest
import torch
from study_helpers import telling_features

from benchmarks import study
from benchmarks.study_curve import draw_curve
from benchmarks.study_heads import (
    FAMILIES,
    Features,
    Job,
    build,
    dense,
    flops_of,
    grid,
    router_methods,
    token_methods,
    totals,
    width_methods,
)
from benchmarks.study_tables import agreement
from benchmarks.study_training import train_heads
from common.errors import UserError


@pytest.fixture(scope="module")
def features():
    return telling_features()


def test_agreement_ignores_the_experts_names():
    first = np.array([0, 0, 1, 1, 2, 2])
    assert agreement([first, (first + 1) % 3]) == pytest.approx(1.0)
    generator = np.random.default_rng(0)
    assert abs(agreement([generator.integers(4, size=2000) for _ in range(3)])) < 0.02
    assert agreement([first]) is None


def test_every_method_has_the_same_number_of_settings_and_can_be_built(features):
    methods = router_methods(16) | width_methods([64], features.groups)
    assert {len(grid(head)) for head in methods.values()} == {10}
    for name, head in methods.items():
        if "logistic" not in head:
            assert build(head, features, 0.0)(features.held_MF)[0].shape == (60, 4), name


def test_every_rule_has_a_dense_head_of_its_total_size():
    heads = router_methods(16)
    rivals = totals(heads)
    assert set(rivals) == {name for name, head in heads.items() if len(head.get("experts", {}).get("sizes", [])) > 1}
    # Eight of 16; eight of 16 and one that is shared; sixteen of 4 and a shared one of 24.
    assert {rivals[name] for name in ("vmoe", "switch, 4 experts")} == {"dense, 128 units (total)"}
    assert rivals["deepseek, shared"] == "dense, 144 units (total)"
    assert rivals["shared + 16 small"] == "dense, 88 units (total)"
    assert heads["dense, 88 units (total)"]["experts"]["sizes"] == [[88]]


@pytest.mark.parametrize("groups", [8, 16])
@pytest.mark.parametrize("width", [16, 128, 1024, 4096])
def test_mixtures_of_the_curve_have_the_cost_of_the_dense_head(groups, width):
    size, none_N = groups * 48, torch.zeros(2).long()
    wide = Features(torch.zeros(1, 2, size), none_N, torch.zeros(2, size), none_N, groups, 4)
    costs = {n: flops_of(build(h, wide, 0.0), wide) for n, h in width_methods([width], groups).items()}
    assert len(costs) == (4 if width <= 512 else 3)
    # By hand: 2 * width * (inputs + classes). A gate costs a whole number of units, and little is left over.
    assert costs.pop(f"dense, {width} units") == 2 * width * (size + 4)
    assert all(2 * (width - 2) * (size + 4) <= cost <= 2 * width * (size + 4) for cost in costs.values()), costs


def test_soft_moe_on_tokens_is_compared_with_a_dense_head_of_equal_cost():
    tokens = Features(
        torch.randn(1, 40, 5, 16), torch.arange(40) % 4, torch.randn(12, 5, 16), torch.arange(12) % 4, 1, 4
    )
    methods = token_methods(8, tokens)
    costs = [flops_of(build(head, tokens, 0.0), tokens) for head in methods.values()]
    assert costs[0] == pytest.approx(costs[1], rel=0.02) and costs[0] > costs[2] > costs[3]
    assert totals(methods) == {"soft_moe, 8 experts": "dense behind one slot, 64 units (total)"}
    assert list(methods)[1] == "soft_moe, 8 experts" and methods["soft_moe, 8 experts"]["against"] == next(
        iter(methods)
    )
    for name, head in methods.items():
        ((found, first_M),) = train_heads([Job(name, head, 0, "test", 2, grid(head)[0])], tokens)
        assert found["entropy"] is None and "specialisation" not in found  # every expert processes every image
        assert first_M.shape == (12,), name


def test_the_flops_of_expert_choice_are_those_of_its_visits(features):
    model = build(router_methods(16)["expert_choice"], features, 0.0)
    even = flops_of(model, features)
    expert = 2 * 16 * (32 + 4)
    assert flops_of(model, features, np.full(8, 3 / 8)) - even == expert  # three experts a sample and not two


@pytest.mark.parametrize("name", list(study.PARTS))
@pytest.mark.parametrize("tiny", [False, True])
def test_every_part_reads_a_valid_configuration(name, tiny):
    options, rest = study.arguments([*(["--tiny"] if tiny else []), "--data.root", "elsewhere"])
    config = study.configuration(study.PARTS[name], options, rest)
    assert config.features.mode == "live" and config.data.root == Path("elsewhere").absolute()
    assert config.backbone.features == list(study.PARTS[name].features) or tiny
    with pytest.raises(UserError, match="optim"):
        study.arguments(["--optim.lr", "1"])


@pytest.mark.slow
def test_the_study_runs_and_continues_where_it_stopped(tmp_path, capsys, undrawn):
    words = ["--tiny", "--parts", "widths", "--widths", "8", "--seeds", "1", "--workers", "1", "--out", str(tmp_path)]
    words += ["--data.max_per_class", "13"]
    study.main(words)
    first = capsys.readouterr().out
    assert (
        "all routed, top-1 of 8, 8 units" in first
        and "one pair" in first
        and (tmp_path / "study_widths_tiny.png").is_file()
    )
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    done = (folder / "runs.jsonl").read_text()
    study.main(words)
    assert (folder / "runs.jsonl").read_text() == done
    study.main([*words[:-1], "14", "--seconds", "0"])  # other data: no run is known, and no time
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 2
    assert "top-1" not in capsys.readouterr().out.rpartition("Heads on frozen")[2]


def test_validation_chooses_who_gets_more_seeds():
    def choice(head, score):
        return {"head": head, "settings": {}, "validation": score}

    chosen = {
        "logistic regression": choice({"logistic": True}, 0.99),
        "linear head": choice(dense(), 0.98),
        "dense, a": choice(dense(8), 0.5),
        "dense, b": choice(dense(9), 0.6),
        "vmoe": choice(router_methods(8)["vmoe"], 0.4),
        "hash": choice(router_methods(8)["hash"], 0.3),
    }
    assert study.best(chosen) == {"dense": "dense, b", "router": "vmoe"}
    assert study.best({name: chosen[name] for name in ("dense, a", "linear head")}) == {}


@pytest.mark.slow
def test_the_curve_is_drawn(tmp_path):
    def row(method, score, ends):
        paired = {} if method.startswith("dense") else {"paired": (0.001, *ends)}
        return {"method": method, "seeds": 3, "macro_f1": score, "macro_f1_deviation": 0.002, **paired}

    found = [row(f"{family}, {width} units", 0.8, (-0.002, 0.004)) for family in FAMILIES[:3] for width in (16, 32)]
    found.append(row(f"{FAMILIES[3]}, 32 units", 0.7, (None, None)))  # one pair
    assert draw_curve(found[:-2], (), tmp_path / "some.png").stat().st_size > 10_000
    plain = draw_curve(found, (), tmp_path / "all.png").read_bytes()
    assert draw_curve(found, {f"{FAMILIES[1]}, 16 units"}, tmp_path / "ringed.png").read_bytes() != plain


def test_validation_selects_a_mixture_at_each_width():
    scores = {"dense, 16 units": 0.9, f"{FAMILIES[1]}, 16 units": 0.7, f"{FAMILIES[2]}, 16 units": 0.8}
    scores[f"{FAMILIES[1]}, 32 units"] = 0.6
    found = study.preferred({method: {"validation": score} for method, score in scores.items()})
    assert found == {f"{FAMILIES[2]}, 16 units", f"{FAMILIES[1]}, 32 units"}
