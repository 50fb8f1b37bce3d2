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
import multiprocess  # what datasets tokenizes with
import numpy as np

import utils
from fllama import audit, basemodel, checkpoints, formats, options, sources, tokenizing
from fllama.options import fail

CLIENT_EVAL_ROWS = 16  # at most so many rows of each client are held out, and at most a tenth of its rows
MAX_BAD_ROWS, SHOWN_ROWS = 0.01, 3  # share of rows that may be bad and are left out; bad rows that are named
ROWS_PER_PROCESS, MAX_PROCESSES = 10_000, 16  # of tokenizing: a process takes a second to start
LIBRARIES = "torch transformers peft trl bitsandbytes datasets accelerate scipy dp-accounting".split()


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
    guarantee: object = None  # accountant.Guarantee, with --dp_epsilon

    @property
    def by_torchrun(self):
        """Whether torchrun has started the ranks: then they have met already."""
        return self.rendezvous is None


def find_versions():
    versions = {"python": platform.python_version()}
    for name in LIBRARIES:
        versions[name] = importlib.metadata.version(name)
    return versions


# -----------------------------------------------------------------------------
# the rows


def find_rows(args, num_gpus):
    """Find the rows of the data set; returns (sources.Source, their form).

    With clients that the data set names (--partition column, folder, file), it says how many there are.
    """
    path, source = args.dataset_path, sources.find_source(args)
    columns = sources.all_columns(source.train)
    form = find_form(args, columns)
    if source.held_out is not None and not set(args.columns.values()) <= set(sources.all_columns(source.held_out)):
        fail(f"--columns: the held-out rows of {path} lack one of these columns")
    if args.partition == "dirichlet" and not args.partition_column:
        args.partition_column = "label"
    if args.partition_column and args.partition_column not in columns:
        fail(
            f"--partition_column: the training rows have no column {args.partition_column}; found {', '.join(columns)}"
        )
    names = source.clients
    if args.partition == "column":
        names = sources.values_of(source.train, args.partition_column)
    if names:
        options.complete_clients(args, len(set(names)), num_gpus)
    needed, clients = needed_rows(args.num_clients, source.held_out is not None), args.num_clients
    if len(source.train) < needed:
        number = len(source.train)
        fail(f"--dataset_path {path}: {number} training rows, {clients} clients need {needed}; lower --num_clients")
    return source, form


def find_form(args, columns):
    """Return the form of rows with these columns, under the names that --columns gives them."""
    path, found = args.dataset_path, ", ".join(columns)
    missing = [column for column in args.columns.values() if column not in columns]
    if missing:
        fail(f"--columns: {path} has no column {', '.join(missing)}; found {found}")
    names = list(args.columns) or columns
    if not args.columns and formats.PREFERENCES <= set(columns):
        advice = "--columns prompt=prompt,completion=chosen trains on the chosen answers"
        fail(f"--dataset_path {path} is preference data ({found}), for which there is no training here; {advice}")
    form = formats.find_form(names)
    if form is None:
        advice = "or say which is which: --columns question=...,answer=..."
        fail(f"--dataset_path {path}: needs the columns {formats.describe_forms()}; {advice}; found {found}")
    return form


def describe_reading(args, source, form):
    """Return the line that says what rows were read as."""
    names = [*form.columns, *form.optional]
    column_of = {name: args.columns.get(name, name) for name in names}
    counts, columns = sources.column_counts(source.train), sources.all_columns(source.train)
    read = [column_of[name] for name in names if column_of[name] in columns]
    line = f"  read as    {form.name}: {', '.join(read)}"
    for name in form.optional:
        if column_of[name] in columns:
            line += f" ({counts[column_of[name]]:,} of {len(source.train):,} with {column_of[name]})"
    unread = [column for column in columns if column not in read and column != args.partition_column]
    return line + (f"; not read: {', '.join(unread)}" if unread else "")


def needed_rows(num_clients, has_held_out):
    """Return the least number of training rows: every client needs one to train on and one to hold out."""
    return 2 * (num_clients + (not has_held_out))


def check_template(args, tokenizer, form):
    """Refuse a model without a chat template, unless all rows are texts."""
    if tokenizer.chat_template is None and form.name not in ("text", "prompt and completion"):
        fail(f"--model_name {args.model_name} has no chat template; name an instruct model, or use prompt texts")


# -----------------------------------------------------------------------------
# tokens, and whose they are


def prepare_data(args, source, form, tokenizer, vocab_size, folder, started):
    """Tokenize all rows, once for all ranks, into `folder`/data, and deal them out to the clients.

    Counts what was cut and what is bad, and leaves out both. `started` is when the run began (datetime), the day that
    chat templates see. Returns (content of partition.json, digest of the rows).
    """
    check_template(args, tokenizer, form)
    if not args.quiet:
        print(describe_reading(args, source, form), flush=True)
    splits = {"train": source.train}
    if source.held_out is not None:
        splits["held_out"] = source.held_out
    kept = {}  # the numbers of the rows that are left
    for name, split in splits.items():
        splits[name], kept[name] = tokenize_split(args, name, split, form, tokenizer, folder, started)
    show_rows(args, splits["train"], tokenizer)
    check_tokens(args, splits, vocab_size)
    left, has_held_out = len(splits["train"]), source.held_out is not None
    digests = row_digests(splits["train"])
    if has_held_out:
        splits["held_out"] = drop_known_rows(splits["held_out"], digests)
    if left < needed_rows(args.num_clients, has_held_out) or not all(map(len, splits.values())):
        fail(f"--max_length {args.max_length} cuts off too many answers: {left} training rows are left; raise it")
    canaries = audit.make_canaries(args, form, tokenizer, started) if args.canaries else None
    if canaries:  # behind all other rows: they are dealt out to nobody, and nobody is asked them
        splits["train"] = datasets.concatenate_datasets([splits["train"], canaries.inserted_rows()])
        splits["canaries"] = canaries.rows
    datasets.disable_progress_bars()
    datasets.DatasetDict(splits).save_to_disk(f"{folder}/data")
    if canaries:
        audit.save(canaries, f"{folder}/data")

    labels = names = None  # of the rows that are left, and of the clients
    values = source.clients
    if args.partition_column:
        values = sources.values_of(source.train, args.partition_column)
    if values:
        labels = [values[number] for number in kept["train"]]
        names = sorted(set(values)) if args.partition in options.IN_THE_DATA else None
    parts, global_part = deal_rows(args, left, has_held_out, labels, names)
    write_parts(args, digests, parts, global_part, f"{folder}/data/parts.json", canaries)
    partition = describe_partition(args, parts, global_part, kept["train"], labels, names)
    return partition, digest_of_rows(f"{folder}/data")


def tokenize_split(args, name, rows, form, tokenizer, folder, started):
    """Return (tokenized rows, their numbers in `rows`), without those that are bad or whose answer was cut off."""
    aside = f"{folder}/{name}.arrow"  # not beside the user's files
    bar = f"tokenizing {name} rows"
    tokens = tokenize(args, rows, form, tokenizer, started, cache_file_name=aside, desc=bar)
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


def tokenize(args, rows, form, tokenizer, started, **more):
    """Return the tokens of rows, with the columns of tokenizing.TOKENIZED."""
    how = {
        "renamed": args.columns,
        "form": form,
        "tokenizer": tokenizer,
        "max_length": args.max_length,
        "learn": args.learn,
        "date": started,
    }
    try:
        return rows.map(
            tokenize_one,
            fn_kwargs=how,
            remove_columns=rows.column_names,
            features=tokenizing.TOKENIZED,
            new_fingerprint="tokens",  # every run tokenizes anew: the library need not hash what it is given
            num_proc=tokenizing_processes(len(rows)),
            **more,
        )
    except multiprocess.TimeoutError as error:  # by which the library hides Ctrl-C and SIGTERM, see main.stop
        while not isinstance(error, SystemExit):
            if error.__context__ is None:
                raise
            error = error.__context__
        raise error from None


def tokenizing_processes(num_rows):
    """Return how many processes tokenize, None: this one. The order of the rows, and so the digest, is the same."""
    processes = min(num_rows // ROWS_PER_PROCESS, os.cpu_count(), MAX_PROCESSES)
    return processes if processes > 1 else None


def tokenize_one(row, renamed, form, tokenizer, max_length, learn, date):
    return tokenizing.tokenize_row(sources.row_of(row, renamed), form, tokenizer, max_length, learn, date)


def show_rows(args, rows, tokenizer):
    """Print the first rows as the model sees them, for --show_rows; what is learned is between ⟦ and ⟧."""
    for number in range(min(args.show_rows, len(rows))):
        row = rows[number]
        text, learned = "", False
        stretch = []
        for token, label in zip([*row["input_ids"], None], [*row["labels"], None]):
            carries_loss = label is not None and label != -100
            if stretch and (token is None or carries_loss != learned):
                shown = tokenizer.decode(stretch)
                text += f"⟦{shown}⟧" if learned else shown
                stretch = []
            learned = carries_loss
            stretch.append(token)
        print(f"--- row {number}: {row['length']} tokens, {row['answer_length']} learned\n{text}", flush=True)


def check_tokens(args, splits, vocab_size):
    """Refuse tokens for which the model has no embedding."""
    largest = max((max(ids) for rows in splits.values() for ids in rows["input_ids"]), default=0)
    if largest >= vocab_size:
        problem = f"its tokenizer makes token {largest}, and its embedding ends at {vocab_size - 1}"
        fail(f"--model_name {args.model_name}: {problem}")


def row_digests(rows):
    """Return a digest of the tokens of each row."""
    return [hashlib.md5(np.asarray(ids).tobytes(), usedforsecurity=False).digest() for ids in rows["input_ids"]]


def drop_known_rows(held_out, train_digests):
    """Return the held-out rows that are not among the training rows, too; says how many are left out."""
    known = set(train_digests)
    new = [number for number, digest in enumerate(row_digests(held_out)) if digest not in known]
    dropped = len(held_out) - len(new)
    if dropped and new:
        print(f"{dropped} of {len(held_out)} held-out rows are training rows, too, and left out", flush=True)
        return held_out.select(new)
    if dropped:
        print(f"all {len(held_out)} held-out rows are training rows, too: the scores say how well they are known")
    return held_out


def deal_rows(args, num_rows, has_held_out, labels, names):
    """Return the rows of every client, and the global held-out rows that are taken from the training rows.

    `labels` are the values of --partition_column, one per row, or None; `names` those of which each is a client.
    """
    seed = options.split_seed(args)
    parts = utils.split_evenly(num_rows, args.num_clients + (not has_held_out), seed)
    global_part = np.array([], dtype=int) if has_held_out else parts.pop()
    rows = np.concatenate(parts)
    kind = "column" if names else args.partition
    parts = utils.partition_rows(rows, args.num_clients, kind, labels, args.dirichlet_alpha, seed)
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


def write_parts(args, digests, parts, global_part, path, canaries=None):
    """Write which rows each client trains on and holds out, and which are the global held-out ones.

    `digests` are those of the rows, see `row_digests`. Held-out rows that a client trains on, too (equal tokens), are
    left out and counted. Inserted canaries are trained on, and their numbers follow those of all other rows.
    """
    held_out, trained = [], []
    for part in parts:
        size = num_own_eval_rows(args, len(part))
        held_out.append(part[:size].tolist())
        trained.append(part[size:].tolist())
    known = {digests[number] for part in trained for number in part}
    dropped = 0
    for group in (*held_out, global_part := global_part.tolist()):
        new = [number for number in group if digests[number] not in known]
        if new:  # else nothing would be left to hold out
            dropped += len(group) - len(new)
            group[:] = new
    if dropped:
        print(f"{dropped} rows to hold out are training rows, too, and left out", flush=True)
    for client, part in enumerate(trained if canaries else []):
        part += canaries.numbers_of(client, first=len(digests))
    if args.centralized:
        trained = [[row for part in trained for row in part]]
    # whose held-out rows are scored at the end: the clients of the last round, or what would be these
    plan = utils.plan_rounds(args.num_clients, args.clients_per_round, args.num_rounds, 1, args.seed)
    scored = plan[-1].clients()
    split = {"train": trained, "held_out": held_out, "global": global_part, "scored": scored}
    Path(path).write_text(json.dumps(split), encoding="utf-8")


def num_own_eval_rows(args, num_rows):
    """Return how many of a client's rows it holds out: --own_eval_rows, but half of them at most, and one at least.

    0 is a tenth, at least 16 and at most 128: what --compare takes. A run by itself takes a tenth, at most 16.
    """
    size = args.own_eval_rows
    if size is None:
        size = min(CLIENT_EVAL_ROWS, num_rows // 10)
    elif size == 0:
        size = min(max(num_rows // 10, 16), 128)
    return max(1, min(size, num_rows // 2))


def describe_partition(args, parts, held_out, row_numbers, labels, names):
    """Return what partition.json holds: of every client its rows, by their numbers in the dataset, and its labels.

    `names` are those of the clients, if the data set names them.
    """
    clients = []
    for k, part in enumerate(parts):
        client = {"client": k, "rows": sorted(row_numbers[i] for i in part)}
        if names:
            client["name"] = names[k]
        if labels is not None and args.partition_column:
            client["labels"] = dict(sorted(collections.Counter(labels[i] for i in part).items()))
        clients.append(client)
    return {
        "partition": args.partition,
        "column": args.partition_column,
        "dirichlet_alpha": args.dirichlet_alpha if args.partition == "dirichlet" else None,
        "seed": options.split_seed(args),
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
    parameters = basemodel.count_lora_parameters(config, args.lora_r)
    each, copies = checkpoint_bytes(args, parameters), checkpoints.KEPT_CHECKPOINTS + 1
    _, playing = options.training_clients(args)
    room = shutil.disk_usage(args.output_dir).free
    needed = copies * each + 4 * parameters * (playing + 2)
    if room < needed:
        fail(
            f"--output_dir {args.output_dir}: {room / 1e9:.2f} GB free, and the run needs {needed / 1e9:.2f} GB: "
            f"{copies} checkpoints of {each / 1e9:.2f} GB, and models; make room, or name another"
        )


def checkpoint_bytes(args, parameters):
    """Return about how large a checkpoint is, with so many LoRA parameters."""
    clients, _ = options.training_clients(args)
    return parameters * (options.client_bytes(args) * clients + 20)  # the adapter, and the server's state
