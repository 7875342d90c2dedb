"""Measures other tile shapes than the shipped ones: which should fastlora/kernels/configs.py select?

The candidates of a product are first compiled and checked by separate processes that share Triton's cache
with this one: compiling takes a fraction of the time, and a candidate that breaks the GPU costs only its
share. Those that are right are then timed alternating with the shipped shape and the BLAS call.
"""

from __future__ import annotations

import concurrent.futures.process
import dataclasses
import functools
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

import source_tree

source_tree.install()  # also needed in the worker processes, which import this module

import torch  # noqa: E402
from measure import Measurement, Plan, base_row, one_line  # noqa: E402
from primitives import (  # noqa: E402
    FLOOR,
    TRITON,
    failures,
    measure_products,
    products,
    shipped_config,
)
from problem import make_problem  # noqa: E402
from results import OK, Row  # noqa: E402
from shapes import Shape  # noqa: E402

from fastlora import planner  # noqa: E402
from fastlora.device import describe  # noqa: E402
from fastlora.kernels import configs  # noqa: E402

# Seconds that the processes may take for the candidates of one product and shape.
CHECK_SECONDS = 90.0
# The values tried for each kernel; the other fields keep their shipped values.
GRIDS: dict[type, dict[str, tuple[int, ...]]] = {
    configs.ProjectConfig: {
        "block_m": (16, 32, 64, 128),
        "block_d": (64, 128, 256),
        "num_warps": (4, 8),
        "num_stages": (3, 4, 5),
    },
    configs.TokenSumConfig: {
        "block_d": (64, 128),
        "block_m": (32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    },
    configs.GemmConfig: {
        "block_m": (64, 128, 256),
        "block_e": (128, 256),
        "block_d": (32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    },
    configs.SmallConfig: {
        "block_n": (16, 32, 64),
        "block_k": (64, 128, 256),
        "num_warps": (2, 4, 8),
        "num_stages": (3, 4, 5, 6),
    },
    configs.BackwardConfig: {
        "block_m": (16, 32, 64),
        "step_n": (64, 128),
        "step_m": (32, 64),
        "block_n": (64, 128),
        "num_warps": (4, 8),
        "num_stages": (3, 4),
    },
}
# Factors on the shipped number of splits (programs per multiprocessor) or of rows per region.
FACTORS = {configs.TokenSumConfig: ("splits", (0.5, 1, 2)), configs.BackwardConfig: ("rows", (0.5, 1, 2))}
# fp32 sums that a thread may hold: more would spill.
MOST_SUMS = 128
# Maximum number of processes that compile and check; lines per table.
MOST_WORKERS, FASTEST = 14, 3


def work() -> list[tuple[str, Shape]]:
    """(product, shape) of everything that is swept on a GPU, the most informative first."""
    square = [(M, 4096, 4096) for M in (8192, 4096)]
    found = []
    for R in (16, 64, 128):
        found += [(name, Shape(*sizes, R)) for sizes in square for name in ("h", "dA", "g", "dB")]
        found += [("g+dA", Shape(8192, 4096, 4096, R)), ("dx", Shape(4096, 4096, 4096, R))]
        found += [("y", Shape(4096, 4096, 4096, R)), ("h", Shape(4096, 4096, 14336, R))]
        found += [
            ("forward", Shape(M, N, 4096, R)) for M, N in ((1, 4096), (16, 4096), (1, 14336), (1, 1024))
        ]
    return found


def text(config: configs.Config) -> str:
    return " ".join(f"{name}={value}" for name, value in dataclasses.asdict(config).items())


def candidates(shipped: configs.Config, capability: int) -> dict[str, configs.Config]:
    """By name: the shipped configuration, whose name begins with ``triton``, and its variations that fit."""
    kind = type(shipped)
    grid = {name: values for name, values in GRIDS[kind].items() if name != "block_r"}
    if kind in FACTORS:
        name, factors = FACTORS[kind]
        step = 64 if name == "rows" else 1
        grid[name] = tuple(
            dict.fromkeys(max(1, int(getattr(shipped, name) * f) // step) * step for f in factors)
        )
    found = {f"{TRITON} {text(shipped)}": shipped}
    for values in itertools.product(*grid.values()):
        config = dataclasses.replace(shipped, **dict(zip(grid, values, strict=True)))
        if config != shipped and configs.fits(config, capability, 2) and _sums(config) <= MOST_SUMS:
            found[text(config)] = config
    return found


def _sums(config: configs.Config) -> int:
    """The fp32 sums that each thread holds."""
    elements = {
        configs.ProjectConfig: lambda c: c.block_m * c.block_r,
        configs.TokenSumConfig: lambda c: c.block_d * c.block_r,
        configs.GemmConfig: lambda c: c.block_m * c.block_e,
        configs.SmallConfig: lambda c: c.block_m * (c.block_n + c.block_r),
        configs.BackwardConfig: lambda c: max(c.block_m, c.block_n) * c.block_r,
    }[type(config)]
    return elements(config) // (32 * config.num_warps)


def measure_tiles(
    product: str, shape: Shape, plan: Plan, most: int | None = None, beside: bool = True
) -> Measurement:
    """Rows of one product at one shape: the BLAS call, and each candidate with its name as the provider.

    ``most``: how many candidates to try, starting with the shipped one; None for all. ``beside``: have them
    checked by other processes first.
    """
    capability = describe(plan.device).tile_capability
    wrong: dict[str, str] = {}

    def tiles(name: str, shipped: configs.Config) -> Mapping[str, configs.Config]:
        if name != product:
            return {}
        named = itertools.islice(candidates(shipped, capability).items(), most)
        return {key: config for key, config in named if key not in wrong}

    if beside:
        wrong.update(wrong_candidates(product, shape, plan))
    measurement = measure_products(shape, dataclasses.replace(plan, modes=(product,)), tiles)
    base = dataclasses.replace(base_row(shape, plan), mode=product)
    measurement.rows += [
        dataclasses.replace(base, timer=timer, provider=name, status=status)
        for name, status in wrong.items()
        for timer in plan.timers
    ]
    return measurement


@functools.cache
def pool() -> tuple[int, concurrent.futures.ProcessPoolExecutor]:
    """The number of workers and their pool, which is kept: starting one takes longer than most shares."""
    workers = max(1, min(MOST_WORKERS, (os.cpu_count() or 1) - 1))
    context = multiprocessing.get_context("spawn")
    return workers, concurrent.futures.ProcessPoolExecutor(workers, mp_context=context)


def end_pool() -> None:
    """End the workers, even one that hangs; the next :func:`pool` starts new ones."""
    executor = pool()[1]
    for child in multiprocessing.active_children():
        child.kill()
    executor.shutdown(wait=False, cancel_futures=True)
    pool.cache_clear()


def outcomes(
    function: Callable[..., object], calls: Sequence[tuple], seconds: float
) -> list[object | Exception]:
    """What each call of ``function`` in the workers returns or raises, in order.

    A worker that dies takes down the pool: the calls that had not ended raise BrokenProcessPool. Those that
    have not ended within ``seconds`` raise TimeoutError. After any exception, later calls get new workers.
    """
    executor, end = pool()[1], time.monotonic() + seconds
    found: list[object | Exception] = []
    shares: list[concurrent.futures.Future | Exception] = []
    for call in calls:
        try:
            shares.append(executor.submit(function, *call))
        except concurrent.futures.process.BrokenProcessPool as failure:  # a worker died while idle
            shares.append(failure)
    for share in shares:
        try:
            if isinstance(share, Exception):
                raise share
            found.append(share.result(timeout=max(0.0, end - time.monotonic())))
        except Exception as failure:
            found.append(failure)
    if any(isinstance(outcome, Exception) for outcome in found):
        end_pool()
    return found


def wrong_candidates(product: str, shape: Shape, plan: Plan) -> dict[str, str]:
    """What is wrong with each candidate that fails, found by separate processes.

    A process that dies takes down its pool and with it the shares of the others: each of these is then
    retried once, alone.
    """
    workers, _ = pool()
    wrong: dict[str, str] = {}
    left = _checked(product, shape, plan, range(workers), wrong)
    for part in left:
        if _checked(product, shape, plan, [part], wrong):
            names = _share(product, shape, plan, part, workers)
            wrong |= dict.fromkeys(names, "error: in one share with others: its process died")
    return wrong


def _checked(
    product: str, shape: Shape, plan: Plan, parts: Sequence[int], wrong: dict[str, str]
) -> list[int]:
    """Add failures to ``wrong``; return the shares whose outcome is unknown because a process died."""
    workers, _ = pool()
    calls = [(product, shape, plan, part, workers) for part in parts]
    left = []
    for part, outcome in zip(parts, outcomes(check_share, calls, CHECK_SECONDS), strict=True):
        if isinstance(outcome, concurrent.futures.process.BrokenProcessPool):
            left.append(part)
        elif isinstance(outcome, Exception):
            names = _share(product, shape, plan, part, workers)
            wrong |= dict.fromkeys(names, f"error: in one share with others: {one_line(outcome)}")
        else:
            wrong |= outcome
    return left


def _share(product: str, shape: Shape, plan: Plan, part: int, parts: int) -> dict[str, configs.Config]:
    """Every ``parts``-th candidate, starting with number ``part``."""
    device = describe(plan.device)
    problem = planner.Problem(device, plan.dtype, shape.M, shape.N, shape.K, shape.R)
    shipped = shipped_config(problem, product)
    if shipped is None:
        return {}
    named = candidates(shipped, device.tile_capability)
    return dict(itertools.islice(named.items(), part, None, parts))


def check_share(product: str, shape: Shape, plan: Plan, part: int, parts: int) -> dict[str, str]:
    """What is wrong with the candidates of one share. Raises PyTorch's exception if the GPU is unusable."""
    share = _share(product, shape, plan, part, parts)
    problem = make_problem(shape, plan.dtype, plan.device, bias=False)
    made = products(problem, tiles=lambda name, shipped: share if name == product else {})
    wrong = failures(made[product](), plan.device)
    if plan.device.type == "cuda":
        torch.cuda.empty_cache()
    return wrong


def tile_table(rows: Iterable[Row], timers: Sequence[str] | None = None) -> str:
    """For each product and shape: the shipped and the fastest configurations, relative to the BLAS call.

    ``timers``: only these.
    """
    blocks: dict[tuple, list[Row]] = {}
    for row in rows:
        if row.section == "tiles" and (timers is None or row.timer in timers):
            key = row.mode, row.M, row.N, row.K, row.R, row.dtype, row.timer
            blocks.setdefault(key, []).append(row)
    lines = ["tile shapes: time over the BLAS call's, the shipped one first"]
    for (product, M, N, K, R, dtype, timer), block in blocks.items():
        timed = sorted(
            (row for row in block if row.ratio is not None and row.provider != FLOOR),
            key=lambda row: row.ratio,
        )
        failed = sum(row.status != OK for row in block)
        head = f"{product} M{M}-N{N}-K{K}-R{R} {dtype}, {timer} timer"
        lines.append(f"{head}: {len(timed)} timed, {failed} failed")
        shipped = [row for row in timed if row.provider.startswith(TRITON)]
        for row in [*shipped, *(row for row in timed[:FASTEST] if row not in shipped)]:
            lines.append(f"  {row.ratio:.3f} {row.median_ms * 1e3:8.1f} us  {row.provider}")
    return "\n".join(lines)
