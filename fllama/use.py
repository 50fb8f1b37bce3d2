"""The finished model: --ask, --merge, --push_to_hub."""

import contextlib
import datetime
import json
import os
import sys
from pathlib import Path

from fllama import basemodel, checkpoints, tokenizing
from fllama.options import EMBEDDED_MODEL, absolute, fail, first_line

CHAT_TOKENS = 512  # of an answer to a question without a context, at most


def use(args, num_gpus):
    """--ask the finished model in output_dir, or --merge it into its base."""
    folder = find_adapter(Path(args.output_dir).resolve(), args.output_dir)
    started = datetime.datetime.now()
    for parent in folder.parents[:2]:
        if (parent / "config.json").is_file():  # of the run
            config = json.loads((parent / "config.json").read_text(encoding="utf-8"))
            args.load_in_4bit = config.get("load_in_4bit", args.load_in_4bit)
            started = datetime.datetime.fromisoformat(config.get("started", started.isoformat()))
            break
    base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    if args.model_name == EMBEDDED_MODEL and Path(base).name != Path(EMBEDDED_MODEL).name:  # it was not given
        args.model_name = absolute(base)
    model_path, _, tokenizer = basemodel.find_model(args)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    merged = folder.with_name("merged_model")
    if args.merge and merged.exists() and not args.overwrite:
        fail(f"{merged} is there already; --overwrite writes over it")

    from fllama.model import load_finished  # seconds of imports, after all that can be refused

    try:
        model = load_finished(args, model_path, folder, num_gpus)
    except RuntimeError as error:
        if "size mismatch" in str(error):
            fail(f"--model_name {args.model_name} does not fit the adapter in {folder}: {first_line(error)}")
        advice = "; CUDA_VISIBLE_DEVICES= main.py ... runs on the CPU" if "out of memory" in str(error) else ""
        print(f"main.py: the model cannot be loaded: {first_line(error)}{advice}", file=sys.stderr)
        raise SystemExit(1) from None
    if args.ask is not None:
        for question in [args.ask] if args.ask else read_questions():
            print(answer_question(model, tokenizer, question, args.context, started, args.max_new_tokens), flush=True)
    if args.merge:
        merge(model, tokenizer, merged)
        print(f"merged into {merged}", flush=True)


def find_adapter(folder, named):
    """Return the folder of the adapter in `folder`; the user called it `named`."""
    if (folder / checkpoints.GLOBAL_MODEL).is_dir():
        folder = folder / checkpoints.GLOBAL_MODEL
    if (folder / "adapter_config.json").is_file():
        return folder
    advice = "name the output_dir of a run"
    of_clients = sorted(folder.glob(f"{checkpoints.CLIENT_MODELS}/*/"))
    if of_clients:
        advice = f"its clients have models of their own: name one, as in --output_dir {of_clients[0]}"
    fail(f"--output_dir {named} holds no finished model; {advice}")


def read_questions():
    """Yield lines from the terminal, or from a file or pipe, up to its end."""
    prompt = "> " if sys.stdin.isatty() else ""
    with contextlib.suppress(EOFError):
        while True:
            if question := input(prompt).strip():
                yield question


def answer_question(model, tokenizer, question, context, started=None, max_new_tokens=None):
    """Return the answer to one question, from `context` if that is not empty, asked as in training.

    `started` is when the run began, the day that chat templates see (None: today).
    """
    import datasets

    from fllama import evaluate, formats

    row = {"prompt": question, "completion": "?"}  # of which the answer is left out
    if context:
        row = {"context": context, "question": question, "answers": ["?"]}
    elif tokenizer.chat_template:
        row = {"question": question, "answer": "?"}
    row = tokenizing.tokenize_row(row, formats.find_form(row), tokenizer, max_length=sys.maxsize, date=started)
    if row["problem"]:
        return f"({row['problem']})"
    longest = max_new_tokens or (evaluate.LONGEST_ANSWER if context else CHAT_TOKENS)
    answers = evaluate.answer(model, tokenizer, datasets.Dataset.from_list([row]), 1, longest)
    return answers[0].text


def merge(model, tokenizer, target):
    """Write a model with its adapter merged into it as 16-bit weights, into the folder `target`.

    Into the weights as training saw them, rounded to NF4: it scores as the adapter did. Merged into the weights before
    rounding, the embedded model has a loss of 0.582 instead of 0.570.
    """
    import torch

    from fllama.evaluate import stop_tokens

    model = model.merge_and_unload().to(torch.bfloat16)
    model.generation_config.eos_token_id = stop_tokens(model, tokenizer)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


# -----------------------------------------------------------------------------
# the hub


def make_repository(args):
    """Make the repository of --push_to_hub if there is none; its full name replaces that of the flag."""
    if not args.push_to_hub:
        return
    from huggingface_hub import HfApi

    try:
        args.push_to_hub = HfApi(token=args.hf_token).create_repo(args.push_to_hub, private=True, exist_ok=True).repo_id
    except Exception as error:  # of the dozen kinds that the hub's client has, every one ends the run
        fail(f"--push_to_hub {args.push_to_hub}: set HF_TOKEN to a token that may write there ({first_line(error)})")


def push(args, token):
    """Upload the finished adapter, if that was asked for."""
    if not args.push_to_hub:
        return
    from huggingface_hub import HfApi

    folder, hub = Path(args.output_dir, checkpoints.GLOBAL_MODEL), HfApi(token=token)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    base = config["base_model_name_or_path"]
    if os.path.isabs(base):  # a folder here, which is nobody else's business
        config["base_model_name_or_path"] = Path(base).name
    content = json.dumps(config, indent=2).encode()
    repo = args.push_to_hub
    try:
        address = hub.upload_folder(repo_id=repo, folder_path=folder, ignore_patterns=["adapter_config.json"])
        hub.upload_file(repo_id=repo, path_or_fileobj=content, path_in_repo="adapter_config.json")
    except Exception as error:
        again = f"--resume --push_to_hub {repo} tries again"
        print(f"main.py: {folder} was not uploaded ({first_line(error)}); {again}", file=sys.stderr)
        raise SystemExit(1) from None
    print(f"uploaded: {address}", flush=True)
