"""Make assets/pipeline.gif: the rounds of a real run, in the plane in which its LoRA weights move most.

usage: python assets/make_pipeline_gif.py

Four clients with different data fine-tune the embedded model. Their LoRA vectors after every local step are projected
on the first two principal components of all of them, which keeps an average an average. 1 minute on 2 cores.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import main
import utils
from fllama import runlog

CLIENTS, ROUNDS, STEPS = 4, 5, 6
FLAGS = f"--num_clients {CLIENTS} --num_rounds {ROUNDS} --local_steps {STEPS} --eval_rounds 1 --world_size 2 "
FLAGS += "--partition dirichlet --partition_column site --dirichlet_alpha 0.1 --lr_scheduler_type linear"
LOCAL, AVERAGE, EVALUATE = range(3)
STAGES = [
    (f"{STEPS} local steps", "each client alone, on its own rows"),
    ("one all-reduce", "everybody gets the average"),
    ("evaluate", "the average, on held-out rows"),
]
SIZE, PLANE, SIDE = (960, 540), (24, 68, 540, 424), (588, 348)  # pixels: x, y, width and height; x and width
PAPER, PANEL, LIT, LINE, GREY, INK = "#151b26", "#1c2432", "#2b3950", "#364152", "#9aa7b8", "#eef2f7"
COLORS, GLOBAL = ["#E69F00", "#56B4E9", "#009E73", "#CC79A7"], "#F0E442"  # Okabe and Ito's


def traced_rank(rank, args, run):
    """main.run_rank that writes down (round, client, step, LoRA vector, rows) at the start and after every step."""
    import federated  # not before the rank has an environment of its own

    trace, original = [], federated.local_steps

    def local_steps(args, trainer, batches, parameters, server, client_state, turn, *more):
        lora, optimizer_step = federated.lora_parameters(trainer.model), trainer.optimizer.step

        def note(step):
            trace.append((server.rounds_done, turn.client, step, utils.flatten_parameters(lora), turn.weight))

        def noted_step():
            optimizer_step()
            note(trace[-1][2] + 1)

        note(0)
        trainer.optimizer.step = noted_step
        loss = original(args, trainer, batches, parameters, server, client_state, turn, *more)
        trainer.optimizer.step = optimizer_step
        return loss

    federated.local_steps = local_steps
    main.run_rank(rank, args, run)
    torch.save(trace, f"{args.output_dir}/trace_{rank}.pt")


def run():
    """Return positions (round, client, step, 2), the rows of each client, and the held-out loss after each round."""
    with tempfile.TemporaryDirectory() as folder:
        main.main([*FLAGS.split(), "--output_dir", folder], target=traced_rank)
        trace = [note for path in Path(folder).glob("trace_*.pt") for note in torch.load(path)]
        losses = [entry["eval_loss"] for entry in runlog.read_rounds(folder)]
    trace.sort(key=lambda note: note[:3])
    vectors = torch.stack([note[3] for note in trace]).double().numpy()
    vectors -= vectors.mean(axis=0)
    u, s, _ = np.linalg.svd(vectors, full_matrices=False)
    positions = (u[:, :2] * s[:2] * np.sign(-u[0, :2])).reshape(ROUNDS, CLIENTS, STEPS + 1, 2)  # from the lower left on
    return positions, np.array([note[4] for note in trace[: CLIENTS * (STEPS + 1) : STEPS + 1]]), losses


def view_of(points):
    """Return [x and y of the center, size of a pixel] with which all of `points` are seen."""
    low, high = points.reshape(-1, 2).min(axis=0), points.reshape(-1, 2).max(axis=0)
    scale = max((high - low) / (PLANE[2] - 110, PLANE[3] - 90))
    return np.array([*(low + high) / 2 + (40 * scale, 0), scale])  # with room for names


def timeline(positions):
    """Yield (round, stage, local steps done, share of the way to the average, view, milliseconds) of every frame."""
    views = [view_of(points) for points in positions]
    for view in views:
        view[2] *= (views[0][2] / view[2]) ** 0.2  # all equally large would hide that they shrink
    views.append(view_of(positions))  # at last, all rounds
    for number, view in enumerate(views[:-1]):
        slow = number == 0
        per_step = 4 if slow else 2
        yield number, LOCAL, 0, 0, view, 700 if slow else 200
        for frame in range(1, STEPS * per_step):
            yield number, LOCAL, frame / per_step, 0, view, 60
        yield number, LOCAL, STEPS, 0, view, 1200 if slow else 200
        yield number, AVERAGE, STEPS, 0, view, 700 if slow else 360
        for share in np.linspace(0, 1, 9)[1:-1]:
            yield number, AVERAGE, STEPS, share**2 * (3 - 2 * share), view, 60
        yield number, AVERAGE, STEPS, 1, view, 700 if slow else 120
        yield number, EVALUATE, STEPS, 1, view, 600
        for share in np.linspace(0, 1, 9)[1:-1]:
            share = share**2 * (3 - 2 * share)
            yield number, EVALUATE, STEPS, 1, view + share * (views[number + 1] - view), 60
    yield number, EVALUATE, STEPS, 1, views[-1], 1900


def draw_plane(plane, positions, rows, number, stage, done, share, view):
    """Draw where the clients are and were; those of earlier rounds pale."""

    def name(at, radius, text, color):
        plane.annotate(
            text, at, (0.72 * radius + 6, 0), textcoords="offset points", color=color, size=11.5, va="center"
        )

    x, y, scale = view
    plane.set(xlim=(x - PLANE[2] / 2 * scale, x + PLANE[2] / 2 * scale), xticks=[], facecolor=PANEL)
    plane.set(ylim=(y - PLANE[3] / 2 * scale, y + PLANE[3] / 2 * scale), yticks=[])
    plane.spines[:].set_color(LINE)
    starts = [positions[0, 0, 0], *(rows @ ends / rows.sum() for ends in positions[:, :, -1])]
    together, first = not done or share == 1, number == 0
    for past in range(number):
        for path, color in zip(positions[past], COLORS):
            plane.plot(*path.T, color=color, lw=1.5, alpha=0.5)
    plane.plot(*np.array(starts[: number + 1 + (share == 1)]).T, "o-", color=GLOBAL, lw=2.5, ms=6)
    if stage == AVERAGE:
        plane.add_patch(Circle(starts[number + 1], 17 * scale, fc="none", ec=GLOBAL, lw=2))
    for client, (path, color) in enumerate(zip(positions[number], COLORS)):
        whole, alpha = int(done), 0.35 if share == 1 else 1
        at = path[whole] + (done - whole) * (path[min(whole + 1, STEPS)] - path[whole])
        plane.plot(*np.vstack([path[: whole + 1], at]).T, color=color, lw=2.5, alpha=alpha)
        plane.plot(*path[1 : whole + 1].T, "o", color=color, ms=5, alpha=alpha)
        if together:
            continue
        if stage == AVERAGE:
            plane.plot(*np.array([at, starts[number + 1]]).T, "--", color=INK, lw=1.2)
        at, radius = at + share * (starts[number + 1] - at), 9 + 14 * rows[client] / rows.sum()
        plane.add_patch(Circle(at, radius * scale, fc=color, ec=PANEL, lw=1.5, zorder=4))
        plane.text(*at, client, color=PAPER, size=12, weight="bold", ha="center", va="center_baseline", zorder=5)
        if first and stage == LOCAL and done == STEPS:
            name(at, radius, f"client {client}, {rows[client]} rows", color)
    if together:
        at = starts[number + (share == 1)]
        plane.add_patch(Circle(at, 17 * scale, fc=GLOBAL, ec=PANEL, lw=1.5, zorder=5))
        if first and stage != EVALUATE:
            name(at, 17, "the average,\nweighted by rows" if done else "all start from the same", GLOBAL)


def draw(figure, positions, rows, losses, number, stage, done, share, view):
    """Draw one frame."""

    def axes(x, y, width, height):
        return figure.add_axes([x / SIZE[0], 1 - (y + height) / SIZE[1], width / SIZE[0], height / SIZE[1]])

    figure.clear()
    draw_plane(axes(*PLANE), positions, rows, number, stage, done, share, view)
    page, (left, width) = axes(0, 0, *SIZE), SIDE
    page.set(xlim=(0, SIZE[0]), ylim=(SIZE[1], 0))
    page.axis("off")
    page.text(PLANE[0], 36, f"round {number + 1} of {ROUNDS}", color=INK, size=19, weight="bold", va="center")
    foot = "LoRA weights, on two principal components; zooms in round by round"
    page.text(PLANE[0], 514, foot, color=GREY, size=10.5, va="center")
    for i, (title, text) in enumerate(STAGES):
        top, (face, edge, color) = PLANE[1] + 74 * i, (LIT, GLOBAL, INK) if i == stage else (PANEL, LINE, GREY)
        page.add_patch(FancyBboxPatch((left, top), width, 62, "round,pad=0,rounding_size=8", fc=face, ec=edge, lw=1.5))
        page.text(left + 18, top + 21, title, color=color, size=14, weight="bold", va="center")
        page.text(left + 18, top + 44, text, color=color, size=11.5, va="center")

    page.text(left, 314, "held-out loss", color=INK, size=14, weight="bold", va="center")
    chart, known = axes(left, 332, width, 160), number + (stage == EVALUATE)
    chart.set(xlim=(0.5, ROUNDS + 0.7), ylim=(min(losses) - 0.1, max(losses) + 0.2), yticks=[], facecolor="none")
    chart.set_xticks(range(1, ROUNDS + 1), ["round 1", *range(2, ROUNDS + 1)])
    chart.tick_params(colors=GREY, labelsize=11, length=0)
    chart.spines[["top", "left", "right"]].set_visible(False)
    chart.spines["bottom"].set_color(LINE)
    chart.plot(range(1, known + 1), losses[:known], "o-", color=GLOBAL, lw=2.5, ms=7)
    for i, loss in enumerate(losses[:known], start=1):
        chart.annotate(f"{loss:.2f}", (i, loss), (5, 6), textcoords="offset points", color=INK, size=12)


def save(frames, times, path):
    """Save a GIF whose frames share a palette: no flicker, and only what changes takes room."""
    papers = [np.array(to_rgb(color)) for color in (PAPER, PANEL, LIT)]
    inks = [np.array(to_rgb(color)) for color in (*COLORS, GLOBAL, GREY, INK)]
    mixed = [a + (b - a) * share for a in papers for b in inks for share in np.linspace(0, 1, 7)] + [to_rgb(LINE)]
    palette = Image.new("P", (1, 1))
    palette.putpalette((np.array(mixed) * 255).round().astype(np.uint8).tobytes())  # hardly any other colors occur
    frames = [Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, loop=0, optimize=True)


if __name__ == "__main__":
    made = run()
    canvas = FigureCanvasAgg(Figure(figsize=(SIZE[0] / 100, SIZE[1] / 100), dpi=100, facecolor=PAPER))
    frames, times = [], []
    for *state, milliseconds in timeline(made[0]):
        draw(canvas.figure, *made, *state)
        canvas.draw()
        frames.append(np.array(canvas.buffer_rgba())[:, :, :3])
        times.append(milliseconds)
    save(frames, times, Path(__file__).with_name("pipeline.gif"))
