"""A checksum of a tensor's bytes that costs less than writing them: CRC-32 takes longer than the copy itself."""

from __future__ import annotations

import zlib

import numpy

PAGE = 4096


class Checksum:
    """The CRC-32 of one sum for each page of 4096 bytes; the bytes come in pieces of whole pages, the last in any.

    A page that is missing, zero, of another place or changed gives another number. It is no protection against an
    attacker, as CRC-32 is none.

    >>> one, other = Checksum(), Checksum()
    >>> one.add(bytes(range(256)) * 40)
    >>> other.add(bytes(range(256)) * 32), other.add(bytes(range(256)) * 8)
    (None, None)
    >>> one.value == other.value
    True
    """

    def __init__(self) -> None:
        self.value = 0

    def add(self, piece: bytes | memoryview) -> None:
        """Take the next bytes."""
        pages, rest = divmod(len(piece), PAGE)
        if pages:
            words = numpy.frombuffer(piece, dtype="<u8", count=pages * (PAGE // 8))
            self.value = zlib.crc32(words.reshape(pages, -1).sum(axis=1).tobytes(), self.value)
        if rest:
            self.value = zlib.crc32(piece[-rest:], self.value)
