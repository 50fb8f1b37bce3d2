"""What machines send each other, and how long it takes. python tests/benchmarks/network.py

Network namespaces as machines, no faster than a rate set by tc tbf; needs root, ip and tc. Gloo, on the CPU.
1. `federated_average` of 2.6 M numbers, 2 machines of 2 ranks with a client each: as on one machine, by an all-reduce
   of float64 among all ranks, and machine by machine.
2. Seconds a round of the embedded model with --lora_r 256, also 2.6 M, 2 machines of a rank each.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import torch
import torch.distributed as dist

import main
import utils
from fllama import runlog
from fllama.collectives import Communicator, Update

RATES = {"100mbit": 1e8, "1gbit": 1e9, "10gbit": 1e10}
DTYPES = {"float32": 4 + 4, "bfloat16": 2 + 2, "int8": 1 + 2}  # bytes a number: of a machine's sum, and of the total
SIZE, REPEATS = 2_621_440, 5


def time_average(rank, args, run):
    """Medians of seconds to average, on one rank of torchrun."""
    torch.set_num_threads(1)
    model, update, start = torch.nn.ParameterList([torch.zeros(SIZE)]), torch.randn(SIZE), torch.zeros(SIZE)

    def seconds(machine_of_rank, dtype):
        comm = Communicator(rank, args.world_size, "gloo", machine_of_rank, dtype)
        residuals, measured = {}, []
        for _ in range(REPEATS):
            dist.barrier()
            begin = time.perf_counter()
            turns = [Update(rank, 1.0, update, residuals)]
            utils.federated_average(model, args.world_size, start, turns, comm=comm)
            measured.append(time.perf_counter() - begin)
        return statistics.median(measured)

    results = {"flat": seconds(None, "float32")}  # as if all ranks were on one machine
    for dtype in DTYPES:
        results[dtype] = seconds(run.machine_of_rank, dtype)
    if rank == 0:
        Path(args.output_dir, "times.json").write_text(json.dumps(results))
    dist.barrier()


def torchrun(both, i, ranks, script, flags):
    """Start a script under torchrun on machine `i` of two; the agents meet on machine 0."""
    meet = ["--rdzv_backend", "c10d", "--rdzv_endpoint", f"{both.address(0)}:29400", "--rdzv_id", both.tag]
    meet += ["--rdzv_conf", f"is_host={int(i == 0)}", "--local_addr", both.address(i)]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", *meet, "--nproc_per_node", ranks]
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return both.start(i, *command, ROOT / script, *flags, env=environment)


def run_machines(rate, ranks, flags, script="main.py"):
    """Run two machines; returns the times or the rounds that they have written, and the bytes that one has sent."""
    from machines import machines

    with tempfile.TemporaryDirectory() as folder, machines(2) as both:
        both.limit(rate)
        started = [torchrun(both, i, ranks, script, [*flags, "--output_dir", folder]) for i in (0, 1)]
        for process in started:
            output = process.communicate()[0]
            assert process.returncode == 0, output
        times = Path(folder, "times.json")
        return json.loads(times.read_text()) if times.exists() else runlog.read_rounds(folder), both.sent(0)


def compare_averages():
    print("| rate | one all-reduce, s | by machines: float32, s | bfloat16, s | int8, s |")
    print("|---|---|---|---|---|")
    for rate, bits in RATES.items():
        times, _ = run_machines(rate, 2, [], "tests/benchmarks/network.py")
        formula = {"flat": 2 * 3 / 4 * 8, **{dtype: number / 2 for dtype, number in DTYPES.items()}}
        cells = [f"{times[name]:.2f} ({8 * SIZE * formula[name] / bits:.2f})" for name in ("flat", *DTYPES)]
        print(f"| {rate} | {' | '.join(cells)} |", flush=True)


def time_rounds():
    flags = "--num_clients 2 --lora_r 256 --num_rounds 5 --local_steps 4 --eval_rounds 5 --save_rounds 5".split()
    print("\n| rate | dtype | local, s | average, s | formula, s | reported MB a round | on the wire, of reported |")
    print("|---|---|---|---|---|---|---|")
    for rate, bits in RATES.items():
        for dtype, number in DTYPES.items():
            rounds, sent = run_machines(rate, 1, [*flags, "--average_dtype", dtype])
            local, average = (
                statistics.median(entry["seconds"][name] for entry in rounds[:-1]) for name in ("local", "average")
            )
            reported = [entry["bytes_between_machines"] for entry in rounds]
            print(
                f"| {rate} | {dtype} | {local:.2f} | {average:.2f} | {8 * SIZE * number / 2 / bits:.2f} "
                f"| {reported[0] / 1e6:.1f} | {2 * sent / sum(reported):.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    if "TORCHELASTIC_RUN_ID" in os.environ:
        main.main(target=time_average)
    else:
        compare_averages()
        time_rounds()
