"""Who gets which rows, who plays when, and the lists of losses."""

import json

import datasets
import numpy as np
import pytest

import utils

# -----------------------------------------------------------------------------
# splits

LABELS = np.array(["a"] * 60 + ["b"] * 30 + ["c"] * 10)
ROWS = utils.split_evenly(100, 1, seed=3)[0]


def test_partition_holds_every_row_once_and_evenly():
    rows = datasets.Dataset.from_dict({"id": list(range(103))})
    parts = [utils.partition_dataset(rows, rank, 8)["id"] for rank in range(8)]
    assert sorted(row for part in parts for row in part) == list(range(103))
    assert {len(part) for part in parts} == {12, 13}
    assert list(parts[0]) == list(utils.partition_dataset(rows, 0, 8)["id"]) != list(range(13))
    assert list(parts[0]) != list(utils.partition_dataset(rows, 0, 8, seed=1)["id"])


@pytest.mark.parametrize("kind", ["iid", "dirichlet", "column", "quantity"])
def test_every_row_goes_to_one_client_and_the_same_every_time(kind):
    size = 3 if kind == "column" else 6
    parts = utils.partition_rows(ROWS, size, kind, LABELS, alpha=0.5, seed=3)
    assert sorted(np.concatenate(parts)) == list(range(100)) and len(parts) == size
    again = utils.partition_rows(ROWS, size, kind, LABELS, alpha=0.5, seed=3)
    assert [part.tolist() for part in parts] == [part.tolist() for part in again]


def test_split_is_the_same_on_every_machine():
    """The split of 12 rows, written down once: numpy's generator is part of what a seed promises."""
    parts = utils.partition_rows(utils.split_evenly(12, 1, 5)[0], 3, "dirichlet", ["x", "y"] * 6, alpha=0.5, seed=5)
    assert [part.tolist() for part in parts] == [[6, 10, 4, 0, 2], [8, 9], [11, 1, 3, 7, 5]]


def test_iid_is_partition_dataset():
    rows = datasets.Dataset.from_dict({"id": list(range(100))})
    parts = utils.partition_rows(np.concatenate(utils.split_evenly(100, 7, seed=3)), 7)
    assert [part.tolist() for part in parts] == [utils.partition_dataset(rows, k, 7, seed=3)["id"][:] for k in range(7)]


def test_column_gives_a_client_per_value():
    parts = utils.partition_rows(ROWS, 3, "column", LABELS)
    assert [set(LABELS[part]) for part in parts] == [{"a"}, {"b"}, {"c"}]


def test_quantity_is_a_power_law():
    # 2 rows each, and 92 rows by 1 : 1/2 : 1/3 : 1/4, that is 44.16, 22.08, 14.72 and 11.04
    assert [len(part) for part in utils.partition_rows(ROWS, 4, "quantity")] == [46, 24, 17, 13]


def test_small_alpha_means_few_labels():
    names = np.array(["a", "b", "c"])

    def largest_share(alpha):
        parts = utils.partition_rows(np.arange(9000), 6, "dirichlet", np.tile(names, 3000), alpha, seed=1)
        shares = []
        for part in parts:
            _, counts = np.unique(names[part % 3], return_counts=True)
            shares.append(counts.max() / len(part))
        return np.mean(shares)

    assert largest_share(0.2) > 0.7 and largest_share(1000) < 0.36


# -----------------------------------------------------------------------------
# who plays when


def test_schedule_reads_every_row_once_an_epoch():
    order = utils.schedule_rows(10, 25, seed=3)
    assert sorted(order[:10]) == sorted(order[10:20]) == list(range(10)) and len(order) == 25
    assert list(order[:10]) != list(order[10:20])
    assert np.array_equal(order[:20], utils.schedule_rows(10, 20, seed=3))  # a longer run begins with the same rows
    assert len(utils.schedule_rows(10, 0, seed=3)) == 0


@pytest.mark.parametrize(("num_clients", "drawn"), [(1, 1), (8, 8), (10, 4), (100, 9), (1000, 1000)])
def test_plan(num_clients, drawn):
    plans = {size: utils.plan_rounds(num_clients, drawn, 6, size, seed=4) for size in (1, 2, 3) if size <= drawn}
    for size, plan in plans.items():
        holder = {}
        for number, (shares, moves) in enumerate(plan):
            assert max(map(len, shares)) - min(map(len, shares)) <= 1 and min(map(len, shares)) >= 1
            clients = sorted(client for share in shares for client in share)
            assert len(set(clients)) == drawn and set(clients) <= set(range(num_clients))
            assert clients == sorted(plans[1][number][0][0])  # the draw does not depend on the ranks
            assert clients == plan[number].clients()
            now = {client: rank for rank, share in enumerate(shares) for client in share}
            assert sorted(moves) == sorted((c, holder[c], r) for c, r in now.items() if holder.get(c, r) != r)
            holder |= now
    if drawn < num_clients:
        assert plans[1][0] != plans[1][1]
    assert plans[1] != utils.plan_rounds(num_clients, drawn, 6, 1, seed=5) or drawn == num_clients


def test_clients_stay_on_their_machine_if_there_is_room():
    """Of the moves of 30 rounds on 4 ranks, fewer are between machines where ranks 0 and 1, 2 and 3 share one."""

    def moves_between(machine_of_rank):
        plan = utils.plan_rounds(40, 16, 30, 4, seed=1, machine_of_rank=machine_of_rank)
        moves = [(source // 2, target // 2) for played in plan for _, source, target in played.moves]
        return sum(source != target for source, target in moves)

    assert moves_between([0, 0, 1, 1]) < moves_between(None)


# -----------------------------------------------------------------------------
# losses on disk


def test_losses_are_appended(tmp_path):
    path = tmp_path / "client_0_train_loss.json"
    for loss in (0.5, float("nan"), 1.5):
        utils.append_loss_to_file(path, loss)
    assert json.loads(path.read_text()) == [0.5, None, 1.5]
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_whole_at_any_time(tmp_path, monkeypatch):
    """If the new content cannot be written, the old one stays."""
    path = tmp_path / "losses.json"
    utils.write_aside(path, "[1]")

    def fail(*args):
        raise OSError

    monkeypatch.setattr(utils.os, "replace", fail)
    with pytest.raises(OSError):
        utils.append_loss_to_file(path, 2.0)
    assert path.read_text() == "[1]"
