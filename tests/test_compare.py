"""--compare: intervals, rows and tables by hand, and a small comparison with all its runs."""

import json
import shutil
from pathlib import Path

import pytest

import main
import utils
from fllama import compare, launch, options
from fllama.compare import compare_rows, comparison_row, comparison_tables

# -----------------------------------------------------------------------------
# by hand


def row(name, exact_match, eval_loss=1.0):
    """A row with the figures of one run, and zeros where they do not matter."""
    keys = [key for key, _ in compare.COLUMNS.values()]
    return dict.fromkeys(keys, 0) | {"name": name, "exact_match": exact_match, "eval_loss": eval_loss, "clients": []}


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
    assert ab["low"] == pytest.approx(2 - 4.303 / 3**0.5) and ab["high"] == pytest.approx(2 + 4.303 / 3**0.5)
    assert ac["mean"] == 12 and ac["low"] == pytest.approx(12 - 4.303 / 3**0.5) and not ac["unresolved"]
    assert (bc["low"], bc["high"], bc["unresolved"]) == (10, 10, False)
    losses = [each for each in comparison["differences"] if each["of"] == "eval_loss"]
    assert all(each["mean"] == 0 and each["unresolved"] for each in losses)
    tables = comparison_tables(comparison)
    assert sum("unresolved" in line for line in tables.splitlines()) == 4
    line = next(line for line in tables.splitlines() if line.startswith("| a - b") and "exact match" in line)
    assert "+2.0" in line and "-0.5 to +4.5" in line


def test_long_answers_are_compared_by_token_accuracy():
    """Where exact match is not the headline, table and differences show what is; a client without a score is "-"."""
    scores = {"headline": ["token_accuracy", "rouge_l", "perplexity"], "rouge_l": 30.0, "perplexity": 2.5}
    repeats = []
    for accuracy in (50.0, 60.0, 70.0):
        one, other = (row(name, None) | scores for name in "ab")
        repeats.append([one | {"token_accuracy": accuracy + 1}, other | {"token_accuracy": accuracy}])
    comparison = compare.compare_rows(["a", "b"], repeats)
    assert comparison["rows"][0]["token_accuracy"] == 61 and comparison["rows"][0]["exact_match"] is None
    assert [each["of"] for each in comparison["differences"]] == ["token_accuracy", "eval_loss"]
    assert comparison["differences"][0]["mean"] == 1
    tables = compare.comparison_tables(comparison)
    assert "token accuracy" in tables and "exact match" not in tables
    line = next(line for line in tables.splitlines() if line.startswith("| a "))
    assert [cell.strip() for cell in line.split("|")[3:6]] == ["61.0%", "30.0%", "2.50"]


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
    found = compare.paired_difference([*runs, None], [{"x": 0.0}] * 10 + [None] * 2, "x")
    half = 2.262 * (sum((i - 4.5) ** 2 for i in range(10)) / 9) ** 0.5 / 10**0.5
    assert (found["mean"], found["high"]) == (4.5, pytest.approx(4.5 + half)) and not found["unresolved"]
    assert compare.paired_difference(runs[:2], runs[:2], "x") is None


def test_columns_of_privacy_are_there_if_a_run_has_them():
    private = {"epsilon": 7.99, "audit_auc": 0.517, "epsilon_lower_bound": 0.0}
    plain = comparison_tables(compare_rows(["a", "b"], [[row("a", 51), row("b", 50)]]))
    assert "epsilon" not in plain and "AUC" not in plain
    table = comparison_tables(compare_rows(["a", "b"], [[row("a", 51) | private, row("b", 50)]]))
    assert "| epsilon | audit AUC | epsilon at least |" in table.splitlines()[0]
    assert "7.99 |     0.517 |             0.00 |" in table and "-" in table.splitlines()[3]


def test_table_of_clients_of_many_is_left_out():
    clients = [{"client": client, "exact_match": 50.0} for client in range(25)]
    rows = [row("a", 50) | {"runs": [{"clients": clients}]}]
    assert compare.table_of_clients(rows) is None
    rows[0]["runs"][0]["clients"] = clients[:24]
    assert "| client 23 " in compare.table_of_clients(rows)


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
