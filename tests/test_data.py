"""The rows of clients in the order in which they read them, and packs of rows."""

import dataclasses
import json

import datasets
import numpy as np
import pytest
import torch
from conftest import make_trainer
from transformers import AutoTokenizer

import main
import utils
from fllama import data, formats, options, tokenizing
from fllama.model import lora_parameters
from fllama.prepare import Run

# -----------------------------------------------------------------------------
# whose turn reads what


@pytest.fixture(scope="module")
def parts():
    return [part.tolist() for part in utils.split_evenly(200, 10, seed=1)]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory, parts):
    """The ClientData of 2 ranks: 10 clients of 18 rows, of which 5 read 6 rows each in every one of 8 rounds."""
    folder = tmp_path_factory.mktemp("data")
    rows = datasets.Dataset.from_dict({"id": list(range(200)), "length": [1] * 200, "prompt_length": [1] * 200})
    datasets.DatasetDict(train=rows, held_out=rows.select(range(100, 200))).save_to_disk(folder)
    split = {"train": [part[2:] for part in parts], "held_out": [part[:2] for part in parts]}
    (folder / "parts.json").write_text(json.dumps(split | {"global": [], "scored": [3, 7]}))
    flags = "--num_clients 10 --clients_per_round 5 --num_rounds 8 --local_steps 2 --per_device_train_batch_size 3"
    args = main.parse_args([*flags.split(), "--world_size", "2"])
    run = Run("", str(folder), machine_of_rank=(0, 0))
    return [data.load_client_data(rank, args, run) for rank in range(2)]


def test_a_client_goes_on_where_its_data_stopped(ranks, parts):
    """Over all its turns, on whatever rank, a client reads its own rows in the order of its schedule."""
    read = {}
    for number in range(1, 9):
        for rank, its_data in enumerate(ranks):
            for client in its_data.plan[number - 1].shares[rank]:
                read.setdefault(client, []).extend(its_data.sequences_of_turn(client, number)["id"])
    assert sum(map(len, read.values())) == 8 * 5 * 6 and max(map(len, read.values())) > 18  # more than an epoch
    for client, ids in read.items():
        own = np.array(parts[client][2:])
        assert ids == own[utils.schedule_rows(18, len(ids), [42, client])].tolist()
        assert set(ranks[0].own_held_out(client)["id"]) == set(parts[client][:2])


def test_ranks_share_the_global_rows_out(ranks):
    shares = [its_data.global_share()["id"][:] for its_data in ranks]
    assert sorted(shares[0] + shares[1]) == list(range(100, 200)) and len(shares[0]) == len(shares[1]) == 50
    assert len(ranks[0].questions()) == 96
    assert len(dataclasses.replace(ranks[0], num_questions=5).questions()) == 5
    numbers = ranks[0].global_numbers  # in their split, whatever the seed
    assert ranks[0].global_held_out["id"] == [100 + number for number in numbers] and numbers != sorted(numbers)


def test_a_round_evaluates_the_first_own_rows_alone():
    """Of 50 that the end answers, 16; of two parts (--centralized) as many each."""
    rows = datasets.Dataset.from_dict({"id": list(range(100))})
    held_out = [list(range(0, 50)), list(range(50, 100))]
    args = {field: None for field in data.ClientData.__dataclass_fields__}
    one = data.ClientData(**args | {"rows": rows, "held_out": held_out, "scored": [0, 1], "num_train": [9, 9]})
    assert one.own_held_out(1)["id"] == list(range(50, 66))
    one.num_train = [18]
    assert one.own_held_out(0)["id"] == [*range(16), *range(50, 66)]


def test_the_last_rank_of_a_client_has_its_state(ranks):
    """Of every client that has played, one rank is the last."""
    for done in (0, 1, 8):
        held = [its_data.last_played_here(done) for its_data in ranks]
        played = {client for each in ranks[0].plan[:done] for client in each.clients()}
        assert sorted(held[0] + held[1]) == sorted(played)
        if done:
            last = ranks[0].plan[done - 1].shares
            assert set(last[0]) <= set(held[0]) and set(last[1]) <= set(held[1])


def test_batches_are_the_turn_in_its_order(tmp_path):
    rows = datasets.Dataset.from_list([{"input_ids": [k] * 3, "labels": [-100, k, k], "length": 3} for k in range(8)])
    _, trainer = make_trainer(tmp_path, "--per_device_train_batch_size", "2", rows=rows)
    batches = list(data.read_batches(rows.select([5, 1, 7, 2]), trainer))
    assert [batch["input_ids"][:, 0].tolist() for batch in batches] == [[5, 1], [7, 2]]


# -----------------------------------------------------------------------------
# packing


def make_rows(lengths):
    """Rows of so many tokens, every token of row k is k; the last two are the answer."""
    rows = [{"input_ids": [k] * n, "labels": [-100] * (n - 2) + [k] * 2} for k, n in enumerate(lengths)]
    return datasets.Dataset.from_list(rows)


def test_packs_hold_every_row_of_one_client_once():
    rows = make_rows([6, 3, 7, 4, 2, 5, 8, 3])
    packs, numbers = data.pack_rows(rows, {4: np.array([0, 1, 2, 3]), 7: np.array([4, 5, 6, 7])}, max_length=10)
    # best fit, the longest first: 7 and 3, 6 and 4; 8 and 2, 5 and 3
    assert [packs[int(i)]["seq_lengths"] for i in numbers[4]] == [[7, 3], [6, 4]]
    assert [packs[int(i)]["seq_lengths"] for i in numbers[7]] == [[8, 2], [5, 3]]
    assert [sorted(set(packs[int(i)]["input_ids"])) for i in numbers[4]] == [[1, 2], [0, 3]]
    assert [sorted(set(packs[int(i)]["input_ids"])) for i in numbers[7]] == [[4, 6], [5, 7]]
    assert data.count_tokens(packs) == 38


@pytest.fixture(scope="module")
def rows_of_other_lengths():
    """8 rows of the embedded data, which differ in their lengths."""
    tokenizer = AutoTokenizer.from_pretrained(options.EMBEDDED_MODEL)
    path = f"{options.EMBEDDED_DATA}/train.jsonl"
    rows = datasets.load_dataset("json", data_files=path)["train"].select(range(8))
    tokens = [tokenizing.tokenize_row(row, formats.find_form(row), tokenizer, 1024) for row in rows]
    cut = [{"input_ids": row["input_ids"][i:], "labels": row["labels"][i:]} for i, row in enumerate(tokens)]
    return datasets.Dataset.from_list(cut)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_do_not_see_each_other(tmp_path, rows_of_other_lengths, attention):
    """The loss of a batch of packs is that of the rows one by one, and so is its gradient."""
    rows = rows_of_other_lengths
    packs, _ = data.pack_rows(rows, {0: np.arange(8)}, 256)
    _, trainer = make_trainer(tmp_path, "--packing", "--attn_implementation", attention, rows=packs)
    for parameter in lora_parameters(trainer.model):
        torch.nn.init.normal_(parameter, std=0.1)  # else the adapter does nothing yet

    def loss_and_gradient(batches):
        trainer.model.zero_grad()
        losses = [trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=1) for batch in batches]
        sum(losses).backward()
        return sum(losses).item(), torch.cat([p.grad.view(-1) for p in utils.shared_parameters(trainer.model)])

    one_by_one = []
    for row in rows:
        batch = {"input_ids": torch.tensor([row["input_ids"]]), "labels": torch.tensor([row["labels"]])}
        one_by_one.append(batch | {"attention_mask": torch.ones(1, len(row["input_ids"]), dtype=torch.long)})
    alone, expected = loss_and_gradient(one_by_one)
    sequences = [{name: pack[name] for name in ("input_ids", "labels", "seq_lengths")} for pack in packs]
    assert len(sequences) < 8 and len({len(pack["input_ids"]) for pack in sequences}) > 1  # one is padded
    packed, gradient = loss_and_gradient([trainer.data_collator(sequences)])
    assert packed == pytest.approx(alone, rel=1e-5)
    assert (gradient - expected).norm() / expected.norm() <= 1e-5


def test_no_row_predicts_the_first_token_of_the_next():
    """Where a row begins, there is no loss, even if it has no prompt."""
    batch = {"labels": torch.tensor([[5, 6, 7, 8]]), "position_ids": torch.tensor([[0, 1, 0, 1]])}
    batch = data.collate_packs(lambda sequences: batch | {"attention_mask": torch.ones(1, 4)}, [])
    assert batch["labels"].tolist() == [[-100, 6, -100, 8]] and "attention_mask" not in batch
