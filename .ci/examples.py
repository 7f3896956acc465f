"""Run every python fence of the Markdown files given, or found in folders given.

The fences of one file share one namespace, in order, as a reader would type them, in a folder of their own that goes
when they are through. An example that nobody runs goes stale.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import warnings
from pathlib import Path

FENCE = re.compile(r"^```python[ \t]*\n(.*?)^```[ \t]*$", re.MULTILINE | re.DOTALL)


def fences(path: Path) -> list[str]:
    """Return the code of each fence, pushed down by newlines so that tracebacks name the line of the file."""
    text = path.read_text(encoding="utf-8")
    return ["\n" * text.count("\n", 0, match.start(1)) + match[1] for match in FENCE.finditer(text)]


def main(arguments: list[str]) -> int:
    """Run them all; an exception or a warning ends the run with its traceback."""
    warnings.simplefilter("error")
    home = Path.cwd()
    paths = [p for a in map(Path, arguments) for p in (sorted(a.rglob("*.md")) if a.is_dir() else [a])]
    for path in paths:
        namespace: dict[str, object] = {"__name__": path.stem}
        codes = fences(path)
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            try:
                for code in codes:
                    exec(compile(code, str(path), "exec"), namespace)
            finally:
                os.chdir(home)
        print(f"{path}: {len(codes)} example{'s' * (len(codes) != 1)} ran")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
