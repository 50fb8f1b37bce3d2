"""What the README tells a reader to type."""

import re
import shlex

import pytest
import torch
from conftest import ROOT

import main
import utils

README = (ROOT / "README.md").read_text()


def test_ci_runs_the_readmes_test_command():
    command = next(line for line in README.splitlines() if "-m pytest" in line and line.startswith("python3 -m venv"))
    assert command.replace("pip install -r", "pip install -q -r") in (ROOT / ".ci" / "run").read_text()


def test_flags_of_the_readme_exist():
    commands = re.findall(r"python main\.py(.*?)(?:`|\n\n|\n```)", README.replace("\\\n", " "))
    assert len(commands) >= 4
    for command in commands:
        if "--aggregator fedavgm" not in command and "--help" not in command:
            main.parse_args(shlex.split(command))
    known = {"help"} | set(vars(main.parse_args([])))
    assert set(re.findall(r"--([a-z_]+)", README)) <= known


def test_worked_strategy():
    """XXX"""
    code = re.search(r"```python\n(def .*?)```", README, re.DOTALL).group(1)
    names = {"sum_over_clients": lambda *terms: [torch.as_tensor(term) for term in terms]}
    exec(code, names)
    state = {}
    assert names["fedavgm"](torch.tensor([1.0]), 3.0, state).item() == pytest.approx(1.0)
    assert names["fedavgm"](torch.tensor([2.0]), 3.0, state).item() == pytest.approx(2.9)
    assert list(utils.AGGREGATORS) == ["fedavg"]  # or else choose another example
