"""The GPUs of this machine: how many there are, whether they can be used, and the compiler that they need."""

import atexit
import ctypes
import functools
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import torch

from fllama.options import fail

PATIENCE = 120  # seconds that a GPU has to answer in
# CUDA is only asked in processes that end: this one may become a rank, which sees one GPU, chosen before CUDA is asked
COUNT = "import torch; print(torch.cuda.device_count())"
PROBE = """
import sys, torch
for number in range(min(torch.cuda.device_count(), int(sys.argv[1]))):
    try:
        torch.ones(1, device=f"cuda:{number}").item()
    except Exception as error:
        print(f"GPU {number} cannot be used:", " ".join(str(error).split())[:300])
        break
"""


def count_gpus():
    """Return how many GPUs this machine shows to us, without asking CUDA in this process."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if listed.strip().startswith("MIG-"):  # a process sees one part of a GPU, however many are listed
        return len(listed.split(","))
    if torch.version.cuda and torch.cuda._device_count_nvml() < 0:  # noqa: SLF001 (no NVML)
        return ask_cuda()
    return torch.cuda.device_count()


@functools.cache
def ask_cuda():
    """Return how many GPUs CUDA sees in another process; 0 at once without its driver."""
    try:
        ctypes.CDLL("libcuda.so.1")  # loaded, not asked
    except OSError:
        return 0
    answer = subprocess.run([sys.executable, "-c", COUNT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return int(answer.stdout or 0)


def visible_gpus(num_gpus):
    """Return what CUDA_VISIBLE_DEVICES has to say to show one GPU, for each of them: a number, or a name."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not listed:
        return [str(number) for number in range(num_gpus)]
    return [part.strip() for part in listed.split(",")][:num_gpus]


def start_check(num_gpus, num_ranks):
    """Refuse a machine without a compiler, and start a process that uses the GPUs of its ranks, for `finish_check`.

    It takes seconds. Returns None without GPUs.
    """
    if not num_gpus:
        return None
    check_compiler()
    command = [sys.executable, "-c", PROBE, str(num_ranks)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    atexit.register(process.kill)  # if the run is refused for something else
    return process


def finish_check(process):
    """Wait for the process of `start_check`, and refuse GPUs that are counted but cannot be used."""
    if process is None:
        return
    try:
        problem = process.communicate(timeout=PATIENCE)[0].strip()
    except subprocess.TimeoutExpired:
        fail(f"a GPU has not answered for {PATIENCE} seconds; see nvidia-smi, or choose others by CUDA_VISIBLE_DEVICES")
    if process.returncode and not problem:
        problem = f"the GPUs cannot be used: a process that asks for them ends with exit code {process.returncode}"
    if problem:
        fail(f"{problem}; see nvidia-smi, choose others by CUDA_VISIBLE_DEVICES, or set it to nothing to use the CPU")


def check_compiler():
    """Refuse a machine on which Triton cannot compile the kernels of TRL's loss: it needs a C compiler and Python.h."""
    if not (os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")):
        fail("on a GPU, Triton compiles kernels and finds no C compiler: apt install build-essential, or set CC")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        fail(f"on a GPU, Triton compiles kernels and finds no Python.h: apt install python{version}-dev")
