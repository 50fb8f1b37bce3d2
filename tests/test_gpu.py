"""What only a GPU can show: NCCL, bf16, the 4-bit kernels and the paged optimizer; skipped without one."""

import json
import shutil

import pytest
import torch
from conftest import run_main

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
FLAGS = "--num_rounds 3 --local_steps 2 --eval_rounds 1".split()


def test_one_rank_over_nccl(tmp_path):
    flags = [*FLAGS, "--world_size", 1, "--lora_r", 512]  # bitsandbytes pages no tensor below 100,000 elements
    process = run_main(*flags, "--output_dir", tmp_path / "out")
    assert process.returncode == 0, process.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["backend"] == "nccl" and config["optim"] == "paged_adamw_32bit"
    losses = json.loads((tmp_path / "out" / "global_eval_loss.json").read_text())
    assert losses[-1] < losses[0]


def test_ranks_share_a_gpu_over_gloo(tmp_path):
    size = torch.cuda.device_count() + 1
    process = run_main(*FLAGS, "--world_size", size, "--output_dir", tmp_path / "out")
    assert process.returncode == 0, process.stderr
    assert "shared by the ranks, gloo" in process.stdout
    losses = json.loads((tmp_path / "out" / "global_eval_loss.json").read_text())
    assert losses[-1] < losses[0]


def test_stop_and_resume(tmp_path):
    flags = [*FLAGS, "--world_size", 1, "--save_rounds", 1]
    assert run_main(*flags, "--output_dir", tmp_path / "out").returncode == 0
    whole = (tmp_path / "out" / "rounds.jsonl").read_text().splitlines()
    checkpoints = tmp_path / "out" / "checkpoints"
    for path in (checkpoints / "round_00003").rglob("*"):
        if path.is_file():
            path.unlink()
    (checkpoints / "round_00003").rename(checkpoints / "staging_00003")
    process = run_main(*flags, "--output_dir", tmp_path / "out", "--resume")
    assert process.returncode == 0, process.stderr
    resumed = (tmp_path / "out" / "rounds.jsonl").read_text().splitlines()
    assert len(resumed) == len(whole)
    assert json.loads(resumed[-1])["eval_loss"] == pytest.approx(json.loads(whole[-1])["eval_loss"], rel=1e-2)


@pytest.mark.parametrize(
    "flags",
    [
        "--aggregator median --scaffold",
        "--aggregator svd --optim paged_adamw_8bit",
        "--aggregator krum --client_state reset",
        "--lora_variant fedsa --prox_mu 0.1",
    ],
)
def test_one_rank_plays_five_clients(tmp_path, flags):
    """What the strategies, the clients' moments and the control variates do with tensors on the GPU; and resumed."""
    flags = [*FLAGS, *flags.split(), "--world_size", 1, "--num_clients", 5, "--save_rounds", 1, "--lora_r", 64]
    process = run_main(*flags, "--output_dir", tmp_path / "out")
    assert process.returncode == 0, process.stderr
    whole = [json.loads(line) for line in (tmp_path / "out" / "rounds.jsonl").read_text().splitlines()]
    shutil.rmtree(tmp_path / "out" / "checkpoints" / "round_00003")
    for name in ("federated_global_model", "client_models"):
        shutil.rmtree(tmp_path / "out" / name, ignore_errors=True)
    process = run_main(*flags, "--output_dir", tmp_path / "out", "--resume")
    assert process.returncode == 0, process.stderr
    again = [json.loads(line) for line in (tmp_path / "out" / "rounds.jsonl").read_text().splitlines()]
    assert len(again) == 3 and again[-1]["eval_loss"] == pytest.approx(whole[-1]["eval_loss"], rel=1e-2)
