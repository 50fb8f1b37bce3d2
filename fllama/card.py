"""The model card of the adapter: what it was made from, how, how well it does, its limits, and how to use it."""

from pathlib import Path

import utils
from fllama import options
from fllama.report import (
    SCORES,
    describe_audit,
    describe_draw,
    describe_guarantee,
    describe_local_terms,
    describe_precision,
    show_score,
)


def model_card(args, run, summary):
    """Return the card of the adapter: what it was made from, how, how well it does, its limits, and how to use it."""
    local = Path(args.model_name).is_absolute()
    base = Path(args.model_name).name if local else args.model_name
    on_hub = "" if local else f"base_model: {base}\n"
    origin = f"`{base}`, a model in a folder of whoever trained this"
    if not local:
        origin = f"[{base}](https://huggingface.co/{base})"
    num_train = summary["rows"]
    each = f"{min(num_train)} to {max(num_train)}" if min(num_train) < max(num_train) else f"{num_train[0]}"
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    adapter = "THIS FOLDER/client_0" if options.keeps_own_models(args) else "THIS FOLDER"
    versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
    return f"""---
{on_hub}library_name: peft
pipeline_tag: text-generation
tags: [lora, federated-learning]
---

# {base}, fine-tuned {"by clients alone" if args.aggregator == "none" else "in federation"}

A LoRA adapter (rank {args.lora_r}, alpha {args.lora_alpha:g}, on all linear layers) for
{origin}.

| | |
|---|---|
| clients | {summary["clients"]}{describe_draw(args)}; {each} training rows each, {sum(num_train)} in all |
| split | {describe_split(args)} |
| rounds | {summary["rounds"]} of {args.local_steps} local steps of {batch} rows |
| averaging | {describe_averaging(args)} |
| base weights | {describe_precision(args)} |
| learning rate | {args.learning_rate:g}, {args.lr_scheduler_type} |
| tokens trained on | {"not told" if summary["privacy"] else f"{summary['tokens']:,}"} |
| command | `{run.command}` |
| versions | {versions} |

{describe_scores(summary)}
{describe_privacy(summary)}
## Limits

{describe_limits(summary)} It was trained to copy short answers from a text or to continue
conversations like those in its data; it was not tested for anything else, nor for safety. One run, one seed.

## Use

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{adapter}")
tokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")
```

Questions about a text were asked with this system message, and the question as the user's:

```text
{utils.INSTRUCTION}

THE TEXT
```

Serve it with [vLLM](https://docs.vllm.ai), beside its base model:

```bash
vllm serve {base} --enable-lora --max-lora-rank {vllm_rank(args.lora_r)} --lora-modules federated="{adapter}"
```

As one 16-bit model, by the program that trained it, and as GGUF, by [llama.cpp](https://github.com/ggml-org/llama.cpp)
(the second needs the first; the adapter alone is converted by `convert_lora_to_gguf.py`):

```bash
python main.py --output_dir OUTPUT_DIR --merge
python convert_hf_to_gguf.py OUTPUT_DIR/merged_model --outfile model.gguf
```
"""


def describe_limits(summary):
    """Return what the card may not promise about privacy."""
    simulated = "The clients were simulated on machines of one owner"
    if summary["privacy"]:
        return f"""{simulated}, and nothing was encrypted. The noise covers the adapter alone,
and nobody who has several rows."""
    return f"""{simulated}, so this promises no privacy: nothing was encrypted, no noise was added,
and an adapter can learn rows by heart."""


def describe_privacy(summary):
    """Return the section of what was measured and promised of privacy; nothing without either."""
    promised, measured = describe_guarantee(summary["privacy"]), describe_audit(summary["audit"])
    if promised:  # what the audit says is not covered, either
        measured = []
    lines = [f"- {' '.join(line.split())}" for line in [" ".join(promised), *measured] if line]
    return "\n".join(["", "## Privacy", "", *lines, ""]) if lines else ""


def describe_scores(summary):
    """Return the scores and losses; with differential privacy none of them, as its guarantee does not cover them."""
    if summary["privacy"]:
        return "Scores and losses are not covered by the guarantee below, and left out here."
    first, last = (f"{loss:.4f}" if loss is not None else "unknown" for loss in summary["eval_loss"].values())
    return f"""{table_of_scores(summary)}

Held-out loss {first} nats per answer token at the first evaluated round, {last} at the last. On the clients' own
held-out rows: {describe_own_scores(summary["headline"][0], summary["per_client"])}."""


def table_of_scores(summary):
    """Return the scores that say most, before and after training, as a table in Markdown."""
    lines = [f"| {summary['answered']} held-out questions | before | after |", "|---|---|---|"]
    for name in summary["headline"]:
        before, after = (show_score(name, summary[name][when]) for when in ("before", "after"))
        lines.append(f"| {SCORES[name][0]} | {before} | {after} |")
    return "\n".join(lines)


def describe_own_scores(name, clients):
    values = [client[name] for client in clients if client[name] is not None]
    if not values:
        return "no score"
    worst = max(values) if name == "perplexity" else min(values)
    mean = show_score(name, sum(values) / len(values))
    return f"{SCORES[name][0]} {mean} as the mean of {len(values)} clients, {show_score(name, worst)} for the worst"


def describe_split(args):
    split = args.partition
    if args.partition_column:
        split += f" by {args.partition_column}"
    if args.partition == "dirichlet":
        split += f", alpha {args.dirichlet_alpha:g}"
    return split


def describe_averaging(args):
    parts = [f"`{args.aggregator}`"]
    if args.lora_variant != "lora":
        parts.append(args.lora_variant)
    return ", ".join(parts + describe_local_terms(args))


def vllm_rank(r):
    """Return the least rank that vLLM can be told to expect."""
    ranks = (8, 16, 32, 64, 128, 256, 320, 512)
    return next((rank for rank in ranks if rank >= r), r)
