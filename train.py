"""Train a vision mixture of experts on a frozen ViT, evaluate it once on the test set, and log both.

python train.py                                        CIFAR-100, the default recipe (configs/cifar100.yaml)
python train.py --config configs/digits.yaml           no download, half a minute on a CPU
python train.py --config configs/article.yaml          the reference recipe
python train.py --router.top_k 1 --train.epochs 20     any field of the configuration
python train.py --resume runs/cifar100-20260101-120000 continue an interrupted run
torchrun --nproc-per-node 2 train.py                   the same run on two GPUs (docs/devices.md)
python train.py --init RUN --data.name folder --data.root ROOT --freeze router    start from a trained run
"""

from common.errors import begin_program

if __name__ == "__main__":
    begin_program()

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from assembly.pipeline import Inputs, build_trainer, load_inputs, pick_device
from assembly.seeds import train_seeds
from assembly.start import announce, export_best, record, start_tracking
from assembly.teachers import named_teachers, teacher_of
from assembly.twin import planned
from common.distributed import joined, started
from common.errors import exit_code_of, exit_process
from common.signals import stoppable
from common.text import printable
from config.command_line import parse_command_line
from config.config import Config
from evaluation.evaluation import evaluate, expert_table, print_scores
from features.bank import FeatureBank
from features.images import ImageBank
from storage.resume import Start, start_of
from tracking.agent import apply_agent_values
from training.side_by_side import Run, fit
from training.trainer import Trainer


def main() -> None:
    """Train one run, or one per seed."""
    with stoppable(), started():
        invocation = apply_agent_values(parse_command_line())
        config = invocation.config
        with joined(pick_device(config.device), config.parallel.timeout):
            if invocation.seeds is not None:
                train_seeds(invocation, train)
            elif (start := start_of(invocation)).finished:
                print(start.finished)
            else:
                named_teachers(start)  # reports a missing one before anything is loaded
                train([start], load_inputs(start.config, start.checkpoint is not None))


def train(starts: Sequence[Start], inputs: Inputs, bank: FeatureBank | ImageBank | None = None) -> None:
    """Train runs, one or several side by side, and evaluate each. bank: shared features (None: built here)."""
    with ExitStack() as opened:
        prepared = [opened.enter_context(_prepared(start, inputs, bank)) for start in starts]
        runs = [run for _, run in prepared]
        announce(prepared[0][0], inputs, runs[0].trainer)
        for run in runs[1:]:
            print(f"run folder   {printable(run.trainer.run.path)}", flush=True)
        for (config, run), best in zip(prepared, fit(runs), strict=True):
            if len(runs) > 1:
                print(f"seed         {config.train.seed}", flush=True)
            _evaluate(config, run.trainer, best, inputs)


@contextmanager
def _prepared(start: Start, inputs: Inputs, bank: FeatureBank | ImageBank | None) -> Iterator[tuple[Config, Run]]:
    """Configuration, model, run folder, tracker: everything for the first step.

    What can be wrong with the options is found before there is a folder or a task.
    """
    config = start.config if start.checkpoint else planned(start.config, inputs)
    trainer = build_trainer(config, inputs, start, bank, teacher_of(start, config, inputs.device))
    if start.checkpoint is None:
        trainer.bank.require_room()
    with start.claimed() as run, start_tracking(config, run, start.checkpoint, inputs) as tracker:
        record(trainer, run, tracker)
        yield config, Run(trainer)


def _evaluate(config: Config, trainer: Trainer, best: dict[str, Any], inputs: Inputs) -> None:
    """Export, evaluate and report a trained run."""
    run = trainer.run
    print(f"{config.train.keep} epoch   {best['epoch']}, validation macro-F1 {100 * best['macro_f1']:.2f} %")
    export_best(trainer, best)
    found = evaluate(run, config, trainer.model, trainer.bank, trainer.tracker, inputs.backbone, scored=print_scores)
    print(expert_table(found))
    print(f"run folder   {printable(run.path)}")


if __name__ == "__main__":
    exit_process(exit_code_of(main, keep_going=True))
