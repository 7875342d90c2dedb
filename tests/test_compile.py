"""torch.compile, torch.export, checkpointing, saved-tensor hooks, torch.func and CUDA graphs."""

import copy
import shutil
from functools import partial

import pytest
import torch
from cases import CUDA, RUNS, bits_equal, differentiate, dtype_id, fused, tensors
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import fastlora
import fastlora.ops

NAMES = ("y", "x", "A", "B", "bias")
TOKENS = (5, 9, 33, 64)
DTYPES = ((torch.float32, torch.float32), (torch.float16, torch.float16), (torch.bfloat16, torch.float32))
# The path is chosen inside the operator: two stand for all.
both_paths = pytest.mark.parametrize("run", [run for run in RUNS if run.values[0].path in ("auto", "triton")])
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "c++", "clang++"))), reason="inductor needs a C++ compiler"
)
backends = pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=needs_compiler)])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def graph_breaks():
    return dict(torch._dynamo.utils.counters["graph_break"])


def compiled(function, backend="aot_eager", **options):
    return torch.compile(function, backend=backend, fullgraph=True, **options)


def assert_same(ours, theirs, names=NAMES):
    for name in names:
        assert bits_equal(getattr(ours, name), getattr(theirs, name)), name


def model(device="cpu", dtype=torch.float32, adapter_dtype=None, dropout=0.0, depth=2):
    """Blocks of two adapted layers and a norm around an activation, with adapters away from their start."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16, bias=False)

        def forward(self, x):
            return x + self.down(nn.functional.gelu(self.up(self.norm(x))))

    net = nn.Sequential(*(Block() for _ in range(depth))).to(device, dtype)
    fastlora.apply_lora(net, ["up", "down"], 3, 2.0, dropout, adapter_dtype=adapter_dtype)
    for name, parameter in net.named_parameters():
        if name.endswith(".A"):
            nn.init.normal_(parameter, std=0.3)
    return net


class Siblings(nn.Module):
    """x: (..., 16) -> (..., 16), by two projections of x."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        return x + torch.tanh(self.q_proj(x)) * self.k_proj(x)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.siblings = nn.LayerNorm(16), Siblings()

    def forward(self, x):
        return self.siblings(self.norm(x))


def gradients(net):
    return {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}


def run_and_backward(net, call, x):
    """y and every gradient of the net's parameters and x, from a ``call(x)``."""
    net.zero_grad()
    leaf = x.clone().requires_grad_()
    y = call(leaf)
    y.float().square().mean().backward()
    return y.detach(), {"x": leaf.grad, **gradients(net)}


def assert_same_run(ours, theirs, exact=True):
    (y, grads), (z, expected) = ours, theirs
    assert grads.keys() == expected.keys()
    compare = torch.testing.assert_close if not exact else partial(torch.testing.assert_close, rtol=0, atol=0)
    compare(y, z)
    for name, grad in expected.items():
        compare(grads[name], grad, msg=lambda text, n=name: f"{n}: {text}")


class TestFunction:
    @both_paths
    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    @pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[2]], ids=dtype_id)
    def test_one_graph_for_any_number_of_tokens(self, run, dtypes, dropout):
        """Bit for bit the eager result: the operators are opaque, nothing is fused into them."""
        seed = torch.tensor([3], device=run.device)
        plain = fused(1.5, dropout, seed, run.path)
        function = compiled(lambda *leaves: plain(*leaves))

        def marked(x, *others):
            torch._dynamo.mark_dynamic(x, 0)
            return function(x, *others)

        for M in TOKENS:
            case = tensors(M, 24, 40, 4, *dtypes, device=run.device)
            ours = differentiate(lambda **leaves: marked(*leaves.values()), case)
            assert_same(ours, differentiate(plain, case))
        assert graphs() == 1
        assert not graph_breaks()

    @backends
    @both_paths
    def test_without_marks(self, run, backend):
        """Left to itself the compiler takes the size as dynamic from the second one on."""
        case = tensors(7, 24, 40, 4, torch.float16, device=run.device)
        plain = fused(1.5, 0.5, torch.tensor([3], device=run.device), run.path)
        function = compiled(lambda x, A, B: plain(x, case.weight, A, B, case.bias).relu(), backend)
        for M in (*TOKENS, 7):
            x = torch.randn(2, M, 40, device=run.device).half()
            results = []
            for call in (function, lambda x, A, B: plain(x, case.weight, A, B, case.bias).relu()):
                leaves = [t.detach().clone().requires_grad_() for t in (x, case.A, case.B)]
                y = call(*leaves)
                results.append([y.detach(), *torch.autograd.grad(y.float().sum(), leaves)])
            assert all(map(bits_equal, *results))
        assert graphs() <= 2

    @both_paths
    def test_inference(self, run):
        plain = fused(1.5, path=run.path)
        case = tensors(7, 24, 40, 4, torch.float16, device=run.device)
        function = compiled(lambda x: plain(x, case.weight, case.A, case.B, case.bias), dynamic=True)
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                for M in TOKENS:
                    x = torch.randn(2, M, 40, device=run.device).half()
                    assert torch.equal(function(x), plain(x, case.weight, case.A, case.B, case.bias))
        assert graphs() <= 2  # one for each mode

    @both_paths
    @pytest.mark.parametrize("wanted", [("x",), ("A",), ("B",), ("bias",), ("A", "B")], ids="+".join)
    def test_some_gradients(self, run, wanted):
        plain = fused(1.5, path=run.path)
        function = compiled(lambda *leaves: plain(*leaves))
        case = tensors((3, 5), 24, 40, 4, torch.float16, device=run.device)
        ours = differentiate(lambda **leaves: function(*leaves.values()), case, wanted)
        assert_same(ours, differentiate(plain, case, wanted), ("y", *wanted))

    @backends
    @pytest.mark.parametrize("dtypes", [DTYPES[0], DTYPES[2]], ids=dtype_id)
    def test_autocast_inside_and_outside(self, backend, dtypes):
        case = tensors((3, 5), 24, 40, 4, *dtypes)

        def inside(x, A, B):
            with torch.autocast("cpu", torch.bfloat16):
                return fastlora.lora_linear(x, case.weight, A, B, 1.5, case.bias)

        results = []
        function, whole = compiled(inside, backend), compiled(lambda *leaves: fused(1.5)(*leaves), backend)
        for call in (inside, function):
            leaves = [t.detach().requires_grad_() for t in (case.x, case.A, case.B)]
            y = call(*leaves)
            results.append((y.detach(), *torch.autograd.grad(y, leaves, case.dy.bfloat16())))
        with torch.autocast("cpu", torch.bfloat16):
            leaves = [t.detach().requires_grad_() for t in (case.x, case.A, case.B)]
            y = whole(leaves[0], case.weight, *leaves[1:], case.bias)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, case.dy.bfloat16())))
        assert y.dtype == torch.bfloat16
        for other in results[1:]:
            for ours, theirs in zip(other, results[0], strict=True):
                assert bits_equal(ours, theirs)

    def test_mode_is_guarded(self, monkeypatch):
        """Code compiled on one path must not be used inside another's block, or be left from it."""
        case = tensors(5, 24, 40, 4)
        seen, real = [], fastlora.ops._plan
        monkeypatch.setattr(fastlora.ops, "_plan", lambda *key: seen.append(key[-1]) or real(*key))
        function = compiled(lambda x: fastlora.lora_linear(x, case.weight, case.A, case.B))
        function(case.x)
        with fastlora.use_path("reference"):
            function(case.x)
        function(case.x)

        def inside(x):
            with fastlora.use_path("addmm"):
                y = fastlora.lora_linear(x, case.weight, case.A, case.B)
            return y.sum() + fastlora.lora_linear(x, case.weight, case.A, case.B).sum()

        compiled(inside)(case.x)
        assert seen == ["auto", "reference", "auto", "addmm", "auto"]
        assert fastlora.paths.current_mode() == "auto"

    def test_bad_shapes_are_refused_while_tracing(self):
        function = compiled(lambda *a: fastlora.lora_linear(*a))
        with pytest.raises(Exception, match=r"shape|observed exception|join"):
            function(torch.randn(3, 8), torch.randn(6, 9), torch.randn(6, 2), torch.randn(2, 8))


class TestModule:
    @backends
    @pytest.mark.parametrize(("dtype", "adapter_dtype"), [DTYPES[0], DTYPES[2]], ids=dtype_id)
    def test_training_steps(self, backend, dtype, adapter_dtype):
        net = model(dtype=dtype, adapter_dtype=adapter_dtype)
        twin = copy.deepcopy(net)
        function = compiled(net, backend)
        optimizers = [
            torch.optim.SGD([p for p in each.parameters() if p.requires_grad], lr=0.1) for each in (net, twin)
        ]
        for M in TOKENS:
            x = torch.randn(2, M, 16, dtype=dtype)
            torch._dynamo.mark_dynamic(x, 1)
            y = function(x)
            # Inductor's norm and gelu round otherwise than eager's.
            exact = backend == "aot_eager"
            tolerance = {} if exact or dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
            torch.testing.assert_close(y, twin(x), **({"rtol": 0, "atol": 0} if exact else tolerance))
            y.float().square().mean().backward()
            twin(x).float().square().mean().backward()
            for (name, ours), theirs in zip(gradients(net).items(), gradients(twin).values(), strict=True):
                assert ours.dtype == adapter_dtype
                message = partial("{0}: {1}".format, name)
                torch.testing.assert_close(
                    ours, theirs, **({"rtol": 0, "atol": 0} if exact else tolerance), msg=message
                )
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            twin.load_state_dict(net.state_dict())
        assert graphs() == 1

    @both_paths
    def test_no_graph_breaks(self, run):
        net = model(run.device, dropout=0.3)
        with fastlora.use_path(run.path):
            for each in (net, net.eval()):
                torch._dynamo.reset()
                explanation = torch._dynamo.explain(each)(torch.randn(2, 5, 16, device=run.device))
                assert explanation.graph_break_count == 0
                assert explanation.graph_count == 1

    @both_paths
    def test_dropout_draws_in_the_graph(self, run):
        """Each call of the same compiled code draws masks, those of eager code for the same generator."""
        net = model(run.device, dropout=0.5)
        x = torch.randn(2, 5, 16, device=run.device)
        with fastlora.use_path(run.path):
            function = compiled(net)
            torch.manual_seed(5)
            ours = [run_and_backward(net, function, x) for _ in range(3)]
            torch.manual_seed(5)
            theirs = [run_and_backward(net, net, x) for _ in range(3)]
        for mine, stock in zip(ours, theirs, strict=True):
            assert_same_run(mine, stock)
        assert not torch.equal(ours[0][0], ours[1][0])

    @needs_compiler
    def test_inductor_draws_a_mask_for_each_layer_and_call(self):
        """Inductor's own random numbers: other masks than eager's, which still agree in all three places."""
        layer = fastlora.FusedLoRALinear(48, 48, 48, bias=False, dropout=0.5)
        for parameter, value in ((layer.weight, torch.zeros(48, 48)), (layer.A, torch.eye(48))):
            parameter.data.copy_(value)
        layer.B.data.copy_(torch.eye(48))
        function = compiled(lambda x: (layer(x), layer(x)), "inductor")
        masks = []
        for _ in range(2):
            x = torch.ones(40, 48, requires_grad=True)
            first, second = function(x)
            for y in (first, second):
                dx, dB = torch.autograd.grad(y, (x, layer.B), torch.ones_like(y), retain_graph=True)
                assert torch.equal(dx, y.detach())
                torch.testing.assert_close(dB, y.detach().sum(0).expand(48, 48))
                masks.append(y.detach() != 0)
        for i, mask in enumerate(masks):
            assert 0.4 < mask.float().mean() < 0.6
            for other in masks[:i]:
                assert 0.4 < (mask == other).float().mean() < 0.6

    def test_regional_compilation_shares_code(self):
        """Blocks compiled one by one, as transformers does it, need one graph for all of them."""
        net, x = model(depth=4), torch.randn(2, 5, 16)
        theirs = run_and_backward(net, net, x)
        for block in net:
            block.compile(backend="aot_eager", fullgraph=True)
        assert_same_run(run_and_backward(net, net, x), theirs)
        assert graphs() == 1

    @pytest.mark.parametrize("shared", ["weight", "A", "B"])
    def test_branches_of_a_group_share_a_tensor(self, shared):
        """A down-projection for several up-projections is a form of LoRA of its own."""
        first, second = (tensors(5, 6, 8, 2) for _ in range(2))
        setattr(second, shared, getattr(first, shared))
        leaves = [t.requires_grad_() for t in (first.x, first.A, first.B)]

        def function(x):
            lists = ([getattr(case, name) for case in (first, second)] for name in ("weight", "A", "B"))
            return fastlora.lora_linear_group(x, *lists, [1.0, 2.0])

        results = []
        for call in (function, compiled(function)):
            ys = call(first.x)
            results.append((*ys, *torch.autograd.grad(sum(y.square().sum() for y in ys), leaves)))
        for plain, ours in zip(*results, strict=True):
            torch.testing.assert_close(ours, plain)

    def test_regional_compilation_of_groups(self):
        """More blocks than a function is compiled for: their hooks must not tell them apart."""
        depth = torch._dynamo.config.recompile_limit + 2
        blocks = nn.Sequential(*(Normed() for _ in range(depth)))
        fastlora.apply_lora(blocks, ["q_proj", "k_proj"], rank=2)
        fastlora.group_projections(blocks)
        x = torch.randn(2, 5, 16, requires_grad=True)
        expected = blocks(x)
        for block in blocks:
            block.compile(backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(blocks(x), expected)
        assert graphs() == 1
        fastlora.ungroup_projections(blocks)
        parents = [block.siblings for block in blocks]
        assert not any(p._forward_hooks or p._forward_hooks_always_called for p in parents)

    def test_adapter_switched_off_and_merged(self):
        """A compiled model follows the switch."""
        net, x = model(), torch.randn(2, 5, 16)
        function = compiled(net)
        adapted = function(x).detach()
        with fastlora.disable_adapter(net):
            frozen = function(x).detach()
            assert torch.equal(frozen, net(x))
        assert not torch.allclose(adapted, frozen)
        assert torch.equal(function(x), adapted)

    def test_autocast(self):
        net, x = model(), torch.randn(2, 5, 16)
        function = compiled(net)

        def autocast(call):
            def under(x):
                with torch.autocast("cpu", torch.bfloat16):
                    return call(x)

            return under

        assert_same_run(run_and_backward(net, autocast(function), x), run_and_backward(net, autocast(net), x))
        # Not under autocast any more.
        assert_same_run(run_and_backward(net, function, x), run_and_backward(net, net, x))

    def test_compiled_autograd(self):
        net, x = model(), torch.randn(2, 5, 16)
        expected = run_and_backward(net, net, x)
        with torch._dynamo.config.patch(compiled_autograd=True):
            step = torch.compile(lambda: run_and_backward(net, net, x), backend="aot_eager")
            assert_same_run(step(), expected)

    @pytest.mark.parametrize("training", [False, True])
    def test_export(self, training):
        """The exported program holds the operator, whole, and takes any number of tokens."""
        net = model().train(training)
        for parameter in net.parameters():
            parameter.requires_grad_(training and parameter.requires_grad)
        tokens = torch.export.Dim("tokens", min=2)
        program = torch.export.export(net, (torch.randn(2, 5, 16),), dynamic_shapes=({1: tokens},))
        targets = [node.target for node in program.graph.nodes]
        assert targets.count(torch.ops.fastlora.lora_forward.default) == 4
        exported = program.module()
        for M in TOKENS:
            x = torch.randn(2, M, 16)
            assert torch.equal(exported(x), net(x))
        program = program.run_decompositions()
        assert torch.equal(program.module()(x), net(x))

    def test_export_with_dropout_draws_seeds(self):
        program = torch.export.export(model(dropout=0.5, depth=1), (torch.randn(5, 16),))
        exported, x = program.module(), torch.randn(5, 16)
        assert not torch.equal(exported(x), exported(x))


def stages(net, how):
    """The net's blocks, each recomputed in backward."""

    def call(x):
        for block in net:
            x = how(block, x)
        return x

    return call


def reentrant(block, x):
    return checkpoint(block, x, use_reentrant=True)


def non_reentrant(block, x):
    return checkpoint(block, x, use_reentrant=False)


def _save_the_operators(context, operator, *args, **kwargs):
    saved = operator == torch.ops.fastlora.lora_forward.default
    return CheckpointPolicy.MUST_SAVE if saved else CheckpointPolicy.PREFER_RECOMPUTE


def selective(block, x):
    contexts = partial(create_selective_checkpoint_contexts, _save_the_operators)
    return checkpoint(block, x, use_reentrant=False, context_fn=contexts)


class TestCheckpoint:
    @both_paths
    @pytest.mark.parametrize("how", [reentrant, non_reentrant, selective])
    @pytest.mark.parametrize(("dropout", "autocast"), [(0.0, False), (0.5, False), (0.5, True)])
    def test_is_the_plain_pass(self, run, how, dropout, autocast):
        net = model(run.device, dropout=dropout)
        x = torch.randn(2, 5, 16, device=run.device)

        def call(x, function):
            with torch.autocast(run.device, torch.bfloat16, enabled=autocast), fastlora.use_path(run.path):
                y = function(x)
            return y * torch.rand((), device=run.device)  # backward starts with the generator gone on

        results = []
        for function in (net, stages(net, how)):
            torch.manual_seed(8)
            with fastlora.use_path(run.path):  # recomputed on the path of its first pass
                results.append(run_and_backward(net, partial(call, function=function), x))
        assert_same_run(*results)

    @pytest.mark.parametrize(("how", "passes"), [(None, 4), (non_reentrant, 8), (selective, 4)])
    def test_what_is_computed_again(self, monkeypatch, how, passes):
        """The policy sees the operator: a layer whose output it saves is not run again."""
        net, x = model(), torch.randn(2, 5, 16)
        calls, real = [], fastlora.ops._plan
        monkeypatch.setattr(fastlora.ops, "_plan", lambda *key: calls.append(key) or real(*key))
        call = net if how is None else stages(net, how)
        y = call(x.requires_grad_())
        assert len(calls) == 4
        y.sum().backward()
        assert len(calls) == passes + 4  # and four backward passes

    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    @pytest.mark.parametrize("how", [non_reentrant, selective])
    def test_compiled(self, how, dropout):
        net, x = model(dropout=dropout), torch.randn(2, 5, 16)
        call = stages(net, how)
        function = compiled(call)
        torch.manual_seed(3)
        first = run_and_backward(net, function, x)
        torch.manual_seed(3)
        assert_same_run(first, run_and_backward(net, net, x))
        assert graphs() == 1

    @both_paths
    def test_the_path_of_the_block_around_backward(self, run, monkeypatch):
        """Backward recomputes on the path that the thread calling it is on, in autograd's threads too."""
        net, x = model(run.device), torch.randn(2, 5, 16, device=run.device, requires_grad=True)
        seen, real = [], fastlora.ops._plan
        monkeypatch.setattr(fastlora.ops, "_plan", lambda *key: seen.append(key[-1]) or real(*key))
        with fastlora.use_path(run.path):
            stages(net, non_reentrant)(x).sum().backward()
        assert set(seen) == {run.path}


class TestSavedTensorHooks:
    @both_paths
    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    def test_save_on_cpu(self, run, dropout):
        net = model(run.device, dropout=dropout)
        x = torch.randn(2, 5, 16, device=run.device)

        def offloaded(x):
            with torch.autograd.graph.save_on_cpu(pin_memory=run.device == "cuda"):
                return net(x)

        results = []
        for call in (net, offloaded):
            torch.manual_seed(8)
            with fastlora.use_path(run.path):
                results.append(run_and_backward(net, call, x))
        assert_same_run(*results)

    @both_paths
    def test_hooks_see_every_tensor(self, run):
        """Gradients come from what the hooks hand back and from nothing kept beside it."""
        case = tensors((3, 5), 24, 40, 4, torch.float16, device=run.device)
        expected = differentiate(fused(1.5, path=run.path), case)
        store = []

        def pack(tensor):
            store.append(tensor.clone())
            return len(store) - 1

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda i: 2 * store[i]):
            leaves = [t.detach().requires_grad_() for t in (case.x, case.A, case.B)]
            y = fused(1.5, path=run.path)(leaves[0], case.weight, *leaves[1:], case.bias)
        dx, dA, dB = torch.autograd.grad(y, leaves, case.dy)
        # h doubles, x and A double, weight doubles and A and B do.
        torch.testing.assert_close(dA, 2 * expected.A, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(dB, 4 * expected.B, rtol=4e-3, atol=4e-2)
        base = case.dy.float() @ case.weight.float()
        update = expected.x.float() - base
        torch.testing.assert_close(dx.float(), 2 * base + 4 * update, rtol=1e-2, atol=6e-2)


class TestFunctional:
    def parameters(self, layer):
        return {name: torch.randn_like(p) for name, p in layer.named_parameters() if p.requires_grad}

    @both_paths
    def test_functional_call(self, run):
        """The given adapters count, in values and gradients; the module keeps its own."""
        layer = fastlora.FusedLoRALinear(16, 24, 3, 2.0, device=run.device)
        twin = copy.deepcopy(layer)
        given = {name: value.requires_grad_() for name, value in self.parameters(layer).items()}
        twin.load_state_dict(given, strict=False)
        x = torch.randn(5, 16, device=run.device)
        with fastlora.use_path(run.path):
            y = functional_call(layer, given, (x,))
            ours = torch.autograd.grad(y.square().sum(), list(given.values()))
            z = twin(x)
            theirs = torch.autograd.grad(z.square().sum(), [getattr(twin, name) for name in given])
        assert torch.equal(y, z)
        assert all(map(torch.equal, ours, theirs))
        assert not layer.A.any()
        assert layer.A.grad is None

    def test_functional_call_compiled(self):
        layer, x = fastlora.FusedLoRALinear(16, 24, 3, 2.0), torch.randn(5, 16)
        given = self.parameters(layer)
        function = compiled(lambda given, x: functional_call(layer, given, (x,)))
        assert torch.equal(function(given, x), functional_call(layer, given, (x,)))

    def test_transforms_of_a_group(self):
        cases = [tensors(5, N, 8, 2) for N in (4, 6)]
        x, weights, As, Bs = cases[0].x, *([getattr(c, n) for c in cases] for n in ("weight", "A", "B"))

        def loss(x):
            ys = fastlora.lora_linear_group(x, weights, As, Bs, [1.0, 2.0])
            return sum(y.square().sum() for y in ys)

        leaf = x.clone().requires_grad_()
        expected = torch.autograd.grad(loss(leaf), leaf)[0]
        torch.testing.assert_close(torch.func.grad(loss)(x), expected)
        torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(x), expected)

    def test_grad_hessian_and_per_sample_gradients(self):
        layer, x = fastlora.FusedLoRALinear(4, 3, 2, 2.0), torch.randn(5, 4)
        given = self.parameters(layer)

        def loss(given, x):
            return functional_call(layer, given, (x,)).square().sum()

        leaves = {name: value.clone().requires_grad_() for name, value in given.items()}
        expected = dict(zip(leaves, torch.autograd.grad(loss(leaves, x), list(leaves.values())), strict=True))
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(given, x)
        for name, grad in torch.func.grad(loss)(given, x).items():
            torch.testing.assert_close(grad, expected[name])
            torch.testing.assert_close(each[name].sum(0), expected[name])
        _, tangent = torch.func.jvp(lambda x: loss(given, x), (x,), (torch.ones_like(x),))
        torch.testing.assert_close(tangent, torch.func.grad(lambda x: loss(given, x))(x).sum())
        hessian = torch.func.hessian(lambda A: loss({**given, "A": A}, x))(given["A"])
        h = x @ given["B"].T
        torch.testing.assert_close(hessian[0, :, 0, :], 2 * 4 * (h.T @ h))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", ["layer", "group", "peft"])
def test_compiled_transforms_have_gradients(kind, backend):
    """torch.func.grad inside compiled code: the operators have no gradients of their own there."""
    x = torch.randn(2, 3, 16)
    if kind == "peft":
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        net = fastlora.fuse_peft(peft.get_peft_model(nn.Sequential(nn.Linear(16, 8)), config))
    else:
        net = fastlora.apply_lora(Siblings(), ["q_proj", "k_proj"], rank=2)
        for layer in (net.q_proj, net.k_proj):
            nn.init.normal_(layer.A)
        if kind == "group":
            fastlora.group_projections(net)
    gradient = torch.func.grad(lambda x: net(x).square().sum())
    expected = gradient(x)
    assert expected.abs().max() > 0
    torch.testing.assert_close(torch.compile(gradient, backend=backend)(x), expected)


@pytest.mark.parametrize("change", [lambda alpha: alpha, lambda alpha: alpha * 2])
def test_alpha_is_an_argument_of_compiled_code(change):
    case = tensors(3, 5, 8, 2)
    operands = (case.weight, case.A, case.B)
    function = compiled(lambda x, alpha: fastlora.lora_linear(x, *operands, change(alpha)), dynamic=True)
    for alpha in (2, 1.5, 3, 0.5):
        expected = fastlora.lora_linear(case.x, *operands, change(alpha))
        torch.testing.assert_close(function(case.x, alpha), expected)


@pytest.mark.cuda
class TestCudaGraphs:
    @pytest.mark.parametrize("path", ["auto", "triton", "addmm"])
    @pytest.mark.parametrize("dropout", [0.0, 0.5])
    def test_captured_training_step(self, path, dropout):
        """Forward and backward replay with new inputs; with dropout each replay has a mask of its own."""
        case = tensors(64, 48, 48, 8, torch.float16, device="cuda")
        x = case.x.clone().requires_grad_()
        A, B = case.A.clone().requires_grad_(), case.B.clone().requires_grad_()

        def step():
            with fastlora.use_path(path):
                y = fastlora.lora_linear(x, case.weight, A, B, 1.5, case.bias, dropout)
            return y, *torch.autograd.grad(y, (x, A, B), case.dy)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        replays = []
        for _ in range(2):
            graph.replay()
            replays.append([t.clone() for t in captured])
        assert all(t.isfinite().all() for t in replays[0])
        assert torch.equal(replays[0][0], replays[1][0]) == (dropout == 0.0)
        with torch.no_grad():
            x.copy_(torch.randn_like(x))
        graph.replay()
        assert not torch.equal(captured[0], replays[1][0])
        if dropout == 0.0:
            for ours, theirs in zip(captured, step(), strict=True):
                torch.testing.assert_close(ours, theirs)

    def test_replays_agree_on_one_mask_in_forward_and_backward(self):
        eye = torch.eye(48, device="cuda")
        x = torch.ones(40, 48, device="cuda", requires_grad=True)
        weight = torch.zeros(48, 48, device="cuda")

        def step():
            with fastlora.use_path("triton"):
                y = fastlora.lora_linear(x, weight, eye, eye, 1.0, None, 0.5)
            return y, torch.autograd.grad(y, x, torch.ones_like(y))[0]

        step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, dx = step()
        for _ in range(3):
            graph.replay()
            torch.testing.assert_close(dx, y.detach(), rtol=2e-3, atol=0)
            assert 0.3 < (y != 0).float().mean() < 0.7

    @pytest.mark.skipif(not CUDA, reason="no NVIDIA GPU")
    def test_reduce_overhead(self):
        """Inductor's own CUDA graphs around the model."""
        net = model("cuda", torch.bfloat16, torch.float32)
        x = torch.randn(2, 8, 16, device="cuda", dtype=torch.bfloat16)
        function = torch.compile(net, mode="reduce-overhead", fullgraph=True)
        for _ in range(4):
            torch.compiler.cudagraph_mark_step_begin()
            ours = run_and_backward(net, function, x)
        theirs = run_and_backward(net, net, x)
        torch.testing.assert_close(ours[0], theirs[0], rtol=0.05, atol=0.05)
        for name, grad in theirs[1].items():
            torch.testing.assert_close(ours[1][name], grad, rtol=0.1, atol=0.05)
