"""main.py on GPUs that are not there, see pretend_cuda.py: every tensor where it belongs, resumed to the same bits."""

import functools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys

import pretend_cuda
import pytest
from conftest import ROOT, run_main
from machines import machines, why_not
from rehearsal_workers import FAULTS, count_waits, faulty_rank, pretending_rank, waits_rank
from runs import assert_same_rounds
from test_machines import end
from workers import resume_rank

import main
import utils
from fllama import runlog

pytestmark = pytest.mark.skipif(bool(pretend_cuda.why_not()), reason=pretend_cuda.why_not())
FLAGS = (
    "--local_steps 1 --per_device_train_batch_size 1 --eval_rounds 1 --save_rounds 1 --gradient_checkpointing".split()
)
FLAGS += "--num_clients 5 --clients_per_round 3 --num_rounds 3 --seed 46 --timeout 5".split()
PAGED = "--lora_r 1024"  # bitsandbytes pages tensors of 100,000 elements or more


@pytest.fixture
def rehearse(small_inputs, tmp_path, capsys):
    """A function that calls a target on ranks with pretended GPUs; returns (exit code, what main said on stderr)."""

    def run(num_gpus, world_size, target):
        flags = [*small_inputs, *FLAGS, "--world_size", str(world_size), "--output_dir", str(tmp_path)]
        code = 0
        try:
            main.main(flags, target=functools.partial(pretending_rank, num_gpus, target))
        except SystemExit as error:
            code = error.code
        return code, capsys.readouterr().err

    return run


def check_resumed(folder, name):
    """A case of resume_rank has come to the same bits undisturbed, resumed before its last round, and after it."""
    rounds = runlog.read_rounds(folder / name)
    assert len({entry["digest"] for entry in rounds}) == len(rounds) == 3
    assert_same_rounds(folder / f"{name}_half", folder / name)
    assert_same_rounds(folder / f"{name}_end", folder / name)


def forget_the_end(folder):
    """Bring a finished run back to before its last round."""
    shutil.rmtree(folder / "checkpoints" / "round_00003")
    shutil.rmtree(folder / "federated_global_model")


# -----------------------------------------------------------------------------
# the ranks alone, as on GPUs


def test_two_gpus(rehearse, small_inputs, tmp_path):
    """The fast one: over NCCL, in int8, with models of their own, and a client that moves."""
    for world_size in (2, 3):
        assert utils.plan_rounds(5, 3, 3, world_size, seed=46)[2].moves
    more = "--world_size 2 --lora_variant fedsa --average_dtype int8 --prox_mu 0.1 --optim adamw_torch".split()
    code, errors = rehearse(2, 2, functools.partial(resume_rank, [*small_inputs, *FLAGS, *more], {"case": ""}))
    assert code == 0, errors
    check_resumed(tmp_path, "case")


def test_counters():
    process = multiprocessing.get_context("forkserver").Process(target=count_waits)
    process.start()
    process.join(60)
    assert process.exitcode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_gpus", "more"),
    [
        (1, f"--aggregator svd --torch_dtype float16 --optim paged_adamw_8bit {PAGED}"),
        (2, f"--scaffold --prox_mu 0.1 --average_dtype int8 --optim paged_adamw_32bit {PAGED}"),
        (2, "--optim adamw_torch_fused"),
        (3, "--aggregator median --lora_variant rolora --optim sgd"),
    ],
)
def test_resume(rehearse, small_inputs, tmp_path, num_gpus, more):
    flags = [*small_inputs, *FLAGS, "--world_size", str(num_gpus), *more.split()]
    code, errors = rehearse(num_gpus, num_gpus, functools.partial(resume_rank, flags, {"case": ""}))
    assert code == 0, errors
    check_resumed(tmp_path, "case")
    for rank in range(num_gpus):
        counts = json.loads((tmp_path / f"counts_{rank}.json").read_text())
        assert counts["operators"] > 0 and ("paged" in counts) == ("paged" in more)


@pytest.mark.slow
def test_waits_of_a_round(small_inputs, tmp_path):
    flags = "--world_size 1 --num_clients 1 --num_rounds 3 --local_steps 1 --eval_rounds 3 --save_rounds 3".split()
    flags = [*small_inputs, *flags, "--optim", "adamw_torch_fused", "--output_dir", str(tmp_path)]
    main.main([str(flag) for flag in flags], target=functools.partial(pretending_rank, 1, waits_rank))


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault(rehearse, small_inputs, fault):
    """That a rehearsal sees each of them."""
    more, sign = "--optim adamw_torch", "at least two devices"
    if fault in ("an int8 scale on the host", "a residual on the host"):
        more += " --average_dtype int8"
    elif fault == "a control variate on the host":
        more, sign = f"{more} --scaffold", "No backend type associated with device type cpu"
    elif fault == "private tensors on the GPU":
        more, sign = f"{more} --lora_variant fedsa", "a message with a tensor on the GPU"
    elif fault == "digest of a GPU tensor":
        sign = "can't convert cuda:0 device type tensor to numpy"
    elif fault == "all GPUs visible":
        sign = "Duplicate GPU detected"
    elif fault == "bf16 adapters under fp16":
        more, sign = f"{more} --torch_dtype float16", "not implemented for 'BFloat16'"
    flags = [*small_inputs, *FLAGS, "--world_size", "2", *more.split()]
    code, errors = rehearse(2, 2, functools.partial(faulty_rank, fault, flags))
    assert code == 1 and sign in errors


# -----------------------------------------------------------------------------
# whole programs


def give_gpus(patch, number):
    """Give so many pretended GPUs to the processes that are started from now on."""
    patch.setenv("PRETEND_GPUS", str(number))
    patch.setenv("PYTHONPATH", str(ROOT / "tests" / "pretend"))
    patch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.fixture(scope="module")
def three_ranks(small_inputs, tmp_path_factory):
    """The folder and the output of main.py with three ranks on two GPUs, which share them over gloo."""
    folder = tmp_path_factory.mktemp("three")
    with pytest.MonkeyPatch.context() as patch:
        give_gpus(patch, 2)
        flags = [*small_inputs, *FLAGS, "--world_size", 3, "--aggregator", "median", "--output_dir", folder]
        process = run_main(*flags)
    assert process.returncode == 0, process.stderr
    return folder, process.stdout, flags


@pytest.mark.slow
def test_three_ranks_share_two_gpus(three_ranks, monkeypatch, tmp_path):
    """The program as it is called, its ranks spawned."""
    folder, output, flags = three_ranks
    assert "2 x Pretended GPU" in output and "shared by the ranks, gloo" in output
    shutil.copytree(folder, tmp_path / "copy")
    forget_the_end(tmp_path / "copy")
    give_gpus(monkeypatch, 2)
    process = run_main(*flags[:-1], tmp_path / "copy", "--resume")
    assert process.returncode == 0, process.stderr
    assert_same_rounds(tmp_path / "copy", folder)


@pytest.mark.slow
@pytest.mark.skipif(bool(why_not()), reason=why_not())
def test_two_machines(small_inputs, monkeypatch, tmp_path):
    """Under torchrun, a rank and a GPU on each; resumed."""
    give_gpus(monkeypatch, 1)
    found = []
    with machines(2) as both:
        for _ in range(2):
            flags = [*small_inputs, *FLAGS, "--average_dtype", "int8", "--output_dir", tmp_path]
            output = end([both.torchrun(i, *flags) for i in (0, 1)])[0]
            assert "nccl, 2 rank(s) on 2 machines" in output
            found.append([entry["digest"] for entry in runlog.read_rounds(tmp_path)])
            forget_the_end(tmp_path)
    assert "resuming after round 2 of 3" in output
    assert found[0] == found[1] and len(found[0]) == 3


@pytest.mark.slow
def test_what_runs_without_ranks(three_ranks, monkeypatch):
    """--dry_run, --ask and --merge, in one process; the model and its merged weights answer alike."""
    give_gpus(monkeypatch, 1)
    folder, _, flags = three_ranks
    script = f"""
import main
flags = {[str(flag) for flag in flags]}
main.main([*flags, "--overwrite", "--dry_run"])
for more in (["--ask", "Where?", "--context", "In Rome."], ["--merge"]):
    main.main([*flags[:2], "--output_dir", {str(folder)!r}, "--max_new_tokens", "4", *more])
"""
    process = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    assert "merged into" in process.stdout and (folder / "merged_model" / "model.safetensors").exists()


@pytest.mark.slow
def test_compare(small_inputs, monkeypatch, tmp_path):
    give_gpus(monkeypatch, 1)
    flags = [*small_inputs, *FLAGS, "--num_rounds", 1, "--world_size", 1, "--compare", "fedavg,local"]
    process = run_main(*flags, "--output_dir", tmp_path / "out")
    assert process.returncode == 0, process.stderr
    assert "fedavg" in process.stdout and "local" in process.stdout


@pytest.mark.slow
def test_tests_hide_gpus():
    """`python -m pytest` on a machine with GPUs: its processes see none."""
    environment = os.environ | {"PRETEND_GPUS": "2", "PYTHONPATH": str(ROOT / "tests" / "pretend")}
    environment.pop("CUDA_VISIBLE_DEVICES")
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_options.py", "tests/test_estimate.py"]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    assert process.returncode == 0, process.stdout
