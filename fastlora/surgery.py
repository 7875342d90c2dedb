"""Whole models: replacing layers by adapted ones, merging them, and their state.

A prepared model keeps its own class and module names: every targeted ``nn.Linear`` is replaced in its parents
by a :class:`FusedLoRALinear`, and every other parameter except those of ``modules_to_save`` is frozen. A
module to save is trained in place; its original values are kept on it as non-persistent buffers, which move
and copy with the model but are in no state_dict, so that :mod:`fastlora.disable` can restore the frozen
model.
"""

from __future__ import annotations

import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from fastlora.checks import (
    check_adapter_dtype,
    check_alpha,
    check_dropout,
    check_model,
    check_rank,
    unwritable,
)
from fastlora.dtensors import sharded_like
from fastlora.group import ungroup_projections
from fastlora.linear import FusedLoRALinear, _keep_fast_path_off
from fastlora.targets import (
    HIDDEN_NAMES,
    adapted_layers,
    checked_names,
    embeddings_of,
    find_saved,
    find_targets,
    join_names,
    listing,
    saved_modules,
    shorten,
)

ORIGINAL = "_original_"
DATA_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_ALPHA = "alpha"


@dataclass(frozen=True)
class LayerSpec:
    """The adapter of one layer; an ``adapter_dtype`` of None means the weight's dtype."""

    rank: int
    alpha: float
    dropout: float
    adapter_dtype: torch.dtype | None = None


def apply_lora(
    model: nn.Module,
    target_modules: str | Iterable[str],
    rank: int = 8,
    alpha: float = 1.0,
    dropout: float = 0.0,
    *,
    adapter_dtype: torch.dtype | None = None,
    modules_to_save: str | Iterable[str] | None = (),
) -> nn.Module:
    """Add LoRA adapters to the targeted ``nn.Linear`` layers of a model, in place, and freeze the rest.

    The layers become :class:`FusedLoRALinear` under their old names, sharing their weights. A layer that is
    reachable under several names is adapted once. A second call adapts further layers and leaves the adapters
    and saved modules of the first alone; every other parameter is frozen again.

    Args:
        model: any module; changed in place.
        target_modules: matched as in PEFT. Several names: each selects the modules with exactly that name or
            a name that ends in ``.name``. A string: a regular expression that must match the whole name.
            ``"all-linear"``: every module that is exactly an ``nn.Linear`` (no subclasses), none of them
            adapted already, except the output head, which is what the model's ``get_output_embeddings()``
            returns or else the first of its direct children lm_head, score, classifier, qa_outputs and head.
            Modules inside ``modules_to_save`` are excluded, as are layers whose weight a transformers model
            is known to read without calling them.
        rank: R of every adapter. alpha: the multiplier of the update (PEFT's ``lora_alpha / r``).
        dropout: probability in [0, 1] of dropping an element of the update's input in training.
        adapter_dtype: dtype of A and B; None means that of the layer's weight.
        modules_to_save: names, matched like several ``target_modules`` (a string is one name), of modules to
            train as a whole, such as a new head, or None; :func:`adapter_state_dict` and
            :func:`fastlora.save_adapter` include them. A module gets its own copy of any weight it shares
            with another (tied embeddings). ``disable_adapter`` restores the values the modules have now, so
            load the base model's values first: ``state_dict()`` does not contain them, and loading one does
            not change them. If this unties the embeddings of a transformers model,
            ``config.tie_word_embeddings`` becomes False, with a warning: ``tie_weights()`` would discard what
            one of them learns (but see :func:`merge_lora`).

    Returns:
        ``model``.

    Raises:
        ValueError: nothing matched, or one of the names matched nothing; a target that is not exactly an
            ``nn.Linear``, already has an adapter or is a module to save; the model itself is the layer; a
            rank below 1, a dropout outside [0, 1]; a DistributedDataParallel, which would not see the new
            parameters; trainable PEFT adapters, which would be frozen. The model is left unchanged.
        TypeError: ``model`` is not a module, a name not a string, or a rank, alpha or dropout not a number.
    """
    check_model(model, "apply_lora")
    check_rank(rank)
    check_alpha(alpha)
    check_dropout(dropout)
    if adapter_dtype is not None:
        check_adapter_dtype(adapter_dtype)
    check_enabled(model, "apply_lora")
    check_not_parallel(model, "apply_lora")
    names = () if modules_to_save is None else checked_names(modules_to_save, "modules_to_save")
    saved = find_saved(model, names)
    targets = find_targets(model, target_modules, saved)
    spec = LayerSpec(rank, alpha, dropout, adapter_dtype)
    warning = prepare(model, dict.fromkeys(targets, spec), saved, "apply_lora")
    if warning:
        warnings.warn(warning, stacklevel=2)
    return model


def check_enabled(model: nn.Module, function: str) -> None:
    """Raise ValueError inside ``disable_adapter``, where the model does not hold its own values."""
    disabled = [path for path, layer in adapted_layers(model).items() if not layer.adapter_enabled]
    disabled += [path for path, m in saved_modules(model).items() if uses_original(m)]
    if disabled:
        raise ValueError(
            f"{function}: adapters are disabled in {listing(disabled)}; leave disable_adapter first"
        )


def check_not_parallel(model: nn.Module, function: str) -> None:
    """Raise ValueError for DistributedDataParallel, which would not average new parameters' gradients."""
    for path, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(
                f"{function}: {path or 'the model'} is a DistributedDataParallel, which knows only the "
                "parameters that it was made with: adapt the model first, then wrap it"
            )


def check_own(layers: Mapping[str, FusedLoRALinear], function: str) -> None:
    """Raise ValueError if a parametrization computes A or B, as values copied into them would be lost."""
    computed = [path for path, layer in layers.items() if not {"A", "B"} <= layer._parameters.keys()]
    if computed:
        raise ValueError(
            f"{function}: a parametrization such as weight_norm computes the adapters of "
            f"{listing(computed)}; remove it first"
        )


def check_unmerged(layers: Mapping[str, FusedLoRALinear], function: str) -> None:
    """Raise ValueError if a layer is merged."""
    merged = [path for path, layer in layers.items() if layer.merged]
    if merged:
        raise ValueError(f"{function}: {listing(merged)} merged: call unmerge() first")


def prepare(
    model: nn.Module, specs: Mapping[str, LayerSpec], saved: Iterable[str], function: str
) -> str | None:
    """Replace layers, freeze the rest and mark the modules to save; all names have been checked.

    Everything that can fail, above all allocation, happens before the first lasting change. Error messages
    start with ``function``.

    Returns:
        What to warn of when all is done (a warning may be an error).

    Raises:
        ValueError: a parameter of a lazy module, which cannot be frozen before it has a shape; trainable PEFT
            adapters.
    """
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise ValueError(
            f"{function}: {listing(lazy)} of lazy modules have no shape yet: run the model once first"
        )
    of_peft = [path for path, m in model.named_modules() if _is_trained_by_peft(m)]
    if of_peft:
        raise ValueError(
            f"{function}: the PEFT adapters of {listing(of_peft)} are trainable and would be frozen. Use "
            "either PEFT or fastlora, or freeze the PEFT adapters first"
        )
    modules = dict(model.named_modules())
    roots = [modules[path] for path in saved if "_saved_with_adapter" not in vars(modules[path])]
    was_trainable = {p: p.requires_grad for p in model.parameters()}
    replacements: dict[nn.Module, FusedLoRALinear] = {}
    try:
        for path, spec in specs.items():
            replacements[modules[path]] = FusedLoRALinear.from_linear(
                modules[path], spec.rank, spec.alpha, spec.dropout, spec.adapter_dtype
            )
        split = {root: _split_saved(model, root) for root in roots}
    except BaseException:
        for parameter, trainable in was_trainable.items():
            with torch.inference_mode(parameter.is_inference()):  # else those made in it cannot be set
                parameter.requires_grad_(trainable)
        for path in specs:
            _remove_own_hook(modules[path])
        raise
    _swap(model, replacements)
    for root in roots:
        for change in split[root].changes:
            change()
        root._saved_with_adapter = True
    _freeze(model, roots)
    for encoder in adapted_encoders(model):
        # With a padding mask in eval mode it would pass nested tensors to a layer whose fast path is off.
        if not hasattr(encoder, "_used_nested_tensor"):
            encoder._used_nested_tensor = encoder.use_nested_tensor
            encoder.use_nested_tensor = False
    shared = _shared_weights(model)
    for layer in replacements.values():
        layer._weight_shared_with = shared.get(layer, ())
    untied = [path for path, m in saved_modules(model).items() if m in split and split[m].unties]
    if not untied:
        return None
    # Frameworks call tie_weights() too, accelerate when it prepares a model for FSDP2 for example.
    if _untie_config(model) == "untied":
        note = "config.tie_word_embeddings is False now, so that tie_weights() does not undo that"
    else:
        note = "tie_weights() would undo that"
    names = listing(untied)
    return f"{names} shared a weight with another module and now has its own copy, to be trained; {note}"


def _is_trained_by_peft(module: Any) -> bool:
    """Whether PEFT trains part of this module: an adapter, a modules_to_save copy or a prompt."""
    if not type(module).__module__.startswith(("peft.", "fastlora.")):
        return False
    parts = ("prompt_encoder", *getattr(module, "adapter_layer_names", ()))
    held = (module._modules.get(part) for part in parts)
    return any(p.requires_grad for part in held if part is not None for p in part.parameters())


def _remove_own_hook(module: nn.Module) -> None:
    """Remove our hook from a module's pre-hooks in place: the user's handles refer to that dictionary."""
    hooks = module._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _keep_fast_path_off]:
        del hooks[key]


def _swap(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put each replacement wherever the module it replaces is registered."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                setattr(parent, name, replacements[child])


def _freeze(model: nn.Module, new_roots: Iterable[nn.Module]) -> None:
    """Freeze all but adapters and saved modules, whose requires_grad is kept; new roots become trainable."""
    keep = adapter_parameters(model)
    for parameter in model.parameters():
        if parameter not in keep:
            parameter.requires_grad_(False)
    for root in new_roots:
        for parameter in root.parameters():
            parameter.requires_grad_(parameter.is_floating_point() or parameter.is_complex())


def adapter_parameters(model: nn.Module) -> set[Tensor]:
    """A and B of each layer, the parameters that a parametrization computes them from, and saved modules'."""
    found: set[Tensor] = {p for layer in adapted_layers(model).values() for p in (layer.A, layer.B)}
    for layer in adapted_layers(model).values():
        computed: Any = layer.parametrizations if is_parametrized(layer) else {}
        for name in computed.keys() & {"A", "B"}:
            found.update(computed[name].parameters())
        # From which the hooks of torch.nn.utils.prune and weight_norm compute them: A_orig, A_g and the like.
        parts = tuple(f"{name}_" for name in layer._stale_adapters())
        own = layer._parameters.items()
        found.update(p for name, p in own if parts and name.startswith(parts) and p is not None)
    found.update(p for root in saved_modules(model).values() for p in root.parameters())
    return found


def adapted_encoders(model: nn.Module) -> list[Any]:
    """The ``nn.TransformerEncoder`` modules with an adapted layer inside."""
    return [m for m in model.modules() if isinstance(m, nn.TransformerEncoder) and adapted_layers(m)]


@dataclass(frozen=True)
class _Split:
    """The changes that give a module to save its own tensors; whether another module shared one of them."""

    changes: Sequence[Callable[[], None]]
    unties: bool


def _split_saved(model: nn.Module, root: nn.Module) -> _Split:
    """How to give a module to save its own trainable tensors and keep the original values.

    PEFT trains a copy of the whole module. Here the tensors stay, and with them optimizers and names, except
    for a parameter that shares memory with another module, which training it would change, and for tensors
    that cannot be written in place.
    """
    inside = dict.fromkeys(root.modules())
    outside = [_memory(tensor) for m in model.modules() if m not in inside for _, tensor in _own_tensors(m)]
    copies: dict[Tensor, Tensor] = {}
    changes, unties = [], False
    for module in inside:
        for name, tensor in saved_tensors(module):
            original = tensor.detach()
            shared = isinstance(tensor, nn.Parameter) and _overlaps(_memory(tensor), outside)
            unties |= shared
            if not shared and not unwritable(tensor):
                original = original.clone()
            elif tensor not in copies:
                copy = original.clone()
                is_parameter = isinstance(tensor, nn.Parameter)
                copies[tensor] = nn.Parameter(copy, tensor.requires_grad) if is_parameter else copy
            changes.append(partial(_keep_original, module, name, original, copies.get(tensor)))
    return _Split(changes, unties)


def saved_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and persistent buffers: what its state_dict holds, without its children."""
    for name, tensor in module._parameters.items():
        if tensor is not None:
            yield name, tensor
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield name, buffer


def _keep_original(module: nn.Module, name: str, original: Tensor, own: Tensor | None) -> None:
    if own is not None:
        setattr(module, name, own)
    # A meta tensor has no values to restore; disable_adapter reports that.
    if original.device.type != "meta":
        module.register_buffer(ORIGINAL + name, original, persistent=False)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and buffers, including the original values of saved modules."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield name, tensor


def _shared_weights(model: nn.Module) -> dict[FusedLoRALinear, tuple[str, ...]]:
    """The adapted layers whose weight overlaps other modules' tensors in memory, with the tensors' names."""
    holders: dict[object, list[tuple[_Memory, nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for name, tensor in _own_tensors(module):
            memory = _memory(tensor)
            name = join_names(path, name.removeprefix(ORIGINAL))
            holders.setdefault(memory.where, []).append((memory, module, name))
    shared = {}
    for layer in adapted_layers(model).values():
        own = _memory(layer.weight)
        names = [
            name
            for memory, module, name in holders[own.where]
            if module is not layer and _overlaps(own, [memory])
        ]
        if names:
            shared[layer] = tuple(names)
    return shared


@dataclass(frozen=True)
class _Memory:
    """A tensor's memory: its device or, without an address, its id; its first byte and last byte + 1."""

    where: object
    start: int
    stop: int


def _memory(tensor: Tensor) -> _Memory:
    """A tensor's memory; one without an address (meta, sparse, nested, DTensor) overlaps no other tensor."""
    strided = tensor.layout is torch.strided and not tensor.is_nested
    address = tensor.data_ptr() if strided else 0
    if address == 0:
        return _Memory(id(tensor), 0, 1)
    extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return _Memory(tensor.device, address, address + extent * tensor.element_size())


def _overlaps(memory: _Memory, others: Iterable[_Memory]) -> bool:
    return any(
        other.where == memory.where and memory.start < other.stop and other.start < memory.stop
        for other in others
    )


def merge_lora(model: nn.Module) -> nn.Module:
    """Turn every adapted layer into a plain ``nn.Linear`` that computes the same, in place.

    The update is added to the weights in place, without copying them; hooks, training modes and names stay,
    and saved modules keep what they learned. Nothing of fastlora remains in the model. A warning says where
    modules_to_save untied the embeddings of an encoder-decoder whose ``config.tie_word_embeddings`` stays
    True, as its forward pass may read it.

    Args:
        model: with at least one adapted layer.

    Returns:
        ``model``.

    Raises:
        ValueError: no adapted layer, or the model itself is one (use its ``to_linear``); a weight that is
            shared with another module (tied embeddings), computed by a parametrization or quantized; an
            update that is not finite; a subclass of the layer with its own forward, or a layer whose forward
            is replaced (accelerate's hooks); a model sharded by FSDP2; inside ``disable_adapter``. The model
            is left unchanged.
        TypeError: ``model`` is not a module.
    """
    layers = require_layers(model, "merge_lora")
    if isinstance(model, FusedLoRALinear):
        raise ValueError("merge_lora: the model itself is the adapted layer; use its to_linear()")
    check_enabled(model, "merge_lora")
    if fully_sharded(model):
        raise ValueError(
            "merge_lora: the model is sharded by fully_shard, so its layers cannot be replaced; use "
            "save_adapter, then load_adapter and merge_lora on an unsharded model"
        )
    shared = _shared_weights(model)
    for path, layer in layers.items():
        if type(layer).forward is not FusedLoRALinear.forward:
            raise ValueError(
                f"merge_lora: {path} is a {type(layer).__qualname__}, whose forward an nn.Linear would not "
                "have; replace it yourself"
            )
        if not layer.merged:
            others = dict.fromkeys((*shared.get(layer, ()), *layer._weight_shared_with))
            if others:
                raise ValueError(
                    f"merge_lora: the weight of {path} is shared with {', '.join(others)}, which merging "
                    "would change too"
                )
            layer._check_plain_weight(f"merge_lora: {path}")
            with torch.no_grad():
                layer._merged_weight(f"merge_lora: {path}")
        layer._check_forward(f"merge_lora: {path}")
    encoders = adapted_encoders(model)
    replacements: dict[nn.Module, nn.Module] = {}
    for layer in layers.values():
        layer.merge()
        # Before to_linear, which then shares the hook dictionaries, so that the user's handles keep working.
        _remove_own_hook(layer)
        replacements[layer] = layer.to_linear()
    _swap(model, replacements)
    for encoder in encoders:
        if hasattr(encoder, "_used_nested_tensor"):
            encoder.use_nested_tensor = encoder._used_nested_tensor
            del encoder._used_nested_tensor
    warning = _keep_untied(model)
    for root in saved_modules(model).values():
        del root._saved_with_adapter
        for module in root.modules():
            for name in [name for name in module._buffers if name.startswith(ORIGINAL)]:
                delattr(module, name)
    ungroup_projections(model)
    if warning:  # last, as it may be an error
        warnings.warn(warning, stacklevel=2)
    return model


def _keep_untied(model: nn.Module) -> str | None:
    """Tell transformers that modules_to_save untied the embeddings of a merged model; what to warn of."""
    untied = (
        "merge_lora: the input embedding and the head no longer share a weight, because modules_to_save "
        "untied them"
    )
    state = _untie_config(model)
    if state == "untied":
        return f"{untied}, so config.tie_word_embeddings is False now"
    if state == "kept":
        return (
            f"{untied}. config.tie_word_embeddings stays True, as an encoder-decoder may depend on it; "
            "check that a saved model loads as it was (transformers before 5 would tie the two again)"
        )
    return None


def _untie_config(model: nn.Module) -> Literal["untied", "kept"] | None:
    """Set ``config.tie_word_embeddings`` to False where a module to save has untied the embeddings.

    An encoder-decoder keeps it: some of these models read the flag in forward, and all tie more than these
    two by it. None if the flag says nothing false.
    """
    config: Any = getattr(model, "config", None)
    saved = set(saved_modules(model).values())
    ends = [embeddings_of(model, kind) for kind in ("input", "output")]
    if not getattr(config, "tie_word_embeddings", False) or not saved.intersection(ends):
        return None
    weights = [getattr(end, "weight", None) for end in ends]
    if None in ends or weights[0] is weights[1]:
        return None
    if getattr(config, "is_encoder_decoder", False):
        return "kept"
    config.tie_word_embeddings = False
    return "untied"


def fully_sharded(model: nn.Module) -> dict[str, Any]:
    """The modules sharded by FSDP2, by name; looks FSDP2 up, as importing it is slow."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return {}
    return {path: m for path, m in model.named_modules() if isinstance(m, fsdp.FSDPModule)}


def require_layers(model: nn.Module, function: str) -> dict[str, FusedLoRALinear]:
    check_model(model, function)
    layers = adapted_layers(model)
    if not layers:
        of_peft = any(type(m).__module__.startswith("peft.") for m in model.modules())
        hint = "for a PEFT model, use PEFT's own methods" if of_peft else "call apply_lora first"
        raise ValueError(f"{function}: the model has no adapted layer; {hint}")
    return layers


def uses_original(root: nn.Module) -> bool:
    return root._saved_with_adapter == "original"


def _public(path: str) -> str:
    """The ``state_dict`` name of the module or tensor that ``named_modules`` calls ``path``."""
    return ".".join(part for part in path.split(".") if part not in HIDDEN_NAMES)


def check_current(layers: Mapping[str, FusedLoRALinear], function: str) -> None:
    """Raise ValueError for adapters that a hook computes in each forward pass: values may be out of date."""
    stale = [path for path, layer in layers.items() if layer._stale_adapters()]
    if stale:
        raise ValueError(
            f"{function}: the adapters of {listing(stale)} are not parameters, but what hooks (of pruning, "
            "say) or FSDP1 compute for a forward pass, and may be out of date: remove these first"
        )


def check_values(tensors: Mapping[str, Tensor], function: str) -> None:
    """Raise ValueError naming the tensors that have no values to save or no memory to load into."""
    meta = [name for name, tensor in tensors.items() if tensor.is_meta]
    if meta:
        raise ValueError(f"{function}: {listing(meta)} on the meta device; give the model its values first")


def check_writable(tensors: Mapping[str, Tensor], function: str) -> None:
    """Raise ValueError naming the tensors that cannot be copied into."""
    check_values(tensors, function)
    fixed = [name for name, tensor in tensors.items() if unwritable(tensor)]
    if fixed:
        raise ValueError(
            f"{function}: {listing(fixed)} cannot be written in place: made in inference mode, or expanded"
        )


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's own tensors of adapters and saved modules, by their state_dict names."""
    tensors: dict[str, Tensor] = {}
    for path, layer in adapted_layers(model).items():
        tensors[join_names(path, "A")], tensors[join_names(path, "B")] = layer.A, layer.B
    for path, root in saved_modules(model).items():
        for inner, module in root.named_modules(prefix=path):
            tensors.update((join_names(inner, name), tensor) for name, tensor in saved_tensors(module))
    return {_public(name): tensor for name, tensor in tensors.items()}


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what training changes: A and B of every adapted layer, and the modules to save.

    The names are those of ``model.state_dict()``. As there, anything that is not a tensor is in the
    dictionary's ``_metadata`` attribute: each layer's ``alpha``. The copy module, pickling and ``torch.save``
    keep it; a new dictionary of the same tensors, such as ``.copy()`` makes, lacks it. ``dropout``, used only
    in training, is not included.

    Args:
        model: with at least one adapted layer.

    Returns:
        The ``A`` (out_features, rank) and ``B`` (rank, in_features) of each layer and the tensors of the
        modules to save, by name, on their own devices and in their own dtypes.

    Raises:
        ValueError: no adapted layer; inside ``disable_adapter``, if the model has saved modules; tensors on
            the meta device; adapters that a hook computes (pruning).
        TypeError: ``model`` is not a module.
    """
    layers = require_layers(model, "adapter_state_dict")
    check_current(layers, "adapter_state_dict")
    if any(uses_original(root) for root in saved_modules(model).values()):
        raise ValueError("adapter_state_dict: inside disable_adapter the saved modules hold original values")
    tensors = adapter_tensors(model)
    check_values(tensors, "adapter_state_dict")
    state: Any = OrderedDict((name, t.detach().clone()) for name, t in tensors.items())
    state._metadata = {_public(path): {_ALPHA: layer.alpha} for path, layer in layers.items()}
    return state


def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Copy a result of :func:`adapter_state_dict` into the model's own tensors, which optimizers hold.

    Each layer's ``alpha`` is set from the state's ``_metadata``, if it has one.

    Args:
        model: with the adapted layers and saved modules that the state names, of the same shapes.
        state: tensors on any device, of any real dtype (or complex like the model's).

    Returns:
        ``model``.

    Raises:
        ValueError: missing or unexpected names, tensors of another shape or on the meta device (in the state
            or the model), tensors of the model made in inference mode or expanded, an alpha that is not a
            finite number, a merged layer; inside ``disable_adapter``. Nothing is copied.
        TypeError: ``model`` is not a module, or ``state`` is not a mapping.
    """
    layers = require_layers(model, "load_adapter_state_dict")
    if not isinstance(state, Mapping):
        raise TypeError(f"load_adapter_state_dict: expected named tensors, got {type(state).__name__}")
    check_enabled(model, "load_adapter_state_dict")
    check_unmerged(layers, "load_adapter_state_dict")
    check_own(layers, "load_adapter_state_dict")
    tensors = adapter_tensors(model)
    check_state({name: t.shape for name, t in tensors.items()}, tensors, state, "load_adapter_state_dict")
    check_writable(tensors, "load_adapter_state_dict")
    metadata = getattr(state, "_metadata", None) or {}
    alphas = {path: metadata.get(_public(path), {}).get(_ALPHA, m.alpha) for path, m in layers.items()}
    for path, alpha in alphas.items():
        try:
            check_alpha(alpha)
        except (TypeError, ValueError) as error:
            raise ValueError(f"load_adapter_state_dict: _metadata of {path}: {error}") from error
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(sharded_like(tensor, state[name]))
    for path, layer in layers.items():
        layer.alpha = alphas[path]
    return model


def check_state(
    expected: Mapping[str, Sequence[int]],
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    function: str,
) -> None:
    """Raise ValueError naming every missing, unexpected or unsuitable tensor of ``state``.

    ``expected``: the shapes. ``own``: those of the model's tensors that exist already.
    """
    problems = []
    missing = [name for name in expected if name not in state]
    if missing:
        problems.append(f"missing {listing(missing)}")
    unexpected = [str(name) for name in state if name not in expected]
    if unexpected:
        problems.append(f"unexpected {listing(unexpected)}")
    wrong = []
    for name in expected.keys() & state.keys():
        tensor, shape = state[name], tuple(expected[name])
        if not isinstance(tensor, Tensor):
            wrong.append(f"{name} is a {type(tensor).__name__}, expected a tensor")
        elif tuple(tensor.shape) != shape:
            wrong.append(f"{name} is {tuple(tensor.shape)}, expected {shape}")
        elif tensor.layout != torch.strided:
            wrong.append(f"{name} is {tensor.layout}, expected a dense tensor")
        elif tensor.is_meta:
            wrong.append(f"{name} is on the meta device, without values")
        elif tensor.is_complex() and not (name in own and own[name].is_complex()):
            wrong.append(f"{name} is {tensor.dtype}, expected a real dtype")
    problems += [shorten(sorted(wrong))] if wrong else []
    if problems:
        raise ValueError(f"{function}: {'; '.join(problems)}")
