"""--compare: a run for each arm, again for each repeat, and a table of them."""

import copy
import itertools
import json
import math
import re
import shutil
import textwrap
from pathlib import Path
from statistics import stdev

import torch

import utils
from fllama import checkpoints, prepare, report
from fllama.options import fail

ARMS = {  # name -> flags
    "local": ["--aggregator", "none"],
    "centralized": ["--aggregator", "none", "--centralized"],
    **{name: ["--aggregator", name] for name in utils.AGGREGATORS if name != "none"},
    **{name: ["--lora_variant", name] for name in utils.LORA_VARIANTS if name != "lora"},
    "scaffold": ["--scaffold"],
}
COMMON_FLAGS = {"--seed", "--output_dir", "--overwrite", "--resume"}  # the same for all arms
# Student's t for a two-sided 95% interval of the mean, by degrees of freedom from 1; of more, the last one is too wide
STUDENT_T = """12.706 4.303 3.182 2.776 2.571 2.447 2.365 2.306 2.262 2.228 2.201 2.179 2.160 2.145 2.131 2.120 2.110
2.101 2.093 2.086 2.080 2.074 2.069 2.064 2.060 2.056 2.052 2.048 2.045""".split()
COLUMNS = {  # of the table: heading -> (what of a row, how)
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
PRIVACY = {  # of the table, too, where a run has it
    "epsilon": ("epsilon", "{:.2f}"),
    "audit AUC": ("audit_auc", "{:.3f}"),
    "epsilon at least": ("epsilon_lower_bound", "{:.2f}"),
}
LONG_ANSWERS = {  # of the table instead, where exact match says little
    "held-out loss": COLUMNS["held-out loss"],
    "token accuracy": ("token_accuracy", "{:.1f}%"),
    "ROUGE-L": ("rouge_l", "{:.1f}%"),
    "perplexity": ("perplexity", "{:.2f}"),
    "tokens": COLUMNS["tokens"],
    "MB sent": COLUMNS["MB sent"],
    "seconds": COLUMNS["seconds"],
}
NAMES = {"exact_match": "exact match", "token_accuracy": "token accuracy", "eval_loss": "held-out loss"}
UNITS = {"bytes": 1e-6}  # of the table, where they are not those of the row


def find_arms(listed):
    """Return {text: flags} of what --compare lists: names of ARMS, each perhaps with flags of its own behind it."""
    arms = {}
    for text in listed.split(","):
        name, *flags = text.split() or [""]
        arm = " ".join([name, *flags])
        if name not in ARMS:
            fail(f"--compare: no run is named {name or 'nothing'}; choose from {', '.join(ARMS)}")
        common = {flag.split("=")[0] for flag in flags} & COMMON_FLAGS
        if common:
            fail(f"--compare {text.strip()}: {common.pop()} is the same for all runs; write it outside of the list")
        if arm in arms:
            fail(f"--compare: {text.strip()} is listed twice")
        arms[arm] = [*ARMS[name], *flags]
    return arms


def compare(args, flags, parse_args, run_once):
    """Run every arm of --compare, again for each of --repeats, on the same split, seed and rows; write the comparison.

    parse_args(flags) and run_once(args, flags) are main's. A run is in a folder of its own, as any other. One that ends
    by itself (exit code 3), or whose seed makes a split that is refused (2), has no figures, and the others go on.
    """
    folder, arms = Path(args.output_dir), find_arms(args.compare)
    runs = plan_runs(args, flags, arms, parse_args)
    num_gpus = torch.cuda.device_count()
    for _, _, each, _ in runs[: len(arms)]:
        prepare.find_rows(copy.copy(each), num_gpus)  # what can be refused is refused before the first run
    if args.overwrite:  # else an earlier one that was longer would be mixed with this one
        shutil.rmtree(folder / "comparison", ignore_errors=True)
    rows = []
    for number, (text, place, each, words) in enumerate(runs, start=1):
        print(f"\ncomparison {number}/{len(runs)}: {text}, seed {each.seed}", flush=True)
        try:
            with checkpoints.locked_output_dir(place):
                run_once(each, words)
            rows.append(comparison_row(text, place))
        except SystemExit as error:
            if error.code != 3 and not (error.code == 2 and any(rows)):
                raise
            rows.append(None)

    repeats = [rows[i : i + len(arms)] for i in range(0, len(rows), len(arms))]
    comparison = compare_rows(list(arms), repeats)
    tables = comparison_tables(comparison)
    utils.write_aside(folder / "comparison.json", json.dumps(comparison, indent=2) + "\n")
    utils.write_aside(folder / "comparison.md", tables)
    plot_comparison(comparison, folder / "comparison.png")
    print(f"\n{tables}\n{folder}/comparison.json, .md and .png", flush=True)
    if None in rows:
        raise SystemExit(3)


def plan_runs(args, flags, arms, parse_args):
    """Return (arm, folder, args, flags) of every run; refuses what can be refused before the first begins."""
    folder, runs = Path(args.output_dir), []
    for repeat in range(args.repeats):
        for text, more in arms.items():
            seed = str(args.seed + repeat)
            place = folder / "comparison" / f"{re.sub('[^A-Za-z0-9.+-]+', '_', text)}_seed_{seed}"
            words = [*flags, *more, "--compare", "", "--repeats", "1", "--seed", seed, "--output_dir", str(place)]
            each = parse_args(words)
            each.hf_token = args.hf_token
            started = (place / "config.json").exists()
            if started and not args.resume and not args.overwrite:
                fail(f"{folder} already holds a comparison: --resume goes on with it, --overwrite removes it")
            each.resume = args.resume and started
            runs.append((text, place, each, words))
    if args.resume and not any(each.resume for _, _, each, _ in runs):
        fail(f"--resume: {folder} holds no comparison; leave --resume out to start one")
    return runs


# -----------------------------------------------------------------------------
# figures


def comparison_row(name, folder):
    """Return what a run has to say in a comparison, from the summary that it has left in `folder`.

    Percent, on the global questions; if clients have models of their own, `exact_match` and `f1` are the means over
    these, and `worst_client` is the worst of them. `own_...` is on each client's own held-out rows. `headline` names
    the scores that say most.
    """
    summary = json.loads(Path(folder, "summary.json").read_text(encoding="utf-8"))
    clients, exact_match, loss = summary["per_client"], summary["exact_match"]["after"], summary["eval_loss"]["last"]
    own, models = [], []  # exact match of each client on its own rows, and of its model on the global questions
    for client in clients:
        own.append(client["exact_match"])
        models.append(client.get("global", {}).get("exact_match", exact_match))
    audit, others = summary.get("audit") or {}, {}
    for key in ("rouge_l", "token_accuracy", "perplexity"):
        others[key] = summary.get(key, {}).get("after")
    return {
        "name": name,
        "headline": summary.get("headline", ["exact_match", "f1"]),
        **others,
        "eval_loss": loss if loss is not None and math.isfinite(loss) else None,
        "exact_match": exact_match,
        "f1": summary["f1"]["after"],
        "worst_client": least(models),
        "own_exact_match": mean(own),
        "own_worst_client": least(own),
        "tokens": summary["tokens"],
        "bytes": summary["bytes"],
        "seconds": summary["seconds"]["local"] + summary["seconds"]["average"],
        "clients": clients,
        "epsilon": (summary.get("privacy") or {}).get("epsilon"),
        "audit_auc": audit.get("auc"),
        "epsilon_lower_bound": audit.get("epsilon_lower_bound"),
    }


def compare_rows(names, repeats):
    """Return what comparison.json holds, of one list of rows (or None) for each repeat, in the order of `names`.

    Rows are means over the repeats that have ended well. With several, `differences` holds for each two arms the mean
    of the paired differences with its 95% interval, which is unresolved if it holds 0.
    """
    runs_of = dict(zip(names, zip(*repeats)))
    rows, differences, score = [], [], "exact_match"
    for run in itertools.chain.from_iterable(repeats):
        if run and "exact_match" not in run.get("headline", ["exact_match"]):
            score = "token_accuracy"
    for name, runs in runs_of.items():
        ended = [run for run in runs if run]
        row = {"name": name}
        for key, _ in (*COLUMNS.values(), *LONG_ANSWERS.values(), *PRIVACY.values()):
            row[key] = mean([run.get(key) for run in ended])
        rows.append(row | {"failed": len(runs) - len(ended), "runs": ended})
    for a, b in itertools.combinations(names, 2):
        for key in (score, "eval_loss"):
            difference = paired_difference(runs_of[a], runs_of[b], key)
            if difference:
                differences.append({"a": a, "b": b, "of": key} | difference)
    comparison = {"repeats": len(repeats), "score": score, "rows": rows}
    return comparison | {"differences": differences} if differences else comparison


def paired_difference(runs, others, key):
    """Return the mean of the paired differences with its 95% interval (Student's t); None with fewer than 3 pairs."""
    pairs = []
    for run, other in zip(runs, others):
        if run and other and run.get(key) is not None and other.get(key) is not None:
            pairs.append(run[key] - other[key])
    if len(pairs) < 3:
        return None
    t = float(STUDENT_T[min(len(pairs) - 1, len(STUDENT_T)) - 1])
    half = t * stdev(pairs) / len(pairs) ** 0.5
    low, high = mean(pairs) - half, mean(pairs) + half
    return {"mean": mean(pairs), "low": low, "high": high, "unresolved": low <= 0 <= high}


def mean(values):
    values = [value for value in values if value is not None]
    return sum(values) / len(values) if values else None


def least(values):
    return min((value for value in values if value is not None), default=None)


# -----------------------------------------------------------------------------
# tables and figure


def comparison_tables(comparison):
    """Return the text of comparison.md."""
    tables = [table_of_arms(comparison)]
    if comparison["score"] == "exact_match":
        tables.append(table_of_clients(comparison["rows"]))
    if "differences" in comparison:
        tables.append(table_of_differences(comparison["differences"]))
    else:
        advice = "--repeats 5 says which differences are larger."
        tables.append(f"One seed and one split: another split can change the order. {advice}")
    return "\n\n".join(filter(None, tables)) + "\n"


def table_of_arms(comparison):
    columns = COLUMNS if comparison["score"] == "exact_match" else LONG_ANSWERS
    for heading, (key, form) in PRIVACY.items():
        if any(row.get(key) is not None for row in comparison["rows"]):
            columns = columns | {heading: (key, form)}
    lines = [["", *columns]]
    for row in comparison["rows"]:
        failed = f" ({row['failed']} of {comparison['repeats']} failed)" if row["failed"] else ""
        cells = [row["name"] + failed]
        for key, form in columns.values():
            cells.append("-" if row[key] is None else form.format(row[key] * UNITS.get(key, 1)))
        lines.append(cells)
    return align(lines)


def table_of_clients(rows):
    """Return the exact match of each client on its own rows, by arm; None for too many clients."""
    scores = {}  # client -> arm -> exact match in its runs
    for row in rows:
        for run in row["runs"]:
            for client in run["clients"]:
                of_client = scores.setdefault(client["client"], {})
                of_client.setdefault(row["name"], []).append(client["exact_match"])
    if len(scores) > report.SHOWN_CLIENTS:
        return None
    names = [row["name"] for row in rows]
    lines = [["exact match on own rows", *names]]
    for client, of_client in sorted(scores.items()):
        cells = [f"{mean(of_client[name]):.1f}%" if name in of_client else "-" for name in names]
        lines.append([f"client {client}", *cells])
    return align(lines)


def table_of_differences(differences):
    lines = [["difference", "of", "mean", "95% interval", ""]]
    for each in differences:
        form, name = "{:+.3f}" if each["of"] == "eval_loss" else "{:+.1f}", NAMES[each["of"]]
        interval = f"{form.format(each['low'])} to {form.format(each['high'])}"
        verdict = "unresolved" if each["unresolved"] else ""
        lines.append([f"{each['a']} - {each['b']}", name, form.format(each["mean"]), interval, verdict])
    return align(lines)


def align(lines):
    """Return a table in Markdown that can be read as it is."""
    widths = [max(map(len, column)) for column in zip(*lines)]
    rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    rows = []
    for cells in lines:
        first, *rest = zip(cells, widths)
        padded = [first[0].ljust(first[1])] + [cell.rjust(width) for cell, width in rest]
        rows.append(f"| {' | '.join(padded)} |")
    rows.insert(1, f"| {' | '.join(rule)} |")
    return "\n".join(rows)


def plot_comparison(comparison, path):
    """Draw comparison.png: the score on the global questions, and of each client on its own rows."""
    score = comparison["score"]
    rows = [row for row in comparison["rows"] if row[score] is not None]
    axes = report.new_axes((7, 1 + 0.5 * len(rows)))
    for height, row in enumerate(reversed(rows)):
        own = [client[score] for run in row["runs"] for client in run["clients"]]
        repeats = [run[score] for run in row["runs"]]
        axes.plot(own, [height] * len(own), "|", color=report.GREY, markersize=9, alpha=0.7)
        ends = [min(repeats), max(repeats)]
        axes.plot(ends, [height] * 2, color=report.ORANGE, linewidth=3, solid_capstyle="round")
        axes.plot(row[score], height, "o", color=report.ORANGE, markersize=9)
        place = (row[score], height)
        label = f"{row[score]:.1f}%"
        axes.annotate(label, place, (0, 8), textcoords="offset points", color=report.ORANGE, ha="center")
    axes.set(xlim=(-2, 102), ylim=(-0.6, len(rows) - 0.3), yticks=range(len(rows)))
    axes.set_yticklabels([textwrap.fill(row["name"], 28) for row in reversed(rows)])
    axes.set_xlabel(f"{NAMES[score]}, percent:  ● all questions (bar: the repeats)    | each client's own")
    axes.figure.savefig(path, transparent=True)
