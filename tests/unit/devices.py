"""A device that is not the CPU: whatever runs on one runs on the other, and which of them waits.

Where torch sees a GPU the tests run there, up to rounding; elsewhere on the device of apart.py,
whose arithmetic is the CPU's: there results are equal bit for bit, and copies are counted.
"""

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.diffusion.config import DiffusionConfig
from pipeline.networks.config import DiTConfig, UNetConfig
from pipeline.samplers.model import Model, ModelSpec, build_model
from tests import needs
from tests.unit import apart

KIND = "cuda" if torch.cuda.is_available() else "apart"
ON_APART = needs.NO_GPU.met_if(KIND == "apart")
UNET = UNetConfig(base_channels=8, channel_multipliers=[1, 2], attention_at=[4])
DIT = DiTConfig(patch_size=2, width=16, depth=2, heads=2)


@contextlib.contextmanager
def opened() -> Iterator[torch.device]:
    """The GPU, else the device of apart.py."""
    if KIND == "apart":
        apart.load()
    with (
        # the threads of autograd are as many as there were devices when it first ran
        torch.autograd.set_multithreading_enabled(KIND == "cuda"),
        sdpa_kernel(SDPBackend.MATH),  # on both sides
    ):
        yield torch.device(KIND, 0)


def assert_same(got: Tensor, want: Tensor) -> None:
    """Equal bit for bit, on a GPU up to rounding."""
    got, want = got.detach().cpu(), want.detach().cpu()
    if KIND == "apart":
        assert torch.equal(got, want)
    else:
        torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-4)


def assert_same_pixels(got: np.ndarray, want: np.ndarray) -> None:
    apart_by = np.abs(got.astype(int) - want.astype(int))
    assert apart_by.max() <= (0 if KIND == "apart" else 2)


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Fails if the host waits for the device within."""
    if KIND == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    else:
        before = apart.traffic()
        yield
        assert (apart.traffic() - before).waits == 0


def make_spec(network: UNetConfig | DiTConfig = UNET, **diffusion: object) -> ModelSpec:
    return ModelSpec(
        network=network,
        diffusion=DiffusionConfig.model_validate({"schedule": "cosine", **diffusion}),
        channels=1,
        image_size=8,
        class_names=["a", "b", "c"],
        has_null_label=True,
    )


def weights_of(spec: ModelSpec) -> dict[str, Tensor]:
    """Of a network that was not trained, but whose zero-initialised layers do something."""
    torch.manual_seed(0)
    named = spec.make_network().state_dict().items()
    return {n: t if t.any() else torch.randn(t.shape) * 0.2 for n, t in named}


def make_model(spec: ModelSpec) -> Model:
    return build_model(spec, weights_of(spec), "digest")
