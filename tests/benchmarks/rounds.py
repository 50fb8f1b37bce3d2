"""What a round costs beside its local steps. python tests/benchmarks/rounds.py [ANOTHER_CHECKOUT]

Whole runs of main.py in which a local step does nothing but move one number; milliseconds of a round are the sum of its
`seconds` in rounds.jsonl, medians over the rounds but for the first two. With another checkout, both run in turn, twice
each. The adapters have 448 tensors, as those of an 8 B LLaMA: of few numbers, which shows what Python and the calls of
torch take, or of 42 million, as with --lora_r 16, where on a CPU the copying adds up. Last, a round on a pretended GPU
(tests/pretend_cuda.py): how often the host waits for it, and how many operators it calls.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROUNDS = 12
COMMON = f"--num_rounds {ROUNDS} --eval_rounds {ROUNDS} --save_rounds {ROUNDS} --local_steps 1 --optim adamw_torch"
COMMON += " --per_device_train_batch_size 1 --torch_dtype float32"
CASES = {  # name: (hidden size, flags)
    "calls, one client": (16, "--world_size 1 --lora_r 1"),
    "calls, two clients in turn": (16, "--world_size 1 --num_clients 2 --lora_r 1"),
    "calls, fedsa": (16, "--world_size 1 --lora_r 1 --lora_variant fedsa"),
    "42 M numbers, one client": (256, "--world_size 1 --lora_r 300"),
    "42 M numbers, two clients in turn": (256, "--world_size 1 --num_clients 2 --lora_r 300"),
}


def write_inputs(folder, hidden_size):
    """Write a LLaMA with 32 layers and random weights, and 100 short rows; returns them as flags."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "assets/tiny-llama")
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=32,
        num_attention_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    row = {"context": "a", "question": "b", "answers": {"text": ["a"]}}
    lines = [json.dumps(row | {"question": f"b {number}"}) + "\n" for number in range(100)]
    (folder / "rows.jsonl").write_text("".join(lines))
    return f"--model_name {folder}/model --dataset_path {folder}/rows.jsonl"


def rank_without_steps(rank, args, run):
    """Be a rank whose local steps only move one number."""
    import torch

    import federated
    import main
    from fllama import clients, data

    data.GLOBAL_EVAL_ROWS = 1  # not what is timed

    counts = []  # of the pretended GPU, as each turn begins
    pretending = sys.modules.get("pretend_cuda")

    def local_steps(*given):
        if pretending:
            counts.append(dict(pretending.COUNTS))
        turn = next(value for value in given if isinstance(value, clients.Turn))
        parameters = next(value for value in given if isinstance(value, list))
        parameters[0].data.view(-1)[0] += 1e-3 * (1 + turn.client)
        turn.train_loss = 1.0  # of checkouts in which nothing is returned
        return torch.tensor(1.0, dtype=torch.float64)

    federated.local_steps = local_steps
    main.run_rank(rank, args, run)
    Path(args.output_dir, "counts.json").write_text(json.dumps(counts))


def run_tree(tree, flags, num_gpus=0):
    """Run a checkout; returns (rounds as in rounds.jsonl, counts of the pretended GPU as each turn begins)."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "run", *flags.split(), "--output_dir", folder]
        environment = os.environ | {"TREE": str(tree)}
        if num_gpus:
            environment |= {"PRETEND_GPUS": str(num_gpus), "PYTHONPATH": str(ROOT / "tests/pretend")}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=tree, env=environment)
        rounds = [json.loads(line) for line in Path(folder, "rounds.jsonl").read_text().splitlines()]
        return rounds, json.loads(Path(folder, "counts.json").read_text())


def milliseconds_of_a_round(tree, flags):
    rounds, _ = run_tree(tree, flags)
    return statistics.median(1000 * sum(entry["seconds"].values()) for entry in rounds[2:-1])  # the last one evaluates


def print_counts(trees):
    """Print what a round does on a pretended GPU, one line per case and checkout."""
    for name, (hidden_size, flags) in CASES.items():
        if hidden_size > 16:  # it does as much
            continue
        with tempfile.TemporaryDirectory() as folder:
            inputs = write_inputs(Path(folder), hidden_size)
            for tree in trees:
                _, counts = run_tree(tree, f"{COMMON} {flags} {inputs}", num_gpus=1)
                turns = 2 if "two clients" in name else 1
                first, last = counts[4 * turns], counts[8 * turns]
                shown = [f"{(last.get(kind, 0) - first.get(kind, 0)) / 4:.0f}" for kind in ("waits", "operators")]
                print(f"| {name}, {tree.name} | {' | '.join(shown)} |", flush=True)


def compare(trees):
    """Print a line per case: the median of two runs of each tree, run in turn."""
    for name, (hidden_size, flags) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            inputs = write_inputs(Path(folder), hidden_size)
            found = {tree: [] for tree in trees}
            for _ in range(2):
                for tree in trees:
                    found[tree].append(milliseconds_of_a_round(tree, f"{COMMON} {flags} {inputs}"))
        medians = [statistics.median(values) for values in found.values()]
        shown = " | ".join(f"{value:.1f}" for value in medians)
        print(f"| {name} | {shown} | {medians[-1] / medians[0]:.2f} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        sys.path.insert(0, os.environ["TREE"])
        import main

        main.main(sys.argv[2:], target=rank_without_steps)
    else:
        checkouts = [*map(Path, sys.argv[1:2]), ROOT]
        compare(checkouts)
        print_counts(checkouts)
