"""HTML as Markdown: the main content, without navigation and without what a browser would not show."""

import re
from collections import Counter
from typing import Any

from bs4 import BeautifulSoup, Comment, Tag
from bs4.dammit import EncodingDetector
from markdownify import ATX, MarkdownConverter

UNSEEN = ["script", "style", "noscript", "svg", "iframe", "object", "nav", "footer", "dialog", "button"]
STYLES = {  # by which an element that stands in a page is not seen there
    "invisible-element": r"display\s*:\s*none|visibility\s*:\s*(?:hidden|collapse)|opacity\s*:\s*0?\.?0+(?![\d.])",
    "tiny-text": r"font-size\s*:\s*(?:0*\.?0+(?![\d.])|(?:0?\.\d+|1(?:\.\d+)?)(?:px|pt)\b)|transform\s*:[^;]*scale\(\s*0?\.?0+\s*[,)]",
    "off-screen": r"(?:left|right|top|bottom|text-indent|margin(?:-\w+)?)\s*:\s*-\d{3,}|(?:left|top)\s*:\s*\d{4,}px"
    r"|translate\w*\([^;]*-\d{3,}|clip\s*:\s*rect\(\s*(?:0|1)(?:px)?\b|clip-path\s*:\s*inset\(\s*(?:50|100)%",
}
NOT_SEEN = {kind: re.compile(rf"(?<![\w-])(?:{styles})", re.IGNORECASE) for kind, styles in STYLES.items()}
COLOUR = re.compile(r"(?<![\w-])(color|background(?:-color)?)\s*:\s*(#[0-9a-f]{3,8}\b|rgba?\([^)]*\)|[a-z]+)", re.IGNORECASE)
WHITE = {"white", "#fff", "#ffff", "#ffffff", "#ffffffff", "rgb(255,255,255)", "rgba(255,255,255,1)", "hsl(0,0%,100%)"}
COMMENT = re.compile(
    r"^ {0,3}<!--.*?(?:-->|\Z)|<!--.*?-->", re.MULTILINE | re.DOTALL
)  # at a line's start, one without end hides the rest
MAY_HIDE = re.compile(r"<([a-zA-Z][\w-]*)\b(?:[^<>]*?\s(?:hidden|style|color)\b[^<>]*)>|<(template)>")
INLINE_CODE = re.compile(r"(?<!`)(`+)(?!`)(?:(?!\n[ \t]*\n).)+?(?<!`)\1(?!`)", re.DOTALL)
LANGUAGE = re.compile(r"^(?:language-|lang-|highlight-(?:source-)?|sourceCode )([\w+#.-]+)$")


class ToMarkdown(MarkdownConverter):
    """markdownify with fences that hold any code, cells that hold bars, and no picture data."""

    def convert_pre(self, el: Any, text: str, parent_tags: Any) -> str:
        from stages.parsers.formats import fenced

        return f"\n\n{fenced(el.get_text(), language_of(el))}\n\n" if el.get_text().strip() else ""

    def convert_td(self, el: Any, text: str, parent_tags: Any) -> str:
        return super().convert_td(el, re.sub(r"(?<!\\)\|", r"\\|", text), parent_tags)  # type: ignore[misc]

    def convert_th(self, el: Any, text: str, parent_tags: Any) -> str:
        return super().convert_th(el, re.sub(r"(?<!\\)\|", r"\\|", text), parent_tags)  # type: ignore[misc]

    def convert_img(self, el: Any, text: str, parent_tags: Any) -> str:
        return (el.get("alt") or "").strip()


def language_of(block: Tag) -> str:
    """The language that a <pre>, its <code> or a wrapper around it names in a class; "" without one."""
    for element in [block, block.find("code"), block.parent, block.parent and block.parent.parent]:
        names: list[str] = list(element.get("class") or []) if isinstance(element, Tag) else []
        if len(names) == 3 and names[0] == "code" and names[2] == "literal-block":  # docutils
            return names[1]
        for name in names:
            found = LANGUAGE.match(name)
            if found and found[1] not in ("default", "none", "text", "plaintext"):
                return found[1]
    return ""


def declared_encoding(content: bytes) -> str:
    """The encoding that the page names for itself, "" without one."""
    return EncodingDetector.find_declared_encoding(content[:4096], is_html=True) or ""


def from_html(page: str, hidden: Counter[str]) -> str:
    """The Markdown of a page or fragment. A page without a first-level heading gets its <title>.

    The characters of text that a browser would not show are added to `hidden`, by kind. A page nested deeper than Python can follow
    gives its bare text.
    """
    soup = BeautifulSoup(page, "html.parser")
    title = " ".join(soup.title.get_text().split()) if soup.title else ""
    main = soup.select_one("main") or soup.select_one("[role=main]") or soup.select_one("article") or soup.body or soup
    for element in main.find_all(UNSEEN):
        element.decompose()
    for comment in main.find_all(string=lambda string: isinstance(string, Comment)):
        hidden["comment"] += len(comment.strip())
        comment.extract()
    for element in reversed(main.find_all(True)):  # inner ones first, so that no text is counted twice
        if kind := kind_of_hiding(element):
            hidden[kind] += len(element.get_text().strip())
            element.decompose()
    for ornament in main.select('[aria-hidden="true"]'):  # what a reader sees twice, as formulas, or as an icon
        ornament.decompose()
    for link in main.select("h1 a, h2 a, h3 a, h4 a, h5 a, h6 a, a.headerlink"):
        if link.get_text().strip() in ("¶", "#", "§", "🔗", ""):
            link.decompose()
    for span in main.select("span.docutils.literal"):
        span.name = "code"
    for table in main.find_all("table"):
        if code := table.find_all("pre"):  # line numbers beside code, set as a table
            table.replace_with(code[-1])
    try:
        text = ToMarkdown(
            heading_style=ATX, bullets="-", escape_asterisks=False, escape_underscores=False, table_infer_header=True
        ).convert_soup(main)
    except RecursionError:
        text = main.get_text("\n", strip=True)
    text = squeezed(text).strip("\n")
    return f"# {title}\n\n{text}" if title and text.strip() and not main.find("h1") else text


def kind_of_hiding(element: Tag) -> str:
    """By what a browser would not show the element, "" when it would: what people cannot see, a model must not learn.

    Styles of classes and of scripts are not known here.
    """
    if element.name == "template":
        return "template"
    if element.has_attr("hidden"):
        return "invisible-element"
    style = str(element.get("style", ""))
    if kind := next((kind for kind, styles in NOT_SEEN.items() if styles.search(style)), ""):
        return kind
    own = colours(element)
    return "same-colour" if "color" in own and own["color"] == ground(element) else ""


def colours(element: Tag) -> dict[str, str]:
    """The element's own `color` and `background`, in lower case; every white is "white"."""
    named = [(name.split("-")[0], value) for name, value in COLOUR.findall(str(element.get("style", "")))]
    named += [(name, str(element[key])) for name, key in (("color", "color"), ("background", "bgcolor")) if element.has_attr(key)]
    plain = {name.lower(): re.sub(r"\s", "", value).lower() for name, value in named}
    return {name: "white" if value in WHITE else value for name, value in plain.items()}


def ground(element: Tag) -> str:
    """The colour that the element stands on: the nearest background, white without one, "" where a class may set it."""
    for around in [element, *element.parents]:
        if background := colours(around).get("background"):
            return background
        if around.get("class") and around.name not in ("html", "body", "main", "article"):
            return ""
    return "white"


def shown(markdown: str, hidden: Counter[str]) -> str:
    """`markdown` without HTML comments and the HTML elements that a browser would not show; code stays as it is.

    The characters left out are added to `hidden`, by kind.
    """
    if "<" not in markdown:
        return markdown
    from markdown_it import MarkdownIt

    lines = markdown.split("\n")
    blocks = MarkdownIt().enable("table")
    blocks.core.ruler.enableOnly(["normalize", "block"])
    for token in blocks.parse(markdown):
        if token.type in ("fence", "code_block") and token.map:
            for number in range(*token.map):
                lines[number] = " " * len(lines[number])  # at the same places, and nothing to find there
    outside = INLINE_CODE.sub(lambda code: re.sub(r"[^\n]", " ", code[0]), "\n".join(lines))
    spans = [("comment", found.start(), found.end()) for found in COMMENT.finditer(outside)]
    for found in MAY_HIDE.finditer(outside):
        element = BeautifulSoup(found[0], "html.parser").find(True)
        if isinstance(element, Tag) and not element.is_empty_element and (kind := kind_of_hiding(element)):
            spans.append((kind, found.start(), end_of(element.name, outside, found.end())))
    parts, end = [], 0
    for kind, start, stop in sorted(spans, key=lambda span: span[1:]):
        if start >= end:
            hidden[kind] += len(re.sub(r"<!--|-->|<[^<>]*>", "", markdown[start:stop]).strip())
            parts.append(markdown[end:start])
        end = max(end, stop)
    return "".join(parts) + markdown[end:]


def end_of(name: str, text: str, start: int) -> int:
    """Where the element `name`, whose first tag ends at `start`, is closed; without a closing tag, the end of the paragraph."""
    depth = 1
    for tag in re.finditer(rf"<(/?){name}\b[^<>]*>", text[start:], re.IGNORECASE):
        depth += -1 if tag[1] else 1
        if depth == 0:
            return start + tag.end()
    paragraph = re.search(r"\n[ \t]*\n|\Z", text[start:])
    return start + (paragraph.start() if paragraph else 0)


def squeezed(text: str) -> str:
    """`text` with at most one blank line in a row, but code as it is."""
    parts = re.split(r"(^(`{3,})[^\n]*\n.*?^\2$)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if i % 3 == 1 else re.sub(r"\n\s*\n", "\n\n", part) for i, part in enumerate(parts) if i % 3 != 2)
