"""The server: uvicorn around the application, and an engine that ends with it."""

import asyncio
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from duo_jax.serve.engine import Engine

# Most bytes of a request's head, and seconds that a connection may idle between requests.
MOST_HEAD, IDLE_SECONDS = 2**16, 30
# Seconds in which a head that was begun must end, at least; at most twice as many.
HEAD_SECONDS = 20.0


class Protocol(H11Protocol):
    """Ends connections that begin a request and do not go on; uvicorn's own timer ends with the first byte."""

    _seen: object = H11Protocol  # The request that was over when last looked at; at first, none that exists.

    def connection_made(self, transport: Any) -> None:  # Of asyncio, or of uvloop.
        """Begin to watch."""
        super().connection_made(transport)
        self._watch()

    def _watch(self) -> None:
        if self.transport.is_closing():
            return
        is_waiting = self.cycle is None or self.cycle.response_complete
        if is_waiting and self.cycle is self._seen:
            self.transport.close()
            return
        self._seen = self.cycle if is_waiting else H11Protocol
        self.loop.call_later(HEAD_SECONDS, self._watch)


class Server(uvicorn.Server):
    """Serves until it is stopped; replies then have a few seconds to finish, and the rest end with an error."""

    def __init__(
        self,
        app: Starlette,
        engine: Engine,
        *,
        connections: int = 1024,
        grace: float = 10.0,
        ready: Callable[[], None] | None = None,
    ) -> None:
        """Prepare.

        Args:
            app: the application.
            engine: it is closed when the server stops.
            connections: most connections; others are answered with status 503.
            grace: seconds that replies have to end once the server stops.
            ready: called once connections are accepted.
        """
        super().__init__(
            uvicorn.Config(
                app,
                http=Protocol,
                ws="none",
                lifespan="off",
                access_log=False,
                log_level="warning",
                limit_concurrency=connections,
                h11_max_incomplete_event_size=MOST_HEAD,
                timeout_keep_alive=IDLE_SECONDS,
                timeout_graceful_shutdown=None,
                server_header=False,
            )
        )
        self._engine, self._grace, self._ready = engine, grace, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        await super().startup(sockets)
        if self._ready is not None:
            self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the engine, which ends all streams, while uvicorn waits for them."""
        closing = asyncio.create_task(asyncio.to_thread(self._engine.close, self._grace))
        await super().shutdown(sockets)
        await closing


def listen(host: str, port: int) -> socket.socket:
    """A socket that accepts connections.

    Raises:
        OSError: the port is taken, or there is no such address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port} ({error.strerror or error}): choose another --port") from None
