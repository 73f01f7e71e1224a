"""The bytes that tokens of a byte-level vocabulary stand for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter

# What can be shown stands for itself in such a vocabulary, the other bytes stand behind.
_SHOWN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_OTHERS = [byte for byte in range(0x100) if byte not in _SHOWN]
SIGNS = {byte: chr(byte) for byte in _SHOWN}
SIGNS |= {byte: chr(0x100 + place) for place, byte in enumerate(_OTHERS)}
BYTES = {sign: byte for byte, sign in SIGNS.items()}


class Spelling(dict[int, bytes]):
    """The bytes of each token by its id, as the byte-level decoder reads them.

    Args:
        token_of: Returns a token by its id.
    """

    def __init__(self, token_of: Callable[[int], str | None]) -> None:
        super().__init__()
        self.token_of = token_of

    def __missing__(self, number: int) -> bytes:
        token = self.token_of(number) or ""
        known = all(sign in BYTES for sign in token)  # an added token is mostly text as it is
        self[number] = bytes(BYTES[sign] for sign in token) if known else token.encode()
        return self[number]

    def of(self, ids: Sequence[int]) -> bytes:
        """Return what ids stand for."""
        # The fastest way; a getter of one key would return no tuple.
        return b"".join(itemgetter(*ids, ids[0])(self)[:-1]) if ids else b""


def lost_bytes(id_of: Callable[[str], int | None]) -> bytes:
    """Return the bytes that a vocabulary has no token for, given how to find a token's id."""
    return bytes(byte for byte, sign in SIGNS.items() if id_of(sign) is None)
