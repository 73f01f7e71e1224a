"""A judge's verdicts in the user's cache: each is kept as it comes, and never asked for again."""

from __future__ import annotations

import json
from hashlib import sha256
from threading import Lock

from sftkey.errors import JudgeError
from sftkey.files import cache_folder


class Verdicts:
    """The verdicts of one judge, a line each, named by the hash of the prompt that was sent.

    A line that a kill has torn is skipped, and its prompt is asked again.

    Args:
        base_url: The judge's endpoint.
        model: Its model there.
    """

    def __init__(self, base_url: str, model: str) -> None:
        name = _sha256(json.dumps([base_url, model]))
        self.file = cache_folder() / "verdicts" / f"{name}.jsonl"
        self._lock = Lock()
        self._known: dict[str, bool] = {}
        if self.file.exists():
            for line in self.file.read_text(encoding="utf-8", errors="replace").splitlines():
                self._known |= _row(line)

    def get(self, prompt: str) -> bool | None:
        """Give the verdict on a prompt; None where there is none."""
        return self._known.get(_sha256(prompt))

    def keep(self, prompt: str, right: bool) -> None:
        """Write a verdict; threads may do so at once.

        Raises:
            JudgeError: The cache can't be written.
        """
        key = _sha256(prompt)
        try:
            with self._lock:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with self.file.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps({"prompt_sha256": key, "right": right}) + "\n")
                self._known[key] = right
        except OSError as error:
            what = f"the judge's verdicts can't be written: {error.strerror or error}"
            hint = "set SFTKEY_CACHE to a folder of yours"
            raise JudgeError(str(cache_folder()), what, hint) from error


def _row(line: str) -> dict[str, bool]:
    """Read a line; nothing where it isn't whole."""
    try:
        row = json.loads(line)
        return {row["prompt_sha256"]: row["right"]} if isinstance(row["right"], bool) else {}
    except (ValueError, TypeError, KeyError):
        return {}


def _sha256(text: str) -> str:
    return sha256(text.encode()).hexdigest()
