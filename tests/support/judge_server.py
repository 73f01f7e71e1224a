"""A server on this machine that speaks as much of the OpenAI protocol as a judge needs."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = tuple[int, str]  # status, and the reply's text or the error's


class JudgeServer:
    """Answers what `say` gives to a prompt, and notes what it was asked.

    `raw` is sent as it is in the place of a completion.
    """

    def __init__(self) -> None:
        self.say: Callable[[str], str | Answer] = lambda prompt: "yes"
        self.raw: bytes | None = None
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.base_url = ""
        self.now, self.most_at_once = 0, 0
        self.lock = threading.Lock()

    @property
    def prompts(self) -> list[str]:
        """Return the prompts in the order in which they came."""
        return [body["messages"][-1]["content"] for body in self.asked]

    def answer(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> tuple[int, bytes]:
        """Note a request, and give status and body of what it gets."""
        with self.lock:
            self.paths.append(path)
            self.headers.append(headers)
            self.asked.append(body)
            self.now += 1
            self.most_at_once = max(self.now, self.most_at_once)
        said = self.say(body["messages"][-1]["content"])
        with self.lock:
            self.now -= 1
        status, text = (200, said) if isinstance(said, str) else said
        if status != 200:
            return status, json.dumps({"error": {"message": text}}).encode()
        if self.raw is not None:
            return 200, self.raw
        message = {"role": "assistant", "content": text}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        whole = {"id": "1", "object": "chat.completion", "created": 1, "model": "m"}
        return 200, json.dumps({**whole, "choices": [choice]}).encode()


@contextmanager
def served() -> Iterator[JudgeServer]:
    """Run a server on a free port; it is gone afterwards."""
    judge = JudgeServer()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            headers = {name.lower(): value for name, value in self.headers.items()}
            status, content = judge.answer(self.path, headers, body)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with suppress(ConnectionError):  # the asker gave up
                self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    judge.base_url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
