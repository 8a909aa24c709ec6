"""Registries of parts by name; each part is a file that registers itself."""

from collections.abc import Callable, Iterable
from dataclasses import fields
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, Generic, Literal, TypeVar

from .errors import InputError
from .options import Option, add_option, set_field

Part = TypeVar("Part")


class Registry(dict[str, Part], Generic[Part]):
    """A dictionary of parts that a decorator fills: `@register("name")`.

    what: the noun for a part, for messages. config: the dataclass whose field `choice` names a part; its choices and
    the options that parts add follow the registry.
    """

    def __init__(self, what: str, config: type, choice: str | None = None):
        super().__init__()
        self.what, self.config, self.choice = what, config, choice

    def register(self, name: str, summary: str, options: Iterable[Option] = ()) -> Callable[[Part], Part]:
        """A decorator that registers a part, and gives it `name`, `summary` and `options`.

        summary: a phrase for --help. options: fields of the configuration that this part adds. Raises InputError for a
        registered name.
        """

        parts: Any = self

        def add(part: Any) -> Any:
            if not name.isidentifier():
                raise InputError(f"{self.what} '{name}' is not a valid name: use letters, digits and _")
            if name in self:
                first = self[name].__module__
                raise InputError(f"{self.what} '{name}' is registered twice, by {first} and by {part.__module__}")
            for option in options:
                add_option(self.config, option)
            part.name, part.summary, part.options = name, summary, tuple(option.name for option in options)
            self[name] = part
            if self.choice is not None:
                text = "; ".join(f"{known}: {other.summary}" for known, other in parts.items())
                set_field(self.config, self.choice, Literal[tuple(self)], help=f"{text}.")
            return part

        return add

    def readers(self) -> dict[str, tuple[str, ...]]:
        """The options that parts have added, and the names of the parts that read each."""
        parts: Any = self
        options = dict.fromkeys(option for part in parts.values() for option in part.options)
        return {option: tuple(name for name, part in parts.items() if option in part.options) for option in options}

    def unread(self, config: Any, section: str) -> list[str]:
        """One line for each option that `config` sets, but that only other parts than the chosen one read.

        section: the prefix of the names, as in router.kind.
        """
        assert self.choice is not None
        chosen, defaults = getattr(config, self.choice), {option.name: option.default for option in fields(config)}
        return [
            f"{section}.{name} {getattr(config, name)} has no effect with {section}.{self.choice} {chosen}: only "
            f"{' and '.join(readers)} {'reads' if len(readers) == 1 else 'read'} it"
            for name, readers in self.readers().items()
            if chosen not in readers and getattr(config, name) != defaults[name]
        ]


def import_all(package: str, path: Iterable[str]) -> None:
    """Import every module of a package, so that its parts register themselves. path: the package's __path__."""
    for module in iter_modules(path):
        import_module(f"{package}.{module.name}")
