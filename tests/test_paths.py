"""use_path: which mode is in force where."""

import re
import sys

import pytest

from fastlora.paths import current_mode, use_path


def test_nested_and_restored():
    assert current_mode() == "auto"
    with use_path("addmm"):
        assert current_mode() == "addmm"
        with use_path("reference"):
            assert current_mode() == "reference"
        assert current_mode() == "addmm"
    assert current_mode() == "auto"


def test_restored_after_an_exception():
    with pytest.raises(KeyError), use_path("reference"):
        raise KeyError
    assert current_mode() == "auto"


def test_counts_its_references():
    """PyTorch 2.11 drops one more than it takes: without help the process crashes after some blocks."""
    mode = "".join(["add", "mm"])  # an object of our own
    before = sys.getrefcount(mode)
    for _ in range(50):
        with use_path(mode):
            assert current_mode() == "addmm"
    assert before <= sys.getrefcount(mode) <= before + 1


@pytest.mark.parametrize("mode", ["fast", "", "Triton", None, 1])
def test_unknown_mode(mode):
    with pytest.raises(ValueError, match=re.escape(repr(mode))), use_path(mode):
        pytest.fail("the block ran")
    assert current_mode() == "auto"
    with use_path("addmm"):
        with pytest.raises(ValueError, match=r"auto.*triton.*addmm.*reference"):
            use_path(mode).__enter__()
        assert current_mode() == "addmm"
