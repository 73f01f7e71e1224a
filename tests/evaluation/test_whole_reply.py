"""A judge's endpoint that never ends its reply, or sends one without end, holds no run."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from sftkey.data.response import Example
from sftkey.evaluation.judge import Judge
from sftkey.recipe.schema import JudgeSection

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
SECONDS = 0.2


@contextmanager
def sending(send: Callable[[socket.socket], None]) -> Iterator[str]:
    """Run a server that reads a request and then sends what `send` says; yield its address."""
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with suppress(OSError):  # the asker has gone, or the test has ended
            while True:
                connection, _ = server.accept()
                threading.Thread(target=answer, args=(connection,), daemon=True).start()

    def answer(connection: socket.socket) -> None:
        with connection, suppress(OSError):
            connection.recv(1 << 16)
            send(connection)

    threading.Thread(target=serve, daemon=True).start()
    with server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/v1"


def drip(head: bytes) -> Callable[[socket.socket], None]:
    """Send a head, and then a byte every twentieth of a second for ten seconds."""

    def send(connection: socket.socket) -> None:
        connection.sendall(head)
        for _ in range(200):
            connection.sendall(b"x")
            time.sleep(0.05)

    return send


def flood(head: bytes, sent: list[int]) -> Callable[[socket.socket], None]:
    """Send a head, and then 64 MiB, as far as they are taken; note the size of what was."""

    def send(connection: socket.socket) -> None:
        connection.sendall(head)
        for _ in range(1 << 10):
            connection.sendall(b" " * (1 << 16))
            sent.append(1 << 16)

    return send


def failure(send: Callable[[socket.socket], None], seconds: float) -> str:
    """Return why a judge behind such a server can't be asked."""
    with sending(send) as base_url:
        made = {"base_url": base_url, "model": "m", "api_key_env": None, "timeout_seconds": seconds}
        judge = Judge(JudgeSection(**made), lambda text: None)
        assert judge.flags([Example("Double 1?", "", "2", 1)], ["2"]) == {}
    return str(judge.failure).splitlines()[0]


@pytest.mark.parametrize(
    "head", [b"", HEAD, HEAD + b"Content-Length: 9999\r\n\r\n"], ids=["start", "headers", "body"]
)
@pytest.mark.fault("a hub or judge that is gone, slow or endless")
def test_a_reply_that_drips_is_given_up(
    head: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    """Each single byte comes in time, and the whole doesn't: three tries, and no more."""
    monkeypatch.setenv("SFTKEY_CACHE", str(tmp_path))
    since = time.monotonic()
    said = failure(drip(head), SECONDS)
    assert said.endswith("the judge m can't be asked: Request timed out.")
    assert time.monotonic() - since < 3 * SECONDS + 5  # between tries the library waits


@pytest.mark.parametrize("status", [b"200 OK", b"500 Broken"])
@pytest.mark.fault("a hub or judge that is gone, slow or endless")
def test_a_reply_without_end_is_given_up_at_its_size(
    status: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    """Also that of an error, which the library would read whole; buffers take some more."""
    monkeypatch.setenv("SFTKEY_CACHE", str(tmp_path))
    head = HEAD.replace(b"200 OK", status) + b"Content-Length: 999999999999\r\n\r\n"
    sent: list[int] = []
    said = failure(flood(head, sent), 60)
    assert said.endswith("the judge m can't be asked: Connection error.")
    assert sum(sent) < 3 * (16 << 20)  # in three tries


@pytest.mark.parametrize(
    ("status", "target"),
    [(301, "http://elsewhere.invalid/v1"), (302, "file:///dev/zero"), (307, "/v1/again")],
)
@pytest.mark.fault("a hub or judge that is gone, slow or endless")
def test_a_redirect_is_not_followed(
    status: int, target: str, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    """Neither round and round, a deadline each, nor to a host that the recipe doesn't name."""
    monkeypatch.setenv("SFTKEY_CACHE", str(tmp_path))
    asked: list[int] = []

    def send(connection: socket.socket) -> None:
        asked.append(1)
        head = f"HTTP/1.1 {status} Elsewhere\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n"
        connection.sendall(head.encode())

    said = failure(send, 5)
    assert said.endswith(f"can't be asked: it redirects to {target}, which isn't followed")
    assert len(asked) == 1


@pytest.mark.parametrize("sent", [b"", HEAD + b"Content-Length: 99\r\n\r\n{"], ids=["none", "half"])
@pytest.mark.fault("a hub or judge that is gone, slow or endless")
def test_a_connection_that_closes_early_is_one_error(
    sent: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    """Before the reply, or within its body."""
    monkeypatch.setenv("SFTKEY_CACHE", str(tmp_path))
    said = failure(lambda connection: connection.sendall(sent), 5)
    assert said.endswith("the judge m can't be asked: Connection error.")


def test_a_judge_behind_a_proxy_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    """The one that the environment names, but for hosts that it excepts."""
    monkeypatch.setenv("SFTKEY_CACHE", str(tmp_path))
    reply = HEAD + b'Content-Length: 48\r\n\r\n{"choices": [{"message": {"content": "right"}}]}'
    asked: list[str] = []

    def send(connection: socket.socket) -> None:
        asked.append("proxy")
        connection.sendall(reply)

    made = {"base_url": "http://judge.invalid/v1", "model": "m", "api_key_env": None}
    with sending(send) as address:
        monkeypatch.setenv("http_proxy", address.removesuffix("/v1"))
        for excepted in ("", "judge.invalid"):
            monkeypatch.setenv("no_proxy", excepted)
            Judge(JudgeSection(**made, timeout_seconds=5), lambda text: None).flags(
                [Example(f"Double 1{excepted}?", "", "2", 1)], ["2"]
            )
    assert asked == ["proxy"]
