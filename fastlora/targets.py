"""Which modules of a model are selected: the layers to adapt and the modules to save, by PEFT's rules.

Nothing here changes a model. Modules that cannot be adapted or saved are rejected with name and reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from fastlora.linear import FusedLoRALinear, why_unusable

ALL_LINEAR = "all-linear"
# Names of the head in transformers and plain PyTorch models without get_output_embeddings().
_HEAD_NAMES = ("lm_head", "score", "classifier", "qa_outputs", "head")
# Layers, by the last parts of their names, whose weight a transformers model of these types reads without
# calling the layer, always or in its CUDA kernels. PEFT refuses out_proj in the first five.
_NEVER_CALLED = {
    "out_proj": (
        *("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"),
        *("bamba", "granitemoehybrid", "wavlm", "zamba2"),
    ),
    "dt_proj": ("falcon_mamba", "jamba", "mamba"),
    "x_proj": ("falcon_mamba", "mamba"),
    "predictions.dense": ("mobilebert",),
    # k_linear in transformers 4.
    **dict.fromkeys(("bbox_attention.k_proj", "bbox_attention.k_linear"), ("detr", "conditional_detr")),
    "kernel": (  # of a time-delay network
        *("data2vec-audio", "unispeech-sat", "wav2vec2", "wav2vec2-bert", "wav2vec2-conformer", "wavlm"),
    ),
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), ("wavlm",)),
    **dict.fromkeys(("rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"), ("layoutlmv2", "layoutlmv3")),
}
# The names of the wrappers that torch.compile, checkpoint_wrapper and FSDP1 put around a module.
COMPILED = "_orig_mod"
HIDDEN_NAMES = ("_checkpoint_wrapped_module", "_fsdp_wrapped_module")
WRAPPED = (COMPILED, *HIDDEN_NAMES)
_SHOWN = 12


@dataclass(frozen=True)
class Selector:
    """Which module names an adapter covers, by PEFT's rules; the fields are those of adapter_config.json.

    A tuple holds exact names or last parts of names (``"q_proj"`` covers ``"layers.0.q_proj"``); a string is
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
        # An exact name takes precedence over the layer numbers.
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


def is_all_linear(target_modules: Any) -> bool:
    """Whether this is PEFT's keyword for all linear layers except the head, in any capitalisation."""
    return isinstance(target_modules, str) and target_modules.lower() == ALL_LINEAR


def matches(names: str | Iterable[str], path: str) -> bool:
    """Whether a regular expression matches all of ``path``, or any of several names its last parts."""
    if isinstance(names, str):
        return re.fullmatch(names, path) is not None
    return any(path == name or path.endswith(f".{name}") for name in names)


def unwrapped_name(path: str) -> str:
    """A module's name without the parts that wrappers add."""
    return ".".join(part for part in path.split(".") if part not in WRAPPED)


def adapted_layers(model: nn.Module) -> dict[str, FusedLoRALinear]:
    """Every adapted layer of a model under its (first) name."""
    return {path: m for path, m in model.named_modules() if isinstance(m, FusedLoRALinear)}


def saved_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module that is trained and saved with the adapters, under its (first) name."""
    return {path: m for path, m in model.named_modules() if "_saved_with_adapter" in vars(m)}


def checked_names(names: str | Iterable[str], argument: str) -> tuple[str, ...]:
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
    """Every module below the root, with all its names."""
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if path:
            paths.setdefault(module, []).append(path)
    return paths


def find_saved(model: nn.Module, names: tuple[str, ...]) -> list[str]:
    """The (first) names of the new modules to save, outermost only; ValueError for one that cannot be."""
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


def find_targets(model: nn.Module, target_modules: str | Iterable[str], saved: Sequence[str]) -> list[str]:
    """The (first) names of the layers to adapt; ValueError if they are not exactly what was requested."""
    if isinstance(model, FusedLoRALinear):
        raise ValueError(f"apply_lora: the model itself already has an adapter: {model}")
    if isinstance(model, nn.Linear):
        raise ValueError(
            f"apply_lora: the model itself is the layer {model}, so it cannot be replaced in place; use "
            "FusedLoRALinear.from_linear"
        )
    modules = dict(model.named_modules())
    roots = [*(modules[path] for path in saved), *saved_modules(model).values()]
    if is_all_linear(target_modules):
        within = _modules_inside(roots)
        targets = [
            path
            for path in linear_names(model)
            if modules[path] not in within and not why_never_called(model, path)
        ]
        of_peft = [path for path, module in modules.items() if path and hasattr(module, "get_base_layer")]
        if of_peft:
            raise ValueError(
                f"target_modules: {ALL_LINEAR!r} of a model that PEFT has adapted, in {listing(of_peft)}; "
                "use either PEFT or fastlora, or name the layers"
            )
        if not targets:
            raise ValueError(
                f"target_modules: {ALL_LINEAR!r} found no nn.Linear to adapt; {available_layers(model)}"
            )
    else:
        targets = _match_targets(model, target_modules, roots)
    check_adaptable(model, {path: modules[path] for path in targets}, "target_modules")
    return targets


def check_adaptable(
    model: nn.Module, targets: Mapping[str, nn.Module], argument: str, *, called: bool = True
) -> None:
    """ValueError naming the modules that cannot be replaced by an adapted layer, and why.

    ``called``: whether layers that the model never calls are refused too.
    """
    problems: dict[str, list[str]] = {}
    for path, module in targets.items():
        why = _why_not_adaptable(model, path, module) or (why_never_called(model, path) if called else None)
        if why:
            problems.setdefault(why, []).append(path)
    if problems:
        text = shorten([f"{listing(paths)} ({why})" for why, paths in problems.items()])
        raise ValueError(f"{argument}: cannot adapt {text}")


def _match_targets(
    model: nn.Module, target_modules: str | Iterable[str], roots: Sequence[nn.Module]
) -> list[str]:
    """The (first) names of all modules that match outside ``roots``, the modules to save."""
    single = isinstance(target_modules, str)
    patterns: tuple[str, ...] = (
        (target_modules,)
        if isinstance(target_modules, str)
        else checked_names(target_modules, "target_modules")
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
        raise ValueError(f"target_modules: {pattern!r} is not a regular expression: {error}") from error
    return pattern


def linear_names(model: nn.Module, exact: bool = True, sequence_classifier: bool | None = None) -> list[str]:
    """The (first) names of all linear layers except the output head's.

    Args:
        exact: only ``nn.Linear`` itself and adapted layers; otherwise, as in PEFT, also subclasses and
            transformers' ``Conv1D``.
        sequence_classifier: whether ``score`` or ``classifier`` counts as the output head (PEFT's rule, from
            its task type); None means that the conventional names listed by :func:`apply_lora` do.
    """
    head = embeddings_of(model, "output")
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


def embeddings_of(model: nn.Module, kind: str) -> nn.Module | None:
    """The "input" or "output" embeddings that a transformers model reports, None if it has none."""
    getter = getattr(model, f"get_{kind}_embeddings", None)
    try:
        return getter() if callable(getter) else None
    except NotImplementedError:  # an image model, for example
        return None


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
        return "torch.compile wraps this layer and would keep calling the original; compile after adapting"
    return why_unusable(module)


def why_never_called(model: nn.Module, path: str) -> str | None:
    """Why an adapter on the layer called ``path`` would do nothing until it is merged, None if it would."""
    name = unwrapped_name(path)
    types = [kind for last, kinds in _NEVER_CALLED.items() if matches((last,), name) for kind in kinds]
    if not types:
        return None
    above = [getattr(getattr(m, "config", None), "model_type", None) for m in _ancestors(model, path)]
    found = next((name for name in above if name in types), None)
    return found and f"{found} reads its weight without calling it, always or in its CUDA kernels"


def _ancestors(model: nn.Module, path: str) -> list[nn.Module]:
    """The modules on the path to the one called ``path``, from the model itself to its parent."""
    modules = [model]
    for name in path.split(".")[:-1]:
        modules.append(modules[-1].get_submodule(name))
    return modules


def available_layers(model: nn.Module) -> str:
    """A short list of a model's nn.Linear layers, for error messages."""
    names = [path for path, m in model.named_modules() if path and type(m) is nn.Linear]
    if names:
        return f"the model's nn.Linear layers are {listing(names)}"
    return f"the model has no nn.Linear, only {shorten(sorted({type(m).__name__ for m in model.modules()}))}"


def listing(paths: Sequence[str]) -> str:
    """Names for an error message, with those that differ only in numbers combined."""
    return shorten(list(collapse(paths)))


def shorten(items: Sequence[str]) -> str:
    more = f", and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more


def collapse(paths: Iterable[str]) -> dict[str, int]:
    """Combine names that differ only in a number, with their count: layers.{0..5}.query -> 6."""
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
