"""Models wrapped by PEFT: their LoRA linear layers run the fused operator and remain PEFT layers.

A layer is fused by changing its class to a subclass of PEFT's own, so that everything else PEFT does with it,
from saving to merging, is still PEFT's code on PEFT's attributes. Importing this module does not import PEFT.
"""

from __future__ import annotations

import importlib
import sys
from collections import Counter
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING

from torch import nn

from fastlora import overview, targets
from fastlora.checks import check_model

if TYPE_CHECKING:
    from peft import LoraConfig
    from peft.tuners.lora.layer import LoraLayer

    from fastlora.peft_layer import FusedLinear


def fuse_peft(model: nn.Module) -> nn.Module:
    """Give every plain LoRA linear layer of a PEFT model the fused forward, in place.

    A layer is plain if its class is exactly ``peft.tuners.lora.layer.Linear``. Parameters, names, adapters
    and everything PEFT does with them are unchanged; the layer's new class, a subclass of PEFT's, pickles and
    copies with the model. The layer decides at every call, and runs PEFT's own forward where the fused form
    would not compute the same: extra arguments (``adapter_names``), disabled or merged adapters, not exactly
    one active adapter, a variant such as DoRA, ``lora_bias``, ``fan_in_fan_out``, a base layer or adapter
    that is not exactly ``nn.Linear``, hooks or a replaced forward on them, sharded tensors, a trained base
    weight. :func:`fastlora.summary` ends with how many layers are fused and why others are not. Layers that
    PEFT creates later are not fused: call this again.

    In training, the dropout mask differs from PEFT's but has the same distribution; its seed comes from
    torch's generator. Float32 adapters on a half-precision base, PEFT's default, are rounded to the base's
    dtype as they are read.

    Args:
        model: a ``PeftModel`` or any module that contains PEFT layers; layers already fused are left as is.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: ``model`` has no plain PEFT LoRA linear layer. It is left unchanged.
        ImportError: PEFT is not installed.
    """
    check_model(model, "fuse_peft")
    layer_module, fused_class = _peft_layers(), _fused_class()
    linears = [m for m in model.modules() if type(m) in (layer_module.Linear, fused_class)]
    if not linears:
        raise ValueError(f"fuse_peft: the model has no PEFT LoRA linear layer: {_what_it_has(model)}")
    for layer in linears:
        layer.__class__ = fused_class
    return model


def unfuse_peft(model: nn.Module) -> nn.Module:
    """Undo :func:`fuse_peft`, giving every layer PEFT's own class again; no effect if none is fused.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module.
    """
    check_model(model, "unfuse_peft")
    module = sys.modules.get("fastlora.peft_layer")  # imported if a fused layer exists
    if module is not None:
        for layer in list(model.modules()):
            if type(layer) is module.FusedLinear:
                layer.__class__ = module.LoraLinear
                vars(layer).pop("_fastlora_last", None)
    return model


def register_fused_layers(config: LoraConfig) -> LoraConfig:
    """Let PEFT itself create fused layers, for a model that it has not wrapped yet.

    ``get_peft_model(model, register_fused_layers(LoraConfig(...)))`` is equivalent to calling ``fuse_peft``
    on the wrapped model, and layers that this configuration creates later are fused too. It relies on PEFT's
    ``LoraConfig._register_custom_module``, which is private, experimental and not saved with the
    configuration: prefer :func:`fuse_peft`, which a loaded model needs anyway.

    Returns:
        ``config``, changed in place.

    Raises:
        TypeError: ``config`` is not a ``peft.LoraConfig``.
        ImportError: PEFT is not installed.
    """
    _peft_layers()
    from peft import LoraConfig

    if not isinstance(config, LoraConfig):
        raise TypeError(f"register_fused_layers: expected a peft.LoraConfig, got {type(config).__name__}")
    # PEFT expects a class here, but only calls it.
    config._register_custom_module({nn.Linear: _create_layer})  # type: ignore[dict-item]
    return config


def _create_layer(
    target: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: object
) -> FusedLinear | None:
    """Called by PEFT for each nn.Linear, subclasses included; None leaves the choice of layer to PEFT.

    PEFT calls this before it checks for quantised layers, which it recognises by the layer's or weight's
    class.
    """
    layers = _peft_layers()
    base = target.get_base_layer() if isinstance(target, layers.BaseTunerLayer) else target
    if type(base) is not nn.Linear or type(base.weight) is not nn.Parameter:
        return None
    layer = layers.dispatch_default(target, adapter_name, config=config, **kwargs)
    if type(layer) is layers.Linear:
        layer.__class__ = _fused_class()
    return layer


def _peft_layers() -> ModuleType:
    try:
        return importlib.import_module("peft.tuners.lora.layer")
    except ModuleNotFoundError as error:
        if error.name != "peft":
            raise
        raise ImportError("PEFT is not installed: pip install 'fastlora-triton[peft]'") from error


def _fused_class() -> type[FusedLinear]:
    return importlib.import_module("fastlora.peft_layer").FusedLinear


def _peft_lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLayer]]:
    """(name, layer) of every PEFT LoRA layer of any kind; none if PEFT has not been imported."""
    module = sys.modules.get("peft.tuners.lora.layer")
    if module is not None:
        for name, layer in model.named_modules():
            if isinstance(layer, module.LoraLayer):
                yield name, layer


def _kind(layer: LoraLayer) -> str:
    """PEFT's name for a layer's type, such as lora.Linear."""
    return repr(layer).partition("(")[0]


def _what_it_has(model: nn.Module) -> str:
    kinds = Counter(_kind(layer) for _, layer in _peft_lora_layers(model))
    if kinds:
        return "its LoRA layers are " + ", ".join(f"{kind} ({count})" for kind, count in kinds.items())
    if targets.adapted_layers(model):
        return "its adapted layers are fastlora's own, which are fused already"
    configs = getattr(model, "peft_config", None)
    if isinstance(configs, dict):
        others = sorted({getattr(config.peft_type, "value", config.peft_type) for config in configs.values()})
        return f"its PEFT adapters are of type {', '.join(others)}, not LORA"
    return f"wrap it with peft.get_peft_model first; {targets.available_layers(model)}"


def _why_not(layer: LoraLayer) -> str:
    """Why a layer runs PEFT's own forward, by its state now or else its last call; "" if it is fused."""
    module = sys.modules.get("fastlora.peft_layer")
    if module is None or not isinstance(layer, module.FusedLinear):
        if type(layer) is _peft_layers().Linear:
            return "not fused by fuse_peft"
        return f"{_kind(layer)} is not PEFT's plain linear layer"
    if layer._fastlora_last is None and "forward" in vars(layer):
        return "the layer's own forward is replaced"
    # FSDP2 gathers the parameters for a call alone, so only it can tell.
    found = module.find_operands(layer, sharded=layer._fastlora_last is not None)
    return found if isinstance(found, str) else layer._fastlora_last or ""


def _describe(model: nn.Module) -> overview.SummaryPart | None:
    """The rows for PEFT's LoRA layers and a closing line: how many are fused and why others are not."""
    rows, reasons, fused = [], [], 0
    fallbacks: Counter[str] = Counter()
    for name, layer in _peft_lora_layers(model):
        why = _why_not(layer)
        ranks = [layer.r[a] for a in layer.active_adapters if a in layer.r]
        if why:
            path, reason = "PEFT", ""
            fallbacks[why] += 1
        else:
            operands = sys.modules["fastlora.peft_layer"].find_operands(layer, sharded=True)
            path, reason = overview.planned_path(operands.weight, operands.A, operands.dropout)
            fused += 1
        shape = f"{layer.out_features} x {layer.in_features}"
        rows.append((name, shape, ", ".join(map(str, ranks)) or "-", path))
        if reason:
            reasons.append(f"{path}: {reason}")
    if not rows:
        return None
    closing = f"fused {fused}, fell back {fallbacks.total()}"
    if fallbacks:
        closing += ": " + "; ".join(f"{why} ({count})" for why, count in fallbacks.items())
    return overview.SummaryPart(rows, reasons, closing)


overview.summary_parts.append(_describe)
