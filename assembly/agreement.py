"""Checks before training that all processes of a run agree."""

import platform
from typing import Any

import torch

from common.distributed import world
from common.environment import versions
from common.errors import UserError, one_line
from common.text import counted
from config.config import Config, flatten
from data.image_set import Splits
from model.backbone import Backbone
from model.routers import ROUTERS
from storage.folder import INCIDENTAL

REMEDY = "give all processes the same command, data and software"


def require_same_inputs(config: Config, splits: Splits, backbone: Backbone) -> None:
    """Raise UserError in every process if options, data, backbone or versions differ between them."""
    if not world().several:
        return
    options = {f"option {key}": value for key, value in flatten(config.to_dict()).items() if key not in INCIDENTAL}
    software = {"Python": platform.python_version(), "PyTorch": torch.__version__, **versions(("timm",))}
    data = {f"the {name} images": splits[name].fingerprint() for name in ("train", "validation", "test")}
    kind = {"the kind of device": "GPU" if torch.cuda.is_available() and config.device != "cpu" else "CPU"}
    require_same(software | kind | options | data | {"the backbone's weights": backbone.fingerprint()})


def require_same(facts: dict[str, Any]) -> None:
    """Raise UserError in every process for the first fact that differs between processes."""
    each = world().gather({name: one_line(repr(value), 80) for name, value in facts.items()})
    for rank, found in enumerate(each):
        for name, value in each[0].items():
            if found.get(name) != value:
                other = found.get(name, "missing")
                raise UserError(f"the processes differ: {name} is {value} on rank 0, {other} on rank {rank}: {REMEDY}")


def require_samples(batch_size: int) -> None:
    """Raise UserError for a batch in which some processes would have no sample."""
    if batch_size < world().size:
        raise UserError(
            f"train.batch_size {batch_size} cannot be shared by {counted(world().size, 'process')}: raise it, or "
            f"start at most {batch_size}"
        )


def require_places(config: Config) -> None:
    """Raise UserError if parallel.experts does not fit the processes, the experts or the other options."""
    members, size, experts = config.parallel.experts, world().size, len(config.experts.sizes)
    given = f"parallel.experts {members}"
    if members == 1:
        return
    if members > experts:
        raise UserError(f"{given} is more than the {counted(experts, 'expert')}: set it to at most {experts}")
    if size % members:
        only = f"does not divide the {size} processes" if size > members else f"needs {members} processes, not {size}"
        divisors = ", ".join(str(number) for number in range(1, size + 1) if size % number == 0)
        raise UserError(f"{given} {only}: start as many with torchrun, or set one of {divisors}")
    if not ROUTERS[config.router.kind].token_choice:
        raise UserError(
            f"{given} needs a rule in which each sample chooses its experts, not router.kind {config.router.kind}: "
            "set 1, or a rule such as noisy_topk"
        )
    if config.freeze:
        raise UserError(f"{given} does not work with freeze: set it to 1")
