"""What Triton makes of every launch, odd arguments too, computes the right values; no GPU is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import ttgir_emulator

from fastlora.kernels.configs import SHARED_MEMORY

SCRIPT = Path(__file__).with_name("emulate_launches.py")


ARCHS = (86, 90)  # the least shared memory, and wgmma


def start(*arguments):
    """The script in a process of its own, with the interpreter off."""
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def rows_of():
    """The kernels of each architecture; the script fails if one computes a wrong value."""
    workers = {arch: start(arch) for arch in ARCHS}
    rows = {}
    for arch, worker in workers.items():
        output, errors = worker.communicate()
        assert worker.returncode == 0, errors[-4000:]
        rows[arch] = [json.loads(line) for line in output.splitlines()]
    return rows


FAULTS = {
    "a copy not waited for": (r"(ttg\.async_wait .*num =) \d+", r"\1 9", ": error nan, values of"),
    "a product not waited for": (r"pendings = 0 ", "pendings = 1 ", "before its products had finished"),
    "a loop variable that is not carried": (
        r"(iter_args\((%\w+) = (?:.|\n)*?scf\.yield )%[\w#]+",
        r"\1\2",
        ": error ",
    ),
    "no mask": (r"(tt\.store %\w+, %\w+), %\w+", r"\1", "out of bounds"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_emulation_finds(rows_of, fault):
    pattern, replacement, message = FAULTS[fault]
    worker = start(90, pattern, replacement)
    errors = worker.communicate()[1]
    assert worker.returncode == 1
    assert message in errors, errors[-4000:]


@pytest.mark.parametrize("element", ["f32", "bf16"])
def test_emulation_knows_tf32(element):
    types = f"tensor<1x1x{element}, #a> * tensor<1x1x{element}, #b> -> tensor<1x1xf32, #c>"
    one = np.ones((1, 1), np.float32)
    for precision, exact in ((", inputPrecision = tf32", element != "f32"), ("", True)):
        op = ttgir_emulator.Op(["%d"], "tt.dot", f" %a, %b, %c{precision} : {types}")
        if exact:
            assert ttgir_emulator.PLAIN["tt.dot"](op, one, one, one) == 2
        else:
            with pytest.raises(AssertionError, match="TF32"):
                ttgir_emulator.PLAIN["tt.dot"](op, one, one, one)


@pytest.mark.parametrize("arch", ARCHS)
def test_every_launch_compiles_and_fits(rows_of, arch):
    rows = rows_of[arch]
    kernels = {row["kernel"] for row in rows}
    assert kernels == {
        "project",
        "gemm",
        "token_sum",
        "reduce",
        "small",
        "group_dx",
        "backward",
        "update",
    } | ({"hopper", "hopper_project"} if arch == 90 else set())
    for row in rows:
        assert row["shared_bytes"] <= SHARED_MEMORY[arch], row


def test_sizes_of_one_are_specialised_and_the_threshold_of_dropout_is_not(rows_of):
    rows = [row for rows in rows_of.values() for row in rows]
    assert any("M: constexpr" in row["signature"] for row in rows)
    assert any("keep_threshold: i32" in row["signature"] for row in rows)
    assert not any("keep_threshold: constexpr" in row["signature"] for row in rows)
