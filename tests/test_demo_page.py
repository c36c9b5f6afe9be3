"""The demo's page, clicked through in a real browser."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import BrowserContext, Page, expect, sync_playwright

from tests.demo_server import KEY, DemoServer, serving

CHROMIUM = os.environ.get("TEST_CHROMIUM") or shutil.which("chromium") or "/usr/bin/chromium"

#: No sandbox, since the suite may run as root; no network but the demo's.
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture
def server(sqlite_sessions_url: str) -> Iterator[DemoServer]:
    """The demo."""
    with serving(SQLSESSIONS_URL=sqlite_sessions_url, SECRET_KEY=KEY) as server:
        yield server


@pytest.fixture
def browser(server: DemoServer, tmp_path: Path) -> Iterator[BrowserContext]:
    """A browser that nobody has used yet; without one, the test is skipped, or fails where CI is set."""
    if not Path(CHROMIUM).exists():
        reason = "no chromium here: install it, or name the program in TEST_CHROMIUM"
        if os.environ.get("CI"):
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path / "profile", executable_path=CHROMIUM, headless=True, args=ARGUMENTS, base_url=server.url
        )
        yield context
        context.close()


def press(page: Page, name: str) -> None:
    """Press the button of that name, as a screen reader would find it."""
    page.get_by_role("button", name=name).click()


def test_clicks(browser: BrowserContext) -> None:
    """Log in, profile, cart and log out work by clicking, without a script, and without a complaint of the browser."""
    page = browser.pages[0]
    complaints: list[str] = []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("requestfailed", lambda request: complaints.append(request.url))

    page.goto("/")
    press(page, "Add one")
    page.get_by_label("Name").fill("Ada & Grace")
    press(page, "Log in")
    expect(page.get_by_role("region", name="Profile")).to_contain_text("Logged in as Ada & Grace.")
    press(page, "Add one")
    expect(page.get_by_role("region", name="Cart")).to_contain_text("2 things")
    page.get_by_role("link", name="As JSON").click()
    expect(page.locator("body")).to_have_text('{"user_id":"Ada & Grace","cart":2}')
    page.go_back()
    press(page, "Log out")
    expect(page.get_by_role("region", name="Log in")).to_be_visible()
    expect(page.get_by_role("region", name="Cart")).to_contain_text("0 things")
    assert complaints == []
    assert browser.cookies() == []


def test_end_a_session(browser: BrowserContext, server: DemoServer) -> None:
    """Ending a session in the list logs out whoever has it, on their next click."""
    here = browser.pages[0]
    here.goto("/")
    here.get_by_label("Name").fill("Ada")
    press(here, "Log in")
    (cookie,) = browser.cookies()
    browser.clear_cookies()
    here.goto("/")
    here.get_by_label("Name").fill("Ada")
    press(here, "Log in")
    mine = here.get_by_role("region", name="Your sessions").get_by_role("listitem")
    expect(mine).to_have_count(2)
    expect(mine.filter(has_text="this browser")).to_have_count(1)
    press(here, "End session")
    expect(mine).to_have_count(1)
    browser.clear_cookies()
    browser.add_cookies([{"name": cookie["name"], "value": cookie["value"], "url": server.url}])
    here.goto("/")
    expect(here.get_by_role("region", name="Log in")).to_be_visible()


def test_keyboard(browser: BrowserContext) -> None:
    """The page is used without a mouse, and is in the language that it says."""
    page = browser.pages[0]
    page.goto("/")
    page.keyboard.press("Tab")
    page.keyboard.type("Ada")
    page.keyboard.press("Enter")
    expect(page.get_by_role("region", name="Profile")).to_contain_text("Logged in as Ada.")
    expect(page.locator("html")).to_have_attribute("lang", "en")
