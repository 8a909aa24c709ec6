"""Advisory file locks, which the system releases when their process ends."""

from typing import IO


def try_lock(file: IO, shared: bool = False) -> bool:
    """Lock an open file until it is closed: exclusively, or shared with other readers.

    Returns False if another process holds the lock. Without lock support (Windows, some network disks) it returns
    True, and users must avoid running two processes in one folder.
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
