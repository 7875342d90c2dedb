"""Layers that share their input (q/k/v, gate/up): groups and separate layers against frozen ones."""

from __future__ import annotations

import pytest
from harness import REPLAY, Benchmark, Session
from shapes import CPU_GROUP_SHAPES, GROUP_SHAPES, GroupShape

BENCHMARK = Benchmark(
    section="group",
    kind=GroupShape,
    gpu_shapes=GROUP_SHAPES,
    cpu_shapes=CPU_GROUP_SHAPES,
    seconds=25.0,
)
pytestmark = pytest.mark.benchmark(timer=REPLAY.now)


def test_group(
    session: Session, shape: GroupShape, mode: str, provider: str, request: pytest.FixtureRequest
) -> None:
    """Check that the provider is right on this group, then report its times."""
    session.report(shape, mode, provider, request)
