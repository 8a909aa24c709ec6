"""Advisory locks on files, which end with the process that holds them, however it ends."""

from typing import IO


def try_lock(file: IO, shared: bool = False) -> bool:
    """Lock an open file until it is closed, for this process alone or shared with others that only use it.

    Returns False where another process is in the way. Where there are no locks (Windows, some network disks), two
    processes in one place must be avoided by their user: True.
    """
    try:
        import fcntl
    except ImportError:
        return True
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
