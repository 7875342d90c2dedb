"""Which path runs each primitive of a layer, and why.

Three paths compute the same values: ``triton`` (the fused kernels), ``addmm`` (cuBLAS or the CPU's BLAS with
beta = 1, the strongest unfused form) and ``reference`` (the plain formula). The choice is made here, for
forward and backward alike, from shapes, dtypes and the device; where no measured row decides, a small
roofline estimate does. Everything is plain arithmetic: it is tested without a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fastlora.kernels import configs

PATHS = ("triton", "addmm", "reference")
MODES = ("auto", *PATHS)
_HALF = (torch.float16, torch.bfloat16)
# Full-precision inputs have no tensor-core path worth choosing, but the kernels compute them when asked.
_KERNEL_DTYPES = (*_HALF, torch.float32)

_mode = "auto"


@dataclass(frozen=True)
class Device:
    """What the planner knows of a device. ``capability``: 10 * major + minor, 0 where there is none."""

    kind: str
    name: str = ""
    capability: int = 0
    sms: int = 0
    rocm: bool = False


@dataclass(frozen=True)
class Roofline:
    """Peak rates of an architecture and the share of cuBLAS's rate that the classic Triton loop reaches."""

    flops: float
    bytes: float
    loop_efficiency: float


# Dense bf16 operations and bytes a second. 90: measured on an H200 (large torch.mm, device copy); the others
# are the vendor's data sheets: A100 SXM, A40, L40S, B200, RTX 5090. The efficiencies are estimates, until
# rows are measured; 0 means that the architecture needs a main loop of its own first.
ROOFLINES = {
    80: Roofline(312e12, 2.0e12, 0.97),
    86: Roofline(150e12, 0.70e12, 0.97),
    89: Roofline(362e12, 0.86e12, 0.97),
    90: Roofline(790e12, 4.3e12, 0.87),
    100: Roofline(2250e12, 8.0e12, 0.0),
    120: Roofline(210e12, 1.79e12, 0.0),
}
# Share of the memory's rate that a skinny product reaches, and one kernel's launch in seconds: estimates.
_TRITON_SKINNY, _CUBLAS_SKINNY = 0.85, 0.60
_LAUNCH = 4e-6


@dataclass(frozen=True)
class Step:
    """How one product is computed: ``config`` is the kernel's tile shape, None unless ``path`` is triton."""

    primitive: str
    path: str
    config: configs.ProjectConfig | configs.GemmConfig | configs.TokenSumConfig | None
    reason: str


@dataclass(frozen=True)
class Plan:
    """The six products of a LoRA linear layer, named as in :mod:`fastlora.reference`."""

    h: Step
    y: Step
    g: Step
    dx: Step
    dA: Step
    dB: Step

    @functools.cached_property
    def all_addmm(self) -> bool:
        """Whether every product takes the addmm form, which then runs as one short chain."""
        return all(getattr(self, name).path == "addmm" for name in self.__dataclass_fields__)

    @property
    def path(self) -> str:
        """The path of the forward gemm with rank-R update."""
        return self.y.path

    @property
    def reason(self) -> str:
        return self.y.reason

    @property
    def project(self) -> Step:
        """The forward project, h."""
        return self.h

    @property
    def gemm(self) -> Step:
        """The forward gemm with rank-R update, y."""
        return self.y

    @property
    def token_sum(self) -> Step:
        """The token sum of dA."""
        return self.dA

    def __str__(self) -> str:
        return "\n".join(
            f"{name:<3}{step.primitive:<10}{step.path:<10}{step.reason}"
            for name, step in ((name, getattr(self, name)) for name in self.__dataclass_fields__)
        )


@dataclass(frozen=True)
class Problem:
    """What a plan depends on. M: tokens, N: out_features, K: in_features, R: rank."""

    device: Device
    dtype: torch.dtype
    M: int
    N: int
    K: int
    R: int
    dropout: bool = False


@contextmanager
def use_path(mode: str) -> Iterator[None]:
    """Run every layer inside the block on one path; for tests and benchmarks.

    Args:
        mode: "auto" (the planner chooses), "triton", "addmm" or "reference". A forward pass remembers the
            mode for its own backward pass.

    Raises:
        ValueError: unknown mode. A layer that cannot run on the path raises RuntimeError when it is called.
    """
    global _mode
    if mode not in MODES:
        raise ValueError(f"use_path: unknown path {mode!r}, expected one of {', '.join(map(repr, MODES))}")
    previous, _mode = _mode, mode
    try:
        yield
    finally:
        _mode = previous


def current_mode() -> str:
    """The mode that the innermost :func:`use_path` has set."""
    return _mode


def interpreting() -> bool:
    """Whether this process runs Triton kernels in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def has_triton() -> bool:
    """Whether the triton package is installed (it is not imported)."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def describe(device: torch.device) -> Device:
    """What the planner needs to know of a torch device; asks the driver once for each GPU."""
    if device.type != "cuda":
        return Device(kind=device.type)
    properties = torch.cuda.get_device_properties(device)
    return Device(
        kind="cuda",
        name=properties.name,
        capability=10 * properties.major + properties.minor,
        sms=properties.multi_processor_count,
        rocm=torch.version.hip is not None,
    )


def why_not_triton(problem: Problem) -> str | None:
    """Why the kernels cannot compute this problem, None where they can."""
    device = problem.device
    if not has_triton():
        return "the triton package is not installed"
    if problem.dtype not in _KERNEL_DTYPES:
        return f"the kernels compute float16, bfloat16 and float32, not {_name(problem.dtype)}"
    if problem.R > configs.MAX_RANK:
        return f"the kernels take ranks up to {configs.MAX_RANK}, not {problem.R}"
    if device.kind == "cpu":
        return None if interpreting() else "CPU tensors reach the kernels only with TRITON_INTERPRET=1"
    if device.kind != "cuda" or device.rocm:
        return f"the kernels are for NVIDIA GPUs, not {'ROCm' if device.rocm else device.kind}"
    if device.capability < configs.MIN_CAPABILITY:
        return f"the kernels need sm_{configs.MIN_CAPABILITY} or newer, this GPU is sm_{device.capability}"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.lru_cache(maxsize=4096)
def make_plan(problem: Problem, mode: str = "auto") -> Plan:
    """The plan of a problem; raises RuntimeError where ``mode`` asks for kernels that cannot run."""
    obstacle = why_not_triton(problem)
    if mode == "triton" and obstacle:
        raise RuntimeError(f"use_path('triton'): {obstacle}")
    if mode != "auto":
        return _uniform_plan(problem, mode, f"use_path({mode!r})")
    if problem.device.kind == "cpu":
        return _uniform_plan(
            problem, "addmm", "CPU: the BLAS with beta = 1 makes one pass less over y and dx"
        )
    if obstacle:
        return _uniform_plan(problem, "addmm", obstacle)
    if problem.dtype not in _HALF:
        return _uniform_plan(problem, "addmm", f"{_name(problem.dtype)} has no fused tensor-core kernel")
    return _estimated_plan(problem)


def _uniform_plan(problem: Problem, path: str, reason: str) -> Plan:
    """Every step on one path."""
    if path == "triton" and interpreting():
        reason += ", in Triton's interpreter"
    return Plan(**{name: _step(problem, name, path, reason) for name in Plan.__dataclass_fields__})


def _sizes(problem: Problem, name: str) -> tuple[str, int, int]:
    """The primitive of a step with its D and E: (M, D) @ (D, E), or (M, D).T @ (M, R)."""
    p = problem
    return {
        "h": ("project", p.K, p.R),
        "y": ("gemm", p.K, p.N),
        "g": ("project", p.N, p.R),
        "dx": ("gemm", p.N, p.K),
        "dA": ("token_sum", p.N, p.R),
        "dB": ("token_sum", p.K, p.R),
    }[name]


def _step(problem: Problem, name: str, path: str, reason: str) -> Step:
    primitive, D, E = _sizes(problem, name)
    config = None
    if path == "triton" and problem.M and D and E:
        # The interpreter has no architecture: it takes the tiles of the oldest.
        capability = problem.device.capability or configs.MIN_CAPABILITY
        M, R, itemsize = problem.M, problem.R, problem.dtype.itemsize
        if primitive == "project":
            config = configs.select_project(capability, M, R, itemsize)
        elif primitive == "gemm":
            config = configs.select_gemm(capability, M, E, R, itemsize, problem.dropout and name == "dx")
        else:
            config = configs.select_token_sum(capability, problem.device.sms or 8, M, D, R, itemsize)
    return Step(primitive, path, config, reason)


def _estimated_plan(problem: Problem) -> Plan:
    """Each step on the path whose estimated time is shorter."""
    steps = {}
    for name in Plan.__dataclass_fields__:
        triton = _step(problem, name, "triton", "")
        if problem.dropout and name in ("h", "dx", "dB"):
            reason = "dropout: only the kernels apply it without writing a mask"
        elif triton.config is None:
            reason = "empty: nothing to launch"
        else:
            reason, faster = _compare(problem, name, triton.config)
            if not faster:
                steps[name] = Step(triton.primitive, "addmm", None, reason)
                continue
        steps[name] = Step(triton.primitive, "triton", triton.config, reason)
    return Plan(**steps)


def _compare(problem: Problem, name: str, config) -> tuple[str, bool]:
    """The reason of a step's choice, and whether the kernel is estimated to be at least as fast as addmm."""
    capability = configs.nearest_capability(problem.device.capability)
    roofline = ROOFLINES[capability]
    primitive, D, E = _sizes(problem, name)
    if primitive == "gemm" and not roofline.loop_efficiency:
        return f"sm_{problem.device.capability}: no main loop of its own yet, cuBLAS with beta = 1", False
    triton, addmm = estimate(primitive, roofline, problem.device.sms, problem.M, D, E, problem.R, config)
    return (
        f"estimated for sm_{problem.device.capability}: triton {triton * 1e6:.1f} us, addmm {addmm * 1e6:.1f} us",
        triton <= addmm,
    )


def estimate(
    primitive: str, roofline: Roofline, sms: int, M: int, D: int, E: int, R: int, config
) -> tuple[float, float]:
    """Seconds of one half-precision product by the kernel and by the addmm form: max(operations, bytes) each.

    A kernel with fewer programs than multiprocessors draws only its share of the memory's rate; cuBLAS is
    taken to split such products further. Nothing here was measured beyond the two rates of ``roofline``.
    """
    rank = max(R, 16)  # tensor-core tiles are at least 16 wide
    if primitive == "gemm":
        flops = 2 * M * E * D
        moved = 2 * (M * D + D * E + M * E)
        programs = -(-M // config.block_m) * -(-E // config.block_e)
        share = min(1.0, programs / sms)
        triton = max(
            (flops + 2 * M * E * rank) / (roofline.flops * roofline.loop_efficiency), moved / roofline.bytes
        )
        plain = max(flops / roofline.flops, moved / roofline.bytes)
        update = max(2 * M * E * rank / roofline.flops, 4 * M * E / roofline.bytes)
        return triton / share + _LAUNCH, plain + update + 2 * _LAUNCH
    flops = 2 * M * D * rank
    moved = 2 * (M * D + M * R + D * R)
    if primitive == "project":
        programs, partial, launches = -(-M // config.block_m), 0, 1
    else:
        programs, launches = -(-D // config.block_d) * config.splits, 2
        partial = 8 * config.splits * D * R  # fp32, written and read
    share = min(1.0, programs / sms)
    triton = max(flops / roofline.flops, moved / (roofline.bytes * _TRITON_SKINNY)) / share
    triton += partial / roofline.bytes + launches * _LAUNCH
    # cuBLAS returns the sum in the half dtype and leaves the factor alpha to another small kernel.
    addmm = max(flops / roofline.flops, moved / (roofline.bytes * _CUBLAS_SKINNY)) + launches * _LAUNCH
    return triton, addmm


def plan(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, bias: Tensor | None = None, dropout: float = 0.0
) -> Plan:
    """What :func:`fastlora.lora_linear` would run for these tensors, and why; nothing is computed.

    Args:
        x: (..., K). weight: (N, K). A: (N, R). B: (R, K). bias: (N,) or None.
        dropout: probability of dropping an element of the update's input.

    Returns:
        A frozen :class:`Plan`: path, tile shape and reason of each product, ``path`` and ``reason`` those of
        the forward gemm.

    Raises:
        ValueError: shapes or dtypes that ``lora_linear`` would refuse.
        RuntimeError: inside ``use_path("triton")`` where the kernels cannot run.
    """
    from fastlora.function import check_arguments, compute_dtype

    check_arguments(x, weight, A, B, 1.0, bias, dropout, None)
    problem = Problem(
        device=describe(x.device),
        dtype=compute_dtype(x),
        M=x.numel() // max(x.shape[-1], 1),
        N=weight.shape[0],
        K=weight.shape[1],
        R=B.shape[0],
        dropout=dropout > 0.0,
    )
    return make_plan(problem, _mode)
