"""What people see of a run: samples, lines, tables, the model card, curves and trackers."""

import json
from pathlib import Path

import pytest
from conftest import ROOT, run_main
from huggingface_hub import ModelCard

import main
from fllama import card, publish, report, runlog
from fllama.evaluate import Answered

# -----------------------------------------------------------------------------
# by hand


def entry_of(number, eval_loss=None, **more):
    """An entry of rounds.jsonl, of two clients."""
    seconds = {"local": 1.5, "average": 0.5, "eval": 0.25, "save": 0.0}
    entry = {"round": number, "clients": [0, 1], "client_train_loss": [2.0, 1.0], "train_loss": 1.5, "rejected": []}
    entry |= {"eval_loss": eval_loss, "update_norm": 0.02, "aggregation_error": None, "peak_memory_gb": 1.5}
    return entry | {"tokens": 100, "bytes": 8, "seconds": seconds} | more


def test_line_of_a_round():
    args = main.parse_args(["--num_rounds", "20"])
    line = report.round_line(args, entry_of(3, 1.25, aggregation_error=0.034))
    assert line == (
        "round  3/20 | train 1.5000 | eval 1.2500 | update 2.0e-02 | local 1.5s | average 0.5s | 1.5 GB | "
        "aggregation error 3.4%"
    )
    not_evaluated = report.round_line(args, entry_of(4))
    assert "eval" not in not_evaluated and not_evaluated.index("update") == line.index("update")


CLIENTS = [{"client": 0, "exact_match": 40.0}, {"client": 1, "exact_match": 20.0}]
SCORES = {"before": {"exact_match": 1.0, "f1": 2.0}, "after": {"exact_match": 30.0, "f1": 45.5}}

NAMES = ["exact_match", "f1"]


def test_summary_by_hand():
    rounds = [entry_of(1), entry_of(2, 1.5, rejected=[1]), entry_of(3), entry_of(4, 1.25, bytes=10)]
    summary = report.summarize(rounds, [10, 20], SCORES, NAMES, CLIENTS, 96)
    assert summary["seconds"] == {"local": 6.0, "average": 2.0, "eval": 1.0, "save": 0.0}
    assert (summary["rounds"], summary["clients"], summary["rows"], summary["tokens"]) == (4, 2, [10, 20], 400)
    assert summary["eval_loss"] == {"first": 1.5, "last": 1.25} and summary["rejected"] == 1
    assert (summary["bytes"], summary["bytes_per_round"], summary["answered"]) == (34, 10, 96)
    assert summary["exact_match"] == {"before": 1.0, "after": 30.0} and summary["f1"]["after"] == 45.5
    nothing = report.summarize([], [10], SCORES, NAMES, CLIENTS, 96)  # the log was lost
    assert nothing["eval_loss"] == {"first": None, "last": None} and nothing["bytes_per_round"] == 0


def test_last_lines_of_a_run(capsys):
    args = main.parse_args(["--output_dir", "out"])
    rounds = [entry_of(1), entry_of(2, 1.5), entry_of(4, 1.25)]
    summary = report.summarize(rounds, [10, 20], SCORES, NAMES, CLIENTS, 96)
    samples = [{"question": "Why?", "accepted": ["a", "b"], "before": "x", "after": "a"}]
    report.print_summary(args, rounds, summary, samples, Path("out/federated_global_model"))
    assert capsys.readouterr().out.splitlines() == [
        "question  Why?",
        "  accepted  a | b",
        "  before    x",
        "  after     a",
        "held-out loss  1.5000 (round 2) -> 1.2500 (round 4)",
        "exact match    1.0% -> 30.0% on 96 held-out questions",
        "f1             2.0% -> 45.5% on 96 held-out questions",
        "on own rows    30.0% exact match, the mean of 2 clients; the worst, client 1, 20.0%",
        'use it: python main.py --output_dir out --ask "..." --context "..."',
    ]


def test_samples_are_paired():
    questions = {"question": ["Q1", "Q2"]}
    samples = publish.compare_samples(questions, ["x", "y"], [Answered("a", ["a"], False), Answered("b", ["c"], False)])
    assert samples[1] == {"question": "Q2", "accepted": ["c"], "before": "y", "after": "b"} and len(samples) == 2
    assert publish.compare_samples(questions, [], [Answered("a", ["a"], False)]) == []


def test_loss_curves_of_rounds_without_an_evaluation(tmp_path):
    """Also of a loss that is no number, and of no round at all."""
    for rounds in ([], [entry_of(1)], [entry_of(1, 1.5), entry_of(2, float("nan"))]):
        report.plot_losses(tmp_path, rounds)
        assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_rank_for_vllm():
    assert [card.vllm_rank(r) for r in (1, 8, 9, 16, 100, 512, 600)] == [8, 8, 16, 16, 128, 512, 600]


def test_words_of_the_card():
    args = main.parse_args("--lora_variant ffa --prox_mu 0.1 --scaffold --num_clients 8 --clients_per_round 2".split())
    assert card.describe_averaging(args) == "`fedavg`, ffa, FedProx mu 0.1, SCAFFOLD"
    assert report.describe_draw(args) == ", 2 drawn for each round"
    args = main.parse_args("--partition dirichlet --partition_column site --dirichlet_alpha 0.3".split())
    assert card.describe_split(args) == "dirichlet by site, alpha 0.3" and report.describe_draw(args) == ""


# -----------------------------------------------------------------------------
# of a run


def test_samples_are_shown(finished):
    samples = json.loads((finished[0] / "samples.json").read_text())
    assert len(samples) == 3
    for sample in samples:
        assert f"question  {sample['question']}\n  accepted  {sample['accepted'][0]}\n" in finished[1].stdout
        assert f"  before    {sample['before']}\n  after     {sample['after']}\n" in finished[1].stdout


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


def test_tracker_and_quiet(small_inputs, tmp_path):
    """One run for the federation, with the curves of the clients; --quiet says what the run has come to, no more."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = "--world_size 2 --num_clients 3 --num_rounds 3 --local_steps 2 --eval_rounds 1 --report_to tensorboard"
    process = run_main(*flags.split(), "--quiet", *small_inputs, "--output_dir", tmp_path)
    said = process.stdout.splitlines()
    assert [line.split()[0] for line in said] == ["held-out", "exact", "f1", "cut", "on", "use"], said
    (events,) = tmp_path.glob("runs/**/events*")
    curves = EventAccumulator(str(events))
    curves.Reload()
    rounds = runlog.read_rounds(tmp_path)
    sources = {name.split("/")[0] for name in curves.Tags()["scalars"]}
    assert sources == {"federation", "client_0", "client_1", "client_2"}
    for client in range(3):
        for kind in ("train_loss", "eval_loss"):
            logged = [event.value for event in curves.Scalars(f"client_{client}/{kind}")]
            assert logged == pytest.approx(json.loads((tmp_path / f"client_{client}_{kind}.json").read_text()))
    for kind in ("train_loss", "eval_loss", "drift", "learning_rate"):
        logged = [event.value for event in curves.Scalars(f"federation/{kind}")]
        assert logged == pytest.approx([entry[kind] for entry in rounds])
        assert [event.step for event in curves.Scalars(f"federation/{kind}")] == [2, 4, 6]
