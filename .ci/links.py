"""Check that every link, picture and anchor inside a built site leads somewhere, and that no page loads from elsewhere.

A link to another host is left alone and not followed. A script, style, font or picture of another host is an error.

python .ci/links.py docs/_build/html
"""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

LOADED_LINKS = {"stylesheet", "icon", "preload", "modulepreload", "prefetch", "preconnect", "dns-prefetch", "manifest"}
URL = re.compile(r"""(?:url\(|@import)\s*['"]?([^'")\s;]+)""")


class Page(HTMLParser):
    """The anchors of a page, what it refers to, and what a browser loads to show it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.references: list[str] = []
        self.loaded: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take down ids, href and src; a style attribute or element may load something too."""
        loads = tag == "link" and bool(LOADED_LINKS & set((dict(attrs).get("rel") or "").split()))
        for name, value in attrs:
            if name == "id" and value:
                self.anchors.add(value)
            elif name in ("href", "src") and value:
                self.references.append(value)
                if name == "src" or loads:
                    self.loaded.append(value)
            elif name == "style" and value:
                self.loaded += URL.findall(value)

    def handle_data(self, data: str) -> None:
        """Take down what the page's own styles load."""
        if self.lasttag == "style":
            self.loaded += URL.findall(data)


def _foreign(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme in ("http", "https") or bool(parts.netloc)


def main(site: Path) -> int:
    """Print what leads nowhere, and what would be loaded from a network; return how many there are."""
    pages = {path.resolve(): Page(path) for path in sorted(site.rglob("*.html"))}
    broken, count = [], 0
    for sheet in sorted(site.rglob("*.css")):
        text = sheet.read_text(encoding="utf-8")
        broken += [f"{sheet.relative_to(site)}: loads {url}" for url in URL.findall(text) if _foreign(url)]
    for path, page in pages.items():
        broken += [f"{path.relative_to(site.resolve())}: loads {url}" for url in page.loaded if _foreign(url)]
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
