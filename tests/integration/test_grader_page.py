"""The grader's pages in headless Chromium: a person types, sees the verdict and why; hostile text does nothing."""

import shutil
from collections.abc import Iterator

import pytest
from live_grader import live_grader
from playwright.sync_api import Browser, Page, expect, sync_playwright

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
TIMEOUT_MS = 20_000
expect.set_options(timeout=TIMEOUT_MS)

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A browser; without a sandbox, because CI runs as root."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=60_000)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, grader_url: str) -> Iterator[Page]:
    """The page, opened; whatever it complains of fails the test."""
    page = browser.new_page()
    page.set_default_timeout(TIMEOUT_MS)
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.goto(grader_url)
    yield page
    page.close()
    assert complaints == []


def grade(page: Page, response: str, gold: str) -> None:
    page.get_by_label("Answer or a whole response").fill(response)
    page.get_by_label("Gold answer").fill(gold)
    page.get_by_role("button", name="Grade").click()


def test_a_person_sees_the_verdict_both_sides_as_mathematics_and_why(page: Page) -> None:
    grade(page, "I think it is $x$,\nso \\boxed{\\frac{1}{2}}", "0.5")
    result = page.get_by_role("region", name="Verdict")
    expect(result).to_contain_text("Correct")
    expect(result).to_contain_text("numeric: by value")
    expect(result.locator("#answer-math math mfrac")).to_be_visible()
    expect(result.locator("#gold-math math mn")).to_have_text("0.5")
    expect(result.locator("dd").first).to_have_text("\\frac{1}{2}")
    assert page.evaluate("document.querySelector('mfrac').namespaceURI") == "http://www.w3.org/1998/Math/MathML"


@pytest.mark.parametrize(
    ("response", "gold", "says"),
    [
        ("\\boxed{1}", "2", "Incorrect"),
        ("I do not know which it is", "2", "No answer"),
        ("\\boxed{1}", "$$", "Unreadable gold"),
    ],
)
def test_every_other_verdict_is_told_in_words(page: Page, response: str, gold: str, says: str) -> None:
    grade(page, response, gold)
    expect(page.get_by_role("region", name="Verdict")).to_contain_text(says)


def test_boxed_looks_into_boxes_only(page: Page) -> None:
    page.get_by_label("only").check()
    grade(page, "7", "7")
    expect(page.get_by_role("region", name="Verdict")).to_contain_text("No answer")
    page.get_by_label("anywhere").check()
    page.get_by_label("Gold answer").press("Enter")
    expect(page.get_by_role("region", name="Verdict")).to_contain_text("Correct")


def test_every_example_gives_a_verdict(page: Page) -> None:
    verdicts = []
    for example in page.get_by_role("group", name="Examples").get_by_role("button").all():
        with page.expect_response("**/v1/explain"):
            example.click()
        expect(page.get_by_role("button", name="Grade")).to_be_enabled()
        verdicts.append(page.locator("#name").inner_text())
    assert verdicts == ["Correct", "Correct", "Incorrect", "Correct", "Incorrect", "Correct"]


XSS = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", r"\text{<img src=x onerror=alert(1)>}",
    r"\href{javascript:alert(1)}{x}", r"\text{</math><script>alert(1)</script>}", "\"><svg onload=alert(1)>",
    r"\style{background:url(//example.com)}{x}", r"\text{&lt;script&gt;alert(1)&lt;/script&gt;}",
]  # fmt: skip


@pytest.mark.parametrize("payload", XSS)
def test_hostile_text_is_shown_and_does_nothing(page: Page, payload: str) -> None:
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    grade(page, f"\\boxed{{{payload}}}", payload)
    expect(page.get_by_role("region", name="Verdict")).to_be_visible()
    acting = "#result :is(script, img, svg, iframe, a, [href], [style], [onerror], [onload])"
    assert page.locator(acting).count() == 0
    assert [url for url in requests if not url.endswith("/v1/explain")] == []


def test_errors_are_one_line_each(page: Page, grader_url: str) -> None:
    problem = '{"title": "Service Unavailable", "status": 503, "detail": "the queue is full"}'
    page.route("**/v1/explain", lambda route: route.fulfill(status=503, body=problem))
    grade(page, "1", "1")
    expect(page.get_by_role("alert")).to_contain_text("busy")
    page.unroute("**/v1/explain")
    page.route("**/v1/explain", lambda route: route.abort())
    grade(page, "1", "1")
    expect(page.get_by_role("alert")).to_have_text("The grader cannot be reached.")
    page.unroute("**/v1/explain")
    grade(page, "1", "1")
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(page.get_by_role("region", name="Verdict")).to_contain_text("Correct")


def test_a_locked_grader_asks_for_its_token(browser: Browser) -> None:
    with live_grader(api_key="open-sesame") as url:
        page = browser.new_page()
        page.goto(url)
        assert not page.get_by_label("Access token").is_visible()
        grade(page, "1", "1")
        expect(page.get_by_role("alert")).to_contain_text("wants an access token")
        page.get_by_label("Access token").fill("open-sesame")
        page.get_by_role("button", name="Grade").click()
        expect(page.get_by_role("region", name="Verdict")).to_contain_text("Correct")
        page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_light_and_dark(browser: Browser, grader_url: str, scheme: str) -> None:
    context = browser.new_context(viewport={"width": 360, "height": 740}, color_scheme=scheme)  # type: ignore[arg-type]
    page = context.new_page()
    page.goto(grader_url)
    grade(page, "\\boxed{" + "x+" * 200 + "1}", "9" * 300)
    expect(page.get_by_role("region", name="Verdict")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    lightness = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (sum(lightness) / 3 > 128) == (scheme == "light")
    context.close()


def test_every_field_has_a_label(page: Page) -> None:
    unlabelled = page.evaluate("[...document.querySelectorAll('input, textarea')].filter(e => !e.labels.length).length")
    assert unlabelled == 0


def test_the_documentation_is_drawn_from_this_host_alone(browser: Browser, grader_url: str) -> None:
    page = browser.new_page()
    hosts: set[str] = set()
    refusals: list[str] = []
    page.on("request", lambda request: hosts.add(request.url.split("/")[2] if "://" in request.url else ""))
    page.on("console", lambda message: refusals.append(message.text) if message.type == "error" else None)
    page.goto(f"{grader_url}/docs")
    expect(page.get_by_text("/v1/grade/batch")).to_be_visible()
    page.get_by_text("/v1/grade", exact=True).click()
    page.get_by_role("button", name="Try it out").click()
    page.get_by_role("button", name="Execute").click()
    expect(page.locator(".live-responses-table .response .response-col_status").first).to_contain_text("200")
    assert hosts <= {grader_url.split("/")[2], ""} and refusals == []
    page.close()
