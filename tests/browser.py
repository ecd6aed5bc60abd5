"""The page of a service in a headless Chromium, as a person uses it."""

import contextlib
import shutil
import socket
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Self

from tests import needs
from tests.conftest import HANG, wait_for
from tests.service import Service

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Locator, Page

PIXELS = """canvas => {
    const { width, height } = canvas;
    return Array.from(canvas.getContext("2d").getImageData(0, 0, width, height).data);
}"""


@contextlib.contextmanager
def chromium() -> Iterator["Browser"]:
    """Debian's Chromium; a test that cannot have it is skipped."""
    playwright = needs.package("playwright.sync_api", "browser-test")
    path = shutil.which("chromium")
    if path is None:
        needs.CHROMIUM.skip()
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class OpenPage:
    """A page of the service in a window of its own.

    The page's policy forbids what Playwright's own `wait_for_function` does, so it is watched from
    outside.
    """

    def __init__(self, browser: "Browser", service: Service, link: str = "", **window: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1100, "height": 800}, **window})
        self.context.set_default_timeout(HANG * 1000)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page: Page = self.context.new_page()
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._note)
        self.page.goto(f"{service.url}/{link}")

    def _note(self, message: "ConsoleMessage") -> None:
        if message.type == "error":
            self.complaints.append(message.text)

    def see(self, selector: str) -> "Locator":
        return self.page.locator(selector)

    def control(self, param: str, run: str = "A") -> "Locator":
        shared = param in ("seed", "n", "mode")
        return self.see(f"#{param}" if shared else f"#{param}-{run}")

    def choose(self, run: str = "A", **settings: object) -> None:
        """Set what is to be drawn, as a person does."""
        for param, value in settings.items():
            control = self.control(param, run)
            if control.evaluate("control => control.tagName") == "SELECT":
                control.select_option(str(value))
            else:
                control.fill(str(value))

    def click(self, name: str) -> None:
        self.page.get_by_role("button", name=name).click()

    def draw(self) -> None:
        self.click("Draw")

    def status(self) -> list[str]:
        return self.see(".run header p").all_inner_texts()

    def wait_until_done(self) -> None:
        def done() -> bool:
            status = self.status()
            return bool(status) and all(text.startswith("Done in") for text in status)

        self.wait(done, "the pictures")

    def wait(self, condition: Any, what: str) -> Any:
        return wait_for(condition, f"{what}; it says {self.status()}, {self.complaints}")

    def pixels(self, picture: int = 0) -> list[int]:
        """Of a picture as it is shown, RGBA."""
        found: list[int] = self.see(".picture canvas").nth(picture).evaluate(PIXELS)
        return found

    def slots(self, replica: int) -> list[str]:
        """The request of each box that is taken in the view of the engine."""
        taken = self.see(".replica").nth(replica).locator(".slot.taken")
        return taken.evaluate_all("slots => slots.map(slot => slot.dataset.request)")

    def close(self, *expected: str) -> None:
        """Its window; it has asked nobody but the service, and complained of nothing else."""
        host = self.page.url.split("#")[0]
        foreign = [url for url in self.requests if not url.startswith((host, "data:", "blob:"))]
        self.context.close()
        assert not foreign, foreign
        others = [text for text in self.complaints if not any(word in text for word in expected)]
        assert not others, others


class Wire:
    """A way to a service that can be cut."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._ends: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self.cut()
        for thread in self._threads:
            thread.join()
        for end in (self._listener, *self._ends):
            end.close()

    def cut(self) -> None:
        """All connections that there are."""
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it is closed
            while True:
                here, _ = self._listener.accept()
                there = socket.create_connection(("127.0.0.1", self._to))
                self._ends += [here, there]
                for pair in ((here, there), (there, here)):
                    self._threads.append(threading.Thread(target=self._relay, args=pair))
                    self._threads[-1].start()

    def _relay(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it is cut
            while data := source.recv(65536):
                sink.sendall(data)
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)
