"""Each kernel against float64, with every layout, odd sizes and padded ranks: interpreted or on a GPU."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from tolerance import LAYOUTS, assert_as_accurate, lay_far_apart, lay_out

from fastlora import masks, reference
from fastlora.kernels import configs

pytestmark = pytest.mark.usefixtures("poisoned_empty")

HALF = (torch.float16, torch.bfloat16)
# (M, D, E, R): below one tile, exact tiles, one past them, ranks that are padded, also after whole steps.
SIZES = (
    (1, 1, 1, 1),
    (3, 5, 7, 2),
    (64, 128, 128, 16),
    (129, 65, 130, 33),
    (17, 200, 40, 100),
    (70, 256, 200, 24),
)
DROPOUT = 0.4  # not 0.3: alpha / (1 - p) would be 1
# Of views: odd, and in eights (see TestRanksInEights) one way round, so that the other way is not.
both_sizes = pytest.mark.parametrize(("M", "D", "E", "R"), [(37, 70, 45, 9), (40, 72, 88, 8)])


@pytest.fixture
def kernels():
    """The launchers, imported after conftest has chosen the interpreter or the compiler."""
    from fastlora.kernels.gemm import gemm
    from fastlora.kernels.project import project
    from fastlora.kernels.token_sum import token_sum
    from fastlora.kernels.update import add_update

    return SimpleNamespace(project=project, gemm=gemm, token_sum=token_sum, add_update=add_update)


def capability(device):
    if device.type == "cpu":
        return 80
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def matrix(rows, columns, dtype, device, layout="contiguous", scale=1.0):
    return lay_out((torch.randn(rows, columns) * scale).to(dtype).to(device), layout)


def eager_keep(seed, rows, columns, device):
    """The oracle's mask times 1 / (1 - p), as float64."""
    keep = reference.keep_mask(seed.cpu(), rows, columns, DROPOUT).double()
    return (keep * masks.keep_scale(DROPOUT)).to(device)


def dropout_arguments(seed):
    return {"seed": seed, "keep_threshold": masks.keep_threshold(DROPOUT)}


class TestProject:
    @pytest.mark.parametrize("block_m", [16, 32, 64])
    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize(("M", "D", "E", "R"), SIZES)
    def test_against_float64(self, kernels, kernel_device, dtype, M, D, E, R, block_m):
        p = matrix(M, D, dtype, kernel_device)
        q = matrix(D, R, dtype, kernel_device, scale=D**-0.5)
        config = configs.select_project(capability(kernel_device), 8, M, R, 2)
        config = dataclasses.replace(config, block_m=block_m)
        h = kernels.project(p, q, config)
        assert h.dtype == dtype
        assert h.is_contiguous()
        assert_as_accurate(h, p @ q, p.double() @ q.double(), "h")

    @pytest.mark.parametrize("p_layout", LAYOUTS)
    @pytest.mark.parametrize("q_layout", LAYOUTS)
    @both_sizes
    def test_reads_only_its_views(self, kernels, kernel_device, M, D, E, R, p_layout, q_layout):
        p = matrix(M, D, torch.float16, kernel_device, p_layout)
        q = matrix(D, R, torch.float16, kernel_device, q_layout, 0.1)
        h = kernels.project(p, q, configs.select_project(capability(kernel_device), 8, M, R, 2))
        assert_as_accurate(h, p @ q, p.double() @ q.double(), "h")

    def test_adapter_of_a_wider_dtype(self, kernels, kernel_device):
        p = matrix(40, 64, torch.bfloat16, kernel_device)
        q = matrix(64, 8, torch.float32, kernel_device, scale=0.1)
        h = kernels.project(p, q, configs.select_project(capability(kernel_device), 8, 40, 8, 2))
        assert_as_accurate(h, p @ q.bfloat16(), p.double() @ q.double(), "h")

    @pytest.mark.parametrize("dtype", HALF)
    def test_dropout_is_the_oracles(self, kernels, kernel_device, dtype):
        M, D, R = 70, 131, 8
        p = matrix(M, D, dtype, kernel_device)
        q = matrix(D, R, dtype, kernel_device, scale=0.1)
        seed = torch.tensor([-(2**62) - 12345], device=kernel_device)
        config = configs.select_project(capability(kernel_device), 8, M, R, 2)
        h = kernels.project(p, q, config, **dropout_arguments(seed), scale=masks.keep_scale(DROPOUT))
        keep = eager_keep(seed, M, D, kernel_device)
        assert_as_accurate(h, (p * keep.to(dtype)) @ q, (p.double() * keep) @ q.double(), "h")

    def test_every_row_has_a_mask_of_its_own(self, kernels, kernel_device):
        """Beyond 16 bits too."""
        M, seed = 2**16 + 64, torch.tensor([3], device=kernel_device)
        p, q = torch.ones(M, 8, device=kernel_device), torch.eye(8, device=kernel_device)
        config = dataclasses.replace(configs.select_project(80, 8, M, 8, 4), block_m=512, block_d=16)
        h = kernels.project(p, q, config, **dropout_arguments(seed))
        assert torch.equal(h != 0, eager_keep(seed, M, 8, kernel_device) != 0)


class TestGemm:
    @staticmethod
    def run(
        kernels, device, dtype, M, D, E, R, *, layouts=("contiguous",) * 5, bias=True, seed=None, adapter=None
    ):
        """Launch once and compare; alpha is no power of two, so that rounding it would show."""
        alpha = 0.7
        p = matrix(M, D, dtype, device, layouts[0])
        q = matrix(D, E, dtype, device, layouts[1], D**-0.5)
        u = matrix(M, R, dtype, device, layouts[2])
        v = matrix(R, E, adapter or dtype, device, layouts[3], R**-0.5)
        b = matrix(1, E, dtype, device, layouts[4])[0] if bias else None
        dropout = {} if seed is None else dropout_arguments(seed)
        keep = torch.ones(M, E, dtype=torch.float64, device=device)
        scale = alpha
        if seed is not None:
            keep = eager_keep(seed, M, E, device)
            scale = alpha * masks.keep_scale(DROPOUT)
        config = configs.select_gemm(capability(device), M, E, R, 2, seed is not None)
        c = kernels.gemm(p, q, u, v, scale, config, b, **dropout)
        exact = p.double() @ q.double() + alpha * keep * (u.double() @ v.double())
        eager = p @ q + alpha * (keep.to(dtype) * (u @ v.to(dtype)))
        if bias:
            exact, eager = exact + b.double(), eager + b
        assert c.dtype == dtype
        assert c.is_contiguous()
        assert_as_accurate(c, eager, exact, "c")

    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize(("M", "D", "E", "R"), SIZES)
    def test_against_float64(self, kernels, kernel_device, dtype, M, D, E, R):
        self.run(kernels, kernel_device, dtype, M, D, E, R)

    @pytest.mark.parametrize("rank", [64, 65, 128, 200, 256])
    def test_ranks_of_several_blocks(self, kernels, kernel_device, rank):
        self.run(kernels, kernel_device, torch.float16, 40, 96, 72, rank)

    @pytest.mark.parametrize("layout", LAYOUTS[1:])
    @pytest.mark.parametrize("operand", range(5))
    @both_sizes
    def test_reads_only_its_views(self, kernels, kernel_device, M, D, E, R, layout, operand):
        layouts = [layout if index == operand else "contiguous" for index in range(5)]
        self.run(kernels, kernel_device, torch.float16, M, D, E, R, layouts=layouts)

    def test_without_bias(self, kernels, kernel_device):
        self.run(kernels, kernel_device, torch.float16, 37, 70, 45, 9, bias=False)

    def test_adapter_of_a_wider_dtype(self, kernels, kernel_device):
        self.run(kernels, kernel_device, torch.bfloat16, 40, 64, 72, 8, adapter=torch.float32)

    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize("rank", [8, 80])
    def test_dropout_is_the_oracles(self, kernels, kernel_device, dtype, rank):
        seed = torch.tensor([2**61 + 99], device=kernel_device)
        self.run(kernels, kernel_device, dtype, 150, 70, 133, rank, bias=False, seed=seed)

    def test_tall_and_wide_grids(self, kernels, kernel_device):
        """More rows of tiles than a group holds, and a last group that is not full."""
        self.run(kernels, kernel_device, torch.float16, 128 * 9 + 1, 32, 300, 4)


class TestUpdate:
    @staticmethod
    def run(kernels, device, dtype, M, E, R, *, layouts=("contiguous",) * 2, adapter=None, beyond=0):
        """``beyond``: how many columns the matrix has that C is a part of, after those of C."""
        alpha, seed = 0.7, torch.tensor([2**61 + 99], device=device)
        whole = matrix(M, E + beyond, dtype, device)
        c, rest = whole[:, :E], whole[:, E:].clone()
        u = matrix(M, R, dtype, device, layouts[0])
        v = matrix(R, E, adapter or dtype, device, layouts[1], R**-0.5)
        keep = eager_keep(seed, M, E, device)
        exact = c.double() + alpha * keep * (u.double() @ v.double())
        eager = c + alpha * (keep.to(dtype) * (u @ v.to(dtype)))
        scale = alpha * masks.keep_scale(DROPOUT)
        result = kernels.add_update(c, u, v, scale, configs.select_update(R), **dropout_arguments(seed))
        assert result is c
        assert_as_accurate(c, eager, exact, "c")
        assert torch.equal(whole[:, E:], rest)

    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize(("M", "D", "E", "R"), SIZES)
    def test_against_float64(self, kernels, kernel_device, dtype, M, D, E, R):
        self.run(kernels, kernel_device, dtype, M, E, R)

    @pytest.mark.parametrize("u_layout", LAYOUTS)
    @pytest.mark.parametrize("v_layout", LAYOUTS)
    @both_sizes
    def test_reads_only_its_views(self, kernels, kernel_device, M, D, E, R, u_layout, v_layout):
        self.run(kernels, kernel_device, torch.float16, M, E, R, layouts=(u_layout, v_layout))

    def test_in_a_part_of_a_matrix(self, kernels, kernel_device):
        self.run(kernels, kernel_device, torch.float16, 70, 37, 9, beyond=6)

    def test_adapter_of_a_wider_dtype(self, kernels, kernel_device):
        self.run(kernels, kernel_device, torch.bfloat16, 40, 72, 8, adapter=torch.float32)


class TestBeyond31Bits:
    """Of rows and of a column-major matrix's columns; test_function has the layers' rows."""

    def test_token_sum(self, kernels, kernel_device, tmp_path):
        p = lay_far_apart(matrix(3, 20, torch.float16, kernel_device), tmp_path).t()
        u = matrix(20, 4, torch.float16, kernel_device)
        config = configs.select_token_sum(capability(kernel_device), 8, 20, 3, 4, 2)
        g = kernels.token_sum(p, u, 1.0, config, torch.float32)
        assert_as_accurate(g, p.t().float() @ u.float(), p.double().t() @ u.double(), "g")

    @pytest.mark.parametrize("operand", range(3))
    def test_update(self, kernels, kernel_device, tmp_path, operand):
        seed = torch.tensor([99], device=kernel_device)
        parts = [matrix(3, 3, torch.float16, kernel_device) for _ in range(3)]
        parts[operand] = lay_far_apart(parts[operand], tmp_path)
        c, u, v = parts[0], parts[1], parts[2].t()
        keep = eager_keep(seed, 3, 3, kernel_device)
        exact, eager = c.double() + keep * (u.double() @ v.double()), c + keep.half() * (u @ v)
        arguments = masks.keep_scale(DROPOUT), configs.select_update(3)
        kernels.add_update(c, u, v, *arguments, **dropout_arguments(seed))
        assert_as_accurate(c, eager, exact, "c")


class TestRanksInEights:
    """Of which the compiler is told: a rank of 8 or 24, or of 16 in rows that lie 24 apart."""

    @pytest.mark.parametrize(("first", "rank", "row"), [(0, 8, 8), (0, 24, 24), (8, 16, 24), (16, 8, 24)])
    def test_parts_of_a_stack(self, kernels, kernel_device, first, rank, row):
        M, D, E, dtype = 70, 96, 80, torch.float16
        from fastlora.kernels.tiles import in_eights

        def part(rows):
            whole = matrix(rows, row, dtype, kernel_device, scale=row**-0.5)
            return whole[:, first : first + rank]

        p, q, u, narrow = (
            matrix(M, D, dtype, kernel_device),
            matrix(D, E, dtype, kernel_device),
            part(M),
            part(D),
        )
        v = part(E).t()
        assert in_eights(rank, *u.stride())
        device = capability(kernel_device)
        h = kernels.project(p, narrow, configs.select_project(device, 8, M, rank, 2))
        assert_as_accurate(h, p @ narrow, p.double() @ narrow.double(), "h")
        g = kernels.token_sum(p, u, 1.0, configs.select_token_sum(device, 8, M, D, rank, 2), dtype)
        assert_as_accurate(g, p.t() @ u, p.double().t() @ u.double(), "g")
        c = kernels.gemm(p, q, u, v, 0.5, configs.select_gemm(device, M, E, rank, 2, False))
        exact = p.double() @ q.double() + 0.5 * (u.double() @ v.double())
        assert_as_accurate(c, p @ q + 0.5 * (u @ v), exact, "c")

    @pytest.mark.parametrize(
        ("R", "strides"), [(16, (16, 1)), (8, (1, 8)), (8, (12, 1)), (12, (8, 1)), (8, (8, 2)), (1, (1, 1))]
    )
    def test_where_the_compiler_knows_or_it_is_not_so(self, R, strides):
        from fastlora.kernels.tiles import in_eights

        assert not in_eights(R, *strides)


class TestTokenSum:
    @staticmethod
    def run(
        kernels,
        device,
        dtype,
        M,
        D,
        R,
        *,
        layouts=("contiguous",) * 2,
        out=None,
        seed=None,
        sms=8,
        transposed=False,
    ):
        alpha = 0.7
        p = matrix(M, D, dtype, device, layouts[0])
        u = matrix(M, R, dtype, device, layouts[1], M**-0.5)
        keep = torch.ones(M, D, dtype=torch.float64, device=device)
        scale, dropout = alpha, {}
        if seed is not None:
            keep, dropout = eager_keep(seed, M, D, device), dropout_arguments(seed)
            scale = alpha * masks.keep_scale(DROPOUT)
        config = configs.select_token_sum(capability(device), sms, M, D, R, 2)
        g = kernels.token_sum(p, u, scale, config, out or dtype, transposed, **dropout)
        assert g.dtype == (out or dtype)
        assert g.is_contiguous()
        exact = alpha * ((p.double() * keep).t() @ u.double())
        wide = out or dtype
        eager = (p.to(wide) * keep.to(wide)).t() @ (u.to(wide) * alpha)
        assert_as_accurate(g.t() if transposed else g, eager, exact, "g")
        return config

    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize(("M", "D", "E", "R"), SIZES)
    def test_against_float64(self, kernels, kernel_device, dtype, M, D, E, R):
        self.run(kernels, kernel_device, dtype, M, D, R)

    @pytest.mark.parametrize("M", [1024, 1025, 1500])
    @pytest.mark.parametrize("seed", [None, 77])
    def test_token_splits(self, kernels, kernel_device, M, seed):
        seed = None if seed is None else torch.tensor([seed], device=kernel_device)
        config = self.run(
            kernels, kernel_device, torch.float16, M, 40, 8, sms=2, out=torch.float32, seed=seed
        )
        assert config.splits > 1

    def test_no_split_is_empty(self, kernels, kernel_device, monkeypatch):
        """Eight splits of whole steps would be longer than all tokens: seven hold them."""
        from fastlora.kernels import token_sum

        partials, reduce = [], token_sum.reduce_partials
        monkeypatch.setattr(
            token_sum, "reduce_partials", lambda p, *rest: partials.append(p) or reduce(p, *rest)
        )
        config = self.run(kernels, kernel_device, torch.float16, 2049, 40, 8, sms=8, out=torch.float32)
        assert config.splits == 8
        assert [len(partial) for partial in partials] == [7]

    @pytest.mark.parametrize("transposed", [False, True])
    @pytest.mark.parametrize("out", [None, torch.float32])
    def test_results(self, kernels, kernel_device, transposed, out):
        self.run(kernels, kernel_device, torch.bfloat16, 700, 75, 12, out=out, transposed=transposed)

    @pytest.mark.parametrize("p_layout", LAYOUTS)
    @pytest.mark.parametrize("u_layout", LAYOUTS)
    @both_sizes
    def test_reads_only_its_views(self, kernels, kernel_device, M, D, E, R, p_layout, u_layout):
        self.run(kernels, kernel_device, torch.float16, M, D, R, layouts=(p_layout, u_layout))

    @pytest.mark.parametrize("dtype", HALF)
    def test_dropout_is_the_oracles(self, kernels, kernel_device, dtype):
        seed = torch.tensor([77], device=kernel_device)
        self.run(kernels, kernel_device, dtype, 300, 131, 8, seed=seed)

    def test_is_deterministic(self, kernels, kernel_device):
        p = matrix(1500, 64, torch.float16, kernel_device)
        u = matrix(1500, 8, torch.float16, kernel_device)
        config = configs.select_token_sum(capability(kernel_device), 2, 1500, 64, 8, 2)
        first = kernels.token_sum(p, u, 1.0, config, torch.float32)
        for _ in range(3):
            assert torch.equal(first, kernels.token_sum(p, u, 1.0, config, torch.float32))


@pytest.mark.parametrize("rank", [1, 16, 17, 128, 256])
@pytest.mark.parametrize("arch", sorted(configs.SHARED_MEMORY))
def test_every_configuration_fits_its_architecture(arch, rank):
    for itemsize in (2, 4):
        for M in (1, 17, 512, 4096, 8192):
            for config in (
                configs.select_project(arch, 108, M, rank, itemsize),
                configs.select_gemm(arch, M, 4096, rank, itemsize, dropout=False),
                configs.select_gemm(arch, M, 4096, rank, itemsize, dropout=True),
                configs.select_token_sum(arch, 108, M, 4096, rank, itemsize),
                configs.select_update(rank),
            ):
                assert configs.fits(config, arch, itemsize)
                assert config.shared_bytes(itemsize) <= configs.SHARED_MEMORY[arch]


@pytest.mark.parametrize("rank", [1, 16, 17, 64, 128, 256])
@pytest.mark.parametrize("arch", sorted(configs.SHARED_MEMORY))
def test_a_wider_adapter_fits_too(arch, rank):
    for M in (1, 17, 512, 4096, 8192):
        for config in (
            configs.select_project(arch, 108, M, rank, 2, 4),
            configs.select_backward(arch, 108, M, 4096, rank, 2, 4),
            configs.select_small(arch, 132, 4096, rank, 2, 4),
        ):
            assert configs.fits(config, arch, 2, 4)
            # Its tile is converted beside the loop: more than the same loop takes of a narrow one.
            assert config.shared_bytes(2) <= config.shared_bytes(2, 4) <= configs.SHARED_MEMORY[arch]


def test_unlisted_architecture_borrows_an_older_one():
    assert configs.nearest_capability(87) == 86
    assert configs.nearest_capability(103) == 100
    assert configs.nearest_capability(121) == 120
    assert configs.select_backward(87, 16, 8192, 4096, 16, 2) == configs.select_backward(
        86, 16, 8192, 4096, 16, 2
    )


def test_training_batches_have_large_tiles():
    for arch in (80, 90):
        config = configs.select_gemm(arch, 8192, 4096, 16, 2, dropout=False)
        assert min(config.block_m, config.block_e) >= 128


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is off in a process with a GPU")
def test_the_interpreter_checks_accesses(kernels):
    from fastlora.kernels.token_sum import _reduce_kernel

    partial, g = torch.zeros(8), torch.empty(8)
    _reduce_kernel[(1,)](partial, g, 8, 1, 1.0, BLOCK=256)
    assert not g.any()
    with pytest.raises(Exception, match="out of bounds"):
        _reduce_kernel[(1,)](partial, g, 9, 1, 1.0, BLOCK=256)
    p, q = torch.zeros(2, 16), torch.zeros(16, 8)
    with pytest.raises(Exception, match="writes an element twice"):
        kernels.project(p, q, configs.select_project(80, 8, 2, 8, 4), out=g.expand(2, 8))


class TestKeepMask:
    def test_against_a_scalar_philox(self):
        """An independent Philox4x32 with seven rounds, in Python integers."""

        def philox(counter, key):
            for _ in range(7):
                product_0, product_1 = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
                counter = (
                    (product_1 >> 32) ^ counter[1] ^ key[0],
                    product_1 & 0xFFFFFFFF,
                    (product_0 >> 32) ^ counter[3] ^ key[1],
                    product_0 & 0xFFFFFFFF,
                )
                key = ((key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF)
            return counter

        seed = -987654321987654321
        mask = reference.keep_mask(torch.tensor([seed]), 40, 29, 0.25)
        for row, column in ((0, 0), (1, 7), (39, 28), (17, 8), (3, 15)):
            word = philox((column // 8, row, 0, 0), (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))[
                column % 8 // 2
            ]
            bits = (word >> (16 * (column % 2))) & 0xFFFF
            assert mask[row, column].item() == (bits >= 16384)

    def test_rate_and_independence(self):
        keep = reference.keep_mask(torch.tensor([5]), 2048, 1024, 0.1).double()
        deviation = (0.1 * 0.9 / keep.numel()) ** 0.5
        assert abs(keep.mean().item() - 0.9) < 5 * deviation + 1 / 65536
        centred = keep - keep.mean()
        for neighbour in (
            centred.roll(1, 0),
            centred.roll(1, 1),
            centred.roll(8, 1),
            centred.t().reshape(2048, 1024),
        ):
            correlation = (centred * neighbour).mean() / centred.square().mean()
            assert abs(correlation.item()) < 5 / keep.numel() ** 0.5
        other = reference.keep_mask(torch.tensor([6]), 2048, 1024, 0.1).double() - keep.mean()
        assert abs(((centred * other).mean() / centred.square().mean()).item()) < 5 / keep.numel() ** 0.5

    def test_ends(self):
        seed = torch.tensor([1])
        assert reference.keep_mask(seed, 30, 30, 0.0).all()
        assert not reference.keep_mask(seed, 30, 30, 1.0).any()
