"""A quick connection test, for libraries that would wait silently for a host that is down."""

import socket
import threading
from urllib.parse import urlparse
from urllib.request import getproxies

SECONDS = 3.0  # limit for a host to accept a connection


def reachable(url: str) -> bool:
    """Whether the host of `url` accepts a connection within SECONDS, name resolution included.

    Behind a proxy it is the proxy that is tested.
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

    # In a thread, because name resolution has no timeout.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(SECONDS + 0.5)
    return answered.is_set()
