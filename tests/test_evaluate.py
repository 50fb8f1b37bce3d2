"""Scores of answers: what counts as right, where answers end, what is cut, and which score is the headline."""

import random
from types import SimpleNamespace

import datasets
import pytest
import torch
from conftest import make_trainer
from torchmetrics.text import SQuAD
from transformers import AutoTokenizer

import main
from fllama import evaluate, options


def scores_of(text, *accepted):
    return evaluate.score([evaluate.Answered(text, list(accepted), False)])


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        ("15 mg", "1.5 mg"),
        ("5", "-5"),
        ("35", "3.5"),
        ("", "A"),
        ("-", "+"),
        ("AB+", "AB-"),
        ("blood group A+", "blood group A-"),
        ("group A", "group"),
        ("hepatitis A virus", "hepatitis virus"),
        ("HIV-", "HIV"),
        ("C", "C++"),
        ("5", "5%"),
        ("<5", "5"),
        ("1/2", "12"),
        ("10-20", "1020"),
        ("the", ""),
        ("?", "!"),
    ],
)
def test_numbers_signs_and_letters_count(text, accepted):
    """Wrong either way round, in exact match and not wholly right in F1; many are right by SQuAD's own script."""
    for one, other in ((text, accepted), (accepted, text)):
        scores = scores_of(one, other)
        assert scores["exact_match"] == 0 and scores["f1"] < 100


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        ("The dog.", "dog"),
        ("a dog", "Dog"),
        ("A dog", "dog"),
        ("(B)", "b"),
        ("A.", "A"),
        ("a", "A"),
        ("U.S.", "us"),
        ("well-known", "wellknown"),
        ("30 mg.", "30 mg"),
        ('"30 mg".', "30 mg"),
        ("**30 mg**", "30 mg"),
        ("don\u2019t", "don't"),
        ("-5", "-5."),
        ("", ""),
    ],
)
def test_words_are_compared_without_case_punctuation_and_articles(text, accepted):
    scores = scores_of(text, accepted)
    assert scores["exact_match"] == scores["f1"] == 100


def test_the_figures_of_squad_stand_beside():
    scores = scores_of("15 mg", "1.5 mg")
    assert scores["squad_exact_match"] == 100 and scores["exact_match"] == 0


def test_words_score_as_torchmetrics_says():
    """Without numbers, signs and single letters, it is SQuAD's own score."""
    words = "The an red, dog; CAT (tree) sees. don't U.S. well-known green".split()
    rng, metric, answers = random.Random(1), SQuAD(), []
    for number in range(200):
        text, *accepted = (" ".join(rng.choices(words, k=rng.randint(1, 5))) for _ in range(3))
        answers.append(evaluate.Answered(text, accepted, False))
        target = {"answers": {"text": accepted, "answer_start": [0, 0]}, "id": str(number)}
        metric.update([{"prediction_text": text, "id": str(number)}], [target])
    answers = [each for each in answers if all(set(evaluate.normalize(t)) - {"the", "an"} for t in each.accepted)]
    ours = evaluate.score(answers)
    assert ours["exact_match"] == pytest.approx(ours["squad_exact_match"], abs=0.01) and ours["exact_match"] > 0
    assert ours["f1"] == pytest.approx(ours["squad_f1"], abs=0.01)


def test_the_best_accepted_answer_counts():
    assert scores_of("30", "30 mg", "30")["exact_match"] == 100
    assert scores_of("30 mg daily", "30 mg")["f1"] == pytest.approx(80)  # precision 2/3, recall 1


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("6 times 7 is 42. #### 42", True),
        ("#### 42.", True),
        ("42", True),
        ("#### 4.2", False),
        ("#### -42", False),
        ("It is 42", False),
    ],
)
def test_gsm8k(text, right):
    """What follows #### is compared; 1,000 is 1000, as in its own script."""
    assert (scores_of(text, "6 x 7 = 42\n#### 42")["exact_match"] == 100) == right
    assert scores_of("so #### 1,000", "... #### 1000")["exact_match"] == 100
    assert scores_of("so #### 1,5", "... #### 15")["exact_match"] == 0


def test_rouge_by_hand():
    """The longest common subsequence has 3 of 4 and 3 of 5 words; letters of other scripts count."""
    scores = scores_of("the lamp is green", "the lamp was not green")
    assert scores["rouge_l"] == pytest.approx(100 * 2 * (3 / 4) * (3 / 5) / (3 / 4 + 3 / 5), abs=0.01)
    assert scores_of("\u7eff\u706f", "\u7eff\u706f")["rouge_l"] == 100
    assert scores_of("gr\u00f6\u00dfer", "gr er")["rouge_l"] == 0


def test_no_answers_have_no_score():
    scores = evaluate.score([])
    assert scores["exact_match"] is scores["f1"] is scores["rouge_l"] is None and scores["cut"] == 0


# -----------------------------------------------------------------------------
# answers


@pytest.fixture
def tokenizer():
    made = AutoTokenizer.from_pretrained(options.EMBEDDED_MODEL)
    made.pad_token = made.pad_token or made.eos_token
    return made


class Recorded:
    """A model that answers what it was told to, whatever it is asked."""

    def __init__(self, answers, eos=None):
        self.answers, self.device = answers, "cpu"
        self.generation_config = SimpleNamespace(eos_token_id=eos)

    def eval(self):
        pass

    def generate(self, input_ids, attention_mask, generation_config):
        self.asked = generation_config
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(ids) for ids in self.answers], batch_first=True, padding_value=generation_config.pad_token_id
        )
        return torch.cat([input_ids, ids[:, : generation_config.max_new_tokens]], dim=1)


def answer(tokenizer, texts, limit=50, eos=None):
    model = Recorded([tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts], eos)
    rows = [{"input_ids": [7, 8, 9], "prompt_length": 2, "references": ["x"]} for _ in texts]
    return model, evaluate.answer(model, tokenizer, datasets.Dataset.from_list(rows), len(texts), limit)


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ("30 mg<|eot_id|>", "30 mg"),
        ("<think>\n\n</think>\n\n30 mg<|eot_id|>", "30 mg"),
        ("<think>Is it 20?\nNo.</think>30 mg<|eot_id|>", "30 mg"),
        ("<think>Is it 20? Or", ""),
        ("was it 20? No.</think>\n\n30 mg<|eot_id|>", "30 mg"),  # begun in the prompt
        ("30 mg<|eot_id|>20 mg", "30 mg"),
    ],
)
def test_thinking_is_cut_off(tokenizer, said, text):
    assert answer(tokenizer, [said])[1][0].text == text


def test_thinking_between_special_tokens_is_cut_off(tokenizer):
    """Those that decoding would leave out, with the thinking left in."""
    tokenizer.add_tokens(["<think>", "</think>"], special_tokens=True)
    assert answer(tokenizer, ["<think>Is it 20?</think>30 mg<|eot_id|>"])[1][0].text == "30 mg"


def test_answers_end_where_the_template_ends_turns(tokenizer):
    """Whatever the tokenizer's eos is, and whether or not the token is marked as special."""
    tokenizer.add_tokens(["<|im_end|>"])
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ':' + m.content + '<|im_end|>' }}{% endfor %}"
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model, answers = answer(tokenizer, ["30 mg<|im_end|>user: more", "20 mg<|eot_id|>"], eos=1)
    assert [each.text for each in answers] == ["30 mg", "20 mg"] and not any(each.cut for each in answers)
    assert model.asked.eos_token_id == sorted({1, tokenizer.eos_token_id, end})
    assert evaluate.stop_tokens(Recorded([], [1, 2]), tokenizer) == sorted({1, 2, tokenizer.eos_token_id, end})


def test_answers_that_are_cut_are_counted(tokenizer):
    _, answers = answer(tokenizer, ["a green lamp and many more words", "yes<|eot_id|>"], limit=3)
    assert [each.cut for each in answers] == [True, False]
    assert evaluate.score(answers)["cut"] == 1


def questions(tokenizer, *references, more=0):
    rows = []
    for accepted in references:
        length = max(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in accepted)
        rows.append({"references": list(accepted), "prompt_length": 4, "length": 4 + length + more})
    return datasets.Dataset.from_list(rows)


def test_answers_may_be_as_long_as_the_accepted_ones(tokenizer):
    args = main.parse_args([])
    asked = questions(tokenizer, ["no"], ["no", "green " * 60])
    longest = len(tokenizer("green " * 60, add_special_tokens=False)["input_ids"])
    assert longest <= evaluate.answer_limit(args, tokenizer, asked) <= longest + 3
    assert evaluate.answer_limit(args, tokenizer, questions(tokenizer, ["green " * 900])) == evaluate.LONGEST_ANSWER
    thinking = questions(tokenizer, ["no"], more=40)  # what the template writes before the answer
    assert evaluate.answer_limit(args, tokenizer, thinking) >= 41
    args.max_new_tokens = 7
    assert evaluate.answer_limit(args, tokenizer, asked) == 7


def test_headline(tokenizer):
    """Exact match for short answers; for long ones and for plain texts it says little."""
    long = "green " * 60
    assert evaluate.headline(tokenizer, questions(tokenizer, ["no"], ["yes"], [long])) == ["exact_match", "f1"]
    assert evaluate.headline(tokenizer, questions(tokenizer, ["no"], [long], [long])) == [
        "token_accuracy", "rouge_l", "perplexity",
    ]  # fmt: skip
    assert evaluate.headline(tokenizer, questions(tokenizer, [f"{long} #### 42"])) == ["exact_match", "f1"]
    assert evaluate.headline(tokenizer, {"references": []}) == ["perplexity", "token_accuracy"]


def test_losses_are_added_over_tokens():
    both = evaluate.add_losses([evaluate.Loss(2.0, 4, 1), evaluate.Loss(6.0, 12, 7)])
    assert both == (8.0, 16, 8) and both.mean() == 0.5
    assert evaluate.describe_loss(both) == {"perplexity": 1.6487, "token_accuracy": 50.0}


def test_sums_of_rows():
    """Padded rows, and rows that lie one after the other, of which the last token has no next one."""
    padded = torch.tensor([[1.0, 2.0, 0.0], [3.0, 4.0, 5.0]])
    assert evaluate.sums_of_rows(padded, [2, 3]).tolist() == [3, 12]
    assert evaluate.sums_of_rows(torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]]), [2, 4]).tolist() == [3, 12]
    assert evaluate.sums_of_rows(torch.tensor([[True, False, True]]), [1, 3]).tolist() == [1, 1]


def test_a_rank_may_have_no_rows(tmp_path):
    """Where there are fewer held-out rows than ranks."""
    rows = datasets.Dataset.from_dict({"input_ids": [[5, 6]], "labels": [[-100, 6]], "length": [2]})
    _, trainer = make_trainer(tmp_path, rows=rows)
    assert evaluate.evaluate(trainer, rows.select([])) == (0, 0, 0)


def test_scores_of_rows():
    """A row that asks nothing has no answer, and neither have those behind the last question that was asked."""
    rows = {"prompt_length": [1, 0, 1, 1]}
    losses = [evaluate.Loss(0.5, 2, 1)] * 3 + [evaluate.Loss(1.0, 4, 4)]
    answers = [evaluate.Answered("red", ["red"], False), evaluate.Answered("x", ["red cat"], False)]
    table = evaluate.scores_of_rows(rows, [7, 3, 5, 9], losses, answers)
    assert table["row"] == [7, 3, 5, 9] and table["exact_match"] == [1, None, 0, None] == table["f1"]
    assert table["nats"] == [0.5, 0.5, 0.5, 1] and table["tokens"] == [2, 2, 2, 4] and table["correct"] == [1, 1, 1, 4]


def test_losses_of_each_row_are_in_the_order_of_the_rows(tmp_path):
    """They are evaluated by their length; those of a row alone are the same."""
    ids = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14, 15], [16, 17, 18, 19]]
    labels = [[-100, *row[1:]] for row in ids]
    rows = datasets.Dataset.from_dict({"input_ids": ids, "labels": labels, "length": [len(row) for row in ids]})
    _, trainer = make_trainer(tmp_path, "--per_device_train_batch_size", "1", rows=rows)
    loss, losses = evaluate.evaluate_each(trainer, rows)
    assert [each.tokens for each in losses] == [2, 5, 1, 3] and loss.tokens == 11
    assert sum(each.nats for each in losses) == pytest.approx(loss.nats, rel=1e-5)
    for number, each in enumerate(losses):
        assert evaluate.evaluate(trainer, rows.select([number])).nats == pytest.approx(each.nats, rel=1e-4)
