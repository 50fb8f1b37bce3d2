"""The life of one rank: load a 4-bit LLaMA, train its LoRA on rows of its own, average with the others every round."""

import datetime
import hashlib
import json
import logging
import os
import resource
import shutil
import sys
import time
import warnings
from pathlib import Path

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports optional kernels as missing, once per process

import bitsandbytes as bnb
import datasets
import torch
import torch.distributed as dist
import transformers
from datasets import load_from_disk
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torchmetrics.text import SQuAD
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

import utils

CLIENT_EVAL_ROWS = 32  # at most so many rows of each client are held out, and at most a tenth of its rows
GLOBAL_EVAL_ROWS = 512  # at most so many of the global held-out rows are evaluated
ANSWERED_ROWS = 96  # held-out questions that are answered before and after training, for exact match and F1
MAX_NEW_TOKENS = 32
KEPT_CHECKPOINTS = 2

# -----------------------------------------------------------------------------
# model, data and trainer of one rank


def load_model(args, device):
    """Load the base model, in 4 bits (NF4, double quantization) unless told otherwise, and put a fresh LoRA on it.

    QLoRA, Dettmers et al. 2023 (arXiv:2305.14314). LoRA, Hu et al. 2021 (arXiv:2106.09685).
    """
    dtype = compute_dtype(device)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        args.model_path,
        dtype=dtype,
        quantization_config=quantization if args.load_in_4bit else None,
        device_map={"": device},
    )
    if args.load_in_4bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)  # the trainer decides on that
        keep_4bit_layout(model)
    lora = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=utils.LORA_TARGETS,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, lora)


def keep_4bit_layout(model):
    """Keep bitsandbytes (0.50) from repacking the weights at the first evaluation on CPUs with AVX512-BF16.

    The repacked layout is computed in bf16 by a kernel without a gradient, and stays: training after the first
    evaluation would silently lose every gradient that has to pass through a base weight.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def compute_dtype(device):
    """bf16 where the GPU has it, else fp16; float32 on the CPU (bf16 is 20 times slower there without AMX)."""
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def load_client_data(rank, args):
    """Return (train, held_out, global_held_out, num_rows) of client `rank`, its training rows in the order of the run.

    Disjoint from those of every other client. The global held-out rows are the same on all ranks.
    """
    data = load_from_disk(args.data_path)
    parts = args.world_size + ("held_out" not in data)
    part = utils.partition_dataset(data["train"], rank, parts, args.seed)
    if "held_out" in data:
        global_held_out = utils.partition_dataset(data["held_out"], 0, 1, args.seed)
    else:
        global_held_out = utils.partition_dataset(data["train"], args.world_size, parts, args.seed)
    global_held_out = global_held_out.select(range(min(GLOBAL_EVAL_ROWS, len(global_held_out))))
    held_out = part.select(range(max(1, min(CLIENT_EVAL_ROWS, len(part) // 10))))
    train = part.select(range(len(held_out), len(part)))
    total = args.num_rounds * args.local_steps * args.per_device_train_batch_size * args.gradient_accumulation_steps
    order = utils.schedule_rows(len(train), total, [args.seed, rank])
    return train.select(order), held_out, global_held_out, len(train)


class LocalTrainer(SFTTrainer):
    """TRL's trainer, with a learning rate that is above zero from the first step to the last."""

    def create_scheduler(self, num_training_steps, optimizer=None):
        scheduler = super().create_scheduler(num_training_steps + 1, optimizer)
        with warnings.catch_warnings(action="ignore"):  # torch asks for an optimizer step before the first of these
            scheduler.step()  # a warm-up begins at zero: with one local step, that would be a round without training
        return scheduler


def build_trainer(rank, args, device, model, tokenizer, train):
    """Build the trainer of one rank, which must not know that there are others."""
    dtype = compute_dtype(device)
    config = SFTConfig(
        output_dir=str(Path(args.output_dir, "checkpoints", "staging", f"rank_{rank}")),
        use_cpu=device.type == "cpu",
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        gradient_checkpointing=device.type == "cuda",
        max_steps=args.num_rounds * args.local_steps,
        per_device_train_batch_size=args.per_device_train_batch_size,
        per_device_eval_batch_size=2 * args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        learning_rate=args.learning_rate,
        lr_scheduler_type=args.lr_scheduler_type,
        warmup_steps=args.warmup_steps,
        optim=args.optim,
        seed=args.seed + rank,  # of the dropout masks; the order of the rows is our own
        train_sampling_strategy="sequential",  # the order of the dataset is the schedule of the run
        dataset_kwargs={"skip_prepare_dataset": True},  # tokenized already, once for all ranks
        eval_strategy="no",
        save_strategy="no",
        logging_strategy="no",  # the round does all three
        logging_nan_inf_filter=False,  # a loss that is not a number is to be seen
        report_to=args.report_to if rank == 0 else "none",
        disable_tqdm=True,
    )
    trainer = LocalTrainer(model=model, args=config, train_dataset=train, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    if trainer.accelerator.num_processes != 1:
        raise RuntimeError(f"rank {rank}: accelerate sees other ranks, and would average every gradient (DDP)")
    for parameter in utils.shared_parameters(model):
        parameter.data = parameter.data.float()  # TRL makes the adapters of a 4-bit model bf16, too coarse to average
    return trainer


# -----------------------------------------------------------------------------
# evaluation: by one rank alone, no collectives


@torch.no_grad()
def evaluate(trainer, rows):
    """Return the mean loss over all answer tokens of `rows`, in nats; it does not depend on the batch size."""
    trainer.model.eval()
    loss, tokens = 0.0, 0
    for batch in trainer.get_eval_dataloader(rows):
        tokens += (batch["labels"][:, 1:] != -100).sum().item()
        with trainer.compute_loss_context_manager():
            loss += trainer.compute_loss(trainer.model, batch, num_items_in_batch=1).item()  # divided by 1: the sum
    return loss / tokens


@torch.no_grad()
def answer(model, tokenizer, rows, batch_size):
    """Return the greedy answers of `model` to the prompts of `rows`, as texts of at most MAX_NEW_TOKENS tokens."""
    model.eval()
    stop = model.generation_config.eos_token_id
    stop = {tokenizer.eos_token_id, *(stop if isinstance(stop, list) else [stop])} - {None}
    greedy = GenerationConfig(
        max_new_tokens=MAX_NEW_TOKENS, do_sample=False, eos_token_id=sorted(stop), pad_token_id=tokenizer.pad_token_id
    )
    texts = []
    for batch in rows.iter(batch_size):
        prompts = [ids[: labels.count(-100)] for ids, labels in zip(batch["input_ids"], batch["labels"])]
        inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
        tokens = model.generate(**inputs, generation_config=greedy)
        texts += tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]


def score_answers(model, tokenizer, rows, rank, args):
    """Return exact match and F1 (SQuAD v1, percent) on `rows`, which the ranks share out; every rank takes part."""
    own = rows.select(range(rank, len(rows), args.world_size))
    gathered = [None] * args.world_size
    dist.all_gather_object(  # all ranks participate
        gathered, list(zip(answer(model, tokenizer, own, 2 * args.per_device_train_batch_size), own["references"]))
    )
    metric = SQuAD(sync_on_compute=False)  # every rank has all answers
    for number, (text, references) in enumerate(pair for part in gathered for pair in part):
        answers = {"text": references, "answer_start": [0] * len(references)}
        metric.update([{"prediction_text": text, "id": str(number)}], [{"answers": answers, "id": str(number)}])
    return {name: round(value.item(), 2) for name, value in metric.compute().items()}


# -----------------------------------------------------------------------------
# the round


class FederatedRounds(TrainerCallback):
    """Ends a round after every `local_steps` optimizer steps: average, evaluate, log, save; every rank takes part."""

    def __init__(self, rank, args, trainer, rows, held_out, global_held_out):
        self.rank, self.args, self.trainer, self.rows = rank, args, trainer, rows
        self.held_out, self.global_held_out = held_out, global_held_out
        self.state = {}  # of the averaging strategy
        self.lengths = trainer.train_dataset["length"]
        self.bar = tqdm(
            total=trainer.args.max_steps, unit="step", disable=None if rank == 0 else True, dynamic_ncols=True
        )

    def on_train_begin(self, args, state, control, model, **kwargs):
        start = utils.flatten_parameters(model)
        dist.broadcast(start, src=0)  # all ranks participate: from a different A on each, the first average is noise
        utils.unflatten_parameters(model, start)
        if self.args.resume_from:
            self.state = torch.load(Path(self.args.resume_from, f"rank_{self.rank}", "strategy.pt"), weights_only=True)
        self.bar.update(state.global_step)
        self.start, self.clock = start, time.perf_counter()

    def on_optimizer_step(self, args, state, control, lr_scheduler, **kwargs):
        self.learning_rate = lr_scheduler.get_last_lr()[0]

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()
        if state.global_step % self.args.local_steps == 0:
            self.finish_round(state.global_step // self.args.local_steps)

    def finish_round(self, number):
        """Finish round `number`, counted from 1."""
        args, model, trainer = self.args, self.trainer.model, self.trainer
        evaluated = number % args.eval_rounds == 0 or number == args.num_rounds
        saved = number % args.save_rounds == 0 or number == args.num_rounds
        per_round = len(self.lengths) // args.num_rounds
        report = {
            "train_loss": trainer._tr_loss.item() / args.local_steps,
            "tokens": sum(self.lengths[(number - 1) * per_round : number * per_round]),
            "local_digest": digest(utils.flatten_parameters(model)) if number == 1 else None,
        }
        trainer._tr_loss.zero_()  # the trainer's running sum, left to us as the trainer logs nothing itself
        dist.barrier()  # all ranks participate; waiting for the slowest client counts as local
        seconds = {"local": self.lap()}

        weight, aggregate = self.rows[self.rank], utils.AGGREGATORS[args.aggregator]
        self.start, update, report["distance"] = utils.federated_average(
            model, args.world_size, self.start, weight, aggregate, self.state
        )
        if not torch.isfinite(update).all():  # the same update, so the same verdict on all ranks
            raise RuntimeError(f"round {number}: the average is not finite; lower --learning_rate")
        report["digest"] = digest(self.start)
        seconds["average"] = self.lap()

        if evaluated:
            report["eval_loss"] = evaluate(trainer, self.held_out)
            if self.rank == 0:
                report["global_eval_loss"] = evaluate(trainer, self.global_held_out)
        report["memory"] = peak_memory()
        clients = [None] * args.world_size
        dist.all_gather_object(clients, report)  # all ranks participate
        if len({client["digest"] for client in clients}) > 1:
            raise RuntimeError(f"round {number}: the ranks hold different adapters after averaging")
        skipped = trainer.accelerator.optimizer_step_was_skipped  # by the gradient scaler of fp16
        if number == 1 and not skipped and len({client["local_digest"] for client in clients}) < args.world_size:
            raise RuntimeError("round 1: clients are equal before averaging; they share gradients, or did not train")
        seconds["eval"] = self.lap()

        if saved:
            trainer._save_checkpoint(model, trial=None)  # into checkpoints/staging/rank_N
            torch.save(self.state, Path(trainer.args.output_dir, "strategy.pt"))
        seconds["save"] = self.lap()
        if self.rank == 0:
            self.log(number, clients, update, seconds)
        if saved:
            dist.barrier()  # all ranks participate: every part is on disk, and the log has the round
            if self.rank == 0:
                commit_checkpoint(Path(args.output_dir, "checkpoints"), number)
            dist.barrier()  # all ranks participate: a trainer that ends looks into its folder, which is moved here

    def log(self, number, clients, update, seconds):
        """Write what round `number` has to say: files, trackers and one line on the terminal; rank 0 alone."""
        args, folder = self.args, Path(self.args.output_dir)
        norm = torch.linalg.vector_norm(update).item()
        entry = {
            "round": number,
            "train_loss": sum(client["train_loss"] for client in clients) / len(clients),
            "eval_loss": clients[0].get("global_eval_loss"),
            "learning_rate": self.learning_rate,
            "clients": list(range(len(clients))),
            "weights": self.rows,
            "drift": sum(client["distance"] for client in clients) / len(clients) / norm if norm else 0.0,
            "update_norm": norm,
            "bytes": 4 * update.numel() * len(clients),  # float32, sent by all clients together
            "tokens": sum(client["tokens"] for client in clients),
            "peak_memory_gb": round(max(client["memory"] for client in clients), 3),
            "seconds": seconds,
            "digest": clients[0]["digest"],
        }
        for k, client in enumerate(clients):
            utils.append_loss_to_file(folder / f"client_{k}_train_loss.json", client["train_loss"])
            if "eval_loss" in client:
                utils.append_loss_to_file(folder / f"client_{k}_eval_loss.json", client["eval_loss"])
        if entry["eval_loss"] is not None:
            utils.append_loss_to_file(folder / "global_eval_loss.json", entry["eval_loss"])
        with open(folder / "rounds.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        self.trainer.log({name: value for name, value in entry.items() if isinstance(value, float)})
        self.bar.write(
            f"round {number:4d}/{args.num_rounds} | train {entry['train_loss']:.4f} | "
            + (f"eval {entry['eval_loss']:.4f} | " if entry["eval_loss"] is not None else "            | ")
            + f"update {norm:.1e} | local {seconds['local']:.1f}s | average {seconds['average']:.1f}s | "
            f"{entry['peak_memory_gb']:.1f} GB"
        )

    def lap(self):
        """Return the seconds since the last call."""
        before, self.clock = self.clock, time.perf_counter()
        return round(self.clock - before, 4)


def digest(flat):
    """Return the sha256 of a vector's bytes, in hexadecimal."""
    return hashlib.sha256(flat.cpu().numpy().tobytes()).hexdigest()


def peak_memory():
    """Return this process's peak memory so far, in GB: on the GPU if it has one, otherwise in the host."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # in KB on Linux


def commit_checkpoint(folder, number):
    """Turn `staging` into the checkpoint of round `number` by one rename, and remove all but the newest ones."""
    (folder / "staging").rename(folder / f"round_{number:05d}")
    for old in sorted(folder.glob("round_*"))[:-KEPT_CHECKPOINTS]:
        shutil.rmtree(old)


# -----------------------------------------------------------------------------
# the life of one rank


def local_train(rank, args):
    """Train the client of `rank` in federation with those of the other ranks, and leave behind what a run leaves.

    `args` are the parsed flags, with the paths that main.py has prepared. Raises RuntimeError where the ranks would
    not be federated: wrapped in DDP, equal before the first averaging, or different after one.
    """
    device = torch.device("cuda", 0) if args.num_gpus else torch.device("cpu")
    sys.stdout.reconfigure(line_buffering=True)  # a round's line is to be seen when the round ends, in a file too
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // args.world_size))
    torch.manual_seed(args.seed + rank)
    dist.init_process_group(
        args.backend,
        store=dist.FileStore(args.store_path, args.world_size),
        rank=rank,
        world_size=args.world_size,
        timeout=datetime.timedelta(minutes=args.timeout),
        device_id=device if args.backend == "nccl" else None,
    )

    tokenizer = AutoTokenizer.from_pretrained(args.model_path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    train, held_out, global_held_out, num_rows = load_client_data(rank, args)
    rows = [None] * args.world_size
    dist.all_gather_object(rows, num_rows)  # all ranks participate
    model = load_model(args, device)
    trainer = build_trainer(rank, args, device, model, tokenizer, train)
    if rank == 0:
        print_header(args, model, rows, global_held_out)

    questions = global_held_out.select(range(min(ANSWERED_ROWS, len(global_held_out))))
    summary_path = Path(args.output_dir, "summary.json")
    if args.resume_from:
        summary = json.loads(summary_path.read_text(encoding="utf-8"))
        before = {name: summary[name]["before"] for name in ("exact_match", "f1")}
    else:
        before = score_answers(model, tokenizer, questions, rank, args)
        if rank == 0:
            summary = {name: {"before": value} for name, value in before.items()}
            utils.write_aside(summary_path, json.dumps(summary))  # a resumed run has no other way to know

    trainer.add_callback(rounds := FederatedRounds(rank, args, trainer, rows, held_out, global_held_out))
    checkpoint = args.resume_from and Path(args.resume_from, f"rank_{rank}")
    trainer.train(resume_from_checkpoint=str(next(checkpoint.glob("checkpoint-*"))) if checkpoint else None)
    rounds.bar.close()
    after = score_answers(model, tokenizer, questions, rank, args)
    if rank == 0:
        publish(args, model, tokenizer, rows, {"before": before, "after": after}, len(questions))
    dist.barrier()  # all ranks participate: nobody leaves before the model is on disk
    dist.destroy_process_group()


def print_header(args, model, rows, global_held_out):
    """Print the sizes that a user can check before the first step."""
    shared = sum(parameter.numel() for parameter in utils.shared_parameters(model))
    each = f"{min(rows)}" if min(rows) == max(rows) else f"{min(rows)} to {max(rows)}"
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    device = f"CPU, {torch.get_num_threads()} thread(s) a rank"
    if args.num_gpus:
        device = f"{min(args.num_gpus, args.world_size)} x {torch.cuda.get_device_name()}"
        device += ", shared by the ranks" if args.num_gpus < args.world_size else ""
    print(
        f"{args.model_name}, {'4-bit NF4' if args.load_in_4bit else 'not quantized'}, LoRA r={args.lora_r}\n"
        f"  clients    {args.world_size}, {each} training rows each; {len(global_held_out)} global held-out rows\n"
        f"  rounds     {args.num_rounds} x {args.local_steps} local steps x {batch} rows\n"
        f"  shared     {shared:,} LoRA parameters, {4 * shared / 1e6:.1f} MB per client and round, {args.aggregator}\n"
        f"  device     {device}, {args.backend}",
        flush=True,
    )


def publish(args, model, tokenizer, rows, scores, num_questions):
    """Write the finished adapter with its tokenizer and card, the figure and the summary; rank 0 alone."""
    folder = Path(args.output_dir)
    rounds = utils.read_rounds(folder)
    evaluated = [entry for entry in rounds if entry["eval_loss"] is not None]
    summary = {
        "rounds": len(rounds),
        "clients": len(rows),
        "rows": rows,
        "tokens": sum(entry["tokens"] for entry in rounds),
        "seconds": {name: round(sum(entry["seconds"][name] for entry in rounds), 2) for name in rounds[0]["seconds"]},
        "eval_loss": {"first": evaluated[0]["eval_loss"], "last": evaluated[-1]["eval_loss"]},
        "exact_match": {when: scores[when]["exact_match"] for when in scores},
        "f1": {when: scores[when]["f1"] for when in scores},
        "answered": num_questions,
        "bytes_per_round": rounds[-1]["bytes"],
        "peak_memory_gb": max(entry["peak_memory_gb"] for entry in rounds),
    }
    target, staging = folder / "federated_global_model", folder / "federated_global_model.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    model.peft_config["default"].base_model_name_or_path = args.model_name
    model.save_pretrained(staging, save_embedding_layers=False)
    tokenizer.save_pretrained(staging)
    (staging / "README.md").write_text(utils.model_card(args, summary), encoding="utf-8")
    utils.plot_losses(folder)
    utils.write_aside(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    staging.rename(target)  # last of all: with the model there, the run is finished
    loss = " -> ".join(f"{entry['eval_loss']:.4f} (round {entry['round']})" for entry in (evaluated[0], evaluated[-1]))
    print(f"held-out loss  {loss}")
    for name in ("exact_match", "f1"):
        before, after = summary[name]["before"], summary[name]["after"]
        print(f"{name.replace('_', ' '):13}  {before:.1f}% -> {after:.1f}% on {num_questions} held-out questions")
    base = f'AutoModelForCausalLM.from_pretrained("{args.model_name}")'
    print(f'use it: PeftModel.from_pretrained({base}, "{target}")', flush=True)
