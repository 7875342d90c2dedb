"""Compiles what the launchers would launch on an architecture, without a GPU: what test_launches.py runs.

    TRITON_INTERPRET=0 python tests/compile_launches.py ARCH

``benchmarks/static.py`` compiles the kernels for sizes and strides that are multiples of 16. Here whole
layers run forward and backward on tensors of the CPU, so that Triton specialises each launch on its own
arguments, as it would on a GPU: sizes of 1 become constants, odd sizes and strides lose their hints. Nothing
is launched, so every result is what its memory held. Prints a line of JSON for each kernel compiled.
"""

import itertools
import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import fastlora
from fastlora import ops, planner
from fastlora.device import Device
from fastlora.kernels import backward, hopper, update

# (M, K, N, R)
SHAPES = [(1, 1, 1, 1), (1, 1000, 17, 3), (17, 48, 1, 200), (33, 24, 40, 1), (500, 77, 24, 72)]
HOPPER_SHAPES = [(1, 8, 8, 8), (129, 72, 520, 24)]  # (M, D, E, R)
# Half precision with wider adapters, as PEFT has them, takes the most shared memory. Full precision is slow
# to compile: one shape is enough.
HALF, FULL = torch.bfloat16, torch.float32
CASES = [(shape, HALF) for shape in SHAPES] + [(SHAPES[0], FULL)]


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


def run_layers(M, K, N, R, dtype, dropout):
    """Every kernel of a layer and of a group of two, in both layouts of dy."""

    def normal(*shape, dtype=dtype):
        return torch.randn(shape, dtype=dtype, requires_grad=True)

    x, weight, bias = normal(M, K), normal(N, K).detach(), normal(N)
    A, B = normal(N, R, dtype=FULL), normal(R, K, dtype=FULL)
    with fastlora.use_path("triton"):
        fastlora.lora_linear(x, weight, A, B, 2.0, bias, dropout).backward(normal(M, N))
        fastlora.lora_linear(x, weight, A, B, 2.0, None, dropout).backward(normal(N, M).t())
        weights, As, Bs = [weight, weight], [A, A], [B, B]
        ys = fastlora.lora_linear_group(x, weights, As, Bs, [1.0, 2.0], [bias, None], dropout)
        torch.autograd.backward(ys, [normal(M, N), normal(M, N)])
    config = planner.backward_config(planner.Problem(ops.describe(x.device), dtype, M, N, K, R))
    backward.g_and_dA(x.new_empty(M, N), A, x.new_empty(M, R), 2.0, config, A.dtype)
    if dropout:
        seed = torch.zeros(1, dtype=torch.int64)
        config = planner.configs.select_update(R)
        update.add_update(x.new_empty(M, K), x.new_empty(M, R), B, 2.0, config, seed, 7)


def run_hopper(M, D, E, R):
    """The main loop that reads through TMA, in both layouts, of rows that it can read."""
    p, u = (torch.empty(M, size, dtype=HALF) for size in (D, R))
    for by_rows, teams in itertools.product((False, True), (1, 2)):
        q, v = (torch.empty((size, E) if by_rows else (E, size), dtype=HALF) for size in (D, R))
        bias = None if by_rows else torch.empty(E, dtype=HALF)
        config = planner.configs.select_hopper(132, R, teams)
        hopper.gemm(p, q, u, v, 2.0, config, bias, by_rows)


def main():
    arch = int(sys.argv[1])
    triton.runtime.driver.set_active(CompileOnly(arch))
    compiled = {}
    launch = JITFunction.run

    def compile_only(self, *args, **kwargs):
        kernel = launch(self, *args, **{**kwargs, "warmup": True})
        compiled[kernel.hash] = {
            "kernel": self.__name__.removeprefix("_").removesuffix("_kernel"),
            "shared_bytes": kernel.metadata.shared,
            "signature": [f"{name}: {kind}" for name, kind in kernel.src.signature.items()],
        }
        return kernel

    JITFunction.run = compile_only
    ops.describe = lambda device: Device("cuda", "", arch, 132)
    ops.start_a_kernel(torch.device("cpu"))
    for shape, dtype in CASES:
        for dropout in (0.0, 1 / 65536):
            try:
                run_layers(*shape, dtype, dropout)
            except Exception:
                print(f"M, K, N, R = {shape}, {dtype}, {dropout=}", file=sys.stderr)
                raise
    for shape in HOPPER_SHAPES if arch == 90 else ():
        run_hopper(*shape)
    for row in compiled.values():
        print(json.dumps(row))


if __name__ == "__main__":
    main()
