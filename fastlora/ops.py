"""The opaque operators of the layer, ``fastlora::lora_forward`` and ``lora_backward``, and those of groups.

Each asks the planner which path computes each product, and runs it. They are registered with
``torch.library`` (define, impl, fake), so that ``torch.compile`` keeps them opaque and plans are made at run
time with the actual number of tokens. Only this module imports the kernels, on first launch.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastlora import flops, masks, reference
from fastlora.device import describe
from fastlora.kernels.configs import ALIGNED, HopperConfig, ProjectConfig, select_gemm
from fastlora.paths import current_mode
from fastlora.planner import (
    GroupPlan,
    Plan,
    Problem,
    Step,
    exclude,
    kernel_step,
    make_group_plan,
    make_plan,
    remembered,
)

_library = torch.library.Library("fastlora", "DEF")
_library.define(
    "lora_forward(Tensor x, Tensor weight, Tensor A, Tensor B, Tensor? bias, float alpha, float dropout, "
    "Tensor? seed, str mode) -> (Tensor y, Tensor h)"
)
_library.define(
    "lora_backward(Tensor dy, Tensor? x, Tensor? weight, Tensor A, Tensor B, Tensor? h, float alpha, "
    "float dropout, Tensor? seed, bool need_dx, bool need_dA, bool need_dB, bool need_dbias, str mode) "
    "-> (Tensor dx, Tensor dA, Tensor dB, Tensor dbias)"
)
# group_forward returns y of each branch, then h of all; group_backward returns dx and dB (of all branches
# that need it), then dA and dbias of each branch.
_library.define(
    "group_forward(Tensor x, Tensor[] weights, Tensor[] As, Tensor[] Bs, Tensor?[] biases, float[] alphas, "
    "float dropout, Tensor? seed, str mode) -> Tensor[]"
)
_library.define(
    "group_backward(Tensor?[] dys, Tensor? x, Tensor?[] weights, Tensor[] As, Tensor[] Bs, Tensor? h, "
    "float[] alphas, float dropout, Tensor? seed, bool need_dx, bool[] need_dA, bool[] need_dB, "
    "bool[] need_dbias, str mode) -> Tensor[]"
)


# Up to this rank the CPU's BLAS is 2 to 6 times slower if the rank is the result's innermost size than if it
# is the outermost (MKL, Zen 3, two threads, fp32, 64 tokens or more; at rank 16 the outermost is slower).
_THIN_RANK = 8

# Below this many rows a float32 product on the CPU is not accumulated onto another of the same size.
_FEW_ROWS = 32

# Up to this many elements of h the CPU computes the update of wider adapters in their own dtype: there a
# half-precision product takes at least 12 us, but is faster from 16 tokens on (oneDNN, AVX512-BF16).
_FEW_WIDE = 256


class Dropout:
    """The keep mask of one call: (seed, threshold) for the kernels, a tensor computed once for other paths.

    ``seed``: one-element int64 tensor, or the mask itself, see :func:`few_mask`.
    """

    def __init__(self, seed: Tensor, probability: float, rows: int, columns: int) -> None:
        self.seed = seed
        self.probability = probability
        self.threshold = masks.keep_threshold(probability)
        self.scale = masks.keep_scale(probability)
        self._shape = (rows, columns)
        self._keep = seed if seed.dtype.is_floating_point else None

    def keep(self) -> Tensor:
        """(rows, columns), bool or 0 and 1; must not be modified."""
        if self._keep is None:
            self._keep = masks.shared_keep_mask(self.seed, *self._shape, self.probability)
        return self._keep

    def kept(self, p: Tensor) -> Tensor:
        """p: (rows, columns) where it is kept and 0 elsewhere, not yet scaled, in p's dtype."""
        keep = self.keep()
        if keep.dtype != torch.bool:
            return p * keep.to(p.dtype)
        return torch.where(keep, p, _zero(p.dtype) if p.device.type == "cpu" else p.new_zeros(()))


# Up to this many elements of x, PyTorch draws a mask faster than Philox (4 us against 25 for one token).
_FEW_DROPPED = 4096


def few_mask(x: Tensor, dropout: float, dtype: torch.dtype) -> Tensor | None:
    """A mask (M, K) of 0 and 1 in ``dtype`` for x: (..., K), or None if a seed is to be used.

    It is the mask that ``F.dropout`` draws on a CPU in ``dtype`` (multiplying by a bool mask takes twice as
    long), and is kept for backward. It is passed in place of the seed, so only if the caller gave no seed.
    """
    # The kernels need a seed. Any other path takes a mask too, so that a checkpoint draws the same again even
    # if it recomputes on another path.
    if x.numel() > _FEW_DROPPED or not _is_plain_cpu(x) or current_mode() == "triton":
        return None
    shape = (x.shape[0] if x.dim() == 2 else _rows(x), x.shape[-1])
    if dropout >= 1.0:
        return torch.zeros(shape, dtype=dtype, device=x.device)
    return torch.empty(shape, dtype=dtype, device=x.device).bernoulli_(1.0 - dropout)


def _for_kernels(p: Tensor, mode: str) -> Tensor:
    """p: (M, D), aligned if the planner chooses the path; an explicit path gets p unchanged."""
    return _aligned(p) if mode == "auto" and p.is_cuda else p


def _aligned(p: Tensor) -> Tensor:
    """p: (M, D) in a layout that the kernels can read fast, 16 bytes at a time; copied if necessary.

    A slice may start at any address, and the gradient of a sum has zero strides. The copy is one pass;
    without it every product would be several times slower.
    """
    rows, columns = p.stride()
    outer = rows if columns == 1 else columns
    fast = (rows == 1 or columns == 1) and outer % ALIGNED == 0 and p.data_ptr() % 16 == 0
    # If the row length is not a multiple, a copy's rows would be no better aligned.
    return p if fast or p.shape[1] % ALIGNED else p.clone(memory_format=torch.contiguous_format)


def run_project(step: Step, p: Tensor, q: Tensor, drop: Dropout | None = None) -> Tensor:
    """drop(p): (M, D) @ q: (D, R) -> (M, R) in p's dtype."""
    if step.path == "triton":
        from fastlora.kernels.project import project

        if drop is None:
            return project(p, q, step.config)
        return project(p, q, step.config, drop.seed, drop.threshold, drop.scale)
    if step.path == "reference":
        p = p if drop is None else drop.kept(p * drop.scale)
        return reference.project(p, q).to(p.dtype)
    if drop is None:
        return torch.mm(p, q.to(p.dtype))
    return _scaled_mm(drop.kept(p), q.to(p.dtype), drop.scale)


def run_gemm(
    step: Step,
    p: Tensor,
    q: Tensor,
    u: Tensor,
    v: Tensor,
    scale: float,
    bias: Tensor | None = None,
    drop: Dropout | None = None,
) -> Tensor:
    """p: (M, D) @ q: (D, E) + scale * drop(u: (M, R) @ v: (R, E)) + bias: (E,) -> (M, E) in p's dtype."""
    if step.path == "triton":
        if isinstance(step.config, HopperConfig):
            return _hopper_gemm(step.config, p, q, u, v, scale, bias)
        from fastlora.kernels.gemm import gemm

        if drop is None:
            return gemm(p, q, u, v, scale, step.config, bias)
        return gemm(p, q, u, v, scale * drop.scale, step.config, bias, drop.seed, drop.threshold)
    if step.path == "reference":
        wide = torch.promote_types(p.dtype, torch.float32)
        keep = None if drop is None else drop.keep().to(wide) * drop.scale
        return reference.gemm(p, q, u, v, scale, bias, keep)
    if drop is None and _update_first(p):
        v = v.to(p.dtype)
        c = _scaled_mm(u, v, scale) if bias is None else torch.addmm(bias, u, v, alpha=scale)
        return c.addmm_(p, q)
    c = torch.mm(p, q) if bias is None else torch.addmm(bias, p, q)
    if drop is None:
        return c.addmm_(u, v.to(p.dtype), alpha=scale)
    if step.config is not None:
        from fastlora.kernels.update import add_update

        return add_update(c, u, v, scale * drop.scale, step.config, drop.seed, drop.threshold)
    return c.addcmul_(torch.mm(u, v.to(p.dtype)), drop.keep(), value=scale * drop.scale)


def _update_first(p: Tensor) -> bool:
    """Whether the BLAS adds P @ Q onto the update rather than vice versa, for p's dtype and device.

    On a GPU the update then costs one pass over C instead of two, as reading the update overlaps with the
    arithmetic of P @ Q. Half precision then also rounds the small update twice instead of the large product.
    A CPU's BLAS is faster in the other order.
    """
    return p.is_cuda and p.dtype.itemsize == 2


def _hopper_gemm(
    config: HopperConfig, p: Tensor, q: Tensor, u: Tensor, v: Tensor, scale: float, bias: Tensor | None
) -> Tensor:
    """:func:`run_gemm` by the kernel that reads through TMA, or by the other one if that cannot run."""
    from fastlora.kernels import gemm, hopper

    by_rows = q.stride(1) == 1
    right, update = (q, v) if by_rows else (q.t(), v.t())
    update = update.to(p.dtype)
    obstacle = hopper.why_not(p, right, u, update)
    if obstacle is None:
        bias = None if bias is None else bias.contiguous()
        return hopper.gemm(p, right, u, update, scale, config, bias, by_rows)
    warnings.warn(f"fastlora: {obstacle}; the other gemm kernel runs", RuntimeWarning, stacklevel=2)
    other = select_gemm(90, p.shape[0], q.shape[1], u.shape[1], p.element_size(), dropout=False)
    return gemm.gemm(p, q, u, v, scale, other, bias)


def run_token_sum(
    step: Step,
    p: Tensor,
    u: Tensor,
    scale: float,
    dtype: torch.dtype,
    transposed: bool = False,
    drop: Dropout | None = None,
) -> Tensor:
    """scale * drop(p): (M, D).T @ u: (M, R) -> (D, R), or (R, D) if ``transposed``, in ``dtype``."""
    if step.path == "triton":
        from fastlora.kernels.token_sum import token_sum

        if drop is None:
            return token_sum(p, u, scale, step.config, dtype, transposed)
        return token_sum(p, u, scale * drop.scale, step.config, dtype, transposed, drop.seed, drop.threshold)
    if drop is not None:
        p, scale = drop.kept(p), scale * drop.scale
    if step.path == "reference":
        total = reference.token_sum(p, u, scale)
        return (total.t() if transposed else total).to(dtype).contiguous()
    return _scaled_mm(*((u.t(), p) if transposed else (p.t(), u)), scale).to(dtype)


def _scaled_mm(p: Tensor, q: Tensor, scale: float) -> Tensor:
    """scale * p: (M, D) @ q: (D, E) -> (M, E) without a second pass over the result."""
    if p.device.type == "cpu":
        return torch.addmm(_zero(p.dtype), p, q, beta=0, alpha=scale)  # beta = 0: the zero is not read
    return p.new_empty((p.shape[0], q.shape[1])).addmm_(p, q, beta=0, alpha=scale)


@functools.cache
def _zero(dtype: torch.dtype) -> Tensor:
    """A zero on the CPU, cached because creating it is noticeable in a small call."""
    return torch.zeros((), dtype=dtype, device="cpu")  # explicit, as the default device may differ


def _is_thin(dy: Tensor, R: int) -> bool:
    """Whether the CPU's products of dy: (M, N) with rank R are faster when computed transposed."""
    return R <= _THIN_RANK and dy.shape[0] >= 64 and dy.dtype == torch.float32 and dy.device.type == "cpu"


def run_small(
    step: Step, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, bias: Tensor | None, alpha: float
) -> tuple[Tensor, Tensor]:
    """x: (M, K) with few tokens -> y: (M, N), h: (M, R) in one launch; adapters of any floating dtype."""
    from fastlora.kernels.small import small

    return small(x, weight, A, B, alpha, step.config, bias)


def _is_few_and_wide(x: Tensor, A: Tensor) -> bool:
    """Whether the CPU computes the update of adapters wider than x: (M, K) in their own dtype."""
    wider = A.dtype.itemsize > x.dtype.itemsize and x.device.type == "cpu"
    return wider and x.shape[0] * A.shape[1] <= _FEW_WIDE


def addmm_forward(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    alpha: float,
    drop: Dropout | None,
) -> tuple[Tensor, Tensor]:
    """x: (M, K) -> y: (M, N), h: (M, R): three products, the last one added in place."""
    wide = A.dtype != x.dtype and _is_few_and_wide(x, A)
    if A.dtype != x.dtype and not wide:
        A, B = A.to(x.dtype), B.to(x.dtype)
    p = x.to(A.dtype) if wide else x
    h = F.linear(p, B) if drop is None else _scaled_mm(drop.kept(p), B.t(), drop.scale)
    if _update_first(x):
        y = _scaled_mm(h, A.t(), alpha) if bias is None else torch.addmm(bias, h, A.t(), alpha=alpha)
        return y.addmm_(x, weight.t()), h
    y = F.linear(x, weight, bias)
    if wide:
        return y.add_(F.linear(h, A), alpha=alpha), h.to(x.dtype)
    return y.addmm_(h, A.t(), alpha=alpha), h


def addmm_backward(
    dy: Tensor,
    x: Any,
    weight: Any,
    A: Tensor,
    B: Tensor,
    h: Any,
    alpha: float,
    drop: Dropout | None,
    need_dx: bool,
    need_dA: bool,
    need_dB: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """dy: (M, N), x: (M, K), h: (M, R) -> dx: (M, K), dA: (N, R), dB: (R, K), None if not needed.

    x may be None if dB is not needed, weight if dx is not, h if dA is not.
    """
    dtype, adapter_dtype = dy.dtype, A.dtype
    wide = adapter_dtype != dtype and _is_few_and_wide(dy, A)
    if adapter_dtype != dtype and not wide:
        A, B = A.to(dtype), B.to(dtype)
    p = dy.to(adapter_dtype) if wide else dy
    thin = _is_thin(p, A.shape[1])
    dx = dA = dB = None
    if need_dx or need_dB:
        # Dropout's factor is applied later, as in eager PyTorch: with it g could overflow in half precision.
        g = _scaled_mm(A.t(), p.t(), alpha).t() if thin else _scaled_mm(p, A, alpha)
        if need_dx and drop is None and _update_first(dy):
            dx = torch.mm(g, B).addmm_(dy, weight)
        elif need_dx:
            dx = torch.mm(dy, weight)
            if drop is not None:
                dx.addcmul_(torch.mm(g, B), drop.keep(), value=drop.scale)
            elif wide:
                dx.add_(torch.mm(g, B))
            else:
                dx.addmm_(g, B)
        if need_dB:
            q = x.to(g.dtype)
            dB = torch.mm(g.t(), q) if drop is None else _scaled_mm(g.t(), drop.kept(q), drop.scale)
    if need_dA:
        h = h.to(p.dtype)
        dA = _scaled_mm(h.t(), p, alpha).t().contiguous() if thin else _scaled_mm(p.t(), h, alpha)
    if adapter_dtype != dtype and not wide:
        dA = None if dA is None else dA.to(adapter_dtype)
        dB = None if dB is None else dB.to(adapter_dtype)
    return dx, dA, dB


def run_g_and_dA(step: Step, dy: Tensor, A: Tensor, h: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """dy: (M, N), A: (N, R), h: (M, R) -> g: (M, R), in dy's dtype, and dA: (N, R), in A's, in one launch."""
    from fastlora.kernels.backward import g_and_dA

    return g_and_dA(dy, A, h, alpha, step.config, A.dtype)


@functools.cache
def _check_interpreter() -> None:
    """Raise RuntimeError if Triton's interpreter multiplies bfloat16 bits as integers, as in 3.6 to 3.9."""
    from fastlora.kernels.project import project

    one = torch.ones((1, 1), dtype=torch.bfloat16, device="cpu")
    if project(one, one, ProjectConfig(16, 16, 16, num_warps=1, num_stages=1)).item() != 1.0:
        raise RuntimeError(
            "use_path('triton'): Triton's interpreter computes bfloat16 products wrongly (it multiplies "
            "their bits as integers); use float16 or float32 there"
        )


def raise_out_of_memory(error: Exception) -> None:
    """Raise torch.OutOfMemoryError if that is what ``error`` means, whichever library has run out of memory.

    Triton's driver calls and cuBLAS say so in a RuntimeError; no path is to blame for it.
    """
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        raise error
    if isinstance(error, RuntimeError) and ("out of memory" in text or "ALLOC_FAILED" in text):
        raise torch.OutOfMemoryError(text) from error


def start_a_kernel(device: torch.device) -> None:
    """Launch a tiny product, whose result is not looked at."""
    from fastlora.kernels.project import project

    one = torch.ones((1, 1), dtype=torch.float16, device=device)
    project(one, one, kernel_step(Problem(describe(device), one.dtype, 1, 1, 1, 1), "h").config)


@functools.cache
def why_no_kernel_starts(device: torch.device) -> str | None:
    """Why Triton cannot start a kernel on this GPU, None where it can.

    It builds a launcher with the machine's C compiler and Python's headers, and code for the GPU with its own
    assembler; any of them may be missing or too old.
    """
    if device.type != "cuda":
        return None
    try:
        with torch.cuda.device(device):
            start_a_kernel(device)
    except Exception as error:  # whatever a compiler, an assembler or a driver raises
        raise_out_of_memory(error)
        text = (str(error).strip().splitlines() or [""])[0]
        return f"no kernel starts on this GPU: {type(error).__name__}: {text}"[:300]
    return None


def exclude_if_no_kernel_starts(device: torch.device) -> str | None:
    """Plan without kernels on a GPU where none starts, with a warning; why, or None where one does.

    Nothing is tried while a CUDA graph is captured.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return None
    why = why_no_kernel_starts(device)
    if why:
        exclude(describe(device), why)
        warnings.warn(f"fastlora: {why}; the addmm form runs instead", RuntimeWarning, stacklevel=2)
    return why


def _check_path(path: str, problem: Problem) -> None:
    """Raise RuntimeError for a path known to compute the problem wrongly."""
    if path == "triton" and problem.device.kind == "cpu" and problem.dtype == torch.bfloat16:
        _check_interpreter()


@remembered
def _plan(
    device: torch.device,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    M: int,
    N: int,
    K: int,
    R: int,
    dropout: bool,
    mode: str,
) -> Plan:
    """The plan of a call, cached by values that are fast to hash."""
    problem = Problem(describe(device), dtype, M, N, K, R, dropout, adapter_dtype)
    plan = make_plan(problem, mode)
    if mode == "auto" and not plan.all_addmm and exclude_if_no_kernel_starts(device):
        plan = make_plan(problem, mode)
    _check_path(plan.path, problem)
    return plan


def make_dropout(dropout: float, seed: Tensor | None, rows: int, columns: int) -> Dropout | None:
    return None if seed is None or dropout == 0.0 else Dropout(seed, dropout, rows, columns)


_NO_SCOPE = nullcontext()


@contextmanager
def _changed_scope(device: torch.device):
    placed = torch.cuda.device(device) if device.type == "cuda" else _NO_SCOPE
    with placed, torch.autocast(device.type, enabled=False):
        yield


def _scope(tensor: Tensor):
    """The context of an operator: autocast off (dtypes are already chosen), on a GPU the tensor's device.

    Triton launches on the current device, which may differ from the tensors'. Usually neither has to change,
    and entering both contexts takes 5 us of host time, so they are entered only if one does.
    """
    device = tensor.device
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    return _changed_scope(device) if elsewhere or torch.is_autocast_enabled(device.type) else _NO_SCOPE


def _forward(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    alpha: float,
    dropout: float,
    seed: Tensor | None,
    mode: str,
) -> tuple[Tensor, Tensor]:
    """x: (..., K), weight: (N, K), A: (N, R), B: (R, K) -> y: (..., N), h: (M, R), both in x's dtype.

    h = drop(x) @ B.T with dropout's factor on every path: the backward pass may take another one.
    """
    N, K = weight.shape
    R = B.shape[0]
    flat = x.dim() == 2
    M = x.shape[0] if flat else _rows(x)
    x_2d = x if flat else x.reshape(M, K)
    with _scope(x):
        plan = _plan(x.device, x.dtype, A.dtype, M, N, K, R, dropout > 0.0, mode)
        if plan.all_addmm:
            y, h = addmm_forward(x_2d, weight, A, B, bias, alpha, make_dropout(dropout, seed, M, K))
        elif not (M and N and K):  # Nothing to sum: no kernel takes an empty tile.
            y = x.new_zeros((M, N)) if bias is None else x.new_empty((M, N)).copy_(bias)
            h = x.new_zeros((M, R))
        elif plan.one_launch:
            y, h = run_small(plan.y, _for_kernels(x_2d, mode), weight, A, B, bias, alpha)
        else:
            x_2d = _for_kernels(x_2d, mode)
            h = run_project(plan.h, x_2d, B.t(), make_dropout(dropout, seed, M, K)).contiguous()
            y = run_gemm(plan.y, x_2d, weight.t(), h, A.t(), alpha, bias)
    if flat:
        return y, h
    # Not a view: autograd forbids in-place changes, such as ReLU(inplace=True), of views returned by a custom
    # function.
    return torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], N)), h


def _rows(x: Tensor) -> int:
    """The number of tokens of x: (..., K), even if K = 0."""
    rows = 1
    for size in x.shape[:-1]:
        rows *= size
    return rows


def _backward(
    dy: Tensor,
    x: Any,
    weight: Any,
    A: Tensor,
    B: Tensor,
    h: Any,
    alpha: float,
    dropout: float,
    seed: Tensor | None,
    need_dx: bool,
    need_dA: bool,
    need_dB: bool,
    need_dbias: bool,
    mode: str,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dy: (..., N), x: (..., K) -> dx: (..., K), dA: (N, R), dB: (R, K), dbias: (N,), None if not needed.

    x is used only for dB, weight: (N, K) only for dx, and h: (M, R) only for dA. With ``mode`` "reference",
    h may be None: it is then computed again from x.
    """
    (N, R), K = A.shape, B.shape[1]
    flat = dy.dim() == 2
    M = dy.shape[0] if flat else _rows(dy)
    dy_2d = dy if flat else dy.reshape(M, N)
    dx = dA = dB = dbias = None
    with _scope(dy):
        plan = _plan(dy.device, dy.dtype, A.dtype, M, N, K, R, dropout > 0.0, mode)
        if not (need_dA and (need_dx or need_dB)):
            plan = plan.apart
        if need_dbias:
            dbias = dy_2d.sum(0)
        drop = make_dropout(dropout, seed, M, K)
        if plan.all_addmm:
            x_2d = x if flat or x is None else x.reshape(M, K)
            dx, dA, dB = addmm_backward(dy_2d, x_2d, weight, A, B, h, alpha, drop, need_dx, need_dA, need_dB)
            return dx if flat or dx is None else dx.reshape(*dy.shape[:-1], K), dA, dB, dbias
        # Nothing to sum: no kernel takes an empty tile. PyTorch's operations do.
        if mode != "reference" and not (M and N and K):
            dx = dy.new_zeros((*dy.shape[:-1], K)) if need_dx else None
            dA = A.new_zeros(A.shape) if need_dA else None
            dB = B.new_zeros(B.shape) if need_dB else None
            return dx, dA, dB, dbias
        dy_2d = _for_kernels(dy_2d, mode)
        if plan.g_with_dA:
            g, dA = run_g_and_dA(plan.g, dy_2d, A, h, alpha)
        else:
            if need_dx or need_dB:
                g = run_project(plan.g, dy_2d, A)
            if need_dA:
                if h is None:
                    h = run_project(plan.h, x.reshape(M, K), B.t(), drop)
                dA = run_token_sum(plan.dA, dy_2d, h, alpha, A.dtype)
        if need_dx:
            dx = run_gemm(plan.dx, dy_2d, weight, g, B, alpha, drop=drop)
            dx = dx if flat else dx.reshape(*dy.shape[:-1], K)
        if need_dB:
            x_2d = _for_kernels(x if flat else x.reshape(M, K), mode)
            dB = run_token_sum(plan.dB, x_2d, g, alpha, B.dtype, transposed=True, drop=drop)
    return dx, dA, dB, dbias


def _lora_backward(dy: Tensor, *arguments) -> tuple[Tensor, ...]:
    """:func:`_backward` for the operator, whose results cannot be None: empty tensors stand in."""
    return tuple(dy.new_empty((0,)) if result is None else result for result in _backward(dy, *arguments))


def _fake_forward(x, weight, A, B, bias, alpha, dropout, seed, mode):
    return x.new_empty((*x.shape[:-1], weight.shape[0])), x.new_empty((_rows(x), B.shape[0]))


def _fake_backward(
    dy, x, weight, A, B, h, alpha, dropout, seed, need_dx, need_dA, need_dB, need_dbias, mode
):  # fmt: skip
    return (
        dy.new_empty((*dy.shape[:-1], B.shape[1]) if need_dx else (0,)),
        A.new_empty(A.shape) if need_dA else dy.new_empty((0,)),
        B.new_empty(B.shape) if need_dB else dy.new_empty((0,)),
        dy.new_empty((A.shape[0],) if need_dbias else (0,)),
    )


def _stack(tensors: Sequence[Tensor], step: Step, dtype: torch.dtype) -> Tensor:
    """The rows of all ``tensors`` in one copy, in ``dtype``; the reference path keeps their own dtypes."""
    return torch.cat([t if step.path == "reference" else t.to(dtype) for t in tensors])


@remembered
def _group_plan(
    device: torch.device,
    dtype: torch.dtype,
    adapter_dtype: torch.dtype,
    M: int,
    Ns: tuple[int, ...],
    K: int,
    Rs: tuple[int, ...],
    dropout: bool,
    mode: str,
) -> GroupPlan:
    """The plan of a group, cached by values that are fast to hash."""
    if not (M and K and all(Ns)):
        mode = "addmm"  # No kernel takes an empty tile.
    problem = Problem(describe(device), dtype, M, sum(Ns), K, sum(Rs), dropout, adapter_dtype)
    plan = make_group_plan(problem, Ns, Rs, mode)
    if mode == "auto" and plan.launches and exclude_if_no_kernel_starts(device):
        plan = make_group_plan(problem, Ns, Rs, mode)
    _check_path(plan.h.path, problem)
    return plan


def _in_memory(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The tensors with their values materialised in memory, where the kernels read them.

    The dispatcher does this for every argument except lists of optional tensors, whose entries may have the
    negative bit set (as ``z.conj().imag`` has) or be efficient zero tensors, which have no memory.
    """
    return [
        t if t is None else torch.zeros_like(t) if t._is_zerotensor() else t.resolve_neg() for t in tensors
    ]


def _group_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    alphas: Sequence[float],
    dropout: float,
    seed: Tensor | None,
    mode: str,
) -> list[Tensor]:
    """x: (..., K), weights: (N_i, K), As: (N_i, R_i), Bs: (R_i, K) -> each y: (..., N_i), h: (M, sum R_i)."""
    M, K = _rows(x), x.shape[-1]
    Ns, Rs = tuple(w.shape[0] for w in weights), tuple(B.shape[0] for B in Bs)
    x_2d = x if x.dim() == 2 else x.reshape(M, K)
    with _scope(x):
        plan = _group_plan(x.device, x.dtype, _widest(A.dtype for A in As), M, Ns, K, Rs, dropout > 0.0, mode)
        if plan.launches:
            x_2d = _for_kernels(x_2d, mode)
        branches = list(zip(plan.branches, weights, As, Bs, _in_memory(biases), alphas, strict=True))
        if plan.one_launch:
            made = [
                run_small(step.y, x_2d, weight, A, B, bias, alpha)
                for step, weight, A, B, bias, alpha in branches
            ]
            ys, h = [y for y, _ in made], torch.cat([h for _, h in made], 1)
        else:
            drop = make_dropout(dropout, seed, M, K) if M and K else None
            h = run_project(plan.h, x_2d, _stack(Bs, plan.h, x.dtype).t(), drop).contiguous()
            ys = [
                run_gemm(step.y, x_2d, weight.t(), part, A.t(), alpha, bias)
                for (step, weight, A, _, bias, alpha), part in zip(branches, h.split(Rs, 1), strict=True)
            ]
    if x.dim() != 2:  # Not views, as in _forward.
        ys = [torch.ops.aten._unsafe_view.default(y, (*x.shape[:-1], y.shape[1])) for y in ys]
    return [*ys, h]


def _widest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    return functools.reduce(torch.promote_types, dtypes)


def _project_into(step: Step, out: Tensor, p: Tensor, q: Tensor, scale: float) -> None:
    """out: (M, R) = scale * p: (M, D) @ q: (D, R), in p's dtype."""
    if step.path == "triton":
        from fastlora.kernels.project import project

        project(p, q, step.config, scale=scale, out=out)
    elif step.path == "reference":
        out.copy_(reference.project(p, q) * scale)
    else:
        out.addmm_(p, q.to(p.dtype), beta=0, alpha=scale)


def _group_dA(step: Step, dy: Tensor, h: Tensor, alpha: float, dtype: torch.dtype) -> Tensor:
    """alpha * dy: (M, N).T @ h: (M, R) -> (N, R) in ``dtype``."""
    if step.path == "addmm" and _is_thin(dy, h.shape[1]):
        return _scaled_mm(h.t(), dy, alpha).t().to(dtype).contiguous()
    return run_token_sum(step, dy, h, alpha, dtype)


def _group_dx(
    step: Step,
    ps: Sequence[Tensor],
    qs: Sequence[Tensor],
    u: Tensor,
    v: Tensor,
    drop: Dropout | None,
) -> Tensor:
    """Sum of ps: (M, D_i) @ qs: (D_i, E), + drop(u: (M, R) @ v: (R, E)) -> (M, E) in u's dtype."""
    if step.path == "triton":
        from fastlora.kernels.group import group_dx

        if drop is None:
            return group_dx(ps, qs, u, v, 1.0, step.config)
        return group_dx(ps, qs, u, v, drop.scale, step.config, drop.seed, drop.threshold)
    c = run_gemm(step, ps[0], qs[0], u, v, 1.0, drop=drop)
    # For few rows the CPU's BLAS adds term by term onto c, with up to four times the error of eager PyTorch.
    apart = c.shape[0] < _FEW_ROWS and c.dtype == torch.float32 and c.device.type == "cpu"
    for p, q in zip(ps[1:], qs[1:], strict=True):
        if apart:
            c += p @ q
        else:
            c.addmm_(p, q)
    return c


def _group_backward(
    dys: Sequence[Tensor | None],
    x: Any,
    weights: Sequence[Any],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    h: Tensor | None,
    alphas: Sequence[float],
    dropout: float,
    seed: Tensor | None,
    need_dx: bool,
    need_dA: Sequence[bool],
    need_dB: Sequence[bool],
    need_dbias: Sequence[bool],
    mode: str,
) -> list[Tensor | None]:
    """dys: (..., N_i), not all None -> dx: (..., K), dB, then each dA: (N_i, R_i), then each dbias: (N_i,).

    dB: (sum of R_i, K) over the branches that need it and have a dy, in the widest of their adapters' dtypes.
    A result is None if not needed. x is used only for dB, weights: (N_i, K) only for dx, and h: (M, sum of
    R_i) only for dA.
    """
    # The branches that need dB come first, so that their columns of g are adjacent.
    given = {i: dy for i, dy in enumerate(_in_memory(dys)) if dy is not None}
    live = sorted(given, key=lambda i: not need_dB[i])
    wanting = [i for i in live if need_dB[i]]
    first, K, n = given[live[0]], Bs[0].shape[1], len(dys)
    M = _rows(first)
    dys_2d = {i: given[i].reshape(M, As[i].shape[0]) for i in live}
    dx = dB = None
    dAs: list[Tensor | None] = [None] * n
    dbiases: list[Tensor | None] = [None] * n
    with _scope(first):
        Ns, Rs = tuple(As[i].shape[0] for i in live), tuple(Bs[i].shape[0] for i in live)
        adapter_dtype = _widest(A.dtype for A in As)
        plan = _group_plan(first.device, first.dtype, adapter_dtype, M, Ns, K, Rs, dropout > 0.0, mode)
        if plan.launches:
            dys_2d = {i: _for_kernels(dy, mode) for i, dy in dys_2d.items()}
        steps = dict(zip(live, plan.branches, strict=True))
        parts: Sequence[Tensor] = () if h is None else h.split([B.shape[0] for B in Bs], 1)
        for i in live:
            if need_dbias[i]:
                dbiases[i] = dys_2d[i].sum(0)
            if need_dA[i]:
                dAs[i] = _group_dA(steps[i].dA, dys_2d[i], parts[i], alphas[i], As[i].dtype)
        used = live if need_dx else wanting
        if used:
            drop = make_dropout(dropout, seed, M, K) if M and K else None
            ranks = [Bs[i].shape[0] for i in used]
            # g carries alpha, which differs from branch to branch.
            thin = _is_thin(first, max(ranks)) and all(steps[i].g.path == "addmm" for i in used)
            g = first.new_empty((sum(ranks), M)).t() if thin else first.new_empty((M, sum(ranks)))
            for i, part in zip(used, g.split(ranks, 1), strict=True):
                _project_into(steps[i].g, part, dys_2d[i], As[i], alphas[i])
        if need_dx:
            stacked = _stack([Bs[i] for i in live], plan.dx, first.dtype)
            qs: list[Any] = _in_memory(weights)
            dx = _group_dx(plan.dx, [dys_2d[i] for i in live], [qs[i] for i in live], g, stacked, drop)
            dx = dx if first.dim() == 2 else dx.reshape(*first.shape[:-1], K)
        if wanting:
            rank = sum(Bs[i].shape[0] for i in wanting)
            dtype = _widest(Bs[i].dtype for i in wanting)
            # Not sliced if whole: slicing has no batching rule for batched gradients.
            part = g if rank == g.shape[1] else g[:, :rank]
            x_2d = x.reshape(M, K)
            x_2d = _for_kernels(x_2d, mode) if plan.launches else x_2d
            dB = run_token_sum(plan.dB, x_2d, part, 1.0, dtype, transposed=True, drop=drop)
    return [dx, dB, *dAs, *dbiases]


def _group_backward_results(dys: Sequence[Tensor | None], *arguments) -> list[Tensor]:
    """:func:`_group_backward` for the operator, with empty tensors instead of None."""
    first = next(dy for dy in dys if dy is not None)
    return [first.new_empty((0,)) if r is None else r for r in _group_backward(dys, *arguments)]


def _fake_group_forward(x, weights, As, Bs, biases, alphas, dropout, seed, mode):
    ys = [x.new_empty((*x.shape[:-1], weight.shape[0])) for weight in weights]
    return [*ys, x.new_empty((_rows(x), sum(B.shape[0] for B in Bs)))]


def _fake_group_backward(
    dys, x, weights, As, Bs, h, alphas, dropout, seed, need_dx, need_dA, need_dB, need_dbias, mode
):  # fmt: skip
    first = next(dy for dy in dys if dy is not None)
    live = [dy is not None for dy in dys]
    wanting = [B for B, need, used in zip(Bs, need_dB, live, strict=True) if need and used]
    dB = first.new_empty((0,))
    if wanting:
        shape = sum(B.shape[0] for B in wanting), Bs[0].shape[1]
        dB = first.new_empty(shape, dtype=_widest(B.dtype for B in wanting))
    return [
        first.new_empty((*first.shape[:-1], Bs[0].shape[1]) if need_dx else (0,)),
        dB,
        *(
            A.new_empty(A.shape) if need and used else first.new_empty((0,))
            for A, need, used in zip(As, need_dA, live, strict=True)
        ),
        *(
            first.new_empty((A.shape[0],) if need and used else (0,))
            for A, need, used in zip(As, need_dbias, live, strict=True)
        ),
    ]


def _register(name: str, implementation: Callable, fake: Callable) -> torch._ops.OpOverload:
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastlora::{name}", fake, lib=_library)
    return getattr(torch.ops.fastlora, name).default


_forward_operator = _register("lora_forward", _forward, _fake_forward)
_backward_operator = _register("lora_backward", _lora_backward, _fake_backward)
_group_forward_operator = _register("group_forward", _group_forward, _fake_group_forward)
_group_backward_operator = _register("group_backward", _group_backward_results, _fake_group_backward)


def _is_plain_cpu(tensor: Tensor) -> bool:
    """Whether the operator's dispatch would only add overhead, which matters in a small CPU call.

    Tensor subclasses (including fake tensors), dispatch modes (selective checkpointing) and compiled code
    need the operator.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    kind = type(tensor)
    return tensor.device.type == "cpu" and (kind is Tensor or kind is torch.nn.Parameter)


def _is_direct(tensor: Tensor, mode: str) -> bool:
    """Whether a call bypasses the operator.

    Not under use_path("triton"): the dispatcher materialises negated and zero tensors, whose values Triton's
    interpreter would not find in memory.
    """
    if mode != "triton" and _is_plain_cpu(tensor):
        return True
    if not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack():
        flops.register_where_counted()
    return False


def lora_forward(x: Tensor, *arguments) -> tuple[Tensor, Tensor]:
    """y: (..., N) and h: (M, R), for the arguments of ``fastlora::lora_forward``."""
    return (_forward if _is_direct(x, arguments[-1]) else _forward_operator)(x, *arguments)


def lora_backward(dy: Tensor, *arguments) -> tuple[Tensor | None, ...]:
    """dx, dA, dB, dbias, for the arguments of ``fastlora::lora_backward``; meaningless if not needed."""
    return (_backward if _is_direct(dy, arguments[-1]) else _backward_operator)(dy, *arguments)


def group_forward(x: Tensor, *arguments) -> list[Tensor]:
    """Each y: (..., N_i), then h: (M, sum of R_i), for the arguments of ``fastlora::group_forward``."""
    return (_group_forward if _is_direct(x, arguments[-1]) else _group_forward_operator)(x, *arguments)


def group_backward(dys: Sequence[Tensor | None], *arguments) -> list[Tensor | None]:
    """The results of ``fastlora::group_backward``; meaningless if not needed."""
    first = next(dy for dy in dys if dy is not None)
    operator = _group_backward if _is_direct(first, arguments[-1]) else _group_backward_operator
    return operator(dys, *arguments)


def recorded_backward(*arguments: Any) -> tuple[Tensor | None, ...]:
    """:func:`lora_backward` in operations that autograd records, for derivatives of the gradients.

    Takes its arguments but for the mode. Raises RuntimeError if dA depends on an x that was not kept.
    """
    dy, x, weight, A, B, h, alpha, dropout, seed, need_dx, need_dA, need_dB, need_dbias = arguments
    if x is not None:
        h = None  # The one that was kept is a constant for autograd.
    elif need_dx and need_dA:
        raise RuntimeError(
            "create_graph=True for a LoRA layer with a trained A and a frozen B: dA depends on x, which is "
            "kept for backward only if B needs a gradient; fastlora.reference.lora_linear keeps it"
        )
    needed = need_dx, need_dA, need_dB, need_dbias
    return _backward(dy, x, weight, A, B, h, alpha, dropout, seed, *needed, "reference")


def recorded_group_backward(*arguments: Any) -> list[Tensor | None]:
    """:func:`group_backward` as :func:`recorded_backward` of each branch."""
    dys, x, weights, As, Bs, h, alphas, dropout, seed, need_dx, *needs = arguments
    parts = [None] * len(dys) if h is None else h.split([B.shape[0] for B in Bs], 1)
    branches = zip(dys, weights, As, Bs, parts, alphas, *needs, strict=True)
    nothing = (None,) * 4
    dxs, dAs, dBs, dbiases = zip(
        *(
            nothing
            if dy is None
            else recorded_backward(dy, x, weight, A, B, part, alpha, dropout, seed, need_dx, *needed)
            for dy, weight, A, B, part, alpha, *needed in branches
        ),
        strict=True,
    )
    dx = functools.reduce(torch.add, [dx for dx in dxs if dx is not None]) if need_dx else None
    stacked = [dB for dB in dBs if dB is not None]
    return [dx, torch.cat(stacked) if stacked else None, *dAs, *dbiases]
