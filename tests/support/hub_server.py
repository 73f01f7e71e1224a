"""A local stand-in for the hub's HTTP API, as far as a push uses it."""

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class FakeHub:
    """What was pushed: repositories as they were asked for, and the files of the commits."""

    url: str = ""
    refuses: bool = False
    repos: list[dict[str, object]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    summaries: list[str] = field(default_factory=list)


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Serve until the block ends; every file is taken in the commit itself, none by LFS."""
    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            """Stay silent."""

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if hub.refuses:
                self.answer({"error": "Forbidden"}, 403)
            elif self.path == "/api/repos/create":
                hub.repos.append(json.loads(body))
                owner, name = hub.repos[-1]["organization"], hub.repos[-1]["name"]
                self.answer({"url": f"{hub.url}/{owner}/{name}"})
            elif "/preupload/" in self.path:
                asked = json.loads(body)["files"]
                regular = {"uploadMode": "regular", "shouldIgnore": False}
                self.answer({"files": [{"path": each["path"], **regular} for each in asked]})
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "header":
                        hub.summaries.append(value["summary"])
                    else:
                        hub.files[value["path"]] = base64.b64decode(value["content"])
                address = f"{hub.url}/o/n/commit/1"
                self.answer({"commitUrl": address, "commitOid": "1", "success": True})
            else:  # the card's metadata are looked at
                self.answer({"errors": [], "warnings": []})

        def answer(self, content: dict[str, object], status: int = 200) -> None:
            text = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
