"""Machine code of a kernel: the loops with matrix products, and how many instructions of a few kinds each has.

Registers and spills do not show everything that makes a kernel slow: masks in the wrong loop, numbers that go through
shared memory, waits between products. Counts do. Knows no kernel.
"""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
LABEL = re.compile(r"^(\.L_x_\d+|\S+):$")


@dataclass(frozen=True)
class Loop:
    """Instructions of an innermost loop with matrix products, the code of its waits included."""

    instructions: int
    mma: int  # matrix products: HMMA, HGMMA, UTCHMMA
    depbar: int  # waits for asynchronous copies and products
    mufu: int  # exponentials and other special functions
    sts: int  # stores to shared memory


@dataclass
class _Block:
    """Instructions without a branch between them."""

    opcodes: list[str]
    targets: list[str]
    falls_through: bool = True


def loops_of(nvdisasm: str, cubin: Path) -> dict[str, tuple[Loop, ...]]:
    """For each kernel in a compiled file, its innermost loops with matrix products, in the order of the code."""
    command = [nvdisasm, "-c", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    sections = re.split(r"^\s*\.section\s+\.text\.([^,\s]+).*$", text, flags=re.M)[1:]
    return {name: tuple(_loops(code)) for name, code in zip(sections[::2], sections[1::2], strict=True)}


def _loops(code: str) -> Iterator[Loop]:
    blocks = _blocks(code)
    names = list(blocks)
    following = dict(zip(names, [*names[1:], None], strict=True))
    successors = {
        name: {target for target in [*block.targets, following[name] if block.falls_through else None] if target}
        & blocks.keys()
        for name, block in blocks.items()
    }
    predecessors: dict[str, set[str]] = {names[0]: set()}
    new = names[:1]
    while new:  # Blocks that cannot be reached have no part in loops.
        name = new.pop()
        for target in successors[name]:
            new += [] if target in predecessors else [target]
            predecessors.setdefault(target, set()).add(name)
    names = [name for name in names if name in predecessors]
    dominators = _dominators(names, predecessors)
    bodies: dict[str, set[str]] = {}  # of natural loops, by their first block
    for name in names:
        for head in successors[name] & dominators[name]:
            body, new = bodies.setdefault(head, {head}), [name]
            while new:
                if (block := new.pop()) not in body:
                    body.add(block)
                    new += predecessors[block]
    counted = {head: _count(blocks, body) for head, body in bodies.items()}
    products = {head: bodies[head] for head, loop in counted.items() if loop.mma}
    for head in names:
        if head in products and not any(body < products[head] for body in products.values()):
            yield counted[head]


def _blocks(code: str) -> dict[str, _Block]:
    """Basic blocks by name, in their order."""
    blocks = {"begin": _Block([], [])}
    block = blocks["begin"]
    for line in code.splitlines():
        if label := LABEL.match(line.strip()):
            block = blocks.setdefault(label.group(1), _Block([], []))
        elif instruction := INSTRUCTION.search(line):
            predicate, opcode, operands = instruction.groups()
            block.opcodes.append(opcode)
            # A far jump is `CALL.REL.NOINC`; a function that it calls has a name of its own.
            target = re.search(r"`\((\.L_x_\d+)\)", operands) if opcode.startswith(("BRA", "CALL")) else None
            if target is None and opcode.partition(".")[0] not in ("EXIT", "RET", "BRA", "BRX"):
                continue
            block.targets += [target.group(1)] if target else []
            # `BRA.U UP0, ...` has its condition among the operands.
            is_conditional = predicate is not None or opcode.startswith("CALL")
            block.falls_through = is_conditional or (target is not None and not operands.startswith("`("))
            block = blocks.setdefault(f"{len(blocks)}", _Block([], []))
    return blocks


def _dominators(names: list[str], predecessors: dict[str, set[str]]) -> dict[str, set[str]]:
    """For each block, the blocks that every path to it passes."""
    found = {name: set(names) for name in names}
    found[names[0]] = {names[0]}
    changed = True
    while changed:
        changed = False
        for name in names[1:]:
            new = set.intersection(*(found[other] for other in predecessors[name])) | {name}
            changed |= new != found[name]
            found[name] = new
    return found


def _count(blocks: dict[str, _Block], body: set[str]) -> Loop:
    opcodes = [opcode for name in body for opcode in blocks[name].opcodes]

    def having(*parts: str) -> int:
        return sum(any(part in opcode.partition(".")[0] for part in parts) for opcode in opcodes)

    waits = sum("DEPBAR" in opcode for opcode in opcodes)
    return Loop(len(opcodes), having("MMA"), waits, having("MUFU"), having("STS"))
