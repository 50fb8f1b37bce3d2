"""What the runs of a comparison have come to: a row of each arm, the choice of a sweep, differences and spread."""

import collections
import itertools
import json
import math
from pathlib import Path

import numpy as np

from fllama import gains, spread
from fllama.gains import read_scores
from fllama.spread import least, mean

FIGURES = """eval_loss exact_match f1 token_accuracy rouge_l perplexity worst_client own_exact_match own_worst_client
tokens bytes seconds epsilon audit_auc epsilon_lower_bound scored""".split()  # of a row: means over its runs

# -----------------------------------------------------------------------------
# a run


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


# -----------------------------------------------------------------------------
# the sweep: chosen on one half of the global held-out rows, scored on the other


def choosing_half(number, seed):
    """Whether the global held-out row `number` is of the half on which values are chosen; the others are scored.

    It depends on the row and on the first seed of the comparison alone. So a row is in the same half for all arms,
    values and repeats: a choice that is made over all repeats has seen no row that is scored in any of them. (Rows
    that are in the data twice may be in both halves.)
    """
    return bool(np.random.default_rng([seed, number]).integers(2))


def scores_on(scores, counts):
    """Return the scores of a run on those of its global held-out rows for which `counts(row number)`.

    If clients have models of their own: the means over these, and the worst of them as `worst_client`.
    """
    models = []
    for table in scores:
        if table["of"] == "global":
            models.append(scores_of_model(table, counts))
    found = {key: mean([model[key] for model in models]) for key in models[0]}
    return found | {"worst_client": least(model["exact_match"] for model in models)}


def count_scored(scores, score, counts):
    """Return how many of the global held-out rows that `counts` a model's `score` is of: answered ones, or all."""
    table = next(table for table in scores if table["of"] == "global")
    known = table[score] if score in table else table["row"]
    return sum(counts(number) and value is not None for number, value in zip(table["row"], known))


def scores_of_model(table, counts):
    places = [place for place, number in enumerate(table["row"]) if counts(number)]
    sums = {}
    for name in ("nats", "tokens", "correct"):
        sums[name] = sum(table[name][place] for place in places)
    found = dict.fromkeys(("eval_loss", "token_accuracy", "perplexity"))
    if sums["tokens"]:
        loss = sums["nats"] / sums["tokens"]
        accuracy = 100 * sums["correct"] / sums["tokens"]
        found = {"eval_loss": loss, "token_accuracy": accuracy, "perplexity": math.exp(min(loss, 700))}
        if not math.isfinite(loss):
            found |= {"eval_loss": None, "perplexity": None}
    for name in ("exact_match", "f1", "rouge_l"):
        share = mean([table[name][place] for place in places])
        found[name] = None if share is None else 100 * share
    return found


def choose(candidates, key):
    """Return the number of the best candidate: the highest score `key` in the mean, then the lowest held-out loss.

    A candidate is the list of the scores of its runs, on the rows for choosing; None of a run that failed. One with
    fewer runs comes behind, as it may be without the hard ones. None if no run has ended well.
    """
    best, best_rank = None, None
    for number, runs in enumerate(candidates):
        score, loss = mean_of(runs, key), mean_of(runs, "eval_loss")
        ended = len(runs) - runs.count(None)
        rank = ended, -math.inf if score is None else score, -math.inf if loss is None else -loss
        if ended and (best is None or rank > best_rank):
            best, best_rank = number, rank
    return best


def mean_of(runs, key):
    """Return the mean of a score over the runs that have ended well."""
    return mean([run.get(key) for run in runs if run])


def choose_value(candidates, grid, key, seed):
    """Return (runs of the best value, what the row says of the choice): `chosen`, and what each value came to.

    `candidates` has the runs of each value (None: failed), `grid` the values, {flag: text}, both by the same keys.
    """
    scores, tried = [], []
    for name, runs in candidates.items():
        of_runs = [run and scores_on(read_scores(run.folder), lambda row: choosing_half(row, seed)) for run in runs]
        scores.append(of_runs)
        values = {flag: float(value) for flag, value in grid[name].items()}
        tried.append(values | {key: mean_of(of_runs, key), "eval_loss": mean_of(of_runs, "eval_loss")})
    best = choose(scores, key) or 0
    runs, values = list(candidates.values())[best], list(grid.values())
    if not values[best]:  # there was nothing to choose
        return runs, {"chosen": None}
    failed = not any(runs)
    return runs, {"chosen": None if failed else describe_choice(values[best], values), "sweep": tried}


def describe_choice(values, grid):
    """Return `chosen` of a row: {flag: value}, and whether one lies at the edge of the values that were tried."""
    chosen = {flag: float(value) for flag, value in values.items()}
    at_edge = False
    for flag, value in chosen.items():
        tried = [float(other[flag]) for other in grid]
        at_edge = at_edge or value in (min(tried), max(tried))
    return chosen | {"at_edge": at_edge}


# -----------------------------------------------------------------------------
# the comparison


def compare_runs(args, arms, runs, ended):
    """Return what comparison.json holds, of the runs of a comparison (compare.Planned) and whether each ended well.

    With --sweep, each row is of the value that was best on the rows for choosing, and its scores are on the others:
    also of an arm that has nothing to choose. `swept` names the flags.
    """
    runs_of, ended_of = collections.defaultdict(list), collections.defaultdict(list)
    for run, well in zip(runs, ended):
        runs_of[run.arm].append(run)
        ended_of[run.arm].append(well)
    score = name_of_score([comparison_row(run.arm, run.folder) for run, well in zip(runs, ended) if well])
    chosen, own, columns = {}, {}, []
    for arm in arms:
        candidates, grid = collections.defaultdict(list), {}  # of each value its runs, None for one that failed
        for run, well in zip(runs_of[arm], ended_of[arm]):
            key = json.dumps(run.values)
            grid[key] = run.values
            candidates[key].append(run if well else None)
        best, chosen[arm] = choose_value(candidates, grid, score, args.seed)
        columns.append([row_of_run(run, bool(args.sweep), args.seed, score) for run in best])
        own[arm] = gains.own_scores([run for run in best if run], score)
    comparison = {"swept": list(dict.fromkeys(flag for _, flag, _ in args.sweep or []))}
    comparison |= compare_rows(arms, list(zip(*columns)), args.seeds)
    for row in comparison["rows"]:
        others = {}  # what the row's clients are compared with
        for gain, name in gains.GAINS.items():
            baseline = next((arm for arm in arms if arm.split()[0] == name), row["name"])
            others[gain] = own[baseline] if baseline != row["name"] else {}
        row |= chosen[row["name"]] | {"clients": gains.clients_of_arm(own[row["name"]], others, score)}
    return comparison


def name_of_score(rows):
    """Return the score by which arms are compared: exact match, or where answers are long token accuracy."""
    for row in rows:
        if row and "exact_match" not in row.get("headline", ["exact_match"]):
            return "token_accuracy"
    return "exact_match"


def row_of_run(run, is_swept, seed, score):
    """Return the row of a run; with a sweep, scored on the rows that were not for choosing. None if it failed.

    `scored` is how many questions, or rows, the `score` is of.
    """
    if run is None:
        return None
    row, scores = comparison_row(run.arm, run.folder), read_scores(run.folder)
    if not is_swept:
        return row | {"scored": count_scored(scores, score, lambda number: True)}
    for client in row["clients"]:
        client.pop("global", None)  # of all rows

    def is_scored(number):
        return not choosing_half(number, seed)

    return row | scores_on(scores, is_scored) | {"scored": count_scored(scores, score, is_scored)}


def compare_rows(names, repeats, seeds=1):
    """Return what comparison.json holds, of one list of rows (or None) for each repeat, in the order of `names`.

    With several `seeds`, a repeat has as many lists, one after the other. Rows are means over the runs that have ended
    well. `differences` holds for each two arms the mean of the paired differences with its 95% interval: a pair is a
    split, the mean over its seeds, or with one split a seed. A pair of arms is unresolved if its p-value, corrected for
    the number of all pairs (`adjusted`, Holm), is above 5%. `variance` has what the spread of the scores is made of,
    and `variance_of` the arms it is of, and what was left out.
    """
    runs_of = dict(zip(names, zip(*repeats)))
    splits = len(repeats) // seeds
    rows, differences, score = [], [], name_of_score(itertools.chain.from_iterable(repeats))
    for name, runs in runs_of.items():
        ended = [run for run in runs if run]
        row = {"name": name}
        for key in FIGURES:
            row[key] = mean_of(runs, key)
        row["interval"] = interval_of_arm(runs, score, seeds if splits > 1 else 1)
        rows.append(row | {"failed": len(runs) - len(ended), "runs": ended})
    for key in (score, "eval_loss"):
        differences += compare_pairs(runs_of, key, seeds if splits > 1 else 1)
    comparison = {"repeats": splits, "seeds": seeds, "score": score, "rows": rows}
    if len(repeats) > 1:
        comparison["variance"], comparison["variance_of"] = shares_of_runs(runs_of, score, splits, seeds)
    return comparison | {"differences": differences} if differences else comparison


def interval_of_arm(runs, key, group):
    """Return {low, high}, the 95% interval of the mean over the splits; None for fewer than 3."""
    found = spread.interval_of_mean(means_of_groups([run and run.get(key) for run in runs], group))
    return {"low": found[1], "high": found[2]} if found else None


def means_of_groups(values, group):
    """Return the mean of each `group` of values that has one; None does not count."""
    means = [mean(values[first : first + group]) for first in range(0, len(values), group)]
    return [value for value in means if value is not None]


def compare_pairs(runs_of, key, group):
    """Return the paired test of each two arms that have enough pairs for one, see spread.paired_test.

    Repeats are needed for 5% divided by the number of tests, which is enough for Holm whatever the others come to.
    """
    found, pairs = {}, []
    for a, b in itertools.combinations(runs_of, 2):
        differences = paired_differences(runs_of[a], runs_of[b], key, group)
        if len(differences) >= spread.LEAST_PAIRS:
            found[a, b] = differences
    for (a, b), differences in found.items():
        test = spread.paired_test(differences, spread.LEVEL / len(found))
        pairs.append({"a": a, "b": b, "of": key, "pairs": len(differences)} | test)
    for pair, adjusted in zip(pairs, spread.holm([pair["p"] for pair in pairs])):
        pair |= {"adjusted": adjusted, "unresolved": adjusted > spread.LEVEL}
        if pair["unresolved"] and pair["needed_repeats"]:
            pair["needed_repeats"] = max(pair["needed_repeats"], pair["pairs"] + 1)
    return pairs


def paired_differences(runs, others, key, group=1):
    """Return the differences of two arms, the mean over each `group` of runs; without those that a failed run lacks."""
    differences = []
    for run, other in zip(runs, others):
        both = run and other and run.get(key) is not None and other.get(key) is not None
        differences.append(run[key] - other[key] if both else None)
    return means_of_groups(differences, group)


def shares_of_runs(runs_of, key, splits, seeds):
    """Return (variance shares of the arms, of which table: `arms`, and `left_out` with the reasons).

    The baselines are left out if two other arms remain: to train alone or to pool is no method of averaging, and its
    distance from all others would be most of what is told. So are the splits on which all arms have failed (with one
    split, the seeds), and then the arms of which a run has failed. None in place of shares if nothing remains.
    """
    scores, left_out = {}, []
    for name, runs in runs_of.items():
        values = [run.get(key) if run else None for run in runs]
        scores[name] = np.reshape(np.array(values, dtype=float), (splits, seeds))
    averaging = {name: table for name, table in scores.items() if name.split()[0] not in gains.GAINS.values()}
    complete = complete_arms(averaging)
    if len(complete) < 2:
        averaging, complete = scores, complete_arms(scores)
    for name in runs_of:
        if name not in averaging:
            left_out.append(f"{name} (a baseline)")
        elif name not in complete:
            left_out.append(f"{name} (a run failed)")
    table = np.array(list(complete.values()))
    if not complete:
        return None, {"arms": [], "left_out": left_out}
    for unit, of_all, kept in (("splits", splits, table.shape[1]), ("seeds", seeds, table.shape[2])):
        if kept < of_all:
            left_out.append(f"{of_all - kept} of {of_all} {unit} (all arms failed)")
    return spread.variance_shares(table), {"arms": list(complete), "left_out": left_out}


def complete_arms(scores):
    """Return {name: (splits, seeds)} of the arms without a failed run (nan), where it is not that all have failed.

    A split in which all arms have failed with a seed is left out, so that the rest is balanced; of one split, the seed.
    """
    if not scores:
        return {}
    tables = np.array(list(scores.values()))  # (arms, splits, seeds)
    failed = np.isnan(tables).all(axis=0)
    if len(failed) > 1:
        tables = tables[:, ~failed.any(axis=1)]
    else:
        tables = tables[:, :, ~failed[0]]
    return {name: table for name, table in zip(scores, tables) if table.size and not np.isnan(table).any()}
