"""Every strategy by hand, against Flower, and against dense matrices, with and without clients that share a rank."""

import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from workers import strategies_rank

import utils

UPDATES = [[1.0, 2.0, -1.0, 4.0], [3.0, -2.0, 0.0, 4.0], [-1.0, 0.0, 7.0, 1.0]]  # client -> its update
WEIGHTS = [1.0, 2.0, 1.0]
MEAN = [1.5, -0.5, 1.5, 3.25]  # (1*1 + 2*3 - 1*1) / 4 and so on
ROUNDS, CLIENTS, SIZE = 5, 7, 37


def case(aggregate, updates=(UPDATES, UPDATES), weights=WEIGHTS, start=None, shapes=((2,), (2,)), **settings):
    """A case for the workers: `updates` holds one (clients, P) a round."""
    updates = [torch.as_tensor(u, dtype=torch.float32) for u in updates]
    start = torch.zeros(updates[0].shape[1]) if start is None else start
    return {
        "aggregate": aggregate, "settings": settings, "updates": updates, "weights": weights, "start": start,
        "shapes": shapes,
    }  # fmt: skip


def random_case(aggregate, **settings):
    generator = torch.Generator().manual_seed(7)
    updates = torch.randn(ROUNDS, CLIENTS, SIZE, generator=generator)
    return case(aggregate, updates, [3.0, 10.0, 1.0, 7.0, 5.0, 2.0, 4.0], updates[0, 0] / 2, [(SIZE,)], **settings)


def product_case(aggregate, num_layers=5):
    """5 layers, A (3, 6) and B (8, 3), unequal weights."""
    shapes = [shape for _ in range(num_layers) for shape in ((3, 6), (8, 3))]
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
    "median": case("median"),
    "median of 4": case("median", [[*UPDATES, [0.0, 9.0, 1.0, 3.0]]], [1.0] * 4),
    "trimmed_mean": case("trimmed_mean", [[*UPDATES, [0.0, 9.0, 1.0, 3.0]]], [1.0] * 4, trim_fraction=0.25),
    "krum": case("krum", num_malicious=0),
    "none": case("none"),
    "two sums": case("two_sums"),
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


def run(folder, world_size, layout=""):
    """Run CASES; returns one dict for every rank."""
    mp.start_processes(
        strategies_rank, args=(str(folder), CASES, world_size, layout), nprocs=world_size, start_method="forkserver"
    )
    return [torch.load(folder / f"strategies_{rank}.pt") for rank in range(world_size)]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run(tmp_path_factory.mktemp("three"), 3)


@pytest.fixture(scope="module")
def averages(results):
    return results[0]["averages"]


def test_every_strategy_has_a_case():
    assert {value["aggregate"] for value in CASES.values()} == {*utils.AGGREGATORS, "two_sums"}


def test_all_ranks_agree_whoever_plays_whom(results, tmp_path_factory):
    """3 ranks, 2 that play the clients in another order, and 2 of which one has no client: the same bits."""
    two = run(tmp_path_factory.mktemp("two"), 2, "shuffled")
    idle = run(tmp_path_factory.mktemp("idle"), 2, "idle")
    for name in CASES:
        if name != "none":
            for other in [*results[1:], *two, *idle]:
                for mine, theirs in zip(results[0]["averages"][name], other["averages"][name]):
                    assert torch.equal(mine, theirs), name
    assert results[0]["error"] == pytest.approx(two[0]["error"], rel=1e-6)


@pytest.fixture(scope="module")
def on_machines(tmp_path_factory):
    return run(tmp_path_factory.mktemp("machines"), 5, "machines")


def test_three_machines(results, on_machines):
    """Who averages coordinate by coordinate gets the same bits; sums between machines are rounded to float32."""
    exact = ("median", "trimmed_mean", "krum")
    for name, value in CASES.items():
        if name != "none":
            for other in on_machines:
                assert all(map(torch.equal, other["averages"][name], on_machines[0]["averages"][name]))
                for mine, theirs in zip(results[0]["averages"][name], other["averages"][name]):
                    assert (mine - theirs).norm() <= (0 if value["aggregate"] in exact else 1e-6) * mine.norm(), name
    assert results[0]["error"] == pytest.approx(on_machines[0]["error"], rel=1e-6)


@pytest.mark.parametrize(
    ("dtype", "tolerance", "bytes_sent"), [("float32", 1e-6, 4 + 4), ("bfloat16", 2e-2, 2 + 2), ("int8", 5e-2, 1 + 2)]
)
def test_streams_between_machines(on_machines, dtype, tolerance, bytes_sent):
    """Every machine sends 2/3 of its sum, and 1/3 of the total to 2; what is rounded off comes in later rounds."""
    updates = torch.randn(6, 3000, generator=torch.Generator().manual_seed(4)).double()
    weights = torch.arange(1.0, 7.0, dtype=torch.float64)
    mean = (weights[:, None] * updates).sum(0) / weights.sum()
    averages, _ = on_machines[0]["streams"][dtype]
    for other in on_machines[1:]:
        assert all(map(torch.equal, averages, other["streams"][dtype][0]))
    assert all((average - mean).norm() / mean.norm() < tolerance for average in averages)
    error = (torch.stack(averages).double().mean(0) - mean).norm() / mean.norm()
    assert error < max(1e-6, (averages[0] - mean).norm() / mean.norm() / 2)
    sent = [rank["streams"][dtype][1] for rank in on_machines]
    assert sent[1] == sent[3] == 0 and sum(sent) == 20 * 3000 * 2 * bytes_sent


def test_one_all_reduce_of_the_update_and_the_weight(results):
    assert results[0]["calls"] == [("all_reduce", 5)] * 2


# -----------------------------------------------------------------------------
# by hand


def expect(rounds, *values):
    assert [r.tolist() for r in rounds] == [pytest.approx(value, rel=1e-5, abs=1e-6) for value in values]


def test_fedavg(averages):
    expect(averages["fedavg"], MEAN, MEAN)


def test_fedavgm(averages):
    # momentum: mean, then mean + 0.9 mean; half of it is applied
    expect(averages["fedavgm"], [0.5 * m for m in MEAN], [0.5 * 1.9 * m for m in MEAN])


def test_diloco(averages):
    # Nesterov: 0.7 (m + 0.9 m), then with momentum 1.9 m: 0.7 (m + 0.9 * 1.9 m)
    expect(averages["diloco"], [0.7 * 1.9 * m for m in MEAN], [0.7 * 2.71 * m for m in MEAN])


def test_fedadagrad(averages):
    # second moment: tau^2 = 1e-6, and the square of the mean once a round
    steps = [[0.1 * m / (math.sqrt(1e-6 + n * m * m) + 1e-3) for m in MEAN] for n in (1, 2)]
    expect(averages["fedadagrad"], *steps)


def test_fedadam(averages):
    # first moment 0.1 m, 0.19 m; second 0.99e-6 + 0.01 m^2, then 0.9801e-6 + 0.0199 m^2
    first = [0.1 * 0.1 * m / (math.sqrt(0.99e-6 + 0.01 * m * m) + 1e-3) for m in MEAN]
    second = [0.1 * 0.19 * m / (math.sqrt(0.9801e-6 + 0.0199 * m * m) + 1e-3) for m in MEAN]
    expect(averages["fedadam"], first, second)


def test_fedyogi(averages):
    # as long as the second moment is below m^2, 0.01 m^2 is added a round, and nothing is forgotten
    first = [0.1 * 0.1 * m / (math.sqrt(1e-6 + 0.01 * m * m) + 1e-3) for m in MEAN]
    second = [0.1 * 0.19 * m / (math.sqrt(1e-6 + 0.02 * m * m) + 1e-3) for m in MEAN]
    expect(averages["fedyogi"], first, second)


def test_norm_clip(averages):
    # norms sqrt(22), sqrt(29), sqrt(51), all cut down to 2
    shrunk = [[2 / math.sqrt(n) * u for u in update] for n, update in zip((22, 29, 51), UPDATES)]
    mean = [(a + 2 * b + c) / 4 for a, b, c in zip(*shrunk)]
    expect(averages["norm_clip"], mean, mean)


def test_median(averages):
    expect(averages["median"], [1, 0, 0, 4], [1, 0, 0, 4])
    expect(averages["median of 4"], [0.5, 1, 0.5, 3.5])  # of an even number: the mean of the two in the middle


def test_trimmed_mean(averages):
    # of 4 clients, the lowest and the highest are cut: the same two are left
    expect(averages["trimmed_mean"], [0.5, 1, 0.5, 3.5])


def test_krum(averages):
    # squared distances 0-1: 21, 0-2: 81, 1-2: 78; with one nearest each, clients 0 and 1 tie at 21
    expect(averages["krum"], UPDATES[0], UPDATES[0])


def test_none(results):
    for rank, result in enumerate(results):
        expect(result["averages"]["none"], UPDATES[rank], UPDATES[rank])


def test_a_strategy_may_sum_twice_and_change_its_state_early(averages):
    expect(averages["two sums"], MEAN, [2 * m for m in MEAN])


def test_a_strategy_must_not_send_what_depends_on_a_result(tmp_path):
    """One rank with two clients: when the first sends, there is no result yet."""

    def dependent(update, weight, state):
        norm = utils.sum_over_clients(update.norm())
        return utils.sum_over_clients(update / norm)

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        model = torch.nn.ParameterList([torch.ones(3)])
        two = [(0, 1.0, torch.ones(3)), (1, 1.0, torch.ones(3))]
        with pytest.raises(RuntimeError, match="depends on results of the same round"):
            utils.federated_average(model, 1, torch.zeros(3), two, dependent)
    finally:
        torch.distributed.destroy_process_group()


# -----------------------------------------------------------------------------
# against Flower: whole parameters instead of updates, and everything on the server


def flower_rounds(strategy, inputs, adapt=lambda strategy, number: None):
    """Let Flower's `strategy` aggregate the same updates; returns the change of its parameters, round by round."""
    from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict

    parameters, changes = inputs["start"].double().numpy(), []
    for number, updates in enumerate(inputs["updates"], start=1):
        strategy.current_arrays = {"x": parameters}
        if type(strategy).__name__ == "FedAvgM":
            strategy.current_arrays = ArrayRecord({"x": Array(parameters)})
        adapt(strategy, number)
        replies = []
        for update, weight in zip(updates, inputs["weights"]):
            content = {"arrays": ArrayRecord({"x": Array(parameters + update.double().numpy())})}
            content["metrics"] = MetricRecord({"num-examples": int(weight)})
            replies.append(SimpleNamespace(content=RecordDict(content), has_error=lambda: False))  # the bare message
        record, _ = strategy.aggregate_train(number, replies)
        after = record["x"].numpy()
        changes.append(torch.tensor(after - parameters))
        parameters = after
    return changes


def start_second_moment(tau):
    """Reddi et al. start the second moment at tau^2, Flower at zero."""

    def adapt(strategy, number):
        if number == 1:
            strategy.v_t = {"x": np.full(SIZE, tau**2)}

    return adapt


def undo_bias_correction(strategy, number):
    """Flower's FedAdam corrects for bias (with one round too many in the exponent); Reddi et al. do not."""
    start_second_moment(0.01)(strategy, number)
    strategy.eta = 0.3 / (math.sqrt(1 - 0.95 ** (number + 1)) / (1 - 0.8 ** (number + 1)))


@pytest.mark.parametrize(
    ("name", "settings", "adapt"),
    [
        ("FedAvg", {}, None),
        ("FedAvgM", {"server_learning_rate": 0.5, "server_momentum": 0.8}, None),
        ("FedAdagrad", {"eta": 0.3, "tau": 0.01}, start_second_moment(0.01)),
        ("FedAdam", {"tau": 0.01, "beta_1": 0.8, "beta_2": 0.95}, undo_bias_correction),
        ("FedYogi", {"eta": 0.3, "tau": 0.01, "beta_1": 0.8, "beta_2": 0.95}, start_second_moment(0.01)),
        ("FedMedian", {}, None),
        ("FedTrimmedAvg", {"beta": 0.3}, None),
        ("Krum", {"num_malicious_nodes": 2}, None),
    ],
)
def test_against_flower(averages, name, settings, adapt, monkeypatch):
    monkeypatch.setitem(os.environ, "FLWR_TELEMETRY_ENABLED", "0")
    from flwr.serverapp import strategy

    inputs = CASES[f"flower {name}"]
    expected = flower_rounds(getattr(strategy, name)(**settings), inputs, *filter(None, [adapt]))
    for mine, theirs in zip(averages[f"flower {name}"], expected, strict=True):
        assert torch.allclose(mine.double(), theirs, rtol=1e-5, atol=1e-5)


# -----------------------------------------------------------------------------
# products of the factors, against the dense matrices


def products(inputs, number, start):
    """The weighted mean of the B A of every client, dense, layer by layer, in float64."""
    p = torch.tensor(inputs["weights"], dtype=torch.float64) / sum(inputs["weights"])
    clients = start.double() + inputs["updates"][number].double()
    return [sum(pi * b @ a for pi, (a, b) in zip(p, layer)) for layer in zip(*(layers(c, inputs) for c in clients))]


def layers(flat, inputs):
    parts = [
        part.view(*shape) for part, shape in zip(flat.split([math.prod(s) for s in inputs["shapes"]]), inputs["shapes"])
    ]
    return list(zip(parts[::2], parts[1::2]))


def test_svd_is_the_best_product_of_rank_r(averages):
    inputs, start = CASES["svd"], CASES["svd"]["start"]
    for number, update in enumerate(averages["svd"]):
        for (a, b), dense in zip(layers((start + update).double(), inputs), products(inputs, number, start)):
            u, s, v = torch.linalg.svd(dense)
            best = u[:, :3] * s[:3] @ v[:3]
            assert (b @ a - best).norm() / best.norm() < 1e-5
        start = start + update


def test_svd_of_equal_clients_changes_nothing_but_the_balance(averages):
    inputs = CASES["svd of equals"]
    ((a, b),), ((old_a, old_b),) = (
        layers(inputs["start"] + update, inputs) for update in (averages["svd of equals"][0], torch.ones(18))
    )
    assert torch.allclose(b @ a, old_b @ old_a, rtol=1e-4, atol=1e-4)
    assert a.norm() == pytest.approx(old_a.norm().item(), rel=1e-5)  # A is as long as before


def test_aggregation_error_against_dense_matrices(results):
    inputs = CASES["svd"]
    p = torch.tensor(inputs["weights"], dtype=torch.float64) / sum(inputs["weights"])
    clients = inputs["start"].double() + inputs["updates"][0].double()
    error = norm = 0
    for layer, dense in zip(zip(*(layers(c, inputs) for c in clients)), products(inputs, 0, inputs["start"])):
        mean_a, mean_b = (sum(pi * factors[i] for pi, factors in zip(p, layer)) for i in (0, 1))
        error += (dense - mean_b @ mean_a).norm() ** 2
        norm += dense.norm() ** 2
    for result in results:
        assert result["error"] == pytest.approx(math.sqrt(error / norm), rel=1e-5)
