"""Whole models: which layers get an adapter, and the swap, merge, switch and table of all of them.

A prepared model keeps its own class and module names: every targeted ``nn.Linear`` is replaced in its parents
by a :class:`FusedLoRALinear`, and every other parameter but those of ``modules_to_save`` is frozen. A module
to save is trained where it is; its original values stay beside it as non-persistent buffers, which move and
copy with the model and are in no state_dict, so that :func:`disable_adapter` can give the frozen model.
"""

from __future__ import annotations

import re
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fastlora.function import any_dtensor, check_dropout, compute_dtype
from fastlora.group import check_model, group_states, ungroup_projections
from fastlora.linear import (
    FusedLoRALinear,
    _keep_fast_path_off,
    check_adapter_dtype,
    check_alpha,
    check_rank,
    why_unusable,
)
from fastlora.planner import Problem, current_mode, describe, make_plan

ALL_LINEAR = "all-linear"
# What transformers and plain PyTorch models call a head that no get_output_embeddings() names.
_HEAD_NAMES = ("lm_head", "score", "classifier", "qa_outputs", "head")
# Their CUDA kernels take out_proj.weight and never call the layer; PEFT refuses the same models.
_MAMBA_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
_ORIGINAL = "_original_"
# The names of modules that state_dict leaves out: what checkpoint_wrapper and the old FSDP put around one.
HIDDEN_NAMES = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module")
DATA_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_ALPHA = "alpha"
_SUMMARY_TOKENS = 4096
_SHOWN = 12


@dataclass(frozen=True)
class Selector:
    """Which module names an adapter covers, by PEFT's rules; the fields are those of adapter_config.json.

    A tuple holds exact names and last parts of names (``"q_proj"`` covers ``"layers.0.q_proj"``), a string is
    a regular expression for the whole name.
    """

    target_modules: str | tuple[str, ...]
    exclude_modules: str | tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()

    def covers(self, path: str) -> bool:
        """Whether the module called ``path`` gets an adapter."""
        if self.exclude_modules and matches(self.exclude_modules, path):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", path) for name in self.modules_to_save):
            return False
        if not matches(self.target_modules, path):
            return False
        if not self.layers_to_transform or isinstance(self.target_modules, str):
            return True
        # An exact name wins over the layer numbers.
        return path in self.target_modules or self._layer_number(path) in self.layers_to_transform

    def _layer_number(self, path: str) -> int | None:
        """The first number in a name, as in ``layers.3.q_proj``, after one of ``layers_pattern`` if given."""
        if not self.layers_pattern:
            found = re.match(r".*?\.[^.]*\.(\d+)\.", path)
            return int(found.group(1)) if found else None
        for pattern in self.layers_pattern:
            found = re.match(rf"(?:^|.*?\.){pattern}\.(?P<number>\d+)\.", path)
            if found:
                return int(found["number"])
        return None


@dataclass(frozen=True)
class SummaryPart:
    """What another kind of adapted layer adds to :func:`summary`."""

    rows: list[tuple[str, str, str, str]]  # name, shape, rank, path
    reasons: list[str]
    closing: str


# Called with the model; modules that know other kinds of layers add theirs.
summary_parts: list[Callable[[nn.Module], SummaryPart | None]] = []


@dataclass(frozen=True)
class LayerSpec:
    """The adapter of one layer; ``adapter_dtype`` None means the weight's."""

    rank: int
    alpha: float
    dropout: float
    adapter_dtype: torch.dtype | None = None


def matches(names: str | Iterable[str], path: str) -> bool:
    """Whether a regular expression is all of ``path``, or one of several names is its last parts."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def adapted_layers(model: nn.Module) -> dict[str, FusedLoRALinear]:
    """Every adapted layer of a model under its (first) name."""
    return {path: m for path, m in model.named_modules() if isinstance(m, FusedLoRALinear)}


def saved_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module that is trained and saved with the adapters, under its (first) name."""
    return {path: m for path, m in model.named_modules() if "_saved_with_adapter" in vars(m)}


def apply_lora(
    model: nn.Module,
    target_modules: str | Iterable[str],
    rank: int = 8,
    alpha: float = 1.0,
    dropout: float = 0.0,
    *,
    adapter_dtype: torch.dtype | None = None,
    modules_to_save: str | Iterable[str] = (),
) -> nn.Module:
    """Give the targeted ``nn.Linear`` layers of a model a LoRA adapter, in place, and freeze the rest.

    The layers become :class:`FusedLoRALinear` under their old names, sharing their weights. A layer that is
    reachable under several names is adapted once. A second call adapts other layers and leaves the first
    one's adapters and saved modules alone; every other parameter is frozen again.

    Args:
        model: any module; changed in place.
        target_modules: as PEFT matches it. Several names: each covers the modules called exactly so or whose
            name ends in ``.name``. A string: a regular expression that must match the whole name.
            ``"all-linear"``: every ``nn.Linear`` but the output head, which is what the model's
            ``get_output_embeddings()`` returns, else its direct child called lm_head, score, classifier,
            qa_outputs or head. What lies inside ``modules_to_save`` is left out.
        rank: R of every adapter. alpha: the multiplier of the update (PEFT's ``lora_alpha / r``).
        dropout: probability in [0, 1] of dropping an element of the update's input in training.
        adapter_dtype: of A and B; None for the dtype of the layer's weight.
        modules_to_save: names, matched like ``target_modules``, of modules that are trained as a whole, such
            as a new head; :func:`adapter_state_dict` and :func:`fastlora.save_adapter` include them. A weight
            that such a module shares with another (tied embeddings) becomes its own.

    Returns:
        ``model``.

    Raises:
        ValueError: nothing matched, or one of the names matched nothing; a target that is not exactly an
            ``nn.Linear``, has an adapter already or is a module to save; the model itself is the layer; a
            rank below 1, a dropout outside [0, 1]; in DistributedDataParallel, which would not see the new
            parameters. The model is left as it was.
        TypeError: ``model`` is no module, a name is no string, a rank, alpha or dropout is no number.
    """
    check_model(model, "apply_lora")
    check_rank(rank)
    check_alpha(alpha)
    check_dropout(dropout)
    if adapter_dtype is not None:
        check_adapter_dtype(adapter_dtype)
    check_enabled(model, "apply_lora")
    check_not_parallel(model, "apply_lora")
    saved = _find_saved(model, _names(modules_to_save, "modules_to_save"))
    targets = _find_targets(model, target_modules, saved)
    prepare(model, dict.fromkeys(targets, LayerSpec(rank, alpha, dropout, adapter_dtype)), saved)
    return model


def check_enabled(model: nn.Module, function: str) -> None:
    """ValueError inside :func:`disable_adapter`, where the model does not hold its own values."""
    disabled = [path for path, layer in adapted_layers(model).items() if not layer.adapter_enabled]
    disabled += [path for path, m in saved_modules(model).items() if uses_original(m)]
    if disabled:
        raise ValueError(
            f"{function}: adapters are disabled in {listing(disabled)}; leave disable_adapter first"
        )


def check_not_parallel(model: nn.Module, function: str) -> None:
    """ValueError in DistributedDataParallel, which would not average the gradients of new parameters."""
    for path, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel):
            raise ValueError(
                f"{function}: {path or 'the model'} is a DistributedDataParallel, which knows only the "
                "parameters that it was made with: adapt the model first, then wrap it"
            )


def check_unmerged(layers: Mapping[str, FusedLoRALinear], function: str) -> None:
    """ValueError if a layer is merged."""
    merged = [path for path, layer in layers.items() if layer.merged]
    if merged:
        raise ValueError(f"{function}: {listing(merged)} merged: call unmerge() first")


def _names(names: str | Iterable[str], argument: str) -> tuple[str, ...]:
    if not isinstance(names, Iterable):
        raise TypeError(f"{argument}: expected names, got {names!r}")
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"{argument}: expected names, got {name!r}")
        if not name:
            raise ValueError(f"{argument}: an empty name")
    return names


def all_paths(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Every module below the root with all its names."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if path:
            paths.setdefault(module, []).append(path)
    return paths


def _find_saved(model: nn.Module, names: tuple[str, ...]) -> list[str]:
    """The (first) names of the new modules to save, none inside another; ValueError for what cannot be."""
    found: dict[str, nn.Module] = {}
    paths = all_paths(model)
    before = saved_modules(model)
    within = _modules_inside(before.values())
    for name in names:
        hits = {own[0]: m for m, own in paths.items() if any(matches((name,), path) for path in own)}
        if not hits:
            raise ValueError(f"modules_to_save: no module is called {name!r}; {available_layers(model)}")
        found.update((path, module) for path, module in hits.items() if module not in within)
    outermost = {path: m for path, m in found.items() if not is_inside(path, found.keys() - {path})}
    for path, module in outermost.items():
        parts = [own for own, m in before.items() if m in _modules_inside([module])]
        if parts:
            raise ValueError(
                f"modules_to_save: {path} contains modules that are saved already: {listing(parts)}"
            )
        if not any(True for _ in module.parameters()):
            raise ValueError(f"modules_to_save: {path} ({type(module).__name__}) has no parameters to train")
        adapted = [join_names(path, inner) for inner in adapted_layers(module)]
        if adapted:
            raise ValueError(f"modules_to_save: {path} contains adapted layers: {listing(adapted)}")
    return list(outermost)


def _modules_inside(roots: Iterable[nn.Module]) -> set[nn.Module]:
    return {module for root in roots for module in root.modules()}


def is_inside(path: str, roots: Iterable[str]) -> bool:
    return any(path == root or path.startswith(f"{root}.") for root in roots)


def join_names(*parts: str) -> str:
    return ".".join(part for part in parts if part)


def _find_targets(model: nn.Module, target_modules: str | Iterable[str], saved: Sequence[str]) -> list[str]:
    """The (first) names of the layers to adapt; ValueError where that is not exactly what was asked for."""
    if isinstance(model, FusedLoRALinear):
        raise ValueError(f"apply_lora: the model itself has an adapter already: {model}")
    if isinstance(model, nn.Linear):
        raise ValueError(
            f"apply_lora: the model itself is the layer {model}, so it cannot be replaced in place; use "
            "FusedLoRALinear.from_linear"
        )
    modules = dict(model.named_modules())
    roots = [*(modules[path] for path in saved), *saved_modules(model).values()]
    if isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR:
        within = _modules_inside(roots)
        targets = [path for path in linear_names(model) if modules[path] not in within]
        if not targets:
            raise ValueError(
                f"target_modules: {ALL_LINEAR!r} found no nn.Linear to adapt; {available_layers(model)}"
            )
    else:
        targets = _match_targets(model, target_modules, roots)
    check_adaptable(model, {path: modules[path] for path in targets}, "target_modules")
    return targets


def check_adaptable(model: nn.Module, targets: Mapping[str, nn.Module], argument: str) -> None:
    """ValueError naming the modules that cannot be replaced by an adapted layer, and why."""
    problems: dict[str, list[str]] = {}
    for path, module in targets.items():
        why = _why_not_adaptable(model, path, module)
        if why:
            problems.setdefault(why, []).append(path)
    if problems:
        text = shorten([f"{listing(paths)} ({why})" for why, paths in problems.items()])
        raise ValueError(f"{argument}: cannot adapt {text}")


def _match_targets(
    model: nn.Module, target_modules: str | Iterable[str], roots: Sequence[nn.Module]
) -> list[str]:
    """The (first) names of all modules that ``target_modules`` matches outside ``roots``, those to save."""
    single = isinstance(target_modules, str)
    patterns: tuple[str, ...] = (
        (target_modules,) if isinstance(target_modules, str) else _names(target_modules, "target_modules")
    )
    within = _modules_inside(roots)
    paths = all_paths(model)
    targets: dict[str, None] = {}
    for pattern in patterns:
        wanted = _expression(pattern) if single else (pattern,)
        hits = {m: own[0] for m, own in paths.items() if any(matches(wanted, path) for path in own)}
        both = [path for m, path in hits.items() if m in roots]
        if both:
            raise ValueError(f"target_modules: {listing(both)} cannot be both adapted and in modules_to_save")
        outside = [path for m, path in hits.items() if m not in within]
        if not outside:
            where = "matches only inside modules_to_save" if hits else "matches no module"
            kind = "the regular expression " if single else ""
            hint = ""
            if single and any(matches((pattern,), path) for own in paths.values() for path in own):
                hint = f" as a whole (the list [{pattern!r}] would match the end of names)"
            raise ValueError(f"target_modules: {kind}{pattern!r} {where}{hint}; {available_layers(model)}")
        targets.update(dict.fromkeys(outside))
    if not targets:
        raise ValueError(f"target_modules: no names were given; {available_layers(model)}")
    return list(targets)


def _expression(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"target_modules: {pattern!r} is no regular expression: {error}") from error
    return pattern


def linear_names(model: nn.Module, exact: bool = True, sequence_classifier: bool | None = None) -> list[str]:
    """The (first) names of all linear layers but the output head's.

    Args:
        exact: ``nn.Linear`` itself and adapted layers alone; else, as in PEFT, subclasses and transformers'
            ``Conv1D`` too.
        sequence_classifier: whether a ``score`` or ``classifier`` counts as the output head (PEFT's rule,
            from its task type); None: the conventional names of :func:`apply_lora` do.
    """
    hook = getattr(model, "get_output_embeddings", None)
    head = hook() if callable(hook) else None
    if head is None:
        names = _HEAD_NAMES if sequence_classifier is None else ("score", "classifier") * sequence_classifier
        head = next(
            (child for name in names if isinstance(child := getattr(model, name, None), nn.Module)), None
        )
    excluded = set(head.modules()) if isinstance(head, nn.Module) else set()

    def is_linear(module: nn.Module) -> bool:
        if exact:
            return type(module) in (nn.Linear, FusedLoRALinear)
        return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"

    return [path for path, m in model.named_modules() if path and is_linear(m) and m not in excluded]


def _why_not_adaptable(model: nn.Module, path: str, module: Any) -> str | None:
    """Why a module cannot be replaced by an adapted layer, None if it can."""
    if isinstance(module, FusedLoRALinear):
        return "adapted already: adapting a layer twice is not supported"
    kind = type(module)
    above = _ancestors(model, path)
    if isinstance(above[-1], nn.MultiheadAttention) or kind.__name__ == "NonDynamicallyQuantizableLinear":
        return "MultiheadAttention reads its weight and never calls it, so an adapter there would do nothing"
    if kind is not nn.Linear:
        return f"{kind.__qualname__}, expected exactly torch.nn.Linear"
    if path.rpartition(".")[2] == "_orig_mod":
        return "torch.compile wraps this very layer and would go on calling it; compile after adapting"
    why = why_unusable(module)
    if why:
        return why
    if path.rpartition(".")[2] == "out_proj":
        types = [getattr(getattr(m, "config", None), "model_type", None) for m in above]
        mamba = next((name for name in types if name in _MAMBA_TYPES), None)
        if mamba:
            return f"{mamba} reads its weight without calling it"
    return None


def _ancestors(model: nn.Module, path: str) -> list[nn.Module]:
    """The modules on the way to the one called ``path``, from the model itself to its parent."""
    modules = [model]
    for name in path.split(".")[:-1]:
        modules.append(modules[-1].get_submodule(name))
    return modules


def available_layers(model: nn.Module) -> str:
    """The nn.Linear layers of a model, in a few words, for error messages."""
    names = [path for path, m in model.named_modules() if path and type(m) is nn.Linear]
    if names:
        return f"the model's nn.Linear layers are {listing(names)}"
    return f"the model has no nn.Linear, only {shorten(sorted({type(m).__name__ for m in model.modules()}))}"


def listing(paths: Sequence[str]) -> str:
    """Names for an error message, layers that differ in their numbers in one."""
    return shorten(list(_collapse(paths)))


def shorten(items: Sequence[str]) -> str:
    more = f", and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more


def _collapse(paths: Iterable[str]) -> dict[str, int]:
    """Names that differ in their numbers alone, in one with their count: layers.{0..5}.query -> 6."""
    groups: dict[tuple[str, ...], list[list[str]]] = {}
    for path in paths:
        parts = path.split(".")
        groups.setdefault(tuple("*" if p.isdigit() else p for p in parts), []).append(parts)
    collapsed = {}
    for pattern, members in groups.items():
        varying = [i for i, p in enumerate(pattern) if p == "*" and len({m[i] for m in members}) > 1]
        name = list(members[0])
        for i in varying:
            name[i] = _number_range({int(m[i]) for m in members}) if len(varying) == 1 else "*"
        collapsed[".".join(name) or "(the model itself)"] = len(members)
    return collapsed


def _number_range(numbers: set[int]) -> str:
    low, high = min(numbers), max(numbers)
    if len(numbers) == high - low + 1:
        return f"{{{low}..{high}}}"
    return "{" + ",".join(map(str, sorted(numbers))) + "}"


def prepare(model: nn.Module, specs: Mapping[str, LayerSpec], saved: Iterable[str]) -> None:
    """Swap layers, freeze the rest and mark the modules to save; all names are known to be right.

    Everything that can fail, allocation above all, happens before the first change that would last.

    Raises:
        ValueError: a parameter of a lazy module, which cannot be frozen before it has a shape.
    """
    lazy = [name for name, parameter in model.named_parameters() if is_lazy(parameter)]
    if lazy:
        raise ValueError(f"{listing(lazy)} of lazy modules have no shape yet: run the model once first")
    modules = dict(model.named_modules())
    roots = [modules[path] for path in saved if "_saved_with_adapter" not in vars(modules[path])]
    was_trainable = {p: p.requires_grad for p in model.parameters()}
    replacements: dict[nn.Module, FusedLoRALinear] = {}
    try:
        for path, spec in specs.items():
            replacements[modules[path]] = FusedLoRALinear.from_linear(
                modules[path], spec.rank, spec.alpha, spec.dropout, spec.adapter_dtype
            )
        split = [change for root in roots for change in _split_saved(model, root)]
    except BaseException:
        for parameter, trainable in was_trainable.items():
            parameter.requires_grad_(trainable)
        for path in specs:
            _remove_own_hook(modules[path])
        raise
    _swap(model, replacements)
    for change in split:
        change()
    for root in roots:
        root._saved_with_adapter = True
    _freeze(model, roots)
    for encoder in _adapted_encoders(model):
        # With a padding mask in eval mode it would hand nested tensors to a layer whose fast path is off.
        if not hasattr(encoder, "_used_nested_tensor"):
            encoder._used_nested_tensor = encoder.use_nested_tensor
            encoder.use_nested_tensor = False
    shared = _shared_weights(model)
    for layer in replacements.values():
        layer._weight_shared_with = shared.get(layer, ())


def _remove_own_hook(module: nn.Module) -> None:
    """Take our hook out of a module's pre-hooks, in the very dictionary that the user's handles know."""
    hooks = module._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _keep_fast_path_off]:
        del hooks[key]


def _swap(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put each replacement wherever the module that it replaces is registered."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and child in replacements:
                setattr(parent, name, replacements[child])


def _freeze(model: nn.Module, new_roots: Iterable[nn.Module]) -> None:
    """Freeze all but adapters and saved modules; what these train stays as it was."""
    keep = {p for layer in adapted_layers(model).values() for p in (layer.A, layer.B)}
    keep.update(p for root in saved_modules(model).values() for p in root.parameters())
    for parameter in model.parameters():
        if parameter not in keep:
            parameter.requires_grad_(False)
    for root in new_roots:
        for parameter in root.parameters():
            parameter.requires_grad_(parameter.is_floating_point())


def _adapted_encoders(model: nn.Module) -> list[Any]:
    """The ``nn.TransformerEncoder`` modules with an adapted layer inside."""
    return [m for m in model.modules() if isinstance(m, nn.TransformerEncoder) and adapted_layers(m)]


def _split_saved(model: nn.Module, root: nn.Module) -> Iterator[Callable[[], None]]:
    """Changes that give a module to save its own trainable tensors, with the original values beside them.

    PEFT trains a copy of the whole module. Here the tensors stay, so that optimizers and names do, unless a
    parameter's memory is another module's too: training it would change that module.
    """
    inside = dict.fromkeys(root.modules())
    outside = [_memory(tensor) for m in model.modules() if m not in inside for _, tensor in _own_tensors(m)]
    copies: dict[Tensor, nn.Parameter] = {}
    for module in inside:
        for name, tensor in saved_tensors(module):
            original = tensor.detach()
            if not isinstance(tensor, nn.Parameter) or not _overlaps(_memory(tensor), outside):
                original = original.clone()
            elif tensor not in copies:
                copies[tensor] = nn.Parameter(original.clone(), tensor.requires_grad)
            yield partial(_keep_original, module, name, original, copies.get(tensor))


def saved_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and persistent buffers: what its state_dict holds, without its children."""
    for name, tensor in module._parameters.items():
        if tensor is not None:
            yield name, tensor
    for name, buffer in module._buffers.items():
        if buffer is not None and name not in module._non_persistent_buffers_set:
            yield name, buffer


def _keep_original(module: nn.Module, name: str, original: Tensor, own: nn.Parameter | None) -> None:
    if own is not None:
        setattr(module, name, own)
    # A meta tensor has no values to go back to: disable_adapter says so.
    if original.device.type != "meta":
        module.register_buffer(_ORIGINAL + name, original, persistent=False)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A module's own parameters and buffers, the original values of saved modules too."""
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None:
            yield name, tensor


def _shared_weights(model: nn.Module) -> dict[FusedLoRALinear, tuple[str, ...]]:
    """The adapted layers whose weight other modules hold, or overlap in memory, with the holders' names."""
    holders: dict[object, list[tuple[_Memory, nn.Module, str]]] = {}
    for path, module in model.named_modules():
        for name, tensor in _own_tensors(module):
            memory = _memory(tensor)
            name = join_names(path, name.removeprefix(_ORIGINAL))
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
    """Where a tensor lies: a device or the identity of the tensor, first byte and last byte + 1."""

    where: object
    start: int
    stop: int


def _memory(tensor: Tensor) -> _Memory:
    """A tensor without an address (on meta, sparse, nested, a DTensor) lies apart from all others."""
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
    and saved modules keep what they learned. Afterwards nothing of fastlora is left in the model.

    Args:
        model: with at least one adapted layer.

    Returns:
        ``model``.

    Raises:
        ValueError: no adapted layer, or the model itself is one (use its ``to_linear``); a weight that
            another module holds too (tied embeddings) or that a parametrization computes; an update that is
            not finite; a model that FSDP2 shards; inside ``disable_adapter``. The model is left as it was.
        TypeError: ``model`` is no module.
    """
    layers = require_layers(model, "merge_lora")
    if isinstance(model, FusedLoRALinear):
        raise ValueError("merge_lora: the model itself is the adapted layer; use its to_linear()")
    check_enabled(model, "merge_lora")
    if _is_fully_sharded(model):
        raise ValueError(
            "merge_lora: fully_shard holds the model's layers, which cannot be replaced; save_adapter, then "
            "load_adapter and merge_lora on a model that is whole"
        )
    shared = _shared_weights(model)
    for path, layer in layers.items():
        if layer.merged:
            continue
        others = dict.fromkeys((*shared.get(layer, ()), *layer._weight_shared_with))
        if others:
            raise ValueError(
                f"merge_lora: the weight of {path} is shared with {', '.join(others)}, which merging would "
                "change too"
            )
        layer._check_plain_weight(f"merge_lora: {path}")
        with torch.no_grad():
            layer._merged_weight(f"merge_lora: {path}")
    encoders = _adapted_encoders(model)
    replacements: dict[nn.Module, nn.Module] = {}
    for layer in layers.values():
        layer.merge()
        # Before to_linear, which then hands on the very dictionaries: the user's handles keep working.
        _remove_own_hook(layer)
        replacements[layer] = layer.to_linear()
    _swap(model, replacements)
    for encoder in encoders:
        if hasattr(encoder, "_used_nested_tensor"):
            encoder.use_nested_tensor = encoder._used_nested_tensor
            del encoder._used_nested_tensor
    for root in saved_modules(model).values():
        del root._saved_with_adapter
        for module in root.modules():
            for name in [name for name in module._buffers if name.startswith(_ORIGINAL)]:
                delattr(module, name)
    return ungroup_projections(model)


def _is_fully_sharded(model: nn.Module) -> bool:
    """Whether FSDP2 shards a part of the model; importing it takes a while, so it is only looked up."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and any(isinstance(m, fsdp.FSDPModule) for m in model.modules())


def require_layers(model: nn.Module, function: str) -> dict[str, FusedLoRALinear]:
    check_model(model, function)
    layers = adapted_layers(model)
    if not layers:
        of_peft = any(type(m).__module__.startswith("peft.") for m in model.modules())
        hint = "PEFT's own methods do this for its models" if of_peft else "apply_lora makes them"
        raise ValueError(f"{function}: the model has no adapted layer; {hint}")
    return layers


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block the model is the frozen one: no updates, and saved modules with their original values.

    For the reference model of DPO and the like. Blocks nest and overlap, also those of several threads: the
    model is the frozen one until the last of them ends. The parameters' values are not written, so that
    autograd graphs from outside stay valid, but what a checkpoint recomputes inside the block it recomputes
    of the frozen model; call ``backward`` outside. A copy of the model made inside stays the frozen one. Of a
    merged layer, the unmerged weight is held inside the block (the original up to rounding).

    Args:
        model: with at least one adapted layer (a PEFT model has a ``disable_adapter`` of its own).

    Returns:
        A context manager that gives ``model``.

    Raises:
        ValueError: on entry, if the model has no adapted layer, or a saved module was on the meta device
            when it was marked, so that its original values are unknown.
        TypeError: on entry, if ``model`` is no module.
    """
    layers = require_layers(model, "disable_adapter")
    roots = saved_modules(model)
    unknown = [path for path, root in roots.items() if not _has_original(root)]
    if unknown:
        raise ValueError(
            f"disable_adapter: the original values of {listing(unknown)} are unknown: it was on the meta "
            "device when it was marked to be saved"
        )
    with ExitStack() as blocks:
        for layer in layers.values():
            blocks.enter_context(_changed(layer, _disable_layer))
        for root in roots.values():
            blocks.enter_context(_changed(root, _use_original))
        for encoder in _adapted_encoders(model):
            if hasattr(encoder, "_used_nested_tensor"):
                blocks.enter_context(_changed(encoder, _use_nested_tensors))
        yield model


# What the blocks of disable_adapter have changed: how to undo it, and in how many blocks a module is.
_changes: WeakKeyDictionary[nn.Module, tuple[ExitStack, int]] = WeakKeyDictionary()
_changes_lock = threading.Lock()


@contextmanager
def _changed(module: nn.Module, change: Callable[[Any, ExitStack], None]) -> Iterator[None]:
    """``change(module, undo)`` by the first block that the module is in, undone by the last."""
    with _changes_lock:
        undo, blocks = _changes.get(module, (ExitStack(), 0))
        if not blocks:
            try:
                change(module, undo)
            except BaseException:
                undo.close()
                raise
        _changes[module] = undo, blocks + 1
    try:
        yield
    finally:
        with _changes_lock:
            undo, blocks = _changes.pop(module)
            if blocks > 1:
                _changes[module] = undo, blocks - 1
            else:
                undo.close()


def _set(module: nn.Module, attribute: str, value: object, undo: ExitStack) -> None:
    undo.callback(setattr, module, attribute, getattr(module, attribute))
    setattr(module, attribute, value)


def _disable_layer(layer: FusedLoRALinear, undo: ExitStack) -> None:
    if layer._merged_alpha is not None:
        # Another tensor, not unmerge() and merge(): each pair of those would round the weight anew.
        weight = nn.Parameter(layer._updated_weight(-layer._merged_alpha), requires_grad=False)
        _set(layer, "weight", weight, undo)
        _set(layer, "_merged_alpha", None, undo)
    _set(layer, "adapter_enabled", False, undo)
    # The frozen model's TransformerEncoderLayer takes its fast path, whose results differ in the last bits.
    hooks = layer._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _keep_fast_path_off]:
        undo.callback(hooks.__setitem__, key, hooks.pop(key))


def _use_nested_tensors(encoder: nn.TransformerEncoder, undo: ExitStack) -> None:
    _set(encoder, "use_nested_tensor", encoder._used_nested_tensor, undo)


def _has_original(root: nn.Module) -> bool:
    return all(_ORIGINAL + name in m._buffers for m in root.modules() for name, _ in saved_tensors(m))


def uses_original(root: nn.Module) -> bool:
    return root._saved_with_adapter == "original"


def _use_original(root: nn.Module, undo: ExitStack) -> None:
    _set(root, "_saved_with_adapter", "original", undo)
    for module in root.modules():
        for name, _ in list(saved_tensors(module)):
            original: Any = module._buffers[_ORIGINAL + name]
            if name in module._parameters:
                _set(module, name, nn.Parameter(original, requires_grad=False), undo)
            else:
                # A copy: a buffer such as BatchNorm's running mean is written by a forward pass.
                _set(module, name, original.clone(), undo)


def _public(path: str) -> str:
    """The name that ``state_dict`` has for the module or tensor that ``named_modules`` calls ``path``."""
    return ".".join(part for part in path.split(".") if part not in HIDDEN_NAMES)


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """state_dict names of adapters and saved modules -> the model's own tensors."""
    tensors: dict[str, Tensor] = {}
    for path, layer in adapted_layers(model).items():
        tensors[join_names(path, "A")], tensors[join_names(path, "B")] = layer.A, layer.B
    for path, root in saved_modules(model).items():
        for inner, module in root.named_modules(prefix=path):
            tensors.update((join_names(inner, name), tensor) for name, tensor in saved_tensors(module))
    return {_public(name): tensor for name, tensor in tensors.items()}


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what training changes: A and B of every adapted layer, and the modules to save.

    The names are those of ``model.state_dict()``. As there, what is no tensor travels in the dictionary's
    attribute ``_metadata``: each layer's ``alpha``, which copying, pickling and ``torch.save`` keep and a new
    dictionary of the same tensors lacks. ``dropout``, which matters in training alone, is not part of it.

    Args:
        model: with at least one adapted layer.

    Returns:
        A dictionary: ``A`` (out_features, rank) and ``B`` (rank, in_features) of each layer and the tensors
        of the modules to save, by name, on their devices and in their dtypes.

    Raises:
        ValueError: no adapted layer, or inside ``disable_adapter`` of a model with saved modules.
        TypeError: ``model`` is no module.
    """
    layers = require_layers(model, "adapter_state_dict")
    if any(uses_original(root) for root in saved_modules(model).values()):
        raise ValueError("adapter_state_dict: inside disable_adapter the saved modules hold original values")
    state: Any = OrderedDict((name, t.detach().clone()) for name, t in adapter_tensors(model).items())
    state._metadata = {_public(path): {_ALPHA: float(layer.alpha)} for path, layer in layers.items()}
    return state


def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """Copy what :func:`adapter_state_dict` returned into the model's own tensors, so that optimizers go on.

    Each layer's ``alpha`` becomes that of the state, where its ``_metadata`` has one.

    Args:
        model: with the adapted layers and saved modules that the state names, of the same shapes.
        state: tensors of any device and real dtype.

    Returns:
        ``model``.

    Raises:
        ValueError: names missing or unexpected, tensors of another shape or without values (on the meta
            device, there or in the model), a merged layer, inside ``disable_adapter``. Nothing is copied.
        TypeError: ``model`` is no module, or ``state`` is no mapping.
    """
    layers = require_layers(model, "load_adapter_state_dict")
    if not isinstance(state, Mapping):
        raise TypeError(f"load_adapter_state_dict: expected named tensors, got {type(state).__name__}")
    check_enabled(model, "load_adapter_state_dict")
    check_unmerged(layers, "load_adapter_state_dict")
    tensors = adapter_tensors(model)
    check_state({name: t.shape for name, t in tensors.items()}, state, "load_adapter_state_dict")
    unreal = [name for name, tensor in tensors.items() if tensor.is_meta]
    if unreal:
        raise ValueError(f"load_adapter_state_dict: the model's {listing(unreal)} are on the meta device")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(sharded_like(tensor, state[name]))
    metadata = getattr(state, "_metadata", None) or {}
    for path, layer in layers.items():
        layer.alpha = metadata.get(_public(path), {}).get(_ALPHA, layer.alpha)
    return model


def sharded_like(own: Any, value: Tensor) -> Tensor:
    """``value``, or of a whole one the part that this process holds of the DTensor ``own``."""
    if not any_dtensor(own) or any_dtensor(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(own.device)
    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)


def check_state(expected: Mapping[str, Sequence[int]], state: Mapping[str, Tensor], function: str) -> None:
    """ValueError naming every missing, unexpected and misshapen tensor of ``state``."""
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
        elif tensor.is_meta:
            wrong.append(f"{name} is on the meta device, without values")
        elif tensor.is_complex():
            wrong.append(f"{name} is {tensor.dtype}, expected a real dtype")
    problems += [shorten(sorted(wrong))] if wrong else []
    if problems:
        raise ValueError(f"{function}: {'; '.join(problems)}")


def summary(model: nn.Module) -> str:
    """A table of what is adapted and trained.

    One line for each group of layers that differ in their number alone: name, count, shape (out x in), rank
    and the path that would run 4096 tokens on the layer's device in its dtype (``merged`` and ``disabled``
    layers run as plain linears); then the modules to save, the parameter counts, and each path's reason.
    After ``group_projections`` a line for each kind of group tells whether it runs as one, or why not.
    A model of PEFT's ends with ``fused n, fell back m: reasons``, a reason being that of the layer's state or
    of its last call.

    Args:
        model: any module; one without adapters has the parameter counts alone.

    Returns:
        The table, lines of text.

    Raises:
        TypeError: ``model`` is no module.
    """
    check_model(model, "summary")
    groups: dict[tuple[str, str, str], list[str]] = {}
    reasons: dict[str, None] = {}
    for name, layer in adapted_layers(model).items():
        path, reason = _path_of(layer)
        shape = f"{layer.out_features} x {layer.in_features}"
        groups.setdefault((shape, str(layer.rank), path), []).append(name)
        if reason:
            reasons[f"{path}: {reason}"] = None
    for name, root in saved_modules(model).items():
        state = "disabled" if uses_original(root) else "trained"
        groups.setdefault((_describe_shape(root), "-", state), []).append(name)
    closing = []
    for part in filter(None, [describe_part(model) for describe_part in summary_parts]):
        for name, shape, rank, path in part.rows:
            groups.setdefault((shape, rank, path), []).append(name)
        reasons.update(dict.fromkeys(part.reasons))
        closing.append(part.closing)
    rows = [("module", "layers", "shape", "rank", "path")]
    for (shape, rank, path), names in groups.items():
        rows += [(name, str(count), shape, rank, path) for name, count in _collapse(names).items()]
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    share = 100 * trainable / max(total, 1)
    return "\n".join(
        [
            *(_table(rows) if len(rows) > 1 else ["no adapted layers"]),
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}",
            *reasons,
            *_group_lines(model),
            *closing,
        ]
    )


def _group_lines(model: nn.Module) -> list[str]:
    """Which siblings run as groups, and which stay single, and why."""
    states: dict[tuple[tuple[str, ...], str], list[str]] = {}
    for path, names, reason in group_states(model):
        states.setdefault((names, reason), []).append(path)
    return [
        f"{'single' if reason else 'grouped'}: {join_names(path, '/'.join(names))} ({count})"
        + (f": {reason}" if reason else "")
        for (names, reason), paths in states.items()
        for path, count in _collapse(paths).items()
    ]


def _path_of(layer: FusedLoRALinear) -> tuple[str, str]:
    """The path of a layer's forward gemm for a usual number of tokens, and its reason."""
    if layer.merged:
        return "merged", ""
    if not layer.adapter_enabled:
        return "disabled", ""
    return planned_path(layer.weight, layer.rank, layer.training and layer.dropout > 0.0)


def planned_path(weight: Tensor, rank: int, dropout: bool) -> tuple[str, str]:
    """The path of the forward gemm of weight: (N, K) for a usual number of tokens, and its reason."""
    problem = Problem(
        device=describe(weight.device),
        dtype=compute_dtype(weight),
        M=_SUMMARY_TOKENS,
        N=weight.shape[0],
        K=weight.shape[1],
        R=rank,
        dropout=dropout,
    )
    plan = make_plan(problem, current_mode())
    return plan.path, plan.reason


def _describe_shape(module: nn.Module) -> str:
    if isinstance(module, nn.Linear):
        return f"{module.out_features} x {module.in_features}"
    return f"{sum(p.numel() for p in module.parameters()):,d}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligned columns; numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = (False, True, True, True, False)
    return [
        "  ".join(
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in rows
    ]
