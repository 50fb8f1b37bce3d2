"""Scores of a model: held-out loss, answers, exact match and F1."""

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchmetrics.text import SQuAD
from transformers import GenerationConfig

from fllama import data as client_data

MAX_NEW_TOKENS = 32  # of an answer


@torch.no_grad()
def evaluate(trainer, rows):
    """Return (loss, tokens) over the answer tokens of `rows`: the sum of the loss in nats, and their number."""
    trainer.model.eval()
    loss, tokens = 0.0, 0
    longest_first = np.argsort(rows["length"], kind="stable")[::-1]  # next to others as long: less padding
    rows = rows.select(longest_first).select_columns(["input_ids", "labels"])
    batches = DataLoader(rows, trainer.args.per_device_eval_batch_size, collate_fn=trainer.data_collator)
    for batch in batches:
        batch = {name: value.to(trainer.args.device) for name, value in batch.items()}
        tokens += (batch["labels"][:, 1:] != -100).sum().item()
        with trainer.compute_loss_context_manager():
            # the sum over the tokens, divided by 1
            loss += trainer.compute_loss(trainer.model, batch, num_items_in_batch=1).item()
    return loss, tokens


@torch.no_grad()
def answer(model, tokenizer, rows, batch_size, max_new_tokens=MAX_NEW_TOKENS):
    """Return (answer, accepted answers) to each of `rows`, decoded greedily."""
    model.eval()
    stop = model.generation_config.eos_token_id
    stop = {tokenizer.eos_token_id, *(stop if isinstance(stop, list) else [stop])} - {None}
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=sorted(stop),
        pad_token_id=tokenizer.pad_token_id,
    )
    texts = []
    for batch in rows.iter(batch_size):
        prompts = [ids[: labels.count(-100)] for ids, labels in zip(batch["input_ids"], batch["labels"])]
        inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(model.device)
        tokens = model.generate(**inputs, generation_config=greedy)
        answers = tokens[:, inputs["input_ids"].shape[1] :]
        texts += tokenizer.batch_decode(answers, skip_special_tokens=True)
    return [(text.strip(), accepted) for text, accepted in zip(texts, rows["references"])]


def score(answers):
    """Return exact match and F1 (SQuAD v1, percent) of (answer, accepted answers) pairs."""
    metric = SQuAD(sync_on_compute=False)  # this rank has all of them
    for number, (text, accepted) in enumerate(answers):
        prediction = {"prediction_text": text, "id": str(number)}
        target = {"answers": {"text": accepted, "answer_start": [0] * len(accepted)}, "id": str(number)}
        metric.update([prediction], [target])
    return {name: round(value.item(), 2) for name, value in metric.compute().items()}


def score_before(args, comm, trainer, rows):
    """Return exact match, F1 and samples of the answers before training; all ranks participate."""
    answers = answer_together(comm, trainer, rows.questions())
    return score(answers) | {"samples": [text for text, _ in answers[: args.generate_samples]]}


def answer_together(comm, trainer, questions):
    """Return the answers of the one model that all ranks have; they share the questions out."""
    own = client_data.share_of(questions, comm.rank, comm.world_size)
    own_answers = answer(trainer.model, trainer.processing_class, own, trainer.args.per_device_eval_batch_size)
    answers = [None] * len(questions)
    for rank, part in enumerate(comm.meet(own_answers)):
        answers[rank :: comm.world_size] = part
    return answers


def evaluate_round(trainer, rows, turns, clients):
    """Evaluate after a round; returns this rank's (loss, tokens) of the global held-out rows.

    Each turn gets the loss on its client's own held-out rows. All ranks have one model and share the global rows out.
    If clients have models of their own, each turn also gets the loss of its client's on all global rows, and None is
    returned.
    """
    global_loss = None if clients.private else evaluate(trainer, rows.global_share())
    for turn in turns:
        if clients.private:
            clients.load_own_model(turn.client)
            turn.global_eval_loss = evaluate(trainer, rows.global_held_out)
        turn.eval_loss = evaluate(trainer, rows.own_held_out(turn.client))
    return global_loss


def score_clients(comm, trainer, rows, own_clients, clients):
    """Return (answers to the global questions, scores of the clients of the last round); all ranks participate.

    `own_clients` are those of this rank. Each is scored on its own held-out rows: loss (nats per answer token), exact
    match and F1 (percent); if clients have models of their own, under "global" also on the global questions, and the
    answers are those of the first one. With --centralized, the one client is scored on the held-out rows of what would
    be the clients of the last round.
    """
    model, tokenizer, batch_size = trainer.model, trainer.processing_class, trainer.args.per_device_eval_batch_size
    questions = rows.questions()
    answers = None if clients.private else answer_together(comm, trainer, questions)
    scores = []
    for client in own_clients:
        on_all = {}
        if clients.private:
            clients.load_own_model(client)
            own_answers = answer(model, tokenizer, questions, batch_size)
            answers = answers or own_answers
            on_all = {"global": score(own_answers)}
        for part in rows.own_parts(client):
            held_out = rows.rows.select(rows.held_out[part])
            loss, tokens = evaluate(trainer, held_out)
            own_scores = score(answer(model, tokenizer, held_out, batch_size))
            scores.append({"client": part, "eval_loss": loss / tokens} | own_scores | on_all)
    scores = [each for part in comm.meet(scores) for each in part]
    return answers, sorted(scores, key=lambda each: each["client"])
