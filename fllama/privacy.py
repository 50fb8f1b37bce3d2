"""Differential privacy of rows: Poisson sampling, the gradient of each row by itself, its clip, and the noise.

DP-SGD, Abadi et al. 2016 (arXiv:1607.00133). What it costs is counted in fllama/accountant.py.
"""

from dataclasses import dataclass

import numpy as np
import torch

from fllama import checkpoints, options, runlog
from fllama.launch import EndRun
from fllama.model import compute_dtype
from fllama.noise import gaussian, secret_generator

# -----------------------------------------------------------------------------
# Poisson sampling: of rows, of clients


def draw_steps(args, guarantee, client, own):
    """Draw the rows of each local step of a turn: every row of the client independently, so that a step may have none.

    `own` are the numbers of its rows. Returns a list of lists. The draw has to be secret for the guarantee, so it comes
    from the operating system: it does not depend on --seed, and a run that is resumed draws anew and counts anew.
    """
    rng, rate = np.random.default_rng(), guarantee.sampling_rate[client]
    return [own[rng.random(len(own)) < rate].tolist() for _ in range(args.local_steps)]


def draw_clients(args, run, comm):
    """Draw the clients of every round for dp_fedavg, each independently; returns a list of lists, equal on all ranks.

    None where the draw is none: with other strategies, or if all clients take part. Rank 0 draws from the operating
    system, at each start of the run anew for all rounds that are still to come: a round that is played again is another
    draw, as the accountant assumes. Who played before is in rounds.jsonl.
    """
    if args.aggregator != "dp_fedavg" or args.clients_per_round == args.num_clients:
        return None
    drawn = None
    if comm.rank == 0:
        done, rng = checkpoints.round_of(run.checkpoint), np.random.default_rng()
        drawn = [entry["clients"] for entry in runlog.read_rounds(args.output_dir) if entry["round"] <= done]
        for _ in range(args.num_rounds - done):
            chances = rng.random(args.num_clients)
            drawn.append(np.flatnonzero(chances < run.guarantee.sampling_rate[0]).tolist())
    return comm.meet(drawn)[0]


def check_dtype(args, device):
    """End the run, before the model is loaded, on a GPU that computes in float16: its scale depends on the gradients.

    Raises launch.EndRun with exit code 2.
    """
    if options.private_by_row(args) and compute_dtype(args, device) == torch.float16:
        raise EndRun(2, "error: --dp_epsilon: this GPU has no bfloat16; give --torch_dtype float32")


# -----------------------------------------------------------------------------
# gradients of single rows


class RowGradients(torch.autograd.Function):
    """Passes the output of a linear layer on as it is; on the way back, notes the gradient of each row by its weight.

    The input is saved as autograd saves tensors, so that gradient checkpointing recomputes it as any other.
    """

    @staticmethod
    def forward(ctx, output, inputs, weight):
        ctx.save_for_backward(inputs)
        ctx.weight = weight
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient):
        (inputs,) = ctx.saved_tensors  # (rows, tokens, in), and gradient (rows, tokens, out)
        ctx.weight.row_gradients = torch.einsum("bto,bti->boi", gradient.float(), inputs.float())
        return gradient, None, None


def watch_rows(model):
    """Let every LoRA layer note the gradient of each row in its weight's `row_gradients` (rows, out, in)."""

    def note(layer, inputs, output):
        if output.requires_grad and layer.weight.requires_grad:
            return RowGradients.apply(output, inputs[0].detach(), layer.weight)
        return None

    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear) and ("lora_A." in name or "lora_B." in name):
            layer.register_forward_hook(note)


@dataclass
class PrivateSteps:
    """The local steps of a turn, and how they are made private."""

    batches: object  # iterator over the steps: a list of micro-batches each, perhaps empty
    clip_norm: float
    noise_multiplier: float
    expected_rows: float
    generator: object = None  # of the noise


def private_steps(args, guarantee, client, steps, sequences, trainer):
    """Return the PrivateSteps of a turn: `steps` are the row numbers of each, in `sequences`."""
    size = args.per_device_train_batch_size

    def read():
        for numbers in steps:
            rows = sequences.select(numbers).select_columns(["input_ids", "labels"]).to_list()
            yield [trainer.data_collator(rows[first : first + size]) for first in range(0, len(rows), size)]

    generator = secret_generator(trainer.args.device)
    return PrivateSteps(read(), guarantee.clip_norm, guarantee.noise_multiplier[client], guarantee.batch, generator)


def noisy_gradient(trainer, private):
    """Put the noisy mean of the clipped gradients of a step's rows into the gradient of each trained parameter.

    That is the sum of the rows' gradients, each clipped to `clip_norm` over all trained parameters together, plus
    Gaussian noise of `noise_multiplier` x `clip_norm` in each coordinate, divided by the expected number of rows. A
    row's loss is the mean over its own answer tokens, in nats, so that it depends on no other row. A gradient that is
    not finite counts as 0. Returns the mean loss of the step's rows, without noise; 0 without rows.
    """
    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    losses = []
    for batch in next(private.batches):
        losses += backward_by_row(trainer, batch).tolist()
        gradients = [parameter.row_gradients for parameter in parameters]
        factors = clip_factors(gradients, private.clip_norm)
        for parameter, total, gradient in zip(parameters, sums, gradients):
            total += torch.einsum("b,boi->oi", factors, gradient.nan_to_num(0, 0, 0))
            parameter.grad = parameter.row_gradients = None
    for parameter, total in zip(parameters, sums):
        if private.noise_multiplier:
            total += private.noise_multiplier * private.clip_norm * gaussian(total, private.generator)
        parameter.grad = total / private.expected_rows
    return sum(losses) / max(1, len(losses))


def backward_by_row(trainer, batch):
    """Pass a micro-batch forward and back; returns the loss of each row (rows,)."""
    trainer.model.train()
    batch = {name: value.to(trainer.args.device) for name, value in batch.items()}
    with trainer.compute_loss_context_manager():
        outputs = trainer.model_wrapped(**batch, use_cache=False, fused_lm_head=True)  # TRL's: log-probabilities
    tokens = outputs.label_mask.sum(dim=1).clamp(min=1)
    losses = -outputs.log_probs.float().sum(dim=1) / tokens
    losses.sum().backward()
    return losses.detach()


def clip_factors(gradients, clip_norm):
    """Return what scales each row (rows,) so that its gradient over all parameters is at most `clip_norm` long."""
    squares = sum(gradient.flatten(1).square().sum(dim=1) for gradient in gradients)
    factors = (clip_norm / squares.sqrt().clamp(min=1e-12)).clamp(max=1)
    return torch.where(squares.isfinite(), factors, 0)
