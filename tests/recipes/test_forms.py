"""recipes.forms: the questions that a sentence answers, worked out by hand for each shape of sentence."""

import re
from pathlib import Path

import pytest

import stages
from stages.evidence import passages_of
from stages.recipes.forms import (
    base_of_gerund,
    base_of_third,
    forms_of,
    heading_forms,
    lowered,
    subject_and_verb,
    thing,
    third_person,
)

HANDBOOK = sorted((Path(stages.__file__).parents[1] / "docs").glob("*.md"))
KINDS = {"f": "factual", "c": "conceptual", "p": "procedural"}
HOW_TO = [
    "p How do I {}?",
    "p What should I do to {}?",
    "p How can I {}?",
    "p Is there a way to {}?",
    "p Can you show me how to {}?",
    "p What is the way to {}?",
]
DEEDS = [
    "f What does {} do?",
    "c What is the purpose of {}?",
    "f Can you tell me what {} does?",
    "c What is {} for?",
    "c What can I use {} for?",
]
ABOUT = ["c What should I know about {}?", "c What does the documentation say about {}?", "c Can you explain {}?"]
EXAMPLE = ["p Can you show an example of {}?", "p Is there an example of {}?", "p What is an example of {}?"]
TROUBLE = ["p What should I do when {}?", "p What can I do when {}?"]


def ladder(steps: list[str], words: str) -> list[str]:
    return [step.format(words) for step in steps]


def asked(forms: list[tuple[str, str]]) -> list[str]:
    return [f"{kind[0]} {question}" for kind, question in forms]


def path_of(headings: str) -> tuple[str, ...]:
    return tuple(headings.split(" > ")) if headings else ()


# sentence, heading path, questions; the shape is the function of forms.py that knows it
OPTIONS = [
    (
        "`-f`, `--force` - overwrites existing files.",
        "lend > Options",
        [
            "f What does the `--force` option of `lend` do?",
            "p How do I overwrite existing files with `lend`?",
            "p Which option of `lend` overwrites existing files?",
            "f What is the `--force` option of `lend` for?",
            "c What is the purpose of the `--force` option of `lend`?",
            "f What happens when I use `--force` with `lend`?",
            "f Can you explain the `--force` option of `lend`?",
        ],
    ),
    (
        "`--days <number>` - sets how many days a book may be kept (14 by default).",
        "lend",
        [
            "f What does the `--days` option of `lend` do?",
            "p How do I set how many days a book may be kept with `lend`?",
            "p Which option of `lend` sets how many days a book may be kept?",
            "f What is the `--days` option of `lend` for?",
            "c What is the purpose of the `--days` option of `lend`?",
            "f What happens when I use `--days` with `lend`?",
            "f Can you explain the `--days` option of `lend`?",
        ],
    ),
    (
        "`-v` - verbose.",
        "Options",
        [
            "f What does the `-v` option do?",
            "f What is the `-v` option for?",
            "c What is the purpose of the `-v` option?",
            "f What happens when I use `-v`?",
            "f Can you explain the `-v` option?",
        ],
    ),
    (
        "`cache.dir` - path of the cache folder.",
        "Configuration > Keys",
        [
            "f What does the `cache.dir` setting of Configuration do?",
            "f What is the `cache.dir` setting of Configuration for?",
            "c What is the purpose of the `cache.dir` setting of Configuration?",
            "f Can you explain the `cache.dir` setting of Configuration?",
        ],
    ),
    (
        "`rows`: shows at most ten lines.",
        "Options > Keys",
        [
            "f What does the `rows` setting do?",
            "p How do I show at most ten lines?",
            "p Which setting shows at most ten lines?",
            "f What is the `rows` setting for?",
            "c What is the purpose of the `rows` setting?",
            "f Can you explain the `rows` setting?",
        ],
    ),
]
HERE = "Page > Section"
TASKS = [
    ("To clean the machine, fill the tank and press `Start`.", HERE, ladder(HOW_TO, "clean the machine")),
    ("If you want to list your remotes, run `tool remote list`.", HERE, ladder(HOW_TO, "list my remotes")),
    ("In order to move a tent (any tent), fold it first.", HERE, ladder(HOW_TO, "move a tent")),
    (
        "Use `tool pull` to download files from the remote.",
        HERE,
        [
            "p How do I download files from the remote?",
            "f What is `tool pull` used for?",
            *ladder(HOW_TO, "download files from the remote")[1:],
        ],
    ),
    (
        "You can run the `clean` command in order to remove old files.",
        HERE,
        ["p How do I remove old files?", "f What is the `clean` command used for?", *ladder(HOW_TO, "remove old files")[1:]],
    ),
    ("You can list remotes by running `tool remote list`.", HERE, ladder(HOW_TO, "list remotes")),
    ("You can change your password in your profile.", HERE, []),  # nothing would be left to answer
    ("You can change your password via the front desk.", HERE, ladder(HOW_TO, "change my password")),
    ("It is possible to rename a card via the front desk.", HERE, ladder(HOW_TO, "rename a card")),
    ("Let's create a small project.", HERE, []),
    ("Let's create a small project:\n\n```\nmake project\n```", HERE, ladder(HOW_TO, "create a small project")),
    ("You can find that every stage was run twice.", HERE, []),
    ("First, let's first move the files, and then the folders.", HERE, ladder(HOW_TO, "move the files")),
]
CONDITIONS = [
    (
        "If the disk is full, the stage stops.",
        HERE,
        [
            "f What happens if the disk is full?",
            "f What does the stage do if the disk is full?",
            "f What should I expect if the disk is full?",
            "f Can you tell me what happens if the disk is full?",
        ],
    ),
    (
        "Once the water boils, open the lid.",
        HERE,
        [
            "p What should I do once the water boils?",
            "f What happens once the water boils?",
            "f What should I expect once the water boils?",
            "f Can you tell me what happens once the water boils?",
        ],
    ),
    (
        "When you are away, lamps turn off.",
        HERE,
        [
            "f What happens when I am away?",
            "f What do lamps do when I am away?",
            "f What should I expect when I am away?",
            "f Can you tell me what happens when I am away?",
        ],
    ),
    (
        "Unless a limit is set, all files are read.",
        HERE,
        [
            "f What happens unless a limit is set?",
            "f What should I expect unless a limit is set?",
            "f Can you tell me what happens unless a limit is set?",
        ],
    ),
]
ORDERS = [
    ("Close the lid tightly with the short strap.", "Tent > Packing", ladder(HOW_TO, "close the lid tightly")),
    ("Now, check the seal because it ages.", HERE, ladder(HOW_TO, "check the seal")),
    ("Show the status of tracked files.", "status", ladder(DEEDS, "`status`")),
    ("Show the status of tracked files with great care.", "Status", ladder(HOW_TO, "show the status of tracked files")),
    ("Show the status of tracked files.", "Status", []),
    ("Returns the root of the project.", "root", ladder(DEEDS, "`root`")),
    ("Returns the root of the project.", "tool api > Description", ladder(DEEDS, "`tool api`")),
    ("Returns the root of the project.", "Tool API > Description", []),
    ("Returns the root of the project.", "Tool API > Roots", []),
]
STATEMENTS = [
    (
        "The stage `split` parts the pairs by section.",
        HERE,
        [
            "f What does the stage `split` part?",
            "f Can you tell me what the stage `split` parts?",
            "f What does the stage `split` do?",
            "f Which stage parts the pairs by section?",
            "c What is the role of the stage `split`?",
        ],
    ),
    (
        "Every stage therefore writes one file (in JSON).",
        HERE,
        ["f What does every stage write?", "f Can you tell me what every stage writes?", "f What does every stage do?"],
    ),
    (  # a state: "What does it do?" is no question
        "The file `notes.txt` contains the list of changes.",
        HERE,
        [
            "f What does the file `notes.txt` contain?",
            "f Can you tell me what the file `notes.txt` contains?",
            "f Which file contains the list of changes?",
            "c What is the role of the file `notes.txt`?",
        ],
    ),
    ("The server listens on port 5000.", HERE, ["f What does the server listen on?", "f What does the server do?"]),
    ("The cache lives in the home folder.", HERE, ["f Where does the cache live?", "f What does the cache do?"]),
    ("Two records belong to every page.", HERE, ["f What do two records belong to?"]),
    (
        "The port and the host identify a server.",
        HERE,
        [
            "f What do the port and the host identify?",
            "f Can you tell me what the port and the host identify?",
            "f What do the port and the host do?",
        ],
    ),
    (  # a verb that asks for another one
        "The index helps to find a page.",
        HERE,
        ["f What does the index help to?", "f What does the index do?", "c What is the index for?"],
    ),
    (  # the verb of a relative clause is not the sentence's
        "A page that holds code needs no picture.",
        HERE,
        ["f What does a page that holds code need?", "f Can you tell me what a page that holds code needs?"],
    ),
]
REASONS_AND_TIMES = [
    (
        "The upper vents let warm air out, so that no water gathers on the inner wall.",
        HERE,
        ["c Why do the upper vents let warm air out?", "f What do the upper vents do?", "c What are the upper vents for?"],
    ),
    (
        "The lamp stores its last brightness because it has flash memory.",
        HERE,
        [
            "c Why does the lamp store its last brightness?",
            "f What does the lamp store?",
            "f Can you tell me what the lamp stores?",
            "f What does the lamp do?",
        ],
    ),
    (
        "The index drops a page when the disk is full.",
        HERE,
        [
            "f When does the index drop a page?",
            "f What happens when the disk is full?",
            "f What does the index drop?",
            "f Can you tell me what the index drops?",
            "f What does the index do?",
        ],
    ),
]
STATES = [
    (
        "A kettle is an electric pot that boils water.",
        HERE,
        [
            "c What is a kettle?",
            "c What is meant by a kettle?",
            "c Can you explain what a kettle is?",
            "c How would you describe a kettle?",
            "c How is a kettle defined?",
        ],
    ),
    (
        "The lights are small lamps.",
        HERE,
        [
            "c What are the lights?",
            "c What is meant by the lights?",
            "c Can you explain what the lights are?",
            "c How would you describe the lights?",
        ],
    ),
    ("The service is not for children.", HERE, []),
]
PASSIVES = [
    ("Backups are stored in the folder `old`.", HERE, ["f Where are Backups stored?"]),
    (
        "The pairs are checked by the suite.",
        HERE,
        [
            "f What are the pairs checked by?",
            "f How are the pairs checked?",
            "f Can you tell me how the pairs are checked?",
        ],
    ),
    ("The port is taken from the file.", HERE, ["f Where is the port taken from?"]),
    ("The default value is taken from the file.", HERE, []),
    (
        "The adapter is merged before the export begins.",
        HERE,
        ["f When is the adapter merged?"],
    ),
    ("The page is printed twice.", HERE, ["f What happens to the page?"]),
]
CLAUSES_FAR = [
    (
        "The licence applies to the model, so read it before you publish one.",
        HERE,
        ["f What does the licence apply to?", "f What does the licence do?"],
    ),
    ("The second one is skipped when it is empty.", HERE, []),
    ("Marks which files and folders should be left out.", HERE, []),
    ("Safely removes a file from the project.", HERE, []),
    ("The command can be anything that a shell runs.", HERE, []),
    ("The next strategy is `copy`.", HERE, []),
]
MODALS = [
    (
        "The battery must be charged every night.",
        HERE,
        ["p How must the battery be charged?", "f What must be done with the battery?"],
    ),
    (
        "The lamp can show the time in red.",
        HERE,
        ["f What can the lamp show?", "f What can the lamp do?", "f Can you tell me what the lamp can do?"],
    ),
    (
        "The port can be changed if another server uses it.",
        HERE,
        ["f When can the port be changed?", "p How can the port be changed?", "f What can be done with the port?"],
    ),
    (
        "Members should return books until the shop closes.",
        HERE,
        [
            "f When should members return books?",
            "f What should members return?",
            "f What should members do?",
            "f Can you tell me what members should do?",
        ],
    ),
    ("A card may stay.", HERE, []),  # "What may a card stay?" would be no English
]


@pytest.mark.parametrize(
    ("sentence", "headings", "questions"),
    [*OPTIONS, *TASKS, *CONDITIONS, *ORDERS, *STATEMENTS, *REASONS_AND_TIMES, *STATES, *PASSIVES, *CLAUSES_FAR, *MODALS],
)
def test_a_sentence_gives_the_questions_that_its_shape_answers(sentence: str, headings: str, questions: list[str]) -> None:
    assert asked(forms_of(sentence, path_of(headings))) == questions


@pytest.mark.parametrize(
    "sentence",
    [
        "",
        "`tool run --fast`",
        "It holds two litres of water.",
        "This setting limits the size.",
        "If it is full, the stage stops.",
        "Nobody understands quantum gravity completely.",  # no known verb
        "Beautiful days in the green hills.",  # no verb
        "See the guide for details.",  # an order to the reader, and no task
        "Every book is red.",
        "Only the owner opens the safe.",
        "The value (a number sets the pace.",
        "A larger value holds more words.",  # than which?
        "The files below hold the settings.",
        "The $HOME folder holds the cache.",
        "A " + "very " * 30 + "long page holds a word.",
        "The " + "x" * 140 + " holds a word.",
    ],
)
def test_a_sentence_of_no_known_shape_or_that_leans_on_the_page_gives_none(sentence: str) -> None:
    assert forms_of(sentence, ("Page", "Section")) == []


def test_only_the_first_sentence_of_an_answer_is_asked_about() -> None:
    alone = forms_of("The tank holds two litres.", ("Page", "Section"))
    assert alone and forms_of("The tank holds two litres. It must be emptied.\n\n- every evening", ("Page", "Section")) == alone


def test_no_question_about_the_handbook_leans_on_its_page() -> None:
    """Every question that the handbook's passages give can be read alone, whatever their shape."""
    assert len(HANDBOOK) > 10
    questions = {
        question
        for page in HANDBOOK
        for passage in passages_of(page.read_text(encoding="utf-8"))
        for _, question in forms_of(passage.answer, ("Handbook",))
    }
    assert len(questions) > 500
    leaning = re.compile(r"(?i)\b(this|these|those|it|they|them|above|below|following|here|we|us|our|your|yourself)\b")
    for question in questions:
        outside_code = re.sub("`[^`]*`", "", question)
        assert not leaning.search(outside_code), question
        assert 12 <= len(question) <= 140 and question.endswith("?") and question.count("?") == 1, question
        assert question[0].isupper() and "  " not in question and "`" not in outside_code, question


# headings


@pytest.mark.parametrize(
    ("headings", "questions"),
    [
        ("", []),
        ("Options", []),
        ("Kettle", ladder(ABOUT, "Kettle")),
        ("Kettle > Overview", ladder(ABOUT, "Kettle")),
        ("lend > Options", ladder(ABOUT, "`lend`")),
        ("Kettle > Cleaning the filter", ladder(HOW_TO, "clean the filter")),
        ("Kettle > How to clean the filter", ladder(HOW_TO, "clean the filter")),
        ("Kettle > Parts > Run the kettle", ladder(HOW_TO, "run the kettle")),
        ("Kettle > Sharing your kettle", ladder(HOW_TO, "share my kettle")),
        ("Kettle > Step 2: Filling the tank", ladder(HOW_TO, "fill the tank")),
        ("Kettle > Example: Sharing your kettle", ladder(HOW_TO, "share my kettle")),
        ("lend > Examples", ladder(EXAMPLE, "`lend`")),
        ("Kettle > The lid does not close", ladder(TROUBLE, "the lid does not close")),
        ("Kettle > Where does the water go?", ["c Where does the water go?"]),
        ("Kettle > The long way {#long-way}", ladder(ABOUT, "the long way in Kettle")),
        ("Examples > Lid", ladder(ABOUT, "Lid")),
        ("Kettle > Running and jumping", ladder(ABOUT, "running and jumping in Kettle")),
        ("Kettle > What comes here", ["c Can you explain what comes here?"]),  # a heading names its section: it may lean
    ],
)
def test_a_heading_raises_the_questions_of_a_task_or_of_a_subject(headings: str, questions: list[str]) -> None:
    assert asked(heading_forms(path_of(headings))) == questions


# words


@pytest.mark.parametrize(
    ("sentence", "parts"),
    [
        ("The tank holds two litres", ("the tank", "holds", "hold", "two litres")),
        ("The tank, which is blue, leaks", None),  # a clause ends before any verb
        (
            "The rows of the file that is open are sorted , then kept",
            ("the rows of the file that is open", "are", "", "sorted, then kept"),
        ),
        ("Pages are many", ("Pages", "are", "", "many")),
        ("Pages list colours", ("Pages", "list", "list", "colours")),
        ("Page list colours", None),  # one page lists
        ("One of the ones is red", None),
    ],
)
def test_a_clause_parts_at_the_verb_of_its_subject(sentence: str, parts: tuple[str, ...] | None) -> None:
    assert subject_and_verb(sentence) == parts


@pytest.mark.parametrize(
    ("base", "third", "gerund"),
    [
        ("copy", "copies", "copying"),
        ("display", "displays", "displaying"),
        ("watch", "watches", "watching"),
        ("go", "goes", "going"),
        ("have", "has", "having"),
        ("merge", "merges", "merging"),
        ("run", "runs", "running"),
        ("fix", "fixes", "fixing"),
    ],
)
def test_a_verb_and_its_forms(base: str, third: str, gerund: str) -> None:
    assert (third_person(base), base_of_third(third), base_of_gerund(gerund)) == (third, base, base)
    assert base_of_third(base) == base_of_gerund(base) == ""


def test_words_that_are_no_verbs_have_no_base() -> None:
    assert [base_of_third(word) for word in ("lamps", "kettles", "s", "")] == [""] * 4
    assert [base_of_gerund(word) for word in ("morning", "thing", "ing")] == [""] * 3


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("The Alto kettle", "the Alto kettle"),
        ("Running water", "running water"),
        ("Members", "members"),
        ("Configuration files", "configuration files"),
        ("DVC files", "DVC files"),
        ("GitHub", "GitHub"),
        ("Python", "Python"),
        ("`The` name", "`The` name"),
    ],
)
def test_a_capital_goes_with_the_sentence_and_stays_with_a_name(words: str, said: str) -> None:
    assert lowered(words) == said


def test_a_page_is_named_by_its_title_unless_that_says_nothing() -> None:
    titles = ("lend", "`lend`", "lend card", "Kettle", "Options", " overview ", "")
    assert [thing(title) for title in titles] == ["`lend`", "`lend`", "`lend card`", "Kettle", "", "", ""]
