"""The finished model on disk: adapters, tokenizer, card, summary, curves."""

import json
import shutil
from pathlib import Path

import utils
from fllama import audit, card, evaluate, report, runlog
from fllama.checkpoints import CLIENT_MODELS, GLOBAL_MODEL
from fllama.options import keeps_own_models


def folder_name(args):
    """Return the name of the folder for the adapter, or for the adapters of all clients."""
    return CLIENT_MODELS if keeps_own_models(args) else GLOBAL_MODEL


def publish(args, run, comm, trainer, rows, server, clients, results, audited, ledger):
    """Write what a run leaves behind; all ranks participate.

    `results` are evaluate.Results, `audited` is what audit.audit has found, `ledger` the accountant.Ledger.
    """
    model, tokenizer = trainer.model, trainer.processing_class
    target = Path(args.output_dir, folder_name(args))
    staging = target.with_suffix(".tmp")
    model.peft_config["default"].base_model_name_or_path = args.model_name
    model.generation_config.eos_token_id = evaluate.stop_tokens(model, tokenizer)
    if clients.private:
        for client in sorted(clients.states):
            clients.load_own_model(client)
            save_adapter(model, staging / f"client_{client}")
        comm.meet()  # all adapters are there
    if comm.rank > 0:
        return

    if not clients.private:
        save_adapter(model, staging)
        after = evaluate.score(results.answers) | evaluate.describe_loss(results.loss)
    else:
        after = mean_scores([each["global"] for each in results.client_scores])
    before = {name: value for name, value in server.scores_before.items() if name != "samples"}
    questions, rounds = rows.questions(), runlog.read_rounds(args.output_dir)
    names = evaluate.headline(tokenizer, questions)
    both = {"before": before, "after": after}
    summary = report.summarize(rounds, rows.num_train, both, names, results.client_scores, len(questions))
    summary["privacy"] = ledger and ledger.summarize()
    summary["audit"] = audited and {name: value for name, value in audited.items() if name != "each"}
    samples = compare_samples(questions, server.scores_before["samples"], results.answers)
    folder = Path(args.output_dir)
    report.plot_losses(folder, rounds)
    if samples:
        utils.write_aside(folder / "samples.json", json.dumps(samples, indent=2) + "\n")
    utils.write_aside(folder / "scores.json", json.dumps(results.row_scores) + "\n")
    if audited:
        utils.write_aside(folder / audit.FILE, json.dumps(audited["each"], indent=2) + "\n")
    utils.write_aside(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    tokenizer.save_pretrained(staging)
    (staging / "README.md").write_text(card.model_card(args, run, summary), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    staging.rename(target)  # last of all: with the model there, the run is finished
    report.print_summary(args, rounds, summary, samples, target)


def save_adapter(model, folder):
    """Save the adapter, and at which tokens answers end."""
    model.save_pretrained(folder, save_embedding_layers=False)
    model.generation_config.save_pretrained(folder)


def mean_scores(scores):
    """Return the mean of each score over the clients' models; None if there is none."""
    means = {}
    for name in scores[0]:
        values = [each[name] for each in scores if each[name] is not None]
        means[name] = round(sum(values) / len(values), 4 if name == "perplexity" else 2) if values else None
    return means


def compare_samples(questions, before, answers):
    """Return the first held-out questions with their answers before and after training."""
    samples = []
    for question, text, after in zip(questions["question"], before, answers):
        samples.append({"question": question, "accepted": after.accepted, "before": text, "after": after.text})
    return samples
