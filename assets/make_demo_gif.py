"""Make assets/demo.gif: a recording of `python main.py` in a terminal.

usage: python assets/make_demo_gif.py

It runs the program in a folder that is removed afterwards, writes down what comes when, and draws it SPEED times as
fast. As long as the run itself, about 90 seconds on 2 cores.
"""

import codecs
import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import tempfile
import termios
import time
from pathlib import Path

import matplotlib.font_manager as fonts
import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
SHOWN_ROOT, BLOCKS = "/home/you/fllama", "▏▎▍▌▋▊▉█"  # the latter in progress bars
PROMPT, COMMAND = "\x1b[90m$\x1b[0m ", "python main.py"
COLUMNS, ROWS, SPEED, FRAME = 120, 30, 7, 0.15  # FRAME: seconds between frames, as shown
FONT, BOLD = (ImageFont.truetype(fonts.findfont(f"DejaVu Sans Mono:{weight}"), 15) for weight in ("regular", "bold"))
CELL, MARGIN, BAR = (9, 20), 22, 44  # pixels of a character, around the text, and of the title
PAPER, PANEL, GREY, INK = "#151b26", "#222c3c", "#9aa7b8", "#d8e0ea"
# Okabe and Ito's, for the terminal's black, red, green, yellow, blue, magenta, cyan, white
COLORS = [GREY, "#D55E00", "#009E73", "#F0E442", "#56B4E9", "#CC79A7", "#56B4E9", INK]


def record():
    """Run the command in a terminal of its own; returns [(seconds, text)]."""
    screen, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    environment = os.environ | {"TERM": "xterm-256color", "PYTHONUNBUFFERED": "1"}
    for name in ("COLUMNS", "LINES"):
        environment.pop(name, None)
    decoder, events = codecs.getincrementaldecoder("utf-8")("replace"), []
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, str(ROOT / "main.py")]
        start = time.monotonic()
        process = subprocess.Popen(
            words, stdin=terminal, stdout=terminal, stderr=terminal, cwd=folder, env=environment, start_new_session=True
        )
        os.close(terminal)
        while select.select([screen], [], [])[0]:
            time.sleep(0.02)  # for the rest of a line
            try:
                data = os.read(screen, 1 << 20)
            except OSError:  # all processes have closed it
                break
            text = decoder.decode(data).replace(str(ROOT), SHOWN_ROOT).replace(folder, SHOWN_ROOT)
            events.append((time.monotonic() - start, text))
        if process.wait():
            raise SystemExit(f"{COMMAND} ended with exit code {process.returncode}")
    return events


class Terminal:
    """As much of a terminal as the output needs: lines, returns, colors, moves up and down, clearing."""

    def __init__(self):
        self.lines, self.row, self.column, self.style = [{} for _ in range(ROWS)], 0, 0, (INK, False)

    def feed(self, text):
        for code, name, control, plain in re.findall(r"\x1b\[([\d;?]*)([A-Za-z])|([\x00-\x1f])|([^\x00-\x1f]+)", text):
            if name:
                self.escape(name, [int(number) for number in re.findall(r"\d+", code)])
            elif control == "\r":
                self.column = 0
            elif control == "\n":
                self.next_line()
            elif control == "\b":
                self.column = max(0, self.column - 1)
            for character in plain:
                if self.column == COLUMNS:
                    self.next_line()
                    self.column = 0
                self.lines[self.row][self.column] = character, *self.style
                self.column += 1

    def next_line(self):
        self.row += 1
        if self.row == ROWS:
            self.row, self.lines = ROWS - 1, [*self.lines[1:], {}]

    def escape(self, name, numbers):
        first = numbers[0] if numbers else 0
        if name in "AB":
            self.row = min(max(self.row + max(1, first) * (1 if name == "B" else -1), 0), ROWS - 1)
        elif name == "K":
            keep = {0: range(self.column), 1: range(self.column + 1, COLUMNS), 2: ()}[first]
            self.lines[self.row] = {i: self.lines[self.row][i] for i in keep if i in self.lines[self.row]}
        elif name == "J":
            self.lines[self.row :] = [{} for _ in self.lines[self.row :]]
        elif name == "m":
            for number in numbers or [0]:
                color, bold = self.style
                if number in (0, 22, 39):
                    self.style = INK, bold and number == 39
                elif number == 1:
                    self.style = color, True
                elif number in (2, 90):
                    self.style = GREY, bold
                elif number % 60 in range(30, 38):
                    self.style = COLORS[number % 10], bold


def draw(terminal, caption, cursor):
    """Draw the terminal as it is now."""
    size = COLUMNS * CELL[0] + 2 * MARGIN, BAR + ROWS * CELL[1] + 2 * MARGIN
    image = Image.new("RGB", size, PAPER)
    canvas = ImageDraw.Draw(image)
    canvas.rectangle((0, 0, size[0], BAR), PANEL)
    canvas.text((MARGIN, BAR / 2), "fllama", INK, FONT, anchor="lm")
    canvas.text((size[0] - MARGIN, BAR / 2), caption, GREY, FONT, anchor="rm")
    for row, line in enumerate(terminal.lines):
        for column, (character, color, bold) in line.items():
            x, y = MARGIN + column * CELL[0], BAR + MARGIN + row * CELL[1]
            if character in BLOCKS:  # whose glyphs would leave seams
                width = CELL[0] * (BLOCKS.index(character) + 1) // len(BLOCKS)
                canvas.rectangle((x, y + 2, x + width - 1, y + CELL[1] - 3), color)
            else:
                canvas.text((x, y), character, color, BOLD if bold else FONT)
    if cursor:
        x, y = MARGIN + terminal.column * CELL[0], BAR + MARGIN + terminal.row * CELL[1]
        canvas.rectangle((x, y + 2, x + CELL[0] - 1, y + CELL[1] - 3), GREY)
    return image


def film(events):
    """Return [(image, milliseconds)]: the command is typed, runs, and its last lines stay."""
    terminal, frames = Terminal(), []
    terminal.feed(PROMPT)
    frames.append((draw(terminal, "", True), 700))
    for character in COMMAND:
        terminal.feed(character)
        frames.append((draw(terminal, "", True), 60))
    terminal.feed("\r\n")
    end, done = events[-1][0], 0
    for now in np.arange(0, end, FRAME * SPEED):
        while done < len(events) and events[done][0] <= now:
            terminal.feed(events[done][1])
            done += 1
        frames.append((draw(terminal, f"{SPEED}x speed, {now:.0f} s", False), round(1000 * FRAME)))
    for _, text in events[done:]:
        terminal.feed(text)
    terminal.feed(PROMPT)
    frames.append((draw(terminal, f"{SPEED}x speed, {end:.0f} s", True), 5000))
    return frames


if __name__ == "__main__":
    images, times = zip(*film(record()))
    pairs = [(PAPER, color) for color in dict.fromkeys(COLORS)] + [(PANEL, INK), (PANEL, GREY)]
    ends = [[np.array(ImageColor.getrgb(color)) for color in pair] for pair in pairs]
    mixed = [(a + (b - a) * share).round() for a, b in ends for share in np.linspace(0, 1, 6)]
    palette = Image.new("P", (1, 1))
    palette.putpalette(np.array(mixed, dtype=np.uint8).tobytes())  # no other colors occur
    images = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    path = ROOT / "assets" / "demo.gif"
    images[0].save(path, save_all=True, append_images=images[1:], duration=times, loop=0, optimize=True)
