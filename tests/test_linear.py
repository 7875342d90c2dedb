"""``FusedLoRALinear`` as a module: set-up, hooks, swaps with ``nn.Linear``, merging, saving, copying."""

import copy
import gc
import inspect
import io
import pickle
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from cases import (
    DTYPES,
    HALF,
    assert_matches,
    bits_equal,
    dtype_id,
    eager_errors,
    every_run,
    exact,
    tensors,
)
from tolerance import lay_out
from torch import nn
from torch.func import functional_call
from torch.nn.utils import prune
from torch.testing._internal.two_tensor import TwoTensor

import fastlora
from fastlora import FusedLoRALinear
from fastlora import linear as linear_module

PARAMETERS = ("weight", "bias", "A", "B")
every_dtype = pytest.mark.parametrize("dtypes", DTYPES, ids=dtype_id)


def layer_of(case, alpha=1.0, dropout=0.0):
    """A layer in training mode that holds copies of the case's weight, bias, A and B."""
    N, K = case.weight.shape
    layer = FusedLoRALinear(
        K,
        N,
        case.B.shape[0],
        alpha,
        case.bias is not None,
        dropout,
        device=case.x.device,
        dtype=case.weight.dtype,
        adapter_dtype=case.A.dtype,
    )
    layer.load_state_dict({n: getattr(case, n) for n in PARAMETERS if getattr(case, n) is not None})
    return layer


def random_layer(N=5, K=7, R=3, alpha=0.5, bias=True, dropout=0.0, **dtypes):
    """A layer whose adapter is not at its zero start."""
    layer = FusedLoRALinear(K, N, R, alpha, bias, dropout, **dtypes)
    nn.init.normal_(layer.A)
    return layer


def step(layer, case, path="auto"):
    """y and what one backward pass leaves in ``grad`` of x and of the parameters."""
    x = case.x.detach().requires_grad_()
    with fastlora.use_path(path):
        y = layer(x)
    y.backward(case.dy)
    return SimpleNamespace(y=y.detach(), x=x.grad, **{n: p.grad for n, p in layer.named_parameters()})


def values(layer):
    return {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}


def assert_values(layer, expected):
    actual = layer.state_dict()
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert bits_equal(actual[name], tensor), name


def rounding(dtype, *magnitudes):
    """Half a unit in the last place of each magnitude, summed, and what float32 sums may add."""
    unit = torch.finfo(dtype).eps / 2
    return 1e-6 + sum(unit * magnitude.double().abs() for magnitude in magnitudes)


class TestConstructor:
    def test_arguments_in_order(self):
        layer = FusedLoRALinear(7, 5, 3, 0.5, False, 0.25, "meta", torch.float16, torch.float32)
        assert (layer.in_features, layer.out_features, layer.rank) == (7, 5, 3)
        assert (layer.alpha, layer.dropout, layer.bias) == (0.5, 0.25, None)
        assert layer.weight.device.type == layer.A.device.type == "meta"
        assert (layer.weight.dtype, layer.A.dtype, layer.B.dtype) == (
            torch.float16,
            torch.float32,
            torch.float32,
        )
        by_name = FusedLoRALinear(
            in_features=7,
            out_features=5,
            rank=3,
            alpha=0.5,
            bias=False,
            dropout=0.25,
            device="meta",
            dtype=torch.float16,
            adapter_dtype=torch.float32,
        )
        assert repr(by_name) == repr(layer)
        assert by_name.A.dtype == torch.float32

    def test_defaults(self):
        layer = FusedLoRALinear(7, 5, 3)
        assert (layer.alpha, layer.dropout) == (1.0, 0.0)
        assert layer.training
        assert not layer.merged
        assert isinstance(layer, nn.Linear)
        assert {n: (p.shape, p.dtype, p.requires_grad) for n, p in layer.named_parameters()} == {
            "weight": ((5, 7), torch.float32, False),
            "bias": ((5,), torch.float32, False),
            "A": ((5, 3), torch.float32, True),
            "B": ((3, 7), torch.float32, True),
        }
        assert not list(layer.buffers())

    @every_dtype
    def test_dtypes(self, dtypes):
        base, adapter = dtypes
        layer = FusedLoRALinear(7, 5, 3, dtype=base, adapter_dtype=None if adapter == base else adapter)
        assert (layer.weight.dtype, layer.bias.dtype) == (base, base)
        assert (layer.A.dtype, layer.B.dtype) == (adapter, adapter)

    def test_default_dtype_and_device_contexts(self):
        torch.set_default_dtype(torch.float64)
        try:
            layer = FusedLoRALinear(7, 5, 3)
        finally:
            torch.set_default_dtype(torch.float32)
        assert {p.dtype for p in layer.parameters()} == {torch.float64}
        with torch.device("meta"):
            layer = FusedLoRALinear(7, 5, 3)
        assert {p.device.type for p in layer.parameters()} == {"meta"}

    def test_starts_as_the_linear_of_the_same_seed(self):
        torch.manual_seed(5)
        linear = nn.Linear(7, 5)
        torch.manual_seed(5)
        layer = FusedLoRALinear(7, 5, 3)
        assert torch.equal(layer.weight, linear.weight)
        assert torch.equal(layer.bias, linear.bias)
        x = torch.randn(4, 7)
        torch.testing.assert_close(layer(x), linear(x))

    def test_subclasses_of_the_layer(self):
        class Ours(FusedLoRALinear):
            pass

        assert type(Ours(7, 5, 3)) is Ours
        assert type(Ours.from_linear(nn.Linear(7, 5), 3)) is Ours


def assert_initialised(layer):
    """A zeros; B uniform in +-1/sqrt(K), as kaiming_uniform(a=sqrt(5)) draws it, and so is the weight."""
    assert not layer.A.any()
    bound = layer.in_features**-0.5
    for drawn in (layer.B, layer.weight):
        assert 0.9 * bound < drawn.abs().max() <= bound
        assert abs(drawn.std().item() * 3**0.5 / bound - 1) < 0.1
        assert abs(drawn.mean().item()) < 0.1 * bound


class TestInitialisation:
    SHAPE = (64, 48, 16)  # enough draws for the statistics; the rank gives another bound than K

    def test_at_construction(self):
        assert_initialised(FusedLoRALinear(*self.SHAPE))

    def test_from_linear(self):
        assert_initialised(FusedLoRALinear.from_linear(nn.Linear(64, 48), 16))

    def test_reset_parameters(self):
        layer = FusedLoRALinear(*self.SHAPE)
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.fill_(9.0)
        torch.manual_seed(5)
        layer.reset_parameters()
        assert_initialised(layer)
        torch.manual_seed(5)
        linear = nn.Linear(64, 48)
        assert torch.equal(layer.weight, linear.weight)
        assert torch.equal(layer.bias, linear.bias)

    def test_reset_lora_parameters_leaves_the_base(self):
        layer = FusedLoRALinear(*self.SHAPE)
        before = values(layer)
        with torch.no_grad():
            layer.A.fill_(9.0)
            layer.B.fill_(9.0)
        layer.reset_lora_parameters()
        assert_initialised(layer)
        assert torch.equal(layer.weight, before["weight"])
        assert torch.equal(layer.bias, before["bias"])

    @pytest.mark.parametrize("method", ["reset_parameters", "reset_lora_parameters"])
    def test_refused_while_merged(self, method):
        """With new values of A and B, unmerge could not restore the weight."""
        layer = random_layer()
        layer.merge()
        layer_values = {name: p.detach().clone() for name, p in layer.named_parameters()}
        with pytest.raises(ValueError, match=rf"{method}.*merged.*unmerge"):
            getattr(layer, method)()
        for name, before in layer_values.items():
            assert torch.equal(getattr(layer, name), before), name

    @pytest.mark.parametrize("method", ["reset_parameters", "reset_lora_parameters", "to_linear"])
    def test_refused_while_disabled(self, method):
        """A merged layer holds the unmerged weight there, to be merged again with the same A and B."""
        model = nn.Sequential(random_layer())
        weight = model[0].weight.detach().clone()
        model[0].merge()
        with fastlora.disable_adapter(model), pytest.raises(ValueError, match=rf"{method}.*disabled"):
            getattr(model[0], method)()
        model[0].unmerge()
        torch.testing.assert_close(model[0].weight, weight)

    def test_meta_then_to_empty(self):
        layer = FusedLoRALinear(*self.SHAPE, device="meta")
        moved = layer.to_empty(device="cpu")
        assert moved is layer
        assert {n for n, p in layer.named_parameters() if p.requires_grad} == {"A", "B"}
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.fill_(float("nan"))
        layer.reset_parameters()
        assert_initialised(layer)
        assert torch.isfinite(layer(torch.randn(3, 64))).all()

    def test_skip_init(self):
        layer = nn.utils.skip_init(FusedLoRALinear, 7, 5, rank=3, adapter_dtype=torch.float64)
        assert {p.device.type for p in layer.parameters()} == {"cpu"}
        assert layer.A.dtype == torch.float64

    def test_meta_shapes(self):
        layer = FusedLoRALinear(7, 5, 3, device="meta")
        y = layer(torch.empty(2, 4, 7, device="meta"))
        assert (y.shape, y.device.type) == ((2, 4, 5), "meta")


class TestFromLinear:
    def test_arguments(self):
        names = ["linear", "rank", "alpha", "dropout", "adapter_dtype"]
        signature = inspect.signature(FusedLoRALinear.from_linear)
        assert list(signature.parameters) == names
        layer = FusedLoRALinear.from_linear(nn.Linear(7, 5).half(), 3, 0.5, 0.25, torch.float32)
        assert (layer.rank, layer.alpha, layer.dropout) == (3, 0.5, 0.25)
        assert (layer.weight.dtype, layer.A.dtype) == (torch.float16, torch.float32)
        layer = FusedLoRALinear.from_linear(nn.Linear(7, 5).half(), 3)
        assert (layer.alpha, layer.dropout, layer.A.dtype) == (1.0, 0.0, torch.float16)

    @pytest.mark.parametrize("bias", [True, False])
    def test_shares_and_freezes_what_it_adapts(self, bias):
        linear = nn.Linear(7, 5, bias=bias)
        before = values(linear)
        layer = FusedLoRALinear.from_linear(linear, 3)
        assert layer.weight is linear.weight
        assert layer.bias is linear.bias
        assert list(layer.state_dict()) == ["weight", "bias", "A", "B"] if bias else ["weight", "A", "B"]
        assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["A", "B"]
        assert_values(linear, before)
        assert (layer.in_features, layer.out_features) == (7, 5)
        torch.testing.assert_close(layer(torch.ones(7)), linear(torch.ones(7)))

    def test_leaves_the_layer_without_our_hook_and_with_dictionaries_of_its_own(self):
        linear = nn.Linear(7, 5)
        layer = FusedLoRALinear.from_linear(linear, 3)
        assert not linear._forward_pre_hooks
        linear.register_forward_hook(lambda *_: pytest.fail("a hook of the plain layer"))
        layer(torch.ones(7))

    @pytest.mark.parametrize("training", [True, False])
    def test_training_mode(self, training):
        assert FusedLoRALinear.from_linear(nn.Linear(7, 5).train(training), 3).training is training

    def test_on_the_weights_device(self):
        with torch.device("meta"):
            linear = nn.Linear(7, 5)
        layer = FusedLoRALinear.from_linear(linear, 3)
        assert {p.device.type for p in layer.parameters()} == {"meta"}
        with torch.device("meta"):
            layer = FusedLoRALinear.from_linear(nn.Linear(7, 5, device="cpu"), 3)
        assert {p.device.type for p in layer.parameters()} == {"cpu"}

    def test_a_compiled_call_stays_with_its_module(self):
        """``compile()`` leaves a callable on the module that is bound to it."""
        linear = nn.Linear(6, 5)
        linear.compile(backend="eager")
        x = torch.randn(4, 6)
        linear(x)
        layer = FusedLoRALinear.from_linear(linear, 2)
        with torch.no_grad():
            layer.A.normal_()
        y = layer(x)
        assert y.requires_grad
        assert not torch.allclose(y, linear(x))
        layer.compile(backend="eager")
        torch.testing.assert_close(layer(x), y)
        plain = layer.to_linear()
        with torch.no_grad():
            layer.A.zero_()
        torch.testing.assert_close(plain(x), y)

    @pytest.mark.parametrize("hook", ["prune", "weight_norm"])
    def test_an_adapter_that_a_hook_computes(self, hook):
        """Between forward passes its values are out of date; it stays trainable."""
        model = fastlora.apply_lora(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5)), ["0"], rank=2)
        with torch.no_grad():
            model[0].A.normal_()
        if hook == "prune":
            prune.random_unstructured(model[0], "A", 0.5)
        else:
            nn.utils.weight_norm(model[0], "A")
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        model[0].B_scale = nn.Parameter(torch.ones(()))  # somebody else's
        fastlora.apply_lora(model, ["1"], rank=2)
        assert {name for name, p in model.named_parameters() if p.requires_grad} == trained | {"1.A", "1.B"}
        for refused in (lambda: fastlora.adapter_state_dict(model), model[0].merge, model[0].to_linear):
            with pytest.raises(ValueError, match=r"out of date: remove"):
                refused()
        for reset in (model[0].reset_parameters, model[0].reset_lora_parameters):
            with pytest.raises(ValueError, match=r"computes A, which would undo the reset"):
                reset()
        if hook == "prune":
            prune.remove(model[0], "A")
        else:
            nn.utils.remove_weight_norm(model[0], "A")
        assert torch.equal(fastlora.adapter_state_dict(model)["0.A"], model[0].A)

    @pytest.mark.parametrize("kind", ["inference", "expanded"])
    def test_a_weight_that_cannot_be_written(self, kind):
        with torch.inference_mode(kind == "inference"):
            linear = nn.Linear(6, 5)
        if kind == "expanded":
            linear.weight = nn.Parameter(torch.randn(1, 6).expand(5, 6))
        model = fastlora.apply_lora(nn.Sequential(nn.Linear(6, 6), linear), ["0", "1"], rank=2)
        with torch.no_grad():
            model[1].A.normal_()
        before = copy.deepcopy(model.state_dict())
        for merge in (model[1].merge, lambda: fastlora.merge_lora(model)):
            with pytest.raises(ValueError, match=r"the weight \(5, 6\) cannot be written in place"):
                merge()
        assert not model[0].merged
        assert not model[1].merged
        assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())

    def test_extra_attributes_go_there_and_back(self):
        linear = nn.Linear(7, 5)
        linear.mark, linear.alpha = ["a library's"], "its own"
        layer = FusedLoRALinear.from_linear(linear, 3, alpha=2.0)
        assert layer.mark is linear.mark
        assert layer.alpha == 2.0
        plain = layer.to_linear()
        assert plain.mark is linear.mark
        assert not vars(plain).keys() - vars(linear).keys()

    def test_tensors_and_modules_of_others_go_there_and_back(self):
        linear = nn.Linear(7, 5)
        linear.register_buffer("calls", torch.zeros(()))
        linear.register_buffer("last", torch.zeros(()), persistent=False)
        linear.register_parameter("scale", nn.Parameter(torch.ones(5)))
        linear.observer = nn.BatchNorm1d(5)
        linear.register_forward_hook(lambda module, _, y: module.observer(y * module.scale) + module.calls)
        x = torch.randn(4, 7)
        y, names = linear(x), list(linear.state_dict())
        layer = FusedLoRALinear.from_linear(linear, 3)
        assert torch.equal(layer(x), y)
        assert [name for name in layer.state_dict() if name not in "AB"] == names
        assert all(getattr(layer, n) is getattr(linear, n) for n in ("calls", "last", "scale", "observer"))
        plain = layer.to_linear()
        assert torch.equal(plain(x), y)
        assert list(plain.state_dict()) == names
        assert list(dict(plain.named_buffers())) == list(dict(linear.named_buffers()))

    @pytest.mark.parametrize("name", ["A", "B", "alpha", "rank", "merged", "_merged_alpha"])
    def test_a_buffer_whose_name_the_layer_uses(self, name):
        linear = nn.Linear(7, 5)
        linear.register_buffer(name, torch.ones(1))
        with pytest.raises(ValueError, match=f"it holds {name}, a name that FusedLoRALinear reserves"):
            FusedLoRALinear.from_linear(linear, 3)


def register(module, kind, hook):
    """Register ``hook``, which takes any arguments, as a hook of one kind; returns the handle."""
    name, _, option = kind.partition(" ")
    options = {option: True} if option else {}
    return getattr(module, f"register_{name}")(hook, **options)


# Each kind of hook and how many arguments it gets.
HOOKS = {
    "forward_pre_hook": 2,
    "forward_pre_hook with_kwargs": 3,
    "forward_hook": 3,
    "forward_hook with_kwargs": 4,
    "forward_hook always_call": 3,
    "full_backward_pre_hook": 2,
    "full_backward_hook": 3,
}


def fire(module):
    module(torch.randn(4, 7, requires_grad=True)).sum().backward()


class TestHooks:
    @pytest.mark.parametrize("kind", HOOKS)
    def test_fire_once_with_the_right_module(self, kind):
        layer, calls = random_layer(), []
        handle = register(layer, kind, lambda *arguments: calls.append(arguments))
        fire(layer)
        assert [call[0] for call in calls] == [layer]
        assert len(calls[0]) == HOOKS[kind]
        handle.remove()
        fire(layer)
        assert len(calls) == 1

    @pytest.mark.parametrize("kind", HOOKS)
    @pytest.mark.parametrize("keep_the_linear", [True, False])
    def test_taken_over_with_their_handles(self, kind, keep_the_linear):
        linear, calls = nn.Linear(7, 5), []
        handle = register(linear, kind, lambda *arguments: calls.append(arguments))
        layer = FusedLoRALinear.from_linear(linear, 3)
        if not keep_the_linear:
            del linear
            gc.collect()
        fire(layer)
        assert [call[0] for call in calls] == [layer]
        assert len(calls[0]) == HOOKS[kind]
        handle.remove()
        fire(layer)
        assert len(calls) == 1

    def test_always_called_hooks_see_a_failed_forward(self):
        linear, calls = nn.Linear(7, 5), []
        linear.register_forward_hook(lambda *arguments: calls.append(arguments), always_call=True)
        layer = FusedLoRALinear.from_linear(linear, 3)
        with pytest.raises(ValueError, match="shapes do not match"):
            layer(torch.randn(4, 8))
        assert len(calls) == 1

    def test_change_input_output_and_gradient(self):
        layer = random_layer()
        x = torch.randn(4, 7)
        plain = layer(2 * x) + 1
        layer.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
        layer.register_forward_hook(lambda module, inputs, output: output + 1)
        layer.register_full_backward_hook(lambda module, dx, dy: (torch.zeros_like(dx[0]),))
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        assert torch.equal(y, plain)
        y.sum().backward()
        assert not leaf.grad.any()
        assert layer.A.grad.any()

    def test_tensor_hooks_on_parameters(self):
        layer, seen = random_layer(), []
        layer.A.register_hook(seen.append)
        layer.B.register_post_accumulate_grad_hook(seen.append)
        fire(layer)
        assert {tensor.shape for tensor in seen} == {(5, 3), (3, 7)}

    @pytest.mark.parametrize("kind", HOOKS)
    def test_handed_on_by_to_linear(self, kind):
        layer, calls = random_layer(), []
        register(layer, kind, lambda *arguments: calls.append(arguments[0]))
        linear = layer.to_linear()
        fire(linear)
        assert calls == [linear]

    def test_to_linear_has_no_hook_of_ours_and_shares_no_empty_dictionary(self):
        layer = random_layer()
        linear = layer.to_linear()
        assert not linear._forward_pre_hooks
        linear.register_forward_hook(lambda *arguments: pytest.fail("the layer called the linear's hook"))
        linear.register_forward_pre_hook(lambda *arguments: pytest.fail("the layer called the linear's hook"))
        fire(layer)

    def test_input_by_name(self):
        """As nn.Linear calls it, for models that do so; hooks see it as they would there."""
        layer, seen = random_layer(), []
        layer.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True)
        x = torch.randn(4, 7)
        assert torch.equal(layer(input=x), layer(x))
        assert [list(kwargs) for kwargs in seen] == [["input"], []]


class Subclass(nn.Linear):
    pass


def pruned(name):
    linear = nn.Linear(7, 5)
    prune.l1_unstructured(linear, name, 0.5)
    return linear


def with_weight_norm():
    with pytest.warns(FutureWarning):
        return nn.utils.weight_norm(nn.Linear(7, 5))


def with_replaced_forward():
    linear = nn.Linear(7, 5)
    linear.forward = lambda x: x
    return linear


def parametrized():
    linear = nn.Linear(7, 5)
    nn.utils.parametrize.register_parametrization(linear, "weight", nn.Identity())
    return linear


def quantized(dtype):
    linear = nn.Linear(7, 5)
    linear.weight = nn.Parameter(torch.ones(5, 7).to(dtype), requires_grad=False)
    return linear


def wrapped():
    """A weight that wraps others, as torchao's quantized tensors do."""
    linear = nn.Linear(7, 5)
    linear.weight = as_wrapper(linear.weight)
    return linear


def as_wrapper(weight):
    return nn.Parameter(TwoTensor(weight.detach(), weight.detach().clone()), requires_grad=False)


UNADAPTABLE = [
    (lambda: Subclass(7, 5), TypeError, "expected exactly torch.nn.Linear, got Subclass"),
    (
        lambda: nn.MultiheadAttention(8, 2).out_proj,
        TypeError,
        "expected exactly torch.nn.Linear, got NonDynamicallyQuantizableLinear",
    ),
    (lambda: nn.Conv1d(7, 5, 1), TypeError, "got Conv1d"),
    (lambda: None, TypeError, "got NoneType"),
    (random_layer, ValueError, r"already has an adapter.*rank=3"),
    (with_replaced_forward, ValueError, r"in_features=7.*forward is replaced"),
    (
        lambda: pruned("weight"),
        ValueError,
        r"in_features=7.*weight is computed from weight_mask, weight_o",
    ),
    (lambda: pruned("bias"), ValueError, r"in_features=7.*bias is computed from bias_mask, bias_orig"),
    (with_weight_norm, ValueError, r"in_features=7.*computed from weight_g, weight_v"),
    (parametrized, TypeError, "got ParametrizedLinear"),
    (wrapped, ValueError, r"in_features=7.*its weight is a TwoTensor, quantized for example"),
    (lambda: quantized(torch.int8), ValueError, r"in_features=7.*int8.*floating-point"),
    (lambda: quantized(torch.float8_e4m3fn), ValueError, r"in_features=7.*float8_e4m3fn.*16, 32 or 64 bits"),
]

BAD_ARGUMENTS = [
    ({"rank": 0}, ValueError, "rank.*0"),
    ({"rank": -3}, ValueError, "rank.*-3"),
    ({"rank": 2.0}, TypeError, "rank.*2.0"),
    ({"rank": "8"}, TypeError, "rank.*'8'"),
    ({"rank": True}, TypeError, "rank.*True"),
    ({"rank": None}, TypeError, "rank.*None"),
    ({"alpha": float("nan")}, ValueError, "alpha.*nan"),
    ({"alpha": float("-inf")}, ValueError, "alpha.*-inf"),
    ({"alpha": 10**400}, ValueError, "alpha must be finite"),
    ({"alpha": "1"}, TypeError, "alpha.*'1'"),
    ({"alpha": None}, TypeError, "alpha.*None"),
    ({"dropout": -0.1}, ValueError, r"dropout.*-0\.1"),
    ({"dropout": 1.5}, ValueError, r"dropout.*1\.5"),
    ({"dropout": float("nan")}, ValueError, "dropout.*nan"),
    ({"dropout": None}, TypeError, "dropout.*None"),
    ({"adapter_dtype": torch.int8}, ValueError, "floating-point.*int8"),
    ({"adapter_dtype": torch.complex64}, ValueError, "floating-point.*complex64"),
    ({"adapter_dtype": torch.float8_e4m3fn}, ValueError, "16, 32 or 64 bits.*float8_e4m3fn"),
    ({"adapter_dtype": "float16"}, TypeError, "torch.dtype.*'float16'"),
]


class TestRefusals:
    @pytest.mark.parametrize(("build", "error", "message"), UNADAPTABLE)
    def test_layers_that_cannot_be_adapted(self, build, error, message):
        module = build()
        before = {} if module is None else dict(vars(module))
        trainable = [] if module is None else [p.requires_grad for p in module.parameters()]
        with pytest.raises(error, match=message):
            FusedLoRALinear.from_linear(module, 3)
        if module is not None:
            assert vars(module) == before
            assert [p.requires_grad for p in module.parameters()] == trainable

    @pytest.mark.parametrize(("change", "error", "message"), BAD_ARGUMENTS)
    def test_arguments_of_from_linear(self, change, error, message):
        linear = nn.Linear(7, 5)
        before, state = dict(vars(linear)), torch.get_rng_state()
        with pytest.raises(error, match=message):
            FusedLoRALinear.from_linear(linear, **{"rank": 3, **change})
        assert vars(linear) == before
        assert linear.weight.requires_grad
        assert linear.bias.requires_grad
        assert not linear._forward_pre_hooks
        assert torch.equal(state, torch.get_rng_state())

    @pytest.mark.parametrize(("change", "error", "message"), BAD_ARGUMENTS)
    def test_arguments_of_the_constructor(self, change, error, message):
        state = torch.get_rng_state()
        with pytest.raises(error, match=message):
            FusedLoRALinear(7, 5, **{"rank": 3, **change})
        assert torch.equal(state, torch.get_rng_state())

    def test_integer_base_without_an_adapter_dtype(self):
        with pytest.raises(ValueError, match=r"int32.*adapter_dtype"):
            FusedLoRALinear(7, 5, 3, dtype=torch.int32)

    @pytest.mark.parametrize("dtype", [torch.complex64, torch.int8])
    def test_a_base_that_is_not_floating_point(self, dtype):
        with pytest.raises(ValueError, match=f"weight must be floating-point, got {dtype}"):
            FusedLoRALinear(7, 5, 3, dtype=dtype, adapter_dtype=torch.float32)

    @pytest.mark.parametrize("shape", [(6,), (3, 8), (2, 3, 5)])
    def test_wrong_width_of_x(self, shape):
        with pytest.raises(ValueError, match=rf"x \({', '.join(map(str, shape))},?\).*weight \(5, 7\)"):
            random_layer()(torch.randn(shape))

    def test_dtype_of_x(self):
        with pytest.raises(ValueError, match=r"x \(3, 7\) float16, weight \(5, 7\) float32"):
            random_layer()(torch.randn(3, 7).half())

    @pytest.mark.parametrize(
        ("name", "value", "error"),
        [
            ("dropout", float("nan"), ValueError),
            ("dropout", -0.5, ValueError),
            ("dropout", None, TypeError),
            ("alpha", float("inf"), ValueError),
            ("alpha", torch.tensor([1.0, 2.0]), TypeError),
            ("alpha", "2", TypeError),
        ],
    )
    def test_attributes_set_later(self, name, value, error):
        layer = random_layer(alpha=0.5, dropout=0.25)
        with pytest.raises(error, match=rf"{name} must be .*{re.escape(str(value))}"):
            setattr(layer, name, value)
        assert (layer.alpha, layer.dropout) == (0.5, 0.25)


class TestForwardAndBackward:
    @every_run
    @every_dtype
    def test_values_and_gradients(self, run, dtypes):
        case = tensors((3, 5), 24, 40, 4, *dtypes, device=run.device)
        layer = layer_of(case, 1.7)
        ours = step(layer, case, run.path)
        assert_matches(ours, exact(case, 1.7), eager_errors(case, 1.7, wanted=("x", "A", "B")))
        assert ours.weight is None
        assert ours.bias is None
        assert (ours.y.dtype, ours.x.dtype) == (case.x.dtype, case.x.dtype)
        assert (ours.A.dtype, ours.B.dtype) == (case.A.dtype, case.A.dtype)

    @every_run
    def test_trainable_bias(self, run):
        case = tensors((3, 5), 24, 40, 4, torch.float16, device=run.device)
        layer = layer_of(case, 1.7)
        layer.bias.requires_grad_()
        assert_matches(step(layer, case, run.path), exact(case, 1.7), eager_errors(case, 1.7))

    @every_run
    def test_without_bias(self, run):
        case = tensors((3, 5), 24, 40, 4, torch.float16, device=run.device, bias=False)
        layer = layer_of(case, 1.7)
        assert layer.bias is None
        ours = step(layer, case, run.path)
        assert_matches(ours, exact(case, 1.7), eager_errors(case, 1.7))

    @every_run
    @pytest.mark.parametrize("lead", [(), (9,), (0,), (2, 0), (2, 3, 4)])
    def test_leading_sizes_of_x(self, run, lead):
        case = tensors(lead, 24, 40, 4, torch.float16, device=run.device)
        ours = step(layer_of(case, 0.5), case, run.path)
        assert ours.y.shape == (*lead, 24)
        assert_matches(ours, exact(case, 0.5), eager_errors(case, 0.5, wanted=("x", "A", "B")))

    @every_run
    @pytest.mark.parametrize("layout", ["transposed", "strided"])
    def test_strided_x(self, run, layout):
        case = tensors(9, 24, 40, 4, torch.float16, device=run.device)
        truth, yardstick = exact(case, 0.5), eager_errors(case, 0.5, wanted=("x", "A", "B"))
        case.x = lay_out(case.x, layout)
        assert_matches(step(layer_of(case, 0.5), case, run.path), truth, yardstick)

    @every_run
    def test_eval_and_no_grad_give_the_same(self, run):
        case = tensors((3, 5), 24, 40, 4, torch.float16, device=run.device)
        layer = layer_of(case, 1.7)
        with fastlora.use_path(run.path):
            y = layer(case.x)
            assert torch.equal(layer.eval()(case.x), y)
            with torch.no_grad():
                assert torch.equal(layer(case.x), y)

    @every_run
    def test_alpha_at_run_time(self, run):
        case = tensors((3, 5), 24, 40, 4, torch.float16, device=run.device)
        layer = layer_of(case, 1.7)
        for alpha in (1.7, -0.5, 2, torch.tensor(0.25)):
            layer.alpha = alpha
            layer.zero_grad()
            ours = step(layer, case, run.path)
            alpha = float(alpha)
            assert_matches(ours, exact(case, alpha), eager_errors(case, alpha, wanted=("x", "A", "B")))

    def test_gradients_accumulate(self):
        case = tensors((3, 5), 24, 40, 4)
        layer = layer_of(case, 1.7)
        once = {name: p.clone() for name, p in vars(step(layer, case)).items() if name in ("A", "B")}
        step(layer, case)
        for name, gradient in once.items():
            torch.testing.assert_close(getattr(layer, name).grad, 2 * gradient)

    def test_a_frozen_weight_cannot_be_trained(self):
        layer = random_layer()
        layer.weight.requires_grad_()
        view = torch.nn.Parameter(torch.randn(35)).view(5, 7)  # as FSDP1 makes them
        with pytest.raises(ValueError, match=r"weight \(5, 7\) requires a gradient.*computed.*fully_shard"):
            fastlora.lora_linear(torch.randn(2, 7), view, torch.randn(5, 2), torch.randn(2, 7))
        with pytest.raises(ValueError, match=r"weight \(5, 7\) requires a gradient.*requires_grad_\(False\)"):
            layer(torch.randn(3, 7))
        with torch.no_grad():
            assert layer(torch.randn(3, 7)).shape == (3, 5)
        layer.weight.requires_grad_(False)
        fire(layer)

    def test_an_optimizer_changes_the_adapter_alone(self):
        layer = random_layer()
        before = values(layer)
        optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.1)
        fire(layer)
        optimizer.step()
        assert [n for n, value in values(layer).items() if not torch.equal(value, before[n])] == ["A", "B"]

    def test_autocast(self):
        layer, x = random_layer(), torch.randn(4, 7)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
            layer.merge()
            assert layer(x).dtype == torch.bfloat16
        assert y.dtype == torch.bfloat16
        y.sum().backward()
        assert layer.A.grad.dtype == torch.float32


class TestDropout:
    def test_only_in_training(self):
        case = tensors((3, 50), 24, 40, 4)
        layer = layer_of(case, 1.7, dropout=0.5)
        plain = layer_of(case, 1.7)(case.x)
        assert not torch.allclose(layer(case.x), plain)
        state = torch.get_rng_state()
        assert torch.equal(layer.eval()(case.x), plain)
        assert torch.equal(state, torch.get_rng_state())

    def test_different_each_call_and_set_by_torchs_seed(self):
        case = tensors((3, 50), 24, 40, 4)
        layer = layer_of(case, 1.7, dropout=0.5)
        torch.manual_seed(3)
        first, second = layer(case.x), layer(case.x)
        torch.manual_seed(3)
        assert torch.equal(layer(case.x), first)
        assert not torch.equal(first, second)

    def test_changes_the_update_alone(self):
        """Half of x dropped and the rest doubled, in the update's input and not in the base."""
        layer = FusedLoRALinear(40, 40, 40, bias=False, dropout=0.5)
        with torch.no_grad():
            layer.A.copy_(torch.eye(40))
            layer.B.copy_(torch.eye(40))
        x = torch.randn(30, 40)
        update = layer(x) - F.linear(x, layer.weight)
        kept = update.abs() > 0.5 * x.abs()
        torch.testing.assert_close(update, torch.where(kept, 2 * x, 0), atol=1e-5, rtol=1e-5)
        assert 0.4 < kept.float().mean() < 0.6

    @every_run
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=dtype_id)
    def test_all_dropped(self, run, dtype):
        case = tensors((3, 5), 24, 40, 4, dtype, device=run.device)
        layer = layer_of(case, 1.7, dropout=1)
        ours = step(layer, case, run.path)
        keep = torch.zeros(15, 40, device=run.device)
        assert_matches(ours, exact(case, 1.7, keep), eager_errors(case, 1.7, keep, wanted=("x", "A", "B")))
        assert not ours.A.any()
        assert not ours.B.any()
        layer.eval()
        layer.zero_grad()
        ours = step(layer, case, run.path)
        assert_matches(ours, exact(case, 1.7), eager_errors(case, 1.7, wanted=("x", "A", "B")))

    def test_set_later(self):
        case = tensors((3, 50), 24, 40, 4)
        layer = layer_of(case, 1.7)
        plain = layer(case.x)
        layer.dropout = 0.5
        assert not torch.equal(layer(case.x), plain)
        layer.dropout = 0
        assert torch.equal(layer(case.x), plain)


class TestMerge:
    def test_not_while_disabled(self):
        layer = random_layer()
        before = values(layer)
        with (
            fastlora.disable_adapter(layer),
            pytest.raises(ValueError, match="merge: the adapter is disabled"),
        ):
            layer.merge()
        assert not layer.merged
        assert_values(layer, before)

    @every_dtype
    def test_one_rounding(self, dtypes):
        case = tensors(9, 24, 40, 4, *dtypes)
        layer = layer_of(case, 1.7)
        weight = layer.weight
        address, truth = weight.data_ptr(), case.weight.double() + 1.7 * case.A.double() @ case.B.double()
        layer.merge()
        assert layer.merged
        assert layer.weight is weight
        assert layer.weight.data_ptr() == address
        assert layer.weight.dtype == dtypes[0]
        assert not layer.weight.requires_grad
        assert (layer.weight.double() - truth).abs().sub(rounding(dtypes[0], truth)).max() <= 0
        assert torch.equal(layer.A, case.A)
        assert torch.equal(layer.B, case.B)

    @every_dtype
    def test_forward_is_one_plain_linear(self, dtypes):
        case = tensors((3, 5), 24, 40, 4, *dtypes)
        layer = layer_of(case, 1.7, dropout=0.5)
        layer.merge()
        state = torch.get_rng_state()
        y = layer(case.x)
        assert torch.equal(y, F.linear(case.x, layer.weight, layer.bias))
        assert not y.requires_grad
        assert torch.equal(state, torch.get_rng_state())

    @every_dtype
    def test_unmerge_restores_up_to_the_rounding(self, dtypes):
        case = tensors((3, 5), 24, 40, 4, *dtypes)
        layer = layer_of(case, 1.7)
        layer.merge()
        merged = layer.weight.detach().clone()
        layer.alpha = -8.0  # what was added counts, not what would be now
        layer.unmerge()
        assert not layer.merged
        error = (layer.weight.double() - case.weight.double()).abs()
        assert (error - rounding(dtypes[0], merged, case.weight)).max() <= 0
        assert layer.alpha == -8.0
        layer.alpha = 1.7
        layer.weight.data.copy_(case.weight)
        ours = step(layer, case)
        assert_matches(ours, exact(case, 1.7), eager_errors(case, 1.7, wanted=("x", "A", "B")))

    def test_idempotent(self):
        layer = random_layer()
        layer.unmerge()
        start = values(layer)
        layer.unmerge()
        assert_values(layer, start)
        layer.merge()
        once = layer.weight.detach().clone()
        layer.merge()
        assert torch.equal(layer.weight, once)
        assert not torch.equal(once, start["weight"])
        layer.unmerge()
        restored = layer.weight.detach().clone()
        layer.unmerge()
        assert torch.equal(layer.weight, restored)

    def test_merged_cannot_be_set(self):
        with pytest.raises(AttributeError):
            random_layer().merged = True

    def test_adapters_wider_than_float32(self):
        case = tensors(9, 24, 40, 4, torch.float32, torch.float64)
        layer = layer_of(case, 1.7)
        layer.merge()
        assert torch.equal(layer.weight, (case.weight.double() + 1.7 * case.A @ case.B).float())

    def test_a_weight_parametrized_while_merged(self):
        layer = random_layer()
        layer.merge()
        nn.utils.parametrizations.weight_norm(layer)
        with pytest.raises(ValueError, match=r"unmerge: the weight .* is computed by a parametrization"):
            layer.unmerge()
        assert layer.merged

    def test_after_dtype_change(self):
        layer = random_layer()
        weight = layer.weight.detach().clone()
        layer.merge()
        layer.double()
        layer.unmerge()
        torch.testing.assert_close(layer.weight, weight.double(), rtol=0, atol=1e-6)

    def test_refused_for_a_shared_weight(self):
        model = nn.Module()
        model.embedding, model.output = nn.Embedding(5, 7), nn.Linear(7, 5, bias=False)
        model.output.weight = model.embedding.weight
        fastlora.apply_lora(model, ["output"], rank=3)
        nn.init.normal_(model.output.A)
        before = values(model)
        with pytest.raises(ValueError, match=r"merge: the weight \(5, 7\) is shared with embedding\.weight"):
            model.output.merge()
        assert not model.output.merged
        assert_values(model, before)
        # A plain layer beside it is no change to the embedding.
        assert not torch.equal(model.output.to_linear().weight, before["embedding.weight"])
        assert_values(model, before)

    @pytest.mark.parametrize("cause", ["overflow", "nan"])
    def test_refused_for_an_update_that_is_not_finite(self, cause):
        layer = random_layer(dtype=torch.float16)
        with torch.no_grad():
            layer.A[0, 0] = 60000.0 if cause == "overflow" else float("nan")
            layer.B[0].fill_(4.0)
        before = values(layer)
        with pytest.raises(ValueError, match=r"merge: weight \+ alpha \* A @ B is not finite.*alpha 0.5.*3"):
            layer.merge()
        assert not layer.merged
        for name in ("weight", "bias", "B"):
            assert torch.equal(getattr(layer, name), before[name]), name

    def test_a_weight_that_was_not_finite_before_merges(self):
        layer = random_layer()
        with torch.no_grad():
            layer.weight[0, 0] = float("inf")
        layer.merge()
        assert layer.merged

    def test_between_forward_and_backward_is_noticed(self):
        layer = random_layer()
        y = layer(torch.randn(3, 7, requires_grad=True))
        layer.merge()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()

    def test_values_that_lie_elsewhere(self):
        """Of an offloaded layer, meta tensors would be merged, and the update lost without a word."""
        layer = FusedLoRALinear(7, 5, 3, device="meta")
        for method in (layer.merge, layer.to_linear):
            with pytest.raises(ValueError, match=f"{method.__name__}: weight, A, B on the meta device"):
                method()
        assert not layer.merged
        layer = random_layer()
        layer.merge()
        layer.to("meta")
        with pytest.raises(ValueError, match="unmerge: weight, A, B on the meta device"):
            layer.unmerge()
        assert layer.merged


class TestToLinear:
    def test_not_finite(self):
        layer = random_layer(alpha=1e6, dtype=torch.float16)
        with pytest.raises(ValueError, match=r"to_linear: weight .* is not finite"):
            layer.to_linear()

    @every_dtype
    @pytest.mark.parametrize("training", [True, False])
    def test_computes_the_same(self, dtypes, training):
        case = tensors((3, 5), 24, 40, 4, *dtypes)
        layer = layer_of(case, 1.7).train(training)
        before = values(layer)
        linear = layer.to_linear()
        assert type(linear) is nn.Linear
        assert (linear.in_features, linear.out_features) == (40, 24)
        assert linear.training is training
        assert linear.bias is layer.bias
        assert linear.weight.data_ptr() != layer.weight.data_ptr()
        assert isinstance(linear.weight, nn.Parameter)
        assert not linear.weight.requires_grad
        assert_values(layer, before)
        assert not layer.merged
        layer.merge()
        assert bits_equal(linear.weight, layer.weight)
        assert torch.equal(linear(case.x), layer(case.x))

    def test_of_a_merged_layer_shares_its_weight(self):
        layer = random_layer()
        layer.merge()
        layer.alpha = 9.0
        assert layer.to_linear().weight is layer.weight

    def test_without_bias(self):
        linear = random_layer(bias=False).to_linear()
        assert linear.bias is None
        assert list(linear.state_dict()) == ["weight"]

    def test_there_and_back(self):
        linear = nn.Linear(7, 5)
        before = values(linear)
        assert_values(FusedLoRALinear.from_linear(linear, 3).to_linear(), before)


def saved_and_loaded(thing, weights_only):
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=weights_only)


class TestStateDict:
    @every_dtype
    @pytest.mark.parametrize("assign", [False, True])
    def test_round_trip(self, dtypes, assign):
        layer = random_layer(dtype=dtypes[0], adapter_dtype=dtypes[1])
        state = saved_and_loaded(layer.state_dict(), weights_only=True)
        assert list(state) == ["weight", "bias", "A", "B"]
        device = "meta" if assign else "cpu"
        fresh = FusedLoRALinear(7, 5, 3, 0.5, device=device, dtype=dtypes[0], adapter_dtype=dtypes[1])
        assert str(fresh.load_state_dict(state, assign=assign)) == "<All keys matched successfully>"
        assert_values(fresh, layer.state_dict())
        assert [n for n, p in fresh.named_parameters() if p.requires_grad] == ["A", "B"]
        x = torch.randn(3, 7, dtype=dtypes[0])
        assert torch.equal(fresh(x), layer(x))

    def test_of_a_plain_linear(self):
        linear, layer = nn.Linear(7, 5), random_layer()
        before = values(layer)
        with pytest.raises(RuntimeError, match=r"Missing key\(s\).*\"A\", \"B\""):
            layer.load_state_dict(linear.state_dict())
        report = layer.load_state_dict(linear.state_dict(), strict=False)
        assert (report.missing_keys, report.unexpected_keys) == (["A", "B"], [])
        assert_values(layer, {**before, **linear.state_dict()})

    def test_wrong_shape(self):
        with pytest.raises(RuntimeError, match=r"size mismatch for A.*\[5, 4\].*\[5, 3\]"):
            random_layer().load_state_dict(random_layer(R=4).state_dict())

    def test_of_a_merged_layer_warns(self):
        model = nn.ModuleDict({"block": nn.Sequential(random_layer(), random_layer())})
        merged = model["block"][1]
        merged.merge()
        with pytest.warns(UserWarning, match=r"merged layer block\.1: .*unmerge") as caught:
            state = model.state_dict()
        assert len(caught) == 1
        assert torch.equal(state["block.1.weight"], merged.weight)
        with pytest.warns(UserWarning, match="merged layer FusedLoRALinear"):
            merged.state_dict()

    @pytest.mark.filterwarnings("error")
    def test_of_an_unmerged_layer_does_not_warn(self):
        layer = random_layer()
        layer.merge()
        layer.unmerge()
        layer.state_dict()

    @pytest.mark.parametrize("strict", [True, False])
    def test_into_a_merged_layer_is_an_error(self, strict):
        model = nn.Sequential(random_layer())
        state = {name: tensor + 1 for name, tensor in model.state_dict().items()}
        model[0].merge()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        with pytest.raises(RuntimeError, match=r"0 is merged: unmerge\(\) before loading"):
            model.load_state_dict(state, strict=strict)
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]), name
        model[0].unmerge()
        model.load_state_dict(state)
        assert_values(model, state)


def test_the_rank_is_that_of_the_adapter():
    layer = random_layer(R=3)
    layer.A, layer.B = nn.Parameter(torch.randn(5, 2)), nn.Parameter(torch.randn(2, 7))
    assert layer.rank == 2
    assert "rank=2" in repr(layer)
    numpy = pytest.importorskip("numpy")
    layer = fastlora.FusedLoRALinear(4, 4, 2, numpy.float32(0.3))
    assert type(layer.alpha) is float
    for infinite in (numpy.float16("inf"), numpy.float32("inf"), numpy.float64("nan")):
        with pytest.raises(ValueError, match=r"alpha must be finite, got (inf|nan)"):
            layer.alpha = infinite
    assert fastlora.FusedLoRALinear(4, 4, numpy.int64(3)).A.shape == (4, 3)


def pickled(layer):
    return pickle.loads(pickle.dumps(layer))


def saved_whole(layer):
    return saved_and_loaded(layer, weights_only=False)


class TestCopies:
    @pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved_whole])
    @every_dtype
    def test_equal_and_independent(self, duplicate, dtypes):
        case = tensors((3, 5), 24, 40, 4, *dtypes)
        layer = layer_of(case, 1.7, dropout=0.25)
        layer.mark = "kept"
        step(layer, case)  # a layer in use: gradients, and a graph that ends in its parameters
        twin = duplicate(layer)
        assert repr(twin) == repr(layer)
        assert twin.mark == "kept"
        assert [n for n, p in twin.named_parameters() if p.requires_grad] == ["A", "B"]
        assert_values(twin, layer.state_dict())
        before = values(layer)
        twin.dropout = 0.0
        twin.zero_grad()
        assert_matches(step(twin, case), exact(case, 1.7), eager_errors(case, 1.7, wanted=("x", "A", "B")))
        twin.merge()
        assert not layer.merged
        assert layer.dropout == 0.25
        assert_values(layer, before)

    @pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved_whole])
    def test_of_a_merged_layer(self, duplicate):
        layer = random_layer()
        weight = layer.weight.detach().clone()
        layer.merge()
        twin = duplicate(layer)
        assert twin.merged
        twin.unmerge()
        torch.testing.assert_close(twin.weight, weight, rtol=0, atol=1e-6)
        assert layer.merged

    @pytest.mark.parametrize("base", [torch.float64, *HALF], ids=dtype_id)
    @pytest.mark.parametrize("adapter", [torch.float32, torch.float64], ids=dtype_id)
    def test_to_another_dtype(self, base, adapter):
        layer = random_layer(adapter_dtype=adapter)
        before = values(layer)
        A = layer.A
        assert layer.to(base) is layer
        assert layer.A is A
        assert A.requires_grad
        assert_values(layer, {name: tensor.to(base) for name, tensor in before.items()})
        y = layer(torch.randn(3, 7, dtype=base))
        assert y.dtype == base
        y.sum().backward()
        assert A.grad.dtype == base

    @pytest.mark.parametrize("method", ["half", "bfloat16", "double"])
    def test_conversion_methods(self, method):
        layer = getattr(random_layer(), method)()
        assert len({p.dtype for p in layer.parameters()}) == 1
        assert layer(torch.randn(3, 7, dtype=layer.weight.dtype)).dtype == layer.weight.dtype

    @pytest.mark.cuda
    def test_to_the_gpu_and_back(self):
        layer = random_layer()
        x = torch.randn(3, 7)
        y = layer(x)
        assert {p.device.type for p in layer.cuda().parameters()} == {"cuda"}
        torch.testing.assert_close(layer(x.cuda()).cpu(), y, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.cpu()(x), y)

    def test_functional_call(self):
        """Parameters are read from the module at each call, so that others can stand in for them."""
        case = tensors((3, 5), 24, 40, 4)
        layer = layer_of(case.redraw(), 1.7)
        before = values(layer)
        stand_ins = {n: getattr(case, n).clone().requires_grad_(n != "weight") for n in PARAMETERS}
        x = case.x.clone().requires_grad_()
        y = functional_call(layer, stand_ins, (x,))
        y.backward(case.dy)
        ours = SimpleNamespace(y=y.detach(), x=x.grad, **{n: stand_ins[n].grad for n in ("A", "B", "bias")})
        assert_matches(ours, exact(case, 1.7), eager_errors(case, 1.7))
        assert all(p.grad is None for p in layer.parameters())
        assert_values(layer, before)


class TestRepr:
    @pytest.mark.parametrize(
        ("layer", "expected"),
        [
            (
                lambda: FusedLoRALinear(7, 5, 3),
                "in_features=7, out_features=5, bias=True, rank=3, alpha=1, dropout=0",
            ),
            (
                lambda: FusedLoRALinear(7, 5, 3, 0.125, bias=False, dropout=0.1),
                "in_features=7, out_features=5, bias=False, rank=3, alpha=0.125, dropout=0.1",
            ),
        ],
    )
    def test_names_what_it_is(self, layer, expected):
        layer = layer()
        assert repr(layer) == f"FusedLoRALinear({expected})"
        layer.merge()
        assert repr(layer) == f"FusedLoRALinear({expected}, merged=True)"
        layer.unmerge()
        assert repr(layer) == f"FusedLoRALinear({expected})"


ENCODER = {"d_model": 16, "nhead": 2, "dim_feedforward": 24, "dropout": 0.0, "batch_first": True}


class TestTransformerEncoderLayer:
    """In eval mode PyTorch's fast path reads linear1.weight and linear2.weight and calls neither layer."""

    @pytest.mark.parametrize("padding", [False, True])
    @pytest.mark.parametrize("norm_first", [False, True])
    @pytest.mark.parametrize("adapted", [("linear1",), ("linear2",), ("linear1", "linear2")], ids="+".join)
    @pytest.mark.parametrize("duplicate", [lambda block: block, copy.deepcopy, saved_whole])
    def test_eval_computes_what_training_does(self, adapted, norm_first, padding, duplicate):
        block = nn.TransformerEncoderLayer(**ENCODER, norm_first=norm_first)
        base = copy.deepcopy(block)
        for name in adapted:
            layer = FusedLoRALinear.from_linear(getattr(block, name), 3)
            nn.init.normal_(layer.A)
            setattr(block, name, layer)
        block.requires_grad_(False)  # the fast path is off anyway where something could be trained
        block = duplicate(block)
        x = torch.randn(2, 6, 16)
        mask = torch.arange(6) >= torch.tensor([[6], [4]]) if padding else None
        real = slice(None) if mask is None else ~mask
        expected = block.train()(x, src_key_padding_mask=mask)
        with torch.no_grad():
            y = block.eval()(x, src_key_padding_mask=mask)
        torch.testing.assert_close(y[real], expected[real])
        assert not torch.allclose(y[real], base.eval()(x, src_key_padding_mask=mask)[real], atol=1e-2)

    def test_merged_and_plain_layers(self):
        block = nn.TransformerEncoderLayer(**ENCODER).requires_grad_(False)
        for name in ("linear1", "linear2"):
            layer = FusedLoRALinear.from_linear(getattr(block, name), 3)
            nn.init.normal_(layer.A)
            setattr(block, name, layer)
        x = torch.randn(2, 6, 16)
        expected = block(x).detach()

        def check():
            with torch.no_grad():
                torch.testing.assert_close(block.eval()(x), expected, rtol=1e-4, atol=1e-5)

        plain = {name: getattr(block, name).to_linear() for name in ("linear1", "linear2")}
        check()  # making a plain layer takes nothing from this one
        block.linear1.merge()
        check()
        for name, linear in plain.items():
            setattr(block, name, linear)
        check()


def _state_dict_hooks(linear, seen):
    """One hook of each kind around state_dict and load_state_dict, which notes that it ran and on what."""
    linear.register_state_dict_pre_hook(lambda module, prefix, keep: seen.append(("before saving", module)))
    linear._register_state_dict_hook(lambda module, state, prefix, local: seen.append(("saved", module)))
    linear.register_load_state_dict_pre_hook(lambda module, *rest: seen.append(("before loading", module)))
    linear.register_load_state_dict_post_hook(lambda module, keys: seen.append(("loaded", module)))


def test_no_kind_of_hook_is_forgotten():
    """A kind that PyTorch adds would be lost where a layer takes the place of another."""
    kinds = {
        name for name, value in vars(nn.Linear(1, 1)).items() if "hook" in name and hasattr(value, "keys")
    }
    assert kinds == {*linear_module._HOOK_DICTS, "_load_state_dict_pre_hooks"}


def test_state_dict_hooks_go_on_both_ways():
    linear, seen = nn.Linear(5, 4), []
    _state_dict_hooks(linear, seen)
    layer = FusedLoRALinear.from_linear(linear, 2)
    for module in (layer, layer.to_linear()):
        seen.clear()
        module.load_state_dict(module.state_dict())
        assert seen == [(kind, module) for kind in ("before saving", "saved", "before loading", "loaded")]


def test_a_weight_that_is_quantized_later():
    """It has no storage for kernels to read, so plain operations run, and it cannot hold the update."""
    layer = random_layer()
    x = torch.randn(6, layer.in_features, requires_grad=True)
    expected = layer(x)
    gradients = torch.autograd.grad(expected.sum(), (x, layer.A, layer.B))
    layer.weight = as_wrapper(layer.weight)
    y = layer(x)
    torch.testing.assert_close(torch.as_tensor(y.a if isinstance(y, TwoTensor) else y), expected)
    for ours, theirs in zip(torch.autograd.grad(y.sum(), (x, layer.A, layer.B)), gradients, strict=True):
        torch.testing.assert_close(ours.a if isinstance(ours, TwoTensor) else ours, theirs)
    for method in (layer.merge, lambda: fastlora.merge_lora(nn.Sequential(layer))):
        with pytest.raises(ValueError, match="TwoTensor, quantized for example, which cannot hold"):
            method()
    assert not layer.merged


def test_a_sharded_weight_is_refused():
    from torch.distributed.tensor import DTensor

    class Pretended(DTensor):
        """Of DTensor's type, without a process group."""

        def __new__(cls, tensor):
            return torch.Tensor._make_subclass(cls, tensor)

    linear = nn.Linear(7, 5)
    linear._parameters["weight"] = Pretended(linear.weight.detach())
    linear.weight._is_param = True  # as nn.Parameter marks other classes
    with pytest.raises(ValueError, match="DTensor: adapt the model first, then shard it"):
        FusedLoRALinear.from_linear(linear, 2)


def test_merging_under_autocast_is_not_rounded():
    layer = random_layer()
    weight = layer.weight.double()
    exact = weight + layer.alpha * layer.A.double() @ layer.B.double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        linear = layer.to_linear()
        layer.merge()
    torch.testing.assert_close(linear.weight.double(), exact, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(layer.weight.double(), exact, rtol=1e-6, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with fastlora.disable_adapter(layer):
            torch.testing.assert_close(layer.weight.double(), weight, rtol=1e-6, atol=1e-6)
        layer.unmerge()
    torch.testing.assert_close(layer.weight.double(), weight, rtol=1e-6, atol=1e-6)


def test_a_state_dict_is_not_loaded_into_a_layer_merged_outside_disable_adapter():
    layer = random_layer()
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.merge()
    merged = layer.weight.clone()
    with fastlora.disable_adapter(layer), pytest.raises(RuntimeError, match="is merged"):
        layer.load_state_dict(state)
    assert torch.equal(layer.weight, merged)


def test_a_bias_added_after_merging_counts():
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    fastlora.merge_lora(fastlora.apply_lora(model, ["0"], rank=2))
    model[0].register_parameter("bias", nn.Parameter(torch.ones(3)))
    assert torch.equal(model(torch.zeros(2, 4)), torch.ones(2, 3))
