"""JAX's persistent compilation cache for commands: what was compiled once is loaded the next time.

The folder is the first of: the command's option, JAX's own `$JAX_COMPILATION_CACHE_DIR`, `$PALLADION_CACHE/compiled`,
`$XDG_CACHE_HOME/palladion/compiled` and `~/.cache/palladion/compiled`. The option "off", or JAX's own
`$JAX_ENABLE_COMPILATION_CACHE=false`, compiles everything anew. Libraries leave the cache to their users: only commands
call `use_compilation_cache`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import jax

from palladion.kernels.tuning import CACHE

OPTION: Final = "--compilation-cache"
"""Option of commands that is passed to `use_compilation_cache`."""

HELP: Final = "folder that keeps compiled programs for the next start, or 'off' (~/.cache/palladion/compiled)"
"""Help for the option."""


def use_compilation_cache(option: str | None = None) -> str | None:
    """Makes JAX keep compiled programs in a folder, and load what is there.

    Args:
      option: a folder, "off", or None for the folder that the environment or the user's home gives.

    Returns:
      A line to show to the user where the folder is new or cannot be written, otherwise None.
    """
    if option == "off":
        jax.config.update("jax_enable_compilation_cache", False)
    if not jax.config.values["jax_enable_compilation_cache"]:
        return None
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        # Most programs compile in less than JAX's minimum of a second, and together they take most of the time.
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if option is None and jax.config.values["jax_compilation_cache_dir"]:
        return None
    folder = (_default_folder() if option is None else Path(option)).expanduser().absolute()
    known = folder.is_dir()
    try:
        # Whoever can write to the folder can run code in processes that read it.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        return f"compiled programs are not kept for the next start: {error} ({OPTION}=FOLDER or off)"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return None if known else f"compiled programs are kept in {folder} for the next start ({OPTION}=off keeps none)"


def inherited() -> dict[str, str]:
    """Returns environment variables with which processes that this one starts use the same folder, or none."""
    folder = jax.config.values["jax_compilation_cache_dir"]
    if not jax.config.values["jax_enable_compilation_cache"]:
        return {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    return {"JAX_COMPILATION_CACHE_DIR": folder} if folder else {}


def _default_folder() -> Path:
    """Returns the folder of `$PALLADION_CACHE`, otherwise that of the user's home."""
    own = os.environ.get(CACHE)
    home = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "palladion"
    return (Path(own) if own else home) / "compiled"
