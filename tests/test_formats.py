"""The forms that rows come in: conversations, tokens, where the loss is, and what is wrong with a row."""

import pytest
from transformers import AutoTokenizer

import utils
from fllama import formats, options

SAMPLE = {"context": "Rx: aspirin 30 mg.", "question": "How much aspirin?", "answers": {"text": ["30 mg", "30"]}}
CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|eot_id|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(options.EMBEDDED_MODEL)


# -----------------------------------------------------------------------------
# conversations


def test_conversation_of_a_squad_row(tokenizer):
    conversation = utils.convert_squad_sample_to_llama_conversation(SAMPLE, tokenizer)
    assert [message["role"] for message in conversation["prompt"]] == ["system", "user"]
    assert conversation["prompt"][0]["content"].endswith("Rx: aspirin 30 mg.")
    assert conversation["prompt"][1]["content"] == "How much aspirin?"
    assert conversation["completion"] == [{"role": "assistant", "content": "30 mg"}]


@pytest.mark.parametrize("answers", [{"text": ["30 mg"]}, [{"text": "30 mg"}]])
def test_both_forms_of_answers(answers):
    assert utils.list_answers(SAMPLE | {"answers": answers}) == ["30 mg"]


@pytest.mark.parametrize("answers", [{"text": []}, []])
def test_no_answer_means_unanswerable(answers):
    assert utils.list_answers(SAMPLE | {"answers": answers}) == ["unanswerable"]


def test_template_without_a_system_role(tokenizer):
    tokenizer.chat_template = NO_SYSTEM
    conversation = utils.convert_squad_sample_to_llama_conversation(SAMPLE, tokenizer)
    assert [message["role"] for message in conversation["prompt"]] == ["user"]
    assert "Rx: aspirin 30 mg." in conversation["prompt"][0]["content"]
    assert conversation["prompt"][0]["content"].endswith("How much aspirin?")


def test_template_that_drops_the_system_message(tokenizer):
    tokenizer.chat_template = NO_SYSTEM.replace("{{ raise_exception('no system') }}", "{% continue %}")
    assert len(utils.convert_squad_sample_to_llama_conversation(SAMPLE, tokenizer)["prompt"]) == 1


# -----------------------------------------------------------------------------
# tokens


@pytest.mark.parametrize("template", [None, CHATML, NO_SYSTEM])
def test_loss_on_the_answer_only(tokenizer, template):
    tokenizer.chat_template = template or tokenizer.chat_template
    row = formats.tokenize_row(SAMPLE, tokenizer, 512)
    assert row["input_ids"].count(tokenizer.bos_token_id) == (0 if template == CHATML else 1)
    assert tokenizer.decode([label for label in row["labels"] if label != -100]).lstrip() == "30 mg<|eot_id|>"
    assert row["labels"][-1] == tokenizer.eos_token_id
    assert row["length"] == len(row["input_ids"]) == len(row["labels"])
    assert row["answer_length"] == sum(label != -100 for label in row["labels"])
    assert row["references"] == ["30 mg", "30"] and row["problem"] == ""
    assert row["question"].endswith("How much aspirin?")


def test_prompt_is_what_the_model_sees_when_it_answers(tokenizer):
    row = formats.tokenize_row(SAMPLE, tokenizer, 512)
    prompt = utils.convert_squad_sample_to_llama_conversation(SAMPLE, tokenizer)["prompt"]
    shown = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
    assert row["input_ids"][: row["labels"].count(-100)] == shown


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "How much?"}, {"role": "assistant", "content": "30 mg"}]},
        {"prompt": "How much?", "completion": " 30 mg"},
        {
            "prompt": [{"role": "user", "content": "How much?"}],
            "completion": [{"role": "assistant", "content": "30 mg"}],
        },
    ],
)
def test_other_forms_of_rows(tokenizer, row):
    tokens = formats.tokenize_row(row, tokenizer, 512)
    assert tokens["input_ids"].count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode([label for label in tokens["labels"] if label != -100]).strip() == "30 mg<|eot_id|>"
    assert [reference.strip() for reference in tokens["references"]] == ["30 mg"]
    assert tokens["question"] == "How much?"


def test_truncation_is_marked(tokenizer):
    whole = formats.tokenize_row(SAMPLE, tokenizer, 512)
    cut = formats.tokenize_row(SAMPLE, tokenizer, whole["length"] - 1)
    assert not whole["truncated"] and cut["truncated"]
    assert cut["answer_length"] == whole["answer_length"] - 1 and cut["length"] == len(cut["labels"])
    assert formats.tokenize_row(SAMPLE, tokenizer, 5)["answer_length"] == 0


def test_common_prefix():
    assert formats.common_prefix([1, 2, 3], [1, 2, 4, 5]) == 2
    assert formats.common_prefix([1, 2], [1, 2, 3]) == formats.common_prefix([1, 2, 3], [1, 2]) == 2
    assert formats.common_prefix([], [1]) == 0


# -----------------------------------------------------------------------------
# what is wrong with a row


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (SAMPLE, ""),
        (SAMPLE | {"context": None}, "context is not a text"),
        (SAMPLE | {"question": " "}, "question is not a text, or empty"),
        (SAMPLE | {"answers": "30 mg"}, "answers has no list of texts"),
        (SAMPLE | {"answers": None}, "answers has no list of texts"),
        (SAMPLE | {"answers": {"text": [""]}}, "an answer is not a text, or empty"),
        ({"messages": "hello"}, "messages is not a list of messages with role and content"),
        ({"messages": []}, "messages is not a list of messages with role and content"),
        ({"messages": [{"role": "user", "content": ""}]}, "the last message is empty"),
        ({"messages": [{"role": "tool", "content": None}, {"role": "assistant", "content": "a"}]}, ""),
        ({"prompt": 3, "completion": "b"}, "prompt is neither a text nor a list of messages"),
        ({"prompt": "a", "completion": ""}, "completion is neither a text nor a list of messages, or empty"),
        (
            {"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]},
            "prompt and completion are of two kinds",
        ),
    ],
)
def test_problems_of_rows(tokenizer, row, problem):
    assert formats.find_problem(row) == problem
    if problem:
        tokens = formats.tokenize_row(row, tokenizer, 512)
        assert tokens["problem"] == problem and tokens["input_ids"] == tokens["labels"] == []


def test_a_row_that_the_template_refuses(tokenizer):
    tokenizer.chat_template = NO_SYSTEM
    row = {"messages": [{"role": "system", "content": "a"}, {"role": "assistant", "content": "b"}]}
    tokens = formats.tokenize_row(row, tokenizer, 512)
    assert tokens["problem"] == "the chat template or the tokenizer refuses it: TemplateError"
    assert set(tokens) == set(formats.TOKENIZED)


def test_columns_that_can_be_read():
    assert formats.is_readable(["id", "context", "question", "answers"]) and formats.is_readable(["messages"])
    assert not formats.is_readable(["context", "question"]) and not formats.is_readable(["prompt", "text"])
