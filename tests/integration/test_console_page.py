"""The console in headless Chromium, on a real run's data: curves, dialogues, keyboard, light and dark, hostile text."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live_console import live_console
from playwright.sync_api import Browser, Page, expect, sync_playwright

from services.contracts.config import load, load_resolved
from services.contracts.samples import FOLDER, SampledAttempt, SampledDialogue, encode_dialogue, write_step

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
TIMEOUT_MS = 20_000
DEMO = Path(__file__).parents[1] / "data" / "demo_run"
expect.set_options(timeout=TIMEOUT_MS)

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium"),
]

HOSTILE = [
    "<script>alert(1)</script>", "<img src=x onerror=alert(1)>", r"$\text{<img src=x onerror=alert(1)>}$",
    r"$\href{javascript:alert(1)}{x}$", r"\boxed{</math><script>alert(1)</script>}", "\"><svg onload=alert(1)>",
    r"\[\style{background:url(//example.com)}{x}\]", r"$$\color{red'onload='alert(1)}{x}$$", "<|im_start|><b>x</b>",
    "$" + "{" * 5000, r"\begin{align}" + r"\frac" * 3000 + r"\end{align}", "$" + r"\left(" * 900 + "$",
]  # fmt: skip


def write_dialogue(folder: Path, texts: list[str], *, problem: str = "2+2", step: int = 1, task_id: int = 7) -> None:
    """A dialogue whose attempts are these texts, a token each; between them feedback."""
    tokens, attempts = [problem], []
    for text in texts:
        attempts.append(
            SampledAttempt(
                start=len(tokens), end=len(tokens) + 1, extracted=text[:200], verdict="incorrect", grading_ms=1.0
            )
        )
        tokens += [text, "try again"]
    sampled = {attempt.start for attempt in attempts}
    dialogue = SampledDialogue(
        step=step, task_id=task_id, problem=problem, gold=(problem,), max_attempts=len(texts), reward=-0.5,
        finish_reason="attempts", replica_id=problem[:60], versions=tuple((0, i, i + 1) for i in sorted(sampled)),
        attempts=tuple(attempts), generate_s=1.0, grade_s=0.5, total_s=1.5, tokens=tuple(tokens),
        logprobs=tuple(-0.5 if i in sampled else None for i in range(len(tokens))),
        advantages=tuple(1.5 if i in sampled else None for i in range(len(tokens))),
    )  # fmt: skip
    write_step(folder / FOLDER, step, [dialogue], [encode_dialogue(dialogue)])


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A browser; without a sandbox, because CI runs as root."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=60_000)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def demo_url() -> Iterator[str]:
    with live_console(load_resolved(DEMO / "config.json"), DEMO) as url:
        yield url


def open_page(browser: Browser, url: str, **options: Any) -> tuple[Page, list[str]]:
    """A page, and what it complains of or asks of other hosts."""
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(TIMEOUT_MS)
    complaints: list[str] = []
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on(
        "console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None
    )
    page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
    page.on("request", lambda request: complaints.append(request.url) if is_elsewhere(request.url, url) else None)
    return page, complaints


def is_elsewhere(asked: str, url: str) -> bool:
    return not asked.startswith((url, "data:"))


@pytest.fixture
def page(browser: Browser, demo_url: str) -> Iterator[Page]:
    """The page of a real run; whatever it complains of fails the test."""
    page, complaints = open_page(browser, demo_url)
    page.goto(demo_url)
    expect(page.locator("#state")).to_contain_text("step 40 of 40")
    yield page
    page.context.close()
    assert complaints == []


def test_the_curves_have_units_axes_and_values_of_the_run(page: Page) -> None:
    for title, unit in (("Reward", "per dialogue"), ("Accuracy by attempt", "%"), ("KL divergence", "nats per token"),
                        ("Response length", "tokens"), ("Staleness", "versions"), ("Throughput", "dialogues / s"),
                        ("The learner's time", "% of each step")):  # fmt: skip
        chart = page.locator("figure", has=page.get_by_text(title, exact=True))
        expect(chart.locator(".unit")).to_contain_text(unit)
        assert chart.locator("path.line").count() >= 1 and chart.locator(".tick").count() >= 4
    accuracy = page.locator("figure", has=page.get_by_text("Accuracy by attempt", exact=True))
    expect(accuracy.locator("dt")).to_have_text(["dialogue", *(f"attempt {k}" for k in range(1, 6))])
    headline = page.locator("#headline div", has=page.get_by_text("Reward", exact=True))
    last = page.evaluate("fetch('api/steps').then(r => r.json()).then(r => r.rows.at(-1).reward)")
    expect(headline.locator("dd")).to_have_text(f"{last:.3f}")


def test_the_cursor_shows_a_steps_values_in_all_charts_and_opens_its_dialogues(page: Page) -> None:
    rewards = page.evaluate("fetch('api/steps').then(r => r.json()).then(r => r.rows.map(row => row.reward))")
    reward = page.locator("figure", has=page.get_by_text("Reward", exact=True))
    reward.focus()
    page.keyboard.press("Home")
    for _ in range(19):
        page.keyboard.press("ArrowRight")
    expect(reward.locator(".legend dd")).to_have_text(f"{rewards[19]:.3f}")
    assert set(page.locator(".hair .at").all_text_contents()) == {"step 20"}
    page.keyboard.press("Enter")
    expect(page.locator("#list li").first).to_contain_text("step 20")
    assert "step=20" in page.url


def test_dialogues_are_walked_through_with_the_keyboard(page: Page) -> None:
    page.keyboard.press("3")
    facts = page.locator(".facts")
    current = page.locator("#list li[aria-current]")
    expect(current).to_have_count(1)
    first = facts.inner_text()
    page.keyboard.press("j")
    expect(facts).not_to_have_text(first, use_inner_text=True)
    page.keyboard.press("ArrowUp")
    expect(facts).to_have_text(first, use_inner_text=True)
    page.keyboard.press("[")
    expect(page.locator("#list li").first).to_contain_text("step 20")
    page.keyboard.press("]")
    expect(page.locator("#list li").first).to_contain_text("step 40")
    page.keyboard.press("/")
    page.keyboard.type("no problem has this")
    expect(page.locator("#dialogue")).to_contain_text("Loosen the filters")
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("1")
    expect(page.locator("#charts")).to_be_visible()


def test_a_dialogue_has_mathematics_feedback_apart_shaded_tokens_and_versions(page: Page) -> None:
    page.keyboard.press("3")
    page.get_by_label("Outcome").select_option("later")
    expect(page.locator("#list li").first.locator(".marks")).to_have_text(re.compile("✗+✓"))
    expect(page.locator(".turn.attempt").first.locator("math .boxed")).to_be_visible()
    assert page.evaluate("document.querySelector('math').namespaceURI") == "http://www.w3.org/1998/Math/MathML"
    expect(page.locator(".turn.feedback").first).to_contain_text("Your answer is incorrect.")
    expect(page.locator(".facts")).to_contain_text("Weights")
    page.keyboard.press("p")
    token = page.locator(".turn.attempt .token").first
    token.hover()
    for said in ("probability", "log-probability", "advantage", "version"):
        expect(page.locator("#tip")).to_contain_text(said)
    colour = "getComputedStyle(document.querySelector('.turn.correct .token')).backgroundColor"
    by_probability = page.evaluate(colour)
    page.keyboard.press("a")
    expect(page.get_by_role("button", name="advantage")).to_have_attribute("aria-pressed", "true")
    assert page.evaluate(colour) != by_probability
    page.keyboard.press("t")
    expect(page.locator(".token")).to_have_count(0)


def test_an_address_leads_back_to_the_same_dialogue(page: Page, demo_url: str) -> None:
    page.keyboard.press("3")
    expect(page.locator("#list li[aria-current]")).to_have_count(1)
    first = page.locator(".facts").inner_text()
    page.locator("#list li").nth(5).click()
    page.wait_for_function("document.querySelector('#list li:nth-child(6)[aria-current]')")
    expect(page.locator(".facts")).not_to_have_text(first, use_inner_text=True)
    before, address = page.locator(".facts").inner_text(), page.url
    page.goto("about:blank")
    page.goto(address)
    expect(page.locator(".facts")).to_have_text(before, use_inner_text=True)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_a_phone_in_light_and_dark(browser: Browser, demo_url: str, scheme: str) -> None:
    page, complaints = open_page(browser, demo_url, viewport={"width": 380, "height": 740}, color_scheme=scheme)
    for view in ("training", "dialogues", "replicas"):
        page.goto(f"{demo_url}/#/{view}")
        expect(page.locator(f"#{view}")).to_be_visible()
        expect(page.locator("#state")).to_contain_text("40")
        assert page.evaluate("document.documentElement.scrollWidth") <= 380
    lightness = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (sum(lightness) / 3 > 128) == (scheme == "light")
    page.context.close()
    assert complaints == []


def test_what_a_model_writes_never_becomes_html(browser: Browser, tmp_path: Path) -> None:
    for step, text in enumerate(HOSTILE, 1):
        write_dialogue(tmp_path, [text, text], problem=text, step=step, task_id=step)
    with live_console(load(None, [], env={}), tmp_path) as url:
        page, complaints = open_page(browser, url)
        page.goto(f"{url}/#/dialogues")
        for step, text in reversed(list(enumerate(HOSTILE, 1))):
            expect(page.locator(".facts dd").first).to_have_text(str(step))
            for key in ("t", "p", "a", "t"):
                page.keyboard.press(key)
            shown = page.locator("#dialogue")
            acting = ":is(script, img, svg, iframe, a, object, [href], [onerror], [onload]), .body b"
            assert shown.locator(acting).count() == 0
            assert page.locator("#list :is(script, img, svg, b, a)").count() == 0
            if "<b>" in text:
                expect(shown.locator(".turn.attempt .body").first).to_contain_text("<b>x</b>")
            page.keyboard.press("j")
        page.context.close()
        assert complaints == []


def test_empty_and_broken_states_say_what_to_do(browser: Browser, tmp_path: Path) -> None:
    with live_console(load(None, [], env={}), tmp_path) as url:
        page, _ = open_page(browser, url)
        page.goto(url)
        expect(page.locator("#training-empty")).to_contain_text("multiattempt train CONFIG")
        page.keyboard.press("2")
        expect(page.locator("#replicas-empty")).to_contain_text("--resume")
        page.keyboard.press("3")
        expect(page.locator("#dialogue")).to_contain_text("No dialogues yet")
    expect(page.locator("#trouble")).to_contain_text("multiattempt serve console")
    page.context.close()


CORPUS = sorted((Path(__file__).parents[1] / "grading_corpus").glob("*.jsonl"))

FORMULAS = {
    r"\frac{1}{2}": "mfrac > mn + mn",
    r"\frac12": "mfrac > mn + mn",
    r"x^{2}_1": "msubsup > mi",
    r"\sqrt[3]{x}": "mroot > mi",
    r"\sum_{i=1}^n i": "munderover > mo",
    r"\lim_{x \to 0} x": "munder",
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}": "mtable > mtr + mtr > mtd + mtd",
    r"\begin{cases}1 & x>0\\ 0\end{cases}": "mtable mtd.left",
    r"\left(\frac{a}{b}\right]": 'mo[stretchy="true"]',
    r"\mathbb{R}": "mi",
    r"\text{ cm}^2": "msup > mtext",
    r"\unknowncommand{x}": "mtext.unknown",
    r"f'(x)": "msup > mo",
    r"\binom{n}{k}": 'mfrac[linethickness="0"]',
    r"\vec{v}": 'mover[accent="true"]',
}


def test_formulas_are_read_as_a_textbook_sets_them(page: Page) -> None:
    for latex, selector in FORMULAS.items():
        script = (
            "async ([latex, selector]) => !!(await import('/static/tex.js')).formula(latex).querySelector(selector)"
        )
        assert page.evaluate(script, [latex, selector]), latex


def test_every_answer_of_the_grading_corpus_is_drawn(page: Page) -> None:
    texts = [json.loads(line) for path in CORPUS for line in path.read_text(encoding="utf-8").splitlines()]
    shown = [str(value) for row in texts for value in row.values() if isinstance(value, str)]
    script = """async (texts) => {
        const { prose, formula } = await import('/static/tex.js');
        let formulas = 0;
        for (const text of texts) {
            const made = prose(text);
            formulas += made.querySelectorAll('math').length;
            if (formula(text).querySelector('script, img, a, svg')) throw new Error(text);
        }
        return formulas;
    }"""
    assert page.evaluate(script, shown) > 500
