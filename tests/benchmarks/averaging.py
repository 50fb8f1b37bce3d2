"""Averaging against one bare all-reduce of the same bytes: seconds and memory. python tests/benchmarks/averaging.py

Seconds: both in turn in one run, P parameters in 448 tensors (as in 32 layers), medians of 7 of the slowest rank.
Memory: the highest that the first call adds to a rank, in vectors of P floats, by processes of their own; the start of
the round and the update are among them.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parents[2]))
import utils
from fllama import launch
from fllama.collectives import Communicator, Update

REPEATS, TENSORS = 7, 448
SIZES = {"SmolLM2-135M, r=16": 4_900_000, "Llama-3.1-8B, r=16": 42_000_000}
STRATEGIES = ["fedavg", "fedavg bfloat16", "fedavg int8", "median", "trimmed_mean", "krum", "fedadam"]
STRATEGIES += ["geometric_median"]


def memory(field):
    """VmRSS (now) or VmHWM (highest since `clear_refs`) of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def make(world_size, rank, size):
    """Return a function that averages a model of about `size` parameters by the strategy of a name."""
    torch.manual_seed(rank)
    model = torch.nn.ParameterList([torch.randn(size // TENSORS) for _ in range(TENSORS)])
    start, states = torch.zeros(size // TENSORS * TENSORS), {name: {} for name in STRATEGIES}
    residuals = {name: {} for name in STRATEGIES}

    def average(name):
        strategy, dtype = (*name.split(), "float32")[:2]
        comm = Communicator(rank, world_size, average_dtype=dtype)
        update = utils.flatten_parameters(model).sub_(start)
        turns = [Update(rank, 1.0 + rank, update, residuals[name])]
        return utils.federated_average(model, world_size, start, turns, utils.AGGREGATORS[strategy], states[name], comm)

    return average


def time_rank(rank, world_size, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)

    def seconds(function):
        dist.barrier()
        start = time.perf_counter()
        function()
        slowest = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
        return slowest.item()

    for label, size in SIZES.items():
        average, flat = make(world_size, rank, size), torch.zeros(size, dtype=torch.float64)
        measured = {"bare": [], **{name: [] for name in STRATEGIES}}
        for _ in range(REPEATS):
            measured["bare"].append(seconds(lambda: dist.all_reduce(flat)))
            for name in STRATEGIES:
                measured[name].append(seconds(lambda: average(name)))
        base, *rest = (statistics.median(values) for values in measured.values())
        if rank == 0:
            for name, value in zip(STRATEGIES, rest):
                row = f"| {label} | {world_size} | {name} | {base:.3f} | {value:.3f} | {value / base:.2f} |"
                print(row, flush=True)
    dist.destroy_process_group()


def memory_rank(rank, world_size, store, name, label):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
    average = make(world_size, rank, SIZES[label])
    dist.all_reduce(torch.zeros(1 << 20))  # gloo's own buffers
    before = memory("VmRSS") - 4 * SIZES[label]  # of which one vector is the start of the round
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    average(name)
    if rank == 0:
        print(f"| {label} | {world_size} | {name} | {(memory('VmHWM') - before) / 4 / SIZES[label]:.1f} |", flush=True)
    dist.destroy_process_group()


def spawn(function, world_size, *args):
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(function, args=(world_size, f"{folder}/store", *args), nprocs=world_size)


if __name__ == "__main__":
    print("| P of | ranks | strategy | vectors of P |\n|---|---|---|---|")
    for name in STRATEGIES:
        spawn(memory_rank, 2, name, "Llama-3.1-8B, r=16")
    os.environ |= launch.KEEP_FREED_MEMORY
    print("| P of | ranks | strategy | bare all-reduce, s | federated_average, s | ratio |\n|---|---|---|---|---|---|")
    for world_size in (2, 4):
        spawn(time_rank, world_size)
