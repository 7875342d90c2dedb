"""Prepare the Python environment of a make target, then run a module in it.

    python3 .ci/environment.py [--python PATH] EXTRA MODULE [ARGUMENT ...]

Without --python, `.venv` is created next to the Makefile, and torch, Triton and the requirements of EXTRA (an
optional dependency group of pyproject.toml) are installed there, with the CPU build of torch if there is no
NVIDIA driver. A stamp in `.venv` records what was installed, so that the next call need not run pip.

With --python, that environment is used as it is. torch, Triton and every other package that is already there
are left alone; small packages that are missing are added, and anything else that does not fit is an error
that names it.

Only the standard library is used, in syntax that older Pythons can parse, so that they can report that they
are too old.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
OLDEST_PYTHON = (3, 10)

TRITON = "triton==3.6.0"
TORCH_FOR_CPU = "torch==2.13.0+cpu"
TORCH_FOR_GPU = "torch==2.11.0"  # the release that itself requires Triton 3.6.0
TORCH_ELSEWHERE = "torch==2.13.0"  # macOS, where the ordinary build has no CUDA
NEVER_INSTALLED = ("torch", "triton")  # in an environment given by --python

# Like plain `pytest`, but unlike `python -m pytest`, keep the current folder off the import path: one of our
# folders has the name of a public package, `kernels`, which other libraries look for.
RUN_MODULE = (
    "import runpy, sys; sys.path = [p for p in sys.path if p]; "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)

# The lines of pip's output that are shown; the log has all of them.
SHOWN = ("Collecting", "  Downloading", "  Building", "Successfully", "ERROR", "  ERROR", "WARNING: Retrying")

# Runs inside the given environment to list what it has, without importing any of it.
DESCRIBE = """
import importlib.metadata as metadata, json, platform, sys
from importlib.util import find_spec
sys.path = [p for p in sys.path if p]
versions = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in metadata.distributions()
            if d.metadata["Name"]}
spec = find_spec("fastlora")
print(json.dumps({"python": list(sys.version_info[:2]), "system": platform.system(), "versions": versions,
                  "fastlora": spec and spec.origin}))
"""


def say(message):
    print("fastlora: " + message, flush=True)


def fail(message):
    sys.exit("fastlora: " + message)


# The requirements, as pyproject.toml states them


def requirements_of(extra):
    """The requirement strings of the package and of `extra`, with `fastlora-triton[other]` resolved."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = []
    for requirement in toml_list(text, "dependencies") + toml_list(text, extra):
        nested = re.match(r"fastlora-triton\[(\w+)\]$", requirement)
        found += requirements_of(nested.group(1)) if nested else [requirement]
    return list(dict.fromkeys(found))


def toml_list(text, key):
    """The strings of `key = [...]`. Python 3.10 has no TOML parser, and this is enough here."""
    match = re.search(rf"^{re.escape(key)} = \[(.*?)\]$", text, re.MULTILINE | re.DOTALL)
    if not match:
        fail(f"pyproject.toml has no list called {key!r}")
    lines = [line for line in match.group(1).splitlines() if not line.lstrip().startswith("#")]
    return re.findall(r'"([^"]+)"', "\n".join(lines))


def unmet(requirements, versions, system):
    """(name, requirement, installed version or None) for each requirement that `versions` does not meet."""
    result = []
    for requirement in requirements:
        specifier, _, marker = requirement.partition(";")
        if "Linux" in marker and system != "Linux":
            continue
        name = re.match(r"[\w.-]+", specifier).group(0).lower()
        bounds = re.findall(r"(>=|<|==)\s*([\d.]+)", specifier)
        installed = versions.get(name)
        if installed is None or not all(holds(installed, sign, bound) for sign, bound in bounds):
            result.append((name, specifier.strip(), installed))
    return result


def holds(installed, sign, bound):
    have, want = release(installed), release(bound)
    return {">=": have >= want, "<": have < want, "==": have == want}[sign]


def release(version):
    """'2.13.0+cpu' -> (2, 13): trailing zeros are dropped so that 2.0 equals 2."""
    numbers = [int(n) for n in re.match(r"\d+(\.\d+)*", version).group(0).split(".")]
    while numbers and numbers[-1] == 0:
        numbers.pop()
    return tuple(numbers)


# Installing


def pip_install(python, what, log):
    """Run pip, show its main lines and log all lines. Return (exit status, lines)."""
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off"]
    lines = []
    with open(log, "a", encoding="utf-8") as file:
        process = subprocess.Popen(
            command + what, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for line in process.stdout:
            if line.startswith(SHOWN):
                print(line, end="", flush=True)
            file.write(line)
            lines.append(line.rstrip())
    return process.wait(), lines


def install(python, what, log):
    """Install, or exit with the package that failed and pip's own reason."""
    status, lines = pip_install(python, what, log)
    if status:
        fail(f"{explain(what, lines)}\n  all of pip's output: {log}")


def explain(what, lines):
    """Which package failed and why, from pip's output."""
    package = " ".join(word for word in what if not word.startswith("-"))
    for line in lines:
        for pattern in (
            r"Collecting ([\w.\[\],-]+)",
            r"Building \w+ for ([\w.-]+)",
            r"satisfies the requirement ([\w.-]+)",
            r"No matching distribution found for (\S+)",
            r"Failed to build '?([\w.-]+)",
        ):
            match = re.search(pattern, line)
            if match:
                package = match.group(1)
    retries = [line for line in lines if line.startswith("WARNING: Retrying")][-1:]
    reasons = [line for line in lines if re.match(r"\s*(ERROR|error|\w+(\.\w+)*Error)\b", line)]
    reasons = reasons[-6:] or [line for line in lines if line.strip()][-5:] or ["pip said nothing"]
    return f"installing {package} failed:\n  " + "\n  ".join(retries + reasons)


def has_nvidia_driver():
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def base_python():
    """This Python or, if it is too old, a newer one on the path."""
    if sys.version_info >= OLDEST_PYTHON:
        return sys.executable
    for minor in (13, 12, 11, 10, 14):
        candidate = shutil.which(f"python3.{minor}")
        if candidate and subprocess.call([candidate, "-c", ""], stderr=subprocess.DEVNULL) == 0:
            return candidate
    raise SystemExit(f"fastlora: python3 is {platform.python_version()}; Python 3.10 or newer is needed")


def venv_python():
    return VENV / "bin" / "python"


def make_venv():
    if venv_python().exists():
        if subprocess.call([str(venv_python()), "-c", "import pip"], stderr=subprocess.DEVNULL) == 0:
            return
        say(f"{VENV} is incomplete: starting it afresh")
        shutil.rmtree(VENV)
    base = base_python()
    say(f"making {VENV} with {base}")
    status = subprocess.call([base, "-m", "venv", str(VENV)])
    if status:
        shutil.rmtree(VENV, ignore_errors=True)
        fail(f"{base} -m venv failed (above); Debian and Ubuntu have it in the package python3-venv")


def install_torch(python, log):
    """Install torch and Triton. Return their requirement strings, which pin them afterwards."""
    if platform.system() != "Linux":
        install(python, [TORCH_ELSEWHERE], log)
        return [TORCH_ELSEWHERE]
    torch = TORCH_FOR_GPU
    if has_nvidia_driver():
        say("there is an NVIDIA driver: installing the ordinary build of torch")
    else:
        say("there is no NVIDIA driver: installing the CPU build of torch")
        status, lines = pip_install(python, [TORCH_FOR_CPU], log)
        if status == 0:
            torch = TORCH_FOR_CPU
        elif any(line.startswith("WARNING: Retrying") for line in lines) or not any(
            "No matching distribution found for torch==" in line for line in lines
        ):  # The cause is not a missing CPU build, so a larger download would not help.
            fail(f"{explain([TORCH_FOR_CPU], lines)}\n  all of pip's output: {log}")
        else:
            say("pip's configured indexes offer no CPU build of torch for this Python.")
            say(f"Installing {torch} instead, which may bring some gigabytes of CUDA packages.")
    if torch != TORCH_FOR_CPU:
        install(python, [torch], log)
    install(python, [TRITON], log)
    return [torch, TRITON]


def stamp_text():
    """What an installed environment depends on."""
    parts = [Path(__file__).read_bytes(), (ROOT / "pyproject.toml").read_bytes(), str(ROOT).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest() + (" gpu" if has_nvidia_driver() else " cpu")


def prepare_own(extra):
    """Make `.venv` hold the requirements of `extra`. Return its Python."""
    stamp, text = VENV / f"fastlora-{extra}.stamp", stamp_text()
    if stamp.exists() and stamp.read_text() == text and venv_python().exists():
        return venv_python()
    make_venv()
    log = VENV / "install.log"
    held = install_torch(venv_python(), log)
    install(venv_python(), [*held, "--editable", f".[{extra}]"], log)
    stamp.write_text(text)
    return venv_python()


def prepare_given(python, extra):
    """Check the environment of `python` and add small packages that it lacks. Return its Python."""
    found = shutil.which(python)
    if found is None:
        fail(f"PYTHON={python} is not a program")
    # Links are not resolved: a virtual environment's link leads to the Python that it was made from.
    found = os.path.abspath(found)
    described = subprocess.run([found, "-c", DESCRIBE], stdout=subprocess.PIPE, text=True, cwd="/")
    if described.returncode:
        fail(f"{found} failed to list its packages (above); is it Python 3.10 or newer?")
    has = json.loads(described.stdout)
    if tuple(has["python"]) < OLDEST_PYTHON:
        fail(f"{found} is Python {'.'.join(map(str, has['python']))}; 3.10 or newer is needed")

    missing = unmet(requirements_of(extra), has["versions"], has["system"])
    refused = [m for m in missing if m[2] is not None or m[0] in NEVER_INSTALLED]
    if refused:
        lines = [f"{requirement}   (it has {installed or 'none'})" for _, requirement, installed in refused]
        fail(
            f"{found} does not meet these requirements:\n  " + "\n  ".join(lines) + "\n"
            "torch, Triton and what is installed there already are never changed from here:\n"
            "install them yourself, or leave PYTHON= out, and an environment of its own is made."
        )
    package = ROOT / "fastlora" / "__init__.py"
    if has["fastlora"] and Path(has["fastlora"]).resolve() != package:
        fail(
            f"in {found}, fastlora is the copy at {has['fastlora']}, not this one. To change that:\n"
            f"  {found} -m pip install --no-deps --editable {ROOT}"
        )
    cache = ROOT / ".cache"
    cache.mkdir(exist_ok=True)
    if missing:
        # Pinning every installed version keeps pip from replacing any of them.
        pins = cache / "installed.txt"
        pins.write_text("".join(f"{n}=={v}\n" for n, v in has["versions"].items() if n != "fastlora-triton"))
        small = [requirement for _, requirement, _ in missing]
        say(f"adding to {found}: {', '.join(small)}")
        install(found, ["--constraint", str(pins), *small], cache / "install.log")
    if not has["fastlora"]:
        say(f"installing fastlora itself (editable, without its requirements) into {found}")
        install(found, ["--no-deps", "--editable", "."], cache / "install.log")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--python", default="", help="use this environment instead of .venv")
    parser.add_argument("extra", help="optional dependency group of pyproject.toml")
    parser.add_argument("module", help="module to run, as with python -m")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    python = prepare_given(options.python, options.extra) if options.python else prepare_own(options.extra)
    os.execv(str(python), [str(python), "-c", RUN_MODULE, options.module, *options.arguments])


if __name__ == "__main__":
    main()
