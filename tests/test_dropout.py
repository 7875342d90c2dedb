"""Dropout without a mask in memory: what is written and drawn, and what the masks look like on every path."""

import math

import pytest
import torch
from cases import RUNS, bits_equal, differentiate, every_run, fused, saved_for_backward, tensors
from torch import nn

import fastlora
import fastlora.ops
from fastlora import masks, reference

kernel_runs = pytest.mark.parametrize("run", [run for run in RUNS if run.values[0].path == "triton"])
P = 0.25


def shown_mask(run, seed, rows, columns, dropout=P):
    """The masks of y, dx and dB, (rows, columns) each, as identities and a base of zeros show them."""
    eye = torch.eye(columns, device=run.device)
    x = torch.ones(rows, columns, device=run.device, requires_grad=True)
    A, B = eye.clone().requires_grad_(), eye.clone().requires_grad_()
    y = fused(1.0, dropout, seed, run.path)(x, torch.zeros_like(eye), A, B)
    dx = torch.autograd.grad(y, x, torch.ones_like(y), retain_graph=True)[0]
    # dy with one row of ones shows one row of the mask in every row of dB.
    rows_of_dB = []
    for row in range(min(rows, 3)):
        dy = torch.zeros_like(y)
        dy[row] = 1
        rows_of_dB.append(torch.autograd.grad(y, B, dy, retain_graph=True)[0][0])
    return y.detach(), dx, torch.stack(rows_of_dB)


class TestOneMask:
    @every_run
    @pytest.mark.parametrize(
        ("seed", "rows", "columns"), [(0, 1, 8), (-(2**63), 1, 9), (-1, 70, 61), (2**62 + 3, 33, 70)]
    )
    def test_forward_dx_and_dB_draw_the_oracles(self, run, seed, rows, columns):
        """Element by element, over several tiles and past the last whole group of eight columns."""
        seed = torch.tensor([seed], device=run.device)
        y, dx, dB = shown_mask(run, seed, rows, columns)
        keep = reference.keep_mask(seed, rows, columns, P)
        assert torch.equal(y != 0, keep)
        assert torch.equal(dx != 0, keep)
        assert torch.equal(dB != 0, keep[: len(dB)])
        for values in (y, dx, dB):
            kept = values[values != 0]
            torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - P)), rtol=2e-3, atol=0)

    @every_run
    def test_shapes_of_the_seed(self, run):
        """One element in any shape; the same tensor serves many calls and stays as it is."""
        masks = []
        for shape in ((), (1,), (1, 1)):
            seed = torch.full(shape, 77, device=run.device)
            masks += [shown_mask(run, seed, 5, 24)[1] for _ in range(2)]
            assert seed.item() == 77
        assert all(torch.equal(masks[0], mask) for mask in masks[1:])

    @every_run
    def test_a_mask_drawn_in_inference_mode_serves_training(self, run):
        """Masks are remembered on a CPU; a tensor made in inference mode must not get in autograd's way."""
        case = tensors(2, 5, 16, 2, device=run.device)
        function = fused(0.5, 0.5, torch.tensor([78], device=run.device), run.path)
        with torch.inference_mode():
            first = function(case.x, case.weight, case.A, case.B, case.bias)
        assert torch.equal(first, differentiate(function, case).y)

    @pytest.mark.parametrize("sizes", [(3, 5), (1, 8), (4, 70)])
    def test_vmap_over_seeds(self, sizes):
        rows, columns = sizes
        x, eye = torch.ones(rows, columns), torch.eye(columns)
        seeds = torch.tensor([5, -(2**63), 2**62 + 3])

        def of(seed):
            return fastlora.lora_linear(x, torch.zeros_like(eye), eye, eye, 1.0, None, P, seed)

        batched = torch.func.vmap(of)(seeds)
        for y, seed in zip(batched, seeds, strict=True):
            assert torch.equal(y != 0, reference.keep_mask(seed, rows, columns, P))

    def test_vmap_without_in_features(self):
        weight, A, B, bias = torch.ones(5, 0), torch.ones(5, 2), torch.ones(2, 0), torch.randn(5)

        def of(x, seed):
            return fastlora.lora_linear(x, weight, A, B, 1.0, bias, P, seed)

        batched = torch.func.vmap(of)(torch.ones(2, 3, 0), torch.tensor([[1], [2]]))
        assert torch.equal(batched, bias.expand(2, 3, 5))

    @pytest.mark.parametrize("randomness", ["different", "same"])
    def test_vmap_draws_masks_as_pytorchs_dropout_does(self, randomness):
        layer = fastlora.FusedLoRALinear(40, 40, 40, dropout=0.5, bias=False)
        nn.init.zeros_(layer.weight)
        nn.init.eye_(layer.A)
        nn.init.eye_(layer.B)
        masks = torch.func.vmap(layer, randomness=randomness)(torch.ones(4, 3, 40)) != 0
        assert 0.3 < masks.float().mean() < 0.7
        assert all(torch.equal(masks[0], mask) == (randomness == "same") for mask in masks[1:])

    @every_run
    def test_only_the_update_is_dropped(self, run):
        case = tensors(20, 24, 40, 4, device=run.device)
        case.A.zero_()
        leaves = (case.x, case.weight, case.A, case.B, case.bias)
        torch.testing.assert_close(fused(1.0, 0.5, path=run.path)(*leaves), fused(path=run.path)(*leaves))

    @every_run
    def test_mean_over_masks_is_the_plain_layer(self, run):
        """Many equal tokens, each with a mask of its own: neither values nor gradients are biased."""
        case = tensors(1, 6, 20, 3, device=run.device, bias=False)
        count = 512
        case.x, case.dy = case.x.expand(count, 20), case.dy.expand(count, 6)
        seed = torch.tensor([9], device=run.device)
        dropped = differentiate(fused(1.0, P, seed, run.path), case)
        plain = differentiate(fused(path=run.path), case)
        for name in ("y", "x"):
            values = getattr(dropped, name)
            error = (values.mean(0) - getattr(plain, name)[0]).abs()
            assert (error < 5 * values.std(0) / math.sqrt(count) + 1e-3).all(), name
        for name in ("A", "B"):
            expected = getattr(plain, name)
            error = (getattr(dropped, name) - expected).abs().max()
            assert error < 0.15 * expected.abs().max(), name

    @every_run
    @pytest.mark.parametrize("p", [1e-9, 1e-4, 0.999, 1 - 1e-9])
    def test_ends_of_the_range(self, run, p):
        """p is resolved to 1/65536: below half of that nothing is dropped, above nothing is kept."""
        y, dx, _ = shown_mask(run, torch.tensor([4], device=run.device), 128, 64, p)
        assert y.isfinite().all()
        assert torch.equal(y != 0, dx != 0)
        kept = (y != 0).sum().item()
        expected = 8192 * (1 - p)
        assert abs(kept - expected) <= 5 * math.sqrt(8192 * p * (1 - p)) + 0.5


class TestWhatIsDrawn:
    @every_run
    def test_one_seed_a_call_and_none_in_backward(self, run, monkeypatch):
        case = tensors(9, 24, 40, 4, device=run.device)
        drawn, new_seed = [], masks.new_seed
        monkeypatch.setattr(masks, "new_seed", lambda device: drawn.append(device) or new_seed(device))
        for calls in (1, 2):
            A = case.A.clone().requires_grad_()
            y = fused(1.0, 0.5, path=run.path)(case.x, case.weight, A, case.B)
            state = torch.get_rng_state()
            y.sum().backward()
            assert torch.equal(state, torch.get_rng_state())
            assert len(drawn) == calls

    @every_run
    def test_zero_costs_nothing(self, run):
        """No random number, no other operation than without the argument; so in eval mode."""
        case = tensors(9, 24, 40, 4, torch.float16, device=run.device)
        layer = fastlora.FusedLoRALinear(
            40, 24, 4, bias=False, dropout=0.5, device=run.device, dtype=torch.float16
        )
        layer.eval().requires_grad_(False)

        def operations(dropout):
            x = case.x.clone().requires_grad_()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                if dropout is None:
                    with fastlora.use_path(run.path):
                        y = fastlora.lora_linear(x, case.weight, case.A, case.B)
                elif dropout == "eval":
                    with fastlora.use_path(run.path):
                        y = layer(x)
                else:
                    y = fused(1.0, dropout, path=run.path)(x, case.weight, case.A, case.B)
                y.backward(case.dy)
            return sorted(event.name for event in profile.events())

        operations(None)  # the first call of a path loads what it needs
        plain = operations(None)
        assert not any("rand" in name for name in plain)
        assert operations(0.0) == operations(0) == plain
        assert operations("eval") == plain
        assert operations(0.5) != plain

    @kernel_runs
    def test_nothing_of_the_size_of_x_is_written(self, run):
        """Of M * K elements the kernels allocate dx alone: no mask, no dropped copy, in either pass."""
        M, K = 128, 256
        case = tensors(M, 16, K, 2, torch.float16, device=run.device)
        leaves = [t.detach().requires_grad_() for t in (case.x, case.A, case.B)]
        usage = "self_device_memory_usage" if run.device == "cuda" else "self_cpu_memory_usage"

        def allocations(function):
            """What the function returns, and how often it allocates M * K bytes or more."""
            with torch.profiler.profile(profile_memory=True) as profile:
                result = function()
            return result, sum(getattr(event, usage) >= M * K for event in profile.events())

        def step(path):
            forward = fused(1.0, 0.5, path=path)
            y, in_forward = allocations(lambda: forward(leaves[0], case.weight, *leaves[1:], case.bias))
            _, in_backward = allocations(lambda: torch.autograd.grad(y, leaves, case.dy))
            return in_forward, in_backward

        step(run.path)  # loads what the first call needs
        assert step(run.path) == (0, 1)
        assert step("reference") > (1, 1)  # the counter does see masks and copies

    @every_run
    @pytest.mark.parametrize("wanted", [("x",), ("A",), ("B",), ("x", "A", "B")], ids="+".join)
    def test_saved_beside_the_arguments(self, run, wanted):
        """h, where dA needs it, and the seed: not the mask, not a dropped x, not even as bits."""
        case = tensors(64, 24, 256, 4, torch.float16, device=run.device)
        y, kept = saved_for_backward(fused(1.0, 0.5, path=run.path), case, wanted)
        assert y.requires_grad
        sizes = sorted(tensor.numel() for tensor in kept)
        assert sizes == ([1, 64 * 4] if "A" in wanted else [1])
        # Nor may the node hold one outside the hooks' sight.
        hidden = [value for value in vars(y.grad_fn).values() if isinstance(value, torch.Tensor)]
        assert not hidden


class TestStatisticsOfDrawnMasks:
    """Masks of successive calls without a seed, from torch's generator at a fixed state."""

    CALLS, ROWS, COLUMNS = 64, 32, 64

    @pytest.fixture(params=RUNS, scope="class")
    def masks(self, request):
        """(calls, rows, columns) of 0 and 1."""
        run = request.param
        # A call takes a tenth of a second in the interpreter.
        calls = 16 if run.path == "triton" and run.device == "cpu" else self.CALLS
        torch.manual_seed(31)
        eye = torch.eye(self.COLUMNS, device=run.device)
        x = torch.ones(self.ROWS, self.COLUMNS, device=run.device)
        zeros = torch.zeros_like(eye)
        function = fused(1.0, P, path=run.path)
        return torch.stack([function(x, zeros, eye, eye) != 0 for _ in range(calls)]).double().cpu()

    def test_rates(self, masks):
        """Over all, for each call, row, column and element."""
        deviation = math.sqrt(P * (1 - P))
        for dims in ((0, 1, 2), (1, 2), (0, 2), (0, 1), (0,)):
            means = masks.mean(dims)
            count = masks.numel() / means.numel()
            assert (means - (1 - P)).abs().max() < 5 * deviation / math.sqrt(count), dims

    def test_neighbours_and_calls_are_independent(self, masks):
        z = (masks - (1 - P)) / math.sqrt(P * (1 - P))
        for dim, shifts in ((0, (1, 2, 5)), (1, (1, 2, 8, 16)), (2, (1, 2, 4, 8, 16, 32))):
            for shift in shifts:
                size = z.shape[dim] - shift
                product = z.narrow(dim, 0, size) * z.narrow(dim, shift, size)
                assert product.mean().abs() < 5 / math.sqrt(product.numel()), (dim, shift)

    def test_no_two_calls_agree_more_than_chance(self, masks):
        z = ((masks - (1 - P)) / math.sqrt(P * (1 - P))).flatten(1)
        correlation = (z @ z.T / z.shape[1]).fill_diagonal_(0)
        assert correlation.abs().max() < 5 / math.sqrt(z.shape[1])


class TestModule:
    def layers(self, run, dropout=0.5):
        net = nn.Sequential(nn.Linear(40, 40), nn.Linear(40, 40)).to(run.device)
        fastlora.apply_lora(net, ["0", "1"], rank=4, dropout=dropout)
        for layer in net:
            nn.init.normal_(layer.A)
        return net

    @every_run
    def test_calls_and_layers_differ_in_training_alone(self, run):
        net, x = self.layers(run), torch.randn(9, 40, device=run.device)
        net[1].load_state_dict(net[0].state_dict())
        with fastlora.use_path(run.path), torch.no_grad():
            first, second, other = net[0](x), net[0](x), net[1](x)
            assert not torch.equal(first, second)
            assert not torch.equal(first, other)
            net.eval()
            assert torch.equal(net[0](x), net[0](x))
            net.train()
            for layer in net:
                layer.dropout = 0.0
            assert torch.equal(net[0](x), net[0](x))

    @every_run
    def test_training_is_reproducible(self, run):
        """The same state of torch's generator gives the same run, bit for bit; another does not."""
        results = []
        for seed in (5, 5, 6):
            torch.manual_seed(1)
            net = self.layers(run)
            optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
            x = torch.randn(9, 40, device=run.device)
            torch.manual_seed(seed)
            with fastlora.use_path(run.path):
                for _ in range(3):
                    net(x).square().mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()
            results.append(net[0].B.detach().clone())
        assert bits_equal(results[0], results[1])
        assert not torch.equal(results[0], results[2])

    @every_run
    def test_certain_dropout_trains_nothing(self, run):
        """p = 1: the frozen layer's values and dx, and gradients of exactly zero."""
        net, x = self.layers(run, dropout=1.0), torch.randn(9, 40, device=run.device, requires_grad=True)
        with fastlora.use_path(run.path):
            y = net(x)
            y.sum().backward()
        with fastlora.disable_adapter(net):
            z = net(x)
            dx = torch.autograd.grad(z.sum(), x)[0]
        torch.testing.assert_close(y, z, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(x.grad, dx, rtol=1e-3, atol=1e-3)
        for layer in net:
            assert not layer.A.grad.any()
            assert not layer.B.grad.any()

    @pytest.mark.cuda
    def test_seed_of_the_right_device_generator(self):
        """On a GPU the seed comes from its own generator, and the value never travels to the host."""
        net = self.layers(RUNS[-1].values[0])
        x = torch.randn(9, 40, device="cuda")
        state = torch.get_rng_state()
        torch.cuda.manual_seed(3)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            first = net(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(state, torch.get_rng_state())
        torch.cuda.manual_seed(3)
        assert torch.equal(first, net(x))


def test_a_default_device_leaves_no_trace():
    """A scalar that is remembered from the first call lies on the CPU."""
    fastlora.ops._zero.cache_clear()
    layer = fastlora.FusedLoRALinear(8, 6, 2, dropout=0.3)
    with torch.device("meta"):
        assert fastlora.ops._zero(torch.float32).device.type == "cpu"
    assert layer(torch.randn(700, 8)).isfinite().all()


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad])
def test_a_mask_drawn_in_inference_mode_serves_other_calls(first):
    x, weight, A, B = (torch.randn(*shape) for shape in ((3, 8), (4, 8), (4, 2), (2, 8)))
    seed = torch.tensor(7700 + (first is torch.no_grad))
    with first():
        expected = fastlora.lora_linear(x, weight, A, B, 1.0, None, 0.5, seed)
    z = x.clone().requires_grad_()
    y = fastlora.reference.lora_linear(z, weight, A, B, 1.0, None, 0.5, seed)
    y.sum().backward()
    torch.testing.assert_close(y, expected)
    assert torch.func.grad(lambda q: fastlora.lora_linear(q, weight, A, B, 1.0, None, 0.5, seed).sum())(
        x
    ).allclose(z.grad)
