"""Clients and splits: who gets which rows, who plays when, and what a client takes with it."""

import argparse
import functools
import json
import os
import subprocess
import sys

import datasets
import numpy as np
import pytest
import report
import torch
from conftest import ROOT, read_adapters
from workers import gradients_rank, layouts_rank, resume_rank

import federated
import main
import utils

# -----------------------------------------------------------------------------
# splits

LABELS = np.array(["a"] * 60 + ["b"] * 30 + ["c"] * 10)
ROWS = utils.split_evenly(100, 1, seed=3)[0]


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
    def largest_share(alpha):
        parts = utils.partition_rows(np.arange(9000), 6, "dirichlet", np.tile(["a", "b", "c"], 3000), alpha, seed=1)
        return np.mean(
            [np.unique(np.array(["a", "b", "c"])[part % 3], return_counts=True)[1].max() / len(part) for part in parts]
        )

    assert largest_share(0.2) > 0.7 and largest_share(1000) < 0.36


def test_table_of_clients_rows_and_labels():
    args = argparse.Namespace(partition="column", partition_column="site", dirichlet_alpha=0.5, seed=1)
    record = report.partition_record(
        args, [np.array([0, 2]), np.array([1])], [3], [10, 11, 12, 13], ["x", "y", "x", "y"]
    )
    assert record["clients"] == [
        {"client": 0, "rows": [10, 12], "labels": {"x": 2}},
        {"client": 1, "rows": [11], "labels": {"y": 1}},
    ]
    assert record["held_out"] == [13]
    assert [line.split() for line in report.partition_table(record).splitlines()] == [
        ["client", "rows", "x", "y"], ["0", "2", "2", "0"], ["1", "1", "0", "1"],
    ]  # fmt: skip


# -----------------------------------------------------------------------------
# who plays when


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
            now = {client: rank for rank, share in enumerate(shares) for client in share}
            assert sorted(moves) == sorted((c, holder[c], r) for c, r in now.items() if holder.get(c, r) != r)
            holder |= now
    if drawn < num_clients:
        assert plans[1][0] != plans[1][1]
    assert plans[1] != utils.plan_rounds(num_clients, drawn, 6, 1, seed=5) or drawn == num_clients


def test_a_client_goes_on_where_its_data_stopped(tmp_path):
    """Over all its turns, on whatever rank, a client reads its own rows in the order of its schedule."""
    rows = datasets.Dataset.from_dict({"id": list(range(200)), "length": [1] * 200})
    datasets.DatasetDict(train=rows, held_out=rows).save_to_disk(tmp_path)
    parts = [part.tolist() for part in utils.split_evenly(200, 10, seed=1)]
    (tmp_path / "parts.json").write_text(
        json.dumps(
            {
                "train": [part[2:] for part in parts],
                "held_out": [part[:2] for part in parts],
                "global": [],
                "scored": [],
            }
        )
    )
    flags = "--num_clients 10 --clients_per_round 5 --num_rounds 8 --local_steps 2 --per_device_train_batch_size 3"
    args = main.parse_args([*flags.split(), "--world_size", "2"])
    args.data_path, args.resume_from = str(tmp_path), None
    ranks = [federated.load_client_data(rank, args) for rank in range(2)]
    read = {}
    for number in range(1, 9):
        for data in ranks:
            for index, (turn, client, _) in enumerate(data.turns):
                if turn == number:
                    read.setdefault(client, []).extend(data.train["id"][index * 6 : (index + 1) * 6])
    assert sum(map(len, read.values())) == 8 * 5 * 6 and max(map(len, read.values())) > 18  # more than an epoch
    for client, ids in read.items():
        own = np.array(parts[client][2:])
        assert ids == own[utils.schedule_rows(18, len(ids), [42, client])].tolist()
        assert set(ranks[0].own_held_out(client)["id"]) == set(parts[client][:2])


# -----------------------------------------------------------------------------
# what a client takes with it

STATEFUL = {name: f"--aggregator {name}" for name in ("fedavgm", "diloco", "fedadagrad", "fedadam", "fedyogi", "none")}
STATEFUL |= {
    "scaffold": "--scaffold",
    "fedsa": "--lora_variant fedsa",
    "rolora_fedadam": "--lora_variant rolora --aggregator fedadam",
    "dropout": "--lora_dropout 0.2",
    "int8": "--average_dtype int8 --client_state reset --packing --max_length 256",
    "one_each": "--aggregator fedadam --num_clients 2 --clients_per_round 2",
    "one_each_fedsa": "--lora_variant fedsa --scaffold --num_clients 2 --clients_per_round 2",
}


@pytest.fixture(scope="module")
def resumed(small_inputs, tmp_path_factory):
    """A folder with three runs of every case, two of them resumed before and after the last round; clients move."""
    folder = tmp_path_factory.mktemp("resumed")
    flags = "--world_size 2 --num_clients 8 --clients_per_round 4 --num_rounds 4 --seed 6 --local_steps 1".split()
    flags += "--eval_rounds 1 --learning_rate 1e-2 --per_device_train_batch_size 1".split() + small_inputs
    target = functools.partial(resume_rank, flags, STATEFUL)
    main.main([*flags, "--output_dir", str(folder)], target=target)
    return folder


@pytest.mark.parametrize("name", STATEFUL)
def test_resume_of_everything_that_has_a_state(resumed, name):
    whole, half = utils.read_rounds(resumed / name), utils.read_rounds(resumed / f"{name}_half")
    assert len(whole) == len(half) == 4
    for key in ("digest", "train_loss", "eval_loss", "client_drift", "clients"):
        assert [entry[key] for entry in whole] == [entry[key] for entry in half], key
    for copy in ("half", "end"):
        assert torch.equal(read_adapters(resumed / name), read_adapters(resumed / f"{name}_{copy}"))
    assert utils.plan_rounds(8, 4, 4, 2, seed=6)[3][1]  # in the last round, clients have moved to the other rank


def test_terms_of_fedprox_and_scaffold(small_inputs, tmp_path):
    """3 clients, 3 rounds of 2 steps: mu (w - start), and mean of all clients' last mean gradients - one's own."""
    flags = "--world_size 1 --num_clients 3 --num_rounds 3 --local_steps 2 --scaffold --prox_mu 0.3".split()
    main.main([*flags, *small_inputs, "--output_dir", str(tmp_path)], target=gradients_rank)
    steps = torch.load(tmp_path / "gradients.pt")
    size = len(steps[0]["added"])
    own, total = {client: torch.zeros(size) for client in range(3)}, torch.zeros(size)
    for number in (1, 2, 3):
        for client in range(3):
            turn = [step for step in steps if (step["round"], step["client"]) == (number, client)]
            assert len(turn) == 2 and turn[0]["moved"].abs().max() == 0 < turn[1]["moved"].abs().max()
            for step in turn:
                expected = 0.3 * step["moved"] + total - own[client]
                assert torch.allclose(step["added"], expected, rtol=1e-4, atol=1e-6)
            # the gradients that SCAFFOLD averages are those of the loss and of FedProx's term
            own[client] = sum(step["before"] + 0.3 * step["moved"] for step in turn) / 2
        total = sum(own.values()) / 3
    assert total.norm() > 0


def test_scaffold_with_identical_clients_is_fedavg(small_inputs, sample_rows, tmp_path):
    """Clients with one and the same row have the same gradients, and nothing to correct; no self-check minds."""
    (tmp_path / "rows.jsonl").write_text(40 * (json.dumps(sample_rows[0]) + "\n"))
    flags = "--world_size 1 --num_clients 3 --num_rounds 3 --local_steps 2 --learning_rate 1e-2".split()
    flags += [*small_inputs[:2], "--dataset_path", str(tmp_path / "rows.jsonl")]
    cases = {"fedavg": "", "scaffold": "--scaffold"}
    target = functools.partial(layouts_rank, flags, cases)
    main.main([*flags, "--output_dir", str(tmp_path / "out")], target=target)
    fedavg, scaffold = (read_adapters(tmp_path / "out" / name) for name in cases)
    assert (fedavg - scaffold).norm() / fedavg.norm() <= 1e-6


# -----------------------------------------------------------------------------
# self-check


FAULTS = {
    "curve from zero": "✗ learns from the first step on: learning rate 0.00e+00",
    "ddp": "✗ no DDP: every rank trains a DistributedDataParallel of its own",
    "own start": "✗ same start: ",
    "own start --lora_variant=ffa": "✗ same start: ",
    "shared gradients": "✗ federated: 2 client(s) with 1 adapter(s) before the averaging, 1 after it",
    "same rows": "✗ fresh data next round: 0 of 2 rows of second turns are not in the first",
}


@pytest.fixture(scope="module")
def faulty(small_inputs, tmp_path_factory):
    """Exit code and output of a run with each of FAULTS, all in one program, as their ranks write to its output."""
    folder = tmp_path_factory.mktemp("faulty")
    flags = "--world_size 2 --num_rounds 2 --local_steps 1 --warmup_steps 1".split() + small_inputs
    (folder / "faulty.py").write_text(f"""
import functools, sys, main, workers
if __name__ == "__main__":
    for number, case in enumerate({list(FAULTS)}):
        fault, *more = case.split(" --")
        flags = {flags} + [f"--{{flag}}" for flag in more] + ["--output_dir", "{folder}/" + str(number)]
        code = 0
        try:
            main.main(flags, target=functools.partial(workers.faulty_rank, fault))
        except SystemExit as stop:
            code = stop.code
        print(f"exit code {{code}}\\n===", flush=True)
""")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    process = subprocess.run(
        [sys.executable, str(folder / "faulty.py")],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300,
    )  # fmt: skip
    return dict(zip(FAULTS, process.stdout.split("===\n")))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_failed_self_check_ends_the_run_with_exit_code_3(faulty, fault):
    output = faulty[fault]
    assert output.endswith("exit code 3\n"), output
    assert FAULTS[fault] in output and output.count("✗") == 1
    assert "main.py: a self-check failed, see its line" in output and "Traceback" not in output
