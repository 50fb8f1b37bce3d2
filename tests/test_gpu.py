"""What only GPUs can show: NCCL, bf16 and fp16, kernels, paged state; `pytest -m gpu`, skipped without one.

Most of them run on pretended GPUs as well, see pretend_cuda.py.
"""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time

import datasets
import psutil
import pytest
import torch
from conftest import ROOT, make_trainer, run_main

from fllama import runlog

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
FLAGS = "--num_rounds 3 --local_steps 2 --eval_rounds 1 --save_rounds 1".split()
MOVING = "--num_clients 5 --clients_per_round 3 --seed 46".split()  # in round 3, a client moves to the other rank
PAGED = "--optim paged_adamw_32bit --lora_r 1024".split()  # bitsandbytes pages tensors of 100,000 elements or more


def needs(package):
    return pytest.mark.skipif(not importlib.util.find_spec(package), reason=f"needs {package}")


def run(folder, *flags, **environment):
    """Run main.py, which must succeed; returns what it said."""
    process = run_main(*FLAGS, *flags, "--output_dir", folder, **environment)
    assert process.returncode == 0, process.stderr
    return process.stdout + process.stderr


def check_it_learns(folder):
    losses = json.loads((folder / "global_eval_loss.json").read_text())
    assert losses[-1] < losses[0]


def check_resumed(folder, *flags, resumed_flags=()):
    """A run that goes on before its last round comes to about the same: sums on a GPU have no fixed order."""
    run(folder, *flags)
    whole = runlog.read_rounds(folder)
    shutil.rmtree(folder / "checkpoints" / "round_00003")
    for name in ("federated_global_model", "client_models"):
        shutil.rmtree(folder / name, ignore_errors=True)
    run(folder, *flags, *resumed_flags, "--resume")
    again = runlog.read_rounds(folder)
    assert len(again) == len(whole) == 3
    assert again[-1]["learning_rate"] == whole[-1]["learning_rate"]
    assert again[-1]["eval_loss"] == pytest.approx(whole[-1]["eval_loss"], rel=1e-2)


# -----------------------------------------------------------------------------
# one GPU


def test_one_rank_over_nccl(tmp_path):
    run(tmp_path, "--world_size", 1, *PAGED)
    assert json.loads((tmp_path / "config.json").read_text())["backend"] == "nccl"
    check_it_learns(tmp_path)


def test_ranks_share_a_gpu_over_gloo(tmp_path):
    size = torch.cuda.device_count() + 1
    assert "shared by the ranks, gloo" in run(tmp_path, "--world_size", size)
    check_it_learns(tmp_path)


@pytest.mark.parametrize(
    "flags",
    [
        "--aggregator median --scaffold --lora_r 64",
        "--aggregator svd --optim paged_adamw_8bit --lora_r 1024",
        "--aggregator krum --client_state reset --lora_r 64",
        "--lora_variant fedsa --prox_mu 0.1 --lora_r 64",
        "--optim paged_adamw_32bit --lora_r 1024",
        "--optim adamw_torch_fused",
        "--torch_dtype float16",
        "--torch_dtype float16 --optim adamw_torch_fused --lora_variant fedsa",
    ],
)
def test_one_rank_plays_five_clients(tmp_path, flags):
    """What the strategies, the clients' moments and the control variates do with tensors on the GPU; and resumed."""
    check_resumed(tmp_path, *flags.split(), "--world_size", 1, "--num_clients", 5)


@needs("flash_attn")
def test_packing_with_flash_attention(tmp_path):
    run(tmp_path, "--world_size", 1, "--packing", "--attn_implementation", "flash_attention_2")
    check_it_learns(tmp_path)


@needs("liger_kernel")
def test_liger(tmp_path):
    run(tmp_path, "--world_size", 1, "--use_liger_kernel")
    check_it_learns(tmp_path)


@needs("triton")
def test_compile(tmp_path):
    run(tmp_path, "--world_size", 1, "--torch_compile")
    check_it_learns(tmp_path)


def one_step(tmp_path, *flags):
    """Return the loss and the gradient of one training step of the embedded model on the GPU, all LoRA B's not zero."""
    rows = datasets.Dataset.from_list(
        [{"input_ids": list(range(5, 45)), "labels": [-100] * 20 + list(range(25, 45)), "length": 40}] * 2
    )
    _, trainer = make_trainer(tmp_path, *flags, rows=rows, device=torch.device("cuda", 0))
    generator = torch.Generator().manual_seed(1)
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.data.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    trainer.model_wrapped = trainer.accelerator.prepare(trainer.model)
    loss = trainer.training_step(trainer.model_wrapped, trainer.data_collator(list(rows)), torch.tensor(40))
    return loss.item(), torch.cat([parameter.grad.reshape(-1).cpu() for parameter in trained])


def check_same_step(step, other):
    assert step[0] == pytest.approx(other[0], rel=1e-2)
    assert step[1].norm() > 0 and (step[1] - other[1]).norm() <= 2e-2 * step[1].norm()  # bf16 has 8 bits


@pytest.fixture
def one_gpu(monkeypatch):
    """Of several GPUs, this process sees the first: Trainer would take all of them for nn.DataParallel."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


def test_gradients_with_and_without_checkpointing(one_gpu, tmp_path):
    without = one_step(tmp_path / "without", "--no-gradient_checkpointing")
    check_same_step(one_step(tmp_path / "with", "--gradient_checkpointing"), without)


@needs("triton")
def test_tritons_loss_is_the_tiled_one(one_gpu, tmp_path, monkeypatch):
    import trl.kernels.chunked_logprob

    with_triton = one_step(tmp_path / "triton")
    monkeypatch.setattr(trl.kernels.chunked_logprob, "_use_triton", lambda device: False)
    check_same_step(one_step(tmp_path / "tiled"), with_triton)


# -----------------------------------------------------------------------------
# two GPUs


@two_gpus
@pytest.mark.parametrize(
    "flags",
    [
        "--average_dtype int8 --scaffold --prox_mu 0.1",
        "--aggregator svd",
        "--lora_variant fedsa",
        "--optim paged_adamw_32bit --lora_r 1024",
        "--torch_dtype float16",
    ],
)
def test_two_ranks_over_nccl(tmp_path, flags):
    """Clients move from GPU to GPU; the run goes on with as many ranks."""
    check_resumed(tmp_path, *flags.split(), *MOVING, "--world_size", 2)
    assert json.loads((tmp_path / "config.json").read_text())["backend"] == "nccl"


@two_gpus
def test_resumed_on_other_ranks(tmp_path):
    check_resumed(tmp_path, *MOVING, "--world_size", 2, resumed_flags=["--world_size", 1])


@two_gpus
def test_killed_rank(tmp_path):
    """The other rank, which may wait for it on its GPU, ends at once, and the launcher with it."""
    command = [sys.executable, str(ROOT / "main.py"), *FLAGS, "--num_rounds", "500", "--world_size", "2"]
    process = subprocess.Popen(
        [*command, "--output_dir", str(tmp_path)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while not runlog.read_rounds(tmp_path):
        assert process.poll() is None
        time.sleep(0.1)
    children = psutil.Process(process.pid).children(recursive=True)
    ranks = [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    assert len(ranks) == 2
    ranks[1].kill()
    began = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and re.search(r"rank \d was ended by SIGKILL", errors), errors
    assert time.monotonic() - began < 30
    assert not psutil.wait_procs(children, timeout=15)[1]


@two_gpus
@pytest.mark.skipif("PRETEND_GPUS" in os.environ, reason="NCCL's own transport")
def test_gpus_talk_to_each_other(tmp_path):
    """Not through the host: NCCL says by which way it goes."""
    if not torch.cuda.can_device_access_peer(0, 1):
        pytest.skip("these GPUs cannot reach each other")
    assert "P2P" in run(tmp_path, "--world_size", 2, NCCL_DEBUG="INFO")
