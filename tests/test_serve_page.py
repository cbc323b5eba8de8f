"""The page of `duo serve` in a real browser: what a user types, sees, and stops."""

import shutil
from collections.abc import Iterator

import pytest

from duo_jax import load
from tests.test_serve_engine import text_of
from tests.test_serve_faults import wait_for
from tests.test_serve_http import KEY, Running, reply_of

pytestmark = pytest.mark.browser
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def lm(chat_model):
    return load(chat_model)


@pytest.fixture
def running(lm) -> Iterator[Running]:
    one = Running(lm, api_key=None)
    yield one
    one.stop()


@pytest.fixture
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser, running):
    errors, asked = [], []
    page = browser.new_page()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(running.url)
    page.get_by_text("tiny", exact=True).wait_for()
    yield page
    assert not errors
    assert all(url.startswith((running.url, "data:")) for url in asked), asked


def say(page, text: str) -> None:
    page.get_by_label("Your message").fill(text)
    page.keyboard.press("Enter")


def replies(page) -> list[str]:
    return page.locator(".turn.assistant .text").all_inner_texts()


def shown(lm, messages: list[tuple[str, str]], seed: int, count: int) -> str:
    prompt = lm.encode_chat([{"role": role, "content": content} for role, content in messages])
    return text_of(reply_of(prompt, seed, count))


def test_a_conversation_about_a_document(page, lm, running):
    page.get_by_label("Document", exact=True).fill("The sky is blue today.")
    page.get_by_text("Settings").click()
    page.get_by_label("Max tokens").fill("6")
    page.get_by_label("Seed").fill("3")
    document = ("system", "The sky is blue today.")
    say(page, "Why?")
    page.get_by_text("prompt tokens").first.wait_for()
    first = shown(lm, [document, ("user", "Why?")], 3, 6)
    assert replies(page) == [first]
    say(page, "So?")
    page.locator(".turn.assistant .facts").nth(1).filter(has_text="from the cache").wait_for()
    turns = [document, ("user", "Why?"), ("assistant", first), ("user", "So?")]
    assert replies(page)[1] == shown(lm, turns, 3, 6)
    facts = page.locator(".turn.assistant .facts").nth(1).inner_text()
    cached = int(facts.partition("prompt tokens, ")[2].partition(" ")[0])
    assert cached >= 24, "the document and the first turn are in the cache"
    page.keyboard.press("Alt+n")
    assert page.locator(".turn").count() == 0
    say(page, "Why?")
    page.locator(".turn.assistant .facts").filter(has_text="from the cache").wait_for()
    assert replies(page) == [first]
    page.locator("#hits").filter(has_text="2 of 3").wait_for()
    assert page.locator("#held-bytes").inner_text().endswith("B")


def test_a_reply_is_stopped_by_a_key(page, running):
    running.device.go.clear()
    page.get_by_text("Settings").click()
    page.get_by_label("Max tokens").fill("60")
    say(page, "Go")
    page.get_by_role("button", name="Stop").wait_for()
    running.wait_until(running=1)
    page.keyboard.press("Escape")
    page.get_by_text("stopped").wait_for()
    wait_for(lambda: running.engine._cancelled or running.engine.metrics().finished)  # Before the reply can end.
    running.device.go.set()
    running.wait_until(running=0)
    assert running.engine.metrics().finished["cancelled"] == 1
    say(page, "Again")
    page.get_by_text("stopped at max tokens").wait_for()


def test_text_of_a_model_is_shown_and_not_run(page):
    page.evaluate("bubble('assistant', '<img src=x onerror=\"window.harm = 1\">')")
    assert page.evaluate("window.harm") is None
    assert "<img" in page.locator(".turn .text").last.inner_text()


def test_a_server_with_a_key_asks_for_it(browser, lm):
    running = Running(lm)
    page = browser.new_page()
    page.goto(running.url)
    page.get_by_text("the API key is wrong or missing").wait_for()
    page.get_by_label("API key").fill(KEY)
    page.get_by_text("tiny", exact=True).wait_for()
    assert not page.get_by_label("API key").is_visible()
    running.stop()
    page.get_by_text("the server does not answer").wait_for()


def luminance(colour: str) -> float:
    """Of `#rrggbb`, as WCAG 2 defines it."""
    parts = [int(colour[index : index + 2], 16) / 255 for index in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def check_contrast(page) -> None:
    """Text has 4.5 to 1 and the edges of controls have 3 to 1, as WCAG 2 asks for."""
    names = {"ink": 4.5, "quiet": 4.5, "link": 4.5, "alarm": 4.5, "edge": 3, "paper": 1, "tint": 1}
    style = "getComputedStyle(document.documentElement).getPropertyValue('--{}').trim()"
    levels = {name: luminance(page.evaluate(style.format(name))) for name in names}
    for ground in ("paper", "tint"):
        for name, least in names.items():
            dark, light = sorted((levels[name], levels[ground]))
            assert (light + 0.05) / (dark + 0.05) >= least, (name, ground)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_fits_the_window(browser, running, scheme, width):
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.goto(running.url)
    page.get_by_text("tiny", exact=True).wait_for()
    check_contrast(page)
    say(page, "word " * 900 + "x" * 200)
    page.get_by_text("do not fit").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # What was wrong and the question, ready to be shortened, are in view.
    log, facts, question = (page.locator(name).bounding_box() for name in ("#log", ".facts.alarm", "#question"))
    assert facts["y"] + facts["height"] <= log["y"] + log["height"] and question["y"] + question["height"] < 800
    assert question["height"] > 200
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 27)"
    assert dark == (scheme == "dark")
    page.get_by_label("Switch between light and dark").click()
    check_contrast(page)
    assert (page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 27)") != dark
