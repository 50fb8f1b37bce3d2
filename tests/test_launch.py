"""Whatever happens to a rank or the program: a clear sentence, nobody left, and a run that goes on to the same bits."""

import argparse
import functools
import os
import random
import re
import signal
import time

import psutil
import pytest
from conftest import read_adapters, write_rows
from runs import (
    DEFAULT_SIGINT,
    FLAGS,
    IGNORED_SIGINT,
    LONG,
    assert_gone,
    assert_same,
    assert_same_rounds,
    find_ranks,
    start,
    start_script,
    wait_for_round,
)
from workers import ask_to_stop, troubled_rank

import main
from fllama import launch, prepare, runlog

slow = pytest.mark.slow
MANY = "--num_clients 6 --clients_per_round 4 "  # two turns a round and rank
FIRST_LINE = r"main.py: finishing the round and saving \((a round takes about \d+ s)\); once more ends it at once"

# -----------------------------------------------------------------------------
# a rank dies, stops, or does not answer


@pytest.mark.parametrize(
    ("trouble", "victim"),
    [
        ("killed in a collective", 1),
        pytest.param("killed in a collective", 0, marks=slow),
        pytest.param("killed in a step", 0, marks=slow),
        pytest.param("killed in a step", 1, marks=slow),
        pytest.param("killed while saving", 0, marks=slow),
        pytest.param("killed while saving", 1, marks=slow),
    ],
)
def test_killed_rank(run_here, undisturbed, tmp_path, trouble, victim):
    code, errors = run_here(target=functools.partial(troubled_rank, trouble, victim))
    killed = rf"main.py: rank {victim} was ended by SIGKILL \(as the kernel does when memory runs out\)"
    assert code == 1 and re.fullmatch(rf"{killed}; --resume goes on after round 1 of 4\n", errors), errors
    assert run_here("--resume") == (0, "")
    assert_same(tmp_path, undisturbed())


@pytest.mark.parametrize(
    ("trouble", "victim", "more", "saved"),
    [
        # after the restart, a client moves to the other rank
        ("stopped in a step", 0, MANY + "--scaffold --prox_mu 0.1 --seed 10", 2),
        pytest.param("stopped in a step", 1, "--lora_variant rolora --aggregator fedadam", 2, marks=slow),
        pytest.param("stopped ahead of the others", 1, "--lora_variant fedsa", 2, marks=slow),
        pytest.param("stopped in a later turn", 1, MANY + "--aggregator median", 2, marks=slow),
        pytest.param("stopped while evaluating", 1, "", 2, marks=slow),
        # the ranks have agreed before what to save; in the next round a client moves to the other rank
        pytest.param("stopped while saving", 0, MANY + "--seed 18", 3, marks=slow),
        pytest.param("stopped while saving", 1, MANY + "--seed 18", 3, marks=slow),
    ],
)
def test_stopped_rank_loses_nothing(run_here, undisturbed, tmp_path, trouble, victim, more, saved):
    """SIGTERM to one rank: all finish the round and save, also where no checkpoint is due, and the run goes on."""
    more += " --save_rounds 1" if "saving" in trouble else " --save_rounds 4"
    code, errors = run_here(f"{more} --restarts 1", functools.partial(troubled_rank, trouble, victim))
    expected = f"main.py: rank {victim} was ended by SIGTERM, and all have saved; restart 1 of 1 after round"
    assert code == 0 and errors == f"{expected} {saved} of 4\n", errors
    assert_same(tmp_path, undisturbed(more))


@slow
def test_a_stop_in_the_last_round_is_none(run_here, undisturbed, tmp_path):
    """There is nothing left to go on with: the run ends as it would have."""
    flags = "--num_rounds 2"
    assert run_here(flags, functools.partial(troubled_rank, "stopped in a step", 1)) == (0, "")
    assert_same(tmp_path, undisturbed(flags))


@slow
@pytest.mark.parametrize("world_size", [1, 3, 4])
@pytest.mark.parametrize("more", ["--local_steps 4 --scaffold --prox_mu 0.1", "--lora_variant fedsa --seed 10"])
def test_goes_on_with_more_or_fewer_ranks(run_here, undisturbed, tmp_path, more, world_size):
    """Two ranks with two clients each were stopped; others take over, to the same bits."""
    code, errors = run_here(MANY + more, functools.partial(troubled_rank, "stopped in a later turn", 1))
    assert code == 1 and "and all have saved; --resume goes on after round 2 of 4" in errors
    assert run_here(f"{MANY}{more} --resume --world_size {world_size}") == (0, "")
    assert_same_rounds(tmp_path, undisturbed(MANY + more), same_ranks=False)


@pytest.mark.parametrize(
    ("trouble", "message"),
    [
        ("exception", "rank 1 failed: RuntimeError: something with a line"),
        pytest.param("no answer in a collective", "; no report from rank 1; --resume", marks=slow),
        pytest.param("slow", "rank 0 failed: TimeoutError: no sign of rank 1 for 0.1 minutes (--timeout)", marks=slow),
        pytest.param("disk full", "; make room on the disk of --output_dir", marks=slow),
        pytest.param(
            "out of memory",
            "OutOfMemoryError: CUDA out of memory; lower --per_device_train_batch_size, then",
            marks=slow,
        ),
    ],
)
def test_failed_rank(run_here, undisturbed, tmp_path, trouble, message):
    code, errors = run_here("--timeout 0.1", target=functools.partial(troubled_rank, trouble, 1))
    assert code == 1 and errors.splitlines()[-1].endswith("; --resume goes on after round 1 of 4")
    assert message in errors.splitlines()[-1]
    if trouble in ("slow", "disk full"):
        assert run_here("--resume") == (0, "")
        assert_same(tmp_path, undisturbed())


# -----------------------------------------------------------------------------
# signals to the program, as users and schedulers send them


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=slow)])
def test_stopped_program(run_here, undisturbed, small_inputs, tmp_path, number, code):
    """The round under way is finished and saved, and a run that goes on comes to the same."""
    process, processes = start(tmp_path, *LONG, *small_inputs, start_new_session=True, preexec_fn=DEFAULT_SIGINT)
    os.killpg(process.pid, number)  # as terminals and schedulers do
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code
    first, last = errors.splitlines()
    assert re.fullmatch(FIRST_LINE, first), errors
    rounds = int(re.fullmatch(r"main.py: stopped; --resume goes on after round (\d+) of 40", last)[1])
    assert 1 <= rounds < 40 and len(runlog.read_rounds(tmp_path)) == rounds
    assert (tmp_path / "checkpoints" / f"round_{rounds:05d}").exists()
    assert_gone(processes)
    assert run_here(" ".join([*LONG, "--resume"])) == (0, "")
    assert_same(tmp_path, undisturbed(" ".join(LONG)))


def test_what_a_request_to_stop_is_answered(tmp_path):
    """How long it takes: as the last round did, all its parts together."""
    args = argparse.Namespace(output_dir=str(tmp_path))
    assert launch.describe_stop(args) == "finishing the round and saving (no round has ended yet)"
    first, last = ({"seconds": {"local": local, "average": 0.5, "eval": 2, "save": 0.1}} for local in (200, 61.2))
    write_rows(tmp_path / "rounds.jsonl", [first, last])
    assert launch.describe_stop(args) == "finishing the round and saving (a round takes about 64 s)"


def test_a_stop_when_the_run_has_just_finished(tmp_path, capsys):
    """It is no run to go on with, but the program ends: a comparison would begin its next run."""
    args = argparse.Namespace(output_dir=str(tmp_path), world_size=1, num_rounds=4)
    run = prepare.Run(model_path="", data_path="")
    before = signal.signal(signal.SIGUSR1, main.stop)
    try:
        with pytest.raises(SystemExit) as stop:
            launch.launch(functools.partial(ask_to_stop, os.getpid()), args, run)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert stop.value.code == 128 + signal.SIGUSR1
    assert capsys.readouterr().err.splitlines()[-1] == "main.py: stopped, and this run has just finished"


@slow
def test_stopped_twice(small_inputs, tmp_path):
    """The second Ctrl-C does not wait for the round, which takes a minute here."""
    process = start_script(tmp_path, [*FLAGS, *small_inputs], 'workers.troubled_rank, "slow", 1')
    wait_for_round(tmp_path / "out", 1, process)
    processes = psutil.Process(process.pid).children(recursive=True)
    time.sleep(1)
    os.killpg(process.pid, signal.SIGINT)
    time.sleep(2)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=15)
    assert process.returncode == 130 and re.fullmatch(f"{FIRST_LINE}\n", errors)
    assert_gone(processes)


@slow
def test_a_rank_that_dies_while_the_others_finish_their_round(small_inputs, tmp_path):
    """One line says that it was asked to stop, one what it goes on from: the last round saved."""
    process = start_script(tmp_path, [*FLAGS, *small_inputs], 'workers.troubled_rank, "slow", 1')
    wait_for_round(tmp_path / "out", 1, process)
    processes = psutil.Process(process.pid).children(recursive=True)
    time.sleep(1)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(1)
    find_ranks(process)[1].kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "main.py: stopped; --resume goes on after round 1 of 4", errors
    assert_gone(processes)


@slow
def test_killed_program_leaves_nobody(small_inputs, run_here, undisturbed, tmp_path):
    """Started as by a job script that uses `&`, with SIGINT ignored; one rank is suspended, and cannot see it end."""
    process, processes = start(tmp_path, *LONG, *small_inputs, preexec_fn=IGNORED_SIGINT)
    find_ranks(process)[1].suspend()
    process.kill()
    assert len(processes) >= 3
    assert_gone(processes)
    process.communicate()
    assert run_here(" ".join([*LONG, "--resume"])) == (0, "")
    assert_same(tmp_path, undisturbed(" ".join(LONG)))


@slow
def test_two_runs_at_once(undisturbed, small_inputs, tmp_path):
    """And SIGINT to ranks, which is nothing: one that it ended would look as if it had finished."""
    runs = [start(tmp_path / name, *LONG, *small_inputs, round_to_reach=0) for name in ("a", "b")]
    wait_for_round(tmp_path / "a", 1, runs[0][0])
    for rank in find_ranks(runs[0][0]):
        rank.send_signal(signal.SIGINT)
    for process, processes in runs:
        assert process.communicate(timeout=120)[1] == "" and process.returncode == 0
        assert_gone(processes)
    for name in ("a", "b"):
        assert_same(tmp_path / name, undisturbed(" ".join(LONG)))


@slow
def test_twenty_random_kills(undisturbed, small_inputs, tmp_path):
    """Of any rank at any time, also while it starts: with --restarts the same bits as of the undisturbed run."""
    flags = "--num_rounds 240 --eval_rounds 240 --save_rounds 2"
    process, _ = start(tmp_path, *flags.split(), *small_inputs, "--restarts", "20", round_to_reach=0)
    choose, kills = random.Random(5), 0
    while kills < 20:
        time.sleep(choose.uniform(0, 1))
        while len(ranks := find_ranks(process)) < 2 and process.poll() is None:  # of this start
            time.sleep(0.01)
        assert process.poll() is None, f"it was finished after {kills} kills"
        choose.choice(ranks).kill()
        kills += 1
        assert_gone(ranks)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert errors.count("was ended by SIGKILL") == errors.count("restart ") == 20
    assert_same(tmp_path, undisturbed(flags))
    assert read_adapters(tmp_path).norm() > 0
