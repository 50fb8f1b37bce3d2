"""Runs side by side: never two on one GPU. The GPUs are pretended, the processes are real."""

import json
import re
import time
from types import SimpleNamespace

import pytest
import torch

import main
from fllama import sidebyside

# holds the lock of its GPU, as a run would hold its memory; exit code 9 if somebody else has it; asked to stop, it
# takes a moment, as a run that saves does, and ends with 143
HOLD = """import fcntl, os, signal, sys, time
def save(*_):
    time.sleep(0.3)
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
lock = open(os.path.join({folder!r}, "gpu_" + os.environ["CUDA_VISIBLE_DEVICES"]), "a")
try: fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError: sys.exit(9)
print(sys.argv[1:], os.environ.get("HF_TOKEN"), flush=True)
time.sleep(float(sys.argv[1]))
sys.exit(int(sys.argv[2]))"""


def tasks(folder, waits):
    args = SimpleNamespace(hf_token="hf_secret", resume=False, overwrite=True)
    found = []
    for number, (seconds, code) in enumerate(waits):
        words = [str(seconds), str(code), "--hf_token", "hf_secret", "--resume"]
        found.append((f"run {number}", folder / str(number), args, words))
    return found


@pytest.fixture
def holding(tmp_path, monkeypatch):
    """The folder of a project whose main.py only holds a GPU."""
    (tmp_path / "main.py").write_text(HOLD.format(folder=str(tmp_path)))
    monkeypatch.setattr(sidebyside, "ASSETS", tmp_path / "assets")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,7")
    return tmp_path


def test_never_two_on_one_gpu(holding, capsys):
    """Five runs on the GPUs 3 and 7 of this machine; exit codes in their order; the token is on no command line."""
    codes = sidebyside.run_side_by_side(tasks(holding, [(0.9, 0), (0.1, 3), (0.1, 0), (0.1, 2), (0.5, 0)]), 2)
    assert codes == [0, 3, 0, 2, 0]
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert [line for line in lines if "on GPU" in line][:3] == [
        "run 0, on GPU 3",
        "run 1, on GPU 7",
        "run 2, on GPU 7",
    ]
    assert sum("ended" in line for line in lines) == 5 and f"run 1, ended, exit code 3: {holding}/1/run.log" in lines
    assert (holding / "0" / "run.log").read_text() == "['0.9', '0', '--overwrite'] hf_secret\n"
    assert not (holding / "gpu_0").exists()


def test_a_request_to_stop_reaches_them_all(holding, monkeypatch):
    """The runs under way are asked to stop and have time to save, exit code 143; killed, they would end with -9."""
    started, sleep = [], time.sleep

    def start_and_keep(run, gpu, start=sidebyside.start):
        started.append(start(run, gpu))
        return started[-1]

    def stopped(seconds):
        for number in range(2):  # until both are there to be asked
            while not (holding / str(number) / "run.log").read_text():
                sleep(0.05)
        raise SystemExit(143)

    monkeypatch.setattr(sidebyside, "start", start_and_keep)
    monkeypatch.setattr(sidebyside.time, "sleep", stopped)
    with pytest.raises(SystemExit) as stop:
        sidebyside.run_side_by_side(tasks(holding, [(60, 0), (60, 0), (60, 0)]), 2)
    assert stop.value.code == 143 and len(started) == 2
    assert [process.poll() for process in started] == [143, 143]


@pytest.mark.slow
def test_comparison_on_two_gpus(small_inputs, tmp_path, monkeypatch, capsys):
    """Runs of one rank, really made on the CPU; the figures are those of runs in turn, and so are the bits."""
    flags = "--world_size 1 --num_clients 2 --num_rounds 2 --local_steps 1 --eval_rounds 2 --quiet".split()
    flags += [*small_inputs, "--optim", "adamw_torch", "--no-gradient_checkpointing", "--compare", "local,centralized"]
    main.main([*flags, "--repeats", "3", "--output_dir", str(tmp_path / "in_turn")])
    capsys.readouterr()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    main.main([*flags, "--repeats", "3", "--output_dir", str(tmp_path / "side_by_side")])
    busy, most = {}, 0
    for line in capsys.readouterr().out.splitlines():
        begun, ended = re.fullmatch(r"(.*), on GPU (\d)", line), re.fullmatch(r"(comparison .*), ended", line)
        if begun:
            assert begun[2] not in busy.values(), line
            busy[begun[1]] = begun[2]
            most = max(most, len(busy))
        elif ended:
            del busy[ended[1]]
    assert most == 2 and not busy
    one, other = (json.loads((tmp_path / name / "comparison.json").read_text()) for name in ("in_turn", "side_by_side"))
    assert one["differences"] == other["differences"]
    assert [row["clients"] for row in one["rows"]] == [row["clients"] for row in other["rows"]]
