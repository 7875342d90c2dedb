"""Checks and times all providers on one shape: what the pytest benchmarks and the GPU script both run."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from check import Checker
from providers import FLOOR, Layer, Problem, Provider, Unavailable, make_problem, step
from results import OK, Row
from shapes import Shape
from timing import (
    Clock,
    CudaEventClock,
    HostClock,
    PerfCounterClock,
    Timing,
    alternate,
    captured,
    in_turn,
    input_sets,
    peak_bytes,
    saved_bytes,
)

MIB = 2**20
CLOCKS: dict[str, type[Clock]] = {
    "cpu": PerfCounterClock,
    "host": HostClock,
    "eager": CudaEventClock,
    "graph": CudaEventClock,
}


@dataclass(frozen=True)
class Plan:
    """How to measure a shape: modes and timers, dtype and device, and about how long to time each mode."""

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


def measure(shape: Shape, providers: Sequence[Provider], plan: Plan) -> Measurement:
    """Builds, checks, then times the providers on ``shape``, in turns within each mode and timer.

    A provider that is unavailable, raises, or fails its check gets a row that says so and is not timed.
    """
    bytes_per_set = plan.dtype.itemsize * (shape.M * (shape.N + shape.K) + shape.N * shape.K)
    sets = input_sets(bytes_per_set, plan.device)
    problems = [
        make_problem(shape, plan.dtype, plan.device, bias=plan.bias, dropout=plan.dropout, seed=seed)
        for seed in range(sets)
    ]
    layers, statuses = _checked_layers(providers, problems)
    measurement = Measurement()
    base = base_row(shape, plan)
    for name, status in statuses.items():
        if status != OK:
            measurement.rows += [
                replace(base, mode=mode, timer=timer, provider=name, status=status)
                for mode in plan.modes
                for timer in plan.timers
            ]
    memory = {name: _memory(built[0], problems[0]) for name, built in layers.items()}
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


def base_row(shape: Shape, plan: Plan) -> Row:
    return Row(
        section=plan.section,
        M=shape.M,
        N=shape.N,
        K=shape.K,
        R=shape.R,
        dtype=str(plan.dtype).removeprefix("torch."),
        bias=plan.bias,
        dropout=plan.dropout,
        mode="",
        timer="",
        provider="",
    )


def with_times(row: Row, timing: Timing, floor: Timing | None) -> Row:
    row = replace(row, median_ms=timing.median * 1e3, spread=timing.spread, rounds=len(timing.seconds))
    if floor is None:
        return row
    low, high = timing.ratio_quartiles(floor)
    return replace(row, ratio=timing.ratio(floor), ratio_low=low, ratio_high=high)


def _checked_layers(
    providers: Sequence[Provider], problems: Sequence[Problem]
) -> tuple[dict[str, list[Layer]], dict[str, str]]:
    """The layers of each provider that is right on the first problem, and the status of every provider."""
    checks = Checks(problems[0])
    layers: dict[str, list[Layer]] = {}
    statuses: dict[str, str] = {}
    for provider in providers:
        statuses[provider.name] = checks.status(provider)
        if statuses[provider.name] == OK:
            layers[provider.name] = [provider.build(problem) for problem in problems]
    return layers, statuses


class Checks:
    """Says of providers whether they are right on one problem."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._plain = Checker(replace(problem, dropout=0.0))
        self._seed = torch.tensor([20240607], device=problem.device)
        self._dropping: Checker | None = None

    def status(self, provider: Provider) -> str:
        """OK, "unavailable: why", "error: what it raised", or "check failed: what was wrong"."""
        problem = self._problem
        if problem.dropout and not provider.dropout:
            return "unavailable: has no dropout"
        try:
            wrong = self._plain.failures(
                provider.build(replace(problem, dropout=0.0)), provider.adapter_dtype
            )
            if problem.dropout and provider.seeded is not None:
                layer = provider.seeded(problem, self._seed)
                wrong += self._with_dropout().failures(layer, provider.adapter_dtype)
        except Unavailable as reason:
            return f"unavailable: {reason}"
        except Exception as failure:
            # Whatever another library raises ends up in its row; its place in the code helps to see why.
            where = traceback.extract_tb(failure.__traceback__)[-1]
            return f"error: {_one_line(failure)} ({where.name}, line {where.lineno})"
        return f"check failed: {'; '.join(wrong)}" if wrong else OK

    def _with_dropout(self) -> Checker:
        if self._dropping is None:
            from fastlora.reference import keep_mask

            shape = self._problem.shape
            keep = keep_mask(self._seed, shape.M, shape.K, self._problem.dropout)
            self._dropping = Checker(self._problem, keep)
        return self._dropping


def _one_line(failure: BaseException) -> str:
    text = " ".join(str(failure).split())
    return f"{type(failure).__name__}: {text[:300]}"


def _memory(layer: Layer, problem: Problem) -> dict[str, float | None]:
    """saved_mib and peak_mib of one training step."""
    known = [problem.x, problem.weight, *layer.adapters]
    if problem.bias is not None:
        known.append(problem.bias)
    peak = peak_bytes(step(layer, problem, "both"), problem.device)
    return {
        "saved_mib": saved_bytes(step(layer, problem, "forward"), known) / MIB,
        "peak_mib": None if peak is None else peak / MIB,
    }


def _path(name: str, problem: Problem) -> str:
    """What fastlora's planner chooses for the gemm of this problem; "" for other providers."""
    if not name.startswith("fastlora"):
        return ""
    forced = name.removeprefix("fastlora-")
    if forced in ("triton", "addmm", "reference"):
        return forced
    from fastlora import plan

    p = problem
    adapter_dtype = torch.float32 if forced == "fp32-adapters" else p.dtype
    return plan(p.x, p.weight, p.A.to(adapter_dtype), p.B.to(adapter_dtype), p.bias, p.dropout).path


def _timed(
    layers: dict[str, list[Layer]], problems: Sequence[Problem], mode: str, timer: str, plan: Plan
) -> tuple[dict[str, Timing], dict[str, str]]:
    """Timings by provider, and why for each that could not be timed in this mode."""
    functions, failed = {}, {}
    stream = torch.cuda.Stream() if timer == "graph" else None
    for name, built in layers.items():
        try:
            function = _prepared(built, problems, mode, stream)
            function()
            functions[name] = function
        except Exception as failure:
            failed[name] = f"error: {mode} by {timer}: {_one_line(failure)}"
    if not functions:
        return {}, failed
    timings = alternate(
        functions,
        CLOCKS[timer](),
        seconds=plan.seconds,
        calls_each=len(problems),
        min_rounds=plan.min_rounds,
        min_sample=plan.min_sample,
    )
    return timings, failed


def _prepared(built: list[Layer], problems: Sequence[Problem], mode: str, stream: torch.cuda.Stream | None):
    """One function that runs all input sets: a graph replay if there is a stream, else plain calls."""
    if stream is None:
        return in_turn(step(layer, problem, mode) for layer, problem in zip(built, problems, strict=True))
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # The kept forward of mode "backward" has to run on the stream that its backward is captured on.
        steps = [step(layer, problem, mode) for layer, problem in zip(built, problems, strict=True)]
    return captured(in_turn(steps), stream)
