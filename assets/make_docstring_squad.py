"""Make a second data set, not part of the project: SQuAD rows from the docstrings of Python's standard library.

usage: python assets/make_docstring_squad.py FILE.jsonl [ROWS]

Each row shows the first lines of three docstrings and asks which name one of them describes. The text is Python's own
(PSF licence) and differs a little between versions of Python, so it is made where it is used.
"""

import importlib
import inspect
import json
import random
import sys

MODULES = """ast base64 bisect calendar copy csv datetime difflib functools gettext glob hashlib heapq inspect itertools json
locale logging math operator os pathlib pickle random re shutil socket sqlite3 statistics string struct subprocess
textwrap threading time urllib.parse zipfile""".split()


def make_rows(module, rng):
    """Make one row for every public name of a module whose docstring begins with a short line that does not name it."""
    first_lines = {}
    for name, value in inspect.getmembers(importlib.import_module(module), callable):
        line = " ".join((inspect.getdoc(value) or "").split("\n\n")[0].split())
        if name[0] != "_" and 20 < len(line) < 120 and name.lower() not in line.lower() and "->" not in line:
            if line not in first_lines.values():
                first_lines[name] = line
    for name, line in first_lines.items():
        shown = [name, *rng.sample([other for other in first_lines if other != name], min(2, len(first_lines) - 1))]
        rng.shuffle(shown)
        context = f"Module {module}. " + " ".join(f"{other}: {first_lines[other]}" for other in shown)
        answers = {"text": [name], "answer_start": [context.index(f"{name}: ")]}
        question = f"Which name in {module} is described so: {line}"
        yield {"context": context, "question": question, "answers": answers}


if __name__ == "__main__":
    rng = random.Random(0)
    rows = [row for module in MODULES for row in make_rows(module, rng)]
    rng.shuffle(rows)
    with open(sys.argv[1], "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows[: int(sys.argv[2]) if len(sys.argv) > 2 else None])
