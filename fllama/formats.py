"""The forms that rows come in, each turned into a conversation, and conversations into tokens that carry loss."""

import ast
import json
import math
from typing import NamedTuple

import utils

ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant", "bot": "assistant"}


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
        answers = [] if answers.get("text") is None else answers["text"]
    if answers is None:
        raise BadRow("answers has no list of texts")
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
