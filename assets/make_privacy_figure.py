"""Draw assets/privacy.png from the comparison of docs/privacy.md: exact match against epsilon, with the audit's bound.

usage: python assets/make_privacy_figure.py outputs-privacy/comparison.json

A line for each variant that was trained with differential privacy: its points are at the epsilon that was spent, each
with its 95% interval over the repeats. The | at the height of a point is the lower bound on epsilon that the audit has
shown, the largest of the repeats: it has to be left of the point. Runs without differential privacy are horizontal.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from fllama import report

COLORS = {"ffa": report.BLUE, "lora": report.ORANGE}
ASIDE = {"ffa": -0.04, "lora": 0.04}  # so that the intervals of two variants do not lie on each other


def variant_of(row):
    return "ffa" if "--lora_variant ffa" in row["name"] else "lora"


def draw(comparison):
    """Return the figure of a comparison.json."""
    (axes,) = report.new_axes((7, 4))
    private = sorted((row for row in comparison["rows"] if row["epsilon"] is not None), key=lambda row: row["epsilon"])
    right = private[-1]["epsilon"]
    for row in comparison["rows"]:
        if row["epsilon"] is None:
            height, name = row["exact_match"], row["name"].split()[0]
            axes.axhline(height, color=report.GREY, linewidth=0.8, linestyle="--")
            axes.text(right, height + 1.5, f"{name}, without privacy", color=report.GREY, ha="right")
    for variant, color in COLORS.items():
        rows = [row for row in private if variant_of(row) == variant]
        places = [row["epsilon"] + ASIDE[variant] for row in rows]
        axes.plot(places, [row["exact_match"] for row in rows], "o-", color=color, label=f"--lora_variant {variant}")
        for place, row in zip(places, rows):
            if row["interval"]:
                axes.vlines(place, row["interval"]["low"], row["interval"]["high"], color=color, alpha=0.5)
            bound = max(run["epsilon_lower_bound"] for run in row["runs"])
            axes.plot(bound, row["exact_match"], "|", color=color, markersize=12, markeredgewidth=2)
    axes.legend(frameon=False, labelcolor="linecolor", loc="lower right", bbox_to_anchor=(1, 0.2))
    axes.set(xlabel="epsilon:  ● spent   | shown by the audit, at least", ylabel="exact match, percent")
    axes.set(xlim=(-0.2, right + 0.3), ylim=(0, 100))
    return axes.figure


if __name__ == "__main__":
    figure = draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    figure.savefig(Path(__file__).parent / "privacy.png", transparent=True)
