"""Repairs of Triton's interpreter, and a check of every address that a kernel reads or writes in it.

The interpreter keeps bfloat16 as raw 16-bit integers: its ``tl.dot`` multiplies those, and its cast from
float32 cuts bits off instead of rounding (seen in triton 3.6 to 3.9). Both are put right here; nothing else
of what the kernels do in bfloat16 is arithmetic.

It also reads past the end of a tensor without complaint, where a GPU may fault. What is read there often has
no influence on the results, so that they alone do not show it.
"""

import numpy as np
import torch


def repair_bfloat16() -> None:
    """Make ``tl.dot`` and casts to bfloat16 right in this process's interpreter."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widen(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return dot(self, widen(a), widen(b), d, input_precision, max_num_imprecise_acc)

    def cast_impl(self, source, target):
        if target.scalar != tl.bfloat16 or source.dtype.scalar == tl.bfloat16:
            return cast(self, source, target)
        single = np.ascontiguousarray(source.data.astype(np.float32))
        bits = single.view(np.uint32).astype(np.uint64)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even
        quiet_nan = (bits >> 16) | 0x40
        return TensorHandle(np.where(np.isnan(single), quiet_nan, rounded).astype(np.uint16), tl.bfloat16)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    for name in ("create_fp_ext", "create_fp_trunc"):
        setattr(InterpreterBuilder, name, cast_impl)


def check_addresses() -> None:
    """Raise IndexError where a kernel reads or writes outside the tensors that it was launched with."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    prepare = GridExecutor._init_args_hst
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    starts = ends = np.empty(0, np.uint64)  # of the current launch's tensors, by ascending address

    def init_args(self, args, kwargs):
        nonlocal starts, ends
        on_host = prepare(self, args, kwargs)
        given = (*on_host[0], *on_host[1].values())
        spans = sorted(_span(t) for t in given if isinstance(t, torch.Tensor) and t.numel())
        starts = np.array([start for start, _ in spans], np.uint64)
        # Views of one buffer may overlap or contain each other.
        ends = np.maximum.accumulate(np.array([end for _, end in spans], np.uint64))
        return on_host

    def check(what, pointers, mask):
        itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        if addresses.size:
            first, last = addresses.min(), addresses.max() + np.uint64(itemsize)
            within = np.searchsorted(starts, first, side="right") - 1
            if within < 0 or last > ends[within]:
                raise IndexError(f"{what} of {first:#x} to {last:#x}, outside every tensor of the launch")

    def create_masked_load(self, pointers, mask, *others):
        check("load", pointers, mask)
        return load(self, pointers, mask, *others)

    def create_masked_store(self, pointers, value, mask, *others):
        check("store", pointers, mask)
        return store(self, pointers, value, mask, *others)

    GridExecutor._init_args_hst = init_args
    InterpreterBuilder.create_masked_load = create_masked_load
    InterpreterBuilder.create_masked_store = create_masked_store


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """The address of the tensor's first element and the one after its last."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()
