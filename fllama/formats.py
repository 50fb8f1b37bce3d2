"""The forms that rows come in, each turned into a prompt and a completion, and those into tokens."""

import datasets
from datasets import List, Value
from jinja2 import TemplateError

import utils

# a form: its columns, and what it is called
FORMS = {
    "SQuAD": ("context", "question", "answers"),
    "chat": ("messages",),
    "texts or messages": ("prompt", "completion"),
}
TOKENIZED = datasets.Features(
    input_ids=List(Value("int64")),
    labels=List(Value("int64")),  # -100 where there is no loss
    length=Value("int64"),
    answer_length=Value("int64"),
    truncated=Value("bool"),
    question=Value("string"),
    references=List(Value("string")),
    problem=Value("string"),
)


def is_readable(columns):
    """Whether rows with these columns have one of the forms."""
    return any(set(form) <= set(columns) for form in FORMS.values())


def describe_forms():
    return ", or ".join(f"{', '.join(columns)} ({name})" for name, columns in FORMS.items())


# -----------------------------------------------------------------------------
# what is wrong with a row


def find_problem(row):
    """Return what is wrong with a row of one of the FORMS, "" if nothing is."""
    if "messages" in row:
        if not are_messages(row["messages"]):
            return "messages is not a list of messages with role and content"
        return "" if is_text(row["messages"][-1]["content"]) else "the last message is empty"
    if "context" in row and "answers" in row:
        return find_squad_problem(row)
    prompt, completion = row.get("prompt"), row.get("completion")
    if not isinstance(prompt, str) and not are_messages(prompt):
        return "prompt is neither a text nor a list of messages"
    if not is_text(completion) and not (are_messages(completion) and is_text(completion[-1]["content"])):
        return "completion is neither a text nor a list of messages, or empty"
    if type(prompt) is not type(completion):
        return "prompt and completion are of two kinds"
    return ""


def find_squad_problem(row):
    if not isinstance(row["context"], str):
        return "context is not a text"
    if not is_text(row.get("question")):
        return "question is not a text, or empty"
    try:
        answers = utils.list_answers(row)
    except (TypeError, KeyError, IndexError):
        return "answers has no list of texts"
    return "" if all(map(is_text, answers)) else "an answer is not a text, or empty"


def is_text(value):
    return isinstance(value, str) and bool(value.strip())


def are_messages(value):
    return isinstance(value, list) and bool(value) and all(map(is_message, value))


def is_message(value):
    """Whether this is a message; one that calls a tool has no content."""
    return isinstance(value, dict) and is_text(value.get("role")) and isinstance(value.get("content") or "", str)


# -----------------------------------------------------------------------------
# tokens


def tokenize_row(row, tokenizer, max_length):
    """Tokenize one row; the labels are -100 (no loss) up to the answer, and the last one ends the turn.

    `row` is SQuAD, `messages` (the last message is the answer) or `prompt`/`completion` (texts or message lists).
    Returns `input_ids` and `labels` of at most `max_length` tokens, `length` and `answer_length` (tokens kept of the
    row and of its answer), `truncated` (bool), `question` (to be shown), `references` (the accepted answers, for exact
    match and F1) and `problem`: why the row cannot be used, which then has no tokens.
    """
    problem = find_problem(row)
    if not problem:
        try:
            return tokenize_conversation(row, tokenizer, max_length) | {"problem": ""}
        except (TemplateError, UnicodeError, TypeError, ValueError, KeyError) as error:
            problem = f"the chat template or the tokenizer refuses it: {type(error).__name__}"
    empty = {"input_ids": [], "labels": [], "length": 0, "answer_length": 0, "truncated": False}
    return empty | {"question": "", "references": [], "problem": problem}


def tokenize_conversation(row, tokenizer, max_length):
    references = None
    if "messages" in row:
        row = {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}
    elif "context" in row and "answers" in row:
        references = utils.list_answers(row)
        row = utils.convert_squad_sample_to_llama_conversation(row, tokenizer)
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        ids, start = tokenize_texts(prompt, completion, tokenizer)
        question, answer = prompt, completion
    else:
        ids, start = tokenize_messages(prompt, completion, tokenizer)
        question, answer = prompt[-1]["content"] if prompt else "", completion[-1]["content"]

    first = common_prefix(ids, start)  # where the answer begins
    labels = [-100] * first + ids[first:]
    length = min(len(ids), max_length)
    return {
        "input_ids": ids[:max_length],
        "labels": labels[:max_length],
        "length": length,
        "answer_length": max(0, length - first),
        "truncated": len(ids) > max_length,
        "question": question,
        "references": references or [answer],
    }


def tokenize_texts(prompt, completion, tokenizer):
    """Return the tokens of the whole row, which ends with the end-of-text token, and those of the prompt alone."""
    ids = tokenizer(prompt + completion)["input_ids"]
    if ids[-1] != tokenizer.eos_token_id:
        ids.append(tokenizer.eos_token_id)
    return ids, tokenizer(prompt)["input_ids"]


def tokenize_messages(prompt, completion, tokenizer):
    """Return the tokens of the whole row, which ends with the end-of-turn token, and those of the prompt alone."""
    ids = tokenizer.apply_chat_template(prompt + completion)["input_ids"]
    start = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
    if tokenizer.eos_token_id in ids[len(start) :]:  # ChatML adds a line break behind the end-of-turn token
        last = len(ids) - 1 - ids[::-1].index(tokenizer.eos_token_id)
        ids = ids[: last + 1]
    return ids, start


def common_prefix(ids, others):
    """Return how many first tokens two lists have in common."""
    for i, (a, b) in enumerate(zip(ids, others)):
        if a != b:
            return i
    return min(len(ids), len(others))
