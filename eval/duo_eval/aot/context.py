"""`duo eval context` and `duo eval meshes`: the longest contexts of large models, planned and checked by the compiler.

For each data type, with full attention and a pattern; and of larger models on one GPU or several. None need be present.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from duo_eval.aot.compile import compiled_with
from duo_eval.aot.plan import describe
from duo_eval.aot.programs import verify
from duo_eval.runner.provenance import provenance
from duo_eval.runner.record import Record, read
from duo_eval.show.markdown import rows_to_table
from duo_eval.show.result_type import ResultType, with_fields
from duo_jax import PRESETS
from duo_jax.mesh.mesh import MeshSize
from duo_jax.plan import Plan, any_pattern
from pallas_kernels.gpus import GPUS, find_gpu

# The paper's operating points (section 3.1): the fraction of KV heads that stream, and the saving in decode memory
# that it reports, with its context.
MODELS: dict[str, tuple[float, int, float]] = {
    "llama-3-8b": (0.5, 500_000, 1.67),
    "llama-2-7b": (0.75, 100_000, 2.55),
}

# Data types of weights and of the cache.
DTYPES: dict[str, tuple[str | None, str | None]] = {
    "bf16": (None, None),
    "KV4": (None, "int4"),
    "W8 KV8": ("int8", "int8"),
    "W8 KV4": ("int8", "int4"),
    "W4 KV4": ("int4", "int4"),
}


@dataclass(frozen=True)
class ContextTask:
    """Plan the longest context of the paper's models on a GPU, for each data type, full and duo, and compile them."""

    gpus: tuple[str, ...] = ("a100-80g",)
    """Names, such as a100-80g, h200 or rtx-4090; the message about a wrong one lists all."""
    models: tuple[str, ...] = tuple(MODELS)
    """llama-3-8b, llama-2-7b."""
    dtypes: tuple[str, ...] = tuple(DTYPES)
    """bf16, KV4, W8 KV8, W8 KV4, W4 KV4."""
    chunk: int = 4096
    """Tokens of a chunk of the prompt."""
    compile: bool = True
    """Compile prefill and decode at the longest context; a cell takes minutes."""
    out: Path | None = None
    """File to write; compiled cells that it contains are kept where the plan is the same."""

    def run(self) -> None:
        """Plan every cell, compile it, print a line for each."""
        _check("models", self.models, MODELS)
        _check("dtypes", self.dtypes, DTYPES)
        record = Record.open(self.out, {"task": "context", **asdict(self)}, again=True)
        compiled = read(self.out)[1] if self.out is not None and self.out.exists() else []
        record.head["savings"] = [_saving(model) for model in self.models]
        with record.writing() as append:
            for gpu in self.gpus:
                for model in self.models:
                    for dtypes in self.dtypes:
                        for heads in ("full", "duo"):
                            cell = {"gpu": gpu, "model": model, "dtypes": dtypes, "heads": heads, "chunk": self.chunk}
                            cell = self._cell(cell, compiled)
                            append(None, cell)
                            print(_line(cell), flush=True)

    def _cell(self, cell: dict[str, Any], compiled: list[dict[str, Any]]) -> dict[str, Any]:
        plan = planned(cell["model"], cell["dtypes"], cell["heads"] == "duo", self.chunk)
        context = plan.max_context(find_gpu(cell["gpu"]).usable_bytes)
        sizes = {"weights": plan.weights, "kv": plan.kv(context), "activations": plan.activations}
        cell |= {"context": context, "kv_per_token": plan.kv_per_token, **sizes, "verified": None}
        for other in compiled:
            if other["verified"] and all(other[name] == cell[name] for name in cell if name != "verified"):
                return other
        if self.compile:
            begin = time.perf_counter()
            try:
                verified = verify(plan, context, cell["gpu"])
            except NotImplementedError as error:
                return cell | {"why_not": str(error)}
            commit = provenance()["machine"]["commit"]
            cell["verified"] = verified | {"seconds": time.perf_counter() - begin, "commit": commit}
        return cell


def planned(model: str, dtypes: str, duo: bool, chunk: int) -> Plan:
    """One cell of the table."""
    weight_dtype, kv_dtype = DTYPES[dtypes]
    config = replace(PRESETS[model], dtype="bfloat16", weight_dtype=weight_dtype)
    # The paper's sizes where it measures efficiency.
    pattern = any_pattern(config, MODELS[model][0], sink_size=128, recent_size=256) if duo else None
    return Plan(config, pattern, chunk_size=chunk, kv_dtype=kv_dtype)


def _saving(model: str) -> dict[str, Any]:
    """Full attention's bytes of weights and cache divided by duo's, in bfloat16, where the paper measured them."""
    full, duo = (planned(model, "bf16", is_duo, 1) for is_duo in (False, True))
    _, context, goal = MODELS[model]

    def saving(length: int) -> float:
        return (full.weights + full.kv(length)) / (duo.weights + duo.kv(length))

    low, high = 1, 1 << 24
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if saving(middle) >= goal else (middle + 1, high)
    return {"model": model, "context": context, "saving": saving(context), "goal": goal, "goal_passed_at": low}


def _line(cell: dict[str, Any]) -> str:
    text = f"{cell['gpu']}, {cell['model']}, {cell['dtypes']}, {cell['heads']}: {cell['context'] / 1e6:.2f}M tokens"
    verified = cell["verified"]
    if verified is None:
        return f"{text}, not compiled" + (f": {cell['why_not']}" if "why_not" in cell else "")
    return f"{text}, planned {verified['planned'] / 1e9:.2f} GB, compiled {verified['total'] / 1e9:.2f} GB"


@dataclass(frozen=True)
class Case:
    """A model on one or several GPUs of one kind."""

    gpu: str
    model: str
    mesh: str
    sparsity: float | None = None
    kv_dtype: str | None = None
    context: int | None = None  # tokens; None: as many as fit
    weight_dtype: str | None = None

    def plan(self, chunk: int) -> Plan:
        """Its plan, with activations in bfloat16, and what is not quantized."""
        config = replace(PRESETS[self.model], dtype="bfloat16", weight_dtype=self.weight_dtype)
        pattern = None if self.sparsity is None else any_pattern(config, self.sparsity)
        return Plan(config, pattern, chunk_size=chunk, kv_dtype=self.kv_dtype, mesh=MeshSize.parse(self.mesh))


_QWEN3 = Case("h200", "qwen3-30b-a3b", "tensor=1", 0.5, context=131_072)
_GPT_OSS = Case("h200", "gpt-oss-120b", "tensor=1", 0.5, context=131_072, weight_dtype="mxfp4")
_GEMMA3 = Case("h200", "gemma-3-27b", "tensor=1", 0.5, context=131_072)
# On several GPUs, then on one.
CASES = {
    "70b-full": Case("h100-80g", "llama-3-70b", "tensor=8"),
    "70b": Case("h100-80g", "llama-3-70b", "tensor=8", 0.5),
    "10m": Case("h200", "llama-3-8b", "tensor=8", 0.5, "int4", 10_000_000),
    "10m-striped": Case("h200", "llama-3-8b", "tensor=4,sequence=2", 0.5, "int4", 10_000_000),
    "qwen3-moe": _QWEN3,
    "gpt-oss": _GPT_OSS,
    "gemma3": _GEMMA3,
    "qwen3-moe-full": replace(_QWEN3, sparsity=None),
    "gpt-oss-full": replace(_GPT_OSS, sparsity=None),
    "gemma3-full": replace(_GEMMA3, sparsity=None),
}
SEVERAL = tuple(name for name, case in CASES.items() if MeshSize.parse(case.mesh).devices > 1)


@dataclass(frozen=True)
class MeshesTask:
    """Plan large models on GPUs, compile prefill and decode for them, and read the traffic between the GPUs."""

    cases: tuple[str, ...] = SEVERAL
    """70b-full, 70b (Llama-3-70B on 8 x H100, the longest context, all heads or half), 10m, 10m-striped (Llama-3-8B at
    ten million tokens in 4 bits on 8 x H200); at 131,072 tokens on one H200: qwen3-moe (30B-A3B), gpt-oss (120b in
    MXFP4), gemma3 (27B), each also with -full for all heads."""
    chunk: int = 4096
    """Tokens of a chunk of the prompt."""
    out: Path | None = None
    """File to write; cases that it contains are not compiled again."""

    def run(self) -> None:
        """Plan and compile every case, print a line for each."""
        _check("cases", self.cases, CASES)
        record = Record.open(self.out, {"task": "meshes", "chunk": self.chunk}, key="case")
        done = {result["case"] for result in record.results}
        if not (missing := [name for name in self.cases if name not in done]):
            print(f"{self.out} has all of these cases", flush=True)
            return
        with record.writing() as append:
            for name in missing:
                case, plan = CASES[name], CASES[name].plan(self.chunk)
                gpu = find_gpu(case.gpu)
                described = describe(plan, gpu.usable_bytes, case.context)
                verified = verify(plan, case.context or described["max_context"], case.gpu)
                append(None, {"case": name, **asdict(case), **described, "verified": verified})
                print(
                    f"{name}: {case.model} on {plan.mesh.devices} x {gpu.name} ({case.mesh}), "
                    f"{verified['context']:,} tokens: {verified['total'] / 1e9:.2f} GB each, "
                    f"plan {verified['deviation']:+.2%}",
                    flush=True,
                )


def _check(name: str, chosen: Sequence[str], known: dict[str, Any]) -> None:
    if not set(chosen) <= set(known):
        raise ValueError(f"unknown {name} in {chosen}; there are {', '.join(known)}")


def plan_table(path: Path) -> str:
    """The longest contexts by plan, and the deviation of the plan from the compiler's figure."""
    head, results = read(path)
    cells: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for cell in results:
        cells.setdefault((cell["gpu"], cell["model"], cell["dtypes"]), {})[cell["heads"]] = cell
    rows = []
    for key, by_heads in cells.items():
        row = [*key]
        for heads in ("full", "duo"):
            planned_cell = by_heads.get(heads)
            verified = planned_cell and planned_cell["verified"]
            row.append(f"{planned_cell['context']:,}" if planned_cell else "")
            row.append(f"{verified['deviation']:+.2%}" if verified else "not compiled")
        rows.append(row)
    headers = ["GPU", "model", "weights, cache", "full attention, tokens", "plan", "duo, tokens", "plan"]
    gpus = {cell["gpu"]: GPUS[cell["gpu"]] for cell in results}
    usable = ", ".join(f"{gpu.name} {gpu.usable_bytes / 1e9:.2f} GB" for gpu in gpus.values())
    savings = [
        f"{saving['model']} at {saving['context']:,} tokens needs {saving['saving']:.2f} times less than with full "
        f"attention (the paper: {saving['goal']}), and passes the paper's figure at {saving['goal_passed_at']:,}"
        for saving in head["savings"]
    ]
    chunk = head["about"]["chunk"]
    return (
        f"{rows_to_table(rows, headers, 'lllr')}\n\n"
        f"Chunks of {chunk} tokens; usable: {usable}. *plan*: its total compared with the compiler's; not run.\n\n"
        f"Decode memory in bfloat16, weights and cache: {'; '.join(savings)}.\n\n{compiled_with(head)}"
    )


def mesh_table(path: Path) -> str:
    """Large models: bytes of each GPU from the compiler; on several, the traffic between them in a layer."""
    head, results = read(path)
    several = any(math.prod(cell["settings"]["mesh"].values()) > 1 for cell in results)
    rows = [_case_cells(cell) | (_traffic_cells(cell) if several else {}) for cell in results]
    note = (
        f"Activations, and what is not quantized, in bfloat16, one row, chunks of {head['about']['chunk']} tokens. "
        "*Each*: bytes of each GPU, from the compiler; *plan*: the plan compared with that"
    )
    note += "; *a layer*: bytes that its collectives deliver to each GPU. Not run." if several else ". Not run."
    table = rows_to_table([tuple(row.values()) for row in rows], list(rows[0]), "llllr")
    return f"{table}\n\n{note}\n\n{compiled_with(head)}"


def _case_cells(cell: dict[str, Any]) -> dict[str, str]:
    settings, verified = cell["settings"], cell["verified"]
    return {
        "GPUs": f"{math.prod(settings['mesh'].values())} x {cell['gpu']}",
        "model": cell["model"],
        "weights": settings["weight_dtype"],
        "cache": settings["kv_dtype"],
        "streaming": f"{cell['sparsity'] or 0:.0%}",
        "tokens": f"{verified['context']:,}",
        "weights, GB": f"{cell['weights'] / 1e9:.2f}",
        "cache, GB": f"{cell['kv'] / 1e9:.2f}",
        "each, GB": f"{verified['total'] / 1e9:.2f}",
        "plan": f"{verified['deviation']:+.2%}",
    }


def _traffic_cells(cell: dict[str, Any]) -> dict[str, str]:
    sent = {name: sizes["collectives"]["bytes_in_a_layer"] for name, sizes in cell["verified"]["programs"].items()}
    return {
        "mesh": cell["mesh"],
        "largest pool, above the mean": f"{cell['devices']['imbalance']:.1%}",
        "decode, KB a layer": f"{sent['decode'] / 1e3:.1f}",
        "prefill, MB a layer": f"{sent['prefill'] / 1e6:.1f}",
    }


RESULT = ResultType(
    "Longest contexts", with_fields("dtypes", "context"), {"On one GPU": plan_table}, group="Compiled, not run"
)
MESHES_RESULT = ResultType(
    "Several GPUs", with_fields("case", "mesh", "verified"), {"Each GPU": mesh_table}, group="Compiled, not run"
)
