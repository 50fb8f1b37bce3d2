"""What does the model give away? Made-up rows, half of them trained on, are told apart at the end by their loss."""

import json
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import torch

import utils
from fllama import tokenizing
from fllama.formats import Conversation, question_and_answer
from fllama.options import fail

SECRETS = 10**6  # the answers that a canary can have: six digits
REFERENCES = 255  # other answers that it is ranked among, so that exposure is measured up to 8 bits
BATCH = 64  # canaries in a forward pass; they are short
CONFIDENCE = 0.95  # of the interval and of the bound
SHARES_GUESSED = (1, 1 / 2, 1 / 4, 1 / 8)  # of the canaries; the auditor abstains from the others
DELTA = 1e-5  # of the bound on epsilon, where no --dp_delta says otherwise
FILE = "canaries.json"


# -----------------------------------------------------------------------------
# before the run: made-up rows


class Canaries(NamedTuple):
    """The canaries of all clients."""

    rows: datasets.Dataset  # their tokens, with the columns of tokenizing.TOKENIZED
    clients: list  # whose each is
    inserted: list  # whether it is among that client's training rows
    references: list  # the tokens of other answers

    def numbers_of(self, client, first):
        """Return the row numbers of a client's inserted canaries, if the inserted ones are numbered from `first`."""
        owners = [owner for owner, inserted in zip(self.clients, self.inserted) if inserted]
        return [first + i for i, owner in enumerate(owners) if owner == client]

    def inserted_rows(self):
        return self.rows.select(np.flatnonzero(self.inserted))


def make_canaries(args, form, tokenizer, started):
    """Make --canaries rows for every client, in the form of the data set; a fair coin for each says whether it is
    inserted.

    Each asks for the six digits that belong to a number, and nothing else says them. Numbers, digits and coins come
    from --seed, so that an audit can be repeated: none of them depends on the rows or on the training, and the noise of
    differential privacy does not depend on --seed. `started` is the day that chat templates see.
    """
    total = args.canaries * args.num_clients
    if total > SECRETS:
        fail(f"--canaries {args.canaries} for {args.num_clients} clients are more than {SECRETS:,}; lower it")
    rng = np.random.default_rng([args.seed, SECRETS])
    names = rng.choice(SECRETS, total, replace=False)
    secrets = rng.integers(SECRETS, size=total + REFERENCES)
    inserted = rng.random(total) < 0.5
    rows = []
    for name, secret in zip(names, secrets):
        rows.append(tokenize_canary(args, form, tokenizer, started, name, secret))
    references = []
    for secret in secrets[total:]:
        row = tokenize_canary(args, form, tokenizer, started, names[0], secret)
        references.append(row["input_ids"][first_learned(row) :])
    features = {name: tokenizing.TOKENIZED[name] for name in rows[0]}
    clients = np.repeat(np.arange(args.num_clients), args.canaries)
    tokens = datasets.Dataset.from_list(rows, features=datasets.Features(features))
    return Canaries(tokens, clients.tolist(), inserted.tolist(), references)


def tokenize_canary(args, form, tokenizer, started, name, secret):
    """Return the tokens of one canary, as those of a row."""
    form = form._replace(read=lambda row: read_canary(row, form))
    row = {"name": f"{name:06}", "secret": f"{secret // 1000:03} {secret % 1000:03}"}
    tokens = tokenizing.tokenize_row(row, form, tokenizer, args.max_length, args.learn, started)
    if tokens.pop("problem") or tokens.pop("truncated"):
        fail(f"--canaries: a canary does not fit into --max_length {args.max_length}, or the template refuses it")
    return tokens


def read_canary(row, form):
    """Return a canary as a conversation of the data set's form."""
    question, secret = f"What is the code of locker {row['name']}?", row["secret"]
    if "context" in form.columns and "question" in form.columns:
        sample = {"context": f"Locker {row['name']}.", "question": question, "answers": {"text": [secret]}}
        asked = utils.convert_squad_sample_to_llama_conversation(sample)
        return Conversation(asked["prompt"] + asked["completion"])
    if form.name == "text":
        return Conversation(prompt=f"The code of locker {row['name']} is", text=f" {secret}")
    return question_and_answer(question, secret)


def first_learned(row):
    """Return where the answer of a tokenized row begins."""
    return next(place for place, label in enumerate(row["labels"]) if label != -100)


def save(canaries, path):
    """Write what the ranks need at the end beside the tokenized rows."""
    what = {"clients": canaries.clients, "inserted": canaries.inserted, "references": canaries.references}
    Path(path, FILE).write_text(json.dumps(what), encoding="utf-8")


# -----------------------------------------------------------------------------
# after the run: the losses


def audit(args, run, comm, trainer, clients):
    """Return what the canaries say of the model, or of the models of the clients; all ranks participate.

    A dict as in summary.json, and with "each" a list of all canaries; None without --canaries. It looks at losses
    alone. The score of a canary is how far training has lowered its loss, so that hard and easy ones can be compared
    (Steinke et al. 2023, section 6). Where clients have models of their own, each canary is scored by its own client's,
    and for "across_clients" by the mean over all other clients' models.
    """
    if not args.canaries:
        return None
    folder = Path(run.data_path)
    rows = datasets.load_from_disk(folder)["canaries"].select_columns(["input_ids", "labels"]).to_list()
    made = json.loads((folder / FILE).read_text(encoding="utf-8"))
    share = range(comm.rank, len(rows), comm.world_size)
    with trainer.model.disable_adapter():
        before = row_losses(trainer, [rows[i] for i in share])
    found = [("before", i, loss, None) for i, loss in zip(share, before)]
    if not clients.private:
        found += look(trainer, rows, "shared", share, share, made["references"])
    for client in sorted(clients.states) if clients.private else []:
        clients.load_own_model(client)
        own = [i for i, owner in enumerate(made["clients"]) if owner == client or args.centralized]
        found += look(trainer, rows, client, range(len(rows)), own, made["references"])
    losses, exposures = gather(comm.meet(found))
    return describe(args, made, losses, exposures)


def look(trainer, rows, model, seen, ranked, references):
    """Return (model, canary, loss, exposure) of the canaries `seen` by the model as it is; exposure of those `ranked`
    only.
    """
    losses, found = row_losses(trainer, [rows[i] for i in seen]), []
    for i, loss in zip(seen, losses):
        exposure = None
        if i in ranked:
            others = row_losses(trainer, [with_answer(rows[i], answer) for answer in references])
            exposure = exposure_of(loss, others)
        found.append((model, i, loss, exposure))
    return found


def with_answer(row, answer):
    """Return a tokenized canary with another answer."""
    first = first_learned(row)
    return {"input_ids": row["input_ids"][:first] + answer, "labels": [-100] * first + answer}


@torch.no_grad()
def row_losses(trainer, rows):
    """Return the loss of each row, a list: nats of all its learned tokens together."""
    trainer.model.eval()
    losses = []
    for first in range(0, len(rows), BATCH):
        batch = trainer.data_collator(rows[first : first + BATCH])
        batch.pop("position_ids", None)
        batch = {name: value.to(trainer.args.device) for name, value in batch.items()}
        with trainer.compute_loss_context_manager():
            outputs = trainer.model(**batch, use_cache=False, fused_lm_head=True)  # TRL's: log-probabilities of labels
        losses += (-outputs.log_probs.double().sum(dim=1)).tolist()
    return losses


def gather(parts):
    """Return ({model: {canary: loss}}, {canary: exposure}) of what all ranks have found."""
    losses, exposures = {}, {}
    for part in parts:
        for model, i, loss, exposure in part:
            losses.setdefault(model, {})[i] = loss
            if exposure is not None:
                exposures[i] = exposure
    return losses, exposures


# -----------------------------------------------------------------------------
# what the losses say


def describe(args, made, losses, exposures):
    """Return the audit, of {model: {canary: loss}} and {canary: exposure}; see `audit`."""
    before, delta, each = losses.pop("before"), args.dp_delta or DELTA, []
    for i, (client, inserted) in enumerate(zip(made["clients"], made["inserted"])):
        own, others = models_of(args, losses, client)
        if own not in losses:  # it has never played, and has no model
            continue
        canary = {"client": client, "inserted": inserted, "loss_before": before[i], "loss": losses[own][i]}
        canary |= {"exposure": exposures[i], "lowered": before[i] - losses[own][i], "lowered_elsewhere": None}
        if others:
            elsewhere = sum(losses[model][i] for model in others) / len(others)
            canary["lowered_elsewhere"] = before[i] - elsewhere
        each.append(canary)

    found = {"canaries": len(each)} | figures(each, "lowered", delta)
    found |= {"delta": delta, "exposure": exposures_of(each), "per_client": {}, "across_clients": {}}
    for client in sorted({canary["client"] for canary in each}):
        own = [canary for canary in each if canary["client"] == client]
        found["per_client"][client] = figures(own, "lowered", delta) | {"exposure": exposures_of(own)}
        if own[0]["lowered_elsewhere"] is not None:
            found["across_clients"][client] = figures(own, "lowered_elsewhere", delta)
    return found | {"each": each}


def models_of(args, losses, client):
    """Return (the model that a client holds, the models that others hold); all hold the shared one."""
    if "shared" in losses:
        return "shared", ["shared"]
    own = 0 if args.centralized else client
    return own, [model for model in losses if model != own]


def figures(canaries, name, delta):
    """Return AUC, its interval and the bound on epsilon, with the scores under `name`."""
    scores = np.array([canary[name] for canary in canaries])
    inserted = np.array([canary["inserted"] for canary in canaries], dtype=bool)
    return measure(scores, inserted, delta)


def exposures_of(canaries):
    """Return the mean exposures of those that were trained on and of those held out, and the most that is measured."""
    means = {"most": float(np.log2(REFERENCES + 1))}
    for name, inserted in (("inserted", True), ("held_out", False)):
        found = [canary["exposure"] for canary in canaries if canary["inserted"] == inserted]
        means[name] = sum(found) / len(found) if found else None
    return means


def measure(scores, inserted, delta):
    """Return AUC, its interval and the lower bound on epsilon, of scores (m,) and which of them were inserted (m,)."""
    value = auc(scores, inserted)
    ranks = -np.arange(len(scores))
    return {
        "auc": value,
        "auc_interval": auc_interval(value, int(inserted.sum()), int((~inserted).sum())),
        "epsilon_lower_bound": epsilon_lower_bound(scores, inserted, delta),
        # if every guess was right; a claim above it cannot be refuted by so few canaries
        "epsilon_lower_bound_most": epsilon_lower_bound(ranks, ranks > -len(scores) / 2, delta),
    }


def exposure_of(loss, others):
    """Return the exposure of a secret, in bits, from its loss and those of others drawn from the same space.

    log2 of the number of answers, minus log2 of the rank of the right one. Carlini et al. 2019 (arXiv:1802.08232),
    approximated by sampling (section 4.3). For a model that has not seen it, 1.44 on average. Equals count half.
    """
    others = np.asarray(others)
    rank = 1 + (others < loss).sum() + (others == loss).sum() / 2
    return float(np.log2((len(others) + 1) / rank))


def auc(scores, inserted):
    """Return the chance that an inserted canary scores higher than one held out, equals counted half; None if there
    are not both.
    """
    if inserted.all() or not inserted.any():
        return None
    differences = scores[inserted][:, None] - scores[~inserted]
    return float(((differences > 0) + (differences == 0) / 2).mean())


def auc_interval(value, m, n, z=1.959964):
    """Return the 95% interval [low, high] of an AUC from m and n independent scores; None if there is none.

    Newcombe 2006 (Statistics in Medicine 25, 559-573), method 5: all values that lie within z standard errors of the
    observed one, with the errors (Hanley and McNeil 1982) that they themselves would have. So it is no point at 1.
    """
    if value is None:
        return None
    from scipy.optimize import brentq  # half a second that runs without canaries need not spend

    more, tiny = (m + n) / 2 - 1, 1e-9

    def distance(true):
        variance = true * (1 - true) * (1 + more * ((1 - true) / (2 - true) + true / (1 + true))) / (m * n)
        return (value - true) ** 2 - z**2 * variance

    low = brentq(distance, 0, min(value, 1 - tiny)) if value > tiny else 0.0
    high = brentq(distance, max(value, tiny), 1) if value < 1 - tiny else 1.0
    return [low, high]


def epsilon_lower_bound(scores, inserted, delta):
    """Return the largest epsilon that this one run refutes with 95% confidence, at `delta`; 0 if it refutes none.

    Privacy auditing with one training run, Steinke, Nasr, Jagielski 2023 (arXiv:2305.08846). Of the canaries with the
    highest scores it guesses that they were inserted, of as many with the lowest that they were not, and abstains from
    the rest. Several numbers of guesses are tried, and each gets its part of the 5% (Bonferroni).
    """
    order = np.argsort(-scores, kind="stable")
    best, error = 0.0, (1 - CONFIDENCE) / len(SHARES_GUESSED)
    for share in SHARES_GUESSED:
        half = int(share * len(scores) / 2)
        if half:
            correct = int(inserted[order[:half]].sum() + (~inserted[order[-half:]]).sum())
            best = max(best, largest_refuted(len(scores), 2 * half, correct, delta, error))
    return best


def largest_refuted(m, guesses, correct, delta, error):
    """Return the largest epsilon whose p-value is below `error`, by bisection; it is rounded down."""
    low, high = 0.0, 20.0
    if p_value(m, guesses, correct, 0.0, delta) > error:
        return 0.0
    while high - low > 1e-4:
        middle = (low + high) / 2
        if p_value(m, guesses, correct, middle, delta) <= error:
            low = middle
        else:
            high = middle
    return low


def p_value(m, guesses, correct, epsilon, delta):
    """Return the largest chance of `correct` or more of `guesses` about m canaries, each in or out by a fair coin,
    against a model that is (epsilon, delta)-differentially private.

    Steinke, Nasr, Jagielski 2023 (arXiv:2305.08846), theorem 5.2: as if each guess were right with the probability
    e^epsilon / (1 + e^epsilon), plus what delta can add, 2 m delta max_i P(correct > V >= correct - i) / i.
    """
    from scipy.stats import binom

    right = binom(guesses, 1 / (1 + np.exp(-epsilon)))
    by_delta = 0.0
    if correct:
        below = np.cumsum(right.pmf(np.arange(correct)[::-1]))  # P(correct > V >= correct - i), for i from 1
        by_delta = 2 * m * delta * (below / np.arange(1, correct + 1)).max()
    return float(min(1, right.sf(correct - 1) + by_delta))
