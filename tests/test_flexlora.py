"""Products of the LoRA factors, against the dense matrices: the svd strategy, and the aggregation error."""

import math

import pytest
import torch
import torch.multiprocessing as mp
from collective_workers import CASES, average_case, error_of, error_rank

from fllama import flexlora
from fllama.collectives import Communicator


def layers(flat, case):
    """The (A, B) of every layer in a vector (P,)."""
    parts = flat.split([shape.numel() for shape in case["shapes"]])
    parts = [part.view(shape) for part, shape in zip(parts, case["shapes"])]
    return list(zip(parts[::2], parts[1::2]))


def shares(case):
    return torch.tensor(case["weights"], dtype=torch.float64) / sum(case["weights"])


def products(case, number, start):
    """The weighted mean of the B A of every client, dense, layer by layer, in float64."""
    adapters = start.double() + case["updates"][number].double()
    of_clients = [layers(adapter, case) for adapter in adapters]
    means = []
    for layer in zip(*of_clients):
        means.append(sum(share * b @ a for share, (a, b) in zip(shares(case), layer)))
    return means


def dense_error(case, layer_numbers):
    """The aggregation error of some layers of the first round, from dense matrices."""
    adapters = case["start"].double() + case["updates"][0].double()
    of_clients, dense = [layers(adapter, case) for adapter in adapters], products(case, 0, case["start"])
    error = norm = 0
    for i in layer_numbers:
        mean_a, mean_b = (
            sum(share * client[i][factor] for share, client in zip(shares(case), of_clients)) for factor in (0, 1)
        )
        error += (dense[i] - mean_b @ mean_a).norm() ** 2
        norm += dense[i].norm() ** 2
    return math.sqrt(error / norm)


def average_alone(name):
    return average_case(CASES[name], Communicator(0, 1), range(3))


def test_svd_is_the_best_product_of_rank_r():
    case, start = CASES["svd"], CASES["svd"]["start"]
    for number, update in enumerate(average_alone("svd")):
        for (a, b), dense in zip(layers((start + update).double(), case), products(case, number, start)):
            u, s, v = torch.linalg.svd(dense)
            best = u[:, :3] * s[:3] @ v[:3]
            assert (b @ a - best).norm() / best.norm() < 1e-5
        start = start + update


def test_svd_of_equal_clients_changes_nothing_but_the_balance():
    case = CASES["svd of equals"]
    (update,) = average_alone("svd of equals")
    (a, b) = layers(case["start"] + update, case)[0]
    (old_a, old_b) = layers(case["start"] + torch.ones(18), case)[0]
    assert torch.allclose(b @ a, old_b @ old_a, rtol=1e-4, atol=1e-4)
    assert a.norm() == pytest.approx(old_a.norm().item(), rel=1e-5)  # A is as long as before


def test_svd_takes_the_factors_that_are_nearest_to_the_mean_ones():
    """A has orthogonal rows, and no turn of A and B comes nearer to what they were: AdamW's moments still fit."""
    case = CASES["svd"]
    (a, b) = layers(case["start"] + average_alone("svd")[0], case)[0]
    gram = a @ a.T
    assert torch.allclose(gram, gram.diag().mean() * torch.eye(3), atol=1e-4)
    adapters = case["start"] + case["updates"][0]
    p = shares(case).float()
    mean_a, mean_b = layers((p[:, None] * adapters).sum(0), case)[0]

    def distance(turn):
        return (turn.T @ a - mean_a).square().sum() + (b @ turn - mean_b).square().sum()

    torch.manual_seed(0)
    for size in (0.01, 0.1, 1, 10):
        square = size * torch.randn(3, 3)
        turn = torch.matrix_exp(square - square.T)
        mirror = turn * torch.tensor([1.0, 1.0, -1.0])
        assert min(distance(turn), distance(mirror)) >= distance(torch.eye(3)) - 1e-4


def test_wide_clients_have_less_rank_than_their_stack():
    """More stacked rows than columns: 4 clients of rank 3 in 5 columns."""
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(4, 3, 5, generator=generator), torch.randn(4, 6, 3, generator=generator)
    weights = torch.full((4,), 0.25, dtype=torch.float64)
    new_a, new_b = flexlora.project_product(a, b, weights)
    u, s, v = torch.linalg.svd((0.25 * (b.double() @ a.double())).sum(0), full_matrices=False)
    best = u[:, :3] * s[:3] @ v[:3]
    assert (new_b.double() @ new_a.double() - best).norm() / best.norm() < 1e-5


def test_norm_of_a_product_is_the_same_by_both_ways():
    """By Gram matrices for few clients, densely for many."""
    generator = torch.Generator().manual_seed(1)
    for clients in (1, 40):
        a = torch.randn(clients, 2, 30, generator=generator, dtype=torch.float64)
        b = torch.randn(clients, 20, 2, generator=generator, dtype=torch.float64)
        weights = torch.rand(clients, generator=generator, dtype=torch.float64)
        dense = (weights[:, None, None] * (b @ a)).sum(0).norm() ** 2
        assert flexlora.squared_product_norm(a, b, weights) == pytest.approx(dense.item(), rel=1e-10)


def test_layers_are_dealt_out_once():
    shapes = [torch.Size(shape) for _ in range(5) for shape in ((3, 6), (8, 3))]
    dealt, sizes = flexlora.deal_layers(shapes, 3)
    assert [len(part) for part in dealt] == [2, 2, 1] and sizes == [84, 84, 42]
    assert flexlora.deal_layers(shapes[:2], 3)[1] == [42, 0, 0]


# -----------------------------------------------------------------------------
# the aggregation error


def test_aggregation_error_against_dense_matrices():
    assert error_of(CASES["svd"], Communicator(0, 1), range(3)) == pytest.approx(
        dense_error(CASES["svd"], range(5)), rel=1e-5
    )


def test_aggregation_error_of_equal_clients_is_zero():
    assert error_of(CASES["svd of equals"], Communicator(0, 1), range(3)) < 1e-6
    nothing = CASES["svd of equals"] | {"start": torch.full((18,), -1.0)}  # no adapter at all
    assert error_of(nothing, Communicator(0, 1), range(3)) == 0


def test_aggregation_error_that_is_rounded_below_zero(monkeypatch):
    """Of Gram matrices, what should be 0 may come out below it."""
    squares = [-1e-12, 4.0] * 5  # of the error and of the product, layer by layer
    monkeypatch.setattr(flexlora, "squared_product_norm", lambda a, b, weights: squares.pop(0))
    assert error_of(CASES["svd"], Communicator(0, 1), range(3)) == 0


@pytest.mark.parametrize(("world_size", "layout"), [(2, "idle"), (5, "machines")])
def test_aggregation_error_on_several_ranks(tmp_path, world_size, layout):
    """The same as on one; between machines, of one layer in 8."""
    args = (str(tmp_path), world_size, layout)
    mp.start_processes(error_rank, args=args, nprocs=world_size, start_method="forkserver")
    for rank in range(world_size):
        result = torch.load(tmp_path / f"error_{rank}.pt")
        assert result["whole"] == pytest.approx(dense_error(CASES["svd"], range(5)), rel=1e-5)
        measured = [0] if layout == "machines" else range(5)
        assert result["thinned"] == pytest.approx(dense_error(CASES["svd"], measured), rel=1e-5)
