"""Adds the repository's Markdown pages to the site, each at its own path, so that links between them hold."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PATTERNS = (
    "*.md",
    "docs/*.md",
    "docs/figures/*.png",
    "kernels/*/README.md",
    "benchmarks/README.md",
    "benchmarks/results/*/*.md",
    "benchmarks/results/*/*.png",
    "examples/*.*",
    "kernels/*.py",
    "model/families.py",
)
"""Pages outside `docs/api`, which mkdocs reads itself, and the pictures and sources that they link to."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Appends the pages; mkdocs calls it once the files of `docs_dir` are known."""
    for pattern in PATTERNS:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files
