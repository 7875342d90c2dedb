"""Options of the pytest benchmarks. Each of their files produces one CSV, one picture and one table.

pytest benchmarks/                                            (on a CPU: small shapes, under 6 minutes)
pytest benchmarks/ --bench-shape 64,768,768,8 --bench-providers peft,fastlora
pytest benchmarks/bench_model.py --bench-shape 2x128,512,16
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
import source_tree

source_tree.install()

import harness  # noqa: E402

DEFAULT_OUT = Path(".benchmarks")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastlora benchmarks")
    group.addoption(
        "--bench-shape",
        action="append",
        metavar="SHAPE",
        help="measure this shape (repeatable) only: M,N,K,R is a layer, M,N+N+N,K,R a group, "
        "BATCHxSEQUENCE,K,R a decoder layer",
    )
    group.addoption("--bench-providers", metavar="NAME,...", help="measure these providers only")
    group.addoption("--bench-modes", metavar="MODE,...", help="forward, backward, both, step, inference")
    group.addoption("--bench-dtype", default=None, help="default: float32 on a CPU, bfloat16 on a GPU")
    group.addoption("--bench-device", default=None, help="default: cuda where there is one, else cpu")
    group.addoption(
        "--bench-seconds",
        type=float,
        default=None,
        help="time to spend on timing in each file, checks not counted (default: the file's own)",
    )
    group.addoption("--bench-out", type=Path, default=DEFAULT_OUT, help="folder of the CSVs and pictures")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "provider" in metafunc.fixturenames:
        harness.parametrize(metafunc, metafunc.module.BENCHMARK)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the files that no shape of --bench-shape is for."""
    kinds = {type(shape) for shape in harness.asked_shapes(config)}
    others = [item for item in items if kinds and hasattr(item, "module") and not _is_for(item.module, kinds)]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]


def _is_for(module: ModuleType, kinds: set[type]) -> bool:
    return not hasattr(module, "BENCHMARK") or module.BENCHMARK.kind in kinds


@pytest.fixture(scope="module")
def session(request: pytest.FixtureRequest):
    """The measurements of one file, written at its end."""
    session = harness.Session(request.config, request.module.BENCHMARK)
    yield session
    request.config.bench_summary = [*getattr(request.config, "bench_summary", ()), *session.write()]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter) -> None:
    """Print what the session's benchmarks wrote after pytest-benchmark's own tables."""
    for line in getattr(terminalreporter.config, "bench_summary", ()):
        terminalreporter.write_line(line)
