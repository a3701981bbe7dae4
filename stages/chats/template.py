"""A chat template is a program that came with a model. It is tried in a process with limits before anything else runs it."""

import os
import resource
import subprocess
import sys

from stages.program.errors import BadModelFile

CPU_S = 2
MEMORY_BYTES = 512 * 2**20
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is it?"},
    {"role": "assistant", "content": "A lamp."},
    {"role": "user", "content": "Why?"},
]


def check_template(template: str, name: str) -> None:
    """Raises BadModelFile unless `template`, of the model `name`, renders a conversation in CPU_S seconds inside a sandbox."""
    done = subprocess.run(
        [sys.executable, "-m", "stages.chats.template"],
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        input=template.encode(),
        capture_output=True,
    )
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"it took more than {CPU_S} s or 512 MB"]
        raise BadModelFile(f"{name}: its chat template is refused: {lines[-1][-300:]}; use a model whose template renders a chat")


def _render(template: str) -> str:
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise ValueError(message)

    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    sandbox.globals |= {"raise_exception": refuse, "strftime_now": lambda _form: "today"}
    known = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True, "tools": None}
    return sandbox.from_string(template).render(messages=CHAT, **known)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    if not _render(sys.stdin.read()).strip():
        sys.exit("it renders nothing")
