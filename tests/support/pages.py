"""Reads a page as a test wants it."""

import re
from html.parser import HTMLParser

VOID = {"meta", "input", "br", "line", "polyline", "circle", "img"}


class Page(HTMLParser):
    """Reads a page; an element that isn't closed, or closed twice, is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str, **attributes: str) -> list[dict[str, str | None]]:
        """Return the attributes of the elements of a name; `class_` must be one of its classes."""
        wanted = attributes.pop("class_", None)
        return [
            found
            for name, found in self.elements
            if name == tag and (wanted is None or wanted in (found.get("class") or "").split())
        ]

    def check_whole(self) -> None:
        """Check that the page needs nothing beside it, and runs no script but its own."""
        assert len(self.all("script")) == 1
        assert not re.search(r"https?://|@import|url\(", self.text)
        links = [found for _, found in self.elements if {"src", "href"} & set(found)]
        images = [
            found for found in links if (found.get("src") or "").startswith("data:image/png;")
        ]
        skip = {"class": "skip", "href": "#answers"}
        assert [found for found in links if found not in images] == [skip]
