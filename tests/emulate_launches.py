"""Compiles what the launchers launch on an architecture and runs it, without a GPU: test_launches.py uses it.

    TRITON_INTERPRET=0 python tests/emulate_launches.py ARCH [PATTERN REPLACEMENT]

``benchmarks/static.py`` compiles the kernels for sizes and strides that are multiples of 16. Here whole
layers run forward and backward on tensors of the CPU, so that Triton specialises each launch on its own
arguments, as it would on a GPU: sizes of 1 become constants, odd sizes and strides lose their hints. What it
has made of each launch is emulated (ttgir_emulator.py), and the results are compared with float64. Prints a
line of JSON for each kernel compiled. What matches PATTERN is replaced before, to see that a fault is found.
"""

import itertools
import json
import os
import re
import sys

import torch
import triton
import ttgir_emulator
from cases import differentiate, exact, fused, keep_factors, tensors
from test_group import exact_group, group, grouped, run_group
from tolerance import errors, lay_out, poisoned
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fastlora import masks, ops, planner
from fastlora.device import Device
from fastlora.kernels import backward, configs, hopper, hopper_project, update

# (M, K, N, R)
SHAPES = [
    (1, 1, 1, 1),
    (1, 1000, 17, 3),
    (17, 48, 1, 200),
    (33, 24, 40, 1),
    (500, 77, 24, 72),
    (80, 352, 368, 32),  # takes every loop several times, with asynchronous copies
]
HOPPER_SHAPES = [(1, 8, 8, 8), (129, 72, 520, 24), (300, 1032, 264, 136)]  # (M, D, E, R)
# Half precision with wider adapters, as PEFT has them, takes the most shared memory. Full precision is slow
# to compile: one shape is enough.
HALF, FULL = torch.bfloat16, torch.float32
CASES = [(shape, HALF) for shape in SHAPES] + [(SHAPES[0], FULL)]
# Bounds of the largest and the root-mean-square error, relative to those of the values. How accurate the
# kernels are is for the other tests to say: what computes something else errs by far more.
TOLERANCES = {HALF: 0.02, FULL: 1e-5}
ALPHA = 1.5


class CompileOnly:
    """A driver for an architecture of which there is no GPU here."""

    def __init__(self, arch):
        self.arch = arch

    def get_current_target(self):
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def emulate_launches(compiled, edit):
    """Replace Triton's launches by emulations of the edited text; ``compiled`` gets a row of each kernel."""
    launch = JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        compiled[kernel.hash] = {
            "kernel": self.__name__.removeprefix("_").removesuffix("_kernel"),
            "shared_bytes": kernel.metadata.shared,
            "signature": [f"{name}: {kind}" for name, kind in kernel.src.signature.items()],
        }
        arguments = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        arguments = {name: getattr(value, "base", value) for name, value in arguments.items()}
        ttgir_emulator.run(edit(kernel.asm["ttgir"]), grid, arguments)
        return kernel

    JITFunction.run = run


def assert_near(name, actual, expected, dtype):
    assert actual.shape == expected.shape
    found, sizes = errors(actual, expected), errors(expected, torch.zeros_like(expected))
    for error, size in zip(found, sizes, strict=True):
        assert error <= TOLERANCES[dtype] * size + 1e-6, f"{name}: error {error:.3g}, values of {size:.3g}"


def check(actual, expected, dtype):
    for name, value in vars(actual).items():
        assert_near(name, value, getattr(expected, name), dtype)


def run_layers(M, K, N, R, dtype, dropout):
    """Every kernel of a layer and of a group, in several layouts of x, dy and the adapters."""
    seed = torch.tensor([2**62 + 12345], dtype=torch.int64) if dropout else None
    case = tensors(M, N, K, R, dtype, FULL)
    keep = keep_factors(seed, case, dropout) if dropout else None
    for layout, bias in (("contiguous", case.bias), ("transposed", None)):
        for name in ("x", "dy", "A", "B"):
            setattr(case, name, lay_out(getattr(case, name), layout))
        case.bias = bias
        ours = differentiate(fused(ALPHA, dropout, seed, "triton"), case)
        check(ours, exact(case, ALPHA, keep), dtype)

    problem = group(M, K, [(N, R), (N + 3, 4)], dtype, FULL)
    ours = run_group(grouped(problem.alphas, dropout, seed, "triton"), problem)
    check(ours, exact_group(problem, keep), dtype)

    h, A, dy = lay_out(torch.randn(M, R).to(dtype), "strided"), case.A, case.dy
    config = planner.backward_config(planner.Problem(ops.describe(h.device), dtype, M, N, K, R))
    g, dA = backward.g_and_dA(dy, A, h, ALPHA, config, A.dtype)
    assert_near("g", g, dy.double() @ A.double(), dtype)
    assert_near("dA", dA, ALPHA * dy.double().t() @ h.double(), dtype)
    if dropout:
        c = torch.randn(M, K).to(dtype)
        expected = c.double() + ALPHA * keep * (h.double() @ case.B.double())
        threshold, scale = masks.keep_threshold(dropout), masks.keep_scale(dropout)
        update.add_update(c, h, case.B, ALPHA * scale, configs.select_update(R), seed, threshold)
        assert_near("c", c, expected, dtype)


def run_hopper(M, D, E, R):
    """The main loop that reads through TMA, in both layouts, of rows that it can read."""
    p, u = (torch.randn(M, size).to(HALF) for size in (D, R))
    for by_rows, teams in itertools.product((False, True), (1, 2)):
        q, v = ((torch.randn(E, size) * size**-0.5).to(HALF) for size in (D, R))
        expected = p.double() @ q.double().t() + ALPHA * u.double() @ v.double().t()
        if by_rows:
            q, v, bias = q.t().contiguous(), v.t().contiguous(), None
        else:
            bias = torch.randn(E).to(HALF)
            expected += bias.double()
        config = configs.select_hopper(4, R, teams)  # few programs, so that each has several tiles
        assert_near("c", hopper.gemm(p, q, u, v, ALPHA, config, bias, by_rows), expected, HALF)


def run_hopper_project(M, D, E, R):
    """The same main loop when it computes the update's left factor too."""
    p = torch.randn(M, D).to(HALF)
    for by_rows in (False, True):
        q, z = ((torch.randn(size, D) * D**-0.5).to(HALF) for size in (E, R))
        v = (torch.randn(E, R) * R**-0.5).to(HALF)
        u = ALPHA * p.double() @ z.double().t()
        expected = p.double() @ q.double().t() + u @ v.double().t()
        if by_rows:
            q, z, v = (t.t().contiguous() for t in (q, z, v))
        config = configs.select_hopper_project(4, R)
        c, found = hopper_project.project_and_gemm(p, q, z, v, ALPHA, config, None, by_rows)
        assert_near("c", c, expected, HALF)
        assert_near("u", found, u, HALF)


def main():
    arch, *edits = sys.argv[1:]
    arch = int(arch)
    triton.runtime.driver.set_active(CompileOnly(arch))
    ops.describe = lambda device: Device("cuda", "", arch, 132)
    compiled = {}
    emulate_launches(compiled, lambda ttgir: re.sub(*edits, ttgir) if edits else ttgir)
    torch.empty = poisoned(torch.empty)
    torch.manual_seed(0)
    ops.start_a_kernel(torch.device("cpu"))
    for shape, dtype in CASES:
        for dropout in (0.0, 1 / 65536, 0.3):
            try:
                run_layers(*shape, dtype, dropout)
            except BaseException:
                print(f"M, K, N, R = {shape}, {dtype}, {dropout=}", file=sys.stderr)
                raise
    if arch == 90:
        for shape in HOPPER_SHAPES:
            run_hopper(*shape)
            run_hopper_project(*shape[:3], min(shape[3], 32))
        # As the planner chooses it, beside the other kernel for what it cannot read.
        os.environ["FASTLORA_HOPPER"] = "1"
        planner.forget_plans()
        for dropout in (0.0, 0.3):
            run_layers(300, 136, 264, 16, HALF, dropout)
    for row in compiled.values():
        print(json.dumps(row))


if __name__ == "__main__":
    main()
