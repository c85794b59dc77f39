"""Finds the page that holds an operation's generated tables."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[1]


def static_page(operation: str) -> str:
    """Returns the text of docs/<operation>_static.md, or of the operation's README where its tables are there."""
    page = ROOT / "docs" / f"{operation}_static.md"
    return (page if page.exists() else ROOT / "kernels" / operation / "README.md").read_text()
