"""Dependencies point one way: every package may import only from those below it."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "splitveil"

# Package → the packages it may import from. What is not listed may import nothing of the project.
ALLOWED = {
    "errors": set(),
    "lattice": {"errors"},
    "private": {"errors", "lattice"},
    "wire": {"errors"},
    "adapters": {"errors"},
    "checkpoints": {"errors", "adapters"},
    "embedded": {"errors"},
    "split": {"errors"},
    "attacks": {"errors", "split"},
    "information": {"errors", "split"},
    "defences": {"errors", "split", "private"},
    "report": {"errors"},
    "auditing": {"errors", "split", "attacks", "information", "defences", "report"},
    "metering": {"errors"},
    "serving": {"errors", "lattice", "private", "wire", "adapters", "metering"},
    "splitlearning": {"errors", "split", "wire", "defences", "serving"},
    "extraction": {"errors", "lattice", "private", "adapters", "serving", "report"},
    "demo": {"errors", "private", "wire", "adapters", "serving", "embedded", "auditing"},
    "bench": {
        "errors",
        "lattice",
        "private",
        "wire",
        "adapters",
        "serving",
        "embedded",
        "split",
        "attacks",
        "auditing",
    },
    "cli": {
        "errors",
        "adapters",
        "embedded",
        "serving",
        "metering",
        "demo",
        "bench",
        "auditing",
        "extraction",
        "splitlearning",
        "checkpoints",
        "splitveil",
    },
    "__init__": {"errors", "private", "serving", "auditing"},
    "__main__": {"cli"},
}
GENERATED = {"adapter_pb2.py", "split_pb2.py"}
FILES = sorted(p for p in SOURCE.rglob("*.py") if p.name not in GENERATED)
# Heavy or one-sided libraries, and the only packages that may import them.
HOMES = {
    "torch": {
        "serving",
        "demo",
        "cli",
        "bench",
        "split",
        "attacks",
        "information",
        "defences",
        "auditing",
        "extraction",
        "checkpoints",
        "splitlearning",
    },
    "transformers": {"demo", "cli", "bench", "split", "attacks", "splitlearning"},
    "peft": {"demo", "bench", "split", "splitlearning", "extraction"},
    "grpc": {"serving"},
    "numba": {"lattice", "private"},
    "seal": {"private"},
    "grpc_health": {"serving"},
    "prometheus_client": {"serving"},
    "cryptography": {"lattice", "serving"},
    "click": {"cli"},
    "rich": {"cli", "demo", "bench"},
    "ray": {"auditing"},
    "sqlalchemy": {"metering"},
    "jinja2": {"report"},
    "markupsafe": {"report"},
}


def home(path: Path) -> str:
    """The package that a file belongs to."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Full names of all modules that a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_downwards(path: Path) -> None:
    package = home(path)
    for name in imported(path):
        parts = name.split(".")
        if parts[0] == "splitveil":
            target = parts[1] if len(parts) > 1 else "splitveil"
            assert target == package or target in ALLOWED[package], f"{package} may not import {name}"
        elif parts[0] in HOMES:
            assert package in HOMES[parts[0]], f"{package} may not import {name}"


def test_the_rules_name_real_packages_and_have_no_cycle() -> None:
    found = {home(path) for path in FILES}
    assert found <= ALLOWED.keys()
    done: set[str] = {"splitveil"}
    waiting = dict(ALLOWED)
    while waiting:
        ready = {package for package, below in waiting.items() if below <= done | {package}}
        assert ready, f"a cycle among {sorted(waiting)}"
        done |= ready
        for package in ready:
            del waiting[package]


def test_files_stay_small() -> None:
    for path in FILES:
        lines = len(path.read_text().splitlines())
        assert lines <= 400, f"{path.name} has {lines} lines: what two things is it doing?"


def test_the_public_names_are_pinned() -> None:
    import splitveil

    assert sorted(splitveil.__all__) == [
        "PrivateLinear",
        "SplitveilError",
        "__version__",
        "audit",
        "connect",
        "disconnect",
        "serve",
    ]
    for name in splitveil.__all__:
        assert getattr(splitveil, name) is not None
