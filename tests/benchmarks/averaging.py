"""Averaging against one bare all-reduce of the same bytes: seconds and memory. python tests/benchmarks/averaging.py

Both are measured in turn in one run, in P parameters in 448 tensors (as in 32 layers); medians of 7. Memory is the
highest that the call adds to a rank, in vectors of P floats. The update and the start of the round are among them.
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
import main
import utils

REPEATS, TENSORS = 7, 448
SIZES = {"SmolLM2-135M, r=16": 4_900_000, "Llama-3.1-8B, r=16": 42_000_000}
STRATEGIES = ["fedavg", "median", "trimmed_mean", "krum", "fedadam"]


def memory(field):
    """VmRSS (now) or VmHWM (highest since `clear_refs`) of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def measure(function):
    """Return the seconds that the slowest rank takes for `function`, and the bytes that it adds at its highest."""
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # forget the highest so far
    before, start = memory("VmRSS"), time.perf_counter()
    result = function()
    seconds, added = time.perf_counter() - start, memory("VmHWM") - before
    del result
    worst = torch.tensor([seconds, float(added)], dtype=torch.float64)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    return worst.tolist()


def rank_main(rank, world_size, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size)
    for label, size in SIZES.items():
        torch.manual_seed(rank)
        model = torch.nn.ParameterList([torch.randn(size // TENSORS) for _ in range(TENSORS)])
        size = size // TENSORS * TENSORS
        state = {}

        def bare():
            flat = torch.zeros(size + 1, dtype=torch.float64)  # what fedavg sends, weight included
            start = time.perf_counter()
            dist.all_reduce(flat)
            return time.perf_counter() - start

        def average(name):
            start = torch.zeros(size)
            return start, utils.federated_average(
                model, world_size, start, 1.0 + rank, utils.AGGREGATORS[name], state.setdefault(name, {})
            )

        measured = {"bare": [], **{name: [] for name in STRATEGIES}}
        for _ in range(REPEATS):
            measured["bare"].append([bare(), 0])
            for name in STRATEGIES:
                measured[name].append(measure(lambda: average(name)))
                if name != "fedadam":
                    state.pop(name)
        if rank == 0:
            base = statistics.median(seconds for seconds, _ in measured.pop("bare"))
            for name, values in measured.items():
                seconds, added = (statistics.median(column) for column in zip(*values))
                print(
                    f"| {label} | {world_size} | {name} | {base:.3f} | {seconds:.3f} | {seconds / base:.2f} | "
                    f"{added / 4 / size:.1f} |",
                    flush=True,
                )
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ |= main.KEEP_FREED_MEMORY
    print("| P of | ranks | strategy | bare all-reduce, s | federated_average, s | ratio | vectors of P |")
    print("|---|---|---|---|---|---|---|")
    for world_size in (2, 4):
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(rank_main, args=(world_size, f"{folder}/store"), nprocs=world_size)
