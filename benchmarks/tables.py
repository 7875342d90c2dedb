"""The three kinds of problems that the benchmarks measure, each with its providers and modes.

A new kind needs a shape, a problem with the members of :class:`problem.AnyProblem`, and providers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from group_providers import GROUP_PROVIDERS, make_group_problem
from model_providers import MODEL_PROVIDERS, make_model_problem
from problem import AnyProblem, make_problem
from providers import FLOOR, PROVIDERS, Provider
from shapes import DECODE_TOKENS, AnyShape, GroupShape, ModelShape, Shape

TRAINING = ("forward", "backward", "both")
# Up to this many tokens, inference of one layer is measured: there the host's share of a call matters.
INFERENCE_TOKENS = 64


@dataclass(frozen=True)
class Kind:
    """``make``: a shape's problem, called like :func:`problem.make_problem`. ``modes``: a shape's modes."""

    providers: Mapping[str, Provider]
    make: Callable[..., AnyProblem]
    modes: Callable[[AnyShape], tuple[str, ...]]


def _linear_modes(shape: Shape) -> tuple[str, ...]:
    return TRAINING if shape.M > INFERENCE_TOKENS else (*TRAINING, "inference")


def _group_modes(shape: GroupShape) -> tuple[str, ...]:
    return ("inference",) if shape.M in DECODE_TOKENS else TRAINING


def _model_modes(shape: ModelShape) -> tuple[str, ...]:
    return ("both", "step")


# By the type of the shape.
KINDS: dict[type[AnyShape], Kind] = {
    Shape: Kind(PROVIDERS, make_problem, _linear_modes),
    GroupShape: Kind(GROUP_PROVIDERS, make_group_problem, _group_modes),
    ModelShape: Kind(MODEL_PROVIDERS, make_model_problem, _model_modes),
}


def select(names: str | None, without: str | None = None) -> dict[type[AnyShape], list[Provider]]:
    """The providers in a comma-separated list, for each kind those that it has, always including the floor.

    ``names``: None for all. ``without``: those to leave out, None for none. ValueError that lists the known
    names if some name belongs to no kind.
    """
    known = dict.fromkeys(name for kind in KINDS.values() for name in kind.providers)
    wanted = known.keys() if names is None else _split(names)
    unwanted = set() if without is None else _split(without)
    unknown = sorted((wanted | unwanted) - known.keys())
    if unknown:
        raise ValueError(f"unknown providers {', '.join(unknown)}; known: {', '.join(known)}")
    wanted = wanted - unwanted | {FLOOR}
    return {
        shape_type: [p for name, p in kind.providers.items() if name in wanted]
        for shape_type, kind in KINDS.items()
    }


def _split(names: str) -> set[str]:
    return {name.strip() for name in names.split(",")}
