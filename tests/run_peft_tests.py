"""Run PEFT's own test files twice, as they are and with every LoRA linear layer fused, and compare.

    python tests/run_peft_tests.py DIRECTORY [--limit SECONDS] [pytest arguments]

DIRECTORY is the tests folder of PEFT at the installed version, from a checkout or from the source archive
(``pip download --no-deps --no-binary :all: peft==VERSION``); without pytest arguments PEFT's LoRA tests below
run. Those that fail plain (without a network, most that load a model do) count for nothing. Exits with 1 if a
test fails only when fused, or if nothing was fused. PEFT's tests need the packages ``attrs``, ``datasets``,
``diffusers``, ``parameterized`` and ``scipy``.

This file is also the pytest plugin of both runs: it writes one JSON line for every test and, when fusing, one
with the number of forward calls by reason.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import wraps
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

REPORT, FUSE = "FASTLORA_PEFT_REPORT", "FASTLORA_PEFT_FUSE"
DEFAULT = (
    "test_custom_models.py",
    "test_lora_variants.py",
    "test_low_level_api.py",
    "test_tuners_utils.py",
    "test_helpers.py",
    "test_mixed.py",
    "test_lora_conversion.py",
    "test_initialization.py",
    "test_lora_ga.py",
    "test_lora_intruders.py",
    "test_lorafa.py",
    "test_loraplus.py",
    "test_riemannian_lora.py",
    "test_velora.py",
    "test_other.py",
    "-k",
    "lora or Lora or LoRA or LORA or linear or Linear",
)


class _Recorder:
    """The outcome of every test: the worst of set-up, call and teardown."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.forwards: Counter[str] = Counter()
        self.phases: dict[str, list[str]] = {}

    def write(self, record: dict) -> None:
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")

    def pytest_runtest_logreport(self, report):
        self.phases.setdefault(report.nodeid, []).append(report.outcome)
        if report.when == "teardown":
            outcomes = self.phases.pop(report.nodeid)
            worst = next((kind for kind in ("failed", "skipped") if kind in outcomes), "passed")
            self.write({"test": report.nodeid, "outcome": worst})
            # Written as it goes, so that a run that is cut off still counts.
            if self.forwards:
                self.write({"forwards": self.forwards})
                self.forwards.clear()


def _fuse_everything(forwards: Counter[str]) -> None:
    """Every model is fused when PEFT has put adapters into it; every forward call is counted."""
    import peft
    import torch
    from peft.tuners.lora.layer import Linear

    import fastlora
    from fastlora.peft_layer import FusedLinear

    def then_fuse(function):
        @wraps(function)
        def wrapped(model, *args, **kwargs):
            result = function(model, *args, **kwargs)
            # A configuration comes first in inject_adapter_in_model, which returns the model.
            fused = model if isinstance(model, torch.nn.Module) else result
            if any(type(module) is Linear for module in fused.modules()):
                fastlora.fuse_peft(fused)
            return result

        return wrapped

    for owner in (peft.PeftModel, peft.PeftMixedModel):
        for name in ("__init__", "add_adapter", "load_adapter"):
            setattr(owner, name, then_fuse(getattr(owner, name)))
    peft.inject_adapter_in_model = then_fuse(peft.inject_adapter_in_model)
    forward = FusedLinear.forward

    @wraps(forward)
    def counted_forward(self, *args, **kwargs):
        result = forward(self, *args, **kwargs)
        if not torch.compiler.is_compiling():
            forwards[self._fastlora_last] += 1
        return result

    FusedLinear.forward = counted_forward


def _never_wait_for_the_hub() -> None:
    """Without a network every download is tried six times, with half a minute of pauses."""
    import huggingface_hub.utils._http as http

    http.time = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})


def pytest_configure(config: pytest.Config) -> None:
    _never_wait_for_the_hub()
    recorder = _Recorder(os.environ[REPORT])
    if os.environ.get(FUSE):
        _fuse_everything(recorder.forwards)
    config.pluginmanager.register(recorder)


def run(directory: Path, fuse: bool, arguments: list[str], limit: float | None) -> tuple[dict, Counter[str]]:
    """(outcome of each test, number of forwards by reason with "" for fused) of one run."""
    with tempfile.TemporaryDirectory() as folder:
        report, settings = Path(folder, "report.jsonl"), Path(folder, "pytest.ini")
        report.touch()
        settings.write_text("[pytest]\n")  # PEFT's own settings ask for a coverage plugin.
        here = str(Path(__file__).parent)
        environment = {
            **os.environ,
            REPORT: str(report),
            FUSE: "1" if fuse else "",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")])),
        }
        command = [sys.executable, "-m", "pytest", "-p", Path(__file__).stem, "-c", str(settings)]
        command += ["--rootdir", str(directory.parent), "-q", "--tb=short", "-p", "no:cacheprovider"]
        command.append("--continue-on-collection-errors")
        try:
            subprocess.run([*command, *arguments], cwd=directory, env=environment, timeout=limit)
        except subprocess.TimeoutExpired:
            print(f"stopped after {limit:g} seconds")
        outcomes, forwards = {}, Counter()
        for line in report.read_text().splitlines():
            record = json.loads(line)
            if "test" in record:
                outcomes[record["test"]] = record["outcome"]
            else:
                forwards.update(record["forwards"])
        return outcomes, forwards


def version_of(directory: Path) -> str:
    """Of the PEFT that the tests in ``directory`` came with; "unknown" for a folder that stands alone."""
    archive, checkout = directory.parent / "PKG-INFO", directory.parent / "src" / "peft" / "__init__.py"
    for path, pattern in ((archive, r"^Version: (.+)$"), (checkout, r'^__version__ = "(.+)"$')):
        if path.exists() and (found := re.search(pattern, path.read_text(), re.MULTILINE)):
            return found[1]
    return "unknown"


def as_package(directory: Path, folder: str) -> Path:
    """``directory``, or a copy in ``folder`` where it is no package: a source archive lacks __init__.py."""
    if (directory / "__init__.py").exists():
        return directory
    package = Path(shutil.copytree(directory, Path(folder, "tests")))
    (package / "__init__.py").touch()
    return package


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("directory", type=Path, help="PEFT's tests folder")
    parser.add_argument("--limit", type=float, help="seconds after which each run is stopped")
    options, arguments = parser.parse_known_args()
    if not (options.directory / "testing_common.py").exists():
        parser.error(f"{options.directory} is not PEFT's tests folder: it has no testing_common.py")
    arguments = arguments or list(DEFAULT)
    with tempfile.TemporaryDirectory() as folder:
        directory = as_package(options.directory.resolve(), folder)
        plain, _ = run(directory, False, arguments, options.limit)
        fused, forwards = run(directory, True, arguments, options.limit)

    passed = [test for test, outcome in plain.items() if outcome == "passed" and test in fused]
    broken = [test for test in passed if fused[test] != "passed"]
    # In the other calls there is no update, or a variant's own code computes it.
    plain_updates = sum(
        calls
        for reason, calls in forwards.items()
        if reason not in ("merged", "adapters disabled", "no active adapter")
        and not reason.startswith("variant")
    )
    print(f"PEFT {version('peft')}, its tests of {version_of(options.directory.resolve())}")
    print(f"tests that ran in both: {len(plain.keys() & fused.keys())}")
    print(f"passed plain: {len(passed)}")
    print(f"passed fused: {len(passed) - len(broken)}")
    print(f"failed only when fused: {len(broken)}")
    for test in broken:
        print(f"  {test}: {fused[test]}")
    print(f"forward calls with an update of plain LoRA: fused {forwards['']} of {plain_updates}")
    print(f"forward calls: fused {forwards['']} of {forwards.total()}")
    for reason, count in forwards.most_common():
        if reason:
            print(f"  fell back {count}: {reason}")
    return 1 if broken or not forwards[""] else 0


if __name__ == "__main__":
    sys.exit(main())
