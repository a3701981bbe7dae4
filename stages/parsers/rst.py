"""reStructuredText as Markdown, Sphinx's own roles and directives included: their text is kept, nothing is run or opened."""

import re
import textwrap
from collections import Counter

from docutils import nodes
from docutils.core import publish_doctree, publish_from_doctree

SETTINGS = {
    "doctitle_xform": False,
    "embed_stylesheet": False,
    "file_insertion_enabled": False,
    "halt_level": 5,
    "initial_header_level": "1",
    "line_length_limit": 1_000_000,
    "math_output": "LaTeX",
    "raw_enabled": False,
    "report_level": 1,
    "strip_comments": True,
    "stylesheet_path": None,
    "syntax_highlight": "none",
    "toc_backlinks": False,
    "warning_stream": False,
    "_disable_config": True,
}
DIRECTIVE = re.compile(r"\.\.\s+(?:\|[^|]+\|\s+)?([\w:+.-]+)::[ \t]*([^\n]*)\n?(.*)", re.DOTALL)
OPTION = re.compile(r"\s*:[\w-]+:")
ROLE = re.compile(r":([\w:+.-]+):`(.*)`", re.DOTALL)
CODE = {"code", "code-block", "sourcecode", "doctest", "testcode", "parsed-literal", "prompt"}
WITHOUT_TEXT = {
    "contents", "currentmodule", "default-role", "highlight", "highlightlang", "image", "include", "index", "literalinclude",
    "meta", "module", "program", "py:currentmodule", "py:module", "raw", "role", "sectionauthor", "tabularcolumns", "toctree",
}  # fmt: skip
WITHOUT_ARGUMENT = {"csv-table", "figure", "list-table", "only"}  # it is a file, a condition or a caption
SIGNATURES = {"attribute", "confval", "data", "envvar", "function", "method", "option"}
PROSE_ROLES = {"ref", "doc", "term", "any", "numref", "abbr", "download", "guilabel", "menuselection", "pep", "rfc"}
VERSIONS = {"versionadded": "New in version", "versionchanged": "Changed in version", "deprecated": "Deprecated since version"}
MAX_DEPTH = 8


def from_rst(text: str) -> str:
    """The Markdown of a page. What docutils does not know or refuses is replaced by the text it holds."""
    from stages.parsers.html import from_html

    page = publish_from_doctree(tree_of(text), writer="html5", settings_overrides=SETTINGS | {"report_level": 5})
    return from_html(re.sub(r"<title>.*?</title>", "", page.decode(), flags=re.DOTALL), Counter())


def tree_of(text: str, depth: int = 0) -> nodes.document:
    """docutils' tree without messages: unknown directives and roles are replaced by what they hold."""
    tree = publish_doctree(text, settings_overrides=SETTINGS)
    for problem in list(tree.findall(nodes.problematic)):
        problem.parent.replace(problem, _role(problem.astext()))
    for message in list(tree.findall(nodes.system_message)):
        source = message.next_node(nodes.literal_block)
        message.parent.replace(message, _directive(source.astext(), depth) if source is not None else [])
    return tree


def _role(source: str) -> nodes.Node:
    role = ROLE.fullmatch(source)
    if role is None:
        return nodes.Text(re.sub(r"^`(.*?)(?:\s*<[^<>]*>)?`__?$", r"\1", source, flags=re.DOTALL))  # a link to another page
    words = re.sub(r"\s*<[^<>]*>$", "", role[2]) or role[2].strip("<>")
    return nodes.Text(words) if role[1] in PROSE_ROLES else nodes.literal("", words.lstrip("~!"))


def _directive(source: str, depth: int) -> list[nodes.Node]:
    found = DIRECTIVE.fullmatch(source.strip("\n"))
    if found is None:
        return [nodes.literal_block(source, source)]  # a table or list that docutils could not read
    name, argument, rest = found.groups()
    lines = textwrap.dedent(rest).split("\n")
    while lines and OPTION.match(lines[0]):
        lines.pop(0)
        while lines and lines[0].startswith(" "):
            lines.pop(0)
    body = "\n".join(lines).strip("\n")
    if name in CODE:
        return [nodes.literal_block(body, body, classes=["code", argument.strip()])] if body else []
    if name in WITHOUT_TEXT:
        return []
    held: list[nodes.Node] = []
    if argument and name not in WITHOUT_ARGUMENT:
        argument = f"{VERSIONS[name]} {argument}" if name in VERSIONS else argument
        is_signature = ":" in name or name in SIGNATURES
        held.append(nodes.paragraph("", "", nodes.literal("", argument) if is_signature else nodes.Text(argument)))
    if body:
        held += tree_of(body, depth + 1).children if depth < MAX_DEPTH else [nodes.literal_block(body, body)]
    return held
