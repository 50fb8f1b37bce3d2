"""Runs as programs of their own, with their processes; and whether two runs have come to the same."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import psutil
import torch
from conftest import ROOT, SMALL_RUN, read_adapters

from fllama import basemodel, runlog

FLAGS = [*SMALL_RUN, "--learning_rate", "1e-2"]
LONG = ["--num_rounds", "40", "--eval_rounds", "40", "--save_rounds", "10"]
KEPT_KEYS = """round digest train_loss client_train_loss client_eval_loss learning_rate client_drift clients weights
rejected tokens""".split()  # of rounds.jsonl: what does not depend on time
DEFAULT_SIGINT = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # even under `&`
IGNORED_SIGINT = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)


def start(folder, *flags, round_to_reach=1, prefix=(), **popen):
    """Start a run, wait until a round has been logged; returns the process and all its descendants."""
    command = [*prefix, sys.executable, str(ROOT / "main.py"), *FLAGS, *flags, "--output_dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen)
    wait_for_round(folder, round_to_reach, process)
    return process, psutil.Process(process.pid).children(recursive=True)


def wait_for_round(folder, number, process):
    deadline = time.monotonic() + 120
    while len(runlog.read_rounds(folder)) < number:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)


def start_script(folder, flags, target):
    """Start a run in folder/out, with another target, as a program of its own."""
    (folder / "script.py").write_text(f"""
import functools, signal, main, workers
if __name__ == "__main__":
    signal.signal(signal.SIGINT, main.stop)
    main.main({[*flags, "--output_dir", str(folder / "out")]}, target=functools.partial({target}))
""")
    return subprocess.Popen(
        [sys.executable, str(folder / "script.py")], env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def find_ranks(process):
    """Return the ranks: forked from the server, in the order in which they were started."""
    servers = [child for child in psutil.Process(process.pid).children() if "forkserver" in " ".join(child.cmdline())]
    return sorted((rank for server in servers for rank in server.children()), key=lambda rank: rank.pid)


def assert_gone(processes):
    """Nobody is left after 15 s."""
    _, alive = psutil.wait_procs(processes, timeout=15)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def assert_same(folder, other):
    """What does not depend on time is equal in the logs of two runs, and so are the bits of what they have trained."""
    assert_same_rounds(folder, other)
    for path in other.glob("*_loss.json"):
        assert (folder / path.name).read_bytes() == path.read_bytes()
    before, after = (json.loads((run / "summary.json").read_text()) for run in (folder, other))
    assert all(before[name] == after[name] for name in ("exact_match", "f1", "eval_loss", "tokens"))


def assert_same_rounds(folder, other, same_ranks=True):
    """The same of rounds.jsonl and the adapters alone.

    On another number of ranks, the global held-out rows are shared out otherwise, and their loss is rounded otherwise.
    """
    found, expected = runlog.read_rounds(folder), runlog.read_rounds(other)
    assert len(found) == len(expected) > 0
    for key in KEPT_KEYS:
        assert [entry[key] for entry in found] == [entry[key] for entry in expected], key
    for entry, same in zip(found, expected):
        if same_ranks or same["eval_loss"] is None:
            assert entry["eval_loss"] == same["eval_loss"]
        else:
            assert abs(entry["eval_loss"] - same["eval_loss"]) <= 1e-6 * same["eval_loss"]
    assert torch.equal(read_adapters(folder), read_adapters(other))


def in_order_of_the_model(adapter):
    """Return the tensors of a saved adapter (of one layer) in one vector."""
    names = [f".{name}.lora_{part}." for name in basemodel.LORA_TARGETS for part in "AB"]
    tensors = [tensor.reshape(-1) for name in names for key, tensor in adapter.items() if name in key]
    assert len(tensors) == len(adapter)
    return torch.cat(tensors)
