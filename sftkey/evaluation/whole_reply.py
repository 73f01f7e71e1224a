"""Requests to a judge that end in time: the client's own limit is for each read, not for all."""

from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotDone
from threading import Thread
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import httpx2

MOST_BYTES = 1 << 20  # of a reply; a verdict takes some hundred


class WholeReply(httpx2.BaseTransport):
    """Reads each reply whole, within a deadline and a size.

    A server that sends a byte from time to time keeps every single read alive, of the headers too.
    So each request has a thread of its own, which is left behind when its time is over: it ends
    with the process, or when the client is closed.
    """

    def __init__(self, seconds: float, address: str) -> None:
        self.seconds, self.inner = seconds, httpx2.HTTPTransport(proxy=_proxy(address))

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request, and return the reply with its whole body.

        Raises:
            httpx2.ReadTimeout: The reply isn't whole when the time is over.
            httpx2.ReadError: It is larger than `MOST_BYTES`, or compressed, which hides its size.
        """
        done: Future[httpx2.Response] = Future()

        def send() -> None:
            try:
                done.set_result(self._read(request))
            except BaseException as error:
                done.set_exception(error)

        Thread(target=send, daemon=True).start()
        try:
            return done.result(self.seconds)
        except NotDone:
            what = f"no whole reply within {self.seconds:g} seconds"
            raise httpx2.ReadTimeout(what, request=request) from None

    def _read(self, request: httpx2.Request) -> httpx2.Response:
        request.headers["Accept-Encoding"] = "identity"
        response = self.inner.handle_request(request)
        try:
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise httpx2.ReadError("the reply is compressed", request=request)
            body = bytearray()
            for chunk in response.iter_raw():
                body += chunk
                if len(body) > MOST_BYTES:
                    what = f"the reply is larger than {MOST_BYTES:,} bytes"
                    raise httpx2.ReadError(what, request=request)
        finally:
            response.close()
        headers = [(k, v) for k, v in response.headers.multi_items() if k not in FRAMING]
        return httpx2.Response(response.status_code, headers=headers, content=bytes(body))

    def close(self) -> None:
        """Close the connections."""
        self.inner.close()


def _proxy(address: str) -> str | None:
    """Return the proxy that the environment names, which a client with a transport leaves aside."""
    asked, proxies = urlsplit(address), getproxies()
    if proxy_bypass(asked.hostname or ""):
        return None
    return proxies.get(asked.scheme, proxies.get("all"))


FRAMING = ("content-length", "transfer-encoding", "content-encoding")  # said anew of the whole body
