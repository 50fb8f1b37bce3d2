"""--dry_run: what a run will need, from sizes alone; no weights are loaded, nothing is trained or written."""

import datetime

import numpy as np
import torch

from fllama import basemodel, checkpoints, options, prepare
from fllama.narrow import CODE_BYTES
from fllama.options import fail

SAMPLED_ROWS = 1000  # are tokenized
NF4_BYTES = 0.516  # per weight in 4 bits, with its share of the doubly quantized scales
LOGITS_TILE = 32768  # logits of each answer token that TRL holds at a time, in float32


def dry_run(args, num_gpus):
    """Print what the run would need."""
    source, form = prepare.find_rows(args, num_gpus)
    rows, held_out = source.train, source.held_out
    _, config, tokenizer = basemodel.find_model(args, weights=False)
    prepare.check_template(args, tokenizer, form)
    if not all(hasattr(config, name) for name in ("intermediate_size", "num_key_value_heads")):
        fail(f"--model_name {args.model_name} is not built as LLaMA is")
    size = min(SAMPLED_ROWS, len(rows))
    sample = rows.select(np.random.default_rng(args.seed).choice(len(rows), size, replace=False))
    sample = prepare.tokenize(args, sample, form, tokenizer, datetime.datetime.now(), keep_in_memory=True)
    sample = sample.select([number for number, length in enumerate(sample["answer_length"]) if length > 0])
    if not len(sample):
        fail(f"--dataset_path {args.dataset_path}: no row that was looked at has an answer within --max_length")
    num_held_out = len(held_out) if held_out else len(rows) // (args.num_clients + 1)
    numbers = estimate(args, config, sample["length"], sample["answer_length"], num_gpus)
    print_estimate(args, numbers, len(rows), num_held_out, np.array(sample["length"]))


def estimate(args, config, lengths, answer_lengths, num_gpus):
    """Return what a run with these flags will need, as a dict; sizes in bytes.

    `lengths` are the tokens of some rows, `answer_lengths` of their answers.
    """
    half = args.torch_dtype in ("bfloat16", "float16") or args.torch_dtype == "auto" and num_gpus > 0
    width = 2 if half else 4  # bytes of a number
    linear, others, largest = count_parameters(config)
    lora = basemodel.count_lora_parameters(config, args.lora_r)
    layers, hidden = config.num_hidden_layers, config.hidden_size
    _, playing = options.training_clients(args)
    turns = -(-playing // args.world_size)  # of a rank in a round

    tokens, learned = tokens_of_batch(args, np.asarray(lengths), np.asarray(answer_lengths))
    saved = saved_elements(config, args.lora_r)
    kept = hidden if args.gradient_checkpointing else saved  # per token and layer, for the backward pass
    memory = {
        "weights": linear * (NF4_BYTES if args.load_in_4bit else width) + others * width,
        "adapter": 3 * 4 * lora,  # with its gradient, and the round's start
        "optimizer": options.OPTIMIZER_BYTES.get(args.optim, 8) * lora,
        "activations": width * (tokens * (layers * kept + saved) + largest) + 8 * learned * LOGITS_TILE,
        "averaging": 24 * lora + 4 * lora * turns * (args.average_dtype != "float32"),
    }
    shared = lora
    if args.aggregator == "none":
        shared = 0
    elif args.lora_variant != "lora":
        shared = lora / 2  # A or B: about half
    clients, _ = options.training_clients(args)
    constant = memory["weights"] + memory["adapter"] + memory["optimizer"]
    return {
        "parameters": (linear, others, lora),
        "memory": memory,
        "peak": constant + max(memory["activations"], memory["averaging"]),
        "clients": options.client_bytes(args) * lora * clients,
        "sent": shared * (CODE_BYTES[args.average_dtype] + 4 * args.scaffold),
        "checkpoint": prepare.checkpoint_bytes(args, lora),
        "tokens": playing * args.local_steps * args.gradient_accumulation_steps * tokens,
    }


def count_parameters(config):
    """Return (in the linear layers, in all others, in the largest linear layer), built without memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    linear = [
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]
    total = sum(parameter.numel() for parameter in model.parameters())
    return sum(linear), total - sum(linear), max(linear)


def saved_elements(config, r):
    """Return how many elements a layer saves of each token for the backward pass, with LoRA of rank `r`."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    keys = hidden * config.num_key_value_heads // heads
    return 6 * hidden + 2 * keys + 4 * config.intermediate_size + 7 * r + heads + 2


def tokens_of_batch(args, lengths, answer_lengths):
    """Return (tokens with padding, tokens that are learned) of one forward pass, on average."""
    size = args.per_device_train_batch_size
    if args.packing:
        return size * args.max_length, size * args.max_length * answer_lengths.mean() / lengths.mean()
    longest = np.random.default_rng(0).choice(lengths, (200, size)).max(axis=1)
    return size * longest.mean(), size * answer_lengths.mean()


def print_estimate(args, numbers, num_rows, num_held_out, lengths):
    """Print what `estimate` says, for people."""
    from fllama import data  # it imports trl: seconds that main.py need not spend on every start

    linear, others, lora = numbers["parameters"]
    memory = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in numbers["memory"].items())
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    copies = checkpoints.KEPT_CHECKPOINTS + 1
    clients, _ = options.training_clients(args)
    evaluated = min(num_held_out, data.GLOBAL_EVAL_ROWS)
    answered = min(evaluated, args.eval_questions)
    lines = [
        "dry run: from sizes; nothing is loaded, trained or written",
        f"  model      {(linear + others) / 1e6:,.1f} M parameters, {linear / 1e6:,.1f} M of them in linear layers; "
        f"LoRA {lora / 1e6:.1f} M",
        f"  rows       {num_rows:,} of {lengths.mean():.0f} tokens; 95% have up to {np.quantile(lengths, 0.95):.0f}",
        f"  memory     {numbers['peak'] / 1e9:.2f} GB a rank beside the libraries: {memory} "
        "(of the last two the larger counts)",
        f"  clients    {numbers['clients'] / 1e9:.2f} GB of host memory on all ranks together, for {clients} "
        "between their turns",
        f"  round      {args.local_steps} local steps x {batch} rows a client, about {numbers['tokens']:,.0f} tokens "
        "with padding in all",
        f"  bytes      {numbers['sent'] / 1e6:.1f} MB per client and round, as {args.average_dtype}",
        f"  evaluation {evaluated} global held-out rows every {args.eval_rounds} round(s), and up to "
        f"{prepare.CLIENT_EVAL_ROWS} of each client; {answered} questions answered before and after",
        f"  disk       {copies * numbers['checkpoint'] / 1e9:.2f} GB for {copies} checkpoints, "
        f"one every {args.save_rounds} round(s)",
        f"  run        {args.num_rounds} rounds, about {args.num_rounds * numbers['tokens']:,.0f} tokens",
    ]
    print("\n".join(lines), flush=True)
