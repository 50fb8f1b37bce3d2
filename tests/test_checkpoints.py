"""Checkpoints and the output folder: what is torn is noticed, passed over, or refused."""

import json
import re
import shutil

import pytest
from conftest import read_adapters
from runs import FLAGS, assert_same
from transformers import AutoConfig

import main
from fllama import basemodel, checkpoints, launch, prepare, runlog


@pytest.fixture
def copy(undisturbed, tmp_path):
    """A run to resume: of 4 rounds, but it has not published its model; checkpoints of rounds 3 and 4."""
    shutil.copytree(undisturbed(), tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "federated_global_model")
    return tmp_path


@pytest.fixture
def no_launch(monkeypatch):
    """No rank is ever started."""

    def start(target, args, run):
        raise AssertionError("ranks were started")

    monkeypatch.setattr(launch, "run_to_the_end", start)


def test_every_torn_file_is_noticed(copy):
    checkpoint = copy / "checkpoints" / "round_00004"
    assert checkpoints.find_fault(checkpoint) is None
    manifest = checkpoint / "manifest.json"
    paths = {path for path in checkpoint.iterdir() if path != manifest}
    assert {path.name for path in paths} == {"client_0.pt", "client_1.pt", "federation.pt"}
    for path in paths:
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
        assert checkpoints.find_fault(checkpoint) == f"{path.name} is torn"
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert checkpoints.find_fault(checkpoint) == f"{path.name} is damaged"
        path.unlink()
        assert checkpoints.find_fault(checkpoint) == f"{path.name} is missing"
        path.write_bytes(content)
    content = manifest.read_text()
    for text in ("", content[:100], "[]", "{}"):
        manifest.write_text(text)
        assert checkpoints.find_fault(checkpoint) == "manifest.json is torn"
    manifest.write_text(content.replace('"round": 4', '"round": 5'))
    assert checkpoints.find_fault(checkpoint) == "manifest.json is of round 5"
    manifest.unlink()
    assert checkpoints.find_fault(checkpoint) == "manifest.json is missing"
    manifest.write_text(content)
    assert checkpoints.find_newest(copy) == checkpoint


def test_resume_passes_over_what_is_torn(copy, run_here, undisturbed):
    """Of the newest checkpoint one file, of the loss lists all, of rounds.jsonl the line after the last checkpoint.

    The lists are written anew from rounds.jsonl. Then no checkpoint is whole.
    """
    (copy / "checkpoints" / "round_00004" / "client_1.pt").write_bytes(b"")
    lists = sorted(copy.glob("*_loss.json"))
    assert len(lists) == 5
    for path, text in zip(lists, ("", "[", "[1.5, 2", "null", "[1.5, 2.5]"), strict=True):
        path.write_text(text)
    log = copy / "rounds.jsonl"
    log.write_text(log.read_text()[:-100])
    (copy / "checkpoints" / "staging_00004").mkdir()
    (copy / "checkpoints" / "staging_00004" / "client_0.pt").write_bytes(b"")
    assert run_here("--resume") == (0, "")
    assert "passing over checkpoints/round_00004: client_1.pt is torn" in run_here.output
    assert "resuming after round 3 of 4" in run_here.output
    assert_same(copy, undisturbed())
    (torn,) = (copy / "checkpoints").glob("torn_*")
    assert re.fullmatch(r"torn_round_00004_\d+", torn.name) and (torn / "client_0.pt").exists()

    shutil.rmtree(copy / "federated_global_model")
    for path in (copy / "checkpoints").glob("round_*/manifest.json"):
        path.unlink()
    code, errors = run_here("--resume")  # which would begin at the beginning
    assert code == 2 and "no checkpoint in" in errors and "is whole" in errors
    assert len(list((copy / "checkpoints").glob("torn_round_00004_*"))) == 1
    assert len(runlog.read_rounds(copy)) == 4


def test_logs_that_are_gone_end_no_run(copy, run_here):
    """After the last round there is nothing left to log: the figure and the summary do with what there is."""
    for path in [*copy.glob("*_loss.json"), copy / "rounds.jsonl"]:
        path.write_text("")
    assert run_here("--resume") == (0, "")
    summary = json.loads((copy / "summary.json").read_text())
    assert summary["eval_loss"] == {"first": None, "last": None} and summary["exact_match"]["after"] >= 0
    assert read_adapters(copy).norm() > 0


def test_torn_config_and_changed_data_are_refused(copy, run_here, no_launch, tmp_path_factory, small_inputs):
    other = tmp_path_factory.mktemp("other") / "rows.jsonl"
    with open(small_inputs[3]) as file:
        lines = file.read().splitlines()
    other.write_text("\n".join([*lines[1:], lines[0]]) + "\n")
    kept = shutil.copy(small_inputs[3], other.parent / "kept")
    try:
        shutil.copy(other, small_inputs[3])  # under the same name
        code, errors = run_here("--resume")
    finally:
        shutil.copy(kept, small_inputs[3])
    assert code == 2 and "was started with other rows or another tokenizer" in errors
    (copy / "config.json").write_text("{")
    code, errors = run_here("--resume")
    assert code == 2 and "the flags of the run, cannot be read" in errors
    (copy / "config.json").unlink()
    code, errors = run_here()  # which would remove the checkpoints
    assert code == 2 and "already holds a run" in errors


def test_no_room_is_noticed_before_a_model_is_loaded(run_here, no_launch, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 10**5, 10**5))
    code, errors = run_here()
    assert code == 2 and "0.00 GB free, and the run needs" in errors


def test_a_checkpoint_is_as_large_as_foretold(undisturbed, small_inputs):
    """Within a third."""
    size = sum(path.stat().st_size for path in undisturbed().glob("checkpoints/round_00004/*"))
    args = main.parse_args(FLAGS)
    parameters = basemodel.count_lora_parameters(AutoConfig.from_pretrained(small_inputs[1]), args.lora_r)
    assert parameters == read_adapters(undisturbed()).numel()
    assert size / 1.5 < prepare.checkpoint_bytes(args, parameters) < size * 1.5
