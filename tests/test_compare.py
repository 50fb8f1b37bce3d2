"""Comparisons, and the finished model: asked, merged, uploaded, described."""

import io
import json
import shutil
from pathlib import Path

import pytest
import report
import torch
from conftest import FINISHED_RUN, ROOT, run_main
from huggingface_hub import ModelCard

import main
import utils

# -----------------------------------------------------------------------------
# comparisons


def row(name, exact_match, eval_loss=1.0):
    """A row with the figures of one run, and zeros where they do not matter."""
    keys = [key for key, _ in report.COLUMNS.values()]
    return dict.fromkeys(keys, 0) | {"name": name, "exact_match": exact_match, "eval_loss": eval_loss, "clients": []}


def test_intervals_by_hand():
    """Paired differences 1, 2, 3: mean 2, standard deviation 1, t(2) = 4.303, so 2 +- 2.484; of 11, 12, 13: 12."""
    repeats = [
        [row("a", 51), row("b", 50), row("c", 40)],
        [row("a", 62), row("b", 60), row("c", 50)],
        [row("a", 73), row("b", 70), row("c", 60)],
    ]
    comparison = report.compare_rows(["a", "b", "c"], repeats)
    assert [each["exact_match"] for each in comparison["rows"]] == [62, 60, 50]
    ab, ac, bc = [each for each in comparison["differences"] if each["of"] == "exact_match"]
    assert (ab["a"], ab["b"], ab["mean"], ab["unresolved"]) == ("a", "b", 2, True)
    assert ab["low"] == pytest.approx(2 - 4.303 / 3**0.5) and ab["high"] == pytest.approx(2 + 4.303 / 3**0.5)
    assert ac["mean"] == 12 and ac["low"] == pytest.approx(12 - 4.303 / 3**0.5) and not ac["unresolved"]
    assert (bc["low"], bc["high"], bc["unresolved"]) == (10, 10, False)
    losses = [each for each in comparison["differences"] if each["of"] == "eval_loss"]
    assert all(each["mean"] == 0 and each["unresolved"] for each in losses)
    tables = report.comparison_tables(comparison)
    assert sum("unresolved" in line for line in tables.splitlines()) == 4
    line = next(line for line in tables.splitlines() if line.startswith("| a - b") and "exact match" in line)
    assert "+2.0" in line and "-0.5 to +4.5" in line


def test_runs_that_failed_are_left_out_and_counted():
    repeats = [
        [row("a", 50), row("b", 40)],
        [row("a", 70), None],
        [row("a", 60), row("b", 46)],
        [row("a", 1), row("b", 1)],
    ]
    comparison = report.compare_rows(["a", "b"], repeats)
    assert [each["exact_match"] for each in comparison["rows"]] == [45.25, 29]
    assert [each["failed"] for each in comparison["rows"]] == [0, 1]
    assert comparison["differences"][0]["mean"] == 8  # of the three pairs that are there
    assert "b (1 of 4 failed)" in report.comparison_tables(comparison)
    comparison = report.compare_rows(["a", "b"], [[row("a", 50), None]])
    assert comparison["rows"][1]["exact_match"] is None and "differences" not in comparison
    assert "--repeats" in report.comparison_tables(comparison)


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
    one = report.comparison_row("a", tmp_path)
    assert one["eval_loss"] is None and one["own_exact_match"] == 30 and one["own_worst_client"] == 20
    assert one["worst_client"] == one["exact_match"] == 50  # of the model that all share
    for client, exact_match in zip(summary["per_client"], (60, 35)):  # of their own
        client["global"] = {"exact_match": exact_match}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    assert report.comparison_row("a", tmp_path)["worst_client"] == 35
    comparison = report.compare_rows(["a", "b"], [[one, row("b", 10)]] * 3)
    assert [each["of"] for each in comparison["differences"]] == ["exact_match"]
    assert "nan" not in report.comparison_tables(comparison)


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


def test_centralized_trains_on_what_the_clients_train_on(compared, tmp_path):
    """The union of their training rows, none of which anybody holds out."""
    seen = {}
    for name, flags in (("fedavg", []), ("centralized", ["--centralized"])):

        def keep(target, args, name=name):
            split = json.loads(Path(args.data_path, "parts.json").read_text())
            seen[name] = split, args

        main.run_to_the_end, original = keep, main.run_to_the_end
        try:
            main.main([*compared[0], "--compare", "", "--repeats", "1", *flags, "--output_dir", str(tmp_path / name)])
        finally:
            main.run_to_the_end = original
    (fedavg, _), (centralized, args) = seen["fedavg"], seen["centralized"]
    assert len(fedavg["train"]) == 4 and centralized["train"] == [sum(fedavg["train"], [])]
    assert centralized["held_out"] == fedavg["held_out"] and centralized["global"] == fedavg["global"]
    parts = [centralized["train"][0], *centralized["held_out"], centralized["global"]]
    assert sorted(sum(parts, [])) == list(range(80))
    assert (args.world_size, args.num_clients, args.aggregator) == (1, 1, "none")


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


# -----------------------------------------------------------------------------
# the finished model


@pytest.fixture
def samples(finished, sample_rows):
    """The questions that the finished run has shown, with the contexts in which they may have been asked."""
    shown = json.loads((finished[0] / "samples.json").read_text())
    rows = [json.loads(line) for line in Path(main.EMBEDDED_DATA, "validation.jsonl").read_text().splitlines()]
    for sample in shown:
        answered = (sample["question"], sample["accepted"])
        sample["contexts"] = [row["context"] for row in rows if (row["question"], row["answers"]["text"]) == answered]
    return shown


def test_samples_are_shown(finished, samples):
    assert len(samples) == 3
    for sample in samples:
        assert f"question  {sample['question']}\n  accepted  {sample['accepted'][0]}\n" in finished[1].stdout
        assert f"  before    {sample['before']}\n  after     {sample['after']}\n" in finished[1].stdout


def test_ask(finished, samples, capsys, monkeypatch):
    """The finished adapter, loaded anew, answers as it did at the end of the run."""
    sample = next(sample for sample in samples if len(sample["contexts"]) == 1)
    question, flags = sample["question"], ["--context", *sample["contexts"], "--output_dir"]
    main.main(["--ask", question, *flags, str(finished[0])])
    assert capsys.readouterr().out == sample["after"] + "\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{question}\n\n{question}\n"))
    main.main(["--ask", *flags, str(finished[0] / "federated_global_model")])
    assert capsys.readouterr().out == 2 * (sample["after"] + "\n")
    main.main(["--ask", "Who are you?", "--output_dir", str(finished[0])])  # without a context: as a chat
    assert capsys.readouterr().out


def test_ask_names_the_models_of_clients(compared, capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(["--ask", "Why?", "--output_dir", str(runs_of(compared[1], "local")[0])])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and "client_models/client_0" in line
    main.main(["--ask", "Why?", "--output_dir", line.split("--output_dir ")[-1].strip()])
    assert capsys.readouterr().out


def test_merge(finished, tmp_path):
    """One model in bfloat16 that needs nothing else, and has the loss that was logged."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shutil.copytree(finished[0], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    main.main(["--merge", "--output_dir", str(tmp_path / "run")])
    with pytest.raises(SystemExit):
        main.main(["--merge", "--output_dir", str(tmp_path / "run")])
    folder = tmp_path / "run" / "merged_model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and "quantization_config" not in json.loads(
        (folder / "config.json").read_text()
    )
    loss, tokens = 0.0, 0
    for line in Path(main.EMBEDDED_DATA, "validation.jsonl").read_text().splitlines():
        row = utils.tokenize_row(json.loads(line), tokenizer, 1024)
        ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
        with torch.no_grad():
            logits = model.float()(input_ids=ids).logits[0, :-1]
        loss += torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum").item()
        tokens += (labels != -100).sum().item()
    logged = json.loads((finished[0] / "global_eval_loss.json").read_text())[-1]
    assert loss / tokens == pytest.approx(logged, abs=3e-3)  # merged into the weights before rounding to NF4: 4.3e-3


def test_model_card(finished):
    folder, _ = finished
    path = folder / "federated_global_model" / "README.md"
    summary = json.loads((folder / "summary.json").read_text())
    card = ModelCard.load(path)
    assert card.data.library_name == "peft" and card.data.base_model is None  # a local folder: no name on the hub
    for part in (
        "| clients | 2; 1884 training rows each, 3768 in all |",
        "| rounds | 4 of 2 local steps of 4 rows |",
        "| split | iid |",
        "`fedavg`",
        "--lora_dropout 0.1",
        "torch 2.13.0",
        f"| exact match | {summary['exact_match']['before']:.1f}% | {summary['exact_match']['after']:.1f}% |",
        "vllm serve tiny-llama --enable-lora --max-lora-rank 16",
        "## Limits",
    ):
        assert part in card.content, part
    assert str(ROOT) not in path.read_text() and str(folder) not in path.read_text()


def test_push_to_hub(hub, finished, tmp_path):
    """A finished run is uploaded, to a private repository; without a token that may write nothing begins."""
    shutil.copytree(finished[0], tmp_path / "run")
    flags = [*FINISHED_RUN, "--output_dir", tmp_path / "run", "--resume", "--push_to_hub", "org/new"]
    environment = {"HF_ENDPOINT": hub[0], "HF_HOME": str(tmp_path / "home")}
    refused = run_main(*flags, **environment, HF_TOKEN="hf_wrong")
    assert (
        refused.returncode == 2
        and "a token that may write there" in refused.stderr
        and len(refused.stderr.splitlines()) == 1
    )
    process = run_main(*flags, **environment, HF_TOKEN="hf_secret")
    assert process.returncode == 0, process.stderr
    assert "org/new" in process.stdout and "hf_secret" not in process.stdout + process.stderr
    assert hub.created == {"org/new": True}
    assert json.loads(hub.uploaded["org/new/adapter_config.json"])["base_model_name_or_path"] == "tiny-llama"
    assert all(str(ROOT).encode() not in content for content in hub.uploaded.values())
    for name in ("adapter_model.safetensors", "README.md", "tokenizer.json"):
        assert hub.uploaded[f"org/new/{name}"] == (tmp_path / "run" / "federated_global_model" / name).read_bytes()


# -----------------------------------------------------------------------------
# trackers and the terminal


def test_tracker_and_quiet(small_inputs, tmp_path):
    """One run for the federation, with the curves of the clients; --quiet says what the run has come to, no more."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = "--world_size 2 --num_clients 3 --num_rounds 3 --local_steps 2 --eval_rounds 1 --report_to tensorboard"
    process = run_main(*flags.split(), "--quiet", *small_inputs, "--output_dir", tmp_path)
    said = process.stdout.splitlines()
    assert [line.split()[0] for line in said] == ["held-out", "exact", "f1", "on", "use"], said
    (events,) = (tmp_path / "runs").glob("events*")
    curves = EventAccumulator(str(events))
    curves.Reload()
    rounds = utils.read_rounds(tmp_path)
    sources = {name.split("/")[0] for name in curves.Tags()["scalars"]}
    assert sources == {"federation", "client_0", "client_1", "client_2", "epoch"}
    for client in range(3):
        for kind in ("train_loss", "eval_loss"):
            logged = [event.value for event in curves.Scalars(f"client_{client}/{kind}")]
            assert logged == pytest.approx(json.loads((tmp_path / f"client_{client}_{kind}.json").read_text()))
    for kind in ("train_loss", "eval_loss", "drift", "learning_rate"):
        logged = [event.value for event in curves.Scalars(f"federation/{kind}")]
        assert logged == pytest.approx([entry[kind] for entry in rounds])
