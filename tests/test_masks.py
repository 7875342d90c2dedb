"""The masks of dropout: reproducible, the same by every way of drawing them, and statistically sound."""

import math

import pytest
import torch

from fastlora import masks
from fastlora.masks import keep_mask


@pytest.mark.parametrize("p", [0.1, 0.25, 0.5, 0.75])
def test_scale_keeps_the_mean(p):
    assert masks.keep_scale(p) == pytest.approx(1 / (1 - p), rel=1e-4)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.15, 0.3, 0.7, 0.9])
def test_the_threshold_is_the_nearest(p):
    assert abs(masks.keep_threshold(p) - 65536 * p) <= 0.5


def test_mask_is_a_function_of_seed_row_and_column():
    seed = torch.tensor([-5])
    whole = keep_mask(seed, 70, 90, 0.3)
    assert whole.dtype == torch.bool
    assert whole.shape == (70, 90)
    for rows, columns in ((70, 90), (1, 1), (33, 17), (70, 5), (2, 90), (0, 9)):
        assert torch.equal(keep_mask(seed, rows, columns, 0.3), whole[:rows, :columns])


@pytest.mark.parametrize("seed", [0, 1, -1, 2**63 - 1, -(2**63), 0x9E3779B97F4A7C15 - 2**64])
@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (3, 37), (1, 1024), (64, 1024), (0, 9), (9, 0)])
def test_a_small_mask_is_drawn_alike_with_and_without_numpy(shape, seed, monkeypatch):
    drawn = [keep_mask(torch.tensor([seed]), *shape, p) for p in (0.1, 0.5)]
    monkeypatch.setattr(masks, "numpy", None)
    for keep, p in zip(drawn, (0.1, 0.5), strict=True):
        assert torch.equal(keep, keep_mask(torch.tensor([seed]), *shape, p))


@pytest.mark.parametrize("with_numpy", [True, False])
def test_an_element_at_the_threshold_is_kept(with_numpy, monkeypatch):
    pytest.importorskip("numpy")
    seed, bits = torch.tensor([5]), masks._few_philox_bits(1, 1, 5)[0].tolist()
    if not with_numpy:
        monkeypatch.setattr(masks, "numpy", None)
    for i in range(8):
        for draw in (keep_mask, masks.functional_keep_mask):
            assert draw(seed, 1, 8, bits[i] / 65536)[0, i]
            assert not draw(seed, 1, 8, (bits[i] + 1) / 65536)[0, i]


def test_a_changed_mask_changes_no_later_one():
    seed = torch.tensor([77])
    kept = keep_mask(seed, 4, 30, 0.5)
    expected = kept.clone()
    kept.fill_(False)
    assert torch.equal(keep_mask(seed, 4, 30, 0.5), expected)


@pytest.mark.parametrize("other", [-6, 5, (1 << 40) - 5, 2**63 - 5])
def test_both_halves_of_the_seed_count(other):
    mine = keep_mask(torch.tensor([-5]), 100, 100, 0.5)
    theirs = keep_mask(torch.tensor([other]), 100, 100, 0.5)
    assert 0.45 < (mine == theirs).float().mean() < 0.55


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.95])
def test_statistics(p):
    """Keep rate over all, by row and by column; neighbours in both directions are independent."""
    rows, columns = 512, 512
    keep = keep_mask(torch.tensor([2024]), rows, columns, p).double()
    deviation = math.sqrt(p * (1 - p))
    assert abs(keep.mean() - (1 - p)) < 5 * deviation / math.sqrt(rows * columns)
    for dim in (0, 1):
        spread = (keep.mean(dim) - (1 - p)).abs().max()
        assert spread < 5.5 * deviation / math.sqrt(rows)
    z = (keep - (1 - p)) / deviation
    for shift in (1, 2, 3, 4, 8, 16, 64):
        for dim in (0, 1):
            product = (z.narrow(dim, 0, rows - shift) * z.narrow(dim, shift, rows - shift)).mean()
            assert abs(product) < 5.5 / rows, (shift, dim)


def test_masks_of_consecutive_seeds_are_independent():
    drawn = torch.stack([keep_mask(torch.tensor([s]), 128, 128, 0.5) for s in range(8)])
    z = (drawn.double() - 0.5).reshape(8, -1) * 2
    correlation = (z @ z.T / z.shape[1]).fill_diagonal_(0)
    assert correlation.abs().max() < 5.5 / 128


def test_new_seed():
    torch.manual_seed(9)
    seeds = [masks.new_seed(torch.device("cpu")) for _ in range(50)]
    assert all(seed.dtype == torch.int64 and seed.shape == (1,) for seed in seeds)
    assert len({seed.item() for seed in seeds}) == 50
    # More than 32 random bits: the high halves differ too.
    assert len({seed.item() >> 32 for seed in seeds}) > 45
    torch.manual_seed(9)
    assert masks.new_seed(torch.device("cpu")).item() == seeds[0].item()


@pytest.mark.parametrize(("rows", "groups"), [(1, 1), (3, 5)])
@pytest.mark.parametrize("seed", [0, 1234567890123456789])
def test_every_way_of_drawing_is_philox(rows, groups, seed):
    """Against the definition, one counter at a time; its words are those of Random123's known answers."""

    def philox(counter, key):
        c, k = [*counter, 0, 0], [key & 0xFFFFFFFF, key >> 32]
        for _ in range(7):
            a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
            k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
        return c

    assert philox((0, 0), 0) == [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    threshold = masks.keep_threshold(0.5)
    expected = [
        [
            (word >> shift & 0xFFFF) >= threshold
            for group in range(groups)
            for word in philox((group, row), seed)
            for shift in (0, 16)
        ]
        for row in range(rows)
    ]
    for draw in (keep_mask, masks.functional_keep_mask):
        assert draw(torch.tensor([seed]), rows, 8 * groups, 0.5).tolist() == expected
