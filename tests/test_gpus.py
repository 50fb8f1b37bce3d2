"""The GPUs of a machine, counted, named, tried; and what is said of them."""

import os
import re
import subprocess
import sys
import sysconfig
import threading
import time

import pytest
import torch

import main
from fllama import gpus, launch, machines, model, prepare, report, use


def run_of(num_gpus, machine_of_rank):
    return prepare.Run("model", "data", num_gpus=num_gpus, machine_of_rank=machine_of_rank)


def refused_line(capsys, function, *args):
    with pytest.raises(SystemExit) as stop:
        function(*args)
    assert stop.value.code == 2
    return capsys.readouterr().err.strip()


def test_gpus_are_counted_without_asking_cuda_here(monkeypatch):
    """That would fix what this process sees. Of parts of GPUs (MIG), CUDA itself sees one."""

    def ask_cuda():
        raise AssertionError("CUDA was asked")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "_device_count_nvml", lambda: -1)
    monkeypatch.setattr(torch.cuda, "device_count", ask_cuda)
    monkeypatch.setattr(gpus, "COUNT", "print(3)")
    assert gpus.count_gpus() == 0  # there is no driver here
    monkeypatch.setattr(gpus.ctypes, "CDLL", lambda name: None)
    for program, number in (("print(3)", 3), ("raise RuntimeError('a driver of another version')", 0)):
        monkeypatch.setattr(gpus, "COUNT", program)
        gpus.ask_cuda.cache_clear()
        assert gpus.count_gpus() == number
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1, MIG-2,MIG-3,MIG-4")
    assert gpus.count_gpus() == 4
    gpus.ask_cuda.cache_clear()


@pytest.mark.parametrize(
    ("listed", "seen"),
    [
        (None, ["0", "1"]),
        ("", ["0", "1"]),
        ("2, 5", ["2", "5"]),
        (" GPU-12ab ,GPU-34cd", ["GPU-12ab", "GPU-34cd"]),
        ("MIG-12ab,MIG-34cd,MIG-56ef", ["MIG-12ab", "MIG-34cd"]),
        ("3,4,-1,5", ["3", "4"]),  # CUDA stops at -1
    ],
)
def test_every_rank_sees_one_gpu(monkeypatch, listed, seen):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if listed is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
    before = dict(os.environ)
    found = []
    for rank in range(6):  # on two machines; the third rank of each shares the first GPU
        launch.isolate_rank(rank, None, run_of(2, (0, 0, 0, 1, 1, 1)))
        found.append(os.environ["CUDA_VISIBLE_DEVICES"])
        os.environ.clear()
        os.environ.update(before)
    assert found == 2 * [*seen, seen[0]]


def test_nccl_takes_one_interface(monkeypatch):
    """eth1 alone would also be eth10 and eth11."""
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "to be removed")
        monkeypatch.delenv(name)
    monkeypatch.setattr(machines, "find_interface", lambda address: "eth1")
    machines.choose_interface()
    assert os.environ["GLOO_SOCKET_IFNAME"] == "eth1" and os.environ["NCCL_SOCKET_IFNAME"] == "=eth1"


def test_gpus_that_cannot_be_used(monkeypatch, capsys):
    assert gpus.start_check(0, 1) is None
    gpus.finish_check(None)
    problem = "GPU 1 cannot be used: The NVIDIA driver on your system is too old"
    monkeypatch.setattr(gpus, "PROBE", f"print({problem!r})")
    line = refused_line(capsys, gpus.finish_check, gpus.start_check(2, 2))
    assert line.startswith(f"main.py: error: {problem}; see nvidia-smi") and "\n" not in line
    monkeypatch.setattr(gpus, "PROBE", "import os; os._exit(7)")
    assert "exit code 7" in refused_line(capsys, gpus.finish_check, gpus.start_check(2, 2))
    monkeypatch.setattr(gpus, "PROBE", "pass")
    gpus.finish_check(gpus.start_check(2, 2))
    monkeypatch.setattr(gpus, "PROBE", "import time; time.sleep(60)")
    monkeypatch.setattr(gpus, "PATIENCE", 0.1)
    assert "has not answered" in refused_line(capsys, gpus.finish_check, gpus.start_check(2, 2))


def test_the_gpus_are_tried_before_the_rows_are_tokenized(monkeypatch, capsys, tmp_path):
    def tokenize(*args):
        raise AssertionError("the rows were tokenized")

    monkeypatch.setattr(gpus, "count_gpus", lambda: 1)
    monkeypatch.setattr(gpus, "PROBE", "print('GPU 0 cannot be used: it sleeps')")
    monkeypatch.setattr(prepare, "tokenize", tokenize)
    line = refused_line(capsys, main.main, ["--world_size", "1", "--output_dir", str(tmp_path / "out")])
    assert "it sleeps" in line and not list((tmp_path / "out").iterdir())


def test_triton_needs_a_compiler_and_a_header(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert re.search(r"finds no Python.h: apt install python3.\d+-dev$", refused_line(capsys, gpus.start_check, 1, 1))
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "finds no C compiler" in refused_line(capsys, gpus.start_check, 1, 1)
    (tmp_path / "clang").touch(mode=0o755)
    (tmp_path / "Python.h").touch()
    gpus.check_compiler()


@pytest.mark.parametrize(
    ("num_gpus", "machine_of_rank", "said"),
    [
        (8, (0,) * 8, "8 x A GPU"),
        (4, (0,) * 8, "4 x A GPU, shared by the ranks"),
        (4, (0, 0, 0, 0, 1, 1, 1, 1), "4 x A GPU a machine"),
        (1, (0, 0, 1, 1), "1 x A GPU a machine, shared by the ranks"),
    ],
)
def test_gpus_are_those_of_one_machine(monkeypatch, num_gpus, machine_of_rank, said):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    assert report.describe_device(None, run_of(num_gpus, machine_of_rank)) == said


def test_a_full_gpu_is_no_adapter_that_does_not_fit(finished, monkeypatch, capsys):
    def load_finished(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(model, "load_finished", load_finished)
    with pytest.raises(SystemExit) as stop:
        use.use(main.parse_args(["--ask", "Why?", "--output_dir", str(finished[0])]), 0)
    line = capsys.readouterr().err
    assert stop.value.code == 1 and "CUDA out of memory" in line and "does not fit" not in line


def rank_with_a_thread(rank, args, run):
    """Leave a thread behind for which Python would wait, as destructors of NCCL may for minutes."""
    threading.Thread(target=time.sleep, args=(300,)).start()
    if rank == args.seed:
        raise RuntimeError("this rank fails")


@pytest.mark.parametrize("failing", [0, 7])
def test_nobody_waits_for_a_rank_that_has_reported(run_here, failing):
    started = time.monotonic()
    code, errors = run_here(f"--seed {failing}", rank_with_a_thread)
    assert time.monotonic() - started < 100
    assert code == (1 if failing == 0 else 0) and ("this rank fails" in errors) == (failing == 0)


def test_the_probe_is_a_program():
    """On a machine without GPUs it has nothing to say."""
    hidden = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.run([sys.executable, "-c", gpus.PROBE, "8"], env=hidden, capture_output=True, text=True)
    assert (process.returncode, process.stdout) == (0, "")
