"""Code that is never compiled. Importing this imports the compiler, which takes seconds: import it only if needed."""

from collections.abc import Callable
from typing import Any

import torch


def _call(run: Callable[..., Any], *arguments: Any) -> Any:
    return run(*arguments)


uncompiled: Any = torch.compiler.disable(_call)
"""uncompiled(run, *arguments) calls run(*arguments) eagerly, even inside a compiled block.

For code that sends varying numbers of rows to other processes.
"""
