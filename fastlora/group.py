"""Layers that share their input: ``lora_linear_group`` and, in whole models, ``group_projections``.

The functional form computes h of all branches in one pass over x and the gradient of x in one product. In a
model, a group exists only during one call of the layers' parent: a hook passes the parent its input as a new
tensor object that carries a :class:`_Call`. The first projection called with this object computes the outputs
of all, the others take theirs from the call, and a second hook empties it when the parent returns. No state
is kept on layers or threads, and ``torch.compile`` and checkpointing trace it like any other code.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastlora import masks, ops, reference
from fastlora.checks import as_number, check_model
from fastlora.dtensors import is_wrapper, shared_seed, with_whole_gradients
from fastlora.function import (
    PLAIN_TENSORS,
    Operands,
    autocast_on,
    check_arguments,
    compute_dtype,
    creates_graph,
    lora_linear,
    needs_plain_operations,
    quick_apply,
)
from fastlora.kernels.configs import MAX_BRANCHES, MAX_RANK
from fastlora.paths import current_mode

# Children of one parent that are called with the same tensor.
SIBLINGS = (
    ("q_proj", "k_proj", "v_proj"),  # Llama and most others
    ("query", "key", "value"),  # BERT, ViT
    ("q", "k", "v"),  # T5
    ("q_lin", "k_lin", "v_lin"),  # DistilBERT, XLM
    ("query_proj", "key_proj", "value_proj"),  # DeBERTa
    ("to_q", "to_k", "to_v"),  # diffusers
    ("q_proj", "q_a_proj", "kv_a_proj_with_mqa"),  # DeepSeek, which has one of the first two
    ("in_proj_qkvz", "in_proj_ba"),  # Qwen3-Next
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),  # Qwen3.5
    ("gate_proj", "up_proj"),  # Llama and most others
    ("wi_0", "wi_1"),  # T5
    ("w1", "w3"),  # Llama as published, torchtune
)
# The key of the hooks on every parent. Compiled code is guarded on hook keys, so different ones would cause a
# recompilation for each of a model's blocks. PyTorch's own keys count up from 0.
_HOOK_KEY = -1


class _LoRALinearGroup(torch.autograd.Function):
    """x: (..., K) -> y: (..., N_i) of each branch and, for backward only, h: (M, sum of R_i)."""

    @staticmethod
    def forward(x, dropout, seed, mode, alphas, *tensors):
        return tuple(ops.group_forward(x, *_by_kind(tensors), alphas, dropout, seed, mode))

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, dropout, seed, mode, alphas, *tensors = inputs
        h = output[-1]
        ctx.mark_non_differentiable(h)
        ctx.set_materialize_grads(False)
        _, need_As, need_Bs, _ = _by_kind(ctx.needs_input_grad[5:])
        weights, As, Bs, _ = _by_kind(tensors)
        if not ctx.needs_input_grad[0]:
            weights = [None] * len(weights)
        kept = x if any(need_Bs) else None, h if any(need_As) else None, seed, *weights, *As, *Bs
        ctx.save_for_backward(*kept)
        ctx.dropout, ctx.mode, ctx.alphas = dropout, mode, alphas

    @staticmethod
    def backward(ctx, *dys):
        dys = dys[:-1]
        n = len(dys)
        if all(dy is None for dy in dys):
            return (None,) * (5 + 4 * n)
        x, h, seed, *tensors = ctx.saved_tensors
        weights, As, Bs = tensors[:n], tensors[n : 2 * n], tensors[2 * n :]
        need_dx = ctx.needs_input_grad[0]
        _, need_dA, need_dB, need_dbias = _by_kind(ctx.needs_input_grad[5:])
        needed = need_dx, need_dA, need_dB, need_dbias
        arguments = dys, x, weights, As, Bs, h, ctx.alphas, ctx.dropout, seed, *needed
        if creates_graph():
            dx, dB, *others = ops.recorded_group_backward(*arguments)
        else:
            dx, dB, *others = ops.group_backward(*arguments, ctx.mode)
        used = [dy is not None for dy in dys]
        dBs = [None] * n
        first = 0
        for i, B in enumerate(Bs):
            if used[i] and need_dB[i]:
                dBs[i] = dB[first : first + B.shape[0]].to(B.dtype)
                first += B.shape[0]
        dAs = [g if used[i] and need_dA[i] else None for i, g in enumerate(others[:n])]
        dbiases = [g if used[i] and need_dbias[i] else None for i, g in enumerate(others[n:])]
        return dx if need_dx else None, None, None, None, None, *[None] * n, *dAs, *dBs, *dbiases


_apply = quick_apply(_LoRALinearGroup)


def _by_kind(values: Sequence) -> tuple[list, list, list, list]:
    """Split a sequence of entries for all weights, then all As, Bs and biases, into these four parts."""
    n = len(values) // 4
    weights, As, Bs, biases = (list(values[i * n : (i + 1) * n]) for i in range(4))
    return weights, As, Bs, biases


def _chunks(ranks: Sequence[int]) -> Iterator[slice]:
    """Runs of branches that fit in one launch: up to MAX_BRANCHES, with a total rank of up to MAX_RANK."""
    start = 0
    for stop in range(1, len(ranks) + 1):
        if stop == len(ranks) or stop - start == MAX_BRANCHES or sum(ranks[start : stop + 1]) > MAX_RANK:
            yield slice(start, stop)
            start = stop


def _check_branches(
    x: Tensor,
    weights: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    alphas: Sequence[float],
    biases: Sequence[Tensor | None],
    dropout: float,
    seed: Tensor | None,
) -> None:
    """Raise the errors of ``lora_linear``, with the number of the branch."""
    for i, (weight, A, B, alpha, bias) in enumerate(zip(weights, As, Bs, alphas, biases, strict=True)):
        try:
            check_arguments(x, weight, A, B, alpha, bias, dropout, seed)
        except (TypeError, ValueError) as error:
            text = str(error).removeprefix("lora_linear: ")
            raise type(error)(f"lora_linear_group: branch {i}: {text}") from None


def _sequences(arguments: dict[str, object]) -> list[list]:
    """Each argument as a list; TypeError for a non-sequence, ValueError unless all have the same length."""
    lists = {}
    for name, values in arguments.items():
        if isinstance(values, (str, Tensor)) or not hasattr(values, "__iter__"):
            raise TypeError(
                f"lora_linear_group: {name} must be a sequence with an entry for each branch, "
                f"got {type(values).__name__}"
            )
        lists[name] = list(values)
    sizes = {len(values) for values in lists.values()}
    if len(sizes) != 1 or sizes == {0}:
        counts = ", ".join(f"{len(values)} {name}" for name, values in lists.items())
        raise ValueError(
            f"lora_linear_group: expected an entry for each of one or more branches, got {counts}"
        )
    return list(lists.values())


def lora_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    As: Sequence[Tensor],
    Bs: Sequence[Tensor],
    alphas: Sequence[float],
    biases: Sequence[Tensor | None] | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """:func:`fastlora.lora_linear` for layers that share one x, such as q/k/v or gate/up, in fewer passes.

    Forward reads x once for the h of all branches; backward computes the gradient of x in one product and
    those of all Bs in one pass over x. Branches may differ in out_features, rank, alpha and bias; all drop
    the same elements of x. Gradients flow to x and each A, B and bias. Besides x, M * (sum of R_i) elements
    are kept for backward.

    Args:
        x: (..., K), as in ``lora_linear``.
        weights: (N_i, K), frozen, in x's dtype (any floating dtype under autocast).
        As: (N_i, R_i). Bs: (R_i, K). Float32 adapters on a half-precision base are allowed.
        alphas: the multiplier of each update.
        biases: (N_i,) or None for each branch; None if no branch has a bias.
        dropout: probability in [0, 1] of dropping an element of the updates' input.
        seed: one-element int64 tensor that determines the dropout mask; drawn from torch's generator if None.

    Returns:
        (..., N_i) for each branch, in x's dtype (autocast's if it is on).

    Raises:
        ValueError: sequences that are empty or differ in length, and anything ``lora_linear`` rejects, with
            the number of the branch.
        TypeError: an argument that is not a sequence, or an entry that is not a tensor or number.
        RuntimeError: as ``lora_linear``.
    """
    given: dict[str, object] = {"weights": weights, "As": As, "Bs": Bs, "alphas": alphas}
    if biases is not None:
        given["biases"] = biases
    weights, As, Bs, alphas, *given_biases = _sequences(given)
    biases = given_biases[0] if given_biases else [None] * len(weights)
    alphas = [as_number(alpha) for alpha in alphas]
    _check_branches(x, weights, As, Bs, alphas, biases, dropout, seed)
    alphas, dropout = [float(alpha) for alpha in alphas], float(dropout)
    if autocast_on(x):
        dtype = compute_dtype(x)
        # Casting here, outside the function, gives every gradient its tensor's own dtype.
        x, weights, As, Bs = x.to(dtype), *([t.to(dtype) for t in ts] for ts in (weights, As, Bs))
        biases = [None if bias is None else bias.to(dtype) for bias in biases]
    tensors = [*weights, *As, *Bs, *biases]
    present = [t for t in (x, *tensors) if t is not None]
    if not set(map(type, present)) <= PLAIN_TENSORS and any(map(is_wrapper, present)):
        # These have no storage that a kernel could read; PyTorch's own operations handle them.
        if dropout > 0.0 and seed is None:
            seed = shared_seed(x)
        As, Bs = with_whole_gradients(As), with_whole_gradients(Bs)
        return reference.lora_linear_group(x, weights, As, Bs, alphas, biases, dropout, seed)
    if needs_plain_operations():
        return reference.lora_linear_group(x, weights, As, Bs, alphas, biases, dropout, seed)
    if dropout == 0.0:
        seed = None
    elif seed is None:
        # Drawn outside the operator, so that checkpointing recomputes with the same seed.
        seed = masks.new_seed(x.device)
    results: list[Tensor] = []
    for chunk in _chunks([B.shape[0] for B in Bs]):
        parts = (weights[chunk], As[chunk], Bs[chunk], alphas[chunk], biases[chunk])
        results += _fused(x, *parts, dropout, seed)
    return tuple(results)


def _fused(
    x: Tensor,
    weights: list[Tensor],
    As: list[Tensor],
    Bs: list[Tensor],
    alphas: list[float],
    biases: list[Tensor | None],
    dropout: float,
    seed: Tensor | None,
) -> Sequence[Tensor]:
    """The results of branches that fit in one launch; the arguments have been checked."""
    if len(weights) == 1:
        return [lora_linear(x, weights[0], As[0], Bs[0], alphas[0], biases[0], dropout, seed)]
    mode = current_mode()
    tensors = (*weights, *As, *Bs, *biases)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *tensors)):
        if torch.compiler.is_compiling():
            tensors = _distinct(tensors)  # dynamo accepts no tensor twice
        return _apply(x, dropout, seed, mode, alphas, *tensors)[:-1]
    return ops.group_forward(x, weights, As, Bs, biases, alphas, dropout, seed, mode)[:-1]


def _distinct(tensors: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The tensors, with each repeated one (such as a B that branches share) replaced by a view."""
    distinct: list[Tensor | None] = []
    for t in tensors:
        if t is not None and any(t is other for other in distinct):
            t = t.view_as(t)
        distinct.append(t)
    return tuple(distinct)


class _Call:
    """One call of a parent: the groups not computed yet, and computed outputs not yet taken."""

    def __init__(self, owner: _Siblings, groups: list[tuple[nn.Module, ...]]) -> None:
        self.owner = owner
        self.groups = groups
        self.recording = _recording()
        self.waiting: list[tuple[nn.Module, tuple, Tensor]] = []

    def output_of(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """The layer's output for x, which carries this call; None if the layer has to compute alone."""
        state = _state(x)
        for i in range(len(self.waiting)):
            waiting, then, y = self.waiting[i]
            if waiting is layer:
                del self.waiting[i]
                return y if then == state else None
        for i in range(len(self.groups)):
            group = self.groups[i]
            if layer in group:
                del self.groups[i]  # Once per call of the parent: a layer called again computes alone.
                return self._compute(group, layer, x, state)
        return None

    def _compute(
        self, group: tuple[nn.Module, ...], layer: nn.Module, x: Tensor, state: tuple
    ) -> Tensor | None:
        branches = _branches(group, x)
        # A checkpoint inside the parent recomputes outside this call, where every layer computes alone.
        if isinstance(branches, str) or self.recording != _recording():
            return None
        weights, biases, As, Bs, alphas, dropouts = zip(*branches, strict=True)
        ys = lora_linear_group(x, weights, As, Bs, alphas, biases, dropouts[0])
        own = None
        for member, y in zip(group, ys, strict=True):
            if member is layer:
                own = y
            else:
                self.waiting.append((member, state, y))
        return own

    def close(self) -> bool:
        """Drop everything; return whether an output was not taken."""
        unused = bool(self.waiting)
        self.groups, self.waiting = [], []
        return unused


def _state(x: Tensor) -> tuple:
    """The state, besides its parameters and the identity of x, that a layer's output depends on."""
    autocast = autocast_on(x)
    return (
        # A compiled graph has no version of x, so a parent that changes x in place between two projections is
        # not supported there.
        0 if torch.compiler.is_compiling() else x._version,
        _recording(),
        autocast and torch.get_autocast_dtype(x.device.type),
        current_mode(),
    )


def _recording() -> tuple:
    """What is recorded for backward, and how: a checkpoint changes either."""
    hooks = None
    if not torch.compiler.is_compiling():
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return torch.is_grad_enabled(), hooks


def _branches(group: Sequence[Any], x: Tensor | None) -> list[Operands] | str:
    """The layers' operands for x, or why they run alone; with x None, as far as can be told without it."""
    branches = []
    for layer in group:
        branch = layer._group_branch(x)
        if isinstance(branch, str):
            return branch
        branches.append(branch)
    if any(branch.weight.dim() != 2 for branch in branches):
        return "sharded or otherwise special parameters"  # FSDP1's are flat
    weight, dropout = branches[0].weight, branches[0].dropout
    for other in branches[1:]:
        if other.weight.shape[1] != weight.shape[1]:
            return f"in_features {weight.shape[1]} and {other.weight.shape[1]} differ"
        if other.weight.dtype != weight.dtype or other.weight.device != weight.device:
            return "dtypes or devices differ"
        if other.dropout != dropout:
            return f"dropout {dropout:g} and {other.dropout:g} differ"
    return branches


class _Siblings:
    """The groups of one parent, by the names of its children; its methods are the parent's two hooks."""

    def __init__(self, groups: Sequence[tuple[str, ...]]) -> None:
        self.groups = tuple(groups)
        # Groups that turned out to be called with different tensors.
        self.apart: set[tuple[str, ...]] = set()
        # Whether the last call had no input that all of them may be meant to take.
        self.without_input = False

    def members(self, parent: nn.Module, names: tuple[str, ...]) -> tuple[Any, ...] | str:
        """The group's layers, or why they do not form a group at present."""
        layers = tuple([parent._modules.get(name) for name in names])
        for name, layer in zip(names, layers, strict=True):
            if not hasattr(type(layer), "_group_branch"):
                return f"{name} is {type(layer).__name__}"
        return layers

    def before(self, parent: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Pass the parent its input as a new tensor object that carries the call."""
        # In training a checkpoint recomputes what its forward pass did, whatever was learned in between.
        # Reentrant ones run forward without gradients, so parent.training has to tell.
        apart = set() if torch.is_grad_enabled() or parent.training else self.apart
        groups = []
        for names in self.groups:
            layers = self.members(parent, names)
            if names not in apart and not isinstance(layers, str):
                groups.append(layers)
        if not groups:
            return None
        x = _only_input((*args, *kwargs.values()), groups[0][0].in_features)
        if not torch.compiler.is_compiling():
            self.without_input = x is None
        if x is None:
            return None
        if x.requires_grad and not torch.is_grad_enabled():
            with torch.enable_grad():  # The parent may turn grad mode on again.
                alias: Any = x.view_as(x)
        else:
            alias = x.view_as(x)
        alias._fastlora_call = _Call(self, groups)
        return (
            tuple([alias if value is x else value for value in args]),
            {name: alias if value is x else value for name, value in kwargs.items()},
        )

    def after(self, parent: nn.Module, args: tuple, kwargs: dict, result: object) -> None:
        """Empty the call, even if the parent raised an exception (``result`` is then None)."""
        for value in (*args, *kwargs.values()):
            call = getattr(value, "_fastlora_call", None) if isinstance(value, Tensor) else None
            if call is None or call.owner is not self:
                continue
            if not torch.compiler.is_compiling():
                del value._fastlora_call  # The parent may have returned it.
            left = [layer for layer, _, _ in call.waiting]
            if call.close() and result is not None and not torch.compiler.is_compiling():
                for names in self.groups:
                    if any(parent._modules.get(name) in left for name in names):
                        self.apart.add(names)


def _only_input(values: Sequence[Any], K: int) -> Tensor | None:
    """The only tensor among a parent's arguments that can be its layers' input, None if ambiguous.

    Cross attention has two, and the input of k and v would be a guess.
    """
    found: Any = None
    for value in values:
        if type(value) not in PLAIN_TENSORS or value.dim() == 0 or value.shape[-1] != K or value is found:
            continue
        if not value.is_floating_point() or (found is not None and value.dim() != found.dim()):
            continue
        if found is not None:
            return None
        found = value
    # Inference tensors have no version counter, so in-place changes would go unnoticed.
    if found is None or (not torch.compiler.is_compiling() and found.is_inference()):
        return None
    return found


def _adapted(module: nn.Module | None) -> bool:
    return hasattr(type(module), "_group_branch")


def _hooked_parents(model: nn.Module) -> Iterator[tuple[str, nn.Module, _Siblings]]:
    for path, module in model.named_modules():
        for hook in list(module._forward_pre_hooks.values()):
            siblings = getattr(hook, "__self__", None)
            if isinstance(siblings, _Siblings):
                yield path, module, siblings


def group_projections(model: nn.Module) -> nn.Module:
    """Let adapted sibling layers of a model, such as q/k/v and gate/up, run as groups, in place.

    Siblings are children of one module called q_proj, k_proj and v_proj, or gate_proj and up_proj, or what
    other families call these (``fastlora.group.SIBLINGS``); two or more with adapters form a group, after
    ``apply_lora`` as after ``fuse_peft``. The first one called with the parent's own input computes the
    outputs of all by :func:`lora_linear_group`; the others, if called with the same tensor object, take
    theirs. Values and gradients are the same up to rounding; in training with dropout the siblings share
    one mask. Only hooks are added to the parents: layers, parameters and names stay. Siblings compute alone
    wherever the group would not give the same: called with different tensors (cross attention) or outside
    the parent, merged or disabled adapters, hooks on them, sharded weights, different dropouts, inference
    mode. :func:`fastlora.summary` lists the reasons. That siblings take different tensors shows in a call
    and is heeded in later ones for inference; in training each call computes all of them. Within one call
    of the parent, parameters and alphas must not change between the calls of siblings, nor, in compiled code,
    the values of their input.

    One autograd node stands for all siblings of a group. If only some of their outputs are used, the adapters
    of the others get no gradient, as without groups; but their gradient hooks are called, with None, and
    compiled code gives them gradients of zeros.

    Args:
        model: any module; a second call searches for siblings anew.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: no siblings with adapters. The model is left unchanged.
    """
    check_model(model, "group_projections")
    found = {}
    for module in model.modules():
        groups = [tuple(n for n in names if _adapted(module._modules.get(n))) for names in SIBLINGS]
        groups = [names for names in groups if len(names) > 1]
        if groups:
            found[module] = groups
    if not found:
        wanted = ", ".join("/".join(names) for names in SIBLINGS)
        adapted = [path for path, module in model.named_modules() if _adapted(module)]
        raise ValueError(
            f"group_projections: found no siblings: expected at least two of {wanted} in one module, adapted "
            "by apply_lora, or by get_peft_model and then fuse_peft; "
            + (f"adapted layers: {', '.join(adapted[:12])}" if adapted else "the model has no adapted layer")
        )
    ungroup_projections(model)
    for module, groups in found.items():
        siblings = _Siblings(groups)
        module.register_forward_pre_hook(siblings.before, with_kwargs=True)
        module.register_forward_hook(siblings.after, with_kwargs=True, always_call=True)
        for hooks, *marks in _hooks_of(module):
            for key in [k for k, hook in hooks.items() if _is_ours(hook, siblings)]:
                for kept in (hooks, *marks):
                    kept[_HOOK_KEY] = kept.pop(key)
    return model


def _hooks_of(module: nn.Module) -> Iterator[tuple[dict, ...]]:
    """A module's hook dictionaries, each with those in which PyTorch records flags under the same keys."""
    yield module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs
    yield module._forward_hooks, module._forward_hooks_with_kwargs, module._forward_hooks_always_called


def _is_ours(hook: object, siblings: _Siblings) -> bool:
    return getattr(hook, "__self__", None) is siblings


def ungroup_projections(model: nn.Module) -> nn.Module:
    """Undo :func:`group_projections`; no effect if nothing is grouped.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is not a module.
    """
    check_model(model, "ungroup_projections")
    for _, module, siblings in list(_hooked_parents(model)):
        for hooks, *marks in _hooks_of(module):
            for key in [k for k, hook in hooks.items() if _is_ours(hook, siblings)]:
                del hooks[key]
                for mark in marks:
                    mark.pop(key, None)
    return model


def group_states(model: nn.Module) -> Iterator[tuple[str, tuple[str, ...], str]]:
    """(parent, names of its children, why they run alone or "") of every group of a model."""
    for path, module, siblings in _hooked_parents(model):
        for names in siblings.groups:
            layers = siblings.members(module, names)
            branches = layers if isinstance(layers, str) else _branches(layers, None)
            why = ""
            if siblings.without_input:
                why = "no one input that all may take in the last call"
            elif names in siblings.apart:
                why = "not all of them take the same tensor (in training, the first still computes all)"
            yield path, names, branches if isinstance(branches, str) else why
