"""What bench_model compares: a decoder layer with adapters on all of its seven linear layers.

The layer is transformers' own, with Llama 3's proportions and random weights. Every provider has its own copy
of the modules around the same frozen weights, and the same adapters, none of them zero.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from problem import Layer, Unavailable, drawing, eager_form
from providers import FLOOR, Provider, first_line, import_or_say_why, same_as_base, wrap_by_peft
from shapes import ModelShape
from torch import Tensor, nn

# Providers are checked on one sequence of at most this many tokens, as float64 is slow and takes much memory.
CHECK_TOKENS = 256
# The attention implementation of transformers that every provider uses.
ATTENTION = "sdpa"


@dataclass(frozen=True)
class ModelProblem:
    """A frozen decoder layer, its adapters (A, B) by layer path, and one batch.

    x, dy: (batch, sequence, hidden). rotary: cosines and sines, each (1, sequence, head size).
    """

    fewest_sets: ClassVar[int] = 1  # One layer of a large model is larger than the cache.
    dropout: ClassVar[float] = 0.0

    shape: ModelShape
    layer: nn.Module
    adapters: Mapping[str, tuple[Tensor, Tensor]]
    alpha: float
    x: Tensor
    dy: Tensor
    rotary: tuple[Tensor, Tensor]

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def names(self) -> tuple[str, ...]:
        gradients = (f"{leaf} of {path}" for path in self.adapters for leaf in ("dA", "dB"))
        return ("y", "dx", *gradients)

    @property
    def frozen(self) -> list[Tensor]:
        return [*self.layer.parameters(), *self.rotary]

    @property
    def elements(self) -> int:
        s = self.shape
        return sum(p.numel() for p in self.layer.parameters()) + s.M * (8 * s.hidden + 3 * s.intermediate)

    @property
    def checked(self) -> ModelProblem:
        sequence = min(self.shape.sequence, CHECK_TOKENS)
        return replace(
            self,
            shape=replace(self.shape, batch=1, sequence=sequence),
            x=self.x.detach()[:1, :sequence].clone().requires_grad_(),
            dy=self.dy[:1, :sequence].clone(),
            rotary=tuple(values[:, :sequence] for values in self.rotary),
        )

    def redrawn(self, seed: int) -> ModelProblem:
        return make_model_problem(self.shape, self.dtype, self.device, seed=seed)

    def copy(self) -> nn.Module:
        """A copy of the layer's modules around the same parameters."""
        return copy.deepcopy(self.layer, {id(p): p for p in self.layer.parameters()})

    def called(self, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda x: layer(x, position_embeddings=self.rotary)

    def exact(self, *, frozen: bool = False, keep: Tensor | None = None) -> dict[str, Tensor]:
        whole = copy.deepcopy(self.layer).double()
        for name, module in list(whole.named_children()):
            if name.endswith("layernorm"):
                # transformers' own norm computes in float32 at most.
                norm = nn.RMSNorm(self.shape.hidden, eps=module.variance_epsilon, device="meta")
                norm.weight = module.weight
                setattr(whole, name, norm)
        wide = replace(
            self,
            layer=whole,
            adapters={path: (A.double(), B.double()) for path, (A, B) in self.adapters.items()},
            x=self.x.detach().double().requires_grad_(),
            dy=self.dy.double(),
            rotary=tuple(values.double() for values in self.rotary),
        )
        layer = _build_frozen(wide) if frozen else wide.eager(torch.float64, "plain")
        y = layer.call(wide.x)
        gradients = torch.autograd.grad(y, (wide.x, *layer.adapters), wide.dy)
        return dict(zip(self.names, (y.detach(), *gradients), strict=False))

    def eager(self, dtype: torch.dtype, form: str, keep: Tensor | None = None) -> Layer:
        layer, leaves = self.copy(), []
        for path, adapters in self.adapters.items():
            A, B = (t.detach().to(dtype, copy=True).requires_grad_() for t in adapters)
            leaves += [A, B]
            linear = layer.get_submodule(path)
            linear.forward = functools.partial(
                eager_form, weight=linear.weight, bias=None, A=A, B=B, alpha=self.alpha, form=form
            )
        return Layer(self.called(layer), tuple(leaves))

    def path(self, name: str, adapter_dtype: torch.dtype) -> str:
        return ""  # Each of the seven layers has its own path.


def make_model_problem(
    shape: ModelShape,
    dtype: torch.dtype,
    device: torch.device,
    *,
    bias: bool = False,
    dropout: float = 0.0,
    seed: int = 0,
) -> ModelProblem:
    """Random weights and a random batch; Unavailable without transformers.

    ValueError for bias or dropout, which Llama's layers do not have.
    """
    if bias or dropout:
        raise ValueError(f"bias {bias}, dropout {dropout}: the decoder layer has neither")
    module = "transformers.models.llama.modeling_llama"
    layer_class = import_or_say_why(module, "LlamaDecoderLayer")
    rotary_class = import_or_say_why(module, "LlamaRotaryEmbedding")
    config = import_or_say_why("transformers", "LlamaConfig")(
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        max_position_embeddings=shape.sequence,
        attn_implementation=ATTENTION,
    )
    normal = drawing(dtype, device, seed)
    with torch.device("meta"):
        layer = layer_class(config, layer_idx=0)
    adapters = {}
    for path, child in layer.named_modules():
        if isinstance(child, nn.Linear):
            N, K = child.weight.shape
            child.weight = nn.Parameter(normal(N, K, scale=K**-0.5), requires_grad=False)
            # The update is about as large as the frozen product, so that an error in it shows in y.
            adapters[path] = (normal(N, shape.R, scale=shape.R**-0.5), normal(shape.R, K, scale=K**-0.5))
        elif hasattr(child, "variance_epsilon"):
            child.weight = nn.Parameter(1.0 + normal(shape.hidden, scale=0.1), requires_grad=False)
    x = normal(shape.batch, shape.sequence, shape.hidden)
    positions = torch.arange(shape.sequence, device=device).unsqueeze(0)
    return ModelProblem(
        shape=shape,
        layer=layer,
        adapters=adapters,
        alpha=0.5,
        x=x.requires_grad_(),
        dy=normal(*x.shape),
        rotary=rotary_class(config).to(device)(x.detach(), positions),
    )


def _build_frozen(problem: ModelProblem) -> Layer:
    return Layer(problem.called(problem.copy()))


def _in_peft(problem: ModelProblem, *, cast_adapters: bool) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A copy of the layer wrapped by PEFT, and its leaves."""
    if not cast_adapters:
        same_as_base(problem, torch.float32, "peft")
    layer = problem.copy()
    return layer, wrap_by_peft(layer, problem.adapters, problem.alpha, 0.0, cast_adapters=cast_adapters)


def _build_peft(problem: ModelProblem, *, cast_adapters: bool) -> Layer:
    layer, leaves = _in_peft(problem, cast_adapters=cast_adapters)
    return Layer(problem.called(layer), leaves)


def _build_compile(problem: ModelProblem) -> Layer:
    """Compiled for the problem's own shape: dynamic sizes would be a handicap."""
    layer, leaves = _in_peft(problem, cast_adapters=True)
    torch._dynamo.reset()
    # Donated buffers forbid retain_graph, which is needed to time the backward pass alone.
    torch._functorch.config.donated_buffer = False
    call = problem.called(torch.compile(layer, dynamic=False))
    try:
        torch.autograd.grad(call(problem.x), (problem.x, *leaves), problem.dy)
    except torch._inductor.exc.InductorError as error:
        raise Unavailable(f"torch.compile failed: {first_line(error)}") from error
    return Layer(call, leaves)


def _build_fastlora(problem: ModelProblem, *, from_peft: bool = False, groups: bool = False) -> Layer:
    """apply_lora, or PEFT's layer (default float32 adapters) with fuse_peft; ``groups``: also grouped."""
    if from_peft:
        layer, leaves = _in_peft(problem, cast_adapters=True)
        import_or_say_why("fastlora", "fuse_peft")(layer)
    else:
        apply_lora = import_or_say_why("fastlora", "apply_lora")
        layer = apply_lora(problem.copy(), list(problem.adapters), problem.shape.R, problem.alpha)
        adapted = [(layer.get_submodule(path), AB) for path, AB in problem.adapters.items()]
        with torch.no_grad():
            for module, (A, B) in adapted:
                module.A.copy_(A)
                module.B.copy_(B)
        leaves = tuple(leaf for module, _ in adapted for leaf in (module.A, module.B))
    if groups:
        import_or_say_why("fastlora", "group_projections")(layer)
    return Layer(problem.called(layer), leaves)


def _attention(
    attention: nn.Module, qkv: Callable, o: Callable, hidden_states: Tensor, position_embeddings, **_
) -> tuple[Tensor, None]:
    """Llama's attention with the projections of another library."""
    rotate = import_or_say_why("transformers.models.llama.modeling_llama", "apply_rotary_pos_emb")
    batch, sequence, _ = hidden_states.shape
    q, k, v = (
        part.view(batch, sequence, -1, attention.head_dim).transpose(1, 2)
        for part in qkv(attention, hidden_states)
    )
    q, k = rotate(q, k, *position_embeddings)
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return o(attention, y.transpose(1, 2).reshape(batch, sequence, -1)), None


def _build_library(problem: ModelProblem, *, module: str) -> Layer:
    """apply_lora_qkv, _o and _mlp_swiglu, which Unsloth and Axolotl both have, on PEFT's layers."""
    qkv, o, mlp = (import_or_say_why(module, f"apply_lora_{name}") for name in ("qkv", "o", "mlp_swiglu"))
    layer, leaves = _in_peft(problem, cast_adapters=False)
    layer.self_attn.forward = functools.partial(_attention, layer.self_attn, qkv, o)
    layer.mlp.forward = functools.partial(mlp, layer.mlp)
    return Layer(problem.called(layer), leaves)


def _fastlora(name: str, what: str, **options: bool) -> Provider:
    dtype = torch.float32 if options.get("from_peft") else None
    return Provider(name, functools.partial(_build_fastlora, **options), what, adapter_dtype=dtype)


MODEL_PROVIDERS = {
    provider.name: provider
    for provider in (
        Provider(FLOOR, _build_frozen, "the frozen layer, forward and dx: the floor"),
        Provider("frozen-again", _build_frozen, "the same once more: its ratio is this run's noise"),
        Provider(
            "peft",
            functools.partial(_build_peft, cast_adapters=True),
            "PEFT, its default float32 adapters",
            adapter_dtype=torch.float32,
        ),
        Provider(
            "peft-same-dtype",
            functools.partial(_build_peft, cast_adapters=False),
            "PEFT, adapters in the base's dtype",
        ),
        Provider("compile", _build_compile, "torch.compile of peft", adapter_dtype=torch.float32),
        _fastlora("fastlora", "apply_lora"),
        _fastlora("fastlora-groups", "apply_lora and group_projections", groups=True),
        _fastlora("fastlora-fuse-peft", "fuse_peft of peft", from_peft=True),
        _fastlora("fastlora-fuse-peft-groups", "the same and group_projections", from_peft=True, groups=True),
        Provider("unsloth", functools.partial(_build_library, module="unsloth.kernels"), "Unsloth's forms"),
        Provider(
            "axolotl", functools.partial(_build_library, module="axolotl.kernels.lora"), "Axolotl's forms"
        ),
    )
}
