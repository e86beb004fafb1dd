"""``splitveil keys``, and reading a key: what is printed where, and what never is."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from metering_support import gate_of

from splitveil.cli.keys import keys, read_key
from splitveil.errors import ConfigurationError
from splitveil.metering import Database, Keyring, is_key


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    url = f"sqlite:///{tmp_path}/ledger.db"
    monkeypatch.setenv("SPLITVEIL_LEDGER", url)
    return url


def run(*arguments: str) -> Result:
    result = CliRunner().invoke(keys, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    return result


def test_a_key_is_printed_once(url: str) -> None:
    made = run("create", "acme", "--adapter", "clinic", "--expires", "90")
    key = made.stdout.strip()
    assert made.stdout == key + "\n"
    assert is_key(key)
    assert key[16:] not in made.stderr
    with Database(url) as database:
        assert Keyring(database).authenticate(key, "clinic") == "acme"
    for shown in (run("list"), run("list", "--json"), run("create", "acme"), run("revoke", "acme")):
        assert key[16:] not in shown.output


def test_the_list_says_who_was_answered_what(url: str) -> None:
    run("create", "acme", "--adapter", "clinic")
    run("create", "bolt")
    with Database(url) as database:
        gate = gate_of(database, None, "q", "v", width=500)
        gate.reserve("acme", "clinic", "v", 300)
        gate.reserve("acme", "clinic", "q", 512)
    run("revoke", "bolt")
    listed = [json.loads(line) for line in run("list", "--json").stdout.splitlines()]
    acme, bolt = sorted(listed, key=lambda key: str(key["name"]))
    assert (acme["name"], acme["adapters"], acme["expires"], acme["revoked"]) == ("acme", ["clinic"], None, None)
    assert (acme["rows_spent"], acme["layers_asked"], acme["layers_learned"]) == (512, 2, 1)
    assert (bolt["adapters"], bolt["rows_spent"], bolt["revoked"] is not None) == (None, 0, True)
    table = run("list").stdout
    for part in ("acme", "clinic", acme["id"], "512", "1 of 2", "bolt", "never"):
        assert part in table


def test_a_second_key_says_that_rows_carry_on(url: str) -> None:
    run("create", "acme")
    with Database(url) as database:
        gate_of(database, None).reserve("acme", "clinic", "q", 1000)
    assert "had 1 keys before and carries on with 1,000 rows spent" in run("create", "acme").stderr


def test_revoking_by_id_and_by_name(url: str) -> None:
    for _ in range(2):
        run("create", "acme")
    first = json.loads(run("list", "--json").stdout.splitlines()[0])["id"]
    assert run("revoke", first).stdout == f"key {first} of acme is revoked\n"
    assert len(run("revoke", "acme").stdout.splitlines()) == 1
    assert "nothing to do" in run("revoke", "acme").stdout
    with pytest.raises(ConfigurationError, match="no key has the id or name"):
        run("revoke", "nobody")


def test_another_ledger_by_flag(url: str, tmp_path: Path) -> None:
    run("create", "acme", "--ledger", f"sqlite:///{tmp_path}/other.db")
    assert run("list", "--json").stdout == ""
    with pytest.raises(ConfigurationError, match="contains a password"):
        run("list", "--ledger", "postgresql://user:secret@host/db")


def test_a_client_reads_its_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Database(f"sqlite:///{tmp_path}/ledger.db") as database:
        keyring = Keyring(database)
        key, other = (keyring.create("acme")[0] for _ in range(2))
    file = tmp_path / "acme.key"
    file.touch(0o600)
    monkeypatch.delenv("SPLITVEIL_API_KEY", raising=False)
    assert read_key(None) is None
    monkeypatch.setenv("SPLITVEIL_API_KEY", key)
    assert read_key(None) == key
    file.write_text(other + "\n")
    assert read_key(file) == other
    for bad in ("", key[:-1], "password123", "ÿ" * 10, key + " " + other):
        file.write_text(bad)
        with pytest.raises(ConfigurationError, match="key") as refused:
            read_key(file)
        assert not bad or bad not in str(refused.value)
    file.write_text(key)
    for mode in (0o640, 0o604, 0o622):
        file.chmod(mode)
        with pytest.raises(ConfigurationError, match=r"acme\.key may be read by others; chmod 600 it") as refused:
            read_key(file)
        assert key not in str(refused.value)
    with pytest.raises(ConfigurationError, match="cannot be read: No such file"):
        read_key(tmp_path / "missing")
    monkeypatch.setenv("SPLITVEIL_API_KEY", "password123")
    with pytest.raises(ConfigurationError, match="SPLITVEIL_API_KEY holds no API key") as refused:
        read_key(None)
    assert "password123" not in str(refused.value)
