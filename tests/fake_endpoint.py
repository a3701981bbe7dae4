"""A small OpenAI-style server that answers, or fails in the way that a test asks for."""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Turn = Literal[
    "ok",
    "429",
    "429 wait",  # with Retry-After: 1
    "500",
    "400",
    "401",
    "slow",
    "drip",  # a byte each 0.2 s, for 10 s
    "reset",
    "no choices",
    "null",
    "empty",  # no byte of a body
    "half json",
    "huge",  # 64 MB, if the client takes them
    "wrong keys",
    "wrong types",
    "nan",
    "nested",
    "html",
    "length",
    "declined",  # by the field `refusal`
    "refusal",
    "wrong language",
    "swapped",  # another model's name on a good reply
]
SLOW_S = 3.0
DRIPS = 50
HUGE_PARTS = 64
BODIES = {
    "empty": "",
    "half json": '{"id": "1", "choices": [{"index": 0, "mess',
    "wrong keys": '{"result": "echo", "done": true}',
    "wrong types": '{"choices": [{"message": {"content": ["echo"]}}]}',
    "nan": '{"choices": [{"message": {"content": "echo"}}], "usage": {"completion_tokens": NaN}}',
    "nested": '{"choices": ' + "[" * 100_000,
    "html": "<html>a proxy says hello</html>",
}
TEXTS = {
    "null": None,
    "declined": None,
    "refusal": "I'm sorry, but I can't help with that.",
    "wrong language": "Der Schlüssel steht in der Umgebung.",
}


def echo(body: dict[str, Any]) -> str:
    return f"echo {body['messages'][-1]['content']}"


def chosen(body: dict[str, Any]) -> str:
    """A reply by the request's schema: the first of what a field offers; where it is free, a question about the prompt's `Answer:`."""
    topic = body["messages"][-1]["content"].partition("Answer: ")[2].split("\n")[0][:60].rstrip(".")
    fields = body["response_format"]["json_schema"]["schema"]["properties"]
    return json.dumps({name: field.get("enum", [f"What about {topic}?"])[0] for name, field in fields.items()})


class FakeEndpoint:
    """Listens from `with` to its end. `turn` picks what call n (from 0) to one prompt gets; `text` what an answer says.

    `models` are the entries of its list of models; None: it has no such route. `answered_as`: the model named in replies, else
    the one asked for. Each call takes `latency_s`. After `dies_after` calls the server is gone: open connections are reset, new ones refused.
    """

    def __init__(
        self,
        turn: Callable[[str, int], Turn] = lambda prompt, call: "ok",
        text: Callable[[dict[str, Any]], str] = echo,
        dies_after: int | None = None,
        models: list[dict[str, Any]] | None = None,
        answered_as: str = "",
        latency_s: float = 0.0,
    ) -> None:
        self.turn, self.text, self.dies_after = turn, text, dies_after
        self.models, self.answered_as, self.latency_s = models, answered_as, latency_s
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []  # the Authorization header of every request
        self.calls: dict[str, int] = {}
        self.listing_status = 200
        self.listings = self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()
        fake = self

        class Answering(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.path == "/v1/chat/completions"
                fake.keys.append(self.headers["Authorization"])
                fake.answer(self, body)

            def do_GET(self) -> None:
                fake.keys.append(self.headers["Authorization"])
                fake.listings += 1
                if self.path != "/v1/models" or fake.models is None:
                    return _send(self, 404, "{}")
                _send(self, fake.listing_status, json.dumps({"object": "list", "data": fake.models}))

            def log_message(self, *_: object) -> None: ...

        class Server(ThreadingHTTPServer):
            request_queue_size = 128  # the default of 5 makes many callers at once wait for a second

        self.server = Server(("127.0.0.1", 0), Answering)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def __enter__(self) -> "FakeEndpoint":
        self.loop = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})
        self.loop.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.loop.join()
        self.server.server_close()

    def answer(self, http: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        prompt = body["messages"][-1]["content"]
        with self.lock:
            if self.dies_after is not None and len(self.bodies) >= self.dies_after:
                self.server.socket.close()
                return _reset(http)
            call = self.calls.get(prompt, 0)
            self.calls[prompt] = call + 1
            self.bodies.append(body)
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        turn = self.turn(prompt, call)
        time.sleep(SLOW_S if turn == "slow" else self.latency_s)
        with self.lock:
            self.at_once -= 1  # before the reply, since the next call may follow at once
        if turn == "reset":
            return _reset(http)
        if turn[:3].isdigit():
            wait = {"Retry-After": "1"} if turn == "429 wait" else {}
            return _send(http, int(turn[:3]), json.dumps({"error": {"message": f"fake {turn}"}}), wait)
        if turn == "huge":
            return _send(http, 200, " " * 1_000_000, repeat=HUGE_PARTS)
        if turn in BODIES:
            return _send(http, 200, BODIES[turn])
        message = {"role": "assistant", "content": TEXTS[turn] if turn in TEXTS else self.text(body)}
        if turn == "declined":
            message["refusal"] = "I can't help\nwith that."
        choice = {"index": 0, "message": message, "finish_reason": "length" if turn == "length" else "stop"}
        reply = json.dumps(
            {
                "id": "1",
                "object": "chat.completion",
                "created": 0,
                "model": "someone-else" if turn == "swapped" else self.answered_as or body["model"],
                "choices": [] if turn == "no choices" else [choice],
                "usage": {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12},
            }
        )
        if turn == "drip":
            return _send(http, 200, " ", repeat=DRIPS, pause_s=0.2)
        _send(http, 200, reply)


def _send(
    http: BaseHTTPRequestHandler,
    status: int,
    part: str,
    headers: dict[str, str] | None = None,
    repeat: int = 1,
    pause_s: float = 0.0,
) -> None:
    """A reply whose body is `part` `repeat` times over."""
    try:
        http.send_response(status)
        for name, value in (
            {"Content-Type": "application/json", "Content-Length": str(len(part.encode()) * repeat)} | (headers or {})
        ).items():
            http.send_header(name, value)
        http.end_headers()
        for _ in range(repeat):
            http.wfile.write(part.encode())
            time.sleep(pause_s)
    except OSError:  # the client gave up waiting
        http.close_connection = True


def _reset(http: BaseHTTPRequestHandler) -> None:
    http.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    http.connection.close()
    http.close_connection = True
    http.wfile = http.rfile  # type: ignore[assignment]  # nothing is left to flush
