"""Work that goes on in a thread while the caller does something else."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """A call that has begun in a thread of its own, which does not keep the program from ending."""

    def __init__(self, call: Callable[[], T]):
        self._found: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self._thread.start()

    def _run(self, call: Callable[[], T]) -> None:
        try:
            self._found.append(call())
        except BaseException as error:  # raised again where the result is asked for
            self._error = error

    def result(self) -> T:
        """What the call returned, once it has. Raises what the call raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._found[0]
