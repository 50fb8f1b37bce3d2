"""Who plays whom must not matter: 8 clients on 1, 2, 4 and 8 ranks train the same adapters."""

import functools

import pytest
from conftest import read_adapters
from workers import layouts_rank

import main
import utils

FLAGS = "--num_clients 8 --num_rounds 3 --local_steps 2 --per_device_train_batch_size 1 --learning_rate 1e-2".split()
FLAGS += "--eval_rounds 3 --save_rounds 3".split()
CASES = {name: f"--aggregator {name}" for name in utils.AGGREGATORS}
CASES |= {variant: f"--lora_variant {variant}" for variant in utils.LORA_VARIANTS if variant != "lora"}
CASES |= {
    "rolora_fedadam": "--lora_variant rolora --aggregator fedadam",
    "fedsa_median": "--lora_variant fedsa --aggregator median",
    "prox": "--prox_mu 0.1",
    "scaffold": "--scaffold",
    "almost_no_prox": "--prox_mu 1e-12",
    "reset": "--client_state reset",
    "dropout": "--lora_dropout 0.2",
    "packing": "--packing --max_length 256",
    "int8": "--average_dtype int8",
    "int8_median": "--average_dtype int8 --aggregator median",
}
MOVING = "--clients_per_round 4 --num_rounds 4 --seed 6"  # so that clients move between ranks
SOME = {f"{name}_of_4": f"{CASES[name]} {MOVING}" for name in ("fedavg", "fedsa", "scaffold", "none", "int8")}


@pytest.fixture(scope="module")
def adapters(small_inputs, tmp_path_factory):
    """Every case on every number of ranks: case -> list of all tensors that were trained, as one vector."""
    folder = tmp_path_factory.mktemp("layouts")
    results = {}
    for world_size in (1, 2, 4, 8):
        cases = CASES | (SOME if world_size <= 4 else {})
        flags = [*FLAGS, *small_inputs, "--world_size", str(world_size)]
        main.main(
            [*flags, "--output_dir", str(folder / str(world_size))],
            target=functools.partial(layouts_rank, flags, cases),
        )
        for name in cases:
            results.setdefault(name, []).append(read_adapters(folder / str(world_size) / name))
    return results


@pytest.mark.parametrize("name", [*CASES, *SOME])
def test_the_same_adapters_on_any_number_of_ranks(adapters, name):
    first, *others = adapters[name]
    assert len(others) >= 2 and first.norm() > 0
    for other in others:
        assert (first - other).norm() / first.norm() <= 1e-5


def test_fedprox_without_its_term_is_fedavg(adapters):
    fedavg = adapters["fedavg"][0]
    assert (adapters["almost_no_prox"][0] - fedavg).norm() / fedavg.norm() <= 1e-5


def test_strategies_and_variants_differ(adapters):
    """Or else the tests above would compare the same thing with itself."""
    sums = {name: results[0].double().sum().item() for name, results in adapters.items() if name != "almost_no_prox"}
    assert len(set(sums.values())) == len(sums), sums
