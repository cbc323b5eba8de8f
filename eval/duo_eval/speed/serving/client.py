"""A client of OpenAI's chat completions that times what it reads. Knows no mix and no file."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp

from duo_eval.speed.serving.mix import Ask

# The longest line of a stream, in bytes; aiohttp's own limit is below an event with many log-probabilities.
MOST_LINE = 2**22


@dataclass(frozen=True)
class Server:
    """A server and how long it is waited for.

    Attributes:
        url: its address.
        model: the name in requests.
        api_key: its key; None: it has none.
        timeout: seconds after which a request has failed.
    """

    url: str
    model: str | None = None
    api_key: str | None = None
    timeout: float = 600.0

    def send(self, asks: Sequence[Ask], clients: int, done: Any) -> list[dict[str, Any]]:
        """Send requests, each at its time and at most `clients` at once; `done` is called after each.

        Returns:
            For each, in their order: `arrived`, `begin`, `first` and `end`, seconds after the start; the numbers of
            tokens that the server reports, `prompt`, `cached` and `reply`; and `error`, a message or None.

        Raises:
            ValueError: the server does not answer, or has no model.
        """
        return asyncio.run(self._send(asks, clients, done))

    async def _send(self, asks: Sequence[Ask], clients: int, done: Any) -> list[dict[str, Any]]:
        free = asyncio.Semaphore(clients)
        headers = {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}
        limit = aiohttp.ClientTimeout(total=self.timeout)
        # A connection for each request: a server may close an idle one just when it is used again.
        pool = aiohttp.TCPConnector(limit=clients, force_close=True)
        async with aiohttp.ClientSession(
            headers=headers, timeout=limit, connector=pool, read_bufsize=MOST_LINE
        ) as session:
            model = self.model or await self._first_model(session)
            start = time.perf_counter()

            async def one(ask: Ask) -> dict[str, Any]:
                if ask.at is not None:
                    await asyncio.sleep(start + ask.at - time.perf_counter())
                async with free:
                    result = await self._ask(session, model, ask, start)
                done()
                return {"arrived": result["begin"] if ask.at is None else ask.at, **result}

            return list(await asyncio.gather(*map(one, asks)))

    async def _first_model(self, session: aiohttp.ClientSession) -> str:
        try:
            async with session.get(f"{self.url}/v1/models") as response:
                text = await response.text()
            return str(json.loads(text)["data"][0]["id"])
        except (aiohttp.ClientError, TimeoutError) as error:
            raise ValueError(f"no server answers at {self.url} ({error or type(error).__name__})") from None
        except (ValueError, LookupError, TypeError):
            raise ValueError(f"{self.url}/v1/models lists no model: {text[:200]}; give --model") from None

    async def _ask(self, session: aiohttp.ClientSession, model: str, ask: Ask, start: float) -> dict[str, Any]:
        system = [{"role": "system", "content": ask.system}] if ask.system else []
        body = {
            "model": model,
            "messages": [*system, {"role": "user", "content": ask.question}],
            "max_tokens": ask.reply_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        begin, first, error = time.perf_counter(), None, None
        usage: dict[str, Any] = {}
        pieces = 0
        try:
            async with session.post(f"{self.url}/v1/chat/completions", json=body) as response:
                if response.status != 200:
                    raise ValueError(f"status {response.status}: {(await response.text())[:200]}")
                async for event in _events(response):
                    if "error" in event:
                        raise ValueError(f"{event['error']}"[:200])
                    usage = event.get("usage") or usage
                    if any((choice.get("delta") or {}).get("content") for choice in event.get("choices") or ()):
                        first = first or time.perf_counter()
                        pieces += 1
        except (aiohttp.ClientError, TimeoutError, ValueError, AttributeError, TypeError) as failure:
            error = f"{type(failure).__name__}: {failure}".strip(": ")
        details = usage.get("prompt_tokens_details") or {}
        return {
            "begin": begin - start,
            "first": None if first is None else first - start,
            "end": time.perf_counter() - start,
            "prompt": usage.get("prompt_tokens"),
            "cached": details.get("cached_tokens"),
            # A server that does not count sends one token, mostly, in each event.
            "reply": usage.get("completion_tokens", pieces),
            "error": error,
        }


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[dict[str, Any]]:
    """The objects of a stream of server-sent events."""
    async for line in response.content:
        text = line.decode(errors="replace").strip()
        if text.startswith("data:") and (data := text.removeprefix("data:").strip()) != "[DONE]":
            yield json.loads(data)
