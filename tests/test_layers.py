"""Imports point one way: the layers of the package, read from its source, and what importing it loads."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A module imports those of the layers below its own, at the top of its file or in a function.
LAYERS = (
    ("fastlora.atomic", "fastlora.checks", "fastlora.kernels.configs", "fastlora.masks", "fastlora.paths"),
    ("fastlora.device", "fastlora.dtensors", "fastlora.measured"),
    ("fastlora.flops", "fastlora.reference", "fastlora.roofline"),
    ("fastlora.planner",),
    ("fastlora.ops",),
    ("fastlora.function",),
    ("fastlora.linear",),
    ("fastlora.group",),
    ("fastlora.targets",),
    ("fastlora.surgery",),
    ("fastlora.disable", "fastlora.overview", "fastlora.peft_layer"),
    ("fastlora.adapters", "fastlora.peft"),
    ("fastlora",),
    ("fastlora.demo", "fastlora.tune"),
    ("fastlora.__main__",),
)
LAYER = {module: number for number, layer in enumerate(LAYERS) for module in layer}
PACKAGE = {f"fastlora.{path.stem}": path for path in (ROOT / "fastlora").glob("*.py")}
PACKAGE["fastlora"] = PACKAGE.pop("fastlora.__init__")
KERNELS = {f"fastlora.kernels.{path.stem}": path for path in (ROOT / "kernels").glob("*.py")}


def imports(path):
    """(module, whether inside a function) of each import; of `from package import module`, the module."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    lazy = {node for function in functions for node in ast.walk(function)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((name.name, node in lazy) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}, line {node.lineno}: a relative import"
            for name in node.names:
                full = f"{node.module}.{name.name}"
                yield full if full in PACKAGE or full in KERNELS else node.module, node in lazy


def own_imports(path):
    return [(module, lazy) for module, lazy in imports(path) if module.split(".")[0] == "fastlora"]


@pytest.mark.parametrize("module", sorted(PACKAGE))
def test_package_imports_point_one_way(module):
    assert module in LAYER, f"{module} has no layer: give it one above"
    for imported, lazy in own_imports(PACKAGE[module]):
        if imported.startswith("fastlora.kernels") and imported not in LAYER:
            assert module == "fastlora.ops", f"{module} imports {imported}: only ops launches kernels"
            assert lazy, f"ops imports {imported} outside a function"
        else:
            assert LAYER[imported] < LAYER[module], f"{module} imports {imported}, which is not below it"


@pytest.mark.parametrize("module", sorted(KERNELS))
def test_kernels_import_kernels_alone(module):
    outside = {name for name, _ in own_imports(KERNELS[module])} - set(KERNELS)
    assert not outside, f"{module} imports {outside}"
    if module in ("fastlora.kernels.__init__", "fastlora.kernels.configs"):
        heavy = {name.split(".")[0] for name, _ in imports(KERNELS[module])} & {"torch", "triton"}
        assert not heavy, "every import of fastlora loads this module"


def test_nothing_imports_the_bare_name_kernels():
    """A public package has that name."""
    folders = [ROOT / name for name in ("fastlora", "kernels", "benchmarks", "tests", ".ci")]
    files = [path for folder in folders for path in folder.rglob("*.py")]
    assert len(files) > 20
    for path in files:
        assert "kernels" not in {name.split(".")[0] for name, _ in imports(path)}, path


def test_import_is_light():
    """`import fastlora` loads no Triton and no library of an extra, and asks no CUDA device."""
    code = (
        "import sys, torch\n"
        "asked, before = [], set(sys.modules)\n"
        "for name in ('_lazy_init', 'is_available', 'device_count', 'get_device_properties'):\n"
        "    setattr(torch.cuda, name, lambda *a, name=name, **k: asked.append(name))\n"
        "import fastlora\n"
        "print(asked, *sorted(set(sys.modules) - before))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    asked, *loaded = result.stdout.split()
    assert asked == "[]", "a CUDA device was asked"
    assert {"fastlora.planner", "fastlora.kernels.configs"} <= set(loaded)
    assert not {name.split(".")[0] for name in loaded} & {"triton", "peft", "transformers", "safetensors"}
    kernels = {name for name in loaded if name.startswith("fastlora.kernels.")}
    assert kernels == {"fastlora.kernels.configs"}
    assert not {"fastlora.demo", "fastlora.tune", "fastlora.__main__"} & set(loaded)
