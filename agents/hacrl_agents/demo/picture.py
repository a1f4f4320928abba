"""The learning curves of the demo as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hacrl_agents.demo.runs import Run
from hacrl_agents.demo.settings import HELD_OUT_PROMPTS, DemoSettings

_COLOURS = ("#0b6e99", "#c2571a")


def draw_learning_curves(runs: Sequence[Run], *, settings: DemoSettings, path: Path) -> None:
    """Writes a PNG: a panel per agent, held-out accuracy together and alone by step."""
    import matplotlib as mpl  # half a second to import, and only needed at the end

    mpl.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import PercentFormatter

    joint = [run for run in runs if not run.alone]
    figure, panels = plt.subplots(1, len(joint), figsize=(5.2 * len(joint), 4.2), sharey=True, squeeze=False)
    for panel, run, colour in zip(panels[0], joint, _COLOURS, strict=False):
        control = next(other for other in runs if other.alone and other.name == run.name)
        for line, style, label in (
            (run, {"color": colour, "marker": "o"}, f"together ({settings.objective})"),
            (control, {"color": "#777777", "marker": "s", "linestyle": "--"}, "alone (gspo)"),
        ):
            curve = line.curve()
            panel.plot([step for step, _ in curve], [value for _, value in curve], label=label, **style)
            if curve:
                panel.annotate(
                    f"{curve[-1][1]:.0%}", curve[-1], xytext=(6, 0), textcoords="offset points", va="center"
                )
        panel.set_title(run.name)
        panel.set_xlabel("step")
        panel.grid(alpha=0.25)
        panel.margins(x=0.1)
        panel.yaxis.set_major_formatter(PercentFormatter(1.0))
        panel.legend(loc="lower right", frameon=False)
    panels[0][0].set_ylabel(f"accuracy on {HELD_OUT_PROMPTS} held-out prompts")
    figure.suptitle("Two different models learn from each other's verified rollouts")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
