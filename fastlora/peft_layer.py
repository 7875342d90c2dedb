"""``FusedLinear``: PEFT's LoRA linear layer, run by the fused operator wherever that computes the same.

PEFT's attributes may change between calls (adapters are added, switched, merged and rescaled, hooks come and
go), so every call checks them again; only the last call's reason is stored, for :func:`fastlora.summary`.
Importing this module imports PEFT; :mod:`fastlora.peft` does so only when needed.
"""

from __future__ import annotations

import numbers
from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from fastlora import ops
from fastlora.checks import dtype_name
from fastlora.dtensors import any_dtensor
from fastlora.function import PLAIN_TENSORS, Operands, autocast_on, compute, needs_plain_operations

_HALF = (torch.float16, torch.bfloat16)
_FLOATS = (torch.float32, *_HALF, torch.float64)
# The dtypes that autocast casts to its own.
_CASTABLE = (torch.float32, *_HALF)
_DROPOUTS = (nn.Identity, nn.Dropout)


class FusedLinear(LoraLinear):
    """PEFT's ``lora.Linear`` with a fused forward; :func:`fastlora.fuse_peft` converts layers to it.

    Outputs, dtypes and gradients are those of PEFT's own forward, which still runs wherever the fused form
    would give others. In training, the dropout mask differs but has the same distribution, with its seed from
    torch's generator; small inputs on a CPU get PEFT's own mask. Second derivatives raise a RuntimeError
    if lora_B is trained but lora_A is frozen; after ``fastlora.unfuse_peft`` they work.
    """

    # Why the last call ran PEFT's own forward; "" if it was fused, None before the first call.
    _fastlora_last: str | None = None

    def _group_branch(self, x: Tensor | None) -> Operands | str:
        """The layer's operands as a branch of a group applied to x, or why it has to run alone."""
        return _branch_of(self, x)

    def _get_name(self) -> str:
        # PEFT takes the layer type it reports from the repr.
        return LoraLinear.__name__

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x: (..., in_features) -> (..., out_features), in the base layer's dtype or autocast's."""
        call = getattr(x, "_fastlora_call", None) if isinstance(x, Tensor) else None  # see fastlora.group
        if call is not None and not args and not kwargs:
            y = call.output_of(self, x)
            if y is not None:
                if self._fastlora_last != "" and not torch.compiler.is_compiling():
                    self._fastlora_last = ""
                return y
        found = why_not_extra(args, kwargs) if args or kwargs else find_operands(self)
        reason = found if isinstance(found, str) else why_not_input(self, x, found)
        # A compiled graph would be guarded on this attribute, and recompiled when it changes.
        if not torch.compiler.is_compiling() and self._fastlora_last != reason:
            self._fastlora_last = reason
        if isinstance(found, str) or reason:
            return LoraLinear.forward(self, x, *args, **kwargs)
        weight, bias, A, B, scaling, dropout = found
        if isinstance(scaling, Tensor):
            # Reading its value would synchronise with the device and break a compiled graph.
            A, scaling = (A * scaling).to(A.dtype), 1.0
        seed = ops.few_mask(x, dropout, A.dtype) if dropout else None
        # Not lora_linear: find_operands and why_not_input have already made its checks.
        return compute(x, weight, A, B, float(scaling), bias, dropout, seed)


def _branch_of(layer: FusedLinear, x: Tensor | None) -> Operands | str:
    """The layer's operands as a branch of a group applied to x, or why it has to run alone.

    With x None, as far as can be told without it.
    """
    if is_watched(layer):
        return "hooks or a replaced forward on a projection"
    # FSDP2 gathers the parameters for a call alone, so between calls only the last one can tell.
    found = find_operands(layer, sharded=x is None and layer._fastlora_last == "")
    if isinstance(found, str):
        return found
    if isinstance(found.alpha, Tensor):
        return "scaling is a tensor"
    return (x is not None and why_not_input(layer, x, found)) or found


def why_not_extra(args: tuple, kwargs: dict[str, Any]) -> str:
    """The reason when forward is called with more than x (adapter_names, alora_offsets)."""
    return f"extra arguments: {', '.join(kwargs) or len(args)}"


def find_operands(layer: LoraLinear, sharded: bool = False) -> Operands | str:
    """The operands of the fused form in the layer's current state, or why PEFT's own forward has to run.

    For the one active adapter, A is ``lora_B.weight``, B is ``lora_A.weight`` and alpha is ``scaling``.
    ``sharded``: DTensors too, which FSDP2 leaves between calls.
    """
    if layer._disable_adapters:
        return "adapters disabled"
    if layer.merged_adapters:
        return "merged"
    modules: dict[str, Any] = layer._modules
    downs = modules["lora_A"]._modules
    active = layer._active_adapter
    if type(active) is not str:
        present = [name for name in active if name in downs]
        if len(present) != 1:
            return f"{len(present) or 'no'} active adapter{'s' if present else ''}"
        active = present[0]
    elif active not in downs:
        return "no active adapter"
    if active in layer.lora_variant:
        return f"variant {type(layer.lora_variant[active]).__name__}"
    if layer.fan_in_fan_out:
        return "fan_in_fan_out"
    base, down = modules["base_layer"], downs[active]
    up = modules["lora_B"]._modules.get(active)
    drop = modules["lora_dropout"]._modules.get(active)
    if not (type(base) is type(down) is type(up) is nn.Linear) or type(drop) not in _DROPOUTS:
        return _why_not_types(base, down, up, drop)
    if is_watched(base) or is_watched(down) or is_watched(up) or is_watched(drop):
        return _why_watched(base, down, up, drop)
    base_parameters: dict[str, Any] = base._parameters
    down_parameters: dict[str, Any] = down._parameters
    up_parameters: dict[str, Any] = up._parameters
    if up_parameters.get("bias") is not None or down_parameters.get("bias") is not None:
        return "lora_bias"
    # A weight that is not a registered parameter, as under older forms of sharding, is left to PEFT.
    weight: Any = base_parameters.get("weight")
    bias = base_parameters.get("bias")
    A: Any = up_parameters.get("weight")
    B: Any = down_parameters.get("weight")
    if not (
        type(weight) in PLAIN_TENSORS
        and type(A) in PLAIN_TENSORS
        and type(B) in PLAIN_TENSORS
        and (bias is None or type(bias) in PLAIN_TENSORS)
    ) and not (sharded and any_dtensor(weight, A, B)):
        return _why_not_plain(weight, bias, A, B)
    if weight.requires_grad:
        return (
            "the base weight is trained" if weight.is_leaf else "the base weight is computed (by FSDP1, say)"
        )
    scaling: Any = layer.scaling.get(active)
    if type(scaling) is not float or scaling - scaling != 0.0:
        reason = _why_not_scaling(scaling)
        if reason:
            return reason
    p = 0.0
    if type(drop) is nn.Dropout and drop.training:
        if drop.inplace:
            return "lora_dropout works in place"
        p = float(drop.p)
        if not 0.0 <= p <= 1.0:
            return f"lora_dropout is {p}"  # PyTorch raises its own error for that
    return Operands(weight, bias, A, B, scaling, p)


def is_watched(module: nn.Module) -> bool:
    """Whether calling a module runs more than its class's forward: hooks or a replaced forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _why_not_types(*modules: nn.Module | None) -> str:
    for name, module in zip(("base layer", "lora_A", "lora_B"), modules, strict=False):
        if type(module) is not nn.Linear:
            return f"{name} is {_type_name(module)}, not exactly nn.Linear"
    return f"lora_dropout is {_type_name(modules[3])}, not exactly nn.Dropout or nn.Identity"


def _type_name(value: object) -> str:
    """The qualified type name with its module, as other tuners' layers are also called Linear."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _why_watched(*modules: nn.Module) -> str:
    for name, module in zip(("base layer", "lora_A", "lora_B", "lora_dropout"), modules, strict=True):
        if "forward" in vars(module):
            return f"replaced forward on {name}"
        if is_watched(module):
            return f"hooks on {name}"
    raise AssertionError("no module is watched")


def _why_not_plain(*tensors: Tensor | None) -> str:
    names = ("base weight", "base bias", "lora_B.weight", "lora_A.weight")
    return next(
        f"{name} is {'missing' if tensor is None else f'a {type(tensor).__name__}'}"
        for name, tensor in zip(names, tensors, strict=True)
        if type(tensor) not in PLAIN_TENSORS and not (tensor is None and name == "base bias")
    )


def _why_not_scaling(scaling: object) -> str | None:
    if isinstance(scaling, Tensor):
        return None if scaling.numel() == 1 else f"scaling of {scaling.numel()} elements"
    if not isinstance(scaling, numbers.Real):
        return f"scaling is a {type(scaling).__name__}"
    return None if scaling - scaling == 0.0 else f"scaling is {scaling}"


def why_not_input(layer: LoraLinear, x: Tensor, operands: Operands) -> str:
    """Why PEFT's own forward has to run for this x, or "".

    Invalid shapes, dtypes and devices are reasons too, so that PEFT raises the usual PyTorch error.
    """
    weight, bias, A, B, _, _ = operands
    if type(x) not in PLAIN_TENSORS:
        return f"x is a {type(x).__name__}"
    if nn_module._has_any_global_hook():
        return "hooks on all modules"
    if needs_plain_operations():
        return "torch.func, forward-mode gradients or torch.jit.trace"
    if x.is_nested or x.layout is not torch.strided:
        return "x is nested or sparse"
    dtype, adapter_dtype = x.dtype, A.dtype
    if autocast_on(x):
        fits = (
            dtype in _CASTABLE
            and weight.dtype in _CASTABLE
            and (bias is None or bias.dtype == weight.dtype)
            and adapter_dtype == B.dtype
            and adapter_dtype in (torch.float32, dtype, torch.get_autocast_dtype(x.device.type))
        )
    else:
        fits = (
            dtype == weight.dtype
            and (bias is None or bias.dtype == dtype)
            and adapter_dtype == B.dtype
            and (
                (adapter_dtype == dtype and dtype in _FLOATS)
                or (adapter_dtype == torch.float32 and dtype in _HALF and layer.cast_input_dtype_enabled)
            )
        )
    if not fits:
        return _describe_dtypes(x=x, weight=weight, bias=bias, lora_B=A, lora_A=B)
    device = x.device
    if not (device == weight.device == A.device == B.device and (bias is None or bias.device == device)):
        return "tensors on different devices"
    out_features, rank = weight.shape[0], B.shape[0]
    if not (
        x.shape[-1:] == weight.shape[1:] == B.shape[1:]
        and A.shape == (out_features, rank)
        and rank
        and (bias is None or bias.shape == (out_features,))
    ):
        return _describe_shapes(x, weight=weight, bias=bias, lora_B=A, lora_A=B)
    return ""


def _describe_dtypes(**tensors: Tensor | None) -> str:
    dtypes = (f"{name} {dtype_name(t.dtype)}" for name, t in tensors.items() if t is not None)
    return f"dtypes {', '.join(dtypes)}"


def _describe_shapes(x: Tensor, **parameters: Tensor | None) -> str:
    # Only x's last size, as reasons are counted and batches may all differ.
    shapes = [f"x (..., {x.shape[-1]})" if x.dim() else "x ()"]
    shapes += [f"{name} {tuple(t.shape)}" for name, t in parameters.items() if t is not None]
    return f"shapes {', '.join(shapes)}"
