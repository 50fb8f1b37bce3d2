"""main.py: bad input, what a run leaves behind, stop and resume, and the hub."""

import json
import os
import subprocess
import sys

import pytest
from conftest import FINISHED_RUN, ROOT, SMALL_RUN, assert_nowhere, run_main, write_rows

import main
from fllama import checkpoints, launch, options, runlog

# -----------------------------------------------------------------------------
# bad input: one line, exit code 2, before a model is loaded


def test_a_run_of_a_comparison_is_refused_before_the_first_begins(refused):
    column = ["--partition", "column", "--partition_column", "site"]  # 8 clients, as is known from the data alone
    assert "krum needs 9 clients" in refused("--compare", "fedavg, krum --num_malicious 3", *column)
    assert "--seed is the same for all runs" in refused("--compare", "fedavg --seed 1, fedavg --seed 2")


def test_bad_files(refused, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"id": 1, "words": "x"}] * 50)
    assert "context, question, answers (SQuAD)" in (line := refused("--dataset_path", rows))
    assert "needs the columns" in line and "--columns question=...,answer=..." in line
    assert line.endswith("found id, words")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "completion"')
    assert "cannot be read" in refused("--dataset_path", tmp_path / "broken.jsonl")
    (tmp_path / "rows.txt").write_text("a")
    assert "not a .json, .jsonl, .csv, .tsv, .parquet, .arrow file" in refused("--dataset_path", tmp_path / "rows.txt")
    (tmp_path / "empty").mkdir()
    assert "--dataset_path" in refused("--dataset_path", tmp_path / "empty")
    few = write_rows(tmp_path / "few.jsonl", [{"prompt": "a", "completion": "b"}] * 5)
    assert "5 training rows, 8 clients need 18; lower --num_clients" in refused("--dataset_path", few)
    text = write_rows(tmp_path / "text.jsonl", [{"messages": "[]"}] * 50)
    assert "50 of 50 train rows are bad: row 0 (messages is not a list of messages" in refused("--dataset_path", text)
    odd = write_rows(tmp_path / "odd.jsonl", [{"context": "a", "question": "b", "answers": 5}] * 50)
    assert "row 0 (an answer is not a text, or empty), row 1 (" in (line := refused("--dataset_path", odd))
    assert line.endswith("and 47 more")


def test_bad_rows(refused, tmp_path, capsys, monkeypatch):
    """Up to 1% are left out and counted, by their numbers; more are refused."""
    monkeypatch.setattr(launch, "run_to_the_end", lambda target, args, run: None)  # no rank is ever started
    good = {"context": "Rx: aspirin 30 mg.", "question": "How much aspirin?", "answers": {"text": ["30 mg"]}}
    rows = [good] * 200
    rows[7], rows[99] = good | {"question": " "}, good | {"answers": None}
    path = write_rows(tmp_path / "rows.jsonl", rows)
    main.main(["--dataset_path", str(path), "--output_dir", str(tmp_path / "out")])
    bad = "row 7 (question is empty), row 99 (answers has no list of texts)"
    assert f"2 of 200 train rows are bad and left out: {bad}\n" in capsys.readouterr().out
    parts = json.loads((tmp_path / "out" / "partition.json").read_text())
    dealt = sorted(row for part in parts["clients"] for row in part["rows"]) + parts["held_out"]
    assert sorted(dealt) == [row for row in range(200) if row not in (7, 99)]
    write_rows(path, rows[:199])
    assert f"2 of 199 train rows are bad: {bad}" in refused("--dataset_path", path, "--overwrite")


def test_bad_clients(refused, tmp_path):
    """A client without rows is named, by the value it stands for where it stands for one."""
    rows = [{"prompt": "a", "completion": "b", "ward": "north" if i else "south"} for i in range(50)]
    flags = ["--partition", "column", "--partition_column", "ward", "--dataset_path"]
    line = refused(*flags, write_rows(tmp_path / "rows.jsonl", rows))
    assert "client 1 (south) gets" in line and "and needs 2" in line
    lists = [{"prompt": "a", "completion": "b", "ward": ["x"] * (i % 3)} for i in range(50)]
    assert "row(s), and needs 2" not in refused(
        *flags, write_rows(tmp_path / "lists.jsonl", lists), "--model_name", "./nowhere"
    )


def test_bad_output_dir(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write to --output_dir" in refused("--output_dir", tmp_path / "file")
    assert "cannot write to --output_dir" in refused("--output_dir", "/proc/none")  # even root cannot
    with checkpoints.locked_output_dir(tmp_path / "busy"):
        assert "another run is writing" in refused("--output_dir", tmp_path / "busy")
    assert "holds no run" in refused("--output_dir", tmp_path / "new", "--resume")


def test_used_output_dir(refused, finished):
    folder, _ = finished
    files = sorted(folder.rglob("*"))
    assert "no such file" in refused("--overwrite", "--dataset_path", "./nowhere", "--output_dir", folder)
    assert sorted(folder.rglob("*")) == files  # a refused run removes nothing
    assert "--resume continues it, --overwrite removes it" in refused(*SMALL_RUN, "--output_dir", folder)
    assert "was started with num_rounds 4 (now 5)" in refused(
        *FINISHED_RUN, "--num_rounds", 5, "--resume", "--output_dir", folder
    )


# -----------------------------------------------------------------------------
# data that is odd, but right


def test_a_megabyte_and_all_alphabets(run_here, tmp_path, sample_rows):
    """One row of 110 is a million characters long: it is counted and left out; no rank trains on an empty answer."""
    rows = sorted(sample_rows, key=lambda row: len(row["context"]))[:100]
    for text in (
        "Ünïcödé",
        "日本語",
        "עברית",
        "\u202eمرحبا",
        "\U0001f9ea\u200d\U0001f52c",
        "a\u0301",
        "\u0000",
        "<|eot_id|>",
        "{{ x }}",
    ):
        rows.append({"id": text, "context": f"Rx: {text} 30 mg.", "question": text, "answers": {"text": [text]}})
    rows.append(
        {"id": "long", "context": "Rx: " + 10**6 * "x", "question": "How much?", "answers": {"text": ["30 mg"]}}
    )
    code, errors = run_here(f"--dataset_path {write_rows(tmp_path / 'odd.jsonl', rows)}")
    assert (code, errors) == (0, "")
    line = "1 of 110 train rows are longer than --max_length 1024 and were cut, 1 of them before the answer: those are"
    assert line in run_here.output
    parts = json.loads((tmp_path / "partition.json").read_text())
    assert max(max(part["rows"]) for part in parts["clients"]) <= 108 >= max(parts["held_out"])
    assert all(entry["train_loss"] > 0 for entry in runlog.read_rounds(tmp_path))


def test_fewer_rows_than_a_batch(run_here, tmp_path, sample_rows):
    """One client with one row to train on, one to hold out, and two of the global held-out set."""
    path = write_rows(tmp_path / "few.jsonl", sample_rows[:4])
    assert run_here(f"--num_clients 1 --per_device_train_batch_size 8 --dataset_path {path}") == (0, "")
    assert [entry["weights"] for entry in runlog.read_rounds(tmp_path)] == [[1]] * 4
    code, errors = run_here(f"--overwrite --num_clients 2 --dataset_path {path}")
    assert code == 2 and "4 training rows, 2 clients need 6; lower --num_clients" in errors


# -----------------------------------------------------------------------------
# the hub


REFUSALS = {  # model, token -> what is said
    ("org/gated", ""): "is gated: accept its licence",
    ("org/gated", "hf_other"): "is gated: accept its licence",
    ("org/tiny", "hf_wrong"): "the hub refuses the token",
    ("org/none", ""): "no such folder, nor model on the hub",
}


def test_refused_by_the_hub(hub, tmp_path):
    """One after the other in one program, whose hub is the fake one."""
    (tmp_path / "refusals.py").write_text(f"""
import os, sys, main
if __name__ == "__main__":
    for model, token in {list(REFUSALS)}:
        os.environ["HF_TOKEN"] = token
        try:
            main.main(["--model_name", model, "--output_dir", {str(tmp_path / "out")!r}])
        except SystemExit as stop:
            print(f"exit code {{stop.code}}\\n===", file=sys.stderr)
""")
    environment = os.environ | {"HF_ENDPOINT": hub[0], "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, tmp_path / "refusals.py"]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    *outputs, rest = process.stderr.split("===\n")
    assert rest == "" and len(outputs) == len(REFUSALS), process.stderr
    for (_, token), output in zip(REFUSALS, outputs):
        message, code = output.splitlines()
        assert REFUSALS[_, token] in message and code == "exit code 2"
    for token in ("hf_other", "hf_wrong"):
        (tmp_path / "refusals.py").unlink(missing_ok=True)
        assert_nowhere(token, process.stdout + process.stderr, tmp_path)


@pytest.mark.parametrize("flag", ["--model_name", pytest.param("--dataset_path", marks=pytest.mark.slow)])
def test_no_network(tmp_path, flag):
    (tmp_path / "sitecustomize.py").write_text("import time\ntime.sleep = lambda seconds: None")  # between its retries
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "PYTHONPATH": str(tmp_path)}
    process = run_main(flag, "org/tiny", "--output_dir", tmp_path / "out", **environment)
    assert process.returncode == 2 and "the hub cannot be reached; check the network" in process.stderr, process.stderr
    assert process.stdout == ""


def test_model_from_the_hub(hub, tmp_path):
    """Downloaded by its id with a token, trained, and saved with the id as its base, the token in no file."""
    flags = "--world_size 1 --num_rounds 1 --local_steps 1 --model_name org/tiny --hf_token hf_secret".split()
    process = run_main(*flags, "--output_dir", tmp_path / "out", HF_ENDPOINT=hub[0], HF_HOME=str(tmp_path / "home"))
    assert process.returncode == 0, process.stderr
    weights = [token for _, path, token in hub[1] if path.endswith("model.safetensors") and token]
    assert set(weights) == {"hf_secret"}
    config = json.loads((tmp_path / "out" / "federated_global_model" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/tiny"
    assert_nowhere("hf_secret", process.stdout + process.stderr, tmp_path / "out")


# -----------------------------------------------------------------------------
# what a run leaves behind


def test_files_of_a_run(finished):
    folder, process = finished
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints", "client_0_eval_loss.json", "client_0_train_loss.json", "client_1_eval_loss.json",
        "client_1_train_loss.json", "config.json", "federated_global_model", "global_eval_loss.json", "loss.png",
        "partition.json", "rounds.jsonl", "samples.json", "scores.json", "summary.json",
    ]  # fmt: skip
    rounds = runlog.read_rounds(folder)
    losses = {path.stem: json.loads(path.read_text()) for path in folder.glob("*_loss.json")}
    assert [entry["round"] for entry in rounds] == [1, 2, 3, 4]
    for number, entry in enumerate(rounds):
        assert entry["train_loss"] == pytest.approx(sum(losses[f"client_{k}_train_loss"][number] for k in (0, 1)) / 2)
        assert entry["learning_rate"] > 0 and entry["update_norm"] > 0 and entry["drift"] > 0
        assert set(entry["seconds"]) == {"local", "average", "eval", "save"}
        assert len(entry["digest"]) == 64 and entry["clients"] == [0, 1] and entry["weights"] == [1884, 1884]
        assert entry["bytes"] == 2 * 4 * 163_840 and 2 * 2 * 4 * 50 < entry["tokens"] < 2 * 2 * 4 * 150
    assert len({entry["digest"] for entry in rounds}) == 4
    evaluated = [entry["eval_loss"] for entry in rounds]
    assert evaluated[0] is evaluated[2] is None and losses["global_eval_loss"] == evaluated[1::2]
    assert len(losses["client_0_eval_loss"]) == len(losses["client_1_eval_loss"]) == 2
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["round_00003", "round_00004"]


def test_summary_and_config_of_a_run(finished):
    folder, process = finished
    rounds = runlog.read_rounds(folder)
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["rounds"] == 4 and summary["clients"] == 2 and summary["rows"] == [1884, 1884]
    assert summary["tokens"] == sum(entry["tokens"] for entry in rounds)
    assert summary["eval_loss"] == {"first": rounds[1]["eval_loss"], "last": rounds[3]["eval_loss"]}
    assert summary["eval_loss"]["last"] < summary["eval_loss"]["first"]
    assert all(0 <= summary[name][when] <= 100 for name in ("exact_match", "f1") for when in ("before", "after"))
    config = json.loads((folder / "config.json").read_text())
    assert config["world_size"] == 2 and config["backend"] == "gloo" and config["learning_rate"] == 1e-2
    assert config["versions"]["torch"].startswith("2.13.0") and "hf_token" not in config
    assert_nowhere("hf_secret", process.stdout + process.stderr, folder)


def test_terminal_of_a_run(finished):
    folder, process = finished
    assert "2, 1884 training rows each; 200 global held-out rows" in process.stdout
    assert "163,840 LoRA parameters, 0.7 MB per client and round, fedavg" in process.stdout
    assert sum(line.startswith("round ") for line in process.stdout.splitlines()) == 4
    assert f"--output_dir {folder} --ask" in process.stdout.splitlines()[-1]
    assert process.stderr == ""


FRESH = """
import sys, json, torch, bitsandbytes
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
folder, validation = sys.argv[1:]
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
name = json.load(open(f"{folder}/adapter_config.json"))["base_model_name_or_path"]
base = AutoModelForCausalLM.from_pretrained(name, quantization_config=config, dtype=torch.float32)
model = PeftModel.from_pretrained(base, folder).eval()
for module in model.modules():  # on some CPUs bitsandbytes would evaluate in bf16
    if isinstance(module, bitsandbytes.nn.Linear4bit):
        module.support_avx512bf16_for_cpu = False
tokenizer = AutoTokenizer.from_pretrained(folder)
loss = tokens = 0
import utils  # for the text of the instruction alone
for line in open(validation):
    row = json.loads(line)
    system = {"role": "system", "content": utils.INSTRUCTION + "\\n\\n" + row["context"]}
    text = tokenizer.apply_chat_template([system, {"role": "user", "content": row["question"]}], tokenize=False)
    text += "<|start_header_id|>assistant<|end_header_id|>\\n\\n"
    answer = tokenizer(" " + row["answers"]["text"][0] + "<|eot_id|>", add_special_tokens=False)["input_ids"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] + answer
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    loss -= logits.log_softmax(-1)[range(len(ids) - len(answer) - 1, len(ids) - 1), answer].sum().item()
    tokens += len(answer)
print(loss / tokens)
"""


def test_adapter_in_a_fresh_process_gives_the_logged_loss(finished):
    """One row at a time, by a plain forward pass and a softmax in float64."""
    folder, _ = finished
    command = [
        sys.executable,
        "-c",
        FRESH,
        folder / "federated_global_model",
        f"{options.EMBEDDED_DATA}/validation.jsonl",
    ]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    logged = json.loads((folder / "global_eval_loss.json").read_text())[-1]
    assert float(output.splitlines()[-1]) == pytest.approx(logged, abs=1e-4)


# -----------------------------------------------------------------------------
# stop and resume


def test_resume_of_a_finished_run_does_nothing(finished, capsys, monkeypatch):
    folder, _ = finished
    monkeypatch.setattr(launch, "launch", None)  # no rank is ever started
    before = (folder / "rounds.jsonl").read_bytes()
    main.main([*FINISHED_RUN, "--output_dir", str(folder), "--resume"])
    assert "nothing to do" in capsys.readouterr().out
    assert (folder / "rounds.jsonl").read_bytes() == before
