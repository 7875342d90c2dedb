"""Makes this checkout importable as `fastlora` and `fastlora.kernels` without installing it.

    import source_tree; source_tree.install()
    python benchmarks/source_tree.py -m pytest tests -m cuda
    python benchmarks/source_tree.py -m fastlora

The repository root is never added to sys.path: its `kernels` folder would hide a public package of that name
from the libraries that look for it.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"fastlora": ROOT / "fastlora", "fastlora.kernels": ROOT / "kernels"}


class _CheckoutFinder(importlib.abc.MetaPathFinder):
    """Finds the two packages by name; their submodules are found through the packages' own __path__."""

    def find_spec(self, fullname, path=None, target=None):
        directory = PACKAGES.get(fullname)
        if directory is None:
            return None
        return importlib.util.spec_from_file_location(
            fullname, directory / "__init__.py", submodule_search_locations=[str(directory)]
        )


def install() -> None:
    """Let `import fastlora` find this checkout in this process, before any other package of that name.

    Imports nothing itself, so TRITON_INTERPRET can still be set afterwards. Calling it again does nothing.
    RuntimeError if another `fastlora` has already been imported.
    """
    loaded = sys.modules.get("fastlora")
    if loaded is not None and Path(loaded.__file__ or "").resolve().parent != PACKAGES["fastlora"]:
        raise RuntimeError(
            f"another fastlora is imported already: {loaded.__file__}; this checkout is {ROOT}"
        )
    if not any(isinstance(finder, _CheckoutFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _CheckoutFinder())


def main() -> None:
    """Run a module as `python -m` does, with the checkout importable."""
    if len(sys.argv) < 3 or sys.argv[1] != "-m":
        sys.exit("usage: python benchmarks/source_tree.py -m MODULE [ARGUMENT ...]")
    module = sys.argv[2]
    install()
    # Not by argparse, which would confuse a second -m (pytest's own) with the first.
    sys.argv = sys.argv[2:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
