"""The life of one rank: load a 4-bit LLaMA, train its LoRA on rows of its own, average with the others every round."""

import atexit
import collections
import concurrent.futures
import contextlib
import datetime
import functools
import hashlib
import inspect
import json
import logging
import math
import os
import resource
import shutil
import signal
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import NamedTuple

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it reports optional kernels as missing, once per process

import bitsandbytes as bnb
import datasets
import numpy as np
import torch
import torch.distributed as dist
import transformers
import trl.trainer.utils
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch.utils.data import DataLoader
from torchmetrics.text import SQuAD
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer, pack_dataset

import report
import utils

# without Triton, TRL (1.16) computes the logits of all tokens; of the answer alone, a step on the CPU takes 0.6 to 0.7
trl.trainer.utils._use_triton = lambda device: True
# trackers get our names as they are, client_3/train_loss; transformers would put "train/" in front of them
transformers.integrations.integration_utils.rewrite_logs = lambda logs: logs
# adapters of a round that are kept for the aggregation error, of more clients only some of the layers; and one layer in
# so many is measured with several machines, between which they have to travel
MEASURED_ADAPTERS, THINNED = 16, 8
BEAT, SILENCE = 5, 60  # seconds between signs of life of a machine; and without one, until it is taken for lost
LEAVING = threading.Event()  # of this rank; then others may be gone
LAST_SECONDS = 10  # that a rank which torchrun ends, and kills after 30, waits for others, who may be dead
# what a checkpoint holds of FederatedRounds, besides one file for each client
SAVED = "start first_private control before rounds_done learning_rate".split()
CHAT_TOKENS = 512  # of an answer to a question without a context, at most
HINTED_ERROR = 0.1  # from this aggregation error on, a run is told once what can be done about it

# -----------------------------------------------------------------------------
# model, data and trainer of one rank


def load_base(args, device):
    """Load the base model, in 4 bits (NF4, double quantization) unless told otherwise.

    QLoRA, Dettmers et al. 2023 (arXiv:2305.14314).
    """
    dtype = compute_dtype(args, device)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        args.model_path,
        dtype=dtype,
        quantization_config=quantization if args.load_in_4bit else None,
        attn_implementation=args.attn_implementation,
        device_map={"": device},
        trust_remote_code=False,
    )
    if args.load_in_4bit:
        keep_4bit_layout(model)
        if dtype == torch.float16:  # in which sums over many layers may overflow: all that is not in 4 bits in float32
            prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return model


def add_lora(args, model):
    """Put a fresh LoRA on all linear layers of `model`, and freeze what --lora_variant does not train.

    LoRA, Hu et al. 2021 (arXiv:2106.09685).
    """
    lora = LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=utils.LORA_TARGETS,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora)
    trained = {part for part, _ in utils.LORA_VARIANTS[args.lora_variant]}
    for name, parameter in model.named_parameters():
        parameter.requires_grad = any(part in name for part in trained)
    return model


def load_model(args, device):
    return add_lora(args, load_base(args, device))


def lora_parameters(model):
    """Return all LoRA parameters, trained or not, in the model's order: A before B in every projection."""
    return [parameter for name, parameter in model.named_parameters() if "lora_" in name]


def keep_4bit_layout(model):
    """Keep bitsandbytes (0.50) from repacking the weights at the first evaluation on CPUs with AVX512-BF16.

    The repacked layout is computed in bf16 by a kernel without a gradient, and stays: training after the first
    evaluation would silently lose every gradient that has to pass through a base weight.
    """
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def compute_dtype(args, device):
    """What was asked for, else bf16 where the GPU has it, or fp16; float32 on the CPU (bf16 is slower there)."""
    if args.torch_dtype != "auto":
        return getattr(torch, args.torch_dtype)
    if device.type == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


class ClientData(NamedTuple):
    """What a rank knows of the data, and who plays when."""

    rows: datasets.Dataset  # all training rows of the run
    held_out: list  # the numbers of the rows that each part of the split holds out
    scored: list  # the clients of the last round; with --centralized, what would have been these
    num_train: list  # the training rows of every client, which are its weight
    global_held_out: datasets.Dataset  # the same on all ranks
    plan: list  # of the rounds, see utils.plan_rounds
    held: list  # the clients whose state this rank has to load when it resumes
    turns: list  # (round, client, first step) left to this rank; a turn is local_steps steps of one client
    own: dict  # the numbers of the sequences that each of its clients trains on: rows, or packs of rows
    order: np.ndarray  # the numbers of the sequences of those turns, one after another
    train: datasets.Dataset  # and those sequences
    unread: np.ndarray  # where in `train` those are that come after the turns' first steps
    lengths: list  # how many tokens each of `train` has

    def own_parts(self, client):
        """Return of which parts of the split `client` has the held-out rows: its own; with --centralized, several."""
        return [client] if len(self.num_train) > 1 else self.scored

    def own_held_out(self, client):
        return self.rows.select(np.concatenate([self.held_out[part] for part in self.own_parts(client)]))


def load_client_data(rank, args):
    """Return the ClientData of one rank. No row is in two of its parts; every client reads only its own."""
    data = datasets.load_from_disk(args.data_path)
    split = json.loads(Path(args.data_path, "parts.json").read_text(encoding="utf-8"))
    if "held_out" in data:
        global_held_out = utils.partition_dataset(data["held_out"], 0, 1, args.seed)
    else:
        global_held_out = data["train"].select(split["global"])
    global_held_out = global_held_out.select(range(min(utils.GLOBAL_EVAL_ROWS, len(global_held_out))))

    plan = utils.plan_rounds(
        args.num_clients, args.clients_per_round, args.num_rounds, args.world_size, args.seed, args.machines
    )
    per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
    per_turn = args.local_steps * per_step
    rounds_done, steps = utils.read_progress(args.resume_from)
    played, turns, holder = collections.Counter(), [], {}
    for number, (shares, _) in enumerate(plan, start=1):
        if number <= rounds_done + bool(steps):
            holder |= {client: its for its, share in enumerate(shares) for client in share}
        for client in shares[rank] if number > rounds_done else []:
            first = steps.get(client, 0) if number == rounds_done + 1 else 0
            if first < args.local_steps:
                turns.append((number, client, played[client], first))
        played.update(client for share in shares for client in share)
    own = {client: np.array(split["train"][client]) for _, client, *_ in turns}
    sequences = data["train"]
    if args.packing and turns:
        sequences, own = pack_rows(sequences, own, args.max_length)
    schedules = {
        client: utils.schedule_rows(len(numbers), played[client] * per_turn, [args.seed, client])
        for client, numbers in own.items()
    }
    order = [own[client][schedules[client][times * per_turn : (times + 1) * per_turn]] for _, client, times, _ in turns]
    unread = [np.arange(i * per_turn + first * per_step, (i + 1) * per_turn) for i, (*_, first) in enumerate(turns)]
    order, unread = (np.concatenate([*parts, np.array([], dtype=int)]) for parts in (order, unread))
    train = sequences.select(order)
    return ClientData(
        rows=data["train"],
        held_out=split["held_out"],
        scored=split["scored"],
        num_train=[len(part) for part in split["train"]],
        global_held_out=global_held_out,
        plan=plan,
        held=[client for client in holder if holder[client] == rank],
        turns=[(number, client, first) for number, client, _, first in turns],
        own=own,
        order=order,
        train=train,
        unread=unread,
        lengths=[sum(lengths) for lengths in train["seq_lengths"]] if args.packing and turns else train["length"][:],
    )


def pack_rows(rows, own, max_length):
    """Pack the rows of each client, {client: row numbers}, into sequences of up to `max_length` tokens, best fit first.

    Returns the sequences of all these clients and {client: sequence numbers}; none has rows of two clients.
    """
    packs, numbers, total = [], {}, 0
    for client, part in own.items():
        packs.append(
            pack_dataset(
                rows.select(part).select_columns(["input_ids", "labels"]),
                max_length,
                map_kwargs={"keep_in_memory": True},
            )
        )
        numbers[client] = np.arange(total, total := total + len(packs[-1]))
    return datasets.concatenate_datasets(packs), numbers


def collate_packs(collate, sequences):
    """Make a batch of packed sequences in which no row can see another.

    Without an attention mask, transformers looks at the positions, which start anew with each row, for its masks.
    """
    batch = collate(sequences)
    del batch["attention_mask"]
    batch["labels"][batch["position_ids"] == 0] = -100  # no row predicts the first token of the next
    return batch


class LocalTrainer(SFTTrainer):
    """TRL's trainer, with a learning rate that follows the federated step and is above zero from first to last."""

    def create_scheduler(self, num_training_steps, optimizer=None):
        steps = self.federated_steps  # where each step of this rank is in the run: rounds before it x local_steps + i
        scheduler = super().create_scheduler(max(steps) + 2, optimizer)
        # a warm-up begins at zero, where one local step would be a round without training: enter the curve a step in
        scheduler.lr_lambdas = [
            lambda step, curve=curve: curve(steps[min(step, len(steps)) - 1] + 1) for curve in scheduler.lr_lambdas
        ]
        with warnings.catch_warnings(action="ignore"):  # torch asks for an optimizer step before the first of these
            scheduler.step()
        return scheduler

    def log(self, logs, start_time=None):
        pass  # the round does it; the trainer's own, at the end, is of this rank alone, and of a loss that was reset

    def floating_point_ops(self, inputs):
        return 0  # else the trainer walks over all parameters every step, for a number that nobody reads


def build_trainer(rank, args, device, model, tokenizer, data):
    """Build the trainer of one rank, which must not know that there are others."""
    dtype = compute_dtype(args, device)
    flat = args.packing and args.attn_implementation == "flash_attention_2"  # which wants a batch as one sequence
    federated_steps = [(n - 1) * args.local_steps + i for n, _, k in data.turns for i in range(k, args.local_steps)]
    config = SFTConfig(
        output_dir=str(Path(args.data_path).parent),  # it saves nothing itself
        use_cpu=device.type == "cpu",
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        gradient_checkpointing=args.gradient_checkpointing,
        torch_compile=args.torch_compile,
        use_liger_kernel=args.use_liger_kernel,
        packing=flat,  # pack_rows has done it: this is for the batches
        max_steps=len(federated_steps) or 1,
        per_device_train_batch_size=args.per_device_train_batch_size,
        per_device_eval_batch_size=4 * args.per_device_train_batch_size,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        learning_rate=args.learning_rate,
        lr_scheduler_type=args.lr_scheduler_type,
        warmup_steps=args.warmup_steps,
        optim=args.optim,
        seed=args.seed,  # the order of the rows and the seeds of the dropout masks are our own
        train_sampling_strategy="sequential",  # the order of the dataset is the schedule of the run
        dataset_kwargs={"skip_prepare_dataset": True},  # tokenized already, once for all ranks
        eval_strategy="no",
        save_strategy="no",
        logging_strategy="no",  # the round does all three
        logging_nan_inf_filter=False,  # a loss that is not a number is to be seen
        report_to=args.report_to if rank == 0 else "none",
        run_name=Path(args.output_dir).name,
        disable_tqdm=True,
    )
    rows = data.train.select(data.unread) if data.turns else data.rows.select(range(1))  # of which it takes no step
    trainer = LocalTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
    if args.packing and not flat:
        trainer.data_collator.return_position_ids = True
        trainer.data_collator = functools.partial(collate_packs, trainer.data_collator)
    trainer.federated_steps = federated_steps
    trainer.remove_callback(PrinterCallback)
    for parameter in lora_parameters(model):
        parameter.data = parameter.data.float()  # TRL makes the adapters of a 4-bit model bf16, too coarse to average
    return trainer


# -----------------------------------------------------------------------------
# evaluation: by one rank alone, no collectives


@torch.no_grad()
def evaluate(trainer, rows):
    """Return (loss, tokens) over the answer tokens of `rows`: the sum of the loss in nats, and their number."""
    trainer.model.eval()
    loss, tokens = 0.0, 0
    batch_size, collate = trainer.args.per_device_eval_batch_size, trainer.data_collator
    rows = rows.select(np.argsort(rows["length"], kind="stable")[::-1])  # next to others as long: less padding
    for batch in DataLoader(rows.select_columns(["input_ids", "labels"]), batch_size, collate_fn=collate):
        batch = trainer._prepare_inputs(batch)
        tokens += (batch["labels"][:, 1:] != -100).sum().item()
        with trainer.compute_loss_context_manager():
            loss += trainer.compute_loss(trainer.model, batch, num_items_in_batch=1).item()  # divided by 1: the sum
    return loss, tokens


@torch.no_grad()
def answer(model, tokenizer, rows, batch_size, max_new_tokens=None):
    """Return (answer, accepted answers) to each of `rows`: greedily, of at most MAX_NEW_TOKENS tokens or as told."""
    model.eval()
    stop = model.generation_config.eos_token_id
    stop = {tokenizer.eos_token_id, *(stop if isinstance(stop, list) else [stop])} - {None}
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens or utils.MAX_NEW_TOKENS,
        do_sample=False,
        eos_token_id=sorted(stop),
        pad_token_id=tokenizer.pad_token_id,
    )
    texts = []
    for batch in rows.iter(batch_size):
        prompts = [ids[: labels.count(-100)] for ids, labels in zip(batch["input_ids"], batch["labels"])]
        inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
        tokens = model.generate(**inputs, generation_config=greedy)
        texts += tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [(text.strip(), references) for text, references in zip(texts, rows["references"])]


def score(answers):
    """Return exact match and F1 (SQuAD v1, percent) of (answer, accepted answers) pairs."""
    metric = SQuAD(sync_on_compute=False)  # this rank has all of them
    for number, (text, references) in enumerate(answers):
        answers = {"text": references, "answer_start": [0] * len(references)}
        metric.update([{"prediction_text": text, "id": str(number)}], [{"answers": answers, "id": str(number)}])
    return {name: round(value.item(), 2) for name, value in metric.compute().items()}


# -----------------------------------------------------------------------------
# the round


class Ended(Exception):
    """Ends the training of all ranks in the same round, because no client's update can be used."""


class FederatedRounds(TrainerCallback):
    """Plays the clients of this rank in turn and ends each round: average, evaluate, log, save.

    Every rank takes part in every round. A turn is `local_steps` optimizer steps of one client.
    """

    def __init__(self, rank, args, store, trainer, data):
        self.rank, self.args, self.store, self.trainer, self.data = rank, args, store, trainer, data
        self.model, self.lora = trainer.model, lora_parameters(trainer.model)
        self.variant = utils.LORA_VARIANTS[args.lora_variant]
        if args.aggregator == "none":
            self.variant = [(trained, "nothing") for trained, _ in self.variant]
        trained, shared = self.variant[0]
        # what stays with its client, FedSA's B or all of it; then every client has a model of its own
        self.private = [p for n, p in self.model.named_parameters() if trained in n and shared not in n]
        self.staging = Path(args.output_dir, f"{utils.CLIENT_MODELS if self.private else utils.GLOBAL_MODEL}.tmp")
        self.strategy = make_strategy(args)
        self.states = [{} for _ in self.variant]  # of the averaging strategy; RoLoRA's A and B have one each
        self.records = {}  # client -> what it leaves in host memory between its turns, on the rank that last played it
        self.current = None  # the client whose moments are in the optimizer, and whose private tensors in the model
        self.several, self.is_first = args.machines[-1] > 0, not utils.local_rank(rank, args.machines)  # of machines
        self.kept_back = {}  # what rounding to a narrow --average_dtype has kept back of the stream of this machine
        every = -(-args.clients_per_round // MEASURED_ADAPTERS)
        self.measured = [p for i in range(0, len(self.lora), 2 * every) for p in self.lora[i : i + 2]]  # A and B
        self.number = self.rounds_done = self.meetings = 0  # number: the round under way, else 0
        self.turn, self.step = 0, None  # which turn is under way, or next; how many steps it has done, None before it
        # of the round under way: what its clients report, their updates (in files but for the last one's), and adapters
        self.reports, self.updates, self.kept, self.gradients = [], [], [], []
        self.scaler = trainer.accelerator.scaler  # of fp16's gradients, else None
        self.first_scaler = self.scaler and self.scaler.state_dict()
        self.before = None  # the scores before training
        self.checked, self.hinted, self.stopping = False, False, False
        self.writer = concurrent.futures.ThreadPoolExecutor(1)  # of the logs
        self.written = self.writer.submit(int)

    def on_train_begin(self, args, state, control, optimizer, lr_scheduler, **kwargs):
        self.begin(optimizer.optimizer, lr_scheduler.get_last_lr()[0])  # without accelerate's wrapper

    def begin(self, optimizer, learning_rate):
        """Start from the same adapter as all ranks, or go on from a checkpoint; every rank takes part."""
        self.optimizer, self.learning_rate = optimizer, learning_rate
        if self.args.resume_from:
            self.load(Path(self.args.resume_from))
        else:
            start = utils.flatten_parameters(self.lora)
            self.meet()
            dist.broadcast(start, src=0)  # all ranks participate: from a different A each, the first average is noise
            utils.unflatten_parameters(self.lora, start)
            self.first_private = utils.flatten_parameters(self.private).cpu()  # of every client's first turn
            self.train_parts(1)
            self.start = utils.flatten_parameters(self.parameters)
            # SCAFFOLD's c: the mean of what all clients' mean gradients were in their last turns
            self.control = torch.zeros_like(self.start) if self.args.scaffold else None
        shown = None if self.rank == 0 and not self.args.quiet else True  # None: where there is a terminal
        steps = self.args.local_steps * sum(len(shares[self.rank]) for shares, _ in self.data.plan)
        done = steps - len(self.trainer.federated_steps)
        self.bar = tqdm(total=steps, initial=done, unit="step", disable=shown, dynamic_ncols=True)
        self.check_start(learning_rate)
        self.clock = time.perf_counter()
        signal.signal(signal.SIGTERM, self.ask_to_stop)
        if self.reports and self.is_last():  # it was stopped while it waited for the others
            self.finish_round()

    def on_step_begin(self, args, state, control, **kwargs):
        if self.step is None:
            self.begin_turn()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Add FedProx's and SCAFFOLD's terms to the gradients, which are clipped already."""
        if self.args.prox_mu:  # Li et al. 2020 (arXiv:1812.06127): the gradient of mu/2 ||w - start||^2
            for parameter, anchor in zip(self.parameters, self.anchors):
                parameter.grad.add_(parameter.detach() - anchor, alpha=self.args.prox_mu)
        if self.args.scaffold:  # Karimireddy et al. 2020 (arXiv:1910.06378)
            for parameter, total, correction in zip(self.parameters, self.gradients, self.corrections):
                total += parameter.grad.nan_to_num(0, 0, 0)  # fp16 may overflow, and the step is then skipped
                parameter.grad += correction

    def on_optimizer_step(self, args, state, control, lr_scheduler, **kwargs):
        self.learning_rate = lr_scheduler.get_last_lr()[0]

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()
        self.step += 1
        if self.step == self.args.local_steps:
            self.finish_turn()
        if self.stopping and state.global_step < args.max_steps:
            self.stop()

    # ---- meeting the other ranks, and stopping

    def meet(self, word=None):
        """Wait until all ranks are here; returns the word (JSON) that each has brought, in the order of the ranks.

        Raises TimeoutError, with the ranks that are missing, after --timeout minutes. By the store of the process
        group: that is faster than a barrier of gloo, knows who is missing, and can be left when a rank has stopped.
        """
        self.meetings += 1
        keys = [f"{self.meetings}/{rank}" for rank in range(self.args.world_size)]
        self.store.set(keys[self.rank], json.dumps(word))
        late, pause = time.monotonic() + 60 * self.args.timeout, 5e-4  # seconds
        while True:
            stopped = self.store.check(["stopped"])  # first: whoever stops has come to all meetings before
            if self.store.check(keys):
                if self.meetings > 1:  # which all have left
                    self.store.delete_key(f"{self.meetings - 1}/{self.rank}")
                words = self.store.multi_get(keys) if self.args.store else map(self.store.get, keys)
                return [json.loads(word) for word in words]
            if stopped:
                self.stop()
            if self.stopping and self.args.store and time.monotonic() > self.stopping + LAST_SECONDS:
                raise SystemExit(utils.STOPPED, f"rank {self.rank} was ended by SIGTERM")
            if time.monotonic() > late:
                missing = [str(rank) for rank, key in enumerate(keys) if not self.store.check([key])]
                raise TimeoutError(
                    f"no sign of rank {', '.join(missing)} for {self.args.timeout:g} minutes (--timeout)"
                )
            time.sleep(pause)
            pause = min(2 * pause, 0.02)

    def ask_to_stop(self, number, frame):
        self.stopping = self.stopping or time.monotonic()

    def stop(self):
        """Save this rank in the middle of a round, and end it. The others do the same after their steps."""
        first = self.store.compare_set("stopped", "", str(self.rank)).decode()  # which rank was told to
        self.bar.close()
        keys = [f"saved/{rank}" for rank in range(self.args.world_size)]
        self.store.set(keys[self.rank], json.dumps(self.save()))
        if self.rank in self.args.keepers:
            late = datetime.timedelta(seconds=LAST_SECONDS if self.args.store else 60 * self.args.timeout)
            with contextlib.suppress(dist.DistError):
                self.store.wait(keys, late)
                self.commit([json.loads(self.store.get(key)) for key in keys], f"round_{self.rounds_done:05d}_part")
        LEAVING.set()
        if self.args.store and not self.stopping:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(30)  # torchrun is about to end this rank, too, and takes an end before that for a failure
        raise SystemExit(utils.STOPPED, f"rank {first} was ended by SIGTERM")

    # ---- the turn of a client

    def parts(self, number):
        """Return what is trained and what is shared in round `number`, by a part of their names."""
        return self.variant[(number - 1) % len(self.variant)]

    def shared(self, number):
        """Return the parameters that are shared in round `number`."""
        return utils.shared_parameters(self.model, self.parts(number)[1])

    def train_parts(self, number):
        """Let what is trained in round `number` have gradients; RoLoRA's A and B take turns."""
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad = self.parts(number)[0] in name
        self.parameters = self.shared(number)

    def begin_turn(self):
        """Bring in the client of this turn, as it was after its last one, and at the start of the round."""
        args, (number, client, self.step) = self.args, self.data.turns[self.turn]
        if number != self.number:
            if moves := self.data.plan[number - 1][1]:
                self.meet()  # a rank that has stopped after the last round will move nobody
            self.number = number
            self.move_clients(moves)
        self.enter(client)
        # every client's dropout masks are its own, whatever its rank did before
        torch.manual_seed(int(np.random.SeedSequence([args.seed, client, number]).generate_state(1)[0]))
        if args.prox_mu:
            self.anchors = split_like(self.start, self.parameters)
        if args.scaffold:
            own = self.records[client].get("control", torch.zeros_like(self.control))
            self.corrections = split_like(self.control - own.to(self.control.device), self.parameters)
            self.gradients = split_like(torch.zeros_like(self.control), self.parameters)
        if turn := self.records[client].pop("turn", None):  # it was stopped in the middle of it
            utils.unflatten_parameters(self.lora, turn["adapter"])
            utils.unflatten_parameters(self.gradients, turn["gradients"])
            self.trainer._tr_loss += turn["loss"].to(self.trainer._tr_loss.device)
            set_random_state(turn["random"])
            return
        if args.client_state == "reset":
            load_moments(self.optimizer, None)
        if self.private:
            self.records[client]["before"] = utils.flatten_parameters(self.private).cpu()

    def enter(self, client):
        """Take `client` out of host memory, and put away the one before."""
        self.records.setdefault(client, {})
        if client == self.current:
            return
        self.leave()
        record = self.records[client]
        load_moments(self.optimizer, record.pop("moments", None))
        if self.scaler:
            self.scaler.load_state_dict(record.pop("scaler", self.first_scaler))
        utils.unflatten_parameters(self.private, record.pop("private", self.first_private))
        utils.unflatten_parameters(self.parameters, self.start)
        self.current = client

    def leave(self):
        """Put away the current client."""
        if self.current is not None:
            self.records[self.current] |= self.in_the_model()
        self.current = None

    def in_the_model(self):
        """Copy what the current client keeps between its turns, or in the middle of one, into host memory."""
        state = {}
        if self.args.client_state == "keep" or self.step:
            state["moments"] = save_moments(self.optimizer)
        if self.scaler:
            state["scaler"] = self.scaler.state_dict()
        if self.private:
            state["private"] = utils.flatten_parameters(self.private).cpu()
        return state

    def move_clients(self, moves):
        """Send what clients left behind to the ranks that play them now; those two ranks take part."""
        args = self.args
        for client, source, destination in moves:
            if self.rank == source:
                if client == self.current:
                    self.leave()
                record = self.records.pop(client)
                if args.machines[source] != args.machines[destination]:
                    utils.outbox["between"] += count_bytes(record)
                dist.send_object_list([record], dst=destination)
            elif self.rank == destination:
                dist.recv_object_list(record := [None], src=source)
                self.records[client] = record[0]

    def is_last(self):
        """Whether this rank has no more turns in the round under way."""
        return self.turn == len(self.data.turns) or self.data.turns[self.turn][0] != self.number

    def finish_turn(self):
        """Put this client's update aside; after the last client of the round, finish the round."""
        args, trainer, (number, client, _) = self.args, self.trainer, self.data.turns[self.turn]
        per_turn = len(self.data.lengths) // len(self.data.turns)
        turn = slice(self.turn * per_turn, (self.turn + 1) * per_turn)
        update = utils.flatten_parameters(self.parameters).sub_(self.start)
        mine = {
            "client": client,
            "train_loss": trainer._tr_loss.item() / args.local_steps,
            "tokens": sum(self.data.lengths[turn]),
            "norm": torch.linalg.vector_norm(update, dtype=torch.float64).item(),
            "skipped": trainer.accelerator.optimizer_step_was_skipped,  # by the gradient scaler of fp16
        }
        if not all(parameter.isfinite().all() for parameter in self.private):
            mine["norm"] = math.inf
        trainer._tr_loss.zero_()  # the trainer's running sum, left to us as the trainer logs nothing itself
        if self.private or not self.checked:
            mine["local_digest"] = digest(utils.flatten_parameters(self.lora))
            mine["read"] = hashlib.sha256(json.dumps(self.data.train[turn]["input_ids"]).encode()).hexdigest()
            mine["rows"] = [] if args.packing else sorted(set(self.data.order[turn].tolist()))
        weight = self.data.num_train[client]
        if self.is_due(number, args.eval_rounds) and not self.private:
            self.kept.append((client, weight, utils.flatten_parameters(self.measured)))
        if args.scaffold:
            self.records[client]["gradients"] = utils.flatten_parameters(self.gradients).cpu() / args.local_steps
            self.gradients = []
        self.reports.append(mine)
        self.turn, self.step = self.turn + 1, None
        self.updates.append((client, weight, update if self.is_last() else self.put_aside(update)))
        if self.is_last():
            self.finish_round()

    def put_aside(self, update):
        """Write an update into a file; whether it counts is known at the end of the round, and memory is to last."""
        path = f"{self.args.data_path}_update_{self.rank}_{len(self.updates)}.pt"
        torch.save(update, path)
        return path

    # ---- the end of a round

    def is_due(self, number, rounds):
        return number % rounds == 0 or number == self.args.num_rounds

    def finish_round(self):
        """Finish the round: average, evaluate, log, save. In the first meeting a rank may still stop, and save."""
        args, trainer, data, number = self.args, self.trainer, self.data, self.number
        norms = self.meet([(each["client"], each["norm"]) for each in self.reports])
        seconds = {"local": self.lap()}  # waiting for the slowest rank counts as local
        rejected = self.reject(number, dict(pair for rank in norms for pair in rank))
        good = [each for each in self.updates if each[0] not in rejected]
        average = utils.federated_average(
            self.model,
            args.world_size,
            self.start,
            good,
            self.strategy,
            self.states[(number - 1) % len(self.states)],
            self.parts(number)[1],
            args.average_dtype,
            {c: self.records[c].setdefault("kept_back", {}) for c, _, _ in good} | {"machine": self.kept_back},
        )
        sent = utils.outbox["bytes"]
        norm = torch.linalg.vector_norm(average, dtype=torch.float64).item()
        if not math.isfinite(norm):  # the same average, so the same verdict on all ranks
            self.written.result()
            advice = "lower --learning_rate or --server_lr"
            raise SystemExit(3, f"round {number}: the averaged update is not finite; {advice}")
        if args.scaffold:
            self.move_control(rejected)
            sent += 4 * self.control.numel() * len(good)
        averaged = self.start = utils.flatten_parameters(self.parameters)
        drift = {
            client: round(torch.linalg.vector_norm(utils.load_update(update) - average).item() / norm, 6)
            for client, _, update in good
            if norm
        }
        self.forget(rejected)
        seconds["average"] = self.lap()

        due = self.is_due(number, args.eval_rounds) and not self.private
        error = self.measure_error([each for each in self.kept if each[0] not in rejected]) if due else None
        everyone = {
            "memory": peak_memory(),
            "shared": checksum(averaged),
            "drift": drift,
            "sent": sent,
            "between": utils.outbox["between"],
            "reports": self.reports,
        }
        utils.outbox["between"] = 0
        self.reports, self.updates, self.kept = [], [], []
        if self.is_due(number, args.eval_rounds):
            if not self.private:  # one model, whose rows the ranks share out
                own_rows = data.global_held_out.select(self.own_share(data.global_held_out))
                everyone["global"] = evaluate(trainer, own_rows)
            for mine in everyone["reports"]:
                if self.private:
                    self.enter(mine["client"])
                    mine["global"] = evaluate(trainer, data.global_held_out)
                mine["eval"] = evaluate(trainer, data.own_held_out(mine["client"]))
        ranks = self.meet(everyone)
        clients = sorted((mine for rank in ranks for mine in rank["reports"]), key=lambda mine: mine["client"])
        self.check_average(ranks, [client for client in clients if client["client"] not in rejected])
        sent = sum(by_name("sent", ranks))  # bytes, by all clients together
        seconds["eval"] = self.lap()

        self.rounds_done, self.number = number, 0
        if len(self.variant) > 1:  # else the next round starts where this one has ended
            self.train_parts(number + 1)
            self.start = utils.flatten_parameters(self.parameters)
        if saved := self.is_due(number, args.save_rounds):
            parts = self.meet(self.save())  # every part is on disk
            sizes = [{name: size for name, (size, _) in part["files"].items()} for part in parts]
            copied = self.copy_files(Path(args.output_dir, "checkpoints", "staging"), sizes)
        seconds["save"] = self.lap()
        if self.rank in args.keepers:
            between = sum(by_name("between", ranks)) + (copied if saved else 0)
            self.log(number, ranks, clients, list(rejected), sent, between, norm, error, seconds, averaged)
        if saved and self.rank in args.keepers:
            self.commit(parts, f"round_{number:05d}")
        if saved:
            self.meet()  # nobody begins another before this one is moved

    def measure_error(self, kept):
        """Return the aggregation error of (client, weight, adapter); every rank takes part."""
        shapes = [parameter.shape for parameter in self.measured]
        if self.several:
            chosen = [i for i in range(len(shapes)) if i // 2 % THINNED == 0]  # A and B of a layer
            parts = [(client, weight, adapter.split([s.numel() for s in shapes])) for client, weight, adapter in kept]
            kept = [(client, weight, torch.cat([part[i] for i in chosen])) for client, weight, part in parts]
            shapes = [shapes[i] for i in chosen]
        return utils.product_error(kept, shapes)

    def reject(self, number, norms):
        """Return {client: what is wrong} of the updates that are left out; the same on all ranks."""
        rejected = utils.find_bad_updates(norms)
        for client, problem in rejected.items():
            if self.args.on_bad_update == "fail":
                self.written.result()
                text = f"round {number}: the update of client {client} is {problem}; lower --learning_rate"
                raise SystemExit(3, text)
            if self.rank == 0:
                self.bar.write(f"  client {client} is left out of round {number}: its update is {problem}")
        if len(rejected) == len(norms):
            utils.unflatten_parameters(self.parameters, self.start)
            self.forget(rejected)
            text = f"round {number}: the update of every client is not finite; lower --learning_rate"
            raise Ended(f"{text}. What round {number - 1} has come to is in {self.staging.with_suffix('').name}")
        return rejected

    def forget(self, rejected):
        """Take clients that were left out back to before their turn, without moments, which may be what is wrong."""
        for client in (each["client"] for each in self.reports):
            record = self.records.get(client, {})
            before = record.pop("before", None)
            if client in rejected:
                record.pop("moments", None)
                record.pop("gradients", None)
                if self.private:
                    record["private"] = before
                if client == self.current:
                    self.current = None

    def move_control(self, rejected):
        """Move SCAFFOLD's c by what changed in the c_i of this round's clients; every rank takes part.

        c_i becomes the mean gradient of the client's turn: no SGD algebra, so it holds for AdamW too.
        """
        change = torch.zeros_like(self.control, dtype=torch.float64)
        for client in (mine["client"] for mine in self.reports if mine["client"] not in rejected):
            record, before = self.records[client], torch.zeros_like(self.control)
            gradients = record.pop("gradients")
            change += (gradients - record.get("control", before.cpu())).to(change.device)
            record["control"] = gradients
        self.control += (utils.sum_over_ranks(change) / self.args.num_clients).float()

    def own_share(self, rows):
        return range(self.rank, len(rows), self.args.world_size)

    def save(self):
        """Write this rank's part of a checkpoint into checkpoints/staging; it may be in the middle of a round.

        One file for each client, with the turn that it has done in this round or is in, so that ranks that play other
        clients can go on from it. Returns the files, as `utils.seal` does, and how many steps each client has done.
        """
        self.written.result()
        folder = Path(self.args.output_dir, "checkpoints", "staging")
        folder.mkdir(parents=True, exist_ok=True)
        reports = {mine["client"]: mine for mine in self.reports}
        updates = {client: update for client, _, update in self.updates}  # perhaps in files, to be read one at a time
        kept = {client: adapter for client, _, adapter in self.kept}
        files, steps = [], dict.fromkeys(reports, self.args.local_steps)

        def write(name, content):
            torch.save(content, folder / name)
            files.append(folder / name)

        for client, record in self.records.items():
            record = record | (self.in_the_model() if client == self.current else {})
            if client == self.current and self.step:
                record["turn"] = {
                    "step": self.step,
                    "adapter": utils.flatten_parameters(self.lora),
                    "gradients": utils.flatten_parameters(self.gradients),
                    "loss": self.trainer._tr_loss,
                    "random": random_state(),
                }
            if "turn" in record:
                steps[client] = record["turn"]["step"]
            content = {"record": record}
            if client in reports:
                content |= {"report": reports[client], "update": utils.load_update(updates[client])}
            if client in kept:
                content["kept"] = kept[client]
            write(f"client_{client}.pt", content)
        if self.kept_back:
            write(f"machine_{self.args.machines[self.rank]}.pt", self.kept_back)
        if self.rank == 0:  # the same on all ranks
            same = {name: getattr(self, name) for name in SAVED} | {"lora": utils.flatten_parameters(self.lora)}
            same["states"] = [{k: v for k, v in s.items() if k not in ("start", "shapes")} for s in self.states]
            write("federation.pt", same)
        return {"files": utils.seal(files), "steps": steps}

    def copy_files(self, folder, files):
        """Copy {name: bytes}, of what each rank has written, to the disks that lack it; returns how many bytes travel.

        A machine may be lost, and the others go on without it. The first rank of every machine takes part.
        """
        args, machines = self.args, self.args.machines
        if len(args.keepers) == 1 or not self.is_first:
            return 0
        sizes = {name: size for own in files for name, size in own.items()}
        owners = {name: args.sharing[machines[rank]] for rank, own in enumerate(files) for name in own}
        return utils.share_files(folder, sizes, owners)

    def commit(self, parts, name):
        """Make a checkpoint of what the ranks have saved; one rank for each disk does it."""
        self.written.result()  # the log has all rounds before it
        manifest = {"round": self.rounds_done}
        manifest |= {key: {k: v for part in parts for k, v in part[key].items()} for key in ("files", "steps")}
        utils.commit_checkpoint(self.args.output_dir, name, manifest)

    def load(self, checkpoint):
        """Go on where `save` has written a checkpoint, whatever the number of ranks then."""
        device = utils.communication_device()
        same = torch.load(checkpoint / "federation.pt", weights_only=True, map_location=device)
        utils.unflatten_parameters(self.lora, same.pop("lora"))
        vars(self).update(same)
        self.train_parts(self.rounds_done + 1)
        utils.unflatten_parameters(self.parameters, self.start)
        make_moments(self.optimizer)
        for client in self.data.held:
            path = checkpoint / f"client_{client}.pt"
            if not path.exists():  # it has not had a turn
                continue
            content = torch.load(path, weights_only=True, map_location="cpu")
            self.records[client], weight = content["record"], self.data.num_train[client]
            if "report" in content:
                self.reports.append(content["report"])
                self.updates.append((client, weight, self.put_aside(content["update"].to(device))))
            if "kept" in content:
                self.kept.append((client, weight, content["kept"].to(device)))
        streams, machine = sorted(checkpoint.glob("machine_*.pt")), self.args.machines[self.rank]
        if self.several and self.is_first:
            if len(streams) == self.args.machines[-1] + 1:
                streams = [checkpoint / f"machine_{machine}.pt"]
            elif machine > 0:  # of more or fewer machines, what was kept back goes to the first
                streams = []
            for kept_back in (torch.load(path, weights_only=True, map_location="cpu") for path in streams):
                self.kept_back |= {name: self.kept_back.get(name, 0) + kept for name, kept in kept_back.items()}
        if utils.read_progress(checkpoint)[1]:
            self.number = self.rounds_done + 1

    def log(self, number, ranks, clients, rejected, sent, between, norm, error, seconds, averaged):
        """Collect what round `number` has to say, for trackers and for `write`; one rank for each disk does it."""
        data = self.data
        drift = {int(client): value for rank in ranks for client, value in rank["drift"].items()}
        good = [client for client in clients if client["client"] not in rejected]
        entry = {
            "round": number,
            "train_loss": sum(by_name("train_loss", good)) / len(good),
            "eval_loss": None,
            "learning_rate": self.learning_rate,
            "clients": by_name("client", clients),
            "rejected": rejected,
            "weights": [data.num_train[client] for client in by_name("client", clients)],
            "drift": sum(drift.values()) / len(good),
            "client_drift": [drift.get(client) for client in by_name("client", clients)],
            "aggregation_error": error,
            "update_norm": norm,
            "bytes": sent,
            "bytes_between_machines": between,
            "tokens": sum(by_name("tokens", clients)),
            "peak_memory_gb": round(max(by_name("memory", ranks)), 3),
            "seconds": seconds,
        }
        if "eval" in clients[0]:
            if self.private:  # the mean over the clients' models
                entry["eval_loss"] = sum(loss / tokens for loss, tokens in by_name("global", good)) / len(good)
            else:
                losses, tokens = zip(*by_name("global", ranks))
                entry["eval_loss"] = sum(losses) / sum(tokens)
        if self.args.report_to != "none" and self.rank == 0:
            self.track(entry, clients)
        self.written.result()
        # aside from the training: hashing 168 MB, the LoRA of an 8 B model, takes 0.2 s
        self.written = self.writer.submit(self.write, entry, clients, averaged.cpu())

    def track(self, entry, clients):
        """Give the curves of the federation and of each of its clients to the tracker."""
        curves = {f"federation/{name}": value for name, value in entry.items() if isinstance(value, float)}
        for client in clients:
            curves[f"client_{client['client']}/train_loss"] = client["train_loss"]
            if "eval" in client:
                curves[f"client_{client['client']}/eval_loss"] = client["eval"][0] / client["eval"][1]
        state, step = self.trainer.state, self.trainer.state.global_step
        state.global_step = entry["round"] * self.args.local_steps  # the same curves, wherever the run was resumed
        transformers.Trainer.log(self.trainer, curves)
        state.global_step = step

    def write(self, entry, clients, averaged):
        """Write what a round has to say into files, and one line on the terminal."""
        args, folder, error = self.args, Path(self.args.output_dir), entry["aggregation_error"]
        digests = [digest(averaged), *(client["local_digest"] for client in clients if self.private)]
        entry["digest"] = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
        if entry["eval_loss"] is not None:
            utils.append_loss_to_file(folder / "global_eval_loss.json", entry["eval_loss"])
        for client in clients:
            name = f"client_{client['client']}"
            utils.append_loss_to_file(folder / f"{name}_train_loss.json", client["train_loss"])
            if "eval" in client:
                utils.append_loss_to_file(folder / f"{name}_eval_loss.json", client["eval"][0] / client["eval"][1])
        with open(folder / "rounds.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        self.say(report.round_line(args, entry))
        if (error or 0) > HINTED_ERROR and not self.hinted and args.aggregator != "svd":
            self.hinted = True
            self.say(
                f"  averaging A and B apart makes an error of {error:.0%} of the product that they stand for here; "
                "--lora_variant ffa or rolora, --aggregator svd, or fewer --local_steps avoid it"
            )

    def say(self, text):
        if not self.args.quiet and self.rank == 0:
            self.bar.write(text)

    def lap(self):
        """Return the seconds since the last call."""
        before, self.clock = self.clock, time.perf_counter()
        return round(self.clock - before, 4)

    # ---- self-check: is this federated learning?

    def check_start(self, learning_rate):
        """Check what can be known before the first step; every rank takes part."""
        wrapped = self.trainer.model_wrapped
        mine = {
            # without a turn left, nothing is trained, nor compiled
            "wrapped": type(wrapped._orig_mod if self.args.torch_compile and self.data.turns else wrapped).__name__,
            "processes": self.trainer.accelerator.num_processes,
            # on resume, what is private differs
            "start": digest(self.start if self.args.resume_from else utils.flatten_parameters(self.lora)),
            "learning_rate": learning_rate,
            "fresh": self.fresh_rows(),
        }
        ranks = self.meet(mine)
        wrapped = ", ".join(sorted({rank["wrapped"] for rank in ranks}))
        alone = all(rank["processes"] == 1 for rank in ranks) and wrapped == type(self.model).__name__
        self.check(alone, f"no DDP: every rank trains a {wrapped} of its own")
        starts = sorted(set(by_name("start", ranks)))
        shown = " and ".join(start[:8] for start in starts)
        self.check(len(starts) == 1, f"same start: {shown} on {len(ranks)} rank(s)")
        lowest = min(rank["learning_rate"] for rank in ranks)
        self.check(lowest > 0, f"learns from the first step on: learning rate {lowest:.2e}")
        if fresh := [rank["fresh"] for rank in ranks if rank["fresh"]]:
            new, read, _ = map(sum, zip(*fresh))
            passed = all(new >= unread for new, _, unread in fresh)
            self.check(passed, f"fresh data next round: {new} of {read} rows of second turns are not in the first")

    def fresh_rows(self):
        """Return (new, read, unread) of the first client here that has a second turn, None without such a client.

        As the trainer will feed it: rows that are not in its first turn, all rows, and how many it had left to read.
        """
        if self.args.resume_from:  # some turns are not whole; it was checked when the run began
            return None
        positions = list(self.trainer._get_train_sampler())
        per_turn, first_turns = len(positions) // len(self.data.turns), {}
        for index, (_, client, _) in enumerate(self.data.turns):
            rows = set(self.data.order[positions[index * per_turn : (index + 1) * per_turn]].tolist())
            first = first_turns.setdefault(client, rows)
            if first is not rows:
                return len(rows - first), len(rows), min(len(self.data.own[client]) - len(first), len(rows))
        return None

    def check_average(self, ranks, clients):
        """Check that clients were apart before the averaging, and ranks equal after it; every rank takes part."""
        args, after = self.args, len(set(by_name("shared", ranks)))
        if not self.checked and all("local_digest" in client for client in clients):  # else it has just been resumed
            before, read = (len(set(by_name(name, clients))) for name in ("local_digest", "read"))
            rows = [row for client in clients for row in client["rows"]]
            # clients may be equal where their rows are, but not where a row is two clients'
            apart = (before >= read or any(by_name("skipped", clients))) and len(set(rows)) == len(rows)
            text = f"{len(clients)} client(s) with {before} adapter(s) before the averaging, {after} after it"
            if args.aggregator == "none":
                text = f"{len(clients)} client(s) with {before} adapter(s), and no averaging"
            self.check(apart and after == 1, f"federated: {text}")
            self.checked = True
        elif after > 1:
            self.check(False, f"federated: {after} adapters after the averaging")

    def check(self, passed, text):
        """Say it; where it is not so, on all ranks, end the run with exit code 3."""
        if self.rank == 0:
            (self.say if passed else self.bar.write)(f"  {'✓' if passed else '✗'} {text}")
        if not passed:
            self.written.result()
            self.meet()  # nobody leaves before it is said
            raise SystemExit(3, "a self-check failed, see its line; this would not be federated learning")


def make_strategy(args):
    """Return the strategy of --aggregator with those of its settings that are flags."""
    function = utils.AGGREGATORS[args.aggregator]
    names = list(inspect.signature(function).parameters)[3:]
    settings = {name: vars(args)[name] for name in names if vars(args).get(name) is not None}
    return functools.partial(function, **settings)


def split_like(flat, parameters):
    """Return the parts of a vector (P,) that belong to the parameters, on their device."""
    flat = flat.to(parameters[0].device)
    return [part.view_as(p) for part, p in zip(flat.split([p.numel() for p in parameters]), parameters)]


def save_moments(optimizer):
    """Copy the optimizer's state into host memory: one dict per parameter."""
    return [
        {
            name: value.to("cpu", copy=True) if torch.is_tensor(value) else value
            for name, value in optimizer.state.get(parameter, {}).items()
            if not name.startswith("qmap")  # bitsandbytes' 8-bit code book, the same for all
        }
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]


def load_moments(optimizer, moments):
    """Copy a state back in place; None, and what a state has not, is zero, which is how an optimizer begins."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter, saved in zip(parameters, moments or [{}] * len(parameters)):
        state = optimizer.state.get(parameter, {})
        for name, value in state.items():
            if not torch.is_tensor(value):
                state[name] = saved.get(name, 0)
            elif name in saved:
                value.copy_(saved[name])
            elif not name.startswith("qmap"):
                value.zero_()


def make_moments(optimizer):
    """Make the state of an optimizer that has not stepped yet, all zero, by a step that changes nothing."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate
    load_moments(optimizer, None)


def random_state():
    """Return the states of torch's random number generators: of the CPU, and of the GPU where there is one."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_available() else [])


def set_random_state(states):
    torch.set_rng_state(states[0])
    if len(states) > 1 and torch.cuda.is_available():
        torch.cuda.set_rng_state(states[1])


def count_bytes(value):
    """Return how many bytes the tensors in lists and dicts have."""
    if torch.is_tensor(value):
        return value.numel() * value.element_size()
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else []
    return sum(map(count_bytes, parts))


def by_name(name, reports):
    return [each[name] for each in reports]


def checksum(flat):
    """Return a number that tells vectors apart, by their bits and where they are: quicker than sha256."""
    total, places = 0, torch.arange(1, 2**20 + 1, device=flat.device)
    for block in flat.view(torch.int32).split(len(places)):
        total = (1000003 * total + (block * places[: len(block)]).sum().item()) % 2**61
    return total


def digest(flat):
    """Return the sha256 of a vector's bytes, in hexadecimal."""
    return hashlib.sha256(flat.cpu().numpy().tobytes()).hexdigest()


def silence_libraries():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)


def peak_memory():
    """Return this process's peak memory so far, in GB: on the GPU if it has one, otherwise in the host."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # in KB on Linux


# -----------------------------------------------------------------------------
# the life of one rank


def local_train(rank, args):
    """Train the clients of `rank` in federation with those of the other ranks, and leave behind what a run leaves.

    `args` are the parsed flags, with the paths that main.py has prepared. Ends with exit code 3 where the run would not
    be federated: ranks wrapped in DDP, clients equal before the first averaging, or ranks different after one.
    """
    device = torch.device("cuda", 0) if args.num_gpus else torch.device("cpu")
    sys.stdout.reconfigure(line_buffering=True, errors="replace")  # a line is to be seen when its round ends
    silence_libraries()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)  # whatever the number of ranks: with more threads, sums are rounded otherwise
    torch.manual_seed(args.seed + rank)
    store = args.store or dist.FileStore(args.store_path, args.world_size)  # for which no socket listens
    dist.init_process_group(
        args.backend,
        store=store,
        rank=rank,
        world_size=args.world_size,
        timeout=datetime.timedelta(minutes=args.timeout),
        device_id=device if args.backend == "nccl" else None,
    )
    utils.set_machines(args.machines, datetime.timedelta(minutes=args.timeout))
    if args.machines[-1] > 0 and not utils.local_rank(rank, args.machines):
        watch = threading.Thread(target=watch_machines, args=(rank, args), daemon=True)
        watch.start()
        atexit.register(watch.join, LAST_SECONDS)  # Python aborts a process in which a thread still asks the store
        atexit.register(LEAVING.set)  # this one is called before that one
        if args.missing:
            folder = Path(args.output_dir, "checkpoints", Path(args.resume_from).name)
            utils.share_files(folder, *args.missing)
    if args.store:
        dist.barrier()  # all ranks participate: now the checkpoint is on every machine
    tokenizer = AutoTokenizer.from_pretrained(args.model_path)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    data = load_client_data(rank, args)
    model = load_model(args, device)
    trainer = build_trainer(rank, args, device, model, tokenizer, data)
    rounds = FederatedRounds(rank, args, store, trainer, data)
    if rank == 0 and not args.quiet:
        shared = sum(parameter.numel() for parameter in rounds.shared(1))
        report.print_header(args, data, shared, client_bytes(args, rounds), model.get_memory_footprint())

    questions = data.global_held_out.select(range(min(utils.ANSWERED_ROWS, len(data.global_held_out))))
    if not args.resume_from:
        answers = answer_together(rounds, tokenizer, questions)
        rounds.before = score(answers) | {"samples": [text for text, _ in answers[: args.generate_samples]]}

    trainer.add_callback(rounds)
    ended = ""
    try:
        if data.turns:
            trainer.train()
        else:  # all that is left is to wait for others, or to publish
            rounds.begin(trainer.create_optimizer(), args.learning_rate)
    except Ended as error:
        ended = str(error)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is left to save
    rounds.written.result()
    rounds.bar.close()
    model.peft_config["default"].base_model_name_or_path = args.model_name
    answers, clients = answer_after(rounds, tokenizer, questions)
    if rounds.private:
        save_client_models(rounds)
    if rank == 0:
        publish(rounds, tokenizer, questions, answers, clients)
        if args.report_to == "wandb":
            import wandb

            wandb.finish()  # it would wait for an exit that a process of the fork server does not have
    elif rank in args.keepers:
        shutil.rmtree(rounds.staging, ignore_errors=True)  # the model is on rank 0's disk
    rounds.meet()  # nobody leaves before it is there
    LEAVING.set()
    dist.destroy_process_group()
    if ended:
        raise SystemExit(3, ended)


def watch_machines(rank, args):
    """Tell the other machines that this one lives, and end this rank when another has not for SILENCE seconds.

    Its torchrun then starts anew with the machines that are left. A rank that waits for a lost machine in a collective
    would do so for --timeout minutes.
    """
    firsts = [args.machines.index(machine) for machine in range(args.machines[-1] + 1)]
    store, beat = args.store.clone(), [time.monotonic()]
    heard = {other: (None, beat[0]) for other in firsts if other != rank}  # all have just been there
    threading.Thread(target=watch_store, args=(beat,), daemon=True).start()
    try:
        while not LEAVING.wait(BEAT):
            beat[0] = time.monotonic()
            store.set(f"alive/{rank}", str(time.time_ns()))
            for other, (before, when) in heard.items():
                word = store.get(f"alive/{other}") if store.check([f"alive/{other}"]) else None
                if word != before:
                    heard[other] = word, time.monotonic()
                elif time.monotonic() - when > SILENCE:
                    raise TimeoutError(f"no sign of machine {args.machines[other]} for {SILENCE} seconds")
    except Exception as error:  # the store is gone, too, where that machine had it
        if not LEAVING.is_set():
            print(f"main.py: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)


def watch_store(beat):
    """End this rank when the thread that talks to the store has waited for it for SILENCE seconds."""
    while not LEAVING.wait(BEAT):
        if time.monotonic() - beat[0] > SILENCE + BEAT:
            print(f"main.py: no answer from the store of machine 0 for {SILENCE} seconds", file=sys.stderr, flush=True)
            os._exit(1)


def client_bytes(args, rounds):
    """Return how many bytes of host memory a client needs between its turns."""
    trained = sum(parameter.numel() for parameter in rounds.lora if parameter.requires_grad)
    private = sum(parameter.numel() for parameter in rounds.private)
    shared = sum(parameter.numel() for parameter in rounds.shared(1))
    shared *= args.scaffold + (args.average_dtype != "float32")
    return utils.moment_bytes(args) * trained + 4 * (private + shared)


def answer_together(rounds, tokenizer, questions):
    """Return the answers, as `answer` does, of the one model that all ranks have; they share the questions out."""
    args, answers = rounds.args, [None] * len(questions)
    own = questions.select(rounds.own_share(questions))
    own = answer(rounds.model, tokenizer, own, 4 * args.per_device_train_batch_size)
    for rank, part in enumerate(rounds.meet(own)):
        answers[rank :: args.world_size] = part
    return answers


def answer_after(rounds, tokenizer, questions):
    """Return (answers to the global questions, scores of the clients of the last round); every rank takes part.

    Each client is scored on its own held-out rows: loss (nats per answer token), exact match and F1 (percent); where
    clients have models of their own, under "global" also on the global questions, and the answers are of the first one.
    With --centralized, the one client is scored on the held-out rows of what would be the clients of the last round.
    """
    args, data, scores = rounds.args, rounds.data, []
    ask = functools.partial(answer, rounds.model, tokenizer, batch_size=4 * args.per_device_train_batch_size)
    answers = None if rounds.private else answer_together(rounds, tokenizer, questions)
    for client in data.plan[(rounds.number or rounds.rounds_done) - 1][0][rounds.rank]:  # of a round that has ended all
        everywhere = {}
        if rounds.private:
            rounds.enter(client)
            own_answers = ask(rows=questions)
            answers, everywhere = answers or own_answers, {"global": score(own_answers)}
        for part in data.own_parts(client):
            rows = data.rows.select(data.held_out[part])
            loss, tokens = evaluate(rounds.trainer, rows)
            scores.append({"client": part, "eval_loss": loss / tokens, **score(ask(rows=rows)), **everywhere})
    scores = [score for part in rounds.meet(scores) for score in part]
    return answers, sorted(scores, key=lambda score: score["client"])


def save_client_models(rounds):
    """Save the adapter of every client that has trained, into staging; every rank takes part."""
    folder, files = rounds.staging, {}
    for client in sorted({*rounds.records, rounds.current} - {None}):
        rounds.enter(client)
        rounds.model.save_pretrained(folder / f"client_{client}", save_embedding_layers=False)
        paths = [path for path in (folder / f"client_{client}").iterdir() if path.is_file()]
        files |= {str(path.relative_to(folder)): path.stat().st_size for path in paths}
    rounds.copy_files(folder, rounds.meet(files))
    rounds.meet()  # all adapters are there


def publish(rounds, tokenizer, questions, answers, clients):
    """Write the finished adapter with its tokenizer and card, the figure and the summary; rank 0 alone."""
    args, folder = rounds.args, Path(rounds.args.output_dir)
    if not rounds.private:
        rounds.model.save_pretrained(rounds.staging, save_embedding_layers=False)
    samples = [
        {"question": question, "accepted": accepted, "before": before, "after": after}
        for question, before, (after, accepted) in zip(questions["question"], rounds.before.pop("samples"), answers)
    ]
    after = score(answers)
    if rounds.private:  # the mean over the clients' models
        after = {name: round(sum(each["global"][name] for each in clients) / len(clients), 2) for name in after}
    summary = report.summarize(args, rounds.data, {"before": rounds.before, "after": after}, clients, len(questions))
    tokenizer.save_pretrained(rounds.staging)
    (rounds.staging / "README.md").write_text(report.model_card(args, summary), encoding="utf-8")
    report.plot_losses(folder)
    if samples:
        utils.write_aside(folder / "samples.json", json.dumps(samples, indent=2) + "\n")
    utils.write_aside(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    target = rounds.staging.with_suffix("")
    shutil.rmtree(target, ignore_errors=True)
    rounds.staging.rename(target)  # last of all: with the model there, the run is finished
    report.print_summary(args, summary, samples, target)


# -----------------------------------------------------------------------------
# the finished model


def load_finished(args, folder):
    """Return the base model with the adapter in `folder`, on the first GPU where there is one."""
    silence_libraries()
    model = load_base(args, torch.device("cuda", 0) if args.num_gpus else torch.device("cpu"))
    if args.merge and args.load_in_4bit:
        model = model.dequantize()
    return PeftModel.from_pretrained(model, folder)


def answer_question(model, tokenizer, question, context):
    """Return the answer to one question, from `context` where that is not empty, asked as in training."""
    if context:
        row = {"context": context, "question": question, "answers": {"text": ["?"]}}
    elif tokenizer.chat_template:
        row = {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "?"}]}
    else:
        row = {"prompt": question, "completion": "?"}
    row = utils.tokenize_row(row, tokenizer, max_length=sys.maxsize)  # of which the answer is left out
    if row["problem"]:
        return f"({row['problem']})"
    row, longest = datasets.Dataset.from_list([row]), None if context else CHAT_TOKENS
    return answer(model, tokenizer, row, 1, longest)[0][0]


def merge(model, tokenizer, target):
    """Write a model with its adapter merged into it as 16-bit weights, into the folder `target`.

    Into the weights as training saw them, rounded to NF4: it scores as the adapter did. Merged into the weights before
    rounding, the embedded model has a loss of 0.582 instead of 0.570.
    """
    model = model.merge_and_unload().to(torch.bfloat16)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
