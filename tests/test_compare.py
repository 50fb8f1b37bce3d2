"""--compare: rows, sweeps, gains and tables by hand, and a small comparison with all its runs."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import main
import utils
from fllama import compare, figures, gains, launch, options, prepare, results, spread
from fllama.figures import comparison_tables
from fllama.results import compare_rows, comparison_row

# -----------------------------------------------------------------------------
# by hand


def row(name, exact_match, eval_loss=1.0):
    """A row with the figures of one run, and zeros where they do not matter."""
    no_privacy = {"epsilon": None, "audit_auc": None, "epsilon_lower_bound": None}
    return dict.fromkeys(results.FIGURES, 0) | {
        **no_privacy,
        "name": name,
        "exact_match": exact_match,
        "eval_loss": eval_loss,
        "clients": [],
    }


def test_intervals_by_hand():
    """Paired differences 1, 2, 3: mean 2, standard deviation 1, t(2) = 4.303, so 2 +- 2.484; of 11, 12, 13: 12."""
    repeats = [
        [row("a", 51), row("b", 50), row("c", 40)],
        [row("a", 62), row("b", 60), row("c", 50)],
        [row("a", 73), row("b", 70), row("c", 60)],
    ]
    comparison = compare_rows(["a", "b", "c"], repeats)
    assert [each["exact_match"] for each in comparison["rows"]] == [62, 60, 50]
    ab, ac, bc = [each for each in comparison["differences"] if each["of"] == "exact_match"]
    assert (ab["a"], ab["b"], ab["mean"], ab["unresolved"]) == ("a", "b", 2, True)
    half = pytest.approx(4.303 / 3**0.5, abs=1e-3)
    assert ab["mean"] - ab["low"] == half and ab["high"] - ab["mean"] == half
    assert ac["mean"] == 12 and 12 - ac["low"] == half and not ac["unresolved"]
    assert (bc["low"], bc["high"], bc["p"], bc["unresolved"]) == (10, 10, 0.25, True)  # equal: by their signs
    losses = [each for each in comparison["differences"] if each["of"] == "eval_loss"]
    assert all(each["mean"] == 0 and each["unresolved"] for each in losses)
    tables = comparison_tables(comparison)
    assert sum("| unresolved |" in line for line in tables.splitlines()) == 5
    line = next(line for line in tables.splitlines() if line.startswith("| a - b"))
    assert "+2.0" in line and "-0.5 to +4.5" in line
    # p is 0.0742, 0.0023 and 0.25: the least of three counts three times. 5 pairs would tell a difference of 2
    # deviations at 5%, and 6 at 5% / 3; equal differences of one sign are below 5% / 3 from 7 on
    assert [each["adjusted"] for each in (ab, ac, bc)] == pytest.approx([2 * 0.0742, 3 * 0.00231, 0.25], abs=1e-4)
    assert (ab["needed_repeats"], bc["needed_repeats"], ab["pairs"]) == (6, 7, 3)
    assert [cell.strip() for cell in line.split("|")[4:7]] == ["0.148", "unresolved", "6"]
    assert "| repeats needed |" in tables
    # the variance: splits 51 62 73 in the mean 11 apart, methods 62 60 50
    squares = {"split": 3 * 2 * 10.333**2, "method": 3 * (4.667**2 + 2.667**2 + 7.333**2)}
    assert comparison["variance"]["split"] / comparison["variance"]["method"] == pytest.approx(
        squares["split"] / squares["method"], rel=1e-2
    )
    assert comparison["variance"]["seed"] is None and comparison["rows"][0]["interval"]["low"] == pytest.approx(
        34.7, abs=0.1
    )


def test_long_answers_are_compared_by_token_accuracy():
    """Where exact match is not the headline, table and differences show what is; a client without a score is "-"."""
    scores = {"headline": ["token_accuracy", "rouge_l", "perplexity"], "rouge_l": 30.0, "perplexity": 2.5}
    repeats = []
    for accuracy in (50.0, 60.0, 70.0):
        one, other = (row(name, None) | scores for name in "ab")
        repeats.append([one | {"token_accuracy": accuracy + 1}, other | {"token_accuracy": accuracy}])
    comparison = compare_rows(["a", "b"], repeats)
    assert comparison["rows"][0]["token_accuracy"] == 61 and comparison["rows"][0]["exact_match"] is None
    assert [each["of"] for each in comparison["differences"]] == ["token_accuracy", "eval_loss"]
    assert comparison["differences"][0]["mean"] == 1
    tables = comparison_tables(comparison)
    assert "token accuracy" in tables and "exact match" not in tables
    line = next(line for line in tables.splitlines() if line.startswith("| a "))
    assert [cell.strip() for cell in line.split("|")[3:6]] == ["61.0% ±24.8", "30.0%", "2.50"]


def test_runs_that_failed_are_left_out_and_counted():
    repeats = [
        [row("a", 50), row("b", 40)],
        [row("a", 70), None],
        [row("a", 60), row("b", 46)],
        [row("a", 1), row("b", 1)],
    ]
    comparison = compare_rows(["a", "b"], repeats)
    assert [each["exact_match"] for each in comparison["rows"]] == [45.25, 29]
    assert [each["failed"] for each in comparison["rows"]] == [0, 1]
    assert comparison["differences"][0]["mean"] == 8  # of the three pairs that are there
    assert "b (1 of 4 failed)" in comparison_tables(comparison)
    comparison = compare_rows(["a", "b"], [[row("a", 50), None]])
    assert comparison["rows"][1]["exact_match"] is None and "differences" not in comparison
    assert "--repeats" in comparison_tables(comparison)


def scores_of(**arms):
    """Runs of arms, of their scores in the order of splits and seeds; None for one that failed."""
    runs_of = {}
    for name, scores in arms.items():
        runs_of[name] = [None if score is None else {"x": float(score)} for score in scores]
    return runs_of


def test_a_refused_split_or_a_failed_run_does_not_empty_the_variance():
    """All failed on the second split: the other three remain. One run of `c` failed: the other arms remain."""
    whole = scores_of(a=[1, 2, 4], b=[2, 5, 3])
    expected, of = results.shares_of_runs(whole, "x", 3, 1)
    assert of == {"arms": ["a", "b"], "left_out": []}
    runs_of = scores_of(a=[1, None, 2, 4], b=[2, None, 5, 3], c=[None, None, 1, 1])
    shares, of = results.shares_of_runs(runs_of, "x", 4, 1)
    assert shares == expected and of["arms"] == ["a", "b"]
    assert of["left_out"] == ["c (a run failed)", "1 of 4 splits (all arms failed)"]
    # with two seeds, a split that lacks one goes as a whole; of one split, only the seed
    runs_of = scores_of(a=[1, 2, 9, None, 4, 3], b=[3, 5, 9, None, 6, 2])
    shares, of = results.shares_of_runs(runs_of, "x", 3, 2)
    assert shares == spread.variance_shares(np.array([[[1, 2], [4, 3]], [[3, 5], [6, 2]]]))
    assert of["left_out"] == ["1 of 3 splits (all arms failed)"]
    shares, of = results.shares_of_runs(scores_of(a=[1, None, 2, 4], b=[2, None, 5, 3]), "x", 1, 4)
    assert shares["seed"] == expected["split"] and of["left_out"] == ["1 of 4 seeds (all arms failed)"]
    shares, of = results.shares_of_runs(scores_of(a=[1, None, 2], b=[None, 3, 4]), "x", 3, 1)
    assert (shares, of) == (None, {"arms": [], "left_out": ["a (a run failed)", "b (a run failed)"]})


def test_baselines_are_not_in_the_variance():
    """Unless fewer than two other arms remain."""
    arms = {
        "local --learning_rate 5e-3": [0, 1, 0],
        "fedavg": [51, 52, 54],
        "ffa": [52, 55, 53],
        "centralized": [90] * 3,
    }
    shares, of = results.shares_of_runs(scores_of(**arms), "x", 3, 1)
    assert shares == pytest.approx(results.shares_of_runs(scores_of(a=[1, 2, 4], b=[2, 5, 3]), "x", 3, 1)[0])
    assert of["left_out"] == ["local --learning_rate 5e-3 (a baseline)", "centralized (a baseline)"]
    shares, of = results.shares_of_runs(scores_of(**arms | {"ffa": [1, 2, None]}), "x", 3, 1)
    assert of["arms"] == ["local --learning_rate 5e-3", "fedavg", "centralized"] and shares["method"] > 0.9


def test_what_was_left_out_of_the_variance_is_said():
    repeats = [[row("local", 1), row("a", 50), row("b", 40)], [row("local", 2), row("a", 60), row("b", 47)], [None] * 3]
    text = " ".join(comparison_tables(compare_rows(["local", "a", "b"], repeats)).split())
    assert "Left out: local (a baseline), 1 of 3 splits (all arms failed)." in text and "the method" in text
    repeats = [[row("a", 50), None], [None, row("b", 40)], [None, None]]
    text = " ".join(comparison_tables(compare_rows(["a", "b"], repeats)).split())
    assert "varies by cannot be told. Left out: a (a run failed), b (a run failed)." in text


def test_row_of_a_run(tmp_path):
    """Worst and mean of the clients; a loss that is no number is left out."""
    summary = {
        "eval_loss": {"last": float("nan")},
        "exact_match": {"after": 50},
        "f1": {"after": 60},
        "tokens": 1,
        "bytes": 1,
    }
    summary |= {"seconds": {"local": 1, "average": 1}, "per_client": []}
    summary["per_client"] = [{"client": 0, "exact_match": 40}, {"client": 1, "exact_match": 20}]
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    one = comparison_row("a", tmp_path)
    assert one["eval_loss"] is None and one["own_exact_match"] == 30 and one["own_worst_client"] == 20
    assert one["worst_client"] == one["exact_match"] == 50  # of the model that all share
    for client, exact_match in zip(summary["per_client"], (60, 35)):  # of their own
        client["global"] = {"exact_match": exact_match}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert comparison_row("a", tmp_path)["worst_client"] == 35
    comparison = compare_rows(["a", "b"], [[one, row("b", 10)]] * 3)
    assert [each["of"] for each in comparison["differences"]] == ["exact_match"]
    assert "nan" not in comparison_tables(comparison)


def test_arms_and_their_flags():
    arms = compare.find_arms("local, fedavg --local_steps  32,ffa")
    assert arms == {
        "local": ["--aggregator", "none"],
        "fedavg --local_steps 32": ["--aggregator", "fedavg", "--local_steps", "32"],
        "ffa": ["--lora_variant", "ffa"],
    }
    assert {"local", "centralized", "scaffold", *utils.AGGREGATORS} - {"none"} <= set(compare.ARMS)


def test_interval_of_many_pairs():
    """Student's t of 9 degrees of freedom; a run that failed takes its pair along, and of 2 pairs there is none."""
    runs = [{"x": float(i)} for i in range(11)]
    found = spread.paired_test(results.paired_differences([*runs, None], [{"x": 0.0}] * 10 + [None] * 2, "x"))
    half = 2.262 * (sum((i - 4.5) ** 2 for i in range(10)) / 9) ** 0.5 / 10**0.5
    assert (found["mean"], found["high"]) == (4.5, pytest.approx(4.5 + half, abs=1e-3)) and found["p"] < 0.05
    assert results.paired_differences(runs[:2], runs[:2], "x") == [0, 0] and spread.paired_test([0, 0]) is None
    assert results.compare_pairs({"a": runs[:2], "b": runs[:2]}, "x", 1) == []


def test_an_unresolved_pair_needs_more_repeats_than_it_has():
    """Mean 1 and deviation 1 of five pairs: alone, p is 9% and 10 pairs would do; of 28 pairs of arms, more must be."""
    steps = [-0.26491, 0.36754, 1.0, 1.63246, 2.26491]
    runs_of = {"a": [{"x": step} for step in steps], "b": [{"x": 0.0}] * 5}
    (alone,) = results.compare_pairs(runs_of, "x", 1)
    assert (alone["unresolved"], alone["needed_repeats"]) == (True, 10)
    for name in "cdefgh":
        runs_of[name] = [{"x": 0.0}] * 5
    first, *others = results.compare_pairs(runs_of, "x", 1)
    assert len(others) == 27 and first["needed_repeats"] == spread.needed_repeats(1, 1, 0.05 / 28) > 10


def test_a_pair_is_a_split_and_the_mean_of_its_seeds():
    """Six runs of three splits are three pairs: 1 and 3, 2 alone, 5 and 7. With one split, the seeds are pairs."""
    repeats = [[row("a", 50.0 + more), row("b", 50.0)] for more in (1, 3, 2, 9, 5, 7)]
    repeats[3][1] = None
    (found, _) = compare_rows(["a", "b"], repeats, seeds=2)["differences"]
    assert found["mean"] == pytest.approx((2 + 2 + 6) / 3)
    comparison = compare_rows(["a", "b"], [[row("a", 51.0 + more), row("b", 50.0)] for more in range(4)], seeds=4)
    assert comparison["differences"][0]["mean"] == 2.5 and comparison["variance"]["split"] is None
    assert (comparison["repeats"], comparison["seeds"]) == (1, 4)
    tables = comparison_tables(comparison)
    assert "training seeds of one split" in tables and "| seeds needed |" in tables and "many seeds in all" in tables


def test_columns_of_privacy_are_there_if_a_run_has_them():
    private = {"epsilon": 7.99, "audit_auc": 0.517, "epsilon_lower_bound": 0.0}
    plain = comparison_tables(compare_rows(["a", "b"], [[row("a", 51), row("b", 50)]]))
    assert "epsilon" not in plain and "AUC" not in plain
    lines = comparison_tables(compare_rows(["a", "b"], [[row("a", 51) | private, row("b", 50)]])).splitlines()
    heading = next(number for number, line in enumerate(lines) if "| epsilon | audit AUC | epsilon at least |" in line)
    assert lines[heading + 2].endswith("7.99 |     0.517 |             0.00 |") and lines[heading + 3].endswith("- |")


def test_table_of_clients_of_many_is_left_out():
    clients = [{"client": client, "exact_match": 50.0} for client in range(25)]
    rows = [row("a", 50) | {"runs": [{"clients": clients}]}]
    assert figures.table_of_clients(rows) is None
    rows[0]["runs"][0]["clients"] = clients[:24]
    assert "| client 23 " in figures.table_of_clients(rows)


# -----------------------------------------------------------------------------
# a sweep, and gains: by hand, on what runs leave behind


def table(of, rows, right, client=None):
    """What scores.json says of rows whose answers are right (1) or wrong (0), with a loss of 1 or 2."""
    each = {"of": of, "row": list(rows), "nats": [2.0 - value for value in right], "tokens": [1] * len(right)}
    each |= {"correct": [0] * len(right), "exact_match": list(right), "f1": list(right), "rouge_l": list(right)}
    return each | ({} if client is None else {"client": client})


def leave_run(folder, tables, names=(None, None), split=42):
    """Leave what compare reads of a run."""
    folder.mkdir(parents=True)
    summary = dict.fromkeys(("exact_match", "f1"), {"after": 0.0}) | {"tokens": 1, "bytes": 1}
    summary |= {"eval_loss": {"last": 1.0}, "seconds": {"local": 1, "average": 1}, "per_client": []}
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "scores.json").write_text(json.dumps(tables))
    clients = [{"client": number} | ({"name": name} if name else {}) for number, name in enumerate(names)]
    (folder / "partition.json").write_text(json.dumps({"seed": split, "clients": clients}))
    return folder


def planned(arm, folder, **values):
    return compare.Planned(arm, values, arm, folder, None, [])


SWEPT = SimpleNamespace(sweep=[("", "learning_rate", ["1e-3", "3e-3"])], seed=42, seeds=1)


def swept_runs(folder):
    """Two values on two splits whose held-out rows overlap: 1e-3 knows the rows for choosing alone, 3e-3 the others."""
    runs = []
    for repeat, rows in enumerate((range(60), range(30, 100))):
        choosing = [float(results.choosing_half(number, 42)) for number in rows]
        others = [1 - each for each in choosing]
        others[choosing.index(1)] = 1.0  # and one more: of all rows, it knows more
        if sum(others) <= sum(choosing):
            others = [1.0 if number % 3 else other for number, other in zip(rows, others)]
        for value, right in (("1e-3", choosing), ("3e-3", others)):
            place = leave_run(folder / f"{value}_{repeat}", [table("global", rows, right)], split=42 + repeat)
            runs.append(planned("fedavg", place, learning_rate=value))
    return runs


def assert_choice_is_blind(runs):
    """The value that knows the rows for choosing is chosen, and scored on the others, of which it knows none."""
    (row,) = results.compare_runs(SWEPT, ["fedavg"], runs, [True] * 4)["rows"]
    assert row["chosen"] == {"learning_rate": 0.001, "at_edge": True} and row["exact_match"] == 0
    assert row["sweep"][0]["exact_match"] == 100 and row["sweep"][1]["exact_match"] < 100
    assert row["eval_loss"] == 2 and row["worst_client"] == 0


def test_a_sweep_does_not_see_the_rows_that_it_is_scored_on(tmp_path):
    assert_choice_is_blind(swept_runs(tmp_path))


def test_a_sweep_that_sees_the_rows_that_it_is_scored_on_is_caught(tmp_path, monkeypatch):
    """Planted leaks: the choice is made on all rows; it is made on the scored ones; the halves of repeats overlap."""
    runs, original = swept_runs(tmp_path), results.scores_on
    monkeypatch.setattr(results, "scores_on", lambda scores, counts: original(scores, lambda number: True))
    with pytest.raises(AssertionError):
        assert_choice_is_blind(runs)
    monkeypatch.setattr(results, "scores_on", lambda scores, counts: original(scores, lambda row: not counts(row)))
    with pytest.raises(AssertionError):
        assert_choice_is_blind(runs)
    monkeypatch.setattr(results, "scores_on", original)
    assert_choice_is_blind(runs)
    splits = []  # of the run whose scores were read last

    def read_scores(folder):
        splits.append(json.loads((folder / "partition.json").read_text())["seed"])
        return gains.read_scores(folder)

    monkeypatch.setattr(results, "read_scores", read_scores)
    half = results.choosing_half
    monkeypatch.setattr(results, "choosing_half", lambda number, seed: half(number, splits[-1]))
    with pytest.raises(AssertionError):
        assert_choice_is_blind(runs)
    monkeypatch.setattr(results, "choosing_half", lambda number, seed: half(number, splits[0]))
    assert_choice_is_blind(runs)  # it was the split


def test_halves_are_the_same_on_every_split():
    """About as many rows in either; other ones with another seed of the comparison."""
    half = [results.choosing_half(number, 42) for number in range(400)]
    assert 160 < sum(half) < 240 and half == [results.choosing_half(number, 42) for number in range(400)]
    assert half != [results.choosing_half(number, 43) for number in range(400)]


def test_questions_that_are_scored_are_counted(tmp_path):
    """Of 60 rows without a sweep the 50 that are answered; of 40 and 60 with one, about a half of each."""
    answered = table("global", range(60), [1.0] * 60)
    answered["exact_match"][50:] = [None] * 10
    run = planned("fedavg", leave_run(tmp_path / "all", [answered]))
    args = SimpleNamespace(sweep=None, seed=42, seeds=1)
    comparison = results.compare_runs(args, ["fedavg"], [run], [True])
    assert comparison["rows"][0]["scored"] == 50
    assert "Exact match is of 50 global held-out questions in each run." in comparison_tables(comparison)
    runs, expected = [], []
    for number in (40, 60):
        expected.append(sum(not results.choosing_half(row, 42) for row in range(number)))
        place = leave_run(tmp_path / str(number), [table("global", range(number), [1.0] * number)])
        runs.append(planned("fedavg", place, learning_rate="1e-3"))
    comparison = results.compare_runs(SWEPT, ["fedavg"], runs, [True, True])
    assert [run["scored"] for run in comparison["rows"][0]["runs"]] == expected
    assert comparison["rows"][0]["scored"] == sum(expected) / 2
    assert f"is of {expected[0]} to {expected[1]} global held-out questions" in comparison_tables(comparison)


def test_choice_of_a_value():
    """The best mean score, then the lowest loss; a value with runs that failed comes behind those without."""
    good, better, worse = ({"x": score, "eval_loss": 1.0} for score in (50.0, 60.0, 40.0))
    assert results.choose([[good, good], [better, worse], [better, good]], "x") == 2
    assert results.choose([[good, good], [better, worse | {"eval_loss": 0.5}]], "x") == 1
    assert results.choose([[worse, worse], [better, None]], "x") == 0
    assert results.choose([[None], [None]], "x") is None
    assert results.choose([[{"x": None, "eval_loss": 2.0}], [{"x": None, "eval_loss": 1.0}]], "x") == 1
    grid = [{"a": a, "b": b} for a in ("1", "2", "3") for b in ("1", "2")]
    assert results.describe_choice({"a": "2", "b": "1"}, grid) == {"a": 2, "b": 1, "at_edge": True}
    assert results.describe_choice({"a": "2"}, [{"a": "1"}, {"a": "2"}, {"a": "3"}]) == {"a": 2, "at_edge": False}


def test_a_value_or_an_arm_that_failed_is_a_row_without_figures(tmp_path):
    runs = [planned("fedavg", tmp_path / value, learning_rate=value) for value in ("1e-3", "3e-3")]
    leave_run(tmp_path / "1e-3", [table("global", range(20), [1.0] * 20)])
    comparison = results.compare_runs(SWEPT, ["fedavg"], runs, [True, False])
    assert comparison["rows"][0]["chosen"]["learning_rate"] == 0.001 and comparison["rows"][0]["failed"] == 0
    assert comparison["rows"][0]["sweep"][1] == {"learning_rate": 0.003, "exact_match": None, "eval_loss": None}
    comparison = results.compare_runs(SWEPT, ["fedavg"], runs, [False, False])
    (row,) = comparison["rows"]
    assert (row["chosen"], row["exact_match"], row["failed"], row["clients"]) == (None, None, 1, [])
    assert "fedavg (1 of 1 failed)" in comparison_tables(comparison)


def test_gains_by_hand(tmp_path):
    """Of 20 own rows, local knows 10: client 0 gains the other 10, client 1 loses all, client 2 stays as it is."""
    half, runs = [1.0, 0.0] * 10, []
    for arm, own in (
        ("local", [half] * 3),
        ("fedavg", [[1.0] * 20, [0.0] * 20, half]),
        ("centralized", [[1.0] * 20] * 3),
    ):
        tables = [
            table("own", range(100 * client, 100 * client + 20), right, client) for client, right in enumerate(own)
        ]
        place = leave_run(tmp_path / arm, [*tables, table("global", [1], [1.0])], (None,) * 3)
        runs.append(planned(arm, place))
    args = SimpleNamespace(sweep=None, seed=42, seeds=1)
    rows = results.compare_runs(args, ["local", "fedavg", "centralized"], runs, [True] * 3)["rows"]
    assert [each["gain_over_local"] for each in rows[0]["clients"]] == [None] * 3
    found = [each["gain_over_local"] for each in rows[1]["clients"]]
    assert [gain["mean"] for gain in found] == [50, -50, 0] and [gain["harmed"] for gain in found] == [
        False,
        True,
        False,
    ]
    assert found[0]["low"] == pytest.approx(50 - 1.96 * 50 / 20**0.5, abs=5) and found[2]["high"] == 0
    assert [each["gain_over_pooled"]["mean"] for each in rows[1]["clients"]] == [0, -100, -50]
    assert [(each["client"], each["split"], each["rows"], each["score"]) for each in rows[1]["clients"]] == [
        (0, 42, 20, 100), (1, 42, 20, 0), (2, 42, 20, 50)
    ]  # fmt: skip
    text = comparison_tables(results.compare_runs(args, ["local", "fedavg", "centralized"], runs, [True] * 3))
    assert "1 of 3: client 1 of split 42" in text


def test_clients_that_the_data_set_names_are_the_same_on_every_split(tmp_path):
    """A row that two splits hold out counts once, with the mean of both; without names, clients are of one split."""
    for names, expected in ((("a", "b"), 2), ((None, None), 4)):
        runs = []
        for split in (42, 43):
            tables = [table("own", range(split, split + 10), [1.0] * 10, client) for client in (0, 1)]
            runs.append(planned("local", leave_run(tmp_path / f"{names[0]}_{split}", tables, names, split)))
        own = gains.own_scores(runs, "exact_match")
        assert len(own) == expected
        rows = own[None, 0, "a"] if names[0] else own[42, 0, None]
        assert len(rows) == (11 if names[0] else 10)


def test_gains_of_equal_clients_hold_0(tmp_path):
    """Two arms that are right as often, at random: hardly an interval is without 0. With equal answers, gains are 0."""
    rng, args = np.random.default_rng(3), SimpleNamespace(sweep=None, seed=42, seeds=1)
    runs = []
    for arm in ("local", "fedavg"):
        tables = [table("global", [1], [1.0])]
        for client in range(40):
            tables.append(table("own", range(48), rng.integers(2, size=48).astype(float).tolist(), client))
        runs.append(planned(arm, leave_run(tmp_path / arm, tables, [None] * 40)))
    _, fedavg = results.compare_runs(args, ["local", "fedavg"], runs, [True] * 2)["rows"]
    found = [each["gain_over_local"] for each in fedavg["clients"]]
    assert sum(gain["low"] <= 0 <= gain["high"] for gain in found) >= 36 and sum(gain["harmed"] for gain in found) <= 2
    runs[1] = planned("fedavg", runs[0].folder)
    _, same = results.compare_runs(args, ["local", "fedavg"], runs, [True] * 2)["rows"]
    assert {tuple(each["gain_over_local"].values()) for each in same["clients"]} == {(0, 0, 0, False)}


# -----------------------------------------------------------------------------
# which runs there are


def plan(folder, *flags):
    flags = ["--output_dir", str(folder), *flags]
    args = main.parse_args(flags)
    return compare.plan_runs(args, flags, compare.find_arms(args.compare), main.parse_args)


def test_runs_of_a_sweep(tmp_path):
    """Every combination; a flag of the arm's own stays, and only strategies that have a server rate try several."""
    flags = "--world_size 2 --sweep learning_rate=1e-3,3e-3 --sweep server_lr=0.3,1".split()
    runs = plan(tmp_path, "--compare", "local --learning_rate 5e-3, fedavg, fedavgm, centralized", *flags)
    assert [run.values for run in runs] == [
        {}, {"learning_rate": "1e-3"}, {"learning_rate": "3e-3"},
        {"learning_rate": "1e-3", "server_lr": "0.3"}, {"learning_rate": "1e-3", "server_lr": "1"},
        {"learning_rate": "3e-3", "server_lr": "0.3"}, {"learning_rate": "3e-3", "server_lr": "1"},
        {"learning_rate": "1e-3"}, {"learning_rate": "3e-3"},
    ]  # fmt: skip
    assert [run.args.learning_rate for run in runs] == [5e-3, 1e-3, 3e-3, 1e-3, 1e-3, 3e-3, 3e-3, 1e-3, 3e-3]
    assert runs[3].args.server_lr == 0.3 and len({run.folder for run in runs}) == 9
    assert runs[0].folder.name == "local_--learning_rate_5e-3_seed_42"
    assert {run.args.own_eval_rows for run in runs} == {0}


def test_values_of_one_arm(tmp_path):
    """They come in place of those of all arms; all runs with that name have them, whatever else is their own."""
    flags = "--world_size 2 --sweep learning_rate=1e-3,3e-3 --sweep ffa:learning_rate=1e-2 --sweep fedadam:server_lr=1"
    runs = plan(tmp_path, "--compare", "fedavg, ffa, ffa --lora_r 4, fedadam", *flags.split())
    assert [(run.arm, run.values) for run in runs] == [
        ("fedavg", {"learning_rate": "1e-3"}), ("fedavg", {"learning_rate": "3e-3"}),
        ("ffa", {"learning_rate": "1e-2"}), ("ffa --lora_r 4", {"learning_rate": "1e-2"}),
        ("fedadam", {"learning_rate": "1e-3", "server_lr": "1"}),
        ("fedadam", {"learning_rate": "3e-3", "server_lr": "1"}),
    ]  # fmt: skip
    assert [run.args.learning_rate for run in runs] == [1e-3, 3e-3, 1e-2, 1e-2, 1e-3, 3e-3]


def test_no_sweep_of_fedprox_where_nothing_is_averaged(tmp_path):
    runs = plan(tmp_path, "--compare", "local, centralized, fedavg", "--sweep", "prox_mu=0.01,0.1")
    assert [run.values for run in runs] == [{}, {}, {"prox_mu": "0.01"}, {"prox_mu": "0.1"}]


@pytest.mark.parametrize(
    "flag", "split_seed num_clients partition partition_column dirichlet_alpha own_eval_rows eval_questions max_length"
    " learn columns dataset_path dataset_config dataset_train_split dataset_test_split num_cl".split()
)  # fmt: skip
def test_all_arms_have_the_same_split_and_rows(flag, capsys):
    """Also if a flag is abbreviated, as argparse allows."""
    for words in (f"--{flag} 1", f"--{flag}=1"):
        with pytest.raises(SystemExit):
            compare.find_arms(f"fedavg {words}, fedavg")
        assert f"--{flag}" in (error := capsys.readouterr().err) and "is the same for all runs" in error
    assert list(compare.find_arms("fedavg --dp_epsilon 8, local --learning_rate 1e-3, fedavg --lora_variant ffa"))


def test_an_arm_with_its_own_ranks_has_no_other_clients(refused):
    assert "would have 1 and 2 clients" in refused("--compare", "fedavg, ffa --world_size 1", "--world_size", "2")


@pytest.mark.parametrize("flag", "dirichlet_alpha max_length max_new_tokens canaries dp_epsilon dp_delta".split())
def test_what_changes_the_question_is_not_swept(flag, capsys):
    with pytest.raises(SystemExit):
        compare.find_sweep(main.parse_args(["--compare", "fedavg", "--sweep", f"{flag}=0.1,1"]))
    assert f"--sweep {flag}: this is no number that arms can have as their own" in capsys.readouterr().err


def test_splits_and_seeds_are_crossed(tmp_path):
    """Each training seed is the same on every split; with one seed a repeat, as ever, the seed is that of the split."""
    seeds = [
        (run.args.split_seed, run.args.seed) for run in plan(tmp_path, *"--compare ffa --repeats 3 --seeds 2".split())
    ]
    assert seeds == [(42, 42), (42, 43), (43, 42), (43, 43), (44, 42), (44, 43)]
    seeds = [(run.args.split_seed, run.args.seed) for run in plan(tmp_path, *"--compare ffa --repeats 3".split())]
    assert seeds == [(None, 42), (None, 43), (None, 44)]


@pytest.mark.parametrize("rows, flag, expected", [
    (9, None, 1), (50, None, 5), (475, None, 16), (9, 0, 4), (50, 0, 16), (475, 0, 47), (5000, 0, 128),
    (50, 20, 20), (50, 40, 25), (2, 40, 1),
])  # fmt: skip
def test_own_held_out_rows(rows, flag, expected):
    assert prepare.num_own_eval_rows(SimpleNamespace(own_eval_rows=flag), rows) == expected


# -----------------------------------------------------------------------------
# a comparison


COMPARED = "--world_size 2 --num_clients 4 --clients_per_round 3 --num_rounds 2 --local_steps 2".split()
COMPARED += "--eval_rounds 2 --quiet".split()
ARMS = ["local", "centralized", "fedavg"]


@pytest.fixture(scope="module")
def compared(small_inputs, tmp_path_factory):
    """The flags and the folder of a comparison with three repeats."""
    folder = tmp_path_factory.mktemp("compared")
    flags = [*COMPARED, *small_inputs, "--compare", ", ".join(ARMS), "--repeats", "3", "--output_dir", str(folder)]
    main.main(flags)
    return flags, folder


def runs_of(folder, name):
    return [folder / "comparison" / f"{name}_seed_{seed}" for seed in (42, 43, 44)]


def test_comparison(compared):
    """Rows are the means of what the runs have left; the worst is the worst model of a client."""
    _, folder = compared
    comparison = json.loads((folder / "comparison.json").read_text())
    assert [each["name"] for each in comparison["rows"]] == ARMS
    for each in comparison["rows"]:
        assert {"eval_loss", "exact_match", "f1", "worst_client", "tokens", "bytes", "seconds"} <= set(each)
    local, centralized, fedavg = comparison["rows"]
    summaries = [json.loads((run / "summary.json").read_text()) for run in runs_of(folder, "local")]
    for summary in summaries:
        scores = [client["global"]["exact_match"] for client in summary["per_client"]]
        assert len(scores) == 3  # of the clients of the last round
        assert summary["exact_match"]["after"] == pytest.approx(sum(scores) / 3, abs=0.01)
    worst = [min(client["global"]["exact_match"] for client in summary["per_client"]) for summary in summaries]
    assert local["worst_client"] == pytest.approx(sum(worst) / 3)
    assert local["eval_loss"] == pytest.approx(sum(summary["eval_loss"]["last"] for summary in summaries) / 3)
    assert fedavg["worst_client"] == fedavg["exact_match"]  # all have the same model
    assert local["bytes"] == centralized["bytes"] == 0 and fedavg["bytes"] > 0
    assert {(each["a"], each["b"]) for each in comparison["differences"]} >= {
        ("local", "centralized"),
        ("local", "fedavg"),
    }
    text = (folder / "comparison.md").read_text()
    assert all(f"| {name} " in text for name in ARMS) and "| client 3 " in text and "unresolved" in text
    assert (folder / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_scores_of_rows_are_those_of_the_summary(compared):
    """Row by row, as --compare reads them, and in all, as the run has summed them up; own rows, too."""
    _, folder = compared
    for arm in ARMS:
        for run in runs_of(folder, arm):
            summary, scores = json.loads((run / "summary.json").read_text()), gains.read_scores(run)
            found = results.scores_on(scores, lambda number: True)
            for name in ("exact_match", "f1", "rouge_l", "token_accuracy"):
                assert found[name] == pytest.approx(summary[name]["after"], abs=0.02), name
            assert found["eval_loss"] == pytest.approx(summary["eval_loss"]["last"], rel=1e-4)
            own = {each["client"]: each for each in scores if each["of"] == "own"}
            assert sorted(own) == [client["client"] for client in summary["per_client"]]
            for client in summary["per_client"]:
                each = own[client["client"]]
                assert len(each["row"]) == 8  # half of 16: 16 would be all
                assert 100 * sum(each["exact_match"]) / 8 == client["exact_match"]
                assert sum(each["nats"]) / sum(each["tokens"]) == pytest.approx(client["eval_loss"], rel=1e-4)
    rows = json.loads((folder / "comparison.json").read_text())["rows"]
    assert [len(row["clients"]) for row in rows] == [9] * 3  # 3 clients on each of 3 splits
    for each in rows[2]["clients"]:
        assert each["gain_over_local"]["low"] <= each["gain_over_local"]["mean"] <= each["gain_over_local"]["high"]


def test_comparison_with_a_sweep(small_inputs, tmp_path):
    """Each value in a folder of its own; the row is of the chosen one, scored on the rows that did not choose it."""
    flags = "--world_size 1 --num_clients 2 --num_rounds 1 --local_steps 2 --quiet --compare fedavg".split()
    flags += ["--sweep", "learning_rate=1e-2,1e-4", *small_inputs, "--output_dir", str(tmp_path)]
    main.main(flags)
    (row,) = json.loads((tmp_path / "comparison.json").read_text())["rows"]
    assert row["chosen"] == {"learning_rate": 0.01, "at_edge": True}
    run = tmp_path / "comparison" / "fedavg_--learning_rate_1e-2_seed_42"
    scored = results.scores_on(gains.read_scores(run), lambda number: not results.choosing_half(number, 42))
    assert row["eval_loss"] == scored["eval_loss"] and row["exact_match"] == scored["exact_match"]
    assert scored["eval_loss"] != results.comparison_row("fedavg", run)["eval_loss"]
    text = (tmp_path / "comparison.md").read_text()
    assert "0.01 (edge)" in text and "the scores are on the other" in text
    halves = [results.choosing_half(number, 42) for number in gains.read_scores(run)[0]["row"]]
    assert row["scored"] == halves.count(False) < len(halves)
    assert f"Exact match is of {row['scored']:g} global held-out questions in each run." in text


def test_runs_of_a_comparison_are_alike(compared):
    """The same split, held-out rows, steps and rows a step; the next repeat has others."""
    _, folder = compared
    splits, scored, configs, tokens = {}, {}, {}, {}
    for name in ("local", "centralized", "fedavg"):
        for seed, run in zip((42, 43, 44), runs_of(folder, name)):
            splits.setdefault(seed, []).append((run / "partition.json").read_text())
            clients = json.loads((run / "summary.json").read_text())["per_client"]
            scored.setdefault(seed, []).append([client["client"] for client in clients])
            configs[name] = json.loads((run / "config.json").read_text())
            tokens[name] = json.loads((run / "summary.json").read_text())["tokens"]
    assert all(len(set(texts)) == 1 for texts in splits.values()) and splits[42][0] != splits[43][0]
    assert all(lists == [lists[0]] * 3 for lists in scored.values()) and len({str(s[0]) for s in scored.values()}) > 1
    assert {configs[name]["num_rounds"] * configs[name]["local_steps"] for name in configs} == {4}
    rows = {name: c["per_device_train_batch_size"] * c["gradient_accumulation_steps"] for name, c in configs.items()}
    assert rows == {"local": 4, "centralized": 12, "fedavg": 4}
    assert tokens["local"] == tokens["fedavg"] == pytest.approx(tokens["centralized"], rel=0.1)
    assert tokens["fedavg"] > 40 * 4 * 12  # 3 clients, 4 steps, 4 rows of 40 tokens or more


def test_centralized_trains_on_what_the_clients_train_on(compared, tmp_path, monkeypatch):
    """The union of their training rows, none of which anybody holds out."""
    seen = {}
    for name, flags in (("fedavg", []), ("centralized", ["--centralized"])):

        def keep(target, args, run, name=name):
            seen[name] = json.loads(Path(run.data_path, "parts.json").read_text()), args

        monkeypatch.setattr(launch, "run_to_the_end", keep)
        main.main([*compared[0], "--compare", "", "--repeats", "1", *flags, "--output_dir", str(tmp_path / name)])
    (fedavg, _), (centralized, args) = seen["fedavg"], seen["centralized"]
    assert len(fedavg["train"]) == 4 and centralized["train"] == [sum(fedavg["train"], [])]
    assert centralized["held_out"] == fedavg["held_out"] and centralized["global"] == fedavg["global"]
    parts = [centralized["train"][0], *centralized["held_out"], centralized["global"]]
    assert sorted(sum(parts, [])) == list(range(80))
    assert (args.world_size, options.training_clients(args), args.aggregator) == (1, (1, 1), "none")


def test_resumed_comparison(compared, tmp_path, capsys):
    """A comparison that was ended goes on: what is done stays, what is missing is run, and the figures are the same."""
    flags, folder = compared
    shutil.copytree(folder, copy := tmp_path / "copy")
    flags = [*flags[:-1], str(copy)]
    with pytest.raises(SystemExit) as stop:
        main.main(flags)
    assert stop.value.code == 2 and "already holds a comparison: --resume goes on with it" in capsys.readouterr().err
    shutil.rmtree(runs_of(copy, "fedavg")[1])
    (copy / "comparison.json").unlink()
    main.main([*flags, "--resume"])
    assert capsys.readouterr().out.count("nothing to do") == 8
    before, after = (json.loads((place / "comparison.json").read_text())["rows"] for place in (folder, copy))
    assert [each["exact_match"] for each in after] == [each["exact_match"] for each in before]
    assert [each["eval_loss"] for each in after] == [each["eval_loss"] for each in before]


def test_a_comparison_resumed_with_other_flags_is_refused(small_inputs, tmp_path, capsys):
    """In one line before any run, though `local` has a learning rate of its own; and what was found stays as it is."""
    flags = "--world_size 1 --num_clients 2 --num_rounds 1 --local_steps 1 --quiet --compare".split()
    flags += ["local --learning_rate 5e-3, fedavg", *small_inputs, "--output_dir", str(tmp_path)]
    main.main([*flags, "--learning_rate", "1e-2"])
    before = (tmp_path / "comparison.json").read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main.main([*flags, "--learning_rate", "3e-3", "--resume"])
    out, error = capsys.readouterr()
    assert stop.value.code == 2 and (tmp_path / "comparison.json").read_bytes() == before
    assert "was started with learning_rate 0.01 (now 0.003)" in error and error.count("\n") == 1 and not out


def test_a_run_that_diverges_does_not_end_the_comparison(small_inputs, tmp_path, capsys):
    flags = [
        *COMPARED,
        *small_inputs,
        "--compare",
        "fedavg --learning_rate 1e30, fedavg",
        "--output_dir",
        str(tmp_path),
    ]
    with pytest.raises(SystemExit) as stop:
        main.main(flags)
    assert stop.value.code == 3
    diverged, fedavg = json.loads((tmp_path / "comparison.json").read_text())["rows"]
    assert diverged["failed"] == 1 and fedavg["failed"] == 0 and fedavg["eval_loss"] > 0
