"""The chat page in headless Chromium."""

from __future__ import annotations

import shutil

import pytest

from helpers.live_server import QUESTION, quick_speculator, serving, slow_rounds

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SECONDS = 20_000


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no chromium on this machine")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def address(base):
    with serving(base, quick_speculator(base)) as (address, _):
        yield address


@pytest.fixture
def page(browser, address):
    """The page; it must fetch nothing from other hosts."""
    page = browser.new_page()
    page.set_default_timeout(SECONDS)
    asked, errors = [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.errors = errors
    page.goto(address)
    page.wait_for_selector("h1:text('tiny')")
    yield page
    page.close()
    assert all(url.startswith((address, "data:")) for url in asked)


def send_message(page, text: str, **options: str):
    """Send a message and wait for the end of the answer: its text, the highlighted text, and the line of counts."""
    for name, value in options.items():
        page.fill(f"#{name}", value)
    count = page.locator(".assistant").count()
    page.fill("#text", text)
    page.press("#text", "Enter")
    shown = page.locator(".assistant").nth(count)
    page.wait_for_function("(n) => document.querySelectorAll('.assistant')[n]?.dataset.finish", arg=count)
    return (
        shown.locator("p").text_content(),
        "".join(shown.locator(".drafted").all_text_contents()),
        shown.locator(".facts").text_content(),
    )


def test_page_answer_highlights_accepted_drafts_and_shows_speed(page):
    assert page.text_content("#speculator") == "with sum_rnn"
    text, drafted, facts = send_message(page, QUESTION, tokens="40")
    assert 0 < len(drafted) < len(text)
    assert facts.startswith("40 tokens · ") and "tokens/s · τ " in facts and "drafts accepted" in facts
    colours = page.evaluate(
        "['.assistant .drafted', '.assistant span:not(.drafted)']"
        ".map((name) => getComputedStyle(document.querySelector(name)).color)"
    )
    assert colours[0] != colours[1]
    page.uncheck("#speculative")
    page.click("#clear")
    again, drafted, facts = send_message(page, QUESTION, tokens="40")
    assert (again, drafted) == (text, "") and "drafts" not in facts
    assert page.errors == []


def test_page_second_message_sends_the_conversation_and_escapes_markup(page):
    send_message(page, "<b>red</b>", tokens="5")
    sent = []
    page.on("request", lambda request: sent.append(request.post_data_json))
    send_message(page, "blue")
    assert [turn["role"] for turn in sent[0]["messages"]] == ["user", "assistant", "user"]
    assert page.locator(".user p").first.text_content() == "<b>red</b>" and page.locator(".user b").count() == 0
    assert page.errors == []


def test_page_shows_an_api_error(page):
    page.fill("#text", "cat " * 300)
    page.click("#send")
    page.wait_for_selector(".error")
    assert "context length is 256" in page.text_content(".error p")
    assert page.locator(".assistant").count() == 0
    send_message(page, QUESTION, tokens="3")


def test_page_stop_button_ends_the_answer(page, monkeypatch):
    with monkeypatch.context() as patch:
        slow_rounds(patch)
        page.fill("#tokens", "100")
        page.fill("#text", QUESTION)
        page.click("#send")
        page.wait_for_selector(".assistant span")
        page.click("#send")
        page.wait_for_selector("#send:text('Send')")
    assert page.get_attribute(".assistant", "data-finish") is None
    send_message(page, QUESTION, tokens="3")
    assert page.errors == []
