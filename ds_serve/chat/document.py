"""The text of an uploaded file: txt, md or pdf.

Knows files; knows no page. The chat tab calls it in a thread.
"""

from __future__ import annotations

import os
from pathlib import Path

import pypdf

ENDINGS = [".txt", ".md", ".pdf"]
MAX_BYTES = 10 * 2**20
_MAX_PAGES = 500
_MAX_CHARS = 1_000_000


def read(path: str, name: str) -> str:
    """The text of the file at path, which was called name. Raises ValueError with a sentence."""
    ending = Path(name).suffix.lower()
    if ending not in ENDINGS:
        raise ValueError(f"{name}: choose a file that ends in {', '.join(ENDINGS)}.")
    if os.path.getsize(path) > MAX_BYTES:
        raise ValueError(f"{name} has more than {MAX_BYTES >> 20} MiB. Choose a smaller file.")
    text = (_pdf(path, name) if ending == ".pdf" else _plain(path, name)).strip()
    if not text:
        raise ValueError(f"{name} has no text in it (a scan is a picture). Choose another file.")
    if len(text) > _MAX_CHARS:
        raise ValueError(f"{name} has more than {_MAX_CHARS:,} characters. Choose a part of it.")
    return text


def _plain(path: str, name: str) -> str:
    data = Path(path).read_bytes()
    if b"\0" in data:
        raise ValueError(f"{name} is no text file. Choose another file.")
    return data.decode("utf-8-sig", errors="replace")


def _pdf(path: str, name: str) -> str:
    try:
        reader = pypdf.PdfReader(path)
        if reader.is_encrypted:
            raise ValueError(f"{name} is encrypted. Save it without a password first.")
        if len(reader.pages) > _MAX_PAGES:
            raise ValueError(f"{name} has more than {_MAX_PAGES} pages. Choose a part of it.")
        return "\n\n".join(page.extract_text() for page in reader.pages)
    except ValueError:
        raise
    except Exception as error:  # pypdf raises what it likes over a broken file
        raise ValueError(f"{name} cannot be read as a PDF ({error}). Choose another file.") from error
