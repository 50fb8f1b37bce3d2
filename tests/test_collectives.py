"""What ranks send each other: in processes of their own, and narrow dtypes by hand."""

import pytest
import torch
import torch.multiprocessing as mp
from collective_workers import (
    CASES,
    average_case,
    average_narrow,
    meeting_rank,
    narrow_updates,
    strategies_rank,
    stream_updates,
)

import utils
from fllama.collectives import Clients, Communicator, Update, even_sizes
from fllama.narrow import CODE_BLOCK, decode, encode


def run(folder, world_size, layout=""):
    """Run CASES; returns one dict for every rank."""
    args = (str(folder), world_size, layout)
    mp.start_processes(strategies_rank, args=args, nprocs=world_size, start_method="forkserver")
    return [torch.load(folder / f"strategies_{rank}.pt") for rank in range(world_size)]


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    return run(tmp_path_factory.mktemp("three"), 3)


@pytest.fixture(scope="module")
def shuffled(tmp_path_factory):
    """2 ranks that play the clients in another order."""
    return run(tmp_path_factory.mktemp("two"), 2, "shuffled")


@pytest.fixture(scope="module")
def idle(tmp_path_factory):
    """2 ranks, of which one has no client."""
    return run(tmp_path_factory.mktemp("idle"), 2, "idle")


@pytest.fixture(scope="module")
def on_machines(tmp_path_factory):
    return run(tmp_path_factory.mktemp("machines"), 5, "machines")


# -----------------------------------------------------------------------------
# who plays whom, and where


def test_all_ranks_agree_whoever_plays_whom(three, shuffled, idle):
    """3 ranks, 2 that play the clients in another order, and 2 of which one has no client: the bits of one process."""
    for name, case in CASES.items():
        alone = average_case(case, Communicator(0, 1), range(len(case["weights"])))
        for rank in [*three, *shuffled, *idle]:
            for mine, theirs in zip(alone, rank["averages"][name], strict=True):
                if case["aggregate"] in ("krum", "svd"):  # sums over parts of the coordinates, or of the layers
                    assert (mine - theirs).norm() <= 1e-6 * mine.norm(), name
                else:
                    assert torch.equal(mine, theirs), name
    for name in CASES:
        for other in [*three[1:], *shuffled, *idle]:
            assert all(map(torch.equal, three[0]["averages"][name], other["averages"][name])), name


def test_three_machines(three, on_machines):
    """Who averages coordinate by coordinate gets the same bits; sums between machines are rounded to float32."""
    exact = ("median", "trimmed_mean", "krum", "none")
    for name, case in CASES.items():
        for other in on_machines:
            assert all(map(torch.equal, other["averages"][name], on_machines[0]["averages"][name]))
            for mine, theirs in zip(three[0]["averages"][name], other["averages"][name], strict=True):
                tolerance = 0 if case["aggregate"] in exact else 1e-6
                assert (mine - theirs).norm() <= tolerance * mine.norm(), name


@pytest.mark.parametrize(
    ("dtype", "tolerance", "bytes_sent"), [("float32", 1e-6, 4 + 4), ("bfloat16", 2e-2, 2 + 2), ("int8", 5e-2, 1 + 2)]
)
def test_streams_between_machines(on_machines, dtype, tolerance, bytes_sent):
    """Every machine sends 2/3 of its sum, and 1/3 of the total to 2; what is rounded off comes in later rounds."""
    weights = torch.arange(1.0, 7.0, dtype=torch.float64)
    mean = (weights[:, None] * stream_updates().double()).sum(0) / weights.sum()
    averages, _ = on_machines[0]["streams"][dtype]
    for other in on_machines[1:]:
        assert all(map(torch.equal, averages, other["streams"][dtype][0]))
    assert all((average - mean).norm() / mean.norm() < tolerance for average in averages)
    error = (torch.stack(averages).double().mean(0) - mean).norm() / mean.norm()
    assert error < max(1e-6, (averages[0] - mean).norm() / mean.norm() / 2)
    sent = [rank["streams"][dtype][1] for rank in on_machines]
    assert sent[1] == sent[3] == 0 and sum(sent) == 20 * 3000 * 2 * bytes_sent  # only the first rank of each machine


# -----------------------------------------------------------------------------
# how much is sent


def test_one_all_reduce_of_the_update_and_the_weight(three):
    for rank in three:
        assert rank["calls"] == [("all_reduce", 5)] * 2  # two rounds of fedavg, 4 parameters


def test_plain_mean_by_one_all_reduce(three):
    for number, rank in enumerate(three):
        assert rank["plain"]["values"] == [[3.0, 3.0], [4.0], [number, number]]  # what is frozen is not shared
        assert rank["plain"]["calls"] == [("all_reduce", 4)]  # 3 parameters and the weight
        assert rank["plain"]["error"] == "world_size is 4, but there are 3 ranks"


@pytest.mark.parametrize(("dtype", "width"), [("float32", 4), ("bfloat16", 2), ("int8", 1)])
def test_bytes_are_those_of_the_clients_updates(dtype, width):
    """Of 2 clients; the scales of int8 are 4 bytes for each CODE_BLOCK numbers."""
    comm, size = Communicator(0, 1, average_dtype=dtype), 3 * CODE_BLOCK + 7
    turns = [Update(client, 1.0, torch.randn(size), {}) for client in range(2)]
    expected = 2 * (width * size + (4 * 4 if dtype == "int8" else 0))
    for strategy in (utils.fedavg, utils.median):
        comm.bytes_sent = 0
        strategy(Clients(comm, turns, torch.zeros(size)), {})
        assert comm.bytes_sent == expected


def test_even_sizes():
    assert even_sizes(11, 4) == [3, 3, 3, 2] and even_sizes(2, 3) == [1, 1, 0]


# -----------------------------------------------------------------------------
# narrow dtypes


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("strategy", ["fedavg", "median"])
def test_narrow_updates_are_the_same_whoever_plays_whom(three, shuffled, dtype, strategy):
    """Each client's codes travel for themselves, so 1, 2 and 3 ranks come to the same bits; both rounds are near."""
    alone = average_narrow(0, 1, dtype)[strategy]
    for rank in [*three, *shuffled]:
        assert all(map(torch.equal, alone, rank["narrow"][dtype][strategy]))
    updates, weights = narrow_updates(), torch.arange(1.0, 6.0)
    expected = updates.median(dim=0).values
    if strategy == "fedavg":
        expected = (weights[:, None] * updates).sum(dim=0) / weights.sum()
    assert all(1e-4 < (average - expected).norm() / expected.norm() < 0.03 for average in alone)
    assert not torch.equal(*alone)  # of the second round: what the first has kept back is in it


def average_twice(update, dtype, strategy=utils.fedavg):
    """Two rounds with the same update of one client; returns the averages, and what the client has kept back."""
    residuals, averages = {}, []
    for _ in range(2):
        turns = [Update(0, 1.0, update, residuals)]
        clients = Clients(Communicator(0, 1, average_dtype=dtype), turns, torch.zeros(len(update)))
        averages.append(strategy(clients, {}))
    return averages, residuals


def test_int8_by_hand():
    """A block with the largest number 254 has steps of 2: of 3.2 it sends 4 (up from 1.6 steps), and keeps -0.8.

    The next time, 3.2 - 0.8 = 2.4 are 1.2 steps: it sends 2, and keeps 0.4. Both are bfloat16 numbers.
    """
    update = torch.zeros(CODE_BLOCK)
    update[0], update[1], update[2] = 254, 3.2, -2
    averages, residuals = average_twice(update, "int8")
    assert averages[0][:4].tolist() == [254, 4, -2, 0] and averages[1][:4].tolist() == [254, 2, -2, 0]
    (kept,) = residuals.values()
    assert kept[:4].tolist() == pytest.approx([0, 0.4, 0, 0], abs=1e-5)


def test_bfloat16_by_hand():
    """Above 256, bfloat16 has steps of 2: of 257.25 it sends 258, and keeps -0.75; then of 256.5 it sends 256."""
    averages, residuals = average_twice(torch.full((CODE_BLOCK,), 257.25), "bfloat16")
    assert [average.unique().tolist() for average in averages] == [[258], [256]]
    assert next(iter(residuals.values())).unique().tolist() == [0.5]


def test_short_vectors_are_sent_as_they_are():
    update = torch.randn(CODE_BLOCK - 1)
    averages, residuals = average_twice(update, "int8")
    assert torch.equal(averages[0], update) and torch.equal(averages[1], update) and not residuals


def test_a_stretch_of_codes_is_decoded_with_its_own_scales():
    """Stretches begin and end anywhere in a block; each block has a scale of its own."""
    vector = torch.randn(4 * CODE_BLOCK + 9) * torch.logspace(-3, 3, 4 * CODE_BLOCK + 9)
    codes, scales = encode(vector, "int8", residuals := {}, "name")
    rounded = vector - residuals["name"]
    for first, last in ((0, len(vector)), (0, 5), (1000, 1030), (CODE_BLOCK, 2 * CODE_BLOCK), (3000, len(vector))):
        decoded = decode(codes[first:last], scales, first)
        assert torch.allclose(decoded, rounded[first:last], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["fedavg", "median", "krum"])
def test_what_is_sent_in_the_long_run_is_what_was_meant(name):
    torch.manual_seed(0)
    update = torch.randn(3 * CODE_BLOCK + 7)
    averages, residuals = average_twice(update, "int8", utils.AGGREGATORS[name])
    (kept,) = residuals.values()
    # but for what the average loses on its way back as bfloat16, 2^-9 of it
    assert (sum(averages) + kept - 2 * update).abs().max() <= 2**-8 * update.abs().max()
    assert kept.abs().max() > 0


def test_each_sum_and_each_half_has_residuals_of_its_own():
    """geometric_median sums several times a round, and RoLoRA shares A and B in turn."""
    residuals = {}
    for part in ("lora_A", "lora_B"):
        turns = [Update(client, 1.0, torch.randn(CODE_BLOCK), residuals) for client in range(1)]
        clients = Clients(Communicator(0, 1, average_dtype="int8"), turns, torch.zeros(CODE_BLOCK), part=part)
        utils.geometric_median(clients, {}, weiszfeld_iterations=2)
    assert len(residuals) == 2 * 3 and all(name.split()[0] in ("lora_A", "lora_B") for name in residuals)


# -----------------------------------------------------------------------------
# messages


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("late", "TimeoutError: no sign of rank 2 for 0.02 minutes (--timeout)"),
        ("gone", "ConnectionError: rank 2 is gone"),
    ],
)
def test_meet_names_the_rank_that_is_missing(tmp_path, how, message):
    args = (str(tmp_path), how)
    processes = mp.start_processes(meeting_rank, args=args, nprocs=3, start_method="forkserver", join=False).processes
    for process in processes:
        process.join()
    first, second = (torch.load(tmp_path / f"meeting_{rank}.pt") for rank in range(2))
    assert first["messages"] == second["messages"] == ["of rank 0", "of rank 1", "of rank 2"]
    assert first["error"] == message and "error" in second
    assert first["seconds"] < 3 and (how == "late") == (first["seconds"] > 1)


def test_one_rank_alone_needs_no_process_group():
    comm = Communicator(0, 1)
    assert not torch.distributed.is_initialized() and comm.meet("hello") == ["hello"]
    comm.broadcast(vector := torch.ones(3))
    comm.all_reduce(vector)
    assert vector.tolist() == [1, 1, 1]
