"""From what a server declares to what its vendor is told: the error of the best known attack, never one too large."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from metering_support import gate_of
from sqlalchemy import text

from splitveil import metering
from splitveil.cli.keys import keys
from splitveil.cli.standings import shown
from splitveil.errors import DataError
from splitveil.lattice.parameters import DEFAULT
from splitveil.metering import Account, Database, Keyring, LedgerGate, Site, accounts, limits
from splitveil.metering.storage import schema
from splitveil.private import exposure, leakage
from splitveil.private.columns import Channel, peak_ratio
from splitveil.private.core import LayerSpec
from splitveil.private.directions import Directions
from splitveil.private.exposure import Facts, facts_of, leakage_of
from splitveil.private.lattice_served import publish
from splitveil.private.layer import publish as publish_layers
from splitveil.serving.exposure import base_model_reckoned_with, known_attack_error, rows_until_learned, sites_of
from splitveil.serving.publishing import ServedAdapter
from splitveil.serving.serve import metered

pytest_plugins = ("metering_fixtures",)

WIDTH, RANK = 64, 2


def adapter(noise: float = 0.0) -> ServedAdapter:
    rng = np.random.default_rng(5)
    specs = [
        LayerSpec(rng.standard_normal((RANK, WIDTH * n)).astype(np.float32), None, 1.0, ((f"m{n}", RANK),))
        for n in (1, 2)
    ]
    half, publication = publish(specs, noise=noise, parameters=DEFAULT)
    return ServedAdapter(half, publication, b"", b"", 1024)


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    url = f"sqlite:///{tmp_path}/ledger.db"
    monkeypatch.setenv("SPLITVEIL_LEDGER", url)
    return url


def served(database: Database, noise: float, limit: int | None) -> LedgerGate:
    gate = LedgerGate(database)
    gate.declare("clinic", sites_of(adapter(noise), limit))
    return gate


def listed() -> list[dict[str, object]]:
    out = CliRunner().invoke(keys, ["list", "--json"], catch_exceptions=False).stdout
    return [json.loads(line) for line in out.splitlines()]


def test_facts_are_those_of_the_served_core() -> None:
    made = adapter()
    for layer, facts in zip(made.publication.layers, facts_of(made.half, made.publication), strict=True):
        assert facts is not None
        core = made.half._secret[made.publication.layers.index(layer)].matrix[:, : layer.width]  # type: ignore[attr-defined]
        assert (facts.parameters, facts.rank, facts.norm_bound) == (DEFAULT.name, RANK, layer.norm_bound)
        assert 0 <= facts.peak_ratio - peak_ratio([core]) <= 0.001
        assert Facts.read(str(facts)) == facts
        channel = Channel.of(DEFAULT, layer.width, RANK, layer.norm_bound, 0.1, facts.peak_ratio)
        assert leakage_of(facts, layer.width, 0.1, 90) == leakage.leakage(channel, 90)


def test_the_plain_engine_has_no_facts() -> None:
    spec = LayerSpec(np.ones((1, 4), dtype=np.float32), None, 1.0, (("m", 1),))
    half, publication = publish_layers([spec], engine="plain", allow_insecure=True)
    assert facts_of(half, publication) == [None]
    site = sites_of(ServedAdapter(half, publication, b"", b"", 1), 3)["m"]
    assert site == Site(4, publication.noise, 3, "")


def test_a_sealed_adapter_is_spoken_of_in_words(url: str) -> None:
    """One answer may give everything away, or nothing: no figure says that."""
    spec = LayerSpec(np.ones((1, 4), dtype=np.float32), np.ones((4, 1), dtype=np.float32), 1.0, (("m", 4),))
    half, publication = publish_layers([spec], engine="sealed")
    sealed = ServedAdapter(half, publication, b"", b"", 1)
    assert rows_until_learned(sealed) == 4
    with Database(url) as database:
        Keyring(database).create("acme")
        Keyring(database).create("bolt")
        metered({"sealed": sealed, "clinic": adapter(0.1)}, database, 400).reserve("acme", "sealed", "m", 1)
        metered({"clinic": adapter(0.1)}, database, 400).reserve("bolt", "clinic", "m1", 1)
    acme, bolt = sorted(listed(), key=lambda one: str(one["name"]))
    assert acme["one_answer_may_be_enough"] is True
    assert acme["best_known_attack_error"] is None
    assert bolt["one_answer_may_be_enough"] is False
    assert isinstance(bolt["best_known_attack_error"], float)
    table = " ".join(CliRunner().invoke(keys, ["list"], catch_exceptions=False).stdout.split())
    for part in ("One answer may be enough: the sealed engine", "a layer of rank 1 from a single answer"):
        assert part in table
    assert "not known" not in table
    assert "nan" not in table.split()


def test_an_all_zero_core_can_be_declared() -> None:
    half, publication = publish(
        [LayerSpec(np.zeros((1, 8), dtype=np.float32), None, 1.0, (("m", 1),))], noise=0.0, parameters=DEFAULT
    )
    (facts,) = facts_of(half, publication)
    assert facts is not None
    assert leakage_of(facts, 8, 0.0, 8).learned


@pytest.mark.parametrize(
    "broken",
    [
        "",
        "{",
        "[]",
        '{"rank": 1}',
        str(Facts("x", 0, 1, 4.0)),
        str(Facts("x", 1, 1, math.nan)),
        str(Facts("x", 1, 1, 4)),
    ],
)
def test_facts_that_cannot_be_read(broken: str) -> None:
    with pytest.raises(DataError, match="facts of a layer"):
        Facts.read(broken)


def test_more_rows_and_less_noise_never_leave_more_error() -> None:
    facts = (str(Facts(DEFAULT.name, RANK, 60_000, 4.2)),)

    def error(rows: int, noise: float) -> float:
        return known_attack_error(Account("a", "clinic", "q", rows, WIDTH, noise, facts))

    assert error(0, 0.1) == 1.0
    for noise in (0.0, 0.1, 1.0):
        assert all(after <= before for before, after in pairwise(error(rows, noise) for rows in range(0, 400, 8)))
    assert error(WIDTH, 0.0) < error(WIDTH, 0.1) < error(WIDTH, 1.0)


def test_of_several_publications_the_most_telling_counts_and_of_none_nothing_is_known() -> None:
    low, high = (str(Facts(DEFAULT.name, RANK, 60_000, ratio)) for ratio in (3.0, 6.0))

    def error(*facts: str) -> float:
        return known_attack_error(Account("a", "clinic", "q", WIDTH, WIDTH, 0.3, facts))

    assert error(low) < error(high)
    assert error(high, low) == error(low)
    assert math.isnan(error())


def test_both_sides_mean_the_same_by_learned() -> None:
    assert metering.LEARNED == leakage.LEARNED


def test_the_vendor_is_told_what_a_client_knows(url: str) -> None:
    with Database(url) as database:
        Keyring(database).create("acme")
        Keyring(database).create("bolt")
        gate = served(database, 0.1, 400)
        gate.reserve_all("acme", "clinic", ["m1", "m2"], 64)
    acme, bolt = sorted(listed(), key=lambda one: str(one["name"]))
    (one,) = acme["by_adapter"]  # type: ignore[misc, attr-defined]
    assert one["adapter"] == "clinic"
    assert one["most_advanced_layer"] == "m1", "64 rows are all of 64 inputs, and half of 128"
    assert (one["layers_asked"], one["layers_learned"]) == (2, 1)
    assert one["rows_limit"] == 400
    assert acme["rows_left"] == 400 - one["rows_spent"]
    # κ·θ·δ/√T and a little more, of one row a column.
    assert 0.03 < float(str(acme["best_known_attack_error"])) < 0.1
    assert bolt["best_known_attack_error"] == 1.0
    assert (bolt["rows_spent"], bolt["rows_left"], bolt["by_adapter"]) == (0, None, [])
    table = CliRunner().invoke(keys, ["list"], catch_exceptions=False).stdout
    for part in ("best known attack", "error", "no bound", "m1", "1 of 2", f"{acme['rows_left']}"):
        assert part in " ".join(table.split())


def test_the_vendor_is_told_whether_the_base_model_is_reckoned_with(url: str) -> None:
    """Which takes directions; without them the figure is marked, and said to be too large."""
    plain = adapter(0.1)
    curve = (Directions((16, 64, 128), (0.3, 0.1, 0.0), 3.0), Directions((128,), (0.0,), 9.0))
    full = replace(plain, directions={"m1": curve[1:], "m2": curve})
    errors = []
    with Database(url) as database:
        Keyring(database).create("acme")
        for served_adapter, known in ((plain, False), (full, True)):
            name = f"known-{known}"
            metered({name: served_adapter}, database, 400).reserve("acme", name, "m2", 16)
            acme = listed()[0]
            (one,) = [one for one in acme["by_adapter"] if one["adapter"] == name]  # type: ignore[attr-defined]
            assert one["base_model_reckoned_with"] is known
            errors.append(one["best_known_attack_error"])
    assert errors[0] > 0.9
    assert errors[1] == pytest.approx(math.sqrt(0.3), rel=0.02)
    table = CliRunner().invoke(keys, ["list"], catch_exceptions=False).stdout
    marked = [line for line in table.splitlines() if line.startswith("acme")]
    assert ["*" in line for line in marked] == ["known-False" in line for line in marked]
    assert "extract --directions" in table


def test_what_is_measured_later_counts_for_rows_before_if_the_weights_are_the_same() -> None:
    curve = (Directions((16, 64), (0.3, 0.0), 3.0),)
    facts = Facts(DEFAULT.name, RANK, 60_000, 4.2)
    before, after = replace(facts, weights="one"), replace(facts, weights="one", directions=curve)

    def reckoned(*found: Facts) -> bool:
        return base_model_reckoned_with(Account("a", "clinic", "q", 16, WIDTH, 0.1, tuple(map(str, found))))

    assert reckoned(after)
    assert reckoned(before, after)
    assert not reckoned(before)
    assert not reckoned(before, replace(after, weights="two")), "of the weights before, nothing was measured"
    assert not reckoned(replace(facts, directions=()), after), "nobody knows which weights those were"
    assert not reckoned()


def test_noise_that_is_raised_later_does_not_make_anything_unlearned(url: str) -> None:
    errors = []
    with Database(url) as database:
        Keyring(database).create("acme")
        for noise in (1.0, 0.1, 1.0, 3.0):
            served(database, noise, None).reserve("acme", "clinic", "m2", 40)
            errors.append(float(str(listed()[0]["best_known_attack_error"])))
        assert accounts(database)[0].noise == 0.1
        assert len(accounts(database)[0].facts) >= 1
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0]


def test_without_noise_a_clone_counts_as_learned_before_d_rows(url: str) -> None:
    with Database(url) as database:
        Keyring(database).create("acme")
        served(database, 0.0, None).reserve("acme", "clinic", "m2", 64)
    (acme,) = listed()
    assert int(str(acme["rows_spent"])) < 128
    assert acme["layers_learned"] == 1
    assert float(str(acme["best_known_attack_error"])) < 0.01


def test_the_limit_in_force_is_the_last_one_declared(url: str) -> None:
    with Database(url) as database:
        for limit in (100, None, 900):
            gate_of(database, limit).reserve("acme", "clinic", "q", 1)
            assert limits(database) == {("clinic", "q"): limit}
        Keyring(database).create("acme")
    (acme,) = listed()
    assert acme["rows_left"] == 900 - int(str(acme["rows_spent"]))
    assert acme["best_known_attack_error"] is None, "nothing was declared for the leakage function"
    assert "not known" in CliRunner().invoke(keys, ["list"], catch_exceptions=False).stdout


def test_a_declaration_is_written_once(url: str) -> None:
    with Database(url) as database:
        for limit in (10, 10, 10, 20, 20, 10):
            gate_of(database, limit)
        with database.read() as connection:
            found = connection.execute(schema.sites.select().order_by(schema.sites.c.id)).all()
    assert [row.row_limit for row in found] == [10, 20, 10]


def test_errors_in_words() -> None:
    assert shown(math.nan) == "not known"
    assert shown(1.0) == "error 100 %"
    assert shown(0.0052) == "error 0.52 %"
    assert shown(1e-9) == "error < 0.01 %"


def test_rows_without_noise_are_fewer_than_d() -> None:
    ten, one, exact = exposure.rows_without_noise(DEFAULT, 256, 16)
    assert ten < one == 128 < exact == 256


def test_a_ledger_of_version_1_is_brought_up_to_date(place: tuple[str, str | None]) -> None:
    url, journal = place
    with Database(url, journal=journal) as database:
        gate_of(database, None, noise=0.25).reserve("acme", "clinic", "q", 300)
        before = accounts(database)
        with database.write() as connection:
            # As version 1 left it: no declarations, and leases without a mention of one.
            connection.execute(text("CREATE TABLE kept AS SELECT * FROM splitveil_leases"))
            connection.execute(text("DROP TABLE splitveil_leases"))
            connection.execute(text("DROP TABLE splitveil_sites"))
            connection.execute(
                text(
                    "CREATE TABLE splitveil_leases (account INTEGER NOT NULL REFERENCES splitveil_accounts (id), "
                    "number BIGINT NOT NULL, rows BIGINT NOT NULL, spent BIGINT NOT NULL, width BIGINT NOT NULL, "
                    "noise DOUBLE PRECISION NOT NULL, time BIGINT NOT NULL, PRIMARY KEY (account, number))"
                )
            )
            names = "account, number, rows, spent, width, noise, time"
            connection.execute(text(f"INSERT INTO splitveil_leases ({names}) SELECT {names} FROM kept"))
            connection.execute(text("DROP TABLE kept"))
            connection.execute(text("UPDATE splitveil_state SET version = 1"))
    for _ in range(2):  # a second time there is nothing to do
        with Database(url, journal=journal) as database:
            assert accounts(database) == before
            assert limits(database) == {}
            assert math.isnan(known_attack_error(accounts(database)[0]))
    with Database(url, journal=journal) as database:
        served(database, 0.5, 1000)
        gate = LedgerGate(database)
        gate.declare("clinic", {"q": sites_of(adapter(0.5), 1000)["m1"]})
        gate.reserve("acme", "clinic", "q", 1)
        (account,) = accounts(database)
        assert account.rows > before[0].rows
        assert account.noise == 0.25
        assert len(account.facts) == 1
        assert known_attack_error(account) < 0.01


def test_a_server_declares_what_the_leakage_function_needs(url: str) -> None:
    with Database(url) as database:
        Keyring(database).create("acme")
        gate = metered({"clinic": adapter(0.1)}, database, 400)
        gate.reserve_all("acme", "clinic", ["m1", "m2"], 64)
        assert all(account.facts for account in accounts(database))
    assert float(str(listed()[0]["best_known_attack_error"])) < 0.1
