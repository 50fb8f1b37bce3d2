"""What a run tells people: header, table of the split, a line per round, figure, model card and summary."""

import collections
import os
import time
from pathlib import Path

import numpy as np
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


def print_header(args, data, shared, client_bytes, model_bytes):
    """Print the sizes that a user can check before the first step.

    `shared` is the number of parameters that a client sends in a round, `client_bytes` what an absent client needs in
    host memory, `model_bytes` what the model needs on every rank.
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
    megabytes = utils.CODE_BYTES[args.average_dtype] * shared / 1e6
    lines = [
        f"{args.model_name}, {'4-bit NF4' if args.load_in_4bit else 'not quantized'}, LoRA r={args.lora_r}",
        f"  clients    {len(rows)}{drawn}, {each} training rows each; {len(data.global_held_out)} global held-out rows",
        f"  rounds     {args.num_rounds} x {args.local_steps} local steps x {batch} rows",
        f"  shared     {shared:,} LoRA parameters, {megabytes:.1f} MB per client and round, "
        + ", ".join([args.aggregator, *[f"variant {args.lora_variant}"] * (args.lora_variant != "lora"), *extras]),
        f"  device     {device}, {args.backend}, {args.world_size} rank(s)",
    ]
    if 0 < args.num_gpus < args.world_size:
        lines.append(
            f"  copies     {args.world_size} of the model, {model_bytes / 1e9:.1f} GB each; "
            f"--world_size {args.num_gpus} --num_clients {args.num_clients} holds one a GPU, and plays clients in turn"
        )
    if args.num_clients > args.world_size:
        playing = {client for shares, _ in data.plan for share in shares for client in share}
        lines.append(
            f"  absent     --client_state {args.client_state}: {client_bytes / 1e6:.1f} MB of host memory per client, "
            f"{client_bytes * len(playing) / 1e9:.2f} GB for the {len(playing)} that will play, "
            "and as much in a checkpoint"
        )
    print("\n".join(lines), flush=True)


# -----------------------------------------------------------------------------
# --dry_run: what a run will need, see tests/benchmarks/README.md for the formulas and how well they hold

# of one layer: work that does not grow with the tokens, seconds (forward, optimizer step); what an element that is
# saved for the backward pass costs, in passes over memory; and what a weight in 4 bits costs to unpack, in passes
LAYER_SECONDS = {"cpu": (1.5e-3, 5.5e-3), "cuda": (0.5e-3, 2e-3)}  # measured on the CPU alone
PASSES, UNPACKING = (4.5, 13), (1.2, 2.4)
LOGITS_TILE = 32768  # logits of each answer token that TRL holds at a time, in float32
LINK = {"gloo": 1.2e9, "nccl": 100e9}  # bytes per second that a rank sends and receives; measured for gloo


def measure_speed(device, dtype, shape):
    """Return (FLOP/s of matrix products, seconds of a pass over an element) on this machine, one thread a rank."""
    torch.set_num_threads(1)
    a, b = torch.randn(1024, shape[0], device=device, dtype=dtype), torch.randn(*shape, device=device, dtype=dtype)
    x = torch.randn(2**24, device=device, dtype=dtype)
    out = torch.empty_like(x)

    def seconds(function, repeats=5):
        function()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            function()
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return sorted(times)[repeats // 2]

    return 2 * 1024 * shape[0] * shape[1] / seconds(lambda: a @ b), seconds(
        lambda: torch.mul(x, x, out=out)
    ) / x.numel()


def count_parameters(config):
    """Return (in the linear layers, in all others, in the largest linear layer), built without memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    linear = [m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    return sum(linear), sum(p.numel() for p in model.parameters()) - sum(linear), max(linear)


def saved_elements(config, r):
    """Return how many elements a layer saves of each token for the backward pass, with LoRA of rank `r`."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    keys = hidden * config.num_key_value_heads // heads
    return 6 * hidden + 2 * keys + 4 * config.intermediate_size + 7 * r + heads + 2


def estimate(args, config, lengths, answer_lengths, num_held_out, speed):
    """Return what a run with these flags will need, as a dict in bytes and seconds.

    `lengths` are the tokens of some rows, `answer_lengths` of their answers; `num_held_out` global held-out rows are
    evaluated; `speed` is what `measure_speed` says.
    """
    kind, (rate, per_element) = "cuda" if args.num_gpus else "cpu", speed
    width = 4 if kind == "cpu" and args.torch_dtype == "auto" or args.torch_dtype == "float32" else 2
    linear, others, largest = count_parameters(config)
    lora, layers = utils.count_lora_parameters(config, args.lora_r), config.num_hidden_layers
    hidden, saved = config.hidden_size, saved_elements(config, args.lora_r)
    lengths, rng = np.asarray(lengths), np.random.default_rng(0)

    def batch_of(size):  # (tokens with padding, tokens that are learned)
        if args.packing and size == args.per_device_train_batch_size:
            return size * args.max_length, size * args.max_length * np.mean(answer_lengths) / lengths.mean()
        return size * rng.choice(lengths, (200, size)).max(axis=1).mean(), size * np.mean(answer_lengths)

    def seconds(size, train):
        tokens, learned = batch_of(size)
        times = 2 if train else 1  # the weights are frozen: no gradients of theirs
        flops = tokens * (2 * (linear + lora) + 4 * tokens / size * hidden * layers)
        flops += learned * 2 * config.vocab_size * hidden * (1.5 if train else 1)
        total = times * flops / rate + tokens * layers * saved * PASSES[train] * per_element
        total += layers * LAYER_SECONDS[kind][train] + args.load_in_4bit * linear * UNPACKING[train] * per_element
        return total + (seconds(size, False) if train and args.gradient_checkpointing else 0)

    batch, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    workers = args.num_gpus or len(os.sched_getaffinity(0))
    crowd = max(1, args.world_size / workers)  # ranks that share a GPU, or a core
    turns = -(-args.clients_per_round // args.world_size)
    private = args.aggregator == "none" or args.lora_variant == "fedsa"  # then every client's model is evaluated
    evaluated = min(num_held_out, utils.GLOBAL_EVAL_ROWS) * (turns if private else 1 / args.world_size)
    evaluated += turns * utils.CLIENT_EVAL_ROWS
    words = utils.MAX_NEW_TOKENS * layers * LAYER_SECONDS[kind][0] + utils.MAX_NEW_TOKENS * args.load_in_4bit * (
        linear * UNPACKING[0] * per_element
    )  # of a batch of answers, one token after another
    batches = -(-min(num_held_out, utils.ANSWERED_ROWS) // (args.world_size * 4 * args.per_device_train_batch_size))
    tokens, learned = batch_of(batch)
    kept = hidden if args.gradient_checkpointing else saved
    memory = {
        "weights": linear * (0.516 if args.load_in_4bit else width) + others * width,
        "adapter": lora
        * (4 + 4 + 4 + utils.OPTIMIZER_BYTES.get(args.optim, 8)),  # with its gradient, and the round's start
        "activations": width * (tokens * (layers * kept + saved) + largest) + 8 * learned * LOGITS_TILE,
        "averaging": 24 * lora + 4 * lora * turns * (args.average_dtype != "float32"),
    }
    shared = 0 if args.aggregator == "none" else lora if args.lora_variant == "lora" else lora / 2  # A or B: about half
    sent = shared * (utils.CODE_BYTES[args.average_dtype] + 4 * args.scaffold)
    wire = 8 * shared if args.average_dtype == "float32" else sent * turns
    checkpoint = utils.checkpoint_bytes(args, lora)
    round_seconds = {
        "local": crowd * turns * args.local_steps * accumulation * seconds(batch, True),
        "average": crowd * (2 * (1 - 1 / args.world_size) * wire / LINK[args.backend] + 10 * lora * per_element),
        "eval": crowd * evaluated / (4 * batch) * seconds(4 * batch, False),
        "save": checkpoint / 3e8,
    }
    every = {"local": 1, "average": 1, "eval": args.eval_rounds, "save": args.save_rounds}
    total = {name: value * -(-args.num_rounds // every[name]) for name, value in round_seconds.items()}
    total["eval"] += 2 * crowd * batches * (words + seconds(4 * batch, False))  # answers before and after
    return {
        "parameters": (linear, others, lora),
        "memory": memory,
        "peak": memory["weights"] + memory["adapter"] + max(memory["activations"], memory["averaging"]),
        "clients": utils.client_bytes(args) * lora * args.num_clients,
        "sent": sent,
        "checkpoint": checkpoint,
        "seconds": round_seconds,
        "total": sum(total.values()),
        "share_of_evaluation": total["eval"] / sum(total.values()),
    }


def print_estimate(args, numbers, num_rows, lengths, speed):
    """Print what `estimate` says, for people."""
    linear, others, lora = numbers["parameters"]
    memory = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in numbers["memory"].items())
    each = {
        name: f"{time:.2g} s" if time < 100 else f"{time / 60:.0f} min" for name, time in numbers["seconds"].items()
    }
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    hours, minutes = divmod(max(1, round(numbers["total"] / 60)), 60)
    device = f"{min(args.num_gpus, args.world_size)} x {torch.cuda.get_device_name()}" if args.num_gpus else "CPU"
    kept, share = utils.KEPT_CHECKPOINTS + 1, numbers["share_of_evaluation"]
    lines = [
        "dry run: estimates from sizes and from the speed of this machine; nothing is loaded, trained or written"
        + ", and never compared with a GPU" * (args.num_gpus > 0),
        f"  model      {(linear + others) / 1e6:,.1f} M parameters, {linear / 1e6:,.1f} M of them in linear layers; "
        f"LoRA {lora / 1e6:.1f} M",
        f"  rows       {num_rows:,} of {np.mean(lengths):.0f} tokens; 95% have up to {np.quantile(lengths, 0.95):.0f}",
        f"  device     {device}, {speed[0] / 1e9:,.0f} GFLOP/s, {args.world_size} rank(s), {args.backend}",
        f"  memory     {numbers['peak'] / 1e9:.2f} GB a rank beside the libraries: {memory} "
        "(of the last two the larger counts)",
        f"  clients    {numbers['clients'] / 1e9:.2f} GB of host memory on all ranks together, for {args.num_clients} "
        "between their turns",
        f"  round      {each['local']} for {args.local_steps} local steps x {batch} rows, {each['average']} to average",
        f"  bytes      {numbers['sent'] / 1e6:.1f} MB per client and round, as {args.average_dtype}",
        f"  evaluation {each['eval']}, every {args.eval_rounds} round(s); with the answers {share:.0%} of the run",
        f"  disk       {kept * numbers['checkpoint'] / 1e9:.2f} GB for {kept} checkpoints, one in {each['save']}, "
        f"every {args.save_rounds} round(s)",
        f"  run        {args.num_rounds} rounds: about {f'{hours} h ' * (hours > 0)}{minutes} min, and the start",
    ]
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
