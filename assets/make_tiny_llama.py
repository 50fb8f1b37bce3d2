"""Make assets/tiny-llama: pretrain a LLaMA small enough for any laptop, so that `python main.py` needs no download.

usage: python assets/make_tiny_llama.py [STEPS]

It learns from plain hospital notes (the generator of the sample data, other draws): to read a note and state its
facts, to read a note aloud and to copy word lists. It knows the words of the questions, but never sees one answered:
fine-tuning has to teach that. About 12 minutes on 2 cores; the result is the same on the same machine and torch build.
"""

import random
import sys
import time
from pathlib import Path

import torch
from make_sample_squad import DRAW, SITES, draw_note
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

COPY_STEPS, STEPS, BATCH, LEARNING_RATE, SEED = 400, 3500, 32, 3e-3, 0
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|pad|>"]
CHAT_TEMPLATE = (  # Llama 3's, with a space before each text, so that a word is one token wherever it stands
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n "
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# how Llama 3 cuts a text into words: numbers in groups of three digits, line breaks together
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QUESTIONS = [text for site in SITES.values() for texts in site["ask"].values() for text in texts]
QUESTION_WORDS = sorted({word for text in QUESTIONS for word in text.split() if "{" not in word})
READ_ALOUD = ["Read the note aloud.", "Please read this to me.", "Copy the note.", "What does the note say?"]
SUM_UP = ["Sum up the note.", "What is in the note?", "List the facts.", "What do we know?"]


def chat(system, user):
    turns = (("system", system), ("user", user))
    text = "".join(f"<|start_header_id|>{role}<|end_header_id|>\n\n {content}<|eot_id|>" for role, content in turns)
    return text + "<|start_header_id|>assistant<|end_header_id|>\n\n"


def shuffled(items, rng):
    return rng.sample(items, len(items))


def make_text(rng):
    """Draw a text in two parts, of which the second can be known from the first: the loss counts there only."""
    kind = rng.random()
    if kind < 0.2:  # with words of the questions, which it knows by sight then, but not what they ask for
        items = [DRAW[rng.choice(list(DRAW))](rng) for _ in range(rng.randint(2, 8))]
        words = " ".join(shuffled(items + rng.sample(QUESTION_WORDS, rng.randint(2, 8)), rng))
        return f" {words}\n", f" {words}<|end_of_text|>"
    site = rng.choice(list(SITES))
    note, values = draw_note(site, rng)
    facts = shuffled([(label.format(**values), values[slot]) for label, slot in SITES[site]["say"].items()], rng)
    sentences = [f"the {label} is {value}" for label, value in facts]
    if kind < 0.45:
        lines = rng.choice(
            [sentences, [f"{label}: {v}" for label, v in facts], [f"{v}: {label}" for label, v in facts]]
        )
        return f" {note}\n", " " + "\n ".join(lines) + "<|end_of_text|>"
    system = f"{rng.choice(['Here is a note.', 'You work in a hospital.', 'Use the note below.'])}\n\n{note}"
    if kind < 0.5:
        return chat(system, rng.choice(READ_ALOUD)), f" {note}<|eot_id|>"
    if kind < 0.6:
        return chat(system, rng.choice(SUM_UP)), " " + ". ".join(sentences) + ".<|eot_id|>"
    some = rng.randint(1, 2)
    return chat(system, ", ".join(label for label, _ in facts[:some])), " " + ". ".join(
        sentences[:some]
    ) + ".<|eot_id|>"


def make_tokenizer():
    """Train a byte-level BPE tokenizer."""
    rng = random.Random(SEED)
    instruction = (
        "Answer the question with words copied from the context. If the answer is not there, say unanswerable."
    )
    texts = ["".join(make_text(rng)) for _ in range(20_000)] + [instruction] * 200 + QUESTIONS * 20
    bpe = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(WORDS), "isolated")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=4096, special_tokens=SPECIAL, initial_alphabet=alphabet)
    )
    bpe.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", pair="<|begin_of_text|> $A $B", special_tokens=[("<|begin_of_text|>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, chat_template=CHAT_TEMPLATE, model_max_length=512, clean_up_tokenization_spaces=False,
        bos_token="<|begin_of_text|>", eos_token="<|eot_id|>", pad_token="<|pad|>",
    )  # fmt: skip


def copy_batch(tokenizer, rng):
    """Draw strings of random tokens, each twice: the shortest way to heads that copy, without which reading stalls."""
    size = rng.randint(8, 32)
    once = torch.randint(len(SPECIAL), len(tokenizer), (BATCH, size))
    ids = torch.cat([once, once], dim=1)
    return {"input_ids": ids}, ids.masked_fill(torch.arange(2 * size) < size, -100)


def text_batch(tokenizer, rng):
    texts = [make_text(rng) for _ in range(BATCH)]
    batch = tokenizer(["".join(text) for text in texts], padding=True, return_tensors="pt")
    known = torch.tensor([len(tokenizer(text[0])["input_ids"]) for text in texts])
    ignored = (torch.arange(batch["input_ids"].shape[1]) < known[:, None]) | (batch["attention_mask"] == 0)
    return batch, batch["input_ids"].masked_fill(ignored, -100)


def pretrain(tokenizer, steps):
    """Train a LLaMA from scratch on freshly drawn texts: AdamW, linear warm-up, then a cosine down to zero."""
    torch.manual_seed(SEED)
    rng = random.Random(SEED + 1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(tokenizer)} tokens", flush=True)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05)
    start = time.time()
    for step in range(steps):
        batch, labels = (copy_batch if step < COPY_STEPS else text_batch)(tokenizer, rng)
        output = model(**batch, labels=labels)
        loss = output.loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 200 == 0 or step == steps - 1:
            right = (output.logits[:, :-1].argmax(-1) == labels[:, 1:]).sum() / (labels[:, 1:] != -100).sum()
            print(f"step {step:5d} loss {loss.item():.3f} right {right:.3f} {time.time() - start:.0f} s", flush=True)
    return model


if __name__ == "__main__":
    tokenizer = make_tokenizer()
    model = pretrain(tokenizer, int(sys.argv[1]) if len(sys.argv) > 1 else STEPS)
    folder = Path(__file__).parent / "tiny-llama"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
