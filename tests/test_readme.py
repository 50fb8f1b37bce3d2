"""What the README and docs/ tell a reader: commands, flags, links, and the strategies to type in.

python tests/test_readme.py FOLDER_OF_SMOLLM2 runs the commands as they are, in a fresh copy, with a model in the folder
smollm2.
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
from fllama import formats, options, runlog
from fllama.collectives import Clients, Communicator, Update

README = (ROOT / "README.md").read_text()
DOCS = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
TEXTS = [README, *DOCS.values()]
LINKED = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "tests" / "benchmarks" / "README.md"]
FEDEXP = re.search(r"```python\n(def fedexp.*?)```", README, re.DOTALL).group(1)


def test_readme_is_a_front_page():
    assert len(README.splitlines()) <= 250


def test_ci_runs_the_readmes_test_command():
    command = next(line for line in README.splitlines() if "-m pytest" in line and line.startswith("python3 -m venv"))
    ci = (ROOT / ".ci" / "run").read_text()
    fast, slow = command.replace("pip install -r", "pip install -q -r") + "\n", ".venv/bin/python -m pytest -m slow\n"
    assert fast in ci and slow in ci
    assert ci.index(fast) < ci.index(slow)


# -----------------------------------------------------------------------------
# links


def anchors_of(text):
    """Return the anchors that GitHub makes of the headings of a page."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


def broken_links(page):
    """Return the relative links of a page whose file or anchor is not there."""
    text = page.read_text()
    targets = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    broken = []
    for target in targets:
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if not file.exists() or anchor and anchor not in anchors_of(file.read_text()):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    assert broken_links(page) == []


def test_broken_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A page: its heading\n[a](#a-page-its-heading) [b](#nowhere) [c](gone.md) [d](https://x.org)\n")
    assert broken_links(page) == ["#nowhere", "gone.md"]


def test_every_page_of_docs_is_linked_from_the_readme():
    for name in DOCS:
        assert f"(docs/{name})" in README or f"(docs/{name}#" in README, name


# -----------------------------------------------------------------------------
# flags, tables and outputs


def test_flags_exist():
    commands = []
    for text in TEXTS:
        commands += re.findall(r"python main\.py(.*?)(?:`|\n\n|\n```)", text.replace("\\\n", " "))
    assert len(commands) >= 10
    for command in commands:
        if "--aggregator fedexp" not in command and "--help" not in command:
            main.parse_args(shlex.split(command))
    known = {"help"} | set(vars(main.parse_args([]))) | set(vars(get_args_parser().parse_args(["main.py"])))
    known.add("shutdown-timeout")  # of torchrun, which has it as shutdown_timeout
    known |= {"rows", "folder"}  # of assets/make_sample_squad.py
    for text in TEXTS:
        assert set(re.findall(r"--([a-z0-9_-]+[a-z0-9])", re.sub("#SBATCH.*", "", text))) <= known


def test_every_strategy_and_variant_is_in_the_docs():
    page = DOCS["averaging.md"]
    for name in [*utils.AGGREGATORS, *utils.LORA_VARIANTS]:
        assert any(line.startswith("|") and f"`{name}`" in line for line in page.splitlines()), name
    for name, strategy in utils.AGGREGATORS.items():
        row = next(line for line in page.splitlines() if line.startswith("|") and f"`{name}`" in line)
        for flag in list(inspect.signature(strategy).parameters)[2:]:
            flag = "dp_epsilon" if flag == "noise_multiplier" else flag  # which it is calibrated from
            assert f"`--{flag}`" in row, (name, flag)


def test_every_partition_and_form_of_rows_is_in_the_docs():
    for name in main.PARTITIONS:
        assert f"| `{name}` |" in DOCS["data.md"]
    for form in formats.FORMS:
        for column in (*form.columns, *form.optional):
            assert f"`{column}`" in DOCS["data.md"], (form.name, column)


def test_every_key_of_a_round_is_in_the_docs():
    keys = re.findall(r'^ +"(\w+)":', inspect.getsource(runlog.round_entry), re.MULTILINE)
    assert {"round", "train_loss", "client_eval_loss", "seconds"} <= set(keys)
    for key in [*keys, "digest"]:
        assert f"`{key}`" in DOCS["outputs.md"], key


def test_every_room_is_in_the_readme():
    for path in (ROOT / "fllama").glob("*.py"):
        assert path.name == "__init__.py" or f"`{path.name}`" in README, path.name


def test_dry_run_says_what_the_docs_show(capsys):
    shown = re.search(r"```text\n(dry run.*?)```", DOCS["costs.md"], re.DOTALL).group(1)
    if torch.cuda.is_available():
        pytest.skip("the docs show the dry run of a machine without GPUs")
    main.main(["--dry_run"])
    assert capsys.readouterr().out == shown


# -----------------------------------------------------------------------------
# strategies to type in


def average(strategy, updates):
    """Return what a strategy makes of updates (a list each) with the weights 1, 2, and so on, in one process."""
    turns = [Update(k, 1.0 + k, torch.tensor(update), residuals={}) for k, update in enumerate(updates)]
    size = len(updates[0])
    clients = Clients(Communicator(0, 1), turns, start=torch.zeros(size), shapes=[(size,)])
    return strategy(clients, {}).tolist()


def test_worked_strategy():
    """The README's fedexp by hand, on two clients with the weights 1 and 2."""
    exec(FEDEXP, names := {})
    # the mean is (1, 2), its square 5; the squares are 18, and 18 / (2 * 2 * 5) is below 1: the step is the mean
    assert average(names["fedexp"], [[3.0, 0.0], [0.0, 3.0]]) == pytest.approx([1.0, 2.0])
    # the mean is (0, 2), its square 4; the squares are 36 + 18, and 54 / (2 * 2 * 4) = 3.375
    assert average(names["fedexp"], [[6.0, 0.0], [-3.0, 3.0]]) == pytest.approx([0.0, 6.75])
    assert "fedexp" not in utils.AGGREGATORS  # or else choose another example


def test_example_of_the_docs(capsys):
    code = re.search(r"```python\n(.*?)```", DOCS["averaging.md"], re.DOTALL).group(1)
    exec(code, {})
    assert capsys.readouterr().out.strip() == re.search(r"print\(.*# (.*)", code).group(1)


def test_exercise_is_one_function():
    """A solution of exercise 2: each coordinate of the mean, times the agreement on its sign."""

    def agreement(clients, state):
        total, weight, signs, count = clients.sum(
            lambda client: (client.weight * client.update, client.weight, client.update.sign(), 1)
        )
        return total / weight * (signs / count).abs()

    # weights 1 and 2: the mean is (2, 0, -1); they agree on the first and the last coordinate
    assert average(agreement, [[4.0, 2.0, -1.0], [1.0, -1.0, -1.0]]) == pytest.approx([2.0, 0.0, -1.0])
    # the mean is (3, 3), and they agree on the first coordinate only
    assert average(agreement, [[3.0, -3.0], [3.0, 6.0]]) == pytest.approx([3.0, 0.0])


# -----------------------------------------------------------------------------
# commands


def find_commands():
    """Return the fenced commands that run a script here, in their order; not those that need a GPU or the hub."""
    commands = []
    for text in TEXTS:
        fenced = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
        for line in fenced.splitlines():
            command = line.split("&& ")[-1]
            if re.match(r"\S*python (main|assets/)", command) and "meta-llama" not in command:
                commands.append(shlex.join([sys.executable, *shlex.split(command)[1:]]))
    return commands


def copy_tree(folder, model):
    """Copy what git knows into `folder`, and `model` into its folder smollm2."""
    listed = ["git", "ls-files", "-co", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    for name in names:
        if (ROOT / name).exists():  # it may be removed, and git does not know yet
            Path(folder, name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, Path(folder, name))
    shutil.copytree(model, Path(folder, "smollm2"))


def run_commands(folder, commands):
    for command in commands:
        yield command, subprocess.run(command, shell=True, cwd=folder, capture_output=True, text=True, timeout=7200)


def shorten(command):
    """Return a command with 2 rounds of 1 step where it trains, two runs of a comparison, one value of a sweep.

    And with fewer rows to write, and fewer canaries.
    """
    words = shlex.split(command)
    for flag, fewer in (("--rows", "500"), ("--canaries", "2")):
        if flag in words:
            words[words.index(flag) + 1] = fewer
    if "--compare" in words:
        place = words.index("--compare") + 1
        first, *_, last = words[place].split(",")
        words[place] = f"{first},{last}"
        words += ["--seeds", "1"]
    for place, word in enumerate(words):
        if word == "--sweep":
            flag, values = words[place + 1].split("=")
            words[place + 1] = flag.split(":")[-1] + "=" + values.split(",")[0]  # the arm may be left out
    while words.count("--sweep") > 1:
        place = words.index("--sweep")
        del words[place : place + 2]
    if words[1] == "main.py" and not {"--ask", "--merge", "--dry_run"} & set(words):
        words += "--num_rounds 2 --local_steps 1 --eval_rounds 2 --repeats 1".split()
    return shlex.join(words)


def type_in_fedexp(folder):
    """Do in a copy what the README says for a new strategy."""
    path = Path(folder, "utils.py")
    text = path.read_text().replace("AGGREGATORS = {\n", f'{FEDEXP}\n\nAGGREGATORS = {{\n    "fedexp": fedexp,\n')
    path.write_text(text)


@pytest.mark.slow
def test_commands_in_a_fresh_copy(tmp_path):
    copy_tree(tmp_path, options.EMBEDDED_MODEL)
    type_in_fedexp(tmp_path)
    fedexp = shlex.join([sys.executable, "main.py", "--aggregator", "fedexp", "--output_dir", "outputs-fedexp"])
    ran = []
    for command, process in run_commands(tmp_path, map(shorten, [*find_commands(), fedexp])):
        assert process.returncode == 0, (command, process.stdout, process.stderr)
        ran.append(command)
    for flag in (
        "main.py --num_rounds 2",
        "--compare",
        "--ask",
        "--merge",
        "--dry_run",
        "--partition column",
        "smollm2",
        "make_docstring_squad",
        "fedexp",
    ):
        assert any(flag in command for command in ran), flag


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        copy_tree(name, sys.argv[1])
        for command, process in run_commands(name, find_commands()):
            print(f"\n$ {command}\n{process.stdout}{process.stderr}exit code {process.returncode}", flush=True)
