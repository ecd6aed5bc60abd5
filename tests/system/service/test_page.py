"""The page of the service in a real browser, by real clicks and keys."""

import base64
import dataclasses
import json
import re
import urllib.request
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pipeline.serving import recipe
from tests.browser import OpenPage, Wire, chromium
from tests.service import Service

if TYPE_CHECKING:
    from playwright.sync_api import Browser

QUICK = {"seed": 11, "n": 2, "class_label": 3, "guidance_scale": 1.5, "num_inference_steps": 12}
LONG = "num_inference_steps=1000&sampler=ancestral"
"""Of a link: some seconds of work."""


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with chromium() as browser:
        yield browser


Opener = Callable[..., OpenPage]


@pytest.fixture
def opened(browser: "Browser", service: Service) -> Iterator[Opener]:
    """Opens pages of the service; at the end each must have had nothing to complain of."""
    pages: list[OpenPage] = []

    def open_page(link: str = "", **window: Any) -> OpenPage:
        pages.append(OpenPage(browser, service, link, **window))
        return pages[-1]

    yield open_page
    for page in pages:
        page.close("status of 422")


def shown(png: bytes) -> list[int]:
    """RGBA of a PNG of one channel, as a canvas has it."""
    grey = recipe.decode(png, "")[0] if b"ddpm" in png else _decode(png)
    opaque = np.full_like(grey, 255)
    pixels: list[int] = np.concatenate([grey, grey, grey, opaque], axis=2).flatten().tolist()
    return pixels


def _decode(png: bytes) -> np.ndarray:
    import io

    from PIL import Image

    with Image.open(io.BytesIO(png)) as image:
        return np.asarray(image)[..., None]


def test_a_picture_appears_and_is_downloaded_as_the_api_gives_it(
    opened: Opener, service: Service
) -> None:
    page = opened()
    page.choose(**QUICK)
    page.draw()
    page.wait_until_done()
    expected = [base64.b64decode(image["b64_json"]) for image in service.images(**QUICK)]
    for i, png in enumerate(expected):
        page.wait(lambda i=i, png=png: page.pixels(i) == shown(png), "the picture")
        with page.page.expect_download() as download:
            page.see(".picture a").nth(i).click()
        assert download.value.suggested_filename == f"digits-1-seed11-{i}.png"
        assert download.value.path().read_bytes() == png
    _, written = recipe.decode(expected[1], "")
    assert (written.seed, written.index, written.label, written.sampling.steps) == (11, 1, 3, 12)


def test_the_steps_are_gone_through_in_both_views(opened: Opener, service: Service) -> None:
    page = opened()
    page.choose(**QUICK)
    page.draw()
    page.wait_until_done()
    frames: dict[int, dict[str, Any]] = {}
    with service.stream({**QUICK, "stream": True, "partial_images": 100}) as reply:
        for line in reply.read().decode().splitlines():
            data = json.loads(line.removeprefix("data: ")) if line.startswith("data: ") else {}
            if data.get("image_index") == 0 and "x_t" in data:
                frames[data["evaluation"]] = data
    assert sorted(frames) == list(range(1, 12))

    def sees(evaluation: int, key: str) -> None:
        page.wait(lambda: page.see("#shown").inner_text() == f"{evaluation} of 12", "the step")
        png = base64.b64decode(frames[evaluation][key])
        page.wait(lambda: page.pixels() == shown(png), f"{key} of step {evaluation}")

    page.see("h1").click()
    page.page.keyboard.press("Home")
    sees(1, "x_t")
    for evaluation in (2, 3):
        page.page.keyboard.press("ArrowRight")
        sees(evaluation, "x_t")
    page.page.get_by_text("best guess").click()
    sees(3, "b64_json")
    page.see("#scrub").fill("9")
    sees(9, "b64_json")
    page.see("h1").click()
    page.page.keyboard.press("x")
    page.page.keyboard.press("ArrowLeft")
    page.see("#scrub").press("ArrowLeft")
    sees(7, "x_t")
    assert len({tuple(shown(base64.b64decode(of["x_t"]))) for of in frames.values()}) > 8
    page.click("Play the steps")
    page.wait(lambda: page.see("#shown").inner_text() == "12 of 12", "the end")


def test_pictures_move_while_they_are_drawn_and_stop_at_once(
    opened: Opener, service: Service
) -> None:
    page = opened(f"#seed=1&n=8&class_label=1&guidance_scale=2&{LONG}")
    seen: set[tuple[int, ...]] = set()

    def moves() -> bool:
        seen.add(tuple(page.pixels()))
        return len(seen) > 5

    page.wait(moves, "pictures that move")
    assert re.fullmatch(r"\d+ %, .* to go", page.status()[0])
    assert page.see(".run progress").evaluate("bar => bar.value") > 0
    page.click("Stop")
    page.wait(lambda: " ".join(page.status()).startswith("Stopped at"), "an end")
    page.wait(lambda: service.get("/v1/engine")["rows"] == 0, "room")
    page.wait(lambda: in_hand(service) == [], "replicas that draw nothing")
    before = page.pixels()
    page.see("h1").click()
    page.page.keyboard.press("Home")
    page.wait(lambda: page.pixels() != before, "an earlier step")


def in_hand(service: Service) -> list[Any]:
    replicas = service.get("/v1/engine")["replicas"]
    return [image for replica in replicas for of in replica["engines"] for image in of["images"]]


def test_nothing_can_be_chosen_before_the_model_is_known(opened: Opener) -> None:
    page = opened()
    held: list[Any] = []
    page.page.route("**/v1/models", lambda route: held.append(route))
    page.page.reload()
    page.wait(lambda: page.see("#draw").is_disabled() and held, "the question about the model")
    for choice in ("#compare", "#seed", "#n", "#mode"):
        assert page.see(choice).is_disabled()
    page.page.keyboard.press("Enter")
    held[0].continue_()
    page.see("#compare").check()
    assert page.control("sampler", "B").is_visible()
    assert page.see(".settings").count() == 2 and len(held) == 1


def test_two_settings_are_drawn_side_by_side_and_share_the_batch(opened: Opener) -> None:
    page = opened()
    page.see("#compare").check()
    page.choose(seed=3, n=4, class_label=2, num_inference_steps=1000, sampler="ancestral")
    page.choose("B", num_inference_steps=1000, sampler="ddim", class_label=2)
    page.choose("B", guidance_scale=2)
    page.draw()
    colours = "slots => slots.map(slot => getComputedStyle(slot, '::before').backgroundColor)"

    def shared() -> Any:
        for replica in range(page.see(".replica").count()):
            if len(set(page.slots(replica))) == 2:
                taken = page.see(".replica").nth(replica).locator(".slot.taken")
                if len(found := set(taken.evaluate_all(colours))) == 2:
                    return found
        return None

    found = page.wait(shared, "a replica with images of both")
    dots = "dots => dots.map(dot => getComputedStyle(dot).backgroundColor)"
    assert set(page.see(".run .dot").evaluate_all(dots)) == found
    page.wait(lambda: page.see("#fill").inner_text().endswith("%"), "the fill")
    page.wait(lambda: page.see("#throughput").inner_text() != "0", "the throughput")
    assert len(page.see("#requests li").all_inner_texts()) == 2
    page.page.keyboard.press("Escape")
    page.wait(lambda: page.see("#requests").inner_text() == "Nothing in hand", "rest")


def test_an_error_is_a_sentence_beside_its_field(opened: Opener) -> None:
    page = opened()
    page.choose(num_inference_steps=5000)
    page.draw()
    note = page.see("[data-param=num_inference_steps] .wrong")
    note.wait_for()
    assert "5000 must be from 1 to the model's 1000" in note.inner_text()
    field = page.control("num_inference_steps")
    assert field.get_attribute("aria-invalid") == "true"
    assert field.get_attribute("aria-describedby") == note.get_attribute("id")
    assert field.evaluate("field => field === document.activeElement")
    page.choose(num_inference_steps=2, seed="nine")
    page.draw()
    page.see("[data-param=seed] .wrong").wait_for()
    assert page.see(".wrong:visible").count() == 1
    page.choose(seed="")
    page.draw()
    page.wait_until_done()
    assert page.see(".wrong:visible").count() == 0


def test_a_link_draws_the_same_picture_at_once(opened: Opener, service: Service) -> None:
    page = opened(permissions=["clipboard-read", "clipboard-write"])
    seed = 2**63 - 1
    page.choose(**{**QUICK, "seed": seed, "sampler": "heun"})
    page.draw()
    page.wait_until_done()
    page.click("copy link")
    page.page.get_by_text("copied").wait_for()
    link = page.page.evaluate("navigator.clipboard.readText()")
    page.click("copy seed")
    page.wait(lambda: page.page.evaluate("navigator.clipboard.readText()") == str(seed), "the seed")
    again = opened(link.removeprefix(f"{service.url}/"))
    again.wait_until_done()
    (first, _) = service.images(**{**QUICK, "seed": seed}, sampler="heun")
    expected = shown(base64.b64decode(first["b64_json"]))
    for one in (page, again):
        one.wait(lambda one=one: one.pixels() == expected, "the picture")
    assert again.control("seed").input_value() == str(seed)
    assert again.control("sampler").input_value() == "heun"


def test_a_seed_is_new_each_time_and_can_be_kept(opened: Opener) -> None:
    page = opened()
    page.choose(num_inference_steps=1, n=1)
    seeds = []
    for _ in range(2):
        page.draw()
        page.wait_until_done()
        seeds.append(page.see("#drawn-seed").inner_text())
    assert seeds[0] != seeds[1]
    page.click("keep")
    assert page.control("seed").input_value() == seeds[1]
    page.draw()
    page.wait_until_done()
    assert page.see("#drawn-seed").inner_text() == seeds[1]


def test_the_keyboard_is_enough(opened: Opener) -> None:
    page = opened(f"#seed=1&n=1&{LONG}")
    keys = page.page.keyboard
    page.wait(lambda: "to go" in " ".join(page.status()), "drawing")
    keys.press("Escape")
    page.wait(lambda: " ".join(page.status()).startswith("Stopped at"), "an end")
    page.control("num_inference_steps").focus()
    keys.press("Control+a")
    keys.type("3")
    keys.press("Enter")
    page.wait_until_done()
    nameless = """controls => controls.filter(control => !control.closest("dialog")
        && !control.labels?.length && !control.ariaLabel && !control.textContent.trim())
        .map(control => control.outerHTML)"""
    assert page.see("input, select, button, a, progress, canvas").evaluate_all(nameless) == []


def test_a_lost_connection_is_taken_up_again(browser: "Browser", service: Service) -> None:
    with Wire(service.port) as wire:
        through = dataclasses.replace(service, url=f"http://127.0.0.1:{wire.port}")
        page = OpenPage(browser, through, "#seed=4&n=1&sampler=ddim&num_inference_steps=300")
        page.wait(lambda: "to go" in " ".join(page.status()), "drawing")
        wire.cut()
        page.wait_until_done()
        assert sum("/v1/images/generations/gen_" in url for url in page.requests) == 1
        (image,) = service.images(seed=4, num_inference_steps=300)
        expected = shown(base64.b64decode(image["b64_json"]))
        page.wait(lambda: page.pixels() == expected, "the picture")
        page.close("net::ERR")


def test_a_narrow_window_has_no_sideways_scroll(opened: Opener) -> None:
    page = opened(
        f"#seed=1&n=9&class_label=1&guidance_scale=1&{LONG}&b.sampler=heun&b.class_label=1"
        "&b.num_inference_steps=1000",
        viewport={"width": 360, "height": 740},
    )
    width = "document.documentElement.scrollWidth"
    page.wait(lambda: page.see(".slot.taken").count(), "the engine at work")
    assert page.page.evaluate(width) <= 360
    page.page.keyboard.press("Escape")
    assert page.page.evaluate(width) <= 360


@pytest.mark.parametrize(("scheme", "is_dark"), [("light", False), ("dark", True)])
def test_the_page_is_as_dark_as_its_reader_likes_it(
    opened: Opener, scheme: str, is_dark: bool
) -> None:
    page = opened(color_scheme=scheme)
    page.see("h1").wait_for()
    style = page.see("body").evaluate(
        "body => [getComputedStyle(body).backgroundColor, getComputedStyle(body).color]"
    )
    paper, ink = (np.mean([int(n) for n in re.findall(r"\d+", colour)[:3]]) for colour in style)
    assert (paper < ink) == is_dark
    assert abs(paper - ink) > 150


def test_the_page_may_run_only_its_own_script(opened: Opener, service: Service) -> None:
    with urllib.request.urlopen(f"{service.url}/") as reply:
        html, policy = reply.read().decode(), reply.headers["Content-Security-Policy"]
    assert not re.search(r"(?:src|href)=\"(?!data:)|@import|url\(|innerHTML|https?://", html)
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    page = opened()
    page.see(".replica").first.wait_for()
    assert page.complaints == []
    foreign = """() => document.body.append(
        Object.assign(document.createElement("img"), { src: "http://192.0.2.1/a.png" }))"""
    page.see("body").evaluate(foreign)
    page.wait(lambda: "Content Security Policy" in "".join(page.complaints), "a refusal")
    page.complaints.clear()
    page.requests.clear()
