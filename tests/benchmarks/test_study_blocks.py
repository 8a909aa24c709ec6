"""The study inside the ViT: widths and costs by hand, tokens instead of images, and a study that continues."""

import json
from typing import Any

import pytest
import torch
from scipy.stats import ttest_rel

from benchmarks import study_blocks
from benchmarks.blocks_methods import DENSE, RULES, WIDTHS, dense, equal, methods, routed, unequal
from benchmarks.blocks_store import Store
from benchmarks.blocks_tables import cells, contrasts, preferred, rows, show
from benchmarks.blocks_training import MethodRuns, Setting
from benchmarks.blocks_vit import EndOfViT, FrozenEnd, averaged, stored_input, tokens_below
from benchmarks.blocks_worker import Worker
from benchmarks.study_heads import Features
from common.errors import UserError
from config.command_line import parse_command_line
from model.backbone import BackboneConfig, load_backbone
from model.classifier import NeckConfig
from model.experts import ExpertsConfig
from model.moe_vit import MoEViT
from model.routers import RouterConfig

CPU = torch.device("cpu")
SETTING = Setting(first=6, epochs=2, data="", backbone="", batch=16)


@pytest.fixture(scope="module")
def backbone():
    return load_backbone(BackboneConfig(name="bundled/vit_micro", features=["cls:6", "cls:7", "mean:7"]), CPU)


@pytest.fixture(scope="module")
def read():
    """Tokens that contain the class: a class token and 16 patches."""
    generator = torch.Generator().manual_seed(0)
    labels_N = torch.arange(64) % 4
    centres_CD = 2 * torch.randn(4, 192, generator=generator)
    tokens_NTD = centres_CD[labels_N][:, None] + torch.randn(64, 17, 192, generator=generator)
    tokens_NTF = torch.cat([tokens_NTD, torch.zeros_like(tokens_NTD)], dim=-1)  # the frozen FFN's output is zero
    found = Features(tokens_NTF[None], labels_N, tokens_NTF[:20], labels_N[:20], groups=1, classes=4)
    return {"validation": found, "test": found}


def runs_of(method, backbone, read, setting=SETTING):
    config = parse_command_line(["--config", "configs/digits_blocks.yaml"]).config
    return MethodRuns(method, FrozenEnd(backbone, setting.first, 16, CPU), config, read, setting, eager=False)


def test_unequal_widths_by_hand():
    # Four experts of which one has 15 units on average: 60 as 1 : 2 : 4 : 8. Two of them: 30.
    assert unequal(15, 1) == (4, 8, 16, 32) and unequal(15, 2) == (2, 4, 8, 16)
    assert unequal(4, 1) == (1, 2, 4, 9)  # 1.07, 2.13, 4.27, 8.53
    assert equal(16, 1) == (16,) * 4 and equal(16, 2) == (8,) * 4
    for width in WIDTHS:
        assert sum(unequal(width, 1)) == 4 * width and sum(unequal(width, 2)) == 2 * width


def test_the_list_starts_with_the_most_important_methods_without_duplicates():
    found = methods()
    assert [method.label for method in found[:2]] == ["dense, r 16", "unequal, k 2, token, noisy_topk, r 16"]
    assert len({method.label for method in found}) == len(found)
    assert {method.width for method in found if method.name == DENSE} == set(WIDTHS)
    assert {method.rule for method in found if method.width == 16} == {"noisy_topk", *RULES}


def test_every_method_of_a_width_costs_the_same_under_an_even_load(backbone, read):
    blocks, tokens, width, classes = 2, 17, 192, 4
    head = 2 * 3 * width * classes
    costs = {}
    for method in (dense(16), *(routed(16, shape, k) for shape in ("equal", "unequal") for k in (1, 2))):
        runs = runs_of(method, backbone, read)
        even_E = torch.full((len(method.sizes),), method.top_k / len(method.sizes)).numpy()
        costs[method.label] = runs.cost(even_E)
    # 18 units of two products each, or 16 and a gate of four: a multiply-add is two operations.
    assert {cost["flops"] for cost in costs.values()} == {blocks * tokens * 18 * 4 * width + head}
    assert {round(cost["active_width"], 4) for cost in costs.values()} == {16.0, 18.0}
    unit = 2 * width + 1
    assert costs["dense, r 16"]["trained_parameters"] == blocks * 18 * unit + head_parameters(classes)
    image = runs_of(routed(16, "unequal", 1, level="image"), backbone, read)
    gate = blocks * 2 * 4 * width  # of one token
    assert image.cost(torch.full((4,), 0.25).numpy())["flops"] == blocks * tokens * 18 * 4 * width + gate + head


def head_parameters(classes):
    return 3 * 192 * classes + classes + 2 * 3 * 192  # a linear layer, and the neck's norm


def test_the_last_blocks_on_stored_tokens_are_those_of_the_whole_vit(backbone):
    torch.manual_seed(0)
    images_BCHW = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    parts = (4, NeckConfig(), RouterConfig(top_k=1, norm="none"))
    sizes = [[2], [4]]
    whole = MoEViT(backbone, *parts, ExpertsConfig(place="blocks", kind="adapter", blocks=[6, 7], sizes=sizes)).eval()
    end = EndOfViT(FrozenEnd(backbone, 6, 64, CPU), *parts, ExpertsConfig(place="blocks", kind="adapter", sizes=sizes))
    for mixture in whole.mixtures:
        torch.nn.init.normal_(mixture.experts.up)
    end.load_state_dict(whole.state_dict())
    with torch.no_grad():
        x_BTF = stored_input(backbone.vit.blocks[6], tokens_below(backbone, images_BCHW, 6))
        expected, found = whole(images_BCHW)[0], end.eval()(x_BTF)[0]
    torch.testing.assert_close(found, expected)


def test_patches_are_averaged_two_by_two():
    grid = torch.arange(16.0).view(1, 16, 1)
    x_BTD = torch.cat([torch.full((1, 1, 1), 100.0), grid], dim=1)
    # Rows of four: 0 1 4 5 have the mean 2.5.
    assert averaged(x_BTD, 1, (4, 4)).flatten().tolist() == [100.0, 2.5, 4.5, 10.5, 12.5]
    with pytest.raises(UserError, match="3 x 3"):
        averaged(x_BTD[:, :10], 1, (3, 3))


@pytest.mark.slow
def test_runs_learn_restart_and_are_reproducible(backbone, read):
    setting = Setting(first=7, epochs=6, data="", backbone="", batch=16, ema=0.9)
    for method in (dense(4), routed(4, "equal", 1, "top_p", "image")):
        runs = runs_of(method, backbone, read, setting)
        found: list[Any] = [*runs.train([(1e-2, 0), (1e-2, 1)]), *runs.train([(1e-2, 0)])]  # two side by side
        first, other, again = found
        assert first["test"]["macro_f1"] > 0.9, method
        assert first["test"] == again["test"] and first["load"] == again["load"]
        assert len(first["load"]) == len(method.sizes) and other["active_width"] >= 4


def stored(tmp_path, scores):
    """A store with macro-F1 by (method, rate, seed), the same on validation and test images."""
    pair = [dense(16), routed(16, "unequal", 2)]
    store = Store(tmp_path, SETTING, pair, [1e-3, 1e-2], seeds=2)
    costs = dict.fromkeys(("flops", "active_parameters", "trained_parameters", "active_width", "seconds"), 1.0)
    for (index, rate, seed), f1 in scores.items():
        found = f1 if isinstance(f1, str) else {"validation": {"macro_f1": f1}, "test": {"macro_f1": f1}, **costs}
        store.keep(pair[index], rate, seed, found)
    return pair, store


def test_differences_are_averaged_over_the_widths_that_both_methods_have(tmp_path, capsys):
    scores = {dense(4): [0.50, 0.52], dense(16): [0.60, 0.62], routed(4, "unequal", 1): [0.50, 0.50]}
    scores |= {routed(4, "unequal", 2): [0.51, 0.55], routed(16, "unequal", 2): [0.61, 0.63]}
    store = Store(tmp_path, SETTING, list(scores), [1e-3], seeds=2)
    costs = dict.fromkeys(("flops", "active_parameters", "trained_parameters", "active_width"), 1.0)
    store.begin()  # and killed
    for method, by_seed in scores.items():
        for seed, f1 in enumerate(by_seed):
            result = {"validation": {"macro_f1": f1}, "test": {"macro_f1": f1}, "seconds": 8.0 - seed, **costs}
            store.keep(method, 1e-3, seed, result)
    two, one = "unequal, k 2, token, noisy_topk", "unequal, k 1, token, noisy_topk"
    found = contrasts(store)
    assert [(row["method"], row["other"], row["widths"]) for row in found] == [
        (two, DENSE, [4, 16]),
        (one, DENSE, [4]),
        (two, one, [4]),
    ]
    # Over widths 4 and 16: 0.56 and 0.59 for two experts, 0.55 and 0.57 for the dense adapter.
    for row, values, others in zip(
        found, ([0.56, 0.59], [0.5, 0.5], [0.51, 0.55]), ([0.55, 0.57], [0.5, 0.52], [0.5, 0.5]), strict=True
    ):
        interval = ttest_rel(values, others).confidence_interval(0.95)
        mean = (sum(values) - sum(others)) / 2
        assert row["paired"] == pytest.approx((mean, interval.low, interval.high), abs=1e-9)
    assert all(row["seconds"] == 7 and row["edge"] for row in rows(store))  # the fastest run, the only learning rate
    store.read()
    show(store, tmp_path)
    said = capsys.readouterr().out
    assert "+1.50 (" in said and "0.0 GPU minutes, without 1 of its starts" in said


def test_rates_come_first_then_the_seeds_of_the_best_one(tmp_path):
    pair, store = stored(tmp_path, {(0, 1e-3, 0): 0.5})
    assert store.next_runs(pair[0]) == [(1e-2, 0)] and store.best_rate(pair[0]) is None
    store.keep(pair[0], 1e-2, 0, "the task loss is not finite after 3 steps")
    assert store.best_rate(pair[0]) == 1e-3 and store.next_runs(pair[0]) == [(1e-3, 1)]
    with open(store.path, "a", encoding="utf-8") as file:
        file.write('\n{"setting": {"fir')  # killed while it wrote
    store.keep(pair[0], 1e-3, 1, {"validation": {"macro_f1": 0.6}, "test": {"macro_f1": 0.6}})
    store.read()
    assert store.next_runs(pair[0]) == [] and store.next_runs(pair[1]) == [(1e-3, 0), (1e-2, 0)]
    other = Store(tmp_path, Setting(first=6, epochs=3, data="", backbone=""), pair, [1e-3], 2)
    assert not other.runs  # of another setting


def test_a_failed_capture_is_remembered_until_the_next_start(tmp_path):
    pair, store = stored(tmp_path, {})
    store.add(separate_graphs=True)
    store.add(eager=pair[0].kind)
    store.read()
    assert store.separate_graphs and store.eager == {pair[0].kind}
    store.begin()
    store.read()
    assert not store.separate_graphs and not store.eager


def test_rows_are_paired_by_seed_with_the_dense_adapter(tmp_path):
    scores = {(0, 1e-3, 0): 0.50, (0, 1e-2, 0): 0.40, (0, 1e-3, 1): 0.52}
    scores |= {(1, 1e-3, 0): 0.30, (1, 1e-2, 0): 0.53, (1, 1e-2, 1): 0.57}
    _, store = stored(tmp_path, scores)
    first, second = rows(store)
    assert (first["method"], first["rate"], second["rate"]) == (DENSE, 1e-3, 1e-2)
    # Differences 0.03 and 0.05: mean 0.04; t(0.975, 1) = 12.7062 times 0.0141421 / sqrt(2).
    assert second["paired"] == pytest.approx((0.04, 0.04 - 0.127062, 0.04 + 0.127062), abs=1e-5)
    assert cells(second)[6] == "+4.00 (-8.71 to +16.71)"
    assert [row["method"] for row in preferred([first, second])] == [second["method"]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optim.lr", "1"], "optim"),
        (["--widths", "2"], "at least 4"),
        (["--rates", "0"], "above 0"),
        (["--side_by_side", "0"], "at least 1"),
    ],
)
def test_wrong_options_are_reported(words, message):
    with pytest.raises(UserError, match=message):
        study_blocks.arguments(words)


def test_a_method_claimed_by_another_process_is_skipped(tmp_path):
    pair, store = stored(tmp_path, {})
    one, other = (object.__new__(Worker) for _ in range(2))
    one.store = other.store = store
    with one._claim(pair[0]) as first, other._claim(pair[0]) as again, other._claim(pair[1]) as second:
        assert first and second and not again
    with other._claim(pair[0]) as free:
        assert free


@pytest.mark.slow
def test_the_study_runs_and_continues_where_it_stopped(tmp_path, capsys):
    words = ["--tiny", "--device", "cpu", "--widths", "4", "--methods", "2", "--rates", "0.01", "--out", str(tmp_path)]
    words += ["--data.max_per_class", "20", "--batch", "64"]
    study_blocks.main([*words, "--seeds", "1"])
    folder = tmp_path / "study_blocks_tiny"
    assert (folder / "mixture_in_blocks.png").stat().st_size > 0
    study_blocks.main(words)
    lines = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines() if line]
    done = [(line["label"], line["seed"]) for line in lines if "result" in line]
    assert sorted(done) == sorted((method.label, seed) for method in methods([4])[:2] for seed in (0, 1))
    capsys.readouterr()
    study_blocks.main([*words, "--tables"])
    said = capsys.readouterr().out
    assert "| 4 | unequal, k 2, token, noisy_topk" in said and "2 runs" not in said and "4 runs" in said


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_runs_side_by_side_equal_separate_runs():
    device = torch.device("cuda")
    backbone = load_backbone(BackboneConfig(name="bundled/vit_micro", features=["cls:6", "mean:7"]), device)
    generator = torch.Generator().manual_seed(0)
    labels_N = (torch.arange(64) % 4).to(device)
    tokens_NTF = torch.randn(64, 17, 2 * 192, generator=generator).to(device, backbone.dtype)
    features = Features(tokens_NTF[None], labels_N, tokens_NTF[:20], labels_N[:20], groups=1, classes=4)
    config, said = parse_command_line(["--config", "configs/digits_blocks.yaml"]).config, []
    end = FrozenEnd(backbone, 6, 16, device, said.append)
    pair, weights = [(1e-2, 0), (3e-2, 1)], []
    for groups in ([pair], [pair[:1], pair[1:]]):
        runs = MethodRuns(dense(4), end, config, {"validation": features, "test": features}, SETTING, eager=False)
        for group in groups:
            runs.train(group)
            weights += [slot.model.mixtures[0].experts.up.detach().clone() for slot in runs.slots[: len(group)]]
    assert not said
    for together, alone in zip(weights[:2], weights[2:], strict=True):
        torch.testing.assert_close(together, alone, atol=1e-2, rtol=0.1)
