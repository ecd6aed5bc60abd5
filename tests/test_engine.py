"""Promise P3: in exact mode an image is a function of its recipe, whatever else is drawn."""

import itertools
import random
from concurrent.futures import Future

import numpy as np
import pytest
import torch

from pipeline.data.images import to_uint8
from pipeline.diffusion.schedules import DiffusionConfig
from pipeline.errors import DataError, RequestError
from pipeline.networks.unet import UNetConfig
from pipeline.samplers.model import SOLVERS, Model, ModelSpec, build_model, make_plan
from pipeline.samplers.plan import MATRIX, OWNERS, SamplerName, SamplingConfig, X, run_plan
from pipeline.seeding import key, normal
from pipeline.serving import recipe
from pipeline.serving.engine import Engine, EngineThread, ImageRequest


def make_model(class_names: list[str], has_null_label: bool = True, **diffusion: object) -> Model:
    """A network that was not trained, but whose zero-initialised layers do something."""
    spec = ModelSpec(
        network=UNetConfig(base_channels=8, channel_multipliers=[1, 2], attention_at=[4]),
        diffusion=DiffusionConfig.model_validate({"schedule": "cosine", **diffusion}),
        channels=1,
        image_size=8,
        class_names=class_names,
        has_null_label=has_null_label,
    )
    torch.manual_seed(0)
    weights = {
        name: torch.randn(tensor.shape) * 0.2 if not tensor.any() else tensor
        for name, tensor in spec.make_network().state_dict().items()
    }
    return build_model(spec, weights, "digest")


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model(["a", "b", "c"])


SETTINGS = [
    SamplingConfig(sampler="ddim", steps=5),
    SamplingConfig(sampler="ddim", steps=7, eta=0.5, guidance=1.5),
    SamplingConfig(sampler="ancestral", steps=9),
    SamplingConfig(sampler="ancestral", steps=3, guidance=0.3),
    SamplingConfig(sampler="heun", steps=4, churn=2.0, spacing="karras"),
    SamplingConfig(sampler="dpm_solver_pp", steps=4, order=3, guidance=1.5, guidance_rescale=0.7),
    SamplingConfig(sampler="dpm_solver", steps=2, singlestep=True, spacing="log_snr"),
    SamplingConfig(sampler="unipc", steps=5, guidance=2.0, guidance_interval=(0.2, 4.0)),
    SamplingConfig(sampler="pndm", steps=4, spacing="leading", threshold_quantile=0.9),
    SamplingConfig(sampler="deis", steps=4, order=3, clip_x_0=False),
    SamplingConfig(sampler="euler_maruyama", steps=6, spacing="linspace"),
]


def crowd() -> list[ImageRequest]:
    """Many images of different requests, samplers, steps and guidance."""
    return [
        ImageRequest(seed, index, label, sampling)
        for seed in (0, 1)
        for index in range(2)
        for label, sampling in zip(itertools.cycle((0, 1, 2)), SETTINGS, strict=False)
    ]


def draw(engine: Engine, requests: list[ImageRequest]) -> dict[ImageRequest, np.ndarray]:
    return {requests[i]: pixels for i, pixels in engine.generate(requests)}


def alone(model: Model, request: ImageRequest) -> np.ndarray:
    return draw(Engine(model), [request])[request]


def test_an_image_does_not_depend_on_the_company_it_is_drawn_in(model: Model) -> None:
    requests = crowd()
    together = draw(Engine(model), requests)
    shuffled = requests.copy()
    random.Random(1).shuffle(shuffled)
    again = draw(Engine(model), shuffled)
    for request in requests:
        assert np.array_equal(together[request], again[request])
        assert np.array_equal(together[request], alone(model, request))


@pytest.mark.parametrize(
    "diffusion",
    [
        {"prediction": "x_0"},
        {"prediction": "v", "zero_terminal_snr": True},
        {"prediction": "score", "schedule": "subvp"},
        {"prediction": "edm", "schedule": "edm"},
        {"prediction": "eps", "schedule": "ve", "variance": "fixed_large"},
        {"prediction": "eps", "variance": "learned_range"},
    ],
    ids=lambda values: "-".join(map(str, values.values())),
)
def test_models_of_every_kind_are_drawn_from_exactly(diffusion: dict[str, object]) -> None:
    model = make_model(["a", "b"], **diffusion)
    requests = [
        ImageRequest(0, i, i % 2, SamplingConfig(sampler=sampler, steps=4, guidance=w))
        for i, (sampler, w) in enumerate(
            itertools.product(("ancestral", "ddim", "euler", "dpm_solver_pp"), (0.0, 1.0))
        )
    ]
    together = draw(Engine(model), requests)
    for request in requests:
        assert np.array_equal(together[request], alone(model, request))
    assert len({pixels.tobytes() for pixels in together.values()}) == len(requests)


@pytest.mark.parametrize("sampler", sorted(set(SOLVERS) - {"langevin"}))
def test_a_terminal_snr_of_zero_is_sampled_or_refused(sampler: SamplerName) -> None:
    model = make_model(["a"], prediction="v", zero_terminal_snr=True)
    for order in (1, 2, 3):
        if order != 2 and sampler not in OWNERS["order"]:
            continue
        request = ImageRequest(
            0, 0, 0, SamplingConfig(sampler=sampler, steps=5, order=order, clip_x_0=False)
        )
        if sampler in ("pndm", "euler_maruyama"):
            with pytest.raises(
                RequestError, match="cannot start at the signal-to-noise ratio of 0"
            ):
                Engine(model).add(request)
            return
        assert make_plan(model, request.sampling).table[:, MATRIX].isfinite().all()
        assert len(np.unique(alone(model, request))) > 10
    with pytest.raises(RequestError, match="spacing=karras cannot start at"):
        Engine(model).add(ImageRequest(0, 0, 0, SamplingConfig(steps=5, spacing="karras")))


def test_a_learned_variance_lies_between_the_posterior_s_and_beta() -> None:
    """A network that says -1 everywhere draws as fixed_small does, one that says +1 as fixed_large.

    Nichol & Dhariwal 2021, Eq. 15: σ² = exp(v log β + (1-v) log β̃).
    """
    sampling = SamplingConfig(sampler="ancestral", steps=6)
    for says, variance in ((-1.0, "fixed_small"), (1.0, "fixed_large")):
        learned = make_model(["a"], variance="learned_range")
        weights = dict(learned.network.state_dict())
        weights["conv_out.weight"][1:] = 0
        weights["conv_out.bias"][1:] = says
        fixed = {
            **weights,
            **{name: weights[name][:1] for name in ("conv_out.weight", "conv_out.bias")},
        }
        learned = build_model(learned.spec, weights, "digest")
        diffusion = learned.spec.diffusion.model_copy(update={"variance": variance})
        spec = learned.spec.model_copy(update={"diffusion": diffusion})
        request = ImageRequest(0, 0, 0, sampling)
        got = alone(learned, request).astype(int)
        want = alone(build_model(spec, fixed, "digest"), request).astype(int)
        assert np.abs(got - want).max() <= 1
    small, large = (
        alone(make_model(["a"], variance=v), request) for v in ("fixed_small", "fixed_large")
    )
    assert np.abs(small.astype(int) - large).max() > 10, "the two are far enough apart to tell"


def test_exactness_is_of_bits_and_not_only_of_rounded_pixels(model: Model) -> None:
    """The network's output for a row, in its padded batch, among zeros and among others."""
    engine = Engine(model)
    requests = crowd()[:6]
    for request in requests:
        engine.add(request)
    images = engine._gather()
    x = torch.stack([image.state[X] for image in images])
    rows = torch.stack([image.row for image in images])
    labels = [image.request.label for image in images]
    together, _ = engine.x_0(labels, x, rows)
    for i in range(len(images)):
        alone, _ = engine.x_0(labels[i : i + 1], x[i : i + 1], rows[i : i + 1])
        assert torch.equal(alone[0], together[i])


def test_the_number_of_threads_does_not_show(model: Model) -> None:
    request = crowd()[1]
    want = alone(model, request)
    torch.set_num_threads(2)
    try:
        assert np.array_equal(alone(model, request), want)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


def test_images_may_join_at_any_step(model: Model) -> None:
    requests = crowd()
    engine = Engine(model)
    tickets = {engine.add(requests[0]): requests[0]}
    drawn: dict[ImageRequest, np.ndarray] = {}
    rest = requests[1:]
    while engine.num_images or rest:
        for ticket, pixels in engine.step():
            drawn[tickets[ticket]] = pixels
        if rest:
            request = rest.pop()
            tickets[engine.add(request)] = request
    for request in requests:
        assert np.array_equal(drawn[request], alone(model, request))


@pytest.mark.parametrize("sampling", SETTINGS[:3:2])
def test_the_engine_follows_the_plan_as_the_plain_loop_does(
    model: Model, sampling: SamplingConfig
) -> None:
    request = ImageRequest(4, 2, 1, sampling)

    def noise(draw: int) -> torch.Tensor:
        return normal([key(4, "sample", 2, draw)], (1, 8, 8))

    x_0 = run_plan(
        make_plan(model, sampling),
        lambda x, t, alpha_bar: model.predict_x_0(x, t, alpha_bar, torch.tensor([1])),
        noise(0),
        lambda i: noise(i + 1),
    )
    got = alone(model, request).astype(int)
    assert np.abs(got - to_uint8(x_0)[0]).max() <= 1


def test_guidance_is_the_two_rows_combined(model: Model) -> None:
    sampling = SamplingConfig(steps=4, guidance=2.0)

    def guided(x: torch.Tensor, t: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
        label, null = (model.predict_x_0(x, t, alpha_bar, torch.tensor([c])) for c in (1, 3))
        return 3 * label - 2 * null

    x_T = normal([key(0, "sample", 0, 0)], (1, 8, 8))
    x_0 = run_plan(make_plan(model, sampling), guided, x_T, lambda i: x_T)
    got = alone(model, ImageRequest(0, 0, 1, sampling)).astype(int)
    assert np.abs(got - to_uint8(x_0)[0]).max() <= 1
    plain = alone(model, ImageRequest(0, 0, 1, SamplingConfig(steps=4)))
    assert not np.array_equal(got, plain)


def test_seed_index_and_label_each_change_the_image(model: Model) -> None:
    base = ImageRequest(0, 0, 0, SETTINGS[0])
    others = [
        ImageRequest(1, 0, 0, SETTINGS[0]),
        ImageRequest(0, 1, 0, SETTINGS[0]),
        ImageRequest(0, 0, 1, SETTINGS[0]),
        ImageRequest(0, 0, None, SETTINGS[0]),
    ]
    for other in others:
        assert not np.array_equal(alone(model, base), alone(model, other))


def test_fast_mode_agrees_with_exact_to_a_grey_level(model: Model) -> None:
    requests = crowd()
    exact, fast = draw(Engine(model), requests), draw(Engine(model, "fast"), requests)
    assert max(np.abs(exact[r].astype(int) - fast[r]).max() for r in requests) <= 1


def test_an_unconditional_model_draws_too() -> None:
    model = make_model([], has_null_label=False)
    assert alone(model, ImageRequest(0, 0, None, SETTINGS[0])).shape == (8, 8, 1)


@pytest.mark.parametrize(
    ("request_", "param", "sentence"),
    [
        (ImageRequest(0, 0, 0, SamplingConfig(steps=1001)), "steps", "from 1 to the model's 1000"),
        (ImageRequest(0, 0, 3, SETTINGS[0]), "label", "from 0 to 2"),
        (ImageRequest(0, 0, -1, SETTINGS[0]), "label", "from 0 to 2"),
        (ImageRequest(0, 0, None, SamplingConfig(guidance=1.0)), "guidance", "needs a label"),
    ],
)
def test_what_the_model_cannot_draw_is_refused(
    model: Model, request_: ImageRequest, param: str, sentence: str
) -> None:
    with pytest.raises(RequestError, match=sentence) as error:
        Engine(model).add(request_)
    assert error.value.param == param


def test_a_model_without_label_dropout_needs_a_label_and_takes_no_guidance() -> None:
    model = make_model(["a", "b"], has_null_label=False)
    with pytest.raises(RequestError, match="label is missing"):
        Engine(model).add(ImageRequest(0, 0, None, SETTINGS[0]))
    with pytest.raises(RequestError, match="without label dropout"):
        Engine(model).add(ImageRequest(0, 0, 1, SamplingConfig(guidance=1.0)))


def test_the_thread_serves_many_callers_and_survives_a_bad_request(model: Model) -> None:
    thread = EngineThread(Engine(model))
    requests = crowd()
    futures: list[Future[np.ndarray]] = [thread.submit(request) for request in requests]
    bad = thread.submit(ImageRequest(0, 0, 99, SETTINGS[0]))
    with pytest.raises(RequestError, match="label=99"):
        bad.result(timeout=60)
    for request, future in zip(requests, futures, strict=True):
        assert np.array_equal(future.result(timeout=60), alone(model, request))
    thread.close()
    assert not thread.is_alive


def test_a_cancelled_image_makes_room(model: Model) -> None:
    thread = EngineThread(Engine(model))
    long = [
        ImageRequest(0, i, 0, SamplingConfig(sampler="ancestral", steps=1000)) for i in range(16)
    ]
    futures = [thread.submit(request) for request in long]
    last = thread.submit(crowd()[0])
    for future in futures:
        assert future.cancel()
    assert np.array_equal(last.result(timeout=60), alone(model, crowd()[0]))
    assert thread.engine.num_calls < 900, "the long ones were not drawn to their end"
    waiting = thread.submit(long[0])
    thread.close()
    assert waiting.cancelled()


def test_callers_hear_of_a_network_that_fails_and_the_thread_goes_on(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread = EngineThread(Engine(model))
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "x_0", lambda *_: 1 / 0)
        futures = [thread.submit(request) for request in crowd()]
        for future in futures:
            with pytest.raises(ZeroDivisionError):
                future.result(timeout=60)
    request = crowd()[0]
    assert np.array_equal(thread.submit(request).result(timeout=60), alone(model, request))
    thread.close()


# --- recipes ------------------------------------------------------------------------------------


def test_a_png_carries_its_recipe() -> None:
    made = recipe.Recipe(
        model="digits@1",
        model_digest="abc",
        seed=2**62,
        index=3,
        label=None,
        sampling=SETTINGS[1],
        made_with=recipe.fingerprint(),
    )
    for channels in (1, 3):
        pixels = np.random.default_rng(0).integers(0, 256, (8, 8, channels), dtype=np.uint8)
        again, got = recipe.decode(recipe.encode(pixels, made), "x.png")
        assert np.array_equal(again, pixels)
        assert got == made


def test_a_png_without_a_readable_recipe_is_refused() -> None:
    from pipeline.data.images import png

    pixels = np.zeros((8, 8, 1), np.uint8)
    for data, sentence in (
        (b"hello", "is not an image"),
        (png(pixels), "carries no recipe"),
        (png(pixels, {"ddpm": '{"model": 1}'}), "cannot be read"),
    ):
        with pytest.raises(DataError, match=sentence):
            recipe.decode(data, "x.png")
