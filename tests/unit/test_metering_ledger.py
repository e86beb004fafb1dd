"""The ledger: what it allows, what it refuses, what it remembers."""

import multiprocessing
import os
from collections.abc import Sequence

import pytest
from metering_support import Opener, gate_of, statement
from sqlalchemy import select, text

from splitveil.errors import BudgetExceededError, ConfigurationError, ProtocolError, RefusedError
from splitveil.metering import Account, Database, LedgerGate, Site, accounts, standing
from splitveil.metering.ledger import LEASE_ROWS
from splitveil.metering.storage.leases import Claim, Grant, Leases
from splitveil.metering.storage.schema import leases

pytest_plugins = ("metering_fixtures",)


@pytest.fixture
def visits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by the number of claims with every visit to the database."""
    seen: list[int] = []
    append = Leases.append

    def counted(self: Leases, claims: Sequence[Claim], time: int) -> tuple[bool, list[Grant]]:
        seen.append(len(claims))
        return append(self, claims, time)

    monkeypatch.setattr(Leases, "append", counted)
    return seen


def drain(gate: LedgerGate, identity: str = "alice", site: str = "q", rows: int = 1) -> int:
    """Rows that are allowed until the first refusal."""
    total = 0
    while True:
        try:
            gate.reserve(identity, "clinic", site, rows)
        except BudgetExceededError:
            return total
        total += rows


@pytest.mark.parametrize("limit", [0, 1, 15, 17, 256, 1000])
def test_exactly_the_limit_is_allowed(database: Database, limit: int) -> None:
    assert drain(gate_of(database, limit)) == limit
    assert statement(database) == ({("alice", "q"): limit} if limit else {})


def test_a_prompt_is_as_many_rows_as_it_has_tokens(database: Database) -> None:
    gate = gate_of(database, 1000)
    assert drain(gate, rows=300) == 900
    gate.reserve("alice", "clinic", "q", 100)
    with pytest.raises(BudgetExceededError, match=r"'q' of adapter 'clinic' is spent: 1 rows .* 0 are left of 1000"):
        gate.reserve("alice", "clinic", "q", 1)


def test_budgets_are_per_identity_adapter_and_site(database: Database) -> None:
    gate = gate_of(database, 20, "q", "v")
    gate.declare("legal", {"q": Site(4096, 0.0, 5)})
    assert drain(gate) == 20
    assert drain(gate, site="v") == 20
    assert drain(gate, "bob") == 20
    for _ in range(5):
        gate.reserve("alice", "legal", "q", 1)
    with pytest.raises(BudgetExceededError):
        gate.reserve("alice", "legal", "q", 1)


def test_a_query_is_charged_everywhere_or_nowhere(database: Database) -> None:
    gate = LedgerGate(database)
    gate.declare("clinic", {"q": Site(4096, 0.0, 100), "k": Site(4096, 0.0, 100), "v": Site(4096, 0.0, 10)})
    gate.reserve("alice", "clinic", "q", 20)
    for _ in range(3):
        with pytest.raises(BudgetExceededError, match="'v'"):
            gate.reserve_all("alice", "clinic", ["q", "k", "v"], 11)
    gate.reserve_all("alice", "clinic", ["q", "k", "v"], 10)
    with pytest.raises(BudgetExceededError, match="'v'"):
        gate.reserve_all("alice", "clinic", ["k", "q", "v"], 1)
    assert drain(gate, site="q") == 70
    assert drain(gate, site="k") == 90


def test_what_another_server_has_spent_refuses_everywhere(another: Opener) -> None:
    servers = [gate_of(another(), 100, "q", "k", "v") for _ in range(2)]
    assert drain(servers[0], site="k") == 100
    for _ in range(3):
        with pytest.raises(BudgetExceededError, match="'k'"):
            servers[1].reserve_all("alice", "clinic", ["q", "k", "v"], 1)
    assert statement(another()) == {("alice", "k"): 100}
    servers[1].reserve_all("alice", "clinic", ["q", "v"], 100)


def test_a_module_named_twice_is_charged_twice(database: Database) -> None:
    gate = gate_of(database, 10)
    gate.reserve_all("alice", "clinic", ["q", "q"], 4)
    assert drain(gate) == 2


@pytest.mark.parametrize("rows", [0, -1, -256, 2**31, 2**70])
def test_what_is_no_number_of_rows_is_refused(database: Database, rows: int) -> None:
    gate = gate_of(database, 10)
    gate.reserve("alice", "clinic", "q", 5)
    with pytest.raises(ProtocolError):
        gate.reserve("alice", "clinic", "q", rows)
    assert drain(gate) == 5


def test_what_was_not_declared_is_refused(database: Database) -> None:
    gate = gate_of(database, 10)
    for adapter, site in (("clinic", "k"), ("legal", "q")):
        with pytest.raises(RefusedError, match="meters no layer"):
            gate.reserve("alice", adapter, site, 1)
    with pytest.raises(RefusedError, match="meters no layer"):
        gate.reserve_all("alice", "clinic", ["q", "k"], 1)
    assert statement(database) == {}


def test_no_answer_waits_for_the_disk_but_the_first_of_a_lease(database: Database, visits: list[int]) -> None:
    gate = gate_of(database, None)
    for _ in range(3 * LEASE_ROWS):
        gate.reserve("alice", "clinic", "q", 1)
    assert visits == [1, 1, 1]
    gate.reserve("alice", "clinic", "q", 1000)  # more than a lease is leased as a whole
    assert visits == [1, 1, 1, 1]
    assert statement(database)["alice", "q"] == 3 * LEASE_ROWS + 1000


def test_all_sites_of_a_client_are_renewed_in_one_visit(database: Database, visits: list[int]) -> None:
    names = [f"m{i}" for i in range(12)]
    gate = gate_of(database, None, *names, "never")
    for _ in range(4 * LEASE_ROWS):
        for name in names:
            gate.reserve("alice", "clinic", name, 1)
    assert visits[:12] == [1] * 12
    assert visits[12:] == [12] * 3
    assert statement(database) == {("alice", name): 4 * LEASE_ROWS for name in names}, "'never' was not asked for"


def test_renewals_ahead_do_not_refuse_what_there_is(database: Database) -> None:
    gate = gate_of(database, 40, "q", "k")
    gate.declare("clinic", {"q": Site(4096, 0.0, 40), "k": Site(4096, 0.0, 4)})
    for _ in range(4):
        gate.reserve_all("alice", "clinic", ["q", "k"], 1)
    assert drain(gate) == 36


def test_a_client_past_its_limit_never_reaches_the_database(database: Database, visits: list[int]) -> None:
    gate = gate_of(database, 8)
    assert drain(gate) == 8
    before = len(visits)
    for rows in (1, 5, 1000):
        with pytest.raises(BudgetExceededError):
            gate.reserve("alice", "clinic", "q", rows)
    assert len(visits) == before


def test_a_server_that_ends_forfeits_its_lease_and_no_more(another: Opener) -> None:
    gate_of(another(), 160).reserve("alice", "clinic", "q", 1)  # leases 10
    gate_of(another(), 160).reserve("alice", "clinic", "q", 12)
    assert drain(gate_of(another(), 160)) == 160 - 10 - 12


def test_two_servers_share_a_budget(another: Opener) -> None:
    gates = [gate_of(another(), 100) for _ in range(2)]
    allowed = [0, 0]
    for turn in range(400):
        try:
            gates[turn % 2].reserve("alice", "clinic", "q", 1)
            allowed[turn % 2] += 1
        except BudgetExceededError:
            pass
    assert sum(allowed) == 100
    assert min(allowed) > 30


def test_servers_that_disagree_on_the_limit_never_pass_the_larger(another: Opener) -> None:
    assert drain(gate_of(another(), 50)) == 50
    assert drain(gate_of(another(), 20)) == 0
    assert drain(gate_of(another(), 60)) == 10


def test_a_lease_is_appended_and_never_changed(database: Database) -> None:
    gate = gate_of(database, 64, noise=0.25, width=48)

    def rows() -> list[tuple[object, ...]]:
        with database.read() as connection:
            return [tuple(row) for row in connection.execute(select(leases).order_by(leases.c.number))]

    before: list[tuple[object, ...]] = []
    for _ in range(6):
        for _ in range(4):
            gate.reserve("alice", "clinic", "q", 1)
        now = rows()
        assert now[: len(before)] == before
        assert [entry[1:6] for entry in now[len(before) :]] == [(len(now), 4, 4 * len(now), 48, 0.25)]
        before = now


def test_a_new_publication_carries_on(database: Database) -> None:
    gate = gate_of(database, 160)
    gate.reserve("alice", "clinic", "q", 1)
    gate.declare("clinic", {"q": Site(4096, 0.0, 160), "new": Site(32, 0.0, 10)})  # the same layer, other weights
    assert drain(gate) == 159
    gate.reserve("alice", "clinic", "new", 1)
    gate.declare("clinic", {"new": Site(32, 0.0, 10)})
    with pytest.raises(RefusedError, match="meters no layer"):
        gate.reserve("alice", "clinic", "q", 1)


def test_rows_under_another_noise_are_not_taken_from_old_leases(database: Database) -> None:
    gate = gate_of(database, 160, noise=0.3)
    gate.reserve("alice", "clinic", "q", 1)  # leases 10
    gate.declare("clinic", {"q": Site(4096, 0.01, 160)})
    gate.reserve("alice", "clinic", "q", 1)
    assert accounts(database) == [Account("alice", "clinic", "q", 20, 4096, 0.01)]
    assert drain(gate) == 160 - 10 - 1


def test_the_least_noise_ever_counts(database: Database) -> None:
    for noise in (0.1, 0.01, 0.3):
        gate_of(database, None, noise=noise).reserve("alice", "clinic", "q", 300)
    assert accounts(database) == [Account("alice", "clinic", "q", 900, 4096, 0.01)]


def test_leases_are_small_where_a_layer_is_soon_learned(database: Database) -> None:
    gate = gate_of(database, None, width=192)
    for expected in [24] * 24 + [48] * 24:
        gate.reserve("alice", "clinic", "q", 1)
        assert statement(database)["alice", "q"] == expected


def test_a_gate_knows_what_it_has_not_allowed_yet(another: Opener) -> None:
    gate = gate_of(another(), None, width=80)
    for count in range(1, 100):
        gate.reserve("alice", "clinic", "q", 1)
        (account,) = gate.accounts()
        assert account == Account("alice", "clinic", "q", count, 80, 0.0)
        assert account.learned == (count >= 80)
    other = gate_of(another(), None, width=80)
    other.reserve("alice", "clinic", "q", 1)
    assert other.accounts()[0].rows == 101
    assert gate.accounts()[0].rows == 109


def test_standing_says_what_the_known_attack_makes_of_it() -> None:
    def leakage(account: Account) -> float:
        return account.noise / account.rows**0.5 if account.rows >= account.width else 1.0

    early = standing(Account("alice", "clinic", "q", 63, 64, 0.1), leakage, 100)
    assert (early.known_attack_error, early.remaining, early.account.learned) == (1.0, 37, False)
    late = standing(Account("alice", "clinic", "q", 64, 64, 0.1), leakage, 60)
    assert (late.known_attack_error, late.remaining, late.account.learned) == (0.0125, 0, True)
    assert standing(late.account, leakage, None).remaining is None


def test_a_forked_process_has_no_share_in_leases(database: Database) -> None:
    gate = gate_of(database, 160)
    gate.reserve("alice", "clinic", "q", 1)  # leases 10
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        gate.reserve("alice", "clinic", "q", 1)
        sender.send(accounts(database)[0].rows)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert receiver.recv() == 20
    assert drain(gate) == 160 - 10 - 1


def test_a_ledger_that_fails_refuses(database: Database, caplog: pytest.LogCaptureFixture) -> None:
    gate = gate_of(database, 160)
    gate.reserve("alice", "clinic", "q", 1)  # leases 10
    with database.write() as connection:
        connection.execute(text("ALTER TABLE splitveil_leases RENAME TO elsewhere"))
    for _ in range(9):
        gate.reserve("alice", "clinic", "q", 1)
    for _ in range(2):
        with pytest.raises(RefusedError, match="cannot use its ledger") as refused:
            gate.reserve("alice", "clinic", "q", 1)
        assert not isinstance(refused.value, BudgetExceededError)
    assert "splitveil_leases" in caplog.text
    with database.write() as connection:
        connection.execute(text("ALTER TABLE elsewhere RENAME TO splitveil_leases"))
    assert drain(gate) == 150


def test_what_was_held_back_is_there_after_a_failure(database: Database) -> None:
    gate = gate_of(database, 160)
    gate.reserve("alice", "clinic", "q", 1)
    with pytest.raises(BudgetExceededError):
        gate.reserve("alice", "clinic", "q", 160)
    assert drain(gate) == 159


@pytest.mark.parametrize("site", [(0, 0.0, 1), (64, -0.1, 1), (64, float("nan"), 1), (64, 0.0, -1)])
def test_sites_outside_their_range_are_refused(site: tuple[int, float, int]) -> None:
    with pytest.raises(ConfigurationError):
        Site(*site)
