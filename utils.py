"""Data, files and averaging for federated fine-tuning. To change the averaging, go to "EDIT HERE"."""

import copy
import functools
import hashlib
import json
import math
import os
import shutil
import statistics
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from datasets import Dataset, DatasetDict, Features, List, Value, load_dataset, load_from_disk
from jinja2 import TemplateError

INSTRUCTION = "Answer the question with words copied from the context. If the answer is not there, say unanswerable."
GLOBAL_MODEL, CLIENT_MODELS = "federated_global_model", "client_models"  # folders of what a run has trained
# --lora_variant: which tensors a client trains and which of them it shares, by a part of their names, in one round
# after another. ffa: FFA-LoRA, Sun et al. 2024 (arXiv:2403.12313). rolora: RoLoRA, Chen et al. 2024 (arXiv:2409.02346).
# fedsa: FedSA-LoRA, Guo et al. 2024 (arXiv:2410.01463).
LORA_VARIANTS = {
    "lora": [("lora_", "lora_")],
    "ffa": [("lora_B", "lora_B")],
    "rolora": [("lora_B", "lora_B"), ("lora_A", "lora_A")],
    "fedsa": [("lora_", "lora_A")],
}
LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENIZED = Features(
    input_ids=List(Value("int64")),
    labels=List(Value("int64")),
    length=Value("int64"),
    answer_length=Value("int64"),
    truncated=Value("bool"),
    question=Value("string"),
    references=List(Value("string")),
    problem=Value("string"),
)
UNANSWERABLE = "unanswerable"
HELD_OUT_SPLITS = ("validation", "valid", "val", "dev", "test")  # the first of these that a dataset has
CLIENT_EVAL_ROWS = 16  # at most so many rows of each client are held out, and at most a tenth of its rows
GLOBAL_EVAL_ROWS = 512  # at most so many of the global held-out rows are evaluated
ANSWERED_ROWS = 96  # held-out questions that are answered before and after training, for exact match and F1
MAX_NEW_TOKENS = 32  # of an answer
KEPT_CHECKPOINTS = 2
CHUNK = 2**26  # bytes of a file that machines send each other at a time
OPTIMIZER_BYTES = {"sgd": 0, "adamw_8bit": 2, "paged_adamw_8bit": 2}  # of its state, for each parameter; else 8
STOPPED = 143  # exit code of a rank that has saved itself on SIGTERM
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
    answers = sample["answers"]
    texts = answers["text"] if isinstance(answers, dict) else [answer["text"] for answer in answers]
    return list(texts) or [UNANSWERABLE]


def find_problem(row):
    """Return what is wrong with a row of one of the forms that `tokenize_row` takes, "" where nothing is."""

    def no_text(value):
        return not isinstance(value, str) or not value.strip()

    def no_messages(value):
        return not isinstance(value, list) or not value or any(no_message(message) for message in value)

    def no_message(value):  # a call of a tool has no content
        return (
            not isinstance(value, dict) or no_text(value.get("role")) or not isinstance(value.get("content") or "", str)
        )

    if "messages" in row:
        if no_messages(row["messages"]):
            return "messages is not a list of messages with role and content"
        return "the last message is empty" if no_text(row["messages"][-1]["content"]) else ""
    if "context" in row and "answers" in row:
        if not isinstance(row["context"], str):
            return "context is not a text"
        if no_text(row.get("question")):
            return "question is not a text, or empty"
        try:
            return "an answer is not a text, or empty" if any(map(no_text, list_answers(row))) else ""
        except (TypeError, KeyError, IndexError):
            return "answers has no list of texts"
    prompt, completion = row.get("prompt"), row.get("completion")
    if not isinstance(prompt, str) and no_messages(prompt):
        return "prompt is neither a text nor a list of messages"
    if no_text(completion) and (no_messages(completion) or no_text(completion[-1]["content"])):
        return "completion is neither a text nor a list of messages, or empty"
    return "" if type(prompt) is type(completion) else "prompt and completion are of two kinds"


def tokenize_row(row, tokenizer, max_length):
    """Tokenize one row; the labels are -100 (no loss) up to the answer, and the last one ends the turn.

    `row` is SQuAD, `messages` (the last message is the answer) or `prompt`/`completion` (texts or message lists).
    Returns `input_ids` and `labels` of at most `max_length` tokens, `length` and `answer_length` (tokens kept of the
    row and of its answer), `truncated` (bool), `question` (to be shown), `references` (the accepted answers, for exact
    match and F1) and `problem`, why the row cannot be used: then it has no tokens.
    """
    empty = {"input_ids": [], "labels": [], "length": 0, "answer_length": 0, "truncated": False}
    empty |= {"question": "", "references": []}
    if problem := find_problem(row):
        return empty | {"problem": problem}
    try:
        return tokenize_conversation(row, tokenizer, max_length) | {"problem": ""}
    except (TemplateError, UnicodeError, TypeError, ValueError, KeyError) as error:
        return empty | {"problem": f"the chat template or the tokenizer refuses it: {type(error).__name__}"}


def tokenize_conversation(row, tokenizer, max_length):
    if "messages" in row:
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
        "question": prompt if isinstance(prompt, str) else prompt[-1]["content"] if prompt else "",
        "references": references or [completion if isinstance(completion, str) else completion[-1]["content"]],
    }


def digest_of_rows(data_path):
    """Return the sha256 of what main.py has prepared: the tokens of all rows, and whose they are."""
    digest = hashlib.sha256(Path(data_path, "parts.json").read_bytes())
    for _, rows in sorted(load_from_disk(data_path).items()):
        for column in (rows.data.column(name) for name in ("input_ids", "labels")):
            for chunk in column.chunks:
                digest.update(chunk.value_lengths().to_numpy())
                digest.update(chunk.flatten().to_numpy())
    return digest.hexdigest()


def digest_of_model(path):
    """Return a sha256 that tells models apart: of the names, sizes and last MB of the files with weights."""
    digest = hashlib.sha256()
    for file in sorted(Path(path).glob("*.safetensors")):
        with open(file, "rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            opened.seek(max(0, size - 2**20))
            digest.update(f"{file.name} {size} ".encode() + opened.read())
    return digest.hexdigest()


def partition_dataset(dataset, rank, world_size, seed=42):
    """Return part `rank` of `world_size`: shuffled by `seed`, disjoint, sizes at most one row apart, no row left out.

    Where a dataset has no held-out split, clients share parts 0 to N-1 of N+1 and part N is the global held-out set.
    """
    return dataset.select(split_evenly(len(dataset), world_size, seed)[rank])


def split_evenly(num_rows, num_parts, seed):
    """Return the rows of each part, shuffled; sizes are at most one apart."""
    return np.array_split(np.random.default_rng(seed).permutation(num_rows), num_parts)


def partition_rows(rows, num_clients, kind="iid", values=None, alpha=0.5, seed=42):
    """Deal `rows` (an array of row numbers, shuffled) out to clients: a list of arrays, in which every row is once.

    iid        sizes at most one apart, as in `partition_dataset`
    quantity   two rows each, and the rest by a power law: client k gets a share proportional to 1 / (k + 1)
    column     one client per value in `values` (one per row), in the order of `sorted`
    dirichlet  the rows of each value go to the clients in shares drawn from Dirichlet(alpha): below 1 a client sees
               few values, above 10 it is nearly iid. Hsu et al. 2019 (arXiv:1909.06335), as in Li et al. 2021
               (arXiv:2102.02079), which draw it per label.
    """
    if kind == "iid":
        return np.array_split(rows, num_clients)
    if kind == "quantity":
        shares = 1 / np.arange(1, num_clients + 1)
        sizes = 2 + shares / shares.sum() * (len(rows) - 2 * num_clients)
        return np.split(rows, np.rint(sizes.cumsum()).astype(int)[:-1])
    values = np.array([str(value) for value in values], dtype=object)[rows]
    groups = [rows[values == value] for value in sorted(set(values))]
    if kind == "column":
        return groups
    rng, parts = np.random.default_rng(seed), []
    for group in groups:
        shares = rng.dirichlet(np.full(num_clients, alpha))
        parts.append(np.split(group, np.rint(shares.cumsum() * len(group)).astype(int)[:-1]))
    return [rng.permutation(np.concatenate(part)) for part in zip(*parts)]


def schedule_rows(num_rows, total, seed):
    """Return the order in which a client reads its `num_rows` rows: `total` indices, every epoch newly shuffled.

    Read from front to back, batch by batch and round by round, it makes every round go on where the last one stopped.
    """
    rng = np.random.default_rng(seed)
    epochs = [rng.permutation(num_rows) for _ in range(-(-total // num_rows))]
    return np.concatenate(epochs)[:total]


def plan_rounds(num_clients, clients_per_round, num_rounds, world_size, seed, machine_of=None):
    """Draw the clients of every round, and deal them out to the ranks; the draw does not depend on `world_size`.

    Returns one (shares, moves) per round: shares[rank] is the list of the clients that `rank` plays one after the
    other, at most one more or less than another rank; moves lists (client, from rank, to rank) of those that were
    played before by another rank, whose state has to travel. A client stays with its rank where there is room, else on
    its machine: machine_of[rank] numbers these.
    """
    machine_of = machine_of or [0] * world_size
    holder, plan = {}, []
    for number in range(1, num_rounds + 1):
        drawn = np.random.default_rng([seed, number]).choice(num_clients, clients_per_round, replace=False)
        sizes = [len(part) for part in np.array_split(drawn, world_size)]
        shares, others, moves = [[] for _ in sizes], [], []
        for client in sorted(drawn.tolist()):
            home = holder.get(client)
            room = home is not None and len(shares[home]) < sizes[home]
            (shares[home] if room else others).append(client)
        for client in others:
            free, home = [rank for rank, share in enumerate(shares) if len(share) < sizes[rank]], holder.get(client, 0)
            rank = min(free, key=lambda rank: machine_of[rank] != machine_of[home])
            shares[rank].append(client)
            if client in holder:
                moves.append((client, holder[client], rank))
            holder[client] = rank
        plan.append((shares, moves))
    return plan


# -----------------------------------------------------------------------------
# logs and checkpoints on disk


def count_lora_parameters(config, r):
    """Return how many parameters a LoRA of rank `r` on all of LORA_TARGETS has, from the config of the model."""
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads  # Qwen2's config has none
    queries, keys = heads * head, config.num_key_value_heads * head
    return config.num_hidden_layers * r * (2 * (hidden + queries) + 2 * (hidden + keys) + 3 * (hidden + inner))


def checkpoint_bytes(args, parameters):
    """Return about how large a checkpoint is, with so many LoRA parameters."""
    return parameters * (client_bytes(args) * args.num_clients + 20)  # the adapter, and the server's state


def client_bytes(args):
    """Return about how many bytes a client keeps between its turns, per LoRA parameter."""
    private = args.lora_variant == "fedsa" or args.aggregator == "none"
    return moment_bytes(args) + 4 * (private + args.scaffold + (args.average_dtype != "float32"))


def moment_bytes(args):
    """Return how many bytes of a client's optimizer state wait for its next turn, per parameter that it trains."""
    return OPTIMIZER_BYTES.get(args.optim, 8) * (args.client_state == "keep")


def write_aside(path, text):
    """Write a file so that a reader finds the old content or the new one, never a part of it."""
    aside = Path(f"{path}.tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


def flush(path):
    """Wait until a file, or the names in a folder, are on the disk itself."""
    file = os.open(path, os.O_RDONLY)
    os.fsync(file)
    os.close(file)


def append_loss_to_file(path, loss):
    """Append one loss (nats per answer token) to a JSON list, which is made when it is not there; no number is null."""
    write_aside(path, json.dumps(read_losses(path) + [loss if math.isfinite(loss) else None]))


def read_losses(path):
    """Return the list of losses in a file; of a torn file, which is set aside, those before the tear."""
    text = Path(path).read_text(encoding="utf-8", errors="replace") if Path(path).exists() else "[]"
    losses = parse(text)
    if not isinstance(losses, list):
        set_aside(path)
        parts = [part.strip() for part in text.lstrip("[").split(",")[:-1]]  # the last may have lost digits
        losses = [parse(part) for part in parts if part == "null" or isinstance(parse(part), float)]
    return losses


def parse(text):
    """Return what a JSON text says, None where it is torn."""
    try:
        return json.loads(text)
    except ValueError:
        return None


def read_rounds(output_dir):
    """Return the rounds that `rounds.jsonl` holds, one dict each, oldest first, without lines that are torn."""
    path = Path(output_dir, "rounds.jsonl")
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    return [entry for entry in map(parse, lines) if isinstance(entry, dict) and "round" in entry]


def set_aside(path):
    """Rename a log that is torn, and say so."""
    os.replace(path, f"{path}.torn")
    print(f"{path} was torn: what is left of it goes on, and the file is kept as {Path(path).name}.torn", flush=True)


def cut_back_logs(output_dir, last_round):
    """Drop what the logs say of rounds after `last_round`, so that a resumed run logs no round twice."""
    path, rounds = Path(output_dir, "rounds.jsonl"), read_rounds(output_dir)
    if path.exists() and len(rounds) < len(path.read_bytes().splitlines()):
        set_aside(path)
    rounds = [entry for entry in rounds if entry["round"] <= last_round]
    write_aside(path, "".join(json.dumps(entry) + "\n" for entry in rounds))
    evaluated = [entry for entry in rounds if entry["eval_loss"] is not None]
    for path in Path(output_dir).glob("client_*_loss.json"):
        logged = rounds if path.name.endswith("train_loss.json") else evaluated
        keep = sum(int(path.name.split("_")[1]) in entry["clients"] for entry in logged)
        write_aside(path, json.dumps(read_losses(path)[:keep]))
    if (path := Path(output_dir, "global_eval_loss.json")).exists():
        write_aside(path, json.dumps(read_losses(path)[: len(evaluated)]))


def round_of(checkpoint):
    """Return how many rounds a run has finished before a checkpoint: 2 for `round_00002` and for `round_00002_part`."""
    return int(checkpoint.name.split("_")[1]) if checkpoint else 0


def seal(paths):
    """Flush files to the disk; returns {name: [size, sha256]}, as the manifest of a checkpoint lists them."""
    files = {}
    for path in paths:
        flush(path)
        with open(path, "rb") as file:
            files[path.name] = [path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest()]
    return files


def find_fault(checkpoint, names=None):
    """Return why a checkpoint does not count, None where every file (or each of `names`) is there and as sealed."""
    name = "manifest.json"
    try:
        manifest = json.loads((checkpoint / name).read_text(encoding="utf-8"))
        if manifest["round"] != round_of(checkpoint):
            return f"{name} is of round {manifest['round']}"
        for name in names or manifest["files"]:
            size, digest = manifest["files"][name]
            with open(checkpoint / name, "rb") as file:
                if os.fstat(file.fileno()).st_size != size:
                    return f"{name} is torn"
                if hashlib.file_digest(file, "sha256").hexdigest() != digest:
                    return f"{name} is damaged"
    except FileNotFoundError:
        return f"{name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{name} is torn"
    return None


def find_newest(output_dir):
    """Return the newest checkpoint that counts, None without one; says which are passed over, and why."""
    for checkpoint in sorted(Path(output_dir).glob("checkpoints/round_*"), reverse=True):
        if not (fault := find_fault(checkpoint)):
            return checkpoint
        print(f"passing over checkpoints/{checkpoint.name}: {fault}", flush=True)
    return None


def survey(output_dir):
    """Return {name: [sha256 of the manifest, its files, those of them that are whole]} of all checkpoints."""
    found = {}
    for checkpoint in Path(output_dir).glob("checkpoints/round_*"):
        text = (checkpoint / "manifest.json").read_bytes() if (checkpoint / "manifest.json").exists() else b""
        manifest = parse(text)
        if isinstance(manifest, dict) and manifest.get("round") == round_of(checkpoint):
            wanted = {name: size for name, (size, _) in manifest["files"].items()}
            whole = [name for name in wanted if not find_fault(checkpoint, [name])]
            wanted["manifest.json"] = len(text)
            found[checkpoint.name] = [hashlib.sha256(text).hexdigest(), wanted, [*whole, "manifest.json"]]
    return found


def find_common(surveys):
    """Return (name, seal, sizes, owners) of the newest checkpoint that machines have together, None without one.

    `surveys` has what `survey` returns for each of them; owners[name] are the machines that have that file.
    """
    for name in sorted({name for found in surveys for name in found}, reverse=True):
        for seal, sizes, _ in (found[name] for found in surveys if name in found):
            owners = {
                file: [
                    i for i, found in enumerate(surveys) if found.get(name, [""])[0] == seal and file in found[name][2]
                ]
                for file in sizes
            }
            if all(owners.values()):
                return name, seal, sizes, owners
    return None


def read_progress(checkpoint):
    """Return (rounds done, {client: steps done in the round after these}) as of a checkpoint, or of None."""
    if not checkpoint:
        return 0, {}
    manifest = json.loads(Path(checkpoint, "manifest.json").read_text(encoding="utf-8"))
    return manifest["round"], {int(client): steps for client, steps in manifest["steps"].items()}


def commit_checkpoint(output_dir, name, manifest):
    """Turn `staging` into a checkpoint by one rename, and remove all but the newest; one process alone does this."""
    folder = Path(output_dir, "checkpoints")
    write_aside(folder / "staging" / "manifest.json", json.dumps(manifest))
    flush(folder / "staging" / "manifest.json")
    for log in [*Path(output_dir).glob("*_loss.json"), Path(output_dir, "rounds.jsonl")]:
        if log.exists():
            flush(log)  # a checkpoint has every round before it in the logs, even after a power cut
    flush(folder / "staging")
    shutil.rmtree(folder / "replaced", ignore_errors=True)
    if (folder / name).exists():  # a part of the same round, stopped twice
        (folder / name).rename(folder / "replaced")
    (folder / "staging").rename(folder / name)
    flush(folder)
    shutil.rmtree(folder / "replaced", ignore_errors=True)
    for old in sorted(folder.glob("round_*"))[:-KEPT_CHECKPOINTS]:
        shutil.rmtree(old)


def share_files(folder, sizes, owners):
    """Copy files from machine to machine: owners[name] lists those that have it, sizes[name] is in bytes.

    The first rank of every machine takes part. Returns how many bytes travel.
    """
    number, here, sent = len(set(machines["of"])), machines["of"][dist.get_rank()], 0
    for name in sorted(sizes, key=lambda name: (name == "manifest.json", name)):  # with which a checkpoint counts
        source, lacking = owners[name][0], number - len(owners[name])
        if not lacking:
            continue
        sent += sizes[name] * lacking
        path, reads, writes = Path(folder, name), here == source, here not in owners[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb" if writes else "rb") as file:
            for begin in range(0, sizes[name], CHUNK):
                content = torch.empty(min(CHUNK, sizes[name] - begin), dtype=torch.uint8)
                if reads:
                    file.readinto(content.numpy())
                content = content.to(communication_device())
                dist.broadcast(content, group=machines["firsts"], group_src=source)  # all firsts participate
                if writes:
                    file.write(content.cpu().numpy())
        if writes:
            flush(path)
    return sent


# -----------------------------------------------------------------------------
# averaging: EDIT HERE
#
# A strategy is a function (update, weight, state) -> update, named in AGGREGATORS; run it with --aggregator NAME.
#   update  float32 (P,): how far this client's shared LoRA parameters moved since the round began
#   weight  float: the number of rows this client trains on
#   state   dict that lives as long as the run and is saved with it, for momentum and the like; in it are always
#           `start` (P,), the shared parameters as the round began, and `shapes`, those of their tensors, in order
# Further arguments are flags of main.py by the same name (--server_lr), and their defaults are the strategy's own.
#
# Every client calls it once a round. What it passes to `sum_over_clients` or `gather_shards` is what it sends; what it
# does with their results is the server's part, and comes out the same on every rank. Of a rank's several clients, all
# but the last only send, each when its turn is over, so that the rank holds one update and not one per client: they
# get results without content (device "meta") and a copy of `state`, and what they return is dropped. So a client must
# not send what depends on results of the same round; a RuntimeError says so.


def sum_over_clients(*terms):
    """Return the sums of `terms` (tensors or numbers) over the clients of the round, as float32 tensors.

    All of them in one all-reduce, in which every rank takes part. Summed in float64, which makes it irrelevant who
    comes first, and so which rank plays which client. Vectors are not in it with a narrow --average_dtype, where every
    rank gets all clients' codes of its share of the coordinates and adds up those (`sum_codes`), nor with several
    machines, of which each sends the sum of its clients (`sum_of_machines`).
    """
    terms = [torch.as_tensor(term) for term in terms]
    exact, vectors = ([term for term in terms if is_apart(term) == apart] for apart in (False, True))
    sizes = [term.numel() for term in exact]
    number, outbox["calls"] = outbox["calls"], outbox["calls"] + 1
    first = number == len(outbox["sums"])
    if first:
        sums = torch.empty(sum(sizes), dtype=torch.float64, device=communication_device())
        outbox["sums"].append([0, sums, [[] for _ in vectors]])
    outbox["sums"][number][0] += not any(term.is_meta for term in terms)
    senders, sums, codes = outbox["sums"][number]
    if senders != outbox["clients"]:
        raise RuntimeError(
            "what clients send depends on results of the same round: one client a rank, or gather_shards"
        )
    for part, term in zip(sums.split(sizes), exact):
        term = torch.zeros_like(part) if outbox["silent"] else send([term.reshape(-1).to(sums.device)])[0]
        part.copy_(term) if first else part.add_(term)
    for i, vector in enumerate(vectors if not outbox["silent"] else []):
        if machines["firsts"]:
            vector = send([vector.reshape(-1).to(communication_device())])[0].double()
            codes[i] = codes[i] + vector if len(codes[i]) else vector
        else:
            codes[i].append((outbox["client"], 1.0, *send(encode(vector, f"{number} {i}", outbox["dtype"]))))
    if not outbox["last"]:
        results = [torch.empty(term.shape, device="meta") for term in terms]
    else:
        if sizes:
            dist.all_reduce(sums)  # all ranks participate
        exact = iter(sums.split(sizes))
        vectors = (
            sum_of_machines(part, vector.numel(), f"{number} {i}")
            if machines["firsts"]
            else sum_codes(part, vector.numel(), outbox["dtype"])
            for i, (part, vector) in enumerate(zip(codes, vectors))
        )
        results = [next(vectors) if is_apart(term) else next(exact).float() for term in terms]
        results = [result.view_as(term) for result, term in zip(results, terms)]
    return results if len(results) > 1 else results[0]


def gather_shards(update, weight, sizes=None):
    """Return (values, weights): what this rank looks after of every client's update, in the order of the clients.

    Values is float32 (clients, C), weights float64 (clients,). Each rank has a 1/world_size of the coordinates, or
    sizes[rank] of them, so that nobody has all of all clients; `join_shards` is the way back. Every rank takes part.
    """
    outbox["gathered"] += 1
    if outbox["gathered"] != outbox["clients"]:
        raise RuntimeError("gather_shards may be called once a round: pass it all that is needed, as one vector")
    if not outbox["silent"]:
        vector = encode(update, "all", outbox["dtype"]) if is_narrow(update) else [update]
        outbox["updates"].append((outbox["client"], weight, *send(vector)))
    if not outbox["last"]:
        raise Sent
    dtype = outbox["dtype"] if is_narrow(update) else "float32"
    return exchange(outbox["updates"], sizes or even_sizes(update.numel()), dtype)


def join_shards(values, sizes, group=None):
    """Return the vector (P,) of which every rank has sizes[rank] coordinates; every rank of the group takes part.

    It travels as float32, or with a narrow --average_dtype as bfloat16; between machines only once.
    """
    flat = values.new_empty(sum(sizes), dtype=torch.float32 if outbox["dtype"] == "float32" else torch.bfloat16)
    parts = flat.split(sizes)
    parts[dist.get_rank(group)].copy_(values)
    if group or not machines["firsts"]:
        spread(parts, group)
        return flat.float()
    of, here = machines["of"], machines["here"]
    spread([part for part, machine in zip(parts, of) if machine == of[dist.get_rank()]], here)
    if dist.get_rank(here) == 0:
        stretches = [sum(size for size, its in zip(sizes, of) if its == machine) for machine in sorted(set(of))]
        spread(flat.split(stretches), machines["firsts"])
    dist.broadcast(flat, group=here, group_src=0)  # all ranks of this machine participate
    return flat.float()


def fedavg(update, weight, state):
    """Mean of the updates, weighted by rows. FedAvg, McMahan et al. 2017 (arXiv:1602.05629)."""
    total, weights = sum_over_clients(weight * update, weight)
    return total / weights


def fedavgm(update, weight, state, server_lr=1.0, server_momentum=0.9):
    """FedAvg with server momentum. FedAvgM, Hsu et al. 2019 (arXiv:1909.06335)."""
    state["momentum"] = fedavg(update, weight, state) + server_momentum * state.get("momentum", 0)
    return server_lr * state["momentum"]


def diloco(update, weight, state, server_lr=0.7, server_momentum=0.9):
    """Nesterov momentum as the outer optimizer. DiLoCo, Douillard et al. 2023 (arXiv:2311.08105)."""
    average = fedavg(update, weight, state)
    state["momentum"] = average + server_momentum * state.get("momentum", 0)
    return server_lr * (average + server_momentum * state["momentum"])


def fedadagrad(update, weight, state, server_lr=3e-2, server_momentum=0.0, server_tau=1e-3):
    """Adagrad on the server. FedAdagrad, Reddi et al. 2021 (arXiv:2003.00295)."""
    average = fedavg(update, weight, state)
    state["second"] = state.get("second", server_tau**2) + average**2
    return adaptive_step(average, state, server_lr, server_momentum, server_tau)


def fedadam(update, weight, state, server_lr=3e-3, server_momentum=0.9, server_beta2=0.99, server_tau=1e-3):
    """Adam on the server, without bias correction. FedAdam, Reddi et al. 2021 (arXiv:2003.00295)."""
    average = fedavg(update, weight, state)
    state["second"] = server_beta2 * state.get("second", server_tau**2) + (1 - server_beta2) * average**2
    return adaptive_step(average, state, server_lr, server_momentum, server_tau)


def fedyogi(update, weight, state, server_lr=3e-3, server_momentum=0.9, server_beta2=0.99, server_tau=1e-3):
    """Yogi on the server. FedYogi, Reddi et al. 2021 (arXiv:2003.00295)."""
    average = fedavg(update, weight, state)
    second = state.get("second", torch.full_like(average, server_tau**2))
    state["second"] = second - (1 - server_beta2) * average**2 * torch.sign(second - average**2)
    return adaptive_step(average, state, server_lr, server_momentum, server_tau)


def adaptive_step(average, state, server_lr, server_momentum, server_tau):
    state["first"] = server_momentum * state.get("first", 0) + (1 - server_momentum) * average
    return server_lr * state["first"] / (state["second"].sqrt() + server_tau)


def norm_clip(update, weight, state, clip_norm=1.0):
    """FedAvg of updates that are scaled down to a norm of at most `clip_norm`. Sun et al. 2019 (arXiv:1911.07963)."""
    return fedavg(update * min(1.0, clip_norm / max(torch.linalg.vector_norm(update).item(), 1e-12)), weight, state)


def median(update, weight, state):
    """Median of each coordinate, unweighted. Yin et al. 2018 (arXiv:1803.01498)."""

    def middle(ordered):
        n = len(ordered)
        return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2

    return join_shards(by_coordinate(middle, gather_shards(update, weight)[0]), even_sizes(len(update)))


def trimmed_mean(update, weight, state, trim_fraction=0.2):
    """Mean of each coordinate, unweighted, without the highest and the lowest. Yin et al. 2018 (arXiv:1803.01498).

    Of n clients, int(trim_fraction * n) are cut at either end.
    """

    def mean(ordered):
        cut = min(int(trim_fraction * len(ordered)), (len(ordered) - 1) // 2)  # some clients may have been left out
        return ordered[cut : len(ordered) - cut].mean(dim=0)

    return join_shards(by_coordinate(mean, gather_shards(update, weight)[0]), even_sizes(len(update)))


def krum(update, weight, state, num_malicious=1):
    """The one update that is nearest to its n - num_malicious - 2 nearest. Krum, Blanchard et al. 2017 (1703.02757)."""
    values, _ = gather_shards(update, weight)
    gram = sum(block.double() @ block.double().T for block in values.split(BLOCK, dim=1))
    dist.all_reduce(gram)  # all ranks participate
    squares = (gram.diag()[:, None] + gram.diag() - gram - gram.T).sort(dim=1).values  # column 0: to itself
    chosen = squares[:, 1 : max(2, len(gram) - num_malicious - 1)].sum(dim=1).argmin()
    return join_shards(values[chosen], even_sizes(len(update)))


def svd(update, weight, state):
    """Average the products B A instead of B and A, and project the result to rank r. FlexLoRA, Bai et al. 2024
    (arXiv:2402.11505), by QR of the stacked factors and an SVD of the small core; B A itself is never formed.

    Each rank does this for some of the layers. Of the factors with that product, take those nearest to the mean ones:
    A with orthogonal rows as long as before, and turned so that AdamW's moments still fit.
    """
    layers, sizes = deal_layers(state["shapes"])
    values, weights = gather_shards(update, weight, sizes)
    start = state["start"].split(sizes)[dist.get_rank()]
    factors = [
        factor.reshape(-1)
        for a, b in layer_factors(start + values, layers[dist.get_rank()])
        for factor in project_product(a, b, weights / weights.sum())
    ]
    return join_shards(torch.cat(factors) - start if factors else start, sizes)


def none(update, weight, state):
    """No averaging: every client trains alone, and shares nothing."""
    return update


AGGREGATORS = {
    "fedavg": fedavg,
    "fedavgm": fedavgm,
    "diloco": diloco,
    "fedadagrad": fedadagrad,
    "fedadam": fedadam,
    "fedyogi": fedyogi,
    "norm_clip": norm_clip,
    "median": median,
    "trimmed_mean": trimmed_mean,
    "krum": krum,
    "svd": svd,
    "none": none,
}

# end of EDIT HERE
# -----------------------------------------------------------------------------
# what the strategies are made of

# of this rank in the round under way: who is sending, how many clients have begun to, whether it is the last of them,
# whether it has none that counts, how often the last has called `sum_over_clients` and all have `gather_shards`,
# [senders, sum so far, codes] of each call of the one, and the updates for the other; --average_dtype, what rounding
# has kept back of each client's vectors, how many bytes of vectors they have sent, and how many have left the machine
outbox = {"clients": 0, "sums": [], "updates": [], "gathered": 0}
outbox |= {"dtype": "float32", "kept_back": {}, "bytes": 0, "between": 0}
# the machine of every rank, and where these are several, the process groups of the ranks here and of the first of each
machines = {"of": None, "here": None, "firsts": None}
CODE_BLOCK = 1024  # numbers that share a scale in int8; shorter vectors are sent as they are
CODE_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1 + 4 / CODE_BLOCK}  # of a number that a client sends
BAD_RATIO = 1000
BLOCK = 2**16  # coordinates that are sorted at a time


class Sent(Exception):
    """Ends the strategy of a client that is not its rank's last in the round, once its update is in the outbox."""


def communication_device():
    """Return the device on which the collectives of the backend want their tensors."""
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def local_rank(rank, of):
    """Return the number of a rank on its machine, by the machines of all ranks."""
    return rank - of.index(of[rank])


def set_machines(of, timeout=None):
    """Say which machine each rank is on, as in [0, 0, 1, 1], and how long they wait; every rank takes part."""
    machines.update(of=of, here=None, firsts=None)
    if len(set(of)) > 1:
        for machine in sorted(set(of)):  # all ranks make all groups
            ranks = [rank for rank, its in enumerate(of) if its == machine]
            group = dist.new_group(ranks, timeout)
            machines["here"] = group if dist.get_rank() in ranks else machines["here"]
        machines["firsts"] = dist.new_group([of.index(machine) for machine in sorted(set(of))], timeout)


def even_sizes(total, group=None):
    """Return how many of `total` coordinates each rank of the group looks after."""
    size, rest = divmod(total, dist.get_world_size(group))
    return [size + (rank < rest) for rank in range(dist.get_world_size(group))]


def spread(parts, group):
    """Send the i-th part from the i-th rank of the group to the others."""
    if group and group is machines["firsts"]:
        own = parts[dist.get_rank(group)]
        outbox["between"] += own.numel() * own.element_size() * (len(parts) - 1)
    works = [dist.broadcast(p, group=group, group_src=i, async_op=True) for i, p in enumerate(parts) if len(p)]
    for work in works:
        work.wait()  # all ranks of the group participate


def exchange(updates, sizes, dtype="float32", group=None):
    """Give every rank its shard of all clients' vectors, by one all-to-all; every rank of the group takes part.

    `updates` holds (client, weight, vector) of this rank's clients, the vectors (P,) of `dtype`, with their scales
    behind them where that is int8. Returns (values, weights) as `gather_shards` does: rank r gets the r-th stretch,
    sizes[r] long, of each vector.
    """
    everyone, rank = [None] * dist.get_world_size(group), dist.get_rank(group)
    own = [(client, weight, *scales) for client, weight, _, *scales in updates]
    dist.all_gather_object(everyone, own, group=group)  # all ranks participate
    mine, vectors = sizes[rank], [update[2] for update in updates]
    if len(vectors) == 1:
        sent = vectors[0]
    else:
        parts = [v for part in zip(*(v.split(sizes) for v in vectors)) for v in part]
        empty = torch.empty(0, dtype=getattr(torch, dtype), device=communication_device())
        sent = torch.cat(parts or [empty])
    received = sent.new_empty(sum(map(len, everyone)) * mine)
    dist.all_to_all_single(  # all ranks participate
        received, sent, [len(part) * mine for part in everyone], [len(updates) * size for size in sizes], group=group
    )
    machine_of = range(len(sizes)) if group else machines["of"] or [0] * len(sizes)
    leaving = sum(size for size, machine in zip(sizes, machine_of) if machine != machine_of[rank])
    outbox["between"] += len(updates) * leaving * sent.element_size()
    clients, weights, *scales = zip(*(each for part in everyone for each in part))
    values, weights = received.view(len(clients), mine).float(), torch.tensor(weights, dtype=torch.float64)
    if scales:
        first, skip = divmod(sum(sizes[:rank]), CODE_BLOCK)  # where the shard begins
        blocks = slice(first, first + (skip + mine) // CODE_BLOCK + 1)
        for value, scale in zip(values, scales[0]):
            value *= scale[blocks].to(values.device).repeat_interleave(CODE_BLOCK)[skip : skip + mine]
    order = sorted(range(len(clients)), key=clients.__getitem__)
    if order != list(range(len(clients))):
        values, weights = values[order], weights[order]
    return values, weights.to(values.device)


def is_narrow(term):
    """Whether a term is sent in fewer bits than it has."""
    return outbox["dtype"] != "float32" and term.numel() >= CODE_BLOCK


def is_apart(term):
    """Whether a term is not in the all-reduce of a round's sums."""
    return is_narrow(term) or bool(machines["firsts"]) and term.numel() >= CODE_BLOCK


def encode(vector, name, dtype, sender=None):
    """Return a vector (P,) as --average_dtype says: bfloat16 codes, or int8 codes and the scale of each CODE_BLOCK.

    What rounding keeps back is added to what the client, or another sender, sends by this name next time: error
    feedback, Seide et al. 2014 (Interspeech), Karimireddy et al. 2019 (arXiv:1901.09847).
    """
    kept_back, name = outbox["kept_back"].setdefault(sender or outbox["client"], {}), f"{outbox['part']} {name}"
    vector = vector.reshape(-1).to(communication_device(), torch.float32)
    vector = vector + kept_back[name].to(vector.device) if name in kept_back else vector.clone()
    if dtype == "bfloat16":
        codes = [vector.bfloat16()]
        rounded = codes[0].float()
    else:
        blocks = torch.nn.functional.pad(vector, (0, -len(vector) % CODE_BLOCK)).view(-1, CODE_BLOCK)
        scales = torch.maximum(blocks.amax(dim=1), -blocks.amin(dim=1)).clamp_min_(1e-30) / 127
        rounded = (blocks / scales[:, None]).round_()
        codes = [rounded.to(torch.int8).view(-1)[: len(vector)], scales.cpu()]
        rounded = rounded.mul_(scales[:, None]).view(-1)[: len(vector)]
    kept_back[name] = vector.sub_(rounded).cpu()
    return codes


def send(parts):
    """Count the bytes of the vectors among what a client sends, as float32 where they are not narrow."""
    outbox["bytes"] += sum(part.numel() * min(4, part.element_size()) for part in parts if part.numel() > 1)
    return parts


def sum_codes(updates, size, dtype, group=None):
    """Return the sum (size,) of all clients' codes, summed in float64; every rank of the group takes part."""
    sizes = even_sizes(size, group)
    values, _ = exchange(updates, sizes, dtype, group)
    sums = torch.zeros(values.shape[1], dtype=torch.float64, device=values.device)
    for value in values:
        sums += value
    return join_shards(sums, sizes, group)


def sum_of_machines(vector, size, name="", dtype=None):
    """Return the sum (size,), float32, of the float64 vectors of all ranks ([]: none); every rank takes part.

    Within each machine in float64; then each sends one stream, of numbers as --average_dtype says, to the others.
    """
    here, firsts = machines["here"], machines["firsts"]
    if not len(vector):
        vector = torch.zeros(size, dtype=torch.float64, device=communication_device())
    dist.reduce(vector, group=here, group_dst=0)  # all ranks of this machine participate
    total = torch.empty(size, device=vector.device)
    if dist.get_rank(here) == 0:
        dtype, machine = dtype or outbox["dtype"], dist.get_rank(firsts)
        codes = [vector.float()] if dtype == "float32" else encode(vector, name, dtype, "machine")
        total = sum_codes([(machine, 1.0, *codes)], size, dtype, firsts)
    dist.broadcast(total, group=here, group_src=0)  # all ranks of this machine participate
    return total


def sum_over_ranks(vector):
    """Return the sum of the float64 vectors (P,) of all ranks, which between machines travels as float32."""
    if machines["firsts"]:
        return sum_of_machines(vector, len(vector), dtype="float32")
    dist.all_reduce(vector)  # all ranks participate
    return vector


def find_bad_updates(norms):
    """Return {client: what is wrong} of the updates that are to be left out, by their norms, {client: norm}.

    Those that are NaN or infinite, or longer than BAD_RATIO times the median (the lower one of an even number).
    """
    finite = [norm for norm in norms.values() if math.isfinite(norm)]
    median = statistics.median_low(finite or [0])
    return {
        client: f"{norm / median:,.0f} times as long as the median" if math.isfinite(norm) else "not finite"
        for client, norm in sorted(norms.items())
        if not math.isfinite(norm) or norm > BAD_RATIO * median > 0
    }


def by_coordinate(function, values):
    """Apply `function` (clients, block) -> (block,) to `values` (clients, C), sorted by size within each coordinate."""
    results = values.new_empty(values.shape[1])
    for block, result in zip(values.split(BLOCK, dim=1), results.split(BLOCK)):
        result.copy_(function(block.sort(dim=0).values))
    return results


def deal_layers(shapes):
    """Deal the LoRA pairs out to the ranks: (layers, sizes), each rank's list of (A's, B's shape), and its numbers."""
    pairs = list(zip(shapes[::2], shapes[1::2]))  # A (r, k) comes before B (d, r)
    layers = [[pairs[i] for i in part] for part in np.array_split(np.arange(len(pairs)), dist.get_world_size())]
    return layers, [sum(a.numel() + b.numel() for a, b in part) for part in layers]


def layer_factors(values, layers):
    """Yield A (clients, r, k) and B (clients, d, r) of each layer in `values` (clients, C)."""
    for a, b in layers:
        yield values[:, : a.numel()].view(-1, *a), values[:, a.numel() : a.numel() + b.numel()].view(-1, *b)
        values = values[:, a.numel() + b.numel() :]


def project_product(a, b, weights):
    """Return the factors (r, k) and (d, r) of the best rank-r approximation of the weighted sum of the b[i] @ a[i]."""
    a, b, (n, r, k) = a.double(), b.double(), a.shape
    weighted = weights[:, None, None] * a
    left_q, left_r = torch.linalg.qr(b.transpose(0, 1).reshape(-1, n * r))
    right_q, right_r = torch.linalg.qr(weighted.reshape(n * r, k).T)
    u, s, v = torch.linalg.svd(left_r @ right_r.T)
    new_b, new_a = left_q @ u[:, : len(s)] * s, v[: len(s)] @ right_q.T
    new_b, new_a = (torch.nn.functional.pad(f, (0, 0, 0, r))[:r] for f in (new_b.T, new_a))  # of rank below r: zeros
    mean_a, mean_b = weighted.sum(0), (weights[:, None, None] * b).sum(0)
    scale = torch.linalg.matrix_norm(mean_a).clamp_min(1e-12) / r**0.5  # B takes the singular values, A stays as long
    new_a, new_b = new_a * scale, new_b.T / scale
    u, _, v = torch.linalg.svd(new_a @ mean_a.T + new_b.T @ mean_b)
    turn = u @ v  # the orthogonal matrix that brings the factors nearest to the mean ones
    return (turn.T @ new_a).float(), (new_b @ turn).float()


def product_error(clients, shapes):
    """Return how wrong it is to average A and B instead of B A: ||sum p (B-mean B)(A-mean A)|| / ||sum p B A||.

    Frobenius norms over all layers. `clients` holds (client, weight, parameters (P,)) of this rank's clients. By Gram
    matrices of the factors, or densely where those are larger. Every rank takes part, each with some of the layers.
    """
    layers, sizes = deal_layers(shapes)
    values, weights = exchange(clients, sizes)
    p = (weights / weights.sum())[:, None, None]

    def squared_norm(a, b):  # of the sum of the p[i] b[i] @ a[i], (d, k)
        left, right = (p * b).transpose(0, 1).flatten(1), a.flatten(0, 1)
        if (
            len(right) * (len(left) + right.shape[1]) > left.shape[0] * right.shape[1]
        ):  # more clients than that is large
            return (left @ right).square().sum()
        return ((left.T @ left) * (right @ right.T)).sum()  # the inner product of two Gram matrices

    squares = torch.zeros(2, dtype=torch.float64, device=values.device)
    for a, b in layer_factors(values, layers[dist.get_rank()]):
        a, b = a.double(), b.double()
        squares[0] += squared_norm(a - (p * a).sum(0), b - (p * b).sum(0))
        squares[1] += squared_norm(a, b)
    dist.all_reduce(squares)  # all ranks participate
    error, norm = squares.clamp_min(0).tolist()  # what should be zero may be rounded below it
    return (error / norm) ** 0.5 if norm else 0.0


# -----------------------------------------------------------------------------
# applying the average to a model


def shared_parameters(model, part=""):
    """Return the parameters that clients share, in the model's order: the trainable ones with `part` in their name."""
    return [parameter for name, parameter in model.named_parameters() if parameter.requires_grad and part in name]


def flatten_parameters(parameters):
    """Copy parameters into one float32 vector (P,) on the device of the collectives."""
    parts = [parameter.detach().float().reshape(-1) for parameter in parameters]
    return torch.cat(parts or [torch.empty(0)]).to(communication_device())


def unflatten_parameters(parameters, flat):
    """Copy a vector (P,) back into the parameters."""
    for parameter, values in zip(parameters, flat.split([p.numel() for p in parameters])):
        parameter.data.copy_(values.view_as(parameter))


def federated_average(
    model, world_size, start=None, clients=None, aggregate=fedavg, state=None, part="", dtype="float32", kept_back=None
):
    """Replace the shared LoRA parameters of every client by their average; every rank takes part.

    With the first two arguments only this is the plain mean over the ranks, by one all-reduce. `start` (P,) is the
    vector from which all clients began the round; `clients` are those that this rank has played, and that count, as a
    list of (number, weight, update), where update is a vector (P,) or the file that holds it; `aggregate` is a strategy
    (see EDIT HERE), `state` its dict, `part` a part of the names of the parameters that are shared. `dtype` is what
    clients send, and `kept_back` {client: dict} what rounding to a narrow one keeps back for the next round. Returns
    the averaged update (P,). Raises ValueError where the process group has not `world_size` ranks.
    """
    if dist.get_world_size() != world_size:
        raise ValueError(f"world_size is {world_size}, but the process group has {dist.get_world_size()} ranks")
    parameters = shared_parameters(model, part)
    sizes = [parameter.numel() for parameter in parameters]
    if start is None:
        start = torch.zeros(sum(sizes), device=communication_device())
    if clients is None:
        clients = [(dist.get_rank(), 1.0, flatten_parameters(parameters) - start)]
    state = {} if state is None else state
    state |= {"start": start, "shapes": [parameter.shape for parameter in parameters]}
    outbox.update(silent=not clients, clients=0, gathered=0, sums=[], updates=[])
    outbox.update(dtype=dtype, kept_back={} if kept_back is None else kept_back, part=part, bytes=0)
    for client, weight, update in clients[:-1]:
        outbox.update(client=client, last=False, calls=0)
        outbox["clients"] += 1
        own = {name: value for name, value in state.items() if name not in ("start", "shapes")}
        try:
            aggregate(load_update(update), weight, state | copy.deepcopy(own))
        except Exception:  # of the server's part, which has nothing to work on
            if not outbox["calls"] and outbox["gathered"] < outbox["clients"]:
                raise
    client, weight, update = clients[-1] if clients else (-1, 1.0, torch.zeros_like(start))  # is not sent
    outbox.update(client=client, last=True, calls=0)
    outbox["clients"] += 1
    average = aggregate(load_update(update), weight, state)
    outbox.update(sums=[], updates=[])
    for parameter, before, change in zip(parameters, start.split(sizes), average.split(sizes)):
        parameter.data.copy_((before + change).view_as(parameter))  # tensor by tensor, which stays in the cache
    return average


def load_update(update):
    """Return an update (P,), from its file where it is in one."""
    if torch.is_tensor(update):
        return update
    return torch.load(update, weights_only=True, map_location=communication_device())
