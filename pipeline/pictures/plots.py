"""What the plots of this folder have in common."""

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, VERMILION, PINK, GREEN, GREY = "#0072B2", "#D55E00", "#CC79A7", "#00614A", "#6B7280"
"""Of Okabe & Ito's palette, or near it: told apart whatever one's colour vision is."""


def make_figure(width: float, height: float) -> "Figure":
    """An empty figure, of so many inches.

    Not by pyplot, which keeps a state and may open windows; and imported here, since a command that
    draws nothing need not wait for it.
    """
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def to_png(figure: "Figure") -> bytes:
    """The figure on white."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()
