"""A release or the champion -> the chat page, POST /chat and OpenAI's /v1 over HTTP, until Ctrl-C.

The model is checked against its checksums, and its chat against params.yaml, before the first answer.
Costs the memory of the GGUF file and of serve.parallel contexts, and that of the embedder which finds sources.
"""

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from stages.params import Chat, Models, Tracking
from stages.program import BadParams, ServerFailed, run, say
from stages.serving.settings import Serve

if TYPE_CHECKING:
    from stages.serving.sources import Sources

KEYS = "DOCSMITH_API_KEYS"
MIN_KEY_CHARS = 16
STOP_S = 20  # for the answers that are open when the server is told to stop
LOOK_AGAIN_S = 1  # for another model


def main(
    serve: Serve,
    chat: Chat,
    tracking: Tracking,
    models: Models,
    store: Path = Path("data/store"),
    feedback: Path = Path("data/feedback.sqlite"),
) -> None:
    import uvloop

    keys = read_keys(os.environ)
    # another handler than Python's own, which asyncio would take for its own and cancel what ends the engine
    signal.signal(signal.SIGINT, _interrupted)
    with (
        contextlib.suppress(KeyboardInterrupt),  # uvicorn raises it again once the open questions are answered
        listen(serve, keys) as listener,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        runner.run(answer(listener, keys, serve, chat, tracking, models, store, feedback))
    say("serve: stopped")


def _interrupted(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def read_keys(environment: Mapping[str, str]) -> tuple[str, ...]:
    """The keys of which a caller must have one; () admits everyone. Raises BadParams, which shows no key."""
    keys = tuple(key.strip() for key in environment.get(KEYS, "").split(",") if key.strip())
    for number, key in enumerate(keys, start=1):
        if len(key) < MIN_KEY_CHARS or not key.isascii() or not key.isprintable() or " " in key:
            raise BadParams(
                f"{KEYS}: key {number} is not {MIN_KEY_CHARS} or more letters, digits and signs without spaces; "
                "make one with: openssl rand -hex 32"
            )
    return keys


def listen(serve: Serve, keys: tuple[str, ...]) -> socket.socket:
    """A socket that listens on the address in params.yaml. Raises ServerFailed when it cannot be had, BadParams when it needs keys."""
    from stages.serving.limits import is_loopback

    try:
        family = socket.AF_INET6 if ":" in serve.host else socket.AF_INET
        listener = socket.create_server((serve.host, serve.port), family=family)
    except OSError as error:
        reason = str(error.strerror or error).partition(" (")[0]
        raise ServerFailed(f"params.yaml: cannot listen on serve.host {serve.host}, serve.port {serve.port}: {reason}") from None
    if not keys and not is_loopback(listener.getsockname()[0]):
        listener.close()
        raise BadParams(
            f"params.yaml: serve.host {serve.host} lets other machines in, so callers need a key: set {KEYS} to keys "
            "separated by commas, or serve.host to 127.0.0.1"
        )
    return listener


async def answer(
    listener: socket.socket,
    keys: tuple[str, ...],
    serve: Serve,
    chat: Chat,
    tracking: Tracking,
    models: Models,
    store: Path,
    feedback: Path,
) -> None:
    """Serves until a signal, which uvicorn raises again when the open answers are finished."""
    import logging

    import uvicorn

    from stages.serving.api import LOG, application
    from stages.serving.engine import running_engine
    from stages.serving.feedback import Feedback
    from stages.serving.limits import Connection
    from stages.serving.sources import Sources, read_passages

    def sources_in(folder: Path) -> Sources:
        passages = read_passages(folder)
        say(
            f"serve: the sources of answers are looked up in {len(passages)} passages; embeddings that {store} lacks are computed now"
        )
        return Sources(passages, models.embedder, store, with_bars=True)

    logging.basicConfig(format="%(asctime)s %(message)s")
    LOG.setLevel(logging.INFO)
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    async with running_engine(serve, chat, tracking) as engine:
        sources = Followed(engine, sources_in)
        app = application(engine, sources, Feedback(feedback), serve, chat, host, keys)
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            log_config=None,
            access_log=False,
            proxy_headers=False,  # else whoever names another address in a header has another rate
            server_header=False,
            timeout_graceful_shutdown=STOP_S,
        )
        following = asyncio.create_task(sources.follow())
        say(f"serve: http://{shown}:{port}/chat answers questions, http://{shown}:{port}/ is the chat page (Ctrl-C stops)")
        try:
            await uvicorn.Server(config).serve(sockets=[listener])
        finally:
            following.cancel()


class Followed:
    """The sources of the model that answers, read again in the background when another one does."""

    def __init__(self, engine: Any, read: "Callable[[Path], Sources]") -> None:
        self.engine, self.read = engine, read
        self.use(engine.served.folder, read(engine.served.folder))

    def use(self, folder: Path, sources: "Sources") -> None:
        self.folder = folder
        self.find, self.prompt, self.passage = sources.find, sources.prompt, sources.passage

    async def follow(self) -> NoReturn:
        while True:
            await asyncio.sleep(LOOK_AGAIN_S)
            served = self.engine.served
            if served is None or served.folder == self.folder:
                continue
            try:
                sources = await asyncio.to_thread(self.read, served.folder)
            except Exception as error:  # whatever it is, the old ones can be shown
                say(f"serve: the sources stay those of {self.folder}: {error}")
                self.folder = served.folder
            else:
                self.use(served.folder, sources)


if __name__ == "__main__":
    run(main)
