"""Experts distributed over processes: their placement, and conversion between single-process and local states.

N processes form N / M groups of M consecutive ranks. Each group has all experts once, or more often if there are
copies. Processes at the same position of different groups are peers and have the same experts.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .dispatcher import AllToAllDispatcher, LocalDispatcher
from .experts import ExpertSet, Part

Shares = Sequence[Sequence[Sequence[float]]]
"""The share of each process of a group in the assignments of each expert at each of L places: (L, E, M)."""


class Spread:
    """The experts of a model, distributed over groups of `members` processes by `shares`.

    Create it in all processes of the default group at once, from a model that has all experts; `apply` then keeps in a
    model, or in its moving average, only the experts of this process.
    """

    def __init__(self, model: nn.Module, members: int, shares: Shares, device: torch.device):
        self.device, self.members = device, members
        size, rank = dist.get_world_size(), dist.get_rank()
        groups = [list(range(first, first + members)) for first in range(0, size, members)]
        self.first, self.here = rank // members * members, rank % members
        made: list[Any] = [
            dist.new_group(ranks) for ranks in groups
        ]  # created by all processes, also by those outside the group
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
        """Set new shares; afterwards call `apply` on the models."""
        self.shares = [[list(map(float, share_M)) for share_M in share_EM] for share_EM in shares]
        self.dispatchers = [AllToAllDispatcher(self.group, share_EM, self.device) for share_EM in self.shares]

    def apply(self, model: nn.Module) -> None:
        """Keep only the experts of this process in a model; load the parameters of new ones afterwards."""
        for (_, experts), dispatcher in zip(_places(model), self.dispatchers, strict=True):
            experts.keep(dispatcher.mine)
            experts.dispatcher = dispatcher

    @staticmethod
    def same_shape(model: nn.Module) -> list[list[str]]:
        """Names of parameters of experts of one shape in this process, which can be trained as one tensor."""
        return [
            [f"{prefix}.{name}" for name in names]
            for prefix, experts in _places(model)
            for names in experts.same_shape()
        ]

    @staticmethod
    def assemble(model: nn.Module, state: dict[str, Tensor]) -> None:
        """Make a model a single-process model again, with the state of all experts."""
        for _, experts in _places(model):
            parts = experts.parts().values()
            owners = {part.owner for part in parts if part.owner is not None}
            experts.keep(sorted(owners or range(len(next(iter(parts)).widths_E))))
            experts.dispatcher = LocalDispatcher()
        model.load_state_dict(state)

    def holders(self, place: int, expert: int) -> list[int]:
        """The processes of a group that have an expert, numbered within the group."""
        return [member for member, share in enumerate(self.shares[place][expert]) if share > 0]

    @property
    def copied(self) -> bool:
        """Whether an expert is on several processes of a group."""
        return any(not dispatcher.whole for dispatcher in self.dispatchers)

    def local(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The part of a single-process state that belongs to this process; names without experts are kept."""
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
        """The single-process state on the CPU, on rank 0 or everywhere, from those of all; all processes must call
        this.

        state: of a model, or tensors in the shapes of the parameters `names`. Other ranks return their argument.
        """
        if not everywhere and self.first:  # in groups other than that of rank 0
            return state
        wanted, found = everywhere or self.here == 0, {}
        for name in self.shapes if names is None else names:
            if name not in self.parts:
                found[name] = state[name].cpu()
                continue
            pieces = []
            for expert in self.owners(name):
                piece = self._broadcast(name, expert, state)
                pieces += [piece.cpu()] if wanted else []
            if wanted:
                found[name] = self._joined(name, pieces)
        return found if wanted else state

    @torch.no_grad()
    def moved(self, state: dict[str, Tensor], shares: Shares, names: Iterable[str] | None = None) -> dict[str, Tensor]:
        """The part of a state that belongs to this process under new shares; all processes must call this.

        state, names: as in `whole`. Set the shares of this object afterwards with `set_shares`.
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
                    mine = self._broadcast(name, expert, state)
                if self.here in new and mine is not None:
                    pieces.append(mine)
            if pieces:
                found[name] = self._joined(name, pieces)
        return found

    def pieces(self, values: dict[str, Tensor]) -> Iterator[tuple[str, int, int, Tensor]]:
        """(name, place, expert, view of the values) of the experts of this process, by parameter name."""
        for name, value in values.items():
            place, part = self.parts[name]
            mine = self.dispatchers[place].mine
            if part.owner is not None:
                yield name, place, part.owner, value
            else:
                views = value.split([part.widths_E[expert] for expert in mine], part.dim)
                yield from ((name, place, expert, view) for expert, view in zip(mine, views, strict=True))

    def shape_of(self, name: str, expert: int) -> list[int]:
        """The shape of an expert's part of a tensor."""
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

    def _broadcast(self, name: str, expert: int, state: dict[str, Tensor]) -> Tensor:
        """An expert's part of a tensor, broadcast to the group by the first process that has it."""
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
    """Raise ValueError for a model whose experts cannot be distributed over processes."""
    found: Any = model
    if len(_places(model)) != len(found.mixtures):
        raise ValueError("this kind of expert cannot be distributed over processes: it is not an ExpertSet")


def _places(model: nn.Module) -> list[tuple[str, ExpertSet]]:
    """The experts of each place, and their name in the state."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, ExpertSet)]
