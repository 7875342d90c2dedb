"""The names of the paths, and :func:`use_path`, which runs every layer of a thread on one of them."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PATHS = ("triton", "addmm", "reference")
MODES = ("auto", *PATHS)

# The mode of the newest open block of any thread; compiled code is guarded on it.
_mode = "auto"
# The mode of each open block of any thread, the newest last. A thread's own mode is in PyTorch's thread-local
# state, which autograd's threads inherit from the one that calls backward(), so that checkpoints recompute on
# its path.
_open_blocks: dict[object, str] = {}
_MODE_KEY = "fastlora.mode"


@contextmanager
def use_path(mode: str) -> Iterator[None]:
    """Run every layer inside the block on one path; for tests and benchmarks.

    Other threads keep their own path; only compiled code follows the newest block of any thread.

    Args:
        mode: "auto" (the planner chooses), "triton", "addmm" or "reference". A forward pass remembers the
            mode for its own backward pass.

    Raises:
        ValueError: unknown mode. A layer that cannot run on the path raises RuntimeError when it is called.
    """
    global _mode
    if mode not in MODES:
        raise ValueError(f"use_path: unknown path {mode!r}, expected one of {', '.join(map(repr, MODES))}")
    previous = current_mode()
    eager = not torch.compiler.is_compiling()
    if eager:
        block = object()
        _open_blocks[block] = mode
        _follow_newest_block()
        _set_thread_mode(mode)
    else:
        _mode = mode
    try:
        yield
    finally:
        if eager:
            _set_thread_mode(previous)
            del _open_blocks[block]
            _follow_newest_block()
        else:
            _mode = previous


def _newest_mode() -> str:
    # A copy, made in one step, as other threads open and close blocks meanwhile.
    return ["auto", *list(_open_blocks.values())][-1]


def _follow_newest_block() -> None:
    """Set the mode of compiled code. Whoever comes last finds that nothing has changed since, and stops."""
    global _mode
    while True:
        _mode = newest = _newest_mode()
        if newest == _newest_mode():
            return


def _set_thread_mode(mode: str) -> None:
    if not _stash_counts_references():
        _keep_for_stash(mode)
    torch._C._stash_obj_in_tls(_MODE_KEY, mode)


@functools.cache
def _stash_counts_references() -> bool:
    """Whether PyTorch counts the reference that its thread-local state holds.

    PyTorch 2.11 does not, but releases one when the object is replaced: some calls later the process crashes.
    """
    probe = object()
    before = sys.getrefcount(probe)
    torch._C._stash_obj_in_tls("fastlora.probe", probe)
    counts = sys.getrefcount(probe) > before
    if not counts:
        _keep_for_stash(probe)
    return counts


def _keep_for_stash(value: object) -> None:
    """Add the reference that the thread-local state will release."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))


def current_mode() -> str:
    """The mode that this thread's innermost :func:`use_path` has set."""
    if torch.compiler.is_compiling():
        return _mode
    if not _open_blocks or not torch._C._is_key_in_tls(_MODE_KEY):
        return "auto"
    return torch._C._get_obj_in_tls(_MODE_KEY)
