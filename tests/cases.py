"""Inputs of a LoRA linear layer, its float64 result written out, and the eager forms that bound its error."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tolerance import FACTOR, FLOOR, errors
from torch import Tensor

import fastlora
from fastlora.checks import dtype_name

# The products are tiny: on a busy machine a second thread costs a hundred times what it saves.
torch.set_num_threads(1)
CUDA = torch.cuda.is_available()
HALF = (torch.float16, torch.bfloat16)
# (dtype of x and the base, dtype of the adapters)
DTYPES = (
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float32),
)


def dtype_id(dtypes) -> str:
    return dtype_name(dtypes) if isinstance(dtypes, torch.dtype) else "-".join(map(dtype_name, dtypes))


def _run(device, path, **kwargs):
    marks = [pytest.mark.cuda] if device == "cuda" else []
    if device == "cpu" and path == "triton":
        marks.append(pytest.mark.skipif(CUDA, reason="the interpreter is off in a process with a GPU"))
    return pytest.param(SimpleNamespace(device=device, path=path), marks=marks, id=f"{device}-{path}")


# Every path on every device; "triton" on CPU tensors is the interpreter.
RUNS = [_run(device, path) for device in ("cpu", "cuda") for path in ("auto", "addmm", "reference", "triton")]
every_run = pytest.mark.parametrize("run", RUNS)


def tensors(lead, N, K, R, dtype=torch.float32, adapter_dtype=None, device="cpu", bias=True):
    """x: (*lead, K), weight: (N, K), A: (N, R), B: (R, K), bias: (N,) or None, dy: (*lead, N)."""
    adapter_dtype = adapter_dtype or dtype
    lead = (lead,) if isinstance(lead, int) else tuple(lead)

    def normal(*shape, dtype=dtype, scale=1.0):
        return (torch.randn(*shape) * scale).to(dtype).to(device)

    return SimpleNamespace(
        redraw=lambda: tensors(lead, N, K, R, dtype, adapter_dtype, device, bias),
        x=normal(*lead, K),
        weight=normal(N, K, scale=K**-0.5),
        A=normal(N, R, dtype=adapter_dtype, scale=R**-0.5),
        B=normal(R, K, dtype=adapter_dtype, scale=K**-0.5),
        bias=normal(N) if bias else None,
        dy=normal(*lead, N),
    )


def leaves_of(case, wanted):
    """The tensors of ``function(x, weight, A, B, bias)`` by name; those in ``wanted`` need gradients."""
    leaves = {name: getattr(case, name) for name in ("x", "weight", "A", "B", "bias")}
    return leaves | {name: leaves[name].detach().requires_grad_() for name in wanted}


def differentiate(function, case, wanted=("x", "A", "B", "bias"), dy=None):
    """y and the gradients of ``wanted`` as a namespace; the case's tensors stay as they are.

    ``function(x, weight, A, B, bias)`` computes y.
    """
    wanted = [name for name in wanted if getattr(case, name) is not None]
    leaves = leaves_of(case, wanted)
    y = function(**leaves)
    grads = torch.autograd.grad(y, [leaves[name] for name in wanted], case.dy if dy is None else dy)
    return SimpleNamespace(y=y.detach(), **dict(zip(wanted, grads, strict=True)))


def fused(alpha=1.0, dropout=0.0, seed=None, path="auto"):
    """``lora_linear`` on one path as a function of (x, weight, A, B, bias)."""

    def function(x, weight, A, B, bias=None):
        with fastlora.use_path(path):
            return fastlora.lora_linear(x, weight, A, B, alpha, bias, dropout, seed)

    return function


def exact(case, alpha=1.0, keep=None):
    """The formula and its gradients in float64; ``keep``: (M, K) factors on the update's input."""
    W, A, B = (getattr(case, name).detach().double() for name in ("weight", "A", "B"))
    x = case.x.detach().double().reshape(-1, W.shape[1])
    dy = case.dy.double().reshape(-1, W.shape[0])
    keep = torch.ones_like(x) if keep is None else keep.double()
    dropped = keep * x
    h = dropped @ B.T
    y = x @ W.T + alpha * (h @ A.T)
    if case.bias is not None:
        y = y + case.bias.detach().double()
    g = dy @ A
    return SimpleNamespace(
        y=y.reshape(case.dy.shape),
        x=(dy @ W + alpha * keep * (g @ B)).reshape(case.x.shape),
        A=alpha * (dy.T @ h),
        B=alpha * (g.T @ dropped),
        bias=dy.sum(0),
    )


def eager(alpha=1.0, keep=None):
    """LoRA in plain PyTorch, adapters in their own dtype: what PEFT computes."""

    def function(x, weight, A, B, bias=None):
        y = F.linear(x, weight, bias)
        update = x if keep is None else x * keep.to(x.dtype).reshape(x.shape)
        update = update.to(A.dtype)
        return (y + alpha * F.linear(F.linear(update, B), A)).to(y.dtype)

    return function


def eager_autocast(dtype, alpha=1.0, keep=None):
    plain = eager(alpha, keep)

    def function(x, weight, A, B, bias=None):
        with torch.autocast(x.device.type, dtype):
            return plain(x, weight, A, B, bias)

    return function


def eager_errors(case, alpha=1.0, keep=None, wanted=("x", "A", "B", "bias")):
    """For each result the worst (max, RMS) error of eager PyTorch in the case's dtypes.

    For adapters of a wider dtype these are PEFT's form and the one under autocast. Few tokens make few
    roundings, whose luck decides: the worst of several draws of the same shapes counts then.
    """
    return worst_errors(
        draws_of(case),
        lambda draw: eager_forms(draw, alpha, keep),
        lambda form, draw: differentiate(form, draw, wanted),
        lambda draw: exact(draw, alpha, keep),
    )


def draws_of(problem):
    """The problem and, if its tokens are few, others of the same shapes."""
    few = problem.x.numel() < 32 * problem.x.shape[-1]
    return [problem, *(problem.redraw() for _ in range(4 if few else 0))]


def eager_forms(case, alpha=1.0, keep=None):
    """What eager PyTorch may compute for a case: of wider adapters PEFT's form and the one under autocast."""
    forms = [eager(alpha, keep)]
    if case.A.dtype != case.x.dtype:
        forms.append(eager_autocast(case.x.dtype, alpha, keep))
    return forms


def worst_errors(draws, forms, results, exact_):
    """By name of a result, the worst (max, RMS) error of any form on any draw.

    ``forms(draw)``: functions. ``results(form, draw)`` and ``exact_(draw)``: namespaces of results.
    """
    worst = {}
    for draw in draws:
        truth = exact_(draw)
        for form in forms(draw):
            for name, value in vars(results(form, draw)).items():
                pair = errors(value, getattr(truth, name))
                worst[name] = tuple(map(max, pair, worst.get(name, pair)))
    return worst


def assert_matches(actual, exact_, eager_errors_):
    """Every result is finite and errs at most twice as much as eager PyTorch, in max and in RMS."""
    for name, theirs in eager_errors_.items():
        ours, truth = getattr(actual, name), getattr(exact_, name)
        assert ours.shape == truth.shape, f"{name}: {tuple(ours.shape)}, expected {tuple(truth.shape)}"
        assert torch.isfinite(ours).all(), f"{name}: not finite"
        for kind, error, yardstick in zip(("max", "rms"), errors(ours, truth), theirs, strict=True):
            bound = FACTOR * yardstick + FLOOR
            assert error <= bound, f"{name}: {kind} error {error:.3e}, eager PyTorch {yardstick:.3e}"


def keep_factors(seed, case, dropout):
    """The oracle's keep mask times 1 / (1 - p), in float64: (M, K)."""
    K = case.x.shape[-1]
    mask = fastlora.reference.keep_mask(seed, case.x.numel() // K, K, dropout)
    return mask.double() / (1 - dropout) if dropout < 1 else mask.double()


def saved_for_backward(function, case, wanted):
    """Tensors that autograd keeps for backward and that share no storage with the case's tensors."""
    leaves = leaves_of(case, wanted)
    known = {leaf.untyped_storage().data_ptr() for leaf in leaves.values()}
    kept = []

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in known:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function(**leaves)
    return y, kept


def bits_equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
