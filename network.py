"""Whether a host answers, asked before a library that would wait for it silently."""

import socket
import threading
from urllib.parse import urlparse
from urllib.request import getproxies


def reachable(url: str, timeout: float = 3.0) -> bool:
    """Whether the host of `url` accepts a connection within `timeout` seconds, name resolution included.

    Behind a proxy: whether the proxy does.
    """
    parts = urlparse(url)
    if proxy := getproxies().get(parts.scheme):
        parts = urlparse(proxy)
    address = (parts.hostname, parts.port or (443 if parts.scheme == "https" else 80))
    answered = threading.Event()

    def connect():
        try:
            socket.create_connection(address, timeout=timeout).close()
        except OSError:
            return
        answered.set()

    # A thread, because a resolver that hangs knows no time-out of ours.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(timeout + 0.5)
    return answered.is_set()
