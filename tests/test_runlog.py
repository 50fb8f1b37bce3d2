"""The logs of a run: rounds, lists of losses, what is left of them after a crash, curves and digests."""

import argparse
import dataclasses
import hashlib
import json
import math

import pytest
import torch

import main
from fllama import report, runlog
from fllama.clients import Turn
from fllama.evaluate import Loss
from fllama.runlog import RankReport, RunLog, cut_back_logs, read_losses, read_rounds
from utils import Round

NAN = float("nan")


def reports_of(number, nan=False):
    """The reports of two ranks that play clients 2 and 0, and 5; evaluated in even rounds."""
    turns = []
    for client, weight in ((2, 10), (0, 30), (5, 20)):
        turn = Turn(client, weight, {}, train_loss=NAN if nan and client == 2 else number + 0.1 * client, tokens=100)
        if number % 2 == 0:
            turn.eval_loss = Loss(6.0 if client else NAN, 4, 0)
        turns.append(turn)
    common = {"checksum": 1, "bytes_sent": 40, "bytes_between_machines": 4, "asked_to_stop": False}
    return [
        RankReport(turns=turns[:2], global_loss=Loss(30.0, 10, 0), drift={2: 0.5, 0: 0.7}, memory=1.5, **common),
        RankReport(turns=turns[2:], global_loss=Loss(20.0, 10, 0), drift={}, memory=2.5, **common),
    ]


SECONDS = {"local": 1.0, "average": 0.5, "eval": 0.0, "save": 0.0}


@pytest.fixture
def log_of(tmp_path):
    """A function that returns the RunLog of a rank which goes on after some rounds."""

    def start(rank=0, done=0, *flags):
        args = main.parse_args(["--output_dir", str(tmp_path), "--num_rounds", "4", "--local_steps", "3", *flags])
        rows = argparse.Namespace(plan=[Round([[0, 2], [5]], [])] * 4)
        return RunLog(rank, args, rows, done)

    return start


def write_rounds(log, numbers, nan=False):
    for number in numbers:
        rejected = {5: "not finite"}
        error = 0.2 if number % 2 == 0 else None
        average = torch.full((4,), float(number))
        log.round(number, 0.01, reports_of(number, nan), rejected, 0.25, error, SECONDS, average)
    log.close()


def content(folder):
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


# -----------------------------------------------------------------------------
# rounds


def test_entry_of_a_round_by_hand():
    """Clients in their order; means over those that were not rejected; the loss per token of all ranks."""
    entry = runlog.round_entry(2, 0.01, reports_of(2), {5: "not finite"}, 0.25, 0.2, SECONDS)
    assert entry["clients"] == [0, 2, 5] and entry["weights"] == [30, 10, 20] and entry["rejected"] == [5]
    assert entry["client_train_loss"] == [2, 2.2, 2.5] and entry["train_loss"] == pytest.approx(2.1)
    assert entry["client_eval_loss"][1:] == [1.5, 1.5] and math.isnan(entry["client_eval_loss"][0])
    assert entry["eval_loss"] == 2.5  # 50 nats, 20 tokens
    assert entry["drift"] == pytest.approx(0.6) and entry["client_drift"] == [0.7, 0.5, None]
    assert (entry["bytes"], entry["bytes_between_machines"], entry["tokens"]) == (80, 8, 300)
    assert entry["peak_memory_gb"] == 2.5 and entry["update_norm"] == 0.25 and entry["aggregation_error"] == 0.2
    entry = runlog.round_entry(1, 0.01, reports_of(1), {}, 0.25, None, SECONDS)
    assert entry["eval_loss"] is entry["client_eval_loss"] is None


def test_entry_of_a_round_in_which_nobody_was_drawn():
    reports = [dataclasses.replace(each, turns=[], drift={}) for each in reports_of(2)]
    entry = runlog.round_entry(2, 0.01, reports, {}, 0.25, None, SECONDS)
    assert entry["clients"] == [] and entry["train_loss"] is None and entry["drift"] == 0
    assert entry["eval_loss"] == 2.5 and entry["client_eval_loss"] == []
    assert "no client" in report.round_line(main.parse_args([]), entry | {"epsilon": 1.5})


def test_loss_of_several_models_is_their_mean():
    reports = reports_of(2)
    turns = runlog.turns_of(reports)
    for i, turn in enumerate(turns):
        turn.global_eval_loss = Loss(8.0 * i, 4, 0)
    assert runlog.global_loss(reports, turns) == pytest.approx((0 + 2 + 4) / 3)


def test_rank_0_writes_all_and_the_others_nothing(log_of, tmp_path):
    write_rounds(log_of(rank=1), [1, 2])
    assert not content(tmp_path)
    write_rounds(log_of(), [1, 2])
    assert [entry["round"] for entry in read_rounds(tmp_path)] == [1, 2]
    digest = hashlib.sha256(torch.full((4,), 2.0).numpy()).hexdigest()
    assert read_rounds(tmp_path)[1]["digest"] == digest
    losses = {name: json.loads(text) for name, text in content(tmp_path).items() if name.endswith("_loss.json")}
    assert losses == {
        "global_eval_loss.json": [2.5],
        **{f"client_{client}_train_loss.json": [1 + 0.1 * client, 2 + 0.1 * client] for client in (0, 2, 5)},
        **{f"client_{client}_eval_loss.json": [1.5] for client in (2, 5)},
        "client_0_eval_loss.json": [None],  # NaN is null
    }
    assert math.isnan(read_losses(tmp_path / "client_0_eval_loss.json")[0])


def test_models_of_clients_are_in_the_digest(log_of, tmp_path):
    log, reports = log_of(0, 0, "--lora_variant", "fedsa"), reports_of(1)
    for turn in runlog.turns_of(reports):
        turn.digest = f"of client {turn.client}"
    log.round(1, 0.01, reports, {}, 0.25, None, SECONDS, torch.zeros(4))
    log.close()
    shared = hashlib.sha256(torch.zeros(4).numpy()).hexdigest()
    expected = hashlib.sha256((shared + "of client 0of client 2of client 5").encode()).hexdigest()
    assert read_rounds(tmp_path)[0]["digest"] == expected


def test_the_error_of_averaging_is_explained_once(log_of, capsys):
    write_rounds(log_of(), [1, 2, 3, 4])
    assert capsys.readouterr().out.count("makes an error of 20% of the product") == 1
    write_rounds(log_of(0, 0, "--aggregator", "svd"), [1, 2])
    assert "makes an error" not in capsys.readouterr().out


def test_what_went_wrong_while_writing_is_raised(log_of, tmp_path):
    log = log_of()
    (tmp_path / "rounds.jsonl").mkdir()
    log.round(1, 0.01, reports_of(1), {}, 0.25, None, SECONDS, torch.zeros(4))
    with pytest.raises(IsADirectoryError):
        log.wait()


def test_bar_counts_the_steps_of_this_rank(log_of):
    """2 clients of 3 steps in each of 4 rounds; 2 rounds are done."""
    log = log_of(0, 2)
    assert (log.bar.total, log.bar.n) == (24, 12)


# -----------------------------------------------------------------------------
# cut back


@pytest.mark.parametrize("nan", [False, True])
def test_logs_are_written_anew_from_the_rounds(log_of, tmp_path, nan):
    """Whatever a crash has left: as they were after round 2, byte for byte."""
    write_rounds(log_of(), [1, 2], nan)
    after_two = content(tmp_path)
    write_rounds(log_of(0, 2), [3, 4], nan)
    with open(tmp_path / "rounds.jsonl", "a") as file:
        file.write('{"round": 5, "train_lo')  # torn
    (tmp_path / "client_0_train_loss.json").write_text("[1.0, 2.0, 3.0, 4.0, 5.0]")  # ahead of the rounds
    (tmp_path / "client_2_train_loss.json").unlink()
    (tmp_path / "client_7_train_loss.json").write_text("[9.0]")  # it has not played up to round 2
    assert [entry["round"] for entry in read_rounds(tmp_path)] == [1, 2, 3, 4]
    cut_back_logs(tmp_path, 2)
    assert content(tmp_path) == after_two
    cut_back_logs(tmp_path, 0)
    assert content(tmp_path) == {"rounds.jsonl": ""}


def test_a_torn_line_is_left_out(tmp_path):
    assert read_rounds(tmp_path) == []
    (tmp_path / "rounds.jsonl").write_bytes(b'{"round": 1}\n{"round": 2, "text": "\xff\n{"round": 3}\n')
    assert [entry["round"] for entry in read_rounds(tmp_path)] == [1, 3]


# -----------------------------------------------------------------------------
# curves and digests


def test_curves():
    entry = runlog.round_entry(2, 0.01, reports_of(2), {}, 0.25, 0.2, SECONDS) | {"digest": "x"}
    curves = runlog.curves_of(entry)
    assert {"federation/train_loss", "federation/eval_loss", "federation/learning_rate"} <= set(curves)
    assert curves["federation/learning_rate"] == 0.01 and curves["federation/eval_loss"] == 2.5
    assert curves["client_2/train_loss"] == 2.2 and curves["client_5/eval_loss"] == 1.5
    assert all(isinstance(value, float | int) for value in curves.values())
    curves = runlog.curves_of(runlog.round_entry(1, 0.01, reports_of(1), {}, 0.25, None, SECONDS))
    assert not any("eval_loss" in name for name in curves) and "client_0/train_loss" in curves


@pytest.mark.parametrize("size", [5000, 2**20 + 5])
def test_checksum_sees_values_and_places(size):
    vector = torch.randn(size)
    others = [vector.roll(1), vector.flip(0), vector.clone().index_fill_(0, torch.tensor(size - 1), 0.0)]
    others.append(vector.roll(2**20))
    assert runlog.checksum(vector).item() == runlog.checksum(vector.clone()).item() < 2**53
    distinct = 5 if size > 2**20 else len({tuple(each.tolist()) for each in [vector, *others]})
    assert len({runlog.checksum(each).item() for each in [vector, *others]}) == distinct


def test_digest():
    vector = torch.arange(4.0)
    assert runlog.digest(vector) == hashlib.sha256(vector.numpy().tobytes()).hexdigest()
