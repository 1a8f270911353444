"""Counts habits of prose that slow a reader down, and test names that are too long.

Run it as `git ls-files | python tools/prose.py`. It reads comments, docstrings, proto comments and
Markdown. It fails above LIMIT hits per 1,000 lines in a group. With -v it prints every hit.
"""

import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

LIMIT, NAME_LIMIT = 5, 60
HABITS = re.compile(
    r"""(?x) \b(?:and|by|for|from|in|is|of|on|says?|than|to|with)\ what\b(?!\ (?:to|if)\b)
    | (?:^|[.:;]\ )What\ (?:a|an|has|is|it|the|they|was|we)\b
    | (?:^|[.:;]\ )Of\ (?:a|all|an|each|its|the|those)\b
    | \b(?:be|been|is|are|was|were)\ told\b | \b(?:hears|tells|feels)\b
    | (?i:\b(?:nobody|somebody|everybody|whoever|whatever|whichever)\b)
    | \b(?:of\ (?:ours|theirs|its\ own)|by\ itself|anew|mend(?:s|ed|ing)?|for\ ever)\b"""
)


def prose(path: Path) -> Iterator[str]:
    text = path.read_text()
    if path.suffix == ".py":
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type == tokenize.COMMENT:
                yield token.string.lstrip("#:! ")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from (ast.get_docstring(node) or "").splitlines()
    elif path.suffix == ".proto":
        yield from re.findall(r"//+ ?(.*)", text)
    else:
        bare = re.sub(r"(?ms)^ *```.*?^ *```$", "", text)
        yield from re.sub(r"`[^`\n]*`", "code", bare).splitlines()


groups: dict[str, list[str]] = {"code": [], "tests": [], "protos": [], "docs": []}
names: list[str] = []
for path in map(Path, sys.stdin.read().splitlines()):
    group = {".py": "code", ".proto": "protos", ".md": "docs"}.get(path.suffix)
    if group and path.exists() and path.parts[0] not in {"generated", "third_party"}:
        group = "tests" if path.parts[0] == "tests" else group
        groups[group] += [f"{path}: {line.strip()}" for line in prose(path) if line.strip()]
        names += re.findall(r"def (test_\w+)", path.read_text()) if group == "tests" else []
hits = {group: [line for line in found if HABITS.search(line.partition(": ")[2])]
        for group, found in groups.items()}  # fmt: skip
rates = {group: 1000 * len(hits[group]) / max(len(found), 1) for group, found in groups.items()}
long = [name for name in names if len(name) > NAME_LIMIT]
print(*(f"{group}: {rate:.1f} habits per 1,000 lines" for group, rate in rates.items()), sep="\n")
print(f"test names over {NAME_LIMIT} characters: {len(long)}")
if "-v" in sys.argv:
    print(*(line for found in hits.values() for line in found), *long, sep="\n")
sys.exit(max(rates.values()) > LIMIT or bool(long))
