"""``fastlora.summary``: a table of what is adapted, what is trained, what runs and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fastlora.checks import check_model
from fastlora.function import problem_of
from fastlora.group import group_states
from fastlora.linear import FusedLoRALinear
from fastlora.paths import current_mode
from fastlora.planner import make_plan
from fastlora.surgery import uses_original
from fastlora.targets import adapted_layers, collapse, join_names, saved_modules

_SUMMARY_TOKENS = 4096


@dataclass(frozen=True)
class SummaryPart:
    """What another kind of adapted layer adds to :func:`summary`."""

    rows: list[tuple[str, str, str, str]]  # name, shape, rank, path
    reasons: list[str]
    closing: str


# Functions called with the model; modules that handle other kinds of layers add theirs.
summary_parts: list[Callable[[nn.Module], SummaryPart | None]] = []


def summary(model: nn.Module) -> str:
    """A table of what is adapted and trained.

    One line for each group of layers that differ only in their number: name, count, shape (out x in), rank
    and the path that would run 4096 tokens on the layer's device in its dtype (``merged`` and ``disabled``
    layers run as plain linears); then the modules to save, the parameter counts and the reason for each path.
    After ``group_projections``, a line for each kind of group says whether it runs as one, or why not. For a
    PEFT model the last line is ``fused n, fell back m: reasons``, where a reason comes from the layer's state
    or its last call.

    Args:
        model: any module; without adapters, the table has only the parameter counts.

    Returns:
        The table, as lines of text.

    Raises:
        TypeError: ``model`` is not a module.
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
        rows += [(name, str(count), shape, rank, path) for name, count in collapse(names).items()]
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
    """Which siblings run as groups, and which run alone and why."""
    states: dict[tuple[tuple[str, ...], str], list[str]] = {}
    for path, names, reason in group_states(model):
        states.setdefault((names, reason), []).append(path)
    return [
        f"{'single' if reason else 'grouped'}: {join_names(path, '/'.join(names))} ({count})"
        + (f": {reason}" if reason else "")
        for (names, reason), paths in states.items()
        for path, count in collapse(paths).items()
    ]


def _path_of(layer: FusedLoRALinear) -> tuple[str, str]:
    """The path of a layer's forward gemm for a typical number of tokens, and the reason."""
    if layer.merged:
        return "merged", ""
    if not layer.adapter_enabled:
        return "disabled", ""
    return planned_path(layer.weight, layer.A, layer.dropout if layer.training else 0.0)


def planned_path(weight: Tensor, A: Tensor, dropout: float) -> tuple[str, str]:
    """The path of the forward gemm of weight: (N, K) and A: (N, R) for typical tokens, and the reason."""
    try:
        plan = make_plan(problem_of(weight, _SUMMARY_TOKENS, weight, A, dropout), current_mode())
    except RuntimeError as error:  # use_path("triton") where the kernels cannot run
        return "none", str(error)
    return plan.path, plan.reason


def _describe_shape(module: nn.Module) -> str:
    if isinstance(module, nn.Linear):
        return f"{module.out_features} x {module.in_features}"
    return f"{sum(p.numel() for p in module.parameters()):,d}"


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with aligned columns, numbers right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    right = (False, True, True, True, False)
    return [
        "  ".join(
            cell.rjust(width) if flush else cell.ljust(width)
            for cell, width, flush in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in rows
    ]
