"""fuse_peft against PEFT itself: whatever is done with a model, the fused one and its stock twin agree."""

import copy
import io
import json
import pickle
import re
import subprocess
import sys
from contextlib import nullcontext
from types import MethodType, SimpleNamespace

import pytest
import torch
from cases import HALF, assert_matches, dtype_id, eager_errors, exact, fused, tensors
from torch import nn
from torch.autograd import forward_ad
from torch.testing import assert_close

import fastlora
from fastlora import masks, ops, reference

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as LoraLinear
from test_adapters import bert, llama, shake, t5

from fastlora.peft import register_fused_layers
from fastlora.peft_layer import FusedLinear


def close(actual, expected):
    """Equal but for the order of float32 sums."""
    assert_close(actual, expected, rtol=1e-4, atol=2e-5)


# Whole models, T5 with q, v, r = 8, lora_alpha = 16 and dropout 0.1 among them.


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=48, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
    )
    return transformers.GPT2LMHeadModel(config)


# name -> (model, LoRA settings)
CASES = {
    "llama": (llama, {"target_modules": "all-linear", "r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}),
    "t5": (t5, {"target_modules": ["q", "v"], "r": 8, "lora_alpha": 16, "lora_dropout": 0.1}),
    "bert": (
        bert,
        {"target_modules": ["query", "value"], "r": 4, "bias": "lora_only", "task_type": "SEQ_CLS"},
    ),
    "gpt2": (gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "lora_dropout": 0.1}),
}
every_model = pytest.mark.parametrize("name", CASES)


def stock_model(name, **settings):
    """PEFT's model with trained-looking adapters; the base's own dropout, which draws too, is off."""
    build, lora = CASES[name]
    model = build()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return shake(get_peft_model(model, LoraConfig(**{**lora, **settings})))


def twins(name, **settings):
    stock = stock_model(name, **settings)
    return stock, fastlora.fuse_peft(copy.deepcopy(stock))


def batch(name, seed=0, rows=2):
    tokens = torch.randint(3, 48, (rows, 7), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": tokens, "labels": tokens[:, 0] % 3 if name == "bert" else tokens}


class SameMasks:
    """Lets PEFT's lora_dropout draw the masks that the fused layers drew before, call by call."""

    def __init__(self, monkeypatch):
        self.seeds = []
        new_seed = masks.new_seed

        def remember(device):
            self.seeds.append(new_seed(device))
            return self.seeds[-1]

        monkeypatch.setattr(masks, "new_seed", remember)
        monkeypatch.setattr(ops, "_FEW_DROPPED", 0)

    def replay(self, model):
        for module in model.modules():
            if isinstance(module, LoraLinear):
                for drop in module.lora_dropout.values():
                    drop.forward = MethodType(self._drop, drop)

    def _drop(self, drop, x):
        if not (drop.training and isinstance(drop, nn.Dropout)):
            return x
        rows, columns = x.numel() // x.shape[-1], x.shape[-1]
        keep = reference.keep_mask(self.seeds.pop(0), rows, columns, drop.p).reshape(x.shape)
        return torch.where(keep, x / (1 - drop.p), 0.0).to(x.dtype)


def train(model, name, steps):
    """Losses of some steps, and the gradients of the first one."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses, gradients = [], None
    for step in range(steps):
        loss = model(**batch(name, step)).loss
        loss.backward()
        gradients = gradients or {
            n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
        }
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses), gradients


def closing(model):
    """The last line of the summary."""
    return fastlora.summary(model).splitlines()[-1]


def count(model):
    return sum(isinstance(m, LoraLinear) for m in model.modules())


@every_model
def test_a_training_run_is_pefts(name, monkeypatch):
    stock, fast = twins(name)
    masks = SameMasks(monkeypatch)
    fast_losses, fast_gradients = train(fast.train(), name, 4)
    if name == "gpt2":  # Conv1D runs PEFT's own code, with PEFT's masks: nothing is drawn for it.
        assert not masks.seeds
        assert closing(fast) == f"fused 0, fell back {count(fast)}: fan_in_fan_out ({count(fast)})"
        return
    assert closing(fast) == f"fused {count(fast)}, fell back 0"
    assert bool(masks.seeds) == (name == "t5")
    masks.replay(stock)
    losses, gradients = train(stock.train(), name, 4)
    assert not masks.seeds
    close(fast_losses, losses)
    assert fast_gradients.keys() == gradients.keys()
    for key, gradient in gradients.items():
        close(fast_gradients[key], gradient)
    assert losses[0] != losses[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("r", [4, 128])  # at rank 128, h is too large for the update to stay in float32
def test_few_tokens_on_a_cpu_drop_what_peft_drops(dtype, p, r):
    """The same masks from the same state of torch's generator, which goes on alike."""
    results = []
    for swap in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 8)).to(dtype)
        config = LoraConfig(
            r=r, lora_alpha=4, target_modules=["0", "2"], lora_dropout=p, init_lora_weights=False
        )
        model = get_peft_model(model, config)
        model = fastlora.fuse_peft(model) if swap else model
        torch.manual_seed(2)
        y = model(torch.randn(3, 24).to(dtype))
        y.square().sum().backward()
        gradients = [q.grad for q in model.parameters() if q.requires_grad]
        results.append((y.detach(), *gradients, torch.get_rng_state()))
        assert not swap or closing(model) == "fused 2, fell back 0"
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for stock, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, stock, rtol=tolerance, atol=tolerance)


def test_many_tokens_and_the_kernels_take_a_seed(monkeypatch):
    x = torch.randn(4, 24)
    for path in ("auto", "addmm", "reference"):
        with fastlora.use_path(path):
            assert ops.few_mask(x, 0.5, x.dtype).unique().tolist() == [0.0, 1.0]
    with fastlora.use_path("triton"):
        assert ops.few_mask(x, 0.5, x.dtype) is None
    assert ops.few_mask(x.to("meta"), 0.5, x.dtype) is None  # as on any other device
    monkeypatch.setattr(ops, "_FEW_DROPPED", 4 * 24 - 1)
    assert ops.few_mask(x, 0.5, x.dtype) is None


@every_model
def test_evaluation_is_pefts(name):
    stock, fast = (model.eval() for model in twins(name))
    with torch.no_grad():
        close(fast(**batch(name)).logits, stock(**batch(name)).logits)


@every_model
def test_saving_and_loading(name, tmp_path):
    stock, fast = twins(name)
    stock.save_pretrained(tmp_path / "stock")
    fast.save_pretrained(tmp_path / "fast")
    weights, settings = "adapter_model.safetensors", "adapter_config.json"
    assert (tmp_path / "fast" / weights).read_bytes() == (tmp_path / "stock" / weights).read_bytes()
    configs = [json.loads((tmp_path / folder / settings).read_text()) for folder in ("fast", "stock")]
    for config in configs:
        config["target_modules"] = sorted(config["target_modules"])  # a set, in any order
    assert configs[0] == configs[1]
    base = copy.deepcopy(stock).unload()
    loaded = fastlora.fuse_peft(PeftModel.from_pretrained(base, tmp_path / "fast")).eval()
    with torch.no_grad():
        close(loaded(**batch(name)).logits, stock.eval()(**batch(name)).logits)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_generation(name):
    stock, fast = (model.eval() for model in twins(name))
    tokens = {"input_ids": batch(name)["input_ids"], "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(fast.generate(**tokens), stock.generate(**tokens))
    assert closing(fast) == f"fused {count(fast)}, fell back 0"


def test_trainer_with_resume(tmp_path):
    """Losses and final adapters, with a resume in the middle, are those of an unfused run without one."""

    def trainer(model, folder, steps):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / folder),
            max_steps=steps,
            lr_scheduler_type="constant",
            learning_rate=1e-2,
            per_device_train_batch_size=2,
            save_steps=3,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            seed=1,
        )
        data = [{key: row[0] for key, row in batch("bert", i, rows=1).items()} for i in range(12)]
        return transformers.Trainer(model=model, args=arguments, train_dataset=data)

    stock, fast = twins("bert")
    again = copy.deepcopy(fast)
    plain = trainer(stock, "stock", 5)
    plain.train()
    trainer(fast, "fast", 3).train()
    resumed = trainer(again, "fast", 5)
    resumed.train(resume_from_checkpoint=True)
    losses, resumed_losses = (
        [entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (plain, resumed)
    )
    assert len(losses) == 5
    assert resumed_losses == pytest.approx(losses, abs=2e-4)
    for (key, ours), theirs in zip(again.state_dict().items(), stock.state_dict().values(), strict=True):
        assert_close(ours, theirs, rtol=1e-2, atol=1e-3, msg=key)
    assert closing(again) == f"fused {count(again)}, fell back 0"


def test_gradient_checkpointing_draws_the_same_mask_again():
    _, fast = twins("llama", lora_dropout=0.3, target_modules=["q_proj", "down_proj"])
    again = copy.deepcopy(fast)
    again.enable_input_require_grads()
    again.gradient_checkpointing_enable({"use_reentrant": False})
    gradients = []
    for model in (fast, again):
        torch.manual_seed(3)
        gradients.append(train(model.train(), "llama", 1)[1])
    close(gradients[1], gradients[0])


# One pair of layers in a small model.


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 16), nn.Linear(16, 6)

    def forward(self, x):
        return self.second(torch.relu_(self.first(x)))


SETTINGS = {"target_modules": ["first", "second"], "r": 3, "lora_alpha": 6}


def nets(**settings):
    stock = shake(get_peft_model(Net(), LoraConfig(**{**SETTINGS, **settings})), 0.1)
    return stock, fastlora.fuse_peft(copy.deepcopy(stock))


def add(model, name, **settings):
    model.add_adapter(name, LoraConfig(**{**SETTINGS, **settings}))
    torch.manual_seed(len(name))
    shake_adapter = [p for n, p in model.named_parameters() if f".{name}." in n]
    with torch.no_grad():
        for parameter in shake_adapter:
            parameter.normal_(std=0.3)


def inputs():
    return torch.linspace(-1, 1, 3 * 5 * 12).sin().reshape(3, 5, 12)


def layer_of(model) -> LoraLinear:
    return model.base_model.model.first


def every_layer(model):
    return [m for m in model.modules() if isinstance(m, LoraLinear)]


def scale_by_tensor(model):
    for layer in every_layer(model):
        layer.scaling["default"] = torch.tensor(2.5)


def set_scale(model):
    for layer in every_layer(model):
        layer.set_scale("default", 3.0)


def replace_adapter(model, tmp_path):
    """load_adapter over the adapter in use, as hot-swapping and checkpoint loading do."""
    other = shake(get_peft_model(Net(), LoraConfig(**SETTINGS)), 0.2)
    other.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "default")


def hotswap(model, tmp_path):
    from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap

    torch.manual_seed(2)
    other = shake(get_peft_model(Net(), LoraConfig(**{**SETTINGS, "r": 5, "lora_alpha": 20})), 0.2)
    other.save_pretrained(tmp_path)
    prepare_model_for_compiled_hotswap(model, target_rank=7)
    hotswap_adapter(model, tmp_path, adapter_name="default")


def weighted(model):
    add(model, "other", r=3)
    model.add_weighted_adapter(["default", "other"], [0.7, 0.4], "sum", combination_type="linear")
    model.set_adapter("sum")


def second(model):
    add(model, "other", r=5)
    model.set_adapter("other")


def both(model):
    add(model, "other")
    model.base_model.set_adapter(["default", "other"])


def delete(model):
    add(model, "other")
    model.delete_adapter("default")
    model.set_adapter("other")


def elsewhere(model):
    """The active adapter exists in one of the layers only."""
    add(model, "other", target_modules=["second"])
    model.set_adapter("other")


def train_bias(model):
    for layer in every_layer(model):
        layer.base_layer.bias.requires_grad_()


CHANGES = {
    "nothing": (lambda model, path: None, ""),
    "set_scale": (lambda model, path: set_scale(model), ""),
    "tensor scaling": (lambda model, path: scale_by_tensor(model), ""),
    "bias trained": (lambda model, path: train_bias(model), ""),
    "load_adapter": (replace_adapter, ""),
    "hotswap": (hotswap, ""),
    "set_adapter": (lambda model, path: second(model), ""),
    "add_weighted_adapter": (lambda model, path: weighted(model), ""),
    "delete_adapter": (lambda model, path: delete(model), ""),
    "merge and unmerge": (lambda model, path: (model.merge_adapter(), model.unmerge_adapter()), ""),
    "merge": (lambda model, path: model.merge_adapter(), "merged (2)"),
    "two adapters": (lambda model, path: both(model), "2 active adapters (2)"),
    "no adapter here": (lambda model, path: elsewhere(model), "no active adapter (1)"),
    "disabled": (lambda model, path: model.base_model.disable_adapter_layers(), "adapters disabled (2)"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_peft_changes_later_counts(change, tmp_path):
    """Outputs and gradients after a change, made when the model was fused and had been called already."""
    alter, reason = CHANGES[change]
    stock, fast = nets()
    results = []
    for model in (stock, fast):
        model(inputs())
        torch.manual_seed(0)
        alter(model, tmp_path)
        x = inputs().requires_grad_()
        y = model(x)
        y.square().sum().backward()
        results.append((y.detach(), x.grad, {n: p.grad for n, p in model.named_parameters()}))
    close(results[1], results[0])
    fallen = 0 if not reason else int(reason[-2])
    assert closing(fast) == f"fused {2 - fallen}, fell back {fallen}" + (f": {reason}" if reason else "")


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_gradient_penalty(dropout):
    """Second derivatives, of PEFT's default adapters."""
    results = []
    for model in nets(lora_dropout=dropout):
        torch.manual_seed(0)
        x = inputs().requires_grad_()
        y = model(x)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        (dx.norm(dim=-1) - 1).square().sum().backward()
        results.append((dx.detach(), x.grad, {n: p.grad for n, p in model.named_parameters()}))
    assert results[0][2]["base_model.model.first.lora_A.default.weight"].any()
    close(results[1], results[0])
    assert closing(model) == "fused 2, fell back 0"


def test_disable_adapter_is_a_block():
    stock, fast = nets()
    with stock.disable_adapter(), fast.disable_adapter():
        close(fast(inputs()), stock(inputs()))
    assert closing(fast) == "fused 0, fell back 2: adapters disabled (2)"
    close(fast(inputs()), stock(inputs()))
    assert closing(fast) == "fused 2, fell back 0"


def test_a_mixed_batch():
    stock, fast = (model.eval() for model in nets())
    for model in (stock, fast):
        add(model, "other")
    names = ["default", "__base__", "other"]
    close(fast(inputs(), adapter_names=names), stock(inputs(), adapter_names=names))
    assert closing(fast) == "fused 0, fell back 2: extra arguments: adapter_names (2)"
    with pytest.raises(ValueError, match="adapter_names"):
        fast(inputs(), adapter_names=names[:2])


@pytest.mark.parametrize("unload", ["merge_and_unload", "unload"])
def test_unloading_leaves_plain_layers(unload):
    stock, fast = nets()
    plain = getattr(fast, unload)()
    assert type(plain.first) is nn.Linear
    close(plain(inputs()), getattr(stock, unload)()(inputs()))


def test_adapters_added_later_are_pefts_until_fused():
    _, fast = nets(target_modules=["first"])
    add(fast, "other")
    assert closing(fast) == "fused 1, fell back 1: not fused by fuse_peft (1)"
    assert closing(fastlora.fuse_peft(fast)).startswith("fused 1, fell back 1: no active adapter")


# Every reason for PEFT's own forward, in a layer that is fused again when the reason goes away.


def double(module, args, output):
    return 2 * output


def replace_forward(module):
    module.forward = lambda x: 2 * type(module).forward(module, x)
    return SimpleNamespace(remove=lambda: vars(module).pop("forward"))


def exchange(modules, key, module):
    old = modules[key]
    modules[key] = module
    return SimpleNamespace(remove=lambda: modules.__setitem__(key, old))


def assign(target, name, value):
    old = getattr(target, name)
    setattr(target, name, value)
    return SimpleNamespace(remove=lambda: setattr(target, name, old))


class OwnLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class OwnDropout(nn.Dropout):
    def forward(self, x):
        return 2 * x


class OwnTensor(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl  # results are plain tensors


REASONS = {
    "hooks on base layer": lambda layer: layer.base_layer.register_forward_hook(double),
    "hooks on lora_A": lambda layer: layer.lora_A["default"].register_forward_pre_hook(
        lambda m, a: (2 * a[0],)
    ),
    "hooks on lora_B": lambda layer: layer.lora_B["default"].register_full_backward_hook(
        lambda module, before, after: (2 * before[0],)
    ),
    "hooks on lora_dropout": lambda layer: layer.lora_dropout["default"].register_full_backward_pre_hook(
        lambda module, gradients: (2 * gradients[0],)
    ),
    "replaced forward on base layer": lambda layer: replace_forward(layer.base_layer),
    "replaced forward on lora_A": lambda layer: replace_forward(layer.lora_A["default"]),
    "replaced forward on lora_B": lambda layer: replace_forward(layer.lora_B["default"]),
    "replaced forward on lora_dropout": lambda layer: replace_forward(layer.lora_dropout["default"]),
    "base layer is test_peft.OwnLinear, not exactly nn.Linear": lambda layer: assign(
        layer.base_layer, "__class__", OwnLinear
    ),
    "lora_A is test_peft.OwnLinear, not exactly nn.Linear": lambda layer: assign(
        layer.lora_A["default"], "__class__", OwnLinear
    ),
    "lora_B is test_peft.OwnLinear, not exactly nn.Linear": lambda layer: assign(
        layer.lora_B["default"], "__class__", OwnLinear
    ),
    "lora_dropout is test_peft.OwnDropout, not exactly nn.Dropout or nn.Identity": lambda layer: exchange(
        layer.lora_dropout, "default", OwnDropout()
    ),
    "lora_dropout works in place": lambda layer: exchange(
        layer.lora_dropout, "default", nn.Dropout(0.0, inplace=True)
    ),
    "fan_in_fan_out": lambda layer: assign(layer, "fan_in_fan_out", True),
    "the base weight is trained": lambda layer: assign(layer.base_layer.weight, "requires_grad", True),
    "scaling of 16 elements": lambda layer: exchange(layer.scaling, "default", torch.linspace(0, 1, 16)),
    "scaling is a complex": lambda layer: exchange(layer.scaling, "default", 2 + 1j),
    "scaling is inf": lambda layer: exchange(layer.scaling, "default", float("inf")),
    "base weight is a OwnTensor": lambda layer: exchange(
        layer.base_layer._parameters, "weight", layer.base_layer.weight.detach().as_subclass(OwnTensor)
    ),
    "lora_A.weight is missing": lambda layer: unregister(layer.lora_A["default"]),
    "dtypes x float32, weight float32, bias float32, lora_B float64, lora_A float64": lambda layer: (
        cast_adapter(layer, torch.float64)
    ),
    "extra arguments: alora_offsets": lambda layer: layer.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {"alora_offsets": None}), with_kwargs=True
    ),
}


def unregister(module):
    """A weight that is a plain attribute, as under some forms of sharding."""
    weight = module._parameters.pop("weight")
    module.weight = weight.detach()

    def remove():
        del module.weight
        module.weight = weight

    return SimpleNamespace(remove=remove)


def cast_adapter(layer, dtype):
    layer.lora_A.to(dtype), layer.lora_B.to(dtype)
    return SimpleNamespace(remove=lambda: (layer.lora_A.float(), layer.lora_B.float()))


@pytest.mark.parametrize("reason", REASONS)
def test_every_reason_is_seen_named_and_gone_again(reason):
    """The layer computes what its stock twin computes with the same change, and says why."""
    stock, fast = nets()
    for model in (stock, fast):
        # Makes a wrong result visible: nothing in these layers is 0 or 1.
        layer_of(model).train()
    before = fast(inputs())
    for number in (1, 2):
        handles = [REASONS[reason](layer_of(model)) for model in (stock, fast)]
        results = []
        for model in (stock, fast):
            x = inputs().requires_grad_()
            y = model(x)
            y.nansum().backward()
            results.append((y.detach(), x.grad.detach()))
        close(torch.nan_to_num(results[1][0]), torch.nan_to_num(results[0][0]))
        close(torch.nan_to_num(results[1][1]), torch.nan_to_num(results[0][1]))
        assert closing(fast) == f"fused 1, fell back 1: {reason} (1)"
        for handle in handles:
            handle.remove()
        close(fast(inputs()), before)
        assert closing(fast) == "fused 2, fell back 0", number


def test_hooks_on_all_modules():
    stock, fast = nets()
    results = []
    for model in (stock, fast):
        lora_A = layer_of(model).lora_A["default"]
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, output, lora_A=lora_A: 2 * output if module is lora_A else None
        )
        try:
            results.append(model(inputs()))
        finally:
            handle.remove()
    close(results[1], results[0])
    assert closing(fast) == "fused 0, fell back 2: hooks on all modules (2)"
    fast(inputs())
    assert closing(fast) == "fused 2, fell back 0"


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"use_dora": True}, "variant DoraLinearVariant"),
        ({"lora_bias": True}, "lora_bias"),
    ],
    ids=["dora", "lora_bias"],
)
def test_variants_run_pefts_code(settings, reason):
    stock, fast = nets(**settings)
    close(fast(inputs()), stock(inputs()))
    assert closing(fast) == f"fused 0, fell back 2: {reason} (2)"


def test_other_kinds_of_layers_are_listed():
    base = nn.Sequential(nn.Embedding(9, 12), nn.Linear(12, 4))
    model = get_peft_model(base, LoraConfig(target_modules=["0", "1"], r=2))
    fastlora.fuse_peft(model)
    assert closing(model) == "fused 1, fell back 1: lora.Embedding is not PEFT's plain linear layer (1)"


def test_the_base_layer_may_be_another_tuners_layer():
    def build():
        torch.manual_seed(0)
        model = peft.get_peft_model(
            Net(), peft.LoHaConfig(target_modules=["first"], r=2, init_weights=False), mixed=True
        )
        model.add_adapter(
            "lora", LoraConfig(target_modules=["first", "second"], r=2, init_lora_weights=False)
        )
        model.set_adapter(["default", "lora"])
        return model

    stock, fast = build(), fastlora.fuse_peft(build())
    close(fast(inputs()), stock(inputs()))
    assert type(layer_of(fast).base_layer) is peft.tuners.loha.layer.Linear
    reason = "base layer is peft.tuners.loha.layer.Linear, not exactly nn.Linear"
    assert closing(fast) == f"fused 1, fell back 1: {reason} (1)"


def test_a_layer_whose_own_forward_was_replaced_before_is_not_called_fused():
    stock, _ = nets()
    layer = layer_of(stock)
    layer.forward = layer.forward  # bound to PEFT's class, as offloading libraries do
    fastlora.fuse_peft(stock)(inputs())
    assert closing(stock) == "fused 1, fell back 1: the layer's own forward is replaced (1)"


def test_function_transforms_are_pefts():
    stock, fast = (model.eval() for model in nets())
    x = inputs()
    reason = "fused 0, fell back 2: torch.func, forward-mode gradients or torch.jit.trace (2)"
    close(torch.func.vmap(fast)(x), torch.func.vmap(stock)(x))
    assert closing(fast) == reason
    fast(x)
    tangents = [torch.func.jvp(model, (x,), (x.cos(),))[1] for model in (stock, fast)]
    close(tangents[1], tangents[0])
    assert closing(fast) == reason
    fast(x)
    tangents = []
    for model in (stock, fast):
        with forward_ad.dual_level():
            tangents.append(forward_ad.unpack_dual(model(forward_ad.make_dual(x, x.cos()))).tangent)
    close(tangents[1], tangents[0])
    assert closing(fast) == reason


def test_subclasses_of_tensors_are_pefts():
    _, fast = nets()
    fast(inputs().as_subclass(OwnTensor))
    assert closing(fast) == "fused 1, fell back 1: x is a OwnTensor (1)"


@pytest.mark.filterwarnings("ignore")  # Tracing is deprecated.
def test_traces_are_pefts():
    stock, fast = (model.eval() for model in nets())
    traced = torch.jit.trace(fast, inputs())
    torch.jit.save(traced, io.BytesIO())  # A Python function in it could not be saved.
    close(traced(inputs()[:2]), stock(inputs()[:2]))


def test_fx_is_told_that_it_cannot_follow():
    """By PEFT's own forward: the tracer's stand-in for a tensor has every attribute, that of groups too."""
    with pytest.raises(torch.fx.proxy.TraceError):
        torch.fx.symbolic_trace(nets()[1].base_model.model)


def test_sharded_tensors_run_pefts_code():
    from torch.distributed.tensor import DTensor

    class Pretended(DTensor):
        """Of DTensor's type, without a process group."""

        def __new__(cls, tensor):
            return torch.Tensor._make_subclass(cls, tensor)

    _, fast = nets()
    layer = layer_of(fast)
    layer.lora_A["default"]._parameters["weight"] = Pretended(layer.lora_A["default"].weight.detach())
    assert closing(fast) == "fused 1, fell back 1: lora_A.weight is a Pretended (1)"


class Siblings(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(24, 20), nn.Linear(24, 20)

    def forward(self, x):
        return self.q_proj(x) + self.k_proj(x)


@pytest.mark.parametrize("grouped", [False, True])
def test_a_summary_between_sharded_calls_tells_of_the_last_call(tmp_path, grouped):
    """FSDP2 gathers the parameters for the calls alone."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this PyTorch has no gloo")
    from torch.distributed.fsdp import fully_shard

    config = LoraConfig(r=4, target_modules=["q_proj", "k_proj"])
    fast = fastlora.fuse_peft(get_peft_model(Siblings(), config))
    if grouped:
        fastlora.group_projections(fast)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        fully_shard(fast, mesh=mesh, reshard_after_forward=True)  # else the root stays gathered
        assert closing(fast) == "fused 0, fell back 2: base weight is a DTensor (2)"
        fast(torch.randn(3, 24))
        assert closing(fast) == "fused 2, fell back 0"
        assert ("grouped: base_model.model.q_proj/k_proj (1)" in fastlora.summary(fast)) == grouped
        assert "single" not in fastlora.summary(fast)
    finally:
        torch.distributed.destroy_process_group()


# Dtypes


def linear_layer(dtype, adapter_dtype, bias=True, dropout=0.0, **settings):
    base = nn.Linear(24, 20, bias=bias).to(dtype).requires_grad_(False)
    config = LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **settings)
    layer = LoraLinear(base, "default", config, r=4, lora_alpha=6, lora_dropout=dropout)
    layer.lora_A.to(adapter_dtype), layer.lora_B.to(adapter_dtype)
    return layer


def results_of(layer, x, autocast=None):
    """y, dx, dA, dB, detached, of one layer."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", autocast) if autocast else nullcontext():
        y = layer(x)
    leaves = (x, layer.lora_B["default"].weight, layer.lora_A["default"].weight)
    return (y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y)))


ALL = (torch.float64, torch.float32, *HALF)
F64, F32, F16, BF16 = torch.float64, torch.float32, *HALF


@pytest.mark.parametrize("autocast", [None, BF16, F16], ids=["plain", "autocast-bf16", "autocast-fp16"])
@pytest.mark.parametrize("adapter_dtype", ALL, ids=dtype_id)
@pytest.mark.parametrize("dtype", ALL, ids=dtype_id)
@pytest.mark.parametrize("x_dtype", ALL, ids=dtype_id)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dtypes_are_pefts(x_dtype, dtype, adapter_dtype, autocast, dropout):
    """The dtype of every result, its values, and PyTorch's own error where PEFT lets it through."""
    stock = linear_layer(dtype, adapter_dtype, dropout=dropout)
    fast = fastlora.fuse_peft(copy.deepcopy(stock))
    x = torch.randn(3, 5, 24).to(x_dtype)
    torch.manual_seed(3)
    try:
        expected = results_of(stock, x, autocast)
    except RuntimeError as error:
        with pytest.raises(RuntimeError, match=f"^{re.escape(str(error))}$"):
            results_of(fast, x, autocast)
        return
    torch.manual_seed(3)
    actual = results_of(fast, x, autocast)
    coarsest = max((x_dtype, dtype, adapter_dtype, autocast or F64), key=lambda d: torch.finfo(d).eps)
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.dtype == theirs.dtype
        scale = theirs.double().abs().max().item()
        assert_close(ours.double(), theirs.double(), rtol=0, atol=8 * torch.finfo(coarsest).eps * scale)


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32), (F16, F32), (BF16, BF16)], ids=dtype_id)
def test_the_usual_dtypes_fuse_as_accurately_as_eager(dtypes):
    dtype, adapter_dtype = dtypes
    case = tensors((3, 5), 20, 24, 4, dtype, adapter_dtype)
    layer = fastlora.fuse_peft(linear_layer(dtype, adapter_dtype))
    with torch.no_grad():
        layer.base_layer.weight.copy_(case.weight), layer.base_layer.bias.copy_(case.bias)
        layer.lora_A["default"].weight.copy_(case.B), layer.lora_B["default"].weight.copy_(case.A)
    x = case.x.clone().requires_grad_()
    y = layer(x)
    leaves = (x, layer.lora_B["default"].weight, layer.lora_A["default"].weight)
    gradients = torch.autograd.grad(y, leaves, case.dy)
    assert closing(layer) == "fused 1, fell back 0"
    actual = SimpleNamespace(y=y.detach(), **dict(zip("xAB", gradients, strict=True)))
    assert_matches(actual, exact(case, 1.5), eager_errors(case, 1.5, wanted=("x", "A", "B")))


def test_input_casting_switched_off_is_pefts_error():
    layer = fastlora.fuse_peft(linear_layer(BF16, F32))
    x = torch.randn(2, 24, dtype=BF16)
    layer(x)
    with peft.helpers.disable_input_dtype_casting(layer), pytest.raises(RuntimeError, match="dtype"):
        layer(x)


def test_input_is_cast_to_the_adapters_dtype_under_autocast_too():
    """A value beyond float16 is infinite in float16 adapters, whatever autocast's dtype is."""
    stock = linear_layer(F32, F16)
    fast = fastlora.fuse_peft(copy.deepcopy(stock))
    with torch.autocast("cpu", BF16):
        results = [layer(torch.full((1, 24), 1e5)) for layer in (fast, stock)]
    assert_close(*results, equal_nan=True)
    assert not torch.isfinite(results[0]).any()


@pytest.mark.parametrize(
    "x", [torch.zeros(2, 23), torch.zeros(2, 24, dtype=torch.int64)], ids=["shape", "int"]
)
def test_errors_are_pytorchs(x):
    assert_same_error(linear_layer(F32, F32), x)


@pytest.mark.parametrize(("name", "shape"), [("lora_A", (4, 23)), ("lora_B", (21, 4)), ("lora_B", (20, 5))])
def test_errors_of_adapters_that_do_not_fit_are_pytorchs(name, shape):
    stock = linear_layer(F32, F32)
    getattr(stock, name)["default"].weight = nn.Parameter(torch.randn(shape))
    assert_same_error(stock, torch.zeros(2, 24))


def assert_same_error(stock, x):
    fast = fastlora.fuse_peft(copy.deepcopy(stock))
    with pytest.raises(RuntimeError) as expected:
        stock(x)
    with pytest.raises(RuntimeError) as actual:
        fast(x)
    assert str(actual.value) == str(expected.value)


@pytest.mark.parametrize(
    ("values", "shapes"),
    [
        ({"lora_B": torch.ones(1, 4)}, "bias (20,), lora_B (1, 4), lora_A (4, 24)"),
        ({"bias": torch.ones(1)}, "bias (1,), lora_B (20, 4), lora_A (4, 24)"),
        (
            {"lora_A": torch.ones(0, 24), "lora_B": torch.ones(20, 0)},
            "bias (20,), lora_B (20, 0), lora_A (0, 24)",
        ),
    ],
    ids=["one row of lora_B", "one bias", "rank 0"],
)
def test_unusual_shapes_that_pytorch_accepts_are_pefts(values, shapes):
    stock = linear_layer(F32, F32)
    for name, value in values.items():
        if name == "bias":
            stock.base_layer.bias = nn.Parameter(value)
        else:
            getattr(stock, name)["default"].weight = nn.Parameter(value)
    fast = fastlora.fuse_peft(copy.deepcopy(stock))
    x = torch.randn(2, 3, 24)
    close(results_of(fast, x), results_of(stock, x))
    assert closing(fast) == f"fused 0, fell back 1: shapes x (..., 24), weight (20, 24), {shapes} (1)"


@pytest.mark.parametrize("shape", [(24,), (0, 24), (2, 1, 3, 24)], ids=str)
def test_shapes(shape):
    stock = linear_layer(F32, F32, bias=False)
    fast = fastlora.fuse_peft(copy.deepcopy(stock))
    x = torch.randn(shape)
    close(results_of(fast, x), results_of(stock, x))
    assert closing(fast) == "fused 1, fell back 0"


def test_a_result_may_be_changed_in_place():
    """As ReLU(inplace=True) and residual sums do; autograd forbids it for views that a function returns."""
    case = tensors((2, 3), 6, 8, 4)
    x = case.x.requires_grad_()
    y = fused(2.0)(x, case.weight, case.A, case.B)
    y += 1.0
    y.sum().backward()
    assert x.grad is not None


def test_a_wider_scaling_leaves_the_dtype():
    stock, fast = (model.bfloat16() for model in nets())
    for model in (stock, fast):
        layer_of(model).scaling["default"] = torch.tensor([0.5])
    x = inputs().bfloat16()
    y = fast(x)
    assert y.dtype == torch.bfloat16
    assert_close(y, stock(x), rtol=3e-2, atol=3e-2)
    assert closing(fast) == "fused 2, fell back 0"


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: torch.nested.nested_tensor([x[0], x[1, :2]]),
        lambda x: x[0].to_sparse(),
        lambda x: x[0].to_sparse_csr(),
    ],
    ids=["nested", "sparse", "csr"],
)
def test_inputs_that_are_not_dense(convert):
    stock, fast = nets()
    x = convert(inputs())
    y, expected = layer_of(fast)(x), layer_of(stock)(x)
    assert y.is_nested == expected.is_nested
    for ours, theirs in zip(y.unbind(), expected.unbind(), strict=True):
        close(ours, theirs)
    assert layer_of(fast)._fastlora_last == "x is nested or sparse"


def test_a_tensor_scaling_gets_its_gradient():
    stock = linear_layer(F32, F32)
    fast = fastlora.fuse_peft(copy.deepcopy(stock))
    gradients = []
    for layer in (stock, fast):
        scaling = layer.scaling["default"] = torch.tensor(1.5, requires_grad=True)
        torch.manual_seed(0)
        layer(torch.randn(4, 24)).square().sum().backward()
        gradients.append(scaling.grad)
    close(gradients[1], gradients[0])
    assert closing(fast) == "fused 1, fell back 0"


# Dropout


@pytest.mark.parametrize("p", [0.25, 1.0])
def test_dropout_has_pefts_distribution(p):
    layer = fastlora.fuse_peft(linear_layer(F32, F32, lora_dropout=p))
    x = torch.ones(4000, 24)
    with torch.no_grad():
        layer.lora_A["default"].weight.fill_(1.0), layer.lora_B["default"].weight.fill_(1.0)
        update = (layer(x) - layer.base_layer(x))[:, 0] / (4 * 1.5)
        # A binomial count of 24 columns, scaled by 1 / (1 - p).
        assert update.mean() == pytest.approx(0.0 if p == 1.0 else 24.0, abs=0.3)
        deviation = 0.0 if p == 1.0 else (24 * p / (1 - p)) ** 0.5
        assert update.std() == pytest.approx(deviation, abs=0.15)
        torch.manual_seed(1)
        first = layer(x)
        assert not torch.equal(layer(x), first) or p == 1.0
        torch.manual_seed(1)
        assert torch.equal(layer(x), first)
    layer.eval()
    state = torch.get_rng_state()
    layer(x)
    assert torch.equal(torch.get_rng_state(), state)
    # PEFT asks the dropout module itself, not the layer, whether it trains.
    layer.lora_dropout["default"].train()
    assert layer(x).requires_grad
    assert not torch.equal(torch.get_rng_state(), state)


# The model stays PEFT's.


def test_a_fused_layer_shows_as_pefts():
    stock, fast = nets()
    assert repr(fast) == repr(stock)
    assert repr(layer_of(fast)).startswith("lora.Linear(")
    assert "Linear" in type(layer_of(fast)).__name__
    assert [s.module_type for s in fast.get_layer_status()] == ["lora.Linear"] * 2
    assert fast.state_dict().keys() == stock.state_dict().keys()


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies(how, called):
    _, fast = nets()
    if called:
        fast(inputs())
    if how == "deepcopy":
        other = copy.deepcopy(fast)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(fast))
    else:
        file = io.BytesIO()
        torch.save(fast, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert closing(other) == "fused 2, fell back 0"
    assert torch.equal(other(inputs()), fast(inputs()))
    with torch.no_grad():
        layer_of(other).lora_B["default"].weight.zero_()
    assert not torch.equal(other(inputs()), fast(inputs()))


def test_fusing_twice_and_undoing_it():
    stock, fast = nets()
    assert fastlora.fuse_peft(fast) is fast
    assert {type(layer) for layer in every_layer(fast)} == {FusedLinear}
    fast(inputs())
    assert fastlora.unfuse_peft(fast) is fast
    assert fastlora.unfuse_peft(fast) is fast
    for ours, theirs in zip(every_layer(fast), every_layer(stock), strict=True):
        assert type(ours) is LoraLinear
        assert vars(ours).keys() == vars(theirs).keys()
    assert torch.equal(fast(inputs()), stock(inputs()))
    assert closing(fast) == "fused 0, fell back 2: not fused by fuse_peft (2)"
    assert fastlora.unfuse_peft(nn.Linear(2, 2)) is not None


def test_one_layer_is_a_model_too():
    assert type(fastlora.fuse_peft(linear_layer(F32, F32))) is FusedLinear


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Net(), "get_peft_model first; the model's nn.Linear layers are first, second"),
        (
            lambda: get_peft_model(nn.Sequential(nn.Embedding(3, 4)), LoraConfig(target_modules=["0"])),
            r"its LoRA layers are lora.Embedding \(1\)",
        ),
        (lambda: fastlora.apply_lora(Net(), ["first"]), "fastlora's own"),
        (
            lambda: get_peft_model(Net(), peft.LoHaConfig(target_modules=["first"])),
            "its PEFT adapters are of type LOHA, not LORA",
        ),
    ],
    ids=["plain", "embedding", "fastlora", "loha"],
)
def test_nothing_to_fuse(build, words):
    with pytest.raises(ValueError, match=words):
        fastlora.fuse_peft(build())


@pytest.mark.parametrize("function", [fastlora.fuse_peft, fastlora.unfuse_peft])
def test_no_module(function):
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got dict"):
        function({})


def test_importing_fastlora_imports_no_peft():
    code = (
        "import sys, fastlora; from fastlora import *; fuse_peft; "
        "sys.exit(bool({'peft', 'transformers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_fused_layers_from_the_start(tmp_path):
    config = register_fused_layers(LoraConfig(**SETTINGS))
    model = get_peft_model(Net(), config)
    assert {type(layer) for layer in every_layer(model)} == {FusedLinear}
    assert closing(model) == "fused 2, fell back 0"
    model.save_pretrained(tmp_path)
    assert not hasattr(LoraConfig.from_pretrained(tmp_path), "unknown")
    loaded = PeftModel.from_pretrained(copy.deepcopy(model).unload(), tmp_path)
    close(loaded(inputs()), model(inputs()))
    with pytest.raises(TypeError, match=r"peft.LoraConfig, got IA3Config"):
        register_fused_layers(peft.IA3Config())


def test_fused_layers_from_the_start_leave_other_layers_to_peft():
    """PEFT recognises some quantized layers by their own class, some by that of their weight."""

    class OwnParameter(nn.Parameter):
        pass

    base = nn.Sequential(OwnLinear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    base[2].weight = OwnParameter(torch.randn(4, 4))
    config = register_fused_layers(LoraConfig(target_modules=["0", "1", "2"]))
    model = get_peft_model(base, config).base_model.model
    assert [type(layer) for layer in model] == [LoraLinear, FusedLinear, LoraLinear]


def test_what_peft_itself_misses_is_not_taken_for_peft(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'accelerate'", name="accelerate")

    monkeypatch.setattr("importlib.import_module", missing)
    with pytest.raises(ModuleNotFoundError, match="accelerate"):
        fastlora.fuse_peft(nn.Linear(2, 2))


def test_the_summary_names_the_ranks_of_the_active_adapters():
    _, fast = nets(target_modules=["first"])
    add(fast, "other", r=5)

    text = fastlora.summary(fast)
    assert re.search(r"\.first +1 +16 x 12 +3 +addmm", text)
    assert re.search(r"\.second +1 +6 x 16 +- +PEFT", text)
    fast.base_model.set_adapter(["default", "other"])
    assert re.search(r"\.first +1 +16 x 12 +3, 5 +PEFT", fastlora.summary(fast))


# torch.compile


def test_compiled_models_are_fused_and_see_changes():
    import torch._dynamo.testing

    torch.compiler.reset()
    stock, fast = nets()
    backend = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fast, backend=backend, fullgraph=True)
    for model in (compiled, stock):
        model.zero_grad()
        model(inputs()).square().sum().backward()
    close({n: p.grad for n, p in fast.named_parameters()}, {n: p.grad for n, p in stock.named_parameters()})
    fast(inputs())  # an eager call notes that it was fused: nothing that compiled code looks at
    close(compiled(inputs()), stock(inputs()))
    assert backend.frame_count == 1
    assert sum("autograd_function" in str(n.target) for n in backend.graphs[0].graph.nodes) == 2
    for change in (
        set_scale,
        scale_by_tensor,
        second,
        lambda m: m.base_model.set_adapter(["default", "other"]),
    ):
        for model in (stock, fast):
            change(model)
        close(compiled(inputs()), stock(inputs()))
    torch.compiler.reset()


def test_dropout_on_the_cpu_under_another_default_device():
    _, fast = nets(lora_dropout=0.5)
    x = inputs()
    with torch.device("meta"):
        assert fast.train()(x).device.type == "cpu"
