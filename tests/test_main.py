"""``python -m fastlora``: the report on machines that need not be here, and the exit statuses."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import fastlora
from fastlora import __main__ as report_module
from fastlora import measured, ops, planner
from fastlora.device import Device
from fastlora.planner import Problem, make_plan

PRODUCTS = {"h": "project", "y": "gemm", "g": "project", "dx": "gemm", "dA": "token_sum", "dB": "token_sum"}
DTYPES = ("float16", "bfloat16", "float32", "float64")


def machine(monkeypatch, *devices, driver="570.1", broken=None):
    """This process believes in these GPUs; a device that is an exception does not answer.

    ``broken``: why no kernel starts on any of them.
    """

    def describe(device):
        found = devices[device.index]
        if isinstance(found, Exception):
            raise found
        return found

    def nvidia_smi(*args, **kwargs):
        if driver is None:
            raise FileNotFoundError("nvidia-smi")
        return SimpleNamespace(stdout=f"{driver}\n" * len(devices))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(devices))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(report_module, "describe", describe)
    monkeypatch.setattr(report_module.subprocess, "run", nvidia_smi)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(ops, "why_no_kernel_starts", lambda device: broken)
    monkeypatch.setattr(ops, "describe", describe)
    monkeypatch.setattr(planner, "_excluded", {})


@pytest.fixture(autouse=True)
def rows_file(tmp_path, monkeypatch):
    """Where this user's measured rows would be; there are none, and other tests' plans are forgotten."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    planner.forget_plans()
    yield measured.user_file()
    planner.forget_plans()


@pytest.fixture
def report(capsys):
    def run():
        assert report_module.main([]) == 0
        return capsys.readouterr().out

    return run


def plans_in(text):
    """{(dtype, tokens): {product: (path, reason)}} as printed, of a report with one table."""
    found, heads = {}, []
    for line in text.splitlines():
        if line.startswith("    "):
            products, path, reason = line[4:24].strip(), line[24:35].strip(), line[35:].strip()
            for product in products.split(",") if "," in products else [products]:
                for head in heads:
                    found[head][product.split()[0]] = (path, reason)
        elif line.startswith("  "):
            dtypes, tokens = line.strip().split("; ")
            heads = [(dtype, int(tokens.split()[0].replace(",", ""))) for dtype in dtypes.split(", ")]
            found.update({head: {} for head in heads})
    return found


H100 = Device("cuda", "NVIDIA H100", 90, 132)
DEVICES = [
    H100,
    Device("cuda", "NVIDIA A10", 86, 72),
    Device("cuda", "NVIDIA B200", 100, 148),
    Device("cuda", "Tesla T4", 75, 40),
    Device("cuda", "of the year 2031", 177, 999),
    Device("cuda", "one multiprocessor", 80, 1),
    Device("cuda", "AMD MI300", 94, 304, rocm=True),
    None,
]


@pytest.mark.parametrize("device", DEVICES, ids=lambda d: d.name if d else "CPU")
def test_every_plan_is_printed(device, monkeypatch, report):
    """Whatever the GPU: each product of each dtype, with the path and the reason that the planner gives."""
    machine(monkeypatch, *([device] if device else []))
    printed = plans_in(report())
    assert set(printed) == {(dtype, tokens) for dtype in DTYPES for tokens in (4096, 1)}
    for (dtype, tokens), products in printed.items():
        problem = Problem(device or Device("cpu"), getattr(torch, dtype), tokens, 4096, 4096, 16)
        plan = make_plan(problem)
        expected = {name: (getattr(plan, name).path, getattr(plan, name).reason) for name in PRODUCTS}
        assert products == expected, (dtype, tokens)


def test_products_carry_the_name_of_their_primitive(monkeypatch, report):
    machine(monkeypatch, H100)
    assert {"triton", "addmm"} <= {path for row in plans_in(report()).values() for path, _ in row.values()}
    for product, primitive in PRODUCTS.items():
        assert f"    {product:<3}{primitive} " in report()


def test_gpus(monkeypatch, report):
    """Each GPU has its line, equal ones share a table, one that does not answer spoils nothing."""
    lost = RuntimeError("CUDA error: device lost\nand a long explanation")
    machine(monkeypatch, H100, H100, lost, DEVICES[1])
    text = report()
    assert "GPU 0        NVIDIA H100, sm_90, 132 multiprocessors\n" in text
    assert "GPU 1        NVIDIA H100, sm_90" in text
    assert "GPU 2        does not answer: CUDA error: device lost\n" in text
    assert "GPU 3        NVIDIA A10, sm_86, 72 multiprocessors" in text
    assert "driver       570.1" in text
    assert text.count("Paths of a layer") == 2
    assert text.count("kernels      can run here") == (2 if planner.has_triton() else 0)


@pytest.mark.skipif(not planner.has_triton(), reason="no kernel is tried without Triton")
def test_a_gpu_on_which_no_kernel_starts(monkeypatch, report):
    machine(monkeypatch, H100, broken="no kernel starts on this GPU: RuntimeError: Failed to find C compiler")
    with pytest.warns(RuntimeWarning, match="no kernel starts .*; the addmm form runs instead"):
        text = report()
    assert "kernels      no kernel starts on this GPU: RuntimeError: Failed to find C compiler" in text
    assert {path for row in plans_in(text).values() for path, _ in row.values()} == {"addmm"}


def test_no_gpu(monkeypatch, report):
    machine(monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "GPU          none: this torch is built without CUDA" in report()
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    text = report()
    assert "GPU          none: torch finds no usable GPU" in text
    assert "driver" not in text
    assert "on CPU:" in text


@pytest.mark.parametrize("failure", [None, subprocess.TimeoutExpired("nvidia-smi", 20)])
def test_driver_that_does_not_tell(failure, monkeypatch, report):
    machine(monkeypatch, H100, driver=None)
    if failure:
        monkeypatch.setattr(report_module.subprocess, "run", lambda *a, **k: (_ for _ in ()).throw(failure))
    assert "driver       unknown" in report()


def test_without_triton_and_peft(monkeypatch, report):
    def absent(name):
        raise report_module.metadata.PackageNotFoundError(name)

    machine(monkeypatch, H100)
    monkeypatch.setattr(report_module.metadata, "version", absent)
    monkeypatch.setattr(planner, "has_triton", lambda: False)
    text = report()
    assert "triton       not installed" in text
    assert "peft" not in text
    assert "safetensors" not in text
    assert "kernels      the triton package is not installed" in text
    assert {row["y"][0] for row in plans_in(text).values()} == {"addmm"}


@pytest.mark.parametrize(("value", "on"), [("1", True), ("0", False)])
def test_interpreter(value, on, monkeypatch, report):
    """NumPy's version matters to the interpreter alone."""
    machine(monkeypatch)
    monkeypatch.setenv("TRITON_INTERPRET", value)
    monkeypatch.setattr(planner, "has_triton", lambda: True)
    monkeypatch.setattr(report_module.metadata, "version", {"numpy": "2.3.0"}.get)
    text = report()
    assert f"interpreter  {'on' if on else 'off'} (TRITON_INTERPRET" in text
    assert ("numpy        2.3.0" in text) is on
    assert ("kernels      can run here" in text) is on


def test_versions(monkeypatch, report):
    installed = {"triton": "3.6.0", "peft": "0.18.1", "safetensors": "0.6.2"}
    machine(monkeypatch)
    monkeypatch.setattr(planner, "has_triton", lambda: True)
    monkeypatch.setattr(report_module.metadata, "version", installed.get)
    lines = dict(line.split(maxsplit=1) for line in report().splitlines()[:6])
    assert lines.pop("python").startswith(".".join(map(str, sys.version_info[:2])))
    assert lines == {"fastlora": fastlora.__version__, "torch": torch.__version__, **installed}


def test_tuned_rows(rows_file, monkeypatch, report):
    """Their number and GPU are printed, and the plans show that they are heeded."""
    machine(monkeypatch, H100)
    assert "tuned        no rows yet" in report()
    monkeypatch.setattr(planner, "has_triton", lambda: True)
    monkeypatch.setattr(measured, "triton_version", lambda: "3.6")
    shape = {"product": "y", "M": 4096, "N": 4096, "K": 4096, "R": 16, "dropout": False}
    shape.update(dict.fromkeys(("dtype", "adapter_dtype"), "bfloat16"))
    rows = [
        measured.Row(gpu="NVIDIA H100", capability=90, triton="3.6", path=path, microseconds=time, **shape)
        for path, time in (("triton", 100.5), ("addmm", 200.0))
    ]
    measured.save_rows(rows_file, rows)
    planner.forget_plans()
    text = report()
    assert f"tuned        2 rows for NVIDIA H100 with Triton 3.6 in {rows_file}\n" in text
    path, reason = plans_in(text)["bfloat16", 4096]["y"]
    assert path == "triton"
    assert "tuned here" in reason
    assert "100.5" in reason


def test_broken_rows(rows_file, monkeypatch, report):
    machine(monkeypatch)
    rows_file.parent.mkdir(parents=True)
    rows_file.write_text("something else")
    assert f"tuned        {rows_file} is ignored: line 1" in report()


def test_exit_statuses(monkeypatch, capsys):
    with pytest.raises(SystemExit) as ending:
        report_module.main(["--help"])
    assert ending.value.code == 0
    assert "tune" in capsys.readouterr().out
    for wrong in (["--shapes"], ["tunes"]):
        with pytest.raises(SystemExit) as ending:
            report_module.main(wrong)
        assert ending.value.code == 2
        assert wrong[0] in capsys.readouterr().err


def test_tune_gets_the_rest_of_the_arguments(monkeypatch):
    """A stand-in for fastlora.tune, as importing the package must not load it."""
    calls = []
    tune = SimpleNamespace(main=lambda arguments: calls.append(arguments) or 3)
    monkeypatch.setitem(sys.modules, "fastlora.tune", tune)
    monkeypatch.setattr(fastlora, "tune", tune, raising=False)
    assert report_module.main(["tune", "--shapes", "1,2,3,4", "--help"]) == 3
    assert calls == [["--shapes", "1,2,3,4", "--help"]]


def test_as_a_command():
    """In a process of its own, which says so if the report loads Triton or PEFT (on a GPU it does)."""
    result = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "fastlora"],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert result.returncode == 0, result.stderr
    assert f"fastlora     {fastlora.__version__}\n" in result.stdout
    assert "Paths of a layer" in result.stdout
    loaded = {line.rsplit("|", 1)[-1].strip() for line in result.stderr.splitlines()}
    assert "fastlora.planner" in loaded
    assert not loaded & {"triton", "peft", "transformers", "safetensors", "fastlora.tune"}
