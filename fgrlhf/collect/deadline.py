"""Ends an HTTP request at its deadline, while the server sends headers or the body.

The time-out of a socket does not do this, because it begins again with every byte that arrives.
"""

import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager


class _Remembering:
    """Keeps the socket of a request in `request.socket`."""

    def do_open(self, connection_class: type, request: urllib.request.Request, **options):
        class Connection(connection_class):
            def connect(self):
                super().connect()
                request.socket = self.sock
                if time.monotonic() > request.deadline:
                    raise TimeoutError

        return super().do_open(Connection, request, **options)


class Http(_Remembering, urllib.request.HTTPHandler):
    """A handler for `build_opener` whose requests are opened inside `within`."""


class Https(_Remembering, urllib.request.HTTPSHandler):
    """The same handler for https."""


@contextmanager
def within(request: urllib.request.Request, seconds: float) -> Iterator[None]:
    """Shuts down the request's socket after `seconds`. A thread that reads from it then wakes up.

    The reader finds an end of the file there, so it must compare the clock with `request.deadline`.
    """
    request.socket, request.deadline = None, time.monotonic() + seconds
    timer = threading.Timer(seconds, _shut, [request])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _shut(request: urllib.request.Request) -> None:
    try:
        request.socket.shutdown(socket.SHUT_RDWR)
    except (AttributeError, OSError):             # not connected yet, or ended
        pass
