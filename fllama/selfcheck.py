"""Is this federated learning? Five checks, of which a failed one ends the run; and the error of averaging A and B."""

import torch

from fllama import flexlora
from fllama.launch import EndRun
from fllama.narrow import Encoded
from fllama.runlog import digest, turns_of

MEASURED_ADAPTERS = 16  # adapters of a round that are kept for the aggregation error; of more clients, fewer layers
THINNED = 8  # with several machines, one layer in so many is measured: adapters have to travel


def check(comm, log, passed, text):
    """Say what was checked; if it failed, end the run on all ranks with exit code 3."""
    (log.say if passed else log.warn)(f"  {'✓' if passed else '✗'} {text}")
    if not passed:
        log.close()
        comm.meet()  # nobody leaves before it is said
        raise EndRun(3, "a self-check failed, see its line; this would not be federated learning")


def before_training(comm, log, trainer, start, first_rate, data, resumed):
    """Check what can be known before the first step; all ranks participate.

    `start` is the vector from which all ranks have to begin, `first_rate` the learning rate of the next step.
    """
    wrapped = trainer.model_wrapped
    if trainer.args.torch_compile:
        wrapped = getattr(wrapped, "_orig_mod", wrapped)
    own = (
        type(wrapped).__name__,
        trainer.accelerator.num_processes,
        digest(start),
        first_rate,
        None if resumed else fresh_rows(data),
    )
    wrappers, processes, starts, rates, fresh = zip(*comm.meet(own))  # of all ranks
    kinds, different_starts = sorted(set(wrappers)), sorted(set(starts))
    alone = set(processes) == {1} and kinds == [type(trainer.model).__name__]
    check(comm, log, alone, f"no DDP: every rank trains a {', '.join(kinds)} of its own")
    shown = " and ".join(start[:8] for start in different_starts)
    check(comm, log, len(different_starts) == 1, f"same start: {shown} on {len(starts)} rank(s)")
    check(comm, log, min(rates) > 0, f"learns from the first step on: learning rate {min(rates):.2e}")
    new = read = 0
    passed = True
    for counts in filter(None, fresh):
        new, read = new + counts["new"], read + counts["read"]
        passed = passed and counts["new"] >= counts["unread"]
    if read:
        check(comm, log, passed, f"fresh data next round: {new} of {read} rows of second turns are not in the first")


def fresh_rows(data):
    """Count how many rows of a client's second turn are not in its first, how many it has, and how many could be new.

    Of the first client here that has a second turn; None without one.
    """
    first_turns = {}
    for number, played in enumerate(data.plan, start=1):
        for client in played.shares[data.rank]:
            if client not in data.own:
                continue
            rows = set(data.rows_of_turn(client, number))
            if client in first_turns:
                first = first_turns[client]
                unread = min(len(data.own[client]) - len(first), len(rows))
                return {"new": len(rows - first), "read": len(rows), "unread": unread}
            first_turns[client] = rows
    return None


def after_averaging(args, comm, log, reports, rejected, first):
    """Check that clients were apart before the averaging, and that ranks are equal after it; all ranks participate.

    `reports` are those of all ranks (runlog.RankReport). Adapters and rows of the clients are compared in the `first`
    round of this start only.
    """
    after = len({each.checksum for each in reports})
    if not first:
        if after > 1:
            check(comm, log, False, f"federated: {after} adapters after the averaging")
        return
    turns = [turn for turn in turns_of(reports) if turn.client not in rejected]
    adapters, tokens, rows, skipped = set(), set(), [], False
    for turn in turns:
        adapters.add(turn.digest)
        tokens.add(turn.tokens_digest)
        rows += set(turn.rows_read)
        skipped = skipped or turn.step_skipped
    before = len(adapters)
    # clients may be equal if what they read is, or if fp16 skipped their steps; but no row may be two clients'
    apart = before >= len(tokens) or skipped
    no_row_twice = args.packing or len(set(rows)) == len(rows)  # packs are numbered by each rank
    text = f"{len(turns)} client(s) with {before} adapter(s) before the averaging, {after} after it"
    if args.aggregator == "none":
        text = f"{len(turns)} client(s) with {before} adapter(s), and no averaging"
    check(comm, log, apart and no_row_twice and after == 1, f"federated: {text}")


# -----------------------------------------------------------------------------
# the aggregation error


def measured_parameters(lora, clients_per_round):
    """Return the LoRA parameters that are kept for the aggregation error, A and B of a layer together."""
    every = -(-clients_per_round // MEASURED_ADAPTERS)
    measured = []
    for i in range(0, len(lora), 2 * every):
        measured += lora[i : i + 2]
    return measured


def aggregation_error(comm, turns, measured):
    """Return how wrong it is to average A and B instead of B A: ||sum p (B-mean B)(A-mean A)|| / ||sum p B A||.

    Frobenius norms over all measured layers, p the clients' shares of the rows. `turns` are those of this rank, each
    with its adapter. All ranks participate, each with some of the layers.
    """
    shapes = [parameter.shape for parameter in measured]
    chosen = range(len(shapes))
    if comm.num_machines > 1:  # adapters have to travel: measure fewer layers
        chosen = [i for i in chosen if i // 2 % THINNED == 0]
    sizes, encoded = [shape.numel() for shape in shapes], []
    for turn in turns:
        parts = turn.adapter.to(comm.device).split(sizes)
        encoded.append(Encoded(turn.client, turn.weight, torch.cat([parts[i] for i in chosen])))
    layers, sizes = flexlora.deal_layers([shapes[i] for i in chosen], comm.world_size)
    values, weights = comm.exchange(encoded, sizes)
    p = weights / weights.sum()
    squares = torch.zeros(2, dtype=torch.float64, device=comm.device)  # of the error, of the product
    for a, b in flexlora.layer_factors(values, layers[comm.rank]):
        a, b = a.double(), b.double()
        mean_a = (p[:, None, None] * a).sum(0)
        mean_b = (p[:, None, None] * b).sum(0)
        squares[0] += flexlora.squared_product_norm(a - mean_a, b - mean_b, p)
        squares[1] += flexlora.squared_product_norm(a, b, p)
    comm.all_reduce(squares)
    error, product = squares.clamp_min(0).tolist()  # what should be zero may be rounded below it
    return (error / product) ** 0.5 if product else 0.0
