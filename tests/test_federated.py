"""federated.py as a whole: the five faults of the loop that everybody writes first, who plays whom, and resume."""

import functools
import json

import pytest
import torch
from conftest import read_adapters
from runs import assert_same_rounds
from workers import gradients_rank, layouts_rank, resume_elsewhere_rank, resume_rank

import federated
import main
import utils
from fllama import runlog

# -----------------------------------------------------------------------------
# the five faults; each test fails when its fault comes back


def test_1_ranks_train_alone_under_a_launchers_environment(traced):
    folder, ranks = traced
    for trace in ranks:
        assert trace["processes"] == 1
        assert trace["wrapped"] == "PeftModelForCausalLM"  # not DistributedDataParallel
    for mine, other in zip(ranks[0]["updates"], ranks[1]["updates"], strict=True):
        assert not torch.equal(mine, other)  # DDP would have made them equal
    assert torch.equal(ranks[0]["end"], ranks[1]["end"])
    assert not set(flat(ranks[0]["batches"])) & set(flat(ranks[1]["batches"]))


def test_2_one_local_step_learns_and_the_curve_spans_the_run(traced):
    folder, ranks = traced
    assert all(update.norm() > 1e-3 for update in ranks[0]["updates"])
    first, second, third = ranks[0]["learning_rates"]
    assert first == second / 2 and 0 < third < second  # 2 warm-up steps, then a cosine: warmed up once, not per round
    assert [entry["learning_rate"] for entry in runlog.read_rounds(folder)] == [first, second, third]


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
    """In order: all that is sent from the first message to the last, and none besides."""
    folder, ranks = traced
    size = ranks[0]["start"].numel()
    message = [("monitored_barrier", None), ("all_gather_object", None)]
    start = message + [("broadcast", size)]
    scores_before = 2 * message  # answers, losses
    self_check = message
    norms = message
    average = [("all_reduce", size + 1)]  # with the weight
    measured = [("all_gather_object", None), ("all_to_all_single", size), ("all_reduce", 2)]  # the aggregation error
    reports = message
    checkpoint = 2 * message  # it is written, it is there
    a_round = norms + average + measured + reports + checkpoint
    scores_after = 3 * message  # answers, losses, scores of clients
    assert ranks[0]["collectives"][: -len(scores_after)] == start + scores_before + self_check + 3 * a_round
    assert ranks[0]["collectives"][-len(scores_after) :] == scores_after


def test_average_against_float64(traced):
    """The final adapter on disk, recomputed in float64 from the updates of each client and their unequal weights."""
    from safetensors.torch import load_file

    folder, ranks = traced
    weights = [trace["weights"][0] for trace in ranks]
    assert weights == [19, 18]
    expected = ranks[0]["start"].double()
    for updates in zip(*(trace["updates"] for trace in ranks), strict=True):
        expected += sum(w * update.double() for w, update in zip(weights, updates)) / sum(weights)
    saved = load_file(folder / "federated_global_model" / "adapter_model.safetensors")
    actual = torch.cat([saved[name.replace(".default", "")].reshape(-1) for name in ranks[0]["names"]])
    assert actual.dtype == torch.float32 and ranks[0]["dtypes"] == {torch.float32}
    assert (actual - expected).abs().max() <= 1e-6


def flat(batches):
    return [row for batch in batches for row in batch]


# -----------------------------------------------------------------------------
# who plays whom must not matter: 8 clients on 1, 2, 4 and 8 ranks train the same adapters

FLAGS = "--num_clients 8 --num_rounds 3 --local_steps 2 --per_device_train_batch_size 1 --learning_rate 1e-2".split()
FLAGS += "--eval_rounds 3 --save_rounds 3".split()
CASES = {name: f"--aggregator {name}" for name in utils.AGGREGATORS if name != "dp_fedavg"}  # it never is the same
CASES |= {variant: f"--lora_variant {variant}" for variant in utils.LORA_VARIANTS if variant != "lora"}
CASES |= {
    "rolora_fedadam": "--lora_variant rolora --aggregator fedadam",
    "fedsa_median": "--lora_variant fedsa --aggregator median",
    "prox": "--prox_mu 0.1",
    "scaffold": "--scaffold",
    "scaffold_prox_ffa": "--scaffold --prox_mu 0.1 --lora_variant ffa",
    "almost_no_prox": "--prox_mu 1e-12",
    "reset": "--client_state reset",
    "dropout": "--lora_dropout 0.2",
    "packing": "--packing --max_length 256",
    "bfloat16": "--average_dtype bfloat16",
    "int8": "--average_dtype int8",
    "int8_median": "--average_dtype int8 --aggregator median",
}
MOVING = "--clients_per_round 4 --num_rounds 4 --seed 6"  # so that clients move between ranks
SOME = {f"{name}_of_4": f"{CASES[name]} {MOVING}" for name in ("fedavg", "fedsa", "scaffold", "none", "int8")}
FEW = {
    name: CASES[name] for name in ("fedavg", "almost_no_prox", "scaffold", "dropout", "fedsa_median", "none", "int8")
}
FEW |= {"scaffold_of_4": SOME["scaffold_of_4"]}


@pytest.fixture(scope="module")
def run_layouts(small_inputs, tmp_path_factory):
    """A function that runs cases on a number of ranks, once; returns the folder that has a folder of each case."""

    @functools.cache
    def run(world_size, only_few):
        folder = tmp_path_factory.mktemp(f"layout_{world_size}")
        cases = FEW if only_few else CASES | (SOME if world_size <= 4 else {})
        flags = [*FLAGS, *small_inputs, "--world_size", str(world_size)]
        target = functools.partial(layouts_rank, flags, cases)
        main.main([*flags, "--output_dir", str(folder)], target=target)
        return folder

    return run


def assert_same_layout(folder, other, name):
    assert read_adapters(folder / name).norm() > 0
    assert_same_rounds(folder / name, other / name, same_ranks=False)


@pytest.mark.parametrize("name", FEW)
def test_the_same_adapters_on_two_ranks(run_layouts, name):
    assert_same_layout(run_layouts(1, True), run_layouts(2, True), name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CASES, *SOME])
def test_the_same_adapters_on_any_number_of_ranks(run_layouts, name):
    for world_size in (2, 4) if name in SOME else (2, 4, 8):
        assert_same_layout(run_layouts(1, False), run_layouts(world_size, False), name)


def test_fedprox_without_its_term_is_fedavg(run_layouts):
    fedavg, prox = (read_adapters(run_layouts(1, True) / name) for name in ("fedavg", "almost_no_prox"))
    assert (prox - fedavg).norm() / fedavg.norm() <= 1e-5


@pytest.mark.slow
def test_strategies_and_variants_differ(run_layouts):
    """Or else the tests above would compare the same thing with itself."""
    names = [name for name in [*CASES, *SOME] if name != "almost_no_prox"]
    sums = {name: read_adapters(run_layouts(1, False) / name).double().sum().item() for name in names}
    assert len(set(sums.values())) == len(sums), sums


# -----------------------------------------------------------------------------
# the terms of FedProx and SCAFFOLD


def test_terms_of_fedprox_and_scaffold(small_inputs, tmp_path):
    """3 clients, 3 rounds of 2 steps: mu (w - start), and mean of all clients' last mean gradients - one's own."""
    flags = "--world_size 1 --num_clients 3 --num_rounds 3 --local_steps 2 --scaffold --prox_mu 0.3".split()
    main.main([*flags, *small_inputs, "--output_dir", str(tmp_path)], target=gradients_rank)
    steps = torch.load(tmp_path / "gradients.pt")
    assert len(steps) == 3 * 3 * 2
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
# resume of everything that has a state, to the same bits

SHORT = "--world_size 2 --num_rounds 4 --seed 6 --local_steps 1 --eval_rounds 1".split()
SHORT += "--learning_rate 1e-2 --per_device_train_batch_size 1".split()
FOUR_OF_8 = "--num_clients 8 --clients_per_round 4"  # they move between the ranks
STATEFUL = {name: f"--aggregator {name}" for name in ("fedavgm", "diloco", "fedadagrad", "fedadam", "fedyogi", "none")}
STATEFUL |= {
    "scaffold": "--scaffold",
    "fedsa": "--lora_variant fedsa",
    "rolora_fedadam": "--lora_variant rolora --aggregator fedadam",
    "dropout": "--lora_dropout 0.2",
    "int8": "--average_dtype int8 --client_state reset --packing --max_length 256",
}
# batch -> (flags that all its cases share, as rows are dealt out once for all; cases; whether it is a slow one)
BATCHES = {
    "few": (
        FOUR_OF_8,
        {
            "much": "--scaffold --lora_variant ffa --aggregator fedadam --lora_dropout 0.2",
            "int8_fedsa": "--average_dtype int8 --lora_variant fedsa",
        },
    ),
    "all": (FOUR_OF_8, STATEFUL),
    "one_each": (
        "--num_clients 2 --clients_per_round 2",
        {"one_each": "--aggregator fedadam", "one_each_fedsa": "--lora_variant fedsa --scaffold"},
    ),
}
RESUMED = [("few", name) for name in BATCHES["few"][1]]
for batch in ("all", "one_each"):
    RESUMED += [pytest.param(batch, name, marks=pytest.mark.slow) for name in BATCHES[batch][1]]


@pytest.fixture(scope="module")
def resumed(small_inputs, tmp_path_factory):
    """A function that returns a folder with three runs of every case, two of them resumed: before and after the last
    round.
    """

    @functools.cache
    def run(batch):
        folder = tmp_path_factory.mktemp(f"resumed_{batch}")
        shared, cases = BATCHES[batch]
        flags = [*SHORT, *shared.split(), *small_inputs]
        main.main([*flags, "--output_dir", str(folder)], target=functools.partial(resume_rank, flags, cases))
        return folder

    return run


@pytest.mark.parametrize(("batch", "name"), RESUMED)
def test_resume_of_everything_that_has_a_state(resumed, batch, name):
    folder = resumed(batch)
    assert len(runlog.read_rounds(folder / name)) == 4
    assert read_adapters(folder / name).norm() > 0
    for copy in ("half", "end"):
        assert_same_rounds(folder / f"{name}_{copy}", folder / name)
    if batch != "one_each":
        assert utils.plan_rounds(8, 4, 4, 2, seed=6)[3].moves  # in the last round, clients have moved to another rank


@pytest.fixture(scope="module")
def resumed_elsewhere(small_inputs, resumed, tmp_path_factory):
    """A function that resumes the cases of a batch, before their last round, on another number of ranks."""

    @functools.cache
    def run(batch, world_size):
        folder = tmp_path_factory.mktemp(f"resumed_{batch}_{world_size}")
        shared, cases = BATCHES[batch]
        flags = [*SHORT, *shared.split(), *small_inputs, "--world_size", str(world_size)]
        target = functools.partial(resume_elsewhere_rank, flags, cases, str(resumed(batch)))
        main.main([*flags, "--output_dir", str(folder)], target=target)
        return folder

    return run


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 3, 4])
@pytest.mark.parametrize(("batch", "name"), [(batch, name) for batch in ("few", "all") for name in BATCHES[batch][1]])
def test_resume_on_more_or_fewer_ranks(resumed, resumed_elsewhere, batch, name, world_size):
    assert_same_rounds(resumed_elsewhere(batch, world_size) / name, resumed(batch) / name, same_ranks=False)


# -----------------------------------------------------------------------------
# small things


def test_bad_updates():
    assert federated.find_bad_updates({0: 1.0, 1: 2.0, 2: 3.0}) == {}
    assert federated.find_bad_updates({2: float("nan"), 0: 1.0, 1: float("inf")}) == {1: "not finite", 2: "not finite"}
    assert federated.find_bad_updates({0: 1.0, 1: 1000.0}) == {}
    assert federated.find_bad_updates({0: 1.0, 1: 1500.0}) == {1: "1,500 times as long as the median"}
    assert federated.find_bad_updates({0: 0.0, 1: 0.0, 2: 1.0}) == {}  # nothing is a multiple of nothing
    assert federated.find_bad_updates({0: float("nan")}) == {0: "not finite"}
