"""One LoRA linear layer: every provider's forward, backward and both, against the frozen linear.

pytest-benchmark times one test after another; here the providers of a shape have to take turns. So the
first test of a shape measures all of them, and each test then hands its own samples to pytest-benchmark,
which keeps and prints them: its timer is a clock that replays the recorded times.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from measure import Measurement, Plan, measure
from plot import draw
from providers import MODES, PROVIDERS, Provider, select
from results import OK, CsvWriter, environment, noise_warning, ratio_table
from shapes import CPU_SHAPES, DECODE_SHAPES, TRAINING_SHAPES, Shape

TRAINING_MODES = ("forward", "backward", "both")
# Inference is worth a look where the host's share of a call shows.
INFERENCE_TOKENS = 64


class ReplayClock:
    """A clock that stands still but for :meth:`advance`, which moves it by the next recorded time."""

    def __init__(self) -> None:
        self._now = 0.0
        self._recorded = iter(())

    def load(self, seconds) -> None:
        self._recorded = iter(seconds)

    def advance(self) -> None:
        self._now += next(self._recorded)

    def now(self) -> float:
        return self._now


REPLAY = ReplayClock()
pytestmark = pytest.mark.benchmark(timer=REPLAY.now)


class Session:
    """Measures each shape once and collects what was measured."""

    def __init__(self, plan: Plan, providers: list[Provider], shapes: list[Shape], modes, seconds: float):
        self._plan = plan
        self._providers = providers
        self._modes = {shape: _modes(shape, modes) for shape in shapes}
        self._seconds = seconds
        self._measured: dict[Shape, Measurement] = {}

    def measurement(self, shape: Shape) -> Measurement:
        if shape not in self._measured:
            modes = self._modes[shape]
            seconds = self._seconds / sum(len(modes) for modes in self._modes.values())
            plan = dataclasses.replace(self._plan, modes=modes, seconds=seconds)
            self._measured[shape] = measure(shape, self._providers, plan)
        return self._measured[shape]

    @property
    def rows(self):
        return [row for measurement in self._measured.values() for row in measurement.rows]


def _modes(shape: Shape, wanted: tuple[str, ...] | None) -> tuple[str, ...]:
    if wanted:
        return wanted
    return TRAINING_MODES if shape.M > INFERENCE_TOKENS else (*TRAINING_MODES, "inference")


def _options(config: pytest.Config) -> tuple[Plan, list[Provider], list[Shape], tuple[str, ...] | None]:
    """The command line's choices; UsageError for one that does not exist."""
    device = torch.device(config.option.bench_device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    try:
        shapes = [Shape.parse(text) for text in config.option.bench_shape or ()]
        providers = select(config.option.bench_providers or ",".join(PROVIDERS))
        dtype = getattr(torch, config.option.bench_dtype or ("bfloat16" if on_gpu else "float32"), None)
        modes = tuple(config.option.bench_modes.split(",")) if config.option.bench_modes else None
        if not isinstance(dtype, torch.dtype) or set(modes or MODES) - set(MODES):
            raise ValueError(
                f"dtype {config.option.bench_dtype}, modes {config.option.bench_modes}: expected a floating "
                f"torch dtype's name and modes among {', '.join(MODES)}"
            )
    except ValueError as error:
        raise pytest.UsageError(str(error)) from error
    plan = Plan(
        section="linear",
        modes=(),
        timers=("graph" if on_gpu else "cpu",),
        dtype=dtype,
        device=device,
        bias=not on_gpu,  # the encoders of the CPU list have biases, the LLMs have none
    )
    return plan, providers, shapes or (TRAINING_SHAPES + DECODE_SHAPES if on_gpu else CPU_SHAPES), modes


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "provider" in metafunc.fixturenames:
        _, providers, shapes, wanted = _options(metafunc.config)
        cases = [
            (shape, mode, provider.name)
            for shape in shapes
            for mode in _modes(shape, wanted)
            for provider in providers
        ]
        metafunc.parametrize(
            ("shape", "mode", "provider"), cases, ids=["-".join(map(str, case)) for case in cases]
        )


@pytest.fixture(scope="session")
def session(request):
    """The session's measurements; writes linear.csv and linear.png at its end."""
    config = request.config
    plan, providers, shapes, modes = _options(config)
    session = Session(plan, providers, shapes, modes, config.option.bench_seconds)
    yield session
    stamp = environment(plan.device)
    csv_path = config.option.bench_out / "linear.csv"
    writer = CsvWriter(csv_path, stamp)
    writer.write(session.rows)
    writer.close()
    picture = csv_path.with_suffix(".png")
    drawn = draw(session.rows, str(stamp), picture)
    config.bench_summary = [
        ratio_table(session.rows),
        *filter(None, [noise_warning(session.rows)]),
        f"wrote {csv_path}{f' and {picture}' if drawn else ''}",
    ]


def test_linear(session: Session, shape: Shape, mode: str, provider: str, request) -> None:
    """The provider is right on this shape; then its times are reported."""
    measurement = session.measurement(shape)
    row = next(row for row in measurement.rows if (row.mode, row.provider) == (mode, provider))
    if row.status.startswith("unavailable"):
        pytest.skip(f"{provider} {row.status}")
    if row.status != OK and not provider.startswith("fastlora"):
        pytest.skip(f"{provider} {row.status}")  # a rival that is wrong is not timed, and blocks nothing
    assert row.status == OK, f"{provider} on {shape}: {row.status}"
    seconds = measurement.timings[mode, row.timer, provider].seconds
    # Asked for only now: pytest-benchmark warns of a test that takes its fixture and does not use it.
    benchmark = request.getfixturevalue("benchmark")
    benchmark.group = f"{shape} {mode} {row.dtype}"
    benchmark.extra_info.update(
        ratio=row.ratio, saved_mib=row.saved_mib, peak_mib=row.peak_mib, path=row.path
    )
    REPLAY.load(seconds)
    benchmark.pedantic(REPLAY.advance, rounds=len(seconds))
