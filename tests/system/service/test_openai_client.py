"""The service through the `openai` package, as its users would reach it."""

import base64
import io
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types import ImageGenCompletedEvent, ImageGenPartialImageEvent, ImagesResponse
from PIL import Image

from tests.conftest import HANG, wait_for
from tests.service import Service


@pytest.fixture
def client(service: Service) -> Iterator[OpenAI]:
    # where the service has no keys any will do; the client always sends one
    with OpenAI(base_url=f"{service.url}/v1", api_key="any", max_retries=0, timeout=HANG) as client:
        yield client


def size_of(b64_json: str | None) -> tuple[int, int]:
    assert b64_json is not None
    with Image.open(io.BytesIO(base64.b64decode(b64_json))) as image:
        assert image.format == "PNG"
        return image.size


EXTENSIONS = {
    "seed": 7,
    "num_inference_steps": 6,
    "guidance_scale": 1.5,
    "sampler": "heun",
    "mode": "exact",
}


def test_images_of_a_class_by_its_name(client: OpenAI) -> None:
    reply = client.images.generate(
        prompt="3", n=3, response_format="b64_json", extra_body=EXTENSIONS
    )
    ImagesResponse.model_validate(reply.to_dict())
    assert reply.data is not None and len(reply.data) == 3
    assert [size_of(image.b64_json) for image in reply.data] == [(8, 8)] * 3
    assert len({image.b64_json for image in reply.data}) == 3
    for index, image in enumerate(reply.data):
        own = image.to_dict()
        assert (own["seed"], own["index"]) == (7, index)
        assert own["recipe"]["label"] == 3
        assert own["recipe"]["mode"] == "exact"
        assert own["recipe"]["sampling"]["sampler"] == "heun"
        assert own["recipe"]["sampling"]["steps"] == 6
        assert own["recipe"]["sampling"]["guidance"] == 1.5
    assert reply.usage is not None
    assert reply.usage.output_tokens == 3 * 6 * 2 * 2, "images, steps, heun, guidance"
    assert reply.output_format == "png"


def test_a_class_label_and_the_prompt_of_nothing(client: OpenAI) -> None:
    by_label, by_name = (
        client.images.generate(prompt=prompt, extra_body={**EXTENSIONS, **more})
        for prompt, more in (("", {"class_label": 3}), ("3", {}))
    )
    assert by_label.data is not None and by_name.data is not None
    assert by_label.data[0].b64_json == by_name.data[0].b64_json


def test_a_stream_has_partial_images_then_the_images(client: OpenAI) -> None:
    plain = client.images.generate(prompt="3", n=2, extra_body=EXTENSIONS)
    assert plain.data is not None
    with client.images.generate(
        prompt="3", n=2, stream=True, partial_images=2, extra_body=EXTENSIONS
    ) as stream:
        events = list(stream)
    assert len(events) == 2 * 3
    for position in range(2):
        own = [event for event in events if event.to_dict()["image_index"] == position]
        *partial, completed = own
        for index, event in enumerate(partial):
            assert isinstance(event, ImageGenPartialImageEvent)
            ImageGenPartialImageEvent.model_validate(event.to_dict())
            assert event.type == "image_generation.partial_image"
            assert event.partial_image_index == index
            assert size_of(event.b64_json) == (8, 8)
            assert event.b64_json != plain.data[position].b64_json
        assert isinstance(completed, ImageGenCompletedEvent)
        ImageGenCompletedEvent.model_validate(completed.to_dict())
        assert completed.type == "image_generation.completed"
        assert completed.b64_json == plain.data[position].b64_json
        assert completed.usage.output_tokens == 6 * 2 * 2


@pytest.mark.parametrize(
    ("arguments", "error", "param", "sentence"),
    [
        ({"prompt": "a cat"}, openai.UnprocessableEntityError, "prompt", "not a class name"),
        ({"n": 65}, openai.UnprocessableEntityError, "n", "n=65 must be from 1 to 64"),
        ({"size": "256x256"}, openai.UnprocessableEntityError, "size", "must be auto or 8x8"),
        ({"quality": "hd"}, openai.UnprocessableEntityError, "quality", "not a parameter"),
        ({"response_format": "url"}, openai.UnprocessableEntityError, "response_format", "b64"),
        ({"extra_body": {"seed": -1}}, openai.UnprocessableEntityError, "seed", "greater than"),
        ({"model": "dall-e-3"}, openai.NotFoundError, "model", "there is no such model"),
        ({"prompt": "x" * 70_000}, openai.BadRequestError, "body", "larger than 65536 bytes"),
        (
            {"extra_headers": {"Idempotency-Key": "k" * 256}},
            openai.UnprocessableEntityError,
            "Idempotency-Key",
            "must have 1 to 255",
        ),
    ],
)
def test_errors_are_the_clients_own(
    client: OpenAI,
    arguments: dict[str, Any],
    error: type[openai.APIStatusError],
    param: str,
    sentence: str,
) -> None:
    with pytest.raises(error, match=sentence) as caught:
        client.images.generate(**{"prompt": "3", **arguments})
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


def test_a_full_service_is_a_rate_limit(client: OpenAI, service: Service) -> None:
    everything = {"num_inference_steps": 1000, "sampler": "heun", "guidance_scale": 1}
    with client.images.generate(prompt="1", n=64, stream=True, extra_body=everything) as stream:
        id = stream.response.headers["x-generation-id"]
        try:
            with pytest.raises(openai.RateLimitError, match="full") as caught:
                client.images.generate(prompt="1", extra_body={"num_inference_steps": 1000})
            assert int(caught.value.response.headers["retry-after"]) >= 1
            assert caught.value.type == "rate_limit_error"
        finally:
            state = client.delete(f"/images/generations/{id}", cast_to=object)
        assert state == {"id": id, "state": "cancelled"}
    assert wait_for(lambda: service.get("/v1/engine")["rows"] == 0, "the rows to be free")


def test_models(client: OpenAI) -> None:
    (listed,) = client.models.list()
    assert listed.id == "digits@1"
    assert listed.created > 1.7e9
    for name in ("digits@1", "digits@champion", "digits"):
        assert client.models.retrieve(name) == listed
    for name in ("faces", "digits@2", "x" * 5000):
        with pytest.raises(openai.NotFoundError, match="there is no such model") as caught:
            client.models.retrieve(name)
        assert caught.value.param == "model"
