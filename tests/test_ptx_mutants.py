"""Kernels that were changed on purpose: their tests must fail, by a wrong result or by an error of the executor.

A change of one instruction does not always matter: compilers wait and synchronize more than they need to, and some
numbers of a tile belong to no query or key. `LEAST` has the share of such changes that must fail.
"""

import importlib
import re
from collections.abc import Callable, Iterator
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.merge import LOG2_E, MASKED
from pallas_kernels.window import Window
from tests import test_ptx_kernels as kernels
from tests.ptx.launch import Change, Launch, Program, forget
from tests.ptx.machine import Failure
from tests.test_attention import Case

pytestmark = kernels.pytestmark

# Shapes in which most instructions matter: each kind of tile is full, or nearly, and all rows of a product are queries.
HEADS = {"dtype": "bfloat16", "head_dim": 64, "is_retrieval": (True, False)}
PREFILL = Case(**HEADS, group=1, tokens=256, capacity=440, starts=(178, 5), lengths=(256, 9), recent_size=90)
DECODE = Case(**HEADS, group=16, tokens=1, capacity=384, starts=(369, 4), lengths=(1, 1), recent_size=160)
TRAINING = (160, 2, 1, 64)


def prefill(change: Change | None = None) -> tuple[float, list[Launch]]:
    error, launches = kernels.prefill(PREFILL, change)
    return error / kernels.BOUND["bfloat16"], launches


def decode(change: Change | None = None, backend: str = "triton") -> tuple[float, list[Launch]]:
    error, launches = kernels.decode(DECODE, backend, change, programs=2)
    return error / kernels.BOUND["bfloat16"], launches


def training(change: Change | None = None) -> tuple[float, list[Launch]]:
    return kernels.training(TRAINING, Window(3, 70), "bfloat16", change)


# The largest error, in units of what the tests tolerate, and the launches.
OPERATIONS: dict[str, Callable[..., tuple[float, list[Launch]]]] = {
    "prefill": prefill,
    "decode": decode,
    "jax_triton": lambda change=None: decode(change, "jax_triton"),
    "training": training,
}
operations = pytest.mark.parametrize("operation", OPERATIONS)


def fails(operation: str, before: Program, text: str) -> bool:
    """Whether the test of an operation fails with another text of one of its programs."""
    try:
        error, _ = OPERATIONS[operation](lambda program: replace(program, text=text) if program == before else program)
    except (Failure, AssertionError):  # Undefined behavior; infinite or not a number.
        return True
    return not error < 1


def unchanged(operation: str) -> list[Launch]:
    if operation == "jax_triton":
        kernels.needs("jax_triton")
    error, launches = OPERATIONS[operation]()
    assert error < 1
    return launches


def swap_registers(instruction: str) -> str:
    """The first two registers of the left matrix exchanged."""
    target, left, *rest = re.split(r"\}\s*,\s*\{", instruction)
    first, second, *others = left.split(",")
    assert len(others) == 2 and rest
    return "}, {".join([target, ",".join([second, first, *others]), *rest])


# Changes of one instruction: its opcode, the change, and the least share of them that must fail.
INSTRUCTIONS = {
    "wait": ("cp.async.wait_group", lambda text: text.replace("cp.async.wait_group", "// "), 0.9),
    "barrier": ("bar.sync", lambda text: text.replace("bar.sync", "// "), 0.7),
    "fragment": ("mma", swap_registers, 0.9),
    "transposed": ("ldmatrix", lambda text: text.replace(".x4.trans.", ".x4."), 0.9),
    "shuffle": ("shfl", lambda text: text.replace(", 2, 31", ", 1, 31"), 0.3),
    "exponential": ("ex2", lambda text: text.replace("ex2.approx.", "lg2.approx."), 0.8),
}
# Of each kernel, at most that many are tried.
SAMPLES = 6


@operations
@pytest.mark.parametrize(("opcode", "change", "least"), INSTRUCTIONS.values(), ids=INSTRUCTIONS)
def test_changed_instructions_fail(opcode, change, least, operation):
    caught, missed = [], []
    for number, launch in enumerate(unchanged(operation)):
        lines = launch.program.text.split("\n")
        changes = {}
        for at in sorted(each.line for each in launch.run.executed if each.opcode.startswith(opcode)):
            before, after = "\n".join(lines[: at - 1]), "\n".join(lines[at - 1 :])
            old, end, rest = after.partition(";")
            if (new := change(old)) != old:
                changes[at] = f"{before}\n{new}{end}{rest}"
        for at in list(changes)[:: max(1, -(-len(changes) // SAMPLES))]:
            (caught if fails(operation, launch.program, changes[at]) else missed).append((number, at))
    if not caught and not missed:
        assert opcode in ("shfl", "ldmatrix")  # Not every kernel has those that would be changed.
        pytest.skip("no such instruction")
    count = len(caught) + len(missed)
    print(f"{operation}: {len(caught)} of {count} changes fail; (kernel, line) of the others: {missed}")
    assert len(caught) >= least * count


def float_bits(number: float) -> str:
    return f"0f{np.float32(number).view(np.uint32):08X}"


@operations
def test_wrong_scale_fails(operation):
    right, wrong = (np.float32(factor * 64**-0.5 * LOG2_E) for factor in (1, 1.1))
    # The merge of decode has none.
    programs = [launch.program for launch in unchanged(operation) if float_bits(right) in launch.program.text]
    assert programs
    for program in programs:
        text = program.text.replace(float_bits(right), float_bits(wrong))
        # What goes into inline assembly is written as an integer.
        text = re.sub(rf"\b{right.view(np.uint32)}\b", str(wrong.view(np.uint32)), text)
        assert fails(operation, program, text)


def without_masks(text: str) -> Iterator[str]:
    """Texts that lack the masks of scores, or of weights, in one part between two labels."""
    masked = re.compile(rf"selp\.[bf]32(\s+%\w+, %\w+), (?:{float_bits(MASKED)}|0f00000000), %p\d+;")
    parts = re.split(r"(?m)^(?=\$)", text)
    for i, part in enumerate(parts):
        if len(masked.findall(part)) >= 8:
            yield "".join([*parts[:i], masked.sub(r"mov.b32\1;", part), *parts[i + 1 :]])


@operations
def test_missing_mask_fails(operation):
    results = [
        fails(operation, launch.program, text)
        for launch in unchanged(operation)
        for text in without_masks(launch.program.text)
    ]
    print(f"{operation}: {sum(results)} of {len(results)} parts without their masks fail")
    assert results and all(results)


def change_of_steps(field: str, by: int) -> Callable[[Callable], Callable]:
    def change(real: Callable) -> Callable:
        def changed(*args, **sizes):
            steps = real(*args, **sizes)
            return steps._replace(**{field: jnp.maximum(getattr(steps, field) + jnp.int32(by), 0)})

        return changed

    return change


def change_of_number(by: int) -> Callable[[Callable], Callable]:
    return lambda real: lambda *args: jnp.maximum(real(*args) + jnp.int32(by), 0)


# Changes of the source: the operation, the module that looks a function up, its name, and the change.
TILES = {
    "prefill_too_few": ("prefill", "flash", "steps_of", change_of_steps("whole", -1)),
    "prefill_too_many": ("prefill", "flash", "steps_of", change_of_steps("whole", 1)),
    "decode_too_few": ("decode", "decode", "cdiv", change_of_number(-1)),
    "decode_too_many": ("decode", "decode", "div", change_of_number(1)),
    "query_gradient_too_few": ("training", "training", "steps_of", change_of_steps("end", -1)),
    "key_gradient_too_few": ("training", "training", "last_tile_of_queries", change_of_number(-1)),
}


@pytest.mark.parametrize(("operation", "module", "name", "change"), TILES.values(), ids=TILES)
def test_wrong_number_of_tiles_fails(operation, module, name, change, monkeypatch):
    forget()
    looked_up_in = importlib.import_module(f"pallas_kernels.triton.{module}")
    monkeypatch.setattr(looked_up_in, name, change(getattr(looked_up_in, name)))
    try:
        error, _ = OPERATIONS[operation]()
    except (Failure, AssertionError):
        error = np.inf
    finally:
        forget()
    assert not error < 1
