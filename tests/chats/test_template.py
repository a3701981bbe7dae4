import time

import pytest

from stages.chats.template import check_template
from stages.program import BadModelFile

CHATML = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"


def test_a_template_that_renders_a_chat_is_let_through() -> None:
    check_template(CHATML, "base")
    check_template("{{ bos_token }}{{ strftime_now('%Y') }}{% for m in messages %}{{ m | tojson }}{% endfor %}", "base")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages.__class__.__mro__ }}", "SecurityError: access to attribute '__class__'"),
        ("{{ raise_exception.__globals__['os'].system('true') }}", "SecurityError|UndefinedError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% for i in range(10**9) %}a{% endfor %}", "Range too big"),
        ("{{ 'a' * 10**10 }}", "MemoryError"),
        ("{% for", "TemplateSyntaxError"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{{ raise_exception('only one turn') }}", "only one turn"),
        ("", "it renders nothing"),
    ],
)
def test_a_template_that_does_more_or_nothing_is_refused_in_one_line(template: str, said: str) -> None:
    with pytest.raises(BadModelFile, match=f"base: its chat template is refused: .*({said})") as refused:
        check_template(template, "base")
    assert "\n" not in str(refused.value)


def test_a_template_that_never_ends_is_stopped() -> None:
    started = time.process_time()
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(BadModelFile, match="it took more than 2 s or 512 MB"):
        check_template(loop, "base")
    assert time.process_time() - started < 2, "not in this process"
