"""What many clients on a rank cost. python tests/benchmarks/clients.py [FOLDER_OF_SMOLLM2]

1. Seconds a round for 8, 16, 64 and 256 clients on 2 ranks, embedded model, one local step each.
2. Changing clients, against 10 local steps: SmolLM2-135M, 4-bit, one rank that plays 2 clients, 6 turns.
3. Memory of the largest of 2 ranks that play 8, 25, 50 and 100 clients a round: embedded model, --lora_r 64.
"""

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import main
from fllama import runlog


def timed(function, seconds):
    """Return `function` as it is, but each call appends its seconds to the list."""

    def wrapped(*args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return result

    return wrapped


def timed_rank(rank, args, run):
    import federated
    from fllama import data

    data.GLOBAL_EVAL_ROWS = 1  # not what is timed
    seconds = {name: [] for name in ("load", "local_steps", "hand_in", "put_aside")}
    federated.LocalClients.load = timed(federated.LocalClients.load, seconds["load"])
    for name in ("local_steps", "hand_in", "put_aside"):
        setattr(federated, name, timed(getattr(federated, name), seconds[name]))
    main.run_rank(rank, args, run)
    Path(args.output_dir, "timed.json").write_text(json.dumps(seconds))


def run(flags, folder, target=main.run_rank):
    main.main([*flags.split(), "--output_dir", folder], target=target)
    return runlog.read_rounds(folder)


def change_clients(smollm2):
    with tempfile.TemporaryDirectory() as folder:
        flags = "--world_size 1 --num_clients 2 --num_rounds 3 --local_steps 10 --eval_rounds 3 --save_rounds 3"
        run(f"{flags} --model_name {smollm2}", folder, timed_rank)
        seconds = json.loads(Path(folder, "timed.json").read_text())
    turn = statistics.median(seconds["local_steps"])
    # loading puts the client before away; the first finds nothing to put away, and after the sixth comes the end
    change = statistics.median(seconds["load"][1:6])
    change += statistics.median(seconds["hand_in"]) + statistics.median(seconds["put_aside"])
    print(f"changing clients {change:.3f} s, 10 local steps {turn:.1f} s: {100 * change / turn:.2f}%")


def linear():
    """All sizes in turn, 3 times; of each run the rounds but for the first, which meets every client anew."""
    flags = "--world_size 2 --client_state reset --local_steps 1 --num_rounds 4 --eval_rounds 4 --save_rounds 4"
    seconds = {clients: [] for clients in (8, 16, 64, 256)}
    for _ in range(3):
        for clients in seconds:
            with tempfile.TemporaryDirectory() as folder:
                rounds = run(f"{flags} --num_clients {clients}", folder)
            for entry in rounds[1:]:
                seconds[clients].append(entry["seconds"]["local"] + entry["seconds"]["average"])
    print("| clients a round | seconds a round | a client | of that with 256 |\n|---|---|---|---|")
    each = {clients: statistics.median(values) / clients for clients, values in seconds.items()}
    for clients, value in each.items():
        print(f"| {clients} | {value * clients:.2f} | {value:.4f} | {value / each[256]:.2f} |", flush=True)


def memory():
    print("| clients a round | keep, GB | reset, GB |\n|---|---|---|")
    for clients in (8, 25, 50, 100):
        peaks = []
        for state in ("keep", "reset"):
            number = 400 // clients  # rounds, for as many steps in all, as longer runs meet longer rows
            flags = f"--world_size 2 --num_clients {clients} --client_state {state} --num_rounds {number}"
            flags += f" --local_steps 1 --lora_r 64 --eval_rounds {number} --save_rounds {number}"
            with tempfile.TemporaryDirectory() as folder:
                rounds = run(flags, folder)
            peaks.append(rounds[-2]["peak_memory_gb"])  # the last one is evaluated and saved
        print(f"| {clients} | {peaks[0]:.3f} | {peaks[1]:.3f} |", flush=True)


if __name__ == "__main__":
    linear()
    if len(sys.argv) > 1:
        change_clients(sys.argv[1])
    memory()
