"""Rows found and dealt out: every kind of file, the record of the split, and what is counted from a config."""

import argparse
import json

import datasets
import numpy as np
import pytest
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import main
from fllama import prepare, report


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet", "folder", "save_to_disk"])
def test_every_kind_of_dataset(tmp_path, kind):
    rows = datasets.Dataset.from_list([{"prompt": f"a{i}", "completion": f"b{i}"} for i in range(5)])
    path = tmp_path / f"rows.{kind}"
    if kind == "folder":
        path.mkdir()
        rows.to_json(path / "train.jsonl")
        rows.select([0]).to_json(path / "validation.jsonl")
    elif kind == "save_to_disk":
        datasets.DatasetDict(train=rows, test=rows.select([0])).save_to_disk(path)
    else:
        {"json": rows.to_json, "jsonl": rows.to_json, "csv": rows.to_csv, "parquet": rows.to_parquet}[kind](path)
    train, held_out = prepare.load_rows(str(path))
    assert list(train["prompt"]) == ["a0", "a1", "a2", "a3", "a4"]
    assert (held_out is None) == (kind not in ("folder", "save_to_disk"))


def test_the_first_held_out_split_counts(tmp_path):
    rows = datasets.Dataset.from_dict({"prompt": ["a", "b", "c"]})
    data = datasets.DatasetDict(test=rows.select([0]), train=rows, validation=rows.select([1]))
    data.save_to_disk(tmp_path / "three")
    assert prepare.load_rows(str(tmp_path / "three"))[1]["prompt"][:] == ["b"]
    rows.save_to_disk(tmp_path / "one")
    assert prepare.load_rows(str(tmp_path / "one"))[1] is None
    datasets.DatasetDict(test=rows).save_to_disk(tmp_path / "none")
    with pytest.raises(ValueError, match="no split is named train; found test"):
        prepare.load_rows(str(tmp_path / "none"))


def test_needed_rows():
    assert prepare.needed_rows(8, has_held_out=False) == 18 and prepare.needed_rows(8, has_held_out=True) == 16


# -----------------------------------------------------------------------------
# whose rows they are


def test_table_of_clients_rows_and_labels():
    args = argparse.Namespace(partition="column", partition_column="site", dirichlet_alpha=0.5, seed=1)
    record = prepare.describe_partition(
        args, [np.array([0, 2]), np.array([1])], [3], [10, 11, 12, 13], ["x", "y", "x", "y"]
    )
    assert record["clients"] == [
        {"client": 0, "rows": [10, 12], "labels": {"x": 2}},
        {"client": 1, "rows": [11], "labels": {"y": 1}},
    ]
    assert record["held_out"] == [13] and record["dirichlet_alpha"] is None
    assert [line.split() for line in report.partition_table(record).splitlines()] == [
        ["client", "rows", "x", "y"], ["0", "2", "2", "0"], ["1", "1", "0", "1"],
    ]  # fmt: skip


def test_table_of_many_clients_and_labels():
    """24 clients and 8 labels are shown, the other labels added up; without labels, one line of sizes."""
    clients = [{"client": k, "rows": [k] * 10, "labels": {f"label {i}": 1 for i in range(10)}} for k in range(30)]
    lines = report.partition_table({"clients": clients}).splitlines()
    assert len(lines) == 1 + 24 + 1 and lines[0].split()[-1] == "others" and lines[1].split()[-1] == "2"
    assert lines[-1].strip() == "... 6 more clients, see partition.json"
    for client in clients:
        del client["labels"]
    assert report.partition_table({"clients": clients[:2]}) == "  rows of the clients: 10 10"


def args_of(*flags):
    return main.parse_args([*flags, "--dataset_path", "rows.jsonl"])


@pytest.mark.parametrize("has_held_out", [False, True])
def test_rows_are_dealt_out_once(has_held_out):
    parts, held_out = prepare.deal_rows(args_of("--num_clients", "4"), 50, has_held_out, None, None)
    assert [len(part) for part in parts] == ([13, 13, 12, 12] if has_held_out else [10] * 4)
    assert len(held_out) == (0 if has_held_out else 10)
    assert sorted([*np.concatenate(parts), *held_out]) == list(range(50))


def test_a_client_without_rows_is_refused(capsys):
    """By the value that it stands for, even if all rows of that are gone."""
    args = args_of("--partition", "column", "--partition_column", "ward")
    args.num_clients = 2
    with pytest.raises(SystemExit) as stop:
        prepare.deal_rows(args, 9, True, ["north"] * 9, ["north", "south"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "client 1 (south) gets 0 row(s), and needs 2, one to hold out" in error
    args = args_of("--partition", "dirichlet", "--dirichlet_alpha", "0.01", "--num_clients", "8")
    with pytest.raises(SystemExit):
        prepare.deal_rows(args, 40, True, list("ab" * 20), None)
    assert "raise --dirichlet_alpha, lower --num_clients, or try another --seed" in capsys.readouterr().err


@pytest.mark.parametrize("centralized", [False, True])
def test_each_client_holds_out_a_tenth_of_its_rows(tmp_path, centralized):
    """One at least, 16 at most; with --centralized one client trains on all that the clients would train on."""
    args = args_of("--num_clients", "3", "--num_rounds", "2", *["--centralized"] * centralized)
    parts = np.split(np.arange(1000), [5, 55])
    prepare.write_parts(args, parts, np.array([1000, 1001]), tmp_path / "parts.json")
    split = json.loads((tmp_path / "parts.json").read_text())
    assert [len(part) for part in split["held_out"]] == [1, 5, prepare.CLIENT_EVAL_ROWS]
    assert [len(part) for part in split["train"]] == ([1000 - 22] if centralized else [4, 45, 929])
    assert sorted(sum(split["train"] + split["held_out"], [])) == list(range(1000))
    assert split["global"] == [1000, 1001] and split["scored"] == [0, 1, 2]


# -----------------------------------------------------------------------------
# sizes


@pytest.mark.parametrize("more", [{}, {"num_key_value_heads": 2}, {"num_key_value_heads": 1, "head_dim": 24}])
def test_count_of_lora_parameters(more):
    """As many as peft makes, with grouped queries and with heads of another size."""
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, **more
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=5, target_modules=prepare.LORA_TARGETS))
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    assert prepare.count_lora_parameters(config, 5) == sum(trained)


def test_checkpoint_bytes_by_hand():
    """20 bytes for the adapter and the server, 8 of moments per client, 4 more for SCAFFOLD and for error feedback."""
    flags = "--num_clients 10 --scaffold --average_dtype int8".split()
    assert prepare.checkpoint_bytes(args_of(*flags, "--optim", "adamw_torch"), 1000) == 1000 * (20 + 10 * (8 + 4 + 4))
    assert prepare.checkpoint_bytes(args_of("--num_clients", "10", "--client_state", "reset"), 1000) == 1000 * 20
    assert prepare.checkpoint_bytes(args_of("--centralized", "--optim", "sgd"), 1000) == 1000 * (20 + 4)


def test_models_are_told_apart(tmp_path):
    """By the last MB of their weights: a part of it that is another is another model."""
    digests = []
    for content in (b"a" * 3_000_000, b"a" * 2_999_999 + b"b", b"a" * 2_999_999):
        (tmp_path / "model.safetensors").write_bytes(content)
        digests.append(prepare.digest_of_model(tmp_path))
    assert len(set(digests)) == 3
