"""`duo bench-serve`: requests to a running server, and how fast it answers."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import tyro
from tqdm import tqdm

from duo_eval.runner.provenance import origin
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


def serve_table(path: Path) -> str:
    """Throughput, and percentiles of the times of the requests that were answered."""
    head, results = read(path)
    about, answered = head["about"], [result for result in results if not result["error"]]
    seconds = max(result["end"] for result in results) - min(result["begin"] for result in results)
    prompt, cached = (sum(result[name] or 0 for result in answered) for name in ("prompt", "cached"))
    tokens = sum(result["reply"] for result in answered)
    timed = [result for result in answered if result["first"] is not None]
    to_first = [result["first"] - result["arrived"] for result in timed]
    per_token = [
        1000 * (result["end"] - result["first"]) / (result["reply"] - 1) for result in timed if result["reply"] > 1
    ]
    cells = [
        ["requests answered, failed", f"{len(answered)}, {len(results) - len(answered)}"],
        ["requests a minute", f"{60 * len(answered) / seconds:.1f}"],
        ["reply tokens a second", f"{tokens / seconds:.1f}"],
        ["prompt tokens from the cache", f"{cached / prompt:.1%}" if prompt else "not reported"],
        *_rows("time to first token, s", to_first, ".2f"),
        *_rows("time per token, ms", per_token, ".1f"),
        *_rows("whole request, s", [result["end"] - result["arrived"] for result in answered], ".2f"),
    ]
    mix = about["mix"]
    shared = f"{mix['prefixes']} shared text{'' if mix['prefixes'] == 1 else 's'} of {mix['prefix_tokens']} tokens"
    setting = f"{about['clients']} clients, {shared}, {'warm' if about['warm'] else 'cold'}"
    table = rows_to_table(cells, [setting, about["name"]])
    return f"{table}\n\n{origin(head['runs'], head['runs'][-1]['command'])}"


def _rows(name: str, values: Sequence[float], spec: str) -> list[list[str]]:
    """A row for each percentile."""
    if not values:
        return [[name, "no request"]]
    return [[f"{name}, p{p}", f"{np.percentile(values, p):{spec}}"] for p in PERCENTILES]


RESULT = ResultType("Serving", of_task("bench-serve"), {"Requests to a server": serve_table})
