"""What a run tells people: header, table of the split, a line per round, figure, model card and summary."""

import collections
import itertools
import json
import math
import os
import textwrap
import time
from pathlib import Path
from statistics import stdev

import numpy as np
import torch

import utils

SECONDS = ("local", "average", "eval", "save")  # of a round, in rounds.jsonl
SHOWN_CLIENTS, SHOWN_LABELS = 24, 8  # lines and columns of the table of the split; partition.json has all
# told apart by everybody (after Okabe and Ito 2008), and readable on white and on black
BLUE, ORANGE, GREY = "#2A87C8", "#D55E00", "#777777"
# Student's t for a two-sided 95% interval of the mean, by degrees of freedom from 1; of more, the last one is too wide
STUDENT_T = """12.706 4.303 3.182 2.776 2.571 2.447 2.365 2.306 2.262 2.228 2.201 2.179 2.160 2.145 2.131 2.120 2.110
2.101 2.093 2.086 2.080 2.074 2.069 2.064 2.060 2.056 2.052 2.048 2.045""".split()
COLUMNS = {  # of the table of a comparison: heading, what of a row, how
    "held-out loss": ("eval_loss", "{:.3f}"),
    "exact match": ("exact_match", "{:.1f}%"),
    "F1": ("f1", "{:.1f}%"),
    "worst client": ("worst_client", "{:.1f}%"),
    "on own rows": ("own_exact_match", "{:.1f}%"),
    "worst on own": ("own_worst_client", "{:.1f}%"),
    "tokens": ("tokens", "{:,.0f}"),
    "MB sent": ("bytes", "{:,.1f}"),
    "seconds": ("seconds", "{:,.0f}"),
}

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
        f"  device     {device}, {args.backend}, {args.world_size} rank(s)"
        + (f" on {args.machines[-1] + 1} machines" if args.machines[-1] else ""),
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
    own_batches = turns * -(-utils.CLIENT_EVAL_ROWS // (4 * args.per_device_train_batch_size))
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
    total["eval"] += crowd * (2 * batches + own_batches) * (words + seconds(4 * batch, False))  # before and after
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
        f"round {entry['round']:{len(str(args.num_rounds))}}/{args.num_rounds}",
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


def new_axes(size):
    """Return the axes of a figure that can be read on light and on dark pages: no background, grey text."""
    from matplotlib.figure import Figure  # half a second that only one process has to pay

    axes = Figure(figsize=size, layout="constrained", dpi=150).subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=GREY)
    axes.xaxis.label.set_color(GREY)
    axes.yaxis.label.set_color(GREY)
    return axes


def plot_losses(output_dir):
    """Draw `loss.png`: the loss of every client in training, and the global held-out loss, over the rounds."""
    rounds = utils.read_rounds(output_dir)
    axes = new_axes((7, 4))
    for path in sorted(Path(output_dir).glob("client_*_train_loss.json")):
        losses = [float("nan") if loss is None else loss for loss in utils.read_losses(path)]
        client = int(path.name.split("_")[1])
        played = [entry["round"] for entry in rounds if client in entry["clients"]]
        axes.plot(*zip(*zip(played, losses)), ".-", markersize=2, color=GREY, alpha=0.5, linewidth=0.7)
    axes.text(1, 0.96, "each client, training", color=GREY, ha="right", transform=axes.transAxes)
    for name, style, color, height, label in (
        ("train_loss", "-", BLUE, 0.89, "mean of the clients, training"),
        ("eval_loss", "o-", ORANGE, 0.82, "held out, all questions"),
    ):
        points = [(entry["round"], entry[name]) for entry in rounds if entry[name] is not None]
        if points:
            axes.plot(*zip(*points), style, color=color)
            label += f": {points[-1][1]:.3f}"
        axes.text(1, height, label, color=color, ha="right", weight="bold", transform=axes.transAxes)
    axes.set(xlabel="round", ylabel="loss (nats per answer token)", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.figure.savefig(Path(output_dir, "loss.png"), transparent=True)


def summarize(args, data, scores, clients, num_questions):
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
        "per_client": clients,  # those of the last round, on their own held-out rows
        "rejected": sum(len(entry["rejected"]) for entry in rounds),
        "bytes": sum(entry["bytes"] for entry in rounds),
        "bytes_per_round": max((entry["bytes"] for entry in rounds), default=0),
        "peak_memory_gb": max((entry["peak_memory_gb"] for entry in rounds), default=0),
    }


def print_summary(args, summary, samples, target):
    """Print what the run has come to, and how to use it; `target` is the folder of the model or models."""
    for sample in samples:
        print(f"question  {sample['question']}\n  accepted  {' | '.join(sample['accepted'])}")
        print(f"  before    {sample['before']}\n  after     {sample['after']}")
    evaluated = [entry for entry in utils.read_rounds(args.output_dir) if entry["eval_loss"] is not None]
    if evaluated:
        first, last = (f"{entry['eval_loss']:.4f} (round {entry['round']})" for entry in (evaluated[0], evaluated[-1]))
        print(f"held-out loss  {first} -> {last}")
    for name in ("exact_match", "f1"):
        before, after = summary[name]["before"], summary[name]["after"]
        print(f"{name.replace('_', ' '):13}  {before:.1f}% -> {after:.1f}% on {summary['answered']} held-out questions")
    own = [each["exact_match"] for each in summary["per_client"]]
    if len(own) > 1:
        worst = min(summary["per_client"], key=lambda each: each["exact_match"])
        print(
            f"on own rows    {sum(own) / len(own):.1f}% exact match, the mean of {len(own)} clients; "
            f"the worst, client {worst['client']}, {worst['exact_match']:.1f}%"
        )
    one = target / "client_N" if target.name == utils.CLIENT_MODELS else args.output_dir
    print(f'use it: python main.py --output_dir {one} --ask "..." --context "..."', flush=True)


# -----------------------------------------------------------------------------
# --compare


def comparison_row(name, folder):
    """Return what a run has to say in a comparison, from the summary that it has left in `folder`.

    Percent, on the global questions; where clients have models of their own, `exact_match` and `f1` are the means over
    these, and `worst_client` is the worst of them. `own_...` is on each client's own held-out rows.
    """
    summary = json.loads(Path(folder, "summary.json").read_text(encoding="utf-8"))
    clients, exact_match, loss = summary["per_client"], summary["exact_match"]["after"], summary["eval_loss"]["last"]
    own = [each["exact_match"] for each in clients]
    return {
        "name": name,
        "eval_loss": loss if loss is not None and math.isfinite(loss) else None,
        "exact_match": exact_match,
        "f1": summary["f1"]["after"],
        "worst_client": min(each["global"]["exact_match"] if "global" in each else exact_match for each in clients),
        "own_exact_match": sum(own) / len(own),
        "own_worst_client": min(own),
        "tokens": summary["tokens"],
        "bytes": summary["bytes"],
        "seconds": summary["seconds"]["local"] + summary["seconds"]["average"],
        "clients": clients,
    }


def compare_rows(names, repeats):
    """Return what `comparison.json` holds, of one list of rows (or None) for each repeat, in the order of `names`.

    Rows are means over the repeats that have ended well. With several, `differences` holds for each two of them the
    mean of the paired differences with its 95% interval (Student's t), which is unresolved where it holds 0.
    """
    rows, differences = [], []
    for name, runs in zip(names, zip(*repeats)):
        ended = [run for run in runs if run]
        row = {"name": name} | {key: mean([run[key] for run in ended]) for key, _ in COLUMNS.values()}
        rows.append(row | {"failed": len(runs) - len(ended), "runs": ended})
    for (a, one), (b, other) in itertools.combinations(zip(names, zip(*repeats)), 2):
        for key in ("exact_match", "eval_loss"):
            pairs = [x[key] - y[key] for x, y in zip(one, other) if x and y and None not in (x[key], y[key])]
            if len(pairs) > 2:
                half = float(STUDENT_T[min(len(pairs) - 1, len(STUDENT_T)) - 1]) * stdev(pairs) / len(pairs) ** 0.5
                low, high = mean(pairs) - half, mean(pairs) + half
                difference = {"a": a, "b": b, "of": key, "mean": mean(pairs), "low": low, "high": high}
                differences.append(difference | {"unresolved": low <= 0 <= high})
    return {"repeats": len(repeats), "rows": rows} | ({"differences": differences} if differences else {})


def mean(values):
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def align(lines):
    """Return a table in Markdown that can be read as it is."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    lines = [
        [cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(line, widths))] for line in lines
    ]
    lines.insert(1, ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def comparison_tables(comparison):
    """Return the text of `comparison.md`."""
    lines = [["", *COLUMNS]]
    for row in comparison["rows"]:
        scale = {"bytes": 1e-6}
        cells = [
            "-" if row[key] is None else form.format(row[key] * scale.get(key, 1)) for key, form in COLUMNS.values()
        ]
        failed = f" ({row['failed']} of {comparison['repeats']} failed)" if row["failed"] else ""
        lines.append([row["name"] + failed, *cells])
    tables = [align(lines)]
    own = {}  # client -> name of the row -> exact match in its runs
    for row in comparison["rows"]:
        for client in (client for run in row["runs"] for client in run["clients"]):
            own.setdefault(client["client"], {}).setdefault(row["name"], []).append(client["exact_match"])
    if len(own) <= SHOWN_CLIENTS:
        names = [row["name"] for row in comparison["rows"]]
        lines = [["exact match on own rows", *names]]
        for client, scores in sorted(own.items()):
            cells = [f"{mean(scores[name]):.1f}%" if name in scores else "-" for name in names]
            lines.append([f"client {client}", *cells])
        tables.append(align(lines))
    if "differences" in comparison:
        lines = [["difference", "of", "mean", "95% interval", ""]]
        for each in comparison["differences"]:
            form, name = ("{:+.1f}", "exact match") if each["of"] == "exact_match" else ("{:+.3f}", "held-out loss")
            interval = " to ".join(form.format(each[end]) for end in ("low", "high"))
            verdict = "unresolved" if each["unresolved"] else ""
            lines.append([f"{each['a']} - {each['b']}", name, form.format(each["mean"]), interval, verdict])
        tables.append(align(lines))
    else:
        tables.append(
            "One seed and one split: another split can change the order. --repeats 5 says which differences are larger."
        )
    return "\n\n".join(tables) + "\n"


def plot_comparison(comparison, path):
    """Draw `comparison.png`: exact match on the global questions, and of each client on its own rows."""
    rows = [row for row in comparison["rows"] if row["exact_match"] is not None]
    axes = new_axes((7, 1 + 0.5 * len(rows)))
    for height, row in enumerate(reversed(rows)):
        own = [client["exact_match"] for run in row["runs"] for client in run["clients"]]
        repeats = [run["exact_match"] for run in row["runs"]]
        axes.plot(own, [height] * len(own), "|", color=GREY, markersize=9, alpha=0.7)
        axes.plot([min(repeats), max(repeats)], [height] * 2, color=ORANGE, linewidth=3, solid_capstyle="round")
        axes.plot(row["exact_match"], height, "o", color=ORANGE, markersize=9)
        label = f"{row['exact_match']:.1f}%"
        axes.annotate(
            label, (row["exact_match"], height), (0, 8), textcoords="offset points", color=ORANGE, ha="center"
        )
    axes.set(xlim=(-2, 102), ylim=(-0.6, len(rows) - 0.3), yticks=range(len(rows)))
    axes.set_yticklabels([textwrap.fill(row["name"], 28) for row in reversed(rows)])
    axes.set_xlabel("exact match, percent:  ● all questions (bar: the repeats)    | each client's own")
    axes.figure.savefig(path, transparent=True)


# -----------------------------------------------------------------------------
# the model card


def model_card(args, summary):
    """Return the card of the adapter: what it was made from, how, how well it does, its limits, and how to use it."""
    local = Path(args.model_name).is_absolute()
    base = Path(args.model_name).name if local else args.model_name
    exact, f1, clients = summary["exact_match"], summary["f1"], summary["per_client"]
    first, last = (f"{loss:.4f}" if loss is not None else "unknown" for loss in summary["eval_loss"].values())
    rows, own = summary["rows"], [each["exact_match"] for each in clients]
    each = f"{min(rows)} to {max(rows)}" if min(rows) < max(rows) else f"{rows[0]}"
    split = args.partition + (f" by {args.partition_column}" if args.partition_column else "")
    split += f", alpha {args.dirichlet_alpha:g}" if args.partition == "dirichlet" else ""
    drawn = f", {args.clients_per_round} drawn for each round" if args.clients_per_round < args.num_clients else ""
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    extras = [args.lora_variant] * (args.lora_variant != "lora") + [f"FedProx mu {args.prox_mu:g}"] * (args.prox_mu > 0)
    extras = ", ".join([f"`{args.aggregator}`", *extras, *["SCAFFOLD"] * args.scaffold])
    precision = "4-bit NF4" if args.load_in_4bit else "not quantized"
    several = args.aggregator == "none" or args.lora_variant == "fedsa"
    adapter = f"THIS FOLDER{'/client_0' if several else ''}"
    on_hub = "" if local else f"base_model: {base}\n"
    return f"""---
{on_hub}library_name: peft
pipeline_tag: text-generation
tags: [lora, federated-learning]
---

# {base}, fine-tuned {"by clients alone" if args.aggregator == "none" else "in federation"}

A LoRA adapter (rank {args.lora_r}, alpha {args.lora_alpha:g}, on all linear layers) for
{f"`{base}`, a model in a folder of whoever trained this" if local else f"[{base}](https://huggingface.co/{base})"}.

| | |
|---|---|
| clients | {summary["clients"]}{drawn}; {each} training rows each, {sum(rows)} in all |
| split | {split} |
| rounds | {summary["rounds"]} of {args.local_steps} local steps of {batch} rows |
| averaging | {extras} |
| base weights | {precision} |
| learning rate | {args.learning_rate:g}, {args.lr_scheduler_type} |
| tokens trained on | {summary["tokens"]:,} |
| command | `{args.command}` |
| versions | {", ".join(f"{name} {version}" for name, version in args.versions.items())} |

| {summary["answered"]} held-out questions | before | after |
|---|---|---|
| exact match | {exact["before"]:.1f}% | {exact["after"]:.1f}% |
| F1 | {f1["before"]:.1f}% | {f1["after"]:.1f}% |

Held-out loss {first} nats per answer token at the first evaluated round, {last} at the last. On the clients' own
held-out rows: exact match {sum(own) / len(own):.1f}% as the mean of {len(own)} clients, {min(own):.1f}% for the worst.

## Limits

The clients were simulated on machines of one owner, so this says nothing about privacy: nothing was encrypted, no noise
was added, and an adapter can learn rows by heart. It was trained to copy short answers from a text or to continue
conversations like those in its data; it was not tested for anything else, nor for safety. One run, one seed.

## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{adapter}")
tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")
```

Questions about a text were asked with this system message, and the question as the user's:

```text
{utils.INSTRUCTION}

THE TEXT
```

Serve it with [vLLM](https://docs.vllm.ai), beside its base model:

```bash
vllm serve {base} --enable-lora --max-lora-rank {vllm_rank(args.lora_r)} --lora-modules federated="{adapter}"
```

As one 16-bit model, by the program that trained it, and as GGUF, by [llama.cpp](https://github.com/ggml-org/llama.cpp)
(the second needs the first; the adapter alone is converted by `convert_lora_to_gguf.py`):

```bash
python main.py --output_dir OUTPUT_DIR --merge
python convert_hf_to_gguf.py OUTPUT_DIR/merged_model --outfile model.gguf
```
"""


def vllm_rank(r):
    """Return the least rank that vLLM can be told to expect."""
    return next((rank for rank in (8, 16, 32, 64, 128, 256, 320, 512) if rank >= r), r)
