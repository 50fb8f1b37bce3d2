"""Find and check the model and the rows, tokenize once for all ranks, deal rows out to clients."""

import collections
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

import utils
from fllama import checkpoints, formats, options
from fllama.options import fail, first_line

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
HELD_OUT_SPLITS = ("validation", "valid", "val", "dev", "test")  # the first of these that a dataset has
CLIENT_EVAL_ROWS = 16  # at most so many rows of each client are held out, and at most a tenth of its rows
MAX_BAD_ROWS, SHOWN_ROWS = 0.01, 3  # share of rows that may be bad and are left out; bad rows that are named
READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja"]
LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "datasets", "accelerate")


@dataclass(frozen=True)
class Run:
    """What preparation has found; every rank gets it beside the flags."""

    model_path: str
    data_path: str  # of the tokenized rows, and of parts.json: whose they are
    checkpoint: Path | None = None  # to go on from
    rendezvous: str | None = None  # the file through which ranks find each other; None under torchrun
    machine_of_rank: tuple = ()  # number of the machine of each rank
    num_gpus: int = 0  # of this machine
    command: str = ""  # for the model card
    versions: dict | None = None  # of Python and the libraries


def find_versions():
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        versions[name] = importlib.metadata.version(name)
    return versions


# -----------------------------------------------------------------------------
# the model


def find_model(args, weights=True):
    """Return (folder of the model, its config, its tokenizer); downloads it once for all ranks.

    Without `weights`, neither downloads nor looks at those.
    """
    import transformers
    from transformers import AutoConfig, AutoTokenizer

    name = args.model_name
    if not os.path.isdir(name) and (os.path.exists(name) or name.startswith((".", "/", "~"))):
        fail(f"--model_name {name}: no such folder")
    path = name if os.path.isdir(name) else download_model(name, args.hf_token, weights)
    check_model_files(name, path, weights)
    transformers.logging.set_verbosity_error()
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        return path, config, AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        fail(f"--model_name {name}: its config or tokenizer cannot be loaded: {first_line(error)}")


def download_model(name, token, weights):
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    ignored = ["original/*"] if weights else ["original/*", "*.safetensors"]
    try:
        return snapshot_download(name, token=token, allow_patterns=MODEL_FILES, ignore_patterns=ignored)
    except GatedRepoError:
        fail(f"--model_name {name} is gated: accept its licence on the hub, then set HF_TOKEN to your token")
    except (RepositoryNotFoundError, HFValidationError):
        fail(f"--model_name {name}: no such folder, nor model on the hub (or a private one: set HF_TOKEN)")
    except Exception as error:  # the hub's client has a dozen kinds of these, and every one of them ends the run
        fail(hub_problem("--model_name", name, error))


def check_model_files(name, path, weights):
    """Refuse a folder without config and weights, and models without the projections of LLaMA."""
    from safetensors import safe_open

    files = list(Path(path).glob("*.safetensors"))
    if not Path(path, "config.json").is_file() or weights and not files:
        found = ", ".join(sorted(os.listdir(path))[:8]) or "nothing"
        fail(f"--model_name {name}: needs config.json, *.safetensors and a tokenizer; found {found}")
    tensors = [tensor for file in files for tensor in safe_open(file, "pt").keys()]
    missing = [part for part in LORA_TARGETS if not any(f".{part}." in tensor for tensor in tensors)]
    if files and missing:
        fail(f"--model_name {name} is not built as LLaMA is: it has no {', '.join(missing)}")


def hub_problem(flag, name, error):
    """Return the line that says why the hub did not give `name`."""
    text = f"{error} {error.__cause__}"
    if "401" in text or "Invalid" in text and "token" in text.lower():
        return f"{flag} {name}: the hub refuses the token; set HF_TOKEN to a valid one, or to none for what is public"
    return f"{flag} {name}: not on this disk, and the hub cannot be reached; check the network ({first_line(error)})"


def digest_of_model(path):
    """Return a sha256 that tells models apart: of the names, sizes and last MB of the files with weights."""
    digest = hashlib.sha256()
    for file in sorted(Path(path).glob("*.safetensors")):
        with open(file, "rb") as opened:
            size = opened.seek(0, os.SEEK_END)
            opened.seek(max(0, size - 2**20))
            digest.update(f"{file.name} {size} ".encode() + opened.read())
    return digest.hexdigest()


# -----------------------------------------------------------------------------
# the rows


def find_rows(args, num_gpus):
    """Return the training rows and the held-out rows (or None) of the dataset; with --partition column, its values in
    the data say how many clients there are."""
    path = args.dataset_path
    if not os.path.exists(path) and (path.startswith((".", "/", "~")) or Path(path).suffix in READERS):
        fail(f"--dataset_path {path}: no such file or folder")
    if os.path.isfile(path) and Path(path).suffix not in READERS:
        fail(f"--dataset_path {path}: not a {', '.join(READERS)} file")
    try:
        rows, held_out = load_rows(path, args.hf_token)
    except (DatasetNotFoundError, FileNotFoundError) as error:
        if os.path.exists(path):
            fail(f"--dataset_path {path}: {first_line(error)}")
        fail(f"--dataset_path {path}: no such file or folder, nor dataset on the hub (or a gated one: set HF_TOKEN)")
    except (DatasetGenerationError, ValueError, KeyError) as error:
        fail(f"--dataset_path {path}: cannot be read: {first_line(error.__cause__ or error)}")
    except Exception as error:
        fail(hub_problem("--dataset_path", path, error))

    for part in filter(None, (rows, held_out)):
        if not formats.is_readable(part.column_names):
            found = ", ".join(part.column_names)
            fail(f"--dataset_path {path}: needs the columns {formats.describe_forms()}; found {found}")
    if not args.partition_column and (args.partition == "dirichlet" or "label" in rows.column_names):
        args.partition_column = "label"
    if args.partition_column and args.partition_column not in rows.column_names:
        found = ", ".join(rows.column_names)
        fail(f"--partition_column: the training rows have no column {args.partition_column}; found {found}")
    if args.partition == "column":
        options.complete_clients(args, len(set(map(str, rows[args.partition_column]))), num_gpus)
    needed, clients = needed_rows(args.num_clients, bool(held_out)), args.num_clients
    if len(rows) < needed:
        fail(f"--dataset_path {path}: {len(rows)} training rows, {clients} clients need {needed}; lower --num_clients")
    return rows, held_out


def load_rows(dataset_path, token=None):
    """Load the training rows and, if the dataset has one, its validation or test split.

    `dataset_path` is a json, jsonl, csv or parquet file, a folder of such files, a `save_to_disk` folder or the id of
    a dataset on the hub. Returns (train, held_out), held_out None if there is no such split.
    """
    path = Path(dataset_path)
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        data = datasets.load_from_disk(dataset_path)
    elif path.is_file():
        data = datasets.load_dataset(READERS[path.suffix], data_files=str(path))
    else:
        data = datasets.load_dataset(dataset_path, token=token)
    if isinstance(data, datasets.Dataset):
        data = datasets.DatasetDict(train=data)
    if "train" not in data:
        raise ValueError(f"no split is named train; found {', '.join(data)}")
    held_out = next((data[name] for name in HELD_OUT_SPLITS if name in data), None)
    return data["train"], held_out


def needed_rows(num_clients, has_held_out):
    """Return the least number of training rows: every client needs one to train on and one to hold out."""
    return 2 * (num_clients + (not has_held_out))


def check_template(args, tokenizer, rows):
    if tokenizer.chat_template is None and rows.features.get("prompt") != datasets.Value("string"):
        fail(f"--model_name {args.model_name} has no chat template; name an instruct model, or use prompt texts")


# -----------------------------------------------------------------------------
# tokens, and whose they are


def prepare_data(args, rows, held_out, tokenizer, folder):
    """Tokenize all rows, once for all ranks, into `folder`/data, and deal them out to the clients.

    Counts what was cut and what is bad, and leaves out both. Returns (content of partition.json, digest of the rows).
    """
    splits = {"train": rows} | ({"held_out": held_out} if held_out else {})
    kept = {}  # the numbers of the rows that are left
    for name, split in splits.items():
        splits[name], kept[name] = tokenize_split(args, name, split, tokenizer, folder)
    left = len(splits["train"])
    if left < needed_rows(args.num_clients, bool(held_out)) or not all(map(len, splits.values())):
        fail(f"--max_length {args.max_length} cuts off too many answers: {left} training rows are left; raise it")
    datasets.disable_progress_bars()
    datasets.DatasetDict(splits).save_to_disk(f"{folder}/data")

    labels = names = None  # of the rows that are left, and of the clients
    if args.partition_column:
        values = [str(value) for value in rows[args.partition_column]]
        names = sorted(set(values)) if args.partition == "column" else None
        labels = [values[number] for number in kept["train"]]
    parts, global_part = deal_rows(args, left, bool(held_out), labels, names)
    write_parts(args, parts, global_part, f"{folder}/data/parts.json")
    partition = describe_partition(args, parts, global_part, kept["train"], labels)
    return partition, digest_of_rows(f"{folder}/data")


def tokenize_split(args, name, rows, tokenizer, folder):
    """Return (tokenized rows, their numbers in `rows`), without those that are bad or whose answer was cut off."""
    check_template(args, tokenizer, rows)
    aside = f"{folder}/{name}.arrow"  # not beside the user's files
    tokens = tokenize(args, rows, tokenizer, cache_file_name=aside, desc=f"tokenizing {name} rows")
    bad = {number: problem for number, problem in enumerate(tokens["problem"]) if problem}
    if bad:
        shown = ", ".join(f"row {number} ({problem})" for number, problem in list(bad.items())[:SHOWN_ROWS])
        if len(bad) > SHOWN_ROWS:
            shown += f" and {len(bad) - SHOWN_ROWS} more"
        if len(bad) > MAX_BAD_ROWS * len(tokens):
            fail(f"--dataset_path {args.dataset_path}: {len(bad)} of {len(tokens)} {name} rows are bad: {shown}")
        print(f"{len(bad)} of {len(tokens)} {name} rows are bad and left out: {shown}", flush=True)
    kept = [number for number, length in enumerate(tokens["answer_length"]) if length > 0]
    cut = sum(tokens["truncated"])
    if cut:
        print(
            f"{cut} of {len(tokens)} {name} rows are longer than --max_length {args.max_length} and were cut, "
            f"{len(tokens) - len(bad) - len(kept)} of them before the answer: those are left out",
            flush=True,
        )
    return tokens.select(kept).remove_columns(["problem", "truncated"]), kept


def tokenize(args, rows, tokenizer, **more):
    return rows.map(
        formats.tokenize_row,
        fn_kwargs={"tokenizer": tokenizer, "max_length": args.max_length},
        remove_columns=rows.column_names,
        features=formats.TOKENIZED,
        **more,
    )


def deal_rows(args, num_rows, has_held_out, labels, names):
    """Return the rows of every client, and the global held-out rows that are taken from the training rows.

    `labels` are the values of --partition_column, one per row, or None; `names` those of which each is a client.
    """
    parts = utils.split_evenly(num_rows, args.num_clients + (not has_held_out), args.seed)
    global_part = np.array([], dtype=int) if has_held_out else parts.pop()
    rows = np.concatenate(parts)
    parts = utils.partition_rows(rows, args.num_clients, args.partition, labels, args.dirichlet_alpha, args.seed)
    if names:  # a client may have lost all its rows
        rows_of_name = {labels[part[0]]: part for part in parts}
        parts = [rows_of_name.get(name, []) for name in names]
    advice = {
        "dirichlet": "raise --dirichlet_alpha, lower --num_clients, or try another --seed",
        "column": "drop the rows of that value, or name another --partition_column",
    }.get(args.partition, "lower --num_clients")
    for k, part in enumerate(parts):
        if len(part) < 2:
            client = f"client {k} ({names[k]})" if names else f"client {k}"
            problem = f"{client} gets {len(part)} row(s), and needs 2, one to hold out"
            fail(f"--partition {args.partition}: {problem}; {advice}")
    return parts, global_part


def write_parts(args, parts, global_part, path):
    """Write which rows each client trains on and holds out, and which are the global held-out ones."""
    held_out, trained = [], []
    for part in parts:
        size = max(1, min(CLIENT_EVAL_ROWS, len(part) // 10))
        held_out.append(part[:size].tolist())
        trained.append(part[size:].tolist())
    if args.centralized:
        trained = [[row for part in trained for row in part]]
    # whose held-out rows are scored at the end: the clients of the last round, or what would be these
    plan = utils.plan_rounds(args.num_clients, args.clients_per_round, args.num_rounds, 1, args.seed)
    scored = plan[-1].clients()
    split = {"train": trained, "held_out": held_out, "global": global_part.tolist(), "scored": scored}
    Path(path).write_text(json.dumps(split), encoding="utf-8")


def describe_partition(args, parts, held_out, row_numbers, labels):
    """Return what partition.json holds: of every client its rows, by their numbers in the dataset, and its labels."""
    clients = []
    for k, part in enumerate(parts):
        client = {"client": k, "rows": sorted(row_numbers[i] for i in part)}
        if labels is not None:
            client["labels"] = dict(sorted(collections.Counter(labels[i] for i in part).items()))
        clients.append(client)
    return {
        "partition": args.partition,
        "column": args.partition_column,
        "dirichlet_alpha": args.dirichlet_alpha if args.partition == "dirichlet" else None,
        "seed": args.seed,
        "clients": clients,
        "held_out": sorted(row_numbers[i] for i in held_out),
    }


def digest_of_rows(data_path):
    """Return the sha256 of what is trained on: the tokens of all rows, and whose they are."""
    digest = hashlib.sha256(Path(data_path, "parts.json").read_bytes())
    for _, rows in sorted(datasets.load_from_disk(data_path).items()):
        for name in ("input_ids", "labels"):
            for chunk in rows.data.column(name).chunks:
                digest.update(chunk.value_lengths().to_numpy())
                digest.update(chunk.flatten().to_numpy())
    return digest.hexdigest()


# -----------------------------------------------------------------------------
# room on the disk


def check_space(args, config):
    """Refuse to start if the disk of output_dir has not the room for the checkpoints."""
    parameters = count_lora_parameters(config, args.lora_r)
    each, copies = checkpoint_bytes(args, parameters), checkpoints.KEPT_CHECKPOINTS + 1
    _, playing = options.training_clients(args)
    room = shutil.disk_usage(args.output_dir).free
    needed = copies * each + 4 * parameters * (playing + 2)
    if room < needed:
        fail(
            f"--output_dir {args.output_dir}: {room / 1e9:.2f} GB free, and the run needs {needed / 1e9:.2f} GB: "
            f"{copies} checkpoints of {each / 1e9:.2f} GB, and models; make room, or name another"
        )


def count_lora_parameters(config, r):
    """Return how many parameters a LoRA of rank `r` on all of LORA_TARGETS has, from the config of the model."""
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads  # Qwen2's config has none
    queries, keys = heads * head, config.num_key_value_heads * head
    return config.num_hidden_layers * r * (2 * (hidden + queries) + 2 * (hidden + keys) + 3 * (hidden + inner))


def checkpoint_bytes(args, parameters):
    """Return about how large a checkpoint is, with so many LoRA parameters."""
    clients, _ = options.training_clients(args)
    return parameters * (options.client_bytes(args) * clients + 20)  # the adapter, and the server's state
