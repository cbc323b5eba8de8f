"""Blocks of threads that execute a kernel: registers are vectors over the lanes of a block. Knows no opcode but jumps.

Lanes run in step. Where they diverge, those that are furthest behind run first, until they meet again. A register that
no lane has written is an error; if only other lanes have, it is zero.
"""

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tests.ptx.memory import SHARED, Fault, Global, Shared
from tests.ptx.opcodes import BITS, PRED, TABLE, WARP
from tests.ptx.parse import Address, Instruction, Kernel, Operand

# More instructions than any launch of a test: a loop that does not end.
MOST_STEPS = 10_000_000


class Failure(Exception):
    """A launch that a GPU would run with undefined results: the instruction, the lane, and the reason."""

    def __init__(self, kernel: Kernel, block: tuple[int, ...], instruction: Instruction, fault: Fault) -> None:
        self.reason, self.instruction, self.lane = fault.reason, instruction, fault.lane
        super().__init__(f"{kernel.name}, block {block}, lane {fault.lane}, {instruction}: {fault.reason}")


@dataclass(frozen=True)
class Run:
    """What a launch computed, and how often its warps executed each instruction."""

    outputs: list[np.ndarray]
    executed: Counter[Instruction]

    def count(self, opcode: str = "") -> int:
        """Instructions that warps executed, those whose opcode begins so."""
        return sum(count for each, count in self.executed.items() if each.opcode.startswith(opcode))


def run(
    kernel: Kernel,
    grid: tuple[int, ...],
    shared: int,
    inputs: list[np.ndarray],
    outputs: list[tuple[tuple[int, ...], np.dtype]],
) -> Run:
    """Execute all blocks of a launch; the arguments are the inputs, then the outputs, by shape and type.

    Raises:
        Failure: undefined behaviour.
        NotImplementedError: an instruction that has no row in the table.
    """
    lacking = sorted({each.opcode for each in kernel.instructions} - TABLE.keys() - Block.JUMPS.keys())
    if lacking:
        raise NotImplementedError(f"no row of the table for {', '.join(lacking)}")
    memory = Global(inputs, outputs, kernel.alignments)
    executed: Counter[int] = Counter()
    with np.errstate(all="ignore"):
        for number, at in enumerate(np.ndindex(*reversed(grid))):
            Block(kernel, grid, tuple(reversed(at)), number, shared, memory, executed).run()
    return Run(memory.outputs(), Counter({kernel.instructions[index]: n for index, n in executed.items()}))


class Block:
    """One block: registers `[lane]`, shared memory, and where its lanes are."""

    JUMPS: ClassVar = {"bra": "_branch", "bra.uni": "_branch", "bar.sync": "_barrier", "ret": "_exit"}

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, ...],
        at: tuple[int, ...],
        number: int,
        shared: int,
        memory: Global,
        executed: Counter[int],
    ) -> None:
        self.kernel, self.at, self.number, self.memory, self.executed = kernel, at, number, memory, executed
        self.lanes = kernel.threads
        self.warps = kernel.threads // WARP
        self.shared = Shared(shared, kernel.threads)
        # Triton adds pointers that it does not use: null.
        self.parameters = dict.fromkeys(kernel.parameters, 0)
        self.parameters.update(zip(kernel.parameters, memory.addresses, strict=False))
        axes = zip("xyz", (*at, 0, 0)[:3], (*grid, 1, 1)[:3], strict=True)
        special = {"%tid.x": np.arange(self.lanes, dtype=np.uint32), "%laneid": np.arange(self.lanes) % WARP}
        special |= {name: 0 for name in ("%tid.y", "%tid.z")} | {"%ntid.x": self.lanes}
        for axis, index, size in axes:
            special |= {f"%ctaid.{axis}": index, f"%nctaid.{axis}": size}
        self.registers = {
            name: np.broadcast_to(np.asarray(value, np.uint32), self.lanes).copy() for name, value in special.items()
        }
        self.constants: dict[tuple[int, str], np.ndarray] = {}
        self.all = np.ones(self.lanes, bool)
        self.waiting: dict[int, np.ndarray] = {}
        # By the next instruction.
        self.groups: dict[int, np.ndarray] = {}

    # What the table's rows use.

    def full(self, value: int, dtype: np.dtype) -> np.ndarray:
        """A number as a vector of bits."""
        key = value, dtype.str
        if key not in self.constants:
            bits = value & ((1 << 8 * dtype.itemsize) - 1)
            self.constants[key] = np.full(self.lanes, bits, BITS[8 * dtype.itemsize]).view(dtype)
        return self.constants[key]

    def dtype(self, register: str) -> np.dtype:
        """The type of a register's bits, as it was declared."""
        return BITS[self.kernel.widths[register.rstrip("0123456789")]]

    def read(self, operand: Operand, dtype: np.dtype) -> np.ndarray:
        """The values of an operand."""
        if isinstance(operand, int):
            return np.full(self.lanes, bool(operand)) if dtype == PRED else self.full(operand, dtype)
        if operand in self.kernel.shared:
            return self.full(SHARED, dtype)
        if operand not in self.registers:
            raise Fault(f"reads {operand}, which has no value", 0)
        bits = self.registers[operand]
        if bits.dtype.itemsize != dtype.itemsize:
            raise Fault(f"reads {operand}, which has {bits.dtype.itemsize} bytes, as {dtype}", 0)
        return bits.view(dtype)

    def write(self, register: str, values: np.ndarray, lanes: np.ndarray) -> None:
        """Set a register of some lanes."""
        bits = values if values.dtype == bool else values.view(BITS[8 * values.dtype.itemsize])
        if lanes is not self.all:
            bits = np.where(lanes, bits, self.registers.get(register, np.zeros_like(bits)))
        self.registers[register] = bits

    def address(self, operand: Address) -> np.ndarray:
        """Addresses `[lane]` of 64 bits; shared memory has addresses of 32 bits too."""
        if operand.base in self.kernel.shared:
            base = self.full(SHARED, BITS[64])
        elif operand.base in self.registers:
            base = self.registers[operand.base].astype(np.uint64)
        else:
            raise Fault(f"uses {operand.base}, which has no value", 0)
        return base + self.full(operand.offset, BITS[64])

    def need_whole_warps(self, lanes: np.ndarray) -> None:
        """Refuse an instruction of a warp that some of its lanes do not execute."""
        if lanes is not self.all:
            active = lanes.reshape(-1, WARP).sum(1)
            broken = (active > 0) & (active < WARP)
            if broken.any():
                raise Fault("needs all lanes of a warp", int(np.argmax(broken)) * WARP)

    # Control flow.

    def run(self) -> None:
        """Execute until all lanes have returned."""
        instructions, executed = self.kernel.instructions, self.executed
        self.groups = {0: self.all}
        steps = 0
        while self.groups:
            index = min(self.groups)
            lanes = self.groups.pop(index)
            lanes = self.all if lanes.all() else lanes
            running = True
            while running:
                if index in self.groups:
                    lanes = lanes | self.groups.pop(index)
                    lanes = self.all if lanes.all() else lanes
                instruction = instructions[index]
                opcode = instruction.opcode
                steps += 1
                executed[index] += self.warps if lanes is self.all else int(lanes.reshape(-1, WARP).any(1).sum())
                try:
                    active = self._active(instruction, lanes)
                    if opcode in self.JUMPS:
                        getattr(self, self.JUMPS[opcode])(instruction, index, active, lanes)
                        running = False
                    elif active is self.all or active.any():
                        TABLE[opcode](self, instruction, active)
                    if steps > MOST_STEPS:
                        raise Fault("a loop without an end", int(np.argmax(lanes)))
                except Fault as fault:
                    raise Failure(self.kernel, self.at, instruction, fault) from None
                index += 1

    def _active(self, instruction: Instruction, lanes: np.ndarray) -> np.ndarray:
        if instruction.predicate is None:
            return lanes
        condition = self.read(instruction.predicate, PRED)
        active = lanes & (~condition if instruction.is_negated else condition)
        return self.all if active.all() else active

    def _go(self, index: int, lanes: np.ndarray) -> None:
        if lanes.any():
            self.groups[index] = self.groups[index] | lanes if index in self.groups else lanes

    def _branch(self, instruction: Instruction, index: int, active: np.ndarray, lanes: np.ndarray) -> None:
        (target,) = instruction.operands
        self._go(self.kernel.labels[target], active)
        self._go(index + 1, lanes & ~active)

    def _barrier(self, instruction: Instruction, index: int, active: np.ndarray, lanes: np.ndarray) -> None:
        self.need_whole_warps(active)
        self._go(index + 1, lanes & ~active)
        if instruction.operands != (0,):
            raise Fault("is known for the barrier 0 of all lanes only", int(np.argmax(active)))
        self.waiting[index + 1] = self.waiting.get(index + 1, ~self.all) | active
        self._pass_barrier()

    def _exit(self, instruction: Instruction, index: int, active: np.ndarray, lanes: np.ndarray) -> None:
        self._go(index + 1, lanes & ~active)
        self._pass_barrier()

    def _pass_barrier(self) -> None:
        """All lanes that have not returned wait: they go on."""
        if not self.groups and self.waiting:
            self.shared.barrier()
            self.groups, self.waiting = self.waiting, {}
