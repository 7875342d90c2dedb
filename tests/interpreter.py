"""Repairs of Triton's interpreter, which keeps bfloat16 as raw 16-bit integers.

Its ``tl.dot`` multiplies those integers and its cast from float32 cuts bits off instead of rounding (seen in
triton 3.6 to 3.9). Both are put right here; nothing else of what the kernels do in bfloat16 is arithmetic.
"""

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
