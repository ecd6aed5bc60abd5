"""Promise P3: in exact mode an image is a function of its recipe, whatever else is drawn."""

import random
from concurrent.futures import Future

import numpy as np
import pytest
import torch

from pipeline.data.images import to_uint8
from pipeline.diffusion.schedules import DiffusionConfig
from pipeline.errors import DataError, RequestError
from pipeline.networks.unet import UNetConfig
from pipeline.samplers.model import Model, ModelSpec, build_model, make_plan
from pipeline.samplers.plan import SamplingConfig, run_plan
from pipeline.seeding import key, normal
from pipeline.serving import recipe
from pipeline.serving.engine import Engine, EngineThread, ImageRequest


def make_model(class_names: list[str], has_null_label: bool = True) -> Model:
    """A network that was not trained, but whose zero-initialised layers do something."""
    spec = ModelSpec(
        network=UNetConfig(base_channels=8, channel_multipliers=[1, 2], attention_at=[4]),
        diffusion=DiffusionConfig(schedule="cosine"),
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
]


def crowd() -> list[ImageRequest]:
    """Many images of different requests, samplers, steps and guidance."""
    return [
        ImageRequest(seed, index, label, sampling)
        for seed in (0, 1)
        for index in range(3)
        for label, sampling in zip((0, 1, 2, 0), SETTINGS, strict=True)
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


def test_exactness_is_of_bits_and_not_only_of_rounded_pixels(model: Model) -> None:
    """The network's output for a row, in its padded batch, among zeros and among others."""
    engine = Engine(model)
    requests = crowd()[:6]
    for request in requests:
        engine.add(request)
    images = engine._gather()
    x = torch.stack([image.x for image in images])
    t = torch.full((len(images),), 500.0, dtype=torch.float64)
    together = engine._eps(images, x, t)
    for i, image in enumerate(images):
        assert torch.equal(engine._eps([image], x[i : i + 1], t[:1])[0], together[i])


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
        patch.setattr(Engine, "_eps", lambda *_: 1 / 0)
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
