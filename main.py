"""Federated fine-tuning of LLaMA: one process per GPU, each a client that trains a 4-bit model with LoRA on its rows.

    python main.py                                                      # everything embedded: no GPU, no download
    python main.py --world_size 8 --model_name meta-llama/Llama-3.1-8B-Instruct --dataset_path rajpurkar/squad
    torchrun --nnodes 2 --nproc_per_node 8 --rdzv_backend c10d --rdzv_endpoint HOST:PORT main.py    # on each machine

This file has the flags and the order of a run; `federated.local_train` is what each rank does.
"""

import os

from fllama import basemodel, terminal

terminal.open_missing_streams()  # before anything opens a file
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"  # before anything of Hugging Face is imported
os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"  # else loading a local file calls s3.amazonaws.com
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# what a killed process has not given back is no news to the user
os.environ.setdefault("PYTHONWARNINGS", "ignore::UserWarning:multiprocessing.resource_tracker")

import argparse
import contextlib
import errno
import functools
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import datasets

import utils
from fllama import (
    accountant,
    checkpoints,
    compare,
    estimate,
    gpus,
    launch,
    machines,
    options,
    prepare,
    report,
    sources,
    use,
)
from fllama.options import columns, fraction, not_negative, not_negative_int, positive, seed

SCHEDULES = ["cosine", "linear", "constant", "constant_with_warmup"]
OPTIMIZERS = ["adamw_torch", "adamw_torch_fused", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit", "sgd"]
DTYPES, ATTENTIONS = ["auto", "bfloat16", "float16", "float32"], ["sdpa", "flash_attention_2", "eager"]
AVERAGE_DTYPES = ["float32", "bfloat16", "int8"]
PARTITIONS = ["iid", "dirichlet", "column", "quantity", "folder", "file"]
TRACKERS = ["none", "tensorboard", "wandb", "trackio", "mlflow"]

# -----------------------------------------------------------------------------
# flags


def parse_args(argv=None):
    """Parse the flags and fill in the defaults that depend on others; bad values end the program with exit code 2."""
    parser = argparse.ArgumentParser(
        usage="python main.py [flags]     (python main.py --help lists them)",
        description="Federated fine-tuning of LLaMA. With no flag: the embedded model on the embedded data.",
        formatter_class=options.HelpWithDefaults,
    )
    add = parser.add_argument_group("federation").add_argument
    add("--world_size", type=positive(int), default=options.ranks_of_torchrun() or 8, help="processes; one per GPU")
    add("--num_clients", type=positive(int), help="the processes play them in turn (default: one each)")
    add("--clients_per_round", type=positive(int), help="drawn at random for each round (default: all of them)")
    add("--num_rounds", type=positive(int), default=20, help="rounds: local training, then one averaging")
    add("--local_steps", type=positive(int), default=8, help="optimizer steps of each client in a round")
    add("--aggregator", choices=list(utils.AGGREGATORS), default="fedavg", help="averaging strategy, see utils.py")
    add("--average_dtype", choices=AVERAGE_DTYPES, default="float32", help="of updates sent; narrow: error feedback")
    add("--client_state", choices=["keep", "reset"], default="keep", help="AdamW's moments of a client after its turn")
    add("--prox_mu", type=not_negative, default=0, help="FedProx: pull of the round's start on each local step")
    add("--on_bad_update", choices=["skip", "fail"], default="skip", help="NaN, infinite, or 1,000 x the median length")
    add("--scaffold", action="store_true", help="SCAFFOLD: plus the mean gradient of all clients, minus the own")

    add = parser.add_argument_group("server (default: the strategy's own, see utils.py)").add_argument
    add("--server_lr", type=positive(float), help="step of fedavgm, diloco, fedadagrad, fedadam, fedyogi")
    add("--server_momentum", type=fraction, help="momentum of these, beta 1 of the last three")
    add("--server_beta2", type=fraction, help="of fedadam and fedyogi: how long they remember squared updates")
    add("--server_tau", type=positive(float), help="of fedadagrad, fedadam, fedyogi: added to the root of these")
    add("--clip_norm", type=positive(float), help="of norm_clip: longest update")
    add("--trim_fraction", type=fraction, help="of trimmed_mean: share of clients to cut at either end")
    add("--num_malicious", type=not_negative_int, help="of krum: clients that may lie")
    add("--weiszfeld_iterations", type=positive(int), help="of geometric_median: reweighted means after the first mean")
    add("--weiszfeld_smoothing", type=positive(float), help="of geometric_median: least distance that counts")

    add = parser.add_argument_group("model").add_argument
    add("--model_name", default=options.EMBEDDED_MODEL, help="folder, or id on the Hugging Face hub")
    add("--hf_token", help="token for gated models; better set HF_TOKEN: other users can see a command line")
    add("--load_in_4bit", action=argparse.BooleanOptionalAction, default=True, help="NF4 base weights (QLoRA)")
    add("--torch_dtype", choices=DTYPES, default="auto", help="of the arithmetic (auto: bfloat16, CPU float32)")
    add("--attn_implementation", choices=ATTENTIONS, default="sdpa", help="flash_attention_2: pip install flash-attn")
    add("--lora_r", type=positive(int), default=16, help="rank of the adapter")
    add("--lora_alpha", type=positive(float), default=32, help="the adapter counts lora_alpha / lora_r times")
    add("--lora_dropout", type=fraction, default=0.0, help="dropout in front of the adapter")
    add("--lora_variant", choices=list(utils.LORA_VARIANTS), default="lora", help="what is trained and what is shared")

    add = parser.add_argument_group("data").add_argument
    add(
        "--dataset_path", default=options.EMBEDDED_DATA, help="json, jsonl, csv, parquet file, folder, or id on the hub"
    )
    add("--max_length", type=positive(int), default=1024, help="tokens of a row; longer rows are cut at the end")
    add("--packing", action="store_true", help="pack a client's rows into sequences of max_length tokens")
    add("--columns", type=columns, default={}, help="question=Frage,answer=Antwort: the columns of other forms of rows")
    add("--dataset_config", help="which of several data sets in one repository")
    add("--dataset_train_split", help="name of the split to train on (default: train)")
    add("--dataset_test_split", help="name of the held-out split (default: validation, or test)")
    add("--learn", choices=["all", "last"], default="all", help="of a chat: all answers of the assistant, or the last")
    add("--show_rows", type=not_negative_int, default=0, help="training rows to show as the model sees them")
    add("--partition", choices=PARTITIONS, help="who gets which rows (default: iid, or as the data set names clients)")
    add("--partition_column", help="of dirichlet and column: whose values tell clients apart (default: label)")
    add("--dirichlet_alpha", type=positive(float), default=0.5, help="the smaller, the less alike the clients")
    add("--split_seed", type=seed, help="of the split alone (default: --seed)")
    own_rows = (
        "of each client, held out for the end; 0: a tenth, 16 to 128 (default: of --compare; else a tenth, 1 to 16)"
    )
    add("--own_eval_rows", type=not_negative_int, help=own_rows)

    add = parser.add_argument_group("privacy (docs/privacy.md)").add_argument
    add("--canaries", type=not_negative_int, default=0, help="made-up rows for each client, to measure what leaks")
    add("--dp_epsilon", type=positive(float), help="differential privacy of each row (of each client with dp_fedavg)")
    add("--dp_delta", type=fraction, help="chance that it fails, below 1 / rows (default: 1e-5)")
    add("--dp_clip_norm", type=positive(float), help="longest gradient of a row, or update of a client (default: 1)")

    add = parser.add_argument_group("local training").add_argument
    add("--per_device_train_batch_size", type=positive(int), default=4, help="rows of a client in one forward pass")
    add("--gradient_accumulation_steps", type=positive(int), default=1, help="forward passes in an optimizer step")
    add("--learning_rate", type=positive(float), help="peak of AdamW (default: 2e-4, embedded model 1e-2)")
    add("--lr_scheduler_type", choices=SCHEDULES, default="cosine", help="curve over the whole run, not over a round")
    add("--warmup_steps", type=not_negative, default=0.05, help="steps, or below 1 the share of all steps")
    add("--optim", choices=OPTIMIZERS, help="optimizer (default: adamw_torch, on GPUs fused; paged: less GPU memory)")
    add("--gradient_checkpointing", action=argparse.BooleanOptionalAction, help="less memory (default: on GPUs)")
    add("--torch_compile", action="store_true", help="compile the model in its first steps")
    add("--use_liger_kernel", action="store_true", help="fused layers on GPUs: pip install liger-kernel")

    run = parser.add_argument_group("run")
    add = run.add_argument
    add("--output_dir", default="outputs", help="folder for all that the run leaves behind")
    either = run.add_mutually_exclusive_group().add_argument
    either("--overwrite", action="store_true", help="remove an earlier run from output_dir")
    either("--resume", action="store_true", help="continue the run in output_dir where it stopped")
    add("--eval_rounds", type=positive(int), help="rounds between evaluations (default: a fifth of num_rounds)")
    add("--save_rounds", type=positive(int), help="rounds between checkpoints (default: a tenth of num_rounds)")
    add("--report_to", choices=TRACKERS, default="none", help="tracker, to be installed by yourself")
    add("--seed", type=seed, default=42, help="of the split, the order of the rows, the adapter and its dropout")
    add("--dry_run", action="store_true", help="print what the run will need: memory, bytes, disk; no weights")
    add("--restarts", type=not_negative_int, default=0, help="after a failure, start again from the last checkpoint")
    add("--timeout", type=positive(float), default=30, help="minutes that a rank waits for the others")
    add("--backend", choices=["nccl", "gloo"], help="(default: nccl with a GPU for every rank, otherwise gloo)")
    add("--quiet", action="store_true", help="say only what the run has come to")
    add("--max_new_tokens", type=positive(int), help="of an answer (default: the longest accepted one, up to 256)")
    add("--eval_questions", type=positive(int), default=96, help="global held-out ones to answer, before and after")
    add("--generate_samples", type=not_negative_int, default=0, help="held-out questions to show, with all answers")

    add = parser.add_argument_group("comparing").add_argument
    add("--compare", metavar="A,B,...", help=f'a run for each of {", ".join(compare.ARMS)}; "fedavg --local_steps 32"')
    add("--repeats", type=positive(int), default=1, help="of --compare, with other seeds and other splits")
    add("--seeds", type=positive(int), default=1, help="of --compare: training seeds on each split")
    sweep_help = (
        "learning_rate=1e-3,3e-3: each run of --compare takes its best, found on rows that are not scored; "
        "fedadam:server_lr=3e-3,1e-2: values of fedadam alone"
    )
    add("--sweep", type=options.sweep, action="append", metavar="[NAME:]FLAG=X,Y,...", help=sweep_help)
    add(
        "--centralized",
        action="store_true",
        help="one client trains on all rows, its steps as large as all steps of a round",
    )

    add = parser.add_argument_group("the finished model in output_dir").add_argument
    add("--ask", nargs="?", const="", metavar="QUESTION", help="answer it (without one: lines from the terminal)")
    add("--context", default="", help="of --ask: the text that holds the answer")
    add("--merge", action="store_true", help="write it as one 16-bit model, merged_model")
    add("--push_to_hub", metavar="REPO", help="upload the adapter after the run; a new repository is private")

    parser.error = options.fail
    args = parser.parse_args(argv)
    args.partition = args.partition or sources.default_partition(options.absolute(args.dataset_path))
    options.complete(args, gpus.count_gpus())
    return args


# -----------------------------------------------------------------------------
# the order of a run


def main(argv=None, target=None):
    """Run the program with the flags `argv`; `target(rank, args, run)` is what each rank does (None: `run_rank`)."""
    flags, target = prepare_process(argv), target or run_rank
    with one_line_if_unwritable():
        if options.ranks_of_torchrun():
            machines.quiet_but_first()
            args = parse_args(flags)
            token, command = args.hf_token, options.describe_command(flags, args.hf_token)
            prepare_all = functools.partial(prepared_run, command=command)
            if machines.join(args, gpus.count_gpus(), prepare_all, target):
                use.push(args, token)
            return
        args = parse_args(flags)
        folder = Path(args.output_dir)
        if args.dry_run:
            estimate.dry_run(args, gpus.count_gpus())
        elif args.ask is not None or args.merge:
            use.use(args, gpus.count_gpus())
        elif args.compare:
            with checkpoints.locked_output_dir(folder):
                compare.compare(args, flags, parse_args, lambda each, words: run_once(each, words, target))
        else:
            with checkpoints.locked_output_dir(folder):
                run_once(args, flags, target)


def run_once(args, flags, target):
    """Run one federation on this machine: prepare, launch the ranks, publish."""
    checkpoints.check_output_dir(args)
    if not gpus.count_gpus():  # a GPU's driver does not survive a fork
        launch.start_imports()
    token = args.hf_token
    with prepared_run(args, options.describe_command(flags, token)) as run:
        args.hf_token = None  # the ranks read from this disk only
        if run:
            launch.run_to_the_end(target, args, run)
    use.push(args, token)


@contextlib.contextmanager
def prepared_run(args, command):
    """Find, check and tokenize all that the ranks need, once for all of them.

    A context manager that gives a Run, or None if the run in output_dir is finished.
    """
    num_gpus, versions = gpus.count_gpus(), prepare.find_versions()
    check_of_gpus = gpus.start_check(num_gpus, options.ranks_here(args))
    source, form = prepare.find_rows(args, num_gpus)
    started = checkpoints.start_of_run(args)
    config = checkpoints.make_config(args, num_gpus=num_gpus, versions=versions, started=started.isoformat())
    checkpoint = checkpoints.find_checkpoint(args, config)
    model_path, model_config, tokenizer = basemodel.find_model(args)
    if checkpoint == checkpoints.FINISHED:
        print(f"nothing to do: the run in {args.output_dir} is finished")
        use.make_repository(args)
        yield None
        return
    gpus.finish_check(check_of_gpus)
    for left in Path(args.output_dir).glob(".prepared-*"):  # by a run that was killed
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=args.output_dir, prefix=".prepared-") as folder:
        partition, data_digest = prepare.prepare_data(
            args, source, form, tokenizer, model_config.vocab_size, folder, started
        )
        guarantee = accountant.promise(args, f"{folder}/data", checkpoint)
        prepare.check_space(args, model_config)
        use.make_repository(args)
        checkpoints.open_output_dir(args, checkpoint, config | {"data_digest": data_digest}, partition)
        if not args.quiet:
            print(report.partition_table(partition), flush=True)
        yield prepare.Run(
            model_path=model_path,
            data_path=f"{folder}/data",
            checkpoint=checkpoint,
            machine_of_rank=(0,) * args.world_size,
            num_gpus=num_gpus,
            command=command,
            versions=versions,
            guarantee=guarantee,
        )


def run_rank(rank, args, run):
    """What the process of each rank does: its environment first, then accelerate and CUDA, which read it."""
    launch.isolate_rank(rank, args, run)
    from federated import local_train

    local_train(rank, args, run)


# -----------------------------------------------------------------------------
# the process


def prepare_process(argv):
    """Make the terminal safe to write to; returns the flags, which are taken out of sys.argv: one may be the token."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # of names and labels, whatever the locale
    terminal.forgive_readers()
    terminal.shorten_temporary_folder()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it reports of a broken file is in our one line
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    if argv is not None:
        return argv
    flags = sys.argv[1:]
    del sys.argv[1:]  # every rank gets a copy of it
    return flags


@contextlib.contextmanager
def one_line_if_unwritable():
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
            raise
        advice = "name a disk that can be written" if error.errno == errno.EROFS else "make room on that disk"
        print(f"main.py: cannot write: {error}; {advice}, and try again", file=sys.stderr)
        raise SystemExit(1) from None


def stop(number, frame):
    """End the program on Ctrl-C (exit code 130) or SIGTERM (143); launch.run_to_the_end lets ranks save before."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) != signal.SIG_IGN:  # as in a job of a script that goes on without a terminal
            signal.signal(number, stop)
    main()
