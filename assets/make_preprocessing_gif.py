"""Make assets/preprocessing.gif: what becomes of a row of the sample data before the model sees it.

usage: python assets/make_preprocessing_gif.py

All that it shows comes out of the functions that a run calls, with the tokenizer of the embedded model. 10 seconds.
"""

import functools
import json
import re
import sys
from pathlib import Path

import matplotlib.font_manager as fonts
import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import utils
from fllama import formats, tokenizing

ASSETS = Path(__file__).resolve().parent
SIZE, MARGIN, FINE = (960, 540), 32, 2  # pixels; all is drawn FINE times as large
PAPER, PANEL, LINE, FAINT, GREY, INK = "#151b26", "#1c2432", "#364152", "#66758b", "#9aa7b8", "#eef2f7"
CONTEXT, QUESTION, ANSWER = "#56B4E9", "#E69F00", "#F0E442"  # Okabe and Ito's
STEPS = {  # what it is now, and what makes it so
    "row": "sources.find_source(args)",
    "conversation": "utils.convert_squad_sample_to_llama_conversation(sample, tokenizer)",
    "text": "tokenizer.apply_chat_template(prompt + completion, tokenize=False)",
    "tokens": "tokenizer.apply_chat_template(prompt + completion)",
    "labels": "tokenizing.tokenize_row(row, form, tokenizer, max_length)",
}


@functools.cache
def font(size, bold=False, mono=False):
    family = fonts.FontProperties(family=f"DejaVu Sans{' Mono' * mono}", weight="bold" if bold else "normal")
    return ImageFont.truetype(fonts.findfont(family), size * FINE)


def width_of(text, size, **style):
    return font(size, **style).getlength(text) / FINE


class Page:
    """A frame under way: what all scenes have, and the shapes that they are made of."""

    def __init__(self, step, remark, color=GREY):
        self.image = Image.new("RGB", (SIZE[0] * FINE, SIZE[1] * FINE), PAPER)
        self.canvas, x = ImageDraw.Draw(self.image), MARGIN
        for name in STEPS:
            self.write(x, 36, name, INK if name == step else GREY, 19, bold=True)
            width = width_of(name, 19, bold=True)
            if name == step:
                self.box(x, 52, width, 4, ANSWER, ANSWER, 2)
            x += width + 16
            if name != "labels":
                self.write(x, 36, "→", GREY, 19)
                x += 36
        self.write(MARGIN, 508, STEPS[step], INK, 15, mono=True)
        self.write(SIZE[0] - MARGIN - width_of(remark, 15), 508, remark, color, 15)

    def write(self, x, y, text, color, size, **style):
        """Write `text` with the middle of its capitals at y."""
        self.canvas.text((x * FINE, (y + 0.36 * size) * FINE), text, color, font(size, **style), anchor="ls")

    def box(self, x, y, width, height, fill, edge, radius=8):
        corners = (x * FINE, y * FINE, (x + width) * FINE, (y + height) * FINE)
        self.canvas.rounded_rectangle(corners, radius * FINE, fill, edge, 3)

    def flow(self, pieces, x, y, right, size, line, hang=0, **style):
        """Write (text, color) pieces from (x, y) on, in lines that end at spaces; those that go on `hang`."""
        at = x
        for text, color in pieces:
            for word in re.findall(r"\n| *[^ \n]+| +", text):
                if word == "\n" or at + width_of(word, size, **style) > right:
                    at, y, word = x + hang * (word != "\n"), y + line, word.strip()
                self.write(at, y, word, color, size, **style)
                at += width_of(word, size, **style)


def paint(text, sample):
    """Cut `text` into (text, color) pieces, by what comes from the context, the question and the answer."""
    answer = utils.list_answers(sample)[0]
    colors = {sample["context"]: CONTEXT, sample["question"]: QUESTION, answer: ANSWER}
    for piece in re.split("(" + "|".join(map(re.escape, colors)) + ")", text):
        for part in re.split(f"({re.escape(answer)})", piece):  # which the context has, too
            yield part, ANSWER if part == answer else colors.get(piece, GREY)


def draw_row(sample):
    page = Page("row", "a line of train.jsonl")
    page.box(MARGIN, 84, SIZE[0] - 2 * MARGIN, 384, PANEL, LINE)
    text = ",\n".join(f'  "{name}": {json.dumps(value)}' for name, value in sample.items())
    page.flow(paint(f"{{\n{text}\n}}", sample), MARGIN + 28, 122, SIZE[0] - MARGIN - 28, 19, 44, hang=46, mono=True)
    return page


def draw_conversation(sample, conversation):
    page, y = Page("conversation", ""), 84
    for part, messages in conversation.items():
        top = y
        for message in messages:
            height = 190 if message["role"] == "system" else 72
            page.write(MARGIN, y + 36, message["role"], INK, 18, bold=True)
            page.box(150, y, 590, height, PANEL, LINE, 14)
            page.flow(paint(message["content"], sample), 174, y + 36, 724, 18, 30)
            y += height + 25
        page.box(764, top, 3, y - 25 - top, INK, INK, 1)
        page.write(786, (top + y - 25) / 2, part, INK, 18, bold=True)
    return page


def draw_text(sample, text):
    page = Page("text", f"{len(text)} characters")
    page.box(MARGIN, 84, SIZE[0] - 2 * MARGIN, 384, PANEL, LINE)
    page.flow(paint(text, sample), MARGIN + 24, 116, SIZE[0] - MARGIN - 20, 16, 30, mono=True)
    return page


def draw_tokens(step, remark, texts, colors, ids, labels):
    """Draw all tokens, with what is learned of each; a label of None is one that is not there yet."""
    page, x, y = Page(step, remark, ANSWER if labels[-1] else GREY), MARGIN, 84
    for text, color, number, label in zip(texts, colors, ids, labels):
        shown, below = text.strip(" ").replace("\n", "↵") or "␣", str(label if label == -100 else number)
        width = max(width_of(shown, 17), width_of("-100", 13)) + 12
        if x + width > SIZE[0] - MARGIN:
            x, y = MARGIN, y + 63
        learned, masked = label == number, label == -100
        face, edge = (ANSWER, ANSWER) if learned else (PAPER, LINE) if masked else (PANEL, LINE)
        ink, small = (PAPER, PAPER) if learned else (FAINT, FAINT) if masked else (color, INK)
        page.box(x, y, width, 55, face, edge, 5)
        page.write(x + (width - width_of(shown, 17)) / 2, y + 18, shown, ink, 17)
        page.write(x + (width - width_of(below, 13)) / 2, y + 40, below, small, 13)
        x += width + 5
    return page


def scenes():
    """Yield (page, milliseconds)."""
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny-llama")
    with open(ASSETS / "sample_squad" / "train.jsonl", encoding="utf-8") as file:
        sample = json.loads(next(file))
    conversation = utils.convert_squad_sample_to_llama_conversation(sample, tokenizer)
    text = tokenizer.apply_chat_template(conversation["prompt"] + conversation["completion"], tokenize=False)
    row = tokenizing.tokenize_row(sample, formats.find_form(sample), tokenizer, max_length=1024)
    ids, labels = row["input_ids"], row["labels"]
    spans = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert spans["input_ids"] == ids
    colors = [color for part, color in paint(text, sample) for _ in part]
    tokens = [text[a:b] for a, b in spans["offset_mapping"]], [colors[b - 1] for _, b in spans["offset_mapping"]], ids

    yield draw_row(sample), 3000
    yield draw_conversation(sample, conversation), 3000
    yield draw_text(sample, text), 3000
    nothing, remark = [None] * len(ids), f"{len(ids)} tokens"
    yield draw_tokens("tokens", remark, *tokens, nothing), 2500
    remark = "-100: no loss here"
    for done in range(0, len(ids), 4):
        yield draw_tokens("labels", remark, *tokens, (labels[:done] + nothing)[: len(ids)]), 60
    yield draw_tokens("labels", f"{row['answer_length']} of {len(ids)} tokens are learned", *tokens, labels), 3500


if __name__ == "__main__":
    pages, times = zip(*scenes())
    frames = [page.image.resize(SIZE, Image.Resampling.LANCZOS) for page in pages]
    colors = [
        np.array(ImageColor.getrgb(color)) for color in (FAINT, GREY, INK, CONTEXT, QUESTION, ANSWER, LINE, PAPER)
    ]
    papers = [np.array(ImageColor.getrgb(color)) for color in (PAPER, PANEL, ANSWER)]
    mixed = [(a + (b - a) * share).round() for a in papers for b in colors for share in np.linspace(0, 1, 10)]
    palette = Image.new("P", (1, 1))
    palette.putpalette(np.array(mixed, dtype=np.uint8).tobytes())  # no other colors occur
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    path = ASSETS / "preprocessing.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, loop=0, optimize=True)
