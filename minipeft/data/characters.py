"""A file's bytes as characters: unpacked where gzip packed them, and decoded. What its first bytes show is not asked
for: gzip, and by a mark its encoding."""

from __future__ import annotations

import codecs
import gzip
import io
from pathlib import Path

from minipeft.errors import DataError

# UTF-32's mark begins with UTF-16's.
ENCODING_MARKS = ((codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
                  (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
MOST_BYTES = 4 << 30  # of an unpacked file: gzip makes a thousandth of what is always the same
PART = 1 << 20


def unpacked(content: bytes, path: Path) -> bytes | bytearray:
    """A file's bytes as they were before gzip packed them, if it did.

    Raises:
        DataError: more than MOST_BYTES.
        OSError, EOFError, zlib.error: it is damaged.
    """
    if not content.startswith(b"\x1f\x8b"):
        return content
    found = bytearray()
    with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
        while part := file.read(PART):
            found += part
            if len(found) > MOST_BYTES:
                raise DataError(f"{path} has more than {MOST_BYTES:,} bytes when it is unpacked: split it into several "
                                "files")
    return found


def decoded(content: bytes | bytearray, path: Path, encoding: str | None) -> tuple[str, str]:
    """A file's bytes as text, without a mark of its encoding; and in words which encoding its mark showed.

    Raises:
        DataError: another encoding than the named, the marked, or UTF-8.
    """
    marked = next((name for mark, name in ENCODING_MARKS if content.startswith(mark)), None)
    name = encoding or marked or "utf-8"
    try:
        text = content.decode(name).removeprefix("\ufeff")
    except UnicodeError as error:
        line = 1 + content[:getattr(error, "start", 0)].count(b"\n")
        raise DataError(f"{path} is not encoded in {name.upper()}, as its line {line:,} shows; name its encoding, such "
                        "as --encoding cp1252, which Windows has in western Europe") from error
    if "\0" in text[:1000]:
        guess = "utf-16-be" if text.startswith("\0") else "utf-16-le"
        raise DataError(f"{path} has zeros between its characters; if it is UTF-16, say --encoding {guess}")
    return text, "" if encoding or marked in (None, "utf-8") else f"{marked} by its mark"
