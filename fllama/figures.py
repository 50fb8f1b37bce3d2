"""What people see of a comparison: its tables, and comparison.png."""

import textwrap

import numpy as np

from fllama import report
from fllama.gains import GAINS
from fllama.spread import LEAST_ROWS, LEVEL, mean

COLUMNS = {  # of the table: heading -> (what of a row, how)
    "held-out loss": ("eval_loss", "{:.3f}"),
    "exact match": ("exact_match", "{:.1f}%"),
    "F1": ("f1", "{:.1f}%"),
    "worst client": ("worst_client", "{:.1f}%"),
    "on own rows": ("own_exact_match", "{:.1f}%"),
    "worst on own": ("own_worst_client", "{:.1f}%"),
}
LONG_ANSWERS = {  # of the table instead, where exact match says little
    "held-out loss": COLUMNS["held-out loss"],
    "token accuracy": ("token_accuracy", "{:.1f}%"),
    "ROUGE-L": ("rouge_l", "{:.1f}%"),
    "perplexity": ("perplexity", "{:.2f}"),
}
COSTS = {"tokens": ("tokens", "{:,.0f}"), "MB sent": ("bytes", "{:,.1f}"), "seconds": ("seconds", "{:,.0f}")}
PRIVACY = {  # of the table of costs, too, where a run has it
    "epsilon": ("epsilon", "{:.2f}"),
    "audit AUC": ("audit_auc", "{:.3f}"),
    "epsilon at least": ("epsilon_lower_bound", "{:.2f}"),
}
NAMES = {"exact_match": "exact match", "token_accuracy": "token accuracy", "eval_loss": "held-out loss"}
UNITS = {"bytes": 1e-6}  # of the table, where they are not those of the row
EDGE = " (edge)"
SMALL = 9  # points of a font
BY_CHANCE = LEVEL / 2  # share of clients that are marked as harmed by chance, at most
NAMED_CLIENTS = 3  # clients that are harmed, by name
FACTORS = {"method": "the method", "split": "the split", "interaction": "the two together", "seed": "the training seed"}

# -----------------------------------------------------------------------------
# tables


def comparison_tables(comparison):
    """Return the text of comparison.md."""
    tables = [table_of_arms(comparison), table_of_costs(comparison["rows"]), notes_on_arms(comparison)]
    if comparison["score"] == "exact_match":
        tables.append(table_of_clients(comparison["rows"]))
    tables += [table_of_gains(comparison["rows"]), describe_spread(comparison)]
    if "differences" in comparison:
        for score in (comparison["score"], "eval_loss"):
            tables.append(table_of_differences(comparison, score))
        tables.append(notes_on_differences(comparison))
    elif comparison["repeats"] * comparison["seeds"] == 1:
        advice = "--repeats 5 says which differences are larger."
        tables.append(f"One seed and one split: another split can change the order. {advice}")
    return "\n\n".join(filter(None, tables)) + "\n"


def table_of_arms(comparison):
    columns = COLUMNS if comparison["score"] == "exact_match" else LONG_ANSWERS
    lines = [["", *columns]]
    for row in comparison["rows"]:
        failed = f" ({row['failed']} of {len(row['runs']) + row['failed']} failed)" if row["failed"] else ""
        lines.append([row["name"] + failed, *cells_of_row(row, columns, comparison["score"])])
    return align(lines)


def cells_of_row(row, columns, score=None):
    """Return the figures of a row as text; of the `score`, with its 95% interval."""
    cells = []
    for key, form in columns.values():
        cell = "-" if row[key] is None else form.format(row[key] * UNITS.get(key, 1))
        if key == score and row.get("interval"):
            cell += f" ±{row['interval']['high'] - row[key]:.1f}"
        cells.append(cell)
    return cells


def swept_flags(rows):
    """Return the flags of the sweep, in their order."""
    flags = {}
    for row in rows:
        flags |= row.get("chosen") or {}
    return [flag for flag in flags if flag != "at_edge"]


def notes_on_arms(comparison):
    rows, notes = comparison["rows"], []
    if any(row.get("interval") for row in rows):
        unit = "repeats" if comparison["repeats"] > 1 else "seeds"
        notes.append(f"± is half of a 95% interval over the {unit} (Student's t).")
    if comparison.get("swept"):
        notes.append("Values were chosen on one half of the global held-out rows; the scores are on the other.")
    scored = [run["scored"] for row in rows for run in row["runs"] if run.get("scored")]
    if scored:
        number = f"{min(scored)}" + (f" to {max(scored)}" if max(scored) > min(scored) else "")
        unit = "questions" if comparison["score"] == "exact_match" else "rows"
        notes.append(f"{NAMES[comparison['score']].capitalize()} is of {number} global held-out {unit} in each run.")
    if any((row.get("chosen") or {}).get("at_edge") for row in rows):
        notes.append("(edge): the best value is the first or last that was tried; there may be better ones beyond it.")
    return "\n".join(notes)


def table_of_costs(rows):
    """Return the table of what each arm has sent and spent, with the values that a sweep has chosen for it."""
    flags, columns = swept_flags(rows), dict(COSTS)
    for heading, (key, form) in PRIVACY.items():
        if any(row.get(key) is not None for row in rows):
            columns[heading] = key, form
    lines = [["", *flags, *columns]]
    for row in rows:
        cells, chosen = [row["name"]], row.get("chosen") or {}
        for flag in flags:
            tried = [each[flag] for each in row.get("sweep", []) if flag in each]
            edge = EDGE if chosen.get(flag) in (min(tried, default=None), max(tried, default=None)) else ""
            cells.append(f"{chosen[flag]:g}{edge}" if flag in chosen else "-")
        lines.append(cells + cells_of_row(row, columns))
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
        means = [mean(of_client.get(name, [])) for name in names]
        lines.append([f"client {client}", *["-" if value is None else f"{value:.1f}%" for value in means]])
    return align(lines)


def table_of_gains(rows):
    """Return what each arm is worth to the clients; None without a local arm."""
    lines, most_told = [["gain over local, on own rows", "mean", "least", "most", "harmed"]], 0
    for row in rows:
        gains = sorted_gains(row)
        if not gains:
            continue
        harmed = [client for client, gain in gains if gain["harmed"]]
        told = [client for client, gain in gains if gain["harmed"] is not None]
        most_told = max(most_told, len(told))
        cell = f"{len(harmed)} of {len(told)}" if told else "-"
        if harmed:
            named = [name_of_client(client) for client in harmed[:NAMED_CLIENTS]]
            cell += f": {', '.join(named)}{' ...' if len(harmed) > NAMED_CLIENTS else ''}"
        means = [gain["mean"] for _, gain in gains]
        lines.append([row["name"], *[f"{value:+.1f}" for value in (mean(means), means[0], means[-1])], cell])
    if len(lines) == 1:
        return None
    return f"{align(lines)}\n\n{notes_on_gains(rows, most_told)}"


def notes_on_gains(rows, most_told):
    """Return what is under the table of gains; `most_told` clients of an arm can be told to be harmed or not."""
    notes = [
        "Points; harmed: the 95% interval of the client's gain, over its rows, is below 0, and where answers are",
        "right or wrong, McNemar's exact test says so, too. "
        f"Of the clients that can be told: {LEAST_ROWS} rows at least.",
    ]
    if most_told:
        notes.append(f"About {BY_CHANCE * most_told:.1f} of {most_told} would be by chance.")
    local = next((row for row in rows if row["name"].split()[0] == GAINS["gain_over_local"]), {})
    if local.get("chosen"):
        notes.append("The value of local is the best on global rows. On its own rows a client alone may do better with")
        notes.append("another, so gains may be too large, and harm too rare.")
    return "\n".join(notes)


def sorted_gains(row):
    """Return (client, gain over local) of the clients of a row, the least gain first."""
    gains = [(client, client["gain_over_local"]) for client in row.get("clients", []) if client["gain_over_local"]]
    return sorted(gains, key=lambda each: each[1]["mean"])


def name_of_client(client):
    if client["name"] is not None:
        return str(client["name"])
    return f"client {client['client']}" + (f" of split {client['split']}" if client["split"] is not None else "")


def describe_spread(comparison):
    """Say in a sentence what the spread of the scores is made of, and what was left out of it."""
    variance, left_out = comparison.get("variance"), comparison.get("variance_of", {}).get("left_out")
    without = f" Left out: {', '.join(left_out)}." if left_out else ""
    if not variance:
        text = f"What {NAMES[comparison['score']]} varies by cannot be told.{without}"
        return "\n".join(textwrap.wrap(text, 110)) if without else None
    parts, hidden = [], []
    for factor, words in FACTORS.items():
        if variance[factor] is None:
            hidden.append(words)
        else:
            parts.append(f"{100 * variance[factor]:.0f}% {words}")
    text = f"What {NAMES[comparison['score']]} varies by, as shares of its variance: {', '.join(parts)}, "
    text += f"{100 * variance['residual']:.0f}% the rest."
    if hidden:
        text += f" Not told apart here: {', '.join(hidden)} (--repeats 3 --seeds 2 and two methods do)."
    text += without
    return "\n".join(textwrap.wrap(text, 110))


def table_of_differences(comparison, score):
    form = "{:+.3f}" if score == "eval_loss" else "{:+.1f}"
    unit = "repeats" if comparison["repeats"] > 1 else "seeds"
    lines = [[f"difference in {NAMES[score]}", "mean", "95% interval", "p (Holm)", "verdict", f"{unit} needed"]]
    for each in comparison["differences"]:
        if each["of"] != score:
            continue
        interval = f"{form.format(each['low'])} to {form.format(each['high'])}"
        verdict = "unresolved" if each["unresolved"] else ""
        needed = each["needed_repeats"] if each["unresolved"] else None
        cells = [form.format(each["mean"]), interval, f"{each['adjusted']:.3f}", verdict]
        lines.append([f"{each['a']} - {each['b']}", *cells, f"{needed:,}" if needed else ""])
    return align(lines) if len(lines) > 1 else None


def notes_on_differences(comparison):
    unit, needed = "splits", "repeats"
    if comparison["repeats"] == 1:
        unit, needed = "training seeds of one split", "seeds"
    return (
        f"Paired over the {unit}. Each interval is of its pair alone; the p-values are corrected for all pairs of the\n"
        f"table (Holm), and a pair is unresolved above 0.05. Needed: that many {needed} in all would find such a\n"
        "difference with power 0.8 (paired t-test at 5% divided by the number of pairs, which is enough for Holm)."
    )


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


# -----------------------------------------------------------------------------
# figure


def draw_comparison(comparison):
    """Return the figure of a comparison: each arm's mean score, and what it is worth to each client, if that is known.

    A client is a point with the 95% interval of its gain over local training, the least gain at the bottom of its arm.
    """
    score = comparison["score"]
    rows = [row for row in comparison["rows"] if row[score] is not None][::-1]  # from the bottom to the top
    most_clients = max((len(sorted_gains(row)) for row in rows), default=0)
    height = min(max(0.55, 0.07 * most_clients), 1.6)  # inches of an arm
    panels = 2 if most_clients else 1
    axes = report.new_axes((7.5, 1.1 + height * len(rows)), panels)
    questions = "the scored half of the questions" if comparison.get("swept") else "all questions"
    plot_scores(axes[0], rows, score, questions)
    if most_clients:
        plot_gains(axes[1], rows)
    for each in axes:
        each.set(ylim=(-0.6, len(rows) - 0.4), yticks=range(len(rows)))
        each.tick_params(axis="y", length=0)
        for place in range(1, len(rows)):
            each.axhline(place - 0.5, color=report.GREY, linewidth=0.3)
    axes[0].set_yticklabels([textwrap.fill(row["name"], 22) for row in rows])
    return axes[0].figure


def plot_scores(axes, rows, score, questions):
    """Draw the mean of each arm with its 95% interval, and each of its runs as a small point."""
    for place, row in enumerate(rows):
        runs = [run[score] for run in row["runs"] if run[score] is not None]
        axes.plot(runs, [place - 0.2] * len(runs), ".", color=report.GREY, markersize=4)
        if row.get("interval"):
            ends = [max(0, row["interval"]["low"]), min(100, row["interval"]["high"])]
            axes.plot(ends, [place] * 2, color=report.BLUE, linewidth=2.5, solid_capstyle="round")
        axes.plot(row[score], place, "o", color=report.BLUE, markersize=7)
        label = f"{row[score]:.1f}%"
        above = {"textcoords": "offset points", "color": report.BLUE, "ha": "center", "fontsize": SMALL}
        axes.annotate(label, (row[score], place), (0, 6), **above)
    axes.margins(x=0.12)
    axes.set_xlabel(f"{NAMES[score]}, {questions}, percent\n● mean, 95% interval  · each run", fontsize=SMALL)


def plot_gains(axes, rows):
    """Draw the gain of each client over its local model, sorted, with its 95% interval."""
    for place, row in enumerate(rows):
        gains = sorted_gains(row)
        heights = place + np.linspace(-0.36, 0.36, len(gains)) if len(gains) > 1 else [place]
        for (_, gain), height in zip(gains, heights):
            color = report.ORANGE if gain["harmed"] else report.BLUE
            if gain["low"] is not None:
                axes.plot([gain["low"], gain["high"]], [height] * 2, color=color, linewidth=1, alpha=0.45)
            axes.plot(gain["mean"], height, "o", color=color, markersize=3)
    axes.axvline(0, color=report.GREY, linewidth=1)
    axes.margins(x=0.05)
    axes.set_yticklabels([])
    axes.set_xlabel("gain over local, points: each client\non its own rows, 95% interval", fontsize=SMALL)
    axes.set_title("orange: harmed", color=report.ORANGE, fontsize=SMALL, loc="left")


def plot_comparison(comparison, path):
    draw_comparison(comparison).savefig(path, transparent=True)
