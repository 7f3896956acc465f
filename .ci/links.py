"""Check that every link, picture and anchor inside of a built site leads somewhere; nothing outside is asked.

python .ci/links.py docs/_build/html
"""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The anchors of a page and what it refers to."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.references: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take down ids, href and src."""
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value:
                self.references.append(value)


def main(site: Path) -> int:
    """Print what leads nowhere, and what would be loaded from a network; return how many there are."""
    pages = {path.resolve(): Page(path) for path in sorted(site.rglob("*.html"))}
    broken, count = [], 0
    for path, page in pages.items():
        for reference in page.references:
            parts = urlsplit(reference)
            if parts.scheme or parts.netloc:
                continue
            count += 1
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            # What scripts handle by themselves: the search box, and furo's "back to top".
            anchor = unquote(parts.fragment) if target in pages else ""
            if not target.exists() or (anchor and anchor not in pages[target].anchors):
                broken.append(f"{path.relative_to(site.resolve())}: {reference}")
    print("\n".join(sorted(set(broken))) or f"{len(pages)} pages, {count} references inside: all there")
    return len(broken)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])) > 0)
