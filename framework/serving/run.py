"""Running a server until it is told to stop, and stopping it without losing a request."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import signal
import socket
import sys
from functools import partial
from types import FrameType
from typing import Any, Final, cast

import uvicorn

from preceptor.errors import ConfigError
from preceptor.serving.door import Door
from preceptor.serving.heads import Bounded
from preceptor.serving.service import Service
from preceptor.serving.watch import LOGGER, Lines

_BACKLOG: Final = 2048
_FILES: Final = 16_384
"""Open files asked of the system; each connection is one."""

_KEEP_ALIVE_SECONDS: Final = 30

_YOUNG: Final = 10_000
"""Objects made before Python looks for garbage; a request makes a few hundred, most of which are gone by then."""


class Server(uvicorn.Server):
    """Serves an application; told to stop, it takes no more requests and answers those that are in."""

    def __init__(self, app: Door, service: Service) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                http=cast("Any", partial(Bounded, seconds=service.limits.seconds)),
                backlog=_BACKLOG,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=math.ceil(service.limits.drain_seconds),
                ws="none",
                proxy_headers=False,  # nothing here depends on the client's address
            )
        )
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain."""
        del frame
        self._service.drain()
        self.force_exit = self.should_exit and sig == signal.SIGINT  # who presses Ctrl-C twice doesn't want to wait
        self.should_exit = True


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens there; port 0 takes a free one.

    Raises:
        ConfigError: If it can't.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with contextlib.ExitStack() as stack:  # closed unless it listens
            listening = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
            listening.listen(_BACKLOG)  # from here on clients wait, and no other process takes the port
            stack.pop_all()
    except (OSError, UnicodeError) as error:  # the latter where a name can't be one
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise ConfigError(
            f"Can't listen on {host}:{port}: {reason}. Choose another --port, or --host, an address of this machine."
        ) from error
    listening.set_inheritable(True)
    return listening


def log_lines() -> None:
    """Write what happens to stderr, a line of JSON each."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(Lines())
    for logger, level in ((LOGGER, logging.INFO), (logging.getLogger("uvicorn"), logging.WARNING)):
        logger.handlers = [handler]
        logger.setLevel(level)
        logger.propagate = False


def spare_garbage_collection() -> None:
    """Look for garbage less often, and not among what is loaded: that held up all requests for up to a second."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, *gc.get_threshold()[1:])


def allow_many_connections() -> None:
    """Ask the system for as many open files as it allows, up to a bound; does nothing where there is no such thing."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted: Any = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
