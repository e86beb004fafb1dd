"""What the design obliges the code to, read from the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[2] / "src" / "splitveil"
FILES = sorted(path for path in SOURCE.rglob("*.py") if not path.name.endswith("_pb2.py"))
SECRET_FILES = [path for path in FILES if path.relative_to(SOURCE).parts[0] in ("lattice", "private")]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imports(path: Path) -> set[str]:
    """Full names of everything that a file imports."""
    names: set[str] = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module or ""}
    return names


def shown(path: Path) -> str:
    return str(path.relative_to(SOURCE))


@pytest.mark.parametrize("path", SECRET_FILES, ids=shown)
def test_randomness_comes_from_the_operating_system_only(path: Path) -> None:
    banned = ("random", "secrets", "torch", "numpy.random", "scipy", "uuid", "time")
    assert not [name for name in imports(path) if name in banned or name.startswith(tuple(b + "." for b in banned))]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute):
            written = ast.unparse(node)
            assert not written.startswith(("np.random", "numpy.random", "torch.")), f"{written} in line {node.lineno}"
            if node.attr == "urandom":
                assert shown(path) in {"lattice/randomness.py", "private/lattice_served.py", "private/plain.py"}


@pytest.mark.parametrize("path", FILES, ids=shown)
def test_nothing_can_run_what_it_reads(path: Path) -> None:
    banned = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "imp", "code"}
    assert not {name.split(".")[0] for name in imports(path)} & banned
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"eval", "exec", "compile", "__import__", "torch.load", "os.system"}, node.lineno
            assert not any(
                k.arg in ("allow_pickle", "shell") and ast.unparse(k.value) != "False" for k in node.keywords
            )
            if any(k.arg == "trust_remote_code" for k in node.keywords):
                assert "trust_remote_code=False" in ast.unparse(node)


@pytest.mark.parametrize("path", FILES, ids=shown)
def test_no_assert_and_no_error_swallowed(path: Path) -> None:
    """A broad ``except`` may clean up and raise again, or hand the error on to a future; nothing else."""
    for node in ast.walk(tree(path)):
        assert not isinstance(node, ast.Assert), f"assert in line {node.lineno}: it vanishes under python -O"
        if isinstance(node, ast.ExceptHandler):
            caught = {
                ast.unparse(n) for n in ast.walk(node.type or ast.Name("BaseException")) if isinstance(n, ast.expr)
            }
            last = ast.unparse(node.body[-1])
            handed_on = last == "raise" or last.endswith(f".set_exception({node.name})")
            assert handed_on or not caught & {"Exception", "BaseException"}, f"broad except in line {node.lineno}"
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("suppress", "contextlib.suppress"):
            assert not {ast.unparse(a) for a in node.args} & {"Exception", "BaseException"}


# Dataclasses print their fields. Public ones may: (file, class).
PUBLIC_ARRAYS = {("lattice/ring.py", "_Tables"), ("lattice/ring.py", "FixedElement")}
ARRAYS = ("NDArray", "F32", "F64", "I8", "I32", "U32", "Tensor", "Pending", "OneTimeMask", "ServedHalf", "bytearray")


def dataclass_fields(path: Path) -> Iterator[tuple[str, ast.AnnAssign]]:
    """(class, field) for all fields that a generated repr would print."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
            silent = any("repr=False" in ast.unparse(d) for d in node.decorator_list)
            own = any(isinstance(item, ast.FunctionDef) and item.name == "__repr__" for item in node.body)
            if not silent and not own:
                yield from ((node.name, item) for item in node.body if isinstance(item, ast.AnnAssign))


@pytest.mark.parametrize("path", FILES, ids=shown)
def test_no_dataclass_prints_its_arrays(path: Path) -> None:
    for owner, item in dataclass_fields(path):
        if (shown(path), owner) not in PUBLIC_ARRAYS and any(name in ast.unparse(item.annotation) for name in ARRAYS):
            assert item.value is not None, f"{owner}, line {item.lineno}"
            assert "repr=False" in ast.unparse(item.value), f"{owner}, line {item.lineno}"


@pytest.mark.parametrize("path", SECRET_FILES, ids=shown)
def test_the_lattice_and_private_code_does_not_log_or_print(path: Path) -> None:
    assert not imports(path) & {"logging", "warnings"}
    for node in ast.walk(tree(path)):
        assert not (isinstance(node, ast.Call) and ast.unparse(node.func) == "print"), node.lineno


# Masks and cores are never on disk: what makes them, and what holds them, neither opens a file nor writes one.

FILE_MODULES = {"pathlib", "io", "tempfile", "shutil", "mmap", "codecs", "fileinput", "gzip", "sqlite3"}
FILE_CALLS = {"open", "fdopen", "safe_open", "save_file", "load_file", "savez", "savetxt", "loadtxt", "memmap", "dump"}
FILE_CALLS |= {"write_bytes", "write_text", "read_bytes", "read_text", "tofile", "fromfile", "mkfifo"}
# Those of safetensors work on memory: a publication is made of them.
FILE_CALLS |= {f"{module}.{call}" for module in ("np", "numpy", "torch") for call in ("save", "load")}


def file_access(path: Path) -> list[str]:
    """Imports and calls that have to do with files."""
    called = [ast.unparse(node.func) for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    return [name for name in imports(path) if name.split(".")[0] in FILE_MODULES] + [
        name for name in called if {name, name.rpartition(".")[2]} & FILE_CALLS
    ]


@pytest.mark.parametrize("path", [*SECRET_FILES, SOURCE / "serving" / "pool.py"], ids=shown)
def test_what_holds_masks_or_cores_touches_no_file(path: Path) -> None:
    assert not file_access(path)


def test_access_to_files_is_seen_where_there_is_some() -> None:
    assert file_access(SOURCE / "serving" / "gauge_key.py")
    assert file_access(SOURCE / "serving" / "cache.py")
