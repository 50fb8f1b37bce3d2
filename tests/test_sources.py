"""Where rows come from: every kind of file as it is now, splits, configs, and clients that the data set names."""

import csv
import datetime
import gzip
import json
import os
import shutil
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

import main
from fllama import files, sources

DATA = Path(__file__).parent / "data"
ROWS = [{"prompt": f"a{i}", "completion": f"b{i}"} for i in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def find(path, *flags):
    return sources.find_source(main.parse_args(["--dataset_path", str(path), *flags]))


def rows_of(rows):
    return [sources.row_of(row, {}) for row in rows]


def refused(capsys, path, *flags):
    """Return the one line with which it is refused."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        find(path, *flags)
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(lines) == 1
    return lines[0]


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def zstd(content):
    out = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(out, "zstd") as packed:
        packed.write(content)
    return out.getvalue().to_pybytes()


def write_kind(path):
    """Write ROWS as the suffix of `path` says."""
    table = pyarrow.Table.from_pylist(ROWS)
    kind, packed = path.suffixes[0], path.suffixes[1:]
    if kind == ".parquet":
        pyarrow.parquet.write_table(table, path)
    elif kind == ".arrow":
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
            writer.write_table(table)
    else:
        delimiter = {".csv": ",", ".tsv": "\t"}.get(kind)
        text = json.dumps(ROWS, indent=1) if kind == ".json" else LINES
        if delimiter:
            text = "".join(
                delimiter.join(cells) + "\n" for cells in [("prompt", "completion"), *map(dict.values, ROWS)]
            )
        write(path, text)
    if packed:
        path.write_bytes({".gz": gzip.compress, ".zst": zstd}[packed[0]](path.read_bytes()))
    return path


# -----------------------------------------------------------------------------
# files


@pytest.mark.parametrize("packed", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", files.READERS)
def test_every_kind_of_file(tmp_path, kind, packed):
    """Alone, and in a folder; the name of the folder may have any characters."""
    folder = tmp_path / "rows [1] of *, no. 2"
    folder.mkdir()
    path = write_kind(folder / f"rows{kind}{packed}")
    for place in (path, folder):
        source = find(place)
        assert rows_of(source.train) == ROWS and source.held_out is None and source.clients is None


def test_a_stream_of_arrow(tmp_path):
    """As datasets writes it."""
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    path = shutil.copy(tmp_path / "saved" / "data-00000-of-00001.arrow", tmp_path / "rows.arrow")
    assert rows_of(find(path).train) == ROWS


def test_parquet_of_other_types(tmp_path):
    table = pyarrow.table({"question": pyarrow.array(["a", "a"]).dictionary_encode(), "answer": [1, 2]})
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    assert rows_of(find(tmp_path / "rows.parquet").train) == [{"question": "a", "answer": n} for n in (1, 2)]


@pytest.mark.parametrize("name", ["codes.csv", "codes.tsv"])
def test_every_cell_is_a_text(name):
    """NA is no missing value and 007 no number; these files have CRLF, one of them a BOM."""
    assert b"\r\n" in (DATA / name).read_bytes()
    rows = rows_of(find(DATA / name).train)
    assert [row["answer"] for row in rows] == "NA 007 None 1.50 null TRUE 1e5 0 nan -5".split()
    assert list(rows[0]) == ["question", "answer", "note"] and rows[0]["note"] == ""
    assert sources.column_counts(find(DATA / name).train) == {"question": 10, "answer": 10, "note": 0}


def test_csv_with_quotes_and_lines_in_cells(tmp_path):
    with open(tmp_path / "rows.csv", "w", newline="") as file:
        csv.writer(file).writerows([("text",), ('two\nlines, "quoted"',), ("x" * 200_000,)])
    assert [row["text"] for row in find(tmp_path / "rows.csv").train] == ['two\nlines, "quoted"', "x" * 200_000]


def test_json_lines_of_several_writings(tmp_path):
    """A BOM, CRLF, empty lines; U+2028 and U+0085 in a text end no line; one object a line may be in a .json file."""
    text = '\ufeff{"text": "a\u2028b\x85c"}\r\n\r\n{"text": ["d", {"e": 1}]}\r\n'
    expected = [{"text": "a\u2028b\x85c"}, {"text": ["d", {"e": 1}]}]
    for name in ("rows.jsonl", "rows.json"):
        assert rows_of(find(write(tmp_path / name, text)).train) == expected


def test_what_the_file_holds_now(tmp_path):
    """Of the same name, size and time as before."""
    path = write(tmp_path / "rows.jsonl", LINES)
    times = path.stat()
    assert rows_of(find(path).train) == ROWS
    write(path, LINES.replace("a0", "z9"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert rows_of(find(path).train)[0]["prompt"] == rows_of(find(tmp_path).train)[0]["prompt"] == "z9"


def test_home_is_the_users(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "rows.jsonl", LINES)
    assert rows_of(find("~/rows.jsonl").train) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', "a.jsonl, line 2 is not JSON"),
        ("a.jsonl", "[1]\n", "a.jsonl is not a list of objects"),
        ("a.json", "7", "a.json is not a list of objects"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.json", '{"data": [3]}', "its data is not a list of objects"),
        ("a.jsonl", LINES.encode("utf-16"), "a.jsonl is not UTF-8"),
        ("a.jsonl.gz", gzip.compress(LINES.encode() * 99)[:60], "ended before the end-of-stream marker"),
        ("a.jsonl.gz", b"no", "Not a gzipped file"),
        ("a.jsonl.zst", zstd(LINES.encode())[:20], "cannot be read"),
        ("a.csv", "", "a.csv has no header"),
        ("a.csv", "a,b\n1,2\n3\n", "a.csv, row 2 has 1 cells, and the header 2"),
        ("a.csv", "a,a\n1,2\n", "a.csv has two columns of one name: a, a"),
        ("a.parquet", "no", "Parquet file size is 2 bytes"),
        ("a.arrow", "no", "cannot be read"),
        ("a.txt", "no", "not a .json, .jsonl, .csv, .tsv, .parquet, .arrow file (each also as .gz or .zst)"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(tmp_path, capsys, name, content, said):
    line = refused(capsys, write(tmp_path / name, content))
    assert said in line and f"--dataset_path {tmp_path / name}" in line
    assert "not on this disk" not in line and "network" not in line


def test_what_is_not_there(tmp_path, capsys):
    assert "no such file or folder" in refused(capsys, tmp_path / "nothing")
    assert "no such file or folder" in refused(capsys, "nothing.jsonl.gz")
    assert "no .json, .jsonl, .csv" in refused(capsys, tmp_path)


def test_squad_as_published():
    """Of both versions; what is impossible has no answers, and plausible ones do not count."""
    first, second = (rows_of(find(DATA / f"squad-v{version}.json").train) for version in ("1.1", "2.0"))
    assert len(first) == len(second) == 10 and first[:9] == second[:9]
    assert first[0]["answers"][0]["text"] == "a lamp" and first[0]["title"] == "Boats" and second[9]["answers"] == []
    assert set(first[0]) == {"context", "question", "answers", "title"}


# -----------------------------------------------------------------------------
# folders and splits


@pytest.mark.parametrize(
    "names", [("train.jsonl", "validation.jsonl"), ("data/train-00000-of-00001.jsonl", "dev/x.jsonl")]
)
def test_splits_are_named_by_files_or_folders(tmp_path, names):
    write(tmp_path / names[0], LINES)
    write(tmp_path / names[1], LINES.splitlines()[0])
    write(tmp_path / ".cache" / "train.jsonl", LINES)  # hidden
    source = find(tmp_path)
    assert rows_of(source.train) == ROWS and rows_of(source.held_out) == ROWS[:1] and source.clients is None


def test_splits_of_a_saved_data_set(tmp_path, capsys):
    rows = datasets.Dataset.from_list(ROWS)
    data = datasets.DatasetDict(test=rows.select([0]), train=rows, validation=rows.select([1]))
    data.save_to_disk(tmp_path / "three")
    assert rows_of(find(tmp_path / "three").held_out) == ROWS[1:2]
    assert rows_of(find(tmp_path / "three", "--dataset_test_split", "test").held_out) == ROWS[:1]
    rows.save_to_disk(tmp_path / "one")
    assert find(tmp_path / "one").held_out is None and rows_of(find(tmp_path / "one").train) == ROWS
    datasets.DatasetDict({"all": rows}).save_to_disk(tmp_path / "all")
    assert rows_of(find(tmp_path / "all").train) == ROWS and "training all, held out none" in capsys.readouterr().out
    datasets.DatasetDict(train_sft=rows, test_sft=rows.select([2]), train_gen=rows).save_to_disk(tmp_path / "sft")
    line = refused(capsys, tmp_path / "sft")
    assert "name one with --dataset_train_split: train_sft, test_sft, train_gen" in line
    source = find(tmp_path / "sft", "--dataset_train_split", "train_sft")
    assert rows_of(source.held_out) == ROWS[2:3] and source.clients is None
    assert "training train_sft, held out test_sft" in capsys.readouterr().out
    assert "names no clients" in refused(capsys, tmp_path / "one", "--partition", "folder")


@pytest.mark.parametrize("flag", ["--dataset_train_split", "--dataset_test_split"])
def test_a_split_that_is_not_there(tmp_path, capsys, flag):
    write(tmp_path / "rows" / "train.jsonl", LINES)
    write(tmp_path / "rows" / "test.jsonl", LINES)
    line = refused(capsys, tmp_path / "rows", flag, "nope")
    assert f"{flag} nope" in line and "no such split; it has test, train" in line
    assert "it has train" in refused(capsys, tmp_path / "rows" / "train.jsonl", flag, "nope")


def test_a_json_object_of_splits(tmp_path):
    """It names no clients."""
    source = find(write(tmp_path / "rows.json", json.dumps({"train": ROWS, "validation": ROWS[:2]})))
    assert rows_of(source.train) == ROWS and rows_of(source.held_out) == ROWS[:2] and source.clients is None
    assert rows_of(find(write(tmp_path / "rows.json", json.dumps({"rows": ROWS}))).train) == ROWS


CARD = """---
configs:
- config_name: main
  data_files: main/*.jsonl
- config_name: socratic
  data_files:
  - split: train_sft
    path: socratic/a*
  - split: test_sft
    path: socratic/b*
---
"""


def test_configs(tmp_path, capsys):
    """They are no clients; a missing one is answered with those that there are."""
    folder = tmp_path / "cards [2]"
    write(folder / "README.md", CARD)
    write(folder / "main" / "x.jsonl", LINES)
    write(folder / "socratic" / "a.jsonl", LINES.splitlines()[1])
    write(folder / "socratic" / "b.jsonl", LINES.splitlines()[0])
    line = refused(capsys, folder)
    assert "name one with --dataset_config" in line and "['main', 'socratic']" in line
    assert "['main', 'socratic']" in refused(capsys, folder, "--dataset_config", "nope")
    source = find(folder, "--dataset_config", "main")
    assert rows_of(source.train) == ROWS and source.clients is None
    source = find(folder, "--dataset_config", "socratic")
    assert rows_of(source.train) == ROWS[1:2] and rows_of(source.held_out) == ROWS[:1]


def test_a_folder_of_several_kinds_of_files(tmp_path, capsys):
    """No file is left out without a word; files of different columns are refused."""
    write(tmp_path / "a.jsonl", LINES)
    write(tmp_path / "b.csv", "prompt,completion\nx,y\n")
    assert rows_of(find(tmp_path).train) == [*ROWS, {"prompt": "x", "completion": "y"}]
    write(tmp_path / "train.jsonl", LINES)
    assert len(find(tmp_path).train) == 5
    assert "not read, as others are named train: a.jsonl, b.csv" in capsys.readouterr().out
    for name, header in (("a.csv", "a,b"), ("b.csv", "a,c")):
        write(tmp_path / "csv" / name, f"{header}\n1,2\n")
    assert "its files have different columns: a, b, and a, c" in refused(capsys, tmp_path / "csv")


# -----------------------------------------------------------------------------
# clients that the data set names


@pytest.mark.parametrize("path", ["clients.json", "sites"])
def test_clients_found_in_the_data(path, capsys):
    """They are the clients if no flag says otherwise; pooling them is said."""
    source = find(DATA / path)
    assert source.clients == ["north"] * 5 + ["south"] * 5 and len(source.train) == 10
    assert main.parse_args(["--dataset_path", str(DATA / path)]).partition in ("folder", "file")
    assert capsys.readouterr().out == ""
    assert find(DATA / path, "--partition", "iid").clients is None
    assert "the data set names 2; --partition iid deals their rows out anew" in capsys.readouterr().out


def test_a_client_for_each_file(tmp_path):
    for name in ("north", "south"):
        write(tmp_path / f"{name}.jsonl", LINES)
    assert find(tmp_path).clients is None
    assert sorted(set(find(tmp_path, "--partition", "file").clients)) == ["north.jsonl", "south.jsonl"]
    found = find(DATA / "sites", "--partition", "file").clients
    assert sorted(set(found)) == ["north/train.jsonl", "south/train.jsonl"]


@pytest.mark.parametrize("above", ["", "data", "train"])
def test_folders_of_clients_in_a_folder(tmp_path, above):
    """Below one that is named as data or as a split; with held-out rows of their own, and of several kinds."""
    write(tmp_path / above / "north" / "train.jsonl", LINES)
    write(tmp_path / above / "test-hospital" / "train.csv", "prompt,completion\nx,y\n")
    if above != "train":
        write(tmp_path / above / "north" / "test.jsonl", LINES.splitlines()[0])
    source = find(tmp_path)
    assert source.clients == ["north"] * 5 + ["test-hospital"]
    assert (source.held_out is None) == (above == "train")


def test_what_names_no_clients(tmp_path, capsys):
    path = write(tmp_path / "rows" / "rows.jsonl", LINES)
    for partition in ("folder", "file"):
        assert f"--partition {partition}: {path} names no clients" in refused(capsys, path, "--partition", partition)
    assert sources.default_partition(tmp_path) == "iid"  # one folder
    assert sources.default_partition(tmp_path / "nothing") == "iid"


# -----------------------------------------------------------------------------
# columns


def test_columns_and_values(tmp_path):
    rows = [{"a": "x", "b": 1}, {"a": "", "c": None}, {"a": "y", "b": 0}]
    found = find(write(tmp_path / "rows.json", json.dumps(rows))).train
    assert sources.all_columns(found) == ["a", "b", "c"]
    assert sources.column_counts(found) == {"a": 2, "b": 2}
    assert sources.values_of(found, "b") == ["1", "None", "0"]
    assert sources.row_of(found[0], {"question": "b", "answer": "c"}) == {"question": 1, "answer": None}


def test_values_that_json_has_not(tmp_path):
    """Days of a parquet file beside JSON rows are texts."""
    day = datetime.date(2024, 5, 1)
    pyarrow.parquet.write_table(pyarrow.table({"a": [day]}), tmp_path / "b.parquet")
    write(tmp_path / "a.jsonl", '{"a": "x"}\n')
    assert rows_of(find(tmp_path).train) == [{"a": "x"}, {"a": "2024-05-01"}]
