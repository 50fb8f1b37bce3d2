"""Make a second data set, not part of the project: SQuAD rows from the documentation that comes with Python.

usage: python assets/make_docstring_squad.py FILE.jsonl [ROWS]

The column `document` says which of four kinds of text a row is from; each asks in its own way, and has equally many:
    library     first lines of docstrings: which name does one of them describe?
    signatures  signatures of functions and classes: their parameters and defaults
    reference   sentences of the language reference (pydoc_data.topics): which code is missing in one of them?
    status      tables of HTTP statuses, system errors, signals and characters: one column from another
The text is Python's own (PSF licence), but messages of errors and signals are the C library's, and names of characters
are Unicode's (Unicode licence). It differs a little between versions of Python, so it is made where it is used.
"""

import contextlib
import errno
import importlib
import inspect
import json
import os
import random
import re
import signal
import sys
import unicodedata
from http import HTTPStatus
from pydoc_data.topics import topics

MAX_CHARACTERS = 400  # of a context, which is about 60 words
MODULES = """argparse asyncio base64 calendar collections configparser contextlib csv difflib email.utils functools
heapq inspect io ipaddress itertools json locale logging math operator os os.path pathlib pickle random re shutil socket
sqlite3 statistics subprocess sys tempfile threading traceback urllib.parse urllib.request warnings weakref""".split()
TABLES = {
    "HTTP status": ["code phrase description", *((str(n.value), n.phrase, n.description) for n in HTTPStatus)],
    "system error": ["number name message", *((str(n), name, os.strerror(n)) for n, name in errno.errorcode.items())],
    "signal": ["number name message", *((str(n.value), n.name, signal.strsignal(n)) for n in signal.Signals)],
    "character": ["code symbol name", *((f"U+{n:04X}", chr(n), unicodedata.name(chr(n))) for n in range(0xF8, 0x178))],
}


def list_public(module):
    """Return (name, value) of the functions and classes of a module, without what it has imported for itself."""
    values = vars(importlib.import_module(module))
    own = [name for name in values if getattr(values[name], "__module__", "") in (module, f"_{module}")]
    names = sorted(values.get("__all__", own))
    return [(name, values[name]) for name in names if name[0] != "_" and callable(values.get(name))]


def show_lines(title, lines, rng):
    """Yield for every line its key, a context of a title, this line and two others, and where the line begins in it."""
    for key in lines if len(lines) > 2 else ():
        shown = [key, *rng.sample([other for other in lines if other != key], 2)]
        context = "\n".join([title, *(lines[other] for other in rng.sample(shown, 3))])
        yield key, context, context.index("\n" + lines[key]) + 1


def library(rng):
    for module in MODULES:
        lines = {}
        for name, value in list_public(module):
            text = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
            if re.fullmatch(r"[A-Z].{20,100}\.", text) and "->" not in text and name.lower() not in text.lower():
                lines.setdefault(text, f"{name}: {text}")
        for text, context, start in show_lines(f"Module {module}", lines, rng):
            yield context, f"Which name in {module} is described so: {text}", start, lines[text].split(":")[0]


def signatures(rng):
    for module in MODULES:
        lines = {}
        for name, value in list_public(module):
            with contextlib.suppress(TypeError, ValueError):  # not everything that is written in C has a signature
                bare = [one.replace(annotation=one.empty) for one in inspect.signature(value).parameters.values()]
                if "<" not in (signature := str(inspect.Signature(bare))):  # objects show their addresses
                    lines[f"{module}.{name}"] = f"{module}.{name}{signature}"
        for name, context, start in show_lines("Signatures", lines, rng):
            line, asked, before = lines[name], [], None
            # two letters or more: exact match drops articles, so the parameter "a" would be no answer
            for one in re.finditer(r"(?<=[( ])([a-z]\w+)(?:=(None|True|False|-?[\d.]+|'[\w.-]+'))?(?=[,)])", line):
                known, default, at = one[1], one[2], start + one.start()
                if before and line[before.end() : one.start()] in (", ", ", /, ", ", *, "):
                    asked.append((f"Which parameter comes right after {before[1]} in {name}?", at, known))
                if len(re.findall(rf"\b{known}\b", context)) == 1:
                    asked.append((f"Which of these has a parameter called {known}?", start, name))
                if default:
                    asked.append((f"What is the default of {known} in {name}?", start + one.start(2), default))
                    if len(re.findall(rf"={default}[,)]", line)) == 1:
                        asked.append((f"Which parameter of {name} has the default {default}?", at, known))
                before = one
            yield from ((context, *question) for question in rng.sample(asked, min(2, len(asked))))


def reference(rng):
    for part in dict.fromkeys(part for topic in sorted(topics) for part in topics[topic].split("\n\n")):
        # no terms before their definitions, marks of lists and footnotes, or breaks after hyphens
        text = " ".join(re.sub(r'^( *)[A-Za-z"].*\n(?=\1 )|^ *(\*|\d+\.) | \[\d+\]|(?<=-)\n *', "", part).split())
        prose = re.fullmatch(r'[A-Z"].*\.', text) and not re.search(r'""|[‘“]"|[*=~^-]{4}|\b[EIei]\.[eg]\.', text)
        sentences = re.split(r'(?<=[.?!]) (?=[A-Z"*])', text) if prose else ()
        for i, sentence in enumerate(sentences):
            context = " ".join(sentences[max(i - 1, 0) : max(i + 1, 2)])
            codes = [one for one in sentence.split('"')[1::2] if re.search(r"\w\w", one) and sentence.count(one) == 1]
            whole = sentence.count('"') % 2 == 0 and 5 <= len(sentence.split()) <= 30
            if whole and codes and len(set(context.split('"')[1::2])) > 1:
                code = f'"{rng.choice(codes)}"'
                question = f"Which code fills the gap? {sentence.replace(code, '___')}"
                yield context, question, context.index(sentence) + sentence.index(code) + 1, code[1:-1]


def status(rng):
    for what, (columns, *table) in TABLES.items():
        lines = {row: " | ".join(row) for row in table if all(row)}
        for row, context, start in show_lines(f"{what}: {columns.replace(' ', ' | ')}", lines, rng):
            cells = list(zip(columns.split(), row, (start, start + len(row[0]) + 3, start + len(row[0] + row[1]) + 6)))
            for known, asked in (rng.sample(cells, 2), rng.sample(cells, 2)):
                yield context, f"What is the {asked[0]} of the {what} with {known[0]} {known[1]}?", asked[2], asked[1]


if __name__ == "__main__":
    rng = random.Random(0)
    parts = []
    for document in (library, signatures, reference, status):
        unique = list({row[:2]: row for row in document(rng) if len(row[0]) <= MAX_CHARACTERS}.values())
        parts.append([(document.__name__, *row) for row in rng.sample(unique, len(unique))])
    size = min([len(part) for part in parts] + [int(rows) // len(parts) for rows in sys.argv[2:]])
    rows = [row for part in parts for row in part[:size]]
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        for document, context, question, start, answer in rng.sample(rows, len(rows)):
            answers = {"text": [answer], "answer_start": [start]}
            row = {"context": context, "question": question, "answers": answers, "document": document}
            file.write(json.dumps(row) + "\n")
