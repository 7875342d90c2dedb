"""The Gluon kernel that projects and multiplies in one launch: what the compiler makes of it, emulated."""

import itertools
import os
import re

import pytest
import torch
import ttgir_emulator
from test_hopper import HOPPER, both_forms, compile_kernel
from tolerance import assert_as_accurate

from fastlora.kernels import configs

SCALE = 1.5
LAUNCHES = int(os.environ.get("FASTLORA_STRESS", "100"))  # of each shape, on a GPU


def matrices(M, D, E, R, q_by_rows, device="cpu"):
    """p, q, z, v and, in the forward form, a bias, as the kernel takes them."""

    def normal(*shape):
        return (torch.randn(*shape) * shape[-1] ** -0.5).bfloat16()

    q, z, v = normal(E, D), normal(R, D), normal(E, R)
    if q_by_rows:
        q, z, v = (t.t().contiguous() for t in (q, z, v))
    bias = None if q_by_rows else normal(E)
    return [t if t is None else t.to(device) for t in (normal(M, D), q, z, v, bias)]


def assert_right(c, u, p, q, z, v, bias, q_by_rows):
    right, down, update = (q, z, v) if q_by_rows else (q.t(), z.t(), v.t())

    def formula(cast):
        found = SCALE * (cast(p) @ cast(down))
        whole = cast(p) @ cast(right) + found @ cast(update)
        return whole if bias is None else whole + cast(bias), found

    for name, actual, eager, exact in zip(
        ("c", "u"), (c, u), formula(lambda t: t), formula(lambda t: t.double()), strict=True
    ):
        assert_as_accurate(actual, eager, exact, name)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return compile_kernel("hopper_project", tmp_path_factory.mktemp("static"))


def compiled(rows, R, q_by_rows):
    (row,) = (row for row in rows if (row["rank"], row["backward"]) == (str(R), str(q_by_rows)))
    return row["ttgir"]


def emulate(ttgir, M, D, E, R, programs, q_by_rows, seed=0):
    """Run the kernel and check what it computes."""
    p, q, z, v, bias = matrices(M, D, E, R, q_by_rows)
    c = torch.full((M, E), float("nan"), dtype=p.dtype)
    u = torch.full((M, R), float("nan"), dtype=p.dtype)
    arguments = {"p_desc": p, "q_desc": q, "z_desc": z, "u_desc": u, "v_desc": v, "c_desc": c, "u_ptr": u}
    states = torch.zeros(-(-M // 128), dtype=torch.int32)
    arguments |= {"states_ptr": states, "bias_ptr": bias}
    arguments |= {"scale": SCALE, "M": M, "D": D, "E": E, "R": R}
    ttgir_emulator.run(ttgir, (programs,), arguments, seed)
    assert_right(c, u, p, q, z, v, bias, q_by_rows)
    assert states.eq(2).all()


@both_forms
@pytest.mark.parametrize(
    ("M", "D", "E", "programs"),
    [
        (1, 8, 8, 1),
        (128, 64, 256, 1),
        (129, 72, 520, 50),  # programs without a tile
        (100, 192, 776, 1),  # the first tile computes u for all
        (300, 1032, 264, 2),  # many times around the ring
        (500, 128, 776, 4),
        (300, 320, 700, 9),  # all tiles at once
    ],
)
def test_values(rows, M, D, E, programs, q_by_rows):
    for seed in range(4):
        emulate(compiled(rows, 16, q_by_rows), M, D, E, 16, programs, q_by_rows, seed)


@both_forms
@pytest.mark.parametrize(("R", "of"), [(8, 8), (24, 32), (32, 32)])
def test_ranks(rows, R, of, q_by_rows):
    for programs in (1, 3):
        emulate(compiled(rows, of, q_by_rows), 200, 136, 600, R, programs, q_by_rows)


# Edits of the compiled text that the emulation has to notice.
FAULTS = {
    "u is read at once": (r'tt\.elementwise_inline_asm "\{.* (%\w+) : .*', r"arith.andi \1, \1 : i32"),
    "tiles wait for what nobody computes yet": (
        r"arith\.cmpi (eq|sgt), (%state\w*), %\w+",
        lambda match: f"arith.cmpi {'ne' if match[1] == 'eq' else 'sge'}, {match[2]}, {match[2]}",
    ),
    "no barrier before the state is set": (r"(?:gpu\.barrier|ttg\.barrier all).*", ""),
    "no fence where u is written": (
        r"tt\.elementwise_inline_asm .* (%c1_i32\w*) : .*",
        r"arith.andi \1, \1 : i32",
    ),
    "no fence where u is read": (r"fence\.proxy\.async\.global(?=;\\0A)", ""),
    "no fence where u was written before": (
        r"tt\.elementwise_inline_asm .* (%state\w*) : .*",
        r"arith.andi \1, \1 : i32",
    ),
    "the state is read without acquire": (r"add, acquire", "add, relaxed"),
    "the state is set without release": (r"add, release", "add, relaxed"),
    "one product too few is awaited": (r"(pendings =) 2 ", r"\1 3 "),
}


@both_forms
@pytest.mark.parametrize("fault", FAULTS)
def test_emulation_finds(rows, fault, q_by_rows):
    ttgir = compiled(rows, 16, q_by_rows)
    broken = re.sub(*FAULTS[fault], ttgir)
    assert broken != ttgir

    def run():
        for seed, programs in itertools.product(range(8), (2, 9)):  # some tiles read U, some wait for it
            emulate(broken, 300, 600, 700, 16, programs, q_by_rows, seed)

    with pytest.raises((AssertionError, ttgir_emulator.Deadlock)):
        run()


def test_compiled(rows):
    """Bounds with their reasons; the counts are those of triton 3.6."""
    assert {row["rank"] for row in rows} == {"8", "16", "32"}
    for row in rows:
        assert int(row["spills"]) == 0, row
        assert int(row["registers"]) <= 168, row  # at launch; 12 warps share 65,536
        assert row["warnings"] == "", "ptxas serialised wgmma"
        config = configs.select_hopper_project(132, int(row["rank"]))
        assert int(row["shared_bytes"]) <= config.shared_bytes(2) <= configs.SHARED_MEMORY[90], row
        # wgmma is 16 deep. A slot takes four for C, in either of two loops, and four for U; the update takes
        # one for each 16 ranks, with U read or computed.
        assert int(row["mma_count"]) == 12 + 2 * -(-int(row["rank"]) // 16), row


def test_ranks_that_fit():
    with pytest.raises(ValueError, match="up to 32, got 33"):
        configs.select_hopper_project(132, 33)
    with_update = configs.select_hopper(132, 32)
    assert configs.select_hopper_project(132, 32).block_r == with_update.block_r == 32


@pytest.mark.cuda
@pytest.mark.skipif(not HOPPER, reason="no GPU of sm_90")
@both_forms
@pytest.mark.parametrize(
    ("M", "D", "E", "R"),
    [
        (128, 64, 256, 16),
        (1000, 1032, 520, 8),
        (77, 200, 4096, 32),
        (4096, 4096, 1024, 24),
        (20000, 136, 1024, 16),  # the first column takes more tiles than there are programs
    ],
)
def test_on_a_gpu(M, D, E, R, q_by_rows, poisoned_empty):
    from fastlora.kernels.hopper_project import project_and_gemm

    p, q, z, v, bias = matrices(M, D, E, R, q_by_rows, "cuda")
    config = configs.select_hopper_project(torch.cuda.get_device_properties(0).multi_processor_count, R)
    c, u = project_and_gemm(p, q, z, v, SCALE, config, bias, q_by_rows)
    assert_right(c, u, p, q, z, v, bias, q_by_rows)
    # The same bits again and again, whichever tiles compute U: a race would show.
    for _ in range(LAUNCHES):
        again, u_again = project_and_gemm(p, q, z, v, SCALE, config, bias, q_by_rows)
        assert torch.equal(again, c)
        assert torch.equal(u_again, u)
