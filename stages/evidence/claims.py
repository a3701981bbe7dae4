"""What an answer claims: that its source does not have it is the cheapest sign of an invention, that it does makes it a key fact."""

import functools
import re

from stages.evidence.text import fold

FENCED = re.compile(r"```.*?(?:```|$)", re.DOTALL)
CODE = re.compile(rf"{FENCED.pattern}|`[^`\n]+`", re.DOTALL)
ITEM = re.compile(r"^\s*(?:\d+[.)]|[-*+])\s+", re.MULTILINE)  # the mark of a list's item
URL = re.compile(r"(?:https?://|www\.)[^\s<>()\[\]`'\"]*[\w/]")
NUMBER = re.compile(r"(?<![\w.,-])\d+(?:[.,]\d+)*(?![\w-]*[A-Za-z_])")  # not part of a name
FLAG = re.compile(r"(?<![\w-])-{1,2}[A-Za-z][\w-]*")
FILE_NAME = re.compile(
    r"(?<![\w/.@-])[\w./~-]*\w\.(?:py|js|ts|go|rs|sh|md|txt|rst|csv|tsv|sql|log|lock|cfg|ini|env|conf|toml|yaml|yml|json|jsonl|xml|html|css|pdf|docx|ipynb|png|jpg|svg|gz|zip|tar|exe|dll|so|jar|war|whl|deb|rpm|tgz|bat|ps1|tf|xlsx|service|properties|java|c|h|cpp|gguf|safetensors|bin|db|sqlite|parquet|pem|key|crt)\b"
)
WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty "
    "thirty forty fifty sixty seventy eighty ninety hundred thousand"
)
NUMERALS = dict(zip(WORDS.split(), [*map(str, range(21)), *map(str, range(30, 100, 10)), "100", "1000"], strict=True))
COUNTING = frozenset(str(value) for value in range(13))  # "two ways" is no claim about the product


def invented(answer: str, source: str) -> dict[str, bool]:
    """Whether `answer` has a URL, number, flag, file name or piece of code that `source` (white space folded) does not have.

    Numbers may be digits or words. A command may stand in the source apart from its flags and what follows them.
    """
    plain = ITEM.sub("", URL.sub(" ", answer))
    prose = FILE_NAME.sub(" ", CODE.sub(" ", plain))
    lines = code_lines(answer)
    return {
        "url_is_invented": any(found not in source for found in URL.findall(answer)),
        "number_is_invented": bool(numbers_in(prose, COUNTING) - numbers_in(source)),
        "flag_is_invented": any(not re.search(rf"(?<![\w-]){found}(?![\w-])", source) for found in FLAG.findall(plain)),
        "file_name_is_invented": any(found not in source for found in FILE_NAME.findall(plain)),
        "code_is_invented": any(part not in source for line in lines if fold(line) not in source for part in parts_of(line)),
    }


def key_facts(answer: str, source: str, question: str) -> tuple[str, ...]:
    """The URLs, numbers, flags, file names and lines of code of `answer` that `source` has as well, in the order of `answer`.

    White space is folded. What `question` says already is none, and neither is a part of another one.
    """
    plain = ITEM.sub("", URL.sub(" ", answer))
    prose = FILE_NAME.sub(" ", CODE.sub(" ", plain))
    named = [*URL.findall(answer), *NUMBER.findall(prose), *FLAG.findall(plain), *FILE_NAME.findall(plain)]
    found = [one for one in dict.fromkeys([*named, *map(fold, code_lines(answer))]) if one and _has(source, one)]
    whole = [one for one in found if not any(one != other and one in other for other in found)]
    return tuple(sorted((one for one in whole if not _has(question, one)), key=fold(answer).find))


def code_lines(answer: str) -> list[str]:
    """The lines that `answer` marks as code, as written."""
    return [line for span in CODE.findall(answer) for line in span.strip("`").split("\n")[span.startswith("```") :]]


def _has(text: str, fact: str) -> bool:
    return bool(re.search(rf"(?<![\w-]){re.escape(fact)}(?![\w-])", fold(text)))


def parts_of(command: str) -> list[str]:
    """The words of `command` up to its first flag in one piece, and each further word: a page may give flags apart from their command."""
    head, *rest = re.split(r"\s+(?=-)", fold(command), maxsplit=1)
    return [head, *" ".join(rest).split()]


@functools.lru_cache(1024)  # a chunk's text comes again with each of its candidates
def numbers_in(text: str, uncounted: frozenset[str] = frozenset()) -> set[str]:
    """The numbers in `text` as digits; of those written as words, not the `uncounted`."""
    said = {NUMERALS[word] for word in re.findall(r"[a-z]+", text.lower()) if word in NUMERALS}
    return {found.replace(",", "") for found in NUMBER.findall(text)} | said.difference(uncounted)
