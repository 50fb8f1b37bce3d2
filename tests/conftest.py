"""Runs that several tests look at; each is made once."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_hub import start_hub

import main
from fllama import launch, options

ROOT = Path(main.__file__).parent
SMALL_RUN = "--world_size 2 --num_rounds 4 --local_steps 2 --save_rounds 1 --eval_rounds 2".split()
SMALL_RUN += "--lora_dropout 0.1 --per_device_train_batch_size 2 --gradient_accumulation_steps 2".split()

FINISHED_RUN = [*SMALL_RUN, "--generate_samples", "3"]


def pytest_configure(config):
    """Hide the GPUs of this machine from all tests but those for GPUs, before torch is asked for them."""
    if "gpu" not in config.option.markexpr.replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session", autouse=True)
def imports_of_the_ranks():
    """Done once for all tests, before one of them starts the server of the processes without: 7 s less a run."""
    import torch

    if not torch.cuda.is_available():
        launch.start_imports()


@pytest.fixture(scope="session")
def hub():
    """A fake hub that has the embedded model."""
    return start_hub(options.EMBEDDED_MODEL)


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def assert_nowhere(secret, output, folder):
    """It is not in what was said, nor in any file."""
    assert secret not in output
    for path in Path(folder).rglob("*"):
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path


def run_main(*flags, **environment):
    """Run main.py in a process of its own; returns the finished process with its output as text."""
    command = [sys.executable, str(ROOT / "main.py"), *map(str, flags)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def refused(capsys, tmp_path, monkeypatch):
    """Returns a function that runs main with flags, expects exit code 2 and returns the one line it says."""

    def fail(*args):
        raise AssertionError("the ranks were started")

    monkeypatch.setattr(launch, "run_to_the_end", fail)
    monkeypatch.chdir(ROOT)

    def refuse(*flags):
        flags = [str(flag) for flag in flags]
        if "--output_dir" not in flags:
            flags += ["--output_dir", str(tmp_path / "out")]
        with pytest.raises(SystemExit) as stop:
            main.main(flags)
        assert stop.value.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        lines = [line for line in lines if not line.startswith("usage:")]
        assert len(lines) == 1, lines
        return lines[0]

    return refuse


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder and the output of a run of the embedded default: 2 ranks, 4 rounds of 2 steps."""
    folder = tmp_path_factory.mktemp("finished")
    process = run_main(*FINISHED_RUN, "--output_dir", folder, HF_TOKEN="hf_secret")
    assert process.returncode == 0, process.stderr
    return folder, process


@pytest.fixture(scope="session")
def sample_rows():
    """The rows of the embedded training split, as dicts."""
    return [json.loads(line) for line in Path(options.EMBEDDED_DATA, "train.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def traced(tmp_path_factory, sample_rows):
    """What two ranks wrote down in 3 rounds of 1 step, started as by torchrun, on 61 rows without a held-out split."""
    import torch

    folder = tmp_path_factory.mktemp("traced")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sample_rows[:61]))
    flags = "--world_size 2 --num_rounds 3 --local_steps 1 --per_device_train_batch_size 6 --warmup_steps 2".split()
    flags += ["--timeout", "0.5"]  # with DDP, ranks may wait for each other for ever
    flags += ["--dataset_path", str(folder / "rows.jsonl"), "--output_dir", str(folder)]

    from workers import traced_rank

    main.main(flags, target=traced_rank)
    return folder, [torch.load(folder / f"trace_{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="session")
def small_inputs(tmp_path_factory, sample_rows):
    """A LLaMA of one layer with random weights and 80 short rows, as flags: for what many runs are needed."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("inputs")
    rows = sorted(sample_rows, key=lambda row: len(row["context"]))[:80]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = AutoTokenizer.from_pretrained(options.EMBEDDED_MODEL)
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    return ["--model_name", str(folder / "model"), "--dataset_path", str(folder / "rows.jsonl")]


@pytest.fixture(scope="session")
def undisturbed(small_inputs, tmp_path_factory):
    """A function that returns the folder of an undisturbed run with more flags; each is made once."""
    from runs import FLAGS

    @functools.cache
    def run(more=""):
        folder = tmp_path_factory.mktemp("undisturbed")
        main.main([*FLAGS, *small_inputs, *more.split(), "--output_dir", str(folder)])
        return folder

    return run


@pytest.fixture
def run_here(small_inputs, tmp_path, capsys):
    """A function that runs main in this process, the ranks in theirs; returns (exit code, what main said on stderr)."""
    from multiprocessing import forkserver

    import psutil
    from runs import FLAGS

    def run(more="", target=None):
        code = 0
        try:
            main.main([*FLAGS, *small_inputs, *more.split(), "--output_dir", str(tmp_path)], target=target)
        except SystemExit as error:
            code = error.code
        run.output, errors = capsys.readouterr()
        server = psutil.Process(forkserver._forkserver._forkserver_pid)
        assert not [child for child in server.children() if child.status() != psutil.STATUS_ZOMBIE]
        assert not list(tmp_path.glob(".prepared-*"))
        return code, errors

    return run


def read_adapters(folder):
    """All tensors that a run has trained, those of its one model or of all its clients, in one vector."""
    import torch
    from safetensors.torch import load_file

    files = sorted(Path(folder).glob("federated_global_model/*.safetensors"))
    files += sorted(Path(folder).glob("client_models/*/*.safetensors"))
    return torch.cat([tensor.reshape(-1) for file in files for _, tensor in sorted(load_file(file).items())])


def make_trainer(folder, *flags, rows=None, device="cpu"):
    """Return (args, trainer) of a run with these flags in this process, of the embedded model.

    `rows` are tokenized ones; without, some that nobody trains on.
    """
    import datasets
    import torch

    from fllama import model, prepare

    args = main.parse_args(["--output_dir", str(folder), "--num_rounds", "1", "--world_size", "1", *flags])
    rows = rows or datasets.Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7], "length": 3}])
    datasets.DatasetDict(train=rows).save_to_disk(folder / "data")
    run, device = prepare.Run(args.model_name, str(folder / "data"), machine_of_rank=(0,)), torch.device(device)
    torch.manual_seed(0)
    loaded = model.load_model(args, run.model_path, device)
    return args, model.build_trainer(args, run, device, loaded, model.load_tokenizer(run.model_path))
