"""The page in a real browser over a real daemon: every task as a person would do it, by role and by name.

Screenshots of what is seen are kept in $BRIDGED_SCREENSHOTS if that is set; with BRIDGED_RENEW_SCREENSHOTS=1 those of
the README are written to docs/screenshots.
"""

import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import currents
from page_bridge import ACCOUNT, PATIENCE_S, PROJECT, SECRET, TOKEN, Bridge, call, until
from playwright.sync_api import Browser, BrowserContext, Locator, Page, Route, expect, sync_playwright

CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
HERE = Path(__file__).parent
DOCS = HERE.parent / "docs" / "screenshots"
README = {"overview", "overview-phone", "halted", "connection", "event", "dead-letter"}
RENEW = bool(os.environ.get("BRIDGED_RENEW_SCREENSHOTS"))
OPEN, CLICK, PURCHASE = "users.messages.email.Open", "users.messages.email.Click", "users.behaviors.Purchase"
# Each with what is there when it has got what it asks for.
VIEWS = {
    "": ".sum dd",
    "connection": "main .field input",
    "events": "main tbody tr",
    "dead-letters": "main tbody tr",
    "cohorts": "main section",
    "activity": "main li",
}

SCRIPT = "<script>document.title='broken'</script><img src=x onerror=\"document.title='broken'\">"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One Chromium for all of them."""
    assert Path(CHROMIUM).exists(), (
        "this test needs a browser: apt-get install chromium, on Ubuntu snap install chromium"
    )
    with sync_playwright() as playwright:
        expect.set_options(timeout=PATIENCE_S * 1000)
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def axe(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The source of axe-core."""
    folder = tmp_path_factory.mktemp("axe")
    shutil.copy(HERE / "clients" / "axe" / "package.json", folder)
    assert shutil.which("npm"), "this test needs Node.js and npm"
    install = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock"]
    subprocess.run(install, cwd=folder, check=True, capture_output=True, timeout=180)
    return (folder / "node_modules" / "axe-core" / "axe.min.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def flowing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bridge]:
    """A bridge that has delivered, and has dead letters of both kinds. Tests that need a clean one have their own."""
    with Bridge(tmp_path_factory.mktemp("flowing")) as bridge:
        for number in range(4):
            batch = [currents(kind, seed=1000 * number + n) for n in range(60) for kind in (OPEN, CLICK, PURCHASE)]
            assert bridge.post(batch) == 200
        bridge.post([currents(OPEN, seed=90_000 + n, user={"user_id": "anonymous"}) for n in range(7)])
        until(lambda: bridge.events()["delivered"] == 720, "720 delivered events")
        # Two that Mixpanel refuses, in its own words.
        refused = {
            "code": 400,
            "error": "some data points in the request failed validation",
            "num_records_imported": 0,
            "status": "Bad Request",
            "failed_records": [
                {"index": n, "insert_id": "", "field": "properties.time", "message": "'properties.time' is invalid"}
                for n in range(2)
            ],
        }
        bridge.mixpanel_says([{"status": 400, "body": refused, "times": 1}])
        bridge.post([currents(OPEN, seed=91_000 + n) for n in range(2)])
        until(lambda: bridge.events()["dead_lettered"] == 2, "two dead letters of Mixpanel")
        fax = {"event_type": "users.messages.fax.Send", "time": int(time.time()), "user": {"external_user_id": "ada"}}
        bridge.post([fax | {"id": f"fax-{n}", "properties": {"page": n}} for n in range(118)])
        yield bridge


class Eyes:
    """Opens pages as a person's browser does, keeps what is seen, and notes what a browser complains of."""

    def __init__(self, browser: Browser, folder: Path) -> None:
        self._browser, self._folder = browser, folder
        self._contexts: list[BrowserContext] = []
        self.complaints: list[str] = []

    def context(self, **options: Any) -> BrowserContext:
        """A fresh profile."""
        settings = {"viewport": {"width": 1280, "height": 860}, "reduced_motion": "reduce", "locale": "en-GB"} | options
        context = self._browser.new_context(**settings)
        context.set_default_timeout(PATIENCE_S * 1000)
        self._contexts.append(context)
        return context

    def open(self, bridge: Bridge, view: str = "", context: BrowserContext | None = None, **options: Any) -> Page:
        """A tab with a view."""
        page = (context or self.context(**options)).new_page()
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.on("console", self._console)
        page.goto(f"{bridge.admin}/#/{view}")
        return page

    def _console(self, message: Any) -> None:
        # An answer that is no 200 is the page's to tell; what else a browser says of a page is a fault of it.
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            self.complaints.append(message.text)

    def shot(self, page: Page, name: str, *, whole: bool = False) -> None:
        """Keeps what is seen."""
        page.screenshot(path=self._folder / f"{name}.png", full_page=whole)
        if RENEW and name in README:
            DOCS.mkdir(parents=True, exist_ok=True)
            shutil.copy(self._folder / f"{name}.png", DOCS)

    def close(self) -> None:
        """Closes every tab."""
        for context in self._contexts:
            context.close()


@pytest.fixture
def eyes(browser: Browser, tmp_path: Path) -> Iterator[Eyes]:
    """A person's browser; a script error or a breach of the content security policy fails the test."""
    folder = Path(os.environ.get("BRIDGED_SCREENSHOTS") or tmp_path / "screenshots")
    folder.mkdir(parents=True, exist_ok=True)
    eyes = Eyes(browser, folder)
    yield eyes
    eyes.close()
    assert eyes.complaints == []


@pytest.fixture
def bridge(tmp_path: Path) -> Iterator[Callable[..., Bridge]]:
    """Makes bridges, and ends them."""
    made: list[Bridge] = []

    def make(**options: Any) -> Bridge:
        new = Bridge(tmp_path / f"bridge-{len(made)}", **options)
        made.append(new)
        return new.__enter__()

    yield make
    for one in made:
        one.__exit__()


def sentence(page: Page) -> Locator:
    """How it is."""
    return page.locator("h1.sentence")


def go(page: Page, view: str) -> None:
    """By the navigation."""
    page.get_by_role("navigation").get_by_role("link", name=view).click()
    expect(page.get_by_role("heading", level=1)).to_have_text(view)


def box(page: Page | Locator, name: str) -> Locator:
    """A text field or the like, by its label."""
    return page.get_by_label(name, exact=True)


def press(page: Page | Locator, name: str) -> None:
    """A button, by its name."""
    page.get_by_role("button", name=name, exact=True).click()


def told(page: Page, text: str | re.Pattern[str]) -> None:
    """Waits for what the page says in passing, and dismisses it."""
    toast = page.locator(".toast").filter(has_text=text)
    expect(toast.first).to_be_visible()
    toast.first.get_by_role("button", name="Dismiss").click()


# -- every task --------------------------------------------------------------------------------------------------------


def test_a_stranger_connects_braze_and_mixpanel_with_the_page_alone(eyes: Eyes, bridge: Callable[..., Bridge]) -> None:
    """From a fresh installation: credentials in, tested, saved; a token made and copied; Braze's events arrive at Mixpanel."""
    fresh = bridge(connected=False)
    page = eyes.open(fresh, permissions=["clipboard-read", "clipboard-write"])
    expect(page.get_by_text("Not set up").first).to_be_visible()
    eyes.shot(page, "fresh")
    page.get_by_role("main").get_by_role("link", name="Connect").click()

    press(page, "Save")
    told(page, "Nothing had changed.")
    press(page, "Test connection")
    expect(box(page, "Service account user name")).to_be_focused()
    expect(page.locator("[aria-invalid=true]")).to_have_count(3)
    box(page, "Project token").fill(TOKEN)
    box(page, "Service account user name").fill(ACCOUNT)
    box(page, "Service account secret").fill("not it")
    press(page, "Save")
    expect(page.locator("[aria-invalid=true]")).to_have_count(1)
    expect(box(page, "Project ID")).to_be_focused()
    expect(page.get_by_text("Needed for this credential.").last).to_be_visible()
    assert fresh.ask("/api/config")["overridden"] == {}
    box(page, "Project ID").fill(PROJECT)
    expect(page.locator("[aria-invalid=true]")).to_have_count(0)
    press(page, "Test connection")
    expect(page.locator(".callout.bad")).to_contain_text(re.compile("secret|credential|service account", re.IGNORECASE))
    eyes.shot(page, "test-connection")
    box(page, "Service account secret").fill(SECRET)
    press(page, "Test connection")
    expect(page.locator(".callout.good")).to_contain_text("It works")
    press(page, "Save")
    told(page, "Saved, and in force at once.")
    expect(box(page, "Service account secret")).to_have_value("")
    expect(box(page, "Service account secret")).to_have_attribute("placeholder", re.compile("Set"))
    expect(page.get_by_text(SECRET)).to_have_count(0)

    address = page.get_by_role("status").filter(has_text="/v1/currents")
    assert address.inner_text() == f"{fresh.http}/v1/currents"
    expect(page.get_by_text("Only this machine reaches this address")).to_be_visible()
    box(page, "Public name of this machine, or of the proxy before it").fill("currents.example.com")
    press(page, "Copy endpoint URL")
    told(page, "Copied endpoint URL")
    assert page.evaluate("navigator.clipboard.readText()") == "https://currents.example.com/v1/currents"
    press(page, "Make a token")
    with_token = page.get_by_role("dialog", name="The new bearer token")
    press(with_token, "Copy bearer token")
    expect(with_token.get_by_text("Copied bearer token")).to_be_visible()
    bearer = page.evaluate("navigator.clipboard.readText()")
    assert re.fullmatch("[0-9a-f]{48}", bearer)
    press(with_token, "I have it")
    told(page, "Copied bearer token")
    expect(page.locator("#state")).to_have_text("Idle")
    page.evaluate("scrollTo(0, 0)")
    eyes.shot(page, "connection")
    eyes.shot(page, "connection-whole", whole=True)

    assert fresh.post([currents(OPEN)]) == 401
    assert fresh.post([currents(OPEN, seed=n) for n in range(25)], bearer) == 200
    page.get_by_role("link", name="Overview").click()
    expect(page.locator(".sum .delivered dd")).to_contain_text("25")
    expect(sentence(page)).to_have_text(re.compile("nothing waiting|Idle"))
    assert len(fresh.arrived()) == 25


def test_a_project_that_lives_in_another_region(eyes: Eyes, bridge: Callable[..., Bridge]) -> None:
    """The test of the connection finds the region; one button chooses it; nothing went anywhere before it was saved."""
    europe = bridge()  # for its Mixpanel
    fresh = bridge(connected=False, europe=europe.mixpanel)
    fresh.mixpanel_accepts(service_secret="another")
    page = eyes.open(fresh, "connection")
    for name, value in {
        "Project token": TOKEN,
        "Service account user name": ACCOUNT,
        "Service account secret": SECRET,
        "Project ID": PROJECT,
    }.items():
        box(page, name).fill(value)
    press(page, "Test connection")
    expect(page.locator(".callout.bad")).to_contain_text("The project lives in another region")
    eyes.shot(page, "another-region")
    press(page, "Use EU")
    expect(box(page, "Data residency")).to_have_value("eu")
    press(page, "Test connection")
    expect(page.locator(".callout.good")).to_contain_text("It works")
    press(page, "Save")
    told(page, "Saved, and in force at once.")
    assert fresh.post([currents(OPEN, seed=n) for n in range(3)]) == 200
    until(lambda: len(europe.arrived()) == 3, "three events in the EU")
    assert fresh.arrived() == []


def test_a_refused_credential_from_start_to_resume(eyes: Eyes, bridge: Callable[..., Bridge]) -> None:
    """Mixpanel refuses, the page says so and how long there is; the new secret is entered; everything that waited arrives."""
    mine = bridge()
    assert mine.post([currents(OPEN, seed=n) for n in range(10)]) == 200
    page = eyes.open(mine)
    expect(page.locator(".sum .delivered dd")).to_contain_text("10")
    mine.mixpanel_accepts(service_secret="renewed")
    assert mine.post([currents(OPEN, seed=100 + n) for n in range(1200)]) == 200

    expect(sentence(page)).to_contain_text("Halted", timeout=PATIENCE_S * 1000)
    expect(sentence(page)).to_contain_text(re.compile("1,200 events safe, expire in 4[78] h"))
    expect(page.locator(".overview-head")).to_contain_text("Invalid credentials")
    expect(page.locator("#spoken")).to_contain_text("Halted")
    eyes.shot(page, "halted")
    page.get_by_role("main").get_by_role("link", name="Renew the credential").first.click()
    box(page, "Service account secret").fill("renewed")
    press(page, "Test connection")
    expect(page.locator(".callout.good")).to_be_visible()
    press(page, "Save")
    told(page, "Saved")
    expect(page.get_by_text("Saved on this page", exact=True).first).to_be_visible()

    page.get_by_role("link", name="Overview").click()
    expect(page.locator(".sum .delivered dd")).to_contain_text("1,210")
    expect(page.locator(".sum .waiting dd")).to_contain_text("0")
    expect(sentence(page)).not_to_contain_text("Halted")
    assert len(mine.arrived()) == 1210
    go(page, "Activity")
    for kind in ("Halted", "Resumed", "Settings"):
        expect(page.locator(".kind").get_by_text(kind, exact=True).first).to_be_visible()
    eyes.shot(page, "activity")


def test_settings_are_seen_exported_and_taken_back(eyes: Eyes, flowing: Bridge) -> None:
    """What is saved here goes before config.toml, is shown beside it, comes as TOML without secrets, and can be removed."""
    page = eyes.open(flowing, "connection")
    box(page, "Data residency").select_option("eu")
    box(page, "Names of events and properties").select_option("current")
    press(page, "Save")
    told(page, "Saved")
    row = page.get_by_role("row").filter(has_text="mixpanel.region")
    expect(row).to_contain_text("European Union")
    expect(row).to_contain_text("United States")
    with page.expect_download() as download:
        page.get_by_role("link", name="Export as TOML").click()
    toml = Path(download.value.path()).read_text(encoding="utf-8")
    assert 'region = "eu"' in toml
    assert SECRET not in toml
    page.get_by_text("Address, retention, pace and alarms").click()
    box(page, "Requests under way at most").fill("many")
    press(page, "Save these")
    expect(box(page, "Requests under way at most")).to_have_attribute("aria-invalid", "true")
    box(page, "Requests under way at most").fill("9999")
    press(page, "Save these")
    expect(box(page, "Requests under way at most")).to_have_attribute("aria-invalid", "true")
    eyes.shot(page, "settings", whole=True)
    press(page, "Remove all")
    press(page.get_by_role("dialog"), "Remove all")
    told(page, "in force")
    expect(page.get_by_text("Nothing yet: everything is as")).to_be_visible()
    assert flowing.ask("/api/config")["mixpanel"]["region"] == "us"


def test_events_are_chosen_renamed_and_transformed(eyes: Eyes, bridge: Callable[..., Bridge]) -> None:
    """A box unticked, another name, a field removed and one hashed: seen in the sample, and in what arrives."""
    mine = bridge()
    page = eyes.open(mine, "events")
    expect(page.get_by_role("heading", name="Message Engagement", exact=False)).to_be_visible()
    expect(page.get_by_role("heading", name="Customer Behavior", exact=False)).to_be_visible()
    page.get_by_role("checkbox", name="Forward Email Click", exact=True).uncheck()
    page.get_by_role("searchbox", name="Find").fill("email open")
    expect(page.get_by_role("row").filter(has_text="users.messages.email.Send")).to_be_hidden()
    press(page, "Email Open")
    dialog = page.get_by_role("dialog", name="Email Open")
    expect(dialog.get_by_text("As Mixpanel gets it", exact=True).first).to_be_visible()
    box(dialog, "Name in Mixpanel").fill("Mail Read")
    dialog.get_by_text(re.compile("Transformations of its")).click()
    dialog.get_by_label("email_address").select_option("remove")
    dialog.get_by_label("user_agent").select_option("hash")
    # What is no text can be removed, but has no hash.
    expect(dialog.get_by_label("is_amp").locator("option")).to_have_text(["As it is", "Remove: [REDACTED]"])
    dialog.get_by_label("is_amp").select_option("remove")
    press(dialog, "Save")
    expect(dialog.get_by_label("As Mixpanel gets it", exact=True)).to_contain_text('"Mail Read"')
    expect(dialog.get_by_label("As Mixpanel gets it", exact=True)).to_contain_text("[REDACTED]")
    told(page, "Saved")
    dialog.evaluate("dialog => { dialog.scrollTop = 0 }")
    eyes.shot(page, "event")
    press(dialog, "Send a test event")
    expect(dialog.get_by_text(re.compile("Sent 1 test event"))).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Mail Read")).to_be_focused()
    expect(page.get_by_role("row").filter(has_text="users.messages.email.Open")).to_contain_text("renamed")

    (event,) = until(mine.arrived, "the test event")
    assert event["event"] == "Mail Read"
    assert event["properties"]["email_address"] == event["properties"]["is_amp"] == "[REDACTED]"
    assert re.fullmatch("[0-9a-f]{64}", event["properties"]["user_agent"])
    assert mine.post([currents(CLICK, seed=n) for n in range(5)]) == 200
    page.get_by_role("searchbox", name="Find").fill("email click")
    clicks = page.get_by_role("row").filter(has_text=CLICK)
    expect(clicks.locator("[data-label=Skipped]")).to_have_text("5")
    page.get_by_role("searchbox", name="Find").fill("")
    group = page.get_by_role("region", name="Customer Behavior").get_by_label("Forward this group")
    group.uncheck()
    until(lambda: mine.ask("/api/config")["events"]["customer_behavior"] is False, "the group to be off")
    expect(page.get_by_role("checkbox", name="Forward Purchase", exact=True)).not_to_be_checked()
    eyes.shot(page, "events")


def test_dead_letters_are_grouped_filtered_paged_replayed_and_purged(eyes: Eyes, flowing: Bridge) -> None:
    """From the reason to one event beside Mixpanel's words; replay, export and purge of one, of a filter and of all."""
    page = eyes.open(flowing, "dead-letters")
    reasons = page.get_by_role("region", name="Table of reasons")
    expect(reasons.get_by_role("row").nth(1)).to_contain_text("118")
    letters = page.get_by_role("region", name="Table of dead letters")
    expect(letters.get_by_role("row")).to_have_count(51)
    press(page, "Older")
    expect(page.get_by_text("Page 2")).to_be_visible()
    press(page, "Newer")
    expect(page.get_by_text("Page 1")).to_be_visible()
    eyes.shot(page, "dead-letters")

    box(page, "Refused by").select_option("mixpanel")
    press(page, "Filter")
    expect(letters.get_by_role("row")).to_have_count(3)
    letters.get_by_role("button").first.click()
    dialog = page.get_by_role("dialog", name="Dead letter")
    expect(dialog.get_by_role("region", name="What Mixpanel says")).to_contain_text("'properties.time' is invalid")
    expect(dialog.get_by_label("Event", exact=True)).to_contain_text('"Email Open"')
    eyes.shot(page, "dead-letter")
    with page.expect_download() as download:
        dialog.get_by_role("link", name="Export").click()
    assert "Email Open" in Path(download.value.path()).read_text(encoding="utf-8")
    press(dialog, "Replay")
    press(page.get_by_role("dialog", name="Replay 1 dead letter?"), "Replay 1 dead letter")
    told(page, "Replayed 1 dead letter")
    expect(letters.get_by_role("row")).to_have_count(2)
    until(lambda: flowing.events()["delivered"] == 721, "the replayed event")

    press(page, "Clear")
    reasons.get_by_role("button", name="unknown event type").click()
    expect(page.get_by_text("118 that match")).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("link", name="Export").click()
    assert len(Path(download.value.path()).read_bytes().splitlines()) == 118
    letters.get_by_role("checkbox").nth(1).check()
    letters.get_by_role("checkbox").nth(2).check()
    expect(page.get_by_text("2 selected")).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("link", name="Export").click()
    assert len(Path(download.value.path()).read_bytes().splitlines()) == 2
    press(page, "Purge")
    confirm = page.get_by_role("dialog", name="Purge 2 dead letters?")
    press(confirm, "Cancel")
    press(page, "Purge")
    press(confirm, "Purge 2 dead letters")
    told(page, "Purged 2 dead letters")
    expect(page.get_by_text("116 that match")).to_be_visible()
    press(page, "Replay")
    press(page.get_by_role("dialog"), "Replay 116 dead letters")
    told(page, "116 were refused again")


def test_cohorts_are_seen_paid_for_and_written_again(eyes: Eyes, bridge: Callable[..., Bridge]) -> None:
    """Mixpanel's page comes, the day's cap stops it, a person lets it go on, and orders the cohort anew."""
    mine = bridge(cohort_points=3)
    assert mine.sync("778", SCRIPT, [f"user-{n}" for n in range(40)]) == 200
    page = eyes.open(mine, "cohorts")
    row = page.get_by_role("row").filter(has_text="117:778")
    expect(row.locator("[data-label=members]")).to_have_text("40")
    expect(row).to_contain_text("<script>")
    expect(page.get_by_text("Capped", exact=True)).to_be_visible()
    press(page, "Spend what is due")
    page.get_by_role("dialog").get_by_role("button", name=re.compile(r"^Spend \d+ data points$")).click()
    told(page, "Allowed, for today.")
    expect(row.locator("[data-label='in Braze']")).to_have_text("40")
    eyes.shot(page, "cohorts")
    row.get_by_role("button", name="Resync").click()
    press(page.get_by_role("dialog"), "Resync")
    told(page, "40 memberships will be written again.")


def test_no_more_is_spent_than_what_was_confirmed(eyes: Eyes, bridge: Callable[..., Bridge]) -> None:
    """What becomes due while the question is open isn't paid for: what the button says is the most that is spent."""
    mine = bridge(cohort_points=5)
    assert mine.sync("778", "Vips", [f"user-{n}" for n in range(40)]) == 200
    page = eyes.open(mine, "cohorts")
    expect(page.get_by_text("Capped", exact=True)).to_be_visible()
    spent = mine.ask("/api/cohorts")["figures"]["points_today"]
    press(page, "Spend what is due")
    dialog = page.get_by_role("dialog")
    expect(dialog).to_contain_text("are due")
    assert mine.sync("779", "Others", [f"other-{n}" for n in range(300)]) == 200
    until(lambda: mine.ask("/api/cohorts/plan")["users"] == 340 - spent, "300 more")
    press(dialog, f"Spend {40 - spent} data points")
    told(page, "Allowed, for today.")
    until(lambda: mine.ask("/api/cohorts")["figures"]["points_today"] == 40, "what was confirmed")
    expect(page.get_by_text("Capped", exact=True)).to_be_visible()
    press(page, "Spend what is due")
    press(page.get_by_role("dialog"), "Spend 300 data points")
    until(lambda: mine.ask("/api/cohorts")["figures"]["in_braze"] == 340, "the others")
    assert mine.ask("/api/cohorts")["figures"]["points_today"] == 340


def test_whom_braze_refused_is_seen_and_tried_again(eyes: Eyes, bridge: Callable[..., Bridge]) -> None:
    """Who may not join and who may not leave, in Braze's words; one button tries just those again. A page that was refused is told."""
    mine = bridge(cohort_points=0)
    assert mine.sync("778", "Vips", ["ada", "ben"], "one") == 200
    page = eyes.open(mine, "cohorts")
    row = page.get_by_role("row").filter(has_text="117:778")
    expect(row.locator("[data-label='in Braze']")).to_have_text("2")
    expect(page.get_by_role("heading", name="Refused by Braze")).to_be_hidden()
    # Whether it is the users or Braze is told by others who are taken.
    mine.braze_refuses("ada", SCRIPT)
    assert mine.sync("778", "Vips", ["ben", *(f"new-{n}" for n in range(5))], "two") == 200
    expect(row.locator("[data-label=rejected]")).to_have_text("1")
    assert mine.ask("/api/cohorts")["figures"]["rejected_leaving"] == 1
    assert mine.sync("778", "Vips", ["ben", SCRIPT, *(f"new-{n}" for n in range(10))], "three") == 200
    expect(row.locator("[data-label=rejected]")).to_have_text("2")
    refused = page.get_by_role("region", name="Table of users that Braze refused")
    for user in ("ada", SCRIPT):
        one = refused.get_by_role("row").filter(has_text=user)
        expect(one).to_contain_text("provided external_id is blacklisted and disallowed")
        expect(one).to_contain_text("Vips")
    eyes.shot(page, "cohorts-refused", whole=True)

    notice = page.get_by_text(re.compile("^A page of Mixpanel.s was refused at"))
    expect(notice).to_be_hidden()
    assert mine.sync("779", "Others", ["ada"], password="wrong") == 401
    expect(notice).to_be_visible()
    expect(page.locator(".callout.bad")).to_contain_text("401")
    assert mine.sync("779", "Others", ["ben"]) == 200
    expect(page.get_by_text("Others have been taken since.")).to_be_visible()
    expect(page.locator(".callout.bad")).to_have_count(0)

    mine.braze_refuses()
    spent = mine.ask("/api/cohorts")["figures"]["points_today"]
    press(page, "Try them again")
    press(page.get_by_role("dialog"), "Try them again")
    told(page, "2 memberships will be written again.")
    expect(row.locator("[data-label=rejected]")).to_have_text("0")
    expect(row.locator("[data-label='in Braze']")).to_have_text("12")
    expect(page.get_by_role("heading", name="Refused by Braze")).to_be_hidden()
    assert mine.ask("/api/cohorts")["figures"]["points_today"] == spent + 2


def test_a_daemon_for_cohorts_only_says_so(eyes: Eyes, bridge: Callable[..., Bridge]) -> None:
    """The overview is about cohorts, in step, halted and waiting; nobody is led to connect an export that is off."""
    mine = bridge(cohort_points=0, connected=False, export=False)
    page = eyes.open(mine)
    expect(sentence(page)).to_contain_text("In step: 0 of 0 memberships in Braze")
    expect(page.get_by_text("mixpanel.export is false, so no events are taken")).to_be_visible()
    expect(page.get_by_text("What to paste into Braze")).to_be_hidden()
    mine.braze_accepts(rest_key="another")
    assert mine.sync("778", "Vips", [f"user-{n}" for n in range(3)]) == 200
    expect(sentence(page)).to_contain_text("Halted: nothing is written to Braze")
    expect(sentence(page)).to_contain_text("3 memberships to write, safe on disk")
    expect(sentence(page)).to_have_class(re.compile("bad"))
    expect(page.locator("#state")).to_have_text("Halted")
    expect(page.locator("p.why")).to_contain_text("401")
    eyes.shot(page, "cohorts-only")

    go(page, "Connection")
    expect(page.get_by_text("No events are exported: mixpanel.export is false.")).to_be_visible()
    expect(page.get_by_text("Braze would be answered 503")).to_be_visible()
    expect(page.get_by_role("button", name="Make a token")).to_be_hidden()
    box(page, "Project token").fill(TOKEN)
    page.get_by_label("The project token alone").check()
    press(page, "Save")
    told(page, "Saved. It has no effect while mixpanel.export is false.")
    expect(page.get_by_text("No events are exported: mixpanel.export is false.")).to_be_visible()


# -- what comes from outside is text ----------------------------------------------------------------------------------


def test_what_looks_like_markup_is_shown_as_text(eyes: Eyes, bridge: Callable[..., Bridge]) -> None:
    """A script in an event's name, a property and a reason is read, not run."""
    mine = bridge()
    custom = currents("users.behaviors.CustomEvent")
    custom["properties"] |= {"name": SCRIPT, "custom_properties": {SCRIPT: SCRIPT}}
    message = f"refused because of {SCRIPT}"
    failed = [{"index": 0, "insert_id": "", "field": SCRIPT, "message": message}]
    mine.mixpanel_says([{"status": 400, "body": {"code": 400, "failed_records": failed, "num_records_imported": 0}}])
    mine.post([custom])
    mine.post([{"event_type": SCRIPT, "id": SCRIPT, "time": int(time.time()), "user": {"external_user_id": SCRIPT}}])
    until(lambda: mine.events()["dead_lettered"] == 2, "both dead letters")
    page = eyes.open(mine, "dead-letters")
    letters = page.get_by_role("region", name="Table of dead letters")
    expect(letters.get_by_role("row")).to_have_count(3)
    for number in (0, 1):
        letters.get_by_role("button").nth(number).click()
        dialog = page.get_by_role("dialog", name="Dead letter")
        expect(dialog.get_by_role("region").last).to_be_visible()
        expect(dialog).to_contain_text("<script>")
        page.keyboard.press("Escape")
    for view in ("Events", "Activity", "Connection", "Overview"):
        page.get_by_role("navigation").get_by_role("link", name=view).click()
        expect(page.get_by_role("heading", level=1)).to_be_visible()
    assert page.locator("main script, main img, dialog script, dialog img").count() == 0
    assert "broken" not in page.title()


def test_numbers_are_shown_and_exported_as_they_came(eyes: Eyes, bridge: Callable[..., Bridge]) -> None:
    """JavaScript has no 12345678901234567890, and calls 1.0 a 1: neither may become of somebody's order number."""
    mine = bridge()
    event = b'{"event_type":"no.such.Type","id":"x","time":1700000000,"properties":{"order":12345678901234567890,"price":1.0}}'
    connection = http.client.HTTPConnection(mine.http[7:], timeout=PATIENCE_S)
    connection.request("POST", "/v1/currents", b'{"events":[' + event + b"]}", {"Content-Type": "application/json"})
    assert connection.getresponse().status == 200
    connection.close()
    page = eyes.open(mine, "dead-letters")
    page.get_by_role("region", name="Table of dead letters").get_by_role("button").first.click()
    dialog = page.get_by_role("dialog", name="Dead letter")
    shown = dialog.get_by_label("Event", exact=True)
    expect(shown).to_contain_text('"order": 12345678901234567890')
    expect(shown).to_contain_text('"price": 1.0')
    with page.expect_download() as download:
        dialog.get_by_role("link", name="Export").click()
    assert event in Path(download.value.path()).read_bytes()


def test_who_refused_an_event_is_told_truly(eyes: Eyes, bridge: Callable[..., Bridge]) -> None:
    """Of one that is too large nobody asked Mixpanel: bridged says that it refused it, and what of it would have been sent."""
    mine = bridge()
    vast = currents("users.behaviors.CustomEvent")
    vast["properties"]["custom_properties"] = {"story": "once " * 250_000}
    assert mine.post([vast]) == 200
    until(lambda: mine.events()["dead_lettered"] == 1, "the dead letter")
    assert [one["stage"] for one in mine.ask("/api/dead-letters")["dead_letters"]] == ["bridged"]
    assert mine.ask("/api/dead-letters?stage=mixpanel")["dead_letters"] == []
    page = eyes.open(mine, "dead-letters")
    letters = page.get_by_role("region", name="Table of dead letters")
    expect(letters).to_contain_text("bridged itself")
    box(page, "Refused by").select_option("bridged itself")
    press(page, "Filter")
    letters.get_by_role("button", name=re.compile("too large as a Mixpanel event")).click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_role("heading", name="Why bridged didn")).to_be_visible()
    expect(dialog.get_by_role("heading", name="The event, as it would have been sent to Mixpanel")).to_be_visible()
    expect(dialog).not_to_contain_text("What Mixpanel says")
    expect(dialog.get_by_label("Event", exact=True)).to_contain_text("once once")


def test_an_event_of_megabytes_is_shown(eyes: Eyes, bridge: Callable[..., Bridge]) -> None:
    """One long text, and one that is all escapes, don't keep a person from seeing what it is: its beginning, and the way to the rest."""
    mine = bridge()
    long, spelled = "x" * 12_000_000, '\\"\n' * 1_000_000
    fax = {"event_type": "users.messages.fax.Send", "time": int(time.time()), "user": {"external_user_id": "ada"}}
    assert mine.post([fax | {"id": "long", "properties": {"n": 1.50, "page": long}}]) == 200
    assert mine.post([fax | {"id": "spelled", "properties": {"page": spelled, "end\\": -1.0}}]) == 200
    until(lambda: mine.events()["dead_lettered"] == 2, "both dead letters")
    page = eyes.open(mine, "dead-letters")
    letters = page.get_by_role("region", name="Table of dead letters").get_by_role("button")
    expect(letters).to_have_count(2)
    for at, id_ in enumerate(("spelled", "long")):
        letters.nth(at).click()
        dialog = page.get_by_role("dialog")
        expect(dialog.get_by_label("Event", exact=True)).to_contain_text(f'"id": "{id_}"')
        expect(
            dialog.get_by_text(re.compile("That is the beginning: 262,144 of .* Export has all of it"))
        ).to_be_visible()
        press(dialog, "Close")


def test_what_is_no_object_is_shown_as_it_came(eyes: Eyes, bridge: Callable[..., Bridge]) -> None:
    """A number or a text alone is JSON, half an event is text: only what is neither is shown as base64."""
    mine = bridge()
    assert mine.post([1, "a"]) == 200
    until(lambda: mine.events()["dead_lettered"] == 2, "both dead letters")
    page = eyes.open(mine, "dead-letters")
    letters = page.get_by_role("region", name="Table of dead letters").get_by_role("button")
    expect(letters).to_have_count(2)
    for at, shown in enumerate(('"a"', "1")):
        letters.nth(at).click()
        expect(page.get_by_role("dialog").get_by_label("Event", exact=True)).to_have_text(shown)
        press(page.get_by_role("dialog"), "Close")


def test_what_is_not_in_the_table_is_counted_too(eyes: Eyes, bridge: Callable[..., Bridge]) -> None:
    """Events of types that bridged doesn't know are no less seen for it; the figures grow by themselves."""
    mine = bridge()
    fax = {"event_type": "users.messages.fax.Send", "time": int(time.time()), "user": {"external_user_id": "ada"}}
    page = eyes.open(mine, "events")
    expect(page.get_by_role("checkbox", name="Forward Email Open", exact=True)).to_be_checked()
    expect(page.get_by_role("heading", name="Not in the table")).to_be_hidden()
    for many in (2, 5):
        assert mine.post([fax | {"id": f"{many}-{n}"} for n in range(many)]) == 200
        accepted = sum(of["accepted"] for of in mine.ask("/api/events")["others"].values())
        others = page.get_by_role("region", name=re.compile("^Event types that aren.t in the table"))
        expect(others.locator("[data-label=Accepted]")).to_have_text(str(accepted))
        expect(others.locator("[data-label='Dead letters']")).to_have_text(str(accepted))
    assert accepted == 7


def test_older_activity_stays_when_something_happens(eyes: Eyes, bridge: Callable[..., Bridge]) -> None:
    """Who has asked for older entries keeps them: a new one comes on top, and takes none away."""
    mine = bridge()
    for n in range(70):
        change = {"set": {"alerts.undelivered": f"{n + 1}h"}, "remove": []}
        assert call("PUT", f"{mine.admin}/api/settings", change)[0] == 200
    page = eyes.open(mine, "activity")
    entries = page.locator("main li")
    expect(entries).to_have_count(50)
    press(page, "Show older")
    expect(entries).not_to_have_count(50)
    before = entries.count()
    assert before > 60
    assert call("PUT", f"{mine.admin}/api/settings", {"set": {"delivery.timeout": "77s"}, "remove": []})[0] == 200
    expect(entries.first).to_contain_text("delivery.timeout")
    expect(entries.last).to_contain_text("Started")
    expect(entries).to_have_count(before + 1)


def test_a_cohort_that_is_written_again_says_how_far_it_is(eyes: Eyes, bridge: Callable[..., Bridge]) -> None:
    """A resync is under way as anything else is; and what the writer counts are updates, not users."""
    mine = bridge(cohort_points=0)
    assert mine.sync("778", "Vips", ["ada"]) == 200
    until(lambda: mine.ask("/api/cohorts")["figures"]["in_braze"] == 1, "the cohort")
    page = eyes.open(mine, "cohorts")
    expect(page.get_by_text("1 update of users written since the start")).to_be_visible()

    def under_way(route: Route) -> None:
        answer = route.fetch()
        said = answer.json()
        said["cohorts"][0] |= {"state": "resyncing", "progress": 0.5}
        route.fulfill(response=answer, json=said)

    page.route("**/api/cohorts", under_way)
    expect(page.get_by_text("resyncing, 50 %")).to_be_visible()


def test_an_answer_that_gets_lost(eyes: Eyes, bridge: Callable[..., Bridge]) -> None:
    """The daemon may have done it: whoever ordered it is told to look, and not that nothing was changed."""
    mine = bridge()
    mine.post([{"event_type": "no.such.Type", "id": "x"}])
    page = eyes.open(mine, "dead-letters")

    def lose(route: Any) -> None:
        route.fetch()
        route.abort()

    page.route("**/api/dead-letters/purge", lose)
    press(page, "Purge")
    press(page.get_by_role("dialog"), "Purge 1 dead letter")
    told(page, "It may have been done all the same")
    assert mine.ask("/api/status")["dead_letters"]["kept"] == 0


def test_a_proxy_that_puts_a_path_before_it(eyes: Eyes, bridge: Callable[..., Bridge]) -> None:
    """`location /tools/bridged/ { proxy_pass ...; }`: files, answers, orders and the stream are asked for below that path."""
    mine = bridge()
    below = f"{mine.admin}/tools/bridged/"

    def proxy(route: Any) -> None:
        if route.request.url.startswith(below):
            route.continue_(url=route.request.url.replace(below, f"{mine.admin}/"))
        else:
            route.abort()

    context = eyes.context()
    context.route("**", proxy)
    page = context.new_page()
    page.goto(below)
    expect(sentence(page)).to_contain_text("Idle")
    assert mine.post([currents(OPEN), {"event_type": "no.such.Type", "id": "x"}]) == 200
    expect(page.locator(".sum .delivered dd")).to_contain_text("1")
    go(page, "Dead letters")
    link = page.get_by_role("link", name="Export")
    expect(link).to_be_visible()
    assert link.evaluate("link => link.href") == f"{below}api/dead-letters/export"
    press(page, "Purge")
    press(page.get_by_role("dialog"), "Purge 1 dead letter")
    told(page, "Purged 1 dead letter")
    assert mine.ask("/api/status")["dead_letters"]["kept"] == 0


def test_a_window_that_nobody_looks_at_holds_no_connection(eyes: Eyes, bridge: Callable[..., Bridge]) -> None:
    """A browser has six for all its windows: the seventh would never open. Looked at again, it goes on at once."""
    mine = bridge()
    page = eyes.open(mine)
    expect(sentence(page)).to_contain_text("Idle")
    see = """hidden => {
        Object.defineProperty(document, 'hidden', {configurable: true, get: () => hidden});
        document.dispatchEvent(new Event('visibilitychange'));
    }"""
    with page.expect_event("requestfailed", lambda request: request.url.endswith("/api/live")):
        page.evaluate(see, True)
    assert mine.post([currents(OPEN)]) == 200
    page.wait_for_timeout(3000)
    expect(page.locator(".sum .delivered dd")).to_contain_text("0")
    page.evaluate(see, False)
    expect(page.locator(".sum .delivered dd")).to_contain_text("1")


def test_a_window_too_many_is_told_so(eyes: Eyes, bridge: Callable[..., Bridge]) -> None:
    """Where 32 listen already, the page says that, and goes on when one has gone."""
    mine = bridge()
    listeners = [socket.create_connection(("127.0.0.1", int(mine.admin.rpartition(":")[2]))) for _ in range(32)]
    for one in listeners:
        one.sendall(b"GET /api/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert one.recv(20).startswith(b"HTTP/1.1 200")
    page = eyes.open(mine)
    expect(page.get_by_text("32 listen already: close a window")).to_be_visible()
    for one in listeners:
        one.close()
    expect(sentence(page)).to_contain_text("Idle")
    expect(page.get_by_text("32 listen already")).to_be_hidden()


def test_who_leaves_the_events_before_they_are_there(eyes: Eyes, bridge: Callable[..., Bridge]) -> None:
    """The answer comes when another view is shown: nothing goes wrong, and the way back shows them."""
    page = eyes.open(bridge(), "activity")
    asked: list[Route] = []
    page.route("**/api/events", lambda route: asked.append(route))  # noqa: PLW0108  # playwright wants a function
    links = page.get_by_role("navigation").get_by_role("link", name="Events")
    links.click()
    expect(page.get_by_role("heading", level=1, name="Events")).to_be_visible()
    until(lambda: page.wait_for_timeout(20) or asked, "the question")
    page.get_by_role("navigation").get_by_role("link", name="Activity").click()
    expect(page.get_by_role("heading", level=1, name="Activity")).to_be_visible()
    with page.expect_response("**/api/events"):
        asked[0].continue_()
    page.evaluate("() => new Promise(done => setTimeout(done))")  # whoever waited for it has had his turn
    page.unroute("**/api/events")
    links.click()
    expect(page.get_by_role("checkbox", name="Forward this group").first).to_be_visible()


@pytest.mark.parametrize("path", sorted((HERE.parent / "bridged" / "page").glob("*.js")), ids=lambda path: path.name)
def test_no_script_makes_markup_or_code_from_text(path: Path) -> None:
    """So that nothing from outside can ever become an element or run."""
    sinks = "innerHTML|outerHTML|insertAdjacentHTML|document\\.write|createContextualFragment|DOMParser|eval\\(|new Function"
    assert re.findall(sinks, path.read_text(encoding="utf-8")) == []


def test_nothing_is_inline_and_nothing_comes_from_elsewhere() -> None:
    """The policy forbids it; the file doesn't try."""
    html = (HERE.parent / "bridged" / "page" / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r"\son\w+=|\sstyle=|<style|<script>|https?://", html)


# -- how it holds up ---------------------------------------------------------------------------------------------------


def test_two_open_tabs_agree(eyes: Eyes, flowing: Bridge) -> None:
    """What is changed in one is seen in the other, and neither overwrites what a person types in it."""
    # In a window each: a browser gives a tab that is hidden little time.
    one, two = eyes.open(flowing, "events"), eyes.open(flowing, "events")
    bounce = ("checkbox", "Forward Email Bounce")
    expect(two.get_by_role(bounce[0], name=bounce[1], exact=True)).to_be_checked()
    one.get_by_role(bounce[0], name=bounce[1], exact=True).uncheck()
    expect(two.get_by_role(bounce[0], name=bounce[1], exact=True)).not_to_be_checked()
    two.get_by_role(bounce[0], name=bounce[1], exact=True).check()
    expect(one.get_by_role(bounce[0], name=bounce[1], exact=True)).to_be_checked()

    go(one, "Connection")
    go(two, "Connection")
    box(two, "Project ID").fill("77")
    box(one, "Names of events and properties").select_option("current")
    press(one, "Save")
    told(one, "Saved")
    expect(box(two, "Names of events and properties")).to_have_value("current")
    expect(box(two, "Project ID")).to_have_value("77")
    press(one, "Remove all")
    press(one.get_by_role("dialog"), "Remove all")
    told(one, "in force")
    expect(box(two, "Names of events and properties")).to_have_value("seed")


def test_two_people_change_one_event_type(eyes: Eyes, bridge: Callable[..., Bridge]) -> None:
    """Who has typed something else is asked which is to stay, and nothing is overwritten unseen; who has typed nothing sees the other's."""
    mine = bridge()
    one, two, reader = (eyes.open(mine, f"events?type={OPEN}") for _ in range(3))
    ones, twos, readers = (page.get_by_role("dialog", name="Email Open") for page in (one, two, reader))
    for dialog in (ones, twos):
        dialog.get_by_text(re.compile("Transformations of its")).click()
    twos.get_by_label("email_address").select_option("hash")
    box(ones, "Name in Mixpanel").fill("Mail Read")
    ones.get_by_label("email_address").select_option("remove")
    press(ones, "Save")
    told(one, "Saved")
    expect(box(readers, "Name in Mixpanel")).to_have_value("Mail Read")
    expect(readers.get_by_label("email_address")).to_have_value("remove")
    expect(readers.get_by_role("alert")).to_be_empty()

    expect(twos.get_by_role("alert")).to_contain_text("called “Mail Read”, and email_address is removed")
    expect(box(twos, "Name in Mixpanel")).to_have_value("")
    press(twos, "Save")
    told(two, "Say first which of the two is to be kept")
    assert mine.ask("/api/config")["events"]["transform"] == {OPEN: {"email_address": "remove"}}
    eyes.shot(two, "conflict")
    press(twos, "Keep mine, to be saved over it")
    box(twos, "Name in Mixpanel").fill("Mail Opened")
    # Another event type is nobody's conflict, even if it is changed in the very same moment.
    send = {"selected": False}
    assert call("PUT", f"{mine.admin}/api/events/{CLICK}", send)[0] == 200
    press(twos, "Save")
    told(two, "Saved")
    assert mine.ask("/api/config")["events"]["transform"] == {OPEN: {"email_address": "hash"}}
    expect(box(ones, "Name in Mixpanel")).to_have_value("Mail Opened")
    expect(ones.get_by_label("email_address")).to_have_value("hash")

    box(ones, "Name in Mixpanel").fill("Neither")
    box(twos, "Name in Mixpanel").fill("")
    press(twos, "Save")
    told(two, "Saved")
    press(ones, "Use theirs")
    expect(box(ones, "Name in Mixpanel")).to_have_value("")
    expect(ones.get_by_role("button", name="Save")).to_be_focused()
    assert mine.ask("/api/config")["events"]["names"] == {}


def test_two_people_save_one_setting(eyes: Eyes, bridge: Callable[..., Bridge]) -> None:
    """Who would overwrite what another has saved since is told so, keeps what was typed, and saves it by saving again."""
    mine = bridge()
    one, two = (eyes.open(mine, "connection") for _ in range(2))
    names = "Names of events and properties"
    told_so = (
        "The settings were changed meanwhile, in another window or file. The newest values are shown; what you typed"
    )
    box(two, "Project ID").fill("77")
    box(one, "Project ID").fill("55")
    box(one, names).select_option("current")
    press(one, "Save")
    told(one, "Saved")
    expect(box(two, names)).to_have_value("current")
    press(two, "Save")
    told(two, told_so)
    expect(two.get_by_text("Somebody else has saved 55 meanwhile.")).to_be_visible()
    assert mine.ask("/api/config")["mixpanel"]["project_id"] == "55"
    expect(box(two, "Project ID")).to_have_value("77")
    press(two, "Save")
    told(two, "Saved")
    assert mine.ask("/api/config")["mixpanel"]["project_id"] == "77"

    expect(box(one, "Project ID")).to_have_value("77")

    # Of a secret nobody is told what it is, but that it may be another one.
    box(two, "Service account secret").fill("the-secret-of-two")
    box(one, "Service account secret").fill("the-secret-of-one")
    box(one, names).select_option("seed")
    press(one, "Save")
    told(one, "Saved")
    expect(box(two, names)).to_have_value("seed")
    press(two, "Save")
    told(two, told_so)
    press(two, "Save")
    told(two, "Saved")


def test_a_number_that_no_computer_holds_is_no_number(eyes: Eyes, flowing: Bridge) -> None:
    """It is told at the field, in words, and nothing is sent."""
    page = eyes.open(flowing, "connection")
    page.get_by_text("Address, retention, pace and alarms").click()
    box(page, "Events per second at most").fill("1e400")
    press(page, "Save these")
    expect(page.get_by_text("A number, please", exact=True)).to_be_visible()


def test_boxes_that_are_ticked_in_a_hurry(eyes: Eyes, bridge: Callable[..., Bridge]) -> None:
    """Each is saved, one after the other: none is refused because the one before it isn't on disk yet."""
    mine = bridge()
    page = eyes.open(mine, "events")
    expect(page.get_by_role("checkbox", name="Forward Email Open", exact=True)).to_be_checked()
    page.evaluate(
        "[...document.querySelectorAll('main tbody input[type=checkbox]')].slice(0, 12).forEach(box => box.click())"
    )
    until(lambda: len(mine.ask("/api/config")["events"]["exclude"]) == 12, "twelve changes")
    expect(page.locator(".toast")).to_have_count(0)


def test_the_daemon_goes_away_and_comes_back(eyes: Eyes, bridge: Callable[..., Bridge]) -> None:
    """Kill -9 while the page is open: it says so, and since when; it goes on by itself, and can change things again."""
    mine = bridge()
    page = eyes.open(mine)
    expect(sentence(page)).to_contain_text("Idle")
    eyes.shot(page, "idle")
    mine.end("daemon", signal.SIGKILL)
    expect(page.get_by_text("The daemon doesn't answer.")).to_be_visible()
    eyes.shot(page, "lost")
    mine.start()
    expect(page.get_by_text("The daemon doesn't answer.")).to_be_hidden()
    assert mine.post([currents(OPEN)]) == 200
    expect(page.locator(".sum .delivered dd")).to_contain_text("1")
    go(page, "Events")
    page.get_by_role("checkbox", name="Forward Email Bounce", exact=True).uncheck()
    until(lambda: "users.messages.email.Bounce" in mine.ask("/api/config")["events"]["exclude"], "the change")


def test_who_has_no_token_stays_outside(eyes: Eyes, bridge: Callable[..., Bridge]) -> None:
    """With [admin] token: a login, a wrong one refused in words, the session kept in a cookie, and ended by logging out."""
    mine = bridge(admin_token="correct horse battery staple")
    context = eyes.context()
    page = eyes.open(mine, context=context)
    eyes.shot(page, "login")
    box(page, "Admin token").fill("battery horse")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_be_visible()
    box(page, "Admin token").fill("correct horse battery staple")
    press(page, "Log in")
    expect(sentence(page)).to_contain_text("Idle")
    (cookie,) = context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
    page.reload()
    expect(sentence(page)).to_contain_text("Idle")
    other = eyes.open(mine, "activity", context)
    expect(other.get_by_role("heading", level=1)).to_have_text("Activity")
    page.bring_to_front()
    press(page, "Log out")
    expect(page.get_by_text("You are logged out.")).to_be_visible()
    expect(other.get_by_text("Your session has ended")).to_be_visible()
    box(page, "Admin token").fill("correct horse battery staple")
    press(page, "Log in")
    expect(sentence(page)).to_contain_text("Idle")
    other.evaluate("dispatchEvent(new Event('focus'))")  # as when its window is looked at
    expect(other.get_by_role("heading", level=1)).to_have_text("Activity")
    mine.end("daemon", signal.SIGKILL)
    mine.start()
    expect(page.get_by_text("Your session has ended")).to_be_visible()


def test_an_ordinary_day_is_drawn(eyes: Eyes, flowing: Bridge) -> None:
    """The charts show the last hour and the last day, say in words what they show, and follow the screen's width."""
    page = eyes.open(flowing)
    rate = page.get_by_role("img", name="Events per second")
    # For the pictures of the README there is more to see.
    for second in range(100 if RENEW else 2):
        now = time.monotonic()
        many = 200 + 150 * (second % 40 > 15) + 7 * (second * second % 31)
        event, moment = currents((OPEN, CLICK, PURCHASE)[second % 3]), time.time_ns()
        assert flowing.post([event | {"id": f"day-{moment}-{n}"} for n in range(many)]) == 200
        time.sleep(max(0.0, 1 - (time.monotonic() - now)))
    expect(rate).to_have_attribute("aria-label", re.compile("accepted [0-9,]+, at most [1-9]"))
    expect(rate.locator("canvas")).to_be_visible()
    page.get_by_label("Last day").check()
    expect(page.get_by_label("Last hour")).not_to_be_checked()
    page.get_by_label("Last hour").check()
    expect(rate.locator("canvas")).to_be_visible()
    eyes.shot(page, "overview", whole=True)
    page.set_viewport_size({"width": 360, "height": 740})
    until(lambda: rate.locator("canvas").bounding_box()["width"] <= 360, "a narrower chart")
    page.get_by_role("heading", name="How it has been going").scroll_into_view_if_needed()
    page.evaluate("scrollTo(0, 0)")
    eyes.shot(page, "overview-phone")


def test_a_flood_is_seen_as_one(eyes: Eyes, bridge: Callable[..., Bridge]) -> None:
    """Mixpanel says 429 while events pour in: what waits, for how long, and why it isn't faster."""
    mine = bridge()
    mine.mixpanel_says([{"after": 2, "status": 429}])
    event = currents(OPEN)
    for number in range(12):
        mine.post([event | {"id": f"flood-{number}-{n}"} for n in range(1000)])
    page = eyes.open(mine)
    expect(sentence(page)).to_contain_text("Backing off")
    expect(page.locator(".facts")).to_contain_text("Backing off for")
    expect(page.locator(".sum .waiting dd")).to_contain_text(re.compile(r"\d+,000"))
    bar = page.get_by_role("img", name=re.compile("12,000 accepted = "))
    expect(bar).to_be_visible()
    eyes.shot(page, "flooded")
    page.set_viewport_size({"width": 360, "height": 740})
    eyes.shot(page, "flooded-phone")


# -- for everybody -----------------------------------------------------------------------------------------------------


def test_the_whole_page_by_keyboard_alone(eyes: Eyes, flowing: Bridge) -> None:
    """Past the navigation, into a view, a dialog opened, walked around in, closed; the focus is seen and comes back."""
    page = eyes.open(flowing)
    expect(sentence(page)).not_to_have_text("…")
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("main")).to_be_focused()
    page.get_by_role("navigation").get_by_role("link", name="Dead letters").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", level=1, name="Dead letters")).to_be_focused()
    letter = page.get_by_role("region", name="Table of dead letters").get_by_role("button").first
    expect(letter).to_be_visible()

    for _ in range(200):
        page.keyboard.press("Tab")
        seen = page.evaluate(
            "(() => { const e = document.activeElement, s = getComputedStyle(e);"
            " return [e === document.body, s.outlineStyle, s.outlineWidth, e.matches('.link[aria-haspopup]'), e.outerHTML.slice(0, 200)] })()"
        )
        assert seen[0] or (seen[1] != "none" and seen[2] != "0px"), f"the focus can't be seen: {seen[4]}"
        if seen[3]:
            break
    expect(letter).to_be_focused()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog", name="Dead letter")
    expect(dialog).to_be_visible()
    for _ in range(25):
        page.keyboard.press("Tab")
        inside = "document.activeElement === document.body || !!document.activeElement.closest('dialog')"
        assert page.evaluate(inside), "the focus left the dialog"
    page.keyboard.press("Escape")
    expect(letter).to_be_focused()

    go_to = page.get_by_role("navigation").get_by_role("link", name="Events")
    go_to.focus()
    page.keyboard.press("Enter")
    tick = page.get_by_role("checkbox", name="Forward Email Retry", exact=True)
    tick.focus()
    page.keyboard.press("Space")
    until(lambda: "users.messages.email.Retry" in flowing.ask("/api/config")["events"]["exclude"], "the change")
    expect(tick).to_be_focused()
    page.keyboard.press("Space")
    until(lambda: "users.messages.email.Retry" not in flowing.ask("/api/config")["events"]["exclude"], "the change")


RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]


def violations(page: Page) -> list[str]:
    """What axe finds wrong, with the first place of each."""
    found = page.evaluate("async tags => (await axe.run({runOnly: tags})).violations", RULES)
    return [f"{one['id']}: {one['help']}: {one['nodes'][0]['html']} {one['nodes'][0]['any'][:1]}" for one in found]


SIGHTS = (("light", 1280), ("light", 360), ("dark", 360), ("dark", 1280))


def look(page: Page, eyes: Eyes, name: str, sights: tuple[tuple[str, int], ...] = SIGHTS) -> None:
    """In light and dark, wide and narrow: no fault that axe finds, and nothing wider than the screen."""
    for scheme, width in sights:
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        page.set_viewport_size({"width": width, "height": 860})
        assert violations(page) == [], f"{name}, {scheme}, {width}"
        assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{name}, {width}"
        eyes.shot(page, f"{name}-{scheme}-{width}")


def test_every_state_is_accessible(eyes: Eyes, bridge: Callable[..., Bridge], axe: str) -> None:
    """The login, a fresh daemon, one that is halted, cohorts that are there, what is asked before it is done, and problems."""
    sights = SIGHTS[1::2]  # the views themselves are looked at in all four
    locked = bridge(admin_token="correct horse battery staple", connected=False)
    page = eyes.open(locked)
    box(page, "Admin token").fill("no")
    press(page, "Log in")
    expect(page.get_by_role("alert")).to_be_visible()
    page.evaluate(axe)
    look(page, eyes, "login", sights)
    box(page, "Admin token").fill("correct horse battery staple")
    press(page, "Log in")
    expect(sentence(page)).to_contain_text("Not set up")
    look(page, eyes, "state-fresh", sights)
    go(page, "Connection")
    press(page, "Test connection")
    expect(page.get_by_text("Needed for this credential.").first).to_be_visible()
    look(page, eyes, "state-incomplete", sights)
    press(page, "Make a token")
    expect(page.get_by_role("dialog", name="The new bearer token")).to_be_visible()
    look(page, eyes, "dialog-token", sights)
    locked.end()
    page.keyboard.press("Escape")
    expect(page.get_by_text("The daemon doesn't answer.")).to_be_visible()
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    expect(page.get_by_text("The daemon doesn't answer.")).to_be_in_viewport()
    look(page, eyes, "state-lost", sights)

    mine = bridge(cohort_points=3)
    for cohort, name in enumerate((SCRIPT, "\u05e2\u05d1\u05e8\u05d9\u05ea \u202eoverride", "x" * 300, "Power users")):
        assert mine.sync(str(cohort), name, [f"user-{n}" for n in range(20)]) == 200
    page = eyes.open(mine, "cohorts")
    expect(page.get_by_text("Capped", exact=True)).to_be_visible()
    expect(page.locator("main tbody tr")).to_have_count(4)
    page.evaluate(axe)
    look(page, eyes, "state-cohorts", sights)
    press(page, "Spend what is due")
    expect(page.get_by_role("dialog")).to_be_visible()
    look(page, eyes, "dialog-confirm", sights)
    page.keyboard.press("Escape")
    mine.mixpanel_accepts(service_secret="renewed")
    assert mine.post([currents(OPEN)]) == 200
    page.get_by_role("navigation").get_by_role("link", name="Overview").click()
    expect(sentence(page)).to_contain_text("Halted")
    look(page, eyes, "state-halted", sights)
    go(page, "Connection")
    press(page, "Test connection")
    expect(page.locator(".callout.bad")).to_be_visible()
    look(page, eyes, "state-refused", sights)


def test_every_view_is_accessible(eyes: Eyes, flowing: Bridge, axe: str) -> None:
    """No view and no dialog has a fault that axe finds, in light and dark, wide and narrow."""
    page = eyes.open(flowing)
    page.evaluate(axe)
    for view, there in VIEWS.items():
        page.evaluate("hash => { location.hash = hash }", f"#/{view}")
        expect(page.get_by_role("heading", level=1)).to_be_visible()
        expect(page.locator(there).first).to_be_visible()
        # A hundred rows alike take axe five seconds, and tell it no more than ten.
        if view == "connection":
            page.get_by_text("Address, retention, pace and alarms").click()
        elif view == "events":
            page.get_by_role("searchbox", name="Find").fill("email")
        elif view == "dead-letters":
            box(page, "Refused by").select_option("mixpanel")
            press(page, "Filter")
            expect(page.get_by_text(re.compile("^[12] that match"))).to_be_visible()
        look(page, eyes, f"view-{view or 'overview'}")
        if view in ("events", "dead-letters"):
            page.locator("main .link[aria-haspopup]:visible").first.click()
            expect(page.locator("dialog pre").first).to_be_visible()
            look(page, eyes, f"dialog-{view}")
            page.keyboard.press("Escape")
