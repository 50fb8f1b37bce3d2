"""Data and files, without a process group."""

import json

import datasets
import numpy as np
import pytest
from transformers import AutoTokenizer

import main
import utils

SAMPLE = {"context": "Rx: aspirin 30 mg.", "question": "How much aspirin?", "answers": {"text": ["30 mg", "30"]}}
CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|eot_id|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(main.EMBEDDED_MODEL)


def test_partition_holds_every_row_once_and_evenly():
    rows = datasets.Dataset.from_dict({"id": list(range(103))})
    parts = [utils.partition_dataset(rows, rank, 8)["id"] for rank in range(8)]
    assert sorted(row for part in parts for row in part) == list(range(103))
    assert {len(part) for part in parts} == {12, 13}
    assert list(parts[0]) == list(utils.partition_dataset(rows, 0, 8)["id"]) != list(range(13))
    assert list(parts[0]) != list(utils.partition_dataset(rows, 0, 8, seed=1)["id"])


def test_schedule_reads_every_row_once_an_epoch():
    order = utils.schedule_rows(10, 25, seed=3)
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10)) and len(order) == 25
    assert list(order[:10]) != list(order[10:20])
    assert np.array_equal(order[:20], utils.schedule_rows(10, 20, seed=3))  # a longer run begins with the same rows


def test_conversation_of_a_squad_row(tokenizer):
    conversation = utils.convert_squad_sample_to_llama_conversation(SAMPLE, tokenizer)
    assert [message["role"] for message in conversation["prompt"]] == ["system", "user"]
    assert conversation["prompt"][0]["content"].endswith("Rx: aspirin 30 mg.")
    assert conversation["prompt"][1]["content"] == "How much aspirin?"
    assert conversation["completion"] == [{"role": "assistant", "content": "30 mg"}]


@pytest.mark.parametrize("answers", [{"text": ["30 mg"]}, [{"text": "30 mg"}]])
def test_both_forms_of_answers(tokenizer, answers):
    assert utils.list_answers(SAMPLE | {"answers": answers}) == ["30 mg"]


@pytest.mark.parametrize("answers", [{"text": []}, []])
def test_no_answer_means_unanswerable(answers):
    assert utils.list_answers(SAMPLE | {"answers": answers}) == ["unanswerable"]


def test_template_without_a_system_role(tokenizer):
    tokenizer.chat_template = NO_SYSTEM
    conversation = utils.convert_squad_sample_to_llama_conversation(SAMPLE, tokenizer)
    assert [message["role"] for message in conversation["prompt"]] == ["user"]
    assert "Rx: aspirin 30 mg." in conversation["prompt"][0]["content"]
    assert conversation["prompt"][0]["content"].endswith("How much aspirin?")


def test_template_that_drops_the_system_message(tokenizer):
    tokenizer.chat_template = NO_SYSTEM.replace("{{ raise_exception('no system') }}", "{% continue %}")
    assert len(utils.convert_squad_sample_to_llama_conversation(SAMPLE, tokenizer)["prompt"]) == 1


@pytest.mark.parametrize("template", [None, CHATML, NO_SYSTEM])
def test_loss_on_the_answer_only(tokenizer, template):
    tokenizer.chat_template = template or tokenizer.chat_template
    row = utils.tokenize_row(SAMPLE, tokenizer, 512)
    assert row["input_ids"].count(tokenizer.bos_token_id) == (0 if template == CHATML else 1)
    assert tokenizer.decode([label for label in row["labels"] if label != -100]).lstrip() == "30 mg<|eot_id|>"
    assert row["labels"][-1] == tokenizer.eos_token_id
    assert row["length"] == len(row["input_ids"]) == len(row["labels"])
    assert row["answer_length"] == sum(label != -100 for label in row["labels"])
    assert row["references"] == ["30 mg", "30"]


def test_prompt_is_what_the_model_sees_when_it_answers(tokenizer):
    row = utils.tokenize_row(SAMPLE, tokenizer, 512)
    prompt = utils.convert_squad_sample_to_llama_conversation(SAMPLE, tokenizer)["prompt"]
    shown = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
    assert row["input_ids"][: row["labels"].count(-100)] == shown


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "How much?"}, {"role": "assistant", "content": "30 mg"}]},
        {"prompt": "How much?", "completion": " 30 mg"},
        {
            "prompt": [{"role": "user", "content": "How much?"}],
            "completion": [{"role": "assistant", "content": "30 mg"}],
        },
    ],
)
def test_other_forms_of_rows(tokenizer, row):
    tokens = utils.tokenize_row(row, tokenizer, 512)
    assert tokens["input_ids"].count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode([label for label in tokens["labels"] if label != -100]).strip() == "30 mg<|eot_id|>"
    assert [reference.strip() for reference in tokens["references"]] == ["30 mg"]


def test_truncation_is_marked(tokenizer):
    whole = utils.tokenize_row(SAMPLE, tokenizer, 512)
    cut = utils.tokenize_row(SAMPLE, tokenizer, whole["length"] - 1)
    assert not whole["truncated"] and cut["truncated"]
    assert cut["answer_length"] == whole["answer_length"] - 1 and cut["length"] == len(cut["labels"])
    assert utils.tokenize_row(SAMPLE, tokenizer, 5)["answer_length"] == 0


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
    train, held_out = utils.load_rows(str(path))
    assert list(train["prompt"]) == ["a0", "a1", "a2", "a3", "a4"]
    assert (held_out is None) == (kind not in ("folder", "save_to_disk"))


def test_losses_are_appended_and_cut_back(tmp_path):
    for number in range(1, 4):
        utils.append_loss_to_file(tmp_path / "client_0_train_loss.json", 0.5 * number)
        if number != 2:
            utils.append_loss_to_file(tmp_path / "global_eval_loss.json", 1.0 * number)
        with open(tmp_path / "rounds.jsonl", "a") as file:
            entry = {"round": number, "clients": [0, 3], "eval_loss": None if number == 2 else 1.0 * number}
            file.write(json.dumps(entry) + "\n")
    assert json.loads((tmp_path / "client_0_train_loss.json").read_text()) == [0.5, 1.0, 1.5]
    utils.cut_back_logs(tmp_path, 2)
    assert json.loads((tmp_path / "client_0_train_loss.json").read_text()) == [0.5, 1.0]
    assert json.loads((tmp_path / "global_eval_loss.json").read_text()) == [1.0]
    assert [entry["round"] for entry in utils.read_rounds(tmp_path)] == [1, 2]
