"""The five faults of the loop that everybody writes first; each test fails when its fault comes back."""

import torch

import utils


def test_1_ranks_train_alone_under_a_launchers_environment(traced):
    folder, ranks = traced
    for trace in ranks:
        assert trace["processes"] == 1
        assert trace["wrapped"] == "PeftModelForCausalLM"  # not DistributedDataParallel
    for mine, other in zip(ranks[0]["updates"], ranks[1]["updates"]):
        assert not torch.equal(mine, other)  # DDP would have made them equal
    assert torch.equal(ranks[0]["end"], ranks[1]["end"])
    assert not set(flat(ranks[0]["batches"])) & set(flat(ranks[1]["batches"]))


def test_2_one_local_step_learns_and_the_curve_spans_the_run(traced):
    folder, ranks = traced
    assert all(update.norm() > 1e-3 for update in ranks[0]["updates"])
    first, second, third = ranks[0]["learning_rates"]
    assert first == second / 2 and 0 < third < second  # 2 warm-up steps, then a cosine: warmed up once, not per round
    assert [entry["learning_rate"] for entry in utils.read_rounds(folder)] == [first, second, third]


def test_3_every_round_goes_on_in_the_data(traced):
    folder, ranks = traced
    rows = flat(ranks[1]["batches"])
    assert len(ranks[1]["batches"]) == 3 and len(set(rows)) == len(rows) == 18  # 20 rows, 2 of them held out
    assert len(set(flat(ranks[0]["batches"]))) == 18  # of 19


def test_4_all_ranks_start_from_the_same_adapter(traced):
    folder, ranks = traced
    assert not torch.equal(ranks[0]["own_start"], ranks[1]["own_start"])  # or else this test could not fail
    assert torch.equal(ranks[0]["start"], ranks[1]["start"])


def test_5_one_collective_of_the_adapter_a_round(traced):
    folder, ranks = traced
    size = ranks[0]["start"].numel()
    measured = ["all_gather_object", "all_to_all_single", "all_reduce"]  # the aggregation error, as it is evaluated
    names = ["broadcast"] + 3 * (["all_reduce"] + measured)
    calls = ranks[0]["collectives"]
    assert [name for name, _ in calls] == names  # from the questions before training to its end, and none besides
    assert {numel for name, numel in calls if name == "all_reduce"} == {size + 1, 2}  # with the weight


def test_average_against_float64(traced):
    """The final adapter on disk, recomputed in float64 from the updates of each client and their unequal weights."""
    from safetensors.torch import load_file

    folder, ranks = traced
    weights = [trace["weights"][0] for trace in ranks]
    assert weights == [19, 18]
    expected = ranks[0]["start"].double()
    for updates in zip(*(trace["updates"] for trace in ranks)):
        expected += sum(w * update.double() for w, update in zip(weights, updates)) / sum(weights)
    saved = load_file(folder / "federated_global_model" / "adapter_model.safetensors")
    actual = torch.cat([saved[name.replace(".default", "")].reshape(-1) for name in ranks[0]["names"]])
    assert actual.dtype == torch.float32 and ranks[0]["dtypes"] == {torch.float32}
    assert (actual - expected).abs().max() <= 1e-6


def flat(batches):
    return [row for batch in batches for row in batch]
