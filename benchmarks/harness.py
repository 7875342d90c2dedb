"""What the pytest benchmarks share: options, one measurement for all tests of a shape, and its reports.

pytest-benchmark times one test after another, but here the providers of a shape have to take turns. The first
test of a shape therefore measures all of them. Each test then hands its own samples to pytest-benchmark,
which stores and prints them: its timer is a clock that replays the recorded times.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import pytest
import torch
from measure import Measurement, Plan, measure
from plot import draw
from problem import MODES
from providers import Provider
from results import OK, CsvWriter, Row, environment, noise_warning, ratio_table
from shapes import AnyShape, parse
from tables import KINDS, select


class ReplayClock:
    """A clock that moves only by :meth:`advance`, each time by the next recorded time."""

    def __init__(self) -> None:
        self._now = 0.0
        self._recorded = iter(())

    def load(self, seconds: Iterable[float]) -> None:
        self._recorded = iter(seconds)

    def advance(self) -> None:
        self._now += next(self._recorded)

    def now(self) -> float:
        return self._now


REPLAY = ReplayClock()


@dataclass(frozen=True)
class Benchmark:
    """One file of benchmarks: its section, the type of its shapes, and what it measures by default.

    seconds: time to spend on timing all shapes. cpu_bias: whether the layers in the CPU's list have biases.
    table: makes the table that is printed from the rows.
    """

    section: str
    kind: type[AnyShape]
    gpu_shapes: Sequence[AnyShape]
    cpu_shapes: Sequence[AnyShape]
    seconds: float
    cpu_bias: bool = False
    table: Callable[[Sequence[Row]], str] = ratio_table


@dataclass(frozen=True)
class Choice:
    """What the command line asks one benchmark to measure, including the modes of each shape."""

    plan: Plan
    providers: list[Provider]
    modes: Mapping[AnyShape, tuple[str, ...]]
    seconds: float


def asked_shapes(config: pytest.Config) -> list[AnyShape]:
    """The shapes of --bench-shape; UsageError for a text that is not a shape."""
    try:
        return [parse(text) for text in config.option.bench_shape or ()]
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error


def choice(config: pytest.Config, benchmark: Benchmark) -> Choice:
    """What to measure; UsageError for a provider, mode or dtype that does not exist."""
    option = config.option
    device = torch.device(option.bench_device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    dtype = getattr(torch, option.bench_dtype or ("bfloat16" if on_gpu else "float32"), None)
    modes = tuple(option.bench_modes.split(",")) if option.bench_modes else None
    try:
        providers = select(option.bench_providers)[benchmark.kind]
        if not isinstance(dtype, torch.dtype) or set(modes or MODES) - set(MODES):
            raise ValueError(
                f"dtype {option.bench_dtype}, modes {option.bench_modes}: expected a floating torch dtype's "
                f"name and modes among {', '.join(MODES)}"
            )
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    shapes = [shape for shape in asked_shapes(config) if type(shape) is benchmark.kind]
    shapes = shapes or (benchmark.gpu_shapes if on_gpu else benchmark.cpu_shapes)
    plan = Plan(
        section=benchmark.section,
        modes=(),
        timers=("graph" if on_gpu else "cpu",),
        dtype=dtype,
        device=device,
        bias=benchmark.cpu_bias and not on_gpu,
    )
    seconds = benchmark.seconds if option.bench_seconds is None else option.bench_seconds
    default_modes = KINDS[benchmark.kind].modes
    return Choice(plan, providers, {shape: modes or default_modes(shape) for shape in shapes}, seconds)


def parametrize(metafunc: pytest.Metafunc, benchmark: Benchmark) -> None:
    """Generate a test for each shape, mode and provider."""
    chosen = choice(metafunc.config, benchmark)
    cases = [
        (shape, mode, provider.name)
        for shape, modes in chosen.modes.items()
        for mode in modes
        for provider in chosen.providers
    ]
    metafunc.parametrize(
        ("shape", "mode", "provider"), cases, ids=["-".join(map(str, case)) for case in cases]
    )


class Session:
    """Measures each shape of a benchmark once and collects the measurements."""

    def __init__(self, config: pytest.Config, benchmark: Benchmark) -> None:
        self._config = config
        self._benchmark = benchmark
        self._choice = choice(config, benchmark)
        self._measured: dict[AnyShape, Measurement] = {}

    def measurement(self, shape: AnyShape) -> Measurement:
        if shape not in self._measured:
            chosen = self._choice
            seconds = chosen.seconds / sum(map(len, chosen.modes.values()))
            plan = dataclasses.replace(chosen.plan, modes=chosen.modes[shape], seconds=seconds)
            self._measured[shape] = measure(shape, chosen.providers, plan, KINDS[type(shape)].make)
        return self._measured[shape]

    def report(self, shape: AnyShape, mode: str, provider: str, request: pytest.FixtureRequest) -> None:
        """Fail if fastlora is wrong on this shape, skip a rival that is wrong, otherwise report the times."""
        measurement = self.measurement(shape)
        row = next(row for row in measurement.rows if (row.mode, row.provider) == (mode, provider))
        if row.status.startswith("unavailable"):
            pytest.skip(f"{provider} {row.status}")
        if row.status != OK and not provider.startswith("fastlora"):
            pytest.skip(f"{provider} {row.status}")  # a wrong rival is not timed, but does not fail the run
        assert row.status == OK, f"{provider} on {shape}: {row.status}"
        seconds = measurement.timings[mode, row.timer, provider].seconds
        # Requested only now: pytest-benchmark warns about a test that takes its fixture but does not use it.
        benchmark = request.getfixturevalue("benchmark")
        benchmark.group = f"{shape} {mode} {row.dtype}"
        benchmark.extra_info.update(
            ratio=row.ratio, saved_mib=row.saved_mib, peak_mib=row.peak_mib, path=row.path
        )
        REPLAY.load(seconds)
        benchmark.pedantic(REPLAY.advance, rounds=len(seconds))

    def write(self) -> list[str]:
        """Write the section's CSV and picture; return what to print at the end of the session."""
        rows = [row for measurement in self._measured.values() for row in measurement.rows]
        stamp = environment(self._choice.plan.device)
        csv_path = self._config.option.bench_out / f"{self._benchmark.section}.csv"
        writer = CsvWriter(csv_path, stamp)
        writer.write(rows)
        writer.close()
        picture = csv_path.with_suffix(".png")
        drawn = draw(rows, str(stamp), picture)
        return [
            self._benchmark.table(rows),
            *filter(None, [noise_warning(rows)]),
            f"wrote {csv_path}{f' and {picture}' if drawn else ''}",
        ]
