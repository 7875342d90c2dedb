"""Repairs of Triton's interpreter, and checks of what a kernel reads and writes in it.

The interpreter keeps bfloat16 as raw 16-bit integers: its ``tl.dot`` multiplies those, and its cast from
float32 cuts bits off instead of rounding (seen in triton 3.6 to 3.9). Both are put right here; nothing else
of what the kernels do in bfloat16 is arithmetic.
"""

import threading

import numpy as np


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


def check_accesses() -> None:
    """Refuse accesses outside the tensors of a launch, and stores that write an element twice.

    The interpreter makes them without complaint. A GPU may fault or race there, but the results need not show
    that a mask is missing.
    """
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    call = GridExecutor.__call__
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    launch = threading.local()

    def launched(self, *args, **kwargs):
        tensors = (value for value in (*args, *kwargs.values()) if hasattr(value, "data_ptr"))
        launch.ranges = [(t.data_ptr(), t.data_ptr() + extent(t)) for t in tensors]
        return call(self, *args, **kwargs)

    def extent(tensor):
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return (last + 1) * tensor.element_size() if tensor.numel() else 0

    def addresses(pointers, mask):
        taken = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        size = np.uint64(pointers.get_element_ty().primitive_bitwidth // 8)
        inside = [(taken >= start) & (taken + size <= end) for start, end in launch.ranges]
        assert np.any(inside, axis=0).all(), "out of bounds: an access outside every tensor of the launch"
        return taken

    def checked_load(self, pointers, mask, *rest):
        addresses(pointers, mask)
        return load(self, pointers, mask, *rest)

    def checked_store(self, pointers, value, mask, *rest):
        taken = addresses(pointers, mask)
        assert len(np.unique(taken)) == taken.size, "one store writes an element twice"
        return store(self, pointers, value, mask, *rest)

    GridExecutor.__call__ = launched
    InterpreterBuilder.create_masked_load = checked_load
    InterpreterBuilder.create_masked_store = checked_store
