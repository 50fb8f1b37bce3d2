"""The plain mean, by hand, in three processes; the strategies are in test_strategies.py."""

import torch
import torch.multiprocessing as mp
from workers import average_rank

VALUES = [[[1.0, 2.0], [3.0]], [[3.0, 6.0], [0.0]], [[5.0, 1.0], [9.0]]]  # client -> its two tensors


def test_plain_mean_by_one_all_reduce(tmp_path):
    mp.start_processes(average_rank, args=(str(tmp_path), VALUES), nprocs=3, start_method="forkserver")
    for rank in range(3):
        result = torch.load(tmp_path / f"average_{rank}.pt")
        assert result["values"] == [[3.0, 3.0], [4.0], [rank, rank]]  # what is frozen is not shared
        assert result["calls"] == [("all_reduce", 4)]  # 3 parameters and the weight
