"""Blocks of threads that execute a kernel: registers are vectors over lanes. Knows no opcode but control flow.

Many blocks run in one batch, so that an instruction is one operation of NumPy for all of them. The lanes of a batch
advance together. Where they diverge, the lanes that are furthest behind in the program run first, until they meet the
others. A register that no lane of a block has written is an error; if only other lanes of the block have, it is zero.
"""

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tests.ptx.memory import MOST_BARRIERS, SHARED, Fault, Global, Shared
from tests.ptx.opcodes import BITS, PRED, TABLE, WARP
from tests.ptx.parse import Address, Instruction, Kernel, Operand

# More instructions than any launch of a test executes: beyond that, it is in an endless loop.
MOST_STEPS = 10_000_000
assert MOST_STEPS <= MOST_BARRIERS
# Lanes of a batch: more would not fit into the CPU's caches.
MOST_LANES = 4096


class Failure(Exception):
    """A launch with undefined behavior: the instruction, the lane, and the reason."""

    def __init__(self, kernel: Kernel, block: tuple[int, ...], instruction: Instruction, fault: Fault) -> None:
        self.reason, self.instruction, self.lane = fault.reason, instruction, fault.lane
        super().__init__(f"{kernel.name}, block {block}, lane {fault.lane}, {instruction}: {fault.reason}")


@dataclass(frozen=True)
class Run:
    """The outputs of a launch, and how often its warps executed each instruction."""

    outputs: list[np.ndarray]
    executed: Counter[Instruction]

    def count(self, opcode: str = "") -> int:
        """Number of instructions that warps executed, of those whose opcode starts with `opcode`."""
        return sum(count for each, count in self.executed.items() if each.opcode.startswith(opcode))


def run(
    kernel: Kernel,
    grid: tuple[int, ...],
    shared: int,
    inputs: list[np.ndarray],
    outputs: list[tuple[tuple[int, ...], np.dtype]],
    before: list[np.ndarray] | None = None,
) -> Run:
    """Execute all blocks of a launch.

    Args:
        kernel: the program.
        grid: number of blocks along each axis, x first.
        shared: bytes of shared memory of each block.
        inputs: the first arguments.
        outputs: shape and type of the other arguments, which the kernel writes.
        before: what the outputs contain where the kernel does not write; None: NaN.

    Raises:
        Failure: undefined behavior.
        NotImplementedError: an instruction that has no row in the table.
    """
    missing = sorted({each.opcode for each in kernel.instructions} - TABLE.keys() - Batch.CONTROL_FLOW.keys())
    if missing:
        raise NotImplementedError(f"no row of the table for {', '.join(missing)}")
    memory = Global(inputs, outputs, kernel.alignments, before)
    executed: Counter[int] = Counter()
    blocks = [tuple(reversed(at)) for at in np.ndindex(*reversed(grid))]
    size = max(1, MOST_LANES // kernel.threads)
    with np.errstate(all="ignore"):
        for first in range(0, len(blocks), size):
            Batch(kernel, grid, blocks[first : first + size], first, shared, memory, executed).run()
    return Run(memory.outputs(), Counter({kernel.instructions[index]: n for index, n in executed.items()}))


class Batch:
    """Some blocks of a launch: registers `[lane]`, shared memory, and the next instruction of each lane.

    Lanes are numbered through: lane `i` of block `b` is `b * threads + i`. A set of lanes is a mask `[lane]`; where it
    has all lanes, it is the object `all`.
    """

    CONTROL_FLOW: ClassVar = {"bra": "_branch", "bra.uni": "_branch", "bar.sync": "_barrier", "ret": "_exit"}

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, ...],
        blocks: list[tuple[int, ...]],
        first: int,
        shared: int,
        memory: Global,
        executed: Counter[int],
    ) -> None:
        self.kernel, self.blocks, self.memory, self.executed = kernel, blocks, memory, executed
        self.lanes = len(blocks) * kernel.threads
        self.warps = self.lanes // WARP
        self.lane = np.arange(self.lanes)
        self.block = first + self.lane // kernel.threads  # [lane]
        self.shared = Shared(shared, kernel.threads, len(blocks))
        # Triton adds pointers that its kernels do not use: null.
        self.parameters = dict.fromkeys(kernel.parameters, 0)
        self.parameters.update(zip(kernel.parameters, memory.addresses, strict=False))
        special = {"%tid.x": self.lane % kernel.threads, "%laneid": self.lane % WARP, "%ntid.x": kernel.threads}
        special |= {name: 0 for name in ("%tid.y", "%tid.z")}
        for axis, name in enumerate("xyz"):
            of_blocks = [at[axis] if axis < len(at) else 0 for at in blocks]
            special[f"%ctaid.{name}"] = np.repeat(of_blocks, kernel.threads)
            special[f"%nctaid.{name}"] = grid[axis] if axis < len(grid) else 1
        self.registers = {
            name: np.broadcast_to(np.asarray(value, np.uint32), self.lanes).copy() for name, value in special.items()
        }
        # Blocks that have written a register, where not all have: sets of blocks are the bits of a number.
        self.partial: dict[str, int] = {}
        self.constants: dict[tuple[int, str], np.ndarray] = {}
        # The lanes that execute the current instruction, and their blocks.
        self.all = self.active = np.ones(self.lanes, bool)
        self.active_blocks = self._blocks_of(self.all)
        # Number of the barrier that each lane waits at, or waited at last.
        self.barrier = np.zeros(self.lanes, np.uint32)
        # Masks by the index of the instruction that follows.
        self.waiting: dict[int, np.ndarray] = {}
        self.groups: dict[int, np.ndarray] = {}

    # Used by the rows of the table.

    def full(self, value: int, dtype: np.dtype) -> np.ndarray:
        """A vector of one number, given by its bits."""
        key = value, dtype.str
        if key not in self.constants:
            bits = value & ((1 << 8 * dtype.itemsize) - 1)
            self.constants[key] = np.full(self.lanes, bits, BITS[8 * dtype.itemsize]).view(dtype)
        return self.constants[key]

    def dtype(self, register: str) -> np.dtype:
        """The type of a register's bits, as declared."""
        return BITS[self._width(register)]

    def is_condition(self, operand: Operand) -> bool:
        """Whether an operand is a predicate register."""
        return isinstance(operand, str) and self._width(operand) == 1

    def _width(self, register: str) -> int:
        return self.kernel.widths[register.rstrip("0123456789")]

    def read(self, operand: Operand, dtype: np.dtype) -> np.ndarray:
        """The values of an operand."""
        if isinstance(operand, int):
            return np.full(self.lanes, bool(operand)) if dtype == PRED else self.full(operand, dtype)
        if operand in self.kernel.shared:
            return self.full(SHARED, dtype)
        bits = self._bits(operand)
        if bits.dtype.itemsize != dtype.itemsize:
            raise Fault(f"reads {operand}, which has {bits.dtype.itemsize} bytes, as {dtype}", self.first_active())
        return bits.view(dtype)

    def _bits(self, register: str) -> np.ndarray:
        if register not in self.registers:
            raise Fault(f"reads {register}, which has no value", self.first_active())
        if register in self.partial and (missing := self.active_blocks & ~self.partial[register]):
            block = (missing & -missing).bit_length() - 1
            lane = int(np.argmax(self.active & (self.lane // self.kernel.threads == block)))
            raise Fault(f"reads {register}, which has no value", lane)
        return self.registers[register]

    def write(self, register: str, values: np.ndarray, lanes: np.ndarray) -> None:
        """Set a register of some lanes."""
        bits = values if values.dtype == bool else values.view(BITS[8 * values.dtype.itemsize])
        if lanes is not self.all:
            old = self.registers.get(register)
            if old is None:
                self.partial[register] = self.active_blocks
            elif register in self.partial:
                self.partial[register] |= self.active_blocks
            bits = np.where(lanes, bits, bits.dtype.type(0) if old is None else old)
        elif register in self.partial:
            del self.partial[register]
        self.registers[register] = bits

    def address(self, operand: Address) -> np.ndarray:
        """Addresses `[lane]` of 64 bits; shared memory has addresses of 32 bits too."""
        if operand.base in self.kernel.shared:
            return self.full(SHARED + operand.offset, BITS[64])
        base = self._bits(operand.base).astype(np.uint64, copy=False)
        return base + self.full(operand.offset, BITS[64]) if operand.offset else base

    def need_whole_warps(self, lanes: np.ndarray) -> None:
        """Refuse an instruction of a warp that some of its lanes do not execute."""
        if lanes is not self.all:
            of_warps = lanes.reshape(-1, WARP)
            broken = of_warps.any(1) & ~of_warps.all(1)
            if broken.any():
                raise Fault("needs all lanes of a warp", int(np.argmax(broken)) * WARP)

    def first_active(self) -> int:
        """A lane that executes the current instruction."""
        return int(np.argmax(self.active))

    # Control flow.

    def run(self) -> None:
        """Execute until all lanes have returned."""
        instructions, executed, steps = self.kernel.instructions, self.executed, 0
        self.groups = {0: self.all}
        while self.groups:
            index = min(self.groups)
            lanes, warps, blocks = None, 0, 0
            is_running = True
            while is_running:
                if index in self.groups:
                    joining = self.groups.pop(index)
                    lanes = joining if lanes is None else lanes | joining
                    lanes = self.all if lanes.all() else lanes
                    warps, blocks = int(lanes.reshape(-1, WARP).any(1).sum()), self._blocks_of(lanes)
                assert lanes is not None
                instruction = instructions[index]
                opcode = instruction.opcode
                steps += 1
                executed[index] += warps
                try:
                    self.active, self.active_blocks = lanes, blocks
                    active = self._active(instruction, lanes)
                    if opcode in self.CONTROL_FLOW:
                        getattr(self, self.CONTROL_FLOW[opcode])(instruction, index, active, lanes)
                        is_running = False
                    elif active is self.all or active.any():
                        TABLE[opcode](self, instruction, active)
                    if steps > MOST_STEPS:
                        raise Fault("a loop without an end", int(np.argmax(lanes)))
                except Fault as fault:
                    raise self._failure(instruction, fault) from None
                index += 1
            if not self.groups and self.waiting:
                try:
                    self._pass_barrier()
                except Fault as fault:
                    raise self._failure(instruction, fault) from None

    def _failure(self, instruction: Instruction, fault: Fault) -> Failure:
        block, fault.lane = divmod(fault.lane, self.kernel.threads)
        return Failure(self.kernel, self.blocks[block], instruction, fault)

    def _active(self, instruction: Instruction, lanes: np.ndarray) -> np.ndarray:
        if instruction.predicate is None:
            return lanes
        condition = self.read(instruction.predicate, PRED)
        active = lanes & (~condition if instruction.is_negated else condition)
        if active.all():
            active = self.all
        self.active, self.active_blocks = active, self._blocks_of(active)
        return active

    def _blocks_of(self, lanes: np.ndarray) -> int:
        """The set of blocks that have one of these lanes."""
        has_lanes = lanes.reshape(-1, self.kernel.threads).any(1)
        return int.from_bytes(np.packbits(has_lanes, bitorder="little").tobytes(), "little")

    def _continue_at(self, index: int, lanes: np.ndarray) -> None:
        if lanes.any():
            self.groups[index] = self.groups[index] | lanes if index in self.groups else lanes

    def _branch(self, instruction: Instruction, index: int, active: np.ndarray, lanes: np.ndarray) -> None:
        (target,) = instruction.operands
        self._continue_at(self.kernel.labels[target], active)
        self._continue_at(index + 1, lanes & ~active)

    def _barrier(self, instruction: Instruction, index: int, active: np.ndarray, lanes: np.ndarray) -> None:
        self.need_whole_warps(active)
        number, *count = instruction.operands
        if count not in ([], [self.kernel.threads]):
            raise Fault("only a barrier of all lanes is supported", self.first_active())
        self.barrier[active] = self.read(number, BITS[32])[active]
        self._continue_at(index + 1, lanes & ~active)
        self.waiting[index + 1] = self.waiting.get(index + 1, ~self.all) | active

    def _exit(self, instruction: Instruction, index: int, active: np.ndarray, lanes: np.ndarray) -> None:
        self.shared.need_no_copies(active)
        self._continue_at(index + 1, lanes & ~active)

    def _pass_barrier(self) -> None:
        """No lane can run: release the blocks that wait at the earliest barrier, wherever their other lanes wait.

        Blocks at a later barrier stay there until those behind have reached it too, and so run in step with them.
        """
        first = self.waiting[min(self.waiting)].reshape(-1, self.kernel.threads).any(1)
        released = np.repeat(first, self.kernel.threads)
        numbers = self.barrier.reshape(-1, self.kernel.threads)
        if (differ := released & (numbers != numbers[:, :1]).ravel()).any():
            raise Fault("waits at another barrier than the block's first lane", int(np.argmax(differ)))
        self.shared.barrier(released)
        for index, lanes in list(self.waiting.items()):
            self._continue_at(index, lanes & released)
            if (lanes & ~released).any():
                self.waiting[index] = lanes & ~released
            else:
                del self.waiting[index]
