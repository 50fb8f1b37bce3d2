"""What a run tells people: header, table of the split, a line per round, figure, model card and summary."""

import collections
from pathlib import Path

import torch

import utils

SECONDS = ("local", "average", "eval", "save")  # of a round, in rounds.jsonl
SHOWN_CLIENTS, SHOWN_LABELS = 24, 8  # lines and columns of the table of the split; partition.json has all

# -----------------------------------------------------------------------------
# before training


def partition_record(args, parts, held_out, row_numbers, labels):
    """Return what `partition.json` holds: of every client its rows, by their numbers in the dataset, and its labels."""
    clients = []
    for k, part in enumerate(parts):
        client = {"client": k, "rows": sorted(row_numbers[i] for i in part)}
        if labels is not None:
            client["labels"] = dict(sorted(collections.Counter(labels[i] for i in part).items()))
        clients.append(client)
    return {
        "partition": args.partition,
        "column": args.partition_column,
        "dirichlet_alpha": args.dirichlet_alpha if args.partition == "dirichlet" else None,
        "seed": args.seed,
        "clients": clients,
        "held_out": sorted(row_numbers[i] for i in held_out),
    }


def partition_table(record):
    """Return the table of clients x rows, and x labels where there are any, as text."""
    clients, shown = record["clients"], record["clients"][:SHOWN_CLIENTS]
    more = f"\n  ... {len(clients) - len(shown)} more clients, see partition.json" if len(clients) > len(shown) else ""
    if "labels" not in clients[0]:
        sizes = " ".join(str(len(client["rows"])) for client in shown)
        return f"  rows of the clients: {sizes}{more}"
    counts = collections.Counter()
    for client in clients:
        counts.update(client["labels"])
    labels = sorted(label for label, _ in counts.most_common(SHOWN_LABELS))
    names = [label[:12] for label in labels] + ["others"] * (len(counts) > len(labels))
    lines = [["client", "rows", *names]]
    for client in shown:
        cells = [client["labels"].get(label, 0) for label in labels]
        others = [len(client["rows"]) - sum(cells)] * (len(counts) > len(labels))
        lines.append([client["client"], len(client["rows"]), *cells, *others])
    widths = [max(len(str(line[i])) for line in lines) for i in range(len(lines[0]))]
    rows = ("  ".join(str(cell).rjust(width) for cell, width in zip(line, widths)) for line in lines)
    return "\n".join(f"  {row}" for row in rows) + more


def print_header(args, data, shared, client_bytes):
    """Print the sizes that a user can check before the first step.

    `shared` is the number of parameters that a client sends in a round, `client_bytes` what an absent client needs in
    host memory.
    """
    rows = data.num_train
    each = f"{min(rows)}" if min(rows) == max(rows) else f"{min(rows)} to {max(rows)}"
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    device = f"CPU, {torch.get_num_threads()} thread(s) a rank"
    if args.num_gpus:
        device = f"{min(args.num_gpus, args.world_size)} x {torch.cuda.get_device_name()}"
        device += ", shared by the ranks" if args.num_gpus < args.world_size else ""
    drawn = f", {args.clients_per_round} drawn for each round" if args.clients_per_round < args.num_clients else ""
    extras = [f"FedProx mu {args.prox_mu:g}"] * (args.prox_mu > 0) + ["SCAFFOLD"] * args.scaffold
    lines = [
        f"{args.model_name}, {'4-bit NF4' if args.load_in_4bit else 'not quantized'}, LoRA r={args.lora_r}",
        f"  clients    {len(rows)}{drawn}, {each} training rows each; {len(data.global_held_out)} global held-out rows",
        f"  rounds     {args.num_rounds} x {args.local_steps} local steps x {batch} rows",
        f"  shared     {shared:,} LoRA parameters, {4 * shared / 1e6:.1f} MB per client and round, "
        + ", ".join([args.aggregator, *[f"variant {args.lora_variant}"] * (args.lora_variant != "lora"), *extras]),
        f"  device     {device}, {args.backend}, {args.world_size} rank(s)",
    ]
    if args.num_clients > args.world_size:
        playing = {client for shares, _ in data.plan for share in shares for client in share}
        lines.append(
            f"  absent     --client_state {args.client_state}: {client_bytes / 1e6:.1f} MB of host memory per client, "
            f"{client_bytes * len(playing) / 1e9:.2f} GB for the {len(playing)} that will play, "
            "and as much in a checkpoint"
        )
    print("\n".join(lines), flush=True)


# -----------------------------------------------------------------------------
# during training


def round_line(args, entry):
    """Return the line of a round, from its entry in rounds.jsonl."""
    parts = [
        f"round {entry['round']:4d}/{args.num_rounds}",
        f"train {entry['train_loss']:.4f}",
        f"eval {entry['eval_loss']:.4f}" if entry["eval_loss"] is not None else " " * 11,
        f"update {entry['update_norm']:.1e}",
        f"local {entry['seconds']['local']:.1f}s",
        f"average {entry['seconds']['average']:.1f}s",
        f"{entry['peak_memory_gb']:.1f} GB",
    ]
    if entry["aggregation_error"] is not None:
        parts.append(f"aggregation error {100 * entry['aggregation_error']:.1f}%")
    return " | ".join(parts)


# -----------------------------------------------------------------------------
# after training


def plot_losses(output_dir):
    """Draw `loss.png`: the loss of every client in training, and the global held-out loss, over the rounds."""
    from matplotlib.figure import Figure  # half a second that only one process has to pay

    rounds = utils.read_rounds(output_dir)
    axes = Figure(figsize=(7, 4), layout="constrained", dpi=150).subplots()
    for path in sorted(Path(output_dir).glob("client_*_train_loss.json")):
        losses = [float("nan") if loss is None else loss for loss in utils.read_losses(path)]
        client = int(path.name.split("_")[1])
        played = [entry["round"] for entry in rounds if client in entry["clients"]]
        axes.plot(*zip(*zip(played, losses)), ".-", markersize=2, color="0.75", linewidth=0.8)
    axes.plot([], [], color="0.75", label="clients, training")
    for name, style, color, label in (
        ("train_loss", "-", "#0072B2", "mean of the clients, training"),
        ("eval_loss", "o-", "#D55E00", "global, held out"),
    ):
        points = [(entry["round"], entry[name]) for entry in rounds if entry[name] is not None]
        axes.plot(*zip(*(points or [(0, float("nan"))])), style, color=color, label=label)
    axes.set(xlabel="round", ylabel="loss (nats per answer token)", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    axes.figure.savefig(Path(output_dir, "loss.png"))


def summarize(args, data, scores, num_questions):
    """Return what `summary.json` holds: the run in one object."""
    rounds = utils.read_rounds(args.output_dir)
    evaluated = [entry["eval_loss"] for entry in rounds if entry["eval_loss"] is not None] or [None]  # a log was torn
    return {
        "rounds": len(rounds),
        "clients": args.num_clients,
        "rows": data.num_train,
        "tokens": sum(entry["tokens"] for entry in rounds),
        "seconds": {name: round(sum(entry["seconds"][name] for entry in rounds), 2) for name in SECONDS},
        "eval_loss": {"first": evaluated[0], "last": evaluated[-1]},
        "exact_match": {when: scores[when]["exact_match"] for when in scores},
        "f1": {when: scores[when]["f1"] for when in scores},
        "answered": num_questions,
        "rejected": sum(len(entry["rejected"]) for entry in rounds),
        "bytes_per_round": max((entry["bytes"] for entry in rounds), default=0),
        "peak_memory_gb": max((entry["peak_memory_gb"] for entry in rounds), default=0),
    }


def print_summary(args, summary, target):
    """Print what the run has come to, and how to use it; `target` is the folder of the model or models."""
    evaluated = [entry for entry in utils.read_rounds(args.output_dir) if entry["eval_loss"] is not None]
    if evaluated:
        first, last = (f"{entry['eval_loss']:.4f} (round {entry['round']})" for entry in (evaluated[0], evaluated[-1]))
        print(f"held-out loss  {first} -> {last}")
    for name in ("exact_match", "f1"):
        before, after = summary[name]["before"], summary[name]["after"]
        print(f"{name.replace('_', ' '):13}  {before:.1f}% -> {after:.1f}% on {summary['answered']} held-out questions")
    base = f'AutoModelForCausalLM.from_pretrained("{args.model_name}")'
    one = target / "client_N" if target.name == utils.CLIENT_MODELS else target
    print(f'use it: PeftModel.from_pretrained({base}, "{one}")', flush=True)


def model_card(args, summary):
    """Return the card of the adapter: what it was made from, how, and how well it does."""
    exact, f1 = summary["exact_match"], summary["f1"]
    first, last = (f"{loss:.4f}" if loss is not None else "unknown" for loss in summary["eval_loss"].values())
    return f"""---
base_model: {args.model_name}
library_name: peft
pipeline_tag: text-generation
tags: [lora, federated-learning]
---

# LoRA adapter, fine-tuned in federation

{summary["clients"]} clients with {min(summary["rows"])} to {max(summary["rows"])} training rows,
{summary["rounds"]} rounds of {args.local_steps} local steps, averaged by `{args.aggregator}`.
The clients were simulated on machines of one owner, so this says nothing about privacy.

| {summary["answered"]} held-out questions | before | after |
|---|---|---|
| exact match | {exact["before"]:.1f}% | {exact["after"]:.1f}% |
| F1 | {f1["before"]:.1f}% | {f1["after"]:.1f}% |

Held-out loss {first} at the first evaluated round, {last} at the last.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{args.model_name}"), "THIS FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")
```
"""
