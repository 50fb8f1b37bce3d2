"""What the ranks of tests/test_rehearsal.py do: as on GPUs, which they pretend to have."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import pretend_cuda
import pretend_nccl
import torch


def pretending_rank(num_gpus, target, rank, args, run):
    """Run `target` as on a machine with so many GPUs; main.py has prepared the run on one without."""
    pretend_cuda.install(num_gpus)
    pretend_nccl.install()
    del os.environ["CUDA_VISIBLE_DEVICES"]  # which hides them from the tests
    target(rank, args, replace(run, num_gpus=num_gpus))
    Path(args.output_dir, f"counts_{rank}.json").write_text(json.dumps(pretend_cuda.COUNTS))


def count_waits():
    """Hand-counted: what makes the host wait for the device, and what does not. To be run in a process of its own."""
    pretend_cuda.install()
    counts, pinned = pretend_cuda.COUNTS, torch.empty(4, pin_memory=True)
    vector = torch.ones(4, device="cuda")
    pinned.copy_(vector, non_blocking=True)
    assert pinned.tolist() == [1] * 4 and counts["copies to host"] == 1 and counts["bytes to host"] == 16
    vector.copy_(pinned.mul_(2), non_blocking=True)
    tensors = list(vector.split(2))
    torch._foreach_mul_(tensors, 2)  # in one operator, through views
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.Event().record()
    assert counts["waits"] == 0
    assert vector.sum().item() == 16
    assert counts["waits"] == 1
    vector.cpu(), vector.tolist(), vector.copy_(torch.ones(4)), vector[vector > 0], torch.cuda.synchronize()
    assert counts["waits"] == 6 and counts["synchronize"] == 1
    assert all(place.startswith("rehearsal_workers.py:") for _, place in pretend_cuda.WAITS)
    assert torch.ones(4).pin_memory().is_pinned() and not torch.ones(4).is_pinned()


def faulty_rank(fault, flags, rank, args, run):
    """One run with one of the faults that the rehearsal is there for."""
    from workers import run_case

    FAULTS[fault]()
    run_case(f"{args.output_dir}/faulty", flags, rank, args, run)


def stay(tensor):
    """Let a tensor ignore on which device it is to be."""
    tensor.to = lambda *args, **named: tensor
    return tensor


def after(owner, name, change):
    """Call `change` with what each call of owner.name returns."""
    original = getattr(owner, name)

    def changed(*args, **named):
        result = original(*args, **named)
        change(result)
        return result

    setattr(owner, name, changed)


def waits_rank(rank, args, run):
    """A run that ends with an error if the host waits more than three times from local steps to the next ones.

    Before the averaging, after it, and in the thread that writes the digest.
    """
    import federated
    import main

    original, counts = federated.local_steps, []

    def local_steps(*given):
        counts.append(pretend_cuda.COUNTS["waits"])
        loss = original(*given)
        counts.append(pretend_cuda.COUNTS["waits"])
        return loss

    federated.local_steps = local_steps
    main.run_rank(rank, args, run)
    between = counts[4] - counts[3]  # of round 2; the first has checks of its own
    assert between <= 3, f"{between} waits"


# -----------------------------------------------------------------------------
# faults


def batch_on_host():
    import trl

    trl.SFTTrainer._prepare_inputs = lambda self, batch: batch


def scale_on_host():
    from fllama import collectives

    original = collectives.scales_of_stretch
    collectives.scales_of_stretch = lambda scales, first, length, device: original(scales, first, length, scales.device)


def weight_on_host():
    import federated

    def move_norm(trainer):
        norm = next(parameter for name, parameter in trainer.model.named_parameters() if name.endswith("norm.weight"))
        norm.data = norm.data.cpu()

    original = federated.build_optimizer  # which brings the whole model to the GPU

    def build_optimizer(args, trainer):
        learning_rate = original(args, trainer)
        move_norm(trainer)
        return learning_rate

    federated.build_optimizer = build_optimizer


def control_on_host():
    import federated

    def move_control(started):
        server, _ = started
        server.control = server.control.cpu()

    after(federated, "start_or_resume", move_control)


def residual_on_host():
    from fllama import collectives

    original = collectives.encode

    def encode(vector, dtype, residuals, name):
        for residual in residuals.values():
            stay(residual)
        return original(vector, dtype, residuals, name)

    collectives.encode = encode


def private_tensors_on_gpu():
    from fllama.clients import LocalClients

    def move_private(state):
        state.private = state.private.cuda()

    after(LocalClients, "snapshot", move_private)


def digest_of_gpu_tensor():
    from fllama import runlog

    runlog.digest = lambda vector: hashlib.sha256(vector.cuda().numpy()).hexdigest()


def all_gpus_visible():
    from fllama import launch

    def forget(result):
        del os.environ["CUDA_VISIBLE_DEVICES"]

    after(launch, "isolate_rank", forget)


def bf16_adapters():
    import federated

    def round_adapters(parameters):
        for parameter in parameters:
            parameter.data = parameter.data.bfloat16()

    after(federated, "lora_parameters", round_adapters)


FAULTS = {
    "a batch on the host": batch_on_host,
    "an int8 scale on the host": scale_on_host,
    "a weight on the host": weight_on_host,
    "a control variate on the host": control_on_host,
    "a residual on the host": residual_on_host,
    "private tensors on the GPU": private_tensors_on_gpu,
    "digest of a GPU tensor": digest_of_gpu_tensor,
    "all GPUs visible": all_gpus_visible,
    "bf16 adapters under fp16": bf16_adapters,
}
