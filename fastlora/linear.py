"""``FusedLoRALinear``: an ``nn.Linear`` and its LoRA adapter, computed by one operator."""

from __future__ import annotations

import math
import warnings
from types import NoneType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastlora.checks import (
    ADAPTER_DTYPES,
    check_adapter_dtype,
    check_alpha,
    check_dropout,
    check_rank,
    unwritable,
)
from fastlora.dtensors import any_dtensor, is_wrapper
from fastlora.function import Operands, autocast_on, lora_linear

_OWN_ATTRIBUTES = (
    "alpha",
    "dropout",
    "adapter_enabled",
    "_alpha",
    "_dropout",
    "_merged_alpha",
    "_weight_shared_with",
)
# The child module that holds what disable_adapter has taken out of a module; see fastlora.disable.
PUT_ASIDE = "_put_aside"
_OWN_PARTS = ("weight", "bias", "A", "B", "parametrizations", PUT_ASIDE)
_HOOK_DICTS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def _keep_fast_path_off(module: nn.Module, inputs: tuple) -> None:
    """A no-op hook whose presence turns off the fast path of ``nn.TransformerEncoderLayer``.

    In eval mode the fast path reads ``linear1.weight`` directly instead of calling the layer, so an adapter
    would be silently ignored. PyTorch does not take it if any submodule has a hook.
    """


def _rebind_load_hooks(source: nn.Module, target: nn.Module) -> None:
    """Copy the ``load_state_dict`` pre-hooks; each holds its module, so each is wrapped again for target."""
    hooks: dict[int, Any] = source._load_state_dict_pre_hooks
    for key, hook in hooks.items():
        bound = target if getattr(hook, "with_module", False) else None
        target._load_state_dict_pre_hooks[key] = type(hook)(hook.hook, bound)


def _copy_attributes(source: nn.Module, target: nn.Module) -> None:
    """Copy attributes that others have set on a module, such as a library's own markers.

    Not the compiled call that ``source.compile()`` leaves there, which would go on calling ``source``.
    """
    for name, value in vars(source).items():
        if name not in vars(target) and name not in (*_OWN_ATTRIBUTES, "_compiled_call_impl"):
            vars(target)[name] = value


def _copy_extras(source: nn.Module, target: nn.Module) -> None:
    """Share what others have registered on a module, such as an observer's counters; nothing is copied."""
    for kind in ("_parameters", "_buffers", "_modules"):
        for name, value in vars(source)[kind].items():
            if name not in _OWN_PARTS:
                vars(target)[kind][name] = value
                if name in source._non_persistent_buffers_set:
                    target._non_persistent_buffers_set.add(name)


def why_unusable(linear: nn.Linear) -> str | None:
    """Why an ``nn.Linear`` cannot be adapted (the layer would ignore or misread part of it), else None."""
    if "forward" in vars(linear):
        return "its forward is replaced, which the adapted layer would ignore"
    extra = [*(linear._parameters.keys() - {"weight", "bias"}), *linear._buffers, *linear._modules]
    for name in ("weight", "bias"):
        if not isinstance(getattr(linear, name), (nn.Parameter, NoneType)):
            return f"its {name} is computed from {', '.join(sorted(extra)) or 'another tensor'}"
    own = (*_OWN_ATTRIBUTES, *_OWN_PARTS)
    taken = [name for name in extra if name in own or hasattr(FusedLoRALinear, name)]
    if taken:
        return f"it holds {', '.join(sorted(taken))}, a name that FusedLoRALinear reserves"
    if any_dtensor(linear.weight):
        return "its weight is a DTensor: adapt the model first, then shard it"
    if is_wrapper(linear.weight):
        return f"its weight is a {type(linear.weight).__name__}, quantized for example"
    if linear.weight.dtype not in ADAPTER_DTYPES:
        return f"its weight is {linear.weight.dtype}, expected a floating-point dtype of 16, 32 or 64 bits"
    return None


class FusedLoRALinear(nn.Linear):
    """y = x @ weight.T + alpha * (drop(x) @ B.T) @ A.T + bias with ``weight`` and ``bias`` frozen.

    Parameters: ``weight`` (out_features, in_features) and ``bias`` (out_features,) as in ``nn.Linear``; ``A``
    (out_features, rank), initialised to zero; ``B`` (rank, in_features), kaiming-uniform. ``alpha`` is the
    plain multiplier, PEFT's ``lora_alpha / r``; it and ``dropout`` can be changed at any time, to any value
    that the constructor accepts. ``rank`` is that of ``A`` and ``B``. Dropout acts in training mode only.

    Args:
        in_features: K. out_features: N. rank: R, at least 1.
        alpha: multiplier of the update.
        bias: whether the layer has a bias.
        dropout: probability in [0, 1] of dropping an element of the update's input.
        device: device of every parameter. dtype: dtype of weight and bias.
        adapter_dtype: dtype of A and B; None means weight's.

    Raises:
        ValueError: rank below 1, dropout outside [0, 1], non-finite alpha, a dtype that is not
            floating-point, or an adapter dtype that is not floating-point of 16, 32 or 64 bits.
        TypeError: a rank that is not an integer, an alpha or dropout that is not a number.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        alpha: float = 1.0,
        bias: bool = True,
        dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        check_rank(rank)
        check_alpha(alpha)
        check_dropout(dropout)
        check_adapter_dtype(adapter_dtype or dtype or torch.get_default_dtype())
        if isinstance(dtype, torch.dtype) and not dtype.is_floating_point:
            raise ValueError(f"weight must be floating-point, got {dtype}")
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self._add_adapter(rank, alpha, dropout, adapter_dtype)

    def _add_adapter(
        self, rank: int, alpha: float, dropout: float, adapter_dtype: torch.dtype | None
    ) -> None:
        """Freeze weight and bias and create the adapter on weight's device."""
        self.alpha = alpha
        self.dropout = dropout
        self.adapter_enabled = True
        self._merged_alpha: float | None = None
        # Other holders of this weight, as found by apply_lora; if there are any, merge() must not write it.
        self._weight_shared_with: tuple[str, ...] = ()
        self.weight.requires_grad_(False)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        options: dict[str, Any] = {"device": self.weight.device, "dtype": adapter_dtype or self.weight.dtype}
        self.A = nn.Parameter(torch.empty(self.out_features, int(rank), **options))
        self.B = nn.Parameter(torch.empty(int(rank), self.in_features, **options))
        self.reset_lora_parameters()
        self.register_forward_pre_hook(_keep_fast_path_off)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int,
        alpha: float = 1.0,
        dropout: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
    ) -> FusedLoRALinear:
        """Adapt an existing layer, sharing its weight and bias (no copy) and freezing them.

        The new layer takes over the training mode, hooks, extra attributes, buffers and the like. If
        ``linear.compile()`` was called, call it on the new layer again.

        Raises:
            TypeError: ``linear`` is not exactly an ``nn.Linear`` (a subclass may compute something else, or
                its parent may never call it, as with ``MultiheadAttention.out_proj``).
            ValueError: ``linear`` already has an adapter, a replaced ``forward``, or a weight that is
                computed from other tensors, not floating-point, quantized or sharded (adapt the layer first,
                then shard it); or the constructor rejects an argument.
        """
        if isinstance(linear, FusedLoRALinear):
            raise ValueError(f"from_linear: the layer already has an adapter: {linear}")
        if type(linear) is not nn.Linear:
            raise TypeError(f"from_linear: expected exactly torch.nn.Linear, got {type(linear).__qualname__}")
        why = why_unusable(linear)
        if why:
            raise ValueError(f"from_linear: cannot adapt {linear}: {why}")
        check_rank(rank)
        check_alpha(alpha)
        check_dropout(dropout)
        check_adapter_dtype(adapter_dtype or linear.weight.dtype)
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.in_features, layer.out_features = linear.in_features, linear.out_features
        layer.weight = linear.weight
        layer.register_parameter("bias", linear.bias)
        for name in _HOOK_DICTS:
            if getattr(linear, name, None):
                # Share the dictionary itself, so that handles can still remove their hooks.
                setattr(layer, name, getattr(linear, name))
        _rebind_load_hooks(linear, layer)
        layer._is_full_backward_hook = linear._is_full_backward_hook
        layer.training = linear.training
        _copy_attributes(linear, layer)
        layer._add_adapter(rank, alpha, dropout, adapter_dtype)
        _copy_extras(linear, layer)
        return layer

    def reset_parameters(self) -> None:
        """Initialise weight and bias as ``nn.Linear`` does, then call :meth:`reset_lora_parameters`."""
        adapted = "adapter_enabled" in vars(self)  # nn.Linear.__init__ calls this before the adapter exists.
        if adapted:
            self._check_resettable("reset_parameters")
        super().reset_parameters()
        if adapted:
            self.reset_lora_parameters()

    def reset_lora_parameters(self) -> None:
        """Set A to zero, so that training starts from the frozen layer, and B to kaiming_uniform(a=sqrt(5)).

        Raises:
            ValueError: the layer is merged, so unmerge() could no longer remove the update from weight;
                inside ``disable_adapter``; a parametrization or hook computes A or B.
        """
        self._check_resettable("reset_lora_parameters")
        nn.init.zeros_(self.A)
        nn.init.kaiming_uniform_(self.B, a=math.sqrt(5))

    def _check_resettable(self, method: str) -> None:
        """Raise ValueError if, with new values of A and B, unmerge() would restore a wrong weight."""
        if self.merged:
            raise ValueError(f"{method}: the layer is merged: call unmerge() first")
        self._check_enabled(method)
        computed = [name for name in ("A", "B") if name not in self._parameters]
        if computed:
            raise ValueError(
                f"{method}: a parametrization or hook computes {', '.join(computed)}, which would undo the "
                "reset: remove it first"
            )

    def _check_enabled(self, method: str) -> None:
        """Raise ValueError inside ``disable_adapter``, where a merged layer has its unmerged weight."""
        if not self.adapter_enabled:
            raise ValueError(f"{method}: the adapter is disabled; leave disable_adapter first")

    def forward(self, input: Tensor) -> Tensor:
        """input: (..., in_features) -> (..., out_features); see :func:`fastlora.lora_linear` for errors.

        The argument is named as in ``nn.Linear``, for callers that pass it by keyword.
        """
        if not self.adapter_enabled or self._merged_alpha is not None:
            return F.linear(input, self.weight, self.bias)
        # See fastlora.group. The type is checked because torch.fx's proxies have every attribute.
        call = getattr(input, "_fastlora_call", None) if isinstance(input, Tensor) else None
        if call is not None:
            y = call.output_of(self, input)
            if y is not None:
                return y
        dropout = self.dropout if self.training else 0.0
        return lora_linear(input, self.weight, self.A, self.B, self.alpha, self.bias, dropout)

    def _group_branch(self, x: Tensor | None) -> Operands | str:
        """The layer's operands as a branch of a group applied to x, or why it has to run alone.

        With x None, as far as can be told without it.
        """
        if self.merged or not self.adapter_enabled:
            return "merged" if self.merged else "adapter disabled"
        if (
            any(hook is not _keep_fast_path_off for hook in self._forward_pre_hooks.values())
            or self._forward_hooks
            or self._backward_hooks
            or self._backward_pre_hooks
            or "forward" in self.__dict__
        ):
            return "hooks or a replaced forward on a projection"
        tensors = (self.weight, self.bias, self.A, self.B)
        if self.weight.requires_grad:
            return "a base weight that is trained"
        if x is not None:
            # Checked with x only, as FSDP2 gathers the parameters just for the call.
            if any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors if tensor is not None):
                return "sharded or otherwise special parameters"
            if not self._fits(x):
                return "another shape, dtype or device"
        return Operands(*tensors, self.alpha, self.dropout if self.training else 0.0)

    def _fits(self, x: Tensor) -> bool:
        """Whether lora_linear would accept x; if not, each layer runs alone and raises its own error."""
        return (
            x.shape[-1] == self.in_features
            and x.device == self.weight.device == self.A.device == self.B.device
            and (x.dtype == self.weight.dtype or autocast_on(x))
            and self.A.dtype == self.B.dtype
        )

    @property
    def alpha(self) -> float:
        """The multiplier of the update; must be a finite number."""
        return self._alpha

    @alpha.setter
    def alpha(self, alpha: float) -> None:
        check_alpha(alpha)
        self._alpha = float(alpha)

    @property
    def dropout(self) -> float:
        """The probability of dropping an element of the update's input; must be in [0, 1]."""
        return self._dropout

    @dropout.setter
    def dropout(self, dropout: float) -> None:
        check_dropout(dropout)
        self._dropout = float(dropout)

    @property
    def rank(self) -> int:
        """R, the number of rows of B."""
        return self.B.shape[0]

    @property
    def merged(self) -> bool:
        """Whether weight contains the update."""
        return self._merged_alpha is not None

    def _updated_weight(self, alpha: float) -> Tensor:
        """weight + alpha * A @ B: (out_features, in_features), in weight's dtype, summed in at least fp32."""
        dtype = torch.promote_types(torch.promote_types(self.weight.dtype, self.A.dtype), torch.float32)
        with torch.autocast(self.weight.device.type, enabled=False):  # it would round the operands
            updated = torch.addmm(self.weight.to(dtype), self.A.to(dtype), self.B.to(dtype), alpha=alpha)
        return updated.to(self.weight.dtype)

    def _merged_weight(self, name: str) -> Tensor:
        """The weight with the update; a ValueError prefixed with ``name`` if unknown or not finite."""
        self._check_values(name)
        merged = self._updated_weight(self.alpha)
        if not torch.isfinite(merged).all() and torch.isfinite(self.weight).all():
            raise ValueError(
                f"{name}: weight + alpha * A @ B is not finite (alpha {self.alpha}, rank {self.rank})"
            )
        return merged

    def _check_values(self, name: str) -> None:
        """Raise a ValueError prefixed with ``name`` if weight, A or B is without values or out of date."""
        unknown = [each for each in ("weight", "A", "B") if getattr(self, each).is_meta]
        if unknown:
            raise ValueError(
                f"{name}: {', '.join(unknown)} on the meta device, offloaded (by accelerate, say) or not "
                "loaded yet; load the values first"
            )
        stale = self._stale_adapters()
        if stale:
            raise ValueError(
                f"{name}: {', '.join(stale)} not a parameter, but what a hook (of pruning, say) or FSDP1 "
                "computes for a forward pass, and may be out of date: remove this first"
            )

    def _stale_adapters(self) -> list[str]:
        """Which of A and B are neither parameters nor parametrized, but what a hook has left there."""
        computed: Any = self._modules.get("parametrizations") or ()
        return [name for name in ("A", "B") if name not in self._parameters and name not in computed]

    def _check_plain_weight(self, name: str) -> None:
        """Raise a ValueError prefixed with ``name`` if the weight cannot hold the update."""
        if "weight" not in self._parameters:
            raise ValueError(
                f"{name}: the weight {tuple(self.weight.shape)} is computed by a parametrization such as "
                "weight_norm; remove that first"
            )
        if is_wrapper(self.weight) and not any_dtensor(self.weight):
            raise ValueError(
                f"{name}: the weight {tuple(self.weight.shape)} is a {type(self.weight).__name__}, quantized "
                "for example, which cannot hold the update"
            )
        if unwritable(self.weight):
            raise ValueError(
                f"{name}: the weight {tuple(self.weight.shape)} cannot be written in place: it was made in "
                "inference mode, or its rows share memory"
            )

    def _check_forward(self, name: str) -> None:
        """Raise a ValueError prefixed with ``name`` if forward is replaced on this layer."""
        if "forward" in vars(self):
            raise ValueError(
                f"{name}: its forward is replaced, which an nn.Linear would take over and which would go on "
                "running the adapted layer: undo that first (accelerate: remove_hook_from_submodules)"
            )

    @torch.no_grad()
    def merge(self) -> None:
        """Add the update to weight in place; forward is then one plain linear. No effect if already merged.

        The sum is rounded to weight's dtype, so in half precision :meth:`unmerge` restores the weight only up
        to that rounding.

        Raises:
            ValueError: another module shares the weight (tied embeddings), as found by ``apply_lora`` or
                ``load_adapter`` (``from_linear`` sees no model); a parametrization computes it; it was
                quantized after the layer was made; the sum is not finite; inside ``disable_adapter``; values
                on the meta device, as in an offloaded model; a hook computes A or B (pruning); a weight made
                in inference mode, or whose rows share memory. The weight is left unchanged.
        """
        if self.merged:
            return
        self._check_enabled("merge")
        if self._weight_shared_with:
            raise ValueError(
                f"merge: the weight {tuple(self.weight.shape)} is shared with "
                f"{', '.join(self._weight_shared_with)}, which merging would change too"
            )
        self._check_plain_weight("merge")
        self.weight.copy_(self._merged_weight("merge"))
        self._merged_alpha = self.alpha

    @torch.no_grad()
    def unmerge(self) -> None:
        """Subtract the update from weight, in place. No effect if not merged.

        The update is recomputed from the current A and B: do not change them while they are merged.

        Raises:
            ValueError: a parametrization computes the weight; values on the meta device; a hook computes A or
                B; a weight that cannot be written in place.
        """
        if self._merged_alpha is None:
            return
        self._check_plain_weight("unmerge")
        self._check_values("unmerge")
        self.weight.copy_(self._updated_weight(-self._merged_alpha))
        self._merged_alpha = None

    @torch.no_grad()
    def to_linear(self) -> nn.Linear:
        """Return a plain ``nn.Linear`` that computes the same; this layer is left unchanged.

        The weight is new (shared if this layer is merged) and the bias shared; training mode, hooks, extra
        attributes, buffers and the like are this layer's.

        Raises:
            ValueError: the weight with the update is not finite; values on the meta device; a hook computes A
                or B (pruning); the layer's forward is replaced (accelerate's hooks); inside
                ``disable_adapter``.
        """
        self._check_enabled("to_linear")
        weight = (
            self.weight
            if self.merged
            else nn.Parameter(self._merged_weight("to_linear"), requires_grad=False)
        )
        self._check_forward("to_linear")
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight, linear.bias = weight, self.bias
        for name in _HOOK_DICTS:
            hooks = getattr(self, name)
            own = [key for key, hook in hooks.items() if hook is _keep_fast_path_off]
            for key in own:
                hooks = hooks.copy()
                del hooks[key]
            if hooks:
                setattr(linear, name, hooks)
        _rebind_load_hooks(self, linear)
        linear._is_full_backward_hook = self._is_full_backward_hook
        linear.training = self.training
        _copy_attributes(self, linear)
        _copy_extras(self, linear)
        return linear

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if self.merged:
            warnings.warn(
                f"state_dict of the merged layer {prefix.removesuffix('.') or type(self).__name__}: its "
                "weight contains the update, which a fresh FusedLoRALinear would add again; unmerge() first, "
                "or save to_linear()",
                stacklevel=3,
            )
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        if self.merged or PUT_ASIDE in self._modules:  # put aside: merged, inside disable_adapter
            errors.append(f"{prefix.removesuffix('.')} is merged: unmerge() before loading a state_dict")
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)

    def extra_repr(self) -> str:
        merged = ", merged=True" if self.merged else ""
        adapter = f"rank={self.rank}, alpha={self.alpha:g}, dropout={self.dropout:g}"
        return f"{super().extra_repr()}, {adapter}{merged}"
