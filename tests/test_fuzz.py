"""Flags and rows that nobody has thought of: exit code 0, 2 or 3, one line where it is refused, never a traceback."""

import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_three_hundred_runs(small_inputs, tmp_path):
    """In a process of its own: each example goes through main.py, and trains where it is not refused."""
    command = [sys.executable, ROOT / "tests" / "fuzz.py", small_inputs[1], tmp_path]
    process = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert process.returncode == 0, process.stdout[-5000:] + process.stderr[-20_000:]
    examples, trained, refused = map(int, process.stdout.splitlines()[-1].split())
    assert examples >= 300 and trained >= 60 and refused >= 60
