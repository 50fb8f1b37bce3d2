"""The forms that rows come in, each turned into a conversation, and conversations into tokens that carry loss."""

import ast
import functools
import json
import math
import re
from typing import NamedTuple

import datasets
from datasets import List, Value
from jinja2 import TemplateError

import utils

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
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"}


REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


class BadRow(Exception):
    """Says why a row cannot be used."""


class Conversation(NamedTuple):
    """What a row comes to: messages for the chat template, or a text as it is, of which the end is learned."""

    messages: list | None = None  # with role and content; the assistant's are learned
    references: list | None = None  # accepted answers, if there are more than the last message
    tools: list | None = None  # handed to the template
    prompt: str | None = None  # without a template: no loss on it
    text: str | None = None  # without a template: learned


# -----------------------------------------------------------------------------
# forms: a function row -> Conversation each


def read_squad(row):
    """SQuAD rows; Rajpurkar et al. 2016 (arXiv:1606.05250), with unanswerable questions 2018 (arXiv:1806.03822)."""
    sample = {
        "context": text_of(row, "context", may_be_empty=True),
        "question": text_of(row, "question"),
        "answers": {"text": list_answers(row["answers"])},
    }
    asked = utils.convert_squad_sample_to_llama_conversation(sample)
    return Conversation(asked["prompt"] + asked["completion"], references=utils.list_answers(sample))


def list_answers(answers):
    """Return the accepted answers in any of the shapes that data sets have; [] if the question is unanswerable."""
    if isinstance(answers, str):
        answers = parsed_answers(answers)
    if isinstance(answers, dict):
        answers = answers.get("text", [])
    if answers is None:
        return []
    if not isinstance(answers, list):
        answers = [answers]
    texts = []
    for answer in answers:
        answer = answer.get("text") if isinstance(answer, dict) else answer
        if not isinstance(answer, str) or not answer.strip():
            raise BadRow("an answer is not a text, or empty")
        texts.append(answer)
    return texts


def parsed_answers(text):
    """Return answers that a csv file holds as text: JSON, or as Python writes them; any other text is the answer."""
    for parse in (json.loads, ast.literal_eval):
        try:
            found = parse(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        if isinstance(found, dict) or found == [] or isinstance(found, list) and isinstance(found[0], (str, dict)):
            return found
    if text.lstrip().startswith(("{'text'", '{"text"')):  # such as {'text': array(...)}
        raise BadRow("answers is a text that is not JSON")
    return text


def read_context_answer(row):
    """A question about a context with one answer; asked as SQuAD's."""
    sample = {
        "context": text_of(row, "context", may_be_empty=True),
        "question": text_of(row, "question"),
        "answers": {"text": [text_of(row, "answer")]},
    }
    asked = utils.convert_squad_sample_to_llama_conversation(sample)
    return Conversation(asked["prompt"] + asked["completion"])


def read_chat(row):
    """`messages` (OpenAI, TRL) or `conversations` (ShareGPT): a list, or the same as JSON text."""
    name = "messages" if row.get("messages") is not None else "conversations"
    messages = [read_message(message, name) for message in parsed_list(row.get(name), name)]
    while messages and messages[-1]["role"] != "assistant":  # a user's last words: nobody has answered them
        messages.pop()
    if not messages:
        raise BadRow(f"{name} has no message of the assistant")
    if not (messages[-1].get("content") or "").strip() and not messages[-1].get("tool_calls"):
        raise BadRow("the last message of the assistant is empty")
    tools = parsed(row.get("tools"))
    return Conversation(messages, tools=tools or None)


def read_message(message, name):
    """Return a message with role and content, from role/content or from/value."""
    if not isinstance(message, dict):
        raise BadRow(f"{name} is not a list of messages with role and content")
    role = message.get("role") or message.get("from")
    content = message.get("content") if "content" in message else message.get("value")
    if not isinstance(role, str) or not role.strip():
        raise BadRow(f"{name} is not a list of messages with role and content")
    if isinstance(content, list):  # parts of type text
        content = "".join(text_of_part(part) for part in content)
    if content is not None and not isinstance(content, str):
        raise BadRow("the content of a message is not a text")
    kept = {"role": ROLES.get(role.strip().lower(), role.strip().lower()), "content": content or ""}
    for extra in ("tool_calls", "tool_call_id", "name"):
        if message.get(extra) is not None:
            kept[extra] = message[extra]
    return kept


def text_of_part(part):
    if isinstance(part, dict) and isinstance(part.get("text"), str) and part.get("type", "text") == "text":
        return part["text"]
    raise BadRow("a message has a part that is not a text")


def read_alpaca(row):
    """Instruction, perhaps with an input: Alpaca (Taori et al. 2023), medical flashcards, CodeAlpaca, FinGPT."""
    instruction, more = text_of(row, "instruction"), row.get("input")
    answer = text_of(row, "output" if row.get("output") is not None else "response")
    return question_and_answer(join_texts(instruction, more, "input"), answer)


def read_dolly(row):
    """Instruction, context (may be empty) and response: Dolly 15k (Databricks 2023)."""
    return question_and_answer(
        join_texts(text_of(row, "instruction"), row.get("context"), "context"), text_of(row, "response")
    )


def read_pair(question, answer):
    """Return the reader of rows with a column for the question and one for the answer."""

    def read(row):
        return question_and_answer(text_of(row, question), text_of(row, answer))

    return read


def read_prompt_completion(row):
    """TRL's prompt and completion: two texts, as they are, or two lists of messages."""
    prompt, completion = parsed_messages(row.get("prompt")), parsed_messages(row.get("completion"))
    if isinstance(prompt, str) or isinstance(completion, str):  # then neither is a list of messages
        prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise BadRow("completion is empty")
        return Conversation(prompt=prompt, text=completion)
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise BadRow("prompt and completion are neither two texts nor two lists of messages")
    return read_chat({"messages": prompt + completion})


def read_text(row):
    """Plain text: the loss is on all of it."""
    return Conversation(prompt="", text=text_of(row, "text"))


def question_and_answer(question, answer):
    return Conversation([{"role": "user", "content": question}, {"role": "assistant", "content": answer}])


class Form(NamedTuple):
    name: str
    columns: tuple  # that rows must have; alternatives are separated by |
    read: object  # row -> Conversation
    optional: tuple = ()  # columns that are read if they are there


FORMS = [  # the first that fits the columns of the data set
    Form("chat", ("messages",), read_chat, ("tools",)),
    Form("chat", ("conversations",), read_chat, ("tools",)),
    Form("SQuAD", ("context", "question", "answers"), read_squad),
    Form("context and answer", ("context", "question", "answer"), read_context_answer),
    Form("Dolly", ("instruction", "context", "response"), read_dolly),
    Form("alpaca", ("instruction", "output"), read_alpaca, ("input",)),
    Form("alpaca", ("instruction", "response"), read_alpaca, ("input",)),
    Form("question and answer", ("question", "answer"), read_pair("question", "answer")),
    Form("question and answer", ("problem", "solution"), read_pair("problem", "solution")),
    Form("question and answer", ("query", "response"), read_pair("query", "response")),
    Form("prompt and completion", ("prompt", "completion"), read_prompt_completion),
    Form("question and answer", ("prompt", "response"), read_pair("prompt", "response")),
    Form("question and answer", ("input", "output"), read_pair("input", "output")),
    Form("text", ("text",), read_text),
]
PREFERENCES = {"chosen", "rejected"}  # columns of preference data


def find_form(columns):
    """Return the first of FORMS that rows with these columns have, None if there is none."""
    for form in FORMS:
        if set(form.columns) <= set(columns):
            return form
    return None


def describe_forms():
    return ", or ".join(dict.fromkeys(f"{', '.join(form.columns)} ({form.name})" for form in FORMS))


# -----------------------------------------------------------------------------
# pieces of rows


def parsed(value):
    """Return a value, parsed if it is a JSON text of a list or an object."""
    if isinstance(value, str) and value.strip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def parsed_list(value, name):
    value = parsed(value)
    if not isinstance(value, list) or not value:
        raise BadRow(f"{name} is not a list of messages with role and content")
    return value


def parsed_messages(value):
    """Return a list of messages that comes as JSON text; a text that is none stays a text."""
    found = parsed(value)
    if isinstance(found, list) and found and isinstance(found[0], dict) and {"role", "from"} & set(found[0]):
        return found
    return value


def text_of(row, name, may_be_empty=False):
    value = row.get(name)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        value = str(value)
    if value is None and may_be_empty:
        value = ""
    if not isinstance(value, str):
        raise BadRow(f"{name} is not a text")
    if not value.strip() and not may_be_empty:
        raise BadRow(f"{name} is empty")
    return value


def join_texts(first, second, name):
    """Return an instruction, followed by its input if it has one."""
    if second is None or second == "":
        return first
    if not isinstance(second, str):
        raise BadRow(f"{name} is not a text")
    return f"{first}\n\n{second}" if second.strip() else first


# -----------------------------------------------------------------------------
# tokens


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
    except REFUSALS as error:
        problem = f"the chat template or the tokenizer refuses it: {type(error).__name__}: {error}"
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
