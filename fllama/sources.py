"""Where rows come from: files as they are now, folders, data sets on the hub; and clients that are found in them."""

import collections
import csv
import json
import os
import re
import tempfile
import zlib
from pathlib import Path
from typing import NamedTuple

import datasets
import pyarrow.ipc
import pyarrow.parquet
from datasets.exceptions import DatasetNotFoundError

from fllama.files import (
    JSON_COLUMN,
    PACKED,
    READERS,
    Unreadable,
    is_data_file,
    read_file,
    read_json_object,
    rows_as_texts,
    same_columns,
    suffix_of,
)
from fllama.options import fail, first_line

HELD_OUT_SPLITS = ("validation", "valid", "val", "dev", "test")  # the first of these that a data set has
SPLIT_WORDS = {"train": "train", "training": "train", "eval": "test", "evaluation": "test", "testing": "test"}
SPLIT_WORDS |= {
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
}
UNTOLD_FOLDERS = {*SPLIT_WORDS, "data", "all"}  # folders of these names are no clients


class Source(NamedTuple):
    """The rows of a data set."""

    train: datasets.Dataset
    held_out: datasets.Dataset | None  # of its validation or test split
    clients: list | None = None  # the client of every training row, with --partition folder or file


UNREADABLE = (OSError, EOFError, ValueError, LookupError, TypeError, zlib.error, csv.Error, pyarrow.ArrowException)


# -----------------------------------------------------------------------------
# a data set


def find_source(args):
    """Find the rows of --dataset_path: a file, a folder (also of `save_to_disk`), or an id on the hub."""
    path = args.dataset_path
    try:
        if is_data_file(path):
            return read_single_file(Path(path), args)
        if os.path.isfile(path):
            fail(f"--dataset_path {path}: not a {', '.join(READERS)} file (each also as {' or '.join(PACKED)})")
        if os.path.isdir(path):
            return with_clients(args, read_folder(Path(path), args))
    except Unreadable as error:
        fail(f"--dataset_path {path}: cannot be read: {error}")
    except RecursionError:
        fail(f"--dataset_path {path}: cannot be read: it is nested too deeply")
    except UNREADABLE as error:
        fail(f"--dataset_path {path}: cannot be read: {first_line(error)}")
    if path.startswith((".", "/", "~")) or path.endswith((*READERS, *PACKED)):
        fail(f"--dataset_path {path}: no such file or folder")
    return with_clients(args, read_hub(args))


def with_clients(args, source):
    """Return a source, which has to name clients if --partition asks for them."""
    if args.partition in ("folder", "file") and source.clients is None:
        fail(f"--partition {args.partition}: {args.dataset_path} names no clients; leave it out")
    return source


def default_partition(path):
    """Return how rows are dealt out if no flag says it: as the data set names its clients, else iid."""
    path = Path(path)
    if path.is_dir() and client_folders(path):
        return "folder"
    if path.is_file() and suffix_of(path) == ".json":
        try:
            content = read_json_object(path)
        except (Unreadable, RecursionError, *UNREADABLE):  # which is said when the rows are read
            return "iid"
        if content and not set(content) <= {"train", *HELD_OUT_SPLITS}:
            return "file"
    return "iid"


def client_folders(folder):
    """Return the names of the subfolders that hold rows, if there are several and nothing says otherwise.

    Those of `save_to_disk`, and of a card that names configs, are none.
    """
    if is_saved(folder) or has_configs(folder):
        return set()
    names = {client_folder(path.relative_to(folder)) for path in data_files(folder)} - {None}
    return names if len(names) > 1 else set()


def client_folder(relative):
    """Return the first folder of a path that is not named as a split is, None if there is none."""
    return next((part for part in relative.parts[:-1] if part.lower() not in UNTOLD_FOLDERS), None)


def data_files(folder):
    """Return the data files in a folder and its subfolders, without hidden ones."""
    files = []
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
        if not hidden and path.name not in ("dataset_infos.json", "dataset_info.json") and is_data_file(path):
            files.append(path)
    return files


def is_saved(folder):
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def has_configs(folder):
    """Whether the card of a data set says which files are of which split."""
    card = folder / "README.md"
    return card.is_file() and re.search(r"^configs:", card.read_text(encoding="utf-8", errors="replace"), re.M)


def read_single_file(path, args):
    content = read_json_object(path) if suffix_of(path) == ".json" else None
    if content is None:
        refuse_split_flags(args, ["train"])
        return with_clients(args, Source(read_file(path), None))
    if set(content) <= {"train", *HELD_OUT_SPLITS}:
        train, held_out = choose_splits(args, content)
        return with_clients(
            args, Source(rows_as_texts(content[train]), rows_as_texts(content[held_out]) if held_out else None)
        )
    refuse_split_flags(args, ["train"])
    names, rows = [], []
    for client, own_rows in content.items():
        names += [client] * len(own_rows)
        rows += own_rows
    return Source(rows_as_texts(rows), None, clients_or_word(args, names))


def read_folder(folder, args):
    if is_saved(folder):
        data = datasets.load_from_disk(str(folder))
        data = data if isinstance(data, datasets.DatasetDict) else datasets.DatasetDict(train=data)
        train, held_out = choose_splits(args, data)
        return Source(data[train], data[held_out] if held_out else None)
    files = files_of_splits(folder, args)
    train, held_out = choose_splits(args, files)
    tables, names = [], []
    for path in files[train]:
        table, relative = read_file(path), path.relative_to(folder)
        tables.append(table)
        name = client_folder(relative) or path.name
        names += [str(relative) if args.partition == "file" else name] * len(table)
    held_out_tables = [read_file(path) for path in files[held_out]] if held_out else []
    named = args.partition in ("folder", "file") or bool(client_folders(folder))
    clients = clients_or_word(args, names) if named else None
    return Source(same_columns(tables), same_columns(held_out_tables) if held_out else None, clients)


def clients_or_word(args, names):
    """Return the client of every row, or say that --partition deals them out anew."""
    number = len(set(names))
    if args.partition in ("folder", "file"):
        return names
    print(
        f"  clients    the data set names {number}; --partition {args.partition} deals their rows out anew", flush=True
    )
    return None


def files_of_splits(folder, args):
    """Return {split: files} of a folder: as its card says, else by the names of the files and folders."""
    if has_configs(folder) or args.dataset_config:
        return files_of_card(folder, args)
    files, unnamed = collections.defaultdict(list), []
    for path in data_files(folder):
        split = split_of(path.relative_to(folder))
        (files[split] if split else unnamed).append(path)
    if "train" in files and unnamed:
        names = ", ".join(str(path.relative_to(folder)) for path in unnamed)
        print(f"  files      not read, as others are named train: {names}", flush=True)
    elif unnamed:
        files["train"] = unnamed
    if not files:
        raise Unreadable(f"no {', '.join(READERS)} file is in it")
    return files


def split_of(relative):
    """Return the split that a file or one of its folders is named after, None if none is."""
    name = relative.name
    if shard := re.match(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}", name):  # train_sft-00000-of-00001.parquet
        return SPLIT_WORDS.get(shard[1].lower(), shard[1])
    words = [word for word in re.split(r"[\W_\d]+", name.lower()[: name.find(".")]) if word in SPLIT_WORDS]
    words += [part.lower() for part in reversed(relative.parts[:-1]) if part.lower() in SPLIT_WORDS]
    return SPLIT_WORDS[words[0]] if words else None


def files_of_card(folder, args):
    """Return {split: files} of a folder with a card, as the library that reads data sets from the hub finds them."""
    try:
        with tempfile.TemporaryDirectory() as cache:  # the usual one may be another user's
            named = Path(cache, "named")  # [ and ] in the name of the folder itself would be taken for a pattern
            for path in [folder / "README.md", *data_files(folder)]:
                link = named / path.relative_to(folder)
                link.parent.mkdir(parents=True, exist_ok=True)
                if path.is_file():
                    link.symlink_to(path.resolve())
            builder = datasets.load_dataset_builder(str(named), args.dataset_config, cache_dir=cache)
            found = builder.config.data_files or {}
            found = {str(split): [os.path.relpath(path, named) for path in paths] for split, paths in found.items()}
    except (FileNotFoundError, DatasetNotFoundError, ValueError, KeyError) as error:
        advice = "name one with --dataset_config. " if "onfig" in str(error) else ""
        raise Unreadable(advice + " ".join(str(error).split())[:400]) from None
    files = {}
    for split, paths in found.items():
        files[split] = sorted(folder / path for path in paths if is_data_file(folder / path))
    files = {split: paths for split, paths in files.items() if paths}
    if not files:
        raise Unreadable(f"no {', '.join(READERS)} file is in it")
    return files


def read_hub(args):
    """Load a data set from the hub, or from its cache."""
    path = args.dataset_path
    try:
        data = datasets.load_dataset(path, args.dataset_config, token=args.hf_token)
    except ValueError as error:
        text = " ".join(str(error).split())
        if "onfig" in text:
            fail(f"--dataset_path {path}: name one with --dataset_config. {text[:300]}")
        fail(f"--dataset_path {path}: cannot be read: {first_line(error.__cause__ or error)}")
    except (DatasetNotFoundError, FileNotFoundError):
        fail(f"--dataset_path {path}: no such file or folder, nor dataset on the hub (or a gated one: set HF_TOKEN)")
    except datasets.exceptions.DatasetGenerationError as error:
        fail(f"--dataset_path {path}: cannot be read: {first_line(error.__cause__ or error)}")
    except PermissionError as error:
        fail(f"--dataset_path {path}: the cache {error.filename} cannot be written; set HF_HOME to a folder that can")
    except Exception as error:  # the hub's client has a dozen kinds of these, and every one of them ends the run
        fail(hub_problem("--dataset_path", path, error))
    train, held_out = choose_splits(args, data)
    return Source(data[train], data[held_out] if held_out else None)


def hub_problem(flag, name, error):
    """Return the line that says why the hub did not give `name`."""
    text = f"{error} {error.__cause__}"
    if "401" in text or "Invalid" in text and "token" in text.lower():
        return f"{flag} {name}: the hub refuses the token; set HF_TOKEN to a valid one, or to none for what is public"
    return f"{flag} {name}: not on this disk, and the hub cannot be reached; check the network ({first_line(error)})"


def choose_splits(args, splits):
    """Return the names of the training split and of the held-out split (or None): as the flags say, else by name."""
    names = list(splits)
    refuse_split_flags(args, names)
    train = args.dataset_train_split or ("train" if "train" in names else None)
    if train is None and len(names) == 1:
        train = names[0]
    if train is None:  # such as train_sft
        candidates = [name for name in names if name.startswith("train")]
        train = candidates[0] if len(candidates) == 1 else None
    if train is None:
        fail(
            f"--dataset_path {args.dataset_path}: no split is named train; "
            f"name one with --dataset_train_split: {', '.join(names)}"
        )
    held_out = args.dataset_test_split
    for name in HELD_OUT_SPLITS:
        held_out = held_out or next((split for split in names if split == name and split != train), None)
    suffix = train.removeprefix("train")
    if not held_out and suffix != train and f"test{suffix}" in names:  # train_sft and test_sft
        held_out = f"test{suffix}"
    if train != "train" or (held_out and held_out not in HELD_OUT_SPLITS):
        print(f"  splits     training {train}, held out {held_out or 'none'}", flush=True)
    return train, held_out


def refuse_split_flags(args, names):
    for flag in ("dataset_train_split", "dataset_test_split"):
        wanted = getattr(args, flag)
        if wanted and wanted not in names:
            fail(f"--{flag} {wanted}: {args.dataset_path} has no such split; it has {', '.join(names)}")


# -----------------------------------------------------------------------------
# columns and rows


def column_counts(rows):
    """Return {column: how many rows have a value in it}."""
    counts = collections.Counter()
    if rows.column_names == [JSON_COLUMN]:
        for text in rows[JSON_COLUMN]:
            counts.update(name for name, value in json.loads(text).items() if value not in (None, ""))
        return counts
    for name in rows.column_names:
        counts[name] = sum(value not in (None, "") for value in rows[name])
    return counts


def all_columns(rows):
    """Return the names of the columns that any row has, in their order."""
    if rows.column_names != [JSON_COLUMN]:
        return rows.column_names
    names = {}
    for text in rows[JSON_COLUMN]:
        names |= dict.fromkeys(json.loads(text))
    return list(names)


def row_of(row, renamed):
    """Return a row as a dict, with its columns under the names that --columns gives them, {name: column}."""
    if set(row) == {JSON_COLUMN}:
        row = json.loads(row[JSON_COLUMN])
    if not renamed:
        return row
    return {name: row.get(column) for name, column in renamed.items()}


def values_of(rows, column):
    """Return the values of a column, as texts."""
    if rows.column_names == [JSON_COLUMN]:
        return [str(json.loads(text).get(column)) for text in rows[JSON_COLUMN]]
    return [str(value) for value in rows[column]]
