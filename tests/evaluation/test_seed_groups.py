"""Runs with several seeds, and mixtures compared with their dense twins."""

import json

import pytest
from test_compare import METRICS, call, write_run  # noqa: F401 - a fixture

from config.config import Config, flatten
from evaluation.compared import Compared
from evaluation.seeds import differences_of, groups, recipe_key, seed_rows
from evaluation.verdict import verdict
from storage.folder import RunFolder

MIXTURE = {"experts.sizes": [[8], [16]], "router.top_k": 2}
TWIN = {"experts.sizes": [[24]], "router.top_k": 1, "dense_twin": True, "twin_of": json.dumps(MIXTURE)}


def a_run(name, seed, macro_f1, config, state=""):
    return Compared(name, name, config | {"train.seed": seed}, {"macro_f1": macro_f1, "accuracy": macro_f1}, (), state)


def mixtures(*scores):
    return [a_run(f"moe-seed{seed}", seed, score, MIXTURE) for seed, score in enumerate(scores)]


def twins(*scores, first=0):
    return [a_run(f"twin-seed{seed}", seed, score, TWIN) for seed, score in enumerate(scores, first)]


def test_a_mixture_minus_its_twin_is_paired_by_seed_whatever_their_order():
    found, left_out = groups([*reversed(twins(0.50, 0.51, 0.52)), *mixtures(0.51, 0.53, 0.55)])
    (minus,), unpaired = differences_of(found)
    # Differences .01, .02, .03: mean .02, deviation .01; t(0.975, 2) = 4.302653, over the root of 3 2.484138.
    assert minus.figures["macro_f1"] == pytest.approx((0.02, 0.02 - 0.02484138, 0.02 + 0.02484138), abs=1e-7)
    assert seed_rows(found, [minus]) == [
        ["seeds together", "seeds", "macro-F1", "accuracy"],
        ["twin", "0 to 2", "51.00 ± 1.00 %", "51.00 ± 1.00 %"],
        ["moe", "0 to 2", "53.00 ± 2.00 %", "53.00 ± 2.00 %"],
        ["moe minus its dense twin", "0 to 2", "+2.00 (-0.48 to +4.48)", "+2.00 (-0.48 to +4.48)"],
    ]
    assert (left_out, unpaired) == ([], [])


def test_unpaired_seeds_are_reported_and_left_out():
    found, _ = groups([*mixtures(0.5, 0.6), *twins(0.4, 0.4, first=1)])
    (minus,), (line,) = differences_of(found)
    assert minus.seeds == [1] and minus.figures["macro_f1"] == (pytest.approx(0.2), None, None)
    assert line == ("the seeds of moe (0, 1) and of twin (1, 2) differ: 0, 2 are left out of the difference")
    found, _ = groups([*mixtures(0.5), *twins(0.4, first=3)])
    minus, (line,) = differences_of(found)
    assert minus == [] and "no seed is in both, so train both with the same seeds, such as --train.seed 0" in line


def test_unfinished_and_duplicate_runs_are_not_in_the_means():
    again = a_run("again", 1, 0.9, MIXTURE)
    stale = a_run("old", 2, 0.9, MIXTURE, "stale: resumed")
    (group,), left_out = groups([*mixtures(0.5, 0.6), again, stale])
    assert group.to_dict()["macro_f1"] == pytest.approx(0.55)
    assert left_out == [
        "again repeats moe-seed1 with seed 1: left out of the means",
        "old is left out of the means (stale: resumed)",
    ]


def test_runs_that_differ_in_more_than_the_seed_are_separate_groups():
    other = [a_run(f"top1-seed{seed}", seed, 0.4, MIXTURE | {"router.top_k": 1}) for seed in range(2)]
    found, _ = groups([*mixtures(0.5, 0.6), *other])
    (minus,), _ = differences_of(found)
    assert minus.name == "top1 minus moe" and minus.figures["macro_f1"][0] == pytest.approx(-0.15)
    assert seed_rows(*[[]] * 2) == [] == seed_rows(groups(mixtures(0.5))[0], [])


def test_the_recipe_is_that_of_the_mixture_and_paths_do_not_count():
    bare = flatten(Config().to_dict())
    elsewhere = MIXTURE | {"run_dir": "/elsewhere", "device": "cuda", "train.seed": 9}
    assert recipe_key(MIXTURE) == recipe_key(TWIN) == recipe_key(bare | elsewhere) != recipe_key(bare)
    assert recipe_key(TWIN | {"twin_of": "no JSON"}) != recipe_key(TWIN)


def test_comparison_prints_and_writes_means(call, tmp_path):  # noqa: F811
    runs = [
        write_run(tmp_path / f"a-seed{seed}", METRICS | {"macro_f1": 0.5 + 0.1 * seed}, train={"seed": seed})
        for seed in range(2)
    ]
    code, out, err = call("--compare", *runs)
    assert (code, err) == (0, "")
    assert "a                0, 1  55.00 ± 7.07 %" in out
    assert "| a | 0, 1 | 55.00 ± 7.07 % |" in (tmp_path / "comparison" / "comparison.md").read_text(encoding="utf-8")
    written = json.loads((tmp_path / "comparison" / "comparison.json").read_text(encoding="utf-8"))
    assert written["seeds"][0]["seeds"] == [0, 1] and written["differences"] == []


@pytest.mark.parametrize(
    ("scores", "words"),
    [
        (
            (0.60, 0.61, 0.62),
            "The mixture is better than its dense twin: its macro-F1 minus that of a dense twin of equal FLOPs is",
        ),
        ((0.50, 0.62, 0.40), "These seeds do not show whether the mixture is better than its dense twin"),
        ((0.40, 0.41, 0.42), "The mixture is worse than its dense twin"),
        ((0.60,), "One seed cannot show whether the mixture is better than its dense twin"),
    ],
)
def test_the_verdict_of_runs_in_one_folder(tmp_path, scores, words):
    config = Config()
    values = config.to_dict()
    replaced = {"experts": values["experts"] | {"sizes": [[9]]}, "router": values["router"] | {"top_k": 1}}
    old = {"experts.sizes": values["experts"]["sizes"], "router.top_k": values["router"]["top_k"]}
    for seed, score in enumerate(scores):
        own = values | {"train": values["train"] | {"seed": seed}}
        write_run(tmp_path / f"moe-{seed}", METRICS | {"macro_f1": score}, **own)
        twin = own | replaced | {"dense_twin": True, "twin_of": json.dumps(old)}
        cost = {"cost": {"flops": 100 + seed, "memory_bytes": None}}
        write_run(tmp_path / f"twin-{seed}", METRICS | {"macro_f1": 0.5 + 0.001 * seed} | cost, **twin)
    write_run(tmp_path / "other", METRICS)
    (tmp_path / "no-run").mkdir()
    found = verdict(RunFolder(tmp_path / "moe-0"), config, scores[0])
    assert found["text"].startswith(words) and found["seeds"] == list(range(len(scores)))
    assert found["beside"] == {"name": "twin-0", "cost": {"flops": 100}}  # of the same seed


def test_without_a_twin_there_is_no_verdict(tmp_path):
    write_run(tmp_path / "other", METRICS)
    assert verdict(RunFolder(tmp_path / "moe"), Config(), 0.5) is None
