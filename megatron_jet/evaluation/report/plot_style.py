"""One look for all figures, and figures as SVG that can stand next to each other in one HTML page."""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, MUTED, RULE, PAPER = "#1c2430", "#6b7480", "#d9dde2", "#ffffff"
TEACHER, FINAL, ACCENT = "#9aa3ad", "#1f4e79", "#c8643c"
SERIES = (FINAL, ACCENT, "#4d8f7a", "#8a6bb0", "#b8923a", "#6b7480")
SCALE = ("#f6f8fa", "#cfdeeb", "#8fb3d1", "#4a80ae", "#1f4e79")  # light to dark, one hue; prints in grey
WIDTH = 7.6  # inches; the width of the text column

_STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlepad": 8,
    "axes.labelsize": 8.5,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": RULE,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#eceff2",
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    # Letters stay text: they take the page's font, can be searched, and the file stays small.
    "svg.fonttype": "none",
}


@contextmanager
def figure(rows: int, columns: int, height: float, **options) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure with `rows` x `columns` axes (as a flat list) in the report's style."""
    with rc_context(_STYLE):
        made = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = made.subplots(rows, columns, squeeze=False, **options)
        yield made, list(axes.flat)


def to_svg(made: Figure, name: str) -> str:
    """The figure as an <svg> element whose ids start with `name`, equal for equal figures."""
    with rc_context({**_STYLE, "svg.hashsalt": name}):
        buffer = io.StringIO()
        made.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = text.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    text = text.replace("DejaVu Sans", "var(--sans)").replace("sans-serif", "var(--sans)")
    # The page sets the width; the viewBox keeps the proportions.
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1), count=1
    )


def quiet_axis(axes: Axes, which: str) -> None:
    """No grid along one axis ("x" or "y")."""
    axes.grid(False, axis=which)
