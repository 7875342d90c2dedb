"""``python -m fastlora tune``: measures the paths on this GPU and writes the rows that the planner reads.

Each path of each product is checked against a float64 result, then the paths that passed are timed in turn,
in one run. After every shape the rows are written to a file in the user's cache folder, so an interrupted run
keeps what it measured and ``--resume`` continues from there. A path that broke the GPU is not run again.

Times are those of CUDA graphs, without the host's overhead for calls launched one by one.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import random
import re
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastlora import masks, measured, ops, planner, reference
from fastlora.adapters import config_from
from fastlora.checks import dtype_name
from fastlora.device import Device, describe, sums_in_float32
from fastlora.kernels import configs
from fastlora.measured import OK, Row
from fastlora.planner import Problem, Step
from fastlora.targets import is_all_linear, linear_names

# The (out, in) features of common 7B to 13B decoders, for training and decoding.
FEATURES = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (8192, 8192))
TOKENS = (1, 2, 4, 8, 16, 64, 256, 512, 1024, 2048, 4096, 8192)
RANKS = (16, 64)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
ADAPTER_DTYPES = {"base": None, "fp32": torch.float32}
ALPHA = 0.5
DROPOUT = 0.1
# The criterion of every test: at most twice the error of eager PyTorch in the same dtypes, plus some slack.
FACTOR, SLACK = 2.0, 1e-6
# Rows and columns of a result that the check compares; not all, as float64 is slow on most GPUs.
_SAMPLED = 256
_MAX_SETS, _MAX_BYTES = 32, 2 * 1024**3
# Status prefix of a path that left the GPU unusable.
_LOST = "lost the GPU: "

# Path names and the calls to time, one for each input set -> seconds per call of each path.
Timer = Callable[[Mapping[str, Sequence[Callable[[], object]]]], Mapping[str, float]]


class DeviceLost(RuntimeError):
    """A path broke the GPU's context, so nothing more can be measured in this process."""

    def __init__(self, row: Row) -> None:
        super().__init__(
            f"{row.product} by {row.path} at M={row.M}, N={row.N}, K={row.K}, R={row.R}: {row.status}"
        )
        self.row = row


@dataclass(frozen=True, order=True)
class Shape:
    """M tokens, N out-features, K in-features, rank R."""

    M: int
    N: int
    K: int
    R: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Parse "M,N,K,R"; ValueError (as argparse expects) for anything else."""
        sizes = [int(part) for part in text.split(",")]
        if len(sizes) != 4 or min(sizes) < 1 or sizes[3] > configs.MAX_RANK:
            raise ValueError(text)
        return cls(*sizes)

    def __str__(self) -> str:
        return f"M={self.M} N={self.N} K={self.K} R={self.R}"


@dataclass(frozen=True)
class Job:
    """One shape to measure, with the dtype of everything but the adapters, and theirs."""

    dtype: torch.dtype
    adapter_dtype: torch.dtype
    shape: Shape

    def __str__(self) -> str:
        adapters = f", {self.adapter_dtype} adapters" if self.adapter_dtype != self.dtype else ""
        return f"{self.shape}, {self.dtype}{adapters}"

    def problem(self, device: Device, dropout: bool = False) -> Problem:
        s = self.shape
        return Problem(device, self.dtype, s.M, s.N, s.K, s.R, dropout, self.adapter_dtype)


@dataclass(frozen=True)
class Inputs:
    """x: (M, K), weight: (N, K), A: (N, R), B: (R, K), dy: (M, N), h and g: (M, R).

    All are of one dtype, except that A and B may be wider.
    """

    x: Tensor
    weight: Tensor
    A: Tensor
    B: Tensor
    dy: Tensor
    h: Tensor
    g: Tensor
    seed: Tensor


def draw_inputs(job: Job, device: torch.device, seed: int = 0) -> Inputs:
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(rows, columns, generator=generator, device=device, dtype=torch.float32)
        return values * scale

    dtype, shape = job.dtype, job.shape
    M, N, K, R = shape.M, shape.N, shape.K, shape.R
    x, dy = normal(M, K).to(dtype), normal(M, N).to(dtype)
    A, B = normal(N, R, R**-0.5).to(job.adapter_dtype), normal(R, K, K**-0.5).to(job.adapter_dtype)
    return Inputs(
        x=x,
        weight=normal(N, K, K**-0.5).to(dtype),
        A=A,
        B=B,
        dy=dy,
        h=x @ B.t().to(dtype),
        g=dy @ A.to(dtype),
        seed=torch.tensor([seed], device=device),
    )


@dataclass(frozen=True)
class Computation:
    """One product on one set of inputs: computed by any path, and part of each result in float64."""

    run: Callable[[str], Tensor | tuple[Tensor, ...]]
    exact: tuple[Callable[[Tensor, Tensor], Tensor], ...]


def computation(product: str, problem: Problem, t: Inputs, before: Sequence[Row] = ()) -> Computation:
    """``run(path)`` gives the whole result or results, ``exact(rows, columns)`` those elements of each.

    ``before``: measured rows of the same sizes, which determine the fastest paths of g and dA apart.
    """

    def step(name: str, path: str) -> Step:
        return planner.step_of(problem, name, path, "")

    def drop() -> ops.Dropout | None:
        # A new one for each call, as it caches the mask that the paths without kernels write.
        return ops.make_dropout(DROPOUT, t.seed if problem.dropout else None, problem.M, problem.K)

    def keep() -> Tensor:
        """(M, K) factors of x in float64."""
        if not problem.dropout:
            return torch.ones_like(t.x, dtype=torch.float64)
        mask = reference.keep_mask(t.seed, problem.M, problem.K, DROPOUT)
        return mask.double() * masks.keep_scale(DROPOUT)

    def project(name: str, p: Tensor, q: Tensor) -> Computation:
        def exact(rows: Tensor, columns: Tensor) -> Tensor:
            factors = keep()[rows] if name == "h" else 1.0
            return (p[rows].double() * factors) @ q[:, columns].double()

        dropped = drop if name == "h" else lambda: None
        return Computation(lambda path: ops.run_project(step(name, path), p, q, dropped()), (exact,))

    def gemm(name: str, p: Tensor, q: Tensor, u: Tensor, v: Tensor) -> Computation:
        def exact(rows: Tensor, columns: Tensor) -> Tensor:
            update = ALPHA * (u[rows].double() @ v[:, columns].double())
            if name == "dx":
                update *= keep()[rows][:, columns]
            return p[rows].double() @ q[:, columns].double() + update

        dropped = drop if name == "dx" else lambda: None

        def run(path: str) -> Tensor:
            return ops.run_gemm(step(name, path), p, q, u, v, ALPHA, drop=dropped())

        return Computation(run, (exact,))

    def token_sum(name: str, p: Tensor, u: Tensor) -> Computation:
        transposed = name == "dB"
        dropped = drop if transposed else lambda: None

        def exact(rows: Tensor, columns: Tensor) -> Tensor:
            if not transposed:
                return ALPHA * (p[:, rows].double().t() @ u[:, columns].double())
            return ALPHA * (u[:, rows].double().t() @ (p[:, columns].double() * keep()[:, columns]))

        def run(path: str) -> Tensor:
            return ops.run_token_sum(step(name, path), p, u, ALPHA, t.A.dtype, transposed, dropped())

        return Computation(run, (exact,))

    def g_and_dA() -> Computation:
        parts = {"g": project("g", t.dy, t.A), "dA": token_sum("dA", t.dy, t.h)}
        fastest = {name: _fastest(before, name) for name in parts}
        one = Step("project", "triton", planner.backward_config(problem), "")

        def run(path: str) -> tuple[Any, ...]:
            if path == "together":
                return ops.run_g_and_dA(one, t.dy, t.A, t.h, ALPHA)
            return tuple(part.run(fastest[name] if path == "apart" else path) for name, part in parts.items())

        return Computation(run, tuple(exact for part in parts.values() for exact in part.exact))

    def forward(path: str) -> Tensor:
        if path == "small":
            small = Step("gemm", "triton", planner.small_config(problem), "")
            return ops.run_small(small, t.x, t.weight, t.A, t.B, None, ALPHA)[0]
        if path == "addmm":
            return ops.addmm_forward(t.x, t.weight, t.A, t.B, None, ALPHA, None)[0]
        h = ops.run_project(step("h", path), t.x, t.B.t())
        return ops.run_gemm(step("y", path), t.x, t.weight.t(), h, t.A.t(), ALPHA)

    def exact_forward(rows: Tensor, columns: Tensor) -> Tensor:
        x = t.x[rows].double()
        update = x @ t.B.double().t() @ t.A[columns].double().t()
        return x @ t.weight[columns].double().t() + ALPHA * update

    return {
        "h": lambda: project("h", t.x, t.B.t()),
        "y": lambda: gemm("y", t.x, t.weight.t(), t.h, t.A.t()),
        "g": lambda: project("g", t.dy, t.A),
        "dx": lambda: gemm("dx", t.dy, t.weight, t.g, t.B),
        "dA": lambda: token_sum("dA", t.dy, t.h),
        "dB": lambda: token_sum("dB", t.x, t.g),
        "forward": lambda: Computation(forward, (exact_forward,)),
        "g+dA": g_and_dA,
    }[product]()


def _fastest(rows: Iterable[Row], product: str) -> str:
    """The fastest path of a product that passed its check, "addmm" if none did."""
    timed = [row for row in rows if row.product == product and row.status == OK]
    return min(timed, key=lambda row: row.time).path if timed else "addmm"


def products(shape: Shape) -> list[tuple[str, bool]]:
    """(product, dropout) of everything measured at a shape; g and dA precede "g+dA"."""
    plain = [name for name in measured.SIZES if name != "forward" or shape.M <= configs.SMALL_ROWS]
    return [(name, False) for name in plain] + [(name, True) for name in planner.DROPPED]


def check(one: Computation, path: str, rounded: Computation) -> str:
    """ "ok", or what is wrong with a path: an exception, a non-finite value or too large an error.

    ``rounded``: the same with adapters of the base's dtype, as eager PyTorch has them under autocast.
    """
    try:
        with sums_in_float32():
            results, eager = as_tuple(one.run(path)), as_tuple(rounded.run("reference"))
        faults = (_fault(*each) for each in zip(results, eager, one.exact, strict=True))
        return next((fault for fault in faults if fault), OK)
    except Exception as error:  # whatever a compiler or driver raises, the path does not work here
        ops.raise_out_of_memory(error)
        return f"failed: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"[:200]


def as_tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else results


def _fault(result: Tensor, eager: Tensor, exact: Callable[[Tensor, Tensor], Tensor]) -> str | None:
    """What is wrong with one result, None if nothing is."""
    if result.shape != eager.shape or not torch.isfinite(result).all():
        return "check failed: not finite, or of another shape"
    rows, columns = (_sample(size, result.device) for size in result.shape)
    truth = exact(rows, columns)
    errors, allowed = ((value[rows][:, columns].double() - truth).abs() for value in (result, eager))
    for kind, norm in (("largest", Tensor.max), ("rms", lambda error: error.square().mean().sqrt())):
        ours, limit = norm(errors).item(), FACTOR * norm(allowed).item() + SLACK
        if not ours <= limit:
            return f"check failed: {kind} error {ours:.3g}, allowed {limit:.3g}"
    return None


def _sample(size: int, device: torch.device) -> Tensor:
    """Indices spread over ``size``, including the first and the last."""
    return torch.linspace(0, size - 1, min(size, _SAMPLED), device=device).round().long().unique()


def _works(device: torch.device) -> bool:
    """Whether the device still responds: an illegal access makes it unusable for the whole process."""
    try:
        torch.zeros(1, device=device).item()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return False
    return True


def measure(
    product: str,
    dropout: bool,
    job: Job,
    described: Device,
    sets: Sequence[Inputs],
    timer: Timer,
    before: Sequence[Row],
    broken: Mapping[tuple, str],
) -> list[Row]:
    """The rows of one product at one shape: every path is checked, and those that passed are timed together.

    ``before``: rows of g and dA at the same sizes. ``broken``: the statuses, by (family, path), of paths that
    broke the GPU in an earlier run and are skipped. Returns no rows, with a warning, if the timer fails.

    Raises:
        DeviceLost: with the row of the path that broke the device; of a kernel, if they were being timed.
    """
    shape, problem = job.shape, job.problem(described, dropout)
    computations = [computation(product, problem, inputs, before) for inputs in sets]
    rounded = computation(product, problem, _rounded(sets[0]), before)
    paths = measured.PATHS[product]

    def row(path: str, status: str, seconds: float | None = None) -> Row:
        return Row(
            gpu=described.name,
            capability=described.capability,
            triton=measured.triton_version(),
            dtype=dtype_name(job.dtype),
            adapter_dtype=dtype_name(job.adapter_dtype),
            product=product,
            M=shape.M,
            N=shape.N,
            K=shape.K,
            R=shape.R,
            dropout=dropout,
            path=path,
            microseconds=None if seconds is None else round(seconds * 1e6, 3),
            status=status,
        )

    status = {}
    for path in paths:
        lost = broken.get((row(path, _LOST).family, path))
        if lost is not None:
            status[path] = lost
            continue
        status[path] = check(computations[0], path, rounded)
        if status[path] != OK and not _works(sets[0].x.device):
            raise DeviceLost(row(path, f"{_LOST}{status[path]}"))
    calls = {
        path: [functools.partial(one.run, path) for one in computations]
        for path in paths
        if status[path] == OK
    }
    try:
        seconds = timer(calls) if calls else {}
    except RuntimeError as error:  # such as a failed capture: no times, and no path is to blame
        ops.raise_out_of_memory(error)
        reason = (str(error).strip().splitlines() or [""])[0]
        if not _works(sets[0].x.device):
            # Any of them may have done it; the first is a kernel of ours, the last the BLAS.
            raise DeviceLost(row(next(iter(calls)), f"{_LOST}timed: {reason}"[:200])) from error
        warnings.warn(f"{product} at {job} was not timed: {reason}", RuntimeWarning, stacklevel=2)
        return []
    return [row(path, status[path], seconds.get(path)) for path in paths]


def _rounded(inputs: Inputs) -> Inputs:
    """The same with adapters of the base's dtype."""
    A, B = inputs.A.to(inputs.x.dtype), inputs.B.to(inputs.x.dtype)
    return dataclasses.replace(inputs, A=A, B=B)


def _dtypes(dtype: str, adapter_dtype: str) -> str:
    return dtype if adapter_dtype == dtype else f"{dtype}+{adapter_dtype}"


def _sizes(product: str, dropout: bool, dtype: str, adapter_dtype: str, shape: Shape | Row) -> tuple:
    """Everything that the rows of a product depend on; jobs with the same key share rows."""
    sizes = tuple(getattr(shape, size) for size in measured.SIZES[product])
    return product, dropout, dtype, adapter_dtype, shape.M, sizes, shape.R


def _earlier(path: Path, described: Device) -> list[Row]:
    """The rows for this GPU and Triton in a file; none if it is missing or invalid, to be replaced."""
    machine = described.name, described.capability, measured.triton_version()
    try:
        return [row for row in measured.read_rows(path) if (row.gpu, row.capability, row.triton) == machine]
    except (FileNotFoundError, ValueError):
        return []


def tune(
    jobs: Iterable[Job],
    device: torch.device,
    described: Device,
    timer: Timer,
    path: Path,
    resume: bool = False,
) -> Iterator[tuple[Job, list[Row], bool]]:
    """Measure every job and save its rows in ``path``; yields the rows, and whether memory sufficed for all.

    Products that two shapes share (h does not depend on N) are measured once; with ``resume``, products whose
    rows are all in ``path`` are not measured again. Cached plans are cleared afterwards.

    Raises:
        DeviceLost: see :func:`measure`; what was measured is saved.
        OSError: the file cannot be read or written.
    """
    earlier = _earlier(path, described)
    broken = {(row.family, row.path): row.status for row in earlier if row.status.startswith(_LOST)}
    known: dict[tuple, list[Row]] = {}
    for row in earlier if resume else ():
        sizes = _sizes(row.product, row.dropout, row.dtype, row.adapter_dtype, row)
        known.setdefault(sizes, []).append(row)
    whole = {product: set(paths) for product, paths in measured.PATHS.items()}
    known = {sizes: rows for sizes, rows in known.items() if {row.path for row in rows} == whole[sizes[0]]}
    for job in jobs:
        shape, dtypes = job.shape, (dtype_name(job.dtype), dtype_name(job.adapter_dtype))
        rows: list[Row] = []
        complete = True
        sets: list[Inputs] = []
        try:
            for product, dropout in products(shape):
                sizes = _sizes(product, dropout, *dtypes, shape)
                if sizes in known:
                    continue
                if not sets:
                    count = _input_sets(shape, device)
                    sets = [draw_inputs(job, device, seed) for seed in range(count)]
                parts = (known.get(_sizes(part, False, *dtypes, shape), []) for part in ("g", "dA"))
                before = [row for part in parts for row in part]
                known[sizes] = measure(product, dropout, job, described, sets, timer, before, broken)
                rows += known[sizes]
        except torch.OutOfMemoryError:
            complete = False
        except DeviceLost as lost:
            measured.save_rows(path, [*rows, lost.row])
            planner.forget_plans()
            raise
        sets = []
        if rows:
            measured.save_rows(path, rows)
            planner.forget_plans()
        yield job, rows, complete


def _input_sets(shape: Shape, device: torch.device) -> int:
    """The number of input sets that a shape's products are timed with, within a limit of memory."""
    M, N, K = shape.M, shape.N, shape.K
    whole = 2 * (M * (N + K) + N * K)
    return min(input_sets(2 * least_read(M, N, K), device), max(2, _MAX_BYTES // whole))


def input_sets(bytes_read: int, device: torch.device, fewest: int = 2) -> int:
    """How many input sets to use in turn: on a GPU, enough for three times its L2 cache; on a CPU, one.

    ``bytes_read``: what the timed calls read of each set.
    """
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(fewest, min(_MAX_SETS, math.ceil(3 * cache / max(bytes_read, 1))))


def least_read(M: int, N: int, K: int) -> int:
    """The fewest elements that a product of a layer reads of its inputs, not counting what is in L2 cache.

    The skinny products read only x or dy. For few tokens those are in the cache anyway, but not the weight.
    """
    return M * min(N, K) if M > 64 else N * K


def time_on_gpu(
    functions: Mapping[str, Sequence[Callable[[], object]]], rounds: int = 11, sample: float = 1e-3
) -> dict[str, float]:
    """Median device seconds per call of each path, from CUDA graphs timed in turn on the current device.

    A graph holds one call for each input set, so Python's overhead is excluded and the inputs come from
    memory; in every round each path has one sample of about ``sample`` seconds, in a new random order.
    """
    graphs = {name: capture(in_turn(calls), torch.cuda.Stream()) for name, calls in functions.items()}
    repeats = {}
    for name, graph in graphs.items():
        graph.replay()
        repeats[name] = max(1, math.ceil(sample / max(_sample_seconds(graph, 1), 1e-7)))
    order, generator = list(graphs), random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds):
        generator.shuffle(order)
        for name in order:
            seconds = _sample_seconds(graphs[name], repeats[name])
            times[name].append(seconds / (repeats[name] * len(functions[name])))
    return {name: statistics.median(values) for name, values in times.items()}


def in_turn(functions: Iterable[Callable[[], object]]) -> Callable[[], None]:
    """One function that calls all of them, to rotate over input sets so that none stays in cache."""
    functions = tuple(functions)

    def call_all() -> None:
        for function in functions:
            function()

    return call_all


def capture(
    function: Callable[[], object], stream: torch.cuda.Stream, warm_up: int = 1
) -> torch.cuda.CUDAGraph:
    """A CUDA graph of ``function``, captured on ``stream`` after a warm-up; its inputs must stay alive."""
    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        for _ in range(warm_up):
            function()
    current.wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            function()
    finally:
        torch.cuda.set_stream(current)  # PyTorch 2.11 omits this if the capture fails at its end
    return graph


def _sample_seconds(graph: torch.cuda.CUDAGraph, repeats: int) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def model_layers(name: str) -> set[tuple[int, int, int | None]]:
    """(N, K, rank) of the linear layers of a model, or of an adapter in PEFT's format; rank None for a model.

    Args:
        name: a directory with ``adapter_config.json``, or a directory or name that transformers'
            ``AutoConfig`` reads. No weights are loaded.

    Raises:
        ValueError: it cannot be read or has no linear layer; says what to do.
    """
    config = Path(name) / "adapter_config.json"
    layers: set[tuple[int, int, int | None]]
    if not config.is_file():
        layers = {(n, k, None) for n, k in _linear_features(_meta_model(name)).values()}
    elif (weights := config.with_name("adapter_model.safetensors")).is_file():
        layers = _adapter_layers(weights)
    else:
        layers = _configured_layers(config)
    if not layers:
        raise ValueError(f"{name} has no linear layers to tune")
    return layers


def _adapter_layers(path: Path) -> set[tuple[int, int, int | None]]:
    """The layers in an adapter's file: ``lora_A`` is (R, K), ``lora_B`` (N, R)."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ValueError(f"reading {path} needs the safetensors package: pip install safetensors") from error
    try:
        with safe_open(path, "pt") as file:
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    layers = set()
    for key, down in shapes.items():
        up = shapes.get(key.replace(".lora_A.", ".lora_B."))
        if re.search(r"\.lora_A\.(\w+\.)?weight$", key) and up and len(up) == len(down) == 2:
            layers.add((up[0], down[1], down[0]))
    return layers


def _configured_layers(path: Path) -> set[tuple[int, int, int | None]]:
    """The layers of the base model that an adapter's configuration selects."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        base = fields["base_model_name_or_path"]
        config = config_from(fields)
    except (OSError, ValueError, KeyError, TypeError, OverflowError, re.error) as error:
        raise ValueError(
            f"{path} is not an adapter configuration: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(base, str):
        raise ValueError(f"{path}: base_model_name_or_path={base!r}, expected a name")
    model, selector = _meta_model(base), config.selector
    sizes = _linear_features(model)
    if is_all_linear(selector.target_modules):
        selector = dataclasses.replace(selector, target_modules=tuple(sizes))
    layers: set[tuple[int, int, int | None]] = set()
    for own, (n, k) in sizes.items():
        # The configuration names layers of the model with its head, where this one is a child of that name.
        for name in (f"{getattr(model, 'base_model_prefix', '')}.{own}", own):
            if selector.covers(name):
                layers.add((n, k, config.rank_of(name)))
                break
    return layers


def _meta_model(name: str) -> nn.Module:
    try:
        from transformers import AutoConfig, AutoModel
    except ImportError as error:
        raise ValueError(
            f"--model {name} needs the transformers package: pip install transformers"
        ) from error
    try:
        config = AutoConfig.from_pretrained(name)
        with torch.device("meta"):
            return AutoModel.from_config(config)
    except Exception as error:  # whatever transformers makes of an unusual configuration
        why = " ".join(str(error).split())[:300]
        raise ValueError(f"transformers cannot build {name}: {type(error).__name__}: {why}") from error


def _linear_features(model: nn.Module) -> dict[str, tuple[int, int]]:
    """(out, in) features of the linear layers except the head, by name."""
    layers: dict[str, Any] = {path: model.get_submodule(path) for path in linear_names(model)}
    return {path: (layer.out_features, layer.in_features) for path, layer in layers.items()}


def job_list(options: argparse.Namespace) -> list[Job]:
    """Everything to measure, without repeats; ValueError for an unreadable model."""
    if options.shapes:
        shapes = sorted(set(options.shapes))
    else:
        layers = {(n, k, None) for n, k in FEATURES} if options.model is None else model_layers(options.model)
        found = {
            Shape(m, n, k, r)
            for n, k, rank in layers
            for m in options.tokens
            for r in (options.ranks if rank is None else (rank,))
            if r <= configs.MAX_RANK
        }
        # Decoding and long batches come first: they matter most if a run ends early.
        shapes = sorted(found, key=lambda shape: (shape.M not in (1, 16), shape.M > 16 and -shape.M, shape))
    return [
        Job(DTYPES[dtype], ADAPTER_DTYPES[adapters] or DTYPES[dtype], shape)
        for dtype in dict.fromkeys(options.dtype)
        for adapters in dict.fromkeys(options.adapter_dtype)
        for shape in shapes
    ]


def _with_progress(jobs: list[Job]) -> Iterable[Job]:
    try:
        from tqdm import tqdm
    except ImportError:
        return _with_lines(jobs)
    return tqdm(jobs, desc="tune", unit="shape")


def _with_lines(jobs: list[Job]) -> Iterator[Job]:
    for number, job in enumerate(jobs, 1):
        print(f"[{number}/{len(jobs)}] {job}", file=sys.stderr, flush=True)
        yield job


def _until(end: float, jobs: Iterable[Job]) -> Iterator[Job]:
    """The jobs that start before ``end``, in seconds of the monotonic clock."""
    for job in jobs:
        if time.monotonic() >= end:
            return
        yield job


def table(rows: Sequence[Row]) -> str:
    """One line per product: the time of each path, and the path that plan will choose."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        dtypes = _dtypes(row.dtype, row.adapter_dtype)
        groups.setdefault((dtypes, row.product, row.dropout, *row.shape), []).append(row)
    lines = []
    for (dtypes, product, dropout, *sizes), paths in groups.items():
        timed = [row for row in paths if row.status == OK]
        best = min(timed, key=lambda row: row.time).path if timed else "none"
        figures = ", ".join(
            f"{row.path} {row.microseconds:.1f} us" if row.status == OK else f"{row.path} {row.status}"
            for row in paths
        )
        name = f"{product}{' dropout' * dropout}"
        lines.append(f"{dtypes:<9} {Shape(*sizes)!s:<28} {name:<11} {best:<8} {figures}")
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    def shape(text: str) -> Shape:
        try:
            return Shape.parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(
                f"{text!r}: expected M,N,K,R, four positive numbers, R at most {configs.MAX_RANK}"
            ) from error

    def positive(text: str) -> int:
        if not text.isdecimal() or int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a positive number")
        return int(text)

    def minutes(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not value > 0.0:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a positive number of minutes")
        return value

    parser = argparse.ArgumentParser(
        prog="python -m fastlora tune",
        description="Check and time the paths of a LoRA layer on this GPU; fastlora then takes the fastest.",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--shapes", nargs="+", type=shape, metavar="M,N,K,R", help="tokens, out-features, in-features, rank"
    )
    what.add_argument(
        "--model", metavar="DIR_OR_NAME", help="the linear layers of a transformers model or a PEFT adapter"
    )
    parser.add_argument(
        "--tokens", nargs="+", type=positive, default=TOKENS, help="values of M where --shapes is not given"
    )
    parser.add_argument(
        "--ranks", nargs="+", type=positive, default=RANKS, help="values of R where nothing else gives it"
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument(
        "--adapter-dtype",
        nargs="+",
        choices=ADAPTER_DTYPES,
        default=["base"],
        help="that of A and B: the base's, or fp32, as PEFT makes them unless told otherwise",
    )
    parser.add_argument("--out", type=Path, help="file to write (default: the one that plan reads)")
    parser.add_argument(
        "--minutes", type=minutes, default=math.inf, help="start no further shape after this many minutes"
    )
    parser.add_argument(
        "--resume", action="store_true", help="skip what already has rows of this GPU in the file"
    )
    parser.add_argument("--list", action="store_true", help="only list what would be measured")
    return parser


def main(
    argv: list[str] | None = None,
    *,
    device: torch.device | None = None,
    described: Device | None = None,
    timer: Timer = time_on_gpu,
) -> int:
    """Run the command. Returns 0, or 2 if nothing can be measured, 130 if interrupted.

    Args:
        argv: the command line after ``tune``; that of the process if None.
        device, described, timer: the device to measure on (the current GPU if None), its description for the
            planner, and the timer to use. For tests.
    """
    options = _parser().parse_args(argv)
    try:
        jobs = job_list(options)
    except ValueError as error:
        return _give_up(str(error))
    if not jobs:
        return _give_up(f"nothing to measure: the kernels take ranks up to {configs.MAX_RANK}")
    if options.list:
        for job in jobs:
            print(f"{_dtypes(dtype_name(job.dtype), dtype_name(job.adapter_dtype)):<9} {job.shape}")
        return 0
    if device is None and not torch.cuda.is_available():
        return _give_up("there is no GPU here to measure; on a CPU fastlora always uses the BLAS")
    device = device or torch.device("cuda", torch.cuda.current_device())
    described = described or describe(device)
    obstacle = planner.why_not_triton(Problem(described, jobs[0].dtype, 1, 1, 1, 1))
    if obstacle:
        return _give_up(f"nothing to choose: {obstacle}")
    path = options.out or measured.user_file()
    if path is None:
        return _give_up("no home folder to write to; use --out FILE")
    if options.out is not None and options.out.is_file() and options.out.stat().st_size:
        try:
            measured.read_rows(path)
        except (OSError, ValueError) as error:
            return _give_up(f"{path} has other contents and is not replaced: {error}")
    rows, skipped, done = [], [], 0
    interrupted = False
    in_time = _until(time.monotonic() + 60 * options.minutes, _with_progress(jobs))
    try:
        for job, new, complete in tune(in_time, device, described, timer, path, options.resume):
            done += 1
            rows += new
            if not complete:
                skipped.append(f"{job}{', in part' * bool(new)}")
    except KeyboardInterrupt:
        interrupted = True
    except DeviceLost as lost:
        return _give_up(
            f"the GPU stopped: {lost}. This path will not be chosen or run again; the rows so far are in "
            f"{path}, --resume goes on"
        )
    except OSError as error:
        return _give_up(f"{path} cannot be written: {error}")
    print(table(rows))
    for what in skipped:
        print(f"left out, the GPU's memory is too small: {what}")
    if done < len(jobs) and not interrupted:
        print(f"left out for lack of time: {len(jobs) - done} of {len(jobs)} shapes")
    wrong = [row for row in rows if row.status != OK]
    if wrong:
        print(f"{len(wrong)} paths failed their check and will not be chosen")
    print(f"{'interrupted; ' * interrupted}{len(rows)} rows for {described.name} in {path}")
    return 130 if interrupted else 0


def _give_up(reason: str) -> int:
    print(f"fastlora tune: {reason}", file=sys.stderr)
    return 2
