"""The benchmarks: all of our contestants agree, the limits are correct, and each command runs."""

import re
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch
from benchmark_helpers import TINY, read

from assembly.pipeline import build_model
from benchmarks import (
    adaptation,
    blocks_step,
    devices,
    dispatch,
    extraction,
    incremental,
    narrow,
    recipe,
    scaling,
    seeds,
    step,
    study,
    time_to_accuracy,
    worth,
)
from benchmarks.common import Failure, Timing, attempt, table, timed
from benchmarks.layers import Shape, contestants
from common.errors import UserError, exit_code_of
from config.command_line import parse_command_line
from evaluation.cost import head_cost

CPU = torch.device("cpu")


def test_all_dispatch_modes_the_loop_and_the_oracle_agree():
    torch.manual_seed(0)
    x_BD = torch.randn(40, 16)
    answers = {}
    for name, make in contestants(Shape(16, (8, 24, 8, 16), 5, 2), CPU):
        made = attempt(make)
        if isinstance(made, Failure):
            assert not name.startswith(("ours", "article", "dense")), made.reason
            continue
        layer, forward = made
        layer.eval()
        if layer not in answers:
            answers[layer] = forward(x_BD)
        torch.testing.assert_close(forward(x_BD), answers[layer], atol=1e-5, rtol=1e-5)


def test_flops_by_hand_and_other_layers_of_equal_flops():
    shape = Shape(10, (4, 8), 6, 2)
    # 3 samples to 2 experts of 6 hidden units on average: 3 * 2 * 6 * (10 + 6) multiply-adds; two FLOPs each, and
    # the backward pass is twice the forward: 6 * 576 = 3456.
    assert dispatch.active_flops(shape, 3) == 3456
    square = Shape(64, (128, 128), 16, 2)
    assert square.square() == [80, 80]  # 2 * 64 * 80 = (64 + 16) * 128
    assert square.square(matrices=3) == [56, 56]  # 3 * 64 * 53.3, to a multiple of 8


def test_goals_count_the_cells_that_are_won():
    def row(batch, mine, other):
        times = {"ours: auto": Timing(mine, mine, mine, 3), "Mixtral": Timing(other, other, other, 3)}
        return {
            "experts": "4 equal",
            "k": 2,
            "batch": batch,
            "limit": 0.5,
            "contestants": {**times, "x": Failure("absent")},
        }

    lines = dispatch.goals([row(256, 9, 1), row(1024, 1, 2), row(4096, 2, 1)])
    assert lines[0] == "fastest in 1 of 2 cells with 1,024 samples or more; not for 4 equal, k 2, batch 4096"
    assert lines[1] == "25 % of the limit at batch 4096, 4 equal experts, k 2"


def test_timing_takes_the_median_and_a_failure_has_a_reason():
    assert Timing.of([3.0, 1.0, 2.0]) == Timing(2.0, 1.0, 3.0, 3)
    assert Timing(0.0012345, 0.001, 0.002, 3).milliseconds() == "1.23 (1-2)"
    runs = []
    assert timed(lambda: runs.append(1), CPU, 0.0).runs == 3
    assert timed(lambda: runs.append(1), CPU, 1.0, most=5).runs == 5

    def full():
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert attempt(full) == Failure("out of memory")
    assert attempt(lambda: 1 / 0).reason == "ZeroDivisionError: division by zero"

    def lacks(name):
        raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    assert attempt(lambda: lacks("st_moe_pytorch")).reason == "not installed: pip install st-moe-pytorch"
    assert attempt(lambda: lacks("transformers.gone")).reason.startswith("ModuleNotFoundError")
    assert table(["a", "b"], [[1, "long"]]) == "| a | b    |\n|---|------|\n| 1 | long |"


def test_the_limit_of_a_step_is_its_largest_part():
    run = {"flops": 100.0, "parameters": 10, "timing": Timing(20.0, 20.0, 20.0, 1)}
    assert scaling.limits(run, matrices=10.0, memory=1e9)["limit"] == "matrix products"
    assert scaling.limits(run, matrices=1e9, memory=scaling.TRAFFIC)["parts"] == pytest.approx(
        {"matrix products": 1e-7, "memory traffic of the weights": 10.0, "launches and the rest": 10.0}
    )


@pytest.mark.slow
def test_dispatch_runs(tmp_path, capsys):
    dispatch.main([*TINY, str(tmp_path)])
    out = capsys.readouterr().out
    assert "CPU" in out and "| 8 unequal | 2 | 64 " in out
    written = read(tmp_path, "dispatch")
    assert len(written["rows"]) == 16 and max(written["agreement"].values()) < 1e-4
    assert all(row["contestants"]["ours: grouped"]["median"] > 0 for row in written["rows"])


def test_extraction_runs(tmp_path, capsys):
    extraction.main([*TINY, str(tmp_path)])
    assert "of the matrix rate" in capsys.readouterr().out
    rows = {row["contestant"]: row for row in read(tmp_path, "extraction")["rows"]}
    assert rows["timm, float32"]["from_float32"] < 1e-5  # the plain way and ours mean the same
    assert rows["ours"]["from_float32"] < 0.05


@pytest.mark.slow
def test_the_step_through_the_vit_runs_and_dropped_patches_need_fewer_flops(tmp_path, capsys):
    blocks_step.main([*TINY, str(tmp_path), "--experts.blocks", "[1]", "--backbone.features", "[mean:1]"])
    assert "of the matrix rate" in capsys.readouterr().out
    dropped, whole = (row["flops"] for row in read(tmp_path, "blocks_step")["rows"])
    # Blocks 0 and 1 forward, 65 tokens of 192 features: 12 D^2 multiply-adds a token in each, two FLOPs each; the rest.
    assert dropped < whole and 2 * 2 * 65 * 12 * 192**2 < whole < 1.3 * 2 * 2 * 65 * 12 * 192**2
    with pytest.raises(UserError, match=r"benchmarks\.step"):
        blocks_step.main(["--config", "configs/digits.yaml", "--device", "cpu"])


def test_kernels_are_told_apart_by_name():
    names = ["nvjet_tst_256x128", "triton_red_fused_3", "pytorch_flash::flash_fwd_kernel", "Memcpy DtoD", "topk"]
    kinds = ["matrix products", "fused by the compiler", "attention", "copies", "other"]
    assert [blocks_step.kind_of(name) for name in names] == kinds


def test_the_largest_kernels_of_each_kind_by_hand():
    names = {"topk": [100, 300], "void at::native::sort": [500], "triton_a": [900], "triton_b": [50], "gemm": [4000]}
    events = [
        SimpleNamespace(name=name, time_range=SimpleNamespace(elapsed_us=lambda us=us: us))
        for name, times in names.items()
        for us in times
    ]
    kernels = blocks_step.per_step(events, steps=2)
    assert blocks_step.by_kind(kernels) == pytest.approx(
        {"matrix products": 2, "fused by the compiler": 0.475, "other": 0.45, "all": 2.925}
    )
    shown = [blocks_step._kernel_line(kernel) for kernel in blocks_step.largest(kernels, count=1)]
    assert shown == [
        ["matrix products", "2.00", "0.5", "gemm"],
        ["fused by the compiler", "0.45", "0.5", "triton_a"],
        ["other", "0.25", "0.5", "sort"],
    ]
    assert [kernel["kernel"] for kernel in blocks_step.largest(kernels)[-2:]] == ["void at::native::sort", "topk"]
    assert blocks_step.by_kind([]) == {} and blocks_step.largest([]) == []


@pytest.mark.slow
def test_scaling_runs(tmp_path, capsys):
    scaling.main([*TINY, str(tmp_path)])
    assert "launches" in capsys.readouterr().out
    assert [row["sweep"] for row in read(tmp_path, "scaling")["rows"]] == ["samples", "samples", "experts", "features"]


@pytest.mark.slow
def test_tiny_does_not_change_given_options(tmp_path):
    scaling.main([*TINY, str(tmp_path), "--samples", "100", "--experts", "2", "--features", "16"])
    (row,) = read(tmp_path, "scaling")["rows"]
    assert (row["samples"], row["experts"], row["features"]) == (100, 2, 16)
    assert read(tmp_path, "scaling")["batch"] == scaling.TINY["batch"]
    options, rest = time_to_accuracy.arguments(["--tiny", "--repeats", "5", "--train.epochs", "4", "--device", "cpu"])
    assert (options.repeats, options.live_epochs, options.article_epochs) == (5, 1, 1)
    recipes, _ = time_to_accuracy.configurations(options, rest)
    assert (recipes["ours"].train.epochs, recipes["ours"].router.warmup_steps) == (4, 2)
    options, rest = time_to_accuracy.arguments(["--train.seed", "3"])
    recipes, _ = time_to_accuracy.configurations(options, rest)
    assert list(recipes) == ["ours, cifar100_head.yaml", "ours, cifar100_fast.yaml"]
    assert all(recipe.train.seed == 3 for recipe in recipes.values())
    file = "configs/digits.yaml"
    for words in ([f"--config={file}"], ["--config", file]):
        recipes, article = time_to_accuracy.configurations(*time_to_accuracy.arguments(words))
        expected = parse_command_line(["--config", file, "--features.cache_dir", "null"]).config
        assert [recipe.to_dict() for recipe in recipes.values()] == [expected.to_dict()]
        assert (article.data, article.backbone.name) == (expected.data, "bundled/vit_micro")
        assert article.backbone.features == ["tokens:-1"]


@pytest.mark.parametrize(
    "benchmark",
    [
        adaptation,
        blocks_step,
        devices,
        dispatch,
        extraction,
        recipe,
        scaling,
        seeds,
        step,
        study,
        time_to_accuracy,
        worth,
    ],
)
def test_help_explains_every_option_and_its_default(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(["--tiny", "--help"])
    text = " ".join(capsys.readouterr().out.partition("options:")[2].split())
    for option in re.split(r" (?=--[a-z])", text)[1:]:
        assert "default" in option or option.startswith(("--help", "--tiny")), option


@pytest.mark.slow
def test_step_runs(tmp_path, capsys):
    step.main([*TINY, str(tmp_path)])
    assert "ms per step" in capsys.readouterr().out
    runs = [row["run"] for row in read(tmp_path, "step")["rows"]]
    assert [run["dispatch"] for run in runs] == ["sorted", "dense", "grouped", "auto", "auto"]
    # Two of four experts with a hidden layer, and one that all samples pass: less than all of their matrix products.
    mixture, active, total = (runs[i]["flops"] for i in (0, 3, 4))
    assert active < mixture < total


@pytest.mark.slow
def test_recipe_pairs_heads_of_equal_cost(tmp_path, capsys):
    recipe.main(["--tiny", "--device", "cpu", "--out", str(tmp_path)])
    assert "paired difference" in capsys.readouterr().out
    found = read(tmp_path, "recipe")
    runs = {name: by_seed["0"] for name, by_seed in found["runs"].items()}
    assert len(runs) == 2 and all(len(by_seed) == 2 for by_seed in found["runs"].values())
    config, shape = parse_command_line([*recipe.TINY, "--experts.shared", "[[40]]"]).config, (384,)
    costs = [head_cost(build_model(head, shape, 10), shape).flops for head in recipe.heads(config, shape, 10).values()]
    assert costs[1] == pytest.approx(costs[0], rel=0.01)
    assert all(0 <= run["macro_f1"] <= 1 and run["best_epoch"] in (1, 2) for run in runs.values())


def test_batches_cycle_through_the_samples_in_one_random_order():
    seen = []
    once = step.on_batches(lambda *batch: seen.append(batch), torch.arange(10.0)[:, None], torch.arange(10), 4)
    for _ in range(3):
        once()
    assert all(torch.equal(features_BF[:, 0].long(), labels_B) for features_BF, labels_B in seen)
    first, second, again = (labels_B.tolist() for _, labels_B in seen)
    assert len({*first, *second}) == 8 and again == first
    few = step.on_batches(lambda *batch: seen.append(batch), torch.arange(3.0)[:, None], torch.arange(3), 4)
    few()
    assert len(seen[-1][1]) == 3


@pytest.mark.parametrize(("way", "counted"), [("dense", 8), ("sorted", 2)])
def test_only_products_of_running_experts_are_counted(monkeypatch, way, counted):
    options = Namespace(batch=16, tiny=True)
    monkeypatch.setattr(scaling, "choose", lambda *_, static: way)
    found = scaling.measure(32, 8, 16, options, CPU, 0.01)
    expert = 16 * 8 + 8 + 2 * 8 + 8 * scaling.CLASSES + scaling.CLASSES
    assert found["dispatch"] == way
    assert found["flops"] == 6 * 16 * (found["parameters"] - (8 - counted) * expert)


def test_a_wrong_option_is_reported_in_one_line(capsys):
    with pytest.raises(UserError, match="--help"):
        scaling.main(["--samples", "many"])
    for program, words, least in (
        (scaling, ["--samples", "100", "0"], 1),
        (incremental, ["--steps", "0"], 1),
        (incremental, ["--memory", "-1"], 0),
        (narrow, ["--replay", "20", "-1"], 0),
        (devices, ["--views", "1"], 2),  # the first is not counted
    ):
        with pytest.raises(UserError, match=f"{words[0]} is {words[-1]}: it must be at least {least}"):
            program.main(words)
    with pytest.raises(UserError, match="--batch 1024 is larger than the 100 of --samples"):
        scaling.main(["--samples", "5000", "100"])
    assert exit_code_of(lambda: dispatch.main(["--device", "gpu"])) == 2
    assert "device is 'gpu'" in capsys.readouterr().err


def test_stacked_seeds_compute_the_same_as_single_seeds(tmp_path, capsys):
    head = seeds.TINY["tiny"]
    weights, x_SBD = seeds.weights_of(head, 3, CPU), torch.randn(3, head.batch, head.features)
    alone = [
        seeds.logits(head, {name: value[s : s + 1] for name, value in weights.items()}, x_SBD[s : s + 1])
        for s in range(3)
    ]
    torch.testing.assert_close(seeds.logits(head, weights, x_SBD), torch.cat(alone))
    seeds.main([*TINY, str(tmp_path)])
    assert "one seed after another" in capsys.readouterr().out
    assert read(tmp_path, "seeds")["rows"][0]["stacked"]["median"] > 0
