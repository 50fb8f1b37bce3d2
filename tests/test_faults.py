"""Kills: every process is gone, the message names who failed first, and the run goes on with the same bits."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import ROOT, SMALL_RUN, run_main

import utils


def start(folder, *flags, round_to_reach=1, **popen):
    """Start a run, wait until a round has been logged; returns the process and all its descendants."""
    command = [sys.executable, str(ROOT / "main.py"), *SMALL_RUN, *flags, "--output_dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **popen)
    deadline = time.monotonic() + 120
    while len(utils.read_rounds(folder)) < round_to_reach:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    return process, psutil.Process(process.pid).children(recursive=True)


def ranks_of(processes):
    """The two ranks: forked from the server, in the order in which they were started."""
    (server,) = [p for p in processes if any(child in processes for child in p.children())]
    return sorted(server.children(), key=lambda child: child.pid)


def assert_gone(processes):
    _, alive = psutil.wait_procs(processes, timeout=15)
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]


def assert_resumes(folder, finished):
    resumed = run_main(*SMALL_RUN, "--output_dir", folder, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert_same(folder, finished)


def assert_same(folder, finished):
    for key in ("round", "digest", "train_loss", "eval_loss", "learning_rate"):
        assert [entry[key] for entry in utils.read_rounds(folder)] == [
            entry[key] for entry in utils.read_rounds(finished[0])
        ], key


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_rank_is_named_and_a_restart_gives_the_same_bits(tmp_path, finished, rank):
    process, processes = start(tmp_path, "--restarts", "1")
    os.kill(ranks_of(processes)[rank].pid, signal.SIGKILL)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert re.search(rf"rank {rank} was ended by SIGKILL .*; restart 1 of 1 after round \d of 4", errors), errors
    assert_gone(processes)
    assert_same(tmp_path, finished)
    losses = json.loads((tmp_path / "client_1_train_loss.json").read_text())
    assert losses == json.loads((finished[0] / "client_1_train_loss.json").read_text())


def test_killed_rank_without_restarts(tmp_path, finished):
    process, processes = start(tmp_path)
    os.kill(ranks_of(processes)[1].pid, signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert re.fullmatch(r"main.py: rank 1 was ended by SIGKILL .*; --resume goes on after round \d of 4\n", errors), (
        errors
    )
    assert_gone(processes)
    assert_resumes(tmp_path, finished)


def test_killed_parent_leaves_nobody(tmp_path):
    """Started as by a job script that uses `&`: with SIGINT ignored."""
    process, processes = start(tmp_path, preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_IGN))
    process.kill()
    process.wait()
    assert len(processes) >= 3
    assert_gone(processes)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_parent(tmp_path, number, code):
    default = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # even under `&`
    process, processes = start(tmp_path, start_new_session=True, preexec_fn=default)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    _, errors = process.communicate(timeout=15)
    assert process.returncode == code and "Traceback" not in errors
    assert errors.splitlines()[-1] == "main.py: stopped; --resume goes on after the last checkpoint"
    assert_gone(processes)
    assert not list(tmp_path.glob(".prepared-*"))
