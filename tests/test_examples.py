"""Small models trained with LoRA as a user would: layer, block, encoder, classifier, half precision."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from cases import HALF, bits_equal, dtype_id
from torch import nn

import fastlora
from fastlora import FusedLoRALinear, apply_lora


def counts(model):
    """How many elements are trained and how many are frozen."""
    sizes = {True: 0, False: 0}
    for parameter in model.parameters():
        sizes[parameter.requires_grad] += parameter.numel()
    return SimpleNamespace(trainable=sizes[True], frozen=sizes[False])


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def frozen_values(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def assert_frozen_is(model, before):
    """Bit for bit, and nothing has been unfrozen or frozen since."""
    after = frozen_values(model)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert bits_equal(after[name], value), name


def randomise_adapters(model):
    """As after training: at the zero start an ignored adapter would go unseen."""
    for module in model.modules():
        if isinstance(module, FusedLoRALinear):
            nn.init.normal_(module.A, std=0.5)
    return model


class TestLayer:
    """in 512, out 512, rank 8: 2 * 8 * 512 trained beside 512 * 512 frozen."""

    def test_as_a_layer(self):
        layer = FusedLoRALinear(512, 512, rank=8, bias=False)
        assert counts(layer) == SimpleNamespace(trainable=8192, frozen=262144)

    def test_in_a_model(self):
        model = apply_lora(nn.Sequential(nn.Linear(512, 512, bias=False)), ["0"], rank=8)
        assert counts(model) == SimpleNamespace(trainable=8192, frozen=262144)
        line = "trainable params: 8,192 || all params: 270,336 || trainable%: 3.0303"
        assert line in fastlora.summary(model).splitlines()

    def test_learns_an_update_of_its_rank(self):
        """The frozen layer plus a rank-8 change is the target: the adapter finds it, the weight stays."""
        layer = FusedLoRALinear(64, 64, rank=8, bias=False)
        x = torch.randn(256, 64)
        with torch.no_grad():
            y = layer(x) + x @ (torch.randn(64, 8) @ torch.randn(8, 64) / 64)
        before = frozen_values(layer)
        optimizer = torch.optim.Adam(trainable(layer), lr=0.02)
        losses = train(layer, lambda model: F.mse_loss(model(x), y), optimizer, steps=150)
        assert losses[-1] < 0.02 * losses[0]
        assert_frozen_is(layer, before)


def train(model, loss_of, optimizer, steps):
    """The loss before each step."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class Block(nn.Module):
    """A pre-norm transformer block. x: (batch, length, width) -> the same."""

    def __init__(self, width=32, heads=4, hidden=64, dropout=0.0):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x):
        normed = self.norm1(x)
        # Heads beside the batch: (batch, heads, length, width / heads).
        q, k, v = (
            proj(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2) for proj in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(mixed.transpose(1, 2).flatten(-2))
        hidden = F.gelu(self.up(self.norm2(x)))
        return x + F.dropout(self.down(hidden), self.dropout, self.training)


BLOCK_TARGETS = ["q", "v", "up", "down"]


class TestTransformerBlock:
    def test_what_is_adapted(self):
        block = apply_lora(Block(), BLOCK_TARGETS, rank=4)
        adapted = [name for name, m in block.named_modules() if isinstance(m, FusedLoRALinear)]
        assert adapted == BLOCK_TARGETS
        assert [n for n, p in block.named_parameters() if p.requires_grad] == [
            f"{name}.{parameter}" for name in BLOCK_TARGETS for parameter in ("A", "B")
        ]
        assert counts(block).trainable == 4 * 2 * (32 + 32) + 4 * 2 * (32 + 64)

    def test_starts_as_the_base(self):
        block = Block()
        x = torch.randn(3, 10, 32)
        expected = block(x)
        torch.testing.assert_close(apply_lora(block, BLOCK_TARGETS)(x), expected)

    def test_train_and_eval_and_merged_agree(self):
        block, x = Block(), torch.randn(3, 10, 32)
        base = block(x)
        randomise_adapters(apply_lora(block, BLOCK_TARGETS, rank=4, alpha=2.0))
        y = block.train()(x)
        assert not torch.allclose(y, base, atol=0.1)
        assert torch.equal(block.eval()(x), y)
        with torch.inference_mode():
            assert torch.equal(block(x), y)
        with fastlora.disable_adapter(block):
            torch.testing.assert_close(block(x), base)
        fastlora.merge_lora(block)
        assert not any(isinstance(m, FusedLoRALinear) for m in block.modules())
        torch.testing.assert_close(block(x), y, rtol=1e-4, atol=1e-4)

    def test_gradients_are_those_of_the_formula(self):
        """Against the block with the update written out as a change of each weight, in float64."""
        block = Block().double()
        plain = copy.deepcopy(block)
        randomise_adapters(apply_lora(block, BLOCK_TARGETS, rank=4, alpha=2.0))
        x, dy = (torch.randn(3, 10, 32, dtype=torch.float64) for _ in range(2))
        block(x).backward(dy)
        factors = {
            name: (layer.A.detach().requires_grad_(), layer.B.detach().requires_grad_())
            for name in BLOCK_TARGETS
            for layer in [block.get_submodule(name)]
        }
        weights = {
            f"{name}.weight": plain.get_submodule(name).weight.detach() + 2.0 * A @ B
            for name, (A, B) in factors.items()
        }
        torch.func.functional_call(plain, weights, (x,)).backward(dy)
        for name, (A, B) in factors.items():
            layer = block.get_submodule(name)
            torch.testing.assert_close(layer.A.grad, A.grad)
            torch.testing.assert_close(layer.B.grad, B.grad)


ENCODER = {"d_model": 32, "nhead": 4, "dim_feedforward": 64, "dropout": 0.0, "batch_first": True}
FEED_FORWARD = ["linear1", "linear2"]


def stock_layer():
    return nn.TransformerEncoderLayer(**ENCODER)


def stock_encoder():
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(**ENCODER), num_layers=2)


class TestTransformerEncoder:
    """PyTorch's fast path in eval mode reads the feed-forward weights without calling the layers."""

    @pytest.mark.parametrize("padding", [False, True])
    @pytest.mark.parametrize("build", [stock_layer, stock_encoder])
    def test_train_and_eval_and_merged_agree(self, build, padding):
        model, x = build(), torch.randn(3, 10, 32)
        mask = torch.arange(10) >= torch.tensor([[10], [7], [4]]) if padding else None
        real = slice(None) if mask is None else ~mask

        def run():
            with torch.no_grad():
                return model(x, src_key_padding_mask=mask)[real]

        base = run()
        apply_lora(model, FEED_FORWARD, rank=4, alpha=2.0)
        torch.testing.assert_close(run(), base)
        randomise_adapters(model)
        y = run()
        assert not torch.allclose(y, base, atol=0.1)
        torch.testing.assert_close(model.eval() and run(), y)
        with fastlora.disable_adapter(model):
            torch.testing.assert_close(run(), base)
        fastlora.merge_lora(model)
        torch.testing.assert_close(run(), y, rtol=1e-4, atol=1e-4)

    def test_trains(self):
        model = apply_lora(stock_encoder(), FEED_FORWARD, rank=4)
        x, y = torch.randn(8, 10, 32), torch.randn(8, 10, 32)
        before = frozen_values(model)
        optimizer = torch.optim.Adam(trainable(model), lr=0.01)
        losses = train(model, lambda model: F.mse_loss(model(x), y), optimizer, steps=40)
        assert losses[-1] < 0.9 * losses[0]
        assert_frozen_is(model, before)
        assert all(layer.linear1.A.any() and layer.linear2.A.any() for layer in model.layers)


VOCABULARY, LENGTH, CLASSES = 40, 12, 3


def sequences(count):
    """Token ids (count, length) with their classes: some tokens of one class among words of no meaning."""
    labels = torch.randint(CLASSES, (count,))
    tokens = torch.randint(4 * CLASSES, VOCABULARY, (count, LENGTH))
    marked = torch.rand(count, LENGTH).argsort(1) < 3
    markers = 4 * labels[:, None] + torch.randint(4, (count, LENGTH))
    return torch.where(marked, markers, tokens), labels


class Classifier(nn.Module):
    """tokens: (batch, length) -> scores: (batch, classes)."""

    def __init__(self, width=32):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**ENCODER), num_layers=1)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, tokens):
        return self.head(self.encoder(self.embedding(tokens)).mean(1))


def classify(model, lr, steps=60):
    """The losses of training on sequences, and the accuracy on others."""
    tokens, labels = sequences(256)
    unseen, truth = sequences(256)
    optimizer = torch.optim.Adam(trainable(model), lr=lr)
    losses = train(model.train(), lambda model: F.cross_entropy(model(tokens), labels), optimizer, steps)
    with torch.no_grad():
        return losses, (model.eval()(unseen).argmax(1) == truth).float().mean().item()


class TestSequenceClassifier:
    def test_in_full(self):
        model = Classifier()
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        losses, accuracy = classify(model, lr=0.005)
        assert losses[0] > 0.8
        assert accuracy > 0.95
        assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())

    @pytest.mark.parametrize("dropout", [0.0, 0.1])
    def test_with_lora(self, dropout):
        """Almost all of the accuracy from a tenth of the parameters, the rest bit for bit as it was."""
        model = apply_lora(
            Classifier(), FEED_FORWARD, rank=4, alpha=2.0, dropout=dropout, modules_to_save=["head"]
        )
        assert counts(model) == SimpleNamespace(trainable=2 * 4 * (32 + 64) + 3 * 33, frozen=9824)
        before = frozen_values(model)
        losses, accuracy = classify(model, lr=0.02)
        assert losses[0] > 0.8
        assert accuracy > 0.95
        assert_frozen_is(model, before)
        assert model.encoder.layers[0].linear1.A.any()

    def test_the_adapter_alone_carries_what_was_learned(self):
        """What training changed, copied into a fresh copy of the same base, gives the same scores."""
        base = Classifier()
        model = apply_lora(copy.deepcopy(base), FEED_FORWARD, rank=4, modules_to_save=["head"])
        classify(model, lr=0.02, steps=10)
        fresh = apply_lora(base, FEED_FORWARD, rank=4, modules_to_save=["head"]).eval()
        tokens, _ = sequences(20)
        assert not torch.allclose(fresh(tokens), model(tokens), atol=0.1)
        fastlora.load_adapter_state_dict(fresh, fastlora.adapter_state_dict(model))
        assert torch.equal(fresh(tokens), model(tokens))


def regression(device="cpu", dtype=torch.float32):
    """A block, inputs, and the outputs of the same block with an update that LoRA can learn."""
    block = Block().to(device)
    x = torch.randn(8, 10, 32, device=device)
    teacher = randomise_adapters(apply_lora(copy.deepcopy(block), BLOCK_TARGETS, rank=4))
    with torch.no_grad():
        y = teacher(x)
    return block.to(dtype), x, y


def assert_trained(model, losses, before, adapter_dtype):
    assert losses[-1] < 0.5 * losses[0]
    for parameter in trainable(model):
        assert parameter.dtype == parameter.grad.dtype == adapter_dtype
        assert parameter.grad.isfinite().all()
    assert_frozen_is(model, before)


class TestMixedPrecision:
    STEPS = 60

    @pytest.mark.parametrize("base", [torch.float32, torch.bfloat16], ids=dtype_id)
    def test_autocast(self, base):
        """Products in bfloat16, adapters and their gradients in float32, on a base of either dtype."""
        block, x, y = regression(dtype=base)
        model = apply_lora(block, BLOCK_TARGETS, rank=4, adapter_dtype=torch.float32)
        before = frozen_values(model)
        seen = []
        model.q.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))

        def loss_of(model):
            with torch.autocast("cpu", torch.bfloat16):
                return F.mse_loss(model(x.to(base)).float(), y)

        losses = train(model, loss_of, torch.optim.Adam(trainable(model), lr=0.01), self.STEPS)
        assert_trained(model, losses, before, torch.float32)
        assert set(seen) == {torch.bfloat16}

    @pytest.mark.parametrize("base", HALF, ids=dtype_id)
    def test_half_precision_base_with_float32_adapters(self, base):
        """PEFT's default: the model computes in half precision, the small matrices do not lose updates."""
        block, x, y = regression(dtype=base)
        model = apply_lora(block, BLOCK_TARGETS, rank=4, adapter_dtype=torch.float32)
        before = frozen_values(model)
        losses = train(
            model,
            lambda model: F.mse_loss(model(x.to(base)).float(), y),
            torch.optim.Adam(trainable(model), lr=0.01),
            self.STEPS,
        )
        assert_trained(model, losses, before, torch.float32)
        assert model(x.to(base)).dtype == base

    @pytest.mark.cuda
    @pytest.mark.parametrize("base", [torch.float32, torch.float16], ids=dtype_id)
    def test_grad_scaler(self, base):
        """float16 under autocast with scaled losses, at a scale that overflows at first."""
        block, x, y = regression("cuda", base)
        model = apply_lora(block, BLOCK_TARGETS, rank=4, adapter_dtype=torch.float32)
        before = frozen_values(model)
        optimizer = torch.optim.Adam(trainable(model), lr=0.01)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
        losses = []
        for _ in range(self.STEPS + 40):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.float16):
                loss = F.mse_loss(model(x.to(base)).float(), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            losses.append(loss.item())
        assert_trained(model, losses, before, torch.float32)
        assert 1.0 < scaler.get_scale() < 2.0**40


def test_the_quickstart_of_the_readme(tmp_path, monkeypatch, capsys):
    pytest.importorskip("safetensors")
    readme = Path(__file__).resolve().parents[1] / "README.md"
    code = readme.read_text(encoding="utf-8").partition("## Quickstart\n\n```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, str(readme), "exec"), names)
    assert "trainable params: 4,688 || all params: 23,898" in capsys.readouterr().out
    assert names["loss"] < 1.0
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert not any(isinstance(module, FusedLoRALinear) for module in names["model"].modules())
