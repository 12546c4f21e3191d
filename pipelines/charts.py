"""How the report's charts look, and a chart as an image in its page."""
from __future__ import annotations

import base64
import io

INK, ACCENT, SOFT = "#23272e", "#0b6e6e", "#8a9099"
LINES = ("#0b6e6e", "#d1662b", "#3d6fb6", "#a04f8f", "#b0912b", "#6b6f76", "#7fb069", "#c0504d", "#5b5ea6", "#2a9d8f")


def new_figure(width: float = 5.6, height: float = 3.3):
    """An empty matplotlib figure, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def style(axes, xlabel: str, ylabel: str) -> None:
    """Name the axes and give them the report's look."""
    axes.set_xlabel(xlabel, color=INK)
    axes.set_ylabel(ylabel, color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(SOFT)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(axis="y", color="#e4e4df", linewidth=0.8)
    axes.set_axisbelow(True)


def plain(text: str) -> str:
    """Text as matplotlib draws it letter by letter: a dollar sign starts no formula."""
    return text.replace("$", r"\$")


def svg(figure) -> str:
    """The figure as an image of its own in the page, its words as text in the reader's fonts."""
    import matplotlib

    data = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "detr"}):
        figure.savefig(data, format="svg", transparent=True, metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(data.getvalue()).decode()
