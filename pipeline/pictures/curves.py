"""Curves of an evaluation: its loss over the timesteps, its distances over the sampling steps."""

from typing import Any

from pipeline.pictures.plots import BLUE, VERMILION, make_figure, to_png

DISTANCES = ("fd_", "kd_", "fid", "kid")
MARKERS = "os^Dv<>Pp*"


def draw_timesteps(loss: dict[str, Any], bits: dict[str, Any] | None) -> bytes:
    """Where along the timesteps held-out images are hard to predict, and where their bits are.

    Args:
        loss: t, loss and error of each bin of timesteps.
        bits: t and bits, L_t of the bound, if it was computed.
    """
    count = 2 if bits else 1
    figure = make_figure(7.5, 2.9 * count)
    axes = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0]
    axes[0].errorbar(loss["t"], loss["loss"], loss["error"], color=BLUE, marker="o", markersize=3)
    axes[0].set_ylabel("loss of held-out images")
    axes[0].set_ylim(bottom=0)
    if bits:
        axes[1].plot(bits["t"], bits["bits"], color=VERMILION, drawstyle="steps-post")
        axes[1].set_ylabel("bits/dim of a timestep")
        axes[1].set_yscale("log")
    axes[-1].set_xlabel("timestep t (t = 0 has the least noise)")
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    return to_png(figure)


def draw_over_steps(points: list[dict[str, Any]]) -> bytes:
    """The distance of samples over the evaluations of the network that each took, by sampler.

    Args:
        points: sampler, evaluations and the figures of features of each.
    """
    names = [name for name in points[0]["figures"] if name.startswith(DISTANCES)]
    figure = make_figure(7.5, 3.2 * max(1, len(names)))
    axes = figure.subplots(max(1, len(names)), 1, sharex=True, squeeze=False)[:, 0]
    for ax, name in zip(axes, names, strict=False):
        for number, sampler in enumerate(dict.fromkeys(point["sampler"] for point in points)):
            own = sorted(
                (point for point in points if point["sampler"] == sampler),
                key=lambda point: float(point["evaluations"]),
            )
            ax.errorbar(
                [point["evaluations"] for point in own],
                [point["figures"][name]["value"] for point in own],
                [point["figures"][name]["standard_error"] or 0.0 for point in own],
                marker=MARKERS[number % len(MARKERS)],
                markersize=4,
                label=sampler,
            )
        ax.set_ylabel(name)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    axes[-1].set_xlabel("evaluations of the network an image (± standard error)")
    axes[-1].set_xscale("log")
    ticks: list[float] = []
    for evaluations in sorted(float(point["evaluations"]) for point in points):
        if not ticks or evaluations > 1.12 * ticks[-1]:  # nearer, and one label hides the other
            ticks.append(evaluations)
    axes[-1].set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes[-1].set_xticks([], minor=True)
    return to_png(figure)
