"""From the command to the first step, with 1 and with 8 ranks. python tests/benchmarks/start.py [FOLDER_OF_SMOLLM2]

Medians of 5 of the embedded default, in turn; the imports of a rank alone beside it. With SmolLM2: what 1 and 4 ranks
together read of the model from the disk, after its file has been dropped from the cache of the system.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
import main


def read_bytes():
    line = next(line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("read_bytes"))
    return int(line.split()[1])


def first_step_rank(rank, args, run):
    """Write down when the first step begins, and how much this rank has read from the disk until then."""
    before = read_bytes()
    import federated

    original = federated.local_steps

    def local_steps(*args_of_steps):
        note = [time.time(), read_bytes() - before]
        Path(args.output_dir, f"first_{rank}.json").write_text(json.dumps(note))
        return original(*args_of_steps)

    federated.local_steps = local_steps
    main.run_rank(rank, args, run)


def first_step(world_size, *flags):
    """Return (seconds until the slowest rank begins its first step, bytes that all have read)."""
    with tempfile.TemporaryDirectory() as folder:
        short = f"--world_size {world_size} --num_rounds 1 --local_steps 1 --output_dir {folder}".split()
        command = [sys.executable, __file__, "run", *short, *flags]
        start = time.time()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        ranks = [json.loads(Path(folder, f"first_{rank}.json").read_text()) for rank in range(world_size)]
    return max(when for when, _ in ranks) - start, sum(size for _, size in ranks)


def seconds_of_imports():
    start = time.time()
    subprocess.run([sys.executable, "-c", "import federated"], check=True, cwd=ROOT)
    return time.time() - start


def compare():
    measured = {"imports of one rank": [], "1 rank": [], "8 ranks": []}
    for _ in range(5):
        measured["imports of one rank"].append(seconds_of_imports())
        measured["1 rank"].append(first_step(1)[0])
        measured["8 ranks"].append(first_step(8)[0])
    print("| until the first step | seconds | of 1 rank |\n|---|---|---|")
    base = statistics.median(measured["1 rank"])
    for name, values in measured.items():
        print(f"| {name} | {statistics.median(values):.1f} | {statistics.median(values) / base:.2f} |")


def reads(smollm2):
    size = Path(smollm2, "model.safetensors").stat().st_size
    print("| ranks | read from the disk, MB | of the file |\n|---|---|---|")
    for world_size in (1, 4):
        file = os.open(Path(smollm2, "model.safetensors"), os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)
        _, read = first_step(world_size, "--model_name", smollm2, "--eval_questions", "1")
        print(f"| {world_size} | {read / 1e6:.0f} | {read / size:.2f} |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        main.main(sys.argv[2:], target=first_step_rank)
    else:
        compare()
        if len(sys.argv) > 1:
            reads(sys.argv[1])
