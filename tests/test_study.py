"""The study's arithmetic by hand, its methods' costs, and a head trained on features that give the class away."""

import numpy as np
import pytest
import torch

from benchmarks import study
from benchmarks.study_curve import draw_curve
from benchmarks.study_heads import (
    Features,
    Job,
    build,
    dense,
    flops_of,
    grid,
    router_methods,
    token_methods,
    width_methods,
)
from benchmarks.study_runs import Results, passes
from benchmarks.study_tables import agreement, cells, paired_interval, rows
from benchmarks.study_training import Average, order, train_heads
from errors import UserError


@pytest.fixture(scope="module")
def features():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 32, generator=generator)
    labels_N = torch.arange(200) % 4
    train_VNF = torch.stack([centres[labels_N] + 0.3 * torch.randn(200, 32, generator=generator) for _ in range(2)])
    held_M = torch.arange(60) % 4
    held_MF = centres[held_M] + 0.3 * torch.randn(60, 32, generator=generator)
    return Features(train_VNF, labels_N, held_MF, held_M, groups=2, classes=4)


def test_the_paired_interval_by_hand():
    # Differences 1, 2, 3: mean 2, deviation 1; t(0.975, 2) = 4.302653, so 2 -+ 4.302653 / sqrt(3) = 2 -+ 2.484138.
    mean, low, high = paired_interval([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert (mean, low, high) == pytest.approx((2.0, -0.484138, 4.484138), abs=1e-5)
    assert paired_interval([1.0], [0.0]) == (1.0, None, None)


def test_agreement_ignores_the_experts_names():
    first = np.array([0, 0, 1, 1, 2, 2])
    assert agreement([first, (first + 1) % 3]) == pytest.approx(1.0)
    generator = np.random.default_rng(0)
    assert abs(agreement([generator.integers(4, size=2000) for _ in range(3)])) < 0.02
    assert agreement([first]) is None


def test_every_method_has_the_same_number_of_settings_and_can_be_built(features):
    methods = router_methods(16) | width_methods([64], features.groups)
    assert {len(grid(head)) for head in methods.values()} == {6}
    for name, head in methods.items():
        if "logistic" not in head:
            assert build(head, features, 0.0)(features.held_MF)[0].shape == (60, 4), name


@pytest.mark.parametrize("groups", [8, 16])
@pytest.mark.parametrize("width", [16, 128, 1024, 4096])
def test_mixtures_of_the_curve_cost_what_the_dense_head_does(groups, width):
    size, none_N = groups * 48, torch.zeros(2).long()
    wide = Features(torch.zeros(1, 2, size), none_N, torch.zeros(2, size), none_N, groups, 4)
    costs = {n: flops_of(build(h, wide, 0.0), wide) for n, h in width_methods([width], groups).items()}
    assert len(costs) == (4 if width <= 512 else 3)
    # By hand: 2 * width * (inputs + classes). A gate costs a whole number of units, and little is left over.
    assert costs.pop(f"dense {width}") == 2 * width * (size + 4)
    assert all(2 * (width - 2) * (size + 4) <= cost <= 2 * width * (size + 4) for cost in costs.values()), costs


def test_tokens_go_through_soft_moe_next_to_a_dense_head_of_its_cost():
    tokens = Features(
        torch.randn(1, 40, 5, 16), torch.arange(40) % 4, torch.randn(12, 5, 16), torch.arange(12) % 4, 1, 4
    )
    methods = token_methods(8, tokens)
    dense_head, soft = (flops_of(build(head, tokens, 0.0), tokens) for head in methods.values())
    assert dense_head == pytest.approx(soft, rel=0.02)
    assert list(methods)[1] == "soft_moe, 8 experts" and methods["soft_moe, 8 experts"]["against"] == next(
        iter(methods)
    )
    for name, head in methods.items():
        ((found, first_M),) = train_heads([Job(name, head, 0, "test", 2, grid(head)[0])], tokens)
        assert found["entropy"] is None and "specialisation" not in found  # every expert serves every image
        assert first_M.shape == (12,), name


def test_heads_of_one_seed_see_the_same_batches():
    ten = Features(torch.zeros(2, 10, 1), torch.zeros(10).long(), torch.zeros(1, 1), torch.zeros(1).long(), 1, 1)
    runs = [[index_B.tolist() for index_B in order(seed, 3, ten, 4)] for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert [sorted({row // 10 for row in index_B}) for index_B in runs[0]] == [[0], [0], [1], [1], [0], [0]]
    assert len({*runs[0][0], *runs[0][1]}) == 8  # without one twice
    assert runs[0][0] != [row - 10 for row in runs[0][2]]


def test_the_flops_of_expert_choice_are_those_of_the_visits_that_it_made(features):
    model = build(router_methods(16)["expert_choice"], features, 0.0)
    even = flops_of(model, features)
    expert = 2 * 16 * (32 + 4)
    assert flops_of(model, features, np.full(8, 3 / 8)) - even == expert  # three experts a sample and not two


@pytest.mark.parametrize("name", list(study.PARTS))
@pytest.mark.parametrize("tiny", [False, True])
def test_every_part_reads_a_configuration_that_is_one(name, tiny):
    options, rest = study.arguments([*(["--tiny"] if tiny else []), "--data.root", "elsewhere"])
    config = study.configuration(study.PARTS[name], options, rest)
    assert config.features.mode == "live" and str(config.data.root) == "elsewhere"
    assert config.backbone.features == list(study.PARTS[name].features) or tiny
    with pytest.raises(UserError, match="optim"):
        study.arguments(["--optim.lr", "1"])


def test_the_study_runs_to_its_end_and_goes_on_where_it_was(tmp_path, capsys):
    words = ["--tiny", "--parts", "widths", "--widths", "8", "--seeds", "1", "--workers", "1", "--out", str(tmp_path)]
    words += ["--data.max_per_class", "20"]
    study.main(words)
    first = capsys.readouterr().out
    assert "all routed, top-1 8" in first and "one pair" in first and (tmp_path / "study_widths.png").is_file()
    (folder,) = (path for path in tmp_path.iterdir() if path.is_dir())
    done = (folder / "runs.jsonl").read_text()
    study.main(words)
    assert (folder / "runs.jsonl").read_text() == done
    study.main([*words[:-1], "25", "--seconds", "0"])  # other data: no run is known, and no time
    assert len([path for path in tmp_path.iterdir() if path.is_dir()]) == 2
    assert "top-1" not in capsys.readouterr().out.rpartition("Heads on frozen")[2]


@pytest.mark.parametrize("head", [dense(8), {"logistic": True}, router_methods(8)["noisy_topk"]], ids=str)
def test_a_head_learns_and_is_the_same_again(features, head):
    settings = grid(head)[0] if "logistic" in head else {"lr": 0.03, "warmup_steps": 3, "dropout": 0.2}
    job = Job("x", head, 0, "test", 25, settings)  # one step each
    ((found, first_M),) = train_heads([job], features)
    ((again, _),) = train_heads([job], features)
    assert found == again and found["macro_f1"] > 0.9
    assert first_M.shape == (60,) and first_M.min() >= 0
    assert ("specialisation" in found) == ("logistic" not in head and len(head["experts"]["sizes"]) > 1)


def test_heads_of_a_pass_are_as_good_as_alone(features):
    # Without dropout and noise nothing is drawn while training: side by side or alone, each ends the same.
    head = {**router_methods(8)["mixtral"], "balance": {"switch": 0.0}}
    head["router"] = {**head["router"], "warmup_steps": 0}
    settings = {"lr": 0.03, "warmup_steps": 3, "dropout": 0.0}
    jobs = [Job("x", head, seed, "test", 25, {**settings, "lr": lr}) for seed, lr in ((0, 0.03), (1, 0.03), (1, 0.01))]
    together = train_heads(jobs, features)
    for job, (found, first_M) in zip(jobs, together, strict=True):
        ((alone, first_alone_M),) = train_heads([job], features)
        assert found == alone and (first_M == first_alone_M).all()
    assert len({found["loss"] for found, _ in together}) == 3


def test_the_average_is_that_of_timm():
    from timm.utils import ModelEmaV3

    torch.manual_seed(0)
    model = build(router_methods(8)["noisy_topk"], Features(*[torch.zeros(1, 1, 32)] * 4, 2, 4), 0.0).train()
    ours, theirs = Average(model, 0.9), ModelEmaV3(model, decay=0.9, use_warmup=True)
    for step in range(1, 60):  # past the warm-up of the decay
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
            model.moe.usage_E += 1
        ours.before(step)
        ours.update()
        theirs.update(model, step=step)
    assert theirs.get_decay(59) == 0.9 > theirs.get_decay(9)
    for name, value in theirs.module.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], value, msg=name)


def test_a_head_that_diverges_is_told_and_does_not_end_the_others(features):
    bad = Job("x", dense(8), 0, "test", 3, {"lr": 1e30, "warmup_steps": 0, "clip_norm": 0.0, "dropout": 0.0})
    good = Job("x", dense(8), 0, "test", 3, {"lr": 1e-3, "dropout": 0.0})
    told, (found, _) = train_heads([bad, good], features)
    assert "not finite" in told and found["loss"] > 0


def test_every_method_has_its_first_pass_before_any_has_its_second():
    jobs = [Job(name, {}, seed, "test", 1) for seed in range(5) for name in ("a", "b")]
    cut = [[(job.method, job.seed) for job in part] for part in passes(jobs, lambda job: 2)]
    assert cut == [
        [("a", 0), ("a", 1)],
        [("b", 0), ("b", 1)],
        [("a", 2), ("a", 3)],
        [("b", 2), ("b", 3)],
        [("a", 4)],
        [("b", 4)],
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: its graphs cannot be tried")
def test_a_captured_pass_trains_as_well_as_its_heads_alone(features):
    device = torch.device("cuda")
    parts = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in vars(features).items()
    }
    there = Features(**parts)
    settings = {"lr": 0.03, "warmup_steps": 3, "dropout": 0.0}
    for kind in ("mixtral", "noisy_topk"):
        jobs = [Job("x", router_methods(16)[kind], seed, "test", 60, settings) for seed in range(4)]
        together = [found for found, _ in train_heads(jobs, there)]
        assert min(found["macro_f1"] for found in together) > 0.9
        alone = [train_heads([job], there)[0][0] for job in jobs]
        # What is drawn at random in the warm-up and as noise depends on who trains beside.
        tolerance = {"mixtral": 0.02, "noisy_topk": 0.5}[kind]
        assert [a["loss"] for a in alone] == pytest.approx([found["loss"] for found in together], rel=tolerance)


def test_finished_runs_are_known_again_and_make_a_table(tmp_path, features):
    results = Results(tmp_path)
    jobs = [Job(name, dense(8), seed, "test", 5, grid({})[0]) for name in ("dense 8", "other") for seed in (0, 1)]
    for job in jobs:
        results.add(job, train_heads([job], features)[0])
    results.add(Job("other", dense(8), 2, "test", 5, {}), "the task loss is not finite")
    again = Results(tmp_path)
    assert again.scores == results.scores and list(again.failed.values()) == ["the task loss is not finite"]
    assert all(map(again.knows, jobs)) and not again.knows(Job("new", dense(8), 0, "test", 5, {}))
    runs = {name: {j.seed: again.scores[j.key] for j in jobs if j.method == name} for name in ("dense 8", "other")}
    table = {row["method"]: row for row in rows(runs, {}, {"other": "dense 8", "dense 8": None})}
    assert table["other"]["paired"] == pytest.approx((0.0, 0.0, 0.0)) and "paired" not in table["dense 8"]
    assert len(cells(table["other"])) == 10


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


def test_the_curve_is_drawn(tmp_path):
    def row(method, score):
        paired = {} if method.startswith("dense") else {"paired": (0.001, -0.002, 0.004)}
        return {"method": method, "seeds": 3, "macro_f1": score, "macro_f1_deviation": 0.002, **paired}

    found = [row(f"{family} {width}", 0.8) for family in ("dense", "shared", "alone") for width in (16, 32)]
    assert draw_curve(found[:-1], tmp_path / "curve.png").stat().st_size > 10_000
