"""main.py on GPUs that are not there (pretend_cuda.py): every tensor on the right device, and resumed to the same bits."""

import functools

import pretend_cuda
import pytest
from rehearsal_workers import FAULTS, faulty_rank, pretending_rank
from runs import assert_same_rounds
from workers import resume_rank

import main
from fllama import runlog

pytestmark = pytest.mark.skipif(bool(pretend_cuda.why_not()), reason=pretend_cuda.why_not())
FLAGS = (
    "--local_steps 1 --per_device_train_batch_size 1 --eval_rounds 1 --save_rounds 1 --gradient_checkpointing".split()
)
MOVING = "--num_clients 5 --clients_per_round 3 --num_rounds 3 --timeout 1".split()  # clients change ranks


@pytest.fixture
def rehearse(small_inputs, tmp_path, capsys):
    """A function that calls a target on ranks with pretended GPUs; returns (exit code, what main said on stderr)."""

    def run(num_gpus, world_size, target):
        flags = [*small_inputs, *FLAGS, *MOVING, "--world_size", str(world_size), "--output_dir", str(tmp_path)]
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


def test_two_gpus(rehearse, small_inputs, tmp_path):
    """The fast one of them: clients that move, over NCCL, in int8, with models of their own."""
    more = "--world_size 2 --lora_variant fedsa --average_dtype int8 --prox_mu 0.1 --optim adamw_torch".split()
    flags = [*small_inputs, *FLAGS, *MOVING, *more]
    code, errors = rehearse(2, 2, functools.partial(resume_rank, flags, {"case": ""}))
    assert code == 0, errors
    check_resumed(tmp_path, "case")


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
    flags = [*small_inputs, *FLAGS, *MOVING, "--world_size", "2", *more.split()]
    code, errors = rehearse(2, 2, functools.partial(faulty_rank, fault, flags))
    assert code == 1 and sign in errors
