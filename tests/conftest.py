"""Chooses between the GPU and Triton's interpreter, once for the process, before anything imports Triton."""

import importlib.util
import os
import sys
from pathlib import Path

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # Before torch is imported: its threads wait busily, so each process gets its share of the cores.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // int(workers))))

import torch

CUDA = torch.cuda.is_available()
os.environ["TRITON_INTERPRET"] = "0" if CUDA else "1"

sys.path.insert(0, str(Path(__file__).parent))  # tolerance.py and interpreter.py

if importlib.util.find_spec("fastlora") is None or importlib.util.find_spec("fastlora.kernels") is None:
    # A machine on which nothing can be installed: run from the checkout.
    sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
    import source_tree

    source_tree.install()

import pytest  # noqa: E402
from tolerance import poisoned  # noqa: E402

if CUDA:
    from fastlora.device import sums_in_float32

    checking = sums_in_float32()  # kept, as the end of the object would end the context
    checking.__enter__()

if not CUDA and importlib.util.find_spec("triton") is not None:
    from interpreter import check_accesses, repair_bfloat16

    repair_bfloat16()
    check_accesses()


@pytest.hookimpl(trylast=True)  # after -m and --deselect
def pytest_collection_modifyitems(items):
    if part := os.environ.get("FASTLORA_TEST_PART"):
        # "i/n": of every n runs of eight tests the i-th; several processes share the tests without a plugin.
        i, n = map(int, part.split("/"))
        items[:] = [item for place, item in enumerate(items) if place // 8 % n == i]
    if CUDA:
        return
    skip = pytest.mark.skip(reason="no NVIDIA GPU")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def kernel_device(request):
    """Where the kernels run: CPU tensors in the interpreter, or a GPU."""
    if request.param == "cpu" and CUDA:
        pytest.skip("the interpreter is off in a process with a GPU")
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _fixed_seed():
    torch.manual_seed(20240607)


@pytest.fixture
def as_blas_on_a_gpu(monkeypatch):
    """The addmm form on the CPU as half precision takes it on a GPU: the large product comes last."""
    from fastlora import ops

    monkeypatch.setattr(ops, "_update_first", lambda p: True)
    monkeypatch.setattr(ops, "_is_few_and_wide", lambda x, A: False)


@pytest.fixture
def poisoned_empty(monkeypatch):
    """``torch.empty`` returns NaN (and large integers), so that an element that no kernel writes is seen."""
    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
