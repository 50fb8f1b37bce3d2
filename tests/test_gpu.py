"""What only a GPU can show: NCCL, bf16, the 4-bit kernels and the paged optimizer; skipped without one."""

import json

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
    (checkpoints / "round_00003").rename(checkpoints / "staging")
    process = run_main(*flags, "--output_dir", tmp_path / "out", "--resume")
    assert process.returncode == 0, process.stderr
    resumed = (tmp_path / "out" / "rounds.jsonl").read_text().splitlines()
    assert len(resumed) == len(whole)
    assert json.loads(resumed[-1])["eval_loss"] == pytest.approx(json.loads(whole[-1])["eval_loss"], rel=1e-2)
