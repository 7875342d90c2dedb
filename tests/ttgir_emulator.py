"""Runs fastlora's Gluon kernel as Triton has compiled it for a GPU, without one, from its TTGIR.

The source alone is not enough: the compiler decides which variables a loop carries. TTGIR is the last form in
which barriers, TMA copies and products are single operations; its text is parsed and run on float32 arrays.

Each asynchronous operation happens at the moment that is worst for the kernel. A TMA load spoils its slot as
soon as it is issued and writes it much later; the slots of a product and the buffer of a TMA store must stay
as they are until these are waited for. Shared memory begins as NaN. Partitions take turns in a random order,
and if none can go on, :class:`Deadlock` is raised.
"""

import math
import operator
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

Steps = Iterator[bool]  # of a partition: whether it could take its next step


class Deadlock(RuntimeError):
    """Every partition waits for a barrier that nothing completes."""


# --- The text ---------------------------------------------------------------------------------------------


@dataclass
class Op:
    """One operation: ``%a, %b = name <text>``, with the blocks that belong to it."""

    results: list[str]
    name: str
    text: str
    blocks: dict[str, "Block"] = field(default_factory=dict)

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%[\w#]+", re.split(r" : | \{", self.text)[0])

    def number(self, attribute: str) -> int:
        return int(re.search(rf"{attribute} = (-?\d+)", self.text).group(1))

    def shape(self) -> tuple[int, ...]:
        """That of the last type, the result's."""
        return tuple(map(int, re.findall(r"(?:tensor|memdesc)<((?:\d+x)+)", self.text)[-1][:-1].split("x")))


@dataclass
class Block:
    arguments: list[str]
    ops: list[Op]


def parse(text: str) -> tuple[dict[str, str], list[Op]]:
    """The kernel's arguments with their types, and its operations."""
    text = re.sub(r' loc\((?:#loc\d*|unknown|"[^"]*"(?:\(#loc\d*\))?|callsite[^)]*\))\)', "", text)
    lines = iter(line.strip() for line in text.splitlines() if line.strip())
    header = next(line for line in lines if line.startswith("tt.func"))
    return dict(re.findall(r"(%\w+): ([^%]+)[,)]", header)), _ops(lines)


def _ops(lines: Iterator[str]) -> list[Op]:
    """The operations up to the end of a block."""
    ops: list[Op] = []
    for line in lines:
        if line.startswith("}"):
            break
        left, right = line.split(" = ", 1) if line.startswith("%") else ("", line)
        name = re.match(r"[\w.]+", right).group()
        op = Op(re.findall(r"%\w+", left), name, right[len(name) :])
        if name == "ttg.warp_specialize":
            for head in lines:
                # The line that ends the last block has the types of all.
                ends: list[str] = []
                inner = _ops(_noting_ends(lines, ends))
                op.blocks[re.match(r"\w+", head).group()] = Block(re.findall(r"(%\w+):", head), inner)
                if ends[-1] != "}":
                    break
        elif right.endswith("{"):
            op.blocks["body"] = Block([], _ops(lines))
        ops.append(op)
    return ops


def _noting_ends(lines: Iterator[str], ends: list[str]) -> Iterator[str]:
    for line in lines:
        if line.startswith("}"):
            ends.append(line)
        yield line


# --- What it runs on --------------------------------------------------------------------------------------


class Barrier:
    """An mbarrier: its phase ends when its arrivals and the bytes that it expects are in."""

    def __init__(self):
        self.count = self._arrivals = self._bytes = self._phase = 0

    def arrive(self, expected=0):
        self._arrivals += 1
        self._bytes += expected
        assert self._arrivals <= self.count, "more arrivals in one phase than the barrier counts"
        self._advance()

    def complete(self, transferred):
        self._bytes -= transferred
        self._advance()

    def is_past(self, parity):
        """Whether the phase of this parity has ended; that before the first one has the parity 1."""
        return (self._phase - 1) % 2 == parity

    def _advance(self):
        if self._arrivals == self.count and self._bytes == 0:
            self._arrivals, self._phase = 0, self._phase + 1


class Memory:
    """A slot or buffer of shared memory, how often it was written, and who has to fence its writes."""

    def __init__(self, shape):
        self.array = np.full(shape, np.nan, dtype=np.float32)
        self.version = 0
        self.unfenced = set()

    def write(self, value):
        self.array[...] = value
        self.version += 1


@dataclass
class View:
    """A part of a slot."""

    memory: Memory
    array: np.ndarray


class Reading:
    """Views that something asynchronous reads between now and the end of its wait."""

    def __init__(self, *views):
        self._views = views
        self._versions = [view.memory.version for view in views]

    def arrays(self):
        now = [view.memory.version for view in self._views]
        assert now == self._versions, "shared memory was written while a product or a TMA store read it"
        return [view.array for view in self._views]


class Accumulator:
    """An array in registers with products that have not been waited for."""

    def __init__(self, value, pending=()):
        self.value, self.pending = value, tuple(pending)

    def finish(self, outstanding):
        value, pending = self.value, list(self.pending)
        while len(pending) > outstanding:
            a, b = pending.pop(0).arrays()
            value = value + a @ b
        return Accumulator(value, pending)


@dataclass
class Descriptor:
    """A TMA descriptor: blocks of a matrix, which is 0 outside for reads and ignores writes there."""

    matrix: np.ndarray
    shape: tuple[int, ...]

    def read(self, coordinates):
        block = np.zeros(self.shape, dtype=np.float32)
        outer, inner = self._overlap(coordinates)
        block[inner] = self.matrix[outer]
        return block

    def write(self, coordinates, block):
        outer, inner = self._overlap(coordinates)
        self.matrix[outer] = block[inner]

    def _overlap(self, coordinates):
        """Where the block lies in the matrix, and the same part of it in the block."""
        axes = zip(coordinates, self.shape, self.matrix.shape, strict=True)
        outer = [slice(start, min(start + size, limit)) for start, size, limit in axes]
        return tuple(outer), tuple(slice(0, max(s.stop - s.start, 0)) for s in outer)


@dataclass
class Pointer:
    """The first element of an array, or elements at offsets from it."""

    array: np.ndarray
    offsets: Any = 0


# --- The machine ------------------------------------------------------------------------------------------


def _plain(value):
    """An operand that an ordinary operation may read."""
    if isinstance(value, Accumulator):
        assert not value.pending, "an accumulator was read before its products had finished"
        return value.value
    return value


def _rounded(array, op):
    dtype = torch.bfloat16 if "bf16" in op.text.rpartition(" to ")[2] else torch.float16
    return torch.from_numpy(np.ascontiguousarray(array)).to(dtype).float().numpy()


def _constant(op):
    text = op.text.strip()
    if text.startswith("dense<"):
        return np.full(op.shape(), float(re.match(r"dense<([^>]+)>", text).group(1)), dtype=np.float32)
    return {"true": True, "false": False}[text] if text in ("true", "false") else int(text.split()[0])


def _compare(op, a, b):
    kinds = {"eq": operator.eq, "ne": operator.ne, "slt": operator.lt, "sgt": operator.gt}
    return kinds[op.text.split(",")[0].strip()](a, b)


def _divide(a, b):
    assert a >= 0 < b, "C rounds a negative quotient otherwise than Python"
    return a // b


def _order(op):
    return tuple(map(int, re.search(r"array<i32: ([^>]+)>", op.text).group(1).split(",")))


# Operations on numbers and arrays, which take the operation and its operands' values.
PLAIN: dict[str, Callable] = {
    "arith.constant": _constant,
    "arith.addi": lambda op, a, b: a + b,
    "arith.subi": lambda op, a, b: a - b,
    "arith.muli": lambda op, a, b: a * b,
    "arith.divsi": lambda op, a, b: _divide(a, b),
    "arith.remsi": lambda op, a, b: a - b * _divide(a, b),
    "arith.minsi": lambda op, a, b: min(a, b),
    "arith.xori": lambda op, a, b: a ^ b,
    "arith.andi": lambda op, a, b: a & b,
    "arith.cmpi": _compare,
    "arith.select": lambda op, condition, a, b: a if condition else b,
    "arith.addf": lambda op, a, b: a + b,
    "arith.mulf": lambda op, a, b: a * b,
    "arith.extf": lambda op, a: a,
    "arith.truncf": lambda op, a: _rounded(a, op),
    "tt.make_range": lambda op: np.arange(op.number("start"), op.number("end")),
    "tt.splat": lambda op, a: a if isinstance(a, Pointer) else np.full(op.shape(), a),
    "tt.addptr": lambda op, pointer, offsets: Pointer(pointer.array, pointer.offsets + offsets),
    "tt.load": lambda op, p, mask, other: np.where(
        mask, p.array[np.minimum(p.offsets, len(p.array) - 1)], other
    ),
    "tt.expand_dims": lambda op, a: np.expand_dims(a, op.number("axis")),
    "tt.broadcast": lambda op, a: np.broadcast_to(a, op.shape()),
    "tt.reshape": lambda op, a: a.reshape(op.shape()),
    "tt.trans": lambda op, a: a.transpose(_order(op)),
    "tt.split": lambda op, a: (a[..., 0], a[..., 1]),
    "ttg.convert_layout": lambda op, a: a,
    "ttg.memdesc_trans": lambda op, view: View(view.memory, view.array.transpose(_order(op))),
}


class Machine:
    """One program of the grid."""

    def __init__(self, program, programs, rng):
        self._program, self._programs, self._rng = program, programs, rng
        self._buffers = []  # shared memory
        self._loads = []  # TMA loads on their way
        self._stores = {}  # TMA stores of each partition that have not been waited for

    def run(self, ops, values):
        for _ in self._run(ops, dict(values), "main"):
            pass

    def _run(self, ops: list[Op], values: dict[str, Any], partition: str) -> Steps:
        """Take the block's steps; returns what it yields to its loop."""
        for op in ops:
            if op.name == "scf.yield":
                return [values[name] for name in op.operands]
            if op.name in ("ttg.warp_yield", "ttg.warp_return", "tt.return"):
                return []
            if op.name == "scf.for":
                yield from self._loop(op, values, partition)
            elif op.name == "ttg.warp_specialize":
                self._specialize(op, values)
            elif op.name == "ttng.wait_barrier":
                barrier, parity, needed = (values[name] for name in op.operands)
                while needed and not barrier.is_past(parity):
                    yield False
            else:
                operands = [values[name] for name in op.operands]
                if op.name in PLAIN:
                    result = PLAIN[op.name](op, *map(_plain, operands))
                else:
                    result = getattr(self, op.name.replace(".", "_"))(op, partition, *operands)
                values.update(zip(op.results, result if len(op.results) > 1 else [result], strict=False))
            yield True
        return []

    def _loop(self, op: Op, values: dict[str, Any], partition: str) -> Steps:
        counter, start, stop, step = re.match(
            r" (%\w+) = (%[\w#]+) to (%[\w#]+) step (%[\w#]+)", op.text
        ).groups()
        initial = re.search(r"iter_args\(([^)]*)\)", op.text)
        pairs = re.findall(r"(%\w+) = (%[\w#]+)", initial.group(1)) if initial else []
        carried = [values[value] for _, value in pairs]
        for i in range(values[start], values[stop], values[step]):
            inner = {**values, counter: i, **{name: v for (name, _), v in zip(pairs, carried, strict=True)}}
            carried = yield from self._run(op.blocks["body"].ops, inner, partition)
        if len(carried) == 1:
            values[op.results[0]] = carried[0]
        else:
            values.update({f"{op.results[0]}#{i}": value for i, value in enumerate(carried)})

    def _specialize(self, op: Op, values: dict[str, Any]) -> None:
        """Run the partitions, some steps of one and then of another, until all have ended."""
        captured = [values[name] for name in op.operands]
        live = {}
        for name, block in op.blocks.items():
            own = dict(values) if name == "default" else dict(zip(block.arguments, captured, strict=True))
            live[name] = self._run(block.ops, own, name)
        while live:
            moved = False
            for name in self._rng.sample(list(live), len(live)):
                for _ in range(self._rng.choice((1, 5, 40, 400))):
                    moves = next(live[name], None)
                    if moves is None:
                        del live[name]
                    if not moves:
                        moved |= moves is None
                        break
                    moved = True
                while self._loads and self._rng.random() < 0.4:
                    self._deliver(self._rng.randrange(len(self._loads)))
                    moved = True
            if not moved:
                if not self._loads:
                    raise Deadlock(f"{', '.join(live)} of program {self._program}")
                self._deliver(0)

    def _deliver(self, which):
        memory, block, barrier, size = self._loads.pop(which)
        memory.write(block)
        barrier.complete(size)

    # Each method below is the operation of its name.

    def tt_get_program_id(self, op, partition):
        return self._program

    def tt_get_num_programs(self, op, partition):
        return self._programs

    def ttg_local_alloc(self, op, partition):
        count, *shape = op.shape()
        if "xi64" in op.text:
            return [Barrier() for _ in range(count)]
        allocation = [Memory(shape) for _ in range(count)]
        self._buffers += allocation
        return allocation

    def ttg_memdesc_index(self, op, partition, allocation, i):
        item = allocation[i]
        return View(item, item.array) if isinstance(item, Memory) else item

    def ttg_memdesc_subslice(self, op, partition, view):
        starts = map(int, re.search(r"\[([^\]]+)\]", op.text).group(1).split(","))
        place = tuple(slice(start, start + size) for start, size in zip(starts, op.shape(), strict=True))
        return View(view.memory, view.array[place])

    def ttg_local_store(self, op, partition, value, view):
        view.memory.write(_plain(value))
        view.memory.unfenced.add(partition)

    def ttng_init_barrier(self, op, partition, barrier):
        barrier.count = int(re.search(r", (\d+)", op.text).group(1))

    def ttng_arrive_barrier(self, op, partition, barrier, needed):
        if needed:
            barrier.arrive()

    def ttng_barrier_expect(self, op, partition, barrier, needed):
        barrier.arrive(expected=int(re.search(r", (\d+)", op.text).group(1)))

    def ttng_fence_async_shared(self, op, partition):
        for memory in self._buffers:
            memory.unfenced.discard(partition)

    def ttng_async_tma_copy_global_to_local(self, op, partition, descriptor, row, column, view, barrier, _):
        view.memory.write(np.nan)
        size = 2 * math.prod(descriptor.shape)
        self._loads.append((view.memory, descriptor.read((row, column)), barrier, size))

    def ttng_async_tma_copy_local_to_global(self, op, partition, descriptor, row, column, view):
        assert not view.memory.unfenced, "a TMA store without a fence after the writes that it reads"
        self._stores.setdefault(partition, []).append((descriptor, (row, column), Reading(view)))

    def ttng_async_tma_store_wait(self, op, partition):
        stores = self._stores.setdefault(partition, [])
        while len(stores) > op.number("pendings"):
            descriptor, coordinates, reading = stores.pop(0)
            descriptor.write(coordinates, *reading.arrays())

    def ttng_warp_group_dot(self, op, partition, a, b, c, _):
        before = c if isinstance(c, Accumulator) else Accumulator(c)
        return Accumulator(before.value, (*before.pending, Reading(a, b)))

    def ttng_warp_group_dot_wait(self, op, partition, accumulator):
        return accumulator.finish(op.number("pendings"))


def run(ttgir, programs, p, q, u, v, scale, bias=None, q_by_rows=False, seed=0) -> torch.Tensor:
    """C of the compiled kernel, (M, E) in p's dtype; the arguments are those of its launcher, on the CPU.

    Raises:
        AssertionError: the kernel reads or writes something at a wrong time.
        Deadlock: all partitions wait.
    """
    signature, ops = parse(ttgir)
    (M, D), E = p.shape, q.shape[1 if q_by_rows else 0]
    result = np.full((M, E), np.nan, dtype=np.float32)
    matrices = {name: t.float().numpy() for name, t in zip("pquv", (p, q, u, v), strict=True)}
    values: dict[str, Any] = {"%M": M, "%D": D, "%E": E, "%scale": np.float32(scale)}
    for name, kind in signature.items():
        if "tensordesc" in kind:
            shape = tuple(map(int, re.search(r"((?:\d+x)+)", kind).group(1)[:-1].split("x")))
            values[name] = Descriptor(matrices.get(name[1], result), shape)
    if bias is not None:
        values["%bias_ptr"] = Pointer(bias.float().numpy())
    rng = random.Random(seed)
    for program in range(programs):
        Machine(program, programs, rng).run(ops, values)
    return torch.from_numpy(result).to(p.dtype)
