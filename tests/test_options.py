"""Flags: what is refused, what defaults follow from others, and what the options that save time or memory come to."""

import functools
import inspect
import os

import pytest
import torch
from conftest import read_adapters
from workers import layouts_rank

import main
import utils
from fllama import options, runlog
from fllama.narrow import CODE_BLOCK

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU can do it")

# -----------------------------------------------------------------------------
# bad flags: one line, exit code 2, before a model is loaded


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--world_size 0", "--world_size: 0 is not above 0"),
        ("--world_size two", "--world_size: two is not a whole number"),
        ("--num_rounds -1", "--num_rounds: -1 is not above 0"),
        ("--learning_rate nan", "--learning_rate: nan is not above 0"),
        ("--lora_dropout 1", "--lora_dropout: 1 is not from 0 up to 1"),
        ("--aggregator fedavgg", "invalid choice: 'fedavgg'"),
        ("--resume --overwrite", "not allowed with argument"),
        ("--seed -1", "--seed: -1 is not from 0 up to 2**31"),
        ("--hf_token hf_a\u201db", "characters that no token has"),
        ("--optim adam", "invalid choice: 'adam'"),
        ("--report_to mlflow", "--report_to mlflow is not installed: pip install mlflow"),
        ("--no_such_flag", "unrecognized arguments: --no_such_flag"),
        ("--rendezvous host:29500", "unrecognized arguments: --rendezvous"),
        ("--backend nccl --world_size 1000", "leave it out"),
        ("--dataset_path ./nowhere", "--dataset_path ./nowhere: no such file or folder"),
        ("--dataset_path nowhere.jsonl", "no such file or folder"),
        ("--model_name ./nowhere", "--model_name ./nowhere: no such folder"),
        ("--model_name tests", "needs config.json, *.safetensors and a tokenizer; found"),
        ("--max_length 20", "--max_length 20 cuts off too many answers"),
        ("--num_clients 1001", "1001 clients: at most 1000"),
        ("--clients_per_round 9", "--clients_per_round 9: there are only 8 clients"),
        ("--dirichlet_alpha 0", "--dirichlet_alpha: 0 is not above 0"),
        ("--partition column", "name it with --partition_column"),
        ("--partition column --partition_column ward", "no column ward; found"),
        ("--partition dirichlet", "no column label; found"),
        ("--partition column --partition_column site --num_clients 3", "site has 8 values; leave it out"),
        ("--partition dirichlet --partition_column site --dirichlet_alpha 0.01 --num_clients 50", "gets 0 row(s), and"),
        ("--server_lr 1", "--server_lr is not a setting of --aggregator fedavg"),
        ("--weiszfeld_iterations 3", "--weiszfeld_iterations is not a setting of --aggregator fedavg"),
        ("--aggregator median --weiszfeld_smoothing 1", "--weiszfeld_smoothing is not a setting of --aggregator"),
        ("--aggregator geometric_median --weiszfeld_iterations 0", "--weiszfeld_iterations: 0 is not above 0"),
        ("--aggregator geometric_median --weiszfeld_smoothing 0", "--weiszfeld_smoothing: 0 is not above 0"),
        ("--aggregator krum --num_clients 4", "krum needs 5 clients a round for --num_malicious 1, not 4"),
        ("--aggregator trimmed_mean --trim_fraction 0.5", "of 8 clients at either end leaves none"),
        ("--aggregator krum --lora_variant fedsa", "fedsa shares only a half of it"),
        ("--aggregator svd --lora_variant fedsa", "fedsa shares only a half of them"),
        ("--aggregator none --scaffold", "none shares nothing"),
        ("--aggregator none --lora_variant rolora", "none shares nothing"),
        ("--scaffold --lora_variant rolora", "leave out --lora_variant rolora"),
        ("--prox_mu -1", "--prox_mu: -1 is not above 0"),
        ("--num_malicious -1", "--num_malicious: -1 is below 0"),
        ("--restarts -1", "--restarts: -1 is below 0"),
        ("--timeout 0", "--timeout: 0 is not above 0"),
        pytest.param("--torch_dtype float16", "float16 needs a GPU; leave it out", marks=no_gpu),
        pytest.param("--use_liger_kernel", "--use_liger_kernel needs a GPU; leave it out", marks=no_gpu),
        pytest.param("--attn_implementation flash_attention_2", "flash_attention_2 needs a GPU", marks=no_gpu),
        ("--average_dtype int4", "invalid choice: 'int4'"),
        ("--compare fedavg,mean", "--compare: no run is named mean; choose from local, centralized, fedavg"),
        ("--compare fedavg,fedavg", "--compare: fedavg is listed twice"),
        ("--compare fedavg,local --server_lr 1", "--server_lr is not a setting of --aggregator fedavg"),
        ("--compare local,centralized --prox_mu 1", "none shares nothing"),
        ("--repeats 3", "--repeats is of --compare"),
        ("--compare local,fedavg --repeats 2", "an interval needs 3 at least"),
        ("--compare local --dry_run", "nor with --dry_run"),
        ("--compare local --centralized", "does not go with --centralized"),
        ("--compare local --resume", "holds no comparison; leave --resume out"),
        ("--compare local --repeats 0", "--repeats: 0 is not above 0"),
        ("--seeds 2", "--seeds and --sweep are of --compare"),
        ("--sweep learning_rate=1", "--seeds and --sweep are of --compare"),
        ("--compare fedavg --sweep seed=1,2", "--sweep seed: this is no number that arms can have as their own"),
        ("--compare fedavg --sweep lr=1,2", "--sweep lr: this is no number"),
        ("--compare fedavg --sweep learning_rate=1,x", "x is not a number"),
        ("--compare fedavg --sweep learning_rate=0.1,1e-1", "lists a value twice"),
        ("--compare fedavg --sweep lora_r=4,0.5", "0.5 is not a whole number"),
        ("--compare fedavg --sweep lora_r=4 --sweep lora_r=8", "--sweep lora_r is listed twice"),
        ("--compare fedavg --sweep ffa:lora_r=4", "--sweep ffa:lora_r: --compare lists no ffa; choose from fedavg"),
        ("--compare fedavg --sweep fedavg:server_lr=1", "--sweep fedavg:server_lr: fedavg has no such setting"),
        ("--compare ffa --sweep ffa:lora_r=4 --sweep ffa:lora_r=8", "--sweep ffa:lora_r is listed twice"),
        ("--compare fedavg --split_seed 1", "--split_seed does not go with --compare"),
        ("--centralized --aggregator median", "which has nobody to average with; leave out --aggregator"),
        ("--push_to_hub x --aggregator none", "--push_to_hub uploads a global model, and this leaves none"),
        ("--ask What?", "holds no finished model; name the output_dir of a run"),
        ("--merge", "holds no finished model"),
    ],
)
def test_bad_flags(refused, flags, message):
    assert message in refused(*flags.split())


@pytest.fixture
def under_torchrun(monkeypatch):
    """The environment of one of 4 ranks, 2 on this machine."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "7")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--restarts 2", "--restarts is not for torchrun, which may start a run many times"),
        ("--ask What?", "--ask is not for torchrun"),
        ("--compare fedavg", "--compare is not for torchrun"),
        ("--overwrite", "--overwrite is not for torchrun"),
        ("--world_size 8", "--world_size 8: torchrun has started 4 ranks; leave it out"),
        ("--num_clients 3", "torchrun has started 4 ranks for 3 clients; lower --nproc_per_node or --nnodes"),
    ],
)
def test_bad_flags_under_torchrun(under_torchrun, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        main.parse_args(flags.split())
    assert stop.value.code == 2 and message in capsys.readouterr().err


# -----------------------------------------------------------------------------
# defaults that follow from others


def test_defaults_on_a_machine_without_gpus():
    args = main.parse_args([])
    if not torch.cuda.is_available():
        assert (args.optim, args.backend, args.gradient_checkpointing) == ("adamw_torch", "gloo", False)
    assert (args.world_size, args.num_clients, args.clients_per_round) == (8, 8, 8)
    assert (args.learning_rate, args.eval_rounds, args.save_rounds) == (1e-2, 4, 2)
    assert main.parse_args(["--model_name", "org/other"]).learning_rate == 2e-4
    assert main.parse_args(["--num_rounds", "3"]).eval_rounds == main.parse_args(["--num_rounds", "3"]).save_rounds == 1


def test_no_rank_is_idle():
    args = main.parse_args("--world_size 8 --num_clients 6 --clients_per_round 3".split())
    assert (args.world_size, args.num_clients, args.clients_per_round) == (3, 6, 3)
    args = main.parse_args("--num_clients 6 --clients_per_round 3 --centralized".split())
    assert (args.world_size, args.aggregator, args.gradient_accumulation_steps) == (1, "none", 3)


def test_defaults_under_torchrun(under_torchrun):
    args = main.parse_args(["--num_clients", "8"])
    assert (args.world_size, args.save_rounds) == (4, 1)


def test_settings_of_a_strategy_are_its_own():
    args = main.parse_args("--aggregator geometric_median --weiszfeld_iterations 7".split())
    strategy = options.strategy_of(args)
    assert strategy.func is utils.geometric_median
    assert strategy.keywords == {"weiszfeld_iterations": 7, "weiszfeld_smoothing": 1e-6}
    assert options.strategy_of(main.parse_args([])).keywords == {}
    strategy = options.strategy_of(main.parse_args(["--aggregator", "fedavgm"]))
    assert strategy.keywords == {"server_lr": 1.0, "server_momentum": 0.9}


def test_every_setting_of_a_strategy_is_a_flag():
    """By the same name, or else it could not be set."""
    settings = set()
    for name, strategy in utils.AGGREGATORS.items():
        parameters = list(inspect.signature(strategy).parameters)
        assert parameters[:2] == ["clients", "state"], name
        settings.update(parameters[2:])
    of_privacy = {"dp_clip_norm", "noise_multiplier", "clients_per_round"}  # the second is calibrated from --dp_epsilon
    assert settings - of_privacy == set(options.SERVER_FLAGS)
    assert settings - {"noise_multiplier"} <= set(vars(main.parse_args([])))


# -----------------------------------------------------------------------------
# the token and the command


def test_the_token_is_taken_from_the_environment(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", " hf_abc\n")
    monkeypatch.setenv("HUGGING_FACE_HUB_TOKEN", "hf_def")
    assert main.parse_args([]).hf_token == "hf_abc"
    assert not {"HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"} & set(os.environ)  # ranks have no use for them


def test_no_error_shows_a_token(capsys):
    with pytest.raises(SystemExit):
        options.fail("refused hf_secret\nin two lines, and --hf_token")
    assert capsys.readouterr().err == "main.py: error: refused hf_... in two lines, and --hf_token\n"


def test_command_for_the_model_card(tmp_path):
    (tmp_path / "rows.jsonl").write_text("")
    flags = ["--hf_token", "hf_abc", f"--dataset_path={tmp_path}/rows.jsonl", "--output_dir", f"{tmp_path}/out put"]
    command = options.describe_command([*flags, "--resume", "--model_name", "org/model"], "hf_abc")
    assert command == (
        "python main.py --hf_token hf_... --dataset_path=rows.jsonl --output_dir 'out put' --model_name org/model"
    )


# -----------------------------------------------------------------------------
# runs with options that save time, memory or bytes


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
    return {name: (read_adapters(folder / name), runlog.read_rounds(folder / name)) for name in cases}


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
    blocks = -(-size // CODE_BLOCK)
    expected = {"default": 4 * size, "send_bfloat16": 2 * size, "send_int8": size + 4 * blocks}
    expected["send_int8_svd"] = expected["send_int8"]
    for name, each in expected.items():
        assert {entry["bytes"] for entry in adapters[name][1]} == {4 * each}  # 4 clients
