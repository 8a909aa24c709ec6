"""The cost model of several devices, against steps worked out by hand."""

import json

import pytest

from benchmarks import scaling_model
from benchmarks.scaling_formulas import Head, Network, Recipe, Step, View
from common.errors import UserError

NETWORK = Network(within=1e9, between=1e8, latency=0.0001, node=4)
SIZES = {"experts": 8, "top_k": 2, "features": 96, "outputs": 4, "common": 1_000_000, "each": 500_000}
HEAD = Head(base=0.001, expert=0.0005, row=1e-6, **SIZES)
RECIPE = Recipe(base=0.002, row=0.0001, trained=1_000_000, gates=500)


def test_one_device_exchanges_nothing():
    step = HEAD.step(NETWORK, 1, 1, 1000)
    assert step.compute == pytest.approx(0.001 + 8 * 0.0005 + 1000 * 1e-6)
    assert step.whole == step.compute
    assert RECIPE.step(NETWORK, 1, 10).whole == pytest.approx(0.003)
    assert View(0.5, 10, 8).step(NETWORK, 1, 35).whole == 2.0  # four batches


def test_two_devices():
    step = HEAD.step(NETWORK, 2, 2, 1000)
    assert step.compute == pytest.approx(0.001 + 4 * 0.0005 + 0.001)
    # Half of 2,000 rows of 96 numbers and 4 outputs, 2 bytes each, and as many gradients; five exchanges.
    assert step.all_to_all == pytest.approx(2 * 1000 * 100 * 2 * 2 / 2 / 1e9 + 0.0005)
    assert step.gates == pytest.approx(1000 * 8 * 4 / 1e9)
    assert step.gradients == pytest.approx(2 * 4 * 1e6 / 2 / 1e9 + 0.0004)


def test_groups_also_sum_the_gradients_of_experts():
    step = HEAD.step(NETWORK, 4, 2, 1000)
    # Of two groups: 4 experts of 500,000 parameters a device.
    assert step.gradients == pytest.approx((2 * 4 * 1e6 * 3 / 4 + 2 * 4 * 2e6 / 2) / 1e9 + 0.0004)


def test_data_between_nodes_uses_the_bandwidth_between_nodes():
    step = HEAD.step(NETWORK, 8, 8, 1000)
    sent = 2 * 1000 * 100 * 2 * 2 * 7 / 8  # of 7 others 4 are in the other node
    assert step.all_to_all == pytest.approx(sent * (3 / 7 / 1e9 + 4 / 7 / 1e8) + 0.0005)


def test_a_recipe_and_a_view_on_two_devices():
    step = RECIPE.step(NETWORK, 2, 10)
    assert step.gates == pytest.approx(10 * 500 * 4 / 1e9) and step.all_to_all == 0
    assert step.gradients == pytest.approx(2 * 4 * 1e6 / 2 / 1e9 + 0.0003)
    # Two of four batches each, then 35 images of 8 bytes.
    assert View(0.5, 10, 8).step(NETWORK, 2, 35).whole == pytest.approx(1.0 + 35 * 8 / 1e9)


def test_inputs_are_fitted_to_steps_on_one_device():
    seconds = [0.001 + experts * 0.0005 + rows * 1e-6 for experts, rows in ((4, 500), (4, 1000), (2, 500))]
    found = Head.fitted(*seconds, rows=1000, **SIZES)
    assert (found.base, found.expert, found.row) == pytest.approx((0.001, 0.0005, 1e-6))
    found = Recipe.fitted(0.002 + 25 * 0.0001, 0.002 + 12 * 0.0001, 25, trained=1, gates=1)
    assert (found.base, found.row) == pytest.approx((0.002, 0.0001))


def measured(folder) -> None:
    """Results of benchmarks.devices in which two devices take 25 % longer than the model says."""
    link = {"within": 1e9, "latency": 0.0001}

    def training(batch: int, seconds: float) -> dict:
        return {"batch": batch, "seconds": seconds, "trained": RECIPE.trained, "gates": RECIPE.gates}

    alone = {"processes": 1, "training": training(20, 0.004), "half": training(10, 0.003)}
    alone["extraction"] = {"images_per_second": 50.0, "seconds": 2.0, "batch": 25, "bytes": 8}
    two = {"processes": 2, "training": training(20, 1.25 * RECIPE.step(NETWORK, 2, 10).whole), "link": link}
    two["extraction"] = {"failed": "out of memory"}
    alone |= {
        f"head{name}": {"rows": rows, "seconds": seconds}
        for name, rows, seconds in (
            ("", 1000, 0.006),
            ("_half", 500, 0.0035),
            ("_half_experts", 1000, 0.004),
            ("_quarter", 500, 0.0025),
        )
    }
    two["head"] = {"rows": 1000, "seconds": 1.25 * HEAD.step(NETWORK, 2, 2, 500).whole}
    two["head_link"] = link | SIZES
    (folder / "devices.json").write_text(json.dumps({"rows": [alone, two]}))


def test_measured_and_predicted_times_are_shown_side_by_side(tmp_path, capsys):
    measured(tmp_path)
    scaling_model.main(["--from", str(tmp_path), "--node", "4", "--between", "1e8", "--devices", "1", "8"])
    said = capsys.readouterr().out
    lines = [line for line in said.splitlines() if line.startswith(("| default", "| 8 exp", "| extraction, 100"))]
    assert [line.split("|")[-2].strip() for line in lines] == ["+0 %", "-20 %", "+0 %", "-20 %", "+0 %"]
    assert "PREDICTIONS, 4 devices per node, 1e+08 bytes/s between nodes" in said and "experts on 4" in said


def test_communication_is_marked_by_its_part_of_a_step_even_if_efficiency_is_high():
    steps = {1: Step(compute=10.0), 2: Step(compute=5.0, all_to_all=6.0), 4: Step(compute=5.0, all_to_all=4.0)}
    *_, one, two, four = scaling_model._growth("", [1, 2, 4], lambda number: [("", steps[number])]).splitlines()
    assert "| 91 % " in two and "more than half is communication" in two
    assert "communication" not in one + four


def test_files_of_other_programs_are_rejected(tmp_path):
    with pytest.raises(UserError, match=r"has no devices\.json to predict from: run"):
        scaling_model.main(["--from", str(tmp_path)])
    (tmp_path / "devices.json").write_text("{}")
    with pytest.raises(UserError, match=r"was not written by benchmarks\.devices"):
        scaling_model.main(["--from", str(tmp_path)])
