"""The report's charts, how they look, and a chart as an image in its page."""
from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np

INK, ACCENT, SOFT = "#23272e", "#0b6e6e", "#8a9099"
LINES = ("#0b6e6e", "#d1662b", "#3d6fb6", "#a04f8f", "#b0912b", "#6b6f76", "#7fb069", "#c0504d", "#5b5ea6", "#2a9d8f")
BETTER, WORSE = ACCENT, "#c2571f"
LOSSES = ("loss", "loss_ce", "loss_bbox", "loss_giou")


def new_figure(width: float = 4.4, height: float = 2.9):
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


def short(text: str, longest: int = 18) -> str:
    """A name for an axis: `plain`, its end cut off where it is too long."""
    return plain(text if len(text) <= longest else text[: longest - 1] + "…")


def loss_figure(steps: list[dict[str, Any]]):
    """The losses over a training's steps."""
    figure = new_figure()
    _draw_losses(figure.subplots(), steps)
    return figure


def ap_figure(validations: list[dict[str, Any]]):
    """AP and AP50 of a training's validations."""
    figure = new_figure()
    _draw_ap(figure.subplots(), validations)
    return figure


def curves_figure(history: dict[str, Any]):
    """Losses and AP of a history.json side by side, what there is of them."""
    parts = [(draw, history[key]) for draw, key in ((_draw_losses, "steps"), (_draw_ap, "validations")) if history[key]]
    figure = new_figure(4.8 * len(parts), 3.2)
    for axes, (draw, values) in zip(np.ravel(figure.subplots(1, len(parts))), parts, strict=True):
        draw(axes, values)
    return figure


def precision_recall_figure(metrics: dict[str, Any], point: dict[str, Any] | None):
    """Precision over recall at IoU 0.5: the mean over classes, up to nine classes, and over all at one threshold."""
    figure = new_figure(4.4, 3.5)
    axes = figure.subplots()
    curve = metrics["precision_recall"]
    classes = [
        (c["name"], values) for c, values in zip(metrics["per_class"], curve["per_class"], strict=True) if values
    ]
    if 1 < len(classes) <= len(LINES) - 1:
        for (name, values), colour in zip(classes, LINES[1:], strict=False):
            axes.plot(curve["recall"], values, color=colour, linewidth=1.2, label=" " + short(name))
    axes.plot(curve["recall"], curve["precision"], color=LINES[0], linewidth=2.4, label="mean over classes")
    if point is not None and point["precision"] is not None:
        axes.plot(point["recall"], point["precision"], "o", color=INK, markersize=6,
                  label=f"all, from a score of {point['threshold']:.2f}")  # fmt: skip
    style(axes, "recall", "precision")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False, fontsize=8.5, loc="lower left")
    return figure


def differences_figure(rows: list[dict[str, Any]]):
    """The difference in AP of each class ("name", "difference", "low", "high") with its interval, in rows.

    An interval that does not reach 0 is coloured; a row without one is a dot alone.
    """
    figure = new_figure(4.4, 0.75 + 0.25 * len(rows))
    axes = figure.subplots()
    axes.axvline(0, color=INK, linewidth=1)
    for at, row in enumerate(rows):
        low, high = row["low"], row["high"]
        colour = SOFT
        if low is not None:
            colour = BETTER if low > 0 else WORSE if high < 0 else SOFT
            axes.plot([low, high], [at, at], color=colour, linewidth=2.2, solid_capstyle="butt")
        axes.plot(row["difference"], at, "o", color=colour, markersize=5.5)
    style(axes, "AP, this model less the champion", "")
    axes.grid(visible=False, axis="y")
    axes.grid(axis="x", color="#e4e4df", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [short(row["name"]) for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    return figure


def confusion_figure(confusion: dict[str, Any]):
    """A confusion matrix as a heat map: counts in the cells, colour by the share of the row."""
    matrix = np.array(confusion["matrix"], float)
    names = [short(name, 14) for name in confusion["names"]]
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    longest = max(map(len, names))
    side = 0.36 * len(names)
    figure = new_figure(max(3.6, side + 0.45 + 0.085 * longest), max(2.6, side + 0.45 + 0.085 * longest))
    axes = figure.subplots()
    axes.pcolormesh(share, cmap="GnBu", vmin=0, vmax=1, edgecolors="#e4e4df", linewidth=0.5)
    for y, x in np.argwhere(matrix > 0).tolist():
        dark = share[y, x] > 0.6
        axes.text(x + 0.5, y + 0.5, f"{matrix[y, x]:.0f}", ha="center", va="center", fontsize=8,
                  color="white" if dark else INK)  # fmt: skip
    style(axes, "found as", "labelled as")
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.xaxis.set_label_position("top")
    axes.xaxis.tick_top()
    at = np.arange(len(names)) + 0.5
    axes.set_xticks(at, [*names[:-1], "missed"], rotation=90 if longest > 3 else 0)
    axes.set_yticks(at, [*names[:-1], "nothing"])
    axes.tick_params(length=0)
    axes.invert_yaxis()
    axes.set_aspect("equal")
    return figure


def calibration_figure(bins: list[dict[str, Any]]):
    """How often a detection is right over its score; a dot's area grows with the detections in its bin."""
    figure = new_figure(4.4, 3.5)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=SOFT, linewidth=1, linestyle="--", label="as sure as right")
    filled = [b for b in bins if b["count"]]
    scores, right = ([b[key] for b in filled] for key in ("score", "precision"))
    counts = np.array([b["count"] for b in filled], float)
    axes.plot(scores, right, color=LINES[0], linewidth=1.6)
    axes.scatter(scores, right, 12 + 90 * counts / counts.max(), color=LINES[0], label="detections, by score", zorder=3)
    style(axes, "score", "share that is right, IoU .50")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    legend = axes.legend(frameon=False, fontsize=8.5, loc="upper left")
    legend.legend_handles[1].set_sizes([30])
    return figure


def errors_figure(rows: list[dict[str, Any]]):
    """Kinds of errors ("kind", "count", "cost" in AP50 or None): how often, and what mending each would gain."""
    figure = new_figure(4.4, 0.75 + 0.34 * len(rows))
    kinds = [("count", SOFT, "how often", "{:,}"), ("cost", LINES[0], "AP50 to gain", "{:.3f}")]
    kinds = [kind for kind in kinds if any(row[kind[0]] is not None for row in rows)]
    axes = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for side, (key, colour, label, pattern) in zip(axes, kinds, strict=True):
        values = [row[key] for row in rows]
        said = ["" if value is None else " " + pattern.format(value) for value in values]
        bars = side.barh(range(len(rows)), [max(value or 0, 0) for value in values], color=colour, height=0.62)
        side.bar_label(bars, said, fontsize=8.5, color=INK)
        style(side, label, "")
        side.grid(visible=False)
        side.spines["bottom"].set_visible(False)
        side.set_xticks([])
        side.tick_params(length=0)
        side.margins(x=0.3)
        side.set_xlim(left=0)
    axes[0].set_yticks(range(len(rows)), [row["kind"].replace(" and ", "\nand ") for row in rows])
    axes[0].invert_yaxis()
    return figure


def _draw_losses(axes, steps: list[dict[str, Any]]) -> None:
    """Each loss over the steps, averaged over at most 300 stretches."""
    stretches = np.array_split(np.arange(len(steps)), min(300, len(steps)))
    for name, colour in zip(LOSSES, LINES, strict=False):
        if any(step.get(name) is None for step in steps):
            continue
        values = np.array([step[name] for step in steps], float)
        at = [steps[stretch[-1]]["step"] for stretch in stretches]
        means = [values[stretch].mean() for stretch in stretches]
        axes.plot(at, means, color=colour, linewidth=2 if name == "loss" else 1.2, label=name)
    style(axes, "step", "loss")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)


def _draw_ap(axes, validations: list[dict[str, Any]]) -> None:
    for name, colour in (("AP50", LINES[1]), ("AP", LINES[0])):
        points = [(v["step"], v[name]) for v in validations if v.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, linewidth=2, label=name)
    style(axes, "step", "average precision, validation")
    axes.set_ylim(0, 1)
    axes.set_xlim(left=0)
    axes.legend(frameon=False, fontsize=9)
