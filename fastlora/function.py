"""The functional form ``fastlora.lora_linear``, its argument checks and its autograd function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastlora import masks, ops, reference
from fastlora.checks import as_number, check_alpha, check_dropout, dtype_name
from fastlora.device import describe
from fastlora.dtensors import is_wrapper, shared_seed, with_whole_gradients
from fastlora.paths import current_mode
from fastlora.planner import Plan, Problem, make_plan, uniform_plan


class _LoRALinear(torch.autograd.Function):
    """x: (..., K) -> y: (..., N) and, for backward only, h: (M, R)."""

    @staticmethod
    def forward(x, weight, A, B, bias, alpha, dropout, seed, mode):
        return ops.lora_forward(x, weight, A, B, bias, alpha, dropout, seed, mode)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, A, B, _, alpha, dropout, seed, mode = inputs
        h = output[1]
        ctx.mark_non_differentiable(h)
        ctx.set_materialize_grads(False)
        need_dx, _, need_dA, need_dB = ctx.needs_input_grad[:4]
        # Under autocast, weight is a copy that nobody else keeps.
        kept = x if need_dB else None, weight if need_dx else None, A, B, h if need_dA else None, seed
        ctx.save_for_backward(*kept)
        ctx.alpha, ctx.dropout, ctx.mode = alpha, dropout, mode

    @staticmethod
    def backward(ctx, dy, _):
        if dy is None:
            return (None,) * 9
        x, weight, A, B, h, seed = ctx.saved_tensors
        need_dx, _, need_dA, need_dB, need_dbias = ctx.needs_input_grad[:5]
        needed = need_dx, need_dA, need_dB, need_dbias
        arguments = dy, x, weight, A, B, h, ctx.alpha, ctx.dropout, seed, *needed
        if creates_graph():
            dx, dA, dB, dbias = ops.recorded_backward(*arguments)
        else:
            dx, dA, dB, dbias = ops.lora_backward(*arguments, ctx.mode)
        return (
            dx if need_dx else None,
            None,
            dA if need_dA else None,
            dB if need_dB else None,
            dbias if need_dbias else None,
            None,
            None,
            None,
            None,
        )


def creates_graph() -> bool:
    """Whether the running backward pass is to be differentiated in turn (``create_graph=True``)."""
    # Compiled backward passes are traced with grad mode on; PyTorch itself refuses to differentiate them.
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def quick_apply(function: Any) -> Callable[..., Any]:
    """``function.apply`` without the cost of binding the arguments to forward's signature.

    The binding takes longer than a small layer's products, and the underlying C method does not need it.
    Compiled code still calls the full ``apply``.
    """
    in_c = super(torch.autograd.Function, function).apply

    def apply(*arguments):
        return (function.apply if torch.compiler.is_compiling() else in_c)(*arguments)

    return apply


_apply = quick_apply(_LoRALinear)


class Operands(NamedTuple):
    """Everything except x that a layer's output depends on; also one branch of a group."""

    weight: Tensor  # (N, K)
    bias: Tensor | None  # (N,)
    A: Tensor  # (N, R)
    B: Tensor  # (R, K)
    alpha: float | Tensor
    dropout: float


def _describe(**tensors: Tensor | None) -> str:
    """The shapes and dtypes of tensors, for error messages."""
    return ", ".join(
        f"{name} {tuple(tensor.shape)} {dtype_name(tensor.dtype)}"
        for name, tensor in tensors.items()
        if tensor is not None
    )


PLAIN_TENSORS = frozenset((Tensor, torch.nn.Parameter))


def autocast_on(x: Tensor) -> bool:
    """Whether autocast is on for x's device; never on meta, for which PyTorch raises when asked."""
    kind = x.device.type
    return kind != "meta" and torch.is_autocast_enabled(kind)


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype the layer computes in: autocast's if it is on and x can be cast, otherwise x's."""
    if autocast_on(x) and x.dtype in (torch.float32, torch.float16, torch.bfloat16):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _is_regular(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    alpha: float,
    bias: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> bool:
    """Whether the arguments are valid and of the common kind; few look-ups, to keep small calls cheap.

    Must imply every check that :func:`check_arguments` makes after it.
    """
    N, K = weight.shape
    R = B.shape[0]
    device, dtype = x.device, x.dtype
    return (
        x.shape[-1] == K
        and A.shape == (N, R)
        and B.shape == (R, K)
        and R > 0
        and dtype.is_floating_point
        and not x.is_nested
        and weight.dtype == dtype
        and A.dtype == B.dtype
        and A.dtype.is_floating_point
        and weight.device == device
        and A.device == device
        and B.device == device
        and (bias is None or (bias.shape == (N,) and bias.dtype == dtype and bias.device == device))
        and not (weight.requires_grad and torch.is_grad_enabled())
        and type(alpha) is float
        and alpha - alpha == 0.0  # finite
        and type(dropout) is float
        and 0.0 <= dropout <= 1.0
        and seed is None
    )


def needs_plain_operations() -> bool:
    """Whether plain PyTorch operations have to run because something needs to see them.

    torch.func transforms (grad, vmap and the like) differentiate and batch them, forward-mode AD follows
    them, torch.jit.trace records them, and torch.onnx.export translates them.
    """
    # torch.compile traces torch.func's transforms into its graph and handles the next two by itself.
    return (
        torch._C._are_functorch_transforms_active()
        or (not torch.compiler.is_compiling() and forward_ad._current_level >= 0)
        or reference.is_traced()
        or torch.onnx.is_in_onnx_export()
    )


def check_arguments(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    alpha: float,
    bias: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> None:
    """Raise ValueError unless the arguments fit together, TypeError for one of the wrong type."""
    try:
        if _is_regular(x, weight, A, B, alpha, bias, dropout, seed):
            return
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        pass  # unusual or invalid: the checks below decide
    for name, tensor in (("x", x), ("weight", weight), ("A", A), ("B", B), ("bias", bias), ("seed", seed)):
        if not isinstance(tensor, Tensor) and not (tensor is None and name in ("bias", "seed")):
            raise TypeError(f"lora_linear: {name} must be a tensor, got {type(tensor).__name__}")

    if x.is_nested:
        raise ValueError(
            "lora_linear: x is a nested tensor, expected a dense one; for the jagged layout, pass x.values() "
            "and rebuild the result with torch.nested.nested_tensor_from_jagged(y, x.offsets())"
        )

    def given() -> str:  # only for an error: compiled code cannot trace it
        return _describe(x=x, weight=weight, A=A, B=B, bias=bias)

    if not (
        weight.dim() == A.dim() == B.dim() == 2
        and x.dim() >= 1
        and x.shape[-1] == weight.shape[1] == B.shape[1]
        and A.shape[0] == weight.shape[0]
        and A.shape[1] == B.shape[0]
        and (bias is None or bias.shape == weight.shape[:1])
    ):
        raise ValueError(
            f"lora_linear: shapes do not match: {given()}; "
            "expected x (..., K), weight (N, K), A (N, R), B (R, K), bias (N,)"
        )
    if B.shape[0] < 1:
        raise ValueError(f"lora_linear: the rank must be at least 1, got {given()}")
    if not (x.is_floating_point() and weight.is_floating_point() and A.is_floating_point()):
        raise ValueError(f"lora_linear: expected floating-point tensors, got {given()}")
    if (
        A.dtype != B.dtype
        or (bias is not None and bias.dtype != weight.dtype)
        or (x.dtype != weight.dtype and not autocast_on(x))
    ):
        raise ValueError(
            f"lora_linear: dtypes do not match: {given()}; expected one dtype for x, weight and bias "
            "(autocast apart) and one for A and B"
        )
    device = x.device
    if not (weight.device == A.device == B.device == device and (bias is None or bias.device == device)):
        raise ValueError(
            "lora_linear: tensors on different devices: "
            f"x {device}, weight {weight.device}, A {A.device}, B {B.device}"
            + ("" if bias is None else f", bias {bias.device}")
        )
    # Under torch.func's transforms plain operations run, which differentiate the weight too.
    transformed = torch._C._are_functorch_transforms_active()
    if weight.requires_grad and torch.is_grad_enabled() and not transformed:
        advice = (
            "Call weight.requires_grad_(False), or train it with nn.Linear"
            if weight.is_leaf
            else "This one is computed from another tensor: call detach(). If it is a view of "
            "FullyShardedDataParallel's flat parameter, use fully_shard (FSDP2) instead"
        )
        raise ValueError(
            f"lora_linear: weight {tuple(weight.shape)} requires a gradient, but it is frozen in a LoRA "
            f"layer: only x, A, B and bias get gradients. {advice}"
        )
    check_alpha(alpha)
    check_dropout(dropout)
    if seed is not None and (seed.dtype != torch.int64 or seed.numel() != 1 or seed.device != device):
        raise ValueError(
            f"lora_linear: seed must be an int64 tensor of one element on {device}, "
            f"got {_describe(seed=seed)} on {seed.device}"
        )


def lora_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    alpha: float = 1.0,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """``F.linear`` with a LoRA update: y = x @ weight.T + alpha * (drop(x) @ B.T) @ A.T + bias.

    Gradients flow to x, A, B and bias; ``weight`` is frozen. Besides x, M * R elements are kept for backward
    (under autocast also what it casts: the adapters and, where x needs a gradient, the weight). With
    ``create_graph=True``, backward runs in PyTorch's own operations, and has derivatives of any order.
    The formula is that of Hu et al. (2021), section 4.1, with the names A and B swapped and ``alpha`` in
    place of their alpha / r; see :mod:`fastlora.reference`.

    Args:
        x: (..., K) activations with any strides; M is the product of the leading sizes and may be 0.
        weight: (N, K), the frozen weight, in x's dtype (any floating dtype under autocast).
        A: (N, R), the up-projection (PEFT's ``lora_B.weight``).
        B: (R, K), the down-projection (PEFT's ``lora_A.weight``), in A's dtype. The adapters may be float32
            on a half-precision base; they are rounded to x's dtype as kernels and BLAS read them.
        alpha: the multiplier of the update (PEFT's ``scaling``, ``lora_alpha / r``).
        bias: (N,) in weight's dtype, or None.
        dropout: probability in [0, 1] of dropping an element of the update's input, with a resolution of
            1/65536. Applied whenever it is not 0, as this function has no training flag.
        seed: one-element int64 tensor on x's device that determines the dropout mask, the same on every path
            and device; drawn from torch's generator if None.

    Returns:
        (..., N), in x's dtype (autocast's if it is on).

    Raises:
        ValueError: mismatched shapes, dtypes or devices, a rank below 1, a ``weight`` that requires a
            gradient (outside torch.func's transforms), a non-finite alpha, a dropout outside [0, 1] or NaN,
            an invalid seed.
        TypeError: an argument that is not a tensor or number where one is expected.
        RuntimeError: ``use_path("triton")`` where it cannot run. In a backward pass with
            ``create_graph=True``: x and A need gradients but B does not, as x is then not kept.
    """
    alpha = as_number(alpha)
    check_arguments(x, weight, A, B, alpha, bias, dropout, seed)
    return compute(x, weight, A, B, float(alpha), bias, float(dropout), seed)


def compute(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    alpha: float,
    bias: Tensor | None,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    """:func:`lora_linear` for arguments that have been checked."""
    if autocast_on(x):
        dtype = compute_dtype(x)
        # Casting here, outside the function, gives every gradient its tensor's own dtype.
        x, weight, A, B = x.to(dtype), weight.to(dtype), A.to(dtype), B.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        if seed is not None and seed.is_floating_point():
            seed = seed.to(dtype)  # the mask itself, see ops.few_mask
    types = {type(x), type(weight), type(A), type(B)}
    if not types <= PLAIN_TENSORS and any(is_wrapper(tensor) for tensor in (x, weight, A, B)):
        # These have no storage that a kernel could read; PyTorch's own operations handle them.
        if dropout > 0.0 and seed is None:
            seed = shared_seed(x)
        A, B = with_whole_gradients((A, B))
        return reference.lora_linear(x, weight, A, B, alpha, bias, dropout, seed)
    if needs_plain_operations():
        return reference.lora_linear(x, weight, A, B, alpha, bias, dropout, seed)
    if dropout == 0.0:
        seed = None
    elif seed is None:
        # Drawn outside the operator, so that checkpointing recomputes with the same seed.
        seed = masks.new_seed(x.device)
    arguments = (x, weight, A, B, bias, alpha, dropout, seed, current_mode())
    if torch.is_grad_enabled() and (
        x.requires_grad or A.requires_grad or B.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return _apply(*arguments)[0]
    return ops.lora_forward(*arguments)[0]


def plan(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, bias: Tensor | None = None, dropout: float = 0.0
) -> Plan:
    """What :func:`lora_linear` would run for these tensors, and why; computes nothing.

    Args:
        x: (..., K). weight: (N, K). A: (N, R). B: (R, K). bias: (N,) or None.
        dropout: probability of dropping an element of the update's input.

    Returns:
        A frozen :class:`Plan` with the path, tile shape and reason of each product; its own ``path`` and
        ``reason`` are those of the forward gemm.

    Raises:
        ValueError: arguments that ``lora_linear`` would reject.
        RuntimeError: inside ``use_path("triton")`` where the kernels cannot run.
    """
    check_arguments(x, weight, A, B, 1.0, bias, dropout, None)
    problem = problem_of(x, x.numel() // max(x.shape[-1], 1), weight, A, dropout)
    if any(is_wrapper(tensor) for tensor in (x, weight, A, B)):
        return uniform_plan(problem, "reference", "a sharded or otherwise wrapped tensor")
    if needs_plain_operations():
        return uniform_plan(problem, "reference", "torch.func, forward-mode gradients, a trace or an export")
    return make_plan(problem, current_mode())


def problem_of(like: Tensor, tokens: int, weight: Tensor, A: Tensor, dropout: float) -> Problem:
    """What the plan depends on, for an x of ``tokens`` tokens with the device and dtype of ``like``."""
    dtype = compute_dtype(like)
    return Problem(
        device=describe(like.device),
        dtype=dtype,
        M=tokens,
        N=weight.shape[0],
        K=weight.shape[1],
        R=A.shape[1],
        dropout=dropout > 0.0,
        adapter_dtype=dtype if autocast_on(like) else A.dtype,
    )
