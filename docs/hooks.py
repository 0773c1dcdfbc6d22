"""Hooks of the documentation site: pages and pictures that stand beside their studies become part of it."""

import re
from pathlib import Path
from typing import Any


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages and pictures below experiments/ to those of docs/."""
    from mkdocs.structure.files import File

    root = Path(config.config_file_path).parent
    for path in sorted((root / "experiments").rglob("*")):
        if path.suffix in (".md", ".png", ".svg"):
            name = path.relative_to(root).as_posix()
            files.append(File(name, str(root), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Mends links between docs/ and experiments/: neighbours in the repository, one below the other here."""
    return in_the_site(markdown, page.file.src_uri)


def in_the_site(markdown: str, name: str) -> str:
    """The text of a page with its links as the site has them."""
    if name.startswith("experiments/"):
        return re.sub(r"\]\(((?:\.\./)+)docs/", r"](\1", markdown)
    markdown = re.sub(r"\]\(\.\./((?:\.\./)*)experiments/", r"](\1experiments/", markdown)
    # Files of the repository alone.
    return re.sub(r"\[([^\]]*)\]\((?:\.\./)+(?:[A-Z]+\.md|tests/[^)]*)\)", r"\1", markdown)
