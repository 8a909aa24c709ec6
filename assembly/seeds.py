"""Train one recipe with several seeds, each run in its own folder, on inputs that are loaded once."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from functools import cache
from pathlib import Path

from assembly.pipeline import Inputs, build_bank, build_model, load_inputs
from assembly.replay import load_images
from assembly.twin import planned
from common.distributed import world
from common.errors import UserError
from common.files import require_place
from common.text import printable, quoted
from config.command_line import Invocation
from config.config import Config, config_from_dict
from features.bank import FeatureBank
from features.images import ImageBank
from features.placement import DeviceMemory
from storage.folder import RunFolder
from storage.resume import Start, load_resumable, start_of
from training.graph import PARAMETERS, worth_capturing
from training.length import steps_per_epoch

# Side by side, five runs of 1,320 or 2,880 steps each took less time, five of 132 did not: start-up, validation and
# checkpoints took longer than the steps (docs/options.md).
STEPS = 1_000
BYTES = 24  # for each parameter: weight, gradient, two moments of AdamW, moving average, best weights, in float32

Train = Callable[[Sequence[Start], Inputs, FeatureBank | ImageBank], None]


def train_seeds(invocation: Invocation, train: Train) -> None:
    """Train the seeds train.seed, train.seed + 1, ... and print their combined scores.

    invocation: the command line, with the number of seeds. train: trains one run, or several at once. The runs share
    the backbone, the images and the features; with data.shots each seed draws different images, with data.split_seed,
    data.split_seed + 1, ... They are sequential, or new ones all at once if that is `worth_joining`. A seed with an
    unfinished folder is continued, and a seed that is already scored is skipped; so an interrupted command continues
    when it is run again with its --run_dir. Raises UserError as `load_inputs`, `dense_twin` and `start_of`.
    """
    from evaluation.compare import compare  # here, because importing matplotlib takes a second

    now = world().broadcast(datetime.now())
    base = invocation.config.run_dir or Path("runs") / f"{invocation.name}-{now:%Y%m%d-%H%M%S}"
    if world().first:
        require_place(base, "the run folder")
    inputs = load_inputs(invocation.config)
    config = planned(invocation.config, inputs)
    bank = build_bank(config, inputs.splits, inputs.backbone, inputs.device)
    # All of them before the first one is trained, because one may not be possible.
    starts = [_start(invocation, _of_seed(config, count, base)) for count in range(invocation.seeds)]
    runs, new = [str(start.config.run_dir) for start, _ in starts], []
    together = cache(lambda: invocation.seeds > 1 and worth_joining(config, inputs, bank, invocation.seeds))
    for count, (start, finished) in enumerate(starts):
        seed = start.config.train.seed
        if config.data.shots and count:
            inputs = replace(inputs, splits=load_images(start.config))
            bank = build_bank(start.config, inputs.splits, inputs.backbone, inputs.device)
        if finished:
            print(finished)
        elif start.checkpoint is None and together():
            new.append(start)
        else:
            print(f"seed         {seed}", flush=True)
            train([start], inputs, bank)
    if new:
        seeds = ", ".join(str(start.config.train.seed) for start in new)
        print(f"seeds        {seeds}, side by side" if len(new) > 1 else f"seed         {seeds}", flush=True)
        train(new, inputs, bank)
    if len(runs) > 1 and world().first:
        out = base.with_name(f"{base.name}-comparison")
        print(f"\n{compare(runs, out)}\nwritten to   {printable(out)}")


def worth_joining(config: Config, inputs: Inputs, bank: FeatureBank | ImageBank, runs: int) -> bool:
    """Whether runs train side by side, with one CUDA graph for the steps of all, because that takes less time.

    Small heads on stored features do, for 1,000 steps or more, if all of them fit in a quarter of the free memory.
    ClearML allows one open task in a process, so runs that it may track do not.
    """
    alike = isinstance(bank, FeatureBank) and config.features.mode == "cached" and not config.data.shots
    captured = inputs.device.type == "cuda" and not world().several and not config.train.deterministic
    steps = config.train.epochs * steps_per_epoch(config.train, len(inputs.splits.train))
    if not alike or not captured or config.tracking != "none" or steps < STEPS:
        return False
    model = build_model(config, bank.feature_shape, inputs.splits.train.num_classes, inputs.backbone)
    parameters = runs * sum(value.numel() for value in model.parameters())
    if parameters > PARAMETERS or 4 * BYTES * parameters > DeviceMemory(inputs.device).free():
        return False
    return worth_capturing(config.train.graph, model.to(inputs.device), runs * config.train.batch_size)


def _of_seed(config: Config, count: int, base: Path) -> Config:
    """The configuration of a seed. count: the number of seeds before it."""
    found = config_from_dict(config.to_dict())
    found.train.seed += count
    found.data.split_seed += count if config.data.shots else 0
    found.run_dir = base.with_name(f"{base.name}-seed{found.train.seed}").absolute()
    return found


def _start(invocation: Invocation, config: Config) -> tuple[Start, str]:
    """A new run in config.run_dir, or the existing one, which must have this configuration; and `Start.finished`.

    Of a finished run the checkpoint is let go: those of many seeds may not fit into memory.
    """
    run = RunFolder(config.run_dir)
    if not run.last.exists():
        return start_of(replace(invocation, config=config)), ""
    run.require_not_busy()
    try:
        start = Start(config, run.path.name, run, load_resumable(run, config))
        return (replace(start, checkpoint=None), start.finished) if start.finished else (start, "")
    except UserError as error:
        folder = quoted(run.path)
        raise UserError(f"--seeds cannot continue {folder}, choose another --run_dir: {error}") from error
