"""What is never compiled. Importing this imports the compiler, which takes seconds: import it only where needed."""

from collections.abc import Callable
from typing import Any

import torch


def _call(run: Callable[..., Any], *arguments: Any) -> Any:
    return run(*arguments)


uncompiled: Any = torch.compiler.disable(_call)
"""uncompiled(run, *arguments) is run(*arguments) as it is, inside a compiled block too.

For code that sends varying numbers of rows to other processes.
"""
