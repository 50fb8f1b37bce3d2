"""--dry_run: what it counts is exact, and nothing of it needs weights."""

import numpy as np
import pytest
import torch
from conftest import run_main
from transformers import LlamaConfig, LlamaForCausalLM

import main
from fllama import estimate
from fllama.model import add_lora


def test_dry_run(tmp_path, hub):
    """From a hub, without the weights; what is known exactly is that."""
    before = len(hub.requests)
    flags = "--dry_run --num_clients 16 --num_rounds 40 --model_name org/tiny --average_dtype bfloat16".split()
    process = run_main(
        *flags, "--output_dir", tmp_path / "out", HF_ENDPOINT=hub.address, HF_HOME=str(tmp_path / "home")
    )
    assert process.returncode == 0, process.stderr
    paths = [path for _, path, _ in hub.requests[before:]]
    assert not (tmp_path / "out").exists()
    assert any(path.endswith("config.json") for path in paths) and not any("safetensors" in path for path in paths)
    output = " ".join(process.stdout.split())
    assert "bytes 0.3 MB per client and round, as bfloat16" in output  # 163,840 parameters
    assert "LoRA 0.2 M" in output and "rows 3,800 of 74 tokens" in output
    assert "round 8 local steps x 4 rows a client" in output and "every 8 round(s)" in output
    assert "run 40 rounds" in output


def test_elements_that_a_layer_saves():
    """What a layer saves for the backward pass, counted by torch, on models whose sizes differ one by one."""

    def count(config):
        args = main.parse_args(["--lora_r", "8", "--no-load_in_4bit"])
        model = add_lora(args, LlamaForCausalLM(config))
        own, saved = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}, {}

        def pack(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() / 4
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            kept = model.get_base_model().model(input_ids=torch.arange(1, 65)[None], use_cache=False)
        assert kept is not None
        return sum(size for pointer, size in saved.items() if pointer not in own) / 64

    for hidden, inner, heads, keys in ((32, 96, 4, 4), (64, 96, 4, 4), (32, 128, 4, 4), (32, 96, 2, 1)):
        sizes = {"hidden_size": hidden, "intermediate_size": inner, "vocab_size": 100}
        sizes |= {"num_attention_heads": heads, "num_key_value_heads": keys}
        two, four = (LlamaConfig(**sizes, num_hidden_layers=layers) for layers in (2, 4))
        assert (count(four) - count(two)) / 2 == estimate.saved_elements(two, 8)


CONFIG = {"vocab_size": 100, "hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 4}


def test_count_of_parameters():
    linear = 3 * (4 * 32 * 32 + 3 * 32 * 96)
    config = LlamaConfig(**CONFIG, num_hidden_layers=3)
    assert estimate.count_parameters(config) == (linear, 2 * 100 * 32 + 7 * 32, 32 * 96)  # embeddings and norms


def test_tokens_of_a_batch_by_hand():
    """Rows are padded to the longest of their batch; packs are as long as --max_length, whatever is in them."""
    lengths, answers = np.array([10, 30]), np.array([2, 4])
    args = main.parse_args(["--per_device_train_batch_size", "1"])
    tokens, learned = estimate.tokens_of_batch(args, lengths, answers)
    assert 17 < tokens < 23 and learned == 3
    tokens, _ = estimate.tokens_of_batch(main.parse_args(["--per_device_train_batch_size", "8"]), lengths, answers)
    assert 8 * 29 < tokens <= 8 * 30
    args = main.parse_args("--packing --max_length 64 --per_device_train_batch_size 2".split())
    assert estimate.tokens_of_batch(args, lengths, answers) == (128, 128 * 3 / 20)


@pytest.mark.parametrize(
    ("flags", "sent"),
    [
        ("", 4),
        ("--average_dtype bfloat16", 2),
        ("--average_dtype int8", 1 + 4 / 1024),
        ("--lora_variant ffa", 2),
        ("--scaffold", 8),
        ("--aggregator none", 0),
        ("--centralized", 0),
    ],
)
def test_bytes_that_a_client_sends(flags, sent):
    config, args = LlamaConfig(**CONFIG, num_hidden_layers=3), main.parse_args(flags.split())
    numbers = estimate.estimate(args, config, [10, 30], [2, 4], num_gpus=0)
    assert numbers["sent"] == pytest.approx(sent * numbers["parameters"][2])


def test_memory_by_hand():
    """LoRA of rank 16 on 3 layers: 3 (8 32 + 3 (32 + 96)) 16 numbers, 12 bytes of each, and 8 of AdamW's moments."""
    config, lora = LlamaConfig(**CONFIG, num_hidden_layers=3), 3 * 16 * (8 * 32 + 3 * (32 + 96))
    flags = "--world_size 2 --num_clients 8 --clients_per_round 6 --no-load_in_4bit --num_rounds 2".split()
    numbers = estimate.estimate(main.parse_args(flags), config, [10, 10], [2, 2], num_gpus=0)
    linear, others, _ = numbers["parameters"]
    assert numbers["parameters"][2] == lora
    assert numbers["memory"]["weights"] == 4 * (linear + others) and numbers["memory"]["adapter"] == 12 * lora
    assert numbers["memory"]["optimizer"] == 8 * lora and numbers["clients"] == 8 * 8 * lora
    assert numbers["tokens"] == 6 * 8 * 4 * 10 and numbers["memory"]["averaging"] == 24 * lora
    in_4bit = estimate.estimate(main.parse_args([]), config, [10, 10], [2, 2], num_gpus=1)
    assert in_4bit["memory"]["weights"] == pytest.approx(0.516 * linear + 2 * others)
