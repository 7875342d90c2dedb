"""Checks and times all providers on one shape; shared by the pytest benchmarks and the GPU script."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from check import Checker
from problem import AnyProblem, Layer, Unavailable, make_problem, step
from providers import FLOOR, Provider
from results import OK, Row
from shapes import AnyShape
from timing import (
    WARM_UP_CALLS,
    Clock,
    CudaEventClock,
    HostClock,
    PerfCounterClock,
    Timing,
    alternate,
    captured,
    peak_bytes,
    saved_bytes,
)

from fastlora.checks import dtype_name
from fastlora.device import sums_in_float32
from fastlora.tune import in_turn, input_sets

MIB = 2**20
CLOCKS: dict[str, type[Clock]] = {
    "cpu": PerfCounterClock,
    "host": HostClock,
    "eager": CudaEventClock,
    "graph": CudaEventClock,
}


@dataclass(frozen=True)
class Plan:
    """How to measure a shape: modes, timers, dtype, device, and roughly how long to time each mode."""

    section: str
    modes: tuple[str, ...]
    timers: tuple[str, ...]
    dtype: torch.dtype
    device: torch.device
    bias: bool = False
    dropout: float = 0.0
    seconds: float = 1.0
    min_rounds: int = 5
    min_sample: float = 2e-4


@dataclass
class Measurement:
    """The rows of one shape, and the times behind them by (mode, timer, provider)."""

    rows: list[Row] = field(default_factory=list)
    timings: dict[tuple[str, str, str], Timing] = field(default_factory=dict)

    def failures(self) -> dict[str, str]:
        """What is wrong with each provider that failed its check or raised; unavailable ones are left out."""
        return {
            row.provider: row.status
            for row in self.rows
            if row.status != OK and not row.status.startswith("unavailable")
        }


def measure(
    shape: AnyShape,
    providers: Sequence[Provider],
    plan: Plan,
    make: Callable[..., AnyProblem] = make_problem,
) -> Measurement:
    """Build, check, then time the providers on ``shape``, alternating within each mode and timer.

    A provider that is unavailable, raises, or fails its check gets a row that says so and is not timed.
    ``make``: makes the problem of a shape, with the arguments of :func:`problem.make_problem`.
    """
    measurement = Measurement()
    base = base_row(shape, plan)
    problems: list[AnyProblem] = []
    layers: dict[str, list[Layer]] = {}
    try:
        problems = _problems(shape, plan, make)
    except Unavailable as reason:
        statuses = dict.fromkeys((provider.name for provider in providers), f"unavailable: {reason}")
    else:
        layers, statuses = _checked_layers(providers, problems)
    for name, status in statuses.items():
        if status != OK:
            measurement.rows += failed_rows(replace(base, provider=name, status=status), plan)
    memory = {}
    for name in list(layers):
        try:
            memory[name] = _memory(layers[name][0], problems[0])
        except Exception as failure:
            if not device_works(plan.device):
                raise
            del layers[name]
            error = f"error: memory of a step: {one_line(failure)}"
            measurement.rows += failed_rows(replace(base, provider=name, status=error), plan)
    paths = {name: _path(name, problems[0]) for name in layers}
    for mode in plan.modes:
        for timer in plan.timers:
            timings, failed = _timed(layers, problems, mode, timer, plan)
            for name in layers:
                row = replace(base, mode=mode, timer=timer, provider=name, path=paths[name])
                if name in failed:
                    measurement.rows.append(replace(row, status=failed[name]))
                    continue
                measurement.timings[mode, timer, name] = timings[name]
                row = with_times(row, timings[name], timings.get(FLOOR))
                measurement.rows.append(replace(row, **memory[name]))
    return measurement


def _problems(shape: AnyShape, plan: Plan, make: Callable[..., AnyProblem]) -> list[AnyProblem]:
    """Enough problems that none stays in the cache while the others have their turn."""

    def problem(seed: int) -> AnyProblem:
        return make(shape, plan.dtype, plan.device, bias=plan.bias, dropout=plan.dropout, seed=seed)

    first = problem(0)
    sets = input_sets(plan.dtype.itemsize * first.elements, plan.device, first.fewest_sets)
    return [first, *(problem(seed) for seed in range(1, sets))]


def base_row(shape: AnyShape, plan: Plan) -> Row:
    return Row(
        section=plan.section,
        M=shape.M,
        N=shape.N,
        K=shape.K,
        R=shape.R,
        dtype=dtype_name(plan.dtype),
        bias=plan.bias,
        dropout=plan.dropout,
        mode="",
        timer="",
        provider="",
    )


def failed_rows(row: Row, plan: Plan) -> list[Row]:
    """``row``, which says what is wrong, for every mode and timer of the plan."""
    return [replace(row, mode=mode, timer=timer) for mode in plan.modes for timer in plan.timers]


def with_times(row: Row, timing: Timing, floor: Timing | None) -> Row:
    row = replace(row, median_ms=timing.median * 1e3, spread=timing.spread, rounds=len(timing.seconds))
    if floor is None:
        return row
    low, high = timing.ratio_quartiles(floor)
    return replace(row, ratio=timing.ratio(floor), ratio_low=low, ratio_high=high)


def _checked_layers(
    providers: Sequence[Provider], problems: Sequence[AnyProblem]
) -> tuple[dict[str, list[Layer]], dict[str, str]]:
    """The layers of each provider that is right on the first problem, and the status of every provider."""
    checks = Checks(problems[0].checked)
    layers: dict[str, list[Layer]] = {}
    statuses: dict[str, str] = {}
    for provider in providers:
        status = checks.status(provider)
        if status == OK:
            layers[provider.name] = []
            # The provider may fail here with more tokens than in the check.
            status = _status(partial(_build, provider, problems, layers[provider.name]))
        if status != OK:
            layers.pop(provider.name, None)
        statuses[provider.name] = status
    return layers, statuses


def _build(provider: Provider, problems: Sequence[AnyProblem], layers: list[Layer]) -> None:
    layers += [provider.build(problem) for problem in problems]


class Checks:
    """Determines whether providers are right on one problem."""

    def __init__(self, problem: AnyProblem) -> None:
        self._problem = problem
        self._undropped = replace(problem, dropout=0.0) if problem.dropout else problem
        self._plain = Checker(self._undropped)
        self._seed = torch.tensor([20240607], device=problem.device)
        self._dropping: Checker | None = None

    def status(self, provider: Provider) -> str:
        """OK, "unavailable: why", "error: what it raised", or "check failed: what was wrong"."""
        if self._problem.dropout and not provider.dropout:
            return "unavailable: has no dropout"
        # torch.compile would compile once for the check and again, with the other setting, to be timed.
        switched = self._problem.device.type == "cuda" and provider.name != "compile"
        with sums_in_float32() if switched else nullcontext():
            return _status(lambda: self._wrong(provider))

    def _wrong(self, provider: Provider) -> list[str]:
        wrong = self._plain.failures(provider.build(self._undropped), provider.adapter_dtype)
        if self._problem.dropout and provider.seeded is not None:
            layer = provider.seeded(self._problem, self._seed)
            wrong += self._with_dropout().failures(layer, provider.adapter_dtype)
        return wrong

    def _with_dropout(self) -> Checker:
        if self._dropping is None:
            from fastlora.reference import keep_mask

            shape = self._problem.shape
            keep = keep_mask(self._seed, shape.M, shape.K, self._problem.dropout)
            self._dropping = Checker(self._problem, keep)
        return self._dropping


def _status(attempt: Callable[[], list[str] | None]) -> str:
    """OK, what the attempt found wrong, or why it failed."""
    try:
        wrong = attempt()
    except Unavailable as reason:
        return f"unavailable: {reason}"
    except Exception as failure:
        # Whatever another library raises ends up in its row; where it was raised helps to explain it.
        where = traceback.extract_tb(failure.__traceback__)[-1]
        return f"error: {one_line(failure)} ({where.name}, line {where.lineno})"
    return f"check failed: {'; '.join(wrong)}" if wrong else OK


def one_line(failure: BaseException) -> str:
    text = " ".join(str(failure).split())
    return f"{type(failure).__name__}: {text[:300]}"


def _memory(layer: Layer, problem: AnyProblem) -> dict[str, float | None]:
    """saved_mib and peak_mib of one training step."""
    known = [problem.x, *problem.frozen, *layer.adapters]
    peak = peak_bytes(step(layer, problem, "both"), problem.device)
    return {
        "saved_mib": saved_bytes(step(layer, problem, "forward"), known) / MIB,
        "peak_mib": None if peak is None else peak / MIB,
    }


def _path(name: str, problem: AnyProblem) -> str:
    """What fastlora's planner chooses for the gemm of this problem; "" for other providers."""
    if not name.startswith("fastlora"):
        return ""
    form = name.removeprefix("fastlora-")
    if form in ("triton", "addmm", "reference"):
        return form
    return problem.path(name, torch.float32 if form == "fp32-adapters" else problem.dtype)


def _timed(
    layers: dict[str, list[Layer]], problems: Sequence[AnyProblem], mode: str, timer: str, plan: Plan
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Timings by provider, and the reason for each provider that could not be timed in this mode."""
    functions, failed = {}, {}
    stream = torch.cuda.Stream() if timer == "graph" else None
    if stream is not None:
        gc.collect()  # An old autograd graph of x would tie the capture to the stream it was made on.
    for name, built in layers.items():
        try:
            function = _prepared(built, problems, mode, stream)
            function()
            functions[name] = function
        except Exception as failure:
            failed[name] = f"error: {mode} by {timer}: {one_line(failure)}"
    while functions:
        try:
            timings = alternate(
                functions,
                CLOCKS[timer](),
                seconds=plan.seconds,
                calls_each=len(problems),
                min_rounds=plan.min_rounds,
                min_sample=plan.min_sample,
            )
        except Exception:
            # A provider that breaks after its check loses its own row, not those of the others.
            broken = raising(functions, plan.device)
            if not broken or not device_works(plan.device):
                raise
            for name, failure in broken.items():
                del functions[name]
                failed[name] = f"error: {mode} by {timer}: {one_line(failure)}"
        else:
            return timings, failed
    return {}, failed


def raising(functions: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, Exception]:
    """The exceptions of those functions that fail within a few more calls."""
    found = {}
    for name, function in functions.items():
        try:
            for _ in range(2 * WARM_UP_CALLS):
                function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except Exception as failure:
            found[name] = failure
    return found


def device_works(device: torch.device) -> bool:
    """Whether the device still computes; after an illegal memory access, every call on a GPU fails."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
        return torch.ones(8, device=device).sum().item() == 8.0
    except RuntimeError:
        return False


def _prepared(
    built: list[Layer], problems: Sequence[AnyProblem], mode: str, stream: torch.cuda.Stream | None
):
    """One function that runs all input sets: a graph replay if a stream is given, else plain calls."""
    if stream is None:
        return in_turn(step(layer, problem, mode) for layer, problem in zip(built, problems, strict=True))
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # The kept forward of mode "backward" has to run on the stream on which its backward is captured.
        steps = [step(layer, problem, mode) for layer, problem in zip(built, problems, strict=True)]
    return captured(in_turn(steps), stream)
