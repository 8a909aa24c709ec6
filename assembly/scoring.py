"""The evaluation of a trained run, as evaluate.py does it."""

import argparse

from assembly.loading import offload_line, open_run
from assembly.pipeline import compile_blocks
from assembly.start import tags_of
from common.text import printable
from evaluation.evaluation import evaluate, expert_table, print_scores
from tracking.tracker import open_evaluation, require_server


def score(options: argparse.Namespace) -> None:
    """Load the model of a run, evaluate it on the test set and write the results."""
    require_server(options.tracking)
    opened = open_run(
        options.run, options.device, options.root, options.weights, options.cache_dir, options.offload_memory
    )
    run, config, model = opened.run, opened.config, opened.model
    if opened.traffic is None:  # a compiled block cannot fetch experts
        compile_blocks(config, model, opened.inputs.device)
    named = {"name": run.path.name, "tags": tags_of(config)}
    with open_evaluation(options.tracking, run.path, config.to_dict(), **named) as tracker:
        if tracker.resends:
            tracker.model(run.weights, run.path.name, opened.inputs.splits.train.class_names)
        measure = (options.worth_images, options.latency, print_scores)
        found = evaluate(run, config, model, opened.bank, tracker, opened.inputs.backbone, *measure)
        print(expert_table(found))
    if opened.traffic is not None:
        print(offload_line(opened.traffic))
    print(f"written to   {printable(run.evaluation)}; open {run.report.name} in a browser")
