"""Properties of request bodies: whatever JSON comes, it is a request or one sentence."""

import functools
import json
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from pipeline.errors import MOST_SHOWN, RequestError
from pipeline.samplers.model import Model
from pipeline.serving.api import GenerationRequest, image_requests, parse_request
from pipeline.serving.config import ServingConfig
from pipeline.serving.engine import Engine
from tests.unit.test_engine import make_model

settings.register_profile(
    "same", derandomize=True, database=None, deadline=None, phases=[Phase.explicit, Phase.generate]
)
SAME = settings.get_profile("same")
CONFIG = ServingConfig()
NAMES = sorted(GenerationRequest.model_fields)


@functools.cache  # no fixture: what fails is shown with all arguments, its weights too
def model() -> Model:
    return make_model([str(i) for i in range(10)])


numbers = st.one_of(
    st.integers(-2, 4),
    st.sampled_from([8, 50, 64, 65, 1000, 1001, 2**31, 2**53, 2**63 - 1, 2**63, 10**400]),
    st.integers(),
    st.floats(),
    st.sampled_from([0.0, -0.0, 0.5, 1.0, 2.0, 50.0, 5e-324, 1e308, 1e-10]),
)
words = st.one_of(
    st.sampled_from([*"0123456789", "auto", "8x8", "b64_json", "png", "exact", "fast", ""]),
    st.sampled_from(["ddim", "heun", "euler", "dpm_solver_pp", "unipc", "deis", "ode", "karras"]),
    st.text(st.characters(), max_size=80),
    st.sampled_from(["\ud800", "\x00", "a\nb", "\u2028", "e\u0301" * 60, "x" * 5000]),
)
leaves = st.one_of(st.none(), st.booleans(), numbers, words)
anything = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=12,
)
fitting = {
    name: st.from_type(field.annotation) for name, field in GenerationRequest.model_fields.items()
}
values = {name: st.one_of(own, leaves, anything) for name, own in fitting.items()}


def fields(of: dict[str, st.SearchStrategy[Any]], most: int) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with a few of the fields, and now and then with another."""
    chosen = st.lists(st.sampled_from(NAMES), unique=True, max_size=most)
    return chosen.flatmap(lambda names: st.fixed_dictionaries({name: of[name] for name in names}))


bodies = st.one_of(
    anything,
    fields(values, 4),
    st.builds(lambda a, b: {**a, **b}, fields(fitting, 2), st.dictionaries(words, anything)),
)


def check_refusal(error: RequestError, body: Any) -> None:
    assert "\n" not in error.message
    assert 10 < len(error.message) < 500
    error.message.encode()  # half a surrogate pair could not be sent
    known = {*NAMES, *(body if isinstance(body, dict) else ())}
    assert error.param is None or error.param in known
    assert error.param is None or (error.param.isprintable() and 0 < len(error.param) <= MOST_SHOWN)


@settings(SAME, max_examples=600, suppress_health_check=list(HealthCheck))
@given(body=bodies)
def test_whatever_comes_is_a_request_or_one_sentence(body: Any) -> None:
    try:
        request = parse_request(body, model().spec, CONFIG)
        image_requests(request, model().spec, 1)
    except RequestError as error:
        check_refusal(error, body)
    else:
        again = json.loads(request.model_dump_json())
        assert parse_request(again, model().spec, CONFIG) == request


@pytest.mark.parametrize(
    ("body", "param", "sentence"),
    [
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 65}, "n", "n=65 must be from 1 to 64"),
        ({"n": "3"}, "n", "valid integer"),
        ({"n": True}, "n", "valid integer"),
        ({"num_inference_steps": 0}, "num_inference_steps", "greater than or equal to 1"),
        ({"num_inference_steps": 1001}, "num_inference_steps", "from 1 to the model's 1000"),
        ({"class_label": 10}, "class_label", "label=10 is not a class of the model, from 0 to 9"),
        ({"class_label": -1}, "class_label", "greater than or equal to 0"),
        ({"guidance_scale": -1}, "guidance_scale", "greater than or equal to 0"),
        ({"guidance_scale": 51}, "guidance_scale", "less than or equal to 50"),
        ({"guidance_scale": 1}, "guidance_scale", "needs a label"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"seed": 1.5}, "seed", "valid integer"),
        ({"sampler": "magic"}, "sampler", "'ancestral', 'ddim'"),
        ({"sampler": "ancestral", "eta": 1}, None, "has no meaning for"),
        ({"sampler": "ode"}, "sampler", "is not served: draw with `ddpm sample`"),
        ({"order": 3}, None, "order=3 has no meaning for sampler=ddim"),
        ({"spacing": "magic"}, "spacing", "'trailing', 'leading'"),
        ({"size": "512x512"}, "size", "must be auto or 8x8"),
        ({"prompt": "a cat"}, "prompt", "is not a class name; there are: 0, 1, 2"),
        ({"prompt": "1", "class_label": 1}, "class_label", "not both"),
        ({"quality": "hd"}, "quality", "is not a parameter of this service"),
        ({"response_format": "url"}, "response_format", "'b64_json'"),
        ([], None, "must be a JSON object"),
        ({"partial_images": 3}, "partial_images", "partial_images=3 needs stream=true"),
        ({"stream": "yes"}, "stream", "valid boolean"),
        (
            {"n": 64, "partial_images": 100, "stream": True},
            "partial_images",
            "n=64 times partial_images=100 must be at most 1000",
        ),
    ],
)
def test_a_bad_request_is_refused_with_the_parameter(
    body: object, param: str | None, sentence: str
) -> None:
    with pytest.raises(RequestError, match=re.escape(sentence)) as caught:
        image_requests(parse_request(body, model().spec, CONFIG), model().spec, 1)
    assert caught.value.param == param


def test_partial_images_of_large_images_are_fewer() -> None:
    large = model().spec.model_copy(update={"image_size": 512, "channels": 3})
    body = {"stream": True, "n": 5, "partial_images": 17}
    assert parse_request(body, large, CONFIG).partial_images == 17
    with pytest.raises(RequestError, match="must be at most 85 for images of 512x512") as caught:
        parse_request({**body, "n": 6}, large, CONFIG)
    assert caught.value.param == "partial_images"


small = {
    **{name: st.just(field.default) for name, field in GenerationRequest.model_fields.items()},
    "n": st.just(1),
    "sampler": fitting["sampler"],
    "spacing": fitting["spacing"],
    "num_inference_steps": st.integers(1, 6),
    "class_label": st.integers(0, 9),
    "guidance_scale": st.sampled_from([0.0, -0.0, 5e-324, 1.5, 50.0]),
    "guidance_rescale": st.sampled_from([0.0, 0.7, 1.0]),
    "guidance_interval": st.none() | st.tuples(st.just(0.0), st.floats(0, width=32)).map(list),
    "clip_x_0": st.booleans(),
    "threshold_quantile": st.none() | st.sampled_from([5e-324, 0.5, 1.0]),
    "eta": st.sampled_from([0.0, 0.3, 1.0]),
    "order": st.integers(1, 3),
    "singlestep": st.booleans(),
    "stochastic": st.booleans(),
    "churn": st.sampled_from([0.0, 80.0, 1e308]),
    "churn_min": st.sampled_from([0.0, 1e308]),
    "churn_max": st.none() | st.sampled_from([0.0, 1e308]),
    "churn_noise": st.sampled_from([5e-324, 1.0, 10.0]),
}


@settings(SAME, max_examples=200, suppress_health_check=list(HealthCheck))
@given(body=fields(small, 6))
def test_what_is_taken_can_be_drawn_and_told(body: dict[str, Any]) -> None:
    try:
        request = parse_request({"num_inference_steps": 3, **body}, model().spec, CONFIG)
        (image,) = image_requests(request, model().spec, 1)
    except RequestError as error:
        check_refusal(error, body)
        return
    engine = Engine(model(), "fast")
    engine.add(image)
    while engine.num_images:
        engine.step()
        assert engine._state.isfinite().all(), "a picture of NaN is no picture"
    json.dumps(image.sampling.model_dump(mode="json"), allow_nan=False)
