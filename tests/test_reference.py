"""The oracle itself: against formulas written out in float64, numerical derivatives and statistics."""

import pytest
import torch
from cases import (
    DTYPES,
    assert_matches,
    differentiate,
    dtype_id,
    eager,
    eager_errors,
    exact,
    keep_factors,
    tensors,
)

from fastlora import masks, reference

SIZES = ((1, 1, 1, 1), (7, 5, 3, 2), (33, 65, 70, 16), (4, 40, 50, 256))


def oracle(alpha=1.0, dropout=0.0, seed=None):
    def function(x, weight, A, B, bias=None):
        return reference.lora_linear(x, weight, A, B, alpha, bias, dropout, seed)

    return function


class TestFormula:
    @pytest.mark.parametrize(("M", "N", "K", "R"), SIZES)
    @pytest.mark.parametrize("bias", [True, False])
    def test_float64_to_the_last_bits(self, M, N, K, R, bias):
        case = tensors(M, N, K, R, torch.float64, bias=bias)
        ours, truth = differentiate(oracle(-0.7), case), exact(case, -0.7)
        for name in ("y", "x", "A", "B") + (("bias",) if bias else ()):
            torch.testing.assert_close(getattr(ours, name), getattr(truth, name), rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
    @pytest.mark.parametrize("lead", [(), (3,), (2, 5), (2, 1, 4)])
    def test_any_dtype_and_rank_of_x(self, dtypes, lead):
        case = tensors(lead, 33, 21, 5, *dtypes)
        ours = differentiate(oracle(1.5), case)
        assert ours.y.dtype == case.x.dtype
        assert ours.y.shape == (*lead, 33)
        for name in ("x", "A", "B", "bias"):
            assert getattr(ours, name).dtype == getattr(case, name).dtype, name
        assert_matches(ours, exact(case, 1.5), eager_errors(case, 1.5))

    @pytest.mark.parametrize("lead", [(0,), (2, 0, 3)])
    def test_no_tokens(self, lead):
        case = tensors(lead, 6, 4, 2)
        ours = differentiate(oracle(2.0), case)
        assert ours.y.shape == (*lead, 6)
        assert ours.x.shape == (*lead, 4)
        assert not ours.A.any()
        assert not ours.B.any()
        assert not ours.bias.any()

    def test_strided_operands(self):
        case = tensors((3, 4), 6, 5, 2, torch.float64)
        truth = exact(case, 0.5)
        case.x = case.x.transpose(0, 1).contiguous().transpose(0, 1)
        case.weight = torch.cat([case.weight, case.weight], 1)[:, :5]
        case.A = case.A.t().contiguous().t()
        case.B = case.B.repeat_interleave(2, 1)[:, ::2]
        ours = differentiate(oracle(0.5), case)
        for name in ("y", "x", "A", "B", "bias"):
            torch.testing.assert_close(getattr(ours, name), getattr(truth, name), rtol=1e-12, atol=1e-12)

    def test_wider_adapters_are_not_rounded(self):
        """PEFT's form: dA of fp32 adapters is as good as fp32 sums of the half-precision inputs."""
        case = tensors(64, 32, 48, 4, torch.bfloat16, torch.float32)
        truth = exact(case)
        ours = differentiate(oracle(), case)
        assert (ours.A.double() - truth.A).abs().max() < 1e-4

    @pytest.mark.parametrize("dropout", [-0.1, 1.5, float("nan")])
    def test_no_probability(self, dropout):
        case = tensors(3, 6, 5, 2)
        with pytest.raises(ValueError, match=rf"dropout must be in \[0, 1\], got {dropout}"):
            reference.lora_linear(case.x, case.weight, case.A, case.B, dropout=dropout)
        with pytest.raises(ValueError, match=rf"dropout must be in \[0, 1\], got {dropout}"):
            reference.lora_linear_group(case.x, [case.weight], [case.A], [case.B], [1.0], dropout=dropout)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_primitives(self, dtype):
        p, q = torch.randn(9, 20).to(dtype), torch.randn(20, 7)
        u, v, bias = torch.randn(9, 3), torch.randn(3, 7), torch.randn(7).to(dtype)
        keep = torch.rand(9, 7)
        assert reference.project(p, q).dtype == torch.float32
        torch.testing.assert_close(reference.project(p, q), p.float() @ q)
        c = reference.gemm(p, q.to(dtype), u, v, -2.0, bias, keep)
        assert c.dtype == dtype
        truth = p.double() @ q.to(dtype).double() - 2 * keep.double() * (u @ v).double() + bias.double()
        torch.testing.assert_close(c.double(), truth, rtol=4 * torch.finfo(dtype).eps, atol=0.05)
        s = reference.token_sum(p, u, 3.0)
        assert s.dtype == torch.float32
        torch.testing.assert_close(s, 3 * p.float().T @ u)


class TestDerivatives:
    @pytest.mark.parametrize("dropout", [0.0, 0.4])
    @pytest.mark.parametrize("bias", [True, False])
    def test_gradcheck_and_gradgradcheck(self, dropout, bias):
        case = tensors((2, 3), 4, 5, 2, torch.float64, bias=bias)
        seed = torch.tensor([11])
        inputs = [
            t.requires_grad_() for t in (case.x, case.weight, case.A, case.B, case.bias) if t is not None
        ]
        function = oracle(-1.3, dropout, seed)
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


class TestDropout:
    @pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
    def test_one_mask_in_forward_and_both_gradients(self, p):
        case = tensors((5, 7), 12, 33, 4, torch.float64)
        seed = torch.tensor([123456789012345])
        keep = keep_factors(seed, case, p)
        # 16-bit thresholds: p is exact only to 1/65536, and so is the scale.
        keep = keep / keep.max() * masks.keep_scale(p)
        ours, truth = differentiate(oracle(0.8, p, seed), case), exact(case, 0.8, keep)
        for name in ("y", "x", "A", "B", "bias"):
            torch.testing.assert_close(getattr(ours, name), getattr(truth, name), rtol=1e-9, atol=1e-9)

    def test_certain_dropout_is_the_frozen_layer(self):
        case = tensors(6, 5, 4, 2)
        ours = differentiate(oracle(3.0, 1.0, torch.tensor([1])), case)
        torch.testing.assert_close(ours.y, torch.nn.functional.linear(case.x, case.weight, case.bias))
        torch.testing.assert_close(ours.x, case.dy @ case.weight)
        assert not ours.A.any()
        assert not ours.B.any()

    def test_none_at_zero(self):
        case = tensors(6, 5, 4, 2)
        state = torch.get_rng_state()
        ours = differentiate(oracle(3.0, 0.0), case)
        assert torch.equal(state, torch.get_rng_state())
        torch.testing.assert_close(ours.y, differentiate(eager(3.0), case).y)

    def test_fresh_and_reproducible_without_a_seed(self):
        case = tensors(6, 5, 40, 2)
        torch.manual_seed(3)
        first, second = (differentiate(oracle(1.0, 0.5), case).y for _ in range(2))
        torch.manual_seed(3)
        assert torch.equal(first, differentiate(oracle(1.0, 0.5), case).y)
        assert not torch.equal(first, second)
