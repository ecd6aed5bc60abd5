"""Power averages of any width after training, from snapshots of a few (Karras et al. 2024, EDM2).

The power average at step t is ∫ p(τ) θ(τ) dτ with the profile p(τ) = (γ+1) τ^γ / t^(γ+1) on (0, t]
and the weights θ(τ) = θ_i of step i on (i-1, i]: no approximation, see `decays`. Averages are thus
combined as their profiles are. Of each width a snapshot is kept every so many steps, and

    Σ_i x_i p_i  with Σ_i x_i = 1  and the smallest  ∫ (Σ_i x_i p_i - p)² dτ

gives the average of another profile p. EDM2 leaves Σ x_i free; but what no longer moves must stay
where it is, and the condition makes the error on a random walk 1.4 to 6 times smaller, for 16
snapshots of each of two widths.

Snapshots lie in `snapshots/step-000001000/`, beside the checkpoints and not among those that are
pruned: a file `power-SIGMA.safetensors` for each width and, written last, `snapshot.json`. They are
float16: half the bytes, for an error of 2^-11 of each value at most, times Σ |x_i|. That sum is
about 1.5 between the tracked widths, 2 beyond the widest, and 10 at 0.03.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from pipeline import storage
from pipeline.errors import ConfigError, CorruptArtifact
from pipeline.training.config import sigma_rel_to_gamma

FOLDER = "snapshots"
DESCRIPTION = "snapshot.json"

Array = npt.NDArray[np.float64]


class Profile(NamedTuple):
    """Which power average: its relative width, and after how many steps."""

    sigma_rel: float
    step: int


@dataclass(frozen=True)
class Snapshot:
    """A stored power average."""

    profile: Profile
    read: Callable[[], dict[str, Tensor]]
    """Its weights. Raises CorruptArtifact if they do not match their sha256."""


def snapshot_due(step: int, steps: int, num_snapshots: int) -> bool:
    """Whether a snapshot falls on step `step` (from 1) of `steps`; one falls on the last."""
    return step * num_snapshots // steps > (step - 1) * num_snapshots // steps


def save_snapshots(folder: str, step: int, averages: Mapping[float, Mapping[str, Tensor]]) -> str:
    """Write the power averages after `step` steps; the same step again is harmless.

    Args:
        folder: where the checkpoints are.
        averages: whole weights, not one rank's shards, by sigma_rel.

    Returns:
        The folder of these snapshots.
    """
    uri = storage.join(folder, FOLDER, f"step-{step:09d}")
    files = []
    for sigma_rel, weights in averages.items():
        data = save_tensors({name: _stored(tensor) for name, tensor in weights.items()})
        entry = storage.write_bytes(storage.join(uri, f"power-{sigma_rel:g}.safetensors"), data)
        files.append({"sigma_rel": sigma_rel, "file": entry.path, "sha256": entry.sha256})
    storage.write_json(
        storage.join(uri, DESCRIPTION), {"format": 1, "step": step, "averages": files}
    )
    return uri


def find_snapshots(folder: str) -> list[Snapshot]:
    """The complete snapshots that `save_snapshots` wrote below `folder`, oldest first."""
    found = []
    for path, description in _descriptions(folder):
        for entry in description["averages"]:
            profile = Profile(entry["sigma_rel"], description["step"])
            found.append(Snapshot(profile, partial(_read, storage.join(folder, path), entry)))
    return found


def snapshot_files(folder: str) -> list[str]:
    """The files of these snapshots, as paths below `folder`."""
    found = []
    for path, description in _descriptions(folder):
        averages = [entry["file"] for entry in description["averages"]]
        found += [f"{path}/{file}" for file in [*averages, DESCRIPTION]]
    return found


def _descriptions(folder: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where each complete snapshot lies below `folder`, and its snapshot.json."""
    for name in storage.list_names(storage.join(folder, FOLDER)):
        path = f"{FOLDER}/{name}"
        try:
            yield path, storage.read_json(storage.join(folder, path, DESCRIPTION))
        except (FileNotFoundError, ValueError):
            continue  # torn: the writer died before snapshot.json


def reconstruct(
    snapshots: Sequence[Snapshot], sigma_rel: float, step: int
) -> tuple[dict[str, Tensor], float]:
    """The power average of width `sigma_rel` after `step` steps, from snapshots of others.

    It is best at a step that has snapshots: the profile ends there, and theirs do too.

    Returns:
        float32 weights by name, and the part of the profile that is missed, as of `solve_weights`.
        What is not floating point comes from the last snapshot up to that step.

    Raises:
        ConfigError: there is no snapshot of that step or a later one, or no such width.
        CorruptArtifact: a snapshot does not match its recorded sha256.
    """
    if not snapshots:
        raise ConfigError(
            f"sigma_rel={sigma_rel} needs snapshots of power averages, and there are none: train "
            "with training.ema.kind=power"
        )
    newest = max(snapshot.profile.step for snapshot in snapshots)
    if not 1 <= step <= newest:
        raise ConfigError(
            f"step={step} must be from 1 to {newest}, where the snapshots of the power averages end"
        )
    try:
        x, missed = solve_weights([s.profile for s in snapshots], Profile(sigma_rel, step))
    except ValueError as error:
        raise ConfigError(str(error)) from error

    whole: dict[str, Tensor] = {}
    by_step = sorted(zip(x.tolist(), snapshots, strict=True), key=lambda pair: pair[1].profile.step)
    for weight, snapshot in by_step:
        for name, tensor in snapshot.read().items():
            if tensor.is_floating_point():
                term = weight * tensor.double()
                whole[name] = whole[name] + term if name in whole else term
            elif name not in whole or snapshot.profile.step <= step:
                whole[name] = tensor
    return {n: t.float() if t.is_floating_point() else t for n, t in whole.items()}, missed


def solve_weights(profiles: Sequence[Profile], profile: Profile) -> tuple[Array, float]:
    """The combination of `profiles`, all different, that is nearest to `profile`.

    Returns:
        x (n,) of sum 1, and the part of the profile that is missed, ‖Σ x_i p_i - p‖/‖p‖: 0 if
        `profile` is among them, 1 or more if they are of no use.

    Raises:
        ValueError: no power average has such a relative width.
    """
    t = np.array([p.step for p in (*profiles, profile)], dtype=np.float64)
    gamma = np.array([sigma_rel_to_gamma(p.sigma_rel) for p in (*profiles, profile)])
    norms = np.sqrt(_inner(t, gamma, t, gamma))
    # of profiles scaled to norm 1, so that the system is no worse than it must be
    cosines = _inner(t[:, None], gamma[:, None], t, gamma) / (norms[:, None] * norms)
    gram, near = cosines[:-1, :-1], cosines[:-1, -1]
    scales = norms[-1] / norms[:-1]

    # the stationary point of the square under Σ x_i = 1, with its Lagrange multiplier
    system = np.block([[gram, scales[:, None]], [scales, 0.0]])
    y: Array = np.linalg.solve(system, np.append(near, 1.0))[:-1]
    missed = y @ gram @ y - 2 * near @ y + 1
    return y * scales, float(np.sqrt(max(missed, 0.0)))


def _inner(t_a: Array, gamma_a: Array, t_b: Array, gamma_b: Array) -> Array:
    """∫ p_a p_b dτ of two profiles; broadcasts."""
    first, last = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    gamma_last = np.where(t_a > t_b, gamma_a, gamma_b)
    height = (gamma_a + 1) * (gamma_b + 1) / ((gamma_a + gamma_b + 1) * last)
    inner: Array = height * (first / last) ** gamma_last
    return inner


def _stored(tensor: Tensor) -> Tensor:
    """As float16; a tensor with a value beyond its range (65,504) stays as it is."""
    tensor = tensor.detach().cpu().contiguous()
    if not tensor.is_floating_point():
        return tensor
    half = tensor.half()
    return half if half.isfinite().all() else tensor


def _read(uri: str, entry: dict[str, Any]) -> dict[str, Tensor]:
    path = storage.join(uri, entry["file"])
    data = storage.read_bytes(path)
    if storage.sha256(data) != entry["sha256"]:
        raise CorruptArtifact(f"{path} does not match its recorded sha256")
    tensors: dict[str, Tensor] = load_tensors(data)
    return tensors
