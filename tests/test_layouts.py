"""Who plays whom must not matter: 8 clients on 1, 2, 4 and 8 ranks train the same adapters."""

import functools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
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
    "reset": "--client_state reset",
    "dropout": "--lora_dropout 0.2",
}
SOME = {f"{name}_of_4": f"{CASES[name]} --clients_per_round 4" for name in ("fedavg", "fedsa", "scaffold", "none")}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, sample_rows):
    """A LLaMA of one layer with random weights, and short rows, as flags."""
    folder = tmp_path_factory.mktemp("inputs")
    rows = sorted(sample_rows, key=lambda row: len(row["context"]))[:80]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = AutoTokenizer.from_pretrained(main.EMBEDDED_MODEL)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return ["--model_name", str(folder / "model"), "--dataset_path", str(folder / "rows.jsonl")]


@pytest.fixture(scope="module")
def adapters(inputs, tmp_path_factory):
    """Every case on every number of ranks: case -> list of all tensors that were trained, as one vector."""
    folder = tmp_path_factory.mktemp("layouts")
    results = {}
    for world_size in (1, 2, 4, 8):
        cases = CASES | (SOME if world_size <= 4 else {})
        flags = [*FLAGS, *inputs, "--world_size", str(world_size)]
        main.main(
            [*flags, "--output_dir", str(folder / str(world_size))],
            target=functools.partial(layouts_rank, flags, cases),
        )
        for name in cases:
            results.setdefault(name, []).append(read_adapters(folder / str(world_size) / name))
    return results


def read_adapters(folder):
    files = sorted(Path(folder).glob("federated_global_model/*.safetensors"))
    files += sorted(Path(folder).glob("client_models/*/*.safetensors"))
    return torch.cat([tensor.reshape(-1) for file in files for _, tensor in sorted(load_file(file).items())])


@pytest.mark.parametrize("name", [*CASES, *SOME])
def test_the_same_adapters_on_any_number_of_ranks(adapters, name):
    first, *others = adapters[name]
    assert len(others) >= 2 and first.norm() > 0
    for other in others:
        assert (first - other).norm() / first.norm() <= 1e-5


def test_strategies_and_variants_differ(adapters):
    """Or else the test above would compare the same thing with itself."""
    sums = {name: results[0].double().sum().item() for name, results in adapters.items() if name != "fedsa_median"}
    assert len(set(sums.values())) == len(sums), sums
