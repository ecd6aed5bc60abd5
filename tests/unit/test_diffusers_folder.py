"""Models as folders of Hugging Face diffusers and back, against the real library."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.errors import ConfigError, DataError, RequestError, StorageError, UserError
from pipeline.exchange.diffusers_folder import from_diffusers, to_diffusers
from pipeline.networks.config import DDPM, DiTConfig
from pipeline.networks.unet import UNet
from pipeline.samplers.config import SamplingConfig, Spacing
from pipeline.samplers.model import Model, ModelSpec, build_model, make_plan
from pipeline.samplers.plan import ALPHA_BAR, T, X, advance, scaled_noise, start, threshold
from tests import needs

diffusers = needs.package("diffusers", "diffusers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

UNET: dict[str, Any] = {
    "base_channels": 16,
    "channel_multipliers": [1, 2],
    "blocks_per_level": 1,
    "attention_at": [4],
    "norm_groups": 4,
}
AS_PUBLISHED = {name: value for name, value in DDPM.items() if name not in UNET}
"""What google/ddpm-cifar10-32 has otherwise than our U-Net by default, but for its size."""


def make_spec(network: Any = None, diffusion: Any = None, **values: Any) -> ModelSpec:
    size = {"channels": 3, "image_size": 8, **values}
    return ModelSpec.model_validate(
        {"network": UNET | (network or {}), "diffusion": diffusion or {}, **size}
    )


def make_weights(spec: ModelSpec) -> dict[str, Tensor]:
    """Of all layers at random, those that start at 0 or 1 too."""
    torch.manual_seed(0)
    network = spec.make_network()
    for parameter in network.parameters():
        nn.init.normal_(parameter, 0.1, 0.2)
    return network.state_dict()


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def export(folder: Path, spec: ModelSpec, label: int | None = None) -> tuple[Model, Any]:
    """(our model, the pipeline of diffusers), both in float64."""
    weights = make_weights(spec)
    write(folder, to_diffusers(spec, weights, label))
    return in_float64(build_model(spec, weights, "")), open_pipeline(folder)


def open_pipeline(folder: Path) -> Any:
    pipe = diffusers.DDPMPipeline.from_pretrained(str(folder)).to(torch.float64)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def in_float64(model: Model) -> Model:
    network = model.network.double()
    assert isinstance(network, UNet)
    network.embed_t.register_forward_pre_hook(lambda _, inputs: (inputs[0].double(),))
    return model


def assert_same_network(model: Model, unet: Any, num_labels: int = 0) -> None:
    """In float64, where what differs is another network, and at timesteps of all sizes."""
    spec = model.spec
    rows = max(num_labels, 3)
    x = torch.randn(rows, *spec.image_shape, dtype=torch.float64)
    t = torch.linspace(0, 999, rows).round().long()
    label = torch.arange(rows) if num_labels else None
    with torch.no_grad():
        got = model.network(x, t, label)
        want = unet(x, t, class_labels=label).sample
    assert got.shape == want.shape
    assert want.std() > 0.1
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def draw(model: Model, noise: Callable[[], Tensor], steps: int, spacing: Spacing) -> Tensor:
    """Our ancestral samples of noise that is drawn in the order in which DDPMPipeline draws it."""
    plan = make_plan(model, SamplingConfig(sampler="ancestral", steps=steps, spacing=spacing))
    state = start(noise())
    label = torch.zeros(len(state), dtype=torch.long)
    for i, row in enumerate(plan.table):
        rows = row.expand(len(state), -1)
        x_t, alpha_bar = state[:, X], rows[:, ALPHA_BAR]
        output, fraction = model.output(x_t, rows[:, T], alpha_bar, label)
        x_0 = threshold(model.x_0(output, x_t, alpha_bar), rows)
        z = noise() if i + 1 < steps else torch.zeros_like(x_t)
        state = advance(state, x_0, scaled_noise(z, fraction, rows), rows)
    return (state[:, X] / 2 + 0.5).clamp(0, 1)


def assert_same_samples(model: Model, pipe: Any, steps: int = 8) -> None:
    """With their table of the schedule to its float32, with ours but for the 1e-20 that they add.

    A learned variance needs the logarithm of the small differences in that table.
    """
    tolerance = 1e-3 if model.spec.learns_variance else 2e-5

    def noise_stream() -> Callable[[], Tensor]:
        generator = torch.Generator().manual_seed(1)
        shape = (2, *model.spec.image_shape)
        return lambda: torch.randn(shape, generator=generator, dtype=torch.float64)

    got = draw(model, noise_stream(), steps, pipe.scheduler.config.timestep_spacing)
    assert ((got > 0) & (got < 1)).double().mean() > 0.2  # what is clipped is always the same
    for alpha_bar, apart in (
        (pipe.scheduler.alphas_cumprod, tolerance),
        (model.schedule.alpha_bar, 1e-9),
    ):
        pipe.scheduler.alphas_cumprod = alpha_bar
        generator = torch.Generator().manual_seed(1)
        want = pipe(2, generator, steps, output_type="pt").images
        torch.testing.assert_close(got, want, rtol=0, atol=apart)


# Out


@pytest.mark.parametrize(
    "network",
    [
        {},
        AS_PUBLISHED,
        {"conditioning": "add", "norm_groups": 8, "dropout": 0.1},
        {"resample": "block", "attention_at": [8, 4]},
        {"resample": "block", "attention_at": []},
        {"head_channels": 4, "attention_at": [8], "blocks_per_level": 2},
        {"channel_multipliers": [1, 1, 3], "attention_at": [4], "head_channels": 16},
        {"channel_multipliers": [1], "attention_at": [8]},
        {"base_channels": 128, "channel_multipliers": [1], "norm_groups": None, "attention_at": []},
    ],
    ids=str,
)
def test_a_network_of_ours_is_the_same_function_there(network: Any, tmp_path: Path) -> None:
    model, pipe = export(tmp_path, make_spec(network))
    assert_same_network(model, pipe.unet)


def test_in_float32_the_network_differs_by_rounding_alone(tmp_path: Path) -> None:
    spec = make_spec()
    weights = make_weights(spec)
    folder = write(tmp_path, to_diffusers(spec, weights))
    unet = diffusers.UNet2DModel.from_pretrained(str(folder), subfolder="unet")
    x, t = torch.randn(4, *spec.image_shape), torch.tensor([0, 10, 500, 999])
    with torch.no_grad():
        got, want = build_model(spec, weights, "").network(x, t), unet(x, t).sample
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "diffusion",
    [
        {},
        {"variance": "fixed_large"},
        {"variance": "learned_range", "schedule": "cosine"},
        {"schedule": "cosine", "prediction": "v"},
        {"schedule": "scaled_linear", "timesteps": 500},
        {"schedule": "linear", "timesteps": 200, "beta_start": 2e-4, "beta_end": 0.01},
        {"schedule": "quadratic", "prediction": "x_0"},
        {"schedule": "sigmoid"},
        {"schedule": "laplace"},
        {"schedule": "betas", "betas": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9], "timesteps": 8},
        {"schedule": "cosine", "prediction": "v", "zero_terminal_snr": True},
        {"schedule": "sigmoid", "prediction": "x_0", "zero_terminal_snr": True},
        {"schedule": "vp"},
        {"schedule": "ve", "prediction": "v"},
    ],
    ids=str,
)
def test_samples_are_those_of_our_ancestral_sampler(diffusion: Any, tmp_path: Path) -> None:
    model, pipe = export(tmp_path, make_spec(diffusion=diffusion))
    assert_same_samples(model, pipe)


def test_a_network_of_classes_takes_their_labels_there_and_the_null_label(tmp_path: Path) -> None:
    spec = make_spec(class_names=["a", "b", "c"], has_null_label=True)
    model, pipe = export(tmp_path, spec)
    assert_same_network(model, pipe.unet, num_labels=4)


@pytest.mark.parametrize("label", [0, 2, 3])
def test_one_class_is_drawn_by_a_pipeline_that_knows_no_labels(label: int, tmp_path: Path) -> None:
    spec = make_spec(class_names=["a", "b", "c"], has_null_label=True)
    model, pipe = export(tmp_path, spec, label)
    x, t = torch.randn(2, *spec.image_shape, dtype=torch.float64), torch.tensor([3, 700])
    with torch.no_grad():
        got = model.network(x, t, torch.tensor([label, label]))
        torch.testing.assert_close(got, pipe.unet(x, t).sample, rtol=1e-10, atol=1e-10)
    assert pipe(1, num_inference_steps=1, output_type="pt").images.shape == (1, 3, 8, 8)


@pytest.mark.parametrize(
    ("spec", "label", "sentence"),
    [
        (
            make_spec().model_copy(
                update={"network": DiTConfig(patch_size=2, width=8, depth=1, heads=1)}
            ),
            None,
            "network.kind=dit cannot be given to diffusers, whose DDPMPipeline has a U-Net",
        ),
        (
            make_spec({"channel_multipliers": [2, 2]}),
            None,
            "network.channel_multipliers=[2, 2] cannot be given to diffusers, whose first conv",
        ),
        (
            make_spec({"base_channels": 32, "norm_groups": None}),
            None,
            "network.norm_groups=null cannot be given to diffusers, which normalises all layers in "
            "the same number of groups, where it makes 8 or 16 or 32: train with network.norm_grou",
        ),
        (
            make_spec(diffusion={"prediction": "score"}),
            None,
            "diffusion.prediction=score cannot be given to diffusers, whose DDPMScheduler reads an "
            "output as eps, x_0, v only",
        ),
        (
            make_spec(diffusion={"schedule": "edm", "prediction": "edm"}),
            None,
            "diffusion.prediction=edm cannot be given to diffusers",
        ),
        (
            make_spec(diffusion={"schedule": "learned"}),
            None,
            "diffusion.schedule=learned cannot be given to diffusers, which tells a network the ti",
        ),
        (
            make_spec(diffusion={"schedule": "ve", "sigma_min": 1e-4}),
            None,
            "diffusion.schedule=ve cannot be given to diffusers, whose schedules are float32: "
            "there its first β, 1e-08, is nothing",
        ),
        (make_spec(data_range=(0.0, 1.0)), None, "data_range=(0.0, 1.0) cannot be given to diffu"),
        (make_spec(), 1, "label=1 is not a label of the model, none: it has no classes"),
        (
            make_spec(class_names=["a", "b"]),
            2,
            "label=2 is not a label of the model, from 0 to 1",
        ),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, str) else "",
)
def test_what_diffusers_cannot_express_is_named_in_a_sentence(
    spec: ModelSpec, label: int | None, sentence: str
) -> None:
    with pytest.raises((ConfigError, RequestError)) as error:
        to_diffusers(spec, make_weights(spec), label)
    assert str(error.value).startswith(sentence)


# In


def make_peer(**values: Any) -> Any:
    """A UNet2DModel with weights at random."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(**values)
    for parameter in unet.parameters():
        nn.init.normal_(parameter, 0.1, 0.2)
    return unet.eval()


def make_published(**values: Any) -> Any:
    """A smaller google/ddpm-cifar10-32."""
    return make_peer(
        **{
            "sample_size": 16,
            "block_out_channels": (16, 32, 32, 32),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 2,
            "norm_num_groups": 8,
            "downsample_padding": 0,
            "flip_sin_to_cos": False,
            "freq_shift": 1,
            "norm_eps": 1e-6,
            "attention_head_dim": None,
            **values,
        }
    )


def make_example() -> Any:
    """A smaller network of the example of unconditional training, which leaves all else as is."""
    plain, attending = ("DownBlock2D", "UpBlock2D"), ("AttnDownBlock2D", "AttnUpBlock2D")
    blocks = [plain, plain, plain, plain, attending, plain]
    return make_peer(
        sample_size=32,
        in_channels=3,
        out_channels=3,
        layers_per_block=2,
        block_out_channels=(32, 32, 64, 64, 96, 96),
        down_block_types=tuple(down for down, _ in blocks),
        up_block_types=tuple(up for _, up in reversed(blocks)),
    )


def make_residual() -> Any:
    """With residual blocks between the levels, and a norm where scale_shift leaves it out."""
    return make_peer(
        sample_size=8,
        block_out_channels=(16, 32, 32),
        down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"),
        up_block_types=("ResnetUpsampleBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        downsample_type="resnet",
        upsample_type="resnet",
        layers_per_block=1,
        norm_num_groups=8,
        attn_norm_num_groups=8,
        resnet_time_scale_shift="scale_shift",
    )


def save(folder: Path, unet: Any, scheduler: Any = None) -> Path:
    scheduler = scheduler or diffusers.DDPMScheduler()
    pipeline = (
        diffusers.DDIMPipeline
        if isinstance(scheduler, diffusers.DDIMScheduler)
        else diffusers.DDPMPipeline
    )
    pipeline(unet, scheduler).save_pretrained(str(folder))
    return folder


def load(folder: Path) -> Model:
    spec, weights = from_diffusers(str(folder))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    return in_float64(build_model(spec, weights, ""))


@pytest.mark.parametrize("make", [make_published, make_example, make_residual])
def test_a_network_of_theirs_is_the_same_function_here(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    unet = make()
    assert_same_network(load(save(tmp_path, unet)), unet.double())


@pytest.mark.parametrize("make", [make_published, make_example, make_residual])
def test_a_model_of_theirs_goes_out_as_it_came_in(make: Callable[[], Any], tmp_path: Path) -> None:
    folder = save(tmp_path / "in", make(), diffusers.DDPMScheduler(variance_type="fixed_large"))
    again = write(tmp_path / "out", to_diffusers(*from_diffusers(str(folder))))
    weights = "unet/diffusion_pytorch_model.safetensors"
    first, second = load_file(folder / weights), load_file(again / weights)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    for name in ("unet/config.json", "scheduler/scheduler_config.json", "model_index.json"):
        old, new = (json.loads((place / name).read_bytes()) for place in (folder, again))
        assert new == old | {"_diffusers_version": new["_diffusers_version"]}


@pytest.mark.parametrize(
    "scheduler",
    [
        {"variance_type": "fixed_large"},
        {"variance_type": "fixed_small_log", "beta_schedule": "squaredcos_cap_v2"},
        {"beta_schedule": "scaled_linear", "beta_start": 1e-4, "num_train_timesteps": 500},
        {"beta_schedule": "sigmoid", "prediction_type": "sample"},
        {"beta_end": 0.05, "timestep_spacing": "trailing"},
        {"trained_betas": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9], "num_train_timesteps": 8},
        {
            "rescale_betas_zero_snr": True,
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
        },
    ],
    ids=str,
)
def test_a_pipeline_of_theirs_is_drawn_alike_here(scheduler: Any, tmp_path: Path) -> None:
    unet = make_published(block_out_channels=(16, 16, 16, 16), sample_size=8, layers_per_block=1)
    folder = save(tmp_path, unet, diffusers.DDPMScheduler(**scheduler))
    assert_same_samples(load(folder), open_pipeline(folder))


def test_a_learned_variance_comes_along(tmp_path: Path) -> None:
    unet = make_published(out_channels=6)
    folder = save(tmp_path, unet, diffusers.DDPMScheduler(variance_type="learned_range"))
    model = load(folder)
    assert model.spec.learns_variance
    assert_same_samples(model, open_pipeline(folder), steps=3)


def test_a_ddim_pipeline_is_a_model_like_any_other(tmp_path: Path) -> None:
    unet = make_published()
    scheduler = diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    model = load(save(tmp_path, unet, scheduler))
    assert model.spec.diffusion.schedule == "cosine"
    assert_same_network(model, unet.double())


def test_a_folder_of_before_is_read_flat_and_with_its_old_names(tmp_path: Path) -> None:
    """As google/ddpm-cifar10-32 is: few keys, old names of attention, all files side by side."""
    unet = make_published()
    tensors = {
        re.sub(
            r"(attentions\.\d\.)(to_q|to_k|to_v|to_out\.0)",
            lambda m: (
                m[1]
                + {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}[m[2]]
            ),
            name,
        ): tensor
        for name, tensor in unet.state_dict().items()
    }
    assert "mid_block.attentions.0.proj_attn.bias" in tensors
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    modern = ("num_class_embeds", "add_attention", "resnet_time_scale_shift", "downsample_type")
    config = {key: value for key, value in unet.config.items() if key not in modern}
    scheduler = {
        "_class_name": "DDPMScheduler",
        "_diffusers_version": "0.1.1",
        "beta_end": 0.02,
        "beta_schedule": "linear",
        "beta_start": 0.0001,
        "clip_sample": True,
        "num_train_timesteps": 1000,
        "trained_betas": None,
        "variance_type": "fixed_large",
    }
    config["_class_name"] = "UNet2DModel"
    for name, values in (("config.json", config), ("scheduler_config.json", scheduler)):
        (tmp_path / name).write_text(json.dumps(values))
    model = load(tmp_path)
    assert model.spec.diffusion.variance == "fixed_large"
    assert_same_network(model, unet.double())


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    unet = make_published().half()
    model = load(save(tmp_path, unet))
    assert_same_network(model, unet.double())


def test_classes_of_theirs_have_no_null_label(tmp_path: Path) -> None:
    unet = make_published(num_class_embeds=3)
    model = load(save(tmp_path, unet))
    assert model.spec.class_names == ["0", "1", "2"]
    assert not model.spec.has_null_label
    assert_same_network(model, unet.double(), num_labels=3)


@pytest.mark.parametrize("has_null_label", [True, False])
def test_classes_of_ours_come_back_with_their_names(has_null_label: bool, tmp_path: Path) -> None:
    spec = make_spec(class_names=["a", "b"], has_null_label=has_null_label)
    weights = make_weights(spec)
    back, same = from_diffusers(str(write(tmp_path, to_diffusers(spec, weights))))
    assert back == spec
    assert same.keys() == weights.keys()
    assert all(torch.equal(same[name], weights[name]) for name in weights)


# What is refused


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("published"), make_published())


def changed(folder: Path, target: Path, name: str, **values: Any) -> Path:
    """A copy with other values in one of its JSON files; None takes a key out."""
    for path in folder.rglob("*.*"):
        write(target, {str(path.relative_to(folder)): path.read_bytes()})
    config = json.loads((target / name).read_text()) | values
    (target / name).write_text(json.dumps({k: v for k, v in config.items() if v is not ...}))
    return target


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"act_fn": "gelu"},
            r'^act_fn="gelu" in .*unet/config.json cannot be .*: should be \'silu',
        ),
        ({"time_embedding_type": "fourier"}, "should be 'positional'"),
        ({"mid_block_scale_factor": 1.4}, "^mid_block_scale_factor=1.4 in .* should be less than"),
        ({"mid_block_type": None}, "^mid_block_type=null in .* should be 'UNetMidBlock2D'"),
        ({"center_input_sample": True}, "^center_input_sample=true in .* should be False"),
        ({"add_attention": False}, "^add_attention=false in .* should be True"),
        ({"class_embed_type": "timestep"}, '^class_embed_type="timestep" in .* should be null'),
        ({"downsample_padding": 2}, "^downsample_padding=2 in .* should be 0 or 1"),
        ({"sample_size": [16, 32]}, r"^sample_size=\[16, 32\] in .* should be a valid integer"),
        ({"sample_size": ...}, "does not say sample_size, which has no default"),
        ({"window": 3}, r"^window=3 in .* is no key of UNet2DModel that is known here \(diffusers"),
        (
            {"_class_name": "UNet2DConditionModel"},
            "^_class_name=UNet2DConditionModel in .* only UN",
        ),
        (
            {"down_block_types": ["SkipDownBlock2D", *["DownBlock2D"] * 3]},
            r'^down_block_types=\["SkipDownBlock2D".* should be \'DownBlock2D\', \'AttnDown',
        ),
        (
            {"up_block_types": ["UpBlock2D"] * 4},
            "^up_block_types=.* must have attention at the levels where down_block_types have it",
        ),
        ({"block_out_channels": [16, 32]}, "^block_out_channels=.* must be as many as down_block_"),
        (
            {"block_out_channels": [16, 24, 32, 32]},
            r"^block_out_channels=\(16, 24, 32, 32\) of the .* must be multiples of the first, 16",
        ),
        ({"time_embedding_dim": 99}, "^time_embedding_dim=99 .* must be 64, four times the first"),
        (
            {"downsample_type": "resnet"},
            "^down_block_types=.* and up_block_types must change the resolution in one way",
        ),
        (
            {"resnet_time_scale_shift": "scale_shift"},
            "^attn_norm_num_groups=None of the U-Net .* must be norm_num_groups=8: with scale",
        ),
        (
            {"norm_num_groups": 6},
            "cannot be taken over: norm_groups=6 must divide base_channels=16",
        ),
        ({"attention_head_dim": 5}, "head_channels=5 does not divide the 32 channels of a level"),
        (
            {"layers_per_block": 0},
            "cannot be taken over: blocks_per_level=0: should be greater than",
        ),
        ({"sample_size": 12}, "channel_multipliers has 4 levels.* is not a multiple of 8"),
        (
            {"out_channels": 6},
            "^out_channels=6 of the U-Net does not go with variance_type=fixed",
        ),
        ({"layers_per_block": 1}, "is not of the model in config.json: tensor .* 'none'|has none"),
        (
            {"in_channels": 1, "out_channels": 1},
            r"conv_in.weight has shape \(16, 3, 3, 3\), the mod",
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_key_of_a_unet_that_is_not_known_is_named(
    values: dict[str, Any], sentence: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises((ConfigError, DataError), match=sentence):
        from_diffusers(str(changed(folder, tmp_path, "unet/config.json", **values)))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (
            {"beta_schedule": "laplace"},
            '^beta_schedule="laplace" in .*scheduler_config.json cannot',
        ),
        ({"prediction_type": "flow"}, "should be 'epsilon', 'sample' or 'v_prediction'"),
        ({"variance_type": "learned"}, '^variance_type="learned" in'),
        (
            {"variance_type": "learned_range"},
            "^out_channels=3 of the U-Net does not go with var",
        ),
        (
            {"final_sigmas_type": "zero"},
            '^final_sigmas_type="zero" in .* is no key of DDPMScheduler',
        ),
        ({"_class_name": "PNDMScheduler"}, "only DDPMScheduler and DDIMScheduler can"),
        ({"rescale_betas_zero_snr": True}, "zero_terminal_snr with prediction=eps cannot work"),
        ({"trained_betas": [0.1, 0.2]}, "betas has 2 numbers, timesteps=1000 must be as many"),
        ({"beta_end": 1.5}, "beta_end=1.5: should be less than 1"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_key_of_a_scheduler_that_is_not_known_is_named(
    values: dict[str, Any], sentence: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        from_diffusers(str(changed(folder, tmp_path, "scheduler/scheduler_config.json", **values)))


WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("files", "kind", "sentence"),
    [
        ({WEIGHTS: None}, StorageError, "has neither unet/diffusion_pytorch_model.safetensors nor"),
        (
            {WEIGHTS: None, "unet/diffusion_pytorch_model.bin": b"pickle"},
            StorageError,
            r"model.bin is a pickle, .* convert it once .*\.save_pretrained\(NEW_DIR\)",
        ),
        ({WEIGHTS: b"nothing"}, DataError, "safetensors is not a file of safetensors"),
        ({"unet/config.json": b"{"}, StorageError, "unet/config.json is not JSON"),
        ({"unet/config.json": b"[]"}, StorageError, "unet/config.json is not a JSON object"),
        ({"unet/config.json": None}, StorageError, "has neither unet/config.json nor config.json"),
        ({"scheduler/scheduler_config.json": None}, StorageError, "neither scheduler/scheduler_co"),
        (
            {"model_index.json": b'{"_class_name": "LDMPipeline"}'},
            ConfigError,
            "_class_name=LDMPipeline in .* only DDPMPipeline and DDIMPipeline can",
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_folder_that_cannot_be_read_is_one_sentence(
    files: dict[str, bytes | None],
    kind: type[UserError],
    sentence: str,
    folder: Path,
    tmp_path: Path,
) -> None:
    changed(folder, tmp_path, "model_index.json")
    for name, data in files.items():
        if data is None:
            (tmp_path / name).unlink()
        else:
            (tmp_path / name).write_bytes(data)
    with pytest.raises(kind, match=sentence):
        from_diffusers(str(tmp_path))
