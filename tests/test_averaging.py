"""Every strategy, in one process without a process group: by hand, against Flower, and against other ways to it."""

import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from collective_workers import CASES, SIZE, UPDATES, WEIGHTS, average_case, random_case, spread

import utils
from fllama.collectives import Clients, Communicator, Update

MEAN = [1.5, -0.5, 1.5, 3.25]  # (1*1 + 2*3 - 1*1) / 4 and so on


def clients_of(updates, weights):
    """The round of these clients, all on one rank."""
    updates = [torch.as_tensor(update, dtype=torch.float32) for update in updates]
    turns = [Update(i, weight, update, residuals={}) for i, (update, weight) in enumerate(zip(updates, weights))]
    return Clients(Communicator(0, 1), turns, torch.zeros_like(updates[0]))


@pytest.fixture(scope="module")
def averages():
    """The averages of every case, one a round."""
    results = {}
    for name, case in CASES.items():
        results[name] = average_case(case, Communicator(0, 1), range(len(case["weights"])))
    return results


def test_every_strategy_has_a_case():
    assert {case["aggregate"] for case in CASES.values()} == {*utils.AGGREGATORS, "two_sums", "spread"}


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


def test_dp_fedavg(averages):
    # as norm_clip, but every client weighs the same, and 4 are expected; without noise here, see test_privacy.py
    shrunk = [[2 / math.sqrt(n) * u for u in update] for n, update in zip((22, 29, 51), UPDATES)]
    mean = [(a + b + c) / 4 for a, b, c in zip(*shrunk)]
    expect(averages["dp_fedavg"], mean, mean)


def test_norm_clip_leaves_short_updates_alone():
    expect([utils.norm_clip(clients_of(UPDATES, WEIGHTS), {}, clip_norm=100.0)], MEAN)


def test_median(averages):
    expect(averages["median"], [1, 0, 0, 4], [1, 0, 0, 4])
    expect(averages["median of 4"], [0.5, 1, 0.5, 3.5])  # of an even number: the mean of the two in the middle


def test_trimmed_mean(averages):
    # of 4 clients, the lowest and the highest are cut: the same two are left
    expect(averages["trimmed_mean"], [0.5, 1, 0.5, 3.5])


def test_trimmed_mean_of_the_few_that_were_not_rejected():
    # int(0.9 * 2) = 1 at either end would leave none: nothing is cut
    expect([utils.trimmed_mean(clients_of([[1.0], [5.0]], [1, 1]), {}, trim_fraction=0.9)], [3])


def test_krum(averages):
    # squared distances 0-1: 21, 0-2: 81, 1-2: 78; with one nearest each, clients 0 and 1 tie at 21
    expect(averages["krum"], UPDATES[0], UPDATES[0])


def test_none(averages):
    expect(averages["none"], [0] * 4, [0] * 4)  # nothing is shared, so nothing moves


def test_a_strategy_may_sum_twice_and_change_its_state_early(averages):
    expect(averages["two sums"], MEAN, [2 * m for m in MEAN])


def test_a_second_sum_may_depend_on_the_first_one():
    # around MEAN: (0.25 + 2 * 2.25 + 6.25) / 4 and so on, of 3 clients on one rank
    variances = [11 / 4, 11 / 4, (6.25 + 2 * 2.25 + 30.25) / 4, (0.5625 + 2 * 0.5625 + 5.0625) / 4]
    expect([spread(clients_of(UPDATES, WEIGHTS), {})], [math.sqrt(variance) for variance in variances])


@pytest.mark.parametrize("name", ["fedavg", "norm_clip", "geometric_median"])
def test_sums_of_a_rank_without_a_turn_are_zero(name):
    """All of its clients may have been rejected: the rank adds nothing, and the sums have the same shapes."""
    calls = []

    def note(tensor):
        calls.append(tensor.clone())
        tensor += 1  # of the other ranks

    clients = Clients(Communicator(0, 1), [], torch.zeros(4))
    clients.comm.all_reduce = note
    utils.AGGREGATORS[name](clients, {})
    assert all(torch.equal(call, torch.zeros(5, dtype=torch.float64)) for call in calls) and calls


def test_every_kind_of_term():
    """A tensor, a number, and tuples of these, each in the shape in which it was given."""
    clients = clients_of(UPDATES, WEIGHTS)
    assert clients.sum(lambda client: client.update.view(2, 2)).tolist() == [[3, 0], [6, 9]]
    assert clients.sum(lambda client: client.number) == 3
    first, second = clients.sum(lambda client: (client.update.sum(), client.weight))
    assert (first.item(), second.item()) == (18, 4) and first.shape == second.shape == ()


# -----------------------------------------------------------------------------
# the geometric median


def find_geometric_median(updates, weights):
    """The point with the least weighted sum of distances, by a general minimiser in float64."""
    point = torch.nn.Parameter(updates.median(dim=0).values)
    optimizer = torch.optim.LBFGS([point], max_iter=500, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def objective():
        optimizer.zero_grad()
        total = (weights * (point - updates).norm(dim=1)).sum()
        total.backward()
        return total

    optimizer.step(objective)
    return point.detach()


def test_geometric_median_is_the_point_of_the_least_distances():
    case = random_case("geometric_median")
    updates, weights = case["updates"][0], case["weights"]
    expected = find_geometric_median(updates.double(), torch.tensor(weights, dtype=torch.float64))
    found = utils.geometric_median(clients_of(updates, weights), {}, weiszfeld_iterations=200)
    assert (found - expected).norm() <= 1e-4 * expected.norm()
    mean = utils.fedavg(clients_of(updates, weights), {})
    assert (mean - expected).norm() > 0.01 * expected.norm()


def test_geometric_median_by_hand():
    """Clients at 0, 1 and 10: from the mean 11/3, distances 11/3, 8/3 and 19/3 weigh as 3/11, 3/8 and 3/19."""
    clients = clients_of([[0.0], [1.0], [10.0]], [1, 1, 1])
    once = utils.geometric_median(clients, {}, weiszfeld_iterations=1)
    expect([once], [(3 / 8 + 30 / 19) / (3 / 11 + 3 / 8 + 3 / 19)])


def test_geometric_median_of_one_place_is_that_place():
    """Every distance is 0; `weiszfeld_smoothing` is what is divided by."""
    place = [0.1, -2.0, 3.0]
    expect([utils.geometric_median(clients_of([place] * 3, WEIGHTS), {})], place)


def test_geometric_median_smoothing_by_hand():
    """With a least distance of 100, all distances count as equal, and the mean comes out."""
    expect([utils.geometric_median(clients_of(UPDATES, WEIGHTS), {}, weiszfeld_smoothing=100.0)], MEAN)


def test_geometric_median_is_robust_to_an_outlier():
    """8 honest clients around 1 and a malicious one at 1000: the mean is at 112."""
    honest = 1 + 0.1 * torch.randn(8, 20, generator=torch.Generator().manual_seed(3))
    updates = torch.cat([honest, torch.full((1, 20), 1000.0)])
    mean, middle = utils.fedavg(clients_of(updates, [1] * 9), {}), honest.mean(dim=0)
    found = utils.geometric_median(clients_of(updates, [1] * 9), {}, weiszfeld_iterations=50)
    by_default = utils.geometric_median(clients_of(updates, [1] * 9), {})
    assert (found - middle).norm() < 0.1 * middle.norm() < 100 * middle.norm() < (mean - middle).norm()
    assert (by_default - middle).norm() < 0.01 * (mean - middle).norm()


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
