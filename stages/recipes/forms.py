"""Questions that an English sentence answers, made from the sentence's own words.

A small teacher writes questions that sound right and ask for something else; it is far better at choosing. So the recipe `quote-first`
offers it these forms. They come from the sentence's shape: an option with its description, a task with its means, a condition with its
consequence, a subject with its verb. A sentence of no known shape gives none.
"""

import re
from functools import cache
from pathlib import Path

from stages.evidence import fold
from stages.records import QuestionType

Form = tuple[QuestionType, str]

MIN_CHARS, MAX_CHARS = 12, 140
MAX_SUBJECT_WORDS = 9
BE, MODALS = ("is", "are"), ("can", "must", "may", "will", "should")
CLAUSES = ("when", "if", "unless", "until", "because", "since", "while")
CLAUSE = re.compile(r"\s(when|if|unless|until|after|before|because|so that|since|while|as soon as|once)\s(?!which|that)")
REASONS = ("because", "so that", "since")
TOKEN = re.compile(r"`[^`]*`|[^\s,;:]+|[,;:]")
LEANS = re.compile(
    r"(?i)\b(the same|the next|(?:first|second|last|next|other) one|that (?:point|case|way|time|page|file|one)|(?:larger|smaller|higher|lower|longer|shorter|other|same) (?:value|number|one)s?|such|this|these|those|it|they|them|above|below|following|previous|here|let's|we|us|our)\b"
)
ABOUT = ("What should I know about", "What does the documentation say about", "Can you explain")
EXAMPLES = ("Can you show an example of", "Is there an example of", "What is an example of")
PLACES = {"in": "Where", "on": "Where", "at": "Where", "under": "Where", "inside": "Where", "from": "Where"}
PARTICIPLE = r"(?:\w+(?:ed|en|ilt|ept|ound|own)|done|made|set|sent|run|read|put|cut|left|lost|held)\b"
MEANS = "use|run|type|call|execute|pass|set|provide|specify|add"


@cache
def english(kind: str) -> frozenset[str]:
    """The words of one kind in english.yaml."""
    import yaml

    lists = yaml.safe_load(Path(__file__).with_name("english.yaml").read_text(encoding="utf-8"))
    return frozenset(lists[kind].split())


def forms_of(answer: str, heading_path: tuple[str, ...]) -> list[Form]:
    """Questions that the first sentence of `answer` answers, the most telling first; [] for a sentence of no known shape.

    `heading_path` names the page, where an option or a sentence without subject needs it. A question never leans on the page ("this").
    """
    sentence = re.split(r"(?<=[.!?])\s+(?=[A-Z`])", answer.partition("\n\n")[0])[0]
    sentence = fold(re.sub(r"\s\([^()]*\)", "", sentence)).rstrip(".!:")
    sentence = re.sub(r"^(Note that|First,|Next,|Now,?|Finally,|However,|Also,|Then,?) ", "", sentence)
    sentence = re.sub(r" (therefore|thus|hence|however|then|also) (?=[a-z])", " ", sentence)
    sentence = sentence[:1].upper() + sentence[1:]
    page = heading_path[0] if heading_path else ""
    for shape in (option, task, condition, setting, order, deed_of_the_page, statement):
        if found := shape(sentence, page, heading_path):
            whole = [(kind, finished(question)) for kind, question in found]
            return [(kind, question) for kind, question in whole if is_sound(question) and not tells_all(kind, question, answer)]
    return []


def heading_forms(heading_path: tuple[str, ...]) -> list[Form]:
    """Questions that a section's heading raises; [] for one that names nothing."""
    name = thing(heading_path[0]) if heading_path else ""
    if not heading_path or not (name or len(heading_path) > 1):
        return []
    found = [(kind, finished(question)) for kind, question in _heading_questions(heading_path, name)]
    return [(kind, question) for kind, question in found if is_sound(question, leans=False)]


def _heading_questions(heading_path: tuple[str, ...], name: str) -> list[Form]:
    inside = f" in {name}" if name else ""
    example = re.match(r"Examples?\b[\s:.-]*", heading_path[-1])
    heading = re.sub(r"\s*\{#[\w-]+\}", "", heading_path[-1][example.end() if example else 0 :])
    heading = re.sub(r"^(Optional|Tip|Note|Only|Just|Step \d+|\d+\.)\s*[:.-]?\s+", "", heading).strip(" :.")
    plain = lowered(heading) if heading[1:] == heading[1:].lower() else heading  # else a title that is all in capitals
    first, _, rest = heading.removeprefix("How to ").partition(" ")
    base = first.lower() if first.lower() in english("verbs") else base_of_gerund(first.lower())
    is_task = bool(base and rest) and not re.match(r"(is|are|and|of|example|examples)\b", rest)
    if example and not is_task:
        what = f"{plain}{inside}" if heading else name
        return [("procedural", f"{opening} {what}") for opening in EXAMPLES]
    if heading.lower() in english("generic_titles") or len(heading_path) == 1:
        return [("conceptual", f"{opening} {name or heading}") for opening in ABOUT]
    if heading.endswith("?"):
        return [("conceptual", heading)]
    if is_task:
        return how_to(f"{base} {rest}")
    if re.match(r"(What|How|Who|Why|When|Where) ", heading):
        return [("conceptual", f"Can you explain {plain}")]
    if re.search(r"\b(is|are|was|cannot|can't|does not|do not|fails?)\b", heading):
        return [("procedural", f"{opening} {plain}") for opening in ("What should I do when", "What can I do when")]
    return [("conceptual", f"{opening} {plain}{inside}") for opening in ABOUT]


def option(sentence: str, page: str, _path: tuple[str, ...]) -> list[Form]:
    """`-f`, `--force` - overwrites files."""
    found = re.match(r"((?:`[^`]+`(?:,? (?:or |and )?|/)?)+)\s*(?:-|\u2013|\u2014|:)\s+(.+)$", sentence)
    if not found:
        return []
    codes = re.findall(r"`([^`]+)`", found[1])
    code = re.split(r"[ =]", max(codes, key=len))[0]
    kind, name = ("option" if code.startswith("-") else "setting"), thing(page)
    of, within = (f" of {name}", f" with {name}") if name else ("", "")
    forms: list[Form] = [
        ("factual", f"What does the `{code}` {kind}{of} do"),
        ("factual", f"What is the `{code}` {kind}{of} for"),
        ("conceptual", f"What is the purpose of the `{code}` {kind}{of}"),
    ]
    if kind == "option":
        forms.append(("factual", f"What happens when I use `{code}`{within}"))
    forms.append(("factual", f"Can you explain the `{code}` {kind}{of}"))
    what = clipped(found[2])
    first, _, rest = what.partition(" ")
    base = base_of(first.lower())
    if base and len(rest.split()) > 1 and code not in rest:
        forms.insert(1, ("procedural", f"How do I {base} {rest}{within}"))
        forms.insert(2, ("procedural", f"Which {kind}{of} {third_person(base)} {rest}"))
    return forms


def task(sentence: str, _page: str, _path: tuple[str, ...]) -> list[Form]:
    """To list remotes, run `x`. / Use `x` to list remotes. / You can list remotes with `x`. / Let's list remotes."""
    purposes = (
        r"(?:If you (?:want|need|wish|would like) to|To|In order to) (?P<do>[a-z-]+) (?P<what>.+?), (?!and |or ).+$",
        rf"(?i:(?:(?:you|we) (?:can|may|could) (?:also )?)?(?:{MEANS})) (?P<means>.{{2,60}}?) (?:in order )?to (?P<do>[a-z-]+) (?P<what>.+)$",
        r"(?:(?:You|We|Users) (?:can|may|could)|It(?:'s| is) possible to) (?:also |now )?(?P<do>[a-z-]+) (?P<what>.+)$",
        r"(?:First, |Next, |Now |Finally, )?[Ll]et's (?:say we )?(?:first |now |also )?(?P<do>[a-z-]+) (?P<what>.+)$",
    )
    for purpose in purposes:
        found = re.match(purpose, sentence)
        if found and found["do"] in english("verbs") - english("no_task"):
            what = clipped(re.split(r" (?:by running|by using|using|via) ", clipped(found["what"]))[0])
            do = f"{found['do']} {what}"
            forms = how_to(do)
            means = found.groupdict().get("means") or ""
            if means.startswith("`") or " `" in means:
                forms.insert(1, ("factual", f"What is {lowered(means)} used for"))
            return forms
    return []


def condition(sentence: str, _page: str, _path: tuple[str, ...]) -> list[Form]:
    """If the disk is full, the stage stops."""
    found = re.match(r"(If|When|Once|After|Before|Unless|As soon as) (.+?), (.+)$", sentence)
    if not found or english("pronouns") & {found[2].split()[0].lower()} - {"you", "we"}:
        return []
    when = f"{found[1].lower()} {found[2]}"
    forms: list[Form] = [
        ("factual", f"What happens {when}"),
        ("factual", f"What should I expect {when}"),
        ("factual", f"Can you tell me what happens {when}"),
    ]
    if found[3].split()[0] in english("verbs"):
        forms.insert(0, ("procedural", f"What should I do {when}"))
    elif parts := subject_and_verb(found[3]):
        subject, verb, base, _ = parts
        if base:
            forms.insert(1, ("factual", f"What {'do' if verb == base else 'does'} {subject} do {when}"))
    return forms


def setting(sentence: str, page: str, path: tuple[str, ...]) -> list[Form]:
    """In version 3, the stage splits pairs. / By default, the stage splits pairs."""
    found = re.match(r"((?:In|For|With|During|On|At|Without|Under|By) [^,`]{2,40}), (?!and |or )(.+)$", sentence)
    if not found:
        return []
    inner = found[2][0].upper() + found[2][1:]
    forms = task(inner, page, path) or order(inner, page, path) or statement(inner, page, path)
    return [(kind, f"{question} {found[1][0].lower()}{found[1][1:]}") for kind, question in forms]


def order(sentence: str, _page: str, path: tuple[str, ...]) -> list[Form]:
    """Roll the tent tightly with the short strap."""
    first, _, rest = sentence.partition(" ")
    if (
        first.lower() not in english("verbs") - english("no_task")
        or not rest
        or re.match(r"(of|in|on|and|or|is|are|was|can|to|for|from|that)\b", rest)
    ):
        return []
    if (
        len(path) == 1 and not rest.startswith("`") and re.fullmatch(r"[a-z][a-z -]*", path[0])
    ):  # a command's page says what it does
        return _deeds(thing(path[0]))
    purpose = re.search(r" to ([a-z-]+) (.+)$", rest)
    if purpose and purpose[1] in english("verbs"):
        return how_to(f"{purpose[1]} {clipped(purpose[2])}")
    what = clipped(re.split(r" (?:with|by|using|via|so that|because|to) ", clipped(rest))[0])
    return how_to(f"{first.lower()} {what}")


def how_to(task_words: str) -> list[Form]:
    if re.match(r"[\w-]+ (with|by|as|for|via|of|that|whether)\b", task_words):
        return []
    openings = (
        "How do I",
        "What should I do to",
        "How can I",
        "Is there a way to",
        "Can you show me how to",
        "What is the way to",
    )
    return [("procedural", f"{opening} {task_words}") for opening in openings]


def deed_of_the_page(sentence: str, page: str, path: tuple[str, ...]) -> list[Form]:
    """Returns the root of the project. (on the page of a command)"""
    first, _, rest = sentence.partition(" ")
    is_about_page = len(path) == 1 or (bool(path) and path[-1].lower() in english("generic_titles"))
    base = base_of_third(first.lower())
    if not (base and base not in english("states") and is_about_page and thing(page).startswith("`") and rest):
        return []
    if re.match(r"(of|in|on|and|or|is|are|was|can|beyond|from|to)\b", rest) or subject_and_verb(sentence):
        return []
    return _deeds(thing(page))


def _deeds(name: str) -> list[Form]:
    return [
        ("factual", f"What does {name} do"),
        ("conceptual", f"What is the purpose of {name}"),
        ("factual", f"Can you tell me what {name} does"),
        ("conceptual", f"What is {name} for"),
        ("conceptual", f"What can I use {name} for"),
    ]


def statement(sentence: str, _page: str, _path: tuple[str, ...]) -> list[Form]:
    """The stage `split` parts the pairs."""
    parts = subject_and_verb(sentence)
    if not parts:
        return []
    subject, verb, base, rest = parts
    near = re.split(r"[;:]|,(?! (?:so that|because|since|when|if|unless|until)\b)", rest)[0]
    clause = CLAUSE.search(f" {near} ")
    main = clipped(rest[: clause.start()] if clause else rest)
    asks: QuestionType = "conceptual" if clause and clause[1] in REASONS else "factual"
    when = ("Why" if asks == "conceptual" else "When") if clause else ""
    if verb in BE or (base == "have" and rest.startswith("been ")):
        return _state(subject, verb, main, rest, when, asks)
    if verb in MODALS:
        return _possibility(subject, verb, main, when, asks)
    do = "do" if verb == base else "does"
    forms: list[Form] = []
    if clause:
        forms.append((asks, f"{when} {do} {subject} {base} {main}"))
        if clause[1] in ("when", "if", "unless") and not LEANS.match(rest[clause.end() - 1 :]):
            forms.append(("factual", f"What happens {clause[1]} {clipped(rest[clause.end() - 1 :])}"))
    head = rest.split()[0] if rest else ""
    if head in ("to", "on", "from", "with", "for", "into", "of", "at"):
        forms.append(("factual", f"What {do} {subject} {base} {head}"))
    elif head == "in":
        is_place = base in ("live", "lie", "run", "stand")
        forms.append(("factual", f"Where {do} {subject} {base}" if is_place else f"What {do} {subject} {base} in"))
    elif (
        head
        and main
        and base not in english("causes")
        and not re.match(r"(not|only|like|also|well|back|up|out|off|down|by|as|and|or)\b", head)
    ):
        forms.append(("factual", f"What {do} {subject} {base}"))
        forms.append(("factual", f"Can you tell me what {subject} {verb}"))
    if base not in english("states"):
        forms.append(("factual", f"What {do} {subject} do"))
    noun = re.fullmatch(r"(?:the )?(\w+) `[^`]+`|(?:the )?`[^`]+` (\w+)", subject)
    if noun and do == "does" and 2 <= len(main.split()) <= 12 and "`" not in main:
        forms.append(("factual", f"Which {noun[1] or noun[2]} {verb} {main}"))
    if base in english("causes") | {"provide", "serve", "support"}:
        forms.append(("conceptual", f"What {'are' if do == 'do' else 'is'} {subject} for"))
    if re.match(r"(the |an? )?(\w+ )?`", subject):
        forms.append(("conceptual", f"What is the role of {subject}"))
    return forms


def _state(subject: str, verb: str, main: str, rest: str, when: str, asks: QuestionType) -> list[Form]:
    passive = re.match(rf"((?:been )?(?:also |only |always |automatically |usually )?{PARTICIPLE}) ?(.*)$", main)
    if not passive:
        is_what = re.match(r"(an?|the|one|two|three|four|five|all|any)\b|`", main) or (
            verb == "are" and re.match(r"(?:[\w/-]+ ){0,3}[\w/-]+s\b", main)
        )
        reason: list[Form] = [(asks, f"{when} {verb} {subject} {main}")] if when and main and not is_what else []
        if not is_what or re.match(r"(not|also|only|always|still|to|in|on|at|as|up|out|for|from|with)\b", main):
            return reason
        forms: list[Form] = [
            ("conceptual", f"What {verb} {subject}"),
            ("conceptual", f"What is meant by {subject}"),
            ("conceptual", f"Can you explain what {subject} {verb}"),
            ("conceptual", f"How would you describe {subject}"),
        ]
        if verb == "is" and re.match(r"(an?|the) ", rest) and "`" not in subject and len(subject.split()) <= 4:
            forms.append(("conceptual", f"How is {subject} defined"))
        return reason + forms
    done, tail = passive[1], passive[2]
    forms = [(asks, f"{when} {verb} {subject} {done} {tail}")] if when else []
    preposition = tail.split()[0] if tail else ""
    if preposition in PLACES:
        forms.append(("factual", f"Where {verb} {subject} {done}{' from' if preposition == 'from' else ''}"))
    elif preposition in ("by", "with", "to", "for", "as", "into"):
        forms.append(("factual", f"What {verb} {subject} {done} {preposition}"))
    if re.search(r"\b(by|with|using|via|through|as)\b", tail):
        forms += [("factual", f"How {verb} {subject} {done}"), ("factual", f"Can you tell me how {subject} {verb} {done}")]
    return forms or [("factual", f"What happens to {subject}")]


def _possibility(subject: str, verb: str, main: str, when: str, asks: QuestionType) -> list[Form]:
    first, _, rest = main.partition(" ")
    forms: list[Form] = [(asks, f"{when} {verb} {subject} {main}")] if when else []
    if first == "be" and re.match(PARTICIPLE, rest):
        done = rest.split()[0]
        forms += [("procedural", f"How {verb} {subject} be {done}"), ("factual", f"What {verb} be done with {subject}")]
    elif first in english("verbs") and verb != "may":
        forms += [("factual", f"What {verb} {subject} {first}"), ("factual", f"What {verb} {subject} do")]
        forms.append(("factual", f"Can you tell me what {subject} {verb} do"))
    return forms


def subject_and_verb(clause: str) -> tuple[str, str, str, str] | None:
    """(subject, verb as written, its base or "" for be and modals, the rest), or None where no verb follows a plain subject."""
    tokens = TOKEN.findall(clause)
    for place, token in enumerate(tokens[: MAX_SUBJECT_WORDS + 1]):
        if token in (*",;:", *CLAUSES):
            return None
        before = tokens[place - 1].lower() if place else ""
        if (
            not place
            or before in english("determiners")
            or before in english("openers")
            or before in ("of", "and", "or", "that", "which")
        ):
            continue
        if place > 1 and tokens[place - 2] in ("that", "which"):  # the verb of a relative clause
            continue
        base = ""
        if token not in (*BE, *MODALS):
            base = base_of_third(token) or (token if token in english("verbs") and (is_plural(tokens[:place])) else "")
            follows = tokens[place + 1] if place + 1 < len(tokens) else ""
            if not base or follows in (*BE, *MODALS) or base_of_third(follows):
                continue
        subject = " ".join(tokens[:place])
        if (
            tokens[0].lower() in english("pronouns")
            or tokens[0].endswith("ly")
            or (base_of_third(tokens[0].lower()) and len(tokens) > 1 and tokens[1] in english("determiners") | {"which", "how"})
            or tokens[0].lower() in ("only", "both", "another", "such", "same")
            or (tokens[0].lower() in ("every", "each", "any", "all", "no") and token in BE)
            or tokens[place - 1] in ("one", "ones")
            or (tokens[place - 1].rstrip("s") in english("hollow") and place < 4)
            or tokens[0].lower() in english("openers")
            or tokens[0] in ("-", "*", "$")
            or subject.count("(") != subject.count(")")
        ):
            return None
        rest = " ".join(tokens[place + 1 :])
        return lowered(subject), token, base, re.sub(r" ([,;:])", r"\1", rest)
    return None


def is_plural(subject: list[str]) -> bool:
    """Whether a subject takes a verb without s, by the noun that stands before its first "of", "with" or "that"."""
    head = next((place for place, token in enumerate(subject) if token in ("of", "with", "that", "in", "for")), len(subject))
    return "and" in subject or (head > 0 and bool(re.search(r"(?<![sui])s`?$", subject[head - 1])))


def base_of(word: str) -> str:
    """The base form of a verb as written in a description: `show` and `shows` give `show`; "" for what is no verb."""
    return word if word in english("verbs") else base_of_third(word)


def base_of_third(word: str) -> str:
    irregular = {"has": "have", "does": "do", "goes": "go"}
    if word in irregular:
        return irregular[word]
    stems = [word[:-3] + "y"] if word.endswith("ies") else []
    stems += [word[:-2]] if word.endswith("es") else []
    stems += [word[:-1]] if word.endswith("s") else []
    return next((stem for stem in stems if stem in english("verbs")), "")


def base_of_gerund(word: str) -> str:
    stem = word.removesuffix("ing")
    if stem == word:
        return ""
    return next((base for base in (stem, stem + "e", stem[:-1]) if base in english("verbs")), "")


def third_person(base: str) -> str:
    if base in ("have", "be"):
        return {"have": "has", "be": "is"}[base]
    if re.search(r"(s|sh|ch|x|z|o)$", base):
        return base + "es"
    return base[:-1] + "ies" if re.search(r"[^aeiou]y$", base) else base + "s"


def thing(title: str) -> str:
    """What a page is about, by its title: a command in lower case is set as code; "" for a title that names nothing."""
    title = title.strip().strip("`")
    if not title or title.lower() in english("generic_titles"):
        return ""
    return f"`{title}`" if title == title.lower() else title


def clipped(words: str) -> str:
    """`words` up to the end of the first clause or aside."""
    aside = r"(?:\s[(\u2013\u2014-]|[,;:]|\s(?:so that|because|which|whereas|but|and then|e\.g\.|i\.e\.)\s)"
    words = re.split(aside, words)[0].strip().rstrip(".")
    return re.sub(r"( (when|if|to|for|in|on|by|with|of|and|or|the|an?|how|that|as|while|only|also|just))+$", "", words)


def lowered(words: str) -> str:
    """`words` without the capital of a sentence's beginning, where the first word is a common one."""
    first = words.split(" ")[0]
    common = first.lower() in english("determiners") | english("openers") | english("verbs") or base_of_third(first.lower())
    is_common = common or re.fullmatch(
        r"[A-Z][a-z]+(ed|en|ing|ent|ant|ive|al|ous|ible|able|ions?|ments?|ers?|les?|ies|ings|ents|ages)", first
    )
    return words[0].lower() + words[1:] if is_common and re.fullmatch(r"[A-Z][a-z'-]*", first) else words


def finished(question: str) -> str:
    """`question` as its asker would type it: "my" for "your", one blank, a question mark."""
    for found, said in (
        (r"\byourself\b", "myself"),
        (r"\byour\b", "my"),
        (r"\b(you|we) are\b", "I am"),
        (r"(?<!would )(?<!Can )\byou\b", "I"),
    ):
        question = re.sub(found, said, question)
    return fold(question).rstrip(" ,.;:?") + "?"


def tells_all(kind: QuestionType, question: str, answer: str) -> bool:
    """Whether `question` holds every word of `answer` that tells something, so that nothing is left to answer; one word tells no way."""
    said = set(re.findall(r"`[^`]+`|\w+", question.lower()))
    left = set(re.findall(r"`[^`]+`|\w{3,}", answer.lower())) - said - english("empty")
    return len(left) < (2 if kind == "procedural" else 1) and not any(word.startswith("`") for word in left)


def is_sound(question: str, leans: bool = True) -> bool:
    """Whether `question` can stand alone: of a sane length, its marks in pairs, no word that points at the page."""
    if leans and LEANS.search(re.sub(r"`[^`]*`", "", question)):
        return False
    return (
        MIN_CHARS <= len(question) <= MAX_CHARS
        and question.count("`") % 2 == 0
        and question.count("(") == question.count(")")
        and not re.search(r"\$|\?.", re.sub(r"`[^`]*`", "", question))
        and question.count('"') % 2 == 0
    )
