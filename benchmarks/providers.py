"""What the benchmarks compare: one builder for each way to compute a LoRA linear layer.

A provider builds a layer from a problem's weights, without copying the frozen ones. Every layer is called as
y = call(x), x: (M, K), y: (M, N), and lists its trainable leaves (A: (N, R), B: (R, K)).
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from problem import AnyProblem, Layer, Problem, Unavailable
from shapes import Shape
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FLOOR = "frozen"


@dataclass(frozen=True)
class Provider:
    """A way to compute the layer. ``adapter_dtype`` None: the adapters have the base's dtype.

    ``seeded`` builds a layer that uses the mask of :func:`fastlora.reference.keep_mask` for the given seed,
    so that dropout can be checked too; the masks of the other libraries are not known here.
    """

    name: str
    build: Callable[[Problem], Layer]
    what: str
    adapter_dtype: torch.dtype | None = None
    dropout: bool = True
    seeded: Callable[[Problem, Tensor], Layer] | None = None


# --- PyTorch forms ---------------------------------------------------------------------------------------


def _adapters(problem: Problem, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
    dtype = problem.dtype if dtype is None else dtype
    return tuple(t.detach().to(dtype, copy=True).requires_grad_() for t in (problem.A, problem.B))


def _frozen_linear(problem: Problem) -> nn.Linear:
    """An nn.Linear that shares the problem's weight and bias, with nothing trainable."""
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
    """The layer in its most straightforward form."""
    return F.linear(x, weight, bias) + alpha * F.linear(F.linear(F.dropout(x, dropout), B), A)


def merged_lora(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, alpha: float, bias: Tensor | None) -> Tensor:
    """The update added to the weight in every step; autograd then creates a gradient of the weight's size."""
    return F.linear(x, weight + alpha * (A @ B), bias)


def _build_eager(problem: Problem) -> Layer:
    p, (A, B) = problem, _adapters(problem)
    return Layer(lambda x: eager_lora(x, p.weight, A, B, p.alpha, p.bias, p.dropout), (A, B))


def _build_merged(problem: Problem) -> Layer:
    p, (A, B) = problem, _adapters(problem)
    return Layer(lambda x: merged_lora(x, p.weight, A, B, p.alpha, p.bias), (A, B))


def _scaled_mm(p: Tensor, q: Tensor, scale: float) -> Tensor:
    """scale * p @ q with the scale applied inside the product: one launch, one rounding."""
    return torch.addmm(p.new_empty(()), p, q, beta=0, alpha=scale)


class UpdateLastLoRA(torch.autograd.Function):
    """BLAS calls only: the frozen product first, the update added into it (beta = 1); h is saved."""

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

    Reading the small product's result then overlaps the large product's main loop.
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
    """torch.compile of the eager form: static sizes for a shape, dynamic sizes for None.

    The other arguments only serve as cache keys. Without the reset, dynamo would count every problem as a
    recompilation and stop compiling at its limit.
    """
    torch._dynamo.reset()
    # Donated buffers forbid retain_graph, which is needed to time the backward pass alone.
    torch._functorch.config.donated_buffer = False
    return torch.compile(eager_lora, dynamic=shape is None, fullgraph=True)


def _build_compile(problem: Problem) -> Layer:
    p, (A, B) = problem, _adapters(problem)
    # On a CPU, compiling takes longer than timing, so one compilation with dynamic sizes serves all shapes.
    shape = p.shape if p.device.type == "cuda" else None
    compiled = _compiled_eager(shape, p.dtype, p.bias is not None, p.dropout)
    try:
        torch.autograd.grad(compiled(p.x, p.weight, A, B, p.alpha, p.bias, p.dropout), (p.x, A, B), p.dy)
    except torch._inductor.exc.InductorError as error:
        raise Unavailable(f"torch.compile failed: {first_line(error)}") from error
    return Layer(lambda x: compiled(x, p.weight, A, B, p.alpha, p.bias, p.dropout), (A, B))


def first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"


# --- Other libraries -------------------------------------------------------------------------------------


def import_or_say_why(module: str, attribute: str):
    """``attribute`` of another library's ``module``; raises Unavailable with the reason if that fails.

    Such an import runs the library's own code, which can raise anything on a machine that it does not know.
    """
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:
        raise Unavailable(f"import of {module}.{attribute} failed: {first_line(error)}") from error


def same_as_base(problem: AnyProblem, adapter_dtype: torch.dtype | None, name: str) -> None:
    """Raise Unavailable if the base also has ``adapter_dtype``: the provider would only repeat ``name``."""
    if adapter_dtype == problem.dtype:
        base = str(problem.dtype).removeprefix("torch.")
        raise Unavailable(f"the base is {base}, so this is the same as {name}")


def peft_layer(problem: Problem, *, cast_adapters: bool) -> nn.Module:
    """PEFT's own LoRA layer on the problem's weights. ``cast_adapters``: to fp32, PEFT's default."""
    model = nn.Module()
    model.linear = _frozen_linear(problem)
    adapters = {"linear": (problem.A, problem.B)}
    wrap_by_peft(model, adapters, problem.alpha, problem.dropout, cast_adapters=cast_adapters)
    return model.linear


def wrap_by_peft(
    model: nn.Module,
    adapters: Mapping[str, tuple[Tensor, Tensor]],
    alpha: float,
    dropout: float,
    *,
    cast_adapters: bool,
) -> tuple[Tensor, ...]:
    """Give the model's layers PEFT's adapters, in place; return the leaves (A, B) of all layers, in order.

    ``adapters``: (A, B) by layer path. ``cast_adapters``: to fp32, PEFT's default.
    """
    get_peft_model = import_or_say_why("peft", "get_peft_model")
    rank = next(iter(adapters.values()))[1].shape[0]
    config = import_or_say_why("peft", "LoraConfig")(
        r=rank, lora_alpha=alpha * rank, target_modules=list(adapters), lora_dropout=dropout
    )
    with warnings.catch_warnings():
        # PEFT finds no `config` of a known model on a bare module and warns about it once per layer.
        warnings.simplefilter("ignore", UserWarning)
        get_peft_model(model, config, autocast_adapter_dtype=cast_adapters)
    leaves: list[Tensor] = []
    with torch.no_grad():
        for path, (A, B) in adapters.items():
            layer = model.get_submodule(path)
            layer.lora_A["default"].weight.copy_(B)
            layer.lora_B["default"].weight.copy_(A)
            leaves += [layer.lora_B["default"].weight, layer.lora_A["default"].weight]
    return tuple(leaves)


def _build_peft(problem: Problem, *, cast_adapters: bool) -> Layer:
    if not cast_adapters:
        same_as_base(problem, torch.float32, "peft")
    layer = peft_layer(problem, cast_adapters=cast_adapters)
    return Layer(layer, (layer.lora_B["default"].weight, layer.lora_A["default"].weight))


def _build_unsloth(problem: Problem) -> Layer:
    """Unsloth's form for one projection; importing Unsloth patches other libraries, so it is listed last."""
    if problem.bias is not None:
        raise Unavailable("apply_lora_o has no bias")
    apply_lora = import_or_say_why("unsloth.kernels", "apply_lora_o")
    layer = peft_layer(problem, cast_adapters=False)
    holder = SimpleNamespace(o_proj=layer)
    leaves = (layer.lora_B["default"].weight, layer.lora_A["default"].weight)
    return Layer(lambda x: apply_lora(holder, x.unsqueeze(0)).squeeze(0), leaves)


def _build_lorafusion(problem: Problem) -> Layer:
    """LoRAFusion's fused linear; its lora_a is our B and its lora_b our A."""
    fused_linear_lora = import_or_say_why("lorafusion.ops.lora_v1", "fused_linear_lora")
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
    """fastlora's module on the problem's weights; ``path`` None leaves the choice to its planner."""
    same_as_base(problem, adapter_dtype, "fastlora")
    if path == "triton" and problem.device.type != "cuda":
        raise Unavailable("the Triton kernels need a GPU; Triton's interpreter is not worth timing")
    fused_class = import_or_say_why("fastlora", "FusedLoRALinear")
    use_path = import_or_say_why("fastlora", "use_path")
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
    lora_linear = import_or_say_why("fastlora", "lora_linear")
    use_path = import_or_say_why("fastlora", "use_path")
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
        Provider("merged", _build_merged, "merged weight each step", dropout=False),
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
