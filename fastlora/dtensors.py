"""Tensors without storage of their own, above all DTensors: parameters sharded by FSDP2, tensor parallelism.

Everything here looks DTensor up instead of importing it, which takes a second, and takes other tensors too.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fastlora import masks

# Before 2.13, clip_grad_norm_ scales a partial gradient (to be summed over the ranks) as if it were the sum.
_CLIPS_PARTIAL_GRADIENTS_WRONGLY = TorchVersion(torch.__version__) < "2.13"


def any_dtensor(*tensors: Tensor) -> bool:
    """Whether any of the tensors is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(tensor, module.DTensor) for tensor in tensors)


def is_wrapper(tensor: Tensor) -> bool:
    """Whether a tensor wraps others that hold its values, as DTensors and torchao's quantized tensors do."""
    return is_traceable_wrapper_subclass(tensor)


def with_whole_gradients(parameters: Sequence[Any]) -> list[Tensor]:
    """Redistribute DTensors to their own placements, so that backward sums their gradients over the ranks.

    Otherwise their gradients would stay partial, which clip_grad_norm_ mis-scales before torch 2.13. Newer
    versions, and calls that record no gradients, get the parameters back unchanged.
    """
    if not (_CLIPS_PARTIAL_GRADIENTS_WRONGLY and torch.is_grad_enabled()):
        return list(parameters)
    return [p.redistribute(placements=p.placements) if hasattr(p, "placements") else p for p in parameters]


def shared_seed(x: Tensor) -> Tensor:
    """A dropout seed that all ranks of a DTensor's mesh agree on, whatever the state of their generators."""
    seed = masks.new_seed(x.device)
    for group in x.device_mesh.get_all_groups() if hasattr(x, "device_mesh") else ():
        torch.distributed.broadcast(seed, group=group, group_src=0)
    return seed


def replicated_like(x: Tensor, value: Tensor) -> Tensor:
    """``value``, which every rank computes whole, as a DTensor on x's mesh if x is a DTensor."""
    mesh = getattr(x, "device_mesh", None)
    if mesh is None:
        return value
    from torch.distributed.tensor import DTensor, Replicate

    return DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)


def sharded_like(own: Any, value: Tensor) -> Tensor:
    """``value``, sharded like ``own`` if that is a DTensor and ``value`` is a whole tensor."""
    if not any_dtensor(own) or any_dtensor(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    value = value.to(own.device)
    return distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None)


def gathered(tensor: Any) -> Tensor:
    """The whole tensor; every rank has to call this if it is a DTensor."""
    return tensor.full_tensor() if any_dtensor(tensor) else tensor
