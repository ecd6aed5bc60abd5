"""What `ddpm schedule` draws and says is what the schedule and its samplers are."""

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.diffusion.config import DiffusionConfig
from pipeline.errors import ConfigError
from pipeline.pictures.schedules import (
    MAX_DOTS,
    curves_of,
    describe,
    draw,
    schedule_of,
    visits_of,
)
from pipeline.samplers.config import SamplingConfig
from tests.conftest import ROOT, Workplace

SCHEDULES = [
    {"schedule": "linear"},
    {"schedule": "cosine"},
    {"schedule": "cosine", "zero_terminal_snr": True, "prediction": "v"},
    {"schedule": "sigmoid", "timesteps": 100},
    {"schedule": "betas", "timesteps": 2, "betas": [0.1, 0.5]},
    {"schedule": "vp"},
    {"schedule": "edm", "timesteps": 20, "prediction": "edm"},
]


def diffusion(**values: Any) -> DiffusionConfig:
    return DiffusionConfig.model_validate(values)


def test_the_curves_are_the_papers_formulas() -> None:
    """Ho et al. 2020 by scalar recursion: β linear, ᾱ their product, β̃ = (1-ᾱ_{t-1})/(1-ᾱ_t) β."""
    curves = curves_of(schedule_of(diffusion(schedule="linear")))
    before = 1.0
    for t in range(1000):
        beta = 1e-4 + (0.02 - 1e-4) * t / 999
        alpha_bar = before * (1 - beta)
        got = [float(c[t]) for c in (curves.beta, curves.alpha_bar, curves.posterior_variance)]
        posterior = (1 - before) / (1 - alpha_bar) * beta
        assert got == pytest.approx([beta, alpha_bar, posterior], rel=1e-9)
        assert float(curves.log_snr[t]) == pytest.approx(
            math.log(alpha_bar / (1 - alpha_bar)), rel=1e-9
        )
        before = alpha_bar


def test_a_zero_terminal_snr_is_minus_infinity_in_the_curves() -> None:
    config = diffusion(schedule="cosine", zero_terminal_snr=True, prediction="v")
    curves = curves_of(schedule_of(config))
    assert curves.log_snr[-1] == -math.inf
    assert curves.beta[-1] == 1
    assert curves.log_snr[:-1].isfinite().all()


def test_the_first_row_is_the_configured_sampler_at_its_own_timesteps() -> None:
    config = diffusion(schedule="cosine")
    sampling = SamplingConfig(sampler="ddim", steps=4, spacing="leading", guidance=1.0)
    rows = visits_of(schedule_of(config), config, sampling)
    assert rows[0].times.tolist() == [750, 500, 250, 0]
    assert (rows[0].is_configured, rows[0].num_evaluations) == (True, 4)
    assert rows[0].label.startswith("ddim") and rows[0].label.endswith("leading")
    assert not any(row.is_configured for row in rows[1:])
    by_label = {row.label: row.times.tolist() for row in rows}
    assert by_label["ddim, trailing"] == [999, 749, 499, 249]
    assert by_label["ddim, linspace"] == [999, 666, 333, 0]
    assert all(len(row.times) >= 4 for row in rows)
    assert len({(*row.times.tolist(), row.num_evaluations) for row in rows}) == len(rows)


def test_spacings_that_visit_the_same_timesteps_share_a_row() -> None:
    config = diffusion(schedule="linear")
    sampling = SamplingConfig(sampler="ancestral", steps=1000)
    first = visits_of(schedule_of(config), config, sampling)[0]
    assert first.label.endswith("trailing = leading = linspace")
    assert first.times.tolist() == list(range(999, -1, -1))


def test_what_cannot_follow_a_schedule_has_no_row() -> None:
    config = diffusion(schedule="cosine", zero_terminal_snr=True, prediction="v")
    rows = visits_of(schedule_of(config), config, SamplingConfig(steps=10))
    assert rows[0].is_configured
    assert not any("karras" in row.label or "log_snr" in row.label for row in rows)


def test_langevins_correctors_are_counted_and_the_adaptive_ode_has_no_row() -> None:
    config = diffusion(schedule="cosine")
    schedule = schedule_of(config)
    langevin = SamplingConfig(sampler="langevin", steps=10, corrector_steps=2)
    row = visits_of(schedule, config, langevin)[0]
    assert (row.label, len(row.times), row.num_evaluations) == ("langevin, trailing", 10, 30)
    ode = SamplingConfig(sampler="ode", steps=10)
    assert not any(row.is_configured for row in visits_of(schedule, config, ode))
    assert "chooses its timesteps" in describe(schedule, config, ode)[-1]


def test_the_words_are_the_figures() -> None:
    config = diffusion(schedule="linear")
    schedule = schedule_of(config)
    snr = float(torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).neg().log1p().sum().exp())
    text = "\n".join(describe(schedule, config, SamplingConfig(steps=50, guidance=2.0)))
    assert "linear, 1000 timesteps" in text
    assert f"SNR {snr / (1 - snr):.3g}, log-SNR {math.log(snr / (1 - snr)):.2f}" in text
    assert f"{math.sqrt(snr):.2g} x_0" in text
    assert "t = 999 first, 19 last, 100 network evaluations an image, guided ones" in text
    plain = describe(schedule, config, SamplingConfig(steps=50))[-1]
    assert plain.endswith("50 network evaluations an image")


@pytest.mark.parametrize("values", SCHEDULES, ids=lambda v: "-".join(map(str, v.values())))
def test_every_schedule_gives_a_picture(values: dict[str, Any]) -> None:
    config = diffusion(**values)
    sampling = SamplingConfig(steps=min(20, config.timesteps))
    png = draw(schedule_of(config), config, sampling)
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    assert image.width == 1140
    assert 1000 <= image.height <= 2500
    pixels = np.asarray(image.convert("RGB"), dtype=int)
    assert (pixels[0, 0] == 255).all(), "a light background"
    vermilion = (abs(pixels - [0xD5, 0x5E, 0x00]).sum(-1) < 30).sum()
    assert vermilion > 100, "the ticks of the configured sampler"


def test_more_evaluations_than_dots_are_drawn_as_ticks_alone() -> None:
    config = diffusion(schedule="linear")
    sampling = SamplingConfig(sampler="ancestral", steps=MAX_DOTS + 1)
    assert draw(schedule_of(config), config, sampling).startswith(b"\x89PNG")


def test_a_schedule_still_to_be_learned_is_refused_in_one_sentence() -> None:
    with pytest.raises(ConfigError, match="schedule=learned is known only after training"):
        schedule_of(diffusion(schedule="learned"))


def test_the_command_writes_the_picture_and_says_where(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    config = str(ROOT / "configs" / "digits.yaml")
    said = place.quick("schedule", config, "--set", "sampling.steps=10", "--out", "a/b.png")
    assert "t = 999 first, 99 last, 20 network evaluations" in said
    assert said.splitlines()[-1] == "picture   a/b.png"
    assert (tmp_path / "a" / "b.png").read_bytes().startswith(b"\x89PNG")
    refused = place.quick("schedule", config, "--out", "/proc/nowhere/b.png", code=2)
    assert "cannot write to /proc/nowhere/b.png" in refused
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
