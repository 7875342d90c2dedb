"""``disable_adapter``: the frozen model inside a block, without writing to any parameter.

During the block, the tensors that a module trains are replaced by the frozen ones. FSDP2 would put its own
parameters back, so there the values in the shards are exchanged instead.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastlora.dtensors import any_dtensor, sharded_like
from fastlora.linear import PUT_ASIDE, FusedLoRALinear, _keep_fast_path_off
from fastlora.surgery import (
    ORIGINAL,
    adapted_encoders,
    fully_sharded,
    require_layers,
    saved_tensors,
)
from fastlora.targets import is_inside, listing, saved_modules


@contextmanager
def disable_adapter(model: nn.Module) -> Iterator[nn.Module]:
    """Inside the block the model is the frozen base: no updates, and saved modules have original values.

    For example, as the reference model of DPO.

    - Blocks may nest and overlap, even across threads: the model stays the base until the last ends.
    - Parameter values are not written (except in FSDP2's shards, which no graph refers to), so autograd
      graphs from outside the block stay valid. A checkpoint recomputed inside the block recomputes the frozen
      model: call ``backward`` outside.
    - Casts and device moves made inside the block persist. A copy of the model made inside stays frozen.
    - For saved modules, ``state_dict`` warns that it holds original values and ``load_state_dict`` raises
      ValueError. ``model.zero_grad()`` does not reach the gradients of their trained values, an optimizer's
      ``zero_grad`` does.
    - Of a saved module's buffers, the persistent ones have their original values; the others, caches by
      convention, stay as they are.
    - A merged layer has its unmerged weight inside the block (the original up to rounding).
    - For a model sharded by FSDP2, pass the whole model, not a part of it; its saved modules and merged
      layers refuse a forward pass that records gradients.

    Args:
        model: with at least one adapted layer (a PEFT model has a ``disable_adapter`` of its own).

    Returns:
        A context manager that yields ``model``.

    Raises:
        ValueError: on entry, if the model has no adapted layer, or a saved module whose original values are
            unknown (it was on the meta device when it was marked, or has been parametrized since) or cannot
            be put in place (it is offloaded, which would bring the trained values back).
        TypeError: on entry, if ``model`` is not a module.
    """
    layers = require_layers(model, "disable_adapter")
    for path, layer in layers.items():
        if layer.merged:
            layer._check_values(f"disable_adapter: {path}")
    roots = saved_modules(model)
    _check_replaceable(roots)
    unknown = [path for path, root in roots.items() if not _has_original(root)]
    if unknown:
        raise ValueError(
            f"disable_adapter: the original values of {listing(unknown)} are unknown: it was on the meta "
            "device when it was marked to be saved, or has been parametrized since"
        )
    sharded = fully_sharded(model)
    with ExitStack() as blocks:
        for path, layer in layers.items():
            holders = _holders(sharded, path, layer)
            blocks.enter_context(_changed(layer, partial(_disable_layer, holders)))
        for path, root in roots.items():
            holders = _holders(sharded, path, root)
            blocks.enter_context(_changed(root, partial(_use_original, holders)))
        for encoder in adapted_encoders(model):
            if hasattr(encoder, "_used_nested_tensor"):
                blocks.enter_context(_changed(encoder, _use_nested_tensors))
        yield model


def _check_replaceable(roots: Mapping[str, nn.Module]) -> None:
    """Raise ValueError for offloaded saved modules, whose trained values would return in a forward pass."""
    offloaded = [
        path
        for path, root in roots.items()
        if _has_original(root) and any(t.is_meta for m in root.modules() for _, t in saved_tensors(m))
    ]
    if offloaded:
        raise ValueError(
            f"disable_adapter: {listing(offloaded)} on the meta device, offloaded by accelerate, say: "
            "its trained values would come back in the forward pass"
        )


# The modules that blocks of disable_adapter have changed: how to undo it, and how many blocks are open.
_changes: WeakKeyDictionary[nn.Module, tuple[ExitStack, int]] = WeakKeyDictionary()
_changes_lock = threading.RLock()
# One module for each block that has ended and is still counted. While a thread counts, the garbage collector
# may end an abandoned block in the same thread, which then must not count as well.
_ended: list[nn.Module] = []
_counting = False


@contextmanager
def _changed(module: nn.Module, change: Callable[[Any, ExitStack], None]) -> Iterator[None]:
    """Run ``change(module, undo)`` in the first block that uses the module, and undo it after the last."""
    _begin_block(module, change)
    try:
        _end_blocks()
        yield
    finally:
        _ended.append(module)
        _end_blocks()


def _begin_block(module: nn.Module, change: Callable[[Any, ExitStack], None]) -> None:
    global _counting
    with _changes_lock:
        counting, _counting = _counting, True
        try:
            undo, blocks = _changes.get(module, (ExitStack(), 0))
            try:
                if not blocks:
                    change(module, undo)
                _changes[module] = undo, blocks + 1
            except BaseException:
                if not blocks:
                    undo.close()
                raise
        finally:
            _counting = counting


def _end_blocks() -> None:
    """Count the blocks that have ended, or leave them to whoever is counting, further down or next."""
    global _counting
    with _changes_lock:
        while not _counting:
            _counting = True
            try:
                while _ended:
                    module = _ended.pop()
                    undo, blocks = _changes.pop(module)
                    if blocks > 1:
                        _changes[module] = undo, blocks - 1
                    else:
                        undo.close()
            finally:
                _counting = False
            if not _ended:
                break


def _set(module: nn.Module, attribute: str, value: object, undo: ExitStack) -> None:
    undo.callback(setattr, module, attribute, getattr(module, attribute))
    setattr(module, attribute, value)


class _PutAside(nn.Module):
    """A child that holds what disable_adapter has taken out of a module, so that casts and moves reach it.

    A copy of the model gets an empty one. Its forward is the identity, for parents that call their children
    in turn.
    """

    def forward(self, x: Any) -> Any:
        return x

    def __deepcopy__(self, memo: dict) -> _PutAside:
        return _PutAside()

    def __reduce__(self) -> tuple:
        return _PutAside, ()


def _exchange(module: nn.Module, name: str, tensor: Tensor, undo: ExitStack) -> None:
    """Replace a module's own tensor by another."""
    own = getattr(module, name)
    kept = own.detach() if isinstance(own, nn.Parameter) else own
    aside: Any = module._modules.get(PUT_ASIDE)
    if aside is None:
        aside = _PutAside()
        module.add_module(PUT_ASIDE, aside)
    aside.register_buffer(name, kept, persistent=False)
    undo.callback(_put_back, module, name, own, kept)
    setattr(module, name, tensor)


def _exchange_parameter(
    holders: Sequence[Any], module: nn.Module, name: str, values: Tensor, undo: ExitStack
) -> None:
    """Replace a parameter by a frozen one with these values; ``holders``: see :func:`_holders`."""
    own = getattr(module, name)
    if holders and any_dtensor(own):
        _exchange_values(own, sharded_like(own, values), undo)
    else:
        _exchange(module, name, nn.Parameter(values, requires_grad=False), undo)


def _put_back(module: nn.Module, name: str, own: Any, kept: Tensor) -> None:
    aside: Any = module._modules[PUT_ASIDE]
    now: Any = aside._buffers.pop(name)
    if not aside._buffers:
        del module._modules[PUT_ASIDE]
    if not isinstance(own, nn.Parameter):
        own = now
    elif now is not kept and torch._has_compatible_shallow_copy_type(own, now):
        # As in nn.Module.to, so that optimizers keep the parameter object.
        own.data = now
        own.grad = None if own.grad is None else own.grad.to(now)
    elif now is not kept:
        own = nn.Parameter(now, own.requires_grad)
    setattr(module, name, own)


def _disable_layer(holders: Sequence[Any], layer: FusedLoRALinear, undo: ExitStack) -> None:
    if layer._merged_alpha is not None:
        # A new tensor rather than unmerge() and merge(), which would round the weight each time.
        with _sharded(holders, layer, undo):
            weight = layer._updated_weight(-layer._merged_alpha)
            _exchange_parameter(holders, layer, "weight", weight, undo)
        _set(layer, "_merged_alpha", None, undo)
    _set(layer, "adapter_enabled", False, undo)
    # Without the hook, TransformerEncoderLayer takes its fast path, as in the base model; the slow path's
    # results differ in the last bits.
    hooks = layer._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is _keep_fast_path_off]:
        undo.callback(hooks.__setitem__, key, hooks.pop(key))


def _use_nested_tensors(encoder: nn.TransformerEncoder, undo: ExitStack) -> None:
    _set(encoder, "use_nested_tensor", encoder._used_nested_tensor, undo)


def _has_original(root: nn.Module) -> bool:
    return all(ORIGINAL + name in m._buffers for m in root.modules() for name, _ in saved_tensors(m))


def _use_original(holders: Sequence[Any], root: nn.Module, undo: ExitStack) -> None:
    _set(root, "_saved_with_adapter", "original", undo)
    undo.callback(root.register_state_dict_pre_hook(_warn_of_original).remove)
    with _sharded(holders, root, undo):
        for module in list(root.modules()):
            undo.callback(module.register_load_state_dict_pre_hook(_refuse_loading).remove)
            for name, _ in list(saved_tensors(module)):
                original: Any = module._buffers[ORIGINAL + name]
                if name in module._parameters:
                    _exchange_parameter(holders, module, name, original, undo)
                else:
                    # A copy, as a forward pass writes buffers such as BatchNorm's running mean.
                    _exchange(module, name, original.clone(), undo)


def _holders(sharded: Mapping[str, Any], path: str, module: nn.Module) -> list[Any]:
    """The modules sharded by FSDP2 that contain the one called ``path`` or are inside it."""
    inside = set(module.modules()) if sharded else set()
    return [m for name, m in sharded.items() if not name or is_inside(path, (name,)) or m in inside]


@contextmanager
def _sharded(holders: Sequence[Any], module: nn.Module, undo: ExitStack) -> Iterator[None]:
    """Keep ``module`` resharded while other values are put in, and again while they are taken out."""
    if holders:
        undo.callback(_reshard, holders)
        # A backward pass would gather the module's own values, which may have been restored by then.
        undo.callback(module.register_forward_pre_hook(_refuse_gradients).remove)
        _reshard(holders)
    yield
    if holders:
        undo.callback(_reshard, holders)


def _reshard(holders: Iterable[Any]) -> None:
    for holder in holders:
        holder.reshard()


def _refuse_gradients(module: nn.Module, inputs: tuple) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"disable_adapter: {type(module).__name__} is sharded by fully_shard, whose backward pass would "
            "gather the trained values again: use torch.no_grad() inside"
        )


@torch.no_grad()
def _exchange_values(parameter: Any, values: Tensor, undo: ExitStack) -> None:
    """Write other values into a parameter that FSDP2 holds, as FSDP2 would undo a replacement.

    Graphs from outside the block refer to the gathered tensors and gather again for their backward pass.
    """
    kept = parameter.detach().clone()
    undo.callback(_write, parameter, kept)
    _write(parameter, values)


@torch.no_grad()
def _write(parameter: Tensor, values: Tensor) -> None:
    if parameter.device.type == "cpu" and torch.cuda.is_initialized():
        torch.cuda.synchronize()  # An offloaded shard may still be in transfer to the GPU.
    parameter.copy_(values)


def _refuse_loading(module: nn.Module, state: Mapping[str, Any], prefix: str, *_: Any) -> None:
    with _changes_lock:
        roots = list(_changes)
    # A copy made inside the block has this hook as well, but is not what the block changed.
    if not any(module is m for root in roots for m in root.modules()):
        return
    # BatchNorm puts a counter of its own into a state that lacks it.
    own = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    if any(name.startswith(prefix) and id(value) not in own for name, value in state.items()):
        raise ValueError(
            f"load_state_dict inside disable_adapter: {prefix.removesuffix('.') or type(module).__name__} "
            "has its original values inside the block, and loading would overwrite them"
        )


def _warn_of_original(root: nn.Module, prefix: str, keep_vars: bool) -> None:
    warnings.warn(
        f"state_dict inside disable_adapter: {prefix.removesuffix('.') or type(root).__name__} holds its "
        "original values there, not the trained ones",
        stacklevel=4,
    )
