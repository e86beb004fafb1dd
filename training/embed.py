"""Copies the trained base and adapter, with their cards, into the package.

    python training/embed.py --work DIR

Only the files that a user needs are taken. The adapter is made to name its base instead of a folder of this machine.
Nothing is copied unless everything is there, names no local folder, and stays within ``LIMIT_BYTES`` together.
"""

import argparse
import json
import shutil
from pathlib import Path

BASE_NAME = "splitveil/embedded-base"
LIMIT_BYTES = 16_000_000
FILES = {
    "base": (
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "README.md",
    ),
    "clinic": ("adapter_config.json", "adapter_model.safetensors", "README.md"),
}
PACKAGE = Path(__file__).resolve().parents[1] / "src" / "splitveil" / "embedded"


def sanitised(content: bytes) -> bytes:
    """An adapter's configuration that names the embedded base."""
    config = json.loads(content) | {"base_model_name_or_path": BASE_NAME}
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def collect(work: Path) -> dict[Path, bytes]:
    """What goes into the package, by path below it."""
    wanted = [Path(folder) / name for folder, names in FILES.items() for name in names]
    missing = [str(path) for path in wanted if not (work / path).is_file()]
    if missing:
        raise SystemExit(f"missing in {work}: {', '.join(missing)}; run the training and evaluate.py first")
    contents = {path: (work / path).read_bytes() for path in wanted}
    config = Path("clinic/adapter_config.json")
    return contents | {config: sanitised(contents[config])}


def check(contents: dict[Path, bytes], work: Path) -> None:
    """Refuses what is too large or tells where it was made."""
    total = sum(len(content) for content in contents.values())
    if total > LIMIT_BYTES:
        raise SystemExit(f"{total:,} bytes together, at most {LIMIT_BYTES:,} may be embedded")
    for path, content in contents.items():
        for place in {work.resolve(), Path.cwd(), Path.home()} - {Path("/")}:
            if str(place).encode() in content:
                raise SystemExit(f"{path} names the local folder {place}")


def write(contents: dict[Path, bytes], target: Path) -> None:
    """Replaces the embedded folders."""
    for folder in FILES:
        shutil.rmtree(target / folder, ignore_errors=True)
        (target / folder).mkdir(parents=True)
    for path, content in contents.items():
        (target / path).write_bytes(content)
        print(f"{len(content):>12,}  {target / path}")
    print(f"{sum(map(len, contents.values())):>12,}  bytes together")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder with the trained and evaluated models")
    parser.add_argument("--text", type=Path, help="accepted like in the other scripts, and not needed")
    parser.add_argument("--target", type=Path, default=PACKAGE, help="where to put them instead of the package")
    arguments = parser.parse_args()
    contents = collect(arguments.work)
    check(contents, arguments.work)
    write(contents, arguments.target)


if __name__ == "__main__":
    main()
