"""What the README tells a reader to type.

python tests/test_readme.py runs its commands as they are, in a fresh copy, with a model in the folder smollm2:
python tests/test_readme.py FOLDER_OF_SMOLLM2
"""

import inspect
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch.distributed.run import get_args_parser

import main
import utils

README = (ROOT / "README.md").read_text()


def test_ci_runs_the_readmes_test_command():
    command = next(line for line in README.splitlines() if "-m pytest" in line and line.startswith("python3 -m venv"))
    assert command.replace("pip install -r", "pip install -q -r") in (ROOT / ".ci" / "run").read_text()


def find_commands():
    """Return the fenced commands that run a script here, in their order; not those that need a GPU or the hub."""
    text = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
    commands = [line.split("&& ")[-1] for line in text.splitlines()]
    return [
        shlex.join([sys.executable, *shlex.split(command)[1:]])
        for command in commands
        if re.match(r"\S*python (main|assets/)", command) and "meta-llama" not in command
    ]


def run_commands(model, shorten):
    """Run the commands of the README in a copy of what git knows, with `model` in the folder smollm2."""
    with tempfile.TemporaryDirectory() as folder:
        names = subprocess.run(
            ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
        )
        for name in names.stdout.splitlines():
            Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, Path(folder, name))
        shutil.copytree(model, Path(folder, "smollm2"))
        for command in map(shorten, find_commands()):
            yield command, subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, timeout=7200)


def shorten(command):
    """Return a command with 2 rounds of 1 step where it trains, and a comparison of two of its runs, once."""
    words = shlex.split(command)
    if "--compare" in words:
        place = words.index("--compare") + 1
        first, *_, last = words[place].split(",")
        words[place] = f"{first},{last}"
    if words[1] == "main.py" and not {"--ask", "--merge", "--dry_run"} & set(words):
        words += "--num_rounds 2 --local_steps 1 --eval_rounds 2 --repeats 1".split()
    return shlex.join(words)


def test_commands_in_a_fresh_copy():
    ran = []
    for command, process in run_commands(main.EMBEDDED_MODEL, shorten):
        assert process.returncode == 0, (command, process.stderr)
        ran.append(command)
    for flag in (
        "main.py --num_rounds 2",
        "--compare",
        "--ask",
        "--merge",
        "--dry_run",
        "smollm2",
        "make_docstring_squad",
    ):
        assert any(flag in command for command in ran), flag


def test_flags_of_the_readme_exist():
    commands = re.findall(r"python main\.py(.*?)(?:`|\n\n|\n```)", README.replace("\\\n", " "))
    assert len(commands) >= 4
    for command in commands:
        if "--aggregator fedexp" not in command and "--help" not in command:
            main.parse_args(shlex.split(command))
    known = {"help"} | set(vars(main.parse_args([]))) | set(vars(get_args_parser().parse_args(["main.py"])))
    assert set(re.findall(r"--([a-z0-9_]+)", re.sub("#SBATCH.*", "", README))) <= known


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


if __name__ == "__main__":
    for command, process in run_commands(sys.argv[1], str):
        print(f"\n$ {command}\n{process.stdout}{process.stderr}exit code {process.returncode}", flush=True)
