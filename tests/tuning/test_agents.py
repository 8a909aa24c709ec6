"""tune.py --queue: trials are clones of one task, in a queue whose agents are simulated here."""

import json
import threading

import pytest
import yaml
from clearml_process import run_forked
from clearml_standin import StandIn
from conftest import ROOT

import tune
from common.errors import UserError, exit_code_of
from config.command_line import parse_command_line
from tracking import queues
from tuning.options import require_agents

pytest.importorskip("optuna")

SPACE = (
    "optim.lr: {low: 1e-4, high: 1e-3}\nrouter.kind: [noisy_topk, switch]\nexperts.sizes: [[[8], [16]], [[16], [16]]]\n"
)
CODE = """
import tune, tuning.agents
from common.errors import exit_code_of
tuning.agents.POLL_SECONDS = 0.1
sys.argv = ["tune.py", *WORDS]
assert exit_code_of(tune.main) == 0
"""


def serve(server: StandIn, ended: threading.Event) -> None:
    """Simulate the agents: the score of a task depends on its learning rate, and tasks of one routing rule fail."""
    while not ended.wait(0.05):
        for task in [task for task in server.tasks.values() if task["status"] == "queued"]:
            values = {f"{s}/{name}": v["value"] for s, held in task["hyperparams"].items() for name, v in held.items()}
            lr, kind = float(values["optim/lr"]), values["router/kind"]
            event = {"type": "training_stats_scalar", "task": task["id"], "metric": "macro_f1", "variant": "validation"}
            for epoch in range(3 if kind == "noisy_topk" else 1):
                server.events.append({**event, "iter": 7 * (epoch + 1), "value": 100 * lr + [0.1, 0.3, 0.2][epoch]})
            reason = "out of memory" if kind == "switch" else ""
            task |= {"completed": "2026-01-01T00:00:00+00:00", "status_reason": reason}
            task["status"] = "failed" if reason else "completed"


@pytest.mark.slow
def test_agents_train_clones_and_the_best_score_wins(tmp_path):
    (tmp_path / "space.yaml").write_text(SPACE, encoding="utf-8")
    words = [
        "--config",
        str(ROOT / "configs" / "digits.yaml"),
        "--space",
        str(tmp_path / "space.yaml"),
        "--queue",
        "gpu",
    ]
    words += ["--trials", "4", "--jobs", "2", "--out", str(tmp_path / "out"), "--router.top_k", "1"]
    ended = threading.Event()
    with StandIn() as server:
        agents = threading.Thread(target=serve, args=(server, ended))
        agents.start()
        try:
            output = run_forked(tmp_path, tmp_path, CODE.replace("WORDS", repr(words)), **server.environment())
        finally:
            ended.set()
            agents.join()
        tasks = list(server.tasks.values())
    (parent,) = [task for task in tasks if task["type"] == "optimizer"]
    (base,) = [task for task in tasks if task["name"] == "out-base"]
    trials = [task for task in tasks if task.get("parent") == parent["id"]]
    assert base["status"] == "created" and parent["status"] == "completed"
    assert all(task["script"]["entry_point"] == "train.py" for task in (base, *trials))
    rows = {row["task"]: row for row in json.loads((tmp_path / "out" / "trials.json").read_text(encoding="utf-8"))}
    assert len(rows) == 4 and {task["id"] for task in trials} == rows.keys() - {None}
    for task in trials:
        row, given = rows[task["id"]], task["hyperparams"]
        assert task["name"] == f"out-{row['trial']:04d}"
        assert (float(given["optim"]["lr"]["value"]), given["router"]["kind"]["value"]) == (
            row["optim.lr"],
            row["router.kind"],
        )
        assert yaml.safe_load(given["experts"]["sizes"]["value"]) == row["experts.sizes"]
        if row["router.kind"] == "switch":
            assert (row["state"], row["reason"]) == ("fail", "failed (out of memory)")
        else:  # of its three epochs the best one, which is what keep best evaluates
            assert (row["state"], row["epochs"]) == ("complete", 3)
            assert row["macro_f1"] == pytest.approx(100 * row["optim.lr"] + 0.3)
    best = max(row["macro_f1"] or 0 for row in rows.values())
    assert f"validation macro-F1 {100 * best:.2f} %" in (tmp_path / "out" / "best.yaml").read_text(encoding="utf-8")
    assert f"{100 * best:.2f} %" in output and "Progress report" not in output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tracking", "none"], "--queue gpu needs a ClearML server: leave --tracking none out"),
        ([], "no ClearML server is configured"),
    ],
)
def test_a_queue_needs_a_server(words, said, monkeypatch, tmp_path, capsys):
    problem = UserError("no ClearML server is configured; run clearml-init")
    monkeypatch.setattr(queues, "server_problem", lambda: problem)
    (tmp_path / "space.yaml").write_text(SPACE, encoding="utf-8")
    monkeypatch.setattr(
        "sys.argv", ["tune.py", "--space", str(tmp_path / "space.yaml"), "--trials", "1", "--queue", "gpu", *words]
    )
    monkeypatch.chdir(ROOT)
    assert exit_code_of(tune.main) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_requests_that_agents_cannot_run_are_rejected_before_contacting_a_server():
    config = parse_command_line(["--config", str(ROOT / "configs" / "digits.yaml")]).config
    config.plugins = ["my_rules.py"]
    with pytest.raises(UserError, match="--plugins works only on this machine"):
        require_agents(config, "gpu")


def test_options_have_the_names_of_their_sections():
    assert queues.parameter_names(["optim.lr", "freeze"]) == {"optim.lr": "optim/lr", "freeze": "General/freeze"}
