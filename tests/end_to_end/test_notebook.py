"""The notebook: it runs from top to bottom, shows its results, and is committed with the outputs of a real run."""

import json
import os

import nbformat
import pytest
from conftest import ROOT
from jupyter_client import KernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

import train
from common.errors import exit_code_of

NOTEBOOK = ROOT / "notebooks" / "expert_assignments.ipynb"


def texts(notebook) -> str:
    """All text and tables of the outputs."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(output.get("text", "") or output.get("data", {}).get("text/markdown", "") for output in outputs)


def images(notebook) -> int:
    return sum("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))


@pytest.fixture(scope="module")
def kernel():
    """One kernel for all runs of the notebook, because its imports take seconds."""
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(NOTEBOOK.parent), env=os.environ | {"OMP_NUM_THREADS": "1"})
    yield manager
    manager.shutdown_kernel(now=True)


@pytest.fixture(scope="module")
def execute(kernel):
    """Run a notebook on a run, without variables of an earlier one."""

    def on(notebook, run) -> None:
        begin = nbformat.v4.new_code_cell(f"%reset -f\nimport os\nos.environ['VISION_MOE_RUN'] = {str(run)!r}")
        notebook.cells.insert(0, begin)
        try:  # a cell takes seconds, and has minutes on a busy machine
            NotebookClient(notebook, kernel, timeout=600, startup_timeout=600).execute()
        finally:
            notebook.cells.remove(begin)

    return on


@pytest.fixture(scope="module")
def executed(tiny_run, execute):
    """The notebook, run on the tiny run."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    execute(notebook, tiny_run)
    return notebook


@pytest.mark.slow
def test_it_runs_on_a_run_and_agrees_with_its_evaluation(executed, tiny_run):
    results = json.loads((tiny_run / "evaluation" / "metrics.json").read_text())
    shown = texts(executed)
    assert f"accuracy {100 * results['accuracy']:.1f} %, macro-F1 {100 * results['macro_f1']:.1f} %" in shown
    for expert, label in enumerate(results["experts"]):
        (own,) = [
            line
            for line in shown.splitlines()
            if line.startswith(f"| {label} | {100 * results['expert_load'][expert]:.1f} %")
        ]
        assert f"{100 * results['expert_importance'][expert]:.1f} %" in own
        change = f"{100 * results['expert_worth'][expert]['macro_f1_change']:+.2f} ±"
        assert f"| {label} | {change}" in shown
    assert "| 0 and 1 |" in shown or "| 2 and 3 |" in shown
    assert images(executed) >= 2


@pytest.mark.slow
def test_with_experts_inside_the_vit_it_shows_patches_and_the_initial_run(
    tmp_path, monkeypatch, without_figures, execute
):
    run, more = tmp_path / "run", tmp_path / "more"
    options = ["--data.max_per_class", "13", "--experts.blocks", "[0,1]", "--backbone.features", "[cls:1,mean:1]"]
    options += ["--train.epochs", "1", "--train.batch_size", "16", "--router.warmup_steps", "1", "--tracking", "none"]
    monkeypatch.chdir(ROOT)
    begun = ["--config", "configs/digits_blocks.yaml", *options, "--run_dir", str(run)]
    more_of = ["--init", str(run), "--experts.add", "[[4]]", "--tracking", "none", "--run_dir", str(more)]
    for words in (begun, more_of):
        monkeypatch.setattr("sys.argv", ["train.py", *words])
        assert exit_code_of(train.main) == 0
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    execute(notebook, more)
    shown = texts(notebook)
    assert f"This run starts from {run}, epoch 1." in shown and "5 experts, 2 for each token" in shown
    assert "the expert with the largest gate weight for each patch" in shown
    assert "block  0: specialisation " in shown and "block  1: specialisation " in shown
    (cell,) = [cell for cell in notebook.cells if cell.source.startswith('show("patch_maps"')]
    assert images(nbformat.from_dict({"cells": [cell]})) == 4  # the ablation in single blocks needs a GPU


@pytest.mark.slow
def test_an_interrupted_run_is_reported_in_one_line(tmp_path, execute):
    (tmp_path / "config.yaml").write_text("{}")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    with pytest.raises(CellExecutionError):
        execute(notebook, tmp_path)
    outputs = [output for cell in notebook.cells[:3] for output in cell.get("outputs", [])]
    (said,) = [output for output in outputs if output.output_type == "error"]
    assert said.ename == "SystemExit" and said.evalue.count("\n") == 0
    assert f"python train.py --resume {tmp_path}" in said.evalue and "cell" in said.evalue
    assert "Traceback" not in "".join(said.traceback)


def test_it_is_committed_with_the_outputs_of_a_real_run():
    committed = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(committed)
    assert NOTEBOOK.stat().st_size < 4_000_000
    assert images(committed) == 9  # five of them of the experts inside the ViT
    shown = texts(committed)
    assert "cifar100" in shown and "10,000 test images" in shown
    assert not [word for word in ("/root", "/tmp", "/home", "Traceback", "Warning") if word in NOTEBOOK.read_text()]
    code = [cell for cell in committed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert code[0].source.startswith("RUN = None")
