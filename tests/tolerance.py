"""The accuracy rule of every test, and tensors laid out to catch wrong addressing."""

from pathlib import Path

import torch
from torch import Tensor

FACTOR = 2.0
FLOOR = 1e-6


def errors(actual: Tensor, exact: Tensor) -> tuple[float, float]:
    """Maximal and root-mean-square absolute error against a float64 result."""
    difference = (actual.double() - exact.double()).abs()
    if difference.numel() == 0:
        return 0.0, 0.0
    return difference.max().item(), difference.square().mean().sqrt().item()


def assert_as_accurate(actual: Tensor, eager: Tensor, exact: Tensor, name: str = "result") -> None:
    """``actual`` is finite and errs at most twice as much as ``eager`` (same dtypes), in max and in RMS."""
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert torch.isfinite(actual).all(), f"{name}: not finite; an element was not written, or NaN was read"
    for kind, ours, theirs in zip(("max", "rms"), errors(actual, exact), errors(eager, exact), strict=True):
        bound = FACTOR * theirs + FLOOR
        assert ours <= bound, (
            f"{name}: {kind} error {ours:.3e}, eager PyTorch {theirs:.3e}, bound {bound:.3e}"
        )


def poisoned(empty):
    """``torch.empty``, but what it returns is NaN, or the largest integer."""

    def filled(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        if tensor.is_floating_point():
            return tensor.fill_(float("nan"))
        return tensor if tensor.dtype == torch.bool else tensor.fill_(torch.iinfo(tensor.dtype).max)

    return filled


def lay_out(values: Tensor, layout: str) -> Tensor:
    """The same (rows, columns) values as a view of a buffer that holds NaN everywhere else.

    layout: "contiguous", "transposed" (column-major) or "strided" (no stride is 1).
    """
    rows, columns = values.shape
    if layout == "contiguous":
        buffer = values.new_full((rows + 2, columns), float("nan"))
        view = buffer[1 : rows + 1]
    elif layout == "transposed":
        buffer = values.new_full((columns + 2, rows), float("nan"))
        view = buffer[1 : columns + 1].t()
    elif layout == "strided":
        buffer = values.new_full((rows + 1, 2 * columns + 3), float("nan"))
        view = buffer[1:, 1 : 2 * columns + 1 : 2]
    else:
        raise ValueError(f"unknown layout {layout!r}")
    view.copy_(values)
    return view


def lay_far_apart(values: Tensor, folder: Path) -> Tensor:
    """The same values, (up to 3 rows, columns) of float16, as a view of zeros with rows 2**30 + 64 apart.

    The stride fits in 32 bits, its product with row 2 does not: a wrapped offset reads zeros. On a CPU, of a
    sparse file in ``folder`` only the touched pages exist.
    """
    stride, elements = 2**30 + 64, 2**32 + 1024
    assert 2 * stride > 2**31
    if values.is_cuda:
        buffer = values.new_zeros(elements)
    else:
        storage = torch.UntypedStorage.from_file(str(folder / "sparse"), True, 2 * elements)
        buffer = torch.empty(0, dtype=torch.float16).set_(storage)
    view = buffer.as_strided(values.shape, (stride, 1), 2**31)
    for row, value in zip(view, values, strict=True):  # one copy would ask for the whole range
        row.copy_(value)
    return view


LAYOUTS = ("contiguous", "transposed", "strided")
