"""Where a text set comes from, read from its SOURCE.txt: repositories, commits, licence and attribution."""

import re
from pathlib import Path

KEYS = r"Repositor(?:y|ies)[^:]*|Commit|Book\(s\)|Paths|Licence as read[^:]*|Cite|Conversion|Rows"
REPOSITORY = r"(github\.com/[\w-]+/[\w.-]+)(?:\s+([0-9a-f]{40}))?"
SENTENCE_END = r"(?<=\.)\s+(?=[A-Z])|(?<=\.\")\s+"


def fields(text: str) -> dict[str, str]:
    """The ``Key: value`` lines of a SOURCE.txt, by the key's first word; other lines continue the line before them."""
    found: dict[str, str] = {}
    key = ""
    for line in text.splitlines():
        match = re.match(rf"({KEYS}): ?(.*)", line)
        if match:
            key = match[1].split()[0].replace("Repositories", "Repository")
            found[key] = match[2]
        elif key:
            found[key] += "\n" + line
    return found


def repositories(found: dict[str, str]) -> list[dict[str, str]]:
    """Each repository with the commit that stands behind its name, or else the file's one commit."""
    default = re.match(r"[0-9a-f]{40}", found.get("Commit", ""))
    return [
        {"repository": name, "commit": commit or (default[0] if default else "")}
        for name, commit in re.findall(REPOSITORY, found["Repository"])
    ]


def attribution(found: dict[str, str]) -> str:
    """The credit that the source asks for, in its own words, if it asks for one."""
    asked = re.search(r"Attribution(?:: | (?=per )).*", found["Licence"])
    credit = asked[0].removeprefix("Attribution: ").strip() if asked else found.get("Cite", "")
    book = found.get("Book(s)", "").split("; paths:")[0]
    return f"{book}: {credit}" if book else credit


def source(folder: Path) -> dict[str, object]:
    """What a model card says about one set's origin."""
    found = fields((folder / "SOURCE.txt").read_text(encoding="utf-8"))
    missing = {"Repository", "Licence"} - found.keys()
    if missing:
        raise SystemExit(f"{folder / 'SOURCE.txt'} has no line for: {', '.join(sorted(missing))}")
    return {
        "repositories": repositories(found),
        "licence_as_read": found["Licence"],
        "licence_quote": re.split(SENTENCE_END, found["Licence"])[0],
        "attribution": attribution(found),
    }
