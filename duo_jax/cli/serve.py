"""`duo serve`: a server with OpenAI's interface, for many users at a time."""

import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import tyro

from duo_jax.arguments import ArgumentError, real_number, whole_number
from duo_jax.certified import inference
from duo_jax.checkpoint.open import open_config
from duo_jax.cli.devices import DeviceOptions
from duo_jax.cli.options import CacheOptions, ModelOptions, PatternOptions, check_room, device_memory, parse_bytes
from duo_jax.cli.timings import show_status
from duo_jax.extras import EXTRAS
from duo_jax.sizes import size_text
from duo_jax.text import template
from duo_jax.text.lm import LM
from pallas_kernels.certify.machine import may_have_gpu
from pallas_kernels.types import Request

# Tokens of a prompt that are computed between two steps of the replies: on a GPU a chunk must be larger to be worth it.
CHUNK_SIZE, GPU_CHUNK_SIZE = 256, 1024
# Addresses that only this machine reaches.
LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True)
class Serve:
    """Serve a model to many users at a time, through OpenAI's HTTP interface."""

    model: tyro.conf.OmitArgPrefixes[ModelOptions]
    pattern: tyro.conf.OmitArgPrefixes[PatternOptions] = PatternOptions()
    kv: tyro.conf.OmitArgPrefixes[CacheOptions] = CacheOptions()
    devices: tyro.conf.OmitArgPrefixes[DeviceOptions] = DeviceOptions()
    host: str = "127.0.0.1"
    """Address to listen on: by default, only programs of this machine reach the server."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    host_names: tuple[str, ...] = ()
    """Further names by which clients may call a server that only this machine reaches, such as that of a proxy."""
    api_key: str | None = None
    """Key that clients must send; by default that of the environment variable DUO_API_KEY, or none."""
    name: str | None = None
    """Name of the model in requests; --model by default, of a path its last part."""
    memory: str | None = None
    """Memory for weights, activations, KV cache and prefix cache, such as 16GB; by default that of the device, or half
    of the free memory on a CPU."""
    rows: int = 8
    """Requests that decode together; others wait."""
    max_context: int | None = None
    """Most tokens of a request, prompt and reply; by default as many as the model was trained for, if they fit."""
    page_size: int = 128
    """Tokens of a page of the KV cache."""
    chunk: int | None = None
    """Tokens of a prompt that are computed at a time, between two steps of the replies; a multiple of --page-size. By
    default 256, and 1024 on a GPU."""
    queue: int = 1024
    """Requests that may wait; others are answered with status 429."""
    timeout: float = 3600.0
    """Seconds after which a request ends, waiting included."""
    max_body: str = "16MB"
    """Most bytes of a request's body."""
    grace: float = 10.0
    """Seconds that replies have to end when the server is stopped."""
    reuse_replies: bool = True
    """A conversation continues from the keys that its replies left, which agree with those of a prompt to rounding.
    With --no-reuse-replies, a reply has the same bits whatever was asked before."""
    prefix: tuple[Path, ...] = ()
    """Folders written by duo prefill: their texts are not computed for requests that begin with them. Their keys are
    loaded if they have the server's pattern and data types; otherwise the texts are computed once, at the start."""

    packages = EXTRAS["serve"]

    def requests(self) -> list[Request]:
        """The attention over a cache in pages, for certification."""
        whole_number("page_size", self.page_size, 1)
        config, pattern = open_config(self.model.model), self.pattern.load(self.max_context or 1)
        config = config.with_dtypes(dtype=self.model.dtype)
        mesh, page_size = self.devices.size, self.page_size
        return inference(config, pattern, kv_dtype=self.kv.kv_dtype, mesh=mesh, page_size=page_size)

    def run(self) -> None:
        """Check the flags, load, compile, and serve until interrupted."""
        from duo_jax.serve.engine import too_many_prefixes
        from duo_jax.serve.http.app import Limits, make_app
        from duo_jax.serve.http.server import Server, listen, most_connections
        from duo_jax.serve.sizing import plan_sizes
        from duo_jax.serve.start import keep_prefix, prefix_tokens, start_engine, stored_for_engine

        whole_number("port", self.port, 0, 65535)
        for flag in ("timeout", "grace"):
            real_number(flag, getattr(self, flag), 0, 1e9)
        key = self.api_key if self.api_key is not None else os.environ.get("DUO_API_KEY")
        if key is not None and not (key and key.isascii() and key.isprintable()):
            name = "DUO_API_KEY" if self.api_key is None else "api_key"
            raise ArgumentError(name, "must be printable ASCII characters, and not empty")
        if self.pattern.kv_budget is not None and self.max_context is None:
            raise ValueError("--kv-budget is a fraction of the tokens of a request: give --max-context too")
        limits = Limits(body_bytes=parse_bytes(self.max_body, "max_body"), seconds=self.timeout)
        pattern = self.pattern.load(self.max_context or 1)
        chunk = self.chunk or (GPU_CHUNK_SIZE if may_have_gpu() else CHUNK_SIZE)
        plan = replace(self.model.plan(pattern, chunk, self.devices.size), kv_dtype=self.kv.kv_dtype)
        if self.max_context is not None:
            check_room("max_context", self.max_context, plan.config)
        sizes, spec = plan_sizes(
            plan,
            self._memory(),
            rows=self.rows,
            page_size=self.page_size,
            max_context=self.max_context,
            queue=self.queue,
            reuse_replies=self.reuse_replies,
        )
        prefixes = [prefix_tokens(path) for path in self.prefix]
        if len(prefixes) > sizes.snapshots:
            raise ValueError(too_many_prefixes(sizes.snapshots))
        listener = listen(self.host, self.port)
        tokenizer = self.model.text_tokenizer()
        template.start(tokenizer)
        model = self.model.load(mesh=self.devices.make(), pattern=pattern)
        lm = stored_for_engine(LM(model, tokenizer, pattern, self.kv.kv_dtype, self.model.sampling()))
        name = self.name or Path(self.model.model).name
        engine = start_engine(lm, sizes, spec, lambda program: show_status(f"compiling {program}"))
        try:
            for number, (path, tokens) in enumerate(zip(self.prefix, prefixes, strict=True)):
                show_status(f"prefix {number + 1} of {len(prefixes)}")
                if reason := keep_prefix(engine, lm.model, spec, path, tokens):
                    show_status("")
                    print(f"{path}: the text was computed again: {reason}", file=sys.stderr)
            hosts = (*LOOPBACK, "[::1]", *self.host_names) if self.host in LOOPBACK else ("*",)
            app = make_app(engine, lm, name, api_key=key, limits=limits, hosts=hosts)
            host, port = listener.getsockname()[:2]
            pages = f"{sizes.pages} pages of {sizes.page_size} tokens ({size_text(spec.nbytes)})"
            about = f"{sizes.rows} rows, {pages}, {sizes.snapshots} snapshots"

            def ready() -> None:
                show_status("")
                address = f"[{host}]" if ":" in host else host
                print(f"{name}: {about}", file=sys.stderr)
                if self.host not in LOOPBACK and key is None:
                    print(
                        "warning: anyone who reaches this address can use the server; set --api-key or DUO_API_KEY",
                        file=sys.stderr,
                    )
                print(f"http://{address}:{port}/v1", flush=True)

            server = Server(app, engine, connections=most_connections(), grace=self.grace, ready=ready)
            server.run(sockets=[listener])
        finally:
            engine.close(0)
            listener.close()

    def _memory(self) -> int:
        if self.memory is not None:
            return parse_bytes(self.memory)
        return device_memory() if may_have_gpu() else device_memory() // 2
