"""Which path runs each primitive of a layer, and why.

Three paths compute the same values: ``triton`` (the fused kernels), ``addmm`` (cuBLAS or the CPU's BLAS with
beta = 1, the strongest unfused form) and ``reference`` (the plain formula). The choice is made here, for
forward and backward alike, from shapes, dtypes and the device: by a measured row (:mod:`fastlora.measured`)
or else by a small roofline estimate. Everything is plain arithmetic, testable without a GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from fastlora import measured
from fastlora.checks import dtype_name
from fastlora.device import Device
from fastlora.kernels import configs
from fastlora.roofline import LAUNCH, estimate, estimate_small, roofline_of

_HALF = (torch.float16, torch.bfloat16)
# The products that dropout changes.
DROPPED = ("h", "dx", "dB")
# Full-precision inputs have no tensor-core path worth choosing, but the kernels compute them when asked.
_KERNEL_DTYPES = (*_HALF, torch.float32)

# How far one of our launches must be ahead of the BLAS call in an estimate: Triton's dispatch costs the host
# about 10 us more, which a GPU running a short layer waits for.
_MARGIN = 2e-6
# Triton releases with which the Gluon kernel compiles (Gluon's names change), and its minimum of tokens.
_HOPPER_TRITON = ("3.6", "3.7", "3.8", "3.9")
_HOPPER_TOKENS = 128


@dataclass(frozen=True)
class Step:
    """How one product is computed: ``config`` is the kernel's tile shape, None unless ``path`` is triton.

    The addmm path of dx with dropout may also have a ``config``, an ``UpdateConfig``: a kernel then adds the
    dropped update to the BLAS product, whereas PyTorch's operations would write the mask to memory.
    ``apart``: of a product that shares a launch with another, the step by which it is computed alone.
    """

    primitive: str
    path: str
    config: configs.Config | None
    reason: str
    apart: Step | None = None

    @property
    def alone(self) -> Step:
        """The step where no launch is shared."""
        return self.apart or self


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
        """Whether every product uses addmm without a kernel; the layer then runs as one short chain."""
        steps = [getattr(self, name) for name in self.__dataclass_fields__]
        return all(step.path == "addmm" and step.config is None for step in steps)

    @functools.cached_property
    def one_launch(self) -> bool:
        """Whether the kernel for few tokens computes h and y together."""
        return isinstance(self.y.config, configs.SmallConfig)

    @functools.cached_property
    def g_with_dA(self) -> bool:
        """Whether one launch computes g and dA together."""
        return isinstance(self.g.config, configs.BackwardConfig)

    @functools.cached_property
    def apart(self) -> Plan:
        """The plan of a call that does not need both g and dA."""
        if not self.g_with_dA:
            return self
        return dataclasses.replace(self, g=self.g.alone, dA=self.dA.alone)

    @property
    def path(self) -> str:
        """The path of the forward gemm with the rank-R update."""
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
        """The forward gemm with the rank-R update, y."""
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
class GroupPlan:
    """The products of layers that share x: h, dx and dB for all together; y, g and dA for each."""

    h: Step
    dx: Step
    dB: Step
    branches: tuple[Plan, ...]

    @functools.cached_property
    def launches(self) -> bool:
        """Whether any product uses a kernel."""
        steps = [self.h, self.dx, self.dB]
        steps += [getattr(branch, name) for branch in self.branches for name in ("y", "g", "dA")]
        return any(step.config is not None for step in steps)

    @functools.cached_property
    def one_launch(self) -> bool:
        """Whether each branch computes its own h and y together, as for few tokens."""
        return all(branch.one_launch for branch in self.branches)


@dataclass(frozen=True)
class Problem:
    """What a plan depends on. M: tokens, N: out_features, K: in_features, R: rank.

    ``adapter_dtype``: that of A and B, None means ``dtype``; a wider one needs more shared memory.
    """

    device: Device
    dtype: torch.dtype
    M: int
    N: int
    K: int
    R: int
    dropout: bool = False
    adapter_dtype: torch.dtype | None = None

    @property
    def adapter_itemsize(self) -> int:
        """Bytes per element of A and B."""
        return (self.adapter_dtype or self.dtype).itemsize


def interpreting() -> bool:
    """Whether this process runs Triton kernels in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def has_triton() -> bool:
    """Whether the triton package is installed (it is not imported)."""
    return importlib.util.find_spec("triton") is not None


def why_not_triton(problem: Problem) -> str | None:
    """Why the kernels cannot compute this problem, None if they can."""
    device = problem.device
    if not has_triton():
        return "the triton package is not installed"
    if problem.dtype not in _KERNEL_DTYPES:
        return f"the kernels compute float16, bfloat16 and float32, not {dtype_name(problem.dtype)}"
    if problem.adapter_itemsize > 4:
        wide = dtype_name(problem.adapter_dtype or problem.dtype)
        return f"the kernels read adapters of up to float32, not {wide}"
    if problem.R > configs.MAX_RANK:
        return f"the kernels take ranks up to {configs.MAX_RANK}, not {problem.R}"
    if device.kind == "cpu":
        return None if interpreting() else "CPU tensors reach the kernels only with TRITON_INTERPRET=1"
    if device.kind != "cuda" or device.rocm:
        return f"the kernels are for NVIDIA GPUs, not {'ROCm' if device.rocm else device.kind}"
    if device.capability < configs.MIN_CAPABILITY:
        return f"the kernels need sm_{configs.MIN_CAPABILITY} or newer, this GPU is sm_{device.capability}"
    if device.capability not in configs.COMPILED_FOR:
        return f"the kernels have not been compiled for sm_{device.capability} yet"
    return _excluded.get(device)


_forget: list[Callable[[], None]] = [measured.forget]


def remembered(function: Callable) -> Callable:
    """``function`` with a result cache that :func:`forget_plans` clears."""
    cached = functools.lru_cache(maxsize=4096)(function)
    _forget.append(cached.cache_clear)
    return cached


# Devices on which no kernel starts -> why.
_excluded: dict[Device, str] = {}


def exclude(device: Device, why: str) -> None:
    """Plan without kernels on this device from now on; ``why`` becomes the reason of its plans."""
    _excluded[device] = why
    forget_plans()


def forget_plans() -> None:
    """Clear all cached plans and measured rows; the next plan reads the files again."""
    for forget in _forget:
        forget()


@remembered
def make_plan(problem: Problem, mode: str = "auto") -> Plan:
    """The plan of a problem; raises RuntimeError if ``mode`` requires kernels that cannot run."""
    obstacle = why_not_triton(problem)
    if mode == "triton" and obstacle:
        raise RuntimeError(f"use_path('triton'): {obstacle}")
    if mode != "auto":
        return uniform_plan(problem, mode, f"use_path({mode!r})")
    if problem.device.kind == "cpu":
        return uniform_plan(problem, "addmm", "CPU: the BLAS with beta = 1 saves a pass over y and dx")
    if obstacle:
        return uniform_plan(problem, "addmm", obstacle)
    if problem.dtype not in _HALF:
        return uniform_plan(problem, "addmm", f"{dtype_name(problem.dtype)} has no fused tensor-core kernel")
    return _chosen_plan(problem)


@remembered
def make_group_plan(
    problem: Problem, Ns: tuple[int, ...], Rs: tuple[int, ...], mode: str = "auto"
) -> GroupPlan:
    """The plan of branches with out_features ``Ns`` and ranks ``Rs``, whose sums are N and R of ``problem``.

    Raises RuntimeError if ``mode`` requires kernels that cannot run.
    """
    each = [dataclasses.replace(problem, N=N, R=R) for N, R in zip(Ns, Rs, strict=True)]
    problem = dataclasses.replace(problem, adapter_dtype=None)  # The shared products read a stacked copy.
    whole = make_plan(problem, mode)
    # The branches write g into one shared tensor, so each computes dA in a launch of its own.
    branches = [make_plan(branch, mode).apart for branch in each]
    if not all(branch.one_launch for branch in branches):
        # One pass over x computes h for all of them, so no branch needs to compute it in y's launch.
        branches = [dataclasses.replace(branch, y=branch.y.alone) for branch in branches]
    return GroupPlan(whole.h.alone, _group_dx(problem, Ns, whole.dx, mode), whole.dB, tuple(branches))


def _group_dx(problem: Problem, Ns: tuple[int, ...], dx: Step, mode: str) -> Step:
    """The step that sums dx over the branches; ``dx``: the step of one layer as wide as all of them."""
    p = problem
    chosen = mode == "auto" and p.device.kind == "cuda" and p.dtype in _HALF and not why_not_triton(p)
    # An empty product has no configuration.
    if not (chosen or dx.path == "triton") or kernel_step(p, "dx").config is None:
        return dx
    config = configs.select_gemm(p.device.tile_capability, p.M, p.K, p.R, p.dtype.itemsize, p.dropout)
    if chosen and any(size % configs.ALIGNED for size in (p.K, *Ns)):
        return _blas_step(p, "dx", f"K={p.K}, N={', '.join(map(str, Ns))}: {_SLOW}")
    if dx.path == "triton":
        return dataclasses.replace(dx, config=config)
    loop = roofline_of(p.device)
    measured_otherwise = _find(p, "dx") or "triton" in measured.failed(_key(p, "dx"))
    if measured_otherwise or not loop.loop_efficiency:
        return dx
    triton, addmm = _times(p, "dx", config)
    # In the chain, each further branch reads and writes dx once more and is another launch.
    addmm += (len(Ns) - 1) * (2 * p.M * p.K / loop.bytes + LAUNCH)
    reason = f"{_estimated(p)}: triton {triton * 1e6:.1f} us, addmm {addmm * 1e6:.1f} us"
    return Step(dx.primitive, "triton", config, reason) if triton <= addmm else _blas_step(p, "dx", reason)


def uniform_plan(problem: Problem, path: str, reason: str) -> Plan:
    """Every step on one path."""
    if path == "triton" and interpreting():
        reason += ", in Triton's interpreter"
    steps = {name: _step(problem, name, path, reason) for name in Plan.__dataclass_fields__}
    small = small_config(problem) if path == "triton" else None
    return Plan(**(steps if small is None else _in_one_launch(steps, small, reason)))


def _sizes(problem: Problem, name: str) -> tuple[str, int, int]:
    """The primitive of a step and its D and E: (M, D) @ (D, E), or (M, D).T @ (M, R)."""
    p = problem
    return {
        "h": ("project", p.K, p.R),
        "y": ("gemm", p.K, p.N),
        "g": ("project", p.N, p.R),
        "dx": ("gemm", p.N, p.K),
        "dA": ("token_sum", p.N, p.R),
        "dB": ("token_sum", p.K, p.R),
    }[name]


def kernel_step(problem: Problem, name: str) -> Step:
    """The step of one product on its own kernel, even if slower; ``config`` is None if it is empty."""
    return _step(problem, name, "triton", "asked for")


def small_config(problem: Problem) -> configs.SmallConfig | None:
    """The configuration of the kernel that computes h and y in one launch, None if it cannot run."""
    if problem.dropout or not (0 < problem.M <= configs.SMALL_ROWS and problem.N and problem.K):
        return None
    p, device = problem, problem.device
    return configs.select_small(
        device.tile_capability, device.tile_sms, p.N, p.R, p.dtype.itemsize, p.adapter_itemsize
    )


def _in_one_launch(steps: dict[str, Step], config: configs.SmallConfig, reason: str) -> dict[str, Step]:
    h = Step("project", "triton", config, f"inside y's launch, {reason}", steps["h"])
    y = Step("gemm", "triton", config, f"one launch with h, {reason}", steps["y"])
    return {**steps, "h": h, "y": y}


def backward_config(problem: Problem) -> configs.BackwardConfig:
    """The configuration of the kernel that computes g and dA in one launch."""
    p, device = problem, problem.device
    return configs.select_backward(
        device.tile_capability, device.tile_sms, p.M, p.N, p.R, p.dtype.itemsize, p.adapter_itemsize
    )


def _g_with_dA(steps: dict[str, Step], config: configs.BackwardConfig, reason: str) -> dict[str, Step]:
    g = Step("project", "triton", config, f"one launch with dA, {reason}", steps["g"])
    dA = Step("token_sum", "triton", config, f"inside g's launch, {reason}", steps["dA"])
    return {**steps, "g": g, "dA": dA}


def step_of(problem: Problem, name: str, path: str, reason: str) -> Step:
    """The step of one product on a path chosen by the planner, not the user."""
    return _blas_step(problem, name, reason) if path == "addmm" else _step(problem, name, path, reason)


def _blas_step(problem: Problem, name: str, reason: str) -> Step:
    """The step of one product on the BLAS, with a kernel for the dropped update of dx if one can run."""
    step = _step(problem, name, "addmm", reason)
    if not (problem.dropout and name == "dx") or kernel_step(problem, name).config is None:
        return step
    return dataclasses.replace(
        step, config=configs.select_update(problem.R), reason=f"{reason}; a kernel adds the dropped update"
    )


def _step(problem: Problem, name: str, path: str, reason: str) -> Step:
    primitive, D, E = _sizes(problem, name)
    config = None
    if path == "triton" and problem.M and D and E:
        capability, sms = problem.device.tile_capability, problem.device.tile_sms
        M, R, itemsize = problem.M, problem.R, problem.dtype.itemsize
        if primitive == "project":
            dropped = problem.dropout and name == "h"
            config = configs.select_project(
                capability, sms, M, R, itemsize, problem.adapter_itemsize, dropped
            )
        elif primitive == "gemm":
            config = hopper_config(problem, name) or configs.select_gemm(
                capability, M, E, R, itemsize, problem.dropout and name == "dx"
            )
        else:
            config = configs.select_token_sum(capability, sms, M, D, R, itemsize)
    return Step(primitive, path, config, reason)


def hopper_config(problem: Problem, name: str) -> configs.HopperConfig | None:
    """The configuration of the warp-specialised loop for y or dx, None if not requested or it cannot run.

    It has not been measured, so it has to be requested by ``FASTLORA_HOPPER=1``, set before the first plan.
    """
    p = problem
    if not measured.hopper_asked_for() or p.device.capability != 90:
        return None
    if p.dtype not in _HALF or p.M < _HOPPER_TOKENS or any(size % 8 for size in (p.N, p.K, p.R)):
        return None  # TMA requires rows that start at multiples of 16 bytes.
    if (p.dropout and name == "dx") or measured.installed_triton() not in _HOPPER_TRITON:
        return None
    return configs.select_hopper(p.device.tile_sms, p.R)


def _chosen_plan(problem: Problem) -> Plan:
    """Each step on the path that was measured, or else is estimated, to be faster."""
    found = {name: _find(problem, name) for name in Plan.__dataclass_fields__}
    steps = {
        name: _estimated_step(problem, name)
        if finding is None
        else step_of(problem, name, finding.path, finding.reason)
        for name, finding in found.items()
    }
    # Its saving depends on how much of dy stays in the L2 cache, which only a measurement can tell.
    backward = _find(problem, "g+dA")
    if backward is not None and backward.path == "together":
        steps = _g_with_dA(steps, backward_config(problem), backward.reason)
    small = small_config(problem)
    if small is None:
        return Plan(**steps)
    forward = _find(problem, "forward")
    if forward is None:
        # Comparing a measured row with an estimate would not be fair.
        reason = None if found["h"] or found["y"] else _why_one_launch(problem, small)
        return Plan(**(steps if reason is None else _in_one_launch(steps, small, reason)))
    if forward.path == "small":
        return Plan(**_in_one_launch(steps, small, forward.reason))
    both = {name: _step(problem, name, forward.path, forward.reason) for name in ("h", "y")}
    return Plan(**{**steps, **both})


def _key(problem: Problem, product: str) -> measured.Family:
    """The family of a product's rows."""
    wide = problem.adapter_itemsize > problem.dtype.itemsize
    return measured.Family(
        gpu=problem.device.name,
        capability=problem.device.capability,
        triton=measured.triton_version(),
        dtype=dtype_name(problem.dtype),
        adapter_dtype=measured.WIDE if wide else dtype_name(problem.dtype),
        product=product,
        ranks=measured.rank_bucket(problem.R),
        dropout=problem.dropout and product in DROPPED,
    )


def _find(problem: Problem, product: str) -> measured.Finding | None:
    return measured.find(_key(problem, product), problem.M, problem.N, problem.K, problem.R)


_SLOW = "the kernels are slow where a size is not a multiple of 16"


def _estimated_step(problem: Problem, name: str) -> Step:
    """A step without a measured row."""
    kernel = kernel_step(problem, name)
    if kernel.config is None:
        return Step(kernel.primitive, "addmm", None, "empty: nothing to launch")
    failed = measured.failed(_key(problem, name))
    if {"triton", "addmm"} <= failed:
        return Step(kernel.primitive, "addmm", None, "the kernels failed their checks on this GPU")
    if "triton" in failed:
        return _blas_step(problem, name, "the kernel failed its check on this GPU at another shape")
    if problem.dropout and name in ("h", "dB"):
        reason = "dropout: only the kernels apply it without writing a mask"
        return Step(kernel.primitive, "triton", kernel.config, reason)
    if "addmm" in failed:
        return dataclasses.replace(kernel, reason="the addmm form failed its check on this GPU")
    if isinstance(kernel.config, configs.HopperConfig):
        reason = "FASTLORA_HOPPER=1 asks for the warp-specialised loop, which has not been measured"
        return Step(kernel.primitive, "triton", kernel.config, reason)
    if not measured.is_aligned(name, problem.N, problem.K):
        sizes = ", ".join(f"{size}={getattr(problem, size)}" for size in measured.SIZES[name])
        return _blas_step(problem, name, f"{sizes}: {_SLOW}")
    reason, faster = _compare(problem, name, kernel.config)
    return dataclasses.replace(kernel, reason=reason) if faster else _blas_step(problem, name, reason)


def _compare(problem: Problem, name: str, config) -> tuple[str, bool]:
    """The reason for a step's choice, and whether the kernel is estimated to be faster than addmm."""
    if not roofline_of(problem.device).loop_efficiency and _sizes(problem, name)[0] == "gemm":
        return f"sm_{problem.device.capability}: no dedicated main loop yet, cuBLAS with beta = 1", False
    triton, addmm = _times(problem, name, config)
    margin = (2 if _sizes(problem, name)[0] == "token_sum" else 1) * _MARGIN
    reason = f"{_estimated(problem)}: triton {triton * 1e6:.1f} us, addmm {addmm * 1e6:.1f} us"
    if triton <= addmm < triton + margin:
        return f"{reason}, a lead below the margin of {margin * 1e6:.0f} us", False
    return reason, triton <= addmm


def _why_one_launch(problem: Problem, config: configs.SmallConfig) -> str | None:
    """The reason if one launch is estimated to be faster than separate ones for h and y, else None."""
    roofline = roofline_of(problem.device)
    if not roofline.loop_efficiency or "small" in measured.failed(_key(problem, "forward")):
        return None
    if not measured.is_aligned("forward", problem.N, problem.K):
        return None
    p = problem
    one = estimate_small(roofline, p.M, p.N, p.K, p.R, config, p.adapter_itemsize)
    apart = sum(min(_times(problem, name, kernel_step(problem, name).config)) for name in ("h", "y"))
    if one > apart:
        return None
    return f"{_estimated(problem)}: together {one * 1e6:.1f} us, apart {apart * 1e6:.1f} us"


def _estimated(problem: Problem) -> str:
    return f"estimated for sm_{problem.device.capability}"


def _times(problem: Problem, name: str, config) -> tuple[float, float]:
    """Estimated seconds of one step by its kernel and by addmm."""
    primitive, D, E = _sizes(problem, name)
    return estimate(
        primitive,
        roofline_of(problem.device),
        problem.M,
        D,
        E,
        problem.R,
        config,
        problem.dropout and name == "dx",
        problem.adapter_itemsize,
    )
