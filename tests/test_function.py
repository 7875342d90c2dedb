"""``fastlora.lora_linear`` on every path: values, gradients, layouts, dropout, autocast, memory, errors."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from cases import (
    DTYPES,
    HALF,
    assert_matches,
    differentiate,
    dtype_id,
    eager,
    eager_errors,
    eager_forms,
    every_run,
    exact,
    fused,
    keep_factors,
    leaves_of,
    saved_for_backward,
    tensors,
    worst_errors,
)
from tolerance import LAYOUTS, errors, lay_far_apart, lay_out
from torch import nn
from torch.utils.checkpoint import checkpoint

import fastlora
from fastlora import reference

NAMES = ("y", "x", "A", "B", "bias")
# (M, N, K, R): one token, odd sizes, padded ranks, ranks above the other sizes.
SIZES = ((1, 33, 65, 5), (37, 50, 70, 16), (65, 131, 67, 33), (5, 7, 3, 1), (9, 40, 30, 256))


def same(a, b, names=NAMES):
    for name in names:
        assert torch.equal(getattr(a, name), getattr(b, name)), name


class TestValues:
    @every_run
    @pytest.mark.parametrize("R", [72, 200])
    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_many_tokens_and_wide_adapters_of_high_rank(self, run, R, dropout):
        """The tiles that take the most shared memory."""
        case = tensors(4100, 72, 136, R, torch.bfloat16, torch.float32, device=run.device)
        seed = torch.tensor([11], device=run.device)
        keep = keep_factors(seed, case, dropout) if dropout else None
        ours = differentiate(fused(1.7, dropout, seed if dropout else None, run.path), case)
        assert_matches(ours, exact(case, 1.7, keep), eager_errors(case, 1.7, keep))

    @every_run
    @pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
    @pytest.mark.parametrize(("M", "N", "K", "R"), SIZES)
    def test_against_float64(self, run, dtypes, M, N, K, R, poisoned_empty):
        case = tensors(M, N, K, R, *dtypes, device=run.device)
        ours = differentiate(fused(1.7, path=run.path), case)
        assert ours.y.dtype == case.x.dtype
        for name in ("x", "A", "B", "bias"):
            assert getattr(ours, name).dtype == getattr(case, name).dtype, name
        assert_matches(ours, exact(case, 1.7), eager_errors(case, 1.7))

    @every_run
    @pytest.mark.parametrize("alpha", [0, 0.0, -2.5, 1e-3])
    def test_alpha(self, run, alpha):
        case = tensors(20, 24, 40, 4, torch.float16, device=run.device)
        ours = differentiate(fused(alpha, path=run.path), case)
        assert_matches(ours, exact(case, alpha), eager_errors(case, alpha))

    @every_run
    def test_alpha_of_each_call_counts(self, run):
        """Nothing may keep the alpha of an earlier call of the same shapes."""
        case = tensors(20, 24, 40, 4, torch.float16, device=run.device)
        for alpha in (1.0, -3.0, 0.5):
            ours = differentiate(fused(alpha, path=run.path), case)
            assert_matches(ours, exact(case, alpha), eager_errors(case, alpha))

    @every_run
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
    def test_without_bias(self, run, dtype):
        case = tensors((3, 7), 24, 40, 4, dtype, device=run.device, bias=False)
        ours = differentiate(fused(0.5, path=run.path), case)
        assert_matches(ours, exact(case, 0.5), eager_errors(case, 0.5))

    @every_run
    @pytest.mark.parametrize(("N", "K"), [(24, 0), (0, 40)])
    def test_no_features(self, run, N, K, poisoned_empty):
        case = tensors((2, 3), 24, 40, 4, torch.float16, device=run.device)
        case.x, case.dy, case.bias = case.x[..., :K], case.dy[..., :N], case.bias[:N]
        case.weight, case.A, case.B = case.weight[:N, :K], case.A[:N], case.B[:, :K]
        ours, theirs = (differentiate(form, case) for form in (fused(0.5, path=run.path), eager(0.5)))
        for name in NAMES:
            torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))

    @every_run
    @pytest.mark.parametrize("lead", [(), (0,), (2, 0), (1,), (3, 5), (2, 1, 3)])
    def test_leading_sizes(self, run, lead, poisoned_empty):
        case = tensors(lead, 24, 40, 4, torch.float16, device=run.device)
        ours = differentiate(fused(0.5, path=run.path), case)
        assert ours.y.shape == (*lead, 24)
        assert ours.x.shape == (*lead, 40)
        assert_matches(ours, exact(case, 0.5), eager_errors(case, 0.5))

    @every_run
    def test_without_gradients_the_same_values(self, run):
        case = tensors((3, 5), 24, 40, 4, torch.float16, device=run.device)
        function = fused(0.5, path=run.path)
        arguments = (case.x, case.weight, case.A, case.B, case.bias)
        with torch.no_grad():
            y = function(*arguments)
        assert not y.requires_grad
        with torch.inference_mode():
            z = function(*arguments)
        assert torch.equal(y, differentiate(function, case).y)
        assert torch.equal(y, z.clone())

    @pytest.mark.parametrize("dtypes", [d for d in DTYPES if d[0] in HALF], ids=dtype_id)
    @pytest.mark.parametrize(("M", "N", "K", "R"), SIZES)
    @pytest.mark.parametrize("bias", [False, True])
    def test_in_the_order_of_a_gpus_blas(self, as_blas_on_a_gpu, dtypes, M, N, K, R, bias):
        case = tensors(M, N, K, R, *dtypes, bias=bias)
        wanted = ("x", "A", "B", "bias")[: 3 + bias]
        ours = differentiate(fused(1.7, path="addmm"), case, wanted)
        assert ours.y.dtype == case.x.dtype
        assert_matches(ours, exact(case, 1.7), eager_errors(case, 1.7, wanted=wanted))

    @every_run
    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_deterministic(self, run, dropout):
        case = tensors(70, 50, 90, 8, torch.float16, device=run.device)
        seed = torch.tensor([4], device=run.device)
        function = fused(1.1, dropout, seed, run.path)
        same(differentiate(function, case), differentiate(function, case))

    @every_run
    def test_inputs_stay_as_they_are(self, run):
        case = tensors(9, 24, 40, 4, torch.float16, device=run.device)
        before = {name: value.clone() for name, value in vars(case).items() if name != "redraw"}
        differentiate(fused(1.1, 0.2, path=run.path), case)
        for name, value in before.items():
            assert torch.equal(value, getattr(case, name)), name


class TestLayouts:
    @every_run
    @pytest.mark.parametrize("operand", ["x", "weight", "A", "B", "dy"])
    @pytest.mark.parametrize("layout", LAYOUTS[1:])
    def test_strided_operands(self, run, operand, layout):
        case = tensors(19, 24, 40, 5, torch.float16, device=run.device)
        truth, yardstick = exact(case, 0.5), eager_errors(case, 0.5)
        setattr(case, operand, lay_out(getattr(case, operand), layout))
        assert_matches(differentiate(fused(0.5, path=run.path), case), truth, yardstick)

    @every_run
    def test_strided_bias(self, run):
        case = tensors(19, 24, 40, 5, torch.float16, device=run.device)
        truth, yardstick = exact(case, 0.5), eager_errors(case, 0.5)
        case.bias = torch.stack([case.bias, torch.full_like(case.bias, float("nan"))], 1)[:, 0]
        assert_matches(differentiate(fused(0.5, path=run.path), case), truth, yardstick)

    @every_run
    @pytest.mark.parametrize("view", ["permuted", "expanded", "sliced", "one_feature_stride_0"])
    def test_views_of_x(self, run, view):
        case = tensors((4, 6), 24, 40, 5, torch.float16, device=run.device)
        if view == "permuted":
            case.x = case.x.transpose(0, 1).contiguous().transpose(0, 1)
        elif view == "expanded":
            case.x = case.x[:1].expand(4, 6, 40)
        elif view == "sliced":
            case.x = torch.cat([case.x, torch.full_like(case.x, float("nan"))], 1)[:, :6]
        else:
            case.x = case.x[..., :1].expand(4, 6, 40)
        truth, yardstick = exact(case, 0.5), eager_errors(case, 0.5)
        assert_matches(differentiate(fused(0.5, path=run.path), case), truth, yardstick)

    @every_run
    @pytest.mark.parametrize("lead", [(), (11,), (3, 4)])
    def test_expanded_dy_of_a_plain_sum(self, run, lead):
        case = tensors(lead, 24, 40, 5, torch.float16, device=run.device)
        case.dy = torch.ones((), dtype=torch.float16, device=run.device).expand(*lead, 24)
        ours = differentiate(fused(0.5, path=run.path), case)
        assert_matches(ours, exact(case, 0.5), eager_errors(case, 0.5))
        leaf = case.A.clone().requires_grad_()
        fused(0.5, path=run.path)(case.x, case.weight, leaf, case.B, case.bias).sum().backward()
        assert torch.equal(leaf.grad, ours.A)

    @every_run
    def test_permuted_dy(self, run):
        case = tensors((4, 6), 24, 40, 5, torch.float16, device=run.device)
        truth, yardstick = exact(case, 0.5), eager_errors(case, 0.5)
        case.dy = case.dy.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        assert_matches(differentiate(fused(0.5, path=run.path), case), truth, yardstick)


class TestLargeOffsets:
    @pytest.mark.parametrize("operand", ["x", "weight", "A", "B", "dy"])
    @every_run
    def test_rows_beyond_31_bits(self, run, operand, tmp_path):
        if run.path != "triton":
            pytest.skip("the BLAS's own matter")
        case = tensors(3, 3, 3, 3, torch.float16, device=run.device)
        if operand in ("x", "dy"):
            case = tensors(3, 20, 17, 2, torch.float16, device=run.device)
        elif operand in ("weight", "A"):
            case = tensors(20, 3, 17, 2, torch.float16, device=run.device)
        else:
            case = tensors(20, 18, 17, 3, torch.float16, device=run.device)
        truth, yardstick = exact(case, 0.5), eager_errors(case, 0.5)
        setattr(case, operand, lay_far_apart(getattr(case, operand), tmp_path))
        ours = differentiate(fused(0.5, path=run.path), case, [n for n in NAMES[1:] if n != operand])
        for name in ("y", "x", "A", "B"):
            if name in vars(ours):
                assert_matches(ours, truth, {name: yardstick[name]})


def products(function):
    """How many matrix products the call runs."""
    names = {
        "aten::mm",
        "aten::addmm",
        "aten::addmm_",
        "aten::bmm",
        "aten::baddbmm",
        "aten::mv",
        "aten::addmv",
    }
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return sum(event.count for event in profile.key_averages() if event.key in names)


class TestOnlyWhatIsAsked:
    @every_run
    @pytest.mark.parametrize(
        "wanted",
        [
            ("x",),
            ("A",),
            ("B",),
            ("bias",),
            ("A", "B"),
            ("x", "bias"),
            ("x", "A", "B"),
            ("x", "A", "B", "bias"),
        ],
        ids="+".join,
    )
    def test_gradients(self, run, wanted):
        case = tensors((5, 7), 24, 40, 4, torch.float16, device=run.device)
        ours = differentiate(fused(0.5, path=run.path), case, wanted)
        yardstick = eager_errors(case, 0.5, wanted=wanted)
        assert set(yardstick) == {"y", *wanted}
        assert_matches(ours, exact(case, 0.5), yardstick)

    @every_run
    @pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
    @pytest.mark.parametrize(
        ("wanted", "ranks"),
        [
            (("x", "A", "B", "bias"), 1),
            (("A", "B"), 1),
            (("A",), 1),
            (("B",), 0),
            (("x",), 0),
            (("bias",), 0),
        ],
    )
    def test_saved(self, run, dtypes, wanted, ranks):
        """At most h, (M, R), beyond x and the parameters, and h only where dA needs it."""
        case = tensors((5, 7), 24, 40, 4, *dtypes, device=run.device)
        y, kept = saved_for_backward(fused(0.5, path=run.path), case, wanted)
        assert y.requires_grad
        assert sum(tensor.numel() for tensor in kept) <= ranks * 35 * 4

    @every_run
    @pytest.mark.parametrize("view", ["permuted", "expanded", "transposed"])
    def test_a_view_of_x_is_not_copied_for_backward(self, run, view):
        case = tensors((5, 7), 24, 40, 4, torch.float16, device=run.device)
        if view == "permuted":
            case.x = case.x.transpose(0, 1).contiguous().transpose(0, 1)
        elif view == "expanded":
            case.x = case.x[:1, :1].expand(5, 7, 40)
        else:
            case.x = torch.randn(40, 35, device=run.device).half().t()
        _, kept = saved_for_backward(fused(0.5, path=run.path), case, ("x", "A", "B"))
        assert sum(tensor.numel() for tensor in kept) <= 35 * 4

    @every_run
    def test_saved_with_dropout_and_a_seed(self, run):
        case = tensors((5, 7), 24, 40, 4, torch.float16, device=run.device)
        seed = torch.tensor([1], device=run.device)
        _, kept = saved_for_backward(fused(0.5, 0.3, seed, run.path), case, ("x", "A", "B"))
        assert sum(tensor.numel() for tensor in kept if tensor is not seed) <= 35 * 4 + 1

    @every_run
    def test_nothing_saved_without_gradients(self, run):
        case = tensors((5, 7), 24, 40, 4, torch.float16, device=run.device)
        y, kept = saved_for_backward(fused(0.5, path=run.path), case, ())
        assert not y.requires_grad
        assert not kept

    @pytest.mark.parametrize("path", ["addmm", "reference"])
    @pytest.mark.parametrize(
        ("wanted", "count"),
        [
            (("x",), 3),  # dy @ W, g, g @ B
            (("A",), 1),  # dy.T @ h
            (("B",), 2),  # g, g.T @ x
            (("bias",), 0),
            (("A", "B"), 3),
            (("x", "A", "B", "bias"), 5),
        ],
    )
    def test_products_of_backward(self, path, wanted, count):
        """A product that nobody asked for costs time that no value shows."""
        case = tensors(35, 24, 40, 4)
        leaves = {n: getattr(case, n) for n in ("x", "weight", "A", "B", "bias")}
        for name in wanted:
            leaves[name] = leaves[name].detach().requires_grad_()
        y = fused(0.5, path=path)(**leaves)
        assert products(lambda: y.backward(case.dy)) == count

    @pytest.mark.parametrize("path", ["addmm", "reference"])
    def test_products_of_forward(self, path):
        case = tensors(35, 24, 40, 4)
        arguments = (case.x, case.weight, case.A, case.B, case.bias)
        assert products(lambda: fused(0.5, path=path)(*arguments)) == 3

    @every_run
    def test_backward_twice_over_a_retained_graph(self, run):
        case = tensors(9, 24, 40, 4, torch.float16, device=run.device)
        A = case.A.clone().requires_grad_()
        y = fused(0.5, path=run.path)(case.x, case.weight, A, case.B, case.bias)
        first = torch.autograd.grad(y, A, case.dy, retain_graph=True)[0]
        assert torch.equal(first, torch.autograd.grad(y, A, case.dy)[0])

    @every_run
    def test_x_changed_in_place_is_noticed(self, run):
        """dB needs x: autograd's version check must see a change between forward and backward."""
        case = tensors(9, 24, 40, 4, torch.float16, device=run.device)
        B = case.B.clone().requires_grad_()
        y = fused(0.5, path=run.path)(case.x, case.weight, case.A, B, case.bias)
        case.x.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward(case.dy)

    @every_run
    @pytest.mark.parametrize("wanted", ["x", "A", "bias"])
    def test_x_may_change_where_no_gradient_needs_it(self, run, wanted):
        case = tensors(9, 24, 40, 4, torch.float16, device=run.device)
        leaf = getattr(case, wanted).detach().requires_grad_()
        leaves = {name: getattr(case, name) for name in ("x", "weight", "A", "B", "bias")} | {wanted: leaf}
        y = fused(0.5, path=run.path)(**leaves)
        before = torch.autograd.grad(y, leaf, case.dy, retain_graph=True)[0]
        case.x.add_(1)
        assert torch.equal(before, torch.autograd.grad(y, leaf, case.dy)[0])

    @every_run
    def test_no_gradient_of_y_gives_none(self, run):
        """As for F.linear: None, not zeros that an optimizer would take for a step."""

        class Nothing(torch.autograd.Function):
            @staticmethod
            def forward(ctx, y):
                return y.clone()

            @staticmethod
            def backward(ctx, dy):
                return None

        case = tensors(9, 24, 40, 4, device=run.device)
        A = case.A.detach().requires_grad_()
        Nothing.apply(fused(0.5, path=run.path)(case.x, case.weight, A, case.B)).sum().backward()
        assert A.grad is None


class TestDropout:
    @every_run
    @pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
    @pytest.mark.parametrize("p", [0.1, 0.5])
    def test_values_and_gradients_are_the_oracles(self, run, dtypes, p):
        case = tensors((5, 7), 24, 51, 4, *dtypes, device=run.device)
        seed = torch.tensor([2**40 + 17], device=run.device)
        keep = keep_factors(seed, case, p)
        ours = differentiate(fused(1.7, p, seed, run.path), case)
        assert_matches(ours, exact(case, 1.7, keep), eager_errors(case, 1.7, keep))

    @every_run
    def test_strided_x(self, run):
        """The mask goes by row and column of x, not by address."""
        case = tensors((5, 7), 24, 51, 4, torch.float16, device=run.device)
        seed = torch.tensor([3], device=run.device)
        keep = keep_factors(seed, case, 0.4)
        truth, yardstick = exact(case, 1.7, keep), eager_errors(case, 1.7, keep)
        case.x = case.x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        assert_matches(differentiate(fused(1.7, 0.4, seed, run.path), case), truth, yardstick)

    @every_run
    def test_all_dropped(self, run):
        case = tensors(9, 24, 40, 4, torch.float16, device=run.device)
        ours = differentiate(fused(1.7, 1.0, path=run.path), case)
        assert not ours.A.any()
        assert not ours.B.any()
        keep = torch.zeros(9, 40, device=run.device)
        assert_matches(ours, exact(case, 1.7, keep), eager_errors(case, 1.7, keep))

    @every_run
    @pytest.mark.parametrize("lead", [(), (0,), (2, 0)])
    def test_few_tokens(self, run, lead):
        case = tensors(lead, 24, 40, 4, torch.float16, device=run.device)
        seed = torch.tensor([5], device=run.device)
        keep = keep_factors(seed, case, 0.5)
        ours = differentiate(fused(1.7, 0.5, seed, run.path), case)
        assert_matches(ours, exact(case, 1.7, keep), eager_errors(case, 1.7, keep))

    @every_run
    def test_no_random_numbers_at_zero(self, run):
        case = tensors(9, 24, 40, 4, torch.float16, device=run.device)
        before = torch.get_rng_state()
        y = fused(1.7, 0.0, path=run.path)(case.x, case.weight, case.A, case.B)
        assert torch.equal(before, torch.get_rng_state())
        seeded = fused(1.7, 0.0, torch.tensor([1], device=run.device), run.path)
        assert torch.equal(y, seeded(case.x, case.weight, case.A, case.B))

    @every_run
    def test_a_given_seed_draws_nothing(self, run):
        case = tensors(9, 24, 40, 4, torch.float16, device=run.device)
        before = torch.get_rng_state()
        differentiate(fused(1.7, 0.5, torch.tensor([1], device=run.device), run.path), case)
        assert torch.equal(before, torch.get_rng_state())

    @every_run
    def test_fresh_masks_from_torchs_generator(self, run):
        case = tensors(9, 24, 40, 4, torch.float16, device=run.device)
        function = fused(1.7, 0.5, path=run.path)
        torch.manual_seed(7)
        first, second = (differentiate(function, case) for _ in range(2))
        torch.manual_seed(7)
        same(first, differentiate(function, case))
        assert not torch.equal(first.y, second.y)
        assert not torch.equal(first.x, second.x)

    @every_run
    def test_keep_rate_without_a_seed(self, run):
        """With the identity as B and A, and no base, y shows the mask itself."""
        eye = torch.eye(64, device=run.device)
        x = torch.ones(128, 64, device=run.device)
        y = fused(1.0, 0.25, path=run.path)(x, torch.zeros(64, 64, device=run.device), eye, eye)
        kept = y != 0
        assert abs(kept.float().mean().item() - 0.75) < 5 * (0.25 * 0.75 / y.numel()) ** 0.5
        torch.testing.assert_close(y[kept], torch.full_like(y[kept], 4 / 3), rtol=2e-3, atol=0)

    @every_run
    def test_gradients_without_a_seed_use_the_forwards_mask(self, run):
        """y, dx and dB show their masks through identities; all three are the same one."""
        eye = torch.eye(48, device=run.device)
        x = torch.ones(40, 48, device=run.device, requires_grad=True)
        B = eye.clone().requires_grad_()
        y = fused(1.0, 0.5, path=run.path)(x, torch.zeros(48, 48, device=run.device), eye, B)
        dx, dB = torch.autograd.grad(y, (x, B), torch.ones_like(y))
        assert 0.3 < (y != 0).float().mean() < 0.7
        torch.testing.assert_close(dx, y.detach(), rtol=2e-3, atol=0)
        torch.testing.assert_close(dB, y.detach().sum(0).expand(48, 48), rtol=2e-3, atol=0)

    @every_run
    @pytest.mark.parametrize("path", ["auto", "addmm", "reference"])
    @pytest.mark.parametrize("adapter_dtype", [torch.float16, torch.float32], ids=dtype_id)
    def test_checkpoint_recomputes_on_another_path(self, run, path, adapter_dtype):
        """Forward on one path, the recomputation for backward on another: h means the same on both."""
        case = tensors(30, 24, 24, 16, torch.float16, adapter_dtype, device=run.device)
        seed = torch.tensor([5], device=run.device)

        def function(x, A, B):
            return fastlora.lora_linear(x, case.weight, A, B, 1.7, case.bias, 0.75, seed)

        def gradients(call):
            x, A, B = (getattr(case, name).detach().requires_grad_() for name in ("x", "A", "B"))
            with fastlora.use_path(path):
                y = call(x, A, B)
            with fastlora.use_path(run.path):
                return torch.autograd.grad(y, (x, A, B), case.dy)

        plain = gradients(function)
        recomputed = gradients(lambda *arguments: checkpoint(function, *arguments, use_reentrant=False))
        for expected, actual in zip(plain, recomputed, strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-2, atol=1e-2)

    @every_run
    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpoint_recomputes_with_the_same_mask(self, run, reentrant):
        case = tensors(30, 24, 24, 4, torch.float16, device=run.device)
        function = fused(1.7, 0.5, path=run.path)

        def layer(x, A, B):
            return function(x, case.weight, A, B, case.bias)

        def stack(call):
            x, A, B = (getattr(case, name).detach().requires_grad_() for name in ("x", "A", "B"))
            torch.manual_seed(1)
            y = call(call(x, A, B), A, B)
            torch.manual_seed(2)  # the generator has gone on when backward recomputes
            return y, *torch.autograd.grad(y, (x, A, B), case.dy)

        def checkpointed(*args):
            return checkpoint(layer, *args, use_reentrant=reentrant)

        if reentrant:  # torch.autograd.grad is not supported there

            def stack(call):
                x, A, B = (getattr(case, name).detach().requires_grad_() for name in ("x", "A", "B"))
                torch.manual_seed(1)
                y = call(call(x, A, B), A, B)
                torch.manual_seed(2)
                y.backward(case.dy)
                return y, x.grad, A.grad, B.grad

        for plain, recomputed in zip(stack(layer), stack(checkpointed), strict=True):
            assert torch.equal(plain, recomputed)


class TestNonFinite:
    @every_run
    @pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
    @pytest.mark.parametrize("operand", ["x", "weight", "A", "B", "bias", "dy"])
    def test_propagates_as_in_eager(self, run, operand, value):
        case = tensors(9, 24, 40, 4, torch.float16, device=run.device)
        poisoned = getattr(case, operand).clone()
        poisoned[(-1,) * poisoned.dim()] = value
        setattr(case, operand, poisoned)
        ours, theirs = differentiate(fused(0.5, path=run.path), case), differentiate(eager(0.5), case)
        assert not all(torch.isfinite(getattr(theirs, name)).all() for name in NAMES)
        for name in NAMES:
            mine, stock = getattr(ours, name), getattr(theirs, name)
            assert torch.equal(mine.isnan(), stock.isnan()), name
            assert torch.equal(mine.isposinf(), stock.isposinf()), name
            assert torch.equal(mine.isneginf(), stock.isneginf()), name

    @every_run
    def test_alpha_zero_does_not_hide_infinity(self, run):
        case = tensors(9, 24, 40, 4, torch.float16, device=run.device)
        case.B[0, 0] = float("inf")
        ours, theirs = differentiate(fused(0.0, path=run.path), case), differentiate(eager(0.0), case)
        assert theirs.y.isnan().any()
        assert torch.equal(ours.y.isnan(), theirs.y.isnan())

    @every_run
    def test_overflow_of_half_precision(self, run):
        """Infinite where the exact value is out of range, and never where eager PyTorch stays finite."""
        case = tensors(9, 24, 40, 4, torch.float16, device=run.device)
        case.x = case.x * 10000
        arguments = (case.x, case.weight, case.A, case.B, case.bias)
        y, stock = fused(8.0, path=run.path)(*arguments), eager(8.0)(*arguments)
        beyond = exact(case, 8.0).y.abs() > 1.01 * torch.finfo(torch.float16).max
        assert beyond.any()
        assert y[beyond].isinf().all()
        assert stock.isfinite().any()
        assert y[stock.isfinite()].isfinite().all()
        assert not y.isnan().any()


# (x, base, adapters, autocast)
AUTOCAST = [
    (x, base, adapter, half)
    for half in HALF
    for x, base, adapter in [
        (torch.float32, torch.float32, torch.float32),
        (half, torch.float32, torch.float32),
        (torch.float32, half, torch.float32),
        (half, half, torch.float32),
        (torch.float32, half, half),
        (half, half, half),
    ]
]


class TestAutocast:
    @every_run
    @pytest.mark.parametrize(("x", "base", "adapter", "half"), AUTOCAST, ids=dtype_id)
    def test_dtypes_and_values(self, run, x, base, adapter, half):
        """y in autocast's dtype, each gradient in its own tensor's, as accurate as eager under autocast."""
        case = tensors((5, 7), 24, 40, 4, half, device=run.device)
        case.x = case.x.to(x)
        case.weight, case.bias = case.weight.to(base), case.bias.to(base)
        case.A, case.B = case.A.to(adapter), case.B.to(adapter)

        def under_autocast(function):
            def call(**leaves):
                with torch.autocast(run.device, half):
                    return function(**leaves)

            return differentiate(call, case)

        ours, stock = under_autocast(fused(1.7, path=run.path)), under_autocast(eager(1.7))
        truth = exact(case, 1.7)
        for name in NAMES:
            assert getattr(ours, name).dtype == getattr(stock, name).dtype, name
        assert ours.y.dtype == half
        yardstick = {name: errors(getattr(stock, name), getattr(truth, name)) for name in NAMES}
        assert_matches(ours, truth, yardstick)

    @every_run
    @pytest.mark.parametrize(("x", "base", "adapter", "half"), AUTOCAST, ids=dtype_id)
    def test_dtypes_are_pefts(self, run, x, base, adapter, half):
        peft = pytest.importorskip("peft")
        model = torch.nn.Sequential(torch.nn.Linear(40, 24, dtype=base))
        model = peft.get_peft_model(
            model, peft.LoraConfig(target_modules=["0"], r=4), autocast_adapter_dtype=False
        )
        layer = model.base_model.model[0].to(run.device)
        A, B = layer.lora_B["default"].to(adapter).weight, layer.lora_A["default"].to(adapter).weight
        inputs = torch.randn(9, 40, device=run.device).to(x).requires_grad_()
        with torch.autocast(run.device, half):
            theirs = layer(inputs)
            with fastlora.use_path(run.path):
                ours = fastlora.lora_linear(inputs, layer.weight.detach(), A, B, 2.0, layer.bias.detach())
        assert ours.dtype == theirs.dtype
        theirs = torch.autograd.grad(theirs.sum(), (inputs, A, B))
        ours = torch.autograd.grad(ours.sum(), (inputs, A, B))
        assert [g.dtype for g in ours] == [g.dtype for g in theirs]

    @every_run
    def test_backward_outside_and_inside_are_the_same(self, run):
        case = tensors(9, 24, 40, 4, device=run.device)
        grads = []
        for inside in (True, False):
            A, B = (t.detach().requires_grad_() for t in (case.A, case.B))
            with torch.autocast(run.device, torch.bfloat16):
                y = fused(1.7, path=run.path)(case.x, case.weight, A, B, case.bias)
                if inside:
                    y.sum().backward()
            if not inside:
                y.sum().backward()
            grads.append((A.grad, B.grad))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))

    @every_run
    def test_switched_off_inside(self, run):
        case = tensors(9, 24, 40, 4, device=run.device)
        arguments = (case.x, case.weight, case.A, case.B, case.bias)
        function = fused(1.7, path=run.path)
        with torch.autocast(run.device, torch.bfloat16), torch.autocast(run.device, enabled=False):
            assert torch.equal(function(*arguments), function(*arguments))
            assert function(*arguments).dtype == torch.float32

    @every_run
    def test_no_half_precision_copy_of_the_weight_is_kept(self, run):
        """Autocast's copies of x and of parameters are made again or kept small, as in eager at most."""
        case = tensors((5, 7), 24, 40, 4, device=run.device)
        with torch.autocast(run.device, torch.bfloat16):
            _, ours = saved_for_backward(fused(1.7, path=run.path), case, ("x", "A", "B"))
            _, stock = saved_for_backward(eager(1.7), case, ("x", "A", "B"))
        assert sum(t.nbytes for t in ours) <= sum(t.nbytes for t in stock)

    @every_run
    @pytest.mark.parametrize("wanted", [("A", "B"), ("bias",)])
    def test_no_copy_of_the_weight_is_kept_where_x_needs_no_gradient(self, run, wanted):
        """As in a model's first layer."""

        def pair(x, weight, A, B, bias):
            with fastlora.use_path(run.path):
                return fastlora.lora_linear_group(x, [weight] * 2, [A] * 2, [B] * 2, [1.7] * 2, [bias] * 2)

        for function in (fused(1.7, path=run.path), pair):
            case = tensors((5, 7), 24, 40, 4, device=run.device)
            with torch.autocast(run.device, torch.bfloat16):
                _, kept = saved_for_backward(function, case, wanted)
            assert kept
            assert case.weight.shape not in {t.shape for t in kept}

    @every_run
    def test_float64_is_not_cast(self, run):
        """Autocast leaves float64 alone; so does the layer."""
        if run.path == "triton":
            pytest.skip("the kernels have no float64")
        case = tensors(9, 24, 40, 4, torch.float64, device=run.device)
        with torch.autocast(run.device, torch.bfloat16):
            ours = fused(1.7, path=run.path)(case.x, case.weight, case.A, case.B, case.bias)
            stock = eager(1.7)(case.x, case.weight, case.A, case.B, case.bias)
        assert ours.dtype == stock.dtype

    @every_run
    def test_integers_are_not_cast(self, run):
        case = tensors(9, 24, 40, 4, device=run.device)
        with (
            torch.autocast(run.device, torch.bfloat16),
            pytest.raises(ValueError, match=r"expected floating-point tensors, got x \(9, 40\) int64"),
        ):
            fused(1.7, path=run.path)(case.x.long(), case.weight, case.A, case.B, case.bias)

    @every_run
    def test_grad_scaler(self, run):
        """A step with scaled fp16 gradients is that of unscaled ones; an overflow is seen and skipped."""
        case = tensors(9, 24, 40, 4, device=run.device)
        A, B = (torch.nn.Parameter(t.clone()) for t in (case.A, case.B))
        optimizer = torch.optim.SGD([A, B], lr=0.1)
        scaler = torch.amp.GradScaler(run.device, init_scale=1024.0)

        def step(factor):
            optimizer.zero_grad()
            with torch.autocast(run.device, torch.float16):
                y = fused(1.7, path=run.path)(case.x, case.weight, A, B, case.bias)
            scaler.scale((y.float() * factor).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()

        start = A.detach().clone(), B.detach().clone()
        step(1.0)
        truth = [t.double().requires_grad_() for t in start]
        y = eager(1.7)(case.x.double(), case.weight.double(), *truth, case.bias.double())
        gradients = torch.autograd.grad(y.square().mean(), truth)
        for parameter, before, gradient in zip((A, B), truth, gradients, strict=True):
            moved = parameter.detach().double() - before.detach()
            torch.testing.assert_close(moved, -0.1 * gradient, rtol=0.05, atol=1e-3)
        here = A.detach().clone()
        step(1e6)
        assert torch.equal(here, A)
        assert scaler.get_scale() < 1024.0


def second_derivatives(function, case, wanted=("x", "A", "B", "bias")):
    """The gradients of ``wanted``, and those of their products with fixed directions, by name."""
    leaves = leaves_of(case, wanted)
    dy = case.dy.detach().requires_grad_()
    grads = torch.autograd.grad(function(**leaves), [leaves[name] for name in wanted], dy, create_graph=True)
    generator = torch.Generator().manual_seed(0)
    along = [torch.randn(g.shape, dtype=torch.float64, generator=generator).to(g.device) for g in grads]
    total = sum((g.double() * direction).sum() for g, direction in zip(grads, along, strict=True))
    of = {**{name: leaves[name] for name in wanted}, "dy": dy}
    second = torch.autograd.grad(total, list(of.values()), allow_unused=True, materialize_grads=True)
    first = {f"d{name}": g.detach() for name, g in zip(wanted, grads, strict=True)}
    return SimpleNamespace(**first, **{f"d2{name}": g for name, g in zip(of, second, strict=True)})


def in_float64(case):
    wide = {name: value.double() for name, value in vars(case).items() if isinstance(value, torch.Tensor)}
    return SimpleNamespace(**wide)


def assert_second_derivatives(function, case, keep=None, wanted=("x", "A", "B", "bias")):
    """As cases.assert_matches with cases.eager_errors, for the first and second derivatives."""

    def derivatives(form, draw):
        return second_derivatives(form, draw, wanted)

    def exactly(draw):
        return derivatives(eager(1.7, keep), in_float64(draw))

    draws = [case, *(case.redraw() for _ in range(4))]
    yardstick = worst_errors(draws, lambda draw: eager_forms(draw, 1.7, keep), derivatives, exactly)
    assert_matches(derivatives(function, case), exactly(case), yardstick)


class TestSecondDerivative:
    @every_run
    @pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)
    @pytest.mark.parametrize("dropout", [0.0, 0.4])
    def test_against_float64(self, run, dtypes, dropout):
        case = tensors((5, 13), 24, 40, 4, *dtypes, device=run.device)
        seed = torch.tensor([3], device=run.device) if dropout else None
        keep = keep_factors(seed, case, dropout) if dropout else None
        assert_second_derivatives(fused(1.7, dropout, seed, run.path), case, keep)

    @every_run
    @pytest.mark.parametrize(
        "wanted", [("x",), ("A",), ("B",), ("bias",), ("A", "B"), ("x", "B")], ids="+".join
    )
    def test_only_what_is_asked(self, run, wanted):
        case = tensors((5, 13), 24, 40, 4, torch.float16, device=run.device)
        assert_second_derivatives(fused(1.7, path=run.path), case, wanted=wanted)

    @every_run
    @pytest.mark.parametrize(("lead", "N", "K"), [((), 24, 40), ((0,), 24, 40), (9, 0, 40), (9, 24, 0)])
    @pytest.mark.parametrize("dropout", [0.0, 0.4])
    def test_one_token_and_empty_shapes(self, run, lead, N, K, dropout):
        case = tensors(lead, 24, 40, 4, torch.float16, device=run.device)
        case.x, case.dy, case.bias = case.x[..., :K], case.dy[..., :N], case.bias[:N]
        case.weight, case.A, case.B = case.weight[:N, :K], case.A[:N], case.B[:, :K]
        case.redraw = lambda: tensors(lead, N, K, 4, torch.float16, device=run.device) if N and K else case
        seed = torch.tensor([3], device=run.device) if dropout else None
        keep = None
        if dropout:
            rows = case.x.shape[:-1].numel()
            keep = reference.keep_mask(seed, rows, K, dropout) / (1 - dropout)
        assert_second_derivatives(fused(1.7, dropout, seed, run.path), case, keep)

    @pytest.mark.parametrize("dropout", [0.0, 0.4])
    def test_by_differences(self, dropout):
        """Third derivatives too: the second ones are PyTorch's own."""
        case = in_float64(tensors(3, 4, 5, 2))
        x, A, B, bias = (t.requires_grad_() for t in (case.x, case.A, case.B, case.bias))

        def first(x, A, B, bias):
            y = fused(1.7, dropout, torch.tensor([3]))(x, case.weight, A, B, bias)
            return torch.autograd.grad(y.square().sum(), (x, A, B), create_graph=True)

        assert torch.autograd.gradcheck(first, (x, A, B, bias))
        assert torch.autograd.gradgradcheck(first, (x, A, B, bias))

    @every_run
    def test_backward_with_the_mask_of_a_small_call(self, run):
        """Without a seed, a small call on a CPU keeps the mask itself."""
        case = tensors(9, 24, 40, 4, torch.float16, device=run.device)
        layer = fastlora.FusedLoRALinear(
            40, 24, 4, alpha=1.7, dropout=0.4, device=run.device, dtype=torch.float16
        )
        layer.A.data.normal_()
        x = case.x.requires_grad_()
        with fastlora.use_path(run.path):
            y = layer(x)
        (dx,) = torch.autograd.grad(y, x, case.dy, create_graph=True)
        (again,) = torch.autograd.grad(y, x, case.dy, retain_graph=True)
        torch.testing.assert_close(dx, again, rtol=0.01, atol=0.01)
        along = torch.randn_like(x)
        dA, dB = torch.autograd.grad(dx, (layer.A, layer.B), along)
        # dx is linear in either adapter.
        update = ((dx.double() - case.dy.double() @ layer.weight.double()) * along.double()).sum()
        for gradient, adapter in ((dA, layer.A), (dB, layer.B)):
            found = (gradient.double() * adapter.double()).sum()
            torch.testing.assert_close(found, update, rtol=0.01, atol=0.1)

    @every_run
    @pytest.mark.parametrize("inside", [False, True])
    def test_autocast(self, run, inside):
        """Autocast is off in backward, even if backward is called under it."""
        case = tensors((5, 13), 24, 40, 4, device=run.device)
        results = []
        for form in (fused(1.7, path=run.path), eager(1.7)):
            x, A, B = (t.detach().requires_grad_() for t in (case.x, case.A, case.B))
            with torch.autocast(run.device, torch.bfloat16):
                y = form(x, case.weight, A, B, case.bias)
            with torch.autocast(run.device, torch.bfloat16, enabled=inside):
                (dx,) = torch.autograd.grad(y.float().square().sum(), x, create_graph=True)
            assert dx.dtype == torch.float32
            results.append(torch.autograd.grad(dx.square().sum(), (x, A, B)))
        for ours, theirs in zip(*results, strict=True):
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours, theirs, rtol=0.1, atol=0.02 * theirs.abs().max().item())

    @every_run
    def test_checkpoint(self, run):
        case = tensors((5, 13), 24, 40, 4, torch.float16, device=run.device)
        function = fused(1.7, 0.4, torch.tensor([3], device=run.device), run.path)

        def checkpointed(x, weight, A, B, bias):
            return checkpoint(function, x, weight, A, B, bias, use_reentrant=False)

        ours, plain = (second_derivatives(form, case) for form in (checkpointed, function))
        for name, value in vars(plain).items():
            torch.testing.assert_close(getattr(ours, name), value)

    @every_run
    def test_frozen_B(self, run):
        """dA depends on x, which is then not kept; where x needs no gradient, h is a constant."""
        case = tensors(9, 24, 40, 4, torch.float16, device=run.device)
        assert_second_derivatives(fused(1.7, path=run.path), case, wanted=("A", "bias"))
        x, A = (t.detach().requires_grad_() for t in (case.x, case.A))
        y = fused(1.7, path=run.path)(x, case.weight, A, case.B, case.bias)
        with pytest.raises(RuntimeError, match=r"create_graph=True.*frozen B"):
            torch.autograd.grad(y.sum(), A, create_graph=True)
        assert A.grad is None
        torch.autograd.grad(y.sum(), A)


class TestUsePath:
    @every_run
    def test_backward_follows_its_forward(self, run, monkeypatch):
        """Backward runs after the block has ended, or in another: the forward's mode counts."""
        case = tensors(40, 24, 40, 4, torch.float16, device=run.device)
        modes = []
        backward = fastlora.ops.lora_backward
        monkeypatch.setattr(
            fastlora.ops, "lora_backward", lambda *args: modes.append(args[-1]) or backward(*args)
        )
        A = case.A.detach().requires_grad_()
        y = fused(path=run.path)(case.x, case.weight, A, case.B)
        with fastlora.use_path("reference" if run.path == "addmm" else "addmm"):
            y.backward(case.dy)
        assert modes == [run.path]

    def test_unknown_mode(self):
        with pytest.raises(ValueError, match=r"'fast'.*auto"), fastlora.use_path("fast"):
            pass

    def test_triton_refused_where_it_cannot_run(self):
        case = tensors(9, 24, 400, 257, torch.float16)
        with fastlora.use_path("triton"), pytest.raises(RuntimeError, match="257"):
            fastlora.lora_linear(case.x, case.weight, case.A, case.B)
        fastlora.lora_linear(case.x, case.weight, case.A, case.B)


def arguments(**changes):
    """Valid arguments of ``lora_linear`` (M, N, K, R = 3, 6, 8, 2) but for ``changes``."""
    valid = {
        "x": torch.randn(3, 8),
        "weight": torch.randn(6, 8),
        "A": torch.randn(6, 2),
        "B": torch.randn(2, 8),
        "alpha": 1.0,
        "bias": torch.randn(6),
        "dropout": 0.5,
        "seed": None,
    }
    return {**valid, **changes}


BAD = [
    ({"x": torch.randn(3, 7)}, ValueError, [r"\(3, 7\)", r"8"]),
    ({"x": torch.randn(())}, ValueError, [r"\(\)"]),
    ({"weight": torch.randn(6, 9)}, ValueError, [r"\(6, 9\)"]),
    ({"weight": torch.randn(6)}, ValueError, [r"\(6,\)"]),
    ({"weight": torch.randn(1, 6, 8)}, ValueError, [r"\(1, 6, 8\)"]),
    ({"A": torch.randn(5, 2)}, ValueError, [r"\(5, 2\)", r"\(6, "]),
    ({"A": torch.randn(2, 6)}, ValueError, [r"\(2, 6\)"]),
    ({"A": torch.randn(12)}, ValueError, [r"\(12,\)"]),
    ({"A": torch.randn(6, 3)}, ValueError, [r"\(6, 3\)|\(2, 8\)", r"rank|R"]),
    ({"B": torch.randn(2, 7)}, ValueError, [r"\(2, 7\)"]),
    ({"B": torch.randn(8, 2)}, ValueError, [r"\(8, 2\)"]),
    ({"B": torch.randn(16)}, ValueError, [r"\(16,\)"]),
    ({"A": torch.randn(6, 0), "B": torch.randn(0, 8)}, ValueError, ["rank", r"\(6, 0\)|\(0, 8\)|0"]),
    ({"bias": torch.randn(5)}, ValueError, ["bias", r"\(5,\)", r"\(6, 8\)"]),
    ({"bias": torch.randn(1, 6)}, ValueError, [r"\(1, 6\)"]),
    ({"x": torch.randn(3, 8).half()}, ValueError, ["float16", "float32"]),
    ({"weight": torch.randn(6, 8).bfloat16()}, ValueError, ["bfloat16", "float32"]),
    ({"A": torch.randn(6, 2).half()}, ValueError, ["float16", "float32"]),
    ({"bias": torch.randn(6).half()}, ValueError, ["float16", "float32"]),
    ({"x": torch.ones(3, 8, dtype=torch.int64)}, ValueError, ["int64"]),
    ({"x": torch.randn(3, 8, dtype=torch.complex64)}, ValueError, ["complex64"]),
    (
        {"A": torch.ones(6, 2, dtype=torch.int8), "B": torch.ones(2, 8, dtype=torch.int8)},
        ValueError,
        ["int8"],
    ),
    (
        {"weight": torch.randn(6, 8, requires_grad=True)},
        ValueError,
        ["weight", "requires_grad|frozen|gradient"],
    ),
    ({"dropout": -0.1}, ValueError, ["-0.1"]),
    ({"dropout": 1.5}, ValueError, ["1.5"]),
    ({"dropout": float("nan")}, ValueError, ["nan"]),
    ({"dropout": "0.1"}, TypeError, ["dropout", "'0.1'"]),
    ({"dropout": None}, TypeError, ["dropout", "None"]),
    ({"alpha": float("nan")}, ValueError, ["alpha", "nan"]),
    ({"alpha": float("-inf")}, ValueError, ["alpha", "-inf"]),
    ({"alpha": 10**400}, ValueError, ["alpha", "finite"]),
    ({"alpha": "1"}, TypeError, ["alpha", "'1'"]),
    ({"alpha": None}, TypeError, ["alpha", "None"]),
    ({"alpha": torch.tensor(1j)}, TypeError, ["alpha must be a number", "1.j"]),
    ({"alpha": torch.ones(1, device="meta")}, TypeError, ["alpha must be a number", "meta"]),
    ({"alpha": torch.ones(2)}, TypeError, ["alpha must be a number"]),
    ({"x": [[1.0] * 8]}, TypeError, ["x", "list"]),
    ({"weight": None}, TypeError, ["weight", "None"]),
    ({"A": None}, TypeError, ["A", "None"]),
    ({"bias": 0.0}, TypeError, ["bias", "float"]),
    ({"seed": 3}, TypeError, ["seed", "int"]),
    ({"seed": torch.tensor([1, 2])}, ValueError, ["seed", r"\(2,\)"]),
    ({"seed": torch.tensor([1.0])}, ValueError, ["seed", "float32"]),
    ({"seed": torch.tensor([1], dtype=torch.int32)}, ValueError, ["seed", "int32"]),
    ({"weight": torch.randn(6, 8, device="meta")}, ValueError, ["meta", "cpu"]),
    ({"A": torch.randn(6, 2, device="meta")}, ValueError, ["meta", "cpu"]),
    ({"B": torch.randn(2, 8, device="meta")}, ValueError, ["meta", "cpu"]),
    ({"bias": torch.randn(6, device="meta")}, ValueError, ["meta", "cpu"]),
    ({"seed": torch.zeros(1, dtype=torch.int64, device="meta")}, ValueError, ["meta", "cpu"]),
]


class TestBadInput:
    @pytest.mark.parametrize(("change", "error", "words"), BAD)
    def test_says_what_was_given(self, change, error, words):
        given = arguments(**change)
        state = torch.get_rng_state()
        with pytest.raises(error) as caught:
            fastlora.lora_linear(**given)
        for word in words:
            assert caught.match(word)
        assert torch.equal(state, torch.get_rng_state()), "a refused call drew random numbers"

    def test_valid_arguments_pass(self):
        """So that each refusal above is for its own change."""
        assert fastlora.lora_linear(**arguments()).shape == (3, 6)
        assert fastlora.lora_linear(
            **arguments(bias=None, dropout=0, alpha=2, seed=torch.tensor(5))
        ).shape == (3, 6)

    @pytest.mark.parametrize("alpha", [0.0, 0])
    def test_frozen_weight_in_inference(self, alpha):
        """A weight that happens to require a gradient is fine where none is recorded."""
        weight = torch.randn(6, 8, requires_grad=True)
        with torch.no_grad():
            y = fastlora.lora_linear(**arguments(weight=weight, dropout=0.0, alpha=alpha))
        torch.testing.assert_close(y.shape, torch.Size((3, 6)))

    @every_run
    def test_alpha_as_numpy_and_as_tensor(self, run):
        numpy = pytest.importorskip("numpy")
        case = tensors(9, 24, 40, 4, device=run.device)
        expected = fused(0.5, path=run.path)(case.x, case.weight, case.A, case.B)
        for alpha in (numpy.float64(0.5), numpy.float32(0.5), numpy.float16(0.5), torch.tensor([0.5])):
            assert torch.equal(expected, fused(alpha, path=run.path)(case.x, case.weight, case.A, case.B))

    def test_same_result_as_nn_functional_at_zero_update(self):
        case = tensors(9, 24, 40, 4)
        case.A.zero_()
        ours = fastlora.lora_linear(case.x, case.weight, case.A, case.B, 1.0, case.bias)
        torch.testing.assert_close(ours, F.linear(case.x, case.weight, case.bias))


@every_run
@pytest.mark.parametrize("counted", [False, True])
def test_forward_mode_derivatives(run, counted):
    """Plain operations have them; the operators would drop the tangent."""
    from torch.autograd import forward_ad
    from torch.utils.flop_counter import FlopCounterMode

    case = tensors(5, 24, 40, 4, device=run.device)
    tangent = torch.randn_like(case.x)
    with fastlora.use_path(run.path), forward_ad.dual_level():
        with FlopCounterMode(display=False) if counted else nullcontext():
            x = forward_ad.make_dual(case.x, tangent)
            y = fastlora.lora_linear(x, case.weight, case.A, case.B, 1.5, case.bias)
            (pair,) = fastlora.lora_linear_group(x, [case.weight], [case.A], [case.B], [1.5], [case.bias])
        expected = tangent @ (case.weight + 1.5 * case.A @ case.B).t()
        for result in (y, pair):
            torch.testing.assert_close(forward_ad.unpack_dual(result).tangent, expected, rtol=1e-3, atol=1e-4)


def test_jit_trace_records_plain_operations():
    """With gradients on as with them off, so that the trace can be checked, saved and used anywhere."""
    layer = fastlora.FusedLoRALinear(8, 5, 2)
    nn.init.normal_(layer.A)
    x = torch.randn(3, 8)
    traced = torch.jit.trace(layer, x)
    assert "^_LoRALinear" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x + 1), layer(x + 1))


class TestJitTraceOfDropout:
    """A trace holds no mask as a constant, which would drop the same elements for good."""

    eye, zeros = torch.eye(8), torch.zeros(8, 8)

    def test_draws_a_mask_at_every_call(self):
        def function(x):
            return fastlora.lora_linear(x, self.zeros, self.eye, self.eye, 1.0, None, 0.5)

        traced = torch.jit.trace(function, torch.ones(3, 8), check_trace=False)
        first, second = traced(torch.ones(40, 8)), traced(torch.ones(40, 8))
        assert set(first.unique().tolist()) == {0.0, 2.0}
        assert not torch.equal(first, second)

    def test_a_group_draws_one(self):
        def function(x):
            twice = [self.eye] * 2
            return fastlora.lora_linear_group(x, [self.zeros] * 2, twice, twice, [1.0] * 2, None, 0.5)

        first, second = torch.jit.trace(function, torch.ones(3, 8), check_trace=False)(torch.ones(40, 8))
        assert torch.equal(first, second)
        assert set(first.unique().tolist()) == {0.0, 2.0}

    @pytest.mark.parametrize(("rows", "number"), [(3, 5), (9, -6)])
    def test_a_given_seed_is_an_input(self, rows, number):
        def function(x, seed):
            return fastlora.lora_linear(x, self.zeros, self.eye, self.eye, 1.0, None, 0.5, seed)

        traced = torch.jit.trace(function, (torch.ones(4, 8), torch.tensor([5])))
        seed = torch.tensor([number])
        keep = reference.keep_mask(seed, rows, 8, 0.5)
        assert torch.equal(traced(torch.ones(rows, 8), seed), keep * 2.0)


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_are_refused_with_a_way_out(layout):
    x = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(2, 8)], layout=layout)
    layer = fastlora.FusedLoRALinear(8, 5, 2)
    with pytest.raises(ValueError, match=r"nested.*values\(\)"):
        layer(x)
    with pytest.raises(ValueError, match=r"lora_linear_group: branch 0: x is a nested.*values\(\)"):
        fastlora.lora_linear_group(x, [layer.weight], [layer.A], [layer.B], [1.0])


def test_fx_is_told_that_it_cannot_follow():
    """Its stand-in for a tensor has every attribute; the trace would fail only when it is run."""
    with pytest.raises(TypeError, match="x must be a tensor, got Proxy"):
        torch.fx.symbolic_trace(nn.Sequential(fastlora.FusedLoRALinear(8, 5, 2)))


def test_onnx_export_sees_plain_operations(monkeypatch):
    """It could not translate the operator."""
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    module = nn.Sequential(fastlora.FusedLoRALinear(8, 5, 2)).eval()
    program = torch.export.export(module, (torch.randn(3, 8),))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert called
    assert not any("fastlora" in name for name in called)


def test_transforms_differentiate_the_weight_too():
    """As opacus does, which asks for gradients of all of a layer's parameters."""
    case = tensors(4, 5, 7, 2, torch.float64)

    def loss(form):
        def function(weight, A, B):
            return form(case.x, weight, A, B, 1.5).square().sum()

        return torch.func.grad(function, argnums=(0, 1, 2))(case.weight, case.A, case.B)

    for ours, theirs in zip(loss(fastlora.lora_linear), loss(plain_formula), strict=True):
        torch.testing.assert_close(ours, theirs)


def plain_formula(x, weight, A, B, alpha):
    return x @ weight.t() + alpha * (x @ B.t()) @ A.t()
