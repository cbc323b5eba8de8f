"""The server: uvicorn around the application, and an engine that ends with it."""

import asyncio
import errno
import resource
import socket
from collections.abc import Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from duo_jax.serve.engine import Engine
from duo_jax.serve.http.answers import RETRY, error_object

# Most bytes of a request's head, and seconds that a connection may idle between requests.
MOST_HEAD, IDLE_SECONDS = 2**16, 30
# Seconds in which a connection must make progress, at least; at most twice as many.
STALL_SECONDS = 20.0
# Seconds that clients have to read the ends of their replies when the server stops.
LAST_SECONDS = 3.0
# Most connections, and files that the process opens besides.
MOST_CONNECTIONS, OTHER_FILES = 2**14, 128
# Connections that wait to be accepted while the loop is busy: as many as the system allows (net.core.somaxconn). The
# kernel lets the clients of others try again for two minutes, and then drops them.
BACKLOG = MOST_CONNECTIONS
FULL = error_object("the server has too many connections: try again later", "server_error")


class Protocol(H11Protocol):
    """Ends connections that stall: a head that was begun and does not go on, or a response that nobody reads.

    uvicorn's own timer ends with the first byte, and it waits for a reader for ever. Its limit on connections, once
    reached, refuses the requests of all connections; here only those of new ones.
    """

    most = MOST_CONNECTIONS
    _seen: object = None  # How far it was when last looked at.
    _pauses = 0

    def connection_made(self, transport: Any) -> None:  # Of asyncio, or of uvloop.
        """Begin to watch."""
        super().connection_made(transport)
        if len(self.connections) > self.most:
            self.app: Any = JSONResponse(FULL, 503, {"Connection": "close", **RETRY})
        self._watch()

    def pause_writing(self) -> None:
        """See asyncio."""
        self._pauses += 1
        super().pause_writing()

    def _watch(self) -> None:
        unread = self.transport.get_write_buffer_size()
        is_idle = self.cycle is None or self.cycle.response_complete
        if self.transport.is_closing() and not unread:
            return
        # Nothing is written while a response is paused or over: what is unread then gets less, or is not read.
        is_waiting = is_idle or self.flow.write_paused
        state = (self.cycle, self._pauses, unread) if is_waiting else None
        if state is not None and state == self._seen:
            self.transport.abort()
            return
        self._seen = state
        self.loop.call_later(STALL_SECONDS, self._watch)


class Server(uvicorn.Server):
    """Serves until it is stopped; replies then have a few seconds to finish, and the rest end with an error."""

    def __init__(
        self,
        app: Starlette,
        engine: Engine,
        *,
        connections: int = MOST_CONNECTIONS,
        grace: float = 10.0,
        ready: Callable[[], None] | None = None,
    ) -> None:
        """Prepare.

        Args:
            app: the application.
            engine: it is closed when the server stops.
            connections: most connections; the requests of others are answered with status 503.
            grace: seconds that replies have to end once the server stops.
            ready: called once connections are accepted.
        """

        class Limited(Protocol):
            most = connections

        super().__init__(
            uvicorn.Config(
                app,
                http=Limited,
                ws="none",
                lifespan="off",
                access_log=False,
                log_level="warning",
                h11_max_incomplete_event_size=MOST_HEAD,
                backlog=BACKLOG,
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
        cutting = asyncio.create_task(self._cut_off(closing))
        await super().shutdown(sockets)
        await closing
        cutting.cancel()

    async def _cut_off(self, closing: asyncio.Task[None]) -> None:
        """End the connections that are still open some time after the last reply."""
        await asyncio.wait({closing})
        await asyncio.sleep(LAST_SECONDS)
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def most_connections() -> int:
    """As many as this process may open files for; it may open more from then on, if the system lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_CONNECTIONS + OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return MOST_CONNECTIONS if soft == resource.RLIM_INFINITY else min(MOST_CONNECTIONS, soft - OTHER_FILES)


def listen(host: str, port: int) -> socket.socket:
    """A socket that accepts connections.

    Raises:
        OSError: the port is taken, or there is no such address.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        reason = str(error.strerror or error).partition(" (while")[0]  # Python adds the address.
        way = "port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "host"
        raise OSError(f"cannot listen on {host}:{port} ({reason}): choose another --{way}") from None
