"""The rows of a file, as it is now: no cache is asked, and every cell of a csv file is a text."""

import csv
import gzip
import io
import json
import os
import sys
from pathlib import Path

import datasets
import pyarrow.ipc
import pyarrow.parquet

from fllama.options import first_line

READERS = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow")
PACKED = (".gz", ".zst")
JSON_COLUMN = "json"  # rows of JSON files are kept as texts: their fields may be of several types
csv.field_size_limit(sys.maxsize)


class Unreadable(Exception):
    """Says what is wrong with a file."""


def is_data_file(path):
    return os.path.isfile(path) and suffix_of(path) in READERS


def suffix_of(path):
    """Return the suffix of a data file, without that of a compression."""
    name = str(path).lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return os.path.splitext(name)[1]


def read_file(path):
    """Return the rows of a file. Every cell of a csv file is a text."""
    suffix = suffix_of(path)
    if suffix in (".json", ".jsonl"):
        return rows_as_texts(read_json_rows(path))
    if suffix in (".csv", ".tsv"):
        return read_csv(path, "," if suffix == ".csv" else "\t")
    with io.BytesIO(read_bytes(path)) as file:
        if suffix == ".parquet":
            return datasets.Dataset(pyarrow.parquet.read_table(file))
        try:
            return datasets.Dataset(pyarrow.ipc.open_stream(file).read_all())
        except pyarrow.ArrowInvalid:  # not a stream but a file
            return datasets.Dataset(pyarrow.ipc.open_file(file).read_all())


def read_bytes(path):
    content = Path(path).read_bytes()
    if str(path).lower().endswith(".gz"):
        return gzip.decompress(content)
    if str(path).lower().endswith(".zst"):
        return pyarrow.input_stream(pyarrow.BufferReader(content), compression="zstd").read()
    return content


def read_as_text(path):
    try:
        return read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable(f"{Path(path).name} is not UTF-8: {first_line(error)}") from None


def read_json_object(path):
    """Return {client: rows} of a JSON file that has one, None of any other."""
    text = read_as_text(path)
    if not text.lstrip().startswith("{"):
        return None
    try:
        content = json.loads(text)
    except ValueError:  # one object a line
        return None
    if isinstance(content.get("data"), list) or len(content) < 2 and "train" not in content:
        return None
    for rows in content.values():
        if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
            return None
    return content


def read_json_rows(path):
    """Return the rows of a JSON file: a list, one object a line, or SQuAD as it was published."""
    name, text = Path(path).name, read_as_text(path)
    if suffix_of(path) == ".json":
        try:
            content = json.loads(text)
        except ValueError:
            content = None  # one object a line, as many .json files have
        if isinstance(content, dict) and isinstance(content.get("data"), list):
            return rows_of_squad(content["data"])
        if isinstance(content, dict):
            values = list(content.values())
            content = values[0] if len(values) == 1 and isinstance(values[0], list) else [content]
        if content is not None:
            return checked_rows(content, name)
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):  # not at U+2028, which may stand in a text
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise Unreadable(f"{name}, line {number} is not JSON: {error}") from None
    return checked_rows(rows, name)


def checked_rows(rows, name):
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise Unreadable(f"{name} is not a list of objects")
    return rows


def rows_of_squad(articles):
    """Return the questions of SQuAD as published, v1.1 and v2.0, as rows; other lists under `data` as they are."""
    rows = []
    for article in articles:
        if not isinstance(article, dict):
            raise Unreadable("its data is not a list of objects")
        if "paragraphs" not in article:
            rows.append(article)
            continue
        for paragraph in article["paragraphs"]:
            for question in paragraph["qas"]:
                answers = [] if question.get("is_impossible") else question["answers"]
                row = {"context": paragraph["context"], "question": question["question"], "answers": answers}
                rows.append(row | {"title": article.get("title", "")})
    return rows


def rows_as_texts(rows):
    return datasets.Dataset.from_dict({JSON_COLUMN: [json.dumps(row, default=str) for row in rows]})


def read_csv(path, delimiter):
    name = Path(path).name
    lines = csv.reader(io.StringIO(read_as_text(path), newline=""), delimiter=delimiter)
    header = next(lines, None)
    if not header:
        raise Unreadable(f"{name} has no header")
    columns = {column: [] for column in header}
    if len(columns) < len(header):
        raise Unreadable(f"{name} has two columns of one name: {', '.join(header)}")
    for number, cells in enumerate(lines, start=1):
        if not cells:
            continue
        if len(cells) != len(header):
            raise Unreadable(f"{name}, row {number} has {len(cells)} cells, and the header {len(header)}")
        for column, cell in zip(header, cells):
            columns[column].append(cell)
    return datasets.Dataset.from_dict(columns)


def same_columns(tables):
    """Return several files' rows as one; files of different columns are refused, but those of JSON may have any."""
    if len(tables) == 1:
        return tables[0]
    if any(table.column_names == [JSON_COLUMN] for table in tables):
        tables = [table if table.column_names == [JSON_COLUMN] else rows_as_texts(table) for table in tables]
    for table in tables:
        if table.column_names != tables[0].column_names:
            found = f"{', '.join(tables[0].column_names)}, and {', '.join(table.column_names)}"
            raise Unreadable(f"its files have different columns: {found}")
    return datasets.concatenate_datasets(tables)
