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
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
import main
import utils

PAIRS = 5


def memory(field):
    """VmRSS (now) or VmHWM (highest since `clear_refs`) of this process, in GB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1e6


def plain_trainer(args, data, folder, **settings):
    """TRL's trainer as its users build it, on the rows of this rank."""
    import torch
    import trl.trainer.utils
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer
    from trl.kernels.chunked_logprob import _use_triton

    import federated

    trl.trainer.utils._use_triton = _use_triton  # as it was before federated.py was imported
    dtype, device = (torch.bfloat16, "cuda:0") if args.num_gpus else (torch.float32, "cpu")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        args.model_path, dtype=dtype, device_map={"": device}, quantization_config=quantization
    )
    config = {
        "use_cpu": not args.num_gpus,
        "bf16": args.num_gpus > 0,
        "optim": args.optim,
        "gradient_checkpointing": args.num_gpus > 0,
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
    eval_dataset = config.pop("eval_dataset", None)
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=folder, **config),
        train_dataset=data.train,
        eval_dataset=eval_dataset,
        processing_class=AutoTokenizer.from_pretrained(args.model_path),
        peft_config=LoraConfig(
            r=args.lora_r, lora_alpha=args.lora_alpha, target_modules=utils.LORA_TARGETS, task_type="CAUSAL_LM"
        ),
    )
    for parameter in federated.lora_parameters(trainer.model) if not args.num_gpus else []:
        parameter.data = parameter.data.float()  # bf16 is slow on the CPU
    return trainer


def clock(trainer, times):
    """Let `trainer` append the time at which each of its steps begins to `times`."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            times.append(time.perf_counter())

    trainer.callback_handler.callbacks.insert(0, Clock())  # before the round begins


def federated_run(rank, args, folder):
    """A whole local_train; returns the time at which each step begins, and the lengths of its rows."""
    import trl.trainer.utils

    import federated

    times, lengths = [], []
    trl.trainer.utils._use_triton = lambda device: True  # as federated.py has it

    class TimedRounds(federated.FederatedRounds):
        def on_train_begin(self, *args, **kwargs):
            lengths.extend(self.data.lengths)
            super().on_train_begin(*args, **kwargs)

        def on_step_begin(self, *args, **kwargs):
            times.append(time.perf_counter())
            super().on_step_begin(*args, **kwargs)

    original, federated.FederatedRounds = federated.FederatedRounds, TimedRounds
    federated.local_train(rank, with_paths(args, folder))
    federated.FederatedRounds = original
    return times, lengths


def with_paths(args, folder):
    import argparse

    os.makedirs(folder, exist_ok=True)
    return argparse.Namespace(**vars(args) | {"output_dir": folder, "store_path": f"{folder}_store"})


def prepare(rank):
    import report
    import torch
    import transformers

    for name in main.LAUNCHER_VARIABLES:
        os.environ.pop(name, None)
    utils.ANSWERED_ROWS, utils.GLOBAL_EVAL_ROWS, utils.CLIENT_EVAL_ROWS = 1, 2, 1  # not what is timed
    report.plot_losses = lambda folder: None
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")


def speed_rank(kinds, pairs, rank, args):
    """The kinds in turn; writes [(tokens per second, GB)] of each."""
    prepare(rank)
    import federated

    data, measured = federated.load_client_data(rank, args), {kind: [] for kind in kinds}
    per_step = args.per_device_train_batch_size
    for pair in range(pairs):
        for kind, results in measured.items():
            gc.collect()
            folder = f"{args.output_dir}/{kind}_{pair}"
            if kind == "plain":
                times, lengths = [], data.train["length"]
                trainer = plain_trainer(args, data, folder, max_steps=args.num_rounds)
                clock(trainer, times)
                trainer.train()
                del trainer
            else:
                times, lengths = federated_run(rank, args, folder)
            tokens = sum(lengths[per_step : (len(times) - 1) * per_step])  # without the first step, and the last
            results.append((tokens / (times[-1] - times[1]), memory("VmHWM")))
    Path(args.output_dir, f"speed_{rank}.json").write_text(json.dumps(measured))


def speed(smollm2):
    def measure(*kinds, pairs=PAIRS, rounds=10):
        with tempfile.TemporaryDirectory() as folder:
            flags = f"--world_size 2 --num_rounds {rounds} --local_steps 1 --eval_rounds 100 --save_rounds 100"
            flags = [*flags.split(), "--warmup_steps", "0", "--model_name", smollm2, "--output_dir", folder]
            main.main(flags, target=functools.partial(speed_rank, kinds, pairs))
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


def naive_loop(rank, args, data, folder, rounds, **settings):
    """The loop that everybody writes first, with its collectives; returns the seconds of its rounds."""
    import torch.distributed as dist

    from federated import lora_parameters

    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}_store", args.world_size), rank=rank,
                            world_size=args.world_size)  # fmt: skip
    trainer, seconds = plain_trainer(args, data, folder, max_steps=1, **settings), []
    for _ in range(rounds):
        start = time.perf_counter()
        trainer.train()
        for parameter in lora_parameters(trainer.model):
            dist.all_reduce(parameter.data)
            parameter.data /= args.world_size
        seconds.append(time.perf_counter() - start)
    dist.destroy_process_group()
    return seconds


def rounds_rank(rank, args):
    prepare(rank)
    import federated

    data, measured = federated.load_client_data(rank, args), {"naive": [], "federated": []}
    for pair in range(PAIRS):
        measured["naive"] += naive_loop(rank, args, data, f"{args.output_dir}/naive_{pair}", 5)[1:]
        times, _ = federated_run(rank, args, f"{args.output_dir}/federated_{pair}")
        measured["federated"] += [after - before for before, after in zip(times[1:], times[2:])]
    Path(args.output_dir, f"rounds_{rank}.json").write_text(json.dumps(measured))


def make_machinery(folder):
    """A model of 448 LoRA tensors and next to no arithmetic, and rows of 16 tokens."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(main.EMBEDDED_MODEL)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=16, num_hidden_layers=32, num_attention_heads=1
    )
    LlamaForCausalLM(config).save_pretrained(f"{folder}/model")
    tokenizer.save_pretrained(f"{folder}/model")
    words = Path(main.EMBEDDED_DATA, "train.jsonl").read_text().split()
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
            main.main(flags.split(), target=rounds_rank)
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
