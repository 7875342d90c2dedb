"""What bench_group compares: layers that share their input, as q/k/v and gate/up do.

Separate layers are those of providers.py, one per branch; autograd then adds their gradients of x. The floor
is the separate frozen linears.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import torch
from problem import Layer, Problem, Unavailable, drawing
from providers import FLOOR, PROVIDERS, Provider, import_or_say_why, peft_layer, same_as_base
from shapes import GroupShape, Shape
from torch import Tensor


@dataclass(frozen=True)
class GroupProblem:
    """Branches that share one x; y and dy are tuples with one entry per branch."""

    fewest_sets: ClassVar[int] = 2
    dropout: ClassVar[float] = 0.0

    shape: GroupShape
    branches: tuple[Problem, ...]

    @property
    def x(self) -> Tensor:
        return self.branches[0].x

    @property
    def dy(self) -> tuple[Tensor, ...]:
        return tuple(branch.dy for branch in self.branches)

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype

    @property
    def device(self) -> torch.device:
        return self.x.device

    @property
    def names(self) -> tuple[str, ...]:
        indices = range(len(self.branches))
        return (
            *(f"y{i}" for i in indices),
            "dx",
            *(name for i in indices for name in (f"dA{i}", f"dB{i}")),
        )

    @property
    def frozen(self) -> list[Tensor]:
        return [tensor for branch in self.branches for tensor in branch.frozen]

    @property
    def elements(self) -> int:
        s = self.shape
        return s.M * (s.N + s.K) + s.N * s.K

    @property
    def checked(self) -> GroupProblem:
        return self

    def redrawn(self, seed: int) -> GroupProblem:
        has_bias = self.branches[0].bias is not None
        return make_group_problem(self.shape, self.dtype, self.device, bias=has_bias, seed=seed)

    def exact(self, *, frozen: bool = False, keep: Tensor | None = None) -> dict[str, Tensor]:
        each = [branch.exact(frozen=frozen, keep=keep) for branch in self.branches]
        results = {f"{name}{i}": value for i, exact in enumerate(each) for name, value in exact.items()}
        dx = sum(results.pop(f"dx{i}") for i in range(len(each)))
        results["dx"] = dx
        return {name: results[name] for name in self.names if name in results}

    def eager(self, dtype: torch.dtype, form: str, keep: Tensor | None = None) -> Layer:
        return joined([branch.eager(dtype, form, keep) for branch in self.branches])

    def path(self, name: str, adapter_dtype: torch.dtype) -> str:
        from fastlora.device import describe
        from fastlora.planner import Problem as Planned
        from fastlora.planner import make_group_plan

        if name == SEPARATE:
            return "/".join(dict.fromkeys(branch.path(name, adapter_dtype) for branch in self.branches))
        s = self.shape
        sizes = s.M, s.N, s.K, s.R * len(s.widths)
        whole = Planned(describe(self.device), self.dtype, *sizes, adapter_dtype=adapter_dtype)
        plan = make_group_plan(whole, s.widths, (s.R,) * len(s.widths))
        y = "/".join(dict.fromkeys(branch.y.path for branch in plan.branches))
        return y if y == plan.dx.path else f"y {y}, dx {plan.dx.path}"


def make_group_problem(
    shape: GroupShape,
    dtype: torch.dtype,
    device: torch.device,
    *,
    bias: bool,
    dropout: float = 0.0,
    seed: int = 0,
) -> GroupProblem:
    """Random weights for each branch and one random batch; ValueError for dropout, which has no benchmark."""
    if dropout:
        raise ValueError(f"dropout {dropout}: groups are measured without it")
    normal = drawing(dtype, device, seed)
    M, K, R = shape.M, shape.K, shape.R
    x = normal(M, K).requires_grad_()
    return GroupProblem(
        shape,
        tuple(
            Problem(
                shape=Shape(M, N, K, R),
                x=x,
                dy=normal(M, N),
                weight=normal(N, K, scale=K**-0.5),
                bias=normal(N) if bias else None,
                A=normal(N, R, scale=R**-0.5),
                B=normal(R, K, scale=K**-0.5),
                # Different for each branch, so that mixing up branches is detected.
                alpha=1.5 / (i + 1),
            )
            for i, N in enumerate(shape.widths)
        ),
    )


def joined(layers: Sequence[Layer]) -> Layer:
    """The layers applied to one x, with their adapters concatenated."""
    calls = [layer.call for layer in layers]
    adapters = tuple(adapter for layer in layers for adapter in layer.adapters)
    return Layer(lambda x: tuple(call(x) for call in calls), adapters)


def _separate(name: str, what: str, source: str | None = None) -> Provider:
    """The provider ``source`` of providers.py (by default ``name``), once per branch."""
    single = PROVIDERS[source or name]

    def build(problem: GroupProblem) -> Layer:
        return joined([single.build(branch) for branch in problem.branches])

    return Provider(name, build, what, adapter_dtype=single.adapter_dtype)


def _build_group(
    problem: GroupProblem, *, path: str | None = None, adapter_dtype: torch.dtype | None = None
) -> Layer:
    """lora_linear_group; ``path`` None leaves the choice to the planner."""
    same_as_base(problem, adapter_dtype, "fastlora")
    if path == "triton" and problem.device.type != "cuda":
        raise Unavailable("the Triton kernels need a GPU; Triton's interpreter is not worth timing")
    group = import_or_say_why("fastlora", "lora_linear_group")
    use_path = import_or_say_why("fastlora", "use_path")
    branches = problem.branches
    dtype = adapter_dtype or problem.dtype
    weights = [branch.weight for branch in branches]
    As, Bs = (
        [t.detach().to(dtype, copy=True).requires_grad_() for t in tensors]
        for tensors in ([branch.A for branch in branches], [branch.B for branch in branches])
    )
    alphas = [branch.alpha for branch in branches]
    biases = None if branches[0].bias is None else [branch.bias for branch in branches]
    adapters = tuple(adapter for pair in zip(As, Bs, strict=True) for adapter in pair)

    def call(x: Tensor) -> tuple[Tensor, ...]:
        return group(x, weights, As, Bs, alphas, biases)

    if path is None:
        return Layer(call, adapters)

    def forced(x: Tensor) -> tuple[Tensor, ...]:
        with use_path(path):
            return call(x)

    return Layer(forced, adapters)


def _build_qkv(problem: GroupProblem, *, module: str) -> Layer:
    """apply_lora_qkv, which Unsloth and Axolotl both have, on PEFT's layers."""
    if len(problem.branches) != 3 or problem.branches[0].bias is not None:
        raise Unavailable("apply_lora_qkv takes three layers without bias")
    apply_lora_qkv: Callable = import_or_say_why(module, "apply_lora_qkv")
    layers = [peft_layer(branch, cast_adapters=False) for branch in problem.branches]
    holder = SimpleNamespace(**dict(zip(("q_proj", "k_proj", "v_proj"), layers, strict=True)))
    adapters = tuple(
        adapter.weight for layer in layers for adapter in (layer.lora_B["default"], layer.lora_A["default"])
    )

    def call(x: Tensor) -> tuple[Tensor, ...]:
        # By default, it overwrites x with dx, but x is a leaf here.
        return tuple(y.squeeze(0) for y in apply_lora_qkv(holder, x.unsqueeze(0), inplace=False))

    return Layer(call, adapters)


def _fastlora_path(path: str, what: str) -> Provider:
    return Provider(f"fastlora-{path}", functools.partial(_build_group, path=path), what)


SEPARATE = "fastlora-separate"
GROUP_PROVIDERS = {
    provider.name: provider
    for provider in (
        _separate(FLOOR, "frozen nn.Linear layers, forward and dx: the floor"),
        _separate("frozen-again", "the same once more: its ratio is this run's noise"),
        _separate("eager", "the formula in PyTorch for each layer"),
        _separate("peft", "PEFT's layers, their default float32 adapters"),
        _separate("peft-same-dtype", "PEFT's layers, adapters in the base's dtype"),
        _separate("addmm-base-last", "a BLAS chain for each layer"),
        _separate(SEPARATE, "fastlora's layers, one by one", "fastlora"),
        Provider("fastlora", _build_group, "lora_linear_group, path chosen by the planner"),
        Provider(
            "fastlora-fp32-adapters",
            functools.partial(_build_group, adapter_dtype=torch.float32),
            "lora_linear_group, float32 adapters",
            adapter_dtype=torch.float32,
        ),
        _fastlora_path("triton", "its Triton kernels for every product"),
        _fastlora_path("addmm", "its BLAS form"),
        _separate("lorafusion", "LoRAFusion's fused_linear_lora for each layer: it has no form for a group"),
        Provider("unsloth", functools.partial(_build_qkv, module="unsloth.kernels"), "Unsloth's q/k/v"),
        Provider("axolotl", functools.partial(_build_qkv, module="axolotl.kernels.lora"), "Axolotl's q/k/v"),
    )
}
