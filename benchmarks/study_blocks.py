"""Compare mixtures inside the frozen ViT with a dense adapter of equal cost, by width: tables and a curve.

python -m benchmarks.study_blocks --data.root DATA --backbone.weights FILE --check     one minute: time estimate
python -m benchmarks.study_blocks --data.root DATA --backbone.weights FILE             on all GPUs, at most 25 minutes
python -m benchmarks.study_blocks --tables                                             the stored results, as Markdown
python -m benchmarks.study_blocks --tiny                                               a quick trial on a CPU, with
digits

Experts are only in the last blocks. What precedes the first of their mixtures is computed once for each augmented view,
with patches averaged over 2 x 2 blocks, and stored on the GPU, so a step costs a fraction of one on images. Up to four
runs of a method are trained side by side. They draw their gate noise from one generator, so the result of a single run
also depends on how many run at once.

Every method of width r has the same cost per token: a token-level mixture has r active hidden units under an even load
and a gate of four experts, which costs as much as two units; an image-level mixture and the dense adapter have r + 2
units.

Each method uses the best of the same learning rates on validation images with seed 0; this run and those of the other
seeds are scored on the test images. Runs with the same seed see the same batches. Finished runs are stored in
OUT/study_blocks/runs.jsonl and are not repeated: an interrupted study continues, and several processes with the same
OUT share the work. Options of the sections data, augment and backbone go to train.py's configuration.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks.blocks_methods import WIDTHS, methods
from benchmarks.blocks_store import Store
from benchmarks.blocks_tables import show
from benchmarks.blocks_training import SIDE_BY_SIDE, Setting
from benchmarks.blocks_worker import Worker, check
from benchmarks.common import Parser, start
from common.errors import EnvironmentFault, exit_code_of
from common.signals import stoppable
from config.command_line import parse_command_line
from config.config import Config

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = ("--data.", "--augment.", "--backbone.")
TINY = {"widths": [4, 16], "seeds": 2, "epochs": 1, "first": 2, "rates": [3e-3, 1e-2], "batch": 64}
RATES = [2e-4, 6e-4, 2e-3]
MOST_STARTS = 4  # limit of starts of one process


def main(argv: list[str] | None = None) -> None:
    """Run the remaining part of the study until the time is over, then print the stored results."""
    words = sys.argv[1:] if argv is None else argv
    options, rest = arguments(words)
    config = configuration(options, rest)
    folder = options.out / f"study_blocks{'_tiny' if options.tiny else ''}"
    chosen = methods(options.widths)[: options.methods]
    store = Store(folder, setting_of(options, config), chosen, options.rates, options.seeds)
    if options.worker:
        work(config, store, options)
        return
    if not options.tables:
        began = time.time()
        store.begin()
        options.until = began + options.seconds
        gpus = gpu_names(options)
        try:
            launch(words, options, store, gpus) if gpus else work(config, store, options)
        finally:
            store.add(held=(time.time() - began) * max(1, len(gpus)))
    if not options.check:
        store.read()
        show(store, folder)


def work(config: Config, store: Store, options: argparse.Namespace) -> None:
    """The work of one process."""
    worker = Worker(config, store, options)
    check(worker) if options.check else worker.run()


def arguments(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The study's options, and those for the configuration. Raises UserError for others."""
    parser = Parser("study_blocks", __doc__, seconds=1500, tiny=TINY)
    parser.allow_abbrev = False
    parser.add_numbers("--widths", list(WIDTHS), "active hidden units r", least=4)  # one for each of four experts
    parser.add_argument("--seeds", type=int, default=5, help="runs of each method (default 5)")
    parser.add_argument(
        "--epochs", type=int, default=3, help="epochs of each run, each with a different view (default 3)"
    )
    parser.add_argument("--first", type=int, default=8, least=0, help="first block with experts (default 8)")
    parser.add_argument("--batch", type=int, default=256, help="images per step (default 256)")
    help_text = f"learning rates (default {' '.join(map(str, RATES))})"
    parser.add_argument("--rates", type=float, nargs="+", default=RATES, metavar="LR", help=help_text)
    parser.add_argument("--methods", type=int, help="number of methods, the most important ones first (default: all)")
    help_text = f"runs of a method that are trained at once (default {SIDE_BY_SIDE})"
    parser.add_argument("--side_by_side", type=int, default=SIDE_BY_SIDE, help=help_text)
    parser.add_argument("--workers", type=int, default=1, help="processes for each GPU (default 1)")
    parser.add_argument("--check", action="store_true", help="only time a few steps, and estimate the total time")
    parser.add_argument("--tables", action="store_true", help="only print the stored results")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options, rest = parser.parse_known_args(words)
    for word in rest:
        if word.startswith("-") and not word.startswith(SECTIONS):
            parser.error(f"{word} is not an option of the study: its methods have their own settings")
    if not all(0 < rate < 1 for rate in options.rates):
        parser.error(f"--rates is {' '.join(map(str, options.rates))}: each must be above 0 and below 1")
    return options, rest


def configuration(options: argparse.Namespace, rest: list[str]) -> Config:
    """Images and backbone; a study selects among methods, which needs more validation images than a finished recipe."""
    recipe = ROOT / "configs" / ("digits_blocks.yaml" if options.tiny else "cifar100.yaml")
    words = ["--config", str(recipe), "--device", options.device, "--data.validation", "0.1"]
    words += ["--train.batch_size", str(options.batch)]
    return parse_command_line([*words, *rest]).config


def setting_of(options: argparse.Namespace, config: Config) -> Setting:
    """The setting of all runs."""
    data = {name: value for name, value in vars(config.data).items() if name != "root"}
    source = {"data": json.dumps(data, default=str), "backbone": config.backbone.name}
    return Setting(first=options.first, epochs=options.epochs, batch=options.batch, **source)


def gpu_names(options: argparse.Namespace) -> list[str]:
    """The GPUs of the study, as in CUDA_VISIBLE_DEVICES: all visible ones, or the one of --device."""
    if start(options).type == "cpu":
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]
    index = options.device.partition(":")[2]
    names = [names[int(index)]] if index else names
    return names[:1] if options.check else names


def launch(words: list[str], options: argparse.Namespace, store: Store, gpus: list[str]) -> None:
    """Run processes for each GPU; a process that asks for it, or that has died, is restarted a few times.

    Raises EnvironmentFault if a process does not finish.
    """
    command = [sys.executable, "-m", "benchmarks.study_blocks", *words, "--device", "cuda"]
    command += ["--worker", "--until", str(options.until)]

    def begin(slot: int) -> subprocess.Popen:
        gpu = gpus[slot % len(gpus)]
        return subprocess.Popen(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": "4"})

    slots = range(1 if options.check else options.workers * len(gpus))
    running, starts, failed = {slot: begin(slot) for slot in slots}, dict.fromkeys(slots, 1), []
    try:
        while running:
            time.sleep(0.2)
            for slot in [slot for slot, process in running.items() if process.poll() is not None]:
                code = running.pop(slot).returncode
                if code and starts[slot] < MOST_STARTS and time.time() < options.until:
                    starts[slot] += 1
                    running[slot] = begin(slot)
                elif code:
                    failed.append(f"{gpus[slot % len(gpus)]} (exit code {code})")
    finally:
        for process in running.values():
            process.terminate()
    if failed:
        raise EnvironmentFault(
            f"processes failed on GPU {', '.join(failed)}: see above; finished runs are kept in {store.path}, and the "
            "same command continues from there"
        )


def program() -> None:
    """`main`, with an orderly shutdown on a signal, processes first."""
    with stoppable():
        main()


if __name__ == "__main__":
    sys.exit(exit_code_of(program))
