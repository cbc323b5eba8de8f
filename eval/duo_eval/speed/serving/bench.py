"""`duo bench-serve`: requests to a running server, and how fast it answers."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from tqdm import tqdm

from duo_eval.runner.provenance import host, origin
from duo_eval.runner.record import Record, read
from duo_eval.show.markdown import rows_to_table
from duo_eval.show.result_type import ResultType, of_task
from duo_eval.speed.serving.mix import Ask, Mix
from duo_jax.arguments import real_number, whole_number

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class BenchServe:
    """Send a running server a mix of requests: time to first token, time per token, throughput, prefix hits.

    Any server with OpenAI's chat completions will do.
    """

    mix: tyro.conf.OmitArgPrefixes[Mix] = Mix()
    url: str = "http://127.0.0.1:8000"
    """Address of the server."""
    clients: int = 16
    """Most requests at the same time."""
    warm: bool = False
    """Send each shared text once before the measurement, so that the server may have it in its cache."""
    model: str | None = None
    """Name of the model in requests; by default the first one that the server lists."""
    name: str = "duo serve"
    """Name of the server in the table."""
    settings: str = ""
    """How the server was started, for the table: its cache, its weights, how many requests it batches."""
    tokenizer: str = "smollm2-135m-instruct"
    """Model whose tokenizer counts the tokens of the texts."""
    haystack: str = "essays"
    """Source of the texts, as in `duo eval needle`."""
    timeout: float = 600.0
    """Seconds after which a request has failed."""
    api_key: str | None = None
    """Key of the server."""
    out: Path = Path("serve.json")
    """File to write."""

    packages = ("aiohttp", "scipy", "tabulate")

    def run(self) -> None:
        """Measure, write, print.

        Raises:
            ValueError: a number out of range, a server that does not answer, or one that refuses all requests.
        """
        from duo_train.data.haystack import load_haystack

        from duo_eval.speed.serving.client import Server
        from duo_jax.checkpoint.open import load_text_tokenizer

        self.mix.check()
        whole_number("clients", self.clients, 1, 10_000)
        real_number("timeout", self.timeout, 0.001, 1e6)
        about = {name: value for name, value in asdict(self).items() if name != "api_key"}
        record = Record.open(self.out, {"task": "bench-serve", **about}, again=True)
        tokenizer = load_text_tokenizer(self.tokenizer)
        text = load_haystack(self.haystack, max_chars=20 * self.mix.longest + 100_000)
        texts, asks = self.mix.draw(tokenizer.encode(text, add_special_tokens=False, verbose=False), tokenizer)
        server = Server(self.url.rstrip("/"), self.model, self.api_key, self.timeout)
        if self.warm:
            server.send([Ask(each, "Hello.", 1, None) for each in texts], self.clients, lambda: None)
        with tqdm(total=len(asks), unit="request", disable=None) as bar:
            answers = server.send(asks, self.clients, bar.update)
        failed = [answer["error"] for answer in answers if answer["error"]]
        if len(failed) == len(answers):
            raise ValueError(f"{self.url} answered no request, the first because of {failed[0]}")
        with record.writing(device=self.name) as append:
            for answer in answers:
                append(None, answer)
        if failed:
            print(f"{len(failed)} of {len(answers)} requests failed, the first because of {failed[0]}")
        print(serve_table(self.out))


@dataclass(frozen=True)
class Load:
    """What a file of results says of a server."""

    head: dict[str, Any]
    results: list[dict[str, Any]]

    @property
    def answered(self) -> list[dict[str, Any]]:
        """Results of the requests that were answered."""
        return [result for result in self.results if not result["error"]]

    @property
    def seconds(self) -> float:
        """From the first request to the last reply."""
        return float(max(result["end"] for result in self.results) - min(result["begin"] for result in self.results))

    @property
    def mix(self) -> str:
        """What was asked for."""
        about, mix = self.head["about"], self.head["about"]["mix"]
        shared = f"{mix['prefixes']} shared text{'' if mix['prefixes'] == 1 else 's'} of {mix['prefix_tokens']} tokens"
        return f"{about['clients']} clients, {shared}, {'warm' if about['warm'] else 'cold'}"

    @property
    def rate(self) -> str:
        """Requests a minute."""
        return f"{60 * len(self.answered) / self.seconds:.1f}"

    @property
    def tokens_a_second(self) -> str:
        """Tokens of replies."""
        return f"{sum(result['reply'] for result in self.answered) / self.seconds:.1f}"

    @property
    def cached(self) -> str:
        """Part of the prompts' tokens that the server did not compute."""
        counts = [(result["prompt"], result["cached"]) for result in self.answered]
        if not counts or any(number is None for pair in counts for number in pair):
            return "not reported"
        prompt, cached = (sum(numbers) for numbers in zip(*counts, strict=True))
        return f"{cached / prompt:.1%}"

    @property
    def to_first(self) -> list[float]:
        """Seconds until the first token of each reply."""
        return [result["first"] - result["arrived"] for result in self.answered if result["first"] is not None]


def serve_table(path: Path) -> str:
    """Throughput, and percentiles of the times of the requests that were answered."""
    load = Load(*read(path))
    answered, about = load.answered, load.head["about"]
    per_token = [
        1000 * (result["end"] - result["first"]) / (result["reply"] - 1)
        for result in answered
        if result["first"] is not None and result["reply"] > 1
    ]
    cells = [
        ["requests answered, failed", f"{len(answered)}, {len(load.results) - len(answered)}"],
        ["requests a minute", load.rate],
        ["reply tokens a second", load.tokens_a_second],
        ["prompt tokens from the cache", load.cached],
        *_rows("time to first token, s", load.to_first, ".2f"),
        *_rows("time per token, ms", per_token, ".1f"),
        *_rows("whole request, s", [result["end"] - result["arrived"] for result in answered], ".2f"),
    ]
    table = rows_to_table(cells, [load.mix, about["name"]])
    return f"{table}\n\n{origin(load.head['runs'], load.head['runs'][-1]['command'])}"


def servers_table(results: Path) -> str:
    """Servers next to each other, from the files `cpu/serve*.json` of a folder of results.

    Raises:
        ValueError: servers that were asked different things, or on different machines.
    """
    loads = [Load(*read(path)) for path in sorted((results / "cpu").glob("serve*.json"))]
    asked = {(load.mix, str(load.head["about"]["mix"]), host(load.head["runs"][-1]["machine"])) for load in loads}
    if len(asked) != 1:
        raise ValueError(f"the files serve*.json in {results / 'cpu'} must be of one mix on one machine, got {asked}")
    rows = [
        [
            load.head["about"]["name"],
            load.head["about"].get("settings") or "-",
            f"{len(load.answered)} of {len(load.results)}",
            load.rate,
            *(f"{np.percentile(load.to_first, p):.1f} s" if load.to_first else "-" for p in (50, 95)),
            load.tokens_a_second,
            load.cached,
        ]
        for load in loads
    ]
    headers = ["server", "settings", "answered", "requests a minute", "first token, p50", "p95"]
    table = rows_to_table(rows, [*headers, "reply tokens a second", "prompt tokens from the cache"], "llr")
    machine = loads[0].head["runs"][-1]["machine"]
    commits = ", ".join(dict.fromkeys(load.head["runs"][-1]["machine"]["commit"] for load in loads))
    return f"{table}\n\n{loads[0].mix}; {host(machine)}. Measured by `duo bench-serve` at {commits}."


def _rows(name: str, values: Sequence[float], spec: str) -> list[list[str]]:
    """A row for each percentile."""
    if not values:
        return [[name, "no request"]]
    return [[f"{name}, p{p}", f"{np.percentile(values, p):{spec}}"] for p in PERCENTILES]


RESULT = ResultType("Serving", of_task("bench-serve"), {"Requests to a server": serve_table})
