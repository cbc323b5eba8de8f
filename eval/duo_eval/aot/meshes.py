"""`duo eval meshes`: large models on several GPUs, planned and held against the compiler. They need not be there."""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from duo_eval.aot.compile import compiled_with
from duo_eval.aot.plan import describe
from duo_eval.aot.verify import verify
from duo_eval.runner.record import begun, write
from duo_eval.show.markdown import rows_to_table
from duo_eval.show.result_type import ResultType, with_fields
from duo_jax import PRESETS
from duo_jax.gpus import find_gpu
from duo_jax.mesh.mesh import MeshSize
from duo_jax.plan import Plan, any_pattern


@dataclass(frozen=True)
class Case:
    """A model on GPUs of one kind."""

    gpu: str
    model: str
    mesh: str
    sparsity: float | None = None
    kv_dtype: str | None = None
    context: int | None = None  # tokens; None: as many as fit


CASES = {
    "70b-full": Case("h100-80g", "llama-3-70b", "tensor=8"),
    "70b": Case("h100-80g", "llama-3-70b", "tensor=8", 0.5),
    "10m": Case("h200", "llama-3-8b", "tensor=8", 0.5, "int4", 10_000_000),
    "10m-striped": Case("h200", "llama-3-8b", "tensor=4,sequence=2", 0.5, "int4", 10_000_000),
}


@dataclass(frozen=True)
class MeshesTask:
    """Plan large models on eight GPUs, compile prefill and decode for them, and read what the GPUs send each other."""

    cases: tuple[str, ...] = tuple(CASES)
    """70b-full, 70b (Llama-3-70B on 8 x H100, the longest context, all heads or half), 10m, 10m-striped (Llama-3-8B at
    ten million tokens in 4 bits on 8 x H200)."""
    chunk: int = 4096
    """Tokens of a chunk of the prompt."""
    out: Path | None = None
    """File to write."""

    def run(self) -> None:
        """Plan and compile every case, print a line for each."""
        if not set(self.cases) <= set(CASES):
            raise ValueError(f"unknown cases in {self.cases}; there are {', '.join(CASES)}")
        record: dict[str, Any] = begun(self.out, asdict(self))
        for name in self.cases:
            case, plan = CASES[name], planned(CASES[name], self.chunk)
            memory = find_gpu(case.gpu).usable_bytes
            about = describe(plan, memory, case.context)
            found = verify(plan, case.context or about["max_context"], case.gpu)
            record["results"].append({"case": name, **asdict(case), **about, "verified": found})
            if self.out is not None:
                write(self.out, record)
            print(
                f"{name}: {case.model} on {plan.mesh.devices} x {find_gpu(case.gpu).name} ({case.mesh}), "
                f"{found['context']:,} tokens: {found['total'] / 1e9:.2f} GB each, plan {found['deviation']:+.2%}",
                flush=True,
            )


def planned(case: Case, chunk: int) -> Plan:
    """The plan of a case, weights and activations in bfloat16."""
    config = replace(PRESETS[case.model], dtype="bfloat16")
    pattern = None if case.sparsity is None else any_pattern(config, case.sparsity)
    return Plan(config, pattern, chunk_size=chunk, kv_dtype=case.kv_dtype, mesh=MeshSize.parse(case.mesh))


def mesh_table(path: Path) -> str:
    """Large models on several GPUs: bytes of each from the compiler, and the traffic between them in a layer."""
    record = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for cell in record["results"]:
        verified, devices = cell["verified"], math.prod(cell["settings"]["mesh"].values())
        sent = {name: sizes["collectives"]["bytes_in_a_layer"] for name, sizes in verified["programs"].items()}
        rows.append(
            (
                f"{devices} x {cell['gpu']}",
                cell["model"],
                cell["mesh"],
                cell["settings"]["kv_dtype"],
                f"{cell['sparsity'] or 0:.0%}",
                f"{verified['context']:,}",
                f"{verified['total'] / 1e9:.2f}",
                f"{verified['deviation']:+.2%}",
                f"{cell['devices']['imbalance']:.1%}",
                f"{sent['decode'] / 1e3:.1f}",
                f"{sent['prefill'] / 1e6:.1f}",
            )
        )
    headers = ["GPUs", "model", "mesh", "cache", "streaming", "tokens", "each, GB", "plan"]
    headers += ["largest pool, above the mean", "decode, KB a layer", "prefill, MB a layer"]
    about = (
        f"Weights and activations in bfloat16, one row, chunks of {record['settings']['chunk']} tokens. *Each*: bytes "
        "of each GPU, from the compiler; *plan*: the plan compared with that; *a layer*: bytes that its collectives "
        "deliver to each GPU. Not run."
    )
    return f"{rows_to_table(rows, headers, 'llllr')}\n\n{about}\n\n{compiled_with(record)}"


RESULT = ResultType(
    "Several GPUs, planned and compiled", with_fields("case", "mesh", "verified"), {"Each GPU": mesh_table}
)
