"""What the README tells a reader to type."""

import inspect
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
        if "--aggregator fedexp" not in command and "--help" not in command:
            main.parse_args(shlex.split(command))
    known = {"help"} | set(vars(main.parse_args([])))
    assert set(re.findall(r"--([a-z0-9_]+)", README)) <= known


def test_worked_strategy():
    """The README's fedexp on clients with updates (3, 0) and (0, 3), weights 1 and 2, by hand."""
    code = re.search(r"```python\n(def .*?)```", README, re.DOTALL).group(1)
    updates, weights = [torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0])], [1.0, 2.0]
    sums = [torch.tensor([3.0, 6.0]), torch.tensor(3.0), torch.tensor(18.0), torch.tensor(2.0)]
    sent = []

    def sum_over_clients(*terms):
        sent.append([torch.as_tensor(term) for term in terms])
        return sums

    exec(code, names := {"sum_over_clients": sum_over_clients})
    # the mean is (1, 2), its square 5; 18 / (2 * 2 * 5) is below 1, so the step is the mean
    results = [names["fedexp"](update, weight, {}) for update, weight in zip(updates, weights)]
    assert all(result.tolist() == pytest.approx([1.0, 2.0]) for result in results)
    assert all(torch.equal(sum(parts), total) for parts, total in zip(zip(*sent), sums))
    sums[2] = torch.tensor(60.0)  # 60 / 20: three times as far
    assert names["fedexp"](updates[0], 1.0, {}).tolist() == pytest.approx([3.0, 6.0])
    assert "fedexp" not in utils.AGGREGATORS  # or else choose another example


def test_every_strategy_and_variant_is_in_the_readme():
    tables = README.split("## Averaging")[1].split("## Clients and their data")[0]
    for name in [*utils.AGGREGATORS, *utils.LORA_VARIANTS]:
        assert f"`{name}`" in tables
    for name, strategy in utils.AGGREGATORS.items():
        row = next(line for line in tables.splitlines() if line.startswith("|") and f"`{name}`" in line)
        for flag in list(inspect.signature(strategy).parameters)[3:]:
            assert f"`--{flag}`" in row, (name, flag)
