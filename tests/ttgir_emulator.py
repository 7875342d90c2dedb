"""Runs fastlora's kernels as Triton has compiled them for a GPU, without one, from their TTGIR.

Triton's interpreter runs the source, which is not enough (the compiler decides which variables a loop
carries), and cannot run Gluon. TTGIR is the last form in which copies, barriers and products are single
operations; its text is parsed and run on arrays.

Each asynchronous operation happens at the moment that is worst for the kernel. A copy spoils its shared
memory as soon as it is issued and fills it much later; the operands of a product and the buffer of a TMA
store must stay as they are until these are waited for. Shared memory begins as NaN. The partitions of a
program take turns in a random order. So do programs that have atomic operations, of which one, two or eight
run at a time; the others run one after another. If nothing can go on, :class:`Deadlock` is raised. Also
checked: that every access is within its tensor's storage, that no program writes what another reads or writes
(unless that is TMA, and a release, an acquire and fences come in between), fences before TMA stores, that no
product rounds float32 to TF32, and what the compiler was told of the arguments.
"""

import functools
import itertools
import math
import operator
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

Steps = Iterator[bool]  # of a partition: whether it could take its next step
TYPES = {
    "i1": np.bool_, "i8": np.int8, "i16": np.int16, "i32": np.int32, "i64": np.int64,
    "f16": np.float32, "bf16": np.float32, "f32": np.float32,
}  # fmt: skip
NAME = r"%[\w\-.$]+(?:#\d+)?"
UNSIGNED = {np.dtype(np.int32): np.uint32, np.dtype(np.int64): np.uint64}
HALF = {"f16": torch.float16, "bf16": torch.bfloat16}


class Deadlock(RuntimeError):
    """Every partition of every program that runs waits, and nothing will end that."""


# --- The text ---------------------------------------------------------------------------------------------


@dataclass
class Op:
    """One operation: ``%a, %b = name <text>``, with the blocks that belong to it by name.

    Results that share a name, ``%a:2``, are called ``%a#0`` and ``%a#1``.
    """

    results: list[str]
    name: str
    text: str
    blocks: dict[str, "Block"] = field(default_factory=dict)

    def __post_init__(self):
        self.operands = re.findall(NAME, re.split(r" : | \{", self.text)[0])
        shapes = re.findall(r"(?:tensor|memdesc)<((?:\d+x)+)", self.text)
        # Those of the last type, the result's.
        self.shape = tuple(map(int, shapes[-1][:-1].split("x"))) if shapes else ()
        elements = re.findall(r"\b(?:\d+x)*(i1|i8|i16|i32|i64|f16|bf16|f32)\b", self.text)
        self.element = elements[-1] if elements else ""

    def number(self, attribute: str) -> int:
        return int(re.search(rf"{attribute} = (-?\d+)", self.text).group(1))

    def numbers(self, pattern: str) -> tuple[int, ...]:
        return tuple(map(int, re.search(pattern, self.text).group(1).split(",")))


@dataclass
class Block:
    arguments: list[str]
    ops: list[Op]


@functools.cache
def parse(text: str) -> tuple[dict[str, str], list[Op]]:
    """The kernel's arguments with their types and hints, and its operations."""
    # A maximum over one element, which makes a tensor a number.
    maximum = r'"tt\.reduce"\((%\w+)\) <.*?\}\)(?:| loc\(#loc\d*\)) : (?=\(tensor<1xi32)'
    text = re.sub(maximum, r"only \1 : ", text, flags=re.DOTALL)
    text = re.sub(r'(tt\.elementwise_inline_asm "[^"]*") \{[^}]*\}', r"\1", text)
    text = re.sub(r' loc\((?:#loc\d*|unknown|"[^"]*"(?:\(#loc\d*\))?|callsite[^)]*\))\)', "", text)
    lines = iter(line.strip() for line in text.splitlines() if line.strip())
    header = next(line for line in lines if line.startswith("tt.func"))
    return dict(re.findall(r"(%\w+): ([^%]+)[,)]", header)), _ops(lines)[0]


def _ops(lines: Iterator[str]) -> tuple[list[Op], str]:
    """The operations up to the end of a block, and the line that ends it."""
    ops: list[Op] = []
    for line in lines:
        if line.startswith("}"):
            return ops, line
        left, right = line.split(" = ", 1) if line.startswith("%") else ("", line)
        name = re.match(r"[\w.]+", right).group()
        results: list[str] = []
        for result, count in re.findall(r"(%[\w\-.$]+)(?::(\d+))?", left):
            results += [f"{result}#{i}" for i in range(int(count))] if count else [result]
        op = Op(results, name, right[len(name) :])
        end = ""
        if name == "ttg.warp_specialize":
            while not end.startswith("} :"):  # the last block's end has the types of all
                head = next(lines)
                inner, end = _ops(lines)
                op.blocks[re.match(r"\w+", head).group()] = Block(re.findall(r"(%\w+):", head), inner)
        elif right.endswith("{"):
            inner, end = _ops(lines)
            op.blocks["body"] = Block([], inner)
            if end == "} else {":
                op.blocks["else"] = Block([], _ops(lines)[0])
        ops.append(op)
    return ops, ""


# --- Memory -----------------------------------------------------------------------------------------------


class Global:
    """The storage of a tensor, with the program that wrote each element and the one that read it."""

    NOBODY, SEVERAL = -1, -2

    def __init__(self, tensor: torch.Tensor):
        self._elements = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        self._writer = np.full(len(self._elements), self.NOBODY)
        self._reader = self._writer.copy()
        self._written_at = self._writer.copy()
        self._released: dict[int, dict[int, int]] = {}  # by place, see Machine._acquired

    def load(self, places: np.ndarray, program: int) -> np.ndarray:
        self._check_bounds(places)
        assert np.isin(self._writer[places], (self.NOBODY, program)).all(), "read after another's write"
        alone = np.isin(self._reader[places], (self.NOBODY, program))
        self._reader[places] = np.where(alone, program, self.SEVERAL)
        values = self._elements[torch.from_numpy(places)]
        return (values.float() if values.is_floating_point() else values).numpy()

    def add(self, place: int, value: int) -> int:
        """Atomically; returns the value before."""
        self._check_bounds(place)
        before = int(self._elements[place])
        self._elements[place] += int(value)
        return before

    def release(self, place: int, program: int, until: int) -> None:
        self._released.setdefault(int(place), {})[program] = until

    def acquire(self, place: int) -> dict[int, int]:
        return self._released.get(int(place), {})

    def check_visible(self, places: np.ndarray, seen: dict[int, int]) -> None:
        """Whether TMA may read the elements, for a program that has ``seen`` others' writes."""
        for program in np.unique(self._writer[places]):
            latest = self._written_at[places][self._writer[places] == program].max()
            assert program == self.NOBODY or seen.get(program, -1) >= latest, "read before it is visible"

    def store(self, places: np.ndarray, values: np.ndarray, program: int, now: int = 0) -> None:
        self._check_bounds(places)
        assert len(np.unique(places)) == places.size, "one store writes an element twice"
        assert (self._writer[places] == self.NOBODY).all(), "an element is written twice"
        assert np.isin(self._reader[places], (self.NOBODY, program)).all(), "written after another's read"
        self._writer[places], self._written_at[places] = program, now
        self._elements[torch.from_numpy(places)] = torch.from_numpy(values).to(self._elements.dtype)

    def _check_bounds(self, places):
        assert not places.size or 0 <= places.min() <= places.max() < len(self._elements), "out of bounds"


@dataclass
class Pointer:
    """Elements of a tensor's storage."""

    memory: Global
    places: np.ndarray


@dataclass
class Descriptor:
    """A TMA descriptor: blocks of a matrix, which is 0 outside for reads and ignores writes there."""

    matrix: torch.Tensor
    shape: tuple[int, ...]
    storage: Global | None = None  # if the kernel also has a pointer to the matrix

    def __post_init__(self):
        self._written = torch.zeros(self.matrix.shape, dtype=torch.bool)

    def check_visible(self, coordinates, seen):
        if self.storage is not None:
            outer, _ = self._overlap(coordinates)
            places = torch.arange(self.matrix.numel()).view(self.matrix.shape)[outer]
            self.storage.check_visible(places.flatten().numpy(), seen)

    def read(self, coordinates):
        block = np.zeros(self.shape, dtype=np.float32)
        outer, inner = self._overlap(coordinates)
        block[inner] = self.matrix[outer].float().numpy()
        return block

    def write(self, coordinates, block):
        outer, inner = self._overlap(coordinates)
        assert not self._written[outer].any(), "an element is written twice"
        self._written[outer] = True
        self.matrix[outer] = torch.from_numpy(block[inner].copy()).to(self.matrix.dtype)

    def _overlap(self, coordinates):
        """Where the block lies in the matrix, and the same part of it in the block."""
        axes = zip(map(int, coordinates), self.shape, self.matrix.shape, strict=True)
        outer = [slice(min(start, limit), min(start + size, limit)) for start, size, limit in axes]
        return tuple(outer), tuple(slice(0, s.stop - s.start) for s in outer)


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


class Shared:
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

    memory: Shared
    array: np.ndarray


class Reading:
    """What something asynchronous reads until it has been waited for: views, or arrays in registers."""

    def __init__(self, *operands):
        self._operands = operands
        self._versions = self._now()

    def _now(self):
        return [operand.memory.version for operand in self._operands if isinstance(operand, View)]

    def arrays(self):
        assert self._now() == self._versions, "shared memory was written while something read it"
        return [operand.array if isinstance(operand, View) else operand for operand in self._operands]


class Accumulator:
    """An array in registers with products that have not been waited for, and their numbers."""

    def __init__(self, value, pending=()):
        self.value, self.pending = value, tuple(pending)

    def finish(self, until):
        """Finish the products below number ``until``."""
        value, pending = self.value, list(self.pending)
        while pending and pending[0][0] < until:
            a, b = pending.pop(0)[1].arrays()
            value = value + a @ b
        return Accumulator(value, pending)


# --- Operations on numbers and arrays, as functions of the operation and its operands' values --------------


def _plain(value):
    """An operand that an ordinary operation may read."""
    if isinstance(value, Accumulator):
        assert not value.pending, "an accumulator was read before its products had finished"
        return value.value
    return value


def _constant(op):
    text, kind = op.text.strip(), TYPES[op.element or "i1"]
    value = re.match(r"(?:dense<)?(true|false|0x\w+|[-\w.+]+)", text).group(1)
    if value.startswith("0x"):
        assert op.element in ("bf16", "f32"), "a constant in hexadecimal digits"
        number = np.uint32(int(value, 16) << (16 if op.element == "bf16" else 0)).view(np.float32)
    elif value in ("true", "false"):
        number = value == "true"
    else:
        number = int(value) if np.issubdtype(kind, np.integer) else float(value)
    return np.full(op.shape, number, kind) if op.shape else kind(number)


def _compare(op, a, b):
    kind = op.text.split(",")[0].strip()
    if kind.startswith("u"):
        a, b = _unsigned(a), _unsigned(b)
    return getattr(operator, kind[-2:])(a, b)


def _unsigned(a):
    a = np.asarray(a)
    return a.view(UNSIGNED[a.dtype])[()]


def _divide(a, b):
    assert np.all(a >= 0), "C rounds a negative quotient otherwise than Python"
    return a // b


def _convert(op, a):
    assert not (op.name == "arith.extsi" and np.asarray(a).dtype == bool), "true is -1 there"
    if op.element in HALF and op.name == "arith.truncf":
        return torch.from_numpy(np.ascontiguousarray(a)).to(HALF[op.element]).float().numpy()
    return np.asarray(a).astype(TYPES[op.element])[()]


def _widen_unsigned(op, a):
    return (np.asarray(a) if np.asarray(a).dtype == bool else _unsigned(a)).astype(TYPES[op.element])[()]


def _assume(op, condition):
    assert condition, "tl.assume of something false"


def _check_precision(op):
    """Tensor cores round float32 to TF32 unless told not to, and wgmma always does."""
    element = re.search(r"(?:tensor|memdesc)<(?:\d+x)+(\w+)", op.text).group(1)
    rounds = op.name == "ttng.warp_group_dot" or re.search(r"inputPrecision = tf32\b", op.text)
    assert not (element == "f32" and rounds), "a product of float32 is one of TF32"


def _dot(op, a, b, c):
    _check_precision(op)
    return c + a @ b


def _order(op):
    return op.numbers(r"array<i32: ([^>]+)>")


def _on_places(function: Callable) -> Callable:
    """The function of an array also for pointers."""

    def apply(op, a):
        return Pointer(a.memory, function(op, a.places)) if isinstance(a, Pointer) else function(op, a)

    return apply


PLAIN: dict[str, Callable] = {
    "arith.constant": _constant,
    "arith.addi": lambda op, a, b: a + b,
    "arith.subi": lambda op, a, b: a - b,
    "arith.muli": lambda op, a, b: a * b,
    "arith.divsi": lambda op, a, b: _divide(a, b),
    "arith.remsi": lambda op, a, b: a - b * _divide(a, b),
    "arith.minsi": lambda op, a, b: np.minimum(a, b),
    "arith.maxsi": lambda op, a, b: np.maximum(a, b),
    "arith.xori": lambda op, a, b: a ^ b,
    "arith.andi": lambda op, a, b: a & b,
    "arith.ori": lambda op, a, b: a | b,
    "arith.shrui": lambda op, a, b: (_unsigned(a) >> _unsigned(b)).view(np.asarray(a).dtype),
    "arith.shli": lambda op, a, b: a << b,
    "arith.extsi": _convert,
    "arith.trunci": _convert,
    "arith.extui": _widen_unsigned,
    "arith.cmpi": _compare,
    "arith.select": lambda op, condition, a, b: np.where(condition, a, b)[()],
    "arith.addf": lambda op, a, b: a + b,
    "arith.mulf": lambda op, a, b: a * b,
    "arith.extf": lambda op, a: a,
    "arith.truncf": _convert,
    "llvm.intr.assume": _assume,
    "tt.make_range": lambda op: np.arange(op.number("start"), op.number("end"), dtype=np.int32),
    "tt.splat": _on_places(lambda op, a: np.full(op.shape, a)),
    "tt.expand_dims": _on_places(lambda op, a: np.expand_dims(a, op.number("axis"))),
    "tt.broadcast": _on_places(lambda op, a: np.broadcast_to(a, op.shape)),
    "tt.reshape": lambda op, a: a.reshape(op.shape),
    "tt.trans": lambda op, a: a.transpose(_order(op)),
    "tt.join": lambda op, a, b: np.stack([a, b], -1),
    "tt.split": lambda op, a: (a[..., 0], a[..., 1]),
    "tt.addptr": lambda op, pointer, offsets: Pointer(pointer.memory, pointer.places + np.int64(offsets)),
    "tt.dot": _dot,
    "tt.ptr_to_int": lambda op, pointer: pointer,
    "ttg.convert_layout": _on_places(lambda op, a: a),
    "ttg.memdesc_trans": lambda op, view: View(view.memory, view.array.transpose(_order(op))),
    "ttg.local_load": lambda op, view, token=None: view.array.astype(TYPES[op.element]),
    "only": lambda op, a: a[0],
    "ttg.local_dealloc": lambda op, view: None,
}


# --- The machine ------------------------------------------------------------------------------------------


class Machine:
    """One program of the grid."""

    def __init__(self, place: tuple[int, ...], grid: tuple[int, ...], rng: random.Random):
        self._place, self._grid, self._rng = place, grid, rng
        self._number = place[0] + grid[0] * (place[1] + grid[1] * place[2])
        self._buffers = []  # shared memory
        # Asynchronous copies of each group that has not been waited for; the last group is open.
        self._copies = [[]]
        self._loads = []  # TMA loads on their way
        self._stores = {}  # TMA stores of each partition that have not been waited for
        self._products = Counter()  # asynchronous products of each partition
        self._now = 0
        # When each partition last passed a fence between ordinary accesses and TMA's, and the fence that was
        # the last one at its last barrier, so that each thread's stores were fenced by itself.
        self._fence_at, self._fenced_before_barrier = Counter(), Counter()
        # Up to when each program's stores are visible, by what atomic operations say, and then also to TMA.
        self._acquired, self._seen = {}, {}

    def run(self, ops, values):
        yield from self._run(ops, dict(values), "main")
        assert not any(self._stores.values()), "a program ended while a TMA store read its memory"

    def _run(self, ops: list[Op], values: dict[str, Any], partition: str) -> Steps:
        """Take the block's steps; returns what it yields to its loop or branch."""
        for op in ops:
            if op.name == "scf.yield":
                return [values[name] for name in op.operands]
            if op.name in ("ttg.warp_yield", "ttg.warp_return", "tt.return"):
                return []
            if op.name == "scf.for":
                yield from self._loop(op, values, partition)
            elif op.name == "scf.if":
                taken = op.blocks.get("body" if values[op.operands[0]] else "else", Block([], []))
                results = yield from self._run(taken.ops, values, partition)
                values.update(zip(op.results, results, strict=True))
            elif op.name == "ttg.warp_specialize":
                yield from self._specialize(op, values)
            elif op.name == "tt.elementwise_inline_asm" and "ld.acquire.gpu.global.b32 state" in op.text:
                yield from self._wait(op, values, partition)
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
                if op.results:
                    values.update(zip(op.results, result if len(op.results) > 1 else [result], strict=True))
            yield True
        return []

    def _loop(self, op: Op, values: dict[str, Any], partition: str) -> Steps:
        counter, start, stop, step = re.findall(NAME, op.text)[:4]
        initial = re.search(r"iter_args\(([^)]*)\)", op.text)
        pairs = re.findall(rf"({NAME}) = ({NAME})", initial.group(1)) if initial else []
        kind = type(values[start])
        carried = [values[value] for _, value in pairs]
        for i in range(values[start], values[stop], values[step]):
            inner = {**values, counter: kind(i)}
            inner.update(zip((name for name, _ in pairs), carried, strict=True))
            carried = yield from self._run(op.blocks["body"].ops, inner, partition)
        values.update(zip(op.results, carried, strict=True))

    def _wait(self, op: Op, values: dict[str, Any], partition: str) -> Steps:
        """The assembly that waits until a state in global memory is large enough, and fences."""
        pointer, least = (values[name] for name in op.operands)
        place = np.int64(pointer.places)
        while pointer.memory.add(place, 0) < least:
            yield False
        self._acquire(pointer.memory, place)
        if "fence.proxy.async.global" in op.text:
            self._seen = dict(self._acquired)

    def _acquire(self, memory: Global, place: np.int64) -> None:
        for program, until in memory.acquire(place).items():
            self._acquired[program] = max(until, self._acquired.get(program, -1))

    def _specialize(self, op: Op, values: dict[str, Any]) -> Steps:
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
            if not moved and self._loads:
                self._deliver(0)
                moved = True
            yield moved

    def _deliver(self, which):
        memory, block, barrier, size = self._loads.pop(which)
        memory.write(block)
        barrier.complete(size)

    # Each method below is the operation of its name.

    def tt_get_program_id(self, op, partition):
        return np.int32(self._place["xyz".index(op.text.split()[0])])

    def tt_get_num_programs(self, op, partition):
        return np.int32(self._grid["xyz".index(op.text.split()[0])])

    def tt_load(self, op, partition, pointer, mask=True, other=np.nan):
        mask = np.broadcast_to(mask, pointer.places.shape)
        values = pointer.memory.load(pointer.places[mask], self._number)
        result = np.array(np.broadcast_to(other, mask.shape)).astype(values.dtype)
        result[mask] = values
        return result[()]

    def tt_store(self, op, partition, pointer, value, mask=True):
        mask = np.broadcast_to(mask, pointer.places.shape)
        value = np.broadcast_to(_plain(value), mask.shape)
        pointer.memory.store(pointer.places[mask], value[mask], self._number, self._tick())

    def _tick(self):
        self._now += 1
        return self._now

    def gpu_barrier(self, op, partition):
        self._fenced_before_barrier[partition] = self._fence_at[partition]

    ttg_barrier = gpu_barrier  # its name from triton 3.7 on

    def tt_elementwise_inline_asm(self, op, partition, value):
        assert re.match(r' "fence\.proxy\.async\.global; mov\.b32 \$0, \$1;"', op.text), "unknown assembly"
        self._fence_at[partition] = self._tick()
        self._seen = dict(self._acquired)
        return value

    def tt_atomic_rmw(self, op, partition, pointer, value, needed):
        assert needed, "not needed"
        kind, order, scope = (part.strip() for part in op.text.split(",")[:3])
        assert (kind, scope) == ("add", "gpu"), "another atomic operation"
        place = np.int64(pointer.places)
        if order == "acquire":
            self._acquire(pointer.memory, place)
        if order == "release":
            pointer.memory.release(place, self._number, self._fenced_before_barrier[partition])
        return np.int32(pointer.memory.add(place, value))

    def ttg_async_copy_global_to_local(self, op, partition, pointer, view, mask=True, other=np.nan):
        view.memory.write(np.nan)
        self._copies[-1].append((view.memory, self.tt_load(op, partition, pointer, mask, other)))

    def ttg_async_commit_group(self, op, partition, *tokens):
        self._copies.append([])

    def ttg_async_wait(self, op, partition, *tokens):
        while len(self._copies) - 1 > op.number("num"):
            for memory, block in self._copies.pop(0):
                memory.write(block)

    def ttg_local_alloc(self, op, partition, value=None):
        if "xi64" in op.text:
            return [Barrier() for _ in range(op.shape[0])]
        several = len(op.shape) > 2 or op.shape[-1] == 1
        shape = op.shape[1:] if several else op.shape
        allocation = [Shared(shape) for _ in range(op.shape[0] if several else 1)]
        self._buffers += allocation
        if several:
            return allocation
        if value is not None:
            allocation[0].write(_plain(value))
        return View(allocation[0], allocation[0].array)

    def ttg_memdesc_index(self, op, partition, allocation, i):
        assert 0 <= i < len(allocation), "no such slot"
        item = allocation[i]
        return View(item, item.array) if isinstance(item, Shared) else item

    def ttg_memdesc_subslice(self, op, partition, view):
        starts = op.numbers(r"\[([^\]]+)\]")
        place = tuple(slice(start, start + size) for start, size in zip(starts, op.shape, strict=True))
        return View(view.memory, view.array[place])

    def ttg_local_store(self, op, partition, value, view):
        view.memory.write(_plain(value))
        view.memory.unfenced.add(partition)

    def ttng_init_barrier(self, op, partition, barrier):
        barrier.count = int(re.search(r", (\d+)", op.text).group(1))

    def ttng_arrive_barrier(self, op, partition, barrier, needed):
        assert ", 1," in op.text, "arrives more than once"
        if needed:
            barrier.arrive()

    def ttng_barrier_expect(self, op, partition, barrier, needed):
        if needed:
            barrier.arrive(expected=int(re.search(r", (\d+)", op.text).group(1)))

    def ttng_fence_async_shared(self, op, partition):
        for memory in self._buffers:
            memory.unfenced.discard(partition)

    def ttng_async_tma_copy_global_to_local(
        self, op, partition, descriptor, row, column, view, barrier, needed
    ):
        if needed:
            view.memory.write(np.nan)
            descriptor.check_visible((row, column), self._seen)
            size = descriptor.matrix.element_size() * math.prod(descriptor.shape)
            self._loads.append((view.memory, descriptor.read((row, column)), barrier, size))

    def ttng_async_tma_copy_local_to_global(self, op, partition, descriptor, row, column, view):
        assert not view.memory.unfenced, "a TMA store without a fence after the writes that it reads"
        self._stores.setdefault(partition, []).append((descriptor, (row, column), Reading(view)))

    def ttng_async_tma_store_wait(self, op, partition):
        stores = self._stores.setdefault(partition, [])
        while len(stores) > op.number("pendings"):
            descriptor, coordinates, reading = stores.pop(0)
            descriptor.write(coordinates, *reading.arrays())

    def ttng_warp_group_dot(self, op, partition, a, b, c, accumulates=True):
        _check_precision(op)
        before = c if isinstance(c, Accumulator) else Accumulator(c)
        if not accumulates:
            before = Accumulator(np.zeros_like(_plain(c)))
        number = self._products[partition]
        self._products[partition] += 1
        product = Accumulator(before.value, (*before.pending, (number, Reading(a, b))))
        return product if "isAsync = true" in op.text else product.finish(number + 1)

    def ttng_warp_group_dot_wait(self, op, partition, *waited):
        until = self._products[partition] - op.number("pendings")
        results = [value.finish(until) if isinstance(value, Accumulator) else value for value in waited]
        return results if len(op.results) > 1 else results[0]


def run(ttgir: str, grid: tuple[int, ...], arguments: dict[str, Any], seed: int = 0) -> None:
    """Run every program of the grid; tensors on the CPU are read and written in place.

    Args:
        arguments: by the kernel's names: numbers, or tensors for pointers and TMA descriptors. Others are
            ignored.
        seed: of the order in which partitions and programs take turns.

    Raises:
        AssertionError: the kernel reads or writes something at a wrong time or place, or an argument is not
            what the compiler was told of it.
        Deadlock: all partitions of a program wait.
    """
    signature, ops = parse(ttgir)
    values: dict[str, Any] = {}
    storages: dict[int, Global] = {}
    for name, kind in signature.items():
        value = arguments.get(name[1:])
        divisor = int((re.search(r"tt.divisibility = (\d+)", kind) or [0, 1])[1])
        if kind.startswith("!tt.tensordesc"):
            shape = re.search(r"((?:\d+x)+)", kind).group(1)
            values[name] = Descriptor(value, tuple(map(int, shape[:-1].split("x"))))
        elif kind.startswith("!tt.ptr"):
            assert value.data_ptr() % divisor == 0, f"{name} is less aligned than promised"
            storage = value.untyped_storage().data_ptr()
            if storage not in storages:
                storages[storage] = Global(value)
            values[name] = Pointer(storages[storage], np.int64(value.storage_offset()))
        elif value is not None:
            assert divisor == 1 or value % divisor == 0, f"{name} = {value} is not the multiple promised"
            values[name] = TYPES[kind.split()[0]](value)
    for value in values.values():
        if isinstance(value, Descriptor):
            value.storage = storages.get(value.matrix.untyped_storage().data_ptr())
    grid = (*grid, 1, 1)[:3]
    rng = random.Random(seed)
    places = list(itertools.product(*map(range, grid)))
    rng.shuffle(places)
    at_once = rng.choice((1, 2, 8)) if "tt.atomic_rmw" in ttgir else 1
    live: list[Steps] = []
    waiting: set[Steps] = set()
    with np.errstate(all="ignore"):
        while places or live:
            while places and len(live) < at_once:
                live.append(Machine(places.pop(), grid, rng).run(ops, values))
            program = rng.choice(live)
            for _ in range(rng.choice((1, 1, 4))):
                moved = next(program, None)
                if moved is None:
                    live.remove(program)
                waiting = waiting | {program} if moved is False else set()
                if not moved:
                    break
            if live and len(waiting) == len(live):
                raise Deadlock("every program that runs")
