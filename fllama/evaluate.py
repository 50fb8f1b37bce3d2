"""Scores of a model: held-out loss, answers, exact match and F1; ROUGE-L and token accuracy for long answers."""

import collections
import re
import statistics
import unicodedata
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchmetrics.functional.text.rouge import rouge_score
from torchmetrics.text import SQuAD
from transformers import GenerationConfig

from fllama import data as client_data
from fllama.tokenizing import end_of_turn

LONGEST_ANSWER = 256  # tokens, unless --max_new_tokens says otherwise
LONG_ANSWERS = 32  # tokens: where the median accepted answer is longer, exact match says little
THINKING = re.compile(r"<think>.*?(</think>|\Z)", re.DOTALL)
OPENING, CLOSING = "\"'([{“‘«*_`", "\"')]}”’»*_`.,;:!?…"  # around words
SIGNS = set("+-<>=±≤≥−%#$€£°")  # that count in words; - only at either end


class Loss(NamedTuple):
    """The loss on the learned tokens of some rows."""

    nats: float  # the sum
    tokens: int
    correct: int  # tokens that were the most likely ones, given those before

    def mean(self):
        """Return the loss in nats per token."""
        return self.nats / self.tokens


def add_losses(losses):
    return Loss(*(sum(values) for values in zip(*losses)))


def evaluate(trainer, rows):
    """Return the Loss of `rows`."""
    return evaluate_each(trainer, rows)[0]


@torch.no_grad()
def evaluate_each(trainer, rows):
    """Return (Loss of `rows`, list of the Loss of each row)."""
    trainer.model.eval()
    sums = torch.zeros(3, dtype=torch.float64, device=trainer.args.device)  # whole numbers are exact in it
    longest_first = np.argsort(rows["length"], kind="stable")[::-1]  # next to others as long: less padding
    rows = rows.select(longest_first).select_columns(["input_ids", "labels"])
    lengths = [len(ids) for ids in rows["input_ids"]]
    batches = DataLoader(rows, trainer.args.per_device_eval_batch_size, collate_fn=trainer.data_collator)
    by_row, done = [], 0  # of each batch (rows, 3): nats, tokens, correct
    for batch in batches:
        batch = {name: value.to(trainer.args.device) for name, value in batch.items()}
        with trainer.compute_loss_context_manager():
            outputs = trainer.model(**batch, use_cache=False, fused_lm_head=True)  # TRL's: log-probabilities of labels
        sums += torch.stack([outputs.log_probs.sum(), outputs.label_mask.sum(), outputs.is_top1.sum()]).double()
        in_batch = lengths[done : done + trainer.args.per_device_eval_batch_size]
        done += len(in_batch)
        columns = [sums_of_rows(each, in_batch) for each in (-outputs.log_probs, outputs.label_mask, outputs.is_top1)]
        by_row.append(torch.stack(columns, dim=1))
    if not by_row:  # fewer rows than ranks
        return Loss(0.0, 0, 0), []
    log_probability, tokens, correct = sums.tolist()  # the host waits for the GPU only now
    losses = [None] * len(lengths)
    for place, (nats, row_tokens, row_correct) in zip(longest_first, torch.cat(by_row).tolist()):
        losses[place] = Loss(nats, int(row_tokens), int(row_correct))
    return Loss(-log_probability, int(tokens), int(correct)), losses


def sums_of_rows(values, lengths):
    """Return the sums (rows,) over the tokens of each row; `values` (rows, tokens), or (1, all tokens) if flattened."""
    if len(values) == len(lengths):
        return values.sum(dim=1)
    missing = sum(lengths) - values.shape[1]  # the last token of all has no next one
    return torch.stack([part.sum() for part in torch.nn.functional.pad(values[0], (0, missing)).split(lengths)])


# -----------------------------------------------------------------------------
# answers


class Answered(NamedTuple):
    """A model's answer to a held-out question."""

    text: str
    accepted: list
    cut: bool  # it was longer than the limit


def stop_tokens(model, tokenizer):
    """Return the tokens at which an answer ends: those that end the template's turns, or that the config names."""
    configured = model.generation_config.eos_token_id
    configured = configured if isinstance(configured, list) else [configured]
    return sorted({tokenizer.eos_token_id, end_of_turn(tokenizer), *configured} - {None})


def answer_limit(args, tokenizer, questions):
    """Return how many tokens an answer may have: as the longest accepted one, up to LONGEST_ANSWER, or as told."""
    if args.max_new_tokens:
        return args.max_new_tokens
    lengths = accepted_lengths(tokenizer, questions)
    for length, prompt_length in zip(questions["length"], questions["prompt_length"]):
        lengths.append(length - prompt_length)  # with what the template puts around an answer, such as <think>
    return min(LONGEST_ANSWER, max(lengths, default=1) + 2)  # a space, an end of turn


def accepted_lengths(tokenizer, questions):
    """Return the tokens of every accepted answer."""
    lengths = []
    for accepted in questions["references"]:
        lengths += [len(ids) for ids in tokenizer(list(accepted), add_special_tokens=False)["input_ids"]]
    return lengths


@torch.no_grad()
def answer(model, tokenizer, rows, batch_size, max_new_tokens):
    """Return what the model Answered to each of `rows`, decoded greedily; what it thinks before is left out."""
    model.eval()
    ends = stop_tokens(model, tokenizer)
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    answers = []
    for batch in rows.iter(batch_size):
        prompts = [ids[:length] for ids, length in zip(batch["input_ids"], batch["prompt_length"])]
        inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
        tokens = model.generate(**inputs, generation_config=greedy)[:, inputs["input_ids"].shape[1] :]
        for ids, accepted in zip(tokens.tolist(), batch["references"]):
            cut = not set(ids) & set(ends)
            end = next((place for place, token in enumerate(ids) if token in ends), len(ids))
            answers.append(Answered(without_thinking(tokenizer, ids[:end]), accepted, cut))
    return answers


def without_thinking(tokenizer, ids):
    """Return an answer as text, without special tokens and without what is between <think> and </think>.

    Thinking that was begun in the prompt has only its end in the answer; one that was cut has only its beginning.
    """
    text = THINKING.sub("", tokenizer.decode(ids)).rsplit("</think>", 1)[-1]
    for token in tokenizer.all_special_tokens:
        text = text.replace(token, "")
    return text.strip()


# -----------------------------------------------------------------------------
# scores of answers


def score(answers):
    """Return the scores of answers, in percent: exact match, F1, ROUGE-L, and both of SQuAD's own script.

    Exact match and F1 are SQuAD's (Rajpurkar et al. 2016, arXiv:1606.05250) for words: without case, punctuation and
    articles. Unlike in its script, numbers, signs and single letters count as they are: 1.5 is not 15, -5 is not 5, AB+
    is not AB-, and an answer that is nothing but an article or a sign is not empty. Of an accepted answer with ####
    (GSM8K, Cobbe et al. 2021, arXiv:2110.14168), what follows is compared. ROUGE-L: Lin 2004, by torchmetrics.
    """
    if not answers:
        return {"exact_match": None, "f1": None, "rouge_l": None, "squad_exact_match": None, "squad_f1": None, "cut": 0}
    exact, f1, rouge = zip(*map(grade, answers))
    squad = SQuAD(sync_on_compute=False)  # this rank has all of them
    for number, each in enumerate(answers):
        target = {"answers": {"text": list(each.accepted), "answer_start": [0] * len(each.accepted)}, "id": str(number)}
        squad.update([{"prediction_text": each.text, "id": str(number)}], [target])
    by_squad = squad.compute()
    return {
        "exact_match": percent(exact),
        "f1": percent(f1),
        "rouge_l": percent(rouge),
        "squad_exact_match": round(by_squad["exact_match"].item(), 2),
        "squad_f1": round(by_squad["f1"].item(), 2),
        "cut": sum(each.cut for each in answers),
    }


def grade(answered):
    """Return exact match (0 or 1), F1 and ROUGE-L (from 0 to 1) of one answer."""
    pairs = [final_parts(answered.text, accepted) for accepted in answered.accepted]
    exact = max(float(normalize(text) == normalize(accepted)) for text, accepted in pairs)
    f1 = max(word_f1(normalize(text), normalize(accepted)) for text, accepted in pairs)
    return exact, f1, max(rouge_l(answered.text, accepted) for accepted in answered.accepted)


def percent(values):
    return round(100 * sum(values) / len(values), 2)


def final_parts(text, accepted):
    """Return both texts, or what follows #### in both if the accepted one has it."""
    if "####" not in accepted:
        return text, accepted
    finals = text.rsplit("####", 1)[-1], accepted.rsplit("####", 1)[-1]
    return tuple(re.sub(r"(?<=\d),(?=\d{3})", "", final) for final in finals)  # 1,000 is 1000, as in its own script


def normalize(text):
    """Return the words of a text as they are compared, see `score`."""
    words, parts = [], text.split()
    for place, part in enumerate(parts):
        word = part.lstrip(OPENING).rstrip(CLOSING).lower()
        if not any(character.isdigit() for character in word):
            word = without_punctuation(word)
        if word and not is_article(part, place, parts):
            words.append(word)
    return words or text.lower().split()


def without_punctuation(word):
    """Return a word without punctuation, but with its signs; - is one at either end (HIV-, not well-known)."""
    kept = ""
    for place, character in enumerate(word):
        hyphen = character == "-" and 0 < place < len(word) - 1
        punctuation = unicodedata.category(character)[0] == "P" or character in "^`|~"
        if not punctuation or character in SIGNS and not hyphen:
            kept += character
    return kept


def is_article(part, place, parts):
    """Whether a word is the, an, or an a that is no letter: at the end, capital in the middle, or with punctuation."""
    word = part.lstrip(OPENING)
    if word.rstrip(CLOSING).lower() in ("an", "the"):
        return True
    return place + 1 < len(parts) and (word == "a" or word == "A" and place == 0)


def word_f1(words, accepted):
    """Return the harmonic mean of precision and recall over words."""
    common = sum((collections.Counter(words) & collections.Counter(accepted)).values())
    if not common:
        return float(words == accepted)
    return 2 * common / (len(words) + len(accepted))


def keep_letters(text):
    """Return a text in lower case, its letters and digits alone; torchmetrics' own keeps those of English only."""
    return re.sub(r"[\W_]+", " ", text.lower())


def rouge_l(text, accepted):
    return rouge_score(text, accepted, rouge_keys="rougeL", normalizer=keep_letters)["rougeL_fmeasure"].item()


# -----------------------------------------------------------------------------
# of a round, and of a run


def score_before(args, comm, trainer, rows):
    """Return the scores before training, and samples of the answers; all ranks participate."""
    answers = answer_together(args, comm, trainer, rows.questions())
    losses = comm.meet(evaluate(trainer, rows.global_share()))
    scores = score(answers) | describe_loss(add_losses(losses))
    return scores | {"samples": [each.text for each in answers[: args.generate_samples]]}


def describe_loss(loss):
    """Return perplexity, and token accuracy in percent."""
    return {
        "perplexity": round(float(np.exp(min(loss.mean(), 700))), 4),
        "token_accuracy": round(100 * loss.correct / loss.tokens, 2),
    }


def answer_together(args, comm, trainer, questions):
    """Return the answers of the one model that all ranks have; they share the questions out."""
    tokenizer = trainer.processing_class
    own = client_data.share_of(questions, comm.rank, comm.world_size)
    limit = answer_limit(args, tokenizer, questions)
    own_answers = answer(trainer.model, tokenizer, own, trainer.args.per_device_eval_batch_size, limit)
    answers = [None] * len(questions)
    for rank, part in enumerate(comm.meet(own_answers)):
        answers[rank :: comm.world_size] = part
    return answers


def evaluate_round(trainer, rows, turns, clients):
    """Evaluate after a round; returns the Loss on this rank's share of the global held-out rows.

    Each turn gets the Loss on its client's own held-out rows. All ranks have one model and share the global rows out.
    If clients have models of their own, each turn also gets the Loss of its client's on all global rows, and None is
    returned.
    """
    global_loss = None if clients.private else evaluate(trainer, rows.global_share())
    for turn in turns:
        if clients.private:
            clients.load_own_model(turn.client)
            turn.global_eval_loss = evaluate(trainer, rows.global_held_out)
        turn.eval_loss = evaluate(trainer, rows.own_held_out(turn.client))
    return global_loss


class Results(NamedTuple):
    """What a run has come to."""

    answers: list  # Answered, to the global questions; of the first client, if clients have models of their own
    loss: Loss | None  # on the global rows; None if clients have models of their own
    client_scores: list  # of each client of the last round
    row_scores: list  # of each row, as in scores.json


def score_clients(args, comm, trainer, rows, own_clients, clients):
    """Return the Results after the last round; all ranks participate.

    `own_clients` are those of this rank. Each is scored on its own held-out rows: loss (nats per answer token) and the
    scores of its answers. If clients have models of their own, each is scored on the global rows, too, under "global".
    With --centralized, the one client is scored on the held-out rows of what would be the clients of the last round.
    """
    model, tokenizer, batch_size = trainer.model, trainer.processing_class, trainer.args.per_device_eval_batch_size
    questions, scores, of_rows = rows.questions(), [], []
    limit = answer_limit(args, tokenizer, questions)
    answers = global_loss = None
    if not clients.private:
        answers = answer_together(args, comm, trainer, questions)
        loss, share = evaluate_each(trainer, rows.global_share())
        shares = comm.meet((loss, share))
        global_loss = add_losses([loss for loss, _ in shares])
        losses = [None] * len(rows.global_numbers)
        for rank, (_, share) in enumerate(shares):
            losses[rank :: comm.world_size] = share
        if comm.rank == 0:
            of_rows.append(
                {"of": "global"} | scores_of_rows(rows.global_held_out, rows.global_numbers, losses, answers)
            )
    for client in own_clients:
        on_all = {}
        if clients.private:
            clients.load_own_model(client)
            own_answers = answer(model, tokenizer, questions, batch_size, limit)
            answers = answers or own_answers
            loss, losses = evaluate_each(trainer, rows.global_held_out)
            on_all = {"global": score(own_answers) | describe_loss(loss)}
            each = scores_of_rows(rows.global_held_out, rows.global_numbers, losses, own_answers)
            of_rows.append({"of": "global", "client": client} | each)
        for part in rows.own_parts(client):
            held_out = rows.rows.select(rows.held_out[part])
            loss, losses = evaluate_each(trainer, held_out)
            asked = client_data.answerable(held_out)
            own_answers = answer(model, tokenizer, asked, batch_size, answer_limit(args, tokenizer, asked))
            own_scores = score(own_answers)
            scores.append({"client": part, "eval_loss": loss.mean()} | own_scores | describe_loss(loss) | on_all)
            each = scores_of_rows(held_out, rows.held_out[part], losses, own_answers)
            of_rows.append({"of": "own", "client": part} | each)
    parts = comm.meet((scores, of_rows))
    scores = [each for part, _ in parts for each in part]
    of_rows = [each for _, part in parts for each in part]
    return Results(answers, global_loss, sorted(scores, key=lambda each: each["client"]), of_rows)


def scores_of_rows(rows, numbers, losses, answers):
    """Return the scores of each of `rows`: lists by name, with null where nothing was asked or answered.

    `numbers` are those of the rows in their split, `losses` their Loss; `answers` those to the first that ask
    something. Row by row, they let --compare choose on some rows and score on others, and pair runs.
    """
    graded = iter([grade(each) for each in answers])
    table = {"row": list(numbers), "nats": [], "tokens": [], "correct": [], "exact_match": [], "f1": [], "rouge_l": []}
    for prompt_length, loss in zip(rows["prompt_length"], losses):
        exact, f1, rouge = (None, None, None) if prompt_length == 0 else next(graded, (None, None, None))
        values = round(loss.nats, 5), loss.tokens, loss.correct, exact, f1, rouge
        for name, value in zip(list(table)[1:], values):
            table[name].append(round(value, 5) if isinstance(value, float) else value)
    return table


def headline(tokenizer, questions):
    """Return the names of the scores that say most: exact match and F1, or for long answers others."""
    finals = [[final_parts("", text)[1] for text in accepted] for accepted in questions["references"]]
    lengths = accepted_lengths(tokenizer, {"references": finals})  # of what is compared
    if not lengths:
        return ["perplexity", "token_accuracy"]
    if statistics.median(lengths) > LONG_ANSWERS:
        return ["token_accuracy", "rouge_l", "perplexity"]
    return ["exact_match", "f1"]
