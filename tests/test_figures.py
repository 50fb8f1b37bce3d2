"""Tables and comparison.png: they fit a terminal, nothing is cut off, and nothing lies on each other."""

import itertools

import pytest
from conftest import ROOT
from matplotlib.backends.backend_agg import FigureCanvasAgg

from fllama import figures, report

NAMES = ["local", "centralized", "fedavg --num_rounds 40 --local_steps 4", "ffa", "fedsa"]


def gain(mean):
    return {"mean": mean, "low": mean - 10, "high": mean + 10, "harmed": mean < -10}


def comparison_of(num_clients=8, names=NAMES, score="exact_match"):
    """A comparison with invented figures, as comparison.json has it."""
    rows = []
    for number, name in enumerate(names):
        run = dict.fromkeys(key for key, _ in (*figures.COLUMNS.values(), *figures.LONG_ANSWERS.values()))
        run |= {"tokens": 379821, "bytes": 104.9e6, "seconds": 51, score: 50.0 + number, "eval_loss": 0.25}
        clients = []
        for client in range(num_clients):
            worth = gain(5.0 * (client - 3)) if name != "local" else None
            clients.append({"client": client, "name": f"site {client}", "split": None, "gain_over_local": worth})
        runs = [run | {score: 48.0 + number, "clients": []}, run | {score: 52.0 + number, "clients": []}]
        interval = {"low": 45.0 + number, "high": 55.0 + number}
        rows.append(run | {"name": name, "failed": 0, "runs": runs, "interval": interval, "clients": clients})
        rows[-1]["chosen"] = {"learning_rate": 0.01, "at_edge": True}
        rows[-1]["sweep"] = [{"learning_rate": 0.003}, {"learning_rate": 0.01}]
    pairs = []
    for a, b in itertools.combinations(names, 2):
        pair = {"a": a, "b": b, "of": score, "mean": -1.0, "low": -10.0, "high": 8.0, "p": 0.5}
        pairs.append(pair | {"adjusted": 1.0, "unresolved": True, "needed_repeats": 123})
    shares = {"split": 0.5, "seed": None, "method": 0.3, "interaction": None, "residual": 0.2}
    shown = {"repeats": 5, "seeds": 1, "swept": ["learning_rate"], "score": score}
    return shown | {"rows": rows, "variance": shares, "differences": pairs}


@pytest.mark.parametrize("num_clients", [0, 1, 8, 50])
def test_nothing_of_the_figure_is_cut_off(num_clients):
    """All texts are within the canvas, and the names of the arms do not lie on each other."""
    figure = figures.draw_comparison(comparison_of(num_clients))
    assert figure.bbox.width <= 1200 and figure.bbox.height <= 1600
    assert_texts_are_inside(figure, least=16)
    for labels in (figure.axes[0].get_yticklabels(), [axes.xaxis.label for axes in figure.axes]):
        boxes = [label.get_window_extent() for label in labels]
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def assert_texts_are_inside(figure, least):
    """All texts of a figure are within its canvas, and there are at least so many."""
    FigureCanvasAgg(figure).draw()
    texts = []
    for axes in figure.axes:
        left, right = axes.get_xlim()
        ticks = [label for label in axes.get_xticklabels() if left <= label.get_position()[0] <= right]  # those drawn
        texts += [*ticks, *axes.get_yticklabels(), *axes.texts, axes.xaxis.label, axes.title, axes._left_title]
    shown = [text for text in texts if text.get_text()]
    assert len(shown) >= least
    for text in shown:
        box, canvas = text.get_window_extent(), figure.bbox
        inside = 0 <= box.x0 and box.x1 <= canvas.width and 0 <= box.y0 and box.y1 <= canvas.height
        assert inside, text.get_text()


def test_points_of_the_figure():
    """A client is a point of its own, sorted by its gain; those that are harmed are orange."""
    figure = figures.draw_comparison(comparison_of(8, ["local", "fedavg"]))
    points = [line for line in figure.axes[1].lines if line.get_marker() == "o"]
    places = [(line.get_xdata()[0], line.get_ydata()[0]) for line in points]
    assert [x for x, _ in places] == [-15, -10, -5, 0, 5, 10, 15, 20]
    assert [y for _, y in places] == sorted({y for _, y in places})
    assert [line.get_color() for line in points] == [report.ORANGE] + [report.BLUE] * 7
    assert len(figures.draw_comparison(comparison_of(0)).axes) == 1


def test_tables_fit_a_terminal():
    names = ["local", "fedavg", "ffa", "rolora", "svd", "fedsa"]
    text = figures.comparison_tables(comparison_of(8, names))
    assert max(map(len, text.splitlines())) <= 110
    assert "0.01 (edge)" in text and "50.0% ±5.0" in text and "123" in text
    assert "50% the split" in text and "Not told apart here" in " ".join(text.split())
    line = next(line for line in text.splitlines() if line.startswith("| fedavg ") and "of 8" in line)
    assert [cell.strip() for cell in line.split("|")[2:6]] == ["+2.5", "-15.0", "+20.0", "1 of 8: site 0"]


def test_clients_that_cannot_be_told_are_not_counted():
    comparison = comparison_of(8, ["local", "fedavg"])
    for client in comparison["rows"][1]["clients"][4:]:
        client["gain_over_local"] |= {"low": None, "high": None, "harmed": None}
    text = figures.table_of_gains(comparison["rows"])
    assert "| 1 of 4: site 0 |" in text and "About 0.1 of 4 would be by chance." in text
    for client in comparison["rows"][1]["clients"]:
        client["gain_over_local"]["harmed"] = None
    text = figures.table_of_gains(comparison["rows"])
    assert " by chance" not in text and [cell.strip() for cell in text.splitlines()[2].split("|")][-2] == "-"


def test_what_is_said_of_repeats_and_seeds():
    """One split and one seed get advice, whatever the arms; intervals of one split are over its seeds."""
    comparison = comparison_of(0, ["fedavg"])
    del comparison["differences"]
    for repeats, seeds, advised in ((1, 1, True), (5, 1, False), (1, 2, False)):
        text = figures.comparison_tables(comparison | {"repeats": repeats, "seeds": seeds})
        assert ("One seed and one split" in text) is advised
        assert f"interval over the {'repeats' if repeats > 1 else 'seeds'} " in text
    for swept, questions in (([], "all questions"), (["learning_rate"], "the scored half of the questions")):
        figure = figures.draw_comparison(comparison | {"swept": swept})
        assert f"exact match, {questions}, percent" in figure.axes[0].get_xlabel()
        assert ("the scores are on the other" in figures.notes_on_arms(comparison | {"swept": swept})) is bool(swept)


def test_a_baseline_that_was_chosen_on_global_rows_is_named():
    """What `local` can do on own rows may be more, with another value; not if it has a value of its own."""
    rows = comparison_of(8, ["local --lora_r 8", "fedavg"])["rows"]
    assert "The value of local is the best on global rows." in figures.table_of_gains(rows)
    rows[0]["chosen"] = None
    assert "The value of local" not in figures.table_of_gains(rows)


def test_one_flag_at_the_edge_says_nothing_of_another():
    comparison = comparison_of(0, ["fedavgm"])
    row = comparison["rows"][0]
    row["chosen"] = {"learning_rate": 0.01, "server_lr": 1.0, "at_edge": True}
    row["sweep"] = [
        {"learning_rate": rate, "server_lr": server} for rate in (0.003, 0.01) for server in (0.3, 1.0, 3.0)
    ]
    line = next(
        line for line in figures.table_of_costs(comparison["rows"]).splitlines() if line.startswith("| fedavgm")
    )
    assert [cell.strip() for cell in line.split("|")[2:4]] == ["0.01 (edge)", "1"]


def test_the_figure_of_privacy(monkeypatch):
    """Each private arm is a point at its epsilon, with the audit's bound left of it; the others are lines."""
    monkeypatch.syspath_prepend(ROOT / "assets")
    import make_privacy_figure

    rows = []
    for name, epsilon, score in (
        ("local --learning_rate 5e-3", None, 15),
        ("fedavg", None, 80),
        ("fedavg --lora_variant ffa --dp_epsilon 8", 7.9, 60),
        ("fedavg --lora_variant ffa --dp_epsilon 1", 0.9, 40),
        ("fedavg --dp_epsilon 8", 7.9, 50),
    ):
        runs = [{"epsilon_lower_bound": 0.0}, {"epsilon_lower_bound": 0.3}]
        interval = {"low": score - 5, "high": score + 5}
        rows.append({"name": name, "epsilon": epsilon, "exact_match": score, "interval": interval, "runs": runs})
    figure = make_privacy_figure.draw({"rows": rows})
    assert_texts_are_inside(figure, least=14)
    (axes,) = figure.axes
    curves = [line for line in axes.lines if line.get_marker() == "o"]
    assert [list(line.get_ydata()) for line in curves] == [[40, 60], [50]]
    assert list(curves[0].get_xdata()) == pytest.approx([0.9, 7.9], abs=0.05)
    bounds = [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "|"]
    assert bounds == [0.3] * 3
    assert [text.get_text() for text in axes.texts] == ["local, without privacy", "fedavg, without privacy"]
