"""The routes: who may ask, how much at a time, and how events of the engine become responses."""

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from duo_jax.finite import json_text
from duo_jax.serve.engine import ClosedError, Engine, Handle
from duo_jax.serve.http.answers import RETRY, Answer, Choice, error_object
from duo_jax.serve.http.metrics import Measurements
from duo_jax.serve.http.schema import BadRequestError, ChatBody, CompletionBody, Options, read_body
from duo_jax.serve.requests import Event, FinishEvent
from duo_jax.serve.requests import Request as EngineRequest
from duo_jax.serve.scheduler import QueueFullError
from duo_jax.text.lm import LM

# Each with the index of its reply; None after a silence.
Events: TypeAlias = AsyncIterator[tuple[int, Event] | None]

EVENT_STREAM = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
# Seconds between signs of life of a stream that waits: proxies end connections that are silent.
SILENCE = 15.0
# Largest bodies that may be arriving at a time.
BODIES = 16
PAGE = Path(__file__).with_name("page.html")
# The page is one file: it may talk to its own server and load nothing.
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}


@dataclass(frozen=True)
class Limits:
    """What a client may take.

    Attributes:
        body_bytes: most bytes of a body.
        body_seconds: seconds in which a body must arrive.
        seconds: seconds after which a request ends, waiting included.
        prompts: most prompts of a request.
    """

    body_bytes: int = 16 * 2**20
    body_seconds: float = 60.0
    seconds: float = 3600.0
    prompts: int = 64


class _Refusal(Exception):
    """An answer in OpenAI's form that is no reply."""

    def __init__(self, status: int, message: str, kind: str, *, field: str | None = None, code: str | None = None):
        super().__init__(message)
        # In ASCII: a field may have half of a surrogate pair in its name.
        error = json_text(error_object(message, kind, field=field, code=code))
        self.response = Response(error, status, media_type="application/json")
        if status in (429, 503):
            self.response.headers.update(RETRY)
        if status == 429:
            # Connections are for those that are served. Others stay open until the rest of a body has come.
            self.response.headers["Connection"] = "close"
        if status == 401:
            self.response.headers["WWW-Authenticate"] = "Bearer"


class Api:
    """The routes of one model."""

    def __init__(self, engine: Engine, lm: LM, name: str, *, api_key: str | None = None, limits: Limits = Limits()):
        """See `make_app`."""
        self._engine, self._lm, self._name = engine, lm, name
        self._key = None if api_key is None else f"Bearer {api_key}".encode()
        self._limits, self._measurements = limits, Measurements(engine)
        self._created = int(time.time())
        self._arriving = 0  # Bytes of bodies.

    def routes(self) -> list[Route]:
        """All routes."""
        posts = {"/v1/completions": self._complete, "/v1/chat/completions": self._chat}
        gets = {
            "/v1/models": self._models,
            "/v1/models/{name:path}": self._model,
            "/metrics": self._metrics,
            "/stats": self._stats,
        }
        return [
            Route("/", self._page, methods=["GET"]),
            Route("/health", self._health, methods=["GET"]),
            *(Route(path, self._guarded(endpoint), methods=["POST"]) for path, endpoint in posts.items()),
            *(Route(path, self._guarded(endpoint), methods=["GET"]) for path, endpoint in gets.items()),
        ]

    def _guarded(self, endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            try:
                self._check_key(request)
                return await endpoint(request)
            except _Refusal as refusal:
                return refusal.response

        return guarded

    def _check_key(self, request: Request) -> None:
        given = request.headers.get("Authorization", "").encode()
        if self._key is not None and not hmac.compare_digest(given, self._key):
            raise _Refusal(401, "the API key is wrong or missing", "authentication_error", code="invalid_api_key")

    async def _page(self, request: Request) -> Response:
        return HTMLResponse(await run_in_threadpool(PAGE.read_text, encoding="utf-8"), headers=PAGE_HEADERS)

    async def _health(self, request: Request) -> Response:
        if self._engine.is_open:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": self._engine.failure or "shutting down"}, 503, RETRY)

    async def _metrics(self, request: Request) -> Response:
        return Response(self._measurements.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _stats(self, request: Request) -> Response:
        """The engine's numbers, for the page."""
        return JSONResponse(asdict(self._engine.metrics()))

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_object()]})

    async def _model(self, request: Request) -> Response:
        self._check_model(request.path_params["name"])
        return JSONResponse(self._model_object())

    def _model_object(self) -> dict[str, Any]:
        length = self._engine.sizes.max_length
        about = {"id": self._name, "object": "model", "created": self._created, "owned_by": "duo-jax"}
        return {**about, "max_model_len": length}

    def _check_model(self, name: str) -> None:
        if name != self._name:
            message = f"there is no model {name!r:.80}: this server has {self._name!r}"
            raise _Refusal(404, message, "invalid_request_error", field="model", code="model_not_found")

    async def _complete(self, request: Request) -> Response:
        body = await self._read(request, CompletionBody)
        prompts = body.prompts
        if len(prompts) > self._limits.prompts:
            message = f"there are {len(prompts)} prompts: a request may have {self._limits.prompts}"
            raise _Refusal(400, message, "invalid_request_error", field="prompt")
        return await self._answer(
            request, body, lambda: [self._lm.encode(p) if isinstance(p, str) else p for p in prompts]
        )

    async def _chat(self, request: Request) -> Response:
        body = await self._read(request, ChatBody)
        messages = [message.plain for message in body.messages]
        return await self._answer(request, body, lambda: [self._lm.encode_chat(messages)])

    async def _read(self, request: Request, kind: type[Any]) -> Any:
        """The body, checked."""
        media_type = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            # Pages of other origins can send other types without asking.
            raise _Refusal(415, "the Content-Type must be application/json", "invalid_request_error")
        content = bytearray()
        try:
            await self._receive(request, content)
            with _engine_refusals():  # Before the body is parsed: a full server can refuse thousands of clients.
                self._engine.check_accepts()
            body = await run_in_threadpool(read_body, bytes(content), kind)
        except TimeoutError:
            message = f"the body did not arrive within {self._limits.body_seconds:g} seconds"
            raise _Refusal(408, message, "invalid_request_error") from None
        except ClientDisconnect:
            raise _Refusal(400, "the client went away", "invalid_request_error") from None
        except BadRequestError as error:
            raise _Refusal(400, str(error), "invalid_request_error", field=error.field) from None
        finally:
            self._arriving -= len(content)
        self._check_model(body.model)
        return body

    async def _receive(self, request: Request, content: bytearray) -> None:
        """Add the bytes of a body to `content`, and to those that are arriving."""
        limits = self._limits
        async with asyncio.timeout(limits.body_seconds):
            async for part in request.stream():
                content += part
                self._arriving += len(part)
                if len(content) > limits.body_bytes:
                    message = f"the body has more than {limits.body_bytes} bytes"
                    raise _Refusal(413, message, "invalid_request_error")
                if self._arriving > BODIES * limits.body_bytes:
                    message = "the server is reading too many bytes of requests: try again later"
                    raise _Refusal(503, message, "server_error")

    async def _answer(self, request: Request, body: Options, encode: Callable[[], list[list[int]]]) -> Response:
        """Submit every prompt, and answer with all replies or with a stream of them."""
        begin = time.perf_counter()
        try:
            prompts = await run_in_threadpool(encode)
            requests = [body.request(prompt, self._lm.sampling) for prompt in prompts]
            with _engine_refusals():
                running = _Running(self._engine, requests)
        except ValueError as error:
            raise _Refusal(400, str(error), "invalid_request_error") from None
        replies = requests[0].n
        choices = [Choice() for _ in range(len(requests) * replies)]
        answer = Answer(body, self._name, self._lm.tokenizer, replies, choices)
        events = self._events(running, answer, begin)
        if body.stream:
            return _EventStream(running, _stream(answer, events))
        return await self._whole(request, answer, events)

    async def _events(self, running: "_Running", answer: Answer, begin: float) -> Events:
        """The events of all replies, added to the answer; None after each silence.

        Whoever stops early frees the rows.
        """
        is_first, deadline = True, begin + self._limits.seconds
        try:
            while not answer.is_done:
                left = deadline - time.perf_counter()
                try:
                    async with asyncio.timeout(min(left, SILENCE)):
                        index, event = await running.events.get()
                except TimeoutError:
                    if left <= SILENCE:
                        raise
                    yield None
                    continue
                if is_first:
                    is_first = False
                    self._measurements.first_token.observe(time.perf_counter() - begin)
                answer.add(index, event)
                yield index, event
        except TimeoutError:
            message = f"the request took more than {self._limits.seconds:g} seconds"
            raise _Refusal(408, message, "timeout_error") from None
        finally:
            running.cancel()
            self._measurements.whole.observe(time.perf_counter() - begin)

    async def _whole(
        self, request: Request, answer: Answer, events: AsyncIterator[tuple[int, Event] | None]
    ) -> Response:
        async def collect() -> None:
            async for _ in events:
                pass

        collecting, leaving = asyncio.create_task(collect()), asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait({collecting, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not collecting.done():
                raise _Refusal(400, "the client went away", "invalid_request_error")
            collecting.result()
        finally:
            for task in (collecting, leaving):
                task.cancel()
                with suppress(asyncio.CancelledError, _Refusal):
                    await task
        if answer.error:
            raise _Refusal(500, answer.error, "server_error")
        return Response(json_text(answer.whole(), ensure_ascii=False), media_type="application/json")


class _Running:
    """The requests of one HTTP request in the engine."""

    def __init__(self, engine: Engine, requests: list[EngineRequest]) -> None:
        """Submit all or none."""
        self.events: asyncio.Queue[tuple[int, Event]] = asyncio.Queue()
        self._handles: list[Handle] = []
        loop = asyncio.get_running_loop()
        try:
            for number, request in enumerate(requests):
                self._handles.append(engine.submit(request, self._listener(loop, number * request.n)))
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        """Free the rows of replies that have not ended."""
        for handle in self._handles:
            handle.cancel()

    def _listener(self, loop: asyncio.AbstractEventLoop, first: int) -> Callable[[Event], None]:
        def listen(event: Event) -> None:
            with suppress(RuntimeError):  # The loop has been closed: nobody waits any more.
                loop.call_soon_threadsafe(self.events.put_nowait, (first + event.reply, event))

        return listen


class _EventStream(StreamingResponse):
    """A stream of events; its rows are free once it has ended, even if it never began."""

    def __init__(self, running: _Running, lines: AsyncIterator[str]) -> None:
        super().__init__(lines, media_type="text/event-stream", headers=EVENT_STREAM)
        self._running = running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See Starlette."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._running.cancel()


@contextmanager
def _engine_refusals() -> Iterator[None]:
    """Requests that the engine does not take, as answers."""
    try:
        yield
    except QueueFullError as error:
        raise _Refusal(429, str(error), "rate_limit_error", code="queue_full") from None
    except ClosedError as error:
        raise _Refusal(503, str(error), "server_error") from None


async def _disconnected(request: Request) -> None:
    """Return when the client goes away."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(answer: Answer, events: Events) -> AsyncIterator[str]:
    """Server-sent events."""
    for first in answer.opening():
        yield _line(first)
    try:
        async for found in events:
            if found is None:
                yield ": waiting\n\n"
                continue
            index, event = found
            if isinstance(event, FinishEvent) and event.reason in ("error", "cancelled"):
                yield _line(error_object(event.error or event.reason, "server_error"))
                return
            if (chunk := answer.chunk(index, event)) is not None:
                yield _line(chunk)
        if answer.body.sends_usage:
            yield _line(answer.closing())
        yield "data: [DONE]\n\n"
    except _Refusal as refusal:
        yield f"data: {bytes(refusal.response.body).decode()}\n\n"
    finally:
        await events.aclose()  # type: ignore[attr-defined]  # It is a generator.


def _line(value: dict[str, Any]) -> str:
    return f"data: {json_text(value)}\n\n"


async def _http_error(request: Request, error: Exception) -> Response:
    status, message = (error.status_code, error.detail) if isinstance(error, HTTPException) else (500, "internal error")
    kind = "server_error" if status == 500 else "invalid_request_error"
    return JSONResponse(error_object(f"{request.method} {request.url.path:.200}: {message}", kind), status)


def make_app(
    engine: Engine,
    lm: LM,
    name: str,
    *,
    api_key: str | None = None,
    limits: Limits = Limits(),
    hosts: Sequence[str] = ("*",),
) -> Starlette:
    """The application.

    Args:
        engine: serves the requests.
        lm: its model, for prompts and their text.
        name: the model's name in requests.
        api_key: the key that clients must send; None: none.
        limits: what a client may take.
        hosts: names by which the server may be called; "*": any. A page of another site can make its own name lead to
            this machine, and then ask what it likes.
    """
    api = Api(engine, lm, name, api_key=api_key, limits=limits)
    middleware = [Middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)]
    handlers: Any = {HTTPException: _http_error, 500: _http_error}
    return Starlette(routes=api.routes(), middleware=middleware, exception_handlers=handlers)
