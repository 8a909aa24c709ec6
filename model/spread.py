"""Experts spread over processes: which are here, and the state of one process from those of several, and back.

N processes are N / M groups of M in a row. Each group has all experts once, or more often where there are copies, and
what a process has is held by its peers too, those at the same place of the other groups.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .dispatcher import AllToAllDispatcher, LocalDispatcher
from .experts import ExpertSet, Part

Shares = Sequence[Sequence[Sequence[float]]]
"""Of the assignments of each expert at each of L places the share of each process of a group: (L, E, M)."""


class Spread:
    """The experts of a model, whose places are spread over groups of `members` processes by `shares`.

    To be made in all processes of the default group at once, from a model that has all experts; `apply` then leaves in
    a model, or in a moving average of it, those that are this process's.
    """

    def __init__(self, model: nn.Module, members: int, shares: Shares, device: torch.device):
        self.device, self.members = device, members
        size, rank = dist.get_world_size(), dist.get_rank()
        groups = [list(range(first, first + members)) for first in range(0, size, members)]
        self.first, self.here = rank // members * members, rank % members
        made: list[Any] = [dist.new_group(ranks) for ranks in groups]  # by all processes, those outside too
        peers: list[Any] = [dist.new_group(list(ranks)) for ranks in zip(*groups, strict=True)]
        self.group, self.peers = made[rank // members], peers[self.here]
        self.has_peers = size > members
        self.parts: dict[str, tuple[int, Part]] = {}
        for place, (prefix, experts) in enumerate(_places(model)):
            self.parts |= {f"{prefix}.{name}": (place, part) for name, part in experts.parts().items()}
        state = model.state_dict(keep_vars=True)
        self.shapes = {name: value.shape for name, value in state.items()}
        self.dtypes = {name: value.dtype for name, value in state.items()}
        self.set_shares(shares)

    def set_shares(self, shares: Shares) -> None:
        """From here on these are the shares; models are to be given their experts by `apply`."""
        self.shares = [[list(map(float, share_M)) for share_M in share_EM] for share_EM in shares]
        self.dispatchers = [AllToAllDispatcher(self.group, share_EM, self.device) for share_EM in self.shares]

    def apply(self, model: nn.Module) -> None:
        """Leave a model the experts of this process; what it lacked so far is to be loaded."""
        for (_, experts), dispatcher in zip(_places(model), self.dispatchers, strict=True):
            experts.keep(dispatcher.mine)
            experts.dispatcher = dispatcher

    @staticmethod
    def assemble(model: nn.Module, state: dict[str, Tensor]) -> None:
        """Make a model one of a single process again, with the state of all experts."""
        for _, experts in _places(model):
            parts = experts.parts().values()
            owners = {part.owner for part in parts if part.owner is not None}
            experts.keep(sorted(owners or range(len(next(iter(parts)).widths_E))))
            experts.dispatcher = LocalDispatcher()
        model.load_state_dict(state)

    def holders(self, place: int, expert: int) -> list[int]:
        """The processes of a group that have an expert, counted in the group."""
        return [member for member, share in enumerate(self.shares[place][expert]) if share > 0]

    @property
    def copied(self) -> bool:
        """Whether an expert is on several processes of a group."""
        return any(not dispatcher.whole for dispatcher in self.dispatchers)

    def local(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """What is this process's of the state of one process; names that are not of experts stay."""
        found = {}
        for name, value in state.items():
            mine: Tensor | None = value
            if name in self.parts:
                place, part = self.parts[name]
                mine = part.of(value, self.dispatchers[place].mine)
            if mine is not None:
                found[name] = mine
        return found

    @torch.no_grad()
    def whole(
        self, state: dict[str, Tensor], names: Iterable[str] | None = None, everywhere: bool = False
    ) -> dict[str, Tensor]:
        """The state of one process on the CPU, on rank 0 or everywhere, from those of all; to be called by all.

        state: of a model, or tensors in the shapes of the parameters `names`. Elsewhere returns what was handed over.
        """
        if not everywhere and self.first:  # of other groups than that of rank 0
            return state
        wanted, found = everywhere or self.here == 0, {}
        for name in self.shapes if names is None else names:
            if name not in self.parts:
                found[name] = state[name].cpu()
                continue
            pieces = []
            for expert in self.owners(name):
                piece = self._told(name, expert, state)
                pieces += [piece.cpu()] if wanted else []
            if wanted:
                found[name] = self._joined(name, pieces)
        return found if wanted else state

    @torch.no_grad()
    def moved(self, state: dict[str, Tensor], shares: Shares, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """What is to be this process's of a state under other shares; to be called by all.

        state, names: as of `whole`. The shares of this object are set afterwards, by `set_shares`.
        """
        found = {name: value for name, value in state.items() if name not in self.parts}
        for name in self.shapes if names is None else names:
            if name not in self.parts:
                continue
            place = self.parts[name][0]
            pieces = []
            for expert in self.owners(name):
                new = [member for member, share in enumerate(shares[place][expert]) if share > 0]
                old = self.holders(place, expert)
                mine = self._piece(name, expert, state) if self.here in old else None
                if set(new) - set(old):
                    mine = self._told(name, expert, state)
                if self.here in new and mine is not None:
                    pieces.append(mine)
            if pieces:
                found[name] = self._joined(name, pieces)
        return found

    def pieces(self, values: dict[str, Tensor]) -> Iterator[tuple[str, int, int, Tensor]]:
        """(name, place, expert, view of the values) of the experts that are here, by the names of parameters."""
        for name, value in values.items():
            place, part = self.parts[name]
            mine = self.dispatchers[place].mine
            if part.owner is not None:
                yield name, place, part.owner, value
            else:
                views = value.split([part.widths_E[expert] for expert in mine], part.dim)
                yield from ((name, place, expert, view) for expert, view in zip(mine, views, strict=True))

    def shape_of(self, name: str, expert: int) -> list[int]:
        """The shape of what an expert has of a tensor."""
        part, shape = self.parts[name][1], list(self.shapes[name])
        if part.owner is None:
            shape[part.dim] = part.widths_E[expert]
        return shape

    def owners(self, name: str) -> list[int]:
        """The experts that have a part of a tensor."""
        part = self.parts[name][1]
        return list(range(len(part.widths_E))) if part.owner is None else [part.owner]

    def _joined(self, name: str, pieces: list[Tensor]) -> Tensor:
        return pieces[0].clone() if len(pieces) == 1 else torch.cat(pieces, self.parts[name][1].dim)

    def _piece(self, name: str, expert: int, state: dict[str, Tensor]) -> Tensor:
        return next(view for _, _, owner, view in self.pieces({name: state[name]}) if owner == expert)

    def _told(self, name: str, expert: int, state: dict[str, Tensor]) -> Tensor:
        """What an expert has of a tensor, told to all of the group by the first process that holds it."""
        first = self.holders(self.parts[name][0], expert)[0]
        if first == self.here:
            piece = self._piece(name, expert, state).detach().contiguous()
        else:
            piece = torch.empty(self.shape_of(name, expert), dtype=self.dtypes[name], device=self.device)
        dist.broadcast(piece, src=self.first + first, group=self.group)
        return piece


def is_spread(model: nn.Module) -> bool:
    """Whether some experts of a model are on other processes."""
    return any(not experts.dispatcher.local for _, experts in _places(model))


def check_spread(model: nn.Module) -> None:
    """Raise ValueError for a model whose experts cannot be spread over processes."""
    found: Any = model
    if len(_places(model)) != len(found.mixtures):
        raise ValueError("this kind of experts cannot be spread over processes: it is no ExpertSet")


def _places(model: nn.Module) -> list[tuple[str, ExpertSet]]:
    """The experts of each place, and their name in the state."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, ExpertSet)]
