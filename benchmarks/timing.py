"""Alternating timing of several callables, device clocks, memory kept and used, and a time budget.

Times within one run are comparable, those of different runs are not: clock speeds and neighbours change. So
every round times each callable once, in a new random order, and ratios are taken within a round.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlora.tune import capture

WARM_UP_CALLS = 3


@dataclass(frozen=True)
class Timing:
    """Seconds per call, one value per round; an index means the same round for all callables of a run."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range over the median: 0.02 means that half of the rounds lie within 2%."""
        low, high = _quartiles(self.seconds)
        return (high - low) / self.median

    def ratio(self, floor: Timing) -> float:
        """Median over the rounds of this time divided by ``floor``'s time in the same round."""
        return statistics.median(_ratios(self, floor))

    def ratio_quartiles(self, floor: Timing) -> tuple[float, float]:
        """Lower and upper quartile of the ratios whose median :meth:`ratio` returns."""
        return _quartiles(_ratios(self, floor))


def _ratios(timing: Timing, floor: Timing) -> list[float]:
    return [ours / theirs for ours, theirs in zip(timing.seconds, floor.seconds, strict=True)]


def _quartiles(values: Iterable[float]) -> tuple[float, float]:
    values = list(values)
    if len(values) == 1:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


class PerfCounterClock:
    """Times a callable on the host: for CPU tensors, or for the host's share of a GPU call."""

    def sample(self, function: Callable[[], object], calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return time.perf_counter() - start

    def read(self, sample: float) -> float:
        return sample

    def synchronize(self) -> None:
        pass


class HostClock(PerfCounterClock):
    """Host time of issuing the calls to a CUDA device that is idle at the start of each sample."""

    def sample(self, function: Callable[[], object], calls: int) -> float:
        torch.cuda.synchronize()
        return super().sample(function, calls)

    def synchronize(self) -> None:
        torch.cuda.synchronize()


class CudaEventClock:
    """Times a callable with CUDA events on the current stream; samples are read after a synchronization."""

    def sample(self, function: Callable[[], object], calls: int) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            function()
        end.record()
        return start, end

    def read(self, sample: tuple[torch.cuda.Event, torch.cuda.Event]) -> float:
        start, end = sample
        return start.elapsed_time(end) * 1e-3

    def synchronize(self) -> None:
        torch.cuda.synchronize()


Clock = PerfCounterClock | HostClock | CudaEventClock


@contextmanager
def _no_garbage_collection():
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def alternate(
    functions: Mapping[str, Callable[[], object]],
    clock: Clock,
    *,
    seconds: float,
    calls_each: int = 1,
    min_rounds: int = 5,
    max_rounds: int = 200,
    min_sample: float = 2e-4,
    seed: int = 0,
) -> dict[str, Timing]:
    """Time the functions alternately and return each one's seconds per call.

    Args:
        functions: what to time, by name. Each is warmed up first.
        clock: PerfCounterClock on a CPU, CudaEventClock on a GPU.
        seconds: approximate total time of the rounds; ``min_rounds`` are run even if they take longer.
        calls_each: calls that one invocation of a function stands for (input sets of a rotation or graph).
        min_sample: a sample repeats its function, often enough that the quickest function takes this long.
        seed: for the order of the functions within each round.

    Raises:
        ValueError: no functions, or fewer than one round.
    """
    if not functions or min_rounds < 1 or max_rounds < min_rounds:
        raise ValueError(
            f"expected functions and 1 <= min_rounds <= max_rounds, got {len(functions)} functions, "
            f"min_rounds={min_rounds}, max_rounds={max_rounds}"
        )
    with _no_garbage_collection():
        estimates = {name: _estimate(function, clock) for name, function in functions.items()}
        repeats = max(1, math.ceil(min_sample / max(min(estimates.values()), 1e-9)))
        round_seconds = repeats * sum(estimates.values())
        rounds = min(max_rounds, max(min_rounds, int(seconds / max(round_seconds, 1e-9))))

        order = list(functions)
        generator = random.Random(seed)
        times: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(rounds):
            generator.shuffle(order)
            samples = {name: clock.sample(functions[name], repeats) for name in order}
            clock.synchronize()
            for name, sample in samples.items():
                times[name].append(clock.read(sample) / (repeats * calls_each))
    return {name: Timing(tuple(values)) for name, values in times.items()}


def _estimate(function: Callable[[], object], clock: Clock) -> float:
    """Seconds per invocation once warm: the minimum of a few samples."""
    for _ in range(WARM_UP_CALLS):
        function()
    clock.synchronize()
    samples = [clock.sample(function, 1) for _ in range(WARM_UP_CALLS)]
    clock.synchronize()
    return min(clock.read(sample) for sample in samples)


def captured(function: Callable[[], object], stream: torch.cuda.Stream) -> Callable[[], None]:
    """The replay of a CUDA graph of ``function``, captured on ``stream``, where its forward must also run.

    Autograd runs a backward node on the stream of its forward, hence one stream for both. The replay keeps
    ``function`` alive: the graph reads and writes what it holds (a kept forward, an optimizer's state) at
    addresses that the allocator would otherwise reuse.
    """
    graph = capture(function, stream, WARM_UP_CALLS)

    def replay(kept: Callable[[], object] = function) -> None:
        graph.replay()

    return replay


def saved_bytes(step: Callable[[], object], known: Iterable[Tensor]) -> int:
    """Bytes of the storages that autograd keeps for backward during ``step``, except those of ``known``.

    ``known``: the input and the parameters, which exist anyway. A storage that is saved twice counts once.
    """
    ours = {tensor.untyped_storage().data_ptr() for tensor in known}
    kept: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        # Holding the tensor keeps its address from being reused.
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = step()
    total = sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in ours)
    del result
    return total


def peak_bytes(step: Callable[[], object], device: torch.device) -> int | None:
    """Peak device memory of ``step`` beyond what was allocated before it; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


class Budget:
    """Keeps a list of measurements within its time and remembers what was left out.

    A unit of work starts only if the longest unit of its kind so far would still fit with a tenth to spare;
    the kind is the first word of its name.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds
        self._longest: dict[str, float] = {}
        self.left_out: list[str] = []

    @property
    def remaining(self) -> float:
        return self._end - self._clock()

    def run(self, name: str, unit: Callable[[], object], guess: float = 0.0) -> bool:
        """Run ``unit`` if the time allows, else record ``name`` as left out; return whether it ran.

        ``guess``: seconds that this unit may take if it is the first of its kind.
        """
        kind = name.split()[0]
        if self.remaining < 1.1 * self._longest.get(kind, guess) or self.remaining <= 0:
            self.left_out.append(name)
            return False
        start = self._clock()
        unit()
        self._longest[kind] = max(self._longest.get(kind, 0.0), self._clock() - start)
        return True
