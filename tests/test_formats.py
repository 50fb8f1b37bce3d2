"""The forms that rows come in: conversations, the tokens that carry loss, and what is wrong with a row."""

import datetime
import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

import utils
from fllama import files, formats, options, sources, tokenizing

DATA = Path(__file__).parent / "data"
SAMPLE = {"context": "Rx: aspirin 30 mg.", "question": "How much aspirin?", "answers": {"text": ["30 mg", "30"]}}
TALK = [
    {"role": "user", "content": "How much aspirin?"},
    {"role": "assistant", "content": "30 mg"},
    {"role": "user", "content": "And of what?"},
    {"role": "assistant", "content": "Of the white one."},
]
SYSTEM = {"role": "system", "content": "Be brief."}
NO_SYSTEM = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
# The structure of turns of well-known templates, and the special tokens that these need.
LLAMA_2 = """{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}
{%- else %}{% set rest = messages %}{% endif %}
{%- for m in rest %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must take turns') }}{% endif %}
{%- if m.role == 'user' %}
{{- '<s>[INST] ' + ('<<SYS>>' + messages[0].content + '<</SYS>>' if loop.first and rest != messages else '') }}
{{- m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content + ' </s>' }}{% endif %}{% endfor %}"""
LLAMA_31 = """{{ bos_token }}<|start_header_id|>system<|end_header_id|>

{% if strftime_now is defined %}Today: {{ strftime_now('%d %b %Y') }}{% endif %}
{% if messages[0].role == 'system' %}{{ messages[0].content }}{% set messages = messages[1:] %}{% endif %}<|eot_id|>
{%- for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
MISTRAL = """{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}
{%- else %}{% set rest = messages %}{% endif %}
{%- set asked = rest | selectattr('role', 'equalto', 'user') | list %}<s>
{%- for m in rest %}{% if m.role == 'user' %}
{%- if tools and m == asked[-1] %}{{ '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}[INST]
{%- if loop.last and rest != messages %} {{ messages[0].content + '\n\n' }}{% endif %} {{ m.content }}[/INST]
{%- else %} {{ m.content }}</s>{% endif %}{% endfor %}"""
GEMMA = """{{ bos_token }}{% if messages[0].role == 'system' %}SYSTEM{% endif %}{% for m in messages %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""
GEMMA_2 = GEMMA.replace("SYSTEM", "{{ raise_exception('System role not supported') }}")
GEMMA_3 = GEMMA.replace(
    "SYSTEM",
    "{% set first = messages[1] %}{% set joined = {'role': 'user', 'content': messages[0].content + first.content} %}"
    "{% set messages = [joined] + messages[2:] %}",
)
CHATML = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
QWEN_25 = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe good.<|im_end|>\n' }}{% endif %}" + CHATML
QWEN_3 = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{{- m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
PHI_35 = """{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""
IM, PHI = ["<|im_start|>", "<|im_end|>"], ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
TEMPLATES = {  # name: (template, its special tokens, the token that ends a turn)
    "Llama 2": (LLAMA_2, ["<s>", "</s>", "[INST]", "[/INST]"], "</s>"),
    "Llama 3.1": (LLAMA_31, [], "<|eot_id|>"),
    "Mistral": (MISTRAL, ["<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"], "</s>"),
    "Gemma 2": (GEMMA_2, ["<start_of_turn>", "<end_of_turn>"], "<end_of_turn>"),
    "Gemma 3": (GEMMA_3, ["<start_of_turn>", "<end_of_turn>"], "<end_of_turn>"),
    "Qwen 2.5": (QWEN_25, IM, "<|im_end|>"),
    "Qwen 3": (QWEN_3, IM, "<|im_end|>"),
    "Phi 3.5": (PHI_35, PHI, "<|end|>"),
    "ChatML": (CHATML, IM, "<|im_end|>"),
}


def make_tokenizer(template=None, special=()):
    made = AutoTokenizer.from_pretrained(options.EMBEDDED_MODEL)
    made.add_tokens(list(special), special_tokens=True)
    made.chat_template = template or made.chat_template
    return made


@pytest.fixture
def tokenizer():
    return make_tokenizer()


def tokenize(row, tokenizer, max_length=4096, **more):
    return tokenizing.tokenize_row(row, formats.find_form(row), tokenizer, max_length, **more)


def learned(tokens, tokenizer):
    """Return the stretches of a row that carry loss, as texts."""
    assert tokens["problem"] == ""
    assert tokens["length"] == len(tokens["input_ids"]) == len(tokens["labels"])
    assert tokens["answer_length"] == sum(label != -100 for label in tokens["labels"])
    stretches, before = [], -100
    for token, label in zip(tokens["input_ids"], tokens["labels"]):
        assert label in (-100, token)
        if label != -100:
            if before == -100:
                stretches.append([])
            stretches[-1].append(label)
        before = label
    return [tokenizer.decode(stretch).strip() for stretch in stretches]


def read_rows(name):
    rows = files.read_file(DATA / name)
    return [sources.row_of(row, {}) for row in rows]


# -----------------------------------------------------------------------------
# every form, by its file in tests/data


WHATS = [
    "a lamp",
    "two ropes",
    "1.5 kg of salt",
    "NA",
    "007",
    "a map",
    "green paint",
    "six cups",
    "an oar",
    "-5 degrees",
]
ONE_ANSWER = {
    "alpaca.jsonl": "alpaca",
    "code_alpaca.jsonl": "alpaca",
    "dolly.jsonl": "Dolly",
    "question_answer.jsonl": "question and answer",
    "problem_solution.jsonl": "question and answer",
    "query_response.jsonl": "question and answer",
    "prompt_response.jsonl": "question and answer",
    "input_output.jsonl": "question and answer",
    "prompt_completion.jsonl": "prompt and completion",
    "prompt_completion_messages.jsonl": "prompt and completion",
    "squad-v1.1.json": "SQuAD",
    "squad-v2.0.json": "SQuAD",
}


@pytest.mark.parametrize("name", list(ONE_ANSWER))
def test_rows_with_one_answer(tokenizer, name):
    """The answer and the token that ends it carry loss, and nothing else; the question and the context are there."""
    rows = read_rows(name)
    assert len(rows) == 10
    for number, (row, what) in enumerate(zip(rows, WHATS)):
        form = formats.find_form(row)
        assert form.name == ONE_ANSWER[name]
        tokens = tokenizing.tokenize_row(row, form, tokenizer, 4096)
        unanswerable = name == "squad-v2.0.json" and number == 9
        expected = "unanswerable" if unanswerable else what
        assert learned(tokens, tokenizer) == [expected + "<|eot_id|>"]
        assert {reference.strip() for reference in tokens["references"]} == {expected}
        shown = tokenizer.decode(tokens["input_ids"][: tokens["prompt_length"]])
        assert f"shelf {number}" in shown.lower() and "eot_id|>" + expected not in shown
        assert tokens["input_ids"].count(tokenizer.bos_token_id) == 1


def test_alpaca_with_and_without_input(tokenizer):
    """The input follows the instruction after an empty line; an empty one leaves nothing behind."""
    with_input, without = read_rows("alpaca.jsonl")[:2]
    assert tokenize(with_input, tokenizer)["question"] == f"{with_input['instruction']}\n\n{with_input['input']}"
    assert tokenize(without, tokenizer)["question"] == without["instruction"]
    assert tokenize(without | {"input": None}, tokenizer)["question"] == without["instruction"]
    without, with_context = read_rows("dolly.jsonl")[:2]
    assert (
        tokenize(with_context, tokenizer)["question"] == f"{with_context['instruction']}\n\n{with_context['context']}"
    )
    assert tokenize(without, tokenizer)["question"] == without["instruction"]


def test_squad_rows_with_every_shape_of_answers(tokenizer):
    rows = read_rows("squad.jsonl")
    found = [tokenize(row, tokenizer) for row in rows]
    expected = [*WHATS, "unanswerable", "unanswerable", "unanswerable"]
    assert [learned(tokens, tokenizer) for tokens in found] == [[what + "<|eot_id|>"] for what in expected]
    assert [tokens["references"] for tokens in found] == [[what] for what in expected]


@pytest.mark.parametrize("name", ["messages.jsonl", "sharegpt.jsonl", "chat_as_text.csv", "parts.jsonl"])
@pytest.mark.parametrize("learn", ["all", "last"])
def test_chats_in_every_writing(tokenizer, name, learn):
    """Every answer of the assistant carries loss, or the last; what a user says after it is left out."""
    rows = read_rows(name)
    assert len(rows) == 10
    for number, (row, what) in enumerate(zip(rows, WHATS)):
        tokens = tokenize(row, tokenizer, learn=learn)
        expected = [what, *[f"Keeper {number}."] * (number % 2)]
        if learn == "last":
            expected = expected[-1:]
        assert learned(tokens, tokenizer) == [answer + "<|eot_id|>" for answer in expected]
        text = tokenizer.decode(tokens["input_ids"])
        assert "Thank you" not in text and ("Be brief." in text) == (number % 3 == 0)
        assert tokens["references"] == [expected[-1]]


def test_tools_are_handed_to_the_template():
    """As a list or as JSON text; a call is learned as an answer is, what the tool says is not."""
    template = """{{ tools | tojson }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}
{%- for call in m.tool_calls or [] %}{{ '[call]' + call.function.name }}{% endfor %}<|im_end|>{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
    tokenizer = make_tokenizer(template, IM)
    for row, what in zip(read_rows("tools.jsonl"), WHATS):
        tokens = tokenize(row, tokenizer)
        assert learned(tokens, tokenizer) == ["[call]look_at_shelf<|im_end|>", what + "<|im_end|>"]
        assert '"name": "look_at_shelf"' in tokenizer.decode(tokens["input_ids"])


def test_plain_text_is_learned_as_a_whole(tokenizer):
    for row in read_rows("text.jsonl"):
        tokens = tokenize(row, tokenizer)
        assert tokens["labels"] == tokens["input_ids"] and tokens["prompt_length"] == 0
        end = tokenizer.decode([tokenizer.eos_token_id])
        assert learned(tokens, tokenizer)[0].removeprefix(tokenizer.bos_token) == row["text"] + end


def test_columns_under_other_names(tokenizer):
    """As --columns names them; the others are not read."""
    rows = files.read_file(DATA / "odd_columns.jsonl")
    renamed = {"context": "Notiz", "question": "Frage", "answer": "Antwort"}
    for row, what in zip(rows, WHATS):
        row = sources.row_of(row, renamed)
        assert set(row) == set(renamed)
        tokens = tokenize(row, tokenizer)
        assert learned(tokens, tokenizer) == [what + "<|eot_id|>"]
        text = tokenizer.decode(tokens["input_ids"])
        assert row["context"] in text and row["question"] in text and "private words" not in text


def test_texts_that_look_like_messages_stay_texts(tokenizer):
    row = {"prompt": "List the lamps as JSON.", "completion": '[{"name": "a lamp"}]'}
    assert learned(tokenize(row, tokenizer), tokenizer)[0].startswith('[{"name": "a lamp"}]')
    row = {"context": "a", "question": "b", "answers": "[1]"}
    assert tokenize(row, tokenizer)["references"] == ["[1]"]


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        (["id", "context", "question", "answers"], "SQuAD"),
        (["instruction", "input", "output", "text"], "alpaca"),
        (["instruction", "context", "response", "category"], "Dolly"),
        (["problem", "solution", "messages"], "chat"),
        (["question", "answer", "context"], "context and answer"),
        (["context", "question"], None),
        (["prompt", "chosen", "rejected"], None),
    ],
)
def test_first_form_that_fits(columns, name):
    form = formats.find_form(columns)
    assert (form and form.name) == name
    assert "instruction, output (alpaca)" in formats.describe_forms()


# -----------------------------------------------------------------------------
# chat templates


@pytest.mark.parametrize("name", list(TEMPLATES))
@pytest.mark.parametrize("with_system", [False, True])
def test_every_turn_is_learned_up_to_its_end(name, with_system):
    template, special, end = TEMPLATES[name]
    tokenizer = make_tokenizer(template, special)
    row = {"messages": [SYSTEM] * with_system + TALK}
    tokens = tokenize(row, tokenizer)
    first, second = "30 mg" + end, "Of the white one." + end
    if name == "Llama 2":  # its template has a space before the end
        first, second = f"30 mg {end}", f"Of the white one. {end}"
    if name == "Qwen 3":  # empty thinking, in the last turn only
        second = "<think>\n\n</think>\n\n" + second
    assert learned(tokens, tokenizer) == [first, second]
    assert tokenizer.decode([tokenizing.end_of_turn(tokenizer)]) == end
    assert tokens["labels"][-1] == tokenizer.convert_tokens_to_ids(end)
    text = tokenizer.decode(tokens["input_ids"])
    assert text.count("How much aspirin?") == text.count("And of what?") == 1
    assert text.count("Be brief.") == with_system
    assert learned(tokenize(row, tokenizer, learn="last"), tokenizer) == [second]
    user_last = {"messages": [*row["messages"], {"role": "user", "content": "bye"}]}
    assert tokenize(user_last, tokenizer)["input_ids"] == tokens["input_ids"]
    asked = row["messages"][:-1]
    if with_system and not tokenizing.keeps_system(tokenizer):
        asked = utils.fold_system(asked)
    shown = tokenizer.apply_chat_template(asked, add_generation_prompt=True)["input_ids"]
    assert tokens["input_ids"][: tokens["prompt_length"]] == shown


def test_mistral_moves_its_tools(tokenizer):
    """They stand before the last question, so that the first answer is asked for otherwise: no question is learned."""
    template, special, end = TEMPLATES["Mistral"]
    tokenizer = make_tokenizer(template, special)
    tools = [{"type": "function", "function": {"name": "look_at_shelf", "parameters": {}}}]
    assert learned(tokenize({"messages": TALK, "tools": tools}, tokenizer), tokenizer) == [
        "30 mg" + end, "Of the white one." + end,
    ]  # fmt: skip


def test_the_day_is_that_of_the_start():
    tokenizer = make_tokenizer(LLAMA_31)
    day = datetime.datetime(2024, 2, 29, 23, 59)
    tokens = tokenize({"messages": TALK}, tokenizer, date=day)
    assert "Today: 29 Feb 2024" in tokenizer.decode(tokens["input_ids"])
    assert tokenize({"messages": TALK}, tokenizer, date=day) == tokens
    assert tokenize({"messages": TALK}, tokenizer, date=datetime.datetime(2025, 1, 1)) != tokens


def test_a_chat_that_the_assistant_begins(tokenizer):
    """Its header and the token that begins the text are not learned."""
    row = {"messages": [{"role": "assistant", "content": "Hello, I am here."}, *TALK]}
    found = learned(tokenize(row, tokenizer), tokenizer)
    assert found == [f"{text}<|eot_id|>" for text in ("Hello, I am here.", "30 mg", "Of the white one.")]


def test_an_answer_that_holds_the_end_of_a_turn_as_text(tokenizer):
    talk = [TALK[0], {"role": "assistant", "content": "It is <|eot_id|> that ends it."}, *TALK[2:]]
    found = learned(tokenize({"messages": talk}, tokenizer), tokenizer)
    assert found[0].replace(" ", "") == "Itis<|eot_id|>thatendsit.<|eot_id|>"
    assert found[1] == "Of the white one.<|eot_id|>"


def test_a_template_without_an_end_of_turn():
    """The next question is not learned, although no token says where the answer ends."""
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    tokenizer = make_tokenizer(template)
    assert tokenizing.end_of_turn(tokenizer) is None
    assert learned(tokenize({"messages": TALK}, tokenizer), tokenizer) == ["30 mg", "Of the white one."]


def test_the_end_of_turn_need_not_be_the_end_of_text():
    tokenizer = make_tokenizer(CHATML, IM)
    assert tokenizer.eos_token == "<|eot_id|>"
    assert tokenizing.end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer = make_tokenizer(CHATML)
    tokenizer.add_tokens(IM)  # not marked as special
    assert tokenizing.end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    assert tokenizing.end_of_turn(tokenizer) == tokenizer.eos_token_id


# -----------------------------------------------------------------------------
# SQuAD's prompt, and templates without a system role


def test_conversation_of_a_squad_row(tokenizer):
    conversation = utils.convert_squad_sample_to_llama_conversation(SAMPLE, tokenizer)
    assert [message["role"] for message in conversation["prompt"]] == ["system", "user"]
    assert conversation["prompt"][0]["content"].endswith("Rx: aspirin 30 mg.")
    assert conversation["prompt"][1]["content"] == "How much aspirin?"
    assert conversation["completion"] == [{"role": "assistant", "content": "30 mg"}]


def test_template_without_a_system_role():
    tokenizer = make_tokenizer(NO_SYSTEM)
    conversation = utils.convert_squad_sample_to_llama_conversation(SAMPLE, tokenizer)
    assert [message["role"] for message in conversation["prompt"]] == ["user"]
    assert "Rx: aspirin 30 mg." in conversation["prompt"][0]["content"]
    assert conversation["prompt"][0]["content"].endswith("How much aspirin?")
    for row in (SAMPLE, {"messages": [SYSTEM, *TALK[:2]]}):
        tokens = tokenize(row, tokenizer)
        assert learned(tokens, tokenizer) == ["30 mg<|eot_id|>"]
        text = tokenizer.decode(tokens["input_ids"])
        assert text.count("[user]") == 1 and ("Be brief.\n\nHow much" in text or "Rx: aspirin" in text)


def test_template_that_drops_the_system_message():
    tokenizer = make_tokenizer(NO_SYSTEM.replace("{{ raise_exception('no system') }}", "{% continue %}"))
    assert len(utils.convert_squad_sample_to_llama_conversation(SAMPLE, tokenizer)["prompt"]) == 1
    assert "Rx: aspirin" in tokenizer.decode(tokenize(SAMPLE, tokenizer)["input_ids"])


@pytest.mark.parametrize("template", [None, NO_SYSTEM])
def test_loss_on_the_answer_only(template):
    tokenizer = make_tokenizer(template)
    row = tokenize(SAMPLE, tokenizer, 512)
    assert row["input_ids"].count(tokenizer.bos_token_id) == 1
    assert learned(row, tokenizer) == ["30 mg<|eot_id|>"] and row["labels"][-1] == tokenizer.eos_token_id
    assert row["references"] == ["30 mg", "30"] and row["question"].endswith("How much aspirin?")


def test_prompt_is_what_the_model_sees_when_it_answers(tokenizer):
    row = tokenize(SAMPLE, tokenizer, 512)
    prompt = utils.convert_squad_sample_to_llama_conversation(SAMPLE, tokenizer)["prompt"]
    shown = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
    assert row["input_ids"][: row["labels"].count(-100)] == shown


def test_truncation_is_marked(tokenizer):
    whole = tokenize(SAMPLE, tokenizer, 512)
    cut = tokenize(SAMPLE, tokenizer, whole["length"] - 1)
    assert not whole["truncated"] and cut["truncated"]
    assert cut["answer_length"] == whole["answer_length"] - 1 and cut["length"] == len(cut["labels"])
    assert tokenize(SAMPLE, tokenizer, 5)["answer_length"] == 0


def test_a_chat_whose_last_answer_is_cut_off_asks_for_the_one_before(tokenizer):
    whole = tokenize({"messages": TALK}, tokenizer)
    cut = tokenize({"messages": TALK}, tokenizer, whole["prompt_length"])
    assert cut["truncated"] and learned(cut, tokenizer) == ["30 mg<|eot_id|>"]
    assert cut["references"] == ["30 mg"] and cut["question"] == "How much aspirin?"
    asked = tokenizer.apply_chat_template(TALK[:1], add_generation_prompt=True)["input_ids"]
    assert cut["input_ids"][: cut["prompt_length"]] == asked


def test_common_prefix():
    assert tokenizing.common_prefix([1, 2, 3], [1, 2, 4, 5]) == 2
    assert tokenizing.common_prefix([1, 2], [1, 2, 3]) == tokenizing.common_prefix([1, 2, 3], [1, 2]) == 2
    assert tokenizing.common_prefix([], [1]) == 0


# -----------------------------------------------------------------------------
# what is wrong with a row

NO_MESSAGES = "is not a list of messages with role and content"
ASKED = {"role": "user", "content": "How much?"}


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (SAMPLE | {"context": None}, ""),
        (SAMPLE | {"context": ["a"]}, "context is not a text"),
        (SAMPLE | {"question": " "}, "question is empty"),
        (SAMPLE | {"question": float("nan")}, "question is not a text"),
        (SAMPLE | {"answers": None}, "answers has no list of texts"),
        (SAMPLE | {"answers": 7}, "an answer is not a text, or empty"),
        (SAMPLE | {"answers": ""}, "an answer is not a text, or empty"),
        (SAMPLE | {"answers": {"text": [""]}}, "an answer is not a text, or empty"),
        (SAMPLE | {"answers": "{'text': array(['30 mg'], dtype=object)}"}, "answers is a text that is not JSON"),
        (
            SAMPLE | {"answers": ["30 mg", "\ud800"]},
            "the chat template or the tokenizer refuses it: UnicodeEncodeError",
        ),
        ({"messages": "hello"}, f"messages {NO_MESSAGES}"),
        ({"messages": "[{broken"}, f"messages {NO_MESSAGES}"),
        ({"messages": []}, f"messages {NO_MESSAGES}"),
        ({"messages": ["hello"]}, f"messages {NO_MESSAGES}"),
        ({"messages": [{"content": "hello"}]}, f"messages {NO_MESSAGES}"),
        ({"conversations": None}, f"conversations {NO_MESSAGES}"),
        ({"messages": [ASKED]}, "messages has no message of the assistant"),
        ({"conversations": [{"from": "human", "value": "a"}]}, "conversations has no message of the assistant"),
        ({"messages": [ASKED, {"role": "assistant", "content": " "}]}, "the last message of the assistant is empty"),
        ({"messages": [ASKED, {"role": "assistant", "content": 7}]}, "the content of a message is not a text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "a"}]},
            "a message has a part that is not a text",
        ),
        ({"messages": [{"role": "tool", "content": None}, {"role": "assistant", "content": "a"}]}, ""),
        ({"prompt": 3, "completion": "b"}, "prompt and completion are neither two texts nor two lists of messages"),
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        (
            {"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]},
            "prompt and completion are neither two texts nor two lists of messages",
        ),
        ({"instruction": "", "output": "b"}, "instruction is empty"),
        ({"instruction": "a", "input": 3, "output": "b"}, "input is not a text"),
        ({"instruction": "a", "output": None}, "response is not a text"),
        ({"question": "a", "answer": True}, "answer is not a text"),
        ({"question": "a", "answer": 7}, ""),
        ({"text": " "}, "text is empty"),
    ],
)
def test_problems_of_rows(tokenizer, row, problem):
    tokens = tokenize(row, tokenizer, 512)
    assert tokens["problem"].startswith(problem) and bool(tokens["problem"]) == bool(problem)
    assert set(tokens) == set(tokenizing.TOKENIZED)
    if problem:
        assert tokens["input_ids"] == tokens["labels"] == []


def test_a_row_that_the_template_refuses():
    """The useful half of what it says is kept."""
    tokenizer = make_tokenizer(TEMPLATES["Llama 2"][0], TEMPLATES["Llama 2"][1])
    tokens = tokenize({"messages": [TALK[1], *TALK]}, tokenizer)
    assert "the chat template refuses it: roles must take turns" in tokens["problem"]
    assert set(tokens) == set(tokenizing.TOKENIZED)


def test_numbers_in_json_are_words(tokenizer):
    rows = [json.loads('{"question": "How many?", "answer": 7}'), {"question": 7, "answer": 1.5}]
    assert [learned(tokenize(row, tokenizer), tokenizer) for row in rows] == [["7<|eot_id|>"], ["1.5<|eot_id|>"]]
