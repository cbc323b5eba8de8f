"""PTX as text becomes kernels: their parameters, shared memory and instructions. Knows no meaning of an instruction.

Operands are registers ("%r1"), numbers, addresses, vectors of operands in braces, or names of labels and memory.
"""

import functools
import re
from dataclasses import dataclass
from typing import NamedTuple


class Address(NamedTuple):
    """Memory at a register's value, or at a name, plus a constant."""

    base: str
    offset: int


Operand = str | int | Address | tuple


@dataclass(frozen=True)
class Instruction:
    """One instruction, and the text that it was read from."""

    opcode: str
    operands: tuple[Operand, ...]
    predicate: str | None  # a register
    is_negated: bool
    line: int
    text: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.text}"


@dataclass(frozen=True)
class Kernel:
    """An entry of a module: everything that running it needs but the grid and the arguments."""

    name: str
    alignments: tuple[int, ...]  # of the arrays that its parameters point to
    parameters: tuple[str, ...]
    threads: int
    shared: tuple[str, ...]  # names of the block's shared memory
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]  # index of the instruction that follows
    widths: dict[str, int]  # bits of registers, by the letters of their names; 1 for conditions


class Unreadable(ValueError):
    """PTX that is beyond this parser."""


@functools.lru_cache(maxsize=64)
def parse(text: str) -> Kernel:
    """The kernel of a module with one entry.

    Raises:
        Unreadable: a form that does not occur in the kernels that this was written for.
    """
    code = re.sub(r"//[^\n]*", "", text)
    entry = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)(.*?)\{(.*?)\n\}", code, re.S)
    if entry is None or code.count(".entry") != 1:
        raise Unreadable(f"a module with one entry is needed, this has {code.count('.entry')}")
    name, parameters, directives, body = entry.groups()
    pointers = re.findall(r"\.param \.u64(?: \.ptr (?:\.global )?\.align (\d+))? ([\w$]+)", parameters)
    if len(pointers) != parameters.count(".param"):
        raise Unreadable(f"parameters of {name} that are no pointers: {parameters.strip()}")
    shared = re.findall(r"\.shared \.align \d+ \.b8 ([\w$]+)[\[;]", code[: entry.end()])
    if len(shared) > 1:  # They would have one address.
        raise Unreadable(f"{name} has {len(shared)} arrays of shared memory")
    threads = re.search(r"\.(?:req|max)ntid (\d+)", directives)
    if threads is None:
        raise Unreadable(f"{name} does not say how many threads a block has")
    declared = re.findall(r"\.reg \.(pred|[bsuf]\d+)\s+(%[a-z]+)<", body)
    instructions, labels = _instructions(body, code[: entry.start(4)].count("\n") + 1)
    return Kernel(
        name,
        tuple(int(align or 1) for align, _ in pointers),
        tuple(parameter for _, parameter in pointers),
        int(threads.group(1)),
        tuple(shared),
        instructions,
        labels,
        {name: 1 if kind == "pred" else int(kind[1:]) for kind, name in declared},
    )


def _instructions(body: str, first: int) -> tuple[tuple[Instruction, ...], dict[str, int]]:
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    unfinished, begin = "", first  # An instruction may take several lines.
    for number, line in enumerate(body.split("\n"), first):
        rest = line.strip()
        if not unfinished:
            begin = number
            while label := re.match(r"(\$?[\w$]+):\s*", rest):
                labels[label.group(1)] = len(instructions)
                rest = rest[label.end() :]
            if rest.startswith("."):
                continue  # Declarations of registers, lines of the source.
        *statements, unfinished = f"{unfinished} {rest}".strip().split(";")
        # A block only limits the names of its registers.
        texts = (statement.lstrip("{} ").strip() for statement in statements)
        instructions += [_instruction(text, begin) for text in texts if text and not text.startswith(".reg")]
        begin = number if statements else begin
    if unfinished.strip("} "):
        raise Unreadable(f"line {begin}: an instruction without an end: {unfinished.strip()}")
    return tuple(instructions), labels


def _instruction(statement: str, number: int) -> Instruction:
    try:
        return Instruction(*_parts(statement), number, " ".join(statement.split()))
    except Unreadable as error:
        raise Unreadable(f"line {number}: {error}") from None


@functools.lru_cache(maxsize=100_000)
def _parts(statement: str) -> tuple[str, tuple[Operand, ...], str | None, bool]:
    """Opcode, operands, predicate and whether it is negated; cached, for texts that differ in few statements."""
    match = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", statement, re.S)
    if match is None:
        raise Unreadable(statement)
    negated, predicate, opcode, operands = match.groups()
    return opcode, tuple(_operand(text) for text in _split(operands)), predicate, negated == "!"


def _split(operands: str) -> list[str]:
    """Operands between commas that are in no brackets."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", operands) if part.strip()]


def _operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(_operand(part) for part in _split(text[1:-1]))
    if text.startswith("["):
        address = re.fullmatch(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\d+)\s*)?\]", text)
        if address:
            return Address(address.group(1), int(address.group(2) or 0))
    elif re.fullmatch(r"0[fFdD][0-9a-fA-F]+", text):
        return int(text[2:], 16)
    elif re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        return int(text.removesuffix("U"), 0)
    elif re.fullmatch(r"%?[\w$.]+", text):
        return text
    raise Unreadable(f"operand {text}")
