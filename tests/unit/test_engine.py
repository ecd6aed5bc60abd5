"""Promise P3: in exact mode an image is a function of its recipe, whatever else is drawn."""

import functools
import itertools
import random
import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from pipeline.data.images import to_uint8
from pipeline.diffusion.config import DiffusionConfig
from pipeline.errors import DataError, RequestError
from pipeline.networks.config import UNetConfig
from pipeline.samplers.config import OWNERS, SamplerName, SamplingConfig
from pipeline.samplers.model import SOLVERS, Model, ModelSpec, build_model, make_plan
from pipeline.samplers.plan import MATRIX, T, X, run_plan
from pipeline.seeding import key, normal
from pipeline.serving import recipe
from pipeline.serving.engine import Caller, Engine, ImageRequest, evenly
from pipeline.serving.engine_thread import EngineThread, StepFailed
from tests.conftest import HANG, wait_for


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
    """The network's output for a row, in its padded batch, alone and among others."""
    engine = Engine(model)
    requests = crowd()[:6]
    for request in requests:
        engine.add(request)
    x = engine._state[:6, X]
    rows = torch.stack([make_plan(model, request.sampling).table[0] for request in requests])
    labels = torch.from_numpy(engine._labels[:6])
    together, _ = engine.x_0(labels, x, rows)
    for i in range(6):
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
        for ticket, pixels in engine.step().finished:
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
    thread, engine = EngineThread(), Engine(model)
    requests = crowd()
    futures: list[Future[np.ndarray]] = [thread.submit(engine, request) for request in requests]
    bad = thread.submit(engine, ImageRequest(0, 0, 99, SETTINGS[0]))
    with pytest.raises(RequestError, match="label=99"):
        bad.result(timeout=HANG)
    for request, future in zip(requests, futures, strict=True):
        assert np.array_equal(future.result(timeout=HANG), alone(model, request))
    thread.close()
    assert not thread.is_alive


def test_a_cancelled_image_makes_room(model: Model) -> None:
    thread, engine = EngineThread(), Engine(model)
    long = [
        ImageRequest(0, i, 0, SamplingConfig(sampler="ancestral", steps=1000)) for i in range(16)
    ]
    futures = [thread.submit(engine, request) for request in long]
    last = thread.submit(engine, crowd()[0])
    for future in futures:
        assert future.cancel()
    assert np.array_equal(last.result(timeout=HANG), alone(model, crowd()[0]))
    assert engine.num_calls < 900, "the long ones were not drawn to their end"
    waiting = thread.submit(engine, long[0])
    thread.close()
    assert waiting.cancelled()


def test_callers_hear_of_a_network_that_fails_and_the_thread_goes_on(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread, engine = EngineThread(), Engine(model)
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "x_0", lambda *_: 1 / 0)
        futures = [thread.submit(engine, request) for request in crowd()]
        for future in futures:
            with pytest.raises(StepFailed, match="ZeroDivisionError: division by zero"):
                future.result(timeout=HANG)
        assert thread.failures > 0
        failures = thread.failures
        thread.call(lambda: thread._step(engine, {})).result(timeout=HANG)
        assert thread.failures == failures, "a step without work calls no network"
    request = crowd()[0]
    found = thread.submit(engine, request).result(timeout=HANG)
    assert np.array_equal(found, alone(model, request))
    assert thread.failures == 0
    thread.close()


def test_those_that_come_hold_up_nobody(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    thread, engine, calls = EngineThread(), Engine(model), list[int]()
    add = Engine.add

    def slow(self: Engine, *arguments: Any) -> int:
        calls.append(self.num_calls)
        time.sleep(0.03)
        return add(self, *arguments)

    monkeypatch.setattr(Engine, "add", slow)
    first = ImageRequest(0, 0, 0, SamplingConfig(steps=50))
    go_on = threading.Event()
    thread.call(lambda: go_on.wait(60))
    futures = [thread.submit(engine, replace(first, index=i)) for i in range(20)]
    go_on.set()
    for future in futures:
        future.result(timeout=HANG)
    # an image that takes long to take in lets those in hand have a network call before the next
    assert calls == list(range(20))

    go_on.clear()
    thread.call(lambda: go_on.wait(60))
    called_off = [thread.submit(engine, replace(first, seed=i)) for i in range(20)]
    for future in called_off:
        assert future.cancel()
    go_on.set()
    thread.submit(engine, first).result(timeout=HANG)
    assert len(calls) == 21, "what was called off on its way is not taken in"
    thread.close()


def test_engines_take_turns_on_one_thread(model: Model) -> None:
    models = (model, make_model(["a", "b", "c"], prediction="v"))
    engines = [Engine(model) for model in models]
    thread, order = EngineThread(), []
    futures = {}
    for i, which in itertools.product(range(3), range(2)):
        request = ImageRequest(i, 0, i, SamplingConfig(sampler="ancestral", steps=20))
        note = functools.partial(lambda which, frame: order.append(which), which)
        futures[which, request] = thread.submit(engines[which], request, frames=19, on_frame=note)
    for (which, request), future in futures.items():
        assert np.array_equal(future.result(timeout=HANG), alone(models[which], request))
    turns = [which for which, _ in itertools.groupby(order)]
    assert len(turns) > 20, "neither waited for the other to be done"
    thread.close()


def test_a_thread_tells_how_long_it_is_in_a_step(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    thread, engine, go_on = EngineThread(), Engine(model), threading.Event()
    assert thread.seconds_in_step == 0
    step = Engine.step
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "step", lambda self: (go_on.wait(60), step(self))[1])
        future = thread.submit(engine, crowd()[0])
        wait_for(lambda: thread.seconds_in_step > 0.2, "a step that does not end")
        go_on.set()
        future.result(timeout=HANG)
    wait_for(lambda: thread.seconds_in_step == 0, "the thread to be without work")
    thread.close()


def test_a_thread_tells_of_its_steps_and_does_other_things_between_them(model: Model) -> None:
    steps: list[tuple[Engine, float, int]] = []
    thread, engine = EngineThread(lambda *step: steps.append(step)), Engine(model)
    assert thread.call(engine.warm_up).result(timeout=HANG) > 0
    request = ImageRequest(0, 0, 1, SamplingConfig(steps=5, guidance=1.0))
    thread.submit(engine, request).result(timeout=HANG)
    assert [rows for _, _, rows in steps] == [2] * 5
    assert all(of is engine and seconds > 0 for of, seconds, _ in steps)
    with pytest.raises(ZeroDivisionError):
        thread.call(lambda: 1 / 0).result(timeout=HANG)
    assert thread.call(lambda: 3).result(timeout=HANG) == 3
    thread.close()


def test_a_compiled_network_is_called_with_few_sizes(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the network itself stands for its compiled form, which takes a minute to make (`make soak`)
    monkeypatch.setattr(torch, "compile", lambda network, **_: network)
    engine, sizes = Engine(model, "fast", rows=12, compiled=True), set()
    note = model.network.register_forward_pre_hook(lambda _, inputs: sizes.add(len(inputs[0])))
    with note:
        images = engine.draw(crowd())
        assert sizes <= {1, 2, 4, 8, 12}
        engine.warm_up()
        assert sizes == {1, 2, 4, 8, 12}
    for image, request in zip(images, crowd(), strict=True):
        assert np.abs(image.astype(int) - alone(model, request)).max() <= 1


def test_frames_show_an_image_on_its_way(model: Model) -> None:
    sampling = SamplingConfig(sampler="heun", steps=6)  # 11 evaluations
    plain, watched = ImageRequest(0, 0, 1, SETTINGS[1]), ImageRequest(3, 0, 1, sampling)
    engine = Engine(model)
    tickets = {engine.add(plain): plain, engine.add(watched, frames=3): watched}
    frames, drawn = [], {}
    while engine.num_images:
        step = engine.step()
        frames += step.frames
        drawn |= {tickets[ticket]: pixels for ticket, pixels in step.finished}
    assert {tickets[frame.ticket] for frame in frames} == {watched}
    assert [(frame.evaluation, frame.evaluations) for frame in frames] == [
        (2, 11),
        (5, 11),
        (8, 11),
    ]
    assert np.array_equal(drawn[watched], alone(model, watched)), "to be watched changes nothing"
    seen = []  # by the plain loop: x_t, and x̂_0 of it

    def predict(x: torch.Tensor, t: torch.Tensor, alpha_bar: torch.Tensor) -> torch.Tensor:
        seen.append((x[0], model.predict_x_0(x, t, alpha_bar, torch.tensor([1]))[0]))
        return seen[-1][1][None]

    x_T = normal([key(3, "sample", 0, 0)], (1, 8, 8))
    run_plan(make_plan(model, sampling), predict, x_T, lambda i: x_T)
    for frame in frames:
        torch.testing.assert_close(frame.x_t, seen[frame.evaluation][0], rtol=0, atol=1e-4)
        x_0 = seen[frame.evaluation - 1][1].clamp(-1, 1)
        torch.testing.assert_close(frame.x_0, x_0, rtol=0, atol=1e-4)


def test_more_frames_than_evaluations_are_one_each(model: Model) -> None:
    assert evenly(5, 100) == {1, 2, 3, 4}
    assert evenly(5, 0) == evenly(1, 3) == set()
    assert evenly(50, 1) == {25}


def test_places_are_used_again_and_a_crowd_leaves_no_room_behind(model: Model) -> None:
    engine = Engine(model)
    many = [ImageRequest(0, i, 0, SamplingConfig(steps=200)) for i in range(100)]
    tickets = [engine.add(request) for request in many]
    assert engine.num_images == 100
    assert engine.num_rows == 20_000
    held = len(engine._state)
    engine.drop(tickets[1:])
    others = {engine.add(request): request for request in crowd()}
    assert len(engine._state) == held, "in the places of those that went"
    got = {}
    while engine.num_images:
        got |= dict(engine.step().finished)
    assert set(got) == {tickets[0], *others}
    assert np.array_equal(got[tickets[0]], alone(model, many[0]))
    for ticket, request in list(others.items())[::7]:
        assert np.array_equal(got[ticket], alone(model, request))
    assert engine.num_rows == 0
    assert not len(engine._state), "nothing in hand takes nothing"


def test_images_of_a_plan_hold_it_once(model: Model) -> None:
    engine = Engine(model)
    sampling = SamplingConfig(sampler="heun", steps=1000)
    for i in range(100):
        engine.add(ImageRequest(0, i, 0, sampling))
        engine.add(ImageRequest(1, i, 0, SamplingConfig(steps=2)))
    held = {table.ctypes.data: table.nbytes for table in engine._tables if len(table)}
    assert len(held) == 2
    assert sum(held.values()) < 2 * make_plan(model, sampling).table.nbytes


def test_the_images_in_hand_are_shown_as_they_are(model: Model) -> None:
    engine = Engine(model, rows=4)
    assert engine.in_hand() == []
    guided = SamplingConfig(steps=10, guidance=1.0)
    engine.add(ImageRequest(1, 7, 0, guided), Caller(1, 1, "gen_a"))
    for i in range(3):
        engine.add(ImageRequest(1, i, 0, SamplingConfig(steps=20)), Caller(2, 2, "gen_b"))
    assert not any(image.in_call for image in engine.in_hand()), "they have just come"
    for _ in range(3):
        engine.step()
    images = engine.in_hand()
    assert sum(image.rows for image in images if image.in_call) == 4
    assert [image.in_call for image in images] == [True, True, True, False]
    first = next(image for image in images if image.request == "gen_a")
    plan = make_plan(model, guided)
    assert (first.image_index, first.evaluation, first.evaluations) == (7, 3, 10)
    assert (first.t, first.rows) == (plan.table[3, T], 2)
    while engine.num_images:
        engine.step()
    assert engine.in_hand() == []


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


def test_a_webp_carries_its_recipe_too() -> None:
    made = recipe.Recipe(
        model="ü@1", model_digest="", seed=1, index=0, label=2, sampling=SETTINGS[0], rows=8
    )
    rng = np.random.default_rng(0)
    for channels in (1, 3):
        pixels = rng.integers(0, 256, (8, 8, channels), dtype=np.uint8)
        again, got = recipe.decode(recipe.encode(pixels, made, "webp"), "x.webp")
        assert np.array_equal(again, np.broadcast_to(pixels, (8, 8, 3)))
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
