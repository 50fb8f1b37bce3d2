"""Make assets/fllama.png: eight clients around a llama, and the name.

usage: python assets/make_logo.py
"""

import math
from pathlib import Path

from PIL import Image, ImageDraw

SIZE, FINE = (800, 240), 8  # pixels; drawn FINE times as large
BLUE, RED, WHITE, GREY = "#2A86C8", "#D55E00", "#FFFFFF", "#8A97A8"  # each is seen on white and on black
CLIENTS, CENTER, RING, DISK, NODE = 8, (122, 120), 103, 76, 12


class Canvas:
    def __init__(self):
        self.image = Image.new("RGBA", (SIZE[0] * FINE, SIZE[1] * FINE), (255, 255, 255, 0))
        self.draw = ImageDraw.Draw(self.image)

    def disk(self, x, y, radius, color):
        self.draw.ellipse([FINE * value for value in (x - radius, y - radius, x + radius, y + radius)], color)

    def bar(self, x, y, width, height, radius, color):
        corners = [FINE * value for value in (x, y, x + width, y + height)]
        self.draw.rounded_rectangle(corners, FINE * radius, color)

    def line(self, points, width, color):
        """Draw a line with round ends and joints."""
        self.draw.line([(FINE * x, FINE * y) for x, y in points], color, FINE * width)
        for x, y in points:
            self.disk(x, y, width / 2, color)

    def arc(self, x, y, radius, start, end, width, color):
        """Draw an arc from angle `start` to `end`, in degrees, clockwise from the right."""
        outer = radius + width / 2
        corners = [FINE * value for value in (x - outer, y - outer, x + outer, y + outer)]
        self.draw.arc(corners, start, end, color, FINE * width)
        for angle in (math.radians(start), math.radians(end)):
            self.disk(x + radius * math.cos(angle), y + radius * math.sin(angle), width / 2, color)


def draw_mark(canvas):
    """Draw the clients, each joined to its neighbours and to the centre, where the llama stands."""
    x, y = CENTER
    canvas.arc(x, y, RING, 0, 360, 5, GREY)
    for client in range(CLIENTS):
        angle = 2 * math.pi * (client + 0.5) / CLIENTS
        at = x + RING * math.cos(angle), y + RING * math.sin(angle)
        canvas.line([CENTER, at], 5, GREY)
        canvas.disk(*at, NODE, RED)
    canvas.disk(x, y, DISK, BLUE)

    for left in (-41, -25, 3, 19):  # legs
        canvas.bar(x + left, y + 18, 12, 37, 5, WHITE)
    canvas.bar(x - 44, y - 5, 75, 38, 16, WHITE)  # body
    canvas.line([(x - 40, y + 8), (x - 50, y + 16)], 11, WHITE)  # tail
    canvas.bar(x + 8, y - 51, 23, 80, 11, WHITE)  # neck
    canvas.bar(x + 8, y - 51, 46, 24, 11, WHITE)  # head
    canvas.line([(x + 16, y - 46), (x + 13, y - 62)], 9, WHITE)  # ears
    canvas.line([(x + 26, y - 46), (x + 29, y - 62)], 9, WHITE)
    canvas.disk(x + 33, y - 41, 3, BLUE)  # eye
    canvas.bar(x - 25, y - 6, 22, 27, 3, RED)  # blanket
    canvas.bar(x - 25, y + 9, 22, 4, 0, WHITE)


def draw_name(canvas, left, base, height, stroke):
    """Draw "fllama" in bars and arcs; `height` is that of an a, without the stroke."""
    radius, top, gap = height / 2, base - 1.7 * height, stroke + 22

    def bar(x, start, end, color=BLUE):
        canvas.line([(x, start), (x, end)], stroke, color)

    hook = 24
    bar(left, base, top + hook, RED)
    canvas.arc(left + hook, top + hook, hook, 180, 275, stroke, RED)
    canvas.line([(left - 18, base - height), (left + 22, base - height)], stroke, RED)
    left += hook + gap
    for _ in "ll":
        bar(left, base, top)
        left += gap
    for letter in "ama":
        if letter == "a":
            canvas.arc(left + radius, base - radius, radius, 0, 360, stroke, BLUE)
            left += 2 * radius
            bar(left, base, base - height)
        else:
            bar(left, base, base - height)
            arch = 0.36 * height
            for _ in range(2):
                canvas.arc(left + arch, base - height + arch, arch, 180, 360, stroke, BLUE)
                left += 2 * arch
                bar(left, base, base - height + arch)
        left += gap


if __name__ == "__main__":
    canvas = Canvas()
    draw_mark(canvas)
    draw_name(canvas, left=308, base=170, height=66, stroke=19)
    image = canvas.image.resize(SIZE, Image.Resampling.LANCZOS)
    image.save(Path(__file__).parent / "fllama.png", optimize=True)
