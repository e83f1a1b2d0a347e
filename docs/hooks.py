"""What mkdocs does to a page beside rendering it: pages also name files of the repository, which are no part of the site."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PICTURES = "benchmarks/results"
LINK = re.compile(r"\[([^\]]+)\]\((?:\.\./)+((?:benchmarks|coterie|recipes|tests)[^)]*|[A-Z]+\.md)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pictures that benchmarks draw."""
    for picture in sorted((ROOT / PICTURES).glob("*.svg")):
        files.append(File.generated(config, f"{PICTURES}/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Show a file outside of the site by its path, and pictures from where the site has them."""
    markdown = re.sub(rf"\]\((\.\./)((?:\.\./)*{PICTURES}/[^)]+\.svg)\)", r"](\2)", markdown)
    return LINK.sub(_as_path, markdown)


def _as_path(link: re.Match[str]) -> str:
    words, path = link[1], link[2]
    if path.endswith(".svg"):
        return link[0]
    return f"`{path}`" if path.endswith(words.strip("`")) else f"{words} (`{path}`)"
