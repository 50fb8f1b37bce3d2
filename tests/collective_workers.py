"""What runs inside the ranks of test_collectives.py, and the cases that it shares with test_averaging.py."""

import functools
import math
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

import utils
from fllama import narrow, selfcheck
from fllama.clients import Turn
from fllama.collectives import Clients, Communicator, Update

MACHINES = [0, 0, 1, 1, 2]  # of the 5 ranks on several machines

# -----------------------------------------------------------------------------
# strategies that only the tests have


def two_sums(clients, state):
    """FedAvg as one would write it down, with a state that is changed before anything is sent."""
    state["rounds"] = state.get("rounds", torch.zeros(1)).add_(1)
    average = clients.sum(lambda client: client.weight * client.update) / clients.sum(lambda client: client.weight)
    return average * state["rounds"]


def spread(clients, state):
    """The standard deviation of each coordinate: a second sum that depends on the first one."""
    mean = utils.fedavg(clients, state)
    total, weight = clients.sum(lambda client: (client.weight * (client.update - mean) ** 2, client.weight))
    return (total / weight).sqrt()


STRATEGIES = utils.AGGREGATORS | {"two_sums": two_sums, "spread": spread}

# -----------------------------------------------------------------------------
# cases

UPDATES = [[1.0, 2.0, -1.0, 4.0], [3.0, -2.0, 0.0, 4.0], [-1.0, 0.0, 7.0, 1.0]]  # client -> its update
WEIGHTS = [1.0, 2.0, 1.0]
ROUNDS, CLIENTS, SIZE = 5, 7, 37
FOUR = [[*UPDATES, [0.0, 9.0, 1.0, 3.0]]]  # one round of four clients


def case(aggregate, updates=(UPDATES, UPDATES), weights=WEIGHTS, start=None, shapes=((2,), (2,)), **settings):
    """A case: `updates` holds one (clients, P) a round."""
    updates = [torch.as_tensor(each, dtype=torch.float32) for each in updates]
    return {
        "aggregate": aggregate,
        "settings": settings,
        "updates": updates,
        "weights": weights,
        "start": torch.zeros(updates[0].shape[1]) if start is None else start,
        "shapes": [torch.Size(shape) for shape in shapes],
    }


def random_case(aggregate, **settings):
    """7 clients with unequal weights, 5 rounds."""
    generator = torch.Generator().manual_seed(7)
    updates = torch.randn(ROUNDS, CLIENTS, SIZE, generator=generator)
    weights = [3.0, 10.0, 1.0, 7.0, 5.0, 2.0, 4.0]
    return case(aggregate, updates, weights, updates[0, 0] / 2, [(SIZE,)], **settings)


def product_case(aggregate, num_layers=5):
    """5 layers, A (3, 6) and B (8, 3), unequal weights."""
    shapes = num_layers * [(3, 6), (8, 3)]
    generator = torch.Generator().manual_seed(8)
    updates = torch.randn(2, 3, sum(map(math.prod, shapes)), generator=generator)
    return case(aggregate, updates, WEIGHTS, updates[0, 0] / 3, shapes)


CASES = {
    "fedavg": case("fedavg"),
    "fedavgm": case("fedavgm", server_lr=0.5),
    "diloco": case("diloco"),
    "fedadagrad": case("fedadagrad", server_lr=0.1),
    "fedadam": case("fedadam", server_lr=0.1),
    "fedyogi": case("fedyogi", server_lr=0.1),
    "norm_clip": case("norm_clip", clip_norm=2.0),
    "geometric_median": random_case("geometric_median"),
    "median": case("median"),
    "median of 4": case("median", FOUR, [1.0] * 4),
    "trimmed_mean": case("trimmed_mean", FOUR, [1.0] * 4, trim_fraction=0.25),
    "krum": case("krum", num_malicious=0),
    "dp_fedavg": case("dp_fedavg", dp_clip_norm=2.0, noise_multiplier=0.0, clients_per_round=4),
    "none": case("none"),
    "two sums": case("two_sums"),
    "spread": random_case("spread"),
    "svd": product_case("svd"),
    "svd of equals": case("svd", [torch.ones(3, 18)], WEIGHTS, torch.arange(18.0) - 9, [(2, 5), (4, 2)]),
    "flower FedAvg": random_case("fedavg"),
    "flower FedAvgM": random_case("fedavgm", server_lr=0.5, server_momentum=0.8),
    "flower FedAdagrad": random_case("fedadagrad", server_lr=0.3, server_tau=0.01),
    "flower FedAdam": random_case("fedadam", server_lr=0.3, server_tau=0.01, server_momentum=0.8, server_beta2=0.95),
    "flower FedYogi": random_case("fedyogi", server_lr=0.3, server_tau=0.01, server_momentum=0.8, server_beta2=0.95),
    "flower FedMedian": random_case("median"),
    "flower FedTrimmedAvg": random_case("trimmed_mean", trim_fraction=0.3),
    "flower Krum": random_case("krum", num_malicious=2),
}


def average_case(case, comm, own_clients, folder=None):
    """Average the clients of a case round by round, those of this rank being `own_clients`; returns the averages.

    With a folder, a rank has all updates but its last in files, as in a run.
    """
    strategy = functools.partial(STRATEGIES[case["aggregate"]], **case["settings"])
    model = torch.nn.ParameterList([torch.zeros(shape) for shape in case["shapes"]])
    start, state, averages = case["start"], {}, []
    for updates in case["updates"]:
        turns = [Update(client, case["weights"][client], updates[client], residuals={}) for client in own_clients]
        for i, turn in enumerate(turns[:-1] if folder else []):
            path = Path(folder, f"update_{comm.rank}_{i}.pt")
            torch.save(turn.update.clone(), path)
            turns[i] = turn._replace(update=path)
        average = utils.federated_average(model, comm.world_size, start, turns, strategy, state, comm)
        assert torch.equal(utils.flatten_parameters(list(model)), start + average)
        start = start + average
        averages.append(average)
    return averages


def error_of(case, comm, own_clients):
    """The aggregation error of the first round of a case."""
    turns = []
    for client in own_clients:
        turns.append(Turn(client, case["weights"][client], {}, adapter=case["start"] + case["updates"][0][client]))
    measured = [torch.zeros(shape) for shape in case["shapes"]]
    return selfcheck.aggregation_error(comm, turns, measured)


# -----------------------------------------------------------------------------
# in the ranks


def note_collectives(calls):
    """Replace the collectives of torch.distributed by ones that first append (name, numel or None) to `calls`."""
    names = """all_reduce broadcast barrier monitored_barrier all_gather all_gather_object all_to_all_single reduce
    gather scatter send recv send_object_list recv_object_list""".split()
    for name in names:

        def noted(*args, name=name, original=getattr(dist, name), **kwargs):
            calls.append((name, args[0].numel() if args and torch.is_tensor(args[0]) else None))
            return original(*args, **kwargs)

        setattr(dist, name, noted)


def join(rank, folder, world_size):
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)


def strategies_rank(rank, folder, world_size, layout):
    """Average the clients of every case; writes down the averages."""
    join(rank, folder, world_size)
    result = {"averages": {}}
    machine_of_rank = MACHINES if layout == "machines" else None
    if layout == "machines":
        result["streams"] = average_by_streams(rank)
        narrow.CODE_BLOCK = 2  # that short vectors take this way, too
    if not layout:
        result["plain"] = plain_mean(rank, world_size)
        result["calls"] = calls_of_fedavg(rank, folder)
    if layout != "machines":
        result["narrow"] = {dtype: average_narrow(rank, world_size, dtype) for dtype in ("bfloat16", "int8")}
    comm = Communicator(rank, world_size, machine_of_rank=machine_of_rank)
    for name, each in CASES.items():
        own_clients = clients_of_rank(rank, world_size, layout, len(each["weights"]))
        result["averages"][name] = average_case(each, comm, own_clients, folder)
    torch.save(result, f"{folder}/strategies_{rank}.pt")
    dist.destroy_process_group()


def error_rank(rank, folder, world_size, layout):
    """Write down the aggregation error of a round of svd, of all layers and of those measured between machines."""
    join(rank, folder, world_size)
    comm = Communicator(rank, world_size, machine_of_rank=MACHINES if layout == "machines" else None)
    own_clients = clients_of_rank(rank, world_size, layout, 3)
    thinned = error_of(CASES["svd"], comm, own_clients)
    selfcheck.THINNED = 1  # measure all layers
    torch.save({"thinned": thinned, "whole": error_of(CASES["svd"], comm, own_clients)}, f"{folder}/error_{rank}.pt")
    dist.destroy_process_group()


def clients_of_rank(rank, world_size, layout, num_clients):
    """Client k is played by rank k % world_size, or by another (`shuffled`), or by rank 0 whatever k is (`idle`).

    With `machines`, ranks 0 and 1 are on one, 2 and 3 on another, and 4 on a third.
    """
    if layout == "idle":
        return [] if rank else list(range(num_clients))
    offset = world_size - 1 if layout == "shuffled" else 0
    own_clients = [client for client in range(num_clients) if client % world_size == (rank + offset) % world_size]
    return own_clients[::-1] if layout == "shuffled" else own_clients


PLAIN = [[[1.0, 2.0], [3.0]], [[3.0, 6.0], [0.0]], [[5.0, 1.0], [9.0]]]  # rank -> its two tensors


def plain_mean(rank, world_size):
    """federated_average with its first two arguments only, on a model with a frozen tensor."""
    model = torch.nn.ParameterList([torch.tensor(part) for part in PLAIN[rank]])
    model.append(torch.nn.Parameter(torch.full((2,), float(rank)), requires_grad=False))
    originals = dict(vars(dist))
    note_collectives(calls := [])
    utils.federated_average(model, world_size)
    vars(dist).update(originals)
    try:
        utils.federated_average(model, world_size + 1)
    except ValueError as error:
        return {"values": [parameter.tolist() for parameter in model], "calls": calls, "error": str(error)}
    raise AssertionError("a wrong world_size was taken")


def calls_of_fedavg(rank, folder):
    """What two rounds of fedavg call."""
    originals = dict(vars(dist))
    note_collectives(calls := [])
    average_case(CASES["fedavg"], Communicator(rank, 3), [rank], folder)
    vars(dist).update(originals)
    return calls


def narrow_updates():
    return torch.randn(5, 3000, generator=torch.Generator().manual_seed(5))


def average_narrow(rank, world_size, dtype):
    """Two rounds of fedavg and median of 5 clients with narrow updates."""
    comm = Communicator(rank, world_size, average_dtype=dtype)
    updates, averages = narrow_updates(), {}
    for strategy in (utils.fedavg, utils.median):
        turns = [Update(client, 1.0 + client, updates[client], {}) for client in range(rank, 5, world_size)]
        averages[strategy.__name__] = [strategy(Clients(comm, turns, torch.zeros(3000)), {}) for _ in range(2)]
    return averages


def stream_updates():
    return torch.randn(6, 3000, generator=torch.Generator().manual_seed(4))


def average_by_streams(rank):
    """Average the same 6 clients in 20 rounds; returns the averages and the bytes between machines, by dtype."""
    results = {}
    for dtype in ("float32", "bfloat16", "int8"):
        comm, updates = Communicator(rank, 5, machine_of_rank=MACHINES, average_dtype=dtype), stream_updates()
        turns = [Update(client, 1.0 + client, updates[client], {}) for client in ([0, 5] if rank == 0 else [rank])]
        averages = [utils.fedavg(Clients(comm, turns, torch.zeros(3000)), {}) for _ in range(20)]
        results[dtype] = averages, comm.bytes_between_machines
    return results


def meeting_rank(rank, folder, how):
    """Meet twice; the second time rank 2 does not come, because it is `late` or `gone`. Writes down what is raised."""
    join(rank, folder, 3)
    comm = Communicator(rank, 3, timeout_minutes=0.02)  # 1.2 s
    result = {"messages": comm.meet(f"of rank {rank}")}
    if rank == 2:
        if how == "late":
            time.sleep(2)
        os.kill(os.getpid(), signal.SIGKILL)
    began = time.monotonic()
    try:
        comm.meet()
    except Exception as error:
        result |= {"error": f"{type(error).__name__}: {error}", "seconds": time.monotonic() - began}
    torch.save(result, f"{folder}/meeting_{rank}.pt")
    os._exit(0)
