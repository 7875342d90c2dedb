"""A decoder layer with adapters on all its linear layers: training steps, tokens per second, memory."""

from __future__ import annotations

import pytest
from harness import REPLAY, Benchmark, Session
from results import step_table
from shapes import CPU_MODEL_SHAPES, MODEL_SHAPES, ModelShape

BENCHMARK = Benchmark(
    section="model",
    kind=ModelShape,
    gpu_shapes=MODEL_SHAPES,
    cpu_shapes=CPU_MODEL_SHAPES,
    seconds=15.0,
    table=step_table,
)
pytestmark = pytest.mark.benchmark(timer=REPLAY.now)


def test_model(
    session: Session, shape: ModelShape, mode: str, provider: str, request: pytest.FixtureRequest
) -> None:
    """Check that the provider is right on this layer, then report its times."""
    session.report(shape, mode, provider, request)
