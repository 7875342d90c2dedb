"""Adapter files against PEFT itself: each reads the other's; refusals; interrupted saving."""

import copy
import ctypes
import errno
import json
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections import OrderedDict
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import bits_equal, dtype_id
from torch import nn

import fastlora
from fastlora import adapters, atomic
from fastlora.linear import FusedLoRALinear
from fastlora.targets import adapted_layers, saved_modules

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."

# Models


class Net(nn.Module):
    """Plain PyTorch: blocks.{0,1}.{up,down}, norm, head."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 8, bias=False)}) for _ in range(2)
        )
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        for block in self.blocks:
            x = x + block["down"](torch.relu(block["up"](x)))
        return self.head(self.norm(x))


def llama(kind="LlamaForCausalLM"):
    config = transformers.LlamaConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        num_labels=3,
    )
    return getattr(transformers, kind)(config)


def tied_llama(tied):
    model = llama()
    config = model.config
    config.tie_word_embeddings = tied
    return type(model)(config).eval()


def bert():
    config = transformers.BertConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=3,
    )
    return transformers.BertForSequenceClassification(config)


def t5():
    config = transformers.T5Config(
        vocab_size=48, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


MODELS = {
    "net": Net,
    "llama": llama,
    "llama-classifier": lambda: llama("LlamaForSequenceClassification"),
    "bert": bert,
    "t5": t5,
}


def make(name):
    """A model with its own seed, in eval mode: two calls give equal models."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return MODELS[name]().eval()


def outputs(model):
    """What a model says to a fixed input."""
    with torch.no_grad():
        base = model.get_base_model() if isinstance(model, PeftModel) else model
        if isinstance(getattr(base, "_orig_mod", base), Net):
            return model(torch.linspace(-1, 1, 40).reshape(5, 8).to(base.head.weight.dtype))
        tokens = torch.arange(1, 15).reshape(2, 7) % 47 + 1
        extra = {"labels": tokens} if isinstance(base, transformers.T5ForConditionalGeneration) else {}
        return model(input_ids=tokens, **extra).logits


def shake(model, scale=0.3):
    """Random values wherever something is trained, as after training."""
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * scale)
    return model


def peft_layers(model):
    return {name: m for name, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}


def assert_same_adapter(ours, theirs):
    """The same layers with the same values, ranks, multipliers and dropout."""
    layers = peft_layers(theirs)
    assert list(adapted_layers(ours)) == list(layers)
    for name, layer in adapted_layers(ours).items():
        stock = layers[name]
        assert torch.equal(layer.B.double(), stock.lora_A["default"].weight.double()), name
        assert torch.equal(layer.A.double(), stock.lora_B["default"].weight.double()), name
        assert layer.rank == stock.r["default"]
        assert layer.alpha == pytest.approx(stock.scaling["default"], rel=4e-16)
        assert layer.dropout == getattr(stock.lora_dropout["default"], "p", 0.0)


def assert_same_outputs(ours, theirs, dtype=torch.float32):
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 3e-2}
    torch.testing.assert_close(outputs(ours), outputs(theirs), check_dtype=True, **tolerance)


def files(directory):
    """Config and weights as bytes."""
    return tuple((Path(directory) / name).read_bytes() for name in (CONFIG, WEIGHTS))


def config_of(directory):
    return json.loads((Path(directory) / CONFIG).read_text())


def change_config(directory, **fields):
    path = Path(directory) / CONFIG
    path.write_text(json.dumps(config_of(directory) | fields))


def change_weights(directory, change):
    state = load_file(Path(directory) / WEIGHTS)
    change(state)
    save_file(state, Path(directory) / WEIGHTS)


def assert_changed(model, base):
    """The comparison means something: the adapter changes what the model says."""
    assert not torch.allclose(outputs(model).float(), outputs(base).float(), rtol=1e-2, atol=1e-2)


# Ours in PEFT


SAVES = {
    "net": {"target_modules": ["up", "down"], "rank": 3, "alpha": 0.7},
    "llama": {"target_modules": ["q_proj", "v_proj"], "rank": 8, "alpha": 2.0, "dropout": 0.1},
    "llama-classifier": {"target_modules": "all-linear", "rank": 4, "modules_to_save": ["score"]},
    "bert": {"target_modules": ["query", "value"], "rank": 4, "alpha": 4.0, "modules_to_save": "classifier"},
    "t5": {"target_modules": ["q", "v"], "rank": 8, "alpha": 2.0, "dropout": 0.1},
}
TASKS = {"llama": "CAUSAL_LM", "llama-classifier": "SEQ_CLS", "bert": "SEQ_CLS", "t5": "SEQ_2_SEQ_LM"}


class TestOursInPeft:
    @pytest.mark.parametrize("name", SAVES)
    def test_gives_the_same_outputs(self, name, tmp_path):
        model = shake(fastlora.apply_lora(make(name), **SAVES[name]))
        assert fastlora.save_adapter(model, tmp_path) is None
        stock = PeftModel.from_pretrained(make(name), tmp_path)
        assert_same_adapter(model, stock)
        assert_same_outputs(model, stock)
        assert_changed(model, make(name))

    @pytest.mark.parametrize(
        "dtypes",
        [
            (torch.float32, None),
            (torch.bfloat16, None),
            (torch.bfloat16, torch.float32),
            (torch.float16, torch.float32),
        ],
        ids=lambda d: dtype_id([t for t in d if t]),
    )
    def test_keeps_the_dtype_of_the_adapters(self, dtypes, tmp_path):
        base, adapter = dtypes
        model = make("llama").to(base)
        shake(fastlora.apply_lora(model, ["q_proj", "up_proj"], 4, 2.0, adapter_dtype=adapter))
        fastlora.save_adapter(model, tmp_path)
        assert {t.dtype for t in load_file(tmp_path / WEIGHTS).values()} == {adapter or base}
        stock = PeftModel.from_pretrained(make("llama").to(base), tmp_path)
        assert_same_adapter(model, stock)
        assert_same_outputs(model, stock, base)
        again = fastlora.load_adapter(make("llama").to(base), tmp_path)
        assert torch.equal(outputs(again), outputs(model))
        assert again.model.layers[0].self_attn.q_proj.A.dtype == (adapter or base)

    def test_writes_the_config_of_the_interface(self, tmp_path):
        model = fastlora.apply_lora(make("bert"), ["query"], 4, 2.0, 0.25, modules_to_save=["classifier"])
        model.config._name_or_path = model.name_or_path = "some/base"
        fastlora.save_adapter(model, tmp_path)
        assert config_of(tmp_path) == {
            "peft_type": "LORA",
            "task_type": "SEQ_CLS",
            "base_model_name_or_path": "some/base",
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["query"],
            "lora_dropout": 0.25,
            "bias": "none",
            "use_rslora": False,
            "fan_in_fan_out": False,
            "rank_pattern": {},
            "alpha_pattern": {},
            "modules_to_save": ["classifier"],
            "inference_mode": True,
        }
        assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]

    @pytest.mark.parametrize("origin", [None, "", Path("x"), 3])
    def test_a_name_or_path_that_is_no_name(self, origin, tmp_path):
        model = fastlora.apply_lora(Net(), ["up"])
        model.name_or_path = origin
        fastlora.save_adapter(model, tmp_path)
        assert config_of(tmp_path)["base_model_name_or_path"] is None

    def test_writes_our_B_as_their_A(self, tmp_path):
        model = shake(fastlora.apply_lora(Net(), ["up"], 3, modules_to_save=["norm"]))
        fastlora.save_adapter(model, tmp_path)
        state = load_file(tmp_path / WEIGHTS)
        expected = {}
        for i in range(2):
            layer = model.blocks[i]["up"]
            expected[f"{PREFIX}blocks.{i}.up.lora_A.weight"] = layer.B
            expected[f"{PREFIX}blocks.{i}.up.lora_B.weight"] = layer.A
        expected |= {f"{PREFIX}norm.{name}": tensor for name, tensor in model.norm.state_dict().items()}
        expected = {name: t for name, t in expected.items() if "_original_" not in name}
        assert state.keys() == expected.keys()
        assert all(bits_equal(state[name], expected[name].detach()) for name in expected)

    @pytest.mark.parametrize("name", ["llama", "t5", "net"])
    def test_different_ranks_multipliers_and_dropouts(self, name, tmp_path):
        targets = {
            "llama": (
                ["q_proj", "model.layers.1.mlp.up_proj"],
                ["v_proj"],
                r"model\.layers\.[02]\.mlp\.up_proj",
            ),
            "t5": (["q"], r"encoder\..*\.v", ["decoder.block.0.layer.1.EncDecAttention.v"]),
            "net": (["blocks.0.up"], ["blocks.1.up", "blocks.1.down"], ["head"]),
        }[name]
        model = make(name)
        for target, rank, alpha in zip(targets, (4, 2, 4), (2.0, 0.3, 1 / 3), strict=True):
            fastlora.apply_lora(model, target, rank, alpha)
        shake(model)
        fastlora.save_adapter(model, tmp_path)
        stock = PeftModel.from_pretrained(make(name), tmp_path)
        assert_same_adapter(model, stock)
        assert_same_outputs(model, stock)
        # And back out of PEFT.
        stock.save_pretrained(tmp_path / "theirs")
        again = fastlora.load_adapter(make(name), tmp_path / "theirs")
        assert_same_adapter(again, stock)
        assert torch.equal(outputs(again), outputs(model))

    def test_one_layer_of_a_name_that_another_ends_in(self, tmp_path):
        """``down`` alone among ``down``, ``x.down`` and ``a.down``: no list of names can say that."""

        def model():
            torch.manual_seed(1)
            tree = {"down": nn.Linear(4, 4), "x": nn.ModuleDict({"down": nn.Linear(4, 4)})}
            return nn.ModuleDict(tree)

        ours = shake(fastlora.apply_lora(model(), "down"))
        fastlora.save_adapter(ours, tmp_path)
        assert config_of(tmp_path)["target_modules"] == "down"
        assert_same_adapter(ours, PeftModel.from_pretrained(model(), tmp_path))

    def test_more_names_than_peft_keeps_in_a_list(self, tmp_path):
        """From twenty names on PEFT looks for a shorter list that covers the same."""

        def model():
            torch.manual_seed(1)
            return nn.ModuleList(
                nn.ModuleDict({name: nn.Linear(2, 2) for name in ("up", "down")}) for _ in range(12)
            )

        names = [f"{i}.up" for i in range(11)] + [f"{i}.down" for i in range(1, 12)]
        ours = shake(fastlora.apply_lora(model(), names, 2))
        fastlora.save_adapter(ours, tmp_path)
        assert config_of(tmp_path)["target_modules"] == sorted(names)
        assert_same_adapter(ours, PeftModel.from_pretrained(model(), tmp_path))

    @pytest.mark.parametrize("alpha", [0.1, 1 / 3, 16 / 8**0.5, 1e-30, -2.0, 0.0, 3])
    @pytest.mark.parametrize("rank", [1, 3, 7, 16])
    def test_saving_again_gives_the_same_bytes(self, rank, alpha, tmp_path):
        model = shake(fastlora.apply_lora(Net(), ["up"], rank, alpha, 0.5, modules_to_save=["norm", "head"]))
        fastlora.save_adapter(model, tmp_path / "a")
        again = fastlora.load_adapter(Net(), tmp_path / "a")
        fastlora.save_adapter(again, tmp_path / "b")
        assert files(tmp_path / "a") == files(tmp_path / "b")
        fastlora.load_adapter(again, tmp_path / "b")
        fastlora.save_adapter(again, tmp_path / "b")
        assert files(tmp_path / "a") == files(tmp_path / "b")
        assert again.blocks[0]["up"].alpha == pytest.approx(alpha, rel=4e-16)

    def test_an_alpha_too_large_for_pefts_form(self, tmp_path):
        model = fastlora.apply_lora(Net(), ["up"], 8, 1e308)
        with pytest.raises(ValueError, match=r"PEFT's lora_alpha is .* 1e\+308 \* 8 of FusedLoRA"):
            fastlora.save_adapter(model, tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()

    def test_the_most_common_dropout_is_written(self, tmp_path):
        model = fastlora.apply_lora(Net(), ["up"], dropout=0.5)
        fastlora.apply_lora(model, ["blocks.0.down"], dropout=0.25)
        fastlora.save_adapter(model, tmp_path)
        assert config_of(tmp_path)["lora_dropout"] == 0.5

    def test_a_merged_layer_is_saved_like_any_other(self, tmp_path):
        model = shake(fastlora.apply_lora(Net(), ["up"], alpha=2.0))
        fastlora.save_adapter(model, tmp_path / "a")
        model.blocks[0]["up"].merge()
        fastlora.save_adapter(model, tmp_path / "b")
        assert files(tmp_path / "a") == files(tmp_path / "b")

    def test_tensors_that_share_memory_or_lie_transposed(self, tmp_path):
        model = shake(fastlora.apply_lora(Net(), ["up"], rank=8))
        first, second = (block["up"] for block in model.blocks)
        first.B = second.B
        second.A.data = second.A.data.t().contiguous().t()
        assert not second.A.is_contiguous()
        fastlora.save_adapter(model, tmp_path)
        assert torch.equal(outputs(fastlora.load_adapter(copy.deepcopy(model), tmp_path)), outputs(model))
        state = load_file(tmp_path / WEIGHTS)
        assert torch.equal(state[f"{PREFIX}blocks.1.up.lora_B.weight"], second.A)

    def test_a_module_that_peft_takes_for_a_saved_one_is_written_too(self, tmp_path):
        """PEFT compares the ends of names: to it DistilBERT's pre_classifier is a classifier."""
        config = transformers.DistilBertConfig(vocab_size=48, dim=16, hidden_dim=24, n_layers=1, n_heads=2)

        def made():
            torch.manual_seed(5)
            return transformers.DistilBertForSequenceClassification(config).eval()

        model = shake(fastlora.apply_lora(made(), ["q_lin"], modules_to_save=["classifier"]))
        fastlora.save_adapter(model, tmp_path)
        assert f"{PREFIX}pre_classifier.weight" in load_file(tmp_path / WEIGHTS)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing.*")
            assert_same_outputs(model, PeftModel.from_pretrained(made(), tmp_path))
        assert same_outputs(model, fastlora.load_adapter(made(), tmp_path))
        assert same_outputs(model, fastlora.load_adapter(model, tmp_path))

    def test_such_a_module_by_its_second_name_alone(self, tmp_path):
        def made():
            torch.manual_seed(5)
            model = Net()
            model.extra = nn.Linear(2, 2)
            model.inner = nn.ModuleDict({"subhead": model.extra})
            return model.eval()

        model = shake(fastlora.apply_lora(made(), ["up"], modules_to_save=["head"]))
        fastlora.save_adapter(model, tmp_path)
        assert f"{PREFIX}extra.weight" in load_file(tmp_path / WEIGHTS)
        fastlora.load_adapter(made(), tmp_path)

    @pytest.mark.parametrize("shared", ["up", "head", "block"])
    def test_a_module_in_several_places(self, shared, tmp_path):
        """PEFT puts another module into one of them; a shared parent makes that all of them."""

        def made():
            torch.manual_seed(1)
            model = Net()
            first, second = model.blocks
            if shared == "up":
                second["up"] = first["up"]
            elif shared == "head":
                model.norm = model.head = nn.Linear(8, 8)
            else:
                model.blocks[1] = first
            return model.eval()

        places = {"up": r"blocks\.0\.up, blocks\.1\.up", "head": "norm, head"}.get(shared)

        def warns():
            message = f"one module has the places {places}"
            return pytest.warns(UserWarning, match=message) if places else nullcontext()

        model = shake(fastlora.apply_lora(made(), ["up"], modules_to_save=["head"]))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with warns():
                fastlora.save_adapter(model, tmp_path)
            with warns():
                assert same_outputs(model, fastlora.load_adapter(made(), tmp_path))
        stock = PeftModel.from_pretrained(made(), tmp_path).eval()
        assert torch.allclose(outputs(stock), outputs(model), atol=1e-5) == (shared == "block")

    def test_a_saved_module_with_complex_parameters(self, tmp_path):
        class Spectral(nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = nn.Parameter(torch.ones(8, dtype=torch.complex64))

            def forward(self, x):
                return torch.fft.ifft(torch.fft.fft(x) * self.weight).real

        def made():
            torch.manual_seed(1)
            model = Net()
            model.norm = Spectral()
            return model.eval()

        model = fastlora.apply_lora(made(), ["up"], modules_to_save=["norm"])
        assert model.norm.weight.requires_grad  # as in PEFT
        y, state = outputs(model), fastlora.adapter_state_dict(model)
        fastlora.save_adapter(shake(model), tmp_path)
        assert not torch.equal(model.norm.weight, state["norm.weight"])
        assert_same_outputs(model, PeftModel.from_pretrained(made(), tmp_path))
        assert same_outputs(model, fastlora.load_adapter(made(), tmp_path))
        assert torch.equal(outputs(fastlora.load_adapter_state_dict(model, state)), y)
        change_weights(tmp_path, lambda s: s.update({f"{PREFIX}norm.weight": torch.ones(8)}))
        refuses_to_load(made(), tmp_path, "norm.weight is torch.float32, expected torch.complex64")

    def test_a_saved_module_that_holds_a_layer_twice(self, tmp_path):
        def made():
            torch.manual_seed(1)
            model, layer = Net(), nn.Linear(8, 8)
            model.norm = nn.Sequential(layer, nn.Tanh(), layer)
            return model.eval()

        model = shake(fastlora.apply_lora(made(), ["up"], modules_to_save=["norm"]))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fastlora.save_adapter(model, tmp_path / "ours")
            stock = PeftModel.from_pretrained(made(), tmp_path / "ours")
            assert_same_outputs(model, stock)
            stock.save_pretrained(tmp_path / "theirs")
            for directory in ("ours", "theirs"):
                assert same_outputs(model, fastlora.load_adapter(made(), tmp_path / directory))

    def test_a_mixture_whose_dense_layers_peft_takes_for_experts(self, tmp_path):
        config = transformers.Qwen3MoeConfig(
            vocab_size=48,
            hidden_size=16,
            intermediate_size=24,
            moe_intermediate_size=8,
            mlp_only_layers=[0],
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_experts=2,
            num_experts_per_tok=1,
        )

        def made():
            torch.manual_seed(5)
            return transformers.Qwen3MoeForCausalLM(config).eval()

        model = shake(fastlora.apply_lora(made(), ["q_proj", "up_proj"]))
        with pytest.warns(
            UserWarning, match=r"PEFT takes .*layers\.0\.mlp\.up_proj of a qwen3_moe .*experts"
        ):
            fastlora.save_adapter(model, tmp_path)
        assert same_outputs(fastlora.load_adapter(made(), tmp_path), model)
        model = shake(fastlora.apply_lora(made(), ["q_proj"]))
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="save_adapter")
            fastlora.save_adapter(model, tmp_path)
        assert_same_outputs(model, PeftModel.from_pretrained(made(), tmp_path))

    def test_an_averaged_model(self, tmp_path):
        model = adapter(1)
        fastlora.save_adapter(torch.optim.swa_utils.AveragedModel(model), tmp_path)
        assert same_outputs(fastlora.load_adapter(make("net"), tmp_path), model)

    @pytest.mark.parametrize(
        ("name", "config"),
        [
            ("PlainForCausalLM", {"hidden_size": 8}),
            ("PlainLMHeadModel", {"hidden_size": 8}),
            ("PlainForQuestionAnswering", {"hidden_size": 8}),
            ("PlainForTokenClassification", None),
        ],
    )
    def test_the_task_of_a_model_is_not_in_its_name_alone(self, name, config, tmp_path):
        """PEFT's model of the task would look for methods and heads of transformers' models."""
        forward = lambda self, x=None, **of_peft: Net.forward(self, x)  # noqa: E731
        kind = type(name, (Net,), {"config": config, "forward": forward})
        fastlora.save_adapter(fastlora.apply_lora(kind(), ["up"]), tmp_path)
        assert config_of(tmp_path)["task_type"] is None

    def test_layers_that_a_model_never_calls_are_loaded_with_a_warning(self, tmp_path):
        """PEFT trains such adapters, in vain: its files are to be read all the same."""
        model = fastlora.apply_lora(nn.ModuleDict({"dt_proj": nn.Linear(4, 4)}), ["dt_proj"])
        fastlora.save_adapter(model, tmp_path)
        jamba = nn.ModuleDict({"dt_proj": nn.Linear(4, 4)})
        jamba.config = SimpleNamespace(model_type="jamba")
        with pytest.warns(UserWarning, match=r"load_adapter: .* weights of dt_proj without calling"):
            fastlora.load_adapter(jamba, tmp_path)
        assert isinstance(jamba["dt_proj"], FusedLoRALinear)

    def test_a_base_model_of_transformers_takes_no_unasked_for_head(self, tmp_path):
        """With SEQ_CLS PEFT would save the classifier too, which the file does not have."""
        fastlora.save_adapter(fastlora.apply_lora(make("bert"), ["query"]), tmp_path)
        assert config_of(tmp_path)["task_type"] is None
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*missing.*")
            PeftModel.from_pretrained(make("bert"), tmp_path)


class TestRefusesToSave:
    @staticmethod
    def refuses(model, directory, match, error=ValueError):
        with pytest.raises(error, match=match):
            fastlora.save_adapter(model, directory / "out")
        assert not (directory / "out").exists()

    def test_a_model_without_adapters(self, tmp_path):
        self.refuses(Net(), tmp_path, "no adapted layer")
        self.refuses(3, tmp_path, "Module", TypeError)

    def test_a_model_that_is_the_layer(self, tmp_path):
        layer = FusedLoRALinear(4, 4, 2)
        self.refuses(layer, tmp_path, "the model itself is the adapted layer")
        self.refuses(torch.compile(layer), tmp_path, "the model itself is the adapted layer")

    def test_original_values_of_saved_modules(self, tmp_path):
        model = fastlora.apply_lora(Net(), ["up"], modules_to_save=["head"])
        with fastlora.disable_adapter(model):
            self.refuses(model, tmp_path, "disable_adapter")

    def test_meta_tensors(self, tmp_path):
        model = fastlora.apply_lora(Net().to("meta"), ["up"])
        self.refuses(model, tmp_path, r"blocks\.\{0..1\}\.up\.lora_A.* meta device")

    @pytest.mark.parametrize("inner", ["adapted", "saved"])
    def test_modules_to_save_that_overlap_for_peft(self, inner, tmp_path):
        """PEFT compares the ends of names, dots or not."""
        model = Net()
        model.overhead = nn.ModuleDict({"up": nn.Linear(3, 3), "head": nn.Linear(3, 3)})
        del model.overhead["head" if inner == "adapted" else "up"]
        fastlora.apply_lora(model, ["up"], modules_to_save=["head"])
        self.refuses(model, tmp_path, "overhead.*rename one")

    def test_an_adapted_layer_that_peft_would_take_for_part_of_a_saved_module(self, tmp_path):
        model = nn.ModuleDict({"axb": nn.Linear(4, 4), "a": nn.ModuleDict({"b": nn.Linear(4, 4)})})
        fastlora.apply_lora(model, ["axb"], modules_to_save=["a.b"])
        self.refuses(model, tmp_path, "axb")

    @pytest.mark.parametrize("name", ["layer", "B", "default"])
    def test_names_that_end_those_of_pefts_own_children(self, name, tmp_path):
        model = Net()
        model.add_module(name, model.head)
        del model.head
        fastlora.apply_lora(model, ["up"], modules_to_save=[name])
        self.refuses(model, tmp_path, f"of its own layers, for {name}; rename")

    def test_a_part_that_is_wrapped(self, tmp_path):
        model = fastlora.apply_lora(Net(), ["up"])
        model.blocks = torch.optim.swa_utils.AveragedModel(model.blocks)
        with pytest.warns(UserWarning, match="blocks wraps a part of the model"):
            fastlora.save_adapter(model, tmp_path)
        model.blocks = model.blocks.module
        model.averaged = torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2))  # has no adapter
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", "save_adapter: averaged.* are trained")
            fastlora.save_adapter(model, tmp_path)

    def test_a_container_warns(self, tmp_path):
        model = Net()
        model.heads = nn.ModuleList([nn.Linear(8, 2)])
        shake(fastlora.apply_lora(model, ["up"], modules_to_save=["heads"]))
        with pytest.warns(UserWarning, match="does not save containers such as heads as a whole"):
            fastlora.save_adapter(model, tmp_path)
        again = Net()
        again.heads = nn.ModuleList([nn.Linear(8, 2)])
        with pytest.raises(TypeError, match="ModuleList"):
            PeftModel.from_pretrained(copy.deepcopy(again), tmp_path)
        fastlora.load_adapter(again, tmp_path)
        assert torch.equal(again.heads[0].weight, model.heads[0].weight)

    def test_a_container_that_peft_takes_for_a_saved_module_warns(self, tmp_path):
        model = Net()
        model.overhead = nn.ModuleList([nn.Linear(8, 2)])
        fastlora.apply_lora(model, ["up"], modules_to_save=["head"])
        with pytest.warns(UserWarning, match="does not save containers such as overhead as a whole"):
            fastlora.save_adapter(model, tmp_path)

    def test_a_missing_safetensors(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
        model = fastlora.apply_lora(Net(), ["up"])
        self.refuses(model, tmp_path, r"fastlora-triton\[peft\]", ImportError)

    def test_one_layer_under_two_names_warns(self, tmp_path):
        model = Net()
        model.again = model.blocks[0]["up"]
        fastlora.apply_lora(model, ["up"])
        with pytest.warns(UserWarning, match=r"blocks\.0\.up, again"):
            fastlora.save_adapter(model, tmp_path)


# PEFT's here


def lora(**fields):
    return {"r": 4, "lora_alpha": 16, **fields}


QV = ["q_proj", "v_proj"]
PATTERNS = {
    "rank_pattern": {
        "v_proj": 2,
        r"^model\.layers\.0\.self_attn\.q_proj": 3,
        r"layers\.\d\.self_attn\.q_proj": 5,
    },
    "alpha_pattern": {r"layers\.1\..*": 1, "model.layers.2.self_attn.v_proj": 7, "nothing": 9},
}
LOADS = {
    "llama-plain": ("llama", lora(target_modules=QV, task_type="CAUSAL_LM")),
    "llama-rslora": ("llama", lora(target_modules=QV, use_rslora=True, lora_dropout=0.1)),
    "llama-patterns": ("llama", lora(target_modules=QV, **PATTERNS)),
    "llama-patterns-rslora": ("llama", lora(target_modules=QV, use_rslora=True, **PATTERNS)),
    "llama-exclude": (
        "llama",
        lora(target_modules=QV, exclude_modules=["layers.1.self_attn.q_proj", "none"]),
    ),
    "llama-exclude-regex": ("llama", lora(target_modules=QV, exclude_modules=r".*\.[12]\..*q_proj")),
    "llama-layer": ("llama", lora(target_modules=QV, layers_to_transform=1)),
    "llama-layers": ("llama", lora(target_modules=QV, layers_to_transform=[0, 2], layers_pattern="layers")),
    "llama-layers-exact": (
        "llama",
        lora(target_modules=["q_proj", "model.layers.0.mlp.up_proj"], layers_to_transform=[2]),
    ),
    "llama-layers-patterns": (
        "llama",
        lora(target_modules=QV, layers_to_transform=[1], layers_pattern=["blocks", "(h|layers)"]),
    ),
    "llama-all-linear": ("llama", lora(target_modules="all-linear", task_type="CAUSAL_LM")),
    "llama-regex": ("llama", lora(target_modules=r".*\.layers\.[01]\.(self_attn\.[qk]|mlp\.gate)_proj")),
    "llama-head": ("llama", lora(target_modules=QV, modules_to_save=["lm_head"])),
    "llama-norms": ("llama", lora(target_modules="all-linear", modules_to_save=["input_layernorm", "norm"])),
    "llama-saved-layer": ("llama", lora(target_modules=QV, modules_to_save=["layers.1.self_attn"])),
    "llama-gaussian": ("llama", lora(target_modules=QV, init_lora_weights="gaussian")),
    "llama-random": ("llama", lora(target_modules=QV, init_lora_weights=False)),
    "llama-seq-cls": ("llama-classifier", lora(target_modules=QV, task_type="SEQ_CLS")),
    "llama-seq-cls-all": ("llama-classifier", lora(target_modules="all-linear", task_type="SEQ_CLS")),
    "bert-seq-cls": ("bert", lora(target_modules=["query", "value"], task_type="SEQ_CLS")),
    "bert-pooler": (
        "bert",
        lora(
            target_modules=["query"], modules_to_save=["pooler", "classifier", "absent"], task_type="SEQ_CLS"
        ),
    ),
    "bert-all": ("bert", lora(target_modules="all-linear", task_type="SEQ_CLS")),
    "t5-seed": (
        "t5",
        {
            "r": 8,
            "lora_alpha": 16,
            "lora_dropout": 0.1,
            "target_modules": ["q", "v"],
            "task_type": "SEQ_2_SEQ_LM",
        },
    ),
    "t5-encoder": ("t5", lora(target_modules=r"encoder\..*\.(q|wo)", rank_pattern={"wo": 1})),
    "net-norm": ("net", lora(target_modules=["up", "down"], modules_to_save=["norm", "head"])),
    "net-bert-like": ("net", lora(target_modules=["blocks.0.up", "head"], alpha_pattern={"head": 0.5})),
}


def saved_by_peft(name, fields, directory, dtype=None):
    stock = get_peft_model(make(name).to(dtype or torch.float32), LoraConfig(**fields))
    shake(stock).eval().save_pretrained(directory)
    return stock


class TestPeftsHere:
    @pytest.mark.parametrize(("name", "fields"), LOADS.values(), ids=LOADS)
    def test_gives_the_same_outputs(self, name, fields, tmp_path):
        stock = saved_by_peft(name, fields, tmp_path / "theirs")
        model = make(name)
        assert fastlora.load_adapter(model, tmp_path / "theirs") is model
        assert_same_adapter(model, stock)
        assert_same_outputs(model, stock)
        assert_changed(model, make(name))
        # The same is trained.
        theirs = {
            n.replace(".default", "").replace("modules_to_save.", "").removeprefix(PREFIX)
            for n, p in stock.named_parameters()
            if p.requires_grad
        }
        ours = {n for n, p in model.named_parameters() if p.requires_grad}
        assert {n.replace(".lora_A.weight", ".B").replace(".lora_B.weight", ".A") for n in theirs} == ours
        # And through our file back into PEFT.
        fastlora.save_adapter(model, tmp_path / "ours")
        assert (
            load_file(tmp_path / "ours" / WEIGHTS).keys() == load_file(tmp_path / "theirs" / WEIGHTS).keys()
        )
        back = PeftModel.from_pretrained(make(name), tmp_path / "ours")
        assert_same_adapter(model, back)
        assert torch.equal(outputs(back), outputs(stock)) or fields.get("use_rslora")
        assert_same_outputs(model, back)

    @pytest.mark.parametrize("tied", [True, False])
    def test_a_head_that_is_a_target(self, tied, tmp_path):
        """PEFT saves its frozen weight too, and loads it into the base model."""
        base = tied_llama(tied)
        fields = lora(target_modules=["q_proj", "lm_head"])
        stock = get_peft_model(copy.deepcopy(base), LoraConfig(**fields))
        shake(stock).eval().save_pretrained(tmp_path)
        assert f"{PREFIX}lm_head.base_layer.weight" in load_file(tmp_path / WEIGHTS)
        with torch.no_grad():
            base.lm_head.weight.mul_(2)  # the file has the values
        model = fastlora.load_adapter(copy.deepcopy(base), tmp_path)
        theirs = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        assert_same_outputs(model, theirs)
        assert torch.equal(model.lm_head.weight, stock.base_model.model.lm_head.base_layer.weight)
        state = load_file(tmp_path / WEIGHTS)
        state[f"{PREFIX}lm_head.base_layer.weight"] = torch.zeros(3, 3)
        save_file(state, tmp_path / WEIGHTS)
        with pytest.raises(ValueError, match=r"lm_head\.base_layer\.weight.*3, 3"):
            fastlora.load_adapter(base, tmp_path)

    @pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]], ids=str)
    def test_a_tied_head_that_is_saved_leaves_the_embedding(self, saved, tmp_path):
        base = tied_llama(True)
        model = fastlora.apply_lora(copy.deepcopy(base), ["q_proj"], rank=3, modules_to_save=saved)
        with torch.no_grad():
            for module in saved_modules(model).values():
                module.weight.add_(0.5)
        fastlora.save_adapter(model, tmp_path)
        loaded = fastlora.load_adapter(copy.deepcopy(base), tmp_path)
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], tensor), name
        assert_same_outputs(loaded, PeftModel.from_pretrained(copy.deepcopy(base), tmp_path))

    @pytest.mark.parametrize("prepared", [False, True])
    @pytest.mark.parametrize("tied", [False, True])
    @pytest.mark.parametrize("saved", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]], ids=str)
    def test_embeddings_of_a_resized_vocabulary_that_are_saved(self, saved, tied, prepared, tmp_path):
        """PEFT writes each under three names; disable_adapter goes back to the original values."""
        hub, file = tmp_path / "hub", tmp_path / "adapter"
        tied_llama(tied).save_pretrained(hub)

        def resized(seed):
            model = transformers.AutoModelForCausalLM.from_pretrained(hub)
            torch.manual_seed(seed)  # of the rows that are new
            model.resize_token_embeddings(51, mean_resizing=False)
            return model.eval()

        stock = get_peft_model(resized(1), LoraConfig(**lora(target_modules=QV, modules_to_save=saved)))
        shake(stock).eval().save_pretrained(file)
        state = load_file(file / WEIGHTS)
        assert sum("original_module" in name for name in state) == len(saved)
        base = resized(2)
        if prepared:
            fastlora.apply_lora(base, QV, rank=2, modules_to_save=saved)
        model = fastlora.load_adapter(base, file)
        theirs = PeftModel.from_pretrained(resized(2), file)
        assert_same_outputs(model, stock)
        assert_same_outputs(theirs, stock)
        with fastlora.disable_adapter(model), theirs.disable_adapter():
            assert_same_outputs(model, theirs)
        original = next(name for name in state if "original_module" in name)
        state[original] = torch.zeros(3, 3)
        save_file(state, file / WEIGHTS)
        with pytest.raises(ValueError, match=rf"{original} is \(3, 3\), expected \(51, 16\)"):
            fastlora.load_adapter(resized(2), file)

    @pytest.mark.parametrize("name", ["llama", "llama-classifier", "bert", "t5"])
    @pytest.mark.parametrize("spelling", ["all-linear", "ALL-Linear"])
    def test_all_linear_by_its_name(self, name, spelling, tmp_path):
        """PEFT writes the names that it found; a config written by hand may still say it."""
        stock = saved_by_peft(name, lora(target_modules="all-linear", task_type=TASKS[name]), tmp_path)
        change_config(tmp_path, target_modules=spelling)
        back = PeftModel.from_pretrained(make(name), tmp_path)
        model = fastlora.load_adapter(make(name), tmp_path)
        assert_same_adapter(model, back)
        assert_same_outputs(model, stock)

    @pytest.mark.parametrize("autocast", [True, False])
    def test_half_precision(self, autocast, tmp_path):
        """PEFT keeps the adapters of a bfloat16 base in float32 unless told otherwise."""
        base = make("llama").to(torch.bfloat16)
        config = LoraConfig(**lora(target_modules=QV))
        stock = shake(get_peft_model(base, config, autocast_adapter_dtype=autocast)).eval()
        stock.save_pretrained(tmp_path)
        model = fastlora.load_adapter(make("llama").to(torch.bfloat16), tmp_path)
        assert_same_adapter(model, stock)
        assert_same_outputs(model, stock, torch.bfloat16)
        layer = model.model.layers[0].self_attn.q_proj
        assert layer.A.dtype == layer.B.dtype == (torch.float32 if autocast else torch.bfloat16)

    def test_narrow_adapters_on_a_wide_base(self, tmp_path):
        stock = saved_by_peft("llama", lora(target_modules=QV), tmp_path)
        change_weights(tmp_path, lambda state: state.update({k: t.half() for k, t in state.items()}))
        model = fastlora.load_adapter(make("llama"), tmp_path)
        layer = model.model.layers[0].self_attn.q_proj
        assert layer.A.dtype == torch.float32
        theirs = peft_layers(stock)["model.layers.0.self_attn.q_proj"].lora_B["default"].weight
        assert torch.equal(layer.A, theirs.half().float())

    def test_the_pickled_file_of_older_versions(self, tmp_path):
        stock = saved_by_peft("llama", lora(target_modules=QV), tmp_path)
        torch.save(load_file(tmp_path / WEIGHTS), tmp_path / PICKLED)
        (tmp_path / WEIGHTS).unlink()
        assert_same_adapter(fastlora.load_adapter(make("llama"), tmp_path), stock)

    def test_a_pickled_file_runs_no_code(self, tmp_path):
        saved_by_peft("net", lora(target_modules=["up"]), tmp_path)
        (tmp_path / WEIGHTS).unlink()
        torch.save(Trap(tmp_path / "sprung"), tmp_path / PICKLED)
        model = Net()
        refuses_to_load(model, tmp_path, PICKLED)
        assert not (tmp_path / "sprung").exists()

    def test_the_safetensors_win(self, tmp_path):
        stock = saved_by_peft("net", lora(target_modules=["up"]), tmp_path)
        (tmp_path / PICKLED).write_bytes(b"old")
        assert_same_adapter(fastlora.load_adapter(make("net"), tmp_path), stock)

    def test_missing_fields_mean_pefts_defaults(self, tmp_path):
        stock = saved_by_peft("net", {"target_modules": ["up"], "r": 8, "lora_alpha": 8}, tmp_path)
        (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "target_modules": ["up"]}))
        assert_same_adapter(fastlora.load_adapter(make("net"), tmp_path), stock)

    def test_every_field_of_this_peft_is_known(self):
        fields = LoraConfig(target_modules=["up"]).to_dict()
        known = {*adapters._PLAIN, *adapters._UNSUPPORTED, *adapters._SUPPORTED, *adapters._WITHOUT_EFFECT}
        assert fields.keys() <= known, f"PEFT {peft.__version__}: what do the new fields mean?"

    def test_unknown_fields_warn(self, tmp_path):
        saved_by_peft("net", lora(target_modules=["up"]), tmp_path)
        change_config(tmp_path, some_new_thing=3, an_unused_new_thing=None)
        with pytest.warns(UserWarning, match=r"unknown fields.*some_new_thing=3") as record:
            fastlora.load_adapter(make("net"), tmp_path)
        assert "unused" not in str(record[0].message)


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


# Refusals


def snapshot(model):
    """All that an attempt to load could change."""
    return {
        "modules": dict(model.named_modules(remove_duplicate=False)),
        "training": {name: module.training for name, module in model.named_modules()},
        "layers": {n: (m.rank, m.alpha, m.dropout) for n, m in adapted_layers(model).items()},
        "saved": list(saved_modules(model)),
        "hooks": {name: len(module._forward_pre_hooks) for name, module in model.named_modules()},
        "tensors": {n: (id(t), t.requires_grad, t.detach().clone()) for n, t in all_tensors(model)},
    }


def all_tensors(model):
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


def assert_unchanged(model, before):
    after = snapshot(model)
    assert after["tensors"].keys() == before["tensors"].keys()
    for name, (identity, trained, value) in before["tensors"].items():
        assert after["tensors"][name][:2] == (identity, trained), name
        assert value.is_meta or bits_equal(after["tensors"][name][2], value), name
    assert all(after[key] == before[key] for key in before if key != "tensors")


def refuses_to_load(model, directory, match, error=ValueError):
    before = snapshot(model)
    with pytest.raises(error, match=match):
        fastlora.load_adapter(model, directory)
    assert_unchanged(model, before)


UP = "base_model.model.blocks.0.up.lora_A.weight"


def write_config(text):
    return lambda directory: (directory / CONFIG).write_text(text)


def fields(**changes):
    return lambda directory: change_config(directory, **changes)


def weights(change):
    return lambda directory: change_weights(directory, change)


def cut(name, size):
    return lambda directory: os.truncate(directory / name, size)


def pickled(change):
    def damage(directory):
        state = load_file(directory / WEIGHTS)
        torch.save(change(state), directory / PICKLED)
        (directory / WEIGHTS).unlink()

    return damage


UNSUPPORTED = {
    "peft_type": ["LOHA", "ADALORA", None, 3],
    "use_dora": [True],
    "lora_bias": [True],
    "fan_in_fan_out": [True],
    "bias": ["all", "lora_only"],
    "init_lora_weights": ["pissa", "pissa_niter_4", "olora", "loftq", "corda", "lora_ga", "mica"],
    "trainable_token_indices": [[1, 2], {"embed": [1]}],
    "layer_replication": [[[0, 1], [0, 1]]],
    "target_parameters": [["blocks.0.up.weight"]],
    "megatron_config": [{"a": 1}],
    "alora_invocation_tokens": [[1, 2]],
    "use_qalora": [True],
    "use_bdlora": [{"nblocks": 2}],
    "arrow_config": [{"top_k": 2}],
    "velora_config": [{"rank": 1}],
    "kasa_config": [{"beta": 1e-4}],
    "monteclora_config": [{"n": 2}],
    "ensure_weight_tying": [True],
}
MALFORMED = {
    "target_modules": [None, [], "", 3, [3], [""], {"up": 1}, "*"],
    "exclude_modules": [3, [3], "("],
    "modules_to_save": ["head", [3], ["("], 3],
    "layers_to_transform": ["abc", 1.5, [-1], [True], True, {"a": 1}],
    "layers_pattern": [3, [3], "("],
    "r": [0, -1, 2.0, "8", True, None],
    "lora_alpha": ["8", None, True, [1]],
    "lora_dropout": [1.5, -0.1, "0.1"],
    "rank_pattern": [[1], 3, {"up": 0}, {"up": 1.5}, {"up": "2"}, {"(": 2}, {"(?i)up": 4}],
    "alpha_pattern": [[1], "up", {"up": None}, {"up": "2"}, {"(": 2}],
}
NAMED = {
    f"{name}={value!r}": (fields(**{name: value}), name)
    for name, values in UNSUPPORTED.items()
    for value in values
}
MALFORMED_CASES = {
    f"{name}={value!r}": (fields(**{name: value}), CONFIG)
    for name, values in MALFORMED.items()
    for value in values
}
MINIMAL = '{"peft_type": "LORA", "target_modules": ["up"], "lora_alpha": %s}'
DAMAGES = {
    "no json": (write_config("{"), f"{CONFIG} is not JSON"),
    "no text": (lambda d: (d / CONFIG).write_bytes(b"\xff\xfe\x00"), f"{CONFIG} is not JSON"),
    "empty config": (write_config(""), f"{CONFIG} is not JSON"),
    "a list": (write_config("[]"), "list"),
    "infinite alpha": (
        write_config(MINIMAL % "Infinity"),
        "inf",
    ),
    "huge alpha": (
        write_config(MINIMAL % ("1" * 400)),
        CONFIG,
    ),
    "regex with layers": (fields(target_modules=".*up", layers_to_transform=[0]), "layers_to_transform"),
    "empty weights": (cut(WEIGHTS, 0), WEIGHTS),
    "short weights": (cut(WEIGHTS, 700), WEIGHTS),
    "short header": (cut(WEIGHTS, 20), WEIGHTS),
    "no safetensors": (lambda d: (d / WEIGHTS).write_bytes(b"junk" * 100), WEIGHTS),
    "missing": (weights(lambda s: s.pop(UP)), rf"missing {UP}"),
    "extra": (weights(lambda s: s.update(extra=torch.zeros(1))), "unexpected extra"),
    "embedding": (weights(lambda s: s.update({f"{PREFIX}embed.weight": torch.zeros(2, 2)})), "embed.weight"),
    "dora": (
        weights(lambda s: s.update({UP.replace("A.weight", "magnitude_vector"): torch.zeros(12)})),
        "magnitude",
    ),
    "shape": (weights(lambda s: s.update({UP: torch.zeros(4, 9)})), rf"{UP} is \(4, 9\), expected \(4, 8\)"),
    "swapped": (weights(lambda s: s.update({UP: s[UP].t().contiguous()})), rf"{UP} is \(8, 4\)"),
    "rank": (fields(r=5), r"expected \(5, 8\)"),
    "integers": (weights(lambda s: s.update({UP: s[UP].to(torch.int32)})), rf"{UP} is torch.int32"),
    "float8": (weights(lambda s: s.update({UP: s[UP].to(torch.float8_e4m3fn)})), "float8"),
    "complex": (weights(lambda s: s.update({UP: s[UP].to(torch.complex64)})), "complex64"),
    "integer head": (
        weights(lambda s: s.update({f"{PREFIX}head.weight": torch.ones(3, 8, dtype=torch.int64)})),
        r"head.weight is torch.int64",
    ),
    "head": (weights(lambda s: s.pop(f"{PREFIX}head.weight")), "missing .*head.weight"),
    "head shape": (
        weights(lambda s: s.update({f"{PREFIX}head.weight": torch.ones(4, 8)})),
        r"head.weight is \(4, 8\)",
    ),
    "unmatched": (fields(target_modules=["nothing"]), "nothing"),
    "norm": (fields(target_modules=["up", "norm"]), "norm.*BatchNorm1d"),
    "both": (fields(target_modules=["blocks.0.up"], modules_to_save=["up", "head"]), "up"),
    "unsaved": (fields(modules_to_save=None), "head"),
    "pickled list": (pickled(lambda s: [1, 2]), "list"),
    "pickled number": (pickled(lambda s: s | {UP: 3}), f"{UP} is a int"),
    "pickled sparse": (pickled(lambda s: s | {UP: s[UP].to_sparse()}), f"{UP} is torch.sparse_coo"),
    "pickled meta": (pickled(lambda s: s | {UP: s[UP].to("meta")}), f"{UP} is on the meta device"),
    "pickled rubbish": (lambda d: ((d / WEIGHTS).unlink(), (d / PICKLED).write_bytes(b"junk")), PICKLED),
}


@pytest.fixture(scope="module")
def peft_directory(tmp_path_factory):
    """PEFT's own directory for ``Net``: up and the head."""
    directory = tmp_path_factory.mktemp("peft")
    torch.manual_seed(3)
    saved_by_peft("net", lora(target_modules=["up"], modules_to_save=["head"]), directory)
    return directory


@pytest.fixture
def directory(peft_directory, tmp_path):
    return Path(shutil.copytree(peft_directory, tmp_path / "adapter"))


def plain():
    return make("net")


def prepared():
    return shake(fastlora.apply_lora(make("net"), ["up"], 4, 2.0, 0.5, modules_to_save=["head"]))


def other_rank():
    return shake(fastlora.apply_lora(make("net"), ["up"], 2, 2.0, modules_to_save=["head"]))


class TestRefusesToLoad:
    @pytest.mark.parametrize("start", [plain, prepared])
    @pytest.mark.parametrize(("damage", "match"), (NAMED | DAMAGES).values(), ids=NAMED | DAMAGES)
    def test_names_what_is_wrong(self, start, damage, match, directory):
        damage(directory)
        refuses_to_load(start(), directory, match)

    @pytest.mark.parametrize(("damage", "match"), MALFORMED_CASES.values(), ids=MALFORMED_CASES)
    def test_malformed_fields(self, damage, match, directory):
        damage(directory)
        refuses_to_load(plain(), directory, match)

    @pytest.mark.parametrize("start", [plain, prepared])
    @pytest.mark.parametrize("gone", [(CONFIG,), (WEIGHTS,), (CONFIG, WEIGHTS)])
    def test_missing_files(self, start, gone, directory):
        for name in gone:
            (directory / name).unlink()
        refuses_to_load(start(), directory, gone[0], FileNotFoundError)

    def test_no_directory(self, tmp_path):
        refuses_to_load(plain(), tmp_path / "none", CONFIG, FileNotFoundError)
        (tmp_path / "file").touch()
        refuses_to_load(plain(), tmp_path / "file", CONFIG, FileNotFoundError)

    def test_no_module(self, directory):
        with pytest.raises(TypeError, match="Module"):
            fastlora.load_adapter("net", directory)

    def test_adapted_layers_that_the_file_does_not_cover(self, directory):
        model = fastlora.apply_lora(prepared(), ["blocks.1.down"])
        refuses_to_load(model, directory, r"does not cover blocks\.1\.down")

    def test_saved_modules_that_the_file_does_not_cover(self, directory):
        model = fastlora.apply_lora(make("net"), ["up"], 4, modules_to_save=["head", "norm"])
        refuses_to_load(model, directory, "does not cover norm")

    def test_an_adapted_layer_inside_a_module_to_save(self, directory):
        refuses_to_load(fastlora.apply_lora(make("net"), ["head"]), directory, "head")

    def test_a_merged_layer(self, directory):
        model = prepared()
        model.blocks[1]["up"].merge()
        refuses_to_load(model, directory, r"blocks\.1\.up.*merged")

    def test_a_disabled_adapter(self, directory):
        model = prepared()
        with fastlora.disable_adapter(model):
            refuses_to_load(model, directory, "disable_adapter")

    def test_a_meta_model(self, directory):
        refuses_to_load(make("net").to("meta"), directory, "meta device")

    @pytest.mark.parametrize("name", ["A", "B"])
    def test_adapters_without_memory(self, name, directory):
        model = prepared()
        setattr(model.blocks[1]["up"], name, nn.Parameter(getattr(model.blocks[1]["up"], name).to("meta")))
        refuses_to_load(model, directory, rf"blocks\.1\.up\.{name}.*meta device")

    def test_embeddings_without_memory(self, tmp_path):
        """Offloaded by accelerate, say: values copied into them would be lost."""
        tied_llama(False).save_pretrained(tmp_path / "hub")

        def resized():
            model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
            model.resize_token_embeddings(51, mean_resizing=False)
            return model.eval()

        stock = get_peft_model(resized(), LoraConfig(**lora(target_modules=QV)))
        shake(stock).save_pretrained(tmp_path / "adapter")
        model = resized()
        model.model.embed_tokens.to("meta")
        refuses_to_load(model, tmp_path / "adapter", r"embed_tokens\.weight on the meta device")

    def test_another_rank_of_a_wrapped_model(self, directory, tmp_path, one_process):
        """The wrappers manage the parameters that they were called with."""
        from torch.distributed.fsdp import fully_shard

        model = other_rank()
        wrapped = nn.parallel.DistributedDataParallel(model)
        before = snapshot(model)
        with pytest.raises(ValueError, match="DistributedDataParallel, which knows only"):
            fastlora.load_adapter(wrapped, directory)
        assert_unchanged(model, before)

        model = other_rank()
        fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (1,)))
        adapters_before = {name: m.A for name, m in adapted_layers(model).items()}
        with pytest.raises(ValueError, match=r"another rank for blocks.*load the adapter first"):
            fastlora.load_adapter(model, directory)
        assert all(adapted_layers(model)[name].A is A for name, A in adapters_before.items())
        assert {m.alpha for m in adapted_layers(model).values()} == {2.0}

    def test_a_model_of_other_shapes(self, directory):
        model = make("net")
        model.blocks[0]["up"] = nn.Linear(6, 12)
        refuses_to_load(model, directory, r"blocks\.0\.up\.lora_A\.weight is \(4, 8\), expected \(4, 6\)")

    def test_memory_that_cannot_be_had(self, directory, monkeypatch):
        """The last allocation fails: nothing has changed by then."""

        def fail(*args, **kwargs):
            raise MemoryError("no memory")

        monkeypatch.setattr(FusedLoRALinear, "reset_lora_parameters", fail)
        refuses_to_load(plain(), directory, "no memory", MemoryError)
        monkeypatch.undo()
        monkeypatch.setattr(adapters, "_empty_adapter", fail)
        refuses_to_load(other_rank(), directory, "no memory", MemoryError)

    @pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
    def test_an_unreadable_file(self, name, directory, monkeypatch):
        (directory / name).unlink()
        (directory / name).mkdir()
        refuses_to_load(plain(), directory, name, FileNotFoundError)

    def test_base_weights_that_peft_has_trained(self, tmp_path):
        """PEFT compares the ends of names, after it has put a base_layer into each of its own."""
        model = Net()
        model.layer = model.head
        del model.head
        config = LoraConfig(**lora(target_modules=["up"], modules_to_save=["layer"]))
        get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path)
        match = r"trained base weights of blocks\.\{0..1\}\.up, which are frozen.* ends in layer.*rename"
        refuses_to_load(model, tmp_path, match)


# Loading into models of all kinds


class TestLoading:
    def test_into_a_plain_model(self, directory):
        model = make("net")
        weight = model.blocks[0]["up"].weight
        fastlora.load_adapter(model, directory)
        assert list(adapted_layers(model)) == ["blocks.0.up", "blocks.1.up"]
        assert model.blocks[0]["up"].weight is weight
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            "blocks.0.up.A",
            "blocks.0.up.B",
            "blocks.1.up.A",
            "blocks.1.up.B",
            "head.weight",
            "head.bias",
        }
        with fastlora.disable_adapter(model):
            assert torch.equal(outputs(model), outputs(make("net")))

    def test_in_place_so_that_optimizers_go_on(self, directory):
        model = prepared()
        model.train()
        parameters = dict(model.named_parameters())
        optimizer = torch.optim.AdamW([p for p in parameters.values() if p.requires_grad], lr=0.1)
        addresses = {name: p.data_ptr() for name, p in parameters.items()}
        fastlora.load_adapter(model, directory)
        assert all(p is parameters[n] and p.data_ptr() == addresses[n] for n, p in model.named_parameters())
        layer = model.blocks[0]["up"]
        assert (layer.rank, layer.alpha, layer.dropout) == (4, 4.0, 0.0)
        assert model.training
        loaded = {n: p.detach().clone() for n, p in parameters.items()}
        assert torch.equal(loaded["blocks.0.up.B"], load_file(directory / WEIGHTS)[UP])
        model(torch.randn(6, 8)).square().sum().backward()
        optimizer.step()
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, loaded[n])}
        assert changed == {n for n, p in parameters.items() if p.requires_grad}

    def test_whole_numbers_become_the_layers_floats(self, directory, tmp_path):
        change_config(directory, lora_dropout=1, lora_alpha=8, r=4)
        for model in (plain(), prepared()):
            fastlora.load_adapter(model, directory)
            layer = model.blocks[0]["up"]
            assert (type(layer.rank), type(layer.alpha), type(layer.dropout)) == (int, float, float)
            fastlora.save_adapter(model, tmp_path / "out")
            assert '"lora_dropout": 1.0,' in (tmp_path / "out" / CONFIG).read_text()

    def test_another_rank_makes_new_parameters(self, directory):
        model = other_rank()
        before = dict(model.named_parameters())
        fastlora.load_adapter(model, directory)
        assert_same_adapter(model, PeftModel.from_pretrained(make("net"), directory))
        for name, parameter in model.named_parameters():
            new = name.endswith((".A", ".B"))
            assert (parameter is before[name]) == (not new), name
            assert isinstance(parameter, nn.Parameter)
            assert parameter.requires_grad == before[name].requires_grad
        assert_same_outputs(model, PeftModel.from_pretrained(make("net"), directory))

    def test_layers_added_to_those_there(self, directory):
        model = fastlora.apply_lora(make("net"), ["blocks.1.up"], 4)
        kept = model.blocks[1]["up"].A
        fastlora.load_adapter(model, directory)
        assert model.blocks[1]["up"].A is kept
        assert_same_outputs(model, PeftModel.from_pretrained(make("net"), directory))

    def test_keeps_the_dtype_of_prepared_adapters(self, directory):
        model = fastlora.apply_lora(make("net").bfloat16(), ["up"], 4, modules_to_save=["head"])
        fastlora.load_adapter(model, directory)
        theirs = load_file(directory / WEIGHTS)[UP]
        assert torch.equal(model.blocks[0]["up"].B, theirs.bfloat16())

    def test_switching_between_adapters(self, directory, tmp_path):
        model = prepared()
        first = outputs(model)
        fastlora.save_adapter(model, tmp_path / "first")
        kept = dict(model.named_parameters())
        fastlora.load_adapter(model, directory)
        second = outputs(model)
        assert not torch.allclose(first, second)
        for _ in range(2):
            assert torch.equal(outputs(fastlora.load_adapter(model, tmp_path / "first")), first)
            assert torch.equal(outputs(fastlora.load_adapter(model, directory)), second)
        assert all(p is kept[n] for n, p in model.named_parameters())

    def test_adapters_made_in_inference_mode(self, directory, tmp_path):
        """PyTorch does not let them change outside of it: they get new parameters, as with another rank."""
        fastlora.save_adapter(prepared(), tmp_path)
        model = make("net")
        with torch.inference_mode():
            fastlora.load_adapter(model, directory)
        assert model.blocks[0]["up"].A.is_inference()
        fastlora.load_adapter(model, tmp_path)
        assert same_outputs(model, fastlora.load_adapter(make("net"), tmp_path))
        assert not any(parameter.is_inference() for parameter in model.parameters())

    @pytest.mark.parametrize("name", ["A", "B"])
    def test_one_adapter_whose_rows_share_memory(self, directory, name):
        """A layer gets both anew where one of them cannot be written in place."""
        model = fastlora.load_adapter(make("net"), directory)
        layer = model.blocks[0]["up"]
        own = getattr(layer, name)
        setattr(layer, name, nn.Parameter(own.detach()[:1].expand_as(own)))
        fastlora.load_adapter(model, directory)
        assert same_outputs(model, fastlora.load_adapter(make("net"), directory))

    def test_new_parameters_of_another_rank_stay_frozen(self, directory):
        model = other_rank()
        model.blocks[0]["up"].A.requires_grad_(False)
        fastlora.load_adapter(model, directory)
        layer = model.blocks[0]["up"]
        assert layer.rank == 4
        assert (layer.A.requires_grad, layer.B.requires_grad) == (False, True)

    def test_a_saved_module_that_cannot_be_written(self, directory):
        model = fastlora.load_adapter(make("net"), directory)
        model.head.bias = nn.Parameter(torch.zeros(1).expand(3))
        before = outputs(model)
        with pytest.raises(ValueError, match=r"load_adapter: .*head\.bias cannot be written in place"):
            fastlora.load_adapter(model, directory)
        assert torch.equal(outputs(model), before)

    def test_what_cannot_change_outside_inference_mode(self, directory):
        state = fastlora.adapter_state_dict(prepared())
        model = make("net")
        with torch.inference_mode():
            fastlora.load_adapter(model, directory)
        before = outputs(model)
        with pytest.raises(ValueError, match=r"blocks\.\{0..1\}\.up\.A.* made in inference mode"):
            fastlora.load_adapter_state_dict(model, state)
        assert torch.equal(outputs(model), before)

    def test_a_warning_that_is_an_error_comes_last(self, tmp_path):
        model = fastlora.apply_lora(tied_llama(True), QV, rank=2, alpha=0.5, modules_to_save=["lm_head"])
        fastlora.save_adapter(shake(model), tmp_path)
        other = tied_llama(True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match="lm_head shared"):
                fastlora.load_adapter(other, tmp_path)
        for name, tensor in fastlora.adapter_state_dict(other).items():
            assert torch.equal(tensor, fastlora.adapter_state_dict(model)[name]), name

    @pytest.mark.parametrize("up", ["_orig_mod.body.up", "body._orig_mod.up"])
    @pytest.mark.parametrize("form", ["ends", "names", "expression"])
    def test_peft_around_a_compiled_model(self, form, up, tmp_path):
        """Its file keeps the wrapper's name; PEFT reads it only into a model compiled alike."""

        def made():
            torch.manual_seed(5)
            body = nn.Sequential(OrderedDict(up=nn.Linear(4, 4)))
            return nn.Sequential(OrderedDict(body=body, out=nn.Linear(4, 2)))

        base, out = made(), "out"
        if up.startswith("body"):
            base.body = torch.compile(base.body, backend="eager")
        else:
            base, out = torch.compile(base, backend="eager"), "_orig_mod.out"
        targets = {
            "ends": ["up", "out"],
            "names": [up, out],
            "expression": "|".join(map(re.escape, (up, out))),
        }
        patterns = {"rank_pattern": {"up": 3}, "alpha_pattern": {"^" + re.escape(up): 5}}
        config = LoraConfig(r=2, target_modules=targets[form], **patterns)
        stock = shake(get_peft_model(base, config)).eval()
        stock.save_pretrained(tmp_path)
        assert any("_orig_mod" in name for name in load_file(tmp_path / WEIGHTS))
        ours = fastlora.load_adapter(made(), tmp_path)
        x = torch.randn(3, 4)
        torch.testing.assert_close(ours(x), stock(x))

    def test_switching_in_memory(self, directory, tmp_path):
        model = fastlora.load_adapter(make("net"), directory)
        states, results = [], []
        for _ in range(3):
            shake(model)
            states.append(fastlora.adapter_state_dict(model))
            results.append(outputs(model))
        for state, result in zip(states, results, strict=True):
            fastlora.load_adapter_state_dict(model, state)
            assert torch.equal(outputs(model), result)

    @pytest.mark.parametrize("compiled", ["save", "load", "both"])
    def test_compiled_models(self, compiled, directory, tmp_path):
        model = prepared()
        expected = outputs(model)
        fastlora.save_adapter(torch.compile(model) if compiled != "load" else model, tmp_path)
        plain_bytes = tmp_path / "plain"
        fastlora.save_adapter(model, plain_bytes)
        assert files(tmp_path) == files(plain_bytes)
        target = make("net")
        wrapper = torch.compile(target, backend="eager") if compiled != "save" else target
        assert fastlora.load_adapter(wrapper, tmp_path) is wrapper
        assert torch.equal(outputs(target), expected)
        torch.testing.assert_close(outputs(wrapper), expected)
        assert_same_adapter(target, PeftModel.from_pretrained(make("net"), tmp_path))

    @pytest.mark.parametrize("compiled", [False, True])
    @pytest.mark.parametrize("wrapper", ["DataParallel", "DistributedDataParallel"])
    def test_data_parallel_models(self, wrapper, compiled, tmp_path, one_process):
        """The files have the model's own names; new adapters that the wrapper would not train are refused."""
        model = adapter(1)
        wrapped = getattr(nn.parallel, wrapper)(model)
        fastlora.save_adapter(torch.compile(wrapped) if compiled else wrapped, tmp_path)
        assert same_outputs(PeftModel.from_pretrained(make("net"), tmp_path), model)
        other = getattr(nn.parallel, wrapper)(adapter(2))
        assert fastlora.load_adapter(other, tmp_path) is other
        assert same_outputs(other.module, model)
        plain = getattr(nn.parallel, wrapper)(make("net"))
        if wrapper == "DistributedDataParallel":
            for change in (
                lambda: fastlora.load_adapter(plain, tmp_path),
                lambda: fastlora.apply_lora(plain, ["up"]),
            ):
                with pytest.raises(ValueError, match="adapt the model first, then wrap it"):
                    change()
            assert not adapted_layers(plain)
        else:
            assert same_outputs(fastlora.load_adapter(plain, tmp_path).module, model)

    @pytest.mark.parametrize("targets", [["up", "down"], "all-linear"])
    def test_models_that_name_no_embeddings(self, targets, tmp_path):
        """transformers raises NotImplementedError for those of CLIP, say."""

        class Unnamed(Net):
            def get_input_embeddings(self):
                raise NotImplementedError

            get_output_embeddings = get_input_embeddings

        def made():
            torch.manual_seed(5)
            return Unnamed().eval()

        model = shake(fastlora.apply_lora(made(), targets, rank=2))
        fastlora.save_adapter(model, tmp_path)
        assert same_outputs(fastlora.load_adapter(made(), tmp_path), model)

    def test_what_is_trained_but_not_saved_is_named(self, tmp_path):
        model = prepared()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fastlora.save_adapter(model, tmp_path)
        model.blocks[0]["up"].bias.requires_grad_(True)
        model.blocks[1]["down"].weight.requires_grad_(True)
        named = r"blocks\.0\.up\.bias, blocks\.1\.down\.weight are trained, but belong neither"
        with pytest.warns(UserWarning, match=named):
            fastlora.save_adapter(model, tmp_path)

    def test_a_model_of_speech_has_no_task(self, tmp_path):
        """PEFT's forward for sequence to sequence passes input_ids."""
        model = make("t5")
        fastlora.apply_lora(model, ["q"], rank=2)
        fastlora.save_adapter(model, tmp_path / "text")
        model.main_input_name = "input_features"
        fastlora.save_adapter(model, tmp_path / "speech")
        kinds = [json.loads((tmp_path / n / CONFIG).read_text())["task_type"] for n in ("text", "speech")]
        assert kinds == ["SEQ_2_SEQ_LM", None]

    @pytest.mark.parametrize("arguments", ["input_ids, attention_mask=None, labels=None", "**batch"])
    def test_a_model_that_does_not_take_what_peft_passes_has_no_task(self, arguments, tmp_path):
        model = make("bert")
        forward = model.forward
        names = {"forward": forward}
        call = (
            "**batch" if "batch" in arguments else "input_ids, attention_mask=attention_mask, labels=labels"
        )
        exec(f"def own(self, {arguments}): return forward({call})", names)
        kind = type("MyForSequenceClassification", (type(model),), {"forward": names["own"]})
        model.__class__ = kind
        fastlora.apply_lora(model, ["query"], rank=2, modules_to_save=["classifier"])
        fastlora.save_adapter(model, tmp_path)
        assert config_of(tmp_path)["task_type"] == (None if "labels" in arguments else "SEQ_CLS")

    def test_a_decoder_alone_is_not_sequence_to_sequence(self, tmp_path):
        """Models of images and text are called ForConditionalGeneration too."""
        model = fastlora.apply_lora(make("t5"), ["q"], rank=2)
        model.config.is_encoder_decoder = False
        fastlora.save_adapter(model, tmp_path)
        assert config_of(tmp_path)["task_type"] is None

    def test_models_behind_checkpoint_wrappers(self, tmp_path):
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

        model = adapter(1)
        wanted = outputs(model)
        model.blocks[0]["up"] = checkpoint_wrapper(model.blocks[0]["up"])
        model.head = checkpoint_wrapper(model.head)
        fastlora.save_adapter(model, tmp_path)
        assert not any("wrapped" in name for name in load_file(tmp_path / WEIGHTS))
        torch.testing.assert_close(outputs(fastlora.load_adapter(make("net"), tmp_path)), wanted)
        other = make("net")
        other.blocks[0]["up"] = checkpoint_wrapper(other.blocks[0]["up"])
        torch.testing.assert_close(outputs(fastlora.load_adapter(other, tmp_path)), wanted)

    def test_models_with_compiled_parts(self, tmp_path):
        model = prepared()
        fastlora.save_adapter(model, tmp_path / "a")
        expected = outputs(model)
        model.blocks[0]["up"] = torch.compile(model.blocks[0]["up"], backend="eager")
        model.head = torch.compile(model.head, backend="eager")
        fastlora.save_adapter(model, tmp_path / "b")
        assert files(tmp_path / "a") == files(tmp_path / "b")
        shake(model)
        fastlora.load_adapter(model, tmp_path / "a")
        torch.testing.assert_close(outputs(model), expected)

    def test_a_layer_that_is_compiled_by_itself_is_refused(self, directory):
        """The wrapper would go on calling the layer that was replaced."""
        model = make("net")
        model.blocks[0]["up"] = torch.compile(model.blocks[0]["up"], backend="eager")
        refuses_to_load(model, directory, "compile after adapting")

    def test_a_layer_under_two_names(self, tmp_path):
        """PEFT adapts the first name alone, and so says the file; here a layer is one layer."""

        def twice():
            model = make("net")
            model.again = model.blocks[0]["up"]
            return model

        stock = shake(get_peft_model(twice(), LoraConfig(**lora(target_modules=["up"]))))
        stock.save_pretrained(tmp_path)
        model = fastlora.load_adapter(twice(), tmp_path)
        assert_same_adapter(model, stock)
        assert model.again is model.blocks[0]["up"]

    def test_sharded_parameters(self, directory, tmp_path):
        from torch.distributed.fsdp import fully_shard

        model = prepared()
        fastlora.save_adapter(model, tmp_path / "plain")
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
        )
        try:
            mesh = torch.distributed.init_device_mesh("cpu", (1,))
            sharded = fully_shard(model, mesh=mesh)
            assert type(sharded.blocks[0]["up"].A).__name__ == "DTensor"
            fastlora.save_adapter(sharded, tmp_path / "sharded")
            assert files(tmp_path / "sharded") == files(tmp_path / "plain")
            parameter = sharded.blocks[0]["up"].B
            fastlora.load_adapter(sharded, directory)
            assert sharded.blocks[0]["up"].B is parameter
            assert torch.equal(parameter.full_tensor(), load_file(directory / WEIGHTS)[UP])
        finally:
            torch.distributed.destroy_process_group()


# Interrupted saving


@pytest.fixture
def one_process():
    """A process group of this process alone."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this PyTorch has no gloo")
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def same_outputs(a, b):
    return torch.allclose(outputs(a), outputs(b), rtol=1e-4, atol=1e-5)


def adapter(seed, rank=4):
    torch.manual_seed(seed)
    return shake(fastlora.apply_lora(make("net"), ["up", "down"], rank, 2.0))


def fill(directory):
    """Other people's files."""
    directory.mkdir(exist_ok=True)
    (directory / "notes.txt").write_text("mine")
    (directory / "runs" / "deep").mkdir(parents=True)
    (directory / "runs" / "deep" / "log").write_text("log")
    (directory / "link").symlink_to("notes.txt")
    (directory / "dangling").symlink_to("nowhere")


def assert_others_kept(directory):
    assert (directory / "notes.txt").read_text() == "mine"
    assert (directory / "runs" / "deep" / "log").read_text() == "log"
    assert os.readlink(directory / "link") == "notes.txt"
    assert os.readlink(directory / "dangling") == "nowhere"


def state_of(directory):
    """The files of the adapter that a directory holds; None if it holds none."""
    return files(directory) if (directory / CONFIG).exists() else None


def fork(work):
    """The process id of a child that does ``work`` and exits with 0, or 70 if it raises."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 70
        try:
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def in_child(work):
    """Exit status of a forked process that does ``work``; negative: the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(fork(work), 0)[1])


def visit_points(root, visit):
    """Call ``visit(n)`` at the n-th point after this process first touches ``root``.

    Points are the lines of adapters.py and atomic.py, and all of the standard library that Python audits:
    opening, renaming, linking and removing files.
    """
    started, visiting, count = False, False, 0

    def point():
        nonlocal visiting, count
        if started and not visiting:
            visiting = True
            visit(count)
            count += 1
            visiting = False

    def audit(event, args):
        nonlocal started
        if event in ("open", "shutil.rmtree") or event.startswith("os."):
            started = started or str(root) in str(args[0])
            point()

    def trace(frame, event, arg):
        if frame.f_code.co_filename not in (adapters.__file__, atomic.__file__):
            return None
        if event == "line":
            point()
        return trace

    sys.addaudithook(audit)
    sys.settrace(trace)


SCENARIOS = ("first", "first beside files", "same config", "other config", "other config, no exchange")


def prepare_scenario(scenario, directory):
    """(model to save, what the directory holds before, what it will hold)"""
    old = None
    new = adapter(2, rank=2 if "other" in scenario else 4)
    if scenario != "first":
        fill(directory)
    if "config" in scenario:
        fastlora.save_adapter(adapter(1), directory)
        old = files(directory)
    wanted = directory.parent / "wanted"
    fastlora.save_adapter(new, wanted)
    return new, old, files(wanted)


class TestInterruptedSaving:
    @pytest.mark.parametrize("scenario", SCENARIOS[:4])
    def test_killed_at_any_point(self, scenario, tmp_path, monkeypatch):
        """A look at the files between any two steps, and a kill at some: what a dead process leaves."""
        # Slow, and a killed process leaves the same files without it.
        monkeypatch.setattr(os, "fsync", lambda descriptor: None)
        directory = tmp_path / "root" / "adapter"
        directory.parent.mkdir()
        new, old, wanted = prepare_scenario(scenario, directory)

        def check():
            state = state_of(directory)
            assert state in (old, wanted), "neither the old adapter nor the new one"
            if scenario != "first":
                assert_others_kept(directory)
            return state

        def watch():
            states, faults = [], []

            def look(n):
                try:
                    states.append(check())
                except (AssertionError, OSError) as fault:
                    faults.append((n, fault))

            visit_points(directory.parent, look)
            fastlora.save_adapter(new, directory)
            sys.settrace(None)
            assert not faults
            # It changes once.
            change = states.index(wanted)
            assert states == [old] * change + [wanted] * (len(states) - change)
            (tmp_path / "points").write_text(f"{change} {len(states)}")

        assert in_child(watch) == 0
        change, count = map(int, (tmp_path / "points").read_text().split())
        assert change > 20
        for n in sorted({*range(0, count, count // 5), change - 1, change, count - 1}):
            self.restore(directory, old)

            def die(n=n):
                at = {n: lambda: os.kill(os.getpid(), signal.SIGKILL)}
                visit_points(directory.parent, lambda n: at.get(n, int)())
                fastlora.save_adapter(new, directory)

            assert in_child(die) == -signal.SIGKILL
            state = check()
            if state:
                fastlora.load_adapter(make("net"), directory)
        fastlora.save_adapter(new, directory)
        assert check() == wanted
        self.assert_clean(directory)

    @staticmethod
    def restore(directory, old):
        for name, contents in zip((CONFIG, WEIGHTS), old or (None, None), strict=True):
            if contents is None:
                (directory / name).unlink(missing_ok=True)
            else:
                (directory / name).write_bytes(contents)

    @staticmethod
    def assert_clean(directory):
        """No scratch file is left, in the directory or beside it."""
        assert not [p for p in directory.parent.rglob("*") if ".fastlora-" in p.name or ".old" in p.name]

    @pytest.mark.parametrize("scenario", SCENARIOS)
    @pytest.mark.parametrize("kill", [True, False], ids=["killed", "no space"])
    def test_stopped_within_a_write(self, scenario, kill, tmp_path, monkeypatch):
        """The limit on a file's size kills the process, or fails the write, in the midst of a file."""
        directory = tmp_path / "root" / "adapter"
        directory.parent.mkdir()
        new, old, wanted = prepare_scenario(scenario, directory)
        if "no exchange" in scenario:
            without_exchange(monkeypatch)
        config, tensors = map(len, wanted)
        assert config < tensors
        for limit in (0, 1, config // 2, config - 1, config, tensors // 2, tensors - 1):

            def work(limit=limit):
                signal.signal(signal.SIGXFSZ, signal.SIG_DFL if kill else signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                if kill:
                    fastlora.save_adapter(new, directory)
                    return
                with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
                    fastlora.save_adapter(new, directory)
                self.assert_clean(directory)

            assert in_child(work) == (-signal.SIGXFSZ if kill else 0)
            assert state_of(directory) == old
            if scenario != "first":
                assert_others_kept(directory)
        fastlora.save_adapter(new, directory)
        assert state_of(directory) == wanted
        self.assert_clean(directory)
        if scenario != "first":
            assert_others_kept(directory)

    @pytest.mark.parametrize("scenario", SCENARIOS)
    @pytest.mark.parametrize("call", ["fsync", "replace", "mkdir", "rename", "write_bytes", "renameat2"])
    def test_an_error_leaves_the_old_adapter_and_no_scratch(self, scenario, call, tmp_path, monkeypatch):
        """Every call of one function fails in its turn; errors after the change may leave the new adapter."""
        directory = tmp_path / "root" / "adapter"
        directory.parent.mkdir()
        new, old, wanted = prepare_scenario(scenario, directory)
        for n in range(30):
            with monkeypatch.context() as patch:
                if "no exchange" in scenario:
                    without_exchange(patch)
                fail_at(patch, call, n)
                error = None
                try:
                    fastlora.save_adapter(new, directory)
                except OSError as caught:
                    error = caught
            if error is None:
                assert state_of(directory) == wanted
                return
            assert error.errno == errno.ENOSPC
            assert state_of(directory) in (old, wanted)
            self.assert_clean(directory)
            if state_of(directory) == wanted:
                self.restore(directory, old)
        pytest.fail("it never came to an end")

    def test_a_read_only_directory(self):
        """In a process without root's rights; the directory's owner may not write either."""
        with tempfile.TemporaryDirectory() as root:
            directory = Path(root) / "adapter"
            fastlora.save_adapter(adapter(1), directory)
            old = files(directory)
            models = {"same": adapter(2), "other": adapter(2, rank=2)}
            directory.chmod(0o555)
            Path(root).chmod(0o777)

            def work():
                if os.geteuid() == 0:
                    os.setuid(65534)
                for model in models.values():
                    with pytest.raises(PermissionError):
                        fastlora.save_adapter(model, directory)
                with pytest.raises(PermissionError):
                    fastlora.save_adapter(models["same"], directory / "sub")

            assert in_child(work) == 0
            assert files(directory) == old
            assert os.listdir(root) == ["adapter"]
            assert sorted(os.listdir(directory)) == [CONFIG, WEIGHTS]
            directory.chmod(0o755)

    def test_a_file_in_the_way(self, tmp_path):
        (tmp_path / "file").write_text("mine")
        for target in (tmp_path / "file", tmp_path / "file" / "sub"):
            with pytest.raises(OSError, match="file"):
                fastlora.save_adapter(adapter(1), target)
        assert (tmp_path / "file").read_text() == "mine"
        assert os.listdir(tmp_path) == ["file"]


def without_exchange(patch):
    """As on a system that cannot swap two directories."""

    class Library:
        def __init__(self, *args, **kwargs):
            pass

    patch.setattr(ctypes, "CDLL", Library)


def fail_at(patch, call, n):
    """Make the n-th call of a function fail for want of space."""
    owner = {"write_bytes": Path, "renameat2": None}.get(call, os)
    count = -1

    def fails():
        nonlocal count
        count += 1
        return count == n

    if owner is None:
        library = ctypes.CDLL(None, use_errno=True)
        if not hasattr(library, "renameat2"):
            return

        class Library:
            def __init__(self, *args, **kwargs):
                pass

            def renameat2(self, *args):
                if fails():
                    ctypes.set_errno(errno.ENOSPC)
                    return -1
                return library.renameat2(*args)

        patch.setattr(ctypes, "CDLL", Library)
        return
    original = getattr(owner, call)

    def replaced(*args, **kwargs):
        if fails():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(*args, **kwargs)

    patch.setattr(owner, call, replaced)


class TestTheDirectory:
    def test_is_made_with_its_parents(self, tmp_path):
        fastlora.save_adapter(adapter(1), str(tmp_path / "a" / "b"))
        assert sorted(os.listdir(tmp_path / "a" / "b")) == [CONFIG, WEIGHTS]

    @pytest.mark.parametrize("scenario", SCENARIOS[1:])
    def test_keeps_other_files_and_its_mode(self, scenario, tmp_path, monkeypatch):
        directory = tmp_path / "adapter"
        new, _, wanted = prepare_scenario(scenario, directory)
        if "no exchange" in scenario:
            without_exchange(monkeypatch)
        directory.chmod(0o750)
        inode = (directory / "runs" / "deep" / "log").stat().st_ino
        with (directory / "runs" / "deep" / "log").open("a") as log:
            fastlora.save_adapter(new, directory)
            log.write(" more")
        assert files(directory) == wanted
        assert (directory / "runs" / "deep" / "log").read_text() == "log more"
        assert (directory / "runs" / "deep" / "log").stat().st_ino == inode
        assert (directory / "notes.txt").read_text() == "mine"
        assert directory.stat().st_mode & 0o777 == 0o750
        assert sorted(os.listdir(tmp_path)) == ["adapter", "wanted"]

    def test_links_to_folders_stay_links(self, tmp_path):
        directory = tmp_path / "adapter"
        new, _, _ = prepare_scenario("other config", directory)
        (directory / "latest").symlink_to("runs")
        fastlora.save_adapter(new, directory)
        assert os.readlink(directory / "latest") == "runs"

    def test_without_a_working_directory(self, tmp_path, monkeypatch):
        new, _, wanted = prepare_scenario("other config", tmp_path / "adapter")
        (tmp_path / "gone").mkdir()
        monkeypatch.chdir(tmp_path / "gone")
        (tmp_path / "gone").rmdir()
        fastlora.save_adapter(new, tmp_path / "adapter")
        assert files(tmp_path / "adapter") == wanted

    def test_copies_where_the_system_has_no_links(self, tmp_path, monkeypatch):
        def refuse(*args, **kwargs):
            raise PermissionError(errno.EPERM, "no links")

        directory = tmp_path / "adapter"
        new, _, wanted = prepare_scenario("other config", directory)
        monkeypatch.setattr(os, "link", refuse)
        fastlora.save_adapter(new, directory)
        assert files(directory) == wanted
        assert_others_kept(directory)

    def test_files_that_come_or_go_meanwhile(self, tmp_path, monkeypatch):
        """Something is written into the directory while it is being replaced, and a file vanishes."""
        directory = tmp_path / "adapter"
        new, _, wanted = prepare_scenario("other config", directory)
        (directory / "vanishing").touch()
        exchange, link = atomic._exchange, os.link

        def meanwhile(scratch, target):
            (directory / "runs" / "late").write_text("late")
            return exchange(scratch, target)

        def vanish(source, target, **kwargs):
            if source.endswith("vanishing"):
                os.unlink(source)
            link(source, target, **kwargs)

        monkeypatch.setattr(atomic, "_exchange", meanwhile)
        monkeypatch.setattr(os, "link", vanish)
        fastlora.save_adapter(new, directory)
        assert files(directory) == wanted
        assert (directory / "runs" / "late").read_text() == "late"
        assert_others_kept(directory)
        assert not (directory / "vanishing").exists()

    @pytest.mark.parametrize("below", [".", "runs/deep"])
    def test_the_working_directory_stays(self, below, tmp_path, monkeypatch):
        directory = tmp_path / "adapter"
        new, _, wanted = prepare_scenario("other config", directory)
        monkeypatch.chdir(directory / below)
        fastlora.save_adapter(new, os.path.relpath(directory))
        assert Path.cwd() == directory / below
        Path("new").touch()
        assert (directory / below / "new").exists()
        assert files(directory) == wanted

    @pytest.mark.parametrize("scenario", SCENARIOS[1:4])
    def test_behind_a_link(self, scenario, tmp_path):
        directory = tmp_path / "adapter"
        new, _, wanted = prepare_scenario(scenario, directory)
        (tmp_path / "alias").symlink_to("adapter")
        fastlora.save_adapter(new, tmp_path / "alias")
        assert (tmp_path / "alias").is_symlink()
        assert files(directory) == wanted

    @pytest.mark.parametrize("scenario", SCENARIOS[1:4])
    def test_an_old_pickled_file_goes_with_its_adapter(self, scenario, tmp_path):
        directory = tmp_path / "adapter"
        new, _, wanted = prepare_scenario(scenario, directory)
        torch.save({}, directory / PICKLED)
        (directory / WEIGHTS).unlink(missing_ok=True)
        fastlora.save_adapter(new, directory)
        assert files(directory) == wanted
        assert not (directory / PICKLED).exists()

    def test_what_interrupted_savers_left_is_removed(self, tmp_path):
        directory = tmp_path / "adapter"
        new, _, wanted = prepare_scenario("same config", directory)
        atomic._scratch(directory).touch()
        folder = atomic._scratch(tmp_path)
        folder.mkdir()
        (folder / WEIGHTS).touch()
        fastlora.save_adapter(new, directory)
        assert files(directory) == wanted
        assert not list(tmp_path.rglob(".fastlora-*"))

    @pytest.mark.parametrize("scenario", SCENARIOS[:4])
    def test_names_that_only_look_like_ours_are_kept(self, scenario, tmp_path):
        directory = tmp_path / "adapter"
        new, _, wanted = prepare_scenario(scenario, directory)
        directory.mkdir(exist_ok=True)
        own = [tmp_path / ".fastlora-venv" / "bin" / "python", directory / ".fastlora-notes.txt"]
        own += [tmp_path / ".fastlora-save-old" / "file", directory / ".fastlora-save-mine"]
        for path in own:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("mine")
        fastlora.save_adapter(new, directory)
        assert files(directory) == wanted
        assert all(path.read_text() == "mine" for path in own)

    @pytest.mark.parametrize("why", ["mount point", "busy", "parent not writable"])
    @pytest.mark.parametrize("old", ["safetensors", "pickled"])
    def test_a_directory_that_cannot_be_replaced(self, why, old, tmp_path, monkeypatch):
        """Then its files are, the config last; a failure before that leaves the old ones."""
        directory = tmp_path / "adapter"
        new, before, wanted = prepare_scenario("other config", directory)
        if old == "pickled":
            torch.save(load_file(directory / WEIGHTS), directory / PICKLED)
            (directory / WEIGHTS).unlink()
        mkdir, replace, calls = os.mkdir, os.replace, []

        def refuse(path, *args, **kwargs):
            if os.path.dirname(path) == str(tmp_path):
                raise PermissionError(errno.EACCES, "not writable", str(path))
            return mkdir(path, *args, **kwargs)

        def busy(scratch, target):
            raise OSError(errno.EBUSY, "busy", str(target))

        if why == "mount point":
            monkeypatch.setattr(os.path, "ismount", lambda path: True)
        elif why == "busy":
            monkeypatch.setattr(atomic, "_exchange", busy)
        else:
            monkeypatch.setattr(os, "mkdir", refuse)

        def failing(source, target):
            raise OSError(errno.ENOSPC, "full", str(target))

        def noted(source, target):
            calls.append((os.path.basename(target), (directory / CONFIG).exists()))
            replace(source, target)

        monkeypatch.setattr(os, "replace", failing)
        with pytest.raises(OSError, match="full"):
            fastlora.save_adapter(new, directory)
        if old == "safetensors":
            assert files(directory) == before
        else:
            assert (directory / CONFIG).read_bytes() == before[0]
            assert (directory / PICKLED).exists()
        monkeypatch.setattr(os, "replace", noted)
        fastlora.save_adapter(new, directory)
        assert calls == [(WEIGHTS, False), (CONFIG, False)]
        assert files(directory) == wanted
        assert not (directory / PICKLED).exists()
        assert_others_kept(directory)
        TestInterruptedSaving.assert_clean(directory)

    def test_without_locks(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "fcntl", None)
        for scenario in SCENARIOS[:4]:
            root = tmp_path / scenario
            root.mkdir()
            new, _, wanted = prepare_scenario(scenario, root / "adapter")
            others = atomic._scratch(root)  # perhaps of a process that is still saving
            others.mkdir()
            fastlora.save_adapter(new, root / "adapter")
            assert files(root / "adapter") == wanted
            assert others.is_dir()


class TestAtOnce:
    """Savers and readers in several processes."""

    @pytest.mark.parametrize("ranks", [(4, 4), (2, 4)], ids=["same config", "other config"])
    @pytest.mark.parametrize("beside", [False, True], ids=["first", "again"])
    def test_two_savers_and_a_reader(self, ranks, beside, tmp_path):
        directory = tmp_path / "root" / "adapter"
        directory.parent.mkdir()
        models = [adapter(seed, rank) for seed, rank in enumerate(ranks)]
        allowed = set()
        for i, model in enumerate(models):
            fastlora.save_adapter(model, tmp_path / str(i))
            loaded = fastlora.load_adapter(make("net"), tmp_path / str(i))
            allowed.add(outputs(loaded).numpy().tobytes())
        if beside:
            fill(directory)
            fastlora.save_adapter(models[0], directory)

        def save(model):
            for _ in range(15):
                fastlora.save_adapter(model, directory)

        running = {fork(lambda model=model: save(model)) for model in models}
        seen = 0
        while running:
            try:
                loaded = fastlora.load_adapter(make("net"), directory)
            except FileNotFoundError:
                assert not beside
                assert seen == 0
            else:
                seen += 1
                assert outputs(loaded).numpy().tobytes() in allowed
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid:
                assert os.waitstatus_to_exitcode(status) == 0
                running.discard(pid)
        assert seen > 3
        TestInterruptedSaving.assert_clean(directory)
        if beside:
            assert_others_kept(directory)

    def test_a_file_replaced_by_an_equal_config_between_the_reads(self, tmp_path, monkeypatch):
        """A, then B, then A again: the config reads the same twice and the weights in between are B's."""
        directory = tmp_path / "adapter"
        a, b = adapter(1, 2), adapter(2, 2)
        for layer in adapted_layers(b).values():
            layer.alpha = 5.0
        fastlora.save_adapter(a, directory)
        read, count = adapters._read_weights, 0

        def switch(path):
            nonlocal count
            count += 1
            if count == 1:
                fastlora.save_adapter(b, directory)
            state = read(path)
            if count == 1:
                fastlora.save_adapter(a, directory)
            return state

        monkeypatch.setattr(adapters, "_read_weights", switch)
        assert torch.equal(outputs(fastlora.load_adapter(make("net"), directory)), outputs(a))
        assert count == 2
