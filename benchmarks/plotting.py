"""Matplotlib as an optional dependency."""

from __future__ import annotations

import importlib.util


def require_matplotlib(what: str = "a picture") -> None:
    """Checks that matplotlib is installed.

    Args:
      what: what needs it, for the message.

    Raises:
      ImportError: it is not installed; the message says how to install it.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError(f"{what} needs matplotlib: pip install 'palladion[bench]', or pip install matplotlib")
