"""Options that save time, memory or bytes: packing, precision, narrow updates, and what --dry_run says of them."""

import functools

import datasets
import numpy as np
import pytest
import report
import torch
import torch.distributed as dist
from conftest import read_adapters, run_main
from workers import layouts_rank

import federated
import main
import utils

# -----------------------------------------------------------------------------
# packing


def make_rows(lengths):
    """Rows of so many tokens, every token of row k is k; the last two are the answer."""
    rows = [{"input_ids": [k] * n, "labels": [-100] * (n - 2) + [k] * 2} for k, n in enumerate(lengths)]
    return datasets.Dataset.from_list(rows)


def test_packs_hold_every_row_of_one_client_once():
    rows = make_rows([6, 3, 7, 4, 2, 5, 8, 3])
    packs, numbers = federated.pack_rows(rows, {4: np.array([0, 1, 2, 3]), 7: np.array([4, 5, 6, 7])}, max_length=10)
    # best fit, the longest first: 7 and 3, 6 and 4; 8 and 2, 5 and 3
    assert [packs[int(i)]["seq_lengths"] for i in numbers[4]] == [[7, 3], [6, 4]]
    assert [packs[int(i)]["seq_lengths"] for i in numbers[7]] == [[8, 2], [5, 3]]
    assert [sorted(set(packs[int(i)]["input_ids"])) for i in numbers[4]] == [[1, 2], [0, 3]]
    assert [sorted(set(packs[int(i)]["input_ids"])) for i in numbers[7]] == [[4, 6], [5, 7]]


def trainer_of(folder, *flags):
    """The trainer of rank 0 for the embedded model, and 8 of its rows that have other lengths."""
    from transformers import AutoTokenizer

    args = main.parse_args(["--output_dir", str(folder), "--num_rounds", "1", "--world_size", "1", *flags])
    args.model_path, args.data_path, device = args.model_name, str(folder / "data"), torch.device("cpu")
    tokenizer = AutoTokenizer.from_pretrained(args.model_path)
    rows = datasets.load_dataset("json", data_files=f"{main.EMBEDDED_DATA}/train.jsonl")["train"].select(range(8))
    columns = rows.column_names
    rows = rows.map(lambda row: utils.tokenize_row(row, tokenizer, 1024), remove_columns=columns, keep_in_memory=True)
    rows = rows.map(lambda row, i: {"input_ids": row["input_ids"][i:], "labels": row["labels"][i:]}, with_indices=True)
    packs, _ = federated.pack_rows(rows, {0: np.arange(8)}, 256)
    more = {"train": packs, "unread": range(len(packs)), "lengths": None}
    data = federated.ClientData(*[None] * 7, turns=[(1, 0, 0)], own=None, order=None, **more)
    torch.manual_seed(0)
    model = federated.load_model(args, device)
    for parameter in federated.lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.1)  # else the adapter does nothing yet
    return federated.build_trainer(0, args, device, model, tokenizer, data), rows, packs


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_do_not_see_each_other(tmp_path, attention):
    """The loss of a batch of packs is that of the rows one by one, and so is its gradient."""
    trainer, rows, packs = trainer_of(tmp_path, "--packing", "--attn_implementation", attention)

    def loss_and_gradient(batches):
        trainer.model.zero_grad()
        losses = [trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=1) for batch in batches]
        sum(losses).backward()
        return sum(losses).item(), torch.cat([p.grad.view(-1) for p in utils.shared_parameters(trainer.model)])

    alone, expected = loss_and_gradient(
        {"input_ids": torch.tensor([row["input_ids"]]), "labels": torch.tensor([row["labels"]]),
         "attention_mask": torch.ones(1, len(row["input_ids"]), dtype=torch.long)} for row in rows
    )  # fmt: skip
    sequences = [{name: pack[name] for name in ("input_ids", "labels", "seq_lengths")} for pack in packs]
    assert len(sequences) < 8 and len({len(pack["input_ids"]) for pack in sequences}) > 1  # one is padded
    packed, gradient = loss_and_gradient([trainer.data_collator(sequences)])
    assert packed == pytest.approx(alone, rel=1e-5)
    assert (gradient - expected).norm() / expected.norm() <= 1e-5


# -----------------------------------------------------------------------------
# runs


@pytest.fixture(scope="module")
def adapters(small_inputs, tmp_path_factory):
    """What 4 clients on 2 ranks come to with each of these flags: case -> (all tensors, entries of rounds.jsonl)."""
    folder = tmp_path_factory.mktemp("options")
    cases = {
        "default": "",
        "checkpointing": "--gradient_checkpointing",
        "bfloat16": "--torch_dtype bfloat16",
        "eager": "--attn_implementation eager",
        "packing": "--packing --max_length 256",
        "send_bfloat16": "--average_dtype bfloat16",
        "send_int8": "--average_dtype int8",
        "send_int8_svd": "--average_dtype int8 --aggregator svd",
    }
    flags = "--world_size 2 --num_clients 4 --num_rounds 4 --local_steps 2 --learning_rate 1e-2".split() + small_inputs
    main.main([*flags, "--output_dir", str(folder)], target=functools.partial(layouts_rank, flags, cases))
    return {name: (read_adapters(folder / name), utils.read_rounds(folder / name)) for name in cases}


def distance(adapters, name):
    default = adapters["default"][0]
    return ((adapters[name][0] - default).norm() / default.norm()).item()


def test_what_saves_memory_does_not_change_the_result(adapters):
    assert distance(adapters, "checkpointing") <= 1e-5 and distance(adapters, "eager") <= 1e-3


def test_what_rounds_changes_it_a_little(adapters):
    assert 1e-4 < distance(adapters, "bfloat16") < 0.3
    assert 1e-6 < distance(adapters, "send_bfloat16") < 1e-2 and 1e-6 < distance(adapters, "send_int8") < 1e-2


def test_packs_train_on_more_tokens_a_step(adapters):
    default, packing = (sum(entry["tokens"] for entry in adapters[name][1]) for name in ("default", "packing"))
    assert packing > 1.5 * default


def test_bytes_are_those_of_the_clients_updates(adapters):
    size = len(adapters["default"][0])
    blocks = -(-size // utils.CODE_BLOCK)
    expected = {"default": 4 * size, "send_bfloat16": 2 * size, "send_int8": size + 4 * blocks}
    expected["send_int8_svd"] = expected["send_int8"]
    for name, each in expected.items():
        assert {entry["bytes"] for entry in adapters[name][1]} == {4 * each}  # 4 clients


# -----------------------------------------------------------------------------
# narrow updates: what is rounded off is not lost


@pytest.fixture
def alone(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def average_twice(update, dtype, **more):
    """Two rounds with the same update; returns the averages, and what the client has kept back."""
    model, kept_back = torch.nn.ParameterList([torch.zeros(len(update))]), {0: {}}
    averages = [
        utils.federated_average(
            model, 1, torch.zeros(len(update)), [(0, 1.0, update)], dtype=dtype, kept_back=kept_back, **more
        )
        for _ in range(2)
    ]
    return averages, kept_back


def test_int8_by_hand(alone):
    """A block with the largest number 254 has steps of 2: of 3.2 it sends 4 (down from 1.6 steps), and keeps -0.8.

    The next time, 3.2 - 0.8 = 2.4 are 1.2 steps: it sends 2, and keeps 0.4. Both are bfloat16 numbers.
    """
    update = torch.zeros(utils.CODE_BLOCK)
    update[0], update[1], update[2] = 254, 3.2, -2
    averages, kept_back = average_twice(update, "int8")
    assert averages[0][:4].tolist() == [254, 4, -2, 0] and averages[1][:4].tolist() == [254, 2, -2, 0]
    (kept,) = kept_back[0].values()
    assert kept[:4].tolist() == pytest.approx([0, 0.4, 0, 0], abs=1e-5)


def test_bfloat16_by_hand(alone):
    """Above 256, bfloat16 has steps of 2: of 257.25 it sends 258, and keeps -0.75; then of 256.5 it sends 256."""
    update = torch.full((utils.CODE_BLOCK,), 257.25)
    averages, kept_back = average_twice(update, "bfloat16")
    assert [average.unique().tolist() for average in averages] == [[258], [256]]
    assert next(iter(kept_back[0].values())).unique().tolist() == [0.5]


@pytest.mark.parametrize("aggregate", ["fedavg", "median", "krum"])
def test_what_is_sent_in_the_long_run_is_what_was_meant(alone, aggregate):
    torch.manual_seed(0)
    update = torch.randn(3 * utils.CODE_BLOCK + 7)
    averages, kept_back = average_twice(update, "int8", aggregate=utils.AGGREGATORS[aggregate])
    (kept,) = kept_back[0].values()
    # but for what the average loses on its way back as bfloat16, 2^-9 of it
    assert (sum(averages) + kept - 2 * update).abs().max() <= 2**-8 * update.abs().max()
    assert kept.abs().max() > 0


def test_checksum_sees_values_and_places():
    vector = torch.randn(5000)
    others = [vector.roll(1), vector.flip(0), vector.clone().index_fill_(0, torch.tensor(4999), 0.0)]
    assert federated.checksum(vector) == federated.checksum(vector.clone())
    assert len({federated.checksum(each) for each in [vector, *others]}) == 4


# -----------------------------------------------------------------------------
# --dry_run


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
    assert "for 8 local steps x 4 rows" in output and "every 8 round(s)" in output and "run 40 rounds" in output


def test_estimate_of_memory():
    """What a layer saves for the backward pass, counted by torch, on models whose sizes differ one by one."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def count(config):
        args = main.parse_args(["--lora_r", "8", "--no-load_in_4bit"])
        model = federated.add_lora(args, LlamaForCausalLM(config))
        own, saved = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

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
        assert (count(four) - count(two)) / 2 == report.saved_elements(two, 8)


def test_count_of_parameters():
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=100, hidden_size=32, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4
    )
    linear = 3 * (4 * 32 * 32 + 3 * 32 * 96)
    assert report.count_parameters(config) == (linear, 2 * 100 * 32 + 7 * 32, 32 * 96)  # embeddings and norms
