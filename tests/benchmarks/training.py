"""Federated training against plain TRL and against the naive loop. python tests/benchmarks/training.py [SMOLLM2]

1. Tokens per second and highest memory of a rank, `--local_steps 1`, SmolLM2-135M, 4-bit, 2 ranks, evaluation off:
   against a plain `SFTTrainer` with one uninterrupted `train()` on the same rows, in 2 unconnected processes.
2. Seconds of a round of a model with 448 LoRA tensors (32 layers, width 16, one row of 16 tokens a step), on 2 and 4
   ranks: against the loop that everybody writes first, one `train()` and 448 all-reduces a round.

Both sides of a pair run in turn in the same processes, medians over 5 pairs.
"""

import functools
import gc
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import main
from fllama import basemodel, launch, options, prepare

PAIRS = 5


def memory(field):
    """VmRSS (now) or VmHWM (highest since `clear_refs`) of this process, in GB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1e6


# -----------------------------------------------------------------------------
# plain TRL


def plain_trainer(args, run, rows, folder, eval_dataset=None, **settings):
    """TRL's trainer as its users build it, on `rows`."""
    import torch
    import trl.trainer.utils
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer
    from trl.kernels.chunked_logprob import _use_triton

    from fllama.model import lora_parameters

    trl.trainer.utils._use_triton = _use_triton  # as it was before fllama/model.py was imported
    dtype, device = (torch.bfloat16, "cuda:0") if run.num_gpus else (torch.float32, "cpu")
    if settings.get("fp16"):
        dtype = torch.float16
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        run.model_path, dtype=dtype, device_map={"": device}, quantization_config=quantization
    )
    config = {
        "use_cpu": not run.num_gpus,
        "bf16": run.num_gpus > 0,
        "optim": args.optim,
        "gradient_checkpointing": run.num_gpus > 0,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "learning_rate": args.learning_rate,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    } | settings
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=folder, **config),
        train_dataset=rows,
        eval_dataset=eval_dataset,
        processing_class=AutoTokenizer.from_pretrained(run.model_path),
        peft_config=LoraConfig(
            r=args.lora_r, lora_alpha=args.lora_alpha, target_modules=basemodel.LORA_TARGETS, task_type="CAUSAL_LM"
        ),
    )
    if not run.num_gpus or trainer.args.fp16:
        for parameter in lora_parameters(trainer.model):
            parameter.data = parameter.data.float()  # bf16 is slow on the CPU, and fp16's gradient scaler knows no bf16
    return trainer


def plain_run(args, run, rows, folder, max_steps):
    """One uninterrupted train(); returns the time at which each step begins."""
    from transformers import TrainerCallback

    times = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            times.append(time.perf_counter())

    trainer = plain_trainer(args, run, rows, folder, max_steps=max_steps)
    trainer.add_callback(Clock())
    trainer.train()
    return times


def naive_loop(rank, args, run, rows, folder, rounds, **settings):
    """The loop that everybody writes first, with its collectives; returns the seconds of its rounds."""
    import torch.distributed as dist

    from fllama.model import lora_parameters

    store = dist.FileStore(f"{folder}_store", args.world_size)
    backend = "nccl" if run.num_gpus >= args.world_size else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=args.world_size)
    trainer, seconds = plain_trainer(args, run, rows, folder, max_steps=1, **settings), []
    for _ in range(rounds):
        start = time.perf_counter()
        trainer.train()
        for parameter in lora_parameters(trainer.model):
            dist.all_reduce(parameter.data)
            parameter.data /= args.world_size
        seconds.append(time.perf_counter() - start)
    dist.destroy_process_group()
    return seconds


# -----------------------------------------------------------------------------
# this project


def federated_run(rank, args, run, folder):
    """A whole local_train; returns the time at which each forward pass of its training begins."""
    import argparse

    import trl.trainer.utils
    from trl import SFTTrainer

    import federated

    trl.trainer.utils._use_triton = lambda device: True  # as fllama/model.py has it
    times, original = [], SFTTrainer.training_step

    def timed_step(*args, **kwargs):
        times.append(time.perf_counter())
        return original(*args, **kwargs)

    os.makedirs(folder, exist_ok=True)
    args = argparse.Namespace(**vars(args) | {"output_dir": folder})
    SFTTrainer.training_step = timed_step
    federated.local_train(rank, args, replace(run, rendezvous=f"{folder}_store"))
    SFTTrainer.training_step = original
    return times


def own_rows(rank, args, run):
    """Return the rows of the one client of this rank, in the order in which it reads them."""
    from fllama import data

    rows = data.load_client_data(rank, args, run)
    (client,) = rows.own
    return rows.sequences.select(rows.own[client][rows.schedules[client]])


def begin(rank, args, run):
    """What every rank of these benchmarks begins with."""
    launch.isolate_rank(rank, args, run)
    import torch
    import transformers

    from fllama import data, report

    data.GLOBAL_EVAL_ROWS = 2  # not what is timed
    report.plot_losses = lambda folder, rounds: None
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")


def launch_ranks(flags, target):
    """Run `target` on every rank, with as few held-out rows as can be: they are not what is timed."""
    prepare.CLIENT_EVAL_ROWS = 1
    main.main([*flags, "--eval_questions", "1"], target=target)


# -----------------------------------------------------------------------------
# 1. speed and memory


def speed_rank(kinds, pairs, rank, args, run):
    """The kinds in turn; writes [(tokens per second, GB)] of each."""
    begin(rank, args, run)
    rows, measured = own_rows(rank, args, run), {kind: [] for kind in kinds}
    lengths, per_step = rows["length"][:], args.per_device_train_batch_size
    for pair in range(pairs):
        for kind, results in measured.items():
            gc.collect()
            folder = f"{args.output_dir}/{kind}_{pair}"
            if kind == "plain":
                times = plain_run(args, run, rows, folder, args.num_rounds)
            else:
                times = federated_run(rank, args, run, folder)
            tokens = sum(lengths[per_step : (len(times) - 1) * per_step])  # without the first step, and the last
            results.append((tokens / (times[-1] - times[1]), memory("VmHWM")))
    Path(args.output_dir, f"speed_{rank}.json").write_text(json.dumps(measured))


def speed(smollm2):
    def measure(*kinds, pairs=PAIRS, rounds=10):
        with tempfile.TemporaryDirectory() as folder:
            flags = f"--world_size 2 --num_rounds {rounds} --local_steps 1 --eval_rounds 100 --save_rounds 100"
            flags = [*flags.split(), "--warmup_steps", "0", "--model_name", smollm2, "--output_dir", folder]
            launch_ranks(flags, functools.partial(speed_rank, kinds, pairs))
            return [json.loads(Path(folder, f"speed_{rank}.json").read_text()) for rank in range(2)]

    lines = ["| rank | plain, tokens/s | federated, tokens/s | ratio (of pairs: least to most) |", "|---|---|---|---|"]
    for rank, measured in enumerate(measure("plain", "federated")):
        plain, ours = ([value for value, _ in measured[kind]] for kind in ("plain", "federated"))
        ratios = sorted(b / a for a, b in zip(plain, ours))
        spread = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        lines.append(f"| {rank} | {statistics.median(plain):.1f} | {statistics.median(ours):.1f} | {spread} |")
    lines += ["| highest memory, GB | rank 0 | rank 1 |", "|---|---|---|"]  # each in processes of its own
    for kind in ("plain", "federated"):
        peaks = [measured[kind][0][1] for measured in measure(kind, pairs=1, rounds=6)]
        lines.append(f"| {kind} | {peaks[0]:.3f} | {peaks[1]:.3f} |")
    return lines


# -----------------------------------------------------------------------------
# 2. rounds without arithmetic


def rounds_rank(rank, args, run):
    begin(rank, args, run)
    rows, measured = own_rows(rank, args, run), {"naive": [], "federated": []}
    for pair in range(PAIRS):
        measured["naive"] += naive_loop(rank, args, run, rows, f"{args.output_dir}/naive_{pair}", 5)[1:]
        times = federated_run(rank, args, run, f"{args.output_dir}/federated_{pair}")
        measured["federated"] += [after - before for before, after in zip(times[1:], times[2:])]
    Path(args.output_dir, f"rounds_{rank}.json").write_text(json.dumps(measured))


def make_machinery(folder):
    """A model of 448 LoRA tensors and next to no arithmetic, and rows of 16 tokens."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(options.EMBEDDED_MODEL)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=32, num_attention_heads=1
    )
    LlamaForCausalLM(config).save_pretrained(f"{folder}/model")
    tokenizer.save_pretrained(f"{folder}/model")
    words = Path(options.EMBEDDED_DATA, "train.jsonl").read_text().split()
    rows = ({"prompt": "the site", "completion": " ".join(words[20 * i : 20 * i + 20])} for i in range(200))
    Path(folder, "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def rounds():
    lines = ["| ranks | naive loop, s a round | federated, s a round | times faster |", "|---|---|---|---|"]
    for world_size in (2, 4):
        with tempfile.TemporaryDirectory() as folder:
            make_machinery(folder)
            flags = f"--world_size {world_size} --num_rounds 10 --local_steps 1 --eval_rounds 100 --save_rounds 100"
            flags += f" --per_device_train_batch_size 1 --max_length 16 --dataset_path {folder}/rows.jsonl"
            flags += f" --model_name {folder}/model --output_dir {folder}/out --warmup_steps 0 --lora_r 4"
            launch_ranks(flags.split(), rounds_rank)
            ranks = [json.loads(Path(folder, "out", f"rounds_{rank}.json").read_text()) for rank in range(world_size)]
        slowest = {kind: [max(values) for values in zip(*(rank[kind] for rank in ranks))] for kind in ranks[0]}
        naive, ours = statistics.median(slowest["naive"]), statistics.median(slowest["federated"])
        lines.append(f"| {world_size} | {naive:.3f} | {ours:.3f} | {naive / ours:.1f} |")
    return lines


if __name__ == "__main__":
    lines = rounds()
    if len(sys.argv) > 1:
        lines += speed(sys.argv[1])
    print("\n".join(lines))  # behind what the runs have said
