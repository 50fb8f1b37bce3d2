"""Averaging, by hand, in three processes."""

import pytest
import torch
import torch.multiprocessing as mp
from workers import average_rank

VALUES = [[[1.0, 2.0], [3.0]], [[3.0, 6.0], [0.0]], [[5.0, 1.0], [9.0]]]  # client -> its two tensors
WEIGHTS = [1.0, 2.0, 5.0]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("average")
    mp.start_processes(average_rank, args=(str(folder), VALUES, WEIGHTS), nprocs=3, start_method="forkserver")
    return [torch.load(folder / f"average_{rank}.pt") for rank in range(3)]


def test_plain_mean(results):
    for rank, result in enumerate(results):
        assert result["plain"] == [[3.0, 3.0], [4.0], [rank, rank]]  # what is frozen is not shared


def test_fedavg_weighs_by_rows(results):
    # (1*1 + 2*3 + 5*5) / 8, (1*2 + 2*6 + 5*1) / 8, (1*3 + 2*0 + 5*9) / 8
    for result in results:
        assert torch.cat(list(map(torch.tensor, result["weighted"]))).tolist() == pytest.approx([4.0, 2.375, 6.0])
        assert result["update"].tolist() == pytest.approx([3.0, 1.375, 5.0])  # all clients started from ones
    # client 0 moved by (0, 1, 2): (3, 0.375, 3) from the average
    assert results[0]["distance"] == pytest.approx((3**2 + 0.375**2 + 3**2) ** 0.5)


def test_one_all_reduce_each(results):
    assert results[0]["calls"] == [("all_reduce", 4), ("all_reduce", 4)]  # 3 parameters and the weight
