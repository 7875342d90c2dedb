"""One LoRA linear layer: every provider's forward, backward and both, against the frozen linear."""

from __future__ import annotations

import pytest
from harness import REPLAY, Benchmark, Session
from shapes import CPU_SHAPES, DECODE_SHAPES, TRAINING_SHAPES, Shape

BENCHMARK = Benchmark(
    section="linear",
    kind=Shape,
    gpu_shapes=TRAINING_SHAPES + DECODE_SHAPES,
    cpu_shapes=CPU_SHAPES,
    seconds=60.0,
    cpu_bias=True,  # the encoders in the CPU's list have biases; the LLMs do not
)
pytestmark = pytest.mark.benchmark(timer=REPLAY.now)


def test_linear(
    session: Session, shape: Shape, mode: str, provider: str, request: pytest.FixtureRequest
) -> None:
    """Check that the provider is right on this shape, then report its times."""
    session.report(shape, mode, provider, request)
