"""The page at `/`, in a real browser without a window, driven over its DevTools pipe."""

from __future__ import annotations

import base64
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, Literal, cast

import dspy
import httpx
import pytest

from preceptor.lm.embedding import embedder_of
from preceptor.modules import Classify, Experts, Generate
from preceptor.regions import divided
from preceptor.serving.settings import Keys
from preceptor.testing import asked as requests
from preceptor.testing import prompt, simulated, system

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BINARY = next(filter(None, map(shutil.which, NAMES)), None)
TOKEN = "a-token-of-the-tests"
SIGNATURE = "text -> label: Literal['spam', 'mail']"
PETS = [f"My {animal} {does}." for animal in ("cat", "dog", "kitten", "puppy") for does in ("sleeps", "barks", "eats")]
TAXES = [f"The {paper} is {state}." for paper in ("tax return", "invoice", "tax bill") for state in ("due", "paid")]
EVIDENCE: dict[str, Any] = {
    "method": "MixtureOfExperts of APE",
    "metric": "accuracy",
    "replaced": True,
    "baseline": 0.61,
    "baseline_ci": [0.54, 0.68],
    "compiled": 0.74,
    "compiled_ci": [0.67, 0.80],
    "gain": 0.13,
    "tested_gain": 0.13,
    "search_score": 0.78,
    "ci": [0.05, 0.21],
    "p_value": 0.0016,
    "rows": 200,
    "calls": 812,
    "tokens": 91_000,
    "dollars": 0.0,
    "has_candidate": True,
    "seed_instructions": {"default: predict": "Sort."},
    "instructions": {"default: predict": "Default."},
    "verdict": "Replaced: accuracy 0.610 -> 0.740 on 200 rows no search step has seen.",
    "regions": [{"region": "region 1", "measuring_rows": 120, "seed": 0.6, "compiled": 0.79, "expert": "its own"}],
}
Save = Callable[..., Path]
Serve = Callable[..., Any]
pytestmark = pytest.mark.skipif(BINARY is None, reason=f"No browser here: none of {', '.join(NAMES)}.")


_ON_3_AND_4 = (
    "import fcntl, os, sys; fds = [fcntl.fcntl(int(each), fcntl.F_DUPFD, 10) for each in sys.argv[1:3]]; "
    "os.dup2(fds[0], 3); os.dup2(fds[1], 4); os.execv(sys.argv[3], sys.argv[3:])"
)
"""Runs a command whose pipes are to have these numbers."""


class Browser:
    """A browser that is told what to do in JSON, over a pipe."""

    def __init__(self, folder: Path) -> None:
        assert BINARY is not None
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        command = [BINARY, *options, "--remote-debugging-pipe", f"--user-data-dir={folder}", "about:blank"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _ON_3_AND_4, str(theirs_in), str(theirs_out), *command],
            pass_fds=(theirs_in, theirs_out),
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._out, self._in = os.fdopen(ours_out, "wb", 0), os.fdopen(ours_in, "rb", 0)
        self._ids = itertools.count(1)
        self._left = b""
        self.events = list[dict[str, Any]]()

    def call(self, method: str, session: str | None = None, **params: Any) -> Any:
        """Ask for something and wait for it."""
        number = next(self._ids)
        message = {"id": number, "method": method, "params": params, **({"sessionId": session} if session else {})}
        self._out.write(json.dumps(message).encode() + b"\0")
        while (told := self._read()).get("id") != number:
            self.events.append(told)
        assert "error" not in told, told
        return told["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            part = self._in.read(65536)
            assert part, "the browser is gone"
            self._left += part
        line, _, self._left = self._left.partition(b"\0")
        told: dict[str, Any] = json.loads(line)
        return told

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait(60)
        self._out.close()
        self._in.close()


class Page:
    """One page of a browser."""

    def __init__(self, browser: Browser, url: str, *, width: int = 1000, is_dark: bool = False) -> None:
        self._browser = browser
        browser.events.clear()
        target = browser.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = browser.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "Accessibility"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if is_dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=url)
        self.wait("document.readyState == 'complete' && document.querySelector('#open')")

    def call(self, method: str, **params: Any) -> Any:
        """Ask for something of this page."""
        return self._browser.call(method, self._session, **params)

    def get(self, expression: str) -> Any:
        """Return what a piece of JavaScript comes to."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, expression: str) -> None:
        """Wait until it is so."""
        end = time.monotonic() + 60
        while not self.get(f"!!({expression})"):
            assert time.monotonic() < end, f"never came to be: {expression}; {self.get('document.body.innerText')}"
            time.sleep(0.02)

    def text(self, selector: str) -> str:
        """Return an element's text, "" where it is hidden."""
        return str(self.get(f"document.querySelector({selector!r}).innerText"))

    def press(self, key: str, code: int, modifiers: int = 0) -> None:
        """Press a key; 2 is Ctrl."""
        same = {"key": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.call("Input.dispatchKeyEvent", type="rawKeyDown", **same)
        self.call("Input.dispatchKeyEvent", type="keyUp", **same)

    def write(self, text: str) -> None:
        """Write into what has the focus."""
        self.call("Input.insertText", text=text)

    def names(self, role: str) -> list[str]:
        """Return the names a screen reader has for the elements of a role."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        known = [node for node in nodes if node.get("role", {}).get("value") == role and not node.get("ignored")]
        return [str(node.get("name", {}).get("value", "")) for node in known]

    def problems(self) -> list[str]:
        """Return what the browser complains of, and the addresses it asked elsewhere."""
        self.get("1")  # events before this one have come
        found = list[str]()
        for event in self._browser.events:
            params = event.get("params", {})
            if event.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                found.append(json.dumps(params))
            if event.get("method") == "Network.requestWillBeSent":
                found.append(params["request"]["url"])
        return found

    def picture(self, file: Path) -> None:
        """Write what the page looks like, all of it."""
        shot = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Generator[Browser]:
    running = Browser(tmp_path_factory.mktemp("browser"))
    yield running
    running.close()


def by_expert(request: Any) -> str:
    """Answer "spam" if the instruction says so."""
    return "spam" if "Spam!" in system(request) else "mail"


def experts() -> dspy.Module:
    """Return a program of two regions, the first with an expert of its own."""
    embedder = embedder_of("all-minilm-l6-v2")
    router = divided(embedder([*PETS, *TAXES]), 2, least_rows=2, seed=0).router(embedder, ("text",))
    return Experts(
        Classify(SIGNATURE, "Sort the message."), {"region 1": Classify(SIGNATURE, "Spam! All of it.")}, router
    )


def test_a_program_is_tried_with_the_keyboard_alone(save: Save, serve: Serve, browser: Browser) -> None:
    running = serve(save())
    page = Page(browser, running.url)
    page.wait("!document.querySelector('#program').hidden")

    page.press("Tab", 9)
    assert page.get("document.activeElement.textContent") == "Skip to the form"
    page.press("Tab", 9)
    assert page.get("document.activeElement.id") == "field-text"
    page.write("win a prize")
    page.press("Enter", 13, modifiers=2)
    page.wait("document.querySelector('#answer dd')")

    assert page.text("#answer dl") == "label\nspam"
    assert page.text("#instructions") == "Is this spam?"
    assert '{"text":"win a prize"}' in page.text("#curl")
    assert page.get("document.querySelector('#answer').getAttribute('aria-live')") == "polite"
    assert page.names("textbox") == ["text"]
    assert page.names("button") == ["Ask"]
    assert page.get("document.querySelector('#routing').hidden") is True


def test_the_page_asks_nobody_else_and_runs_no_script_of_others(save: Save, serve: Serve, browser: Browser) -> None:
    running = serve(
        save(Generate("text -> summary", "Sum it up.")), simulated(lambda request: "<img src=x onerror=x()>")
    )
    page = Page(browser, running.url)
    page.wait("document.querySelector('#field-text')")
    page.get("document.querySelector('#field-text').focus()")
    page.write("a")
    page.press("Enter", 13, modifiers=2)
    page.wait("document.querySelector('#answer dd')")

    assert page.text("#answer dd") == "<img src=x onerror=x()>"
    elsewhere = [each for each in page.problems() if not each.startswith((running.url, "data:,"))]
    assert elsewhere == []
    policy = httpx.get(running.url).headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self'")


def test_the_form_has_a_control_for_every_kind_of_field(save: Save, serve: Serve, browser: Browser) -> None:
    kinds: dict[str, Any] = {
        "text": (str, dspy.InputField(desc="What came in.")),
        "size": (int, dspy.InputField()),
        "mood": (Literal["good", "bad"], dspy.InputField()),
        "tags": (list[str] | None, dspy.InputField()),
        "is_new": (bool, dspy.InputField()),
        "label": (str, dspy.OutputField()),
    }
    lm = simulated(lambda request: "fine")
    running = serve(save(Generate(cast("Any", dspy.Signature)(kinds, "Sort."))), lm)
    page = Page(browser, running.url)
    page.wait("document.querySelector('#field-is_new')")
    assert page.names("textbox") == ["text What came in.", "tags May be left empty. As JSON."]
    assert page.names("spinbutton") == ["size"]
    assert page.names("combobox") == ["mood"]
    assert page.names("checkbox") == ["is_new"]

    page.get("document.querySelector('#ask').click()")
    page.wait("document.querySelector('[aria-invalid]')")
    assert page.get("document.activeElement.id") == "field-size"
    assert page.text("#field-size-wrong") == "size: Field required."

    for name, value in (("text", "a"), ("size", "3"), ("mood", "1"), ("tags", '["x"]')):
        page.get(f"document.querySelector('#field-{name}').value = {value!r}")
    page.get("document.querySelector('#ask').click()")
    page.wait("document.querySelector('#answer dd')")
    asked = prompt(requests(lm)[-1])
    assert asked.splitlines() == ["text: a", "size: 3", "mood: bad", 'tags: ["x"]', "is_new: False"]
    assert page.get("document.querySelectorAll('[aria-invalid]').length") == 0


def test_a_token_opens_the_page_and_a_wrong_one_says_so(save: Save, serve: Serve, browser: Browser) -> None:
    running = serve(save(), keys=Keys.of([TOKEN]))
    page = Page(browser, running.url)
    page.wait("!document.querySelector('#open').hidden")
    assert page.text("#instructions") == ""
    page.write("wrong")
    page.press("Enter", 13)
    page.get("document.querySelector('#open button').click()")
    page.wait("!document.querySelector('#problem').hidden")
    assert "Send one of the server's tokens" in page.text("#problem")
    page.get(f"document.querySelector('#token').value = {TOKEN!r}")
    page.get("document.querySelector('#open button').click()")
    page.wait("document.querySelector('#field-text')")
    assert page.get("document.querySelector('#open').hidden") is True
    assert TOKEN not in page.text("body")


def test_experts_are_told_with_their_distances_light_and_dark_wide_and_narrow(
    save: Save, serve: Serve, browser: Browser, tmp_path: Path
) -> None:
    running = serve(save(experts(), **EVIDENCE), simulated(by_expert))
    for width, is_dark in ((1000, False), (360, True)):
        page = Page(browser, running.url, width=width, is_dark=is_dark)
        page.wait("document.querySelector('#field-text')")
        page.get("document.querySelector('#field-text').focus()")
        page.write("My puppy barks and eats.")
        page.get("document.querySelector('#ask').click()")
        page.wait("document.querySelector('#distances tbody tr')")

        assert page.text("#answer dd") == "spam"
        assert page.text("#routed").startswith(
            "The input is in region 1, whose own expert answered. Nearest is region 1, "
        )
        rows = page.get(
            "[...document.querySelectorAll('#distances tbody tr')].map(row => row.innerText.split(/\\s*\\t\\s*/))"
        )
        assert [row[:2] for row in rows] == [["region 1", "region 1"], ["region 2", "default"]]
        assert float(rows[0][2]) < float(rows[1][2])
        assert page.text("#instructions .used summary").startswith("region 1: predict")
        assert page.text("#verdict") == EVIDENCE["verdict"]
        assert "compiled program 0.740, interval 0.670 to 0.800" in page.names("image")[0]
        assert page.get("document.documentElement.scrollWidth") <= width
        assert page.get(CUT_OFF) == []
        assert page.get(CONTRAST) >= 4.5
        file = (
            Path(os.environ.get("PRECEPTOR_PICTURES", tmp_path)) / f"page-{width}-{'dark' if is_dark else 'light'}.png"
        )
        page.picture(file)
        assert file.stat().st_size > 10_000


def test_an_answer_stays_and_is_told_rightly_when_another_program_is_put_in_place(
    save: Save, serve: Serve, browser: Browser
) -> None:
    running = serve(save(Classify(SIGNATURE, "Sort.")), simulated(by_expert), keys=Keys.of([TOKEN]))
    reload = {"url": "/admin/reload", "headers": {"Authorization": f"Bearer {TOKEN}"}}
    page = Page(browser, running.url)
    page.wait("!document.querySelector('#open').hidden")
    page.get(f"document.querySelector('#token').value = {TOKEN!r}")
    page.get("document.querySelector('#open button').click()")
    page.wait("document.querySelector('#field-text')")
    page.get("document.querySelector('#field-text').focus()")
    page.write("My puppy barks and eats.")
    for program, label, told in (
        (experts(), "spam", "Spam! All of it."),
        (Classify(SIGNATURE, "Sort."), "mail", "Sort."),
    ):
        save(program)
        assert running.client.post(**reload).status_code == 200
        page.get("document.querySelector('#ask').click()")
        page.wait(f"document.querySelector('#about').textContent.endsWith({running.service.current.digest!r})")
        page.wait("!document.querySelector('#ask').disabled")
        assert page.text("#answer dd") == label
        assert told in page.text("#instructions")
        assert page.get("document.querySelector('#routing').hidden") is (label == "mail")
        assert page.get("document.querySelector('#problem').hidden") is True


CUT_OFF = """[...document.querySelectorAll('table, pre, dd, p, summary, label')].filter((each) => each.offsetParent
  && each.scrollWidth > each.parentElement.clientWidth).map((each) => each.outerHTML.slice(0, 60))"""
"""Whatever is wider than the place it is in."""

CONTRAST = """(() => {
  const light = (rgb) => rgb.map((c) => c / 255).map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, at) => sum + c * [0.2126, 0.7152, 0.0722][at], 0);
  const rgb = (text) => text.match(/[\\d.]+/g).slice(0, 4).map(Number);
  const behind = (element) => { for (let at = element; at; at = at.parentElement) {
    const found = rgb(getComputedStyle(at).backgroundColor);
    if (found.length < 4 || found[3] > 0) return found.slice(0, 3);
  } return [255, 255, 255]; };
  const texts = [...document.querySelectorAll('body *')].filter((each) => each.offsetParent &&
    [...each.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim()));
  return Math.min(...texts.map((each) => { const [a, b] = [light(rgb(getComputedStyle(each).color).slice(0, 3)),
    light(behind(each))].sort((x, y) => y - x); return (a + 0.05) / (b + 0.05); }));
})()"""
"""The least contrast of any text with what is behind it, as WCAG computes it."""
