"""Every launcher's arguments, odd ones too, compile as Triton specialises them on a GPU; none is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastlora.kernels.configs import SHARED_MEMORY

SCRIPT = Path(__file__).with_name("compile_launches.py")


ARCHS = (86, 90)  # the least shared memory, and wgmma


@pytest.fixture(scope="module")
def rows_of():
    """The kernels compiled for each architecture, by two processes with the interpreter off."""
    workers = {
        arch: subprocess.Popen(
            [sys.executable, str(SCRIPT), str(arch)],
            env={**os.environ, "TRITON_INTERPRET": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for arch in ARCHS
    }
    rows = {}
    for arch, worker in workers.items():
        output, errors = worker.communicate()
        assert worker.returncode == 0, errors[-4000:]
        rows[arch] = [json.loads(line) for line in output.splitlines()]
    return rows


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
    } | ({"hopper"} if arch == 90 else set())
    for row in rows:
        assert row["shared_bytes"] <= SHARED_MEMORY[arch], row


def test_sizes_of_one_are_specialised_and_the_threshold_of_dropout_is_not(rows_of):
    rows = [row for rows in rows_of.values() for row in rows]
    assert any("M: constexpr" in row["signature"] for row in rows)
    assert any("keep_threshold: i32" in row["signature"] for row in rows)
    assert not any("keep_threshold: constexpr" in row["signature"] for row in rows)
