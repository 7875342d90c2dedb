"""Checks of single arguments, shared by the layer, the functions and models; how messages name a dtype."""

from __future__ import annotations

import numbers
import sys
from typing import Any

import torch
from torch import Tensor, nn

ADAPTER_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def as_number(value: Any) -> Any:
    """Convert a real one-element tensor that needs no gradient, or a NumPy scalar, to a Python number.

    Anything else is returned unchanged.
    """
    if type(value) is float:
        return value  # the common case, of every call
    if isinstance(value, Tensor):
        known = value.numel() == 1 and not (value.requires_grad or value.is_complex() or value.is_meta)
        return float(value) if known else value
    # is_finite would compare a NumPy float32 with Python's largest float in float32's narrower range.
    foreign = isinstance(value, numbers.Real) and not isinstance(value, (float, numbers.Rational))
    return float(value) if foreign else value


def dtype_name(dtype: torch.dtype) -> str:
    """Such as "bfloat16", for messages and files."""
    return str(dtype).removeprefix("torch.")


def unwritable(tensor: Tensor) -> bool:
    """Whether PyTorch refuses to write the tensor in place here.

    It does so outside of inference mode if the tensor was made in it, and if the elements share memory.
    """
    expanded = any(
        stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return expanded or (tensor.is_inference() and not torch.is_inference_mode_enabled())


def is_finite(value: Any) -> bool:
    """Whether a number, be it a huge integer, is finite as a float; torch.compile can trace it."""
    return bool(abs(value) <= sys.float_info.max)


def check_alpha(alpha: float | Tensor) -> None:
    """Raise TypeError unless ``alpha`` is a number, ValueError unless it is finite as a float."""
    alpha = as_number(alpha)
    if not isinstance(alpha, numbers.Real):
        raise TypeError(f"alpha must be a number, got {alpha!r}")
    if not is_finite(alpha):
        raise ValueError(f"alpha must be finite, got {alpha}")


def check_dropout(dropout: float) -> None:
    """Raise TypeError unless ``dropout`` is a number, ValueError unless it is a probability."""
    if not isinstance(dropout, numbers.Real):
        raise TypeError(f"dropout must be a number in [0, 1], got {dropout!r}")
    if not 0.0 <= dropout <= 1.0:
        raise ValueError(f"dropout must be in [0, 1], got {dropout}")


def check_rank(rank: int) -> None:
    """Raise TypeError unless ``rank`` is an integer, ValueError unless it is at least 1."""
    if isinstance(rank, bool) or not isinstance(rank, numbers.Integral):
        raise TypeError(f"rank must be an integer, got {rank!r}")
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")


def check_adapter_dtype(dtype: torch.dtype) -> None:
    """Raise TypeError unless ``dtype`` is one, ValueError unless adapters may have it."""
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"adapter_dtype must be a torch.dtype, got {dtype!r}")
    if dtype not in ADAPTER_DTYPES:
        raise ValueError(
            f"adapters must be floating-point of 16, 32 or 64 bits, got {dtype}; pass adapter_dtype"
        )


def check_model(model: nn.Module, function: str) -> None:
    """Raise a TypeError prefixed with the function's name unless ``model`` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: expected a torch.nn.Module, got {type(model).__name__}")
