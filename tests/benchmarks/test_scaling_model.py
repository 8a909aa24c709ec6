"""The cost model of steps with experts on several devices, against steps worked out by hand."""

import json

import pytest

from benchmarks.scaling_model import Inputs, compared, predict, read
from common.errors import UserError

GIVEN = Inputs(
    base=0.001,
    expert=0.0005,
    row=1e-6,
    within=1e9,
    between=1e8,
    latency=0.0001,
    experts=8,
    top_k=2,
    features=96,
    outputs=4,
    common=1_000_000,
    each=500_000,
    node=4,
)


def test_one_device_exchanges_nothing():
    step = predict(GIVEN, 1, 1, 1000)
    assert step.compute == pytest.approx(0.001 + 8 * 0.0005 + 1000 * 1e-6)
    assert step.whole == step.compute


def test_two_devices():
    step = predict(GIVEN, 2, 2, 1000)
    assert step.compute == pytest.approx(0.001 + 4 * 0.0005 + 0.001)
    # Half of 2,000 rows of 96 numbers and 4 outputs, 2 bytes each, and as many gradients; five exchanges.
    assert step.all_to_all == pytest.approx(2 * 1000 * 100 * 2 * 2 / 2 / 1e9 + 0.0005)
    assert step.gates == pytest.approx(2000 * 8 * 4 / 1e9)
    assert step.gradients == pytest.approx(2 * 4 * 1e6 / 2 / 1e9 + 0.0004)


def test_groups_add_up_the_gradients_of_experts_too():
    step = predict(GIVEN, 4, 2, 1000)
    # Of two groups: 4 experts of 500,000 parameters a device.
    assert step.gradients == pytest.approx((2 * 4 * 1e6 * 3 / 4 + 2 * 4 * 2e6 / 2) / 1e9 + 0.0004)


def test_what_leaves_the_node_goes_at_the_bandwidth_between_nodes():
    step = predict(GIVEN, 8, 8, 1000)
    sent = 2 * 1000 * 100 * 2 * 2 * 7 / 8  # of 7 others 4 are in the other node
    assert step.all_to_all == pytest.approx(sent * (3 / 7 / 1e9 + 4 / 7 / 1e8) + 0.0005)


def test_inputs_are_fitted_to_three_steps():
    kept = {name: value for name, value in vars(GIVEN).items() if name not in ("base", "expert", "row", "experts")}
    seconds = (predict(GIVEN, 1, 1, 1000).whole, predict(GIVEN, 1, 1, 500).whole, 0.001 + 4 * 0.0005 + 500e-6)
    found = Inputs.fitted(*seconds, rows=1000, experts=8, **kept)
    assert (found.base, found.expert, found.row) == pytest.approx((0.001, 0.0005, 1e-6))


def test_measured_and_predicted_stand_side_by_side(tmp_path):
    seconds = predict(GIVEN, 2, 2, 500).whole
    found = {"rows": 1000, "inputs": vars(GIVEN), "steps": [{"processes": 2, "seconds": 1.25 * seconds}]}
    (tmp_path / "found.json").write_text(json.dumps(found))
    assert "-20 %" in compared(read(tmp_path / "found.json"), GIVEN)


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UserError, match="run that first"):
        read(tmp_path / "other.json")
