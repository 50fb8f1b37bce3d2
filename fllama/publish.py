"""The finished model on disk: adapters, tokenizer, card, summary, curves."""

import json
import shutil
from pathlib import Path

import utils
from fllama import evaluate, report, runlog
from fllama.checkpoints import CLIENT_MODELS, GLOBAL_MODEL
from fllama.options import keeps_own_models


def folder_name(args):
    """Return the name of the folder for the adapter, or for the adapters of all clients."""
    return CLIENT_MODELS if keeps_own_models(args) else GLOBAL_MODEL


def publish(args, run, comm, trainer, rows, server, clients, answers, scores):
    """Write what a run leaves behind; all ranks participate.

    `answers` are those to the held-out questions after training, `scores` those of the clients of the last round.
    """
    target = Path(args.output_dir, folder_name(args))
    staging = target.with_suffix(".tmp")
    trainer.model.peft_config["default"].base_model_name_or_path = args.model_name
    if clients.private:
        for client in sorted(clients.states):
            clients.load_own_model(client)
            trainer.model.save_pretrained(staging / f"client_{client}", save_embedding_layers=False)
        comm.meet()  # all adapters are there
    if comm.rank > 0:
        return

    if not clients.private:
        trainer.model.save_pretrained(staging, save_embedding_layers=False)
    after = evaluate.score(answers)
    if clients.private:  # the mean over the clients' models
        for name in after:
            after[name] = round(sum(each["global"][name] for each in scores) / len(scores), 2)
    before = {name: value for name, value in server.scores_before.items() if name != "samples"}
    questions = rows.questions()
    rounds = runlog.read_rounds(args.output_dir)
    summary = report.summarize(rounds, rows.num_train, {"before": before, "after": after}, scores, len(questions))
    samples = compare_samples(questions, server.scores_before["samples"], answers)
    folder = Path(args.output_dir)
    report.plot_losses(folder, rounds)
    if samples:
        utils.write_aside(folder / "samples.json", json.dumps(samples, indent=2) + "\n")
    utils.write_aside(folder / "summary.json", json.dumps(summary, indent=2) + "\n")
    trainer.processing_class.save_pretrained(staging)
    (staging / "README.md").write_text(report.model_card(args, run, summary), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    staging.rename(target)  # last of all: with the model there, the run is finished
    report.print_summary(args, rounds, summary, samples, target)


def compare_samples(questions, before, answers):
    """Return the first held-out questions with their answers before and after training."""
    samples = []
    for question, text, (after, accepted) in zip(questions["question"], before, answers):
        samples.append({"question": question, "accepted": accepted, "before": text, "after": after})
    return samples
