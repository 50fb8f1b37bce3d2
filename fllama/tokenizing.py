"""Conversations into tokens, and which of them carry loss."""

import functools
import re
from typing import NamedTuple

import datasets
from datasets import List, Value
from jinja2 import TemplateError

import utils
from fllama.formats import BadRow

TOKENIZED = datasets.Features(
    input_ids=List(Value("int64")),
    labels=List(Value("int64")),  # -100 where there is no loss
    length=Value("int64"),
    answer_length=Value("int64"),  # tokens that carry loss
    prompt_length=Value("int64"),  # tokens before the last answer, which is the one that is asked for in the evaluation
    truncated=Value("bool"),
    question=Value("string"),
    references=List(Value("string")),  # the accepted answers
    problem=Value("string"),
)
PROBE = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": "an answer"}]
OTHER_ANSWER = "\u2603"  # begins and ends with tokens that hardly any answer has
REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


def tokenize_row(row, form, tokenizer, max_length, learn="all", date=None):
    """Tokenize one row of a form; labels are -100 where there is no loss.

    Learned are the answers of the assistant (`learn`: all of them, or the last), each up to and including the token
    that ends its turn. Returns `input_ids` and `labels` of at most `max_length` tokens, and what TOKENIZED says beside
    them. `problem` is why the row cannot be used, which then has no tokens. `date` is the day that templates see.
    """
    try:
        conversation = form.read(row)
        if conversation.messages is None:
            ids, answers = tokenize_text(conversation, tokenizer)
        else:
            ids, answers = tokenize_messages(conversation, tokenizer, learn, date)
        row = label(ids, answers, conversation, max_length)
        " ".join([row["question"], *row["references"]]).encode()  # which half of a surrogate pair cannot be
        return row | {"problem": ""}
    except BadRow as error:
        problem = str(error)
    except TemplateError as error:
        problem = f"the chat template refuses it: {error}"
    except REFUSALS as error:  # of which the text may hold text of the row
        problem = f"the chat template or the tokenizer refuses it: {type(error).__name__}"
    empty = {"input_ids": [], "labels": [], "length": 0, "answer_length": 0, "prompt_length": 0, "truncated": False}
    return empty | {
        "question": "",
        "references": [],
        "problem": " ".join(problem.split())[:200].encode("utf-8", "replace").decode(),
    }


class Answer(NamedTuple):
    """A stretch of tokens that is learned."""

    first: int
    end: int  # behind the token that ends its turn
    question: str
    text: str


def label(ids, answers, conversation, max_length):
    """Return the tokens of a row with its labels, cut to `max_length`."""
    labels = [-100] * len(ids)
    for answer in answers:
        labels[answer.first : answer.end] = ids[answer.first : answer.end]
    kept = [answer for answer in answers if answer.first < max_length]
    last = kept[-1] if kept else answers[-1]
    accepted = [last.text]
    if conversation.references and last is answers[-1]:
        accepted = conversation.references
    labels = labels[:max_length]
    return {
        "input_ids": ids[:max_length],
        "labels": labels,
        "length": len(labels),
        "answer_length": len(labels) - labels.count(-100),
        "prompt_length": last.first,
        "truncated": len(ids) > max_length,
        "question": last.question,
        "references": accepted,
    }


def tokenize_text(conversation, tokenizer):
    """Return (tokens, answers) of a text as it is; the end-of-text token is learned, too."""
    ids = tokenizer(conversation.prompt + conversation.text)["input_ids"]
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    first = common_prefix(ids, tokenizer(conversation.prompt)["input_ids"]) if conversation.prompt else 0
    return ids, [Answer(first, len(ids), conversation.prompt, conversation.text)]


def tokenize_messages(conversation, tokenizer, learn, date):
    """Return (tokens, answers) of messages in the model's chat template."""
    messages = conversation.messages
    if messages[0]["role"] == "system" and not keeps_system(tokenizer):
        messages = utils.fold_system(messages)
    render = functools.partial(apply_template, tokenizer, tools=conversation.tools, date=date)
    ids = render(messages)
    answers = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        first = find_first(ids, messages, i, render)
        end = find_end(ids, first, messages, i, render, tokenizer)
        question = messages[i - 1]["content"] if i else ""
        answers.append(Answer(first, end, question, message["content"]))
    if learn == "last":
        answers = answers[-1:]
    return ids[: answers[-1].end], answers


@functools.cache
def keeps_system(tokenizer):
    """Whether the chat template has a system message at the same place before and after the answer (Mistral's: no)."""
    if not utils.has_system_role(tokenizer):
        return False
    probe = [{"role": "system", "content": "a-system-message"}, *PROBE]
    return "a-system-message" in tokenizer.apply_chat_template(probe, tokenize=False)


def apply_template(tokenizer, messages, tools=None, date=None, **more):
    """Return the tokens of messages in the chat template; a template that asks for the day gets `date`."""
    if date is not None and isinstance(tokenizer.chat_template, str):
        more["chat_template"] = template_of_day(tokenizer.chat_template, date)
    return tokenizer.apply_chat_template(messages, tools=tools, **more)["input_ids"]


@functools.cache
def template_of_day(template, date):
    """Return a chat template that asks for no date, but has `date` in it: a resumed run tokenizes alike."""
    return re.sub(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)", lambda call: repr(date.strftime(call[2])), template)


def find_first(ids, messages, i, render):
    """Return where the answer in messages[i] begins: behind what the model is given when it is asked.

    Where the template writes that otherwise once it is answered, it begins with the words of the answer.
    """
    if i:
        asked = render(messages[:i], add_generation_prompt=True)
        first = common_prefix(ids, asked)
        if first >= len(asked) - 1:  # the last token may have grown by the beginning of the answer
            return first
    other = {"role": "assistant", "content": OTHER_ANSWER}
    return common_prefix(ids, render([*messages[:i], other, *messages[i + 1 :]]))


def find_end(ids, first, messages, i, render, tokenizer):
    """Return where the answer in messages[i], which begins at `first`, ends: behind the token that ends its turn."""
    turn_end, rest = end_of_turn(tokenizer), len(ids)
    if i + 1 < len(messages):
        rest = max(first, common_prefix(ids, render(messages[: i + 1])))  # what follows is of others
    if turn_end is None:
        return rest
    content = messages[i]["content"]
    inside = tokenizer(content, add_special_tokens=False)["input_ids"].count(turn_end)  # someone wrote it there
    for place in range(first, len(ids)):
        if ids[place] == turn_end:
            if not inside:
                return place + 1
            inside -= 1
    return rest


@functools.cache
def end_of_turn(tokenizer):
    """Return the token with which the chat template ends the assistant's turns, None if it has none."""
    if tokenizer.chat_template is None:
        return tokenizer.eos_token_id
    try:
        ids = tokenizer.apply_chat_template(PROBE)["input_ids"]
        others = tokenizer.apply_chat_template([PROBE[0], PROBE[1] | {"content": OTHER_ANSWER}])["input_ids"]
    except REFUSALS:
        return tokenizer.eos_token_id
    behind = common_prefix(ids[::-1], others[::-1])  # so many tokens stand behind the answer
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return next((token for token in ids[len(ids) - behind :] if token in special), None)


def common_prefix(ids, others):
    """Return how many first tokens two lists have in common."""
    for i, (a, b) in enumerate(zip(ids, others)):
        if a != b:
            return i
    return min(len(ids), len(others))
