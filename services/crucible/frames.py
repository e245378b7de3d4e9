"""The wire format in which a sandbox's output travels: runner -> dispatcher or monitor -> storage.

A frame is a 13-byte header (kind: 1 byte, milliseconds since the run began: 8 bytes, payload length: 4 bytes; big endian) and
its payload. Frames of one run arrive in the order in which the runner read them, so that two streams stay apart and in order.
`crucible.runner` writes the same format with the standard library alone; a test holds the two together.

A container's log keeps lines and not bytes (it drops carriage returns and cuts at newlines), so through one each frame travels as
a line of base64.
"""

from __future__ import annotations

import binascii
import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

HEADER = struct.Struct(">BQI")
# The runner reads at most this much at once; anything larger in a header is not ours.
MAX_PAYLOAD = 1024 * 1024
# Fits a signed 64-bit column, and no run lasts that long.
MAX_AT_MS = 2**63 - 1
# The largest frame in base64, which makes four characters of three bytes.
MAX_LINE = 4 * -(-(HEADER.size + MAX_PAYLOAD) // 3)
# What is kept of lines that are no frames. The last of them tell most: a failing program's own words end with the error.
_STRAY_BYTES = 4096


class Kind(IntEnum):
    """What a frame carries."""

    STDOUT = 1
    STDERR = 2
    STARTED = 3
    REPORT = 4


_KINDS = frozenset(Kind)


@dataclass(frozen=True, slots=True)
class Frame:
    """One piece of output, or a message of the runner. `at_ms` counts from the start of the run."""

    kind: Kind
    at_ms: int
    payload: bytes

    def encode(self) -> bytes:
        """Return header and payload as they travel.

        Raises:
            FrameError: the payload is larger than a decoder accepts, or the time is out of range.
        """
        if len(self.payload) > MAX_PAYLOAD or not 0 <= self.at_ms <= MAX_AT_MS:
            raise FrameError(f"no frame holds {len(self.payload)} bytes at {self.at_ms} ms")
        return HEADER.pack(self.kind, self.at_ms, len(self.payload)) + self.payload

    def encode_line(self) -> bytes:
        """Return the frame as a line of base64, its newline included.

        Raises:
            FrameError: as `encode`.
        """
        return binascii.b2a_base64(self.encode())


class FrameError(ValueError):
    """Bytes that are not frames: the peer is not a runner, or it broke off and went on."""


class Decoder:
    """Cuts a byte stream into frames; keeps what is incomplete, at most one frame and what was fed last, until more arrives.

    After a `FrameError` the position in the stream is lost for good: every later use raises it again.
    """

    def __init__(self) -> None:
        self._pending = bytearray()

    @property
    def pending(self) -> int:
        """Bytes not yet given out as frames."""
        return len(self._pending)

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Take in `data` and return an iterator over every frame that is complete now.

        A frame leaves the decoder as it is given out, so an iteration that stops early goes on with the next call.

        Raises:
            FrameError: from the iterator, after the good frames: an unknown kind, or an impossible length or time.
        """
        self._pending += data
        return self._complete()

    def _complete(self) -> Iterator[Frame]:
        while len(self._pending) >= HEADER.size:
            kind, at_ms, length = HEADER.unpack_from(self._pending)
            if kind not in _KINDS or length > MAX_PAYLOAD or at_ms > MAX_AT_MS:
                raise FrameError(f"not a frame: kind {kind}, length {length}, at {at_ms} ms")
            end = HEADER.size + length
            if len(self._pending) < end:
                return
            frame = Frame(Kind(kind), at_ms, bytes(self._pending[HEADER.size : end]))
            # Cheap: a bytearray drops its front without moving the rest.
            del self._pending[:end]
            yield frame


class LineDecoder:
    """Finds the frames in a container's log, where each is a line of base64; keeps at most one line and what was fed last.

    Nothing that is not a frame can harm what follows it: a runner's or a runtime's last words, or a line that was torn where a container
    was killed, are kept aside for people (`strays`). A log that breaks off and is read again from its start needs a new decoder.
    """

    def __init__(self) -> None:
        self._pending = bytearray()
        self._searched = 0
        self._overlong = False
        self._strays = bytearray()

    @property
    def pending(self) -> int:
        """Bytes of a line that has not ended yet."""
        return len(self._pending)

    @property
    def strays(self) -> str:
        """The last lines that were no frames; empty if there were none."""
        return self._strays.decode(errors="replace").strip()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Take in `data` and return an iterator over every frame that is complete now.

        A frame leaves the decoder as it is given out, so an iteration that stops early goes on with the next call.
        """
        self._pending += data
        return self._complete()

    def _complete(self) -> Iterator[Frame]:
        while (end := self._pending.find(b"\n", self._searched)) >= 0:
            line = bytes(self._pending[:end])
            del self._pending[: end + 1]
            self._searched = 0
            overlong, self._overlong = self._overlong, False
            frame = None if overlong else _frame_of(line)
            if frame:
                yield frame
            else:
                self._keep(line)
        if len(self._pending) > MAX_LINE:
            self._keep(bytes(self._pending[-_STRAY_BYTES:]))
            self._pending.clear()
            self._overlong = True
        self._searched = len(self._pending)

    def _keep(self, line: bytes) -> None:
        self._strays += line[-_STRAY_BYTES:] + b"\n"
        del self._strays[:-_STRAY_BYTES]


def _frame_of(line: bytes) -> Frame | None:
    try:
        decoded = binascii.a2b_base64(line, strict_mode=True)
        found = decode_all(decoded)
    except ValueError:
        return None
    return found[0] if len(found) == 1 else None


def encode_all(frames: Iterable[Frame]) -> bytes:
    """Return many frames as one body."""
    return b"".join(frame.encode() for frame in frames)


def decode_all(body: bytes) -> list[Frame]:
    """Return the frames of a whole body.

    Raises:
        FrameError: the body is not frames, or ends inside one.
    """
    decoder = Decoder()
    frames = list(decoder.feed(body))
    if decoder.pending:
        raise FrameError(f"the body ends inside a frame, {decoder.pending} bytes over")
    return frames
