"""Data, files and averaging for federated fine-tuning. To change the averaging, go to "EDIT HERE"."""

import functools
import json
import os
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
from jinja2 import TemplateError

INSTRUCTION = "Answer the question with words copied from the context. If the answer is not there, say unanswerable."
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
UNANSWERABLE = "unanswerable"
HELD_OUT_SPLITS = ("validation", "valid", "val", "dev", "test")  # the first of these that a dataset has
READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}

# -----------------------------------------------------------------------------
# data: rows -> conversations -> tokens -> one part per client -> the order of a run


def load_rows(dataset_path, token=None):
    """Load the training rows and, where the dataset has one, its validation or test split.

    `dataset_path` is a json, jsonl, csv or parquet file, a folder of such files, a `save_to_disk` folder or the id of
    a dataset on the hub. Returns (train, held_out), held_out None where there is no such split.
    """
    path = Path(dataset_path)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        data = load_from_disk(dataset_path)
    elif path.is_file():
        data = load_dataset(READERS[path.suffix], data_files=str(path))
    else:
        data = load_dataset(dataset_path, token=token)
    if isinstance(data, Dataset):
        data = DatasetDict(train=data)
    held_out = next((data[name] for name in HELD_OUT_SPLITS if name in data), None)
    if "train" not in data:
        raise ValueError(f"no split is named train; found {', '.join(data)}")
    return data["train"], held_out


@functools.cache
def has_system_role(tokenizer):
    """Whether the chat template of `tokenizer` takes a system message (some refuse it, some drop it silently)."""
    probe = [{"role": "system", "content": "a-system-message"}, {"role": "user", "content": "a-question"}]
    try:
        return "a-system-message" in tokenizer.apply_chat_template(probe, tokenize=False)
    except TemplateError:
        return False


def convert_squad_sample_to_llama_conversation(sample, tokenizer):
    """Turn one SQuAD row into a conversation whose completion, the answer, is all that the loss sees.

    `sample` has `context`, `question` and `answers`, which is `{"text": [...]}` or a list of `{"text": ...}`; an empty
    list means that the context does not hold the answer. Returns TRL's conversational prompt-completion format:
    `{"prompt": [system, user], "completion": [assistant]}`, or a prompt of one user turn where the chat template of
    `tokenizer` knows no system role.
    """
    system = f"{INSTRUCTION}\n\n{sample['context']}"
    prompt = [{"role": "system", "content": system}, {"role": "user", "content": sample["question"]}]
    if not has_system_role(tokenizer):
        prompt = [{"role": "user", "content": f"{system}\n\n{sample['question']}"}]
    return {"prompt": prompt, "completion": [{"role": "assistant", "content": list_answers(sample)[0]}]}


def list_answers(sample):
    """Return every accepted answer of a SQuAD row, at least one."""
    answers = sample["answers"] or []
    texts = answers["text"] if isinstance(answers, dict) else [answer["text"] for answer in answers]
    return list(texts) or [UNANSWERABLE]


def tokenize_row(row, tokenizer, max_length):
    """Tokenize one row; the labels are -100 (no loss) up to the answer, and the last one ends the turn.

    `row` is SQuAD, `messages` (the last message is the answer) or `prompt`/`completion` (texts or message lists).
    Returns `input_ids` and `labels` of at most `max_length` tokens, `length` and `answer_length` (tokens kept of the
    row and of its answer), `truncated` (bool) and `references` (the accepted answers, for exact match and F1).
    """
    if "messages" in row:
        if not isinstance(row["messages"], list):
            raise TypeError("messages is not a list")
        row = {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}
    references = list_answers(row) if "answers" in row and "context" in row else None
    if references:
        row = convert_squad_sample_to_llama_conversation(row, tokenizer)
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        ids = tokenizer(prompt + completion)["input_ids"]
        start = tokenizer(prompt)["input_ids"]
        ids += [tokenizer.eos_token_id] * (ids[-1] != tokenizer.eos_token_id)
    else:
        ids = tokenizer.apply_chat_template(prompt + completion)["input_ids"]
        start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        if tokenizer.eos_token_id in ids[len(start) :]:  # ChatML adds a line break behind the end-of-turn token
            ids = ids[: len(ids) - ids[::-1].index(tokenizer.eos_token_id)]
    answer = next((i for i, (a, b) in enumerate(zip(ids, start)) if a != b), min(len(ids), len(start)))
    labels = [-100] * answer + ids[answer:]
    return {
        "input_ids": ids[:max_length],
        "labels": labels[:max_length],
        "length": min(len(ids), max_length),
        "answer_length": max(0, min(len(ids), max_length) - answer),
        "truncated": len(ids) > max_length,
        "references": references or [completion if isinstance(completion, str) else completion[-1]["content"]],
    }


def partition_dataset(dataset, rank, world_size, seed=42):
    """Return part `rank` of `world_size`: shuffled by `seed`, disjoint, sizes at most one row apart, no row left out.

    Where a dataset has no held-out split, clients take parts 0 to N-1 of N+1 and part N is the global held-out set.
    """
    order = np.random.default_rng(seed).permutation(len(dataset))
    return dataset.select(np.array_split(order, world_size)[rank])


def schedule_rows(num_rows, total, seed):
    """Return the order in which a client reads its `num_rows` rows: `total` indices, every epoch newly shuffled.

    Read from front to back, batch by batch and round by round, it makes every round go on where the last one stopped.
    """
    rng = np.random.default_rng(seed)
    epochs = [rng.permutation(num_rows) for _ in range(-(-total // num_rows))]
    return np.concatenate(epochs)[:total]


# -----------------------------------------------------------------------------
# losses on disk


def write_aside(path, text):
    """Write a file so that a reader finds the old content or the new one, never a part of it."""
    aside = Path(f"{path}.tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def append_loss_to_file(path, loss):
    """Append one loss (nats per answer token) to a JSON list of floats, which is made when it is not there."""
    losses = json.loads(Path(path).read_text(encoding="utf-8")) if Path(path).exists() else []
    write_aside(path, json.dumps(losses + [loss]))


def read_rounds(output_dir):
    """Return the rounds that `rounds.jsonl` holds, one dict each, oldest first."""
    path = Path(output_dir, "rounds.jsonl")
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []  # an unfinished line is no round
    return [json.loads(line) for line in lines]


def cut_back_logs(output_dir, last_round):
    """Drop what the logs say of rounds after `last_round`, so that a resumed run logs no round twice."""
    rounds = [entry for entry in read_rounds(output_dir) if entry["round"] <= last_round]
    write_aside(Path(output_dir, "rounds.jsonl"), "".join(json.dumps(entry) + "\n" for entry in rounds))
    evaluated = sum(entry["eval_loss"] is not None for entry in rounds)
    for path in [*Path(output_dir).glob("client_*_loss.json"), *Path(output_dir).glob("global_eval_loss.json")]:
        keep = last_round if path.name.endswith("train_loss.json") else evaluated
        write_aside(path, json.dumps(json.loads(path.read_text(encoding="utf-8"))[:keep]))


def plot_losses(output_dir):
    """Draw `loss.png`: the loss of every client in training, and the global held-out loss, over the rounds."""
    from matplotlib.figure import Figure  # half a second that only one process has to pay

    rounds = read_rounds(output_dir)
    axes = Figure(figsize=(7, 4), layout="constrained", dpi=150).subplots()
    for path in sorted(Path(output_dir).glob("client_*_train_loss.json")):
        losses = json.loads(path.read_text(encoding="utf-8"))
        axes.plot(range(1, len(losses) + 1), losses, color="0.75", linewidth=0.8)
    axes.plot([], [], color="0.75", label="clients, training")
    for name, style, color, label in (
        ("train_loss", "-", "#0072B2", "mean of the clients, training"),
        ("eval_loss", "o-", "#D55E00", "global, held out"),
    ):
        points = [(entry["round"], entry[name]) for entry in rounds if entry[name] is not None]
        axes.plot(*zip(*points), style, color=color, label=label)
    axes.set(xlabel="round", ylabel="loss (nats per answer token)", ylim=(0, None))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    axes.figure.savefig(Path(output_dir, "loss.png"))


# -----------------------------------------------------------------------------
# averaging: EDIT HERE
#
# A strategy is a function (update, weight, state) -> update.
#   update  float32 (P,): how far this client's shared LoRA parameters moved since the round began
#   weight  float: the number of rows this client trains on
#   state   dict that lives as long as the run and is saved with it, for momentum and the like
# It returns the update that every client applies, the same on all of them. Every client calls it, and the only way to
# the others is `sum_over_clients`. Add your function to AGGREGATORS and run it with --aggregator NAME.


def sum_over_clients(*terms):
    """Sum each of `terms` (tensors or numbers) over the clients, all in one all-reduce; every rank takes part."""
    terms = [torch.as_tensor(term, dtype=torch.float32) for term in terms]
    flat = torch.cat([term.reshape(-1).to(communication_device()) for term in terms])
    dist.all_reduce(flat)  # all ranks participate
    sums = [part.view_as(term) for part, term in zip(flat.split([term.numel() for term in terms]), terms)]
    return sums if len(sums) > 1 else sums[0]


def fedavg(update, weight, state):
    """Mean of the updates, weighted by rows. FedAvg, McMahan et al. 2017 (arXiv:1602.05629)."""
    total, weights = sum_over_clients(weight * update, weight)
    return total / weights


AGGREGATORS = {"fedavg": fedavg}

# end of EDIT HERE
# -----------------------------------------------------------------------------
# applying the average to a model


def communication_device():
    """Return the device on which the collectives of the backend want their tensors."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def shared_parameters(model):
    """Return the parameters that clients share, in the model's order: the trainable ones, which are LoRA's A and B."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def flatten_parameters(model):
    """Copy the shared parameters into one float32 vector (P,) on the device of the collectives."""
    flat = torch.cat([parameter.detach().float().reshape(-1) for parameter in shared_parameters(model)])
    return flat.to(communication_device())


def unflatten_parameters(model, flat):
    """Copy a vector (P,) back into the shared parameters."""
    parameters = shared_parameters(model)
    for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters])):
        parameter.data.copy_(part.view_as(parameter))


def federated_average(model, world_size, start=None, weight=1.0, aggregate=fedavg, state=None):
    """Replace the LoRA parameters of every client by their average; every rank takes part.

    With the first two arguments only this is the plain mean, by one all-reduce. `start` (P,) is the vector from which
    all clients began the round, `weight` this client's rows, `aggregate` a strategy (see EDIT HERE), `state` its dict.
    Returns (parameters, update, distance): the new vector (P,), the averaged update (P,), and how far this client's
    own update was from it (Euclidean norm).
    """
    local = flatten_parameters(model)
    start = torch.zeros_like(local) if start is None else start
    update = aggregate(local - start, weight, {} if state is None else state)
    distance = torch.linalg.vector_norm(local - start - update).item() if world_size > 1 else 0.0
    parameters = start + update
    unflatten_parameters(model, parameters)
    return parameters, update, distance


# -----------------------------------------------------------------------------
# the model card


def model_card(args, summary):
    """Return the card of the adapter: what it was made from, how, and how well it does."""
    exact, f1, loss = summary["exact_match"], summary["f1"], summary["eval_loss"]
    return f"""---
base_model: {args.model_name}
library_name: peft
pipeline_tag: text-generation
tags: [lora, federated-learning]
---

# LoRA adapter, fine-tuned in federation

{summary["clients"]} clients with {", ".join(map(str, summary["rows"]))} training rows,
{summary["rounds"]} rounds of {args.local_steps} local steps, averaged by `{args.aggregator}`.
The clients were simulated on machines of one owner, so this says nothing about privacy.

| {summary["answered"]} held-out questions | before | after |
|---|---|---|
| exact match | {exact["before"]:.1f}% | {exact["after"]:.1f}% |
| F1 | {f1["before"]:.1f}% | {f1["after"]:.1f}% |

Held-out loss {loss["first"]:.4f} at the first evaluated round, {loss["last"]:.4f} at the last.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{args.model_name}"), "THIS FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")
```
"""
