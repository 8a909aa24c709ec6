"""Train one recipe with several seeds, each run in its own folder, on inputs that are loaded once."""

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from assembly.pipeline import Inputs, build_bank, load_inputs
from assembly.replay import load_images
from assembly.twin import planned
from common.distributed import world
from common.errors import UserError
from common.text import printable, quoted
from config.command_line import Invocation
from config.config import Config, config_from_dict
from features.bank import FeatureBank
from features.images import ImageBank
from storage.folder import RunFolder
from storage.resume import Start, load_resumable, start_of

Train = Callable[[Start, Inputs, FeatureBank | ImageBank], None]


def train_seeds(invocation: Invocation, train: Train) -> None:
    """Train the seeds train.seed, train.seed + 1, ... and print their combined scores.

    invocation: the command line, with the number of seeds. train: trains one run. The runs are sequential and share the
    backbone, the images and the features; with data.shots each seed draws different images, with data.split_seed,
    data.split_seed + 1, ... A seed with an unfinished folder is continued, and a seed that is already
    scored is skipped; so an interrupted command continues when it is run again with its --run_dir. Raises UserError as
    `load_inputs`, `dense_twin` and `start_of`.
    """
    from evaluation.compare import compare  # here, because importing matplotlib takes a second

    inputs = load_inputs(invocation.config)
    config = planned(invocation.config, inputs)
    bank = build_bank(config, inputs.splits, inputs.backbone, inputs.device)
    now = world().broadcast(datetime.now())
    base = config.run_dir or Path("runs") / f"{invocation.name}-{now:%Y%m%d-%H%M%S}"
    runs = []
    for count in range(invocation.seeds):
        seed = config.train.seed + count
        own = _with_seed(config, seed, base.with_name(f"{base.name}-seed{seed}"))
        if config.data.shots and count:
            own.data.split_seed += count
            inputs = replace(inputs, splits=load_images(own))
            bank = build_bank(own, inputs.splits, inputs.backbone, inputs.device)
        start = _start(invocation, own)
        runs.append(str(start.config.run_dir))
        if start.finished:
            print(start.finished)
        else:
            print(f"seed         {seed}", flush=True)
            train(start, inputs, bank)
    if len(runs) > 1 and world().first:
        out = base.with_name(f"{base.name}-comparison")
        print(f"\n{compare(runs, out)}\nwritten to   {printable(out)}")


def _with_seed(config: Config, seed: int, folder: Path) -> Config:
    found = config_from_dict(config.to_dict())
    found.train.seed, found.run_dir = seed, folder.absolute()
    return found


def _start(invocation: Invocation, config: Config) -> Start:
    """A new run in config.run_dir, or the existing one, which must have this configuration."""
    run = RunFolder(config.run_dir)
    if not run.last.exists():
        return start_of(replace(invocation, config=config))
    run.require_not_busy()
    try:
        return Start(config, run.path.name, run, load_resumable(run, config))
    except UserError as error:
        folder = quoted(run.path)
        raise UserError(f"--seeds cannot continue {folder}, choose another --run_dir: {error}") from error
