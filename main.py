"""Federated fine-tuning of LLaMA: one process per GPU, each a client that trains a 4-bit model with LoRA on its rows.

    python main.py                                                      # everything embedded: no GPU, no download
    python main.py --world_size 8 --model_name meta-llama/Llama-3.1-8B-Instruct --dataset_path rajpurkar/squad
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:PORT main.py    # on each machine

This file turns flags into checked input and starts the ranks; `federated.local_train` is what each of them does.
"""

import os

os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # before anything of Hugging Face is imported
os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"  # else loading a local file calls s3.amazonaws.com
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# what a killed process has not given back is no news to the user
os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")

import argparse
import contextlib
import copy
import ctypes
import datetime
import errno
import fcntl
import importlib.metadata
import importlib.util
import inspect
import json
import multiprocessing.connection
import multiprocessing.forkserver
import platform
import re
import secrets
import shlex
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import report
import utils

ASSETS = Path(__file__).resolve().parent / "assets"
EMBEDDED_MODEL, EMBEDDED_DATA = str(ASSETS / "tiny-llama"), str(ASSETS / "sample_squad")
SCHEDULES = ["cosine", "linear", "constant", "constant_with_warmup"]
OPTIMIZERS = ["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "sgd"]
DTYPES, ATTENTIONS = ["auto", "bfloat16", "float16", "float32"], ["sdpa", "flash_attention_2", "eager"]
AVERAGE_DTYPES = ["float32", "bfloat16", "int8"]
PARTITIONS = ["iid", "dirichlet", "column", "quantity"]
SERVER_FLAGS = "server_lr server_momentum server_beta2 server_tau clip_norm trim_fraction num_malicious".split()
TRACKERS = ["none", "tensorboard", "wandb", "trackio", "mlflow"]
MAX_CLIENTS = 1000
ARMS = {  # of --compare: name -> flags
    "local": ["--aggregator", "none"],
    "centralized": ["--aggregator", "none", "--centralized"],
    **{name: ["--aggregator", name] for name in utils.AGGREGATORS if name != "none"},
    **{name: ["--lora_variant", name] for name in utils.LORA_VARIANTS if name != "lora"},
    "scaffold": ["--scaffold"],
}
FINISHED = "finished"  # instead of a checkpoint to go on from
PR_SET_PDEATHSIG, SIOCGIFADDR = 1, 0x8915  # of the kernel's prctl.h and sockios.h
LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate")
SAMPLED_ROWS = 1000  # are tokenized by --dry_run
MAX_BAD_ROWS, SHOWN_ROWS = 0.01, 3  # share of rows that may be bad and are left out; bad rows that are named
MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja"]
COLUMNS = {"context question answers": "SQuAD", "messages": "chat", "prompt completion": "texts or messages"}
# with these in its environment, accelerate takes a rank for a DDP worker and averages every gradient
LAUNCHER_VARIABLES = """LOCAL_RANK RANK WORLD_SIZE LOCAL_WORLD_SIZE GROUP_RANK ROLE_RANK MASTER_ADDR MASTER_PORT
PMI_RANK PMI_SIZE MPI_LOCALRANKID MPI_LOCALNRANKS OMPI_COMM_WORLD_RANK OMPI_COMM_WORLD_SIZE OMPI_COMM_WORLD_LOCAL_RANK
OMPI_COMM_WORLD_LOCAL_SIZE MV2_COMM_WORLD_RANK MV2_COMM_WORLD_SIZE MV2_COMM_WORLD_LOCAL_RANK MV2_COMM_WORLD_LOCAL_SIZE
ACCELERATE_USE_CPU ACCELERATE_USE_FSDP ACCELERATE_USE_DEEPSPEED ACCELERATE_USE_PARALLELISM_CONFIG
ACCELERATE_MIXED_PRECISION ACCELERATE_DYNAMO_BACKEND ACCELERATE_TORCH_DEVICE""".split()
ADVICE = {  # by a part of the message of an error in a rank
    "OutOfMemoryError": "; lower --per_device_train_batch_size, then --max_length",
    "PytorchStreamWriter failed": "; make room on the disk of --output_dir",
    "unexpected pos": "; make room on the disk of --output_dir",  # of the same writer
    "o space left": "; make room on the disk of --output_dir",
    "File too large": "; make room on the disk of --output_dir",
}
# for glibc: without it, a step on the CPU spends a tenth of its time on getting back pages that the last one has freed
KEEP_FREED_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
NOT_MATHEMATICS = """output_dir eval_rounds save_rounds report_to restarts timeout backend num_gpus versions
world_size machines""".split()
NOT_IN_CONFIG = """hf_token overwrite resume dry_run compare repeats arms ask context merge push_to_hub quiet
command rendezvous store resume_from keepers sharing missing""".split()
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # in the environment, for which ranks have no use
ALONE = "compare dry_run ask merge overwrite restarts rendezvous".split()  # flags of what torchrun does not start
RUN_FILES = """checkpoints federated_global_model* client_models* client_*_loss.json global_eval_loss.json rounds.jsonl
*.torn loss.png runs samples.json merged_model summary.json partition.json config.json""".split()  # see --overwrite

# -----------------------------------------------------------------------------
# flags


def parse_args(argv=None):
    """Parse the flags and fill in the defaults that depend on others; bad values end the program with exit code 2."""
    parser = argparse.ArgumentParser(
        usage="python main.py [flags]     (python main.py --help lists them)",
        description="Federated fine-tuning of LLaMA. With no flag: the embedded model on the embedded data.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument_group("federation").add_argument
    started = dist.is_torchelastic_launched() and int(os.environ["WORLD_SIZE"])  # by torchrun, so many ranks
    add("--world_size", type=positive(int), default=started or 8, help="processes; best one per GPU")
    add("--num_clients", type=positive(int), help="the processes play them in turn (default: one each)")
    add("--clients_per_round", type=positive(int), help="drawn at random for each round (default: all of them)")
    add("--num_rounds", type=positive(int), default=20, help="rounds: local training, then one averaging")
    add("--local_steps", type=positive(int), default=8, help="optimizer steps of each client in a round")
    add("--aggregator", choices=list(utils.AGGREGATORS), default="fedavg", help="averaging strategy, see utils.py")
    add("--average_dtype", choices=AVERAGE_DTYPES, default="float32", help="of updates sent, narrow: error feedback")
    add("--client_state", choices=["keep", "reset"], default="keep", help="AdamW's moments of a client after its turn")
    add("--prox_mu", type=not_negative, default=0, help="FedProx: pull of the round's start on each local step")
    add("--on_bad_update", choices=["skip", "fail"], default="skip", help="NaN, infinite, or 1,000 x the median length")
    add("--scaffold", action="store_true", help="SCAFFOLD: correct local gradients by the mean of all clients'")
    add = parser.add_argument_group("server (default: the strategy's own, see utils.py)").add_argument
    add("--server_lr", type=positive(float), help="step of fedavgm, diloco, fedadagrad, fedadam, fedyogi")
    add("--server_momentum", type=fraction, help="momentum of these, beta 1 of the last three")
    add("--server_beta2", type=fraction, help="of fedadam and fedyogi: how long they remember squared updates")
    add("--server_tau", type=positive(float), help="of fedadagrad, fedadam, fedyogi: added to the root of these")
    add("--clip_norm", type=positive(float), help="of norm_clip: longest update")
    add("--trim_fraction", type=fraction, help="of trimmed_mean: share of clients to cut at either end")
    add("--num_malicious", type=not_negative_int, help="of krum: clients that may lie")
    add = parser.add_argument_group("model").add_argument
    add("--model_name", default=EMBEDDED_MODEL, help="folder, or id on the Hugging Face hub")
    add("--hf_token", help="token for gated models; better set HF_TOKEN: other users can see a command line")
    add("--load_in_4bit", action=argparse.BooleanOptionalAction, default=True, help="NF4 base weights (QLoRA)")
    add("--torch_dtype", choices=DTYPES, default="auto", help="of the arithmetic (auto: bfloat16, CPU float32)")
    add("--attn_implementation", choices=ATTENTIONS, default="sdpa", help="flash_attention_2: pip install flash-attn")
    add("--lora_r", type=positive(int), default=16, help="rank of the adapter")
    add("--lora_alpha", type=positive(float), default=32, help="the adapter counts lora_alpha / lora_r times")
    add("--lora_dropout", type=fraction, default=0.0, help="dropout in front of the adapter")
    add("--lora_variant", choices=list(utils.LORA_VARIANTS), default="lora", help="what is trained and what is shared")
    add = parser.add_argument_group("data").add_argument
    add("--dataset_path", default=EMBEDDED_DATA, help="json, jsonl, csv or parquet file, folder, or id on the hub")
    add("--max_length", type=positive(int), default=1024, help="tokens of a row; longer rows are cut at the end")
    add("--packing", action="store_true", help="pack a client's rows into sequences of max_length tokens")
    add("--partition", choices=PARTITIONS, default="iid", help="how the rows are dealt out to the clients")
    add("--partition_column", help="of dirichlet and column: whose values tell clients apart (default: label)")
    add("--dirichlet_alpha", type=positive(float), default=0.5, help="the smaller, the less alike the clients")
    add = parser.add_argument_group("local training").add_argument
    add("--per_device_train_batch_size", type=positive(int), default=4, help="rows of a client in one forward pass")
    add("--gradient_accumulation_steps", type=positive(int), default=1, help="forward passes in an optimizer step")
    add("--learning_rate", type=positive(float), help="peak of AdamW (default: 2e-4, embedded model 1e-2)")
    add("--lr_scheduler_type", choices=SCHEDULES, default="cosine", help="curve over the whole run, not over a round")
    add("--warmup_steps", type=not_negative, default=0.05, help="steps, or below 1 the share of all steps")
    add("--optim", choices=OPTIMIZERS, help="optimizer (default: paged_adamw_32bit, on the CPU adamw_torch)")
    add("--gradient_checkpointing", action=argparse.BooleanOptionalAction, help="less memory (default: on GPUs)")
    add("--torch_compile", action="store_true", help="compile the model in its first steps")
    add("--use_liger_kernel", action="store_true", help="fused layers on GPUs: pip install liger-kernel")
    add = (run := parser.add_argument_group("run")).add_argument
    add("--output_dir", default="outputs", help="folder for all that the run leaves behind")
    either = run.add_mutually_exclusive_group().add_argument
    either("--overwrite", action="store_true", help="remove an earlier run from output_dir")
    either("--resume", action="store_true", help="continue the run in output_dir where it stopped")
    add("--eval_rounds", type=positive(int), help="rounds between evaluations (default: a fifth of num_rounds)")
    add("--save_rounds", type=positive(int), help="rounds between checkpoints (default: a tenth of num_rounds)")
    add("--report_to", choices=TRACKERS, default="none", help="tracker, to be installed by yourself")
    add("--seed", type=seed, default=42, help="of the split, the order of the rows, the adapter and its dropout")
    add("--dry_run", action="store_true", help="print what the run will need: memory, bytes, time, disk; no weights")
    add("--restarts", type=not_negative_int, default=0, help="after a failure, start again from the last checkpoint")
    add("--timeout", type=positive(float), default=30, help="minutes that a rank waits for the others")
    add("--backend", choices=["nccl", "gloo"], help="(default: nccl with a GPU for every rank, otherwise gloo)")
    add("--quiet", action="store_true", help="say only what the run has come to")
    add("--generate_samples", type=not_negative_int, default=0, help="held-out questions to show, with all answers")
    add("--rendezvous", metavar="HOST:PORT", help="be where torchrun's agents meet, for --rdzv_conf is_host=0")
    add = parser.add_argument_group("comparing").add_argument
    add("--compare", metavar="A,B,...", help=f'one run for each of: {", ".join(ARMS)}; "fedavg --local_steps 32"')
    add("--repeats", type=positive(int), default=1, help="of --compare, with other seeds and other splits")
    add("--centralized", action="store_true", help="one client trains on the rows of all, as many a step as they would")
    add = parser.add_argument_group("the finished model in output_dir").add_argument
    add("--ask", nargs="?", const="", metavar="QUESTION", help="answer it (without one: lines from the terminal)")
    add("--context", default="", help="of --ask: the text that holds the answer")
    add("--merge", action="store_true", help="write it as one 16-bit model, merged_model")
    add("--push_to_hub", metavar="REPO", help="upload the adapter after the run; a new repository is private")
    parser.error = fail
    args = parser.parse_args(argv)

    args.command, args.arms = None, find_arms(args.compare)
    args.hf_token = (args.hf_token or os.environ.get("HF_TOKEN", "")).strip() or None
    for name in TOKENS:
        os.environ.pop(name, None)
    if args.hf_token and not re.fullmatch(r"[!-~]+", args.hf_token):
        fail("the token in --hf_token or HF_TOKEN has characters that no token has; copy it again")
    args.command = describe_command(argv or [], args.hf_token)
    args.model_name, args.dataset_path = map(absolute, (args.model_name, args.dataset_path))
    args.num_gpus, args.versions = torch.cuda.device_count(), {"python": platform.python_version()}
    args.versions |= {name: importlib.metadata.version(name) for name in LIBRARIES}
    args.learning_rate = args.learning_rate or (1e-2 if args.model_name == EMBEDDED_MODEL else 2e-4)
    args.optim = args.optim or ("paged_adamw_32bit" if args.num_gpus else "adamw_torch")
    if args.gradient_checkpointing is None:
        args.gradient_checkpointing = args.num_gpus > 0
    args.eval_rounds = args.eval_rounds or max(1, args.num_rounds // 5)
    args.save_rounds = args.save_rounds or (1 if started else max(1, args.num_rounds // 10))
    if alone := [name for name in ALONE if started and getattr(args, name) not in (None, False, 0)]:
        fail(f"--{alone[0]} is not for torchrun, which may start a run many times; leave it out, or use python main.py")
    if started and args.world_size != started:
        fail(f"--world_size {args.world_size}: torchrun has started {started} ranks; leave it out")
    check_strategy(args)
    check_kernels(args)
    if args.partition == "column" and not args.partition_column:
        fail("--partition column makes a client of each value in a column: name it with --partition_column")
    if args.partition != "column":  # which finds its clients in the data
        set_clients(args, args.num_clients or args.world_size)
    if args.compare and (args.centralized or args.dry_run):
        fail("--compare does not go with --centralized (list it instead) nor with --dry_run (of one run at a time)")
    if args.repeats > 1 and (args.repeats == 2 or not args.compare):
        fail("--repeats is of --compare, and an interval needs 3 at least; raise it, or leave it out")
    if args.push_to_hub and (args.compare or args.aggregator == "none" or args.lora_variant == "fedsa"):
        fail("--push_to_hub uploads a global model, and this leaves none; leave it out")
    if args.report_to != "none" and not importlib.util.find_spec(args.report_to):
        fail(f"--report_to {args.report_to} is not installed: pip install {args.report_to}")
    return args


def describe_command(argv, token):
    """Return the command for the model card: without the token, and of what is on this disk only the names."""
    words = ["python", "main.py"]
    for word in (word.replace(token or "\0", "hf_...") for word in argv if word not in ("--resume", "--overwrite")):
        *flag, value = word.split("=", 1)
        local = os.path.isabs(value) or "/" in value and os.path.exists(value)
        words.append("=".join([*flag, Path(value).name if local else value]))
    return shlex.join(words)


def find_arms(compare):
    """Return {text: flags} of what --compare lists: names of ARMS, each perhaps with flags of its own behind it."""
    arms = {}
    for text in compare.split(",") if compare else []:
        name, *flags = text.split() or [""]
        if name not in ARMS:
            fail(f"--compare: no run is named {name or 'nothing'}; choose from {', '.join(ARMS)}")
        if common := {flag.split("=")[0] for flag in flags} & {"--seed", "--output_dir", "--overwrite", "--resume"}:
            fail(f"--compare {text.strip()}: {common.pop()} is the same for all runs; write it outside of the list")
        if " ".join([name, *flags]) in arms:
            fail(f"--compare: {text.strip()} is listed twice")
        arms[" ".join([name, *flags])] = [*ARMS[name], *flags]
    return arms


def set_clients(args, num_clients):
    """Fill in how many clients there are, how many in a round, and what follows from that; no idle ranks."""
    if (args.num_clients or num_clients) != num_clients:
        fail(f"--num_clients {args.num_clients}: {args.partition_column} has {num_clients} values; leave it out")
    if num_clients > MAX_CLIENTS:
        fail(f"{num_clients} clients: at most {MAX_CLIENTS} are possible")
    if (args.clients_per_round or 1) > num_clients:
        fail(f"--clients_per_round {args.clients_per_round}: there are only {num_clients} clients")
    args.num_clients, args.clients_per_round = num_clients, args.clients_per_round or num_clients
    drawn, cut = args.clients_per_round, int((args.trim_fraction or 0) * args.clients_per_round)
    if drawn <= 2 * cut:
        fail(f"--trim_fraction {args.trim_fraction} of {drawn} clients at either end leaves none; lower it")
    if args.aggregator == "krum" and drawn < 2 * args.num_malicious + 3:
        needed = 2 * args.num_malicious + 3
        fail(f"--aggregator krum needs {needed} clients a round for --num_malicious {args.num_malicious}, not {drawn}")
    args.num_parts, args.parts_per_round = num_clients, drawn  # of the rows: clients, if not --centralized
    if args.centralized:
        args.gradient_accumulation_steps *= drawn
        args.num_clients = args.clients_per_round = drawn = 1
    if drawn < args.world_size and dist.is_torchelastic_launched():
        fail(f"torchrun has started {args.world_size} ranks for {drawn} clients; lower --nproc_per_node or --nnodes")
    args.world_size = min(args.world_size, drawn)
    here = int(os.environ["LOCAL_WORLD_SIZE"]) if dist.is_torchelastic_launched() else args.world_size
    args.backend = args.backend or ("nccl" if args.num_gpus >= here else "gloo")
    if args.backend == "nccl" and args.num_gpus < here:
        fail(f"--backend nccl: {args.num_gpus} GPUs for {here} ranks; leave it out: over gloo they share")
    # of each rank its machine, of each disk the rank that keeps it; what `join` knows of others
    args.machines, args.keepers, args.sharing, args.missing = [0] * args.world_size, [0], [[0]], None
    args.store = args.resume_from = None


def check_strategy(args):
    """Refuse what does not go together, and fill in the strategy's own settings."""
    if args.centralized and args.aggregator == "fedavg":  # the mean of one
        args.aggregator = "none"
    function, name, variant = utils.AGGREGATORS[args.aggregator], args.aggregator, args.lora_variant
    if args.centralized and name != "none":
        fail("--centralized trains one client, which has nobody to average with; leave out --aggregator")
    own = {name: value.default for name, value in inspect.signature(function).parameters.items()}
    for flag in SERVER_FLAGS:
        if getattr(args, flag) is None:
            setattr(args, flag, own.get(flag))
        elif flag not in own:
            fail(f"--{flag} is not a setting of --aggregator {name}; leave it out")
    if name == "svd" and variant != "lora":
        fail(f"--aggregator svd averages whole products B A, and --lora_variant {variant} shares only a half of them")
    if name == "krum" and variant == "fedsa":
        fail("--aggregator krum picks the model of one client, and --lora_variant fedsa shares only a half of it")
    if name == "none" and (variant in ("rolora", "fedsa") or args.scaffold or args.prox_mu):
        fail("--aggregator none shares nothing; leave out --lora_variant, --scaffold and --prox_mu")
    if args.scaffold and variant == "rolora":
        fail("--scaffold needs the same parameters in every round; leave out --lora_variant rolora")


def check_kernels(args):
    """Refuse what this machine cannot run."""
    if args.torch_dtype == "float16" and not args.num_gpus:
        fail("--torch_dtype float16 needs a GPU; leave it out")
    if args.torch_compile and not shutil.which("cc" if args.num_gpus else os.environ.get("CXX", "g++")):
        fail("--torch_compile needs a compiler: apt install build-essential")
    if args.attn_implementation == "flash_attention_2" and args.torch_dtype == "float32":
        fail("--attn_implementation flash_attention_2 has no float32; leave out --torch_dtype")
    for wanted, flag, module in (
        (args.attn_implementation == "flash_attention_2", "--attn_implementation flash_attention_2", "flash_attn"),
        (args.use_liger_kernel, "--use_liger_kernel", "liger_kernel"),
    ):
        if wanted and not args.num_gpus:
            fail(f"{flag} needs a GPU; leave it out")
        if wanted and not importlib.util.find_spec(module):
            fail(f"{flag} is not installed: pip install {module.replace('_', '-')}")


def absolute(name):
    """Return the absolute path of what is on this disk, and the id of what is on the hub as it is."""
    return os.path.abspath(name) if os.path.exists(name) else name


def positive(kind):
    def parse(text):
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    return parse


def not_negative(text):
    return float(text) if float(text) == 0 else positive(float)(text)


def not_negative_int(text):
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return int(text)


def fraction(text):
    if not 0 <= float(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 up to 1")
    return float(text)


def seed(text):
    if not 0 <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 up to 2**31")
    return int(text)


def fail(message):
    """End the program over bad input: one line that says what to do, without a token in it, exit code 2."""
    message = re.sub(r"(?<![-\w])hf_\w+", "hf_...", " ".join(message.split()))
    print(f"main.py: error: {message}", file=sys.stderr)
    raise SystemExit(2)


# -----------------------------------------------------------------------------
# checks, all before a model is loaded


@contextlib.contextmanager
def locked_output_dir(folder):
    """Make the folder, private to the user, and keep other runs out of it as long as the context lasts."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fail(f"another run is writing to --output_dir {folder}; wait for it, or name another")
    except OSError as error:
        fail(f"cannot write to --output_dir {folder}: {error.strerror}")
    try:
        yield
    finally:
        os.close(lock)


def check_output_dir(args):
    """Make sure that `output_dir` holds no run but the one to resume; removes nothing."""
    folder = Path(args.output_dir)
    if not (folder / "config.json").exists() and not any(folder.glob("checkpoints/round_*")):
        if args.resume:
            fail(f"--resume: {folder} holds no run; leave --resume out to start one")
    elif not args.resume and not args.overwrite:
        fail(
            f"{folder} already holds a run: --resume continues it, --overwrite removes it, or name another --output_dir"
        )


def find_checkpoint(args):
    """Return the newest checkpoint of the run to resume that counts, FINISHED where nothing is left to do.

    None where a run starts from the beginning.
    """
    if not args.resume:
        return None
    folder = Path(args.output_dir)
    check_config(folder, args)
    newest = utils.find_newest(folder)
    if not newest and any(folder.glob("checkpoints/round_*")):
        fail(f"--resume: no checkpoint in {folder} is whole, see above; mend one, or start anew with --overwrite")
    last_round = utils.round_of(newest)
    if last_round == args.num_rounds and is_finished(folder):
        return FINISHED
    print(f"resuming {whereabouts(newest)} of {args.num_rounds}", flush=True)
    return newest


def check_config(folder, args):
    """Refuse to go on with a run that was started with other flags."""
    earlier, config = read_config(folder), resolved_config(args)
    if changed := [key for key in config if key not in NOT_MATHEMATICS and config[key] != earlier.get(key)]:
        changes = ", ".join(f"{key} {earlier.get(key)} (now {config[key]})" for key in changed)
        fail(f"--resume: the run in {folder} was started with {changes}")


def read_config(folder):
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return dict(config)
    except (OSError, ValueError, TypeError):
        fail(f"--resume: {folder}/config.json, the flags of the run, cannot be read; --overwrite starts anew")


def whereabouts(checkpoint):
    """Say where a run goes on."""
    done = utils.round_of(checkpoint)
    return f"in round {done + 1}" if checkpoint and checkpoint.name.endswith("_part") else f"after round {done}"


def open_output_dir(args, resume_from, partition, torn=()):
    """Remove what an overwritten run left, or what a resumed one left behind its last checkpoint; write what is known
    before a run: config.json and partition.json."""
    folder = Path(args.output_dir)
    if args.resume and (digest := read_config(folder).get("data_digest")) != args.data_digest:
        fail(f"--resume: the run in {folder} was started with other rows or another tokenizer (digest {digest})")
    for path in (path for pattern in RUN_FILES if args.overwrite for path in folder.glob(pattern)):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    if args.resume or resume_from:
        cut_back(folder, resume_from, torn)
    else:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    utils.write_aside(folder / "partition.json", json.dumps(partition) + "\n")
    utils.write_aside(folder / "config.json", json.dumps(resolved_config(args), indent=2) + "\n")


def is_finished(folder):
    return (folder / utils.GLOBAL_MODEL).exists() or (folder / utils.CLIENT_MODELS).exists()


def resolved_config(args):
    """Return what `config.json` holds: every flag, and the versions of what ran; never the token."""
    return {name: value for name, value in vars(args).items() if name not in NOT_IN_CONFIG}


def find_model(args, weights=True):
    """Return the folder of the model, downloading it once for all ranks, its config and its tokenizer.

    Without `weights`, neither downloads nor looks at those.
    """
    import transformers
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError
    from safetensors import safe_open
    from transformers import AutoConfig, AutoTokenizer

    name, path = args.model_name, args.model_name
    if not os.path.isdir(name):
        if os.path.exists(name) or name.startswith((".", "/", "~")):
            fail(f"--model_name {name}: no such folder")
        try:
            path = snapshot_download(
                name,
                token=args.hf_token,
                allow_patterns=MODEL_FILES,
                ignore_patterns=["original/*", *["*.safetensors"] * (not weights)],
            )
        except GatedRepoError:
            fail(f"--model_name {name} is gated: accept its licence on the hub, then set HF_TOKEN to your token")
        except (RepositoryNotFoundError, HFValidationError):
            fail(f"--model_name {name}: no such folder, nor model on the hub (or a private one: set HF_TOKEN)")
        except Exception as error:  # the hub's client has a dozen kinds of these, and every one of them ends the run
            fail(hub_problem("--model_name", name, error))
    files = list(Path(path).glob("*.safetensors"))
    if not Path(path, "config.json").is_file() or weights and not files:
        found = ", ".join(sorted(os.listdir(path))[:8]) or "nothing"
        fail(f"--model_name {name}: needs config.json, *.safetensors and a tokenizer; found {found}")
    tensors = [tensor for file in files for tensor in safe_open(file, "pt").keys()]
    if files and (
        missing := [part for part in utils.LORA_TARGETS if not any(f".{part}." in tensor for tensor in tensors)]
    ):
        fail(f"--model_name {name} is not built as LLaMA is: it has no {', '.join(missing)}")
    transformers.logging.set_verbosity_error()
    try:
        load = {"pretrained_model_name_or_path": path, "trust_remote_code": False}
        return path, AutoConfig.from_pretrained(**load), AutoTokenizer.from_pretrained(**load)
    except Exception as error:
        fail(f"--model_name {name}: its config or tokenizer cannot be loaded: {first_line(error)}")


def check_space(args, config):
    """Refuse to start where the disk of output_dir has not the room for the checkpoints."""
    parameters = utils.count_lora_parameters(config, args.lora_r)
    each = utils.checkpoint_bytes(args, parameters)
    room = shutil.disk_usage(args.output_dir).free
    needed = (utils.KEPT_CHECKPOINTS + 1) * each + 4 * parameters * (args.clients_per_round + 2)
    if room < needed:
        fail(
            f"--output_dir {args.output_dir}: {room / 1e9:.2f} GB free, and the run needs {needed / 1e9:.2f} GB: "
            f"{utils.KEPT_CHECKPOINTS + 1} checkpoints of {each / 1e9:.2f} GB, and models; make room, or name another"
        )


def hub_problem(flag, name, error):
    """Return the line that says why the hub did not give `name`."""
    text = f"{error} {error.__cause__}"
    if "401" in text or "Invalid" in text and "token" in text.lower():
        return f"{flag} {name}: the hub refuses the token; set HF_TOKEN to a valid one, or to none for what is public"
    return f"{flag} {name}: not on this disk, and the hub cannot be reached; check the network ({first_line(error)})"


def first_line(error):
    return (str(error) or type(error).__name__).strip().splitlines()[0][:200]


def find_rows(args):
    """Return the training rows and the held-out rows (or None) of the dataset."""
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

    path = args.dataset_path
    if not os.path.exists(path) and (path.startswith((".", "/", "~")) or Path(path).suffix in utils.READERS):
        fail(f"--dataset_path {path}: no such file or folder")
    if os.path.isfile(path) and Path(path).suffix not in utils.READERS:
        fail(f"--dataset_path {path}: not a {', '.join(utils.READERS)} file")
    try:
        rows, held_out = utils.load_rows(path, args.hf_token)
    except (DatasetNotFoundError, FileNotFoundError) as error:
        if os.path.exists(path):
            fail(f"--dataset_path {path}: {first_line(error)}")
        fail(f"--dataset_path {path}: no such file or folder, nor dataset on the hub (or a gated one: set HF_TOKEN)")
    except (DatasetGenerationError, ValueError, KeyError) as error:
        fail(f"--dataset_path {path}: cannot be read: {first_line(error.__cause__ or error)}")
    except Exception as error:
        fail(hub_problem("--dataset_path", path, error))
    for part in filter(None, (rows, held_out)):
        if not any(set(columns.split()) <= set(part.column_names) for columns in COLUMNS):
            forms = ", or ".join(f"{columns.replace(' ', ', ')} ({kind})" for columns, kind in COLUMNS.items())
            fail(f"--dataset_path {path}: needs the columns {forms}; found {', '.join(part.column_names)}")
    if not args.partition_column and (args.partition == "dirichlet" or "label" in rows.column_names):
        args.partition_column = "label"
    if args.partition_column and args.partition_column not in rows.column_names:
        found = ", ".join(rows.column_names)
        fail(f"--partition_column: the training rows have no column {args.partition_column}; found {found}")
    if args.partition == "column":
        set_clients(args, len(set(map(str, rows[args.partition_column]))))
    needed, size = needed_rows(args.num_parts, bool(held_out)), args.num_parts
    if len(rows) < needed:
        fail(f"--dataset_path {path}: {len(rows)} training rows, {size} clients need {needed}; lower --num_clients")
    return rows, held_out


def prepare_data(args, rows, held_out, tokenizer, folder):
    """Tokenize all rows, once for all ranks, into `folder`, and deal them out to the clients.

    Counts what was cut and what is bad, and leaves out both. Returns the content of partition.json.
    """
    splits = {"train": rows} | ({"held_out": held_out} if held_out else {})
    kept = {}  # the numbers of the rows that are left
    for name, split in splits.items():
        check_template(args, tokenizer, split)
        aside = f"{folder}/{name}.arrow"  # not beside the user's files
        tokens = tokenize(args, split, tokenizer, cache_file_name=aside, desc=f"tokenizing {name} rows")
        bad = {number: problem for number, problem in enumerate(tokens["problem"]) if problem}
        if bad:
            shown = ", ".join(f"row {number} ({problem})" for number, problem in list(bad.items())[:SHOWN_ROWS])
            shown += f" and {len(bad) - SHOWN_ROWS} more" * (len(bad) > SHOWN_ROWS)
            if len(bad) > MAX_BAD_ROWS * len(tokens):
                fail(f"--dataset_path {args.dataset_path}: {len(bad)} of {len(tokens)} {name} rows are bad: {shown}")
            print(f"{len(bad)} of {len(tokens)} {name} rows are bad and left out: {shown}", flush=True)
        kept[name] = [number for number, length in enumerate(tokens["answer_length"]) if length > 0]
        if cut := sum(tokens["truncated"]):
            print(
                f"{cut} of {len(tokens)} {name} rows are longer than --max_length {args.max_length} and were cut, "
                f"{len(tokens) - len(bad) - len(kept[name])} of them before the answer: those are left out",
                flush=True,
            )
        splits[name] = tokens.select(kept[name]).remove_columns(["problem", "truncated"])
    if len(splits["train"]) < needed_rows(args.num_parts, bool(held_out)) or not all(map(len, splits.values())):
        left = len(splits["train"])
        fail(f"--max_length {args.max_length} cuts off too many answers: {left} training rows are left; raise it")
    datasets.disable_progress_bars()
    datasets.DatasetDict(splits).save_to_disk(f"{folder}/data")

    labels = [str(value) for value in rows[args.partition_column]] if args.partition_column else None
    names = sorted(set(labels)) if args.partition == "column" else None  # of the clients
    labels = labels and [labels[i] for i in kept["train"]]
    parts, global_part = deal_rows(args, len(splits["train"]), bool(held_out), labels, names)
    sizes = [max(1, min(utils.CLIENT_EVAL_ROWS, len(part) // 10)) for part in parts]
    held_out = [part[:size].tolist() for part, size in zip(parts, sizes)]
    trained = [part[size:].tolist() for part, size in zip(parts, sizes)]
    if args.centralized:
        trained = [sum(trained, [])]
    plan = utils.plan_rounds(args.num_parts, args.parts_per_round, args.num_rounds, 1, args.seed)
    split = {"train": trained, "held_out": held_out, "global": global_part.tolist(), "scored": plan[-1][0][0]}
    Path(folder, "data", "parts.json").write_text(json.dumps(split), encoding="utf-8")
    args.data_digest = utils.digest_of_rows(f"{folder}/data")
    return report.partition_record(args, parts, global_part, kept["train"], labels)


def tokenize(args, rows, tokenizer, **more):
    return rows.map(
        utils.tokenize_row,
        fn_kwargs={"tokenizer": tokenizer, "max_length": args.max_length},
        remove_columns=rows.column_names,
        features=utils.TOKENIZED,
        **more,
    )


def check_template(args, tokenizer, rows):
    if tokenizer.chat_template is None and rows.features.get("prompt") != datasets.Value("string"):
        fail(f"--model_name {args.model_name} has no chat template; name an instruct model, or use prompt texts")


def deal_rows(args, num_rows, has_held_out, labels, names):
    """Return the rows of every client, and the global held-out rows that are taken from the training rows.

    `labels` are the values of --partition_column, one per row, or None; `names` those of which each is a client.
    """
    parts = utils.split_evenly(num_rows, args.num_parts + (not has_held_out), args.seed)
    global_part = np.array([], dtype=int) if has_held_out else parts.pop()
    parts = utils.partition_rows(
        np.concatenate(parts), args.num_parts, args.partition, labels, args.dirichlet_alpha, args.seed
    )
    ways = {
        "dirichlet": "raise --dirichlet_alpha, lower --num_clients, or try another --seed",
        "column": "drop the rows of that value, or name another --partition_column",
    }
    if names:  # a client may have lost all its rows
        own = {labels[part[0]]: part for part in parts}
        parts = [own.get(name, []) for name in names]
    for k, part in enumerate(parts):
        if len(part) < 2:
            client = f"client {k} ({names[k]})" if names else f"client {k}"
            fail(
                f"--partition {args.partition}: {client} gets {len(part)} row(s), and needs 2, one to hold out; "
                + ways.get(args.partition, "lower --num_clients")
            )
    return parts, global_part


def needed_rows(num_clients, has_held_out):
    """Return the least number of training rows: every client needs one to train on and one to hold out."""
    return 2 * (num_clients + (not has_held_out))


# -----------------------------------------------------------------------------
# one process per rank


def run_rank(rank, args):
    """Give the process of one rank an environment of its own, then import what reads it."""
    for name in LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    if args.num_gpus:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(args.num_gpus)))
        number = utils.local_rank(rank, args.machines) % args.num_gpus
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[number]  # before CUDA is touched
    # where `join` has not said otherwise, all ranks are on this machine, and nobody else has to see them
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", f"{args.output_dir}/runs")  # not beside the checkpoints
    from federated import local_train

    local_train(rank, args)


def start_imports():
    """On a machine without GPUs, start the process that all ranks are forked from: it imports what they need, once."""
    os.environ |= KEEP_FREED_MEMORY | os.environ
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ASSETS.parent), os.environ.get("PYTHONPATH"))))
    multiprocessing.set_forkserver_preload(["federated"])
    handler = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # schedulers send it to all; ranks need the server to save
    multiprocessing.forkserver.ensure_running()
    signal.signal(signal.SIGTERM, handler)


def guard(rank, target, args, parent, words):
    """Run one rank so that it dies with its parent, and leaves word of how it ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes, and the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    die_with_parent()  # the pipe covers the time before this, and this a rank that cannot look at its pipe
    if not args.num_gpus:  # the parent is the server, which lives as long as somebody can reach it
        os.close(multiprocessing.forkserver._forkserver._forkserver_alive_fd)
    threading.Thread(target=die_with, args=(parent,), daemon=True).start()
    code, text, trace = 0, "", ""
    try:
        target(rank, args)
    except SystemExit as error:  # (code, why): it has ended itself
        code, text = error.code
    except BaseException as error:
        code, text, trace = 1, f"{type(error).__name__}: {first_line(error)}", traceback.format_exc()[-10_000:]
        text += next((advice for sign, advice in ADVICE.items() if sign in text), "")
    words[rank].send({"time": time.time(), "code": code, "text": text, "trace": trace})
    sys.exit(code)


def die_with_parent():
    """Have the kernel, where that is Linux's, kill this process when its parent ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def die_with(parent):
    """Wait until the other end of the pipe is closed, as it is when the parent ends, however it ends."""
    with contextlib.suppress(EOFError, OSError):
        parent.recv()
    os._exit(1)


def launch(target, args):
    """Run `target(rank, args)` in one process per rank; returns (exit code, message), (0, "") if all have finished.

    On Ctrl-C or SIGTERM, every rank finishes its step and saves; then the program ends.
    """
    # from a process that has imported everything, on the CPU: 6.5 CPU-seconds and 490 MB less a rank
    method = "spawn" if args.num_gpus else "forkserver"
    parent, alive = multiprocessing.Pipe(duplex=False)  # nobody writes: its end tells the ranks that we have ended
    readers, writers = zip(*(multiprocessing.Pipe(duplex=False) for _ in range(args.world_size)))
    processes, asked = [], None
    try:
        context = mp.start_processes(
            guard, args=(target, args, parent, writers), nprocs=args.world_size, join=False, start_method=method
        )
        processes = context.processes
        for writer in writers:
            writer.close()
        words = [None] * args.world_size
        try:
            await_ranks(processes, readers, words)
        except SystemExit as error:  # see `stop`
            asked = error
            print("main.py: finishing the step and saving; once more ends it at once", file=sys.stderr, flush=True)
        if asked or any(word and word["code"] == utils.STOPPED for word in words):  # of a signal to one rank alone
            await_ranks(processes, readers, words, stop=True, late=time.monotonic() + 60 * args.timeout)
        if asked and not all(word and word["code"] == 0 for word in words):
            if any(word and word["trace"] for word in words):
                print(f"main.py: {failure(processes, words)[1]}", file=sys.stderr)
            where = whereabouts(utils.find_newest(args.output_dir))
            print(f"main.py: stopped; --resume goes on {where} of {args.num_rounds}", file=sys.stderr)
            raise asked
        if all(word and word["code"] == 0 for word in words):
            return 0, ""
        late = time.monotonic() + 1
        while not all(words) and time.monotonic() < late:  # for those that fail over it to say so
            time.sleep(0.05)
            await_ranks([], readers, words)
        return failure(processes, words)
    finally:
        alive.close()
        for process in processes:
            process.kill()  # what is on disk is whole at any time
            process.join()


def await_ranks(processes, readers, words, stop=False, late=float("inf")):
    """Collect the words of the ranks until all processes have ended, or one has otherwise than it should.

    With `stop`, ask them to save and end, until all have said that they have, or it is `late`; every second, as one
    that has just been started does not listen yet.
    """
    running = True
    while running and not (stop and all(words)) and time.monotonic() < late:
        for process in processes:
            if stop:
                process.terminate()
        running = [process.sentinel for process in processes if process.is_alive()]
        for rank, reader in enumerate(readers):
            with contextlib.suppress(EOFError, OSError):  # it ended without a word
                words[rank] = words[rank] or (reader.recv() if reader.poll() else None)
        ended = [words[rank] for rank, process in enumerate(processes) if process.sentinel not in running]
        if any(word is None or word["code"] not in ((0, utils.STOPPED) if stop else (0,)) for word in ended):
            break
        if running:
            multiprocessing.connection.wait(running, timeout=1 if stop else None)


def failure(processes, words):
    """Return (exit code, message) of the rank that failed first: who ended without a word, or the first to speak."""
    for rank, process in enumerate(processes):
        if not words[rank] and not process.is_alive():
            code = process.exitcode
            how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            return 1, f"rank {rank} {how}" + (" (as the kernel does when memory runs out)" if code == -9 else "")
    failed = [word for word in words if word and word["code"] != 0]
    first = min(failed, key=lambda word: (not word["trace"], word["time"]))  # rather one that has not ended itself
    rank, code = words.index(first), first["code"]
    silent = [str(rank) for rank, word in enumerate(words) if not word]
    missing = f"; no word from rank {', '.join(silent)}" if silent else ""
    if code == utils.STOPPED:
        return 1, first["text"] + (missing or ", and all have saved")
    if not first["trace"]:  # it has ended itself
        return code, first["text"]
    print(first["trace"], file=sys.stderr)
    missing = missing if "imed out" in first["text"] else ""
    return 1, f"rank {rank} failed: {first['text']}{missing}"


def run_to_the_end(target, args):
    """Launch the ranks, again after a failure as often as --restarts says, each time from the last checkpoint."""
    for attempt in range(args.restarts + 1):
        args.store_path = f"{args.data_path}_store_{attempt}"
        code, message = launch(target, args)
        if not code:
            return
        if code != 1:  # it would come to the same again
            print(f"main.py: {message}", file=sys.stderr)
            raise SystemExit(code)
        args.resume_from = utils.find_newest(args.output_dir)
        where = f"{whereabouts(args.resume_from)} of {args.num_rounds}"
        if attempt == args.restarts:
            print(f"main.py: {message}; --resume goes on {where}", file=sys.stderr)
            raise SystemExit(1)
        print(f"main.py: {message}; restart {attempt + 1} of {args.restarts} {where}", file=sys.stderr, flush=True)
        cut_back(Path(args.output_dir), args.resume_from)


def cut_back(folder, checkpoint, torn=()):
    """Put what the run has left behind the checkpoint from which it goes on out of the way, and what is torn."""
    shutil.rmtree(folder / "checkpoints" / "staging", ignore_errors=True)
    for path in folder.glob("checkpoints/round_*"):
        if path.name > (checkpoint.name if checkpoint else "") or path.name in torn:
            path.rename(path.with_name(f"torn_{path.name}_{time.time_ns()}"))
    for name in (utils.GLOBAL_MODEL, utils.CLIENT_MODELS):  # of a run that ended by itself; this one is not finished
        if (folder / name).exists():
            shutil.rmtree(folder / f"{name}.old", ignore_errors=True)
            (folder / name).rename(folder / f"{name}.old")
    utils.cut_back_logs(folder, utils.round_of(checkpoint))


# -----------------------------------------------------------------------------
# one of the ranks that torchrun has started, on this machine and perhaps on others


def join(flags, target):
    """Be a rank of torchrun. The first on each machine checks and prepares, as `run` does, for all there.

    A run that is in output_dir is gone on with: torchrun ends all ranks, and starts them anew, when one of them fails,
    or a machine comes or goes.
    """
    rank, local_rank, machine = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "GROUP_RANK"))
    die_with_parent()  # an agent that is killed leaves nobody
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, lambda *_: signal.raise_signal(signal.SIGTERM))  # of Ctrl-C, torchrun sends that
    if not {"GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"} <= set(os.environ):
        interface = find_interface(os.environ["MASTER_ADDR"])
        os.environ |= {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface} | os.environ
    store = open_store(rank)
    with contextlib.ExitStack() as stack:
        if local_rank:
            for name in TOKENS:
                os.environ.pop(name, None)
            args = argparse.Namespace(**await_word(store, f"args/{machine}"))
        else:
            try:
                args, token = lead(flags, store, machine, stack)
            except BaseException:
                with contextlib.suppress(dist.DistError):  # the others wait for its word
                    store.set("refused", f"machine {machine} ({socket.gethostname()})")
                    time.sleep(rank == 0)  # second: the store may be in this process
                raise
        if args.resume_from == FINISHED:
            return None if local_rank else push(args, token)
        args.store = store
        code = 0
        try:
            target(rank, args)
        except SystemExit as error:  # (code, why), the same on all ranks
            code, text = error.code
            if rank == 0:
                print(f"main.py: {text}", file=sys.stderr, flush=True)
        with contextlib.suppress(dist.DistError):
            store.set(f"left/{rank}", "")
            if rank == 0:  # leaves last, as the store may be in this process
                store.wait([f"left/{other}" for other in range(args.world_size)], datetime.timedelta(seconds=10))
        if code:
            sys.exit(code)
        if rank == 0:
            push(args, token)


def lead(flags, store, machine, stack):
    """Check and prepare what the ranks of this machine need, together with the first ranks of the other machines.

    Returns (args, token); what is to be undone at the end goes on `stack`.
    """
    args, number = parse_args(flags), int(os.environ["GROUP_WORLD_SIZE"])
    rows, held_out = find_rows(args)
    folder = Path(args.output_dir)

    def gather(key, word):
        """Return the words of all machines; their first ranks take part."""
        store.set(f"{key}/{machine}", json.dumps(word))
        return [await_word(store, f"{key}/{other}", args.timeout) for other in range(number)]

    args.machines = sum(([i] * size for i, size in enumerate(gather("size", int(os.environ["LOCAL_WORLD_SIZE"])))), [])
    mark = None
    if machine == 0:
        stack.enter_context(locked_output_dir(folder))
        remove_left(args)
        mark = stack.enter_context(tempfile.NamedTemporaryFile(dir=folder, prefix=".here-"))
    seen = gather("mark", mark and Path(mark.name).name)[0]
    own_disk = machine == 0 or not (folder / seen).exists()  # or it is one with that of machine 0
    if own_disk and machine:
        stack.enter_context(locked_output_dir(folder))
        remove_left(args)
    disks = [i if own else 0 for i, own in enumerate(gather("disk", own_disk))]
    args.keepers = [args.machines.index(disk) for disk in sorted(set(disks))]
    args.sharing = [[i for i, disk in enumerate(disks) if disk == own] for own in disks]

    model_path, config, tokenizer = find_model(args)
    token, args.hf_token = args.hf_token, None
    if args.push_to_hub and own_disk:
        args.push_to_hub = make_repository(args.push_to_hub, token)
    data = stack.enter_context(tempfile.TemporaryDirectory(dir=folder, prefix=".prepared-"))
    partition = prepare_data(args, rows, held_out, tokenizer, data)
    check_space(args, config)
    args.resume = (folder / "config.json").exists()
    if args.resume:
        check_config(folder, args)

    local = ("model_name", "dataset_path", "model_path", "data_path", "output_dir")
    logs = [path.name for path in [*folder.glob("*_loss.json"), folder / "rounds.jsonl"] if path.exists()]
    words = gather(
        "prepared",
        {
            "host": socket.gethostname(),
            "rows": args.data_digest,
            "model": utils.digest_of_model(model_path),
            "flags": {k: v for k, v in resolved_config(args).items() if k not in (*local, "num_gpus", "data_digest")},
            "checkpoints": utils.survey(folder),
            "rounds": len(utils.read_rounds(folder)),
            "finished": args.resume and is_finished(folder),
        },
    )
    gather("heard", True)
    check_agreement(words)
    args.resume_from = None
    if common := utils.find_common([word["checkpoints"] for word in words]):
        name, seal, sizes, owners = common
        args.resume_from = folder / "checkpoints" / name
        if any(len(machines) < number for machines in owners.values()):
            args.missing = [sizes, owners]
        # the rounds so far, for a machine that was not there
        source = max(range(number), key=lambda i: (words[i]["rounds"], -i))
        if machine == source:
            store.set("logs", json.dumps({name: (folder / name).read_text(encoding="utf-8") for name in logs}))
        if own_disk and words[machine]["rounds"] < words[source]["rounds"]:
            for log, text in await_word(store, "logs", args.timeout).items():
                utils.write_aside(folder / log, text)
        finished = [i for i, word in enumerate(words) if word["finished"]]
        if utils.round_of(args.resume_from) == args.num_rounds and finished:
            args.resume_from = FINISHED
            if machine != finished[0]:
                args.push_to_hub = None
    if machine == 0 and args.resume_from == FINISHED:
        place = f"machine {finished[0]} ({words[finished[0]]['host']})"
        print(f"nothing to do: the run is finished, and its model in {folder} on {place}", flush=True)
    elif machine == 0:
        if args.resume_from:
            print(f"resuming {whereabouts(args.resume_from)} of {args.num_rounds}", flush=True)
        if not args.quiet:
            print(report.partition_table(partition), flush=True)
    if own_disk and args.resume_from != FINISHED:
        mine = words[machine]["checkpoints"]
        torn = [n for n, (own, *_) in mine.items() if common and n == common[0] and own != common[1]]
        open_output_dir(args, args.resume_from, partition, torn)
    gather("opened", True)
    args.model_path, args.data_path = model_path, f"{data}/data"
    store.set(f"args/{machine}", json.dumps(vars(args), default=str))
    return args, token


def check_agreement(words):
    """Refuse machines that would train on other rows, another model, or with other flags."""

    def fail_where_different(values, what):
        if len({json.dumps(value) for value in values}) > 1:
            found = [f"machine {i} ({word['host']}) {value}" for i, (word, value) in enumerate(zip(words, values))]
            fail(f"{what} on all machines: {', '.join(found)}")

    for name in words[0]["flags"]:
        fail_where_different([word["flags"][name] for word in words], f"--{name} is not the same")
    for what, flag in (("rows", "--dataset_path"), ("model", "--model_name")):
        fail_where_different([word[what][:8] for word in words], f"{flag}: the digest of the {what} is not the same")


def await_word(store, key, minutes=float("inf")):
    """Return what a machine says by `key`; ends the program when one has refused to go on, or is gone."""
    problem, late = "machine 0 does not go on; see what it says", time.monotonic() + 60 * minutes  # it has the store
    with contextlib.suppress(dist.DistError):
        while not store.check([key]) and not store.check(["refused"]) and time.monotonic() < late:
            time.sleep(0.05)
        if store.check([key]):
            return json.loads(store.get(key))
        problem = f"no word from machine {key.split('/')[-1]} for {minutes:g} minutes (--timeout)"
        if store.check(["refused"]):
            problem = f"{store.get('refused').decode()} does not go on; see what it says"
    time.sleep(2)  # seconds: with the first rank that ends, torchrun ends all here, and that one is to say it first
    print(f"main.py: {problem}", file=sys.stderr)
    raise SystemExit(1)


def open_store(rank):
    """Return the store in which the ranks of this start of torchrun find each other, and nobody else."""
    host, port, size = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), int(os.environ["WORLD_SIZE"])
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":  # TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1: rank 0 has it
        return make_store(host, port) if rank == 0 else dist.TCPStore(host, port)
    store, mine = dist.TCPStore(host, port), secrets.token_hex(8)
    # it is the agents', and holds what ranks have said before a restart: agree on a name that is new
    store.set(f"hello/{rank}", mine)
    while rank == 0 and store.add(f"here/{mine}", 0) < size - 1:
        others = [store.get(f"hello/{r}").decode() for r in range(1, size) if store.check([f"hello/{r}"])]
        store.set("welcome", json.dumps([mine, *others]))
        time.sleep(0.05)
    if rank == 0:
        return dist.PrefixStore(mine, store)
    while not store.check(["welcome"]) or mine not in (names := json.loads(store.get("welcome"))):
        time.sleep(0.05)
    store.add(f"here/{names[0]}", 1)
    return dist.PrefixStore(names[0], store)


def make_store(host, port):
    """Serve a store that listens on this address only, unlike torchrun's own, which listens on all of a machine."""
    listener = socket.create_server((host, port), backlog=1024)
    return dist.TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def serve_rendezvous(endpoint):
    """Be the store in which torchrun's agents meet, until Ctrl-C."""
    host, _, port = endpoint.rpartition(":")
    try:
        if not host or not 0 < int(port) < 2**16:
            raise ValueError("not HOST:PORT")
        store = make_store(host, int(port))
    except (OSError, ValueError, dist.DistError) as error:
        fail(f"--rendezvous {endpoint}: {first_line(error)}; give an address of this machine and a free port")
    print(f"torchrun --rdzv_backend c10d --rdzv_endpoint {endpoint} --rdzv_conf is_host=0 ...", flush=True)
    while store:
        time.sleep(3600)


def find_interface(address):
    """Return the name of the network interface by which this machine reaches `address`, loopback if it is alone."""
    if os.environ["GROUP_WORLD_SIZE"] == "1":
        return "lo"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((socket.gethostbyname(address), 9))  # sends nothing
        except OSError as error:
            fail(f"{address}, as torchrun calls the first machine, is unknown here ({error}): give it --local_addr")
        own = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no address
                request = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(request[20:24]) == own and not own.startswith("127."):
                    return name
    if own.startswith("127."):
        fail(f"{address} is this machine only to itself: give torchrun --local_addr and an address that all can reach")
    fail(f"no interface has {own} as its first address: set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME to that to use")


def stop(number, frame):
    """End the program on Ctrl-C or SIGTERM; `launch` lets the ranks save."""
    raise SystemExit(128 + number)


def main(argv=None, target=run_rank):
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # of names and labels, whatever the locale
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it reports of a broken file is in our one line
    flags = sys.argv[1:] if argv is None else argv
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if argv is None:
        del sys.argv[1:]  # of which every rank gets a copy, and which may hold the token
    try:
        if dist.is_torchelastic_launched():
            return join(flags, target)
        args = parse_args(flags)
        if args.dry_run:
            return dry_run(args)
        if args.rendezvous:
            return serve_rendezvous(args.rendezvous)
        if args.ask is not None or args.merge:
            return use(args)
        with locked_output_dir(Path(args.output_dir)):
            compare(args, flags, target) if args.compare else run(args, target)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        print(f"main.py: cannot write: {error}; make room on that disk, and try again", file=sys.stderr)
        raise SystemExit(1) from None


def dry_run(args):
    """Print what the run would need; neither loads the weights of the model, nor writes anything."""
    rows, held_out = find_rows(args)
    _, config, tokenizer = find_model(args, weights=False)
    check_template(args, tokenizer, rows)
    if not all(hasattr(config, name) for name in ("intermediate_size", "num_key_value_heads")):
        fail(f"--model_name {args.model_name} is not built as LLaMA is")
    number = min(SAMPLED_ROWS, len(rows))
    sample = rows.select(np.random.default_rng(args.seed).choice(len(rows), number, replace=False))
    sample = tokenize(args, sample, tokenizer, keep_in_memory=True)
    sample = sample.filter(lambda row: row["answer_length"] > 0, keep_in_memory=True)
    if not len(sample):
        fail(f"--dataset_path {args.dataset_path}: no row that was looked at has an answer within --max_length")
    device = "cuda" if args.num_gpus else "cpu"
    half = args.num_gpus and args.torch_dtype != "float32" or args.torch_dtype == "bfloat16"
    shape = (config.hidden_size, config.intermediate_size)
    speed = report.measure_speed(device, torch.bfloat16 if half else torch.float32, shape)
    num_held_out = len(held_out) if held_out else len(rows) // (args.num_parts + 1)
    numbers = report.estimate(args, config, sample["length"], sample["answer_length"], num_held_out, speed)
    report.print_estimate(args, numbers, len(rows), sample["length"], speed)


def compare(args, argv, target):
    """Run each of --compare, again for each of --repeats, on the same split, seed and rows, and make a table of them.

    A run is in a folder of its own, as any other. One that ends by itself (exit code 3), or whose seed makes a split
    that is refused (2), has no figures, and the others go on.
    """
    folder, runs = Path(args.output_dir), []
    for repeat in range(args.repeats):
        for text, flags in args.arms.items():
            place = folder / "comparison" / f"{re.sub('[^A-Za-z0-9.+-]+', '_', text)}_seed_{args.seed + repeat}"
            own = ["--compare", "", "--repeats", "1", "--seed", str(args.seed + repeat), "--output_dir", str(place)]
            each = parse_args([*argv, *flags, *own])  # all of them, before the first begins
            each.hf_token = args.hf_token
            started = (place / "config.json").exists()
            if started and not args.resume and not args.overwrite:
                fail(f"{folder} already holds a comparison: --resume goes on with it, --overwrite removes it")
            each.resume = args.resume and started
            runs.append((text, place, each))
    if args.resume and not any(each.resume for _, _, each in runs):
        fail(f"--resume: {folder} holds no comparison; leave --resume out to start one")
    for _, _, each in runs[: len(args.arms)]:
        find_rows(copy.copy(each))  # what can be refused is refused before the first run
    if args.overwrite:  # else an earlier one that was longer would be mixed with this one
        shutil.rmtree(folder / "comparison", ignore_errors=True)
    rows = []
    for number, (text, place, each) in enumerate(runs, start=1):
        print(f"\ncomparison {number}/{len(runs)}: {text}, seed {each.seed}", flush=True)
        try:
            with locked_output_dir(place):
                run(each, target)
            rows.append(report.comparison_row(text, place))
        except SystemExit as error:
            if error.code != 3 and not (error.code == 2 and any(rows)):
                raise
            rows.append(None)
    repeats = [rows[i : i + len(args.arms)] for i in range(0, len(rows), len(args.arms))]
    comparison = report.compare_rows(list(args.arms), repeats)
    tables = report.comparison_tables(comparison)
    utils.write_aside(folder / "comparison.json", json.dumps(comparison, indent=2) + "\n")
    utils.write_aside(folder / "comparison.md", tables)
    report.plot_comparison(comparison, folder / "comparison.png")
    print(f"\n{tables}\n{folder}/comparison.json, .md and .png", flush=True)
    if None in rows:
        raise SystemExit(3)


def use(args):
    """--ask the finished model in output_dir, or --merge it into its base."""
    folder = Path(args.output_dir).resolve()
    if (folder / utils.GLOBAL_MODEL).is_dir():
        folder = folder / utils.GLOBAL_MODEL
    if not (folder / "adapter_config.json").is_file():
        several = sorted(folder.glob(f"{utils.CLIENT_MODELS}/*/"))
        advice = f"its clients have models of their own: name one, as in --output_dir {several[0]}" if several else ""
        fail(f"--output_dir {args.output_dir} holds no finished model; {advice or 'name the output_dir of a run'}")
    config = next((c for c in (parent / "config.json" for parent in folder.parents[:2]) if c.is_file()), None)
    if config:  # of the run
        args.load_in_4bit = json.loads(config.read_text(encoding="utf-8")).get("load_in_4bit", args.load_in_4bit)
    base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    if args.model_name == EMBEDDED_MODEL and Path(base).name != Path(EMBEDDED_MODEL).name:  # it was not given
        args.model_name = absolute(base)
    args.model_path, _, tokenizer = find_model(args)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    if args.merge:
        merged = folder.with_name("merged_model")
        if merged.exists() and not args.overwrite:
            fail(f"{merged} is there already; --overwrite writes over it")
    import federated

    try:
        model = federated.load_finished(args, folder)
    except RuntimeError as error:
        fail(f"--model_name {args.model_name} does not fit the adapter in {folder}: {first_line(error)}")
    for question in read_questions() if args.ask == "" else filter(None, [args.ask]):
        print(federated.answer_question(model, tokenizer, question, args.context), flush=True)
    if args.merge:
        federated.merge(model, tokenizer, merged)
        print(f"merged into {merged}", flush=True)


def read_questions():
    """Yield lines from the terminal, or from a file or pipe, up to its end."""
    prompt = "> " if sys.stdin.isatty() else ""
    with contextlib.suppress(EOFError):
        while True:
            if question := input(prompt).strip():
                yield question


def run(args, target):
    """Check and prepare all that the ranks need, and run them."""
    check_output_dir(args)
    if not args.num_gpus:
        start_imports()
    rows, held_out = find_rows(args)
    resume_from, token = find_checkpoint(args), args.hf_token
    model_path, config, tokenizer = find_model(args)
    if args.push_to_hub:
        args.push_to_hub = make_repository(args.push_to_hub, token)
    if resume_from == FINISHED:
        print(f"nothing to do: the run in {args.output_dir} is finished")
        return push(args, token)
    remove_left(args)
    with tempfile.TemporaryDirectory(dir=args.output_dir, prefix=".prepared-") as folder:
        partition = prepare_data(args, rows, held_out, tokenizer, folder)
        check_space(args, config)
        open_output_dir(args, resume_from, partition)
        if not args.quiet:
            print(report.partition_table(partition), flush=True)
        args.hf_token = None  # the ranks read from this disk only
        args.model_path, args.resume_from = model_path, resume_from
        args.data_path = f"{folder}/data"
        run_to_the_end(target, args)
    push(args, token)


def remove_left(args):
    """Remove what a run that was killed had prepared."""
    for left in Path(args.output_dir).glob(".prepared-*"):
        shutil.rmtree(left)
    for left in Path(args.output_dir).glob(".here-*"):
        left.unlink()


def make_repository(name, token):
    """Make the repository of --push_to_hub where there is none; returns its full name."""
    from huggingface_hub import HfApi

    try:
        return HfApi(token=token).create_repo(name, private=True, exist_ok=True).repo_id
    except Exception as error:  # of the dozen kinds that the hub's client has, every one ends the run
        fail(f"--push_to_hub {name}: set HF_TOKEN to a token that may write there ({first_line(error)})")


def push(args, token):
    """Upload the finished adapter, if that was asked for."""
    from huggingface_hub import HfApi

    if not args.push_to_hub:
        return
    folder, hub = Path(args.output_dir, utils.GLOBAL_MODEL), HfApi(token=token)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if os.path.isabs(config["base_model_name_or_path"]):  # a folder here, which is nobody else's business
        config["base_model_name_or_path"] = Path(config["base_model_name_or_path"]).name
    config = json.dumps(config, indent=2).encode()
    try:
        address = hub.upload_folder(
            repo_id=args.push_to_hub, folder_path=folder, ignore_patterns=["adapter_config.json"]
        )
        hub.upload_file(repo_id=args.push_to_hub, path_or_fileobj=config, path_in_repo="adapter_config.json")
    except Exception as error:
        again = f"--resume --push_to_hub {args.push_to_hub} tries again"
        print(f"main.py: {folder} was not uploaded ({first_line(error)}); {again}", file=sys.stderr)
        raise SystemExit(1) from None
    print(f"uploaded: {address}", flush=True)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as in a job of a script that goes on without a terminal
            signal.signal(number, stop)
    main()
