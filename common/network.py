"""Whether a host answers, asked before a library that would wait for it silently."""

import socket
import threading
from urllib.parse import urlparse
from urllib.request import getproxies

SECONDS = 3.0  # for a host to accept a connection


def reachable(url: str) -> bool:
    """Whether the host of `url` accepts a connection within SECONDS, name resolution included.

    Behind a proxy: whether the proxy does.
    """
    parts = urlparse(url)
    if proxy := getproxies().get(parts.scheme):
        parts = urlparse(proxy)
    address = (parts.hostname, parts.port or (443 if parts.scheme == "https" else 80))
    answered = threading.Event()

    def connect():
        try:
            socket.create_connection(address, timeout=SECONDS).close()
        except OSError:
            return
        answered.set()

    # A thread, because a resolver that hangs knows no time-out of ours.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(SECONDS + 0.5)
    return answered.is_set()
