"""Adapter files in PEFT's directory format: ``adapter_config.json`` and ``adapter_model.safetensors``.

PEFT's ``lora_A.weight`` is our B, its ``lora_B.weight`` our A, and its scaling, ``lora_alpha / r``
(``lora_alpha / sqrt(r)`` for rsLoRA), our alpha.
"""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from fastlora.atomic import replace_files
from fastlora.checks import ADAPTER_DTYPES, check_dropout, check_model, is_finite, unwritable
from fastlora.dtensors import gathered, sharded_like
from fastlora.linear import FusedLoRALinear
from fastlora.surgery import (
    DATA_PARALLEL,
    ORIGINAL,
    LayerSpec,
    adapter_parameters,
    check_current,
    check_enabled,
    check_not_parallel,
    check_own,
    check_state,
    check_unmerged,
    check_values,
    check_writable,
    fully_sharded,
    prepare,
    require_layers,
    saved_tensors,
    uses_original,
)
from fastlora.targets import (
    COMPILED,
    WRAPPED,
    Selector,
    adapted_layers,
    check_adaptable,
    embeddings_of,
    is_all_linear,
    is_inside,
    join_names,
    linear_names,
    listing,
    saved_modules,
    shorten,
    unwrapped_name,
    why_never_called,
)

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PICKLED_WEIGHTS_NAME = "adapter_model.bin"
_PREFIX = "base_model.model."

# The values that a plain LoRA linear layer requires of the LoraConfig fields that change what it computes.
# The init_lora_weights listed here are those that leave the base weights unchanged.
_PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
}
_UNSUPPORTED = (
    "alora_invocation_tokens",
    "arrow_config",
    "ensure_weight_tying",
    "fan_in_fan_out",
    "kasa_config",
    "layer_replication",
    "lora_bias",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "trainable_token_indices",
    "use_bdlora",
    "use_dora",
    "use_qalora",
    "velora_config",
)
_SUPPORTED = (
    "alpha_pattern",
    "exclude_modules",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "r",
    "rank_pattern",
    "target_modules",
    "task_type",
    "use_rslora",
)
# Fields on the model's origin or the initialisation, or without effect unless a field above enables them.
_WITHOUT_EFFECT = (
    "auto_mapping",
    "base_model_name_or_path",
    "corda_config",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
)
# What PEFT calls the children of the layers that it adapts.
_PEFT_CHILDREN = (
    "base_layer",
    "lora_dropout",
    "lora_dropout.default",
    "lora_A",
    "lora_A.default",
    "lora_B",
    "lora_B.default",
    "lora_embedding_A",
    "lora_embedding_B",
    "lora_magnitude_vector",
)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
}
# PEFT adds these to modules_to_save of its own accord.
_TASK_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def save_adapter(model: nn.Module, directory: str | os.PathLike) -> None:
    """Write the adapters and saved modules of a model in PEFT's format.

    ``PeftModel.from_pretrained(base, directory)`` gives the same outputs; a warning says where PEFT cannot
    (dense layers of a mixture of experts that PEFT takes for the experts; containers to save; a module in
    several places, of which PEFT would change one; a part that is wrapped for data-parallel training or
    averaging), and another which parameters are trained but not saved, as they belong to neither an adapter
    nor a module to save. A merged layer's adapter is saved like any other. If layers differ in dropout, which
    matters only in training, the most common value is written. If the save is interrupted at any point, the
    directory holds either the old adapter or the new one, complete; other files in it are kept. (Where the
    system cannot swap two directories in one step, a save that changes the config leaves a moment without it:
    outside Linux, both adapters are then complete next to the directory; if the directory is a mount point or
    its parent is not writable, only the weights are there.)
    If several processes hold the model, let one of them save, except that sharded parameters (DTensors, as
    made by FSDP2) are gathered, so every process has to call this and writes the same. Name parts added by
    ``torch.compile`` and checkpoint wrappers are omitted, as are data-parallel training and ``AveragedModel``
    around the whole model. PEFT matches the ends of names: ``modules_to_save=["classifier"]`` selects a
    ``pre_classifier`` too, so its values are also written.

    Args:
        model: with at least one adapted layer. directory: created if it does not exist.

    Raises:
        ValueError: no adapted layer, or the model itself is one; inside ``disable_adapter``, if the model has
            saved modules; names that PEFT's matching could not tell apart; tensors on the meta device;
            adapters that a hook computes (pruning). Nothing is written.
        ImportError: the safetensors package is missing.
        OSError: the files cannot be written; an existing adapter is left unchanged.
    """
    save = _safetensors().save
    check_model(model, "save_adapter")
    model = _unwrapped(model)
    layers = require_layers(model, "save_adapter")
    _warn_of_parts(model)
    if any(uses_original(root) for root in saved_modules(model).values()):
        raise ValueError("save_adapter: inside disable_adapter the saved modules hold original values")
    check_current(layers, "save_adapter")
    _check_names(model)
    _warn_of_experts(model, map(unwrapped_name, layers))
    config = _config_of(model, layers)
    own = _file_tensors(model) | _tensors_of(_also_saved(model))
    check_values(own, "save_adapter")
    _warn_of_left_out(model, own.values())
    tensors = {name: _whole(tensor) for name, tensor in own.items()}
    replace_files(
        Path(os.path.realpath(directory)),
        {
            WEIGHTS_NAME: save(tensors, metadata={"format": "pt"}),
            CONFIG_NAME: (json.dumps(config, indent=2) + "\n").encode(),
        },
        stale=(PICKLED_WEIGHTS_NAME,),
    )


def _warn_of_left_out(model: nn.Module, written: Iterable[Tensor]) -> None:
    """Warn of parameters that are trained but not written."""
    known = adapter_parameters(model).union(written)
    left_out = [
        unwrapped_name(name)
        for name, p in model.named_parameters()
        if p.requires_grad and p not in known and not getattr(p, "_is_flat_param", False)
    ]
    if left_out:
        warnings.warn(
            f"save_adapter: {listing(left_out)} are trained, but belong neither to an adapter nor to "
            "modules_to_save, and are not saved",
            stacklevel=3,
        )


def load_adapter(model: nn.Module, directory: str | os.PathLike) -> nn.Module:
    """Load an adapter written by :func:`save_adapter` or PEFT.

    The layers it names are adapted and the rest is frozen, as by :func:`fastlora.apply_lora`; its modules to
    save are marked and become trainable. Layers that are already adapted take its values, alpha and dropout:
    in place if the ranks agree, so that optimizers remain valid, otherwise as new parameters. Other layers
    get adapters in the wider of the file's and the base weight's dtype. As in PEFT, embeddings and a head
    that the file holds besides the adapter (because it targets the head or the vocabulary was resized) are
    written into the base model, including the original values of those that are modules to save. A module in
    several places changes in all of them, where PEFT would change one: a warning says so.

    Args:
        model: the base model, or one to which this or another adapter was applied.
        directory: a local directory.

    Returns:
        ``model``.

    Raises:
        ValueError: a feature other than plain LoRA linear layers, a target that is not one, missing,
            unexpected or misshapen tensors, adapted layers that the file does not cover, a merged layer,
            parameters on the meta device or made in inference mode; new parameters in a model that
            DistributedDataParallel or fully_shard has wrapped. All are named, and the model is left
            unchanged.
        FileNotFoundError: the directory holds no adapter.
        ImportError: the safetensors package is missing.
    """
    check_model(model, "load_adapter")
    config, state = _read_adapter(Path(directory))
    given, model = model, _unwrapped(model)
    check_enabled(model, "load_adapter")
    layers = adapted_layers(model)
    check_unmerged(layers, "load_adapter")
    check_own(layers, "load_adapter")
    targets = _find_targets(model, config)
    saved = _find_saved(model, config, targets)
    own_saved = _tensors_of(saved)
    originals = {k: place for k, place in _saved_places(saved, "original_module").items() if k in state}
    again = _saved_places(saved, "modules_to_save")
    state = {name: tensor for name, tensor in state.items() if name not in again}
    # Must precede prepare, which gives a tied head that is saved its own weight, no longer the base's.
    base = {name: t for name, t in _base_tensors(model, targets, state).items() if name not in own_saved}
    _check_coverage(model, layers, targets, saved)
    new = {path: module for path, module in targets.items() if path not in layers}
    ranks = {path: config.rank_of(unwrapped_name(path)) for path in layers}
    resized = {
        path: rank
        for path, rank in ranks.items()
        if rank != layers[path].rank or unwritable(layers[path].A) or unwritable(layers[path].B)
    }
    if new.keys() | resized.keys() | (saved.keys() - saved_modules(model).keys()):
        check_not_parallel(given, "load_adapter")
    if resized and fully_sharded(model):
        raise ValueError(
            f"load_adapter: the file has another rank for {listing(list(resized))}, and fully_shard manages "
            "the parameters that it was called with: load the adapter first, then shard the model"
        )
    check_adaptable(model, new, "load_adapter", called=False)
    _check_tensors(config, targets, {**own_saved, **base, **_at(originals)}, state)
    check_values({path: module.weight for path, module in targets.items()} | own_saved, "load_adapter")
    kept = {
        f"{path}.{name}": getattr(layers[path], name)
        for path in layers.keys() - resized.keys()
        for name in "AB"
    }
    check_writable({**kept, **base, **_tensors_of(saved_modules(model))}, "load_adapter")
    # Allocations may fail, so they precede any change.
    adapters = {path: _empty_adapter(layers[path], rank) for path, rank in resized.items()}
    warning = prepare(
        model, {path: config.layer_spec(path, m, state) for path, m in new.items()}, saved, "load_adapter"
    )
    for path, layer in adapted_layers(model).items():
        if path in adapters:
            layer.A, layer.B = adapters[path]
        spec = config.layer_spec(path, layer, state)
        layer.alpha, layer.dropout = spec.alpha, spec.dropout
    for name, (module, own_name) in originals.items():
        original = module._buffers.get(ORIGINAL + own_name)
        if original is not None:
            base[name] = original
    with torch.no_grad():
        for name, tensor in {**base, **_file_tensors(model)}.items():
            tensor.copy_(sharded_like(tensor, state[name]))
    # Last, as a warning may be an error.
    if warning:
        warnings.warn(warning, stacklevel=2)
    several = _several_places(model)
    if several:
        warnings.warn(
            f"load_adapter: one module has the places {several}. It changes in all of them, by PEFT in only "
            "one, so an adapter that PEFT has trained does not give the same outputs",
            stacklevel=2,
        )
    idle = [path for path in new if why_never_called(model, path)]
    if idle:
        warnings.warn(
            f"load_adapter: the model may read the weights of {listing(idle)} without calling them; as in "
            "PEFT, their adapters then do nothing until they are merged",
            stacklevel=2,
        )
    return given


@dataclass(frozen=True)
class AdapterConfig:
    """The contents of adapter_config.json for a plain LoRA adapter."""

    selector: Selector
    rank: int
    lora_alpha: float
    dropout: float
    rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    task_type: str | None

    def rank_of(self, path: str) -> int:
        return _first_match(self.rank_pattern, path, self.rank)

    def alpha_of(self, path: str) -> float:
        """The plain multiplier of a layer's update."""
        rank = self.rank_of(path)
        lora_alpha = _first_match(self.alpha_pattern, path, self.lora_alpha)
        return lora_alpha / (math.sqrt(rank) if self.rslora else rank)

    def layer_spec(self, path: str, linear: nn.Linear, state: Mapping[str, Tensor]) -> LayerSpec:
        """The adapter of the layer called ``path`` in the model."""
        name = unwrapped_name(path)
        dtype = linear.weight.dtype
        for part in ("lora_A", "lora_B"):
            dtype = torch.promote_types(dtype, state[f"{_PREFIX}{name}.{part}.weight"].dtype)
        return LayerSpec(self.rank_of(name), self.alpha_of(name), self.dropout, dtype)


_Number = TypeVar("_Number", int, float)


def _first_match(patterns: Mapping[str, _Number], path: str, default: _Number) -> _Number:
    """The value of the first regular expression that matches the last parts of a name."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return patterns.get(path, default)


def _unwrapped(model: Any) -> Any:
    """The model inside the wrappers of compilation, checkpoints, data-parallel training and averaging."""
    while True:
        only = next(iter(model._modules)) if len(model._modules) == 1 else None
        if only in WRAPPED:
            model = model._modules[only]
        elif isinstance(model, (*DATA_PARALLEL, AveragedModel)):
            model = model.module
        else:
            return model


def _warn_of_parts(model: nn.Module) -> None:
    """Warn of wrappers that names in files do not omit, around an adapted or saved part."""
    parts = [
        path
        for path, m in model.named_modules()
        if isinstance(m, (*DATA_PARALLEL, AveragedModel)) and (adapted_layers(m) or saved_modules(m))
    ]
    if parts:
        warnings.warn(
            f"save_adapter: {listing(parts)} wraps a part of the model for data-parallel training or "
            "averaging and adds to the names in the file: only a model with the same wrapper can read it",
            stacklevel=3,
        )


def _file_modules(model: nn.Module, once: bool = True) -> Iterator[tuple[str, str, nn.Module]]:
    """Yield (own name, name in the files, module), without the root and wrappers such as torch.compile's.

    once: yield each module only under its first name.
    """
    for path, module in model.named_modules(remove_duplicate=once):
        name = unwrapped_name(path)
        if name and not any(wrapped in module._modules for wrapped in WRAPPED):
            yield path, name, module


def _file_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The model's own tensors, by their names in PEFT's file."""
    tensors: dict[str, Tensor] = {}
    for path, layer in adapted_layers(model).items():
        name = _PREFIX + unwrapped_name(path)
        tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = layer.B, layer.A
    return tensors | _tensors_of(saved_modules(model))


def _tensors_of(saved: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The tensors of modules to save, by their names in PEFT's file."""
    return _at(_saved_places(saved))


def _at(places: Mapping[str, tuple[nn.Module, str]]) -> dict[str, Tensor]:
    return {name: getattr(module, own) for name, (module, own) in places.items()}


def _saved_places(saved: Mapping[str, nn.Module], part: str = "") -> dict[str, tuple[nn.Module, str]]:
    """(module, attribute name) of each tensor of the modules to save, by its name in PEFT's file.

    As in a state_dict, a part that a module holds twice is there under both names.
    ``part``: a child of PEFT's wrapper. If the vocabulary was resized, PEFT writes everything it holds of the
    embeddings. One that is a module to save then has its trained tensor in the file twice, also under
    "modules_to_save" (PEFT reads the other), and the original one under "original_module".
    """
    return {
        _PREFIX + unwrapped_name(join_names(path, part, inner, name)): (module, name)
        for path, root in saved.items()
        for inner, module in root.named_modules(remove_duplicate=False)
        for name, _ in saved_tensors(module)
    }


def _base_tensors(
    model: nn.Module, targets: Mapping[str, nn.Module], state: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The base model's tensors that the file holds, by their names in PEFT's file.

    PEFT saves the input embedding and the output head with the adapter if one of them is a target (then named
    as in ``lm_head.base_layer.weight``) or if the vocabulary was resized.
    """
    embeddings = [embeddings_of(model, kind) for kind in ("input", "output")]
    tensors = {}
    for path, name, module in _file_modules(model):
        if any(module is embedding for embedding in embeddings if embedding is not None):
            inner = "base_layer." if path in targets else ""
            for own, tensor in module.named_parameters(recurse=False):
                tensors[f"{_PREFIX}{name}.{inner}{own}"] = tensor
    return {name: tensor for name, tensor in tensors.items() if name in state}


def _whole(tensor: Any) -> Tensor:
    """A copy that safetensors accepts: contiguous, in its own memory, gathered if sharded."""
    return gathered(tensor).detach().clone(memory_format=torch.contiguous_format)


def _config_of(model: nn.Module, layers: Mapping[str, FusedLoRALinear]) -> dict[str, object]:
    """The contents of a model's adapter_config.json."""
    if "" in map(unwrapped_name, layers):
        raise ValueError("save_adapter: the model itself is the adapted layer, so PEFT has no name for it")
    own = {unwrapped_name(path): layer for path, layer in layers.items()}
    names = [name for _, name, _ in _file_modules(model)]
    saved = [unwrapped_name(path) for path in saved_modules(model)]
    ranks = {name: layer.rank for name, layer in own.items()}
    alphas = {name: _lora_alpha(layer) for name, layer in own.items()}
    rank, alpha = _most_common(ranks.values()), _most_common(alphas.values())
    origin = getattr(model, "name_or_path", None)
    return {
        "peft_type": "LORA",
        "task_type": _task_type(model, saved),
        "base_model_name_or_path": origin if isinstance(origin, str) and origin else None,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": _target_modules(own.keys(), names, saved),
        "lora_dropout": _most_common(layer.dropout for layer in own.values()),
        "bias": "none",
        "use_rslora": False,
        "fan_in_fan_out": False,
        "rank_pattern": {_exactly(name): r for name, r in ranks.items() if r != rank},
        "alpha_pattern": {_exactly(name): a for name, a in alphas.items() if a != alpha},
        "modules_to_save": saved or None,
        "inference_mode": True,
    }


def _most_common(values: Iterable[float]) -> float:
    return Counter(values).most_common(1)[0][0]


def _exactly(name: str) -> str:
    """A key for rank_pattern and alpha_pattern that matches only this name."""
    return "^" + re.escape(name)


def _lora_alpha(layer: FusedLoRALinear) -> float:
    """PEFT's lora_alpha, which PEFT divides by the rank; an integer if that gives the same alpha."""
    exact = layer.alpha * layer.rank
    if not is_finite(exact):
        raise ValueError(
            f"save_adapter: PEFT's lora_alpha is alpha * rank, {layer.alpha} * {layer.rank} of {layer}: "
            "too large for a float"
        )
    return round(exact) if round(exact) / layer.rank == layer.alpha else exact


def _target_modules(own: Iterable[str], names: Iterable[str], saved: Iterable[str]) -> str | list[str]:
    """The shortest target_modules by which PEFT selects these layers and no other module."""
    own = sorted(own)
    for targets in (
        tuple(sorted({name.rpartition(".")[2] for name in own})),
        tuple(own),
        "|".join(map(re.escape, own)),
    ):
        selector = Selector(targets, modules_to_save=tuple(saved))
        if sorted(filter(selector.covers, names)) == own:
            return targets if isinstance(targets, str) else list(targets)
    raise ValueError(
        f"save_adapter: PEFT cannot adapt {listing(own)} together with the modules to save "
        f"{listing(list(saved))}"
    )


def _ending_in(model: nn.Module, endings: Iterable[str]) -> set[nn.Module]:
    """The modules that PEFT selects by modules_to_save: it matches the end of a name, even within a part."""
    endings = tuple(endings)
    return {module for _, name, module in _file_modules(model, once=False) if name.endswith(endings)}


def _also_saved(model: nn.Module) -> dict[str, nn.Module]:
    """What PEFT takes for modules to save beside those of the model, under their (first) names."""
    saved = saved_modules(model)
    meant = _ending_in(model, map(unwrapped_name, saved)) - set(saved.values())
    return {path: module for path, _, module in _file_modules(model) if module in meant}


def _check_names(model: nn.Module) -> None:
    """ValueError where PEFT would save other modules too, a warning of containers and of shared modules."""
    saved, also = saved_modules(model), _also_saved(model)
    overlapping = []
    for path, module in also.items():
        others = (saved.keys() | also.keys()) - {path}
        nested = is_inside(path, others) or any(is_inside(other, [path]) for other in others)
        if nested or adapted_layers(module):
            overlapping.append(path)
    if overlapping:
        raise ValueError(
            f"save_adapter: PEFT compares the ends of names and would also save {listing(overlapping)}, in "
            f"or around what is adapted or saved, for {listing(list(saved))}; rename one"
        )
    own_names = tuple(map(unwrapped_name, saved))
    inner = [name for name in _PEFT_CHILDREN if name.endswith(own_names)]
    if inner:
        raise ValueError(
            f"save_adapter: PEFT compares the ends of names and would also save {listing(inner)} of its own "
            f"layers, for {listing(list(saved))}; rename the module"
        )
    containers = [path for path, module in (saved | also).items() if isinstance(module, _CONTAINERS)]
    if containers:
        warnings.warn(
            f"save_adapter: PEFT does not save containers such as {listing(containers)} as a whole, so "
            "PeftModel.from_pretrained refuses the file; name their children in modules_to_save instead",
            stacklevel=3,
        )
    several = _several_places(model)
    if several:
        warnings.warn(
            f"save_adapter: one module has the places {several}, of which PEFT would change only one, so "
            "PeftModel.from_pretrained will not give the same outputs; fastlora.load_adapter does",
            stacklevel=3,
        )


def _several_places(model: nn.Module) -> str:
    """The places of each adapted or saved module that has, or holds a part that has, others outside it.

    A place is a parent and the name of a child. PEFT puts another module into one of them, so a shared
    parent, by which a layer has several names, makes no difference.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    places: dict[nn.Module, dict[tuple[nn.Module, str], str]] = {}
    for path, module in modules.items():
        above, _, name = path.rpartition(".")
        places.setdefault(module, {}).setdefault((modules[above], name), unwrapped_name(path))
    several = []
    for root in (*adapted_layers(model).values(), *saved_modules(model).values()):
        inside = dict.fromkeys(root.modules())
        own = [path for m in inside for (parent, _), path in places[m].items() if parent not in inside]
        if len(own) > 1:
            several.append(", ".join(own))
    return shorten(several)


def _warn_of_experts(model: nn.Module, names: Iterable[str]) -> None:
    """Warn of layers that PEFT would not adapt: of some mixtures it takes their names for the experts'.

    transformers 5 holds all experts in one parameter. For these models PEFT rewrites targets such as up_proj,
    of dense layers and shared experts too, to that parameter.
    """
    if not any(
        name.endswith(("experts.gate_up_proj", "experts.down_proj")) for name, _ in model.named_parameters()
    ):
        return
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:
        return
    kind = getattr(getattr(model, "config", None), "model_type", None)
    family = getattr(conversion, "_MODEL_TO_CONVERSION_PATTERN", {}).get(kind)
    taken = getattr(conversion, "_MOE_TARGET_MODULE_MAPPING", {}).get(family, ())
    lost = [name for name in names if name.rpartition(".")[2] in taken]
    if lost:
        warnings.warn(
            f"save_adapter: PEFT takes {listing(lost)} of a {kind} model for its experts, so that "
            "PeftModel.from_pretrained will not give the same outputs; fastlora.load_adapter does",
            stacklevel=3,
        )


def _task_type(model: nn.Module, saved: Iterable[str]) -> str | None:
    """PEFT's task type of a transformers model; None if PEFT would then save other modules too."""
    name = type(getattr(model, COMPILED, model)).__name__
    task = next((task for ending, task in _TASKS.items() if name.endswith(ending)), None)
    config = getattr(model, "config", None)
    if config is None or (task == "SEQ_2_SEQ_LM" and not getattr(config, "is_encoder_decoder", False)):
        return None
    if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and not hasattr(model, "prepare_inputs_for_generation"):
        return None  # which PEFT's model of this task reads
    if task == "QUESTION_ANS" and not hasattr(model, "qa_outputs"):
        return None  # a model that generates its answers
    if task is not None and not _takes_peft_arguments(model):
        return None
    heads = _ending_in(model, (*saved, *_TASK_HEADS.get(task or "", ())))
    return task if heads == set(saved_modules(model).values()) else None


def _takes_peft_arguments(model: nn.Module) -> bool:
    """Whether a model accepts what PEFT's forward for a task passes; speech models do not, for example."""
    if getattr(model, "main_input_name", "input_ids") != "input_ids":
        return False
    parameters = inspect.signature(model.forward).parameters
    passed = {"input_ids", "attention_mask", "inputs_embeds"}
    passed |= {"output_attentions", "output_hidden_states", "return_dict"}
    return passed <= parameters.keys() or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _read_adapter(directory: Path) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """The config and the tensors that belong to it, even while another process replaces them."""
    path = directory / CONFIG_NAME
    while True:
        if not path.is_file():
            raise FileNotFoundError(f"load_adapter: no {CONFIG_NAME} in {directory}")
        # Stays open until the comparison, so that a new file cannot reuse its inode.
        with path.open("rb") as file:
            config, state = _parse_config(file.read(), path), _read_weights(directory)
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return config, state


def _parse_config(raw: bytes, path: Path) -> AdapterConfig:
    try:
        fields = json.loads(raw)
    except ValueError as error:
        raise ValueError(f"load_adapter: {path} is not JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"load_adapter: {path} holds a {type(fields).__name__}, expected an object")
    _check_features(fields)
    try:
        return config_from({name: _without_wrappers(value) for name, value in fields.items()})
    except (TypeError, ValueError, OverflowError, re.error) as error:
        raise ValueError(f"load_adapter: {path}: {error}") from error


def _without_wrappers(value: Any) -> Any:
    """A value of adapter_config.json without the parts that wrappers add to names in its strings."""
    if isinstance(value, str):
        wrapped = "|".join(WRAPPED)
        return re.sub(rf"(?:\\?\.)(?:{wrapped})$|(?<![^.|(^])(?:{wrapped})\\?\.", "", value)
    if isinstance(value, list):
        return [_without_wrappers(item) for item in value]
    if isinstance(value, dict):
        return {_without_wrappers(key): _without_wrappers(item) for key, item in value.items()}
    return value


def _check_features(fields: Mapping[str, Any]) -> None:
    """Raise ValueError naming every field that asks for more than plain LoRA linear layers."""
    bad = [
        f"{name}={fields.get(name)!r} (expected {' or '.join(map(repr, accepted))})"
        for name, accepted in _PLAIN.items()
        if fields.get(name) not in accepted
    ]
    bad += [f"{name}={fields[name]!r}" for name in _UNSUPPORTED if fields.get(name)]
    if bad:
        raise ValueError(f"load_adapter: not supported: {', '.join(bad)}")
    known = {*_PLAIN, *_UNSUPPORTED, *_SUPPORTED, *_WITHOUT_EFFECT}
    unknown = [f"{name}={value!r}" for name, value in fields.items() if name not in known and value]
    if unknown:
        warnings.warn(f"load_adapter: unknown fields are ignored: {', '.join(unknown)}", stacklevel=5)


def config_from(fields: Mapping[str, Any]) -> AdapterConfig:
    """Parse the fields, with PEFT's defaults for missing ones.

    Raises:
        ValueError, TypeError, OverflowError, re.error: invalid values.
    """
    targets = _expression_or_strings(fields, "target_modules")
    if not targets:
        raise ValueError(f"target_modules={fields.get('target_modules')!r}, expected names")
    layers = fields.get("layers_to_transform")
    layers = (layers,) if isinstance(layers, int) else tuple(layers or ())
    patterns = fields.get("layers_pattern")
    patterns = (patterns,) if isinstance(patterns, str) else _strings(fields, "layers_pattern")
    if isinstance(targets, str) and (layers or patterns):
        raise ValueError("layers_to_transform and layers_pattern need a list of target_modules")
    selector = Selector(
        target_modules=targets,
        exclude_modules=_expression_or_strings(fields, "exclude_modules"),
        modules_to_save=_strings(fields, "modules_to_save"),
        layers_to_transform=tuple(_integer(layer, "layers_to_transform", 0) for layer in layers),
        layers_pattern=tuple(pattern for pattern in patterns if pattern),
    )
    rank_pattern, alpha_pattern = _pattern(fields, "rank_pattern"), _pattern(fields, "alpha_pattern")
    config = AdapterConfig(
        selector=selector,
        rank=_integer(fields.get("r", 8), "r", 1),
        lora_alpha=_number(fields.get("lora_alpha", 8), "lora_alpha"),
        dropout=_number(fields.get("lora_dropout") or 0.0, "lora_dropout"),
        rslora=bool(fields.get("use_rslora")),
        rank_pattern={key: _integer(r, "rank_pattern", 1) for key, r in rank_pattern.items()},
        alpha_pattern={key: _number(a, "alpha_pattern") for key, a in alpha_pattern.items()},
        task_type=fields.get("task_type"),
    )
    check_dropout(config.dropout)
    for expression in (*rank_pattern, *alpha_pattern, *patterns, *selector.modules_to_save):
        re.compile(rf"(.*\.)?({expression})$")  # Compiled inside a larger expression, as PEFT uses them.
    for names in (selector.target_modules, selector.exclude_modules):
        if isinstance(names, str):
            re.compile(names)
    return config


def _expression_or_strings(fields: Mapping[str, Any], name: str) -> str | tuple[str, ...]:
    value = fields.get(name)
    return value if value and isinstance(value, str) else _strings(fields, name)


def _strings(fields: Mapping[str, Any], name: str) -> tuple[str, ...]:
    value = fields.get(name) or ()
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) and item for item in value):
        raise ValueError(f"{name}={value!r}, expected a list of names")
    return tuple(value)


def _pattern(fields: Mapping[str, Any], name: str) -> Mapping[str, object]:
    value = fields.get(name) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{name}={value!r}, expected an object")
    return value


def _integer(value: object, name: str, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: {value!r}, expected an integer of at least {least}")
    return value


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not is_finite(value):
        raise ValueError(f"{name}: {value!r}, expected a finite number")
    return float(value)


def _read_weights(directory: Path) -> dict[str, Tensor]:
    path = directory / WEIGHTS_NAME
    if path.is_file():
        load = _safetensors().load

        def read(path: Path) -> object:
            # load_file opens the file twice; another process might replace it in between.
            return load(path.read_bytes())

    else:
        path = directory / PICKLED_WEIGHTS_NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"load_adapter: no {WEIGHTS_NAME} or {PICKLED_WEIGHTS_NAME} in {directory}"
            )
        read = _load_pickled
    try:
        state = read(path)
    except OSError:
        raise
    except Exception as error:  # Each reader has its own exceptions for damaged files.
        raise ValueError(f"load_adapter: {path} cannot be read: {error}") from error
    if not isinstance(state, dict):
        raise ValueError(f"load_adapter: {path} holds a {type(state).__name__}, expected named tensors")
    # PEFT keeps the names of the wrappers inside the model that it was given.
    return {unwrapped_name(name) if isinstance(name, str) else name: tensor for name, tensor in state.items()}


def _load_pickled(path: Path) -> object:
    return torch.load(path, map_location="cpu", weights_only=True)


def _safetensors() -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "adapter files need the safetensors package: pip install 'fastlora-triton[peft]'"
        ) from error
    return safetensors.torch


def _find_targets(model: nn.Module, config: AdapterConfig) -> dict[str, Any]:
    """The modules that PEFT would adapt, under their (first) names."""
    selector = config.selector
    if is_all_linear(selector.target_modules):
        names = linear_names(model, exact=False, sequence_classifier=config.task_type == "SEQ_CLS")
        selector = replace(selector, target_modules=tuple(map(unwrapped_name, names)))
    targets = {path: module for path, name, module in _file_modules(model) if selector.covers(name)}
    if not targets:
        raise ValueError(f"load_adapter: target_modules {config.selector.target_modules!r} match no module")
    return targets


def _find_saved(
    model: nn.Module, config: AdapterConfig, targets: Mapping[str, nn.Module]
) -> dict[str, nn.Module]:
    """The modules that PEFT would save, under their (first) names, without any inside another."""
    meant = _ending_in(model, config.selector.modules_to_save)
    found = {path: module for path, _, module in _file_modules(model) if module in meant}
    saved = {path: module for path, module in found.items() if not is_inside(path, found.keys() - {path})}
    both = [path for path in {**targets, **adapted_layers(model)} if is_inside(path, saved)]
    if both:
        raise ValueError(f"load_adapter: {listing(both)} cannot be both adapted and in modules_to_save")
    return saved


def _check_coverage(
    model: nn.Module, layers: Mapping[str, nn.Module], targets: Mapping[str, nn.Module], saved: Iterable[str]
) -> None:
    """Raise ValueError if the model has adapters or saved modules that the file does not cover."""
    uncovered = [path for path in layers if path not in targets]
    uncovered += [path for path in saved_modules(model) if path not in saved]
    if uncovered:
        raise ValueError(
            f"load_adapter: the file does not cover {listing(uncovered)}, adapted or saved in this model; "
            "load the file into the base model"
        )


def _check_base_layers(saved: Iterable[str], targets: Iterable[str], names: Iterable[Any]) -> None:
    """Raise ValueError if PEFT has trained the base weights of ``targets``, as ``names`` in its file tell.

    It matches modules_to_save after it has wrapped the layers, so "layer" selects each "base_layer" too.
    """
    endings = [name for name in saved if "base_layer".endswith(name)]
    trained = {str(name).rpartition(".base_layer.")[0] for name in names}
    layers = [path for path in targets if _PREFIX + unwrapped_name(path) in trained]
    if endings and layers:
        raise ValueError(
            f"load_adapter: the file holds trained base weights of {listing(layers)}, which are frozen here: "
            f"PEFT compares the ends of names, and its own base_layer ends in {listing(endings)}, one of "
            "modules_to_save; rename that module, or use PEFT for this model"
        )


def _check_tensors(
    config: AdapterConfig,
    targets: Mapping[str, Any],
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
) -> None:
    """Raise ValueError unless the file holds exactly the adapters of ``targets`` and values of ``own``."""
    _check_base_layers(config.selector.modules_to_save, targets, state.keys() - own.keys())
    expected: dict[str, Sequence[int]] = {}
    for path, module in targets.items():
        name = unwrapped_name(path)
        rank = config.rank_of(name)
        expected[f"{_PREFIX}{name}.lora_A.weight"] = (rank, module.in_features)
        expected[f"{_PREFIX}{name}.lora_B.weight"] = (module.out_features, rank)
    adapters = set(expected)
    expected.update((name, tensor.shape) for name, tensor in own.items())
    check_state(expected, own, state, "load_adapter")
    wrong = []
    for name in expected:
        tensor = state[name]
        if name in adapters and tensor.dtype not in ADAPTER_DTYPES:
            wrong.append(f"{name} is {tensor.dtype}, expected a floating-point dtype")
        elif name not in adapters and _number_kind(tensor) != _number_kind(own[name]):
            wrong.append(f"{name} is {tensor.dtype}, expected {own[name].dtype}")
    if wrong:
        raise ValueError(f"load_adapter: {shorten(wrong)}")


def _number_kind(tensor: Tensor) -> tuple[bool, bool]:
    return tensor.is_floating_point(), tensor.is_complex()


def _empty_adapter(layer: FusedLoRALinear, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """A (N, rank) and B (rank, K), like the layer's except for the rank."""
    A = nn.Parameter(layer.A.new_empty(layer.out_features, rank), layer.A.requires_grad)
    B = nn.Parameter(layer.B.new_empty(rank, layer.in_features), layer.B.requires_grad)
    return A, B
