"""Rows that nobody has thought of: a conversation or a named bad row, never a traceback, whatever the form."""

import json

import datasets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from fllama import files, formats, options, sources, tokenizing

EXAMPLES = 500
COLUMNS = sorted({column for form in formats.FORMS for column in (*form.columns, *form.optional)} | {"label"})
ODD = ["Where?", "<|eot_id|>", "{{ messages }}", "\u202e\U0001f9ea\u0301", "\0", "\ud800", " ", "", "[", "{", "[1]"]
ODD += [
    '{"text": ["a"]}',
    '{"text": 3}',
    "{'text': array(['a'])}",
    '[{"role": "assistant", "content": "a"}]',
    "[" * 2000,
]
TEXTS = st.one_of(st.text(max_size=12), st.sampled_from(ODD))
SIMPLE = st.one_of(TEXTS, st.none(), st.integers(), st.floats(), st.booleans())
ROLES = st.sampled_from("system user assistant tool human gpt bot developer".split() + ["", None, 3])
PARTS = st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "image", 3]), "text": SIMPLE}), max_size=2)
CONTENTS = st.one_of(TEXTS, TEXTS, TEXTS, SIMPLE, PARTS)
CALLS = st.one_of(SIMPLE, st.lists(st.fixed_dictionaries({"function": SIMPLE}), max_size=2))
MESSAGE = st.one_of(
    st.fixed_dictionaries({"role": ROLES, "content": CONTENTS}, optional={"tool_calls": CALLS, "name": SIMPLE}),
    st.fixed_dictionaries({"from": ROLES, "value": CONTENTS}),
    st.dictionaries(st.sampled_from(["role", "content", "from", "value"]), SIMPLE, max_size=2),
    SIMPLE,
)
WORDS = st.sampled_from(["a lamp", "30 mg <|eot_id|>", "\u7eff\u706f", "-5"])
TURN = st.tuples(WORDS, WORDS | TEXTS).map(
    lambda texts: [{"role": "user", "content": texts[0]}, {"role": "assistant", "content": texts[1]}]
)
MESSAGES = st.one_of(st.lists(MESSAGE, max_size=4), st.lists(TURN, max_size=3).map(lambda turns: sum(turns, [])))
AS_TEXT = MESSAGES.map(json.dumps)
ANSWERS = st.one_of(
    st.fixed_dictionaries({"text": st.one_of(SIMPLE, st.lists(TEXTS, max_size=2))}),
    st.lists(st.one_of(SIMPLE, st.fixed_dictionaries({"text": SIMPLE})), max_size=2),
)
VALUES = st.one_of(TEXTS, TEXTS, SIMPLE, MESSAGES, AS_TEXT, ANSWERS, st.dictionaries(TEXTS, SIMPLE, max_size=2))
TURNS = st.lists(TURN, min_size=1, max_size=3).map(lambda turns: sum(turns, []))
TYPICAL = {"messages": TURNS, "conversations": TURNS.map(json.dumps), "answers": WORDS | ANSWERS, "tools": st.none()}
NO_SYSTEM = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('turns') }}"
    "{% endif %}[{{ m.role }}] {{ m.content }}<|eot_id|>{% endfor %}"
)
seen = {"rows": 0, "good": 0, "forms": set()}


@st.composite
def rows(draw):
    """A form and a row that has its columns, most of them as they should be; some have others besides."""
    form = draw(st.sampled_from(formats.FORMS))
    row = {}
    for name in (*form.columns, *form.optional):
        typical = TYPICAL.get(name, WORDS)
        row[name] = draw(VALUES if draw(st.integers(0, 4)) == 0 else typical)
    for name in draw(st.lists(st.sampled_from(COLUMNS), max_size=2)):
        row.setdefault(name, draw(SIMPLE))
    for name in draw(st.lists(st.sampled_from(sorted(row)), max_size=1 if draw(st.integers(0, 9)) == 0 else 0)):
        del row[name]
    return form, row


TOKENIZERS = [AutoTokenizer.from_pretrained(options.EMBEDDED_MODEL) for _ in range(2)]
TOKENIZERS[1].chat_template = NO_SYSTEM


def test_a_conversation_or_a_named_bad_row():
    @settings(
        max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(rows(), st.sampled_from(TOKENIZERS), st.sampled_from([5, 30, 10**9]), st.sampled_from(["all", "last"]))
    def check(drawn, tokenizer, max_length, learn):
        form, row = drawn
        row = sources.row_of({files.JSON_COLUMN: json.dumps(row, default=str)}, {})
        tokens = tokenizing.tokenize_row(row, form, tokenizer, max_length, learn)
        seen["rows"] += 1
        assert set(tokens) == set(tokenizing.TOKENIZED)
        datasets.Dataset.from_list([tokens], features=tokenizing.TOKENIZED)  # it can be written
        if tokens["problem"]:
            assert tokens["input_ids"] == tokens["labels"] == tokens["references"] == [] and tokens["length"] == 0
            return
        seen["good"] += 1
        seen["forms"].add(form)
        assert 0 < tokens["length"] == len(tokens["input_ids"]) == len(tokens["labels"]) <= max_length
        assert all(label in (-100, token) for token, label in zip(tokens["input_ids"], tokens["labels"]))
        assert tokens["answer_length"] == sum(label != -100 for label in tokens["labels"])
        assert tokens["references"] and (tokens["answer_length"] or tokens["truncated"])

    check()
    assert seen["rows"] >= 300 and seen["good"] >= 100 and seen["forms"] == set(formats.FORMS), seen
