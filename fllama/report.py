"""What people see of a run: header, table of the split, a round's line, curves, summary, model card."""

import collections
import shlex
from pathlib import Path

import torch

from fllama import options
from fllama.narrow import CODE_BYTES

SECONDS = ("local", "average", "eval", "save")  # of a round, in rounds.jsonl
SHOWN_CLIENTS, SHOWN_LABELS = 24, 8  # lines and columns of the table of the split; partition.json has all
# told apart by everybody (after Okabe and Ito 2008), and readable on white and on black
BLUE, ORANGE, GREY = "#2A87C8", "#D55E00", "#777777"

# -----------------------------------------------------------------------------
# before training


def partition_table(partition):
    """Return the table of clients x rows, and x labels if there are any, as text; `partition` as in partition.json."""
    clients, shown = partition["clients"], partition["clients"][:SHOWN_CLIENTS]
    more = ""
    if len(clients) > len(shown):
        more = f"\n  ... {len(clients) - len(shown)} more clients, see partition.json"
    if "labels" not in clients[0]:
        sizes = [str(len(client["rows"])) for client in shown]
        if "name" in clients[0]:
            sizes = [f"{client['name']} {size}" for client, size in zip(shown, sizes)]
        return f"  rows of the clients: {(', ' if 'name' in clients[0] else ' ').join(sizes)}{more}"

    counts = collections.Counter()
    for client in clients:
        counts.update(client["labels"])
    labels = sorted(label for label, _ in counts.most_common(SHOWN_LABELS))
    has_others = len(counts) > len(labels)
    lines = [["client", "rows", *(label[:12] for label in labels)]]
    for client in shown:
        cells = [client["labels"].get(label, 0) for label in labels]
        lines.append([client["client"], len(client["rows"]), *cells])
        if has_others:
            lines[-1].append(len(client["rows"]) - sum(cells))
    if has_others:
        lines[0].append("others")
    widths = [max(len(str(cell)) for cell in column) for column in zip(*lines)]
    rows = []
    for line in lines:
        rows.append("  " + "  ".join(str(cell).rjust(width) for cell, width in zip(line, widths)))
    return "\n".join(rows) + more


def print_header(args, run, rows, server, clients, model_bytes):
    """Print the sizes that a user can check before the first step.

    `model_bytes` is what the model needs on every rank.
    """
    num_train, shared = rows.num_train, server.start.numel()
    each = f"{min(num_train)}" if min(num_train) == max(num_train) else f"{min(num_train)} to {max(num_train)}"
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    megabytes = CODE_BYTES[args.average_dtype] * shared / 1e6
    averaging = [args.aggregator]
    if args.lora_variant != "lora":
        averaging.append(f"variant {args.lora_variant}")
    machines = f" on {len(set(run.machine_of_rank))} machines" if len(set(run.machine_of_rank)) > 1 else ""
    ranks_here = run.machine_of_rank.count(run.machine_of_rank[0])  # the GPUs are those of this machine
    lines = [
        f"{args.model_name}, {describe_precision(args)}, LoRA r={args.lora_r}",
        f"  clients    {len(num_train)}{describe_draw(args)}, {each} training rows each; "
        f"{len(rows.global_held_out)} global held-out rows",
        f"  rounds     {args.num_rounds} x {args.local_steps} local steps x {batch} rows",
        f"  shared     {shared:,} LoRA parameters, {megabytes:.1f} MB per client and round, "
        + ", ".join(averaging + describe_local_terms(args)),
        f"  device     {describe_device(args, run)}, {args.backend}, {args.world_size} rank(s){machines}",
    ]
    if 0 < run.num_gpus < ranks_here:
        fewer = f"--world_size {run.num_gpus}" if not machines else f"--nproc_per_node {run.num_gpus} of torchrun"
        lines.append(
            f"  copies     {ranks_here} of the model, {model_bytes / 1e9:.1f} GB each; "
            f"{fewer} --num_clients {args.num_clients} holds one a GPU, and plays clients in turn"
        )
    if len(num_train) > args.world_size:
        playing = {client for played in rows.plan for client in played.clients()}
        waiting = waiting_bytes(args, clients, shared)
        lines.append(
            f"  absent     --client_state {args.client_state}: {waiting / 1e6:.1f} MB of host memory per client, "
            f"{waiting * len(playing) / 1e9:.2f} GB for the {len(playing)} that will play, "
            "and as much in a checkpoint"
        )
    print("\n".join(lines), flush=True)


def waiting_bytes(args, clients, shared):
    """Return how many bytes of host memory a client needs between its turns."""
    trained = sum(parameter.numel() for group in clients.optimizer.param_groups for parameter in group["params"])
    private = sum(parameter.numel() for parameter in clients.private)
    vectors = args.scaffold + (args.average_dtype != "float32")
    return options.moment_bytes(args) * trained + 4 * (private + shared * vectors)


def describe_precision(args):
    return "4-bit NF4" if args.load_in_4bit else "not quantized"


def describe_draw(args):
    clients, per_round = options.training_clients(args)
    return f", {per_round} drawn for each round" if per_round < clients else ""


def describe_local_terms(args):
    """Return what is added to the clients' gradients."""
    terms = []
    if args.prox_mu:
        terms.append(f"FedProx mu {args.prox_mu:g}")
    if args.scaffold:
        terms.append("SCAFFOLD")
    return terms


def describe_device(args, run):
    if not run.num_gpus:
        return f"CPU, {torch.get_num_threads()} thread(s) a rank"
    ranks_here = run.machine_of_rank.count(run.machine_of_rank[0])
    shared = ", shared by the ranks" if run.num_gpus < ranks_here else ""
    each = " a machine" if len(set(run.machine_of_rank)) > 1 else ""
    return f"{min(run.num_gpus, ranks_here)} x {torch.cuda.get_device_name()}{each}{shared}"


# -----------------------------------------------------------------------------
# during training


def round_line(args, entry):
    """Return the line of a round, from its entry in rounds.jsonl."""
    width = len(str(args.num_rounds))
    parts = [
        f"round {entry['round']:{width}}/{args.num_rounds}",
        f"train {entry['train_loss']:.4f}" if entry["train_loss"] is not None else "no client   ",
        f"eval {entry['eval_loss']:.4f}" if entry["eval_loss"] is not None else " " * 11,
        f"update {entry['update_norm']:.1e}",
        f"local {entry['seconds']['local']:.1f}s",
        f"average {entry['seconds']['average']:.1f}s",
        f"{entry['peak_memory_gb']:.1f} GB",
    ]
    if entry["aggregation_error"] is not None:
        parts.append(f"aggregation error {100 * entry['aggregation_error']:.1f}%")
    if entry.get("epsilon"):
        parts.append(f"epsilon {entry['epsilon']:.2f}")
    return " | ".join(parts)


# -----------------------------------------------------------------------------
# after training


def new_axes(size, panels=1):
    """Return the axes of a figure's panels, which can be read on light and on dark pages: no background, grey text."""
    from matplotlib.figure import Figure  # half a second that only one process has to pay

    panels = Figure(figsize=size, layout="constrained", dpi=150).subplots(1, panels, squeeze=False)[0]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.tick_params(colors=GREY)
        axes.xaxis.label.set_color(GREY)
        axes.yaxis.label.set_color(GREY)
    return panels


def plot_losses(output_dir, rounds):
    """Draw loss.png: the loss of every client in training, and the global held-out loss, over the rounds."""
    (axes,) = new_axes((7, 4))
    of_client = collections.defaultdict(list)  # client -> (round, loss)
    for entry in rounds:
        for client, loss in zip(entry["clients"], entry["client_train_loss"]):
            of_client[client].append((entry["round"], loss))
    for points in of_client.values():
        axes.plot(*zip(*points), ".-", markersize=2, color=GREY, alpha=0.5, linewidth=0.7)
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


SCORES = {  # of summary.json: what they are called, and how they are shown
    "exact_match": ("exact match", "{:.1f}%"),
    "f1": ("f1", "{:.1f}%"),
    "rouge_l": ("ROUGE-L", "{:.1f}%"),
    "token_accuracy": ("token accuracy", "{:.1f}%"),
    "perplexity": ("perplexity", "{:.2f}"),
    "squad_exact_match": ("exact match (SQuAD v1)", "{:.1f}%"),
    "squad_f1": ("F1 (SQuAD v1)", "{:.1f}%"),
}


def show_score(name, value):
    return "-" if value is None else SCORES[name][1].format(value)


def summarize(rounds, num_train, scores, names, clients, num_questions):
    """Return what summary.json holds: the run in one object.

    `num_train` are the rows of each client, `scores` those before and after, `names` the ones that say most, `clients`
    the scores of those of the last round on their own held-out rows.
    """
    both = {}
    for name in SCORES:
        both[name] = {when: scores[when].get(name) for when in ("before", "after")}
    evaluated = [entry["eval_loss"] for entry in rounds if entry["eval_loss"] is not None] or [None]  # a log was lost
    seconds = {}
    for name in SECONDS:
        seconds[name] = round(sum(entry["seconds"][name] for entry in rounds), 2)
    return {
        "rounds": len(rounds),
        "clients": len(num_train),
        "rows": num_train,
        "tokens": sum(entry["tokens"] for entry in rounds),
        "seconds": seconds,
        "eval_loss": {"first": evaluated[0], "last": evaluated[-1]},
        "headline": names,
        **both,
        "answered": num_questions,
        "cut": scores["after"].get("cut"),
        "per_client": clients,
        "rejected": sum(len(entry["rejected"]) for entry in rounds),
        "bytes": sum(entry["bytes"] for entry in rounds),
        "privacy": None,
        "audit": None,
        "bytes_per_round": max((entry["bytes"] for entry in rounds), default=0),
        "peak_memory_gb": max((entry["peak_memory_gb"] for entry in rounds), default=0),
    }


def print_summary(args, rounds, summary, samples, target):
    """Print what the run has come to, and how to use it; `target` is the folder of the model or models."""
    for sample in samples:
        print(f"question  {sample['question']}\n  accepted  {' | '.join(sample['accepted'])}")
        print(f"  before    {sample['before']}\n  after     {sample['after']}")
    evaluated = [f"{e['eval_loss']:.4f} (round {e['round']})" for e in rounds if e["eval_loss"] is not None]
    if evaluated:
        print(f"held-out loss  {evaluated[0]} -> {evaluated[-1]}")
    for name in summary["headline"]:
        before, after = (show_score(name, summary[name][when]) for when in ("before", "after"))
        asked = f" on {summary['answered']} held-out questions" if summary["answered"] else ""
        print(f"{SCORES[name][0]:13}  {before} -> {after}{asked}")
    if summary["cut"]:
        print(
            f"cut            {summary['cut']} of {summary['answered']} answers were longer than --max_new_tokens allows"
        )
    for line in describe_guarantee(summary["privacy"]) + describe_audit(summary["audit"]):
        print(line)
    first = summary["headline"][0]
    scored = [client for client in summary["per_client"] if client[first] is not None]
    if len(scored) > 1:
        mean = sum(client[first] for client in scored) / len(scored)
        worst = (max if first == "perplexity" else min)(scored, key=lambda client: client[first])
        print(
            f"on own rows    {show_score(first, mean)} {SCORES[first][0]}, the mean of {len(scored)} clients; "
            f"the worst, client {worst['client']}, {show_score(first, worst[first])}"
        )
    folder = target / "client_N" if options.keeps_own_models(args) else args.output_dir
    print(f'use it: python main.py --output_dir {shlex.quote(str(folder))} --ask "..." --context "..."', flush=True)


def describe_guarantee(privacy):
    """Return what was promised and spent, as in summary.json, with all that gives the number its meaning."""
    if not privacy:
        return []
    return [
        f"privacy        epsilon {privacy['epsilon']:.2f} was spent at delta {privacy['delta']:g}, for "
        f"{privacy['unit']} ({privacy['relation']})",
        f"               sampling: {privacy['sampling']}; it covers the adapter, and no losses, scores, logs, nor "
        "choices made by looking at them",
    ]


def describe_audit(audit):
    """Return what an audit, as in summary.json, says in words: three lines; none without an audit."""
    if not audit or audit["auc"] is None:
        return []
    low, high = audit["auc_interval"]
    bound = f"{audit['epsilon_lower_bound']:.2f} of {audit['epsilon_lower_bound_most']:.2f} at delta {audit['delta']:g}"
    inserted, held_out, most = (audit["exposure"][name] for name in ("inserted", "held_out", "most"))
    return [
        f"audit          {audit['canaries']} canaries: those trained on are told apart from those it has not seen in "
        f"{audit['auc']:.0%} of the cases ({low:.0%} to {high:.0%}); 50% is guessing",
        f"exposure       {inserted:.1f} bits if trained on, {held_out:.1f} if not; 1.4 is guessing, and {most:.0f} the "
        "most that is measured",
        f"epsilon        at least {bound}, the most that so many canaries can show, with 95% confidence; another "
        "attack may show more",
    ]
