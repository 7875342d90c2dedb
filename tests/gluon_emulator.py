"""Runs the source of fastlora's Gluon kernel in plain Python, as Triton's interpreter cannot run Gluon.

Each asynchronous operation happens at the moment that is worst for the kernel: a TMA load writes its slot as
soon as it is issued, a product reads its slots only when it is waited for, a TMA store reads its buffer only
when it is waited for. A slot that is freed too early, a buffer that is reused too early or an accumulator
that is touched before its product has finished then shows in the result or raises. Shared memory begins as
NaN, partitions are threads, and a wait that nothing ends raises :class:`Deadlock`.
"""

import builtins
import math
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch

PATIENCE = 10.0  # seconds until a wait counts as a deadlock


class Deadlock(RuntimeError):
    """A partition waited for a barrier that nothing completes."""


class Barrier:
    """An mbarrier: its phase ends when its arrivals and the bytes that it expects are in."""

    def __init__(self):
        self._changed = threading.Condition()
        self._count = self._arrivals = self._bytes = self._phase = 0

    def init(self, count):
        self._count = count

    def arrive(self, count=1, expected=0):
        with self._changed:
            self._arrivals += count
            self._bytes += expected
            assert self._arrivals <= self._count, "more arrivals in one phase than the barrier counts"
            self._advance()

    def complete(self, transferred):
        with self._changed:
            self._bytes -= transferred
            self._advance()

    def wait(self, parity):
        """Wait for the end of the phase of this parity; that before the first one has the parity 1."""
        with self._changed:
            if not self._changed.wait_for(lambda: (self._phase - 1) % 2 == parity, PATIENCE):
                raise Deadlock(f"no end of a phase of parity {parity} after {self._phase} phases")

    def _advance(self):
        if self._arrivals == self._count and self._bytes == 0:
            self._arrivals, self._phase = 0, self._phase + 1
            self._changed.notify_all()


class Shared:
    """A view of shared memory; ``allocation`` knows whose writes to it still await a fence."""

    def __init__(self, array, allocation=None):
        self.array = array
        self.allocation = allocation or SimpleNamespace(unfenced=set())

    @property
    def shape(self):
        return self.array.shape

    def _view(self, array):
        return Shared(array, self.allocation)

    def index(self, i):
        return self._view(self.array[i])

    def slice(self, start, length, dim):
        place = [slice(None)] * self.array.ndim
        place[dim] = slice(start, start + length)
        return self._view(self.array[tuple(place)])

    def permute(self, order):
        return self._view(self.array.transpose(order))

    def store(self, value):
        self.array[...] = value.array
        self.allocation.unfenced.add(threading.get_ident())


class Barriers:
    """An allocation of mbarriers."""

    def __init__(self, count):
        self._barriers = [Barrier() for _ in range(count)]

    def index(self, i):
        return self._barriers[i]


class Register:
    """A tensor in registers: its value, and the products that it still waits for."""

    def __init__(self, value, pending=()):
        self._value, self._pending = np.asarray(value), tuple(pending)

    @property
    def array(self):
        assert not self._pending, "an accumulator was read before its products had finished"
        return self._value

    def multiply(self, a, b):
        return Register(self._value, (*self._pending, (a, b)))

    def finish(self, outstanding):
        value, pending = self._value, list(self._pending)
        while len(pending) > outstanding:
            a, b = pending.pop(0)
            value = value + a.array @ b.array
        return Register(value, pending)

    def to(self, rounded):
        return Register(rounded(self.array))

    def __mul__(self, other):
        return Register(self.array * np.float32(other))

    def __add__(self, other):
        return Register(self.array + (other.array if isinstance(other, Register) else other))

    __radd__ = __add__

    def __lt__(self, other):
        return Register(self.array < other)


class Descriptor:
    """A TMA descriptor of a float32 array: what it reads outside is 0, what it would write outside is not."""

    def __init__(self, matrix, block, dtype=None):
        self.matrix, self.dtype, self.layout = matrix, dtype, None
        self.block_type = SimpleNamespace(shape=block, nbytes=2 * math.prod(block))

    def read(self, coordinates, target):
        outer, inner = self._overlap(coordinates)
        target[...] = 0.0
        target[inner] = self.matrix[outer]

    def write(self, coordinates, source):
        outer, inner = self._overlap(coordinates)
        self.matrix[outer] = source[inner]

    def _overlap(self, coordinates):
        """Where the block lies in the matrix, and the same part of it in the block."""
        axes = zip(coordinates, self.block_type.shape, self.matrix.shape, strict=True)
        outer = [slice(start, min(start + size, limit)) for start, size, limit in axes]
        return tuple(outer), tuple(slice(0, max(s.stop - s.start, 0)) for s in outer)


class Machine:
    """One program of the grid: what the names that a Gluon kernel imports mean in it."""

    def __init__(self, program, programs):
        self._program, self._programs = program, programs
        self._allocations = []
        self._partition = threading.local()
        self.failures = []

    def modules(self):
        """The modules that the kernel imports, by name."""
        gl = SimpleNamespace(
            bfloat16=None, constexpr=lambda value: value, float16=None, float32=np.float32, int64=Barriers,
            NVMMADistributedLayout=lambda *_: None, NVMMASharedLayout=None, SliceLayout=lambda *_: None,
            allocate_shared_memory=self._allocate,
            arange=lambda start, stop, layout: Register(np.arange(start, stop)),
            cdiv=lambda a, b: -(-a // b),
            expand_dims=lambda value, axis: Register(np.expand_dims(value.array, axis)),
            load=_load,
            minimum=min,
            num_programs=lambda axis: self._programs,
            permute=lambda value, order: Register(value.array.transpose(order)),
            program_id=lambda axis: self._program,
            reshape=lambda value, shape: Register(value.array.reshape(shape)),
            split=lambda value: (Register(value.array[..., 0]), Register(value.array[..., 1])),
            static_range=range,
            warp_specialize=self._warp_specialize,
            where=lambda condition, a, b: a if condition else b,
            zeros=lambda shape, dtype, layout: Register(np.zeros(shape, np.float32)),
        )  # fmt: skip
        mbarrier = SimpleNamespace(
            MBarrierLayout=lambda: None,
            arrive=lambda barrier, count, pred=True: barrier.arrive(count) if pred else None,
            expect=lambda barrier, size: barrier.arrive(expected=size),
            init=lambda barrier, count: barrier.init(count),
            wait=lambda barrier, phase: barrier.wait(phase),
        )
        hopper = SimpleNamespace(
            fence_async_shared=self._fence,
            mbarrier=mbarrier,
            tma=SimpleNamespace(
                async_load=_tma_load, async_store=self._tma_store, store_wait=self._store_wait
            ),
            warpgroup_mma=lambda a, b, acc, is_async: acc.multiply(a, b),
            warpgroup_mma_wait=lambda outstanding, deps: deps[0].finish(outstanding),
        )
        return {
            "triton": SimpleNamespace(cdiv=gl.cdiv),
            "triton.experimental": SimpleNamespace(gluon=SimpleNamespace(jit=lambda function: function)),
            "triton.experimental.gluon": SimpleNamespace(language=gl),
            "triton.experimental.gluon.language.nvidia.hopper": hopper,
            "triton.experimental.gluon.nvidia.hopper": SimpleNamespace(TensorDescriptor=None),
        }

    def _allocate(self, dtype, shape, layout):
        if dtype is Barriers:
            return Barriers(shape[0])
        memory = Shared(np.full(shape, np.nan, dtype=np.float32))
        self._allocations.append(memory.allocation)
        return memory

    def _fence(self):
        for allocation in self._allocations:
            allocation.unfenced.discard(threading.get_ident())

    def _tma_store(self, descriptor, coordinates, source):
        unfenced = source.allocation.unfenced
        assert threading.get_ident() not in unfenced, (
            "a TMA store without a fence after the writes that it reads"
        )
        self._partition.stores.append((descriptor, coordinates, source))

    def _store_wait(self, outstanding):
        while len(self._partition.stores) > outstanding:
            descriptor, coordinates, source = self._partition.stores.pop(0)
            descriptor.write(coordinates, source.array)

    def _warp_specialize(self, partitions, warps, registers):
        def run(function, arguments):
            self._partition.stores = []
            try:
                function(*arguments)
            except BaseException as error:
                self.failures.append(error)

        threads = [threading.Thread(target=run, args=partition, daemon=True) for partition in partitions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


def _load(pointer, mask, other):
    """gl.load of (array, offsets)."""
    array, offsets = pointer
    return Register(np.where(mask.array, array[np.minimum(offsets.array, len(array) - 1)], other))


def _tma_load(descriptor, coordinates, barrier, target):
    descriptor.read(coordinates, target.array)
    barrier.complete(descriptor.block_type.nbytes)


class Pointer:
    """A pointer to the first element of a float32 array."""

    def __init__(self, array):
        self._array = array

    def __add__(self, offsets):
        return self._array, offsets


def load_module(path: Path, fakes: dict) -> ModuleType:
    """The module at ``path`` with its imports of ``fakes`` answered by those."""

    def fake_import(name, *arguments):
        return fakes[name] if name in fakes else builtins.__import__(name, *arguments)

    module = ModuleType("emulated")
    module.__dict__["__builtins__"] = {**vars(builtins), "__import__": fake_import}
    exec(compile(path.read_text(encoding="utf-8"), str(path), "exec"), module.__dict__)
    return module


def run(path, config, p, q, u, v, scale, bias=None, q_by_rows=False, programs=3, change=None):
    """C of the kernel at ``path``; the arguments are those of its ``gemm``, the matrices half-precision.

    ``change(module)`` may replace parts of the emulated module, to see that a fault is found.
    """
    (M, D), R = p.shape, u.shape[1]
    E = q.shape[1] if q_by_rows else q.shape[0]
    result = np.full((M, E), np.nan, dtype=np.float32)
    for program in range(programs):
        machine = Machine(program, programs)
        module = load_module(path, machine.modules())
        if change is not None:
            change(module)
        block = module.blocks(config, q_by_rows)
        matrices = zip(block.items(), (p, q, u, v), strict=False)
        inputs = [Descriptor(matrix.float().numpy(), shape) for (_, shape), matrix in matrices]
        module._hopper_kernel(
            *inputs,
            Descriptor(result, block["c_desc"], lambda array: _round(array, p.dtype)),
            None if bias is None else Pointer(bias.float().numpy()),
            scale, M, D, E,
            BLOCK_R=config.block_r, RANK_STEPS=-(-R // config.block_d), GROUP_M=config.group_m,
            SLOTS=config.slots, Q_BY_ROWS=q_by_rows, HAS_BIAS=bias is not None, TEAMS=config.teams,
        )  # fmt: skip
        if machine.failures:
            raise machine.failures[0]
    return torch.from_numpy(result).to(p.dtype)


def _round(array, dtype):
    return torch.from_numpy(np.ascontiguousarray(array)).to(dtype).float().numpy()
