"""Draw docs/privacy.png from the comparison of docs/privacy.md: exact match against epsilon, with the audit's bound.

usage: python assets/make_privacy_figure.py outputs-privacy/comparison.json

One line for each variant that was trained with differential privacy, its points at the epsilon that was spent; a bar
from the lowest to the highest repeat. The tick below each point is the lower bound on epsilon that the audit has shown:
it has to be left of the point. Runs without differential privacy are horizontal lines.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from fllama import report

COLORS = {"ffa": report.BLUE, "lora": report.ORANGE}


def draw(comparison, path):
    """Draw the figure of a comparison.json."""
    axes = report.new_axes((7, 4))
    points = {"ffa": [], "lora": []}
    for row in comparison["rows"]:
        if row["epsilon"] is None:
            axes.axhline(row["exact_match"], color=report.GREY, linewidth=0.8)
            label = f"{row['name']}: {row['exact_match']:.0f}%, AUC {row['audit_auc']:.2f}"
            axes.annotate(label, (0.02, row["exact_match"]), xycoords=("axes fraction", "data"), color=report.GREY)
            continue
        points["ffa" if "ffa" in row["name"] else "lora"].append(row)
    for variant, rows in points.items():
        rows.sort(key=lambda row: row["epsilon"])
        epsilons, scores = [row["epsilon"] for row in rows], [row["exact_match"] for row in rows]
        axes.plot(epsilons, scores, "o-", color=COLORS[variant], label=variant)
        for row in rows:
            repeats = [run["exact_match"] for run in row["runs"]]
            axes.plot([row["epsilon"]] * 2, [min(repeats), max(repeats)], color=COLORS[variant], alpha=0.5, linewidth=3)
            bound = max(run["epsilon_lower_bound"] for run in row["runs"])
            axes.plot(bound, row["exact_match"], "|", color=COLORS[variant], markersize=12)
    axes.legend(frameon=False, labelcolor="linecolor")
    axes.set(xlabel="epsilon:  ● spent    | lower bound that the audit has shown", ylabel="exact match, percent")
    axes.set(xlim=(-0.1, None), ylim=(0, 100))
    axes.figure.savefig(path, transparent=True)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(__file__).parent.parent / "docs" / "privacy.png")
