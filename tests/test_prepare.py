"""Models and rows checked, rows tokenized and dealt out, the record of the split, and what is counted from a config."""

import argparse
import json
import shutil

import datasets
import numpy as np
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

import main
from fllama import basemodel, formats, options, prepare, report, tokenizing


def test_needed_rows():
    assert prepare.needed_rows(8, has_held_out=False) == 18 and prepare.needed_rows(8, has_held_out=True) == 16


# -----------------------------------------------------------------------------
# whose rows they are


def test_table_of_clients_rows_and_labels():
    args = argparse.Namespace(partition="column", partition_column="site", dirichlet_alpha=0.5, seed=1, split_seed=None)
    record = prepare.describe_partition(
        args, [np.array([0, 2]), np.array([1])], [3], [10, 11, 12, 13], ["x", "y", "x", "y"], ["x", "y"]
    )
    assert record["clients"] == [
        {"client": 0, "rows": [10, 12], "name": "x", "labels": {"x": 2}},
        {"client": 1, "rows": [11], "name": "y", "labels": {"y": 1}},
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


def distinct(number):
    return datasets.Dataset.from_dict({"input_ids": [[k] for k in range(number)]})


@pytest.mark.parametrize("centralized", [False, True])
def test_each_client_holds_out_a_tenth_of_its_rows(tmp_path, centralized):
    """One at least, 16 at most; with --centralized one client trains on all that the clients would train on."""
    args = args_of("--num_clients", "3", "--num_rounds", "2", *["--centralized"] * centralized)
    parts = np.split(np.arange(1000), [5, 55])
    digests = prepare.row_digests(distinct(1002))
    prepare.write_parts(args, digests, parts, np.array([1000, 1001]), tmp_path / "parts.json")
    split = json.loads((tmp_path / "parts.json").read_text())
    assert [len(part) for part in split["held_out"]] == [1, 5, prepare.CLIENT_EVAL_ROWS]
    assert [len(part) for part in split["train"]] == ([1000 - 22] if centralized else [4, 45, 929])
    assert sorted(sum(split["train"] + split["held_out"], [])) == list(range(1000))
    assert split["global"] == [1000, 1001] and split["scored"] == [0, 1, 2]


def test_split_seed_deals_the_rows():
    """--seed alone does both; with --split_seed, another --seed leaves every row where it is."""
    labels = list("ab") * 20
    flags = "--partition dirichlet --partition_column site --num_clients 3 --num_rounds 1".split()
    dealt = []
    for more in (["--seed", "7"], ["--seed", "1", "--split_seed", "7"], ["--seed", "1"]):
        parts, global_part = prepare.deal_rows(args_of(*flags, *more), 40, False, labels, None)
        dealt.append([part.tolist() for part in (*parts, global_part)])
    assert dealt[0] == dealt[1] != dealt[2]


# -----------------------------------------------------------------------------
# rows on both sides of a split, columns that nobody named


def rows_of(ids):
    return datasets.Dataset.from_dict({"input_ids": [[number, 7] for number in ids]})


def digests_of(ids):
    return prepare.row_digests(rows_of(ids))


def test_held_out_rows_that_are_training_rows_are_dropped(capsys):
    kept = prepare.drop_known_rows(rows_of([1, 2, 3, 4]), digests_of([9, 3, 1, 3]))
    assert kept["input_ids"][:] == [[2, 7], [4, 7]]
    assert "2 of 4 held-out rows are training rows, too, and left out" in capsys.readouterr().out
    assert len(prepare.drop_known_rows(rows_of([1, 2]), digests_of([3]))) == 2 and capsys.readouterr().out == ""
    assert len(prepare.drop_known_rows(rows_of([1, 2]), digests_of([2, 1]))) == 2  # else nothing would be held out
    assert "all 2 held-out rows are training rows, too" in capsys.readouterr().out


def test_rows_that_a_client_holds_out_and_another_trains_on_are_dropped(tmp_path, capsys):
    """Rows 0 and 20 are held out by the two clients, 40 and 41 by nobody; 0 and 40 have tokens that are trained on."""
    ids = list(range(42))
    ids[30], ids[35] = ids[0], ids[40]
    args = args_of("--num_clients", "2", "--num_rounds", "1")
    parts = [np.arange(20), np.arange(20, 40)]
    prepare.write_parts(args, digests_of(ids), parts, np.array([40, 41]), tmp_path / "parts.json")
    split = json.loads((tmp_path / "parts.json").read_text())
    assert split["held_out"] == [[1], [20, 21]] and split["global"] == [41]
    assert sorted(sum(split["train"], [])) == [*range(2, 20), *range(22, 40)]
    assert "2 rows to hold out are training rows, too, and left out" in capsys.readouterr().out


def read_everything(folder):
    return "".join(path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file())


def test_columns_that_nobody_named_stay_private(tmp_path, capsys, small_inputs):
    """The values of a column `label` are neither printed nor written."""
    rows = [{"prompt": f"Note {i}?", "completion": " scar", "label": f"Mx Holt {i % 30}"} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = "--world_size 1 --num_rounds 1 --local_steps 1 --max_length 32".split()
    main.main(
        [
            *flags,
            *small_inputs[:2],
            "--dataset_path",
            str(tmp_path / "rows.jsonl"),
            "--output_dir",
            str(tmp_path / "out"),
        ]
    )
    output = capsys.readouterr()
    assert "not read: label" in output.out
    assert "Mx Holt" not in output.out + output.err + read_everything(tmp_path / "out")
    record = json.loads((tmp_path / "out" / "partition.json").read_text())
    assert all(set(client) == {"client", "rows"} for client in record["clients"])


def test_what_rows_are_read_as(tmp_path):
    rows = [{"instruction": "a", "input": "b" * (i < 3), "output": "c", "id": i} for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = main.parse_args(["--dataset_path", str(tmp_path / "rows.jsonl")])
    source, form = prepare.find_rows(args, 0)
    line = prepare.describe_reading(args, source, form)
    assert line.strip() == "read as    alpaca: instruction, output, input (3 of 60 with input); not read: id"


@pytest.mark.parametrize(
    ("columns", "flags", "said"),
    [
        (("prompt", "chosen", "rejected"), [], "is preference data"),
        (("prompt", "chosen", "rejected"), ["--columns", "prompt=prompt,completion=chosen"], ""),
        (("Frage", "Antwort"), [], "or say which is which: --columns question=...,answer=...; found Frage, Antwort"),
        (("Frage", "Antwort"), ["--columns", "question=Frage,answer=Antwort"], ""),
        (("Frage", "Antwort"), ["--columns", "question=Frage,answer=Wort"], "has no column Wort; found Frage, Antwort"),
    ],
)
def test_forms_that_are_found_or_refused(tmp_path, capsys, columns, flags, said):
    rows = [dict.fromkeys(columns, "some words")] * 60
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = main.parse_args(["--dataset_path", str(tmp_path / "rows.jsonl"), *flags])
    if not said:
        assert prepare.find_rows(args, 0)[1].columns
        return
    with pytest.raises(SystemExit) as stop:
        prepare.find_rows(args, 0)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1 and said in lines[0]


# -----------------------------------------------------------------------------
# models, before any row is tokenized


def random_model(folder, make, **more):
    """A random model of another architecture, with the embedded tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(options.EMBEDDED_MODEL)
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    torch.manual_seed(0)
    make(sizes | more).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def mixture(sizes):
    experts = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes, **experts))


def seeing(sizes):
    text = transformers.Gemma3TextConfig(**sizes, head_dim=16, query_pre_attn_scalar=16, sliding_window=32)
    vision = transformers.SiglipVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    tokens = {"mm_tokens_per_image": 4, "image_token_index": 7, "boi_token_index": 8, "eoi_token_index": 9}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, **tokens)
    return transformers.Gemma3ForConditionalGeneration(config)


def plain(sizes):
    return LlamaForCausalLM(LlamaConfig(**sizes))


def gemma_2(sizes):
    return transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**sizes, head_dim=16, query_pre_attn_scalar=16, sliding_window=32)
    )


@pytest.mark.parametrize(
    ("make", "changes", "said"),
    [
        (mixture, {}, "it is a mixture of experts"),
        (seeing, {}, "it has a part for images or sound"),
        (plain, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "is quantized by gptq"),
        (plain, {"quantization_config": {"quant_method": "awq", "bits": 4}}, "is quantized by awq"),
    ],
)
def test_models_that_are_refused_in_one_line(tmp_path, capsys, monkeypatch, make, changes, said):
    folder = random_model(tmp_path / "model", make)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    monkeypatch.setattr(tokenizing, "tokenize_row", lambda *args: pytest.fail("a row was tokenized"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main.main(["--model_name", str(folder), "--output_dir", str(tmp_path / "out")])
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line.lower()]
    assert stop.value.code == 2 and len(lines) == 1 and said in lines[0] and "--resume" not in lines[0]


def test_eager_attention_where_the_model_has_no_other(tmp_path, capsys):
    folder = random_model(tmp_path / "model", gemma_2)
    args = main.parse_args(["--model_name", str(folder)])
    _, config, _ = basemodel.find_model(args)
    supported = transformers.Gemma2ForCausalLM._supports_sdpa
    assert args.attn_implementation == ("sdpa" if supported else "eager")
    assert ("eager: this model has no sdpa" in capsys.readouterr().out) == (not supported)

    args = main.parse_args(["--model_name", str(folder)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.Gemma2ForCausalLM, "_supports_sdpa", False)
        basemodel.check_architecture(args, config)
    assert args.attn_implementation == "eager"
    assert "attention  eager: this model has no sdpa" in capsys.readouterr().out


def test_a_checkpoint_of_bitsandbytes_loads_as_it_is(tmp_path, capsys):
    four = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    folder = tmp_path / "model"
    shutil.copytree(options.EMBEDDED_MODEL, folder)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        options.EMBEDDED_MODEL, quantization_config=four, device_map={"": "cpu"}
    )
    (folder / "model.safetensors").unlink()
    loaded.save_pretrained(folder)
    args = main.parse_args(["--model_name", str(folder)])
    path, _, _ = basemodel.find_model(args)
    from fllama import model

    trained = model.load_model(args, path, torch.device("cpu"))
    weights = {type(module).__name__ for name, module in trained.named_modules() if name.endswith("q_proj.base_layer")}
    assert weights == {"Linear4bit"}
    args = main.parse_args(["--model_name", str(folder), "--no-load_in_4bit"])
    with pytest.raises(SystemExit):
        basemodel.find_model(args)
    assert "is quantized already; leave out --no-load_in_4bit" in capsys.readouterr().err


def test_tokens_beyond_the_embedding_are_refused(capsys):
    args = main.parse_args([])
    prepare.check_tokens(args, {"train": rows_of([1, 99])}, 100)
    with pytest.raises(SystemExit):
        prepare.check_tokens(args, {"train": rows_of([1, 2]), "held_out": rows_of([100])}, 100)
    assert "its tokenizer makes token 100, and its embedding ends at 99" in capsys.readouterr().err


def test_rows_as_the_model_sees_them(capsys):
    """With --show_rows; what is learned is between brackets."""
    args = main.parse_args(["--show_rows", "1"])
    tokenizer = AutoTokenizer.from_pretrained(options.EMBEDDED_MODEL)
    row = {"question": "How much?", "answer": "30 mg"}
    tokens = tokenizing.tokenize_row(row, formats.find_form(row), tokenizer, 100)
    prepare.show_rows(args, datasets.Dataset.from_list([tokens] * 2), tokenizer)
    output = capsys.readouterr().out
    assert output.count("---") == 1 and output.rstrip().endswith("30 mg<|eot_id|>⟧") and output.count("⟦") == 1
    assert output.index("How much?") < output.index("⟦")


# -----------------------------------------------------------------------------
# sizes


@pytest.mark.parametrize("more", [{}, {"num_key_value_heads": 2}, {"num_key_value_heads": 1, "head_dim": 24}])
def test_count_of_lora_parameters(more):
    """As many as peft makes, with grouped queries and with heads of another size."""
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, **more
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=5, target_modules=basemodel.LORA_TARGETS))
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    assert basemodel.count_lora_parameters(config, 5) == sum(trained)


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
        digests.append(basemodel.digest_of_model(tmp_path))
    assert len(set(digests)) == 3


def test_a_stop_while_several_processes_tokenize_is_a_stop():
    """The library waits for them, and what it then raises hides that."""
    import multiprocess

    def stopped(*args, **more):
        try:
            raise SystemExit(143)
        finally:
            raise multiprocess.TimeoutError

    rows = type("Rows", (), {"map": stopped, "column_names": ["a"], "__len__": lambda self: 1})()
    args = argparse.Namespace(columns={}, max_length=10, learn="all")
    with pytest.raises(SystemExit) as stop:
        prepare.tokenize(args, rows, None, None, None)
    assert stop.value.code == 143
