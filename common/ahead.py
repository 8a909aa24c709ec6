"""Work that runs in a thread while the caller does something else."""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """A call that runs in a separate thread, which does not prevent the program from ending."""

    def __init__(self, call: Callable[[], T]):
        self._found: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self._thread.start()

    def _run(self, call: Callable[[], T]) -> None:
        try:
            self._found.append(call())
        except BaseException as error:  # raised again when the result is requested
            self._error = error

    def check(self) -> None:
        """Raise the error of the call if it has already failed, without waiting for it."""
        if self._error is not None:
            raise self._error

    def result(self) -> T:
        """Wait for the call and return its result. Raises what the call raised."""
        self._thread.join()
        self.check()
        return self._found[0]
