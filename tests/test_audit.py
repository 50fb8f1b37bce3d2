"""fllama/audit.py: canaries, and what their losses tell."""

import json
import math
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from conftest import make_trainer

import main
from fllama import audit, formats, prepare, report
from fllama.collectives import Communicator
from fllama.model import load_tokenizer
from fllama.options import EMBEDDED_MODEL

SQUAD = formats.find_form(["context", "question", "answers"])


def arguments(*flags):
    return main.parse_args(["--world_size", "2", *flags])


# -----------------------------------------------------------------------------
# figures


def test_auc_by_hand():
    inserted = np.array([True, True, False, False])
    assert audit.auc(np.array([3.0, 2.0, 1.0, 0.0]), inserted) == 1
    assert audit.auc(np.array([3.0, 1.0, 2.0, 0.0]), inserted) == 0.75
    assert audit.auc(np.array([1.0, 1.0, 1.0, 1.0]), inserted) == 0.5
    assert audit.auc(np.array([1.0, 2.0]), np.array([True, True])) is None


def test_the_interval_of_an_auc_is_no_point_at_its_ends_and_holds_the_truth_in_95_percent():
    low, high = audit.auc_interval(1.0, 10, 10)
    assert 0.7 < low < 0.9 and high == 1
    assert audit.auc_interval(0.0, 10, 10) == [0, pytest.approx(1 - low)]
    low, high = audit.auc_interval(0.5, 10, 10)
    assert low == pytest.approx(1 - high) and 0.2 < low < 0.3
    assert audit.auc_interval(None, 0, 4) is None
    rng, held = np.random.default_rng(1), 0
    truth = 0.5 * (1 + math.erf(0.8 / 2))  # of two normals, 0.8 apart
    inserted = np.arange(60) < 30
    for _ in range(400):
        scores = rng.normal(size=60) + 0.8 * inserted
        low, high = audit.auc_interval(audit.auc(scores, inserted), 30, 30)
        held += low <= truth <= high
    assert 0.92 < held / 400 < 0.98


def test_exposure_by_hand():
    assert audit.exposure_of(1.0, [2.0] * 255) == 8  # the first of 256
    assert audit.exposure_of(3.0, [2.0] * 255) == 0
    assert audit.exposure_of(1.0, [0.5, 2.0, 2.0]) == 1  # the second of 4
    rng = np.random.default_rng(1)
    guesses = [audit.exposure_of(rng.random(), rng.random(255)) for _ in range(3000)]
    assert abs(np.mean(guesses) - 1.44) < 0.1  # 1 / ln 2


def plain_p_value(m, guesses, correct, epsilon, delta):
    """The same from the theorem's words, by sums over single outcomes."""
    q = math.exp(epsilon) / (1 + math.exp(epsilon))
    chance = [math.comb(guesses, k) * q**k * (1 - q) ** (guesses - k) for k in range(guesses + 1)]
    gains = [sum(chance[correct - i : correct]) / i for i in range(1, correct + 1)]
    return min(1, sum(chance[correct:]) + 2 * m * delta * max(gains, default=0))


def test_p_values_follow_the_theorem():
    for m, guesses, correct in ((10, 10, 10), (10, 10, 7), (40, 20, 15), (8, 4, 0), (100, 100, 60)):
        for epsilon in (0.0, 0.5, 3.0):
            for delta in (0.0, 1e-5, 1e-2):
                found = audit.p_value(m, guesses, correct, epsilon, delta)
                assert found == pytest.approx(plain_p_value(m, guesses, correct, epsilon, delta), rel=1e-9)
    bound = audit.largest_refuted(64, 64, 64, 0.0, 0.05)  # all right: q^64 = 0.05
    assert bound == pytest.approx(math.log(1 / (0.05 ** (-1 / 64) - 1)), abs=1e-3)
    assert audit.largest_refuted(64, 64, 64, 1e-3, 0.05) < bound
    assert audit.largest_refuted(64, 64, 32, 0.0, 0.05) == 0


def test_the_bound_on_epsilon_holds_for_what_is_exactly_that_private():
    """Randomized response says each canary's coin rightly with e^eps / (1 + e^eps), and is eps-private."""
    rng, epsilon, above, bounds = np.random.default_rng(1), 1.5, 0, []
    for _ in range(100):
        inserted = rng.random(128) < 0.5
        says = inserted ^ (rng.random(128) > 1 / (1 + math.exp(-epsilon)))
        bounds.append(audit.epsilon_lower_bound(says + rng.random(128) / 2, inserted, 0.0))
        above += bounds[-1] > epsilon
    assert above <= 5  # of 100
    assert np.mean(bounds) > 0.6  # and it is no bound that says nothing


# -----------------------------------------------------------------------------
# canaries among the rows


@pytest.mark.parametrize(
    "columns",
    [["context", "question", "answers"], ["messages"], ["instruction", "output"], ["text"], ["input", "output"]],
)
def test_canaries_take_the_form_of_the_rows(columns):
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    args = arguments("--canaries", "8")
    form = formats.find_form(columns)
    made = audit.make_canaries(args, form, tokenizer, None)
    assert made.clients == [0] * 8 + [1] * 8 and 0 < sum(made.inserted) < 16
    assert len(set(map(tuple, made.rows["input_ids"]))) == 16 and len(made.references) == audit.REFERENCES
    row = made.rows[3]
    answer = tokenizer.decode([label for label in row["labels"] if label != -100])
    asked = tokenizer.decode(row["input_ids"][: audit.first_learned(row)])
    secret = answer.replace(tokenizer.eos_token, "").replace("<|eot_id|>", "").strip()
    assert len(secret) == 7 and secret.replace(" ", "").isdigit() and secret not in asked and "locker" in asked
    # another answer gives the tokens that its own row would have
    name = asked.split("locker ")[-1][:6]
    other = audit.tokenize_canary(args, form, tokenizer, None, int(name), 123456)
    answer = other["input_ids"][audit.first_learned(other) :]
    assert audit.with_answer(row, answer) == {"input_ids": other["input_ids"], "labels": other["labels"]}


def test_coins_come_from_the_seed_alone():
    tokenizer = load_tokenizer(EMBEDDED_MODEL)
    first, again, other = (
        audit.make_canaries(arguments("--canaries", "50", "--seed", seed), SQUAD, tokenizer, None) for seed in "112"
    )
    assert first.inserted == again.inserted != other.inserted and 30 < sum(first.inserted) < 70
    assert first.rows.to_list() == again.rows.to_list()


def test_canaries_are_trained_on_and_never_asked(tmp_path):
    found = {}
    for number in (0, 6):
        folder = tmp_path / str(number)
        args = arguments("--canaries", str(number), "--quiet")
        source, form = prepare.find_rows(args, 0)
        tokenizer = load_tokenizer(EMBEDDED_MODEL)
        partition, _ = prepare.prepare_data(args, source, form, tokenizer, len(tokenizer), folder, None)
        parts = json.loads((folder / "data" / "parts.json").read_text())
        found[number] = partition, parts, datasets.load_from_disk(folder / "data")
    (partition, parts, rows), (partition_with, parts_with, rows_with) = found[0], found[6]
    assert partition_with == partition and "canaries" not in rows  # which names no canary
    assert all(parts_with[name] == parts[name] for name in ("held_out", "global", "scored"))
    made = json.loads((tmp_path / "6" / "data" / audit.FILE).read_text())
    assert rows_with["train"][: len(rows["train"])] == rows["train"][:]
    for client, (trained, before) in enumerate(zip(parts_with["train"], parts["train"])):
        new = trained[len(before) :]
        expected = [i for i in range(12) if made["clients"][i] == client and made["inserted"][i]]
        assert trained[: len(before)] == before and min(new) >= len(rows["train"])
        assert rows_with["train"].select(new).to_list() == rows_with["canaries"].select(expected).to_list()


def test_canaries_that_do_not_fit(refused):
    assert "--max_length" in refused("--canaries", "2", "--max_length", "40")


# -----------------------------------------------------------------------------
# it must be able to fail


@pytest.fixture
def audited(tmp_path, small_inputs):
    """A function that audits a model after so many epochs on the inserted canaries, or on others from another seed."""

    def train_and_audit(epochs, on_others=False):
        torch.manual_seed(1)
        args, trainer = make_trainer(tmp_path, *small_inputs, "--canaries", "24")
        made = audit.make_canaries(args, SQUAD, trainer.processing_class, None)
        datasets.DatasetDict(canaries=made.rows).save_to_disk(tmp_path / "audited")
        audit.save(made, tmp_path / "audited")
        trained = made
        if on_others:
            others = arguments("--canaries", "24", "--seed", "7")
            trained = audit.make_canaries(others, SQUAD, trainer.processing_class, None)
        samples = trained.inserted_rows().select_columns(["input_ids", "labels"]).to_list()
        optimizer = torch.optim.AdamW([p for p in trainer.model.parameters() if p.requires_grad], 5e-3)
        num_tokens = torch.tensor(sum(label != -100 for row in samples for label in row["labels"]))
        for _ in range(epochs):
            trainer.training_step(trainer.model, trainer.data_collator(samples), num_tokens)
            optimizer.step()
            optimizer.zero_grad()
        clients = SimpleNamespace(private=[], states={})
        return audit.audit(args, SimpleNamespace(data_path=tmp_path / "audited"), Communicator(0, 1), trainer, clients)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small, and other processes may be at work
    yield train_and_audit
    torch.set_num_threads(threads)


def test_a_model_that_has_learned_rows_by_heart_is_caught(audited, monkeypatch):
    monkeypatch.setattr(audit, "REFERENCES", 63)
    found = audited(120)
    assert found["auc"] > 0.97 and found["auc_interval"][0] > 0.8 and found["auc_interval"][1] > 0.99
    assert found["exposure"]["most"] == 6 and found["exposure"]["inserted"] > 4 > 2.5 > found["exposure"]["held_out"]
    assert found["epsilon_lower_bound"] > 0.8
    assert found["canaries"] == len(found["each"]) == 24 and list(found["per_client"]) == [0]
    assert found["across_clients"][0]["auc"] == found["auc"]
    line = report.describe_audit(found)[0]
    assert "told apart from those it has not seen in" in line and "50% is guessing" in line


def test_a_model_that_was_trained_on_other_rows_is_guessing(audited, monkeypatch):
    """Its training has moved the loss of each canary, of those put in no more than of those held out."""
    monkeypatch.setattr(audit, "REFERENCES", 63)
    found = audited(40, on_others=True)
    lowered = [canary["lowered"] for canary in found["each"]]
    assert len(set(lowered)) == 24 and min(lowered) > 1
    low, high = found["auc_interval"]
    assert low < 0.5 < high and found["auc"] != 0.5 and found["epsilon_lower_bound"] == 0
    assert abs(found["exposure"]["inserted"] - 1.44) < 1


def test_own_models_are_seen_by_their_own_client_and_by_the_others():
    made = {"clients": [0, 0, 1, 1], "inserted": [True, False, True, False]}
    losses = {"before": dict.fromkeys(range(4), 9.0), 0: {0: 1, 1: 8, 2: 8, 3: 8}, 1: {0: 8, 1: 7, 2: 2, 3: 9}}
    args = SimpleNamespace(dp_delta=None, centralized=False)
    found = audit.describe(args, made, losses, dict.fromkeys(range(4), 2.0))
    assert found["auc"] == 1 and found["per_client"][1]["auc"] == 1
    assert found["across_clients"][0]["auc"] == 0 and found["across_clients"][1]["auc"] == 0.5


def test_a_run_without_canaries_has_no_audit(finished):
    folder, process = finished
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["audit"] is None and summary["privacy"] is None and "canaries" not in process.stdout
    assert not Path(folder, audit.FILE).exists()
