"""HTML as Markdown: the main content, without navigation and without what a browser would not show."""

import re
from typing import Any

from bs4 import BeautifulSoup, Tag
from bs4.dammit import EncodingDetector
from markdownify import ATX, MarkdownConverter

UNSEEN = ["script", "style", "noscript", "template", "svg", "iframe", "object", "nav", "footer", "dialog", "button"]
NOT_SHOWN = re.compile(
    r"display\s*:\s*none|visibility\s*:\s*hidden|font-size\s*:\s*0(?![\d.])|opacity\s*:\s*0(?![\d.])", re.IGNORECASE
)
LANGUAGE = re.compile(r"^(?:language-|lang-|highlight-(?:source-)?|sourceCode )([\w+#.-]+)$")


class ToMarkdown(MarkdownConverter):
    """markdownify with fences that hold any code, cells that hold bars, and no picture data."""

    def convert_pre(self, el: Any, text: str, parent_tags: Any) -> str:
        from stages.parsers.formats import fenced

        return f"\n\n{fenced(el.get_text(), language_of(el))}\n\n" if el.get_text().strip() else ""

    def convert_td(self, el: Any, text: str, parent_tags: Any) -> str:
        return super().convert_td(el, re.sub(r"(?<!\\)\|", r"\\|", text), parent_tags)

    def convert_th(self, el: Any, text: str, parent_tags: Any) -> str:
        return super().convert_th(el, re.sub(r"(?<!\\)\|", r"\\|", text), parent_tags)

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


def from_html(page: str) -> str:
    """The Markdown of a page or fragment. A page without a first-level heading gets its <title>.

    A page nested deeper than Python can follow gives its bare text.
    """
    soup = BeautifulSoup(page, "html.parser")
    title = " ".join(soup.title.get_text().split()) if soup.title else ""
    main = soup.select_one("main") or soup.select_one("[role=main]") or soup.select_one("article") or soup.body or soup
    for element in main.find_all(UNSEEN):
        element.decompose()
    for element in main.find_all(is_not_shown):
        element.decompose()
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


def is_not_shown(element: Tag) -> bool:
    """Whether a browser would leave the element out: what people cannot see, a model must not learn."""
    return (
        element.has_attr("hidden")
        or element.get("aria-hidden") == "true"
        or bool(NOT_SHOWN.search(str(element.get("style", ""))))
    )


def squeezed(text: str) -> str:
    """`text` with at most one blank line in a row, but code as it is."""
    parts = re.split(r"(^(`{3,})[^\n]*\n.*?^\2$)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if i % 3 == 1 else re.sub(r"\n\s*\n", "\n\n", part) for i, part in enumerate(parts) if i % 3 != 2)
