"""The chat page in Chromium, against a small real server that speaks the HTTP interface and gives canned answers."""

import asyncio
import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from contrasts import CONTRASTS
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from playwright.sync_api import Browser, BrowserContext, Locator, Page, expect

import stages.serving

PAGE = (Path(stages.serving.__file__).parent / "page.html").read_text(encoding="utf-8")
expect.set_options(timeout=20_000)  # for a machine with much else to do
KEY = "a-key-for-tests"
HOSTILE = (
    "<img src=x onerror=\"document.title='taken over'\"><script>document.title='taken over'</script> & <b>bold</b> <|im_end|>"
)
TEXT = f"""🙂🙂 Ports are numbers.
{HOSTILE}

The server listens on port
5000. Change it with `serve.port`.

```
make serve
```
"""
QUOTE = "The server listens on port 5000."
AT = TEXT.index("The server")
TRAINED = {
    "kind": "trained",
    "passage_id": "p1",
    "path": "serving.md",
    "heading_path": ["Serving", "The HTTP server"],
    "start": 100 + AT,
    "end": 100 + AT + len(QUOTE),
    "quote": QUOTE,
    "similarity": 0.914,
}
RETRIEVED = {**TRAINED, "kind": "retrieved", "heading_path": ["Serving", HOSTILE], "quote": "make serve", "similarity": 0.47}
MARKDOWN = """Run `make serve` to **start the server**, *once*. It is documented [here](https://docs.example/serving), at https://docs.example/a_b.

1. Open `params.yaml`
2. Set the port
   - any free one
   - or 0

- one
- two

### Then

> It listens on loopback.

```yaml
serve:
  port: 5000  # **not bold**
```

| a | b |
|---|---|
"""
BAD_LINKS = "[run](javascript:document.title=1) [page](data:text/html,x) [file](file:///etc/passwd) [near](serving.md) [as](https://bank.example@other.example) ![picture](https://other.example/x.png)"
DONE = {"id": "a1", "model": "docsmith/3", "sources": [TRAINED], "covered": True}


def event(name: str, **data: object) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"


def deltas(text: str) -> list[str]:
    return [event("delta", text=piece) for piece in re.findall(r"\s*\S+\s*", text)]


# question -> the canned events of its answer; None: the answer waits there until the test lets it go on
SCRIPTS: dict[str, list[str | None]] = {
    "port?": [*deltas("It listens on port 5000."), event("done", **DONE | {"sources": [TRAINED, RETRIEVED]})],
    "slow?": [*deltas("The first half,"), None, *deltas(" the second half."), event("done", **DONE)],
    "markdown?": [*deltas(MARKDOWN), event("done", **DONE)],
    "hostile?": [*deltas(HOSTILE + "\n\n" + BAD_LINKS + "\n\n```\n" + HOSTILE), event("done", **DONE | {"model": HOSTILE})],
    "weather?": [*deltas("It will rain."), event("done", **DONE | {"sources": [], "covered": False})],
    "breaks?": [*deltas("It begins"), event("error", error="the engine ended", retry_after_s=2)],
    "ends?": deltas("It begins"),
    "wide?": [*deltas("x" * 400 + "\n\n```\n" + "y" * 400 + "\n```\n| " + "z | " * 200), event("done", **DONE)],
}
FAILURES = {"many?": (429, "2"), "busy?": (503, "1"), "long?": (413, ""), "fails?": (500, ""), "odd?": (422, "")}


class Canned:
    """What the server was asked, and what it waits for."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.feedback: list[dict[str, Any]] = []
        self.left: list[str] = []  # questions whose readers went away
        self.goes_on = threading.Event()
        self.key = ""
        self.fails = True

    def application(self) -> FastAPI:
        app = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
        hashes = {
            name: base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
            for name in ("script", "style")
            if (found := re.search(f"<{name}>(.*?)</{name}>", PAGE, re.DOTALL))
        }
        policy = (
            f"default-src 'none'; script-src 'sha256-{hashes['script']}'; style-src 'sha256-{hashes['style']}'; "
            "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )

        @app.middleware("http")
        async def only_with_the_key(request: Request, call_next: Any) -> Response:
            if self.key and request.url.path != "/" and request.headers.get("authorization") != f"Bearer {self.key}":
                return JSONResponse({"error": "no key"}, 401)
            return await call_next(request)

        @app.get("/")
        async def page() -> HTMLResponse:
            return HTMLResponse(PAGE, headers={"Content-Security-Policy": policy})

        @app.post("/chat")
        async def chat(request: Request) -> Response:
            body = await request.json()
            self.asked.append(body)
            question = body["question"]
            if question in FAILURES and self.fails:
                status, wait_s = FAILURES[question]
                return JSONResponse({"error": "words of the server"}, status, headers={"Retry-After": wait_s} if wait_s else {})
            script = SCRIPTS.get(question, SCRIPTS["port?"])
            return StreamingResponse(self.pieces(question, script, request), media_type="text/event-stream")

        @app.get("/passages/{id}")
        async def passage(id: str) -> JSONResponse:
            if id != "p1":
                return JSONResponse({"error": "no such passage"}, 404)
            values = {
                "id": id,
                "path": "serving.md",
                "heading_path": ["Serving"],
                "start": 100,
                "end": 100 + len(TEXT),
                "text": TEXT,
            }
            return JSONResponse(values)

        @app.post("/feedback")
        async def feedback(request: Request) -> Response:
            body = await request.json()
            if body["answer_id"] != "a1":
                return JSONResponse({"error": "no such answer"}, 404)
            self.feedback.append(body)
            return Response(status_code=204)

        return app

    async def pieces(self, question: str, script: list[str | None], request: Request) -> AsyncIterator[bytes]:
        try:
            for piece in script:
                while piece is None and not self.goes_on.is_set():
                    await asyncio.sleep(0.01)
                if piece:
                    yield piece.encode()
        except asyncio.CancelledError:
            self.left.append(question)
            raise


@contextlib.contextmanager
def serving(app: Any) -> Iterator[str]:
    """The address of a server with `app`, in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[Canned, str]]:
    canned = Canned()
    with serving(canned.application()) as address:
        yield canned, address


@pytest.fixture
def canned(running: tuple[Canned, str]) -> Canned:
    """The server's memory, empty."""
    running[0].goes_on.set()  # for an answer that a test before left waiting
    running[0].__init__()  # type: ignore[misc]
    return running[0]


@pytest.fixture
def address(running: tuple[Canned, str]) -> str:
    return running[1]


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    with contextlib.closing(browser.new_context(viewport={"width": 1280, "height": 800}, color_scheme="light")) as context:
        yield context


@pytest.fixture
def page(context: BrowserContext, canned: Canned, address: str) -> Iterator[Page]:
    """The page as it opens. It must not raise an error, break its own policy or ask another server."""
    page = context.new_page()
    faults: list[str] = []
    asked: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda line: faults.append(line.text) if "Failed to load resource" not in line.text else None)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    yield page
    canned.goes_on.set()
    assert faults == []
    assert {url for url in asked if not url.startswith((f"{address}/", "data:"))} == set() != set(asked)


def ask(page: Page, question: str) -> Locator:
    """The answer to `question`, which has perhaps only begun."""
    page.get_by_role("textbox", name="Your question").fill(question)
    page.keyboard.press("Enter")
    return page.locator("article").last


def answered(page: Page, question: str) -> Locator:
    """The whole answer to `question`."""
    answer = ask(page, question)
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    return answer


def alert(answer: Locator) -> Locator:
    return answer.get_by_role("alert")


# ---- a conversation


def test_an_answer_is_read_while_it_is_written(page: Page, canned: Canned) -> None:
    answer = ask(page, "slow?")
    expect(answer).to_contain_text("The first half,")
    expect(answer).not_to_contain_text("second")
    expect(answer.get_by_role("button", name="Copy")).to_be_hidden()
    canned.goes_on.set()
    expect(answer.locator(".text")).to_have_text("The first half, the second half.")
    expect(answer.get_by_role("button", name="Copy")).to_be_visible()
    expect(answer).to_contain_text("Model docsmith/3")
    expect(page.locator("#status")).to_contain_text("The first half, the second half.")
    assert canned.asked == [{"question": "slow?", "history": [], "stream": True}]


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_events_may_arrive_in_any_pieces(page: Page, line_end: str) -> None:
    stream = ": still here\n\n" + event("delta", text="Grüße 🙂 ") + event("delta", text="und Ende.") + event("done", **DONE)
    pieces = [[byte] for byte in stream.replace("\n", line_end).encode()]
    page.evaluate(
        """pieces => { window.fetch = async () => new Response(new ReadableStream({ async start(control) {
            for (const piece of pieces) { control.enqueue(new Uint8Array(piece)); await null; }
            control.close(); } })); }""",
        pieces,
    )
    expect(answered(page, "greet").locator(".text")).to_have_text("Grüße 🙂 und Ende.")
    expect(page.locator("article")).to_contain_text("Trained evidence")


def test_a_question_goes_with_the_conversation_and_a_new_one_forgets_it(page: Page, canned: Canned) -> None:
    answered(page, "port?")
    answered(page, "and then?")
    said = [{"role": "user", "content": "port?"}, {"role": "assistant", "content": "It listens on port 5000."}]
    assert canned.asked[1]["history"] == said
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator("article")).to_have_count(0)
    expect(page.get_by_role("heading", name="Ask the documentation")).to_be_visible()
    expect(page.get_by_role("textbox", name="Your question")).to_be_focused()
    answered(page, "port?")
    assert canned.asked[2]["history"] == []


def test_a_long_conversation_is_cut_at_its_old_end(page: Page, canned: Canned) -> None:
    for number in range(12):
        answered(page, f"question {number}")
    assert [one["content"] for one in canned.asked[-1]["history"][::2]] == [f"question {number}" for number in range(1, 11)]
    for letter in "wxyz":
        answered(page, letter * 3900)
    answered(page, "last")
    assert [one["content"][:1] for one in canned.asked[-1]["history"][::2]] == ["x", "y", "z"]


@pytest.mark.parametrize("how", ["button", "Escape", "new"])
def test_an_answer_is_stopped_and_the_server_is_told(page: Page, canned: Canned, how: str) -> None:
    answer = ask(page, "slow?")
    expect(answer).to_contain_text("The first half,")
    if how == "button":
        page.get_by_role("button", name="Stop").click()
    elif how == "new":
        page.get_by_role("button", name="New conversation").click()
    else:
        page.keyboard.press("Escape")
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    for _ in range(100):
        if canned.left:
            break
        page.wait_for_timeout(20)
    assert canned.left == ["slow?"]
    if how == "new":
        expect(page.locator("article")).to_have_count(0)
    else:
        expect(answer).to_contain_text("You stopped this answer.")
        answered(page, "port?")
        assert canned.asked[1]["history"][1]["content"] == "The first half,"


# ---- what an answer shows


def test_markdown_is_rendered(page: Page) -> None:
    text = answered(page, "markdown?").locator(".text")
    expect(text.locator("strong")).to_have_text("start the server")
    expect(text.locator("em")).to_have_text("once")
    expect(text.locator("p code")).to_have_text(["make serve", "params.yaml"])
    expect(text.locator("> ol > li")).to_contain_text(["Open params.yaml", "Set the port"])
    expect(text.locator("> ol > li > ul > li")).to_have_text(["any free one", "or 0"])
    expect(text.locator("> ul > li")).to_have_text(["one", "two"])
    expect(text.locator("h3")).to_have_text("Then")
    expect(text.locator("blockquote")).to_have_text("It listens on loopback.")
    expect(text.locator("pre").first).to_have_text("serve:\n  port: 5000  # **not bold**")
    expect(text.locator("pre").last).to_contain_text("| a | b |")
    links = text.locator("a")
    assert [link.get_attribute("href") for link in links.all()] == ["https://docs.example/serving", "https://docs.example/a_b"]
    assert {link.get_attribute("rel") for link in links.all()} == {"noopener noreferrer"}


def test_odd_markdown_ends_as_text_at_once(page: Page) -> None:
    shown = {
        "a\\*b\\* **c*": "a*b* **c*",
        "snake_case and __init__ and 2 * 3 * 4": "snake_case and __init__ and 2 * 3 * 4",
        "``a ` b`` `": "a ` b `",
        "on port\n5000. Then": "on port\n5000. Then",
        "1. a\n\n   b\n\n2. c\n\nd": "abcd",
        "~~~\nopen": "openCopy",
        "> " * 9 + "deep": "> " * 5 + "deep",
    }
    rendered = page.evaluate("texts => texts.map(text => markdown(text).textContent)", list(shown))
    assert rendered == list(shown.values())
    long = [
        "> " * 3000,
        "- " * 3000,
        "[" * 5000 + "](" * 5000,
        "a" + "`" * 20000 + "*" * 20000,
        "a" + "` ``" * 5000,
        "a" + "** *" * 5000,
    ]
    took_ms = page.evaluate(
        "texts => { const from = performance.now(); texts.map(one => markdown(one + 'x')); return performance.now() - from; }",
        long,
    )
    assert took_ms < 3000


def test_markup_in_an_answer_is_seen_as_text_and_only_web_links_are_links(page: Page) -> None:
    answer = answered(page, "hostile?")
    expect(answer.locator(".text > p").first).to_have_text(HOSTILE)
    expect(answer.locator("pre")).to_have_text(HOSTILE)
    expect(answer.locator(".tools span")).to_have_text(f"Model {HOSTILE}")
    expect(answer.locator(".text > p").last).to_have_text("run page file near as picture")
    assert [link.get_attribute("href") for link in answer.locator("a").all()] == ["https://other.example/x.png"]
    asked = ask(page, HOSTILE)
    expect(page.locator(".asked").last).to_contain_text(HOSTILE)
    expect(asked.locator("b").nth(1)).to_have_text(HOSTILE)
    assert page.locator("img, .text b, main script").count() == 0
    assert page.title() == "Docsmith"


def test_a_script_that_gets_into_the_page_does_not_run(context: BrowserContext, canned: Canned, address: str) -> None:
    page = context.new_page()
    page.goto(address)
    page.evaluate("""() => {
        document.body.insertAdjacentHTML("beforeend", `<img src=x onerror="document.title = 'taken over'">`);
        const script = document.createElement("script");
        script.textContent = "document.title = 'taken over'";
        document.body.append(script);
    }""")
    page.wait_for_timeout(200)
    assert page.title() == "Docsmith"


def test_sources_are_labelled_and_open_their_paragraph_with_the_quote_marked(page: Page) -> None:
    answer = answered(page, "port?")
    sources = answer.get_by_role("list").get_by_role("button")
    expect(sources.first).to_have_text(f"The HTTP server{QUOTE}Trained evidencevery close to your question (0.91)serving.md")
    expect(sources.last).to_contain_text("Retrieved sectionloosely related to your question (0.47)")
    sources.first.click()
    dialog = page.get_by_role("dialog", name="Serving › The HTTP server")
    expect(dialog.locator("p mark")).to_have_text(QUOTE)
    expect(dialog.locator("p code")).to_have_text("serve.port")
    expect(dialog.locator("mark")).to_be_in_viewport()
    expect(dialog).to_contain_text(HOSTILE)  # the rest of the paragraph, as text
    expect(dialog).to_contain_text(f"serving.md, characters 100 to {100 + len(TEXT)}")
    page.keyboard.press("Escape")
    expect(dialog).to_be_hidden()
    expect(sources.first).to_be_focused()
    sources.last.click()
    expect(page.locator("mark")).to_have_text("make serve")
    page.get_by_role("button", name="Close", exact=True).click()
    expect(page.locator("#passage")).to_be_hidden()
    assert page.locator("img").count() == 0


def test_sources_do_not_push_the_beginning_of_their_answer_out_of_sight(page: Page) -> None:
    page.set_viewport_size({"width": 360, "height": 500})
    answered(page, "port?")
    answered(page, "port?")
    expect(page.locator(".asked").last).to_be_in_viewport(ratio=1)
    expect(page.locator("article").last.get_by_role("button", name="The HTTP server").first).to_be_in_viewport()


def test_of_a_quote_that_stands_twice_the_place_that_is_meant_is_marked(page: Page) -> None:
    marked = """([text, quote, share]) => {
        const made = element("div", markdown(text));
        mark_quote(made, quote, share);
        return made.innerHTML.replaceAll(/<button.*?<\\/button>/g, "");
    }"""
    twice = "🙂 `one` two.\n\n🙂 `one`\ntwo. Three."
    first, second = "<p>🙂 <code>one</code> two.</p>", "<p>🙂 <code>one</code>\ntwo. Three.</p>"
    quoted = "<code><mark>one</mark></code><mark> two.</mark>"
    assert page.evaluate(marked, [twice, "`one` two.", 0.1]) == first.replace("<code>one</code> two.", quoted) + second
    quoted = "<code><mark>one</mark></code><mark>\ntwo.</mark>"
    assert page.evaluate(marked, [twice, "`one` two.", 0.6]) == first + second.replace("<code>one</code>\ntwo.", quoted)
    over_paragraphs = page.evaluate(marked, ["# A\n\nb\n\n```\nc\n```", "A\n\nb\n```\nc\n```", 0])
    assert over_paragraphs.count("<mark>") == 3
    absent = page.evaluate(marked, ["some text", "no *such* words", 0.5])
    assert absent == "<blockquote><mark>no *such* words</mark></blockquote><p>some text</p>"


def test_a_passage_that_is_gone_is_told(page: Page) -> None:
    page.evaluate("source => { show_passage(source); }", {**TRAINED, "passage_id": "../p2"})
    expect(page.get_by_role("dialog")).to_contain_text("The server refused this (status 404)")


def test_a_question_that_the_documentation_does_not_cover_says_so(page: Page) -> None:
    line = "The documentation does not seem to cover this."
    expect(answered(page, "port?").get_by_text(line)).to_be_hidden()
    answer = answered(page, "weather?")
    expect(answer.get_by_text(line)).to_be_visible()
    expect(answer.get_by_role("region", name="Sources")).to_be_hidden()
    expect(page.locator("#status")).to_contain_text(line)


def test_an_answer_and_its_code_are_copied_as_written(context: BrowserContext, page: Page) -> None:
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    answer = answered(page, "markdown?")
    for name, text in (("Copy", MARKDOWN), ("Copy this code", "serve:\n  port: 5000  # **not bold**")):
        button = answer.get_by_role("button", name=name, exact=True)
        button.click()
        expect(page.get_by_text("Copied").first).to_be_visible()
        assert page.evaluate("() => navigator.clipboard.readText()") == text


# ---- feedback


def test_a_rating_goes_alone_and_texts_only_after_consent(page: Page, canned: Canned) -> None:
    answer = answered(page, "port?")
    answer.get_by_role("button", name="Bad answer").click()
    consent = answer.get_by_role("checkbox")
    expect(consent).not_to_be_checked()
    rated = {"answer_id": "a1", "rating": "down", "comment": "", "question": None, "answer": None}
    assert canned.feedback == [rated]
    answer.get_by_role("textbox").fill(" The port is wrong. ")
    answer.get_by_role("button", name="Send feedback").click()
    expect(answer.get_by_role("status")).to_have_text("Thank you. Saved: your rating, your comment.")
    expect(answer.get_by_role("button", name="Bad answer")).to_be_focused()
    assert canned.feedback[1:] == [{**rated, "comment": "The port is wrong."}]
    answer.get_by_role("button", name="Good answer").click()
    expect(answer.get_by_role("button", name="Good answer")).to_have_attribute("aria-pressed", "true")
    expect(answer.get_by_role("button", name="Bad answer")).to_have_attribute("aria-pressed", "false")
    expect(consent).not_to_be_checked()
    answer.get_by_text("Send my question and this answer along").click()
    answer.get_by_role("button", name="Send feedback").click()
    expect(answer.get_by_role("status")).to_contain_text("your question and this answer")
    texts = {"question": "port?", "answer": "It listens on port 5000."}
    assert canned.feedback[-1] == {**rated, "rating": "up", "comment": "The port is wrong.", **texts}


def test_a_rating_that_cannot_be_saved_is_told_and_not_shown_as_given(page: Page) -> None:
    answer = answered(page, "port?")
    page.evaluate("() => { turns[0].id = 'another'; }")
    answer.get_by_role("button", name="Good answer").click()
    expect(answer.get_by_role("status")).to_have_text("This answer is too old to be rated.")
    expect(answer.get_by_role("button", name="Good answer")).to_have_attribute("aria-pressed", "false")


# ---- faults


def test_a_busy_server_is_asked_again_after_the_time_it_names(page: Page, canned: Canned) -> None:
    answer = ask(page, "many?")
    expect(alert(answer)).to_have_text("You have asked many questions in a short time.")
    again = answer.get_by_role("button", name="Try again")
    expect(again).to_be_disabled()
    expect(again).to_have_text(re.compile("Try again in [12] s"))
    canned.fails = False
    expect(again).to_have_text("Try again")
    again.click()
    expect(answer.locator(".text")).to_have_text("It listens on port 5000.")
    expect(alert(answer)).to_be_hidden()
    assert [one["question"] for one in canned.asked] == ["many?", "many?"]
    assert canned.asked[1]["history"] == []


def test_each_fault_is_told_in_words_and_the_next_question_goes_on(page: Page, canned: Canned) -> None:
    for question, line, can_retry in (
        ("busy?", "The server is busy, or its model is being restarted.", True),
        ("long?", "This question is too long for the model. Ask it more briefly.", False),
        ("fails?", "The server failed (status 500).", True),
        ("odd?", "The server refused this (status 422): words of the server", True),
        ("ends?", "The connection broke before the answer was complete.", True),
    ):
        answer = ask(page, question)
        expect(alert(answer)).to_have_text(line)
        expect(answer.get_by_role("button", name="Try again")).to_be_visible(visible=can_retry)
    expect(answered(page, "port?").locator(".text")).to_have_text("It listens on port 5000.")
    assert [one["content"] for one in canned.asked[-1]["history"]] == ["ends?", "It begins"]


def test_an_engine_that_fails_in_mid_answer_leaves_what_it_said_and_can_be_asked_again(page: Page, canned: Canned) -> None:
    answer = ask(page, "breaks?")
    expect(alert(answer)).to_have_text("The model stopped in the middle of this answer.")
    expect(answer.locator(".text")).to_have_text("It begins")
    expect(answer.get_by_role("button", name="Good answer")).to_be_hidden()
    again = answer.get_by_role("button", name="Try again")
    expect(again).to_have_text("Try again")
    again.click()
    expect(alert(answer)).to_have_text("The model stopped in the middle of this answer.")
    assert len(canned.asked) == 2 and len(page.get_by_role("article").all()) == 1


def test_a_server_that_is_gone_is_told(context: BrowserContext) -> None:
    page = context.new_page()
    with serving(Canned().application()) as address:
        page.goto(address)
    expect(alert(ask(page, "port?"))).to_have_text(
        "The server cannot be reached. Check that it is running and that you are connected."
    )


def test_a_key_is_asked_for_kept_in_the_tab_and_sent(page: Page, canned: Canned) -> None:
    canned.key = KEY
    answer = ask(page, "port?")
    dialog = page.get_by_role("dialog", name="This server asks for a key")
    key = dialog.get_by_label("Key")
    key.fill("wrong")
    page.keyboard.press("Enter")
    expect(dialog.get_by_role("alert")).to_have_text("The server did not accept this key.")
    key.fill(KEY)
    page.keyboard.press("Enter")
    expect(answer.locator(".text")).to_have_text("It listens on port 5000.")
    assert page.evaluate("() => [Object.values(sessionStorage), Object.values(localStorage)]") == [[KEY], []]
    page.reload()
    answer = answered(page, "port?")
    answer.get_by_role("list").get_by_role("button").first.click()
    expect(page.locator("mark")).to_have_text(QUOTE)
    page.keyboard.press("Escape")
    answer.get_by_role("button", name="Good answer").click()
    expect(answer.get_by_role("status")).to_contain_text("your rating is saved")
    assert len(canned.asked) == 2 and len(canned.feedback) == 1


def test_without_a_key_the_question_stays_to_be_asked_again(page: Page, canned: Canned) -> None:
    canned.key = KEY
    answer = ask(page, "port?")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(alert(answer)).to_have_text("This server answers only with a key.")
    answer.get_by_role("button", name="Try again").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    expect(alert(answer)).to_have_text("This server answers only with a key.")
    assert canned.asked == []


# ---- looks and keys


def test_the_keyboard_sends_starts_a_line_and_reaches_everything_in_order(page: Page, canned: Canned) -> None:
    field = page.get_by_role("textbox", name="Your question")
    expect(field).to_be_focused()
    page.keyboard.press("Enter")  # nothing to send
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    assert [one["question"] for one in canned.asked] == ["one\ntwo"]
    expect(field).to_be_focused()
    expect(field).to_have_value("")
    page.keyboard.press("Tab")
    order = [page.evaluate("() => document.activeElement.textContent.trim()")]
    field.focus()
    while len(order) < 20:
        page.keyboard.press("Shift+Tab")
        name = page.evaluate(
            "() => { const one = document.activeElement; return one.getAttribute('aria-label') ?? one.textContent.trim(); }"
        )
        order.insert(0, name[:15])
        if name == "New conversation":
            break
    what = [
        "New conversatio",
        "Dark mode",
        "The HTTP server",
        HOSTILE[:15],
        "What do these l",
        "Copy",
        "Good answer",
        "Bad answer",
        "Send",
    ]
    assert [name for name in order if name != ""] == what
    page.locator("summary").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_text("does not prove")).to_be_visible()


def test_enter_while_an_answer_is_written_sends_nothing_and_keeps_what_was_typed(page: Page, canned: Canned) -> None:
    ask(page, "slow?")
    field = page.get_by_role("textbox", name="Your question")
    field.fill("port?")
    page.keyboard.press("Enter")
    page.wait_for_timeout(100)
    expect(field).to_have_value("port?")
    canned.goes_on.set()
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_visible()
    assert len(canned.asked) == 1


def test_a_theme_is_the_systems_until_one_is_chosen_and_the_choice_stays(page: Page) -> None:
    ground = "() => getComputedStyle(document.body).backgroundColor"
    button = page.get_by_role("button", name="Dark mode")
    light = page.evaluate(ground)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(ground)
    assert (light, dark) == ("rgb(255, 255, 255)", "rgb(18, 22, 27)")
    expect(button).to_have_attribute("aria-pressed", "true")
    button.click()
    assert page.evaluate(ground) == light
    page.reload()
    assert page.evaluate(ground) == light
    expect(button).to_have_attribute("aria-pressed", "false")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_nothing_is_cut_off_and_texts_stand_out_from_their_ground(
    browser: Browser, canned: Canned, address: str, width: int, scheme: Any
) -> None:
    with contextlib.closing(browser.new_context(viewport={"width": width, "height": 700}, color_scheme=scheme)) as context:
        page = context.new_page()
        page.goto(address)
        contrasts = page.evaluate(CONTRASTS)
        answered(page, "port?").get_by_role("button", name="Bad answer").click()
        for question in ("wide?", "markdown?", "weather?", "fails?"):
            answered(page, question)
        assert (
            page.evaluate("() => [document.documentElement.scrollWidth, document.querySelector('main').scrollWidth]")[0] <= width
        )
        assert page.evaluate("() => document.querySelector('main').scrollWidth - document.querySelector('main').clientWidth") == 0
        expect(page.get_by_role("textbox", name="Your question")).to_be_in_viewport(ratio=1)
        expect(page.get_by_role("button", name="Send", exact=True)).to_be_in_viewport(ratio=1)
        expect(page.get_by_role("button", name="New conversation")).to_be_in_viewport(ratio=1)
        contrasts |= page.evaluate(CONTRASTS)
        page.locator(".sources li button").first.click()
        expect(page.locator("mark")).to_be_in_viewport()
        expect(page.get_by_role("button", name="Close", exact=True)).to_be_in_viewport(ratio=1)
        widths = page.locator("#paragraph").evaluate("one => [...one.children].map(part => part.clientWidth / one.clientWidth)")
        assert min(widths) > 0.8 and max(widths) <= 1  # paragraphs below each other, none beside another
        contrasts |= page.evaluate(CONTRASTS)
        assert len(contrasts) > 40
        assert {text: ratio for text, ratio in contrasts.items() if ratio < 4.5} == {}  # WCAG 2.2, 1.4.3


def test_every_field_and_button_has_a_name(page: Page) -> None:
    answered(page, "port?")
    nameless = """() => [...document.querySelectorAll("input, textarea, button")]
        .filter(one => !(one.getAttribute("aria-label") || (one.labels?.[0] ?? one).textContent.trim())).map(one => one.outerHTML)"""
    assert page.evaluate(nameless) == []
    assert page.evaluate("() => document.querySelectorAll('input, textarea, button').length") >= 15
    ids = page.evaluate("() => [...document.querySelectorAll('[id]')].map(one => one.id)")
    assert len(ids) == len(set(ids)) > 12
    assert page.locator("html").get_attribute("lang") == "en"
    assert page.locator("h1, main, header").count() == 3


def test_the_page_is_one_file_with_one_script_and_one_style_and_no_handlers_in_its_markup() -> None:
    markup = re.sub(r"<(script|style)>.*?</\1>", r"<\1>", PAGE, flags=re.DOTALL)
    assert (markup.count("<script>"), markup.count("<style>")) == (1, 1)
    assert re.findall(r"<(?:script|style|img|iframe|object|embed)\b[^>]+>|\s(?:on\w+|style|src|href)=(?!\"data:)", markup) == []
    assert "innerHTML" not in PAGE and "url(" not in PAGE and "@import" not in PAGE
