"""What federation is worth to each client: its score on its own held-out rows, against training alone and pooling."""

import collections
import json
from pathlib import Path

from fllama import spread
from fllama.spread import mean

GAINS = {"gain_over_local": "local", "gain_over_pooled": "centralized"}  # of a client, over its score with that arm


def read_scores(folder):
    """Return the scores of each held-out row of a run, see evaluate.scores_of_rows."""
    return json.loads(Path(folder, "scores.json").read_text(encoding="utf-8"))


def own_scores(runs, score):
    """Return {client: {row number: scores in percent}}: what the runs of an arm have got on the clients' own rows.

    A client is (split, number, name). One that the data set names is the same on every split, which is None then.
    """
    found = collections.defaultdict(lambda: collections.defaultdict(list))
    for run in runs:
        partition = json.loads(Path(run.folder, "partition.json").read_text(encoding="utf-8"))
        for table in read_scores(run.folder):
            if table["of"] != "own":
                continue
            name = partition["clients"][table["client"]].get("name")
            client = (partition["seed"] if name is None else None, table["client"], name)
            for number, value in zip(table["row"], score_of_rows(table, score)):
                if value is not None:
                    found[client][number].append(100 * value)
    return found


def score_of_rows(table, score):
    if score in table:
        return table[score]
    return [correct / tokens if tokens else None for correct, tokens in zip(table["correct"], table["tokens"])]


def clients_of_arm(own, own_of_baselines, score):
    """Return `clients` of a row: of each client its mean score on its own held-out rows, and what it has gained.

    `own` is from `own_scores` of `score`, `own_of_baselines` has the same of a baseline for each of GAINS, or {} for no
    gain. A gain is over the same rows of the baseline; each row counts once, with its mean over the runs that held it
    out.
    """
    clients = []
    for key, rows in sorted(own.items(), key=in_order):
        split, client, name = key
        scores = {number: mean(values) for number, values in rows.items()}
        each = {"client": client, "name": name, "split": split, "rows": len(rows), "score": mean(scores.values())}
        for gain, baseline in own_of_baselines.items():
            differences = []
            for number, values in baseline.get(key, {}).items():
                if number in scores:
                    differences.append(scores[number] - mean(values))
            each[gain] = spread.gain_over_rows(differences, score == "exact_match") if differences else None
        clients.append(each)
    return clients


def in_order(item):
    (split, client, _), _ = item
    return split or 0, client
