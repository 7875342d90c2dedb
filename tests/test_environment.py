"""The script that prepares the environment of the make targets. Nothing is installed: pip is a stand-in."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
NO_CPU_BUILD = ["ERROR: No matching distribution found for torch==2.13.0+cpu"]
NO_NETWORK = [
    "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError: unreachable'",
    "ERROR: Could not find a version that satisfies the requirement {name} (from versions: none)",
    "ERROR: No matching distribution found for {name}",
]


@pytest.fixture
def script(tmp_path, monkeypatch):
    """The script as a module, its checkout moved to an empty folder."""
    spec = importlib.util.spec_from_file_location("environment", ROOT / ".ci" / "environment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(module, "VENV", tmp_path / ".venv")
    return module


@pytest.fixture
def pip(script, monkeypatch):
    """Stands in for pip: `calls` are what it was asked for, `failures` {a package: the lines it prints}."""
    fake = SimpleNamespace(calls=[], failures={})

    def pip_install(python, what, log):
        fake.calls.append(what)
        failing = next((lines for package, lines in fake.failures.items() if package in what), None)
        return (0, []) if failing is None else (1, failing)

    monkeypatch.setattr(script, "pip_install", pip_install)
    return fake


def message(ending):
    return str(ending.value.code)


class TestRequirements:
    def test_extras_within_extras(self, script):
        found = script.requirements_of("dev")
        names = {script.re.match(r"[\w.-]+", requirement).group(0) for requirement in found}
        assert {"torch", "triton", "peft", "safetensors", "transformers", "pytest", "hypothesis"} <= names
        assert "fastlora-triton" not in names
        assert len(found) == len(set(found))
        assert set(script.requirements_of("peft")) < set(found)

    def test_toml_list(self, script):
        text = 'no = ["x"]\nkey = [\n    "a>=1",\n    # "hidden",\n    "b; x == \'y\'",\n]\none = ["c[d]"]\n'
        assert script.toml_list(text, "key") == ["a>=1", "b; x == 'y'"]
        assert script.toml_list(text, "one") == ["c[d]"]
        with pytest.raises(SystemExit) as ending:
            script.toml_list(text, "absent")
        assert "'absent'" in message(ending)

    def test_unmet(self, script):
        wanted = ["torch>=2.11", "triton>=3.6; platform_system == 'Linux'", "numpy<2.4", "ruff==0.12"]
        has = {"torch": "2.13.0+cpu", "triton": "3.5.1", "numpy": "2.3.5", "ruff": "0.12.0"}
        assert script.unmet(wanted, has, "Linux") == [("triton", "triton>=3.6", "3.5.1")]
        assert script.unmet(wanted, has, "Darwin") == []
        assert script.unmet(["peft>=0.17,<0.20"], {"peft": "0.20"}, "Linux") == [
            ("peft", "peft>=0.17,<0.20", "0.20")
        ]
        assert script.unmet(["tqdm"], {}, "Linux") == [("tqdm", "tqdm", None)]

    @pytest.mark.parametrize(
        ("installed", "sign", "bound", "expected"),
        [
            ("2.11.0+cu128", ">=", "2.11", True),
            ("2.9.1", ">=", "2.11", False),
            ("2.4.0", "<", "2.4", False),
            ("2.3.99", "<", "2.4", True),
            ("3.6.0", "==", "3.6", True),
            ("3.6.1", "==", "3.6", False),
            ("0.18.0rc1", ">=", "0.17", True),
        ],
    )
    def test_holds(self, script, installed, sign, bound, expected):
        assert script.holds(installed, sign, bound) is expected

    def test_release(self, script):
        assert script.release("2.13.0+cpu") == (2, 13)
        assert script.release("10.0.0") == (10,)


class TestExplain:
    def test_last_package_and_its_reason(self, script):
        lines = ["Collecting numpy", "Collecting tokenizers>=0.2 (from transformers)"]
        lines += [
            "  error: can't find Rust compiler",
            "ERROR: Failed to build 'tokenizers' when getting wheels",
        ]
        text = script.explain(["--editable", ".[demo]"], lines)
        assert text.startswith("installing tokenizers failed:")
        assert "can't find Rust compiler" in text

    def test_no_network_and_no_words(self, script):
        text = script.explain(["torch==1"], [line.format(name="torch==1") for line in NO_NETWORK])
        assert text.startswith("installing torch==1 failed:")
        assert "unreachable" in text
        assert "pip said nothing" in script.explain(["--no-deps", "x"], [])


class TestOwnEnvironment:
    @pytest.fixture(autouse=True)
    def machine(self, script, monkeypatch):
        """A Linux without a driver, on which `python -m venv` makes an empty file of the interpreter."""
        self.has_driver = False
        self.commands = []

        def call(command, **kwargs):
            self.commands.append(command)
            if "venv" in command:
                script.venv_python().parent.mkdir(parents=True)
                script.venv_python().touch()
            return 0

        monkeypatch.setattr(script.platform, "system", lambda: "Linux")
        monkeypatch.setattr(script, "has_nvidia_driver", lambda: self.has_driver)
        monkeypatch.setattr(script.subprocess, "call", call)

    def test_second_call_starts_nothing(self, script, pip):
        assert script.prepare_own("dev") == script.venv_python()
        held = [script.TORCH_FOR_CPU, script.TRITON]
        assert pip.calls == [[held[0]], [held[1]], [*held, "--editable", ".[dev]"]]
        pip.calls.clear()
        self.commands.clear()
        assert script.prepare_own("dev") == script.venv_python()
        assert pip.calls == []
        assert self.commands == []

    @pytest.mark.parametrize("change", ["pyproject", "driver", "extra", "removed"])
    def test_installs_again_after(self, script, pip, change):
        script.prepare_own("dev")
        pip.calls.clear()
        if change == "pyproject":
            with (script.ROOT / "pyproject.toml").open("a") as file:
                file.write("\n# changed\n")
        elif change == "removed":
            shutil.rmtree(script.VENV / "bin")
        self.has_driver = change == "driver"
        script.prepare_own("demo" if change == "extra" else "dev")
        assert pip.calls

    def test_ordinary_torch_with_a_driver(self, script, pip):
        self.has_driver = True
        script.prepare_own("dev")
        assert [script.TORCH_FOR_GPU] in pip.calls
        assert all(script.TORCH_FOR_CPU not in what for what in pip.calls)

    def test_no_cpu_build_on_offer(self, script, pip, capsys):
        pip.failures[script.TORCH_FOR_CPU] = NO_CPU_BUILD
        script.prepare_own("dev")
        assert [script.TORCH_FOR_GPU] in pip.calls
        assert "no CPU build" in capsys.readouterr().out

    @pytest.mark.parametrize("package", ["torch==2.13.0+cpu", "triton==3.6.0", ".[dev]"])
    def test_failed_install(self, script, pip, package):
        """Names the package and pip's reason, downloads nothing larger instead, and leaves no stamp."""
        name = "setuptools" if package == ".[dev]" else package
        pip.failures[package] = [line.format(name=name) for line in NO_NETWORK]
        with pytest.raises(SystemExit) as ending:
            script.prepare_own("dev")
        assert f"installing {name} failed" in message(ending)
        assert "unreachable" in message(ending)
        assert str(script.VENV / "install.log") in message(ending)
        assert all(script.TORCH_FOR_GPU not in what for what in pip.calls)
        assert not list(script.VENV.glob("*.stamp"))

    def test_venv_that_cannot_be_made(self, script, pip, monkeypatch):
        monkeypatch.setattr(script.subprocess, "call", lambda command, **kwargs: 1)
        with pytest.raises(SystemExit) as ending:
            script.prepare_own("dev")
        assert "python3-venv" in message(ending)
        assert pip.calls == []

    def test_stamp_text(self, script):
        without = script.stamp_text()
        self.has_driver = True
        assert script.stamp_text() != without
        assert script.stamp_text() == script.stamp_text()


class TestGivenEnvironment:
    @pytest.fixture(autouse=True)
    def interpreter(self, script, monkeypatch):
        """The interpreter that `prepare_given` finds; it has all that the tests need."""
        required = [script.re.match(r"[\w.-]+", r).group(0) for r in script.requirements_of("dev")]
        versions = dict.fromkeys(required, "999")
        versions |= {"torch": "2.11.0+cu128", "triton": "3.6.0", "numpy": "2.3.5", "fastlora-triton": "0.1.0"}
        self.has = {
            "python": [3, 11],
            "system": "Linux",
            "versions": versions,
            "fastlora": str(script.ROOT / "fastlora" / "__init__.py"),
        }
        self.status = 0

        def run(command, **kwargs):
            return SimpleNamespace(returncode=self.status, stdout=json.dumps(self.has))

        monkeypatch.setattr(script.shutil, "which", lambda name: f"/given/{name}")
        monkeypatch.setattr(script.subprocess, "run", run)

    def refusal(self, script, pip):
        with pytest.raises(SystemExit) as ending:
            script.prepare_given("python", "dev")
        assert pip.calls == [], "nothing is installed once anything is refused"
        return message(ending)

    def test_complete(self, script, pip):
        assert script.prepare_given("python", "dev") == "/given/python"
        assert pip.calls == []

    @pytest.mark.parametrize(
        ("package", "installed"),
        [
            ("torch", "2.9.0"),
            ("torch", None),
            ("triton", None),
            ("triton", "3.4.0"),
            ("transformers", "4.40.0"),
        ],
    )
    def test_changes_nothing_that_is_there(self, script, pip, package, installed):
        """Nor adds torch or Triton; a small package that is missing as well does not change that."""
        del self.has["versions"]["hypothesis"], self.has["versions"][package]
        if installed:
            self.has["versions"][package] = installed
        text = self.refusal(script, pip)
        assert f"{package}>=" in text
        assert f"(it has {installed or 'none'})" in text
        assert "hypothesis" not in text

    def test_adds_small_packages(self, script, pip, capsys):
        for name in ("hypothesis", "pytest-benchmark"):
            del self.has["versions"][name]
        script.prepare_given("python", "dev")
        pins = script.ROOT / ".cache" / "installed.txt"
        ((first, constraint, *small),) = pip.calls
        assert (first, constraint) == ("--constraint", str(pins))
        assert {requirement.split(">=")[0] for requirement in small} == {"hypothesis", "pytest-benchmark"}
        held = pins.read_text().splitlines()
        assert {"torch==2.11.0+cu128", "triton==3.6.0", "numpy==2.3.5"} <= set(held)
        assert "fastlora-triton==0.1.0" not in held
        assert "hypothesis" in capsys.readouterr().out

    def test_installs_fastlora_alone(self, script, pip):
        self.has["fastlora"] = None
        script.prepare_given("python", "dev")
        assert pip.calls == [["--no-deps", "--editable", "."]]

    def test_failed_install(self, script, pip):
        del self.has["versions"]["hypothesis"]
        pip.failures["--constraint"] = [line.format(name="hypothesis") for line in NO_NETWORK]
        with pytest.raises(SystemExit) as ending:
            script.prepare_given("python", "dev")
        assert "installing hypothesis failed" in message(ending)

    def test_another_fastlora(self, script, pip):
        self.has["fastlora"] = "/elsewhere/fastlora/__init__.py"
        text = self.refusal(script, pip)
        assert "/elsewhere/fastlora/__init__.py" in text
        assert f"--no-deps --editable {script.ROOT}" in text

    def test_unusable_interpreters(self, script, pip, monkeypatch):
        self.has["python"] = [3, 9]
        assert "is Python 3.9" in self.refusal(script, pip)
        self.status = 1
        assert "failed to list its packages" in self.refusal(script, pip)
        monkeypatch.setattr(script.shutil, "which", lambda name: None)
        assert "PYTHON=python is not a program" in self.refusal(script, pip)


class TestProcesses:
    """The parts that run in other processes, for real."""

    def test_describe(self, script):
        command = [sys.executable, "-c", script.DESCRIBE]
        has = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        assert has["python"] == list(sys.version_info[:2])
        assert {"torch", "pytest"} <= set(has["versions"])
        assert has["fastlora"] is None or Path(has["fastlora"]).name == "__init__.py"

    def test_pip_install(self, script, tmp_path, capsys):
        """The main lines are shown, all are logged, and pip's exit status comes back."""
        python = tmp_path / "python"
        python.write_text('#!/bin/sh\necho Collecting "$7"\necho detail\necho ERROR: no >&2\nexit 7\n')
        python.chmod(0o755)
        status, lines = script.pip_install(python, ["thing"], tmp_path / "log")
        assert status == 7
        assert lines == ["Collecting thing", "detail", "ERROR: no"]
        assert (tmp_path / "log").read_text() == "Collecting thing\ndetail\nERROR: no\n"
        assert capsys.readouterr().out == "Collecting thing\nERROR: no\n"

    def test_modules_run_without_the_current_folder(self, script, tmp_path):
        """So that our folder does not hide the public package `kernels`."""
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").touch()
        (tmp_path / "elsewhere").mkdir()
        (tmp_path / "elsewhere" / "shown.py").write_text(
            "import sys\nfrom importlib.util import find_spec\n"
            "found = find_spec('kernels')\n"
            f"print(__name__, sys.argv[1:], bool(found and found.origin.startswith({str(tmp_path)!r})))\n"
        )
        command = [sys.executable, "-c", script.RUN_MODULE, "shown", "--flag", "-m"]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "elsewhere")}
        result = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        assert result.stdout == "__main__ ['--flag', '-m'] False\n"

    @pytest.mark.parametrize("given", ["", "/given/python"])
    def test_main(self, script, given, monkeypatch):
        """Every argument after the module's name is the module's own."""
        ran = []
        monkeypatch.setattr(script, "prepare_own", lambda extra: Path(f"/own/{extra}"))
        monkeypatch.setattr(script, "prepare_given", lambda python, extra: f"{python}/{extra}")
        monkeypatch.setattr(script.os, "execv", lambda path, arguments: ran.append((path, arguments)))
        monkeypatch.setattr(sys, "argv", ["x", "--python", given, "demo", "fastlora.demo", "--all", "--help"])
        script.main()
        path = f"{given or '/own'}/demo"
        assert ran == [(path, [path, "-c", script.RUN_MODULE, "fastlora.demo", "--all", "--help"])]
