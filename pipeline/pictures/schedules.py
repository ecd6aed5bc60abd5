"""A picture of a config's noise schedule and of the timesteps that samplers visit."""

import textwrap
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.diffusion.config import DiffusionConfig
from pipeline.diffusion.gaussian import posterior_coefficients
from pipeline.diffusion.schedules import Schedule, make_schedule
from pipeline.errors import ConfigError, RequestError
from pipeline.pictures.plots import BLUE, GREEN, GREY, PINK, VERMILION, make_figure, to_png
from pipeline.samplers import langevin
from pipeline.samplers.config import SamplingConfig, Spacing, check_sampling
from pipeline.samplers.model import SOLVERS, compile_plan
from pipeline.samplers.plan import GUIDANCE, Plan, T

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SPACINGS: tuple[Spacing, ...] = ("trailing", "leading", "linspace", "karras", "log_snr")

MAX_DOTS = 100
"""More than this many evaluations would hide the curve they lie on."""


@dataclass(frozen=True)
class Curves:
    """What is drawn over t = 0 .. T-1: (T,) float64 each."""

    beta: Tensor
    posterior_variance: Tensor
    """β̃_t of a step from t to t-1; 0 at t = 0, which leads to the clean image."""
    alpha_bar: Tensor
    log_snr: Tensor


@dataclass(frozen=True)
class Visits:
    """The timesteps at which samplers evaluate the network, in their order; one row of ticks."""

    label: str
    times: Tensor
    num_evaluations: int
    is_configured: bool


def schedule_of(config: DiffusionConfig) -> Schedule:
    """The schedule of a config, as long as no training is needed to know it.

    Raises:
        ConfigError: it is to be learned.
    """
    if config.schedule == "learned":
        raise ConfigError(
            "diffusion.schedule=learned is known only after training, which fits it with the "
            "network's weights: there is nothing to draw of the config alone"
        )
    return make_schedule(config)


def curves_of(schedule: Schedule) -> Curves:
    """β_t, β̃_t, ᾱ_t and λ_t of every timestep."""
    previous = torch.cat([schedule.alpha_bar.new_ones(1), schedule.alpha_bar[:-1]])
    _, _, posterior_variance = posterior_coefficients(schedule.alpha_bar, previous)
    return Curves(schedule.beta, posterior_variance, schedule.alpha_bar, schedule.log_snr)


def plan_of(
    schedule: Schedule, diffusion: DiffusionConfig, sampling: SamplingConfig
) -> Plan | None:
    """The plan of a sampler, of Langevin dynamics that of its predictor; None for the adaptive ode.

    Raises:
        RequestError: the sampler cannot follow the schedule.
    """
    check_sampling(diffusion, sampling)
    if sampling.sampler == "ode":
        return None
    return compile_plan(schedule, diffusion.variance, sampling)


def visits_of(
    schedule: Schedule, diffusion: DiffusionConfig, sampling: SamplingConfig
) -> list[Visits]:
    """Rows of ticks: the configured sampler, its other spacings, then the other samplers.

    All have the configured number of steps and no guidance. Samplers that visit the same timesteps
    equally often share a row, and what cannot follow the schedule has none.
    """
    configured = sampling.model_copy(update={"guidance": 0.0})
    others = [
        SamplingConfig.model_validate(
            {"sampler": name, "steps": sampling.steps, "spacing": sampling.spacing}
        )
        for name in SOLVERS
        if name not in (sampling.sampler, "langevin")  # whose levels are those of ancestral
    ]
    spacings = [s for s in SPACINGS if s != sampling.spacing]
    spaced = [configured.model_copy(update={"spacing": spacing}) for spacing in spacings]
    alike: dict[tuple[tuple[float, ...], int], list[SamplingConfig]] = {}
    for config in (configured, *spaced, *others):
        try:
            plan = plan_of(schedule, diffusion, config)
        except RequestError:
            continue
        if plan is not None:
            visited = tuple(plan.table[:, T].tolist()), count_evaluations(plan, config)
            alike.setdefault(visited, []).append(config)
    return [
        Visits(_name(group), torch.tensor(times, dtype=torch.float64), count, configured in group)
        for (times, count), group in alike.items()
    ]


def _name(group: list[SamplingConfig]) -> str:
    """`ddim, trailing` of one sampler, `ddim, euler, pndm, trailing` of some."""
    spacings = dict.fromkeys(config.spacing for config in group)
    samplers = dict.fromkeys(config.sampler for config in group)
    return ", ".join([*samplers, " = ".join(spacings)])


def count_evaluations(plan: Plan, sampling: SamplingConfig) -> int:
    """Network evaluations an image; a guided one counts twice."""
    if sampling.sampler == "langevin":
        return langevin.count_evaluations(plan, sampling)
    return len(plan) + int((plan.table[:, GUIDANCE] != 0).sum())


def describe(schedule: Schedule, diffusion: DiffusionConfig, sampling: SamplingConfig) -> list[str]:
    """What a person should know of the schedule and its sampler, in lines."""
    log_snr = schedule.log_snr[-1]
    left = float(schedule.alpha_bar[-1].sqrt())
    lines = [
        f"schedule  {diffusion.schedule}, {schedule.timesteps} timesteps",
        f"terminal  SNR {float(log_snr.exp()):.3g}, log-SNR {float(log_snr):.2f}: the last x_t is "
        f"{left:.2g} x_0 and the rest noise",
    ]
    plan = plan_of(schedule, diffusion, sampling)
    if plan is None:
        return [*lines, f"sampler   {sampling.sampler}, which chooses its timesteps as it goes"]
    first, last = (f"{float(t):.4g}" for t in plan.table[[0, -1], T])
    guided = ", guided ones counted twice" if sampling.guidance else ""
    return [
        *lines,
        f"sampler   {sampling.sampler}, {sampling.spacing}: t = {first} first, {last} last, "
        f"{count_evaluations(plan, sampling)} network evaluations an image{guided}",
    ]


# --- the picture --------------------------------------------------------------------------------


def draw(schedule: Schedule, diffusion: DiffusionConfig, sampling: SamplingConfig) -> bytes:
    """A PNG: ᾱ_t, the log-SNR, β_t and β̃_t, and below them the timesteps visited, over one t axis.

    The dots on ᾱ_t and on the log-SNR are the configured sampler's.
    """
    from matplotlib.ticker import MaxNLocator

    curves, visits = curves_of(schedule), visits_of(schedule, diffusion, sampling)
    labels = [textwrap.fill(visit.label, 26, break_on_hyphens=False) for visit in visits]
    rows = [max(1.0, 0.3 + 0.5 * (1 + label.count("\n"))) for label in labels]
    heights = [2.2, 2.2, 2.2, 0.33 * sum(rows) + 0.4]  # inches
    figure = make_figure(9.5, sum(heights) + 1.6)
    axes = figure.subplots(4, 1, sharex=True, height_ratios=heights)
    ax_signal, ax_snr, ax_beta, ax_visits = axes

    t = torch.arange(schedule.timesteps)
    marker = "." if schedule.timesteps <= 30 else ""

    def line(
        ax: "Axes", y: Tensor, color: str, label: str, style: str = "-", width: float = 1.8
    ) -> None:
        ax.plot(t, y, style, color=color, label=label, linewidth=width, marker=marker)

    zero_snr = " with zero terminal SNR" if diffusion.zero_terminal_snr else ""
    ax_signal.set_title(f"{diffusion.schedule} schedule, {schedule.timesteps} timesteps{zero_snr}")
    line(ax_signal, curves.alpha_bar, BLUE, r"$\bar\alpha_t$")
    ax_signal.set_ylabel(r"signal kept  $\bar\alpha_t$")
    ax_signal.set_ylim(-0.04, 1.04)
    line(ax_snr, _or_gap(curves.log_snr, curves.log_snr.isfinite()), BLUE, r"$\lambda_t$")
    ax_snr.set_ylabel(r"log-SNR  $\lambda_t$")
    ax_snr.axhline(0, color=GREY, linewidth=0.8, linestyle=":")
    if curves.log_snr[-1].isinf():
        what = f"−∞ at t = {schedule.timesteps - 1}"
        ax_snr.text(0.98, 0.06, what, transform=ax_snr.transAxes, ha="right")
    line(ax_beta, curves.beta, PINK, r"$\beta_t$", width=4)  # nearly the same as the posterior's
    posterior = _or_gap(curves.posterior_variance, curves.posterior_variance > 0)
    line(ax_beta, posterior, GREEN, r"$\tilde\beta_t$ of the posterior", "--")
    ax_beta.set_yscale("log")
    ax_beta.set_ylabel("variance of a step")
    ax_beta.legend(frameon=False, loc="lower right")

    for visit in visits:
        if visit.is_configured and len(visit.times) <= MAX_DOTS:
            alpha_bar = schedule.alpha_bar_at(visit.times)
            log_snr = alpha_bar.logit()
            name = f"{sampling.sampler}, {sampling.spacing}"
            ax_signal.plot(visit.times, alpha_bar, "o", color=VERMILION, ms=3.5, label=name)
            finite = _or_gap(log_snr, log_snr.isfinite())
            ax_snr.plot(visit.times, finite, "o", color=VERMILION, ms=3.5)
            ax_signal.legend(frameon=False, loc="upper right")
    _draw_visits(ax_visits, visits, labels, rows)
    margin = 0.01 * (schedule.timesteps - 1)
    ax_visits.set_xlim(-margin, schedule.timesteps - 1 + margin)
    ax_visits.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    ax_visits.set_xlabel(f"timestep t: 0 is next to the image, {schedule.timesteps - 1} to noise")
    for ax in (ax_signal, ax_snr, ax_beta):
        ax.grid(color="#E5E7EB", linewidth=0.8)
        ax.set_axisbelow(True)
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
    return to_png(figure)


def _or_gap(y: Tensor, where: Tensor) -> Tensor:
    """y with a gap in its line where an axis cannot show it."""
    return torch.where(where, y, torch.nan)


def _draw_visits(ax: "Axes", visits: list[Visits], labels: list[str], rows: list[float]) -> None:
    """A row of ticks for each sampler, the number of its evaluations at the right."""
    centres = []
    bottom = 0.0
    for visit, height in zip(visits, rows, strict=True):
        y = bottom + height / 2
        bottom += height
        centres.append(y)
        color = VERMILION if visit.is_configured else GREY
        width = 1.4 if len(visit.times) <= MAX_DOTS else 0.5
        ax.vlines(visit.times, y - 0.34, y + 0.34, color=color, linewidth=width)
        ax.text(
            1.01, y, str(visit.num_evaluations), transform=ax.get_yaxis_transform(), va="center"
        )
    ax.set_yticks(centres, labels)
    ax.set_ylim(bottom, 0)  # the first row on top
    ax.tick_params(axis="y", length=0)
    ax.set_title("where the network is evaluated; at the right, how often", fontsize=10)
