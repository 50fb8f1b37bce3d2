"""The finished model: asked, merged, uploaded."""

import io
import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from conftest import FINISHED_RUN, ROOT

import main
from fllama import formats, options, tokenizing, use


@pytest.fixture
def samples(finished):
    """The questions that the finished run has shown, with the contexts in which they may have been asked."""
    shown = json.loads((finished[0] / "samples.json").read_text())
    rows = [json.loads(line) for line in Path(options.EMBEDDED_DATA, "validation.jsonl").read_text().splitlines()]
    for sample in shown:
        answered = (sample["question"], sample["accepted"])
        sample["contexts"] = [row["context"] for row in rows if (row["question"], row["answers"]["text"]) == answered]
    return shown


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


@pytest.fixture(scope="module")
def of_clients(small_inputs, tmp_path_factory):
    """The folder of a run whose clients have models of their own, of a base that is not the embedded one."""
    folder = tmp_path_factory.mktemp("of_clients")
    flags = "--world_size 1 --num_clients 2 --num_rounds 1 --local_steps 1 --aggregator none --quiet".split()
    main.main([*flags, *small_inputs, "--output_dir", str(folder)])
    return folder


def test_ask_names_the_models_of_clients(of_clients, capsys):
    with pytest.raises(SystemExit) as stop:
        main.main(["--ask", "Why?", "--output_dir", str(of_clients)])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and "client_models/client_0" in line
    main.main(["--ask", "Why?", "--output_dir", line.split("--output_dir ")[-1].strip()])
    assert capsys.readouterr().out


def test_a_base_that_does_not_fit_is_refused(of_clients, tmp_path, capsys):
    folder, other = of_clients / "client_models" / "client_1", tmp_path / "other"
    other.symlink_to(options.EMBEDDED_MODEL)
    with pytest.raises(SystemExit) as stop:
        main.main(["--ask", "Why?", "--output_dir", str(folder), "--model_name", str(other)])
    assert stop.value.code == 2 and "does not fit the adapter in" in capsys.readouterr().err


def test_a_question_that_the_template_refuses_gets_a_reason():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.EMBEDDED_MODEL)
    assert use.answer_question(None, tokenizer, " ", "a context") == "(question is empty)"


def test_merge(finished, tmp_path, capsys):
    """One model in bfloat16 that needs nothing else, and has the loss that was logged."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    shutil.copytree(finished[0], tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    main.main(["--merge", "--output_dir", str(tmp_path / "run")])
    with pytest.raises(SystemExit):
        main.main(["--merge", "--output_dir", str(tmp_path / "run")])
    assert "is there already; --overwrite writes over it" in capsys.readouterr().err
    folder = tmp_path / "run" / "merged_model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert model.dtype == torch.bfloat16 and "quantization_config" not in config
    model.float()
    loss, tokens = 0.0, 0
    for line in Path(options.EMBEDDED_DATA, "validation.jsonl").read_text().splitlines():
        row = json.loads(line)
        row = tokenizing.tokenize_row(row, formats.find_form(row), tokenizer, 1024)
        ids, labels = (torch.tensor([row[name]]) for name in ("input_ids", "labels"))
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, :-1]
        loss += torch.nn.functional.cross_entropy(logits, labels[0, 1:], reduction="sum").item()
        tokens += (labels != -100).sum().item()
    logged = json.loads((finished[0] / "global_eval_loss.json").read_text())[-1]
    assert loss / tokens == pytest.approx(logged, abs=3e-3)  # merged into the weights before rounding to NF4: 4.3e-3


def test_push_to_hub(hub, finished, tmp_path, monkeypatch, capsys):
    """A finished run is uploaded, to a private repository; without a token that may write nothing begins."""
    shutil.copytree(finished[0], tmp_path / "run")
    flags = [*FINISHED_RUN, "--output_dir", str(tmp_path / "run"), "--resume", "--push_to_hub", "org/new"]
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.address)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(SystemExit) as stop:
        main.main(flags)
    said = capsys.readouterr()
    assert stop.value.code == 2 and "a token that may write there" in said.err and len(said.err.splitlines()) == 1
    assert "hf_wrong" not in said.out + said.err and not hub.created and not hub.uploaded
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    main.main(flags)
    said = capsys.readouterr()
    assert "org/new" in said.out and "hf_secret" not in said.out + said.err
    assert hub.created == {"org/new": True}
    assert json.loads(hub.uploaded["org/new/adapter_config.json"])["base_model_name_or_path"] == "tiny-llama"
    assert all(str(ROOT).encode() not in content for content in hub.uploaded.values())
    for name in ("adapter_model.safetensors", "README.md", "tokenizer.json"):
        assert hub.uploaded[f"org/new/{name}"] == (tmp_path / "run" / "federated_global_model" / name).read_bytes()
