"""A small OpenAI-style server that answers, or fails in the way that a test asks for."""

import json
import socket
import struct
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Turn = Literal["ok", "429", "500", "400", "slow", "reset", "no choices", "null", "not json", "html", "length"]
SLOW_S = 3.0


def echo(body: dict[str, Any]) -> str:
    return f"echo {body['messages'][-1]['content']}"


class FakeEndpoint:
    """Listens from `with` to its end. `turn` picks what call n (from 0) to one prompt gets; `text` what an answer says.

    After `dies_after` calls the server is gone: open connections are reset, new ones refused.
    """

    def __init__(
        self,
        turn: Callable[[str, int], Turn] = lambda prompt, call: "ok",
        text: Callable[[dict[str, Any]], str] = echo,
        dies_after: int | None = None,
    ) -> None:
        self.turn, self.text, self.dies_after = turn, text, dies_after
        self.bodies: list[dict[str, Any]] = []
        self.calls: dict[str, int] = {}
        self.lock = threading.Lock()
        fake = self

        class Answering(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                assert self.path == "/v1/chat/completions"
                fake.answer(self, body)

            def log_message(self, *_: object) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Answering)
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
        turn = self.turn(prompt, call)
        if turn == "reset":
            return _reset(http)
        if turn == "slow":
            time.sleep(SLOW_S)
        if turn in ("429", "500", "400"):
            return _send(http, int(turn), json.dumps({"error": {"message": f"fake {turn}"}}))
        if turn == "not json":
            return _send(http, 200, "{half of a")
        if turn == "html":
            return _send(http, 200, "<html>a proxy says hello</html>", "text/html")
        message = {"role": "assistant", "content": None if turn == "null" else self.text(body)}
        choice = {"index": 0, "message": message, "finish_reason": "length" if turn == "length" else "stop"}
        reply = {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [] if turn == "no choices" else [choice],
            "usage": {"prompt_tokens": 5, "completion_tokens": 7, "total_tokens": 12},
        }
        _send(http, 200, json.dumps(reply))


def _send(http: BaseHTTPRequestHandler, status: int, body: str, kind: str = "application/json") -> None:
    try:
        http.send_response(status)
        http.send_header("Content-Type", kind)
        http.send_header("Content-Length", str(len(body.encode())))
        http.end_headers()
        http.wfile.write(body.encode())
    except OSError:  # the client gave up waiting
        http.close_connection = True


def _reset(http: BaseHTTPRequestHandler) -> None:
    http.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    http.connection.close()
    http.close_connection = True
    http.wfile = http.rfile  # type: ignore[assignment]  # nothing is left to flush
