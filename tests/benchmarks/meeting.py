"""Meeting by the store of the process group against gloo's barrier: milliseconds. python tests/benchmarks/meeting.py"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch.distributed as dist
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parents[2]))
import federated


def meeting_rank(rank, world_size, folder):
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    rounds = argparse.Namespace(args=argparse.Namespace(world_size=world_size, timeout=1))
    rounds.rank, rounds.store, rounds.meetings = rank, store, 0
    measured = {"meet": [], "barrier": []}
    for _ in range(200):
        for name, wait in (
            ("meet", lambda: federated.FederatedRounds.meet(rounds, 20 * "x")),
            ("barrier", dist.barrier),
        ):
            start = time.perf_counter()
            wait()
            measured[name].append(1e3 * (time.perf_counter() - start))
    if rank == 0:
        meet, barrier = (statistics.median(values) for values in measured.values())
        print(f"| {world_size} | {meet:.2f} | {barrier:.2f} | {meet / barrier:.2f} |", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    print("| ranks | meeting, ms | barrier, ms | ratio |\n|---|---|---|---|")
    for world_size in (2, 4, 8):
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(meeting_rank, args=(world_size, folder), nprocs=world_size)
