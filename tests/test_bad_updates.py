"""Updates that would spoil the average: NaN, or a thousand times too long."""

import functools
import json
import re

import psutil
import pytest
import torch
from conftest import read_adapters
from runs import FLAGS, assert_gone, in_order_of_the_model, start_script, wait_for_round
from safetensors.torch import load_file
from workers import poisoned_rank

import main
from fllama import report, runlog

NAN = float("nan")


@pytest.mark.parametrize(
    ("poison", "more"),
    [
        (1e6, "--scaffold"),
        pytest.param(NAN, "", marks=pytest.mark.slow),
        pytest.param(NAN, "--lora_variant fedsa", marks=pytest.mark.slow),
        pytest.param(1e6, "--aggregator krum", marks=pytest.mark.slow),
        pytest.param(NAN, "--aggregator geometric_median", marks=pytest.mark.slow),
        pytest.param(NAN, "--average_dtype int8", marks=pytest.mark.slow),
    ],
)
def test_a_bad_update_is_left_out_on_any_layout(run_here, tmp_path, poison, more):
    """Client 1 of 5; it takes part again in the next round."""
    adapters, digests = [], []
    for size in (1, 5):
        flags = f"{more} --num_clients 5 --world_size {size} --overwrite"
        assert run_here(flags, functools.partial(poisoned_rank, poison, [1])) == (0, "")
        rounds = runlog.read_rounds(tmp_path)
        assert [entry["rejected"] for entry in rounds] == [[], [1], [], []]
        assert all(entry["clients"] == [0, 1, 2, 3, 4] for entry in rounds)
        assert rounds[1]["client_drift"][1] is None and None not in rounds[2]["client_drift"]
        assert json.loads((tmp_path / "summary.json").read_text())["rejected"] == 1
        adapters.append(read_adapters(tmp_path))
        digests.append([entry["digest"] for entry in rounds])
    assert adapters[0].isfinite().all() and torch.equal(adapters[0], adapters[1]) and digests[0] == digests[1]


@pytest.mark.slow
def test_a_client_that_is_left_out_is_named(small_inputs, tmp_path):
    process = start_script(tmp_path, [*FLAGS, *small_inputs], "workers.poisoned_rank, 1e9, [0]")
    wait_for_round(tmp_path / "out", 1, process)
    processes = psutil.Process(process.pid).children(recursive=True)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert_gone(processes)
    line = r"  client 0 is left out of round 2: its update is [\d,]{7,} times as long as the median\n"
    assert len(re.findall(line, output)) == 1 and output.count("left out") == 1


def test_bad_updates_of_the_first_round(run_here, tmp_path):
    """Two adapters full of NaN have the same bits: no reason for the self-check to end the run."""
    target = functools.partial(poisoned_rank, NAN, [1, 2], bad_round=1)
    assert run_here("--num_clients 5", target) == (0, "")
    assert [entry["rejected"] for entry in runlog.read_rounds(tmp_path)] == [[1, 2], [], [], []]


def test_a_model_of_its_own_goes_back_to_before_the_turn(run_here, tmp_path):
    flags = "--aggregator none --num_rounds 2"
    assert run_here(flags, functools.partial(poisoned_rank, NAN, [1])) == (0, "")
    saved = torch.load(tmp_path / "checkpoints" / "round_00001" / "client_1.pt")["private"]
    after = load_file(tmp_path / "client_models" / "client_1" / "adapter_model.safetensors")
    assert torch.equal(saved, in_order_of_the_model(after))
    assert any(tensor.norm() > 0 for name, tensor in after.items() if "lora_B" in name)


def test_on_bad_update_fail(run_here, tmp_path):
    target = functools.partial(poisoned_rank, NAN, [1])
    code, errors = run_here("--on_bad_update fail --restarts 3", target)
    assert code == 3 and errors == (
        "main.py: round 2: the update of client 1 is not finite; lower --learning_rate\n"
    )  # no restart: it would come to the same
    assert [path.name for path in (tmp_path / "checkpoints").glob("round_*")] == ["round_00001"]


def test_all_updates_are_bad(run_here, tmp_path):
    """The run ends with the model of the round before."""
    code, errors = run_here(target=functools.partial(poisoned_rank, NAN, [0, 1]))
    assert code == 3 and errors == (
        "main.py: round 2: the update of every client is not finite; lower --learning_rate. "
        "What round 1 has come to is in federated_global_model\n"
    )
    (first,) = runlog.read_rounds(tmp_path)
    saved = load_file(tmp_path / "federated_global_model" / "adapter_model.safetensors")
    kept = torch.load(tmp_path / "checkpoints" / "round_00001" / "federation.pt")["lora"]
    assert first["round"] == 1 and torch.equal(in_order_of_the_model(saved), kept)
    assert report.round_line(main.parse_args(FLAGS), first)
