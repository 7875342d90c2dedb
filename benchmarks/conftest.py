"""Options of the pytest benchmarks, and the session's results: one CSV, one picture, one table.

pytest benchmarks/                                            (a CPU: small shapes, under 4 minutes)
pytest benchmarks/ --bench-shape 64,768,768,8 --bench-providers peft,fastlora
"""

from __future__ import annotations

from pathlib import Path

import pytest
import source_tree

source_tree.install()

DEFAULT_OUT = Path(".benchmarks")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastlora benchmarks")
    group.addoption(
        "--bench-shape", action="append", metavar="M,N,K,R", help="measure this shape (repeatable) only"
    )
    group.addoption("--bench-providers", metavar="NAME,...", help="measure these providers only")
    group.addoption("--bench-modes", metavar="MODE,...", help="forward, backward, both, inference")
    group.addoption("--bench-dtype", default=None, help="default: float32 on a CPU, bfloat16 on a GPU")
    group.addoption("--bench-device", default=None, help="default: cuda where there is one, else cpu")
    group.addoption(
        "--bench-seconds", type=float, default=110.0, help="time to spend on timing, checks not counted"
    )
    group.addoption("--bench-out", type=Path, default=DEFAULT_OUT, help="folder of the CSV and the picture")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter) -> None:
    """What the session's benchmarks wrote, after pytest-benchmark's own tables."""
    for line in getattr(terminalreporter.config, "bench_summary", ()):
        terminalreporter.write_line(line)
