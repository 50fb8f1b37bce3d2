"""What people change: the averaging ("EDIT HERE"), the prompt of SQuAD rows, who gets which rows, who plays when.

Rows are dealt out by fllama/prepare.py, which also calls the splits here; other forms of rows are in fllama/formats.py.
"""

import functools
import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jinja2 import TemplateError

from fllama import flexlora, noise
from fllama.collectives import Clients, Communicator, Update

# -----------------------------------------------------------------------------
# averaging: EDIT HERE
#
# A strategy is a function (clients, state) -> update, named in AGGREGATORS; run it with --aggregator NAME.
#   clients  of this round; each has a `number`, a `weight` (rows that it trains on) and an `update`, float32 (P,): how
#            far its shared LoRA parameters moved since the round began
#   state    a dict that lives as long as the run and is saved with it: momentum and the like
#   update   float32 (P,): how far the shared model moves
#
# It is called once a round, on every rank, and has to return the same vector on each. That comes by itself if it sees
# the clients only through these methods, in which all ranks participate:
#   clients.sum(terms)     sums over all clients of what terms(client) returns: a tensor, a number, or a tuple of these
#   clients.shards()       (values (clients, C), weights (clients,)): C of the P coordinates, of every client
#   clients.join(values)   (P,), from the C coordinates of every rank
# Strategies that look into the vectors have more: `start`, `shapes`, `own_stretch`, `sum_over_ranks`, and `sizes` of
# shards and join (see fllama/collectives.py). Further arguments are flags of main.py by the same name (--server_lr);
# their defaults are the strategy's own.


def fedavg(clients, state):
    """Mean of the updates, weighted by rows. FedAvg, McMahan et al. 2017 (arXiv:1602.05629)."""
    total, weight = clients.sum(lambda client: (client.weight * client.update, client.weight))
    return total / weight


def fedavgm(clients, state, server_lr=1.0, server_momentum=0.9):
    """FedAvg with momentum on the server. FedAvgM, Hsu et al. 2019 (arXiv:1909.06335)."""
    state["momentum"] = fedavg(clients, state) + server_momentum * state.get("momentum", 0)
    return server_lr * state["momentum"]


def diloco(clients, state, server_lr=0.7, server_momentum=0.9):
    """Nesterov momentum as the outer optimizer. DiLoCo, Douillard et al. 2023 (arXiv:2311.08105)."""
    average = fedavg(clients, state)
    state["momentum"] = average + server_momentum * state.get("momentum", 0)
    return server_lr * (average + server_momentum * state["momentum"])


def fedadagrad(clients, state, server_lr=3e-2, server_momentum=0.0, server_tau=1e-3):
    """Adagrad on the server. FedAdagrad, Reddi et al. 2021 (arXiv:2003.00295)."""
    average = fedavg(clients, state)
    state["second"] = state.get("second", server_tau**2) + average**2
    return adaptive_step(average, state, server_lr, server_momentum, server_tau)


def fedadam(clients, state, server_lr=3e-3, server_momentum=0.9, server_beta2=0.99, server_tau=1e-3):
    """Adam on the server, without bias correction. FedAdam, Reddi et al. 2021 (arXiv:2003.00295)."""
    average = fedavg(clients, state)
    state["second"] = server_beta2 * state.get("second", server_tau**2) + (1 - server_beta2) * average**2
    return adaptive_step(average, state, server_lr, server_momentum, server_tau)


def fedyogi(clients, state, server_lr=3e-3, server_momentum=0.9, server_beta2=0.99, server_tau=1e-3):
    """Yogi on the server. FedYogi, Reddi et al. 2021 (arXiv:2003.00295)."""
    average = fedavg(clients, state)
    second = state.get("second", torch.full_like(average, server_tau**2))
    state["second"] = second - (1 - server_beta2) * average**2 * torch.sign(second - average**2)
    return adaptive_step(average, state, server_lr, server_momentum, server_tau)


def adaptive_step(average, state, server_lr, server_momentum, server_tau):
    state["first"] = server_momentum * state.get("first", 0) + (1 - server_momentum) * average
    return server_lr * state["first"] / (state["second"].sqrt() + server_tau)


def norm_clip(clients, state, clip_norm=1.0):
    """FedAvg of updates that are scaled down to a norm of at most `clip_norm`. Sun et al. 2019 (arXiv:1911.07963)."""

    def clipped(client):
        norm = torch.linalg.vector_norm(client.update).item()
        update = client.update * min(1.0, clip_norm / max(norm, 1e-12))
        return client.weight * update, client.weight

    total, weight = clients.sum(clipped)
    return total / weight


def geometric_median(clients, state, weiszfeld_iterations=3, weiszfeld_smoothing=1e-6):
    """The point with the least weighted sum of distances to the updates: RFA, robust to a minority of bad clients.

    Smoothed Weiszfeld algorithm, Pillutla et al. 2022 (arXiv:1912.13445): from the mean, `weiszfeld_iterations` times a
    mean in which clients weigh the less, the farther they are from the last one. Each is a sum of its own.
    """
    center = fedavg(clients, state)
    for _ in range(weiszfeld_iterations):

        def reweighted(client):
            distance = torch.linalg.vector_norm(client.update - center).item()
            weight = client.weight / max(distance, weiszfeld_smoothing)
            return weight * client.update, weight

        total, weight = clients.sum(reweighted)
        center = total / weight
    return center


def median(clients, state):
    """Median of each coordinate, unweighted. Yin et al. 2018 (arXiv:1803.01498)."""

    def middle(ordered):
        n = len(ordered)
        return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2

    medians = by_coordinate(middle, clients.shards()[0])  # then the shards are freed
    return clients.join(medians)


def trimmed_mean(clients, state, trim_fraction=0.2):
    """Mean of each coordinate, unweighted, without the highest and the lowest. Yin et al. 2018 (arXiv:1803.01498).

    Of n clients, int(trim_fraction * n) are cut at either end.
    """

    def mean(ordered):
        cut = min(int(trim_fraction * len(ordered)), (len(ordered) - 1) // 2)  # some clients may have been rejected
        return ordered[cut : len(ordered) - cut].mean(dim=0)

    means = by_coordinate(mean, clients.shards()[0])  # then the shards are freed
    return clients.join(means)


def krum(clients, state, num_malicious=1):
    """The one update with the least sum of squared distances to its n - num_malicious - 2 nearest; unweighted.

    Krum, Blanchard et al. 2017 (arXiv:1703.02757).
    """
    values, _ = clients.shards()
    gram = torch.zeros(len(values), len(values), dtype=torch.float64, device=values.device)
    for block in values.split(BLOCK, dim=1):
        gram += block.double() @ block.double().T
    clients.sum_over_ranks(gram)
    squared_distances = gram.diag()[:, None] + gram.diag() - gram - gram.T
    nearest = squared_distances.sort(dim=1).values[:, 1 : max(2, len(gram) - num_malicious - 1)]  # column 0: to itself
    return clients.join(values[nearest.sum(dim=1).argmin()])


def svd(clients, state):
    """Average the products B A instead of B and A, and project to rank r. FlexLoRA, Bai et al. 2024 (arXiv:2402.11505).

    Each rank does this for some of the layers; B A itself is never formed, see fllama/flexlora.py.
    """
    layers, sizes = flexlora.deal_layers(clients.shapes, clients.comm.world_size)
    values, weights = clients.shards(sizes)
    start = clients.own_stretch(clients.start, sizes)
    factors = [start.new_empty(0)]
    for a, b in flexlora.layer_factors(start + values, layers[clients.comm.rank]):
        new_a, new_b = flexlora.project_product(a, b, weights / weights.sum())
        factors += [new_a.reshape(-1), new_b.reshape(-1)]
    return clients.join(torch.cat(factors) - start, sizes)


def dp_fedavg(clients, state, dp_clip_norm=1.0, noise_multiplier=1.0, clients_per_round=1):
    """Sum of the clipped updates, plus Gaussian noise, divided by the expected number of clients.

    DP-FedAvg, McMahan et al. 2018 (arXiv:1710.06963): hides whether a whole client took part. Every client weighs the
    same and is drawn independently, so a round may be empty: then it is noise alone. Rank 0 draws the noise for all.
    """

    def clipped(client):
        norm = torch.linalg.vector_norm(client.update, dtype=torch.float64).item()
        return client.update * min(1.0, dp_clip_norm / max(norm, 1e-12))

    total = clients.sum(clipped)
    secret = noise.gaussian(total, noise.secret_generator(total.device))
    clients.comm.broadcast(secret)
    return (total + noise_multiplier * dp_clip_norm * secret) / clients_per_round


def none(clients, state):
    """No averaging: every client trains alone and shares nothing, so P is 0."""
    return torch.zeros_like(clients.start)


AGGREGATORS = {
    "fedavg": fedavg,
    "fedavgm": fedavgm,
    "diloco": diloco,
    "fedadagrad": fedadagrad,
    "fedadam": fedadam,
    "fedyogi": fedyogi,
    "norm_clip": norm_clip,
    "geometric_median": geometric_median,
    "median": median,
    "trimmed_mean": trimmed_mean,
    "krum": krum,
    "svd": svd,
    "dp_fedavg": dp_fedavg,
    "none": none,
}

# --lora_variant: (what a client trains, what of that it shares), by a part of the tensors' names; several of these take
# turns, one a round. ffa: FFA-LoRA, Sun et al. 2024 (arXiv:2403.12313). rolora: RoLoRA, Chen et al. 2024
# (arXiv:2409.02346). fedsa: FedSA-LoRA, Guo et al. 2024 (arXiv:2410.01463).
LORA_VARIANTS = {
    "lora": [("lora_", "lora_")],
    "ffa": [("lora_B", "lora_B")],
    "rolora": [("lora_B", "lora_B"), ("lora_A", "lora_A")],
    "fedsa": [("lora_", "lora_A")],
}

# end of EDIT HERE
# -----------------------------------------------------------------------------
# what averaging is made of

BLOCK = 2**16  # coordinates that are handled at a time


def by_coordinate(function, values):
    """Apply `function` (clients, block) -> (block,) to `values` (clients, C), sorted by size within each coordinate."""
    results = values.new_empty(values.shape[1])
    for block, result in zip(values.split(BLOCK, dim=1), results.split(BLOCK)):
        result.copy_(function(block.sort(dim=0).values))
    return results


def shared_parameters(model, part=""):
    """Return the parameters that clients share, in the model's order: the trainable ones with `part` in their name."""
    return [parameter for name, parameter in model.named_parameters() if parameter.requires_grad and part in name]


def flatten_parameters(parameters, device="cpu"):
    """Copy parameters into one float32 vector (P,) on `device`."""
    parts = [parameter.detach().reshape(-1) for parameter in parameters]
    return torch.cat(parts or [torch.empty(0)]).float().to(device)


def unflatten_parameters(parameters, vector):
    """Copy a vector (P,) back into the parameters, by one call for all of them."""
    if parameters:
        device = parameters[0].device
        vector = vector.to(device, non_blocking=device.type == "cuda")
        parts = vector.split([parameter.numel() for parameter in parameters])
        parts = [part.view_as(parameter) for part, parameter in zip(parts, parameters)]
        with torch.no_grad():
            torch._foreach_copy_(parameters, parts)


def federated_average(model, world_size, start=None, turns=None, strategy=fedavg, state=None, comm=None, part=""):
    """Replace the shared LoRA parameters of every client by their average; all ranks participate.

    With the first two arguments only, it is the plain mean over the ranks of the default process group, by one
    all-reduce. Else `start` (P,) is the vector from which all clients began the round, `turns` what this rank's clients
    handed in, `strategy` and `state` are as under EDIT HERE, `comm` is a Communicator, and `part` is in the names of
    the shared parameters. Returns the average update (P,). Raises ValueError if there are not `world_size` ranks.
    """
    comm = comm or Communicator.of_default_group()
    if comm.world_size != world_size:
        raise ValueError(f"world_size is {world_size}, but there are {comm.world_size} ranks")
    parameters = shared_parameters(model, part)
    if start is None:
        start = torch.zeros(sum(parameter.numel() for parameter in parameters), device=comm.device)
        turns = [Update(comm.rank, 1.0, flatten_parameters(parameters, comm.device), residuals={})]
    clients = Clients(comm, turns, start, [parameter.shape for parameter in parameters], part)
    average = strategy(clients, {} if state is None else state)
    unflatten_parameters(parameters, start + average)
    return average


# -----------------------------------------------------------------------------
# the prompt

INSTRUCTION = "Answer the question with words copied from the context. If the answer is not there, say unanswerable."
UNANSWERABLE = "unanswerable"


@functools.cache
def has_system_role(tokenizer):
    """Whether the chat template of `tokenizer` takes a system message (some refuse it, some drop it silently)."""
    probe = [{"role": "system", "content": "a-system-message"}, {"role": "user", "content": "a-question"}]
    try:
        return "a-system-message" in tokenizer.apply_chat_template(probe, tokenize=False)
    except TemplateError:
        return False


def convert_squad_sample_to_llama_conversation(sample, tokenizer=None):
    """Turn one SQuAD row into a conversation whose completion, the answer, is all that the loss sees.

    `sample` has `context`, `question` and `answers`, which is `{"text": [...]}`; an empty list means that the context
    does not hold the answer. Returns TRL's conversational prompt-completion format: `{"prompt": [system, user],
    "completion": [assistant]}`; a prompt of one user turn if the chat template of `tokenizer` knows no system role.
    """
    system = f"{INSTRUCTION}\n\n{sample['context']}"
    prompt = [{"role": "system", "content": system}, {"role": "user", "content": sample["question"]}]
    if tokenizer is not None and not has_system_role(tokenizer):
        prompt = fold_system(prompt)
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": list_answers(sample)[0]}]}


def fold_system(messages):
    """Return messages with the system message in front of the first user message."""
    system, *rest = messages
    if rest and rest[0]["role"] == "user":
        return [rest[0] | {"content": f"{system['content']}\n\n{rest[0]['content']}"}, *rest[1:]]
    return [{"role": "user", "content": system["content"]}, *rest]


def list_answers(sample):
    """Return every accepted answer of a SQuAD row, at least one."""
    return list(sample["answers"]["text"]) or [UNANSWERABLE]


# -----------------------------------------------------------------------------
# who gets which rows, and who plays when


def partition_dataset(dataset, rank, world_size, seed=42):
    """Return part `rank` of `world_size`: shuffled by `seed`, disjoint, sizes at most one row apart, no row left out.

    If a data set has no held-out split, it is dealt into N + 1 parts: client k gets part k, and part N is held out.
    """
    return dataset.select(split_evenly(len(dataset), world_size, seed)[rank])


def split_evenly(num_rows, num_parts, seed):
    """Return the row numbers of each part, shuffled; sizes are at most one apart."""
    return np.array_split(np.random.default_rng(seed).permutation(num_rows), num_parts)


def partition_rows(rows, num_clients, kind="iid", values=None, alpha=0.5, seed=42):
    """Deal `rows` (an array of row numbers, shuffled) out to clients: a list of arrays, in which every row is once.

    iid        sizes at most one apart, as in `partition_dataset`
    quantity   two rows each, and the rest by a power law: client k gets a share proportional to 1 / (k + 1)
    column     one client per value in `values` (one per row), in the order of `sorted`
    dirichlet  the rows of each value go to the clients in shares drawn from Dirichlet(alpha): below 1 a client sees
               few values, above 10 it is nearly iid. Hsu et al. 2019 (arXiv:1909.06335), as in Li et al. 2021
               (arXiv:2102.02079), which draw it per label.
    """
    if kind == "iid":
        return np.array_split(rows, num_clients)
    if kind == "quantity":
        shares = 1 / np.arange(1, num_clients + 1)
        sizes = 2 + shares / shares.sum() * (len(rows) - 2 * num_clients)
        return np.split(rows, np.rint(sizes.cumsum()).astype(int)[:-1])

    if kind not in ("column", "dirichlet"):
        raise ValueError(f"no partition is named {kind}")
    values = np.array([str(value) for value in values], dtype=object)[rows]
    rows_of_value = [rows[values == value] for value in sorted(set(values))]
    if kind == "column":
        return rows_of_value
    rng = np.random.default_rng(seed)
    dealt = []  # for each value, the rows that go to each client
    for group in rows_of_value:
        shares = rng.dirichlet(np.full(num_clients, alpha))
        dealt.append(np.split(group, np.rint(shares.cumsum() * len(group)).astype(int)[:-1]))
    return [rng.permutation(np.concatenate(part)) for part in zip(*dealt)]


def schedule_rows(num_rows, total, seed):
    """Return the order in which a client reads its `num_rows` rows: `total` indices, every epoch newly shuffled.

    Read from front to back, batch by batch and round by round, it makes every round go on where the last one stopped.
    """
    rng = np.random.default_rng(seed)
    num_epochs = math.ceil(total / num_rows)
    epochs = [rng.permutation(num_rows) for _ in range(num_epochs)]
    return np.concatenate([*epochs, np.array([], dtype=int)])[:total]


class Round(NamedTuple):
    """Who plays in a round."""

    shares: list  # shares[rank] lists the clients that this rank plays, one after the other
    moves: list  # (client, from rank, to rank) of clients that another rank played before; their state travels

    def clients(self):
        return sorted(client for share in self.shares for client in share)


def plan_rounds(num_clients, clients_per_round, num_rounds, world_size, seed, machine_of_rank=None, drawn_before=None):
    """Draw the clients of every round, and deal them out to the ranks; the draw does not depend on `world_size`.

    Ranks play as many clients as each other, or one more. A client stays with its rank if there is room, else on its
    machine: machine_of_rank[rank] numbers these. `drawn_before` are the clients of every round if they were drawn
    elsewhere. Returns one Round per round.
    """
    machine_of_rank = machine_of_rank or [0] * world_size
    rank_of_client, plan = {}, []
    for number in range(1, num_rounds + 1):
        drawn = np.random.default_rng([seed, number]).choice(num_clients, clients_per_round, replace=False)
        if drawn_before is not None:
            drawn = np.array(drawn_before[number - 1], dtype=int)
        sizes = [len(part) for part in np.array_split(drawn, world_size)]
        shares, moves, unplaced = [[] for _ in sizes], [], []
        for client in sorted(drawn.tolist()):
            home = rank_of_client.get(client)
            if home is not None and len(shares[home]) < sizes[home]:
                shares[home].append(client)
            else:
                unplaced.append(client)
        for client in unplaced:
            home = rank_of_client.get(client, 0)
            free = [rank for rank, share in enumerate(shares) if len(share) < sizes[rank]]
            same_machine = [rank for rank in free if machine_of_rank[rank] == machine_of_rank[home]]
            rank = (same_machine or free)[0]
            shares[rank].append(client)
            if client in rank_of_client:
                moves.append((client, rank_of_client[client], rank))
            rank_of_client[client] = rank
        plan.append(Round(shares, moves))
    return plan


# -----------------------------------------------------------------------------
# losses on disk


def append_loss_to_file(path, loss):
    """Append one loss (nats per answer token) to a JSON list, made if it is not there; NaN and infinity become null."""
    losses = json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).exists() else []
    write_aside(path, json.dumps([*losses, loss if math.isfinite(loss) else None]))


def write_aside(path, text):
    """Write a file so that a reader finds the old content or the new one, never a part of it."""
    aside = Path(f"{path}.tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
