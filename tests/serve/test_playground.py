"""The page that the server shows at /, in a browser, before a server whose answers are known."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.fake import MAX_LOOPS, N_LOOPS, WORDS, Fake, Served, loops_of
from tests.serve.running import running, small

pytestmark = pytest.mark.browser
axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe-playwright-python")
sync = pytest.importorskip("playwright.sync_api", reason="needs playwright")

CHROMIUM = Path("/usr/bin/chromium")
QUIET = "--disable-background-networking --disable-component-update --disable-sync --no-first-run"
TEXT = "".join(WORDS)
WAIT_MS = 15_000  # cores may be busy
SHADES = """all => all.map(element => {
  const pixel = new OffscreenCanvas(1, 1).getContext("2d"), {backgroundColor, color} = getComputedStyle(element);
  return [backgroundColor, color].map(css => {
    pixel.fillStyle = css;
    pixel.fillRect(0, 0, 1, 1);
    return [...pixel.getImageData(0, 0, 1, 1).data];
  });
})"""


@pytest.fixture(scope="module")
def browser() -> Iterator[sync.Browser]:
    if not CHROMIUM.exists():
        pytest.skip(f"needs {CHROMIUM}")
    with sync.sync_playwright() as playwright:
        args = ["--no-sandbox", "--disable-gpu", *QUIET.split()]
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=args)
        sync.expect.set_options(timeout=WAIT_MS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Fake, str]]:
    fake = Fake()
    with Served(fake) as url:
        yield fake, url


@pytest.fixture
def fake(served: tuple[Fake, str]) -> Fake:
    served[0].__dict__.update(Fake().__dict__)
    return served[0]


@pytest.fixture(scope="module")
def tab(browser: sync.Browser) -> Iterator[sync.Page]:
    """One for all tests, each of which loads its page anew: another one takes a second."""
    page = browser.new_page()
    page.set_default_timeout(WAIT_MS)
    yield page
    page.close()


@pytest.fixture
def page(tab: sync.Page, fake: Fake, served: tuple[Fake, str]) -> sync.Page:
    tab.set_viewport_size({"width": 1400, "height": 900})
    tab.emulate_media(color_scheme="light")
    tab.goto(served[1])
    sync.expect(tab.locator("#name")).to_contain_text("made-up")
    return tab


def send(page: sync.Page, prompt: str = "import math\n") -> None:
    page.get_by_label("Prompt").or_(page.get_by_label("Message")).fill(prompt)
    page.keyboard.press("Control+Enter")


def answered(page: sync.Page, prompt: str = "import math\n") -> None:
    send(page, prompt)
    sync.expect(page.get_by_role("status")).to_contain_text("done")


def panel(page: sync.Page) -> sync.Locator:
    return page.locator("#panel")


def rows(page: sync.Page) -> list[str]:
    return [" ".join(row.split()) for row in panel(page).locator("tbody tr").all_inner_texts()]


def luminance(rgba: list[int]) -> float:
    """Relative luminance of WCAG 2."""
    linear = [x / 12.92 if (x := c / 255) <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for c in rgba[:3]]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: list[int], other: list[int]) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def violations(page: sync.Page, *rules: str) -> list[str]:
    """rules: all if none is named."""
    options = {"resultTypes": ["violations"]} | ({"runOnly": list(rules)} if rules else {})
    found = axe.Axe().run(page, options=options).response["violations"]
    return [f"{rule['id']}: {node['html']}" for rule in found for node in rule["nodes"]]


def test_nothing_is_fetched_from_elsewhere_and_nothing_complains(
    browser: sync.Browser, fake: Fake, served: tuple[Fake, str]
) -> None:
    page = browser.new_page()
    asked: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(served[1])
    answered(page)
    page.locator(".token").first.hover()
    sync.expect(panel(page)).to_contain_text("Entropy")
    assert {url.removeprefix(served[1]) for url in asked if not url.startswith("data:")} == {
        "/",
        "/v1/models",
        "/v1/completions",
        "/v1/trace",
    }
    assert complaints == []
    page.evaluate("fetch('http://127.0.0.1:9/').catch(() => {})")  # the policy that the page works under is in force
    assert complaints
    page.close()


def test_an_answer_streams_in_the_colours_of_its_loops(page: sync.Page, fake: Fake) -> None:
    fake.waits_at = 2
    send(page)
    tokens = page.locator(".token")
    sync.expect(tokens).to_have_count(3)
    sync.expect(page.get_by_role("status")).to_have_text("writing…")
    fake.waits_at = None
    sync.expect(page.get_by_role("status")).to_contain_text("done: 14 tokens, 3.5 loops in the mean")
    assert page.locator(".text").inner_text().replace("⏎", "") == "import math\n" + TEXT
    loops = [loops_of(i, N_LOOPS) for i in range(len(WORDS))]
    joined = [*map(str, loops[:3]), f"{loops[3]}+{loops[4]}", *map(str, loops[5:])]  # half a character joins the next
    assert tokens.evaluate_all("all => all.map(token => token.dataset.loops)") == joined
    shades = [str(pair[0]) for pair in tokens.evaluate_all(SHADES)]
    assert len({*zip(joined, shades, strict=True)}) == len({*joined})
    assert len({*shades}) == 6
    assert page.locator("#legend li").all_inner_texts() == [*"123456"]
    sync.expect(page.locator(".facts")).to_contain_text(re.compile(r"\d tokens/s; ended by the model; seed\s\d"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_shade_is_readable_and_in_order(page: sync.Page, fake: Fake, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.get_by_label("Loops, at most").press("End")
    answered(page)
    page.locator("#legend").evaluate(
        "legend => legend.replaceChildren(...Array.from({length: 24}, (_, i) => {"
        "const shade = document.createElement('li'); shade.style.setProperty('--loops', i + 1); return shade }))"
    )
    shades = page.locator("#legend li").evaluate_all(SHADES)
    assert min(contrast(*pair) for pair in shades) >= 4.5
    light = [luminance(shade) for shade, _ in shades]
    assert light == sorted(light, reverse=scheme == "light")
    assert contrast(shades[0][0], shades[-1][0]) > 2.5


def test_controls_say_what_is_sent(page: sync.Page, fake: Fake) -> None:
    dial = page.get_by_label("Loops, at most")
    assert dial.get_attribute("aria-valuetext") == "6 loops, the model's own"
    dial.press("ArrowRight")
    assert dial.get_attribute("aria-valuetext") == "7 loops"
    page.get_by_label("Exit rule").select_option("kl")
    page.get_by_label("Threshold").fill("0.01")
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Max tokens").fill("5")
    page.get_by_label("Seed").fill("3")
    answered(page, "x = ")
    said = {"model": "made-up", "prompt": "x = ", "loops": 7, "exit": "kl", "exit_threshold": 0.01, "temperature": 0}
    ours = {"max_tokens": 5, "seed": 3, "stream": True, "loops_per_token": True}
    assert fake.sent("/v1/completions") == [said | ours]
    dial.press("End")
    assert page.locator("#loops-said").inner_text() == str(MAX_LOOPS)
    page.get_by_role("button", name="its own").click()
    page.get_by_label("Exit rule").select_option("")
    sync.expect(page.get_by_label("Threshold")).to_be_disabled()
    answered(page, "y = ")
    last = fake.sent("/v1/completions")[-1]
    assert (last["loops"], last.keys() & {"exit", "exit_threshold"}) == (N_LOOPS, set())


def test_the_same_at_another_depth(page: sync.Page, fake: Fake) -> None:
    answered(page)
    page.get_by_label("Again at").fill("2")
    page.get_by_role("button", name="Compare").click()
    sync.expect(page.locator(".facts").nth(1)).to_contain_text("1.8 loops in the mean")
    sync.expect(page.locator(".facts").nth(1)).to_contain_text("the same as the first")
    one, other = fake.sent("/v1/completions")
    assert other == one | {"loops": 2}


def test_what_is_written_can_be_stopped(page: sync.Page, fake: Fake) -> None:
    fake.waits_at = 2
    for stop in (lambda: page.get_by_role("button", name="Stop").click(), lambda: page.keyboard.press("Escape")):
        send(page)
        sync.expect(page.locator(".token")).to_have_count(3)
        stop()
        sync.expect(page.get_by_role("status")).to_contain_text("stopped: 3 tokens")
        sync.expect(page.locator(".facts")).to_contain_text("stopped by you")
    page.locator(".token").first.hover()
    sync.expect(panel(page)).to_contain_text("Entropy")
    assert fake.sent("/v1/trace")[0]["completion"] == [0, 1, 2]


def test_a_token_shows_its_loops(page: sync.Page, fake: Fake) -> None:
    answered(page)
    tokens = page.locator(".token")
    tokens.nth(8).hover()  # " π" is token 9: 4 loops
    sync.expect(panel(page).get_by_role("heading")).to_have_text("“␣π”: 4 loops")
    sync.expect(panel(page).locator("tbody tr")).to_have_count(4)
    early, last = "another first choice 2.00 ␣pass 75% ␣π 13% <b> 6.3%", "4 0.25 ␣π 75% ␣pass 13% <b> 6.3%"
    assert rows(page)[0] == f"1 ≠ {early}"
    assert rows(page)[-1] == last
    sync.expect(panel(page).locator("caption")).to_contain_text("Settled at loop 4.")
    tokens.nth(3).hover()
    sync.expect(panel(page).get_by_role("heading")).to_have_text("“π”: 4 + 3 loops")
    sync.expect(panel(page).locator("table")).to_have_count(2)
    body = fake.sent("/v1/trace")
    assert [sent["completion"] for sent in body] == [[*range(len(WORDS))]], "once for an answer"
    asked = {"prompt": "import math\n", "loops": N_LOOPS, "exit": "hazard", "top": 5}
    assert asked.items() <= body[0].items()


def test_keys_go_through_tokens(page: sync.Page, fake: Fake) -> None:
    answered(page)
    page.get_by_label("as numbers").focus()
    page.keyboard.press("Tab")
    title = panel(page).get_by_role("heading")
    for key, said in {
        "ArrowRight": "␣area",
        "End": "␣2",
        "ArrowLeft": "␣**",
        "Home": "def",
        "ArrowLeft ": "def",
    }.items():
        page.keyboard.press(key.strip())
        sync.expect(title).to_contain_text(f"“{said}”")
        assert page.evaluate("document.activeElement.classList.contains('token')")
    page.locator(".token").nth(5).hover()
    sync.expect(title).to_contain_text("“def”")  # what has the focus stays
    page.keyboard.press("Escape")
    sync.expect(title).to_have_text("Loop by loop")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('.again') !== null"), "one stop of Tab for all tokens"


def test_a_trace_that_fails_is_told_and_asked_again(page: sync.Page, fake: Fake) -> None:
    answered(page)
    fake.failure = (500, "no trace today", {})
    page.locator(".token").first.hover()
    sync.expect(panel(page)).to_contain_text("The server failed: no trace today")
    panel(page).get_by_role("button", name="Try again").click()
    sync.expect(panel(page)).to_contain_text("Entropy")


@pytest.mark.parametrize(
    ("failure", "said"),
    [
        ((400, "loops is 99: at most 24", {}), "The server refuses this: loops is 99: at most 24"),
        ((429, "8 requests wait", {"Retry-After": "3"}), "The server is busy: 8 requests wait. Try again in 3 s."),
        ((503, "draining", {"Retry-After": "30"}), "takes no more requests: draining. Try again in 30 s."),
    ],
)
def test_errors_are_told_in_words(
    page: sync.Page, fake: Fake, failure: tuple[int, str, dict[str, str]], said: str
) -> None:
    fake.failure = failure
    send(page)
    sync.expect(page.get_by_role("alert")).to_contain_text(said)
    sync.expect(page.locator(".answer")).to_have_count(0)
    answered(page)
    sync.expect(page.get_by_role("alert")).to_have_count(0)


def test_what_breaks_off_is_told_and_its_beginning_stays(page: sync.Page, fake: Fake) -> None:
    fake.breaks_at = 2
    send(page)
    sync.expect(page.get_by_role("alert")).to_have_text("The answer broke off: out of memory")
    sync.expect(page.locator(".token")).to_have_text(["def", " area", "("])
    sync.expect(page.locator(".facts")).to_contain_text("3 tokens")
    sync.expect(page.locator(".facts")).to_contain_text("broken off")


def test_a_key_is_asked_for_and_kept_in_memory_only(page: sync.Page, fake: Fake) -> None:
    fake.key = "secret"
    page.reload()
    sync.expect(page.get_by_role("alert")).to_contain_text("wants a key: this key is not known")
    page.get_by_label("API key").fill("wrong")
    page.keyboard.press("Enter")
    sync.expect(page.get_by_label("API key")).to_be_focused()
    page.get_by_label("API key").fill("secret")
    page.keyboard.press("Enter")
    sync.expect(page.locator("#name")).to_contain_text("made-up")
    sync.expect(page.get_by_label("API key")).to_be_hidden()
    answered(page)
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]


def test_markup_stays_text(page: sync.Page, fake: Fake) -> None:
    evil = '<img src=x onerror="document.title=1"><script>document.title=2</script>'
    fake.words = (evil, "<b>bold</b>")
    answered(page, evil)
    page.locator(".token").first.hover()
    sync.expect(panel(page).locator("tbody tr")).to_have_count(1)
    assert evil in page.locator(".token").first.inner_text()
    assert evil in panel(page).locator("code").first.inner_text()
    made = page.locator("main :is(img, b, script)")
    assert (made.count(), page.title()) == (0, "Ritornello playground")
    page.locator(".facts").evaluate("(facts, evil) => { facts.innerHTML = evil }", evil)
    assert made.count() == 2, "markup that is parsed is seen"


def test_a_conversation_goes_on(page: sync.Page, fake: Fake) -> None:
    fake.chat, fake.words = True, ("Hi", "!")
    page.reload()
    answered(page, "Hello?")
    sync.expect(page.get_by_label("Message")).to_have_value("")
    answered(page, "And?")
    sync.expect(page.locator(".turn")).to_have_count(2)
    before = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi!"}]
    assert fake.sent("/v1/chat/completions")[-1]["messages"] == [*before, {"role": "user", "content": "And?"}]
    fake.failure = (429, "full", {})
    send(page, "Lost?")
    sync.expect(page.get_by_label("Message")).to_have_value("Lost?")  # what failed is given back
    page.get_by_role("button", name="New conversation").click()
    answered(page, "Hello again?")
    assert len(fake.sent("/v1/chat/completions")[-1]["messages"]) == 1


def test_a_plain_model_has_no_depth(page: sync.Page, fake: Fake) -> None:
    fake.looped = False
    page.reload()
    sync.expect(page.get_by_label("Loops, at most")).to_be_disabled()
    answered(page)
    assert not {"loops", "exit"} & fake.sent("/v1/completions")[0].keys()
    sync.expect(page.locator(".facts")).not_to_contain_text("loops")


@pytest.mark.parametrize("chat", [False, True])
def test_our_own_server_takes_what_the_page_sends(tab: sync.Page, chat: bool) -> None:
    with running(small(chat=chat)) as server:
        tab.goto(server.url)
        tab.get_by_label("Exit rule").select_option("kl")
        tab.get_by_label("Threshold").fill("0.001")
        tab.get_by_label("Max tokens").fill("12")
        tab.get_by_label("Seed").fill("3")
        answered(tab, "hello")
        ask = {"max_tokens": 12, "seed": 3, "temperature": 0.7, "exit": "kl", "exit_threshold": 0.001}
        asked = {"messages": [{"role": "user", "content": "hello"}]} if chat else {"prompt": "hello"}
        told = server.post("chat/completions" if chat else "completions", **ask, **asked).json()
        text = told["choices"][0]["message"]["content"] if chat else told["choices"][0]["text"]
        usage = told["usage"]
        mean = f"{usage['completion_tokens']} tokens, {usage['loops']['mean']:.1f} loops in the mean"
        sync.expect(tab.locator(".facts")).to_contain_text(mean)
        assert "".join(tab.locator(".token").evaluate_all("all => all.map(token => token.textContent)")) == text
        tab.locator(".token").first.hover()
        sync.expect(panel(tab)).to_contain_text("Entropy")
        tab.goto("about:blank")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(page: sync.Page, fake: Fake, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    answered(page)
    page.locator(".token").nth(8).hover()
    sync.expect(panel(page)).to_contain_text("Entropy")
    assert violations(page) == []
    page.locator("#prompt").evaluate("field => field.closest('label').replaceWith(field)")
    assert violations(page, "label"), "a field without its label is seen"


def test_it_fits_a_phone(page: sync.Page, fake: Fake) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    answered(page)
    page.locator(".token").nth(8).evaluate("token => token.scrollIntoView({block: 'end'})")
    page.locator(".token").nth(7).hover()
    sync.expect(panel(page)).to_be_hidden()  # it would open over what is pointed at
    page.locator(".token").nth(8).click()
    sync.expect(panel(page)).to_contain_text("Entropy")
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    token, below = page.locator(".token").nth(8).bounding_box(), panel(page).bounding_box()
    assert token and below and token["y"] + token["height"] <= below["y"], "the panel does not cover its token"
    panel(page).get_by_role("button", name="Close").click()
    sync.expect(panel(page)).to_be_hidden()
