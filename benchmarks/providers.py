"""What the benchmarks compare: one builder for each way to compute a LoRA linear layer.

A provider builds a layer from a problem's weights, without copying the frozen ones. Every layer is called as
y = call(x), x: (M, K), y: (M, N), and names its trainable leaves (A: (N, R), B: (R, K)); forward, backward
and both are then made here in the same way for all of them.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from shapes import Shape
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MODES = ("forward", "backward", "both", "inference")
FLOOR = "frozen"


class Unavailable(Exception):
    """A provider cannot run here or cannot take this problem; the message says why."""


@dataclass(frozen=True)
class Problem:
    """The weights of one layer and one batch, the same for every provider.

    x: (M, K), dy: (M, N), weight: (N, K), bias: (N,) or None, A: (N, R), B: (R, K); all of one dtype.
    """

    shape: Shape
    x: Tensor
    dy: Tensor
    weight: Tensor
    bias: Tensor | None
    A: Tensor
    B: Tensor
    alpha: float
    dropout: float = 0.0

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        return self.x.device


def make_problem(
    shape: Shape, dtype: torch.dtype, device: torch.device, *, bias: bool, dropout: float = 0.0, seed: int = 0
) -> Problem:
    """Random weights and a random batch; A is not zero, as if training had gone on for a while."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        values = torch.randn(size, generator=generator, device=device, dtype=torch.float32)
        return (values * scale).to(dtype)

    M, N, K, R = shape.M, shape.N, shape.K, shape.R
    return Problem(
        shape=shape,
        x=normal(M, K).requires_grad_(),
        dy=normal(M, N),
        weight=normal(N, K, scale=K**-0.5),
        bias=normal(N) if bias else None,
        A=normal(N, R, scale=R**-0.5),
        B=normal(R, K, scale=K**-0.5),
        alpha=1.5,
        dropout=dropout,
    )


@dataclass(frozen=True)
class Layer:
    """A built layer: ``call`` maps x to y; ``adapters`` are its leaves (A, B), none for the frozen linear."""

    call: Callable[[Tensor], Tensor]
    adapters: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Provider:
    """A way to compute the layer. ``adapter_dtype`` None: the adapters have the base's dtype.

    ``seeded`` builds a layer that drops what :func:`fastlora.reference.keep_mask` says for the given seed,
    so that dropout can be checked too; the other libraries draw masks that only they know.
    """

    name: str
    build: Callable[[Problem], Layer]
    what: str
    adapter_dtype: torch.dtype | None = None
    dropout: bool = True
    seeded: Callable[[Problem, Tensor], Layer] | None = None


def step(layer: Layer, problem: Problem, mode: str) -> Callable[[], object]:
    """The callable that is timed for ``mode``: it returns what it computed, and keeps nothing.

    forward: training forward. backward: dx and the adapters' gradients of one kept forward. both: the two.
    inference: forward without autograd. ValueError for another mode.
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r}: expected one of {', '.join(MODES)}")
    call, x, dy = layer.call, problem.x, problem.dy
    leaves = (x, *layer.adapters)

    def forward() -> Tensor:
        return call(x)

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(call(x), leaves, dy)

    @torch.no_grad()
    def inference() -> Tensor:
        return call(x)

    if mode == "backward":
        y = call(x)
        return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)
    return {"forward": forward, "both": both, "inference": inference}[mode]


def outputs(layer: Layer, problem: Problem) -> dict[str, Tensor]:
    """y and every gradient of one training step, by name."""
    y = layer.call(problem.x)
    gradients = torch.autograd.grad(y, (problem.x, *layer.adapters), problem.dy)
    return {"y": y.detach(), **dict(zip(("dx", "dA", "dB"), gradients, strict=False))}


# --- PyTorch forms ---------------------------------------------------------------------------------------


def _adapters(problem: Problem, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    dtype = problem.dtype if dtype is None else dtype
    return tuple(t.detach().to(dtype, copy=True).requires_grad_() for t in (problem.A, problem.B))


def _frozen_linear(problem: Problem) -> nn.Linear:
    """An nn.Linear over the problem's own weight and bias, nothing trainable."""
    linear = nn.Linear(problem.shape.K, problem.shape.N, bias=problem.bias is not None, device="meta")
    linear.weight = nn.Parameter(problem.weight, requires_grad=False)
    if problem.bias is not None:
        linear.bias = nn.Parameter(problem.bias, requires_grad=False)
    return linear


def _build_frozen(problem: Problem) -> Layer:
    return Layer(_frozen_linear(problem))


def eager_lora(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, alpha: float, bias: Tensor | None, dropout: float = 0.0
) -> Tensor:
    """The layer as one would write it first."""
    return F.linear(x, weight, bias) + alpha * F.linear(F.linear(F.dropout(x, dropout), B), A)


def merged_lora(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, alpha: float, bias: Tensor | None) -> Tensor:
    """The update added to the weight in every step; autograd then makes a gradient of the weight's size."""
    return F.linear(x, weight + alpha * (A @ B), bias)


def _build_eager(problem: Problem) -> Layer:
    p, (A, B) = problem, _adapters(problem)
    return Layer(lambda x: eager_lora(x, p.weight, A, B, p.alpha, p.bias, p.dropout), (A, B))


def _build_seed(problem: Problem) -> Layer:
    p, (A, B) = problem, _adapters(problem)
    return Layer(lambda x: merged_lora(x, p.weight, A, B, p.alpha, p.bias), (A, B))


def _scaled_mm(p: Tensor, q: Tensor, scale: float) -> Tensor:
    """scale * p @ q with the scale inside the product: one launch, one rounding."""
    return torch.addmm(p.new_empty(()), p, q, beta=0, alpha=scale)


class UpdateLastLoRA(torch.autograd.Function):
    """BLAS calls alone: the frozen product first, the update added into it (beta = 1); h saved."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, alpha: float, bias: Tensor | None):
        h = F.linear(x, B)
        y = F.linear(x, weight, bias)
        return y.addmm_(h, A.t(), alpha=alpha), h

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, A, B, alpha, _ = inputs
        h = output[1]
        ctx.mark_non_differentiable(h)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, weight, A, B, h)
        ctx.alpha = alpha

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor, _):
        x, weight, A, B, h = ctx.saved_tensors
        g = torch.mm(dy, A)
        dA = _scaled_mm(dy.t(), h, ctx.alpha)
        dB = _scaled_mm(g.t(), x, ctx.alpha)
        dx = torch.mm(dy, weight).addmm_(g, B, alpha=ctx.alpha)
        return dx, None, dA, dB, None, None


class BaseLastLoRA(UpdateLastLoRA):
    """The same with the small product first and the frozen one accumulated onto it.

    The read of the small product's result then hides behind the large product's main loop.
    """

    @staticmethod
    def forward(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, alpha: float, bias: Tensor | None):
        h = F.linear(x, B)
        y = _scaled_mm(h, A.t(), alpha) if bias is None else torch.addmm(bias, h, A.t(), alpha=alpha)
        return y.addmm_(x, weight.t()), h

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor, _):
        x, weight, A, B, h = ctx.saved_tensors
        g = torch.mm(dy, A)
        dA = _scaled_mm(dy.t(), h, ctx.alpha)
        dB = _scaled_mm(g.t(), x, ctx.alpha)
        dx = _scaled_mm(g, B, ctx.alpha).addmm_(dy, weight)
        return dx, None, dA, dB, None, None


def _build_function(problem: Problem, function: type[torch.autograd.Function]) -> Layer:
    p, (A, B) = problem, _adapters(problem)
    return Layer(lambda x: function.apply(x, p.weight, A, B, p.alpha, p.bias)[0], (A, B))


@functools.lru_cache(maxsize=1)
def _compiled_eager(shape: Shape | None, dtype: torch.dtype, bias: bool, dropout: float):
    """torch.compile of the eager form; static for a shape, with dynamic sizes for None.

    The other arguments are only the cache's key. Without the reset, dynamo would count every problem as a
    recompilation and stop compiling at its limit.
    """
    torch._dynamo.reset()
    # Donated buffers forbid retain_graph, which timing the backward alone needs.
    torch._functorch.config.donated_buffer = False
    return torch.compile(eager_lora, dynamic=shape is None, fullgraph=True)


def _build_compile(problem: Problem) -> Layer:
    p, (A, B) = problem, _adapters(problem)
    # On a CPU a compilation takes longer than the timing: one with dynamic sizes serves all shapes.
    shape = p.shape if p.device.type == "cuda" else None
    compiled = _compiled_eager(shape, p.dtype, p.bias is not None, p.dropout)
    try:
        torch.autograd.grad(compiled(p.x, p.weight, A, B, p.alpha, p.bias, p.dropout), (p.x, A, B), p.dy)
    except torch._inductor.exc.InductorError as error:
        raise Unavailable(f"torch.compile failed: {_first_line(error)}") from error
    return Layer(lambda x: compiled(x, p.weight, A, B, p.alpha, p.bias, p.dropout), (A, B))


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


# --- Other libraries -------------------------------------------------------------------------------------


def _import(module: str, attribute: str):
    """``attribute`` of another library's ``module``, or Unavailable with the reason why not.

    Such an import runs the library's own code, which can fail with anything on a machine it does not know.
    """
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise Unavailable(f"import of {module}.{attribute} failed: {_first_line(error)}") from error


def _peft_layer(problem: Problem, *, cast_adapters: bool) -> nn.Module:
    """PEFT's own LoRA layer over the problem's weights. ``cast_adapters``: to fp32, PEFT's default."""
    config_class, get_peft_model = _import("peft", "LoraConfig"), _import("peft", "get_peft_model")
    model = nn.Module()
    model.linear = _frozen_linear(problem)
    rank = problem.shape.R
    config = config_class(
        r=rank, lora_alpha=problem.alpha * rank, target_modules=["linear"], lora_dropout=problem.dropout
    )
    with warnings.catch_warnings():
        # It finds no `config` of a known model on a bare module, and says so once a layer.
        warnings.simplefilter("ignore", UserWarning)
        model = get_peft_model(model, config, autocast_adapter_dtype=cast_adapters)
    layer = model.base_model.model.linear
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(problem.B)
        layer.lora_B["default"].weight.copy_(problem.A)
    return layer


def _build_peft(problem: Problem, *, cast_adapters: bool) -> Layer:
    if not cast_adapters and problem.dtype == torch.float32:
        raise Unavailable("the base is float32, so this is the same as peft")
    layer = _peft_layer(problem, cast_adapters=cast_adapters)
    return Layer(layer, (layer.lora_B["default"].weight, layer.lora_A["default"].weight))


def _build_unsloth(problem: Problem) -> Layer:
    """Unsloth's form for one projection; importing Unsloth patches other libraries, so it comes last."""
    if problem.bias is not None:
        raise Unavailable("apply_lora_o has no bias")
    apply_lora = _import("unsloth.kernels", "apply_lora_o")
    layer = _peft_layer(problem, cast_adapters=False)
    holder = SimpleNamespace(o_proj=layer)
    leaves = (layer.lora_B["default"].weight, layer.lora_A["default"].weight)
    return Layer(lambda x: apply_lora(holder, x.unsqueeze(0)).squeeze(0), leaves)


def _build_lorafusion(problem: Problem) -> Layer:
    """LoRAFusion's fused linear; its lora_a is our B and its lora_b our A."""
    fused_linear_lora = _import("lorafusion.ops.lora_v1", "fused_linear_lora")
    p, (A, B) = problem, _adapters(problem)

    def call(x: Tensor) -> Tensor:
        y = fused_linear_lora(
            x.unsqueeze(0), p.weight, B, A, p.alpha, dropout_p=p.dropout, linear_bias=p.bias
        )
        return y.squeeze(0)

    return Layer(call, (A, B))


# --- fastlora --------------------------------------------------------------------------------------------


def _build_fastlora(
    problem: Problem, *, path: str | None = None, adapter_dtype: torch.dtype | None = None
) -> Layer:
    """fastlora's module over the problem's weights; ``path`` None leaves the choice to its planner."""
    if adapter_dtype == problem.dtype:
        raise Unavailable(f"the base is {problem.dtype}, so this is the same as fastlora")
    if path == "triton" and problem.device.type != "cuda":
        raise Unavailable("the Triton kernels need a GPU; Triton's interpreter is not worth timing")
    fused_class, use_path = _import("fastlora", "FusedLoRALinear"), _import("fastlora", "use_path")
    layer = fused_class.from_linear(
        _frozen_linear(problem),
        problem.shape.R,
        alpha=problem.alpha,
        dropout=problem.dropout,
        adapter_dtype=adapter_dtype,
    )
    with torch.no_grad():
        layer.A.copy_(problem.A)
        layer.B.copy_(problem.B)
    if path is None:
        return Layer(layer, (layer.A, layer.B))

    def call(x: Tensor) -> Tensor:
        with use_path(path):
            return layer(x)

    return Layer(call, (layer.A, layer.B))


def _build_seeded(
    problem: Problem, seed: Tensor, *, path: str = "auto", adapter_dtype: torch.dtype | None = None
) -> Layer:
    lora_linear, use_path = _import("fastlora", "lora_linear"), _import("fastlora", "use_path")
    p, (A, B) = problem, _adapters(problem, adapter_dtype)

    def call(x: Tensor) -> Tensor:
        with use_path(path):
            return lora_linear(x, p.weight, A, B, p.alpha, p.bias, p.dropout, seed)

    return Layer(call, (A, B))


def _fastlora_path(path: str, what: str) -> Provider:
    build = functools.partial(_build_fastlora, path=path)
    return Provider(f"fastlora-{path}", build, what, seeded=functools.partial(_build_seeded, path=path))


PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(FLOOR, _build_frozen, "frozen nn.Linear, forward and dx: the floor"),
        Provider("frozen-again", _build_frozen, "the same once more: its ratio is this run's noise"),
        Provider("seed", _build_seed, "merged weight each step", dropout=False),
        Provider("eager", _build_eager, "the formula in PyTorch"),
        Provider(
            "peft",
            functools.partial(_build_peft, cast_adapters=True),
            "PEFT's layer, its default float32 adapters",
            adapter_dtype=torch.float32,
        ),
        Provider(
            "peft-same-dtype",
            functools.partial(_build_peft, cast_adapters=False),
            "PEFT's layer, adapters in the base's dtype",
        ),
        Provider(
            "addmm",
            functools.partial(_build_function, function=UpdateLastLoRA),
            "BLAS chain with its own backward, update last",
            dropout=False,
        ),
        Provider(
            "addmm-base-last",
            functools.partial(_build_function, function=BaseLastLoRA),
            "the same, frozen product last",
            dropout=False,
        ),
        Provider("compile", _build_compile, "torch.compile of eager"),
        Provider("fastlora", _build_fastlora, "fastlora, path chosen by plan", seeded=_build_seeded),
        Provider(
            "fastlora-fp32-adapters",
            functools.partial(_build_fastlora, adapter_dtype=torch.float32),
            "fastlora, float32 adapters",
            adapter_dtype=torch.float32,
            seeded=functools.partial(_build_seeded, adapter_dtype=torch.float32),
        ),
        _fastlora_path("triton", "its Triton kernels for every product"),
        _fastlora_path("addmm", "its BLAS form"),
        _fastlora_path("reference", "its plain PyTorch form"),
        Provider("lorafusion", _build_lorafusion, "LoRAFusion's fused_linear_lora"),
        Provider("unsloth", _build_unsloth, "Unsloth's apply_lora_o", dropout=False),
    )
}


def select(names: str) -> list[Provider]:
    """The providers of a comma-separated list, in the order of PROVIDERS, with the floor always among them.

    ValueError that lists the known names if one is unknown.
    """
    wanted = {name.strip() for name in names.split(",")}
    unknown = sorted(wanted - PROVIDERS.keys())
    if unknown:
        raise ValueError(f"unknown providers {', '.join(unknown)}; known: {', '.join(PROVIDERS)}")
    return [provider for name, provider in PROVIDERS.items() if name in wanted | {FLOOR}]
