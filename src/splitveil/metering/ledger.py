"""The ledger as a gate: rows are counted down in memory from leases that were written to disk beforehand."""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace

from splitveil.errors import BudgetExceededError, ProtocolError, RefusedError
from splitveil.metering.accounts import Account, Site, accounts
from splitveil.metering.clock import Clock
from splitveil.metering.forking import watch
from splitveil.metering.storage.database import Database
from splitveil.metering.storage.leases import Claim, Grant, Leases, Name
from splitveil.metering.storage.sites import Declared, declare

LEASE_ROWS = 256
"""Rows of a lease, at most: one answer in so many waits for the disk, and so many does a crash cost a site."""
LEASES_A_LIMIT = 16
"""A limit is handed out in at least so many leases: where few rows are allowed, 256 would be all there is."""
LEASES_A_WIDTH = 8
"""And so are the rows after which a layer is learned: what is on record says nearly how many were answered."""
MAX_ROWS = 2**31 - 1


class LedgerGate:
    """Refuses the rows of an identity at a site of an adapter past the site's limit; thread-safe.

    Several gates, in one process or in many, may share a database: together they never allow more than the limit.
    Every row that is allowed was written down as spent before. Nothing is ever refunded: rows of a lease that a process
    did not use when it ended stay spent, and so does every retry.
    """

    def __init__(self, database: Database, *, clock: Clock | None = None) -> None:
        self._leases = Leases(database)
        self._clock = clock or Clock(database)
        self._sites: dict[tuple[str, str], Site] = {}
        self._declared: dict[tuple[str, str], int] = {}
        self._balances: dict[Name, int] = {}
        self._spent: dict[Name, int] = {}
        self._used: dict[tuple[str, str], set[str]] = {}
        self._refilling: dict[tuple[str, str], threading.Lock] = {}
        self._lock = threading.Lock()
        watch(self)

    def declare(self, adapter: str, sites: Mapping[str, Site]) -> None:
        """What ``adapter`` consists of, in place of what was declared for it before.

        Accounts carry on: a layer of the same name is the same site, whatever its weights are now. What is left of
        leases under another declaration is forfeited: they were written down as something else. Raises ``RefusedError``
        if the database fails; then nothing has changed.
        """
        kept = {site: Declared(facts.width, facts.noise, facts.limit, facts.facts) for site, facts in sites.items()}
        numbers = declare(self._leases.database, adapter, kept, self._clock.glance())
        with self._lock:
            for place in [place for place in self._declared if place[0] == adapter]:
                del self._declared[place]
            self._declared |= {(adapter, site): number for site, number in numbers.items()}
            before = {site: self._sites.pop((owner, site)) for owner, site in list(self._sites) if owner == adapter}
            self._sites |= {(adapter, site): facts for site, facts in sites.items()}
            changed = {site for site, facts in before.items() if sites.get(site) != facts}
            for name in [name for name in self._balances if name[1] == adapter and name[2] in changed]:
                del self._balances[name]

    def reserve(self, identity: str, adapter: str, module: str, rows: int) -> None:
        """Allows ``rows`` rows of one module, as ``reserve_all`` does."""
        self.reserve_all(identity, adapter, (module,), rows)

    def reserve_all(self, identity: str, adapter: str, modules: Sequence[str], rows: int) -> None:
        """Allows ``rows`` rows of every module, or of none.

        A module that is named twice is charged twice. Raises ``BudgetExceededError`` past a limit, ``ProtocolError``
        for a count that is none, ``RefusedError`` for a module that was not declared, or if the database fails.
        """
        if not 1 <= rows <= MAX_ROWS:
            raise ProtocolError(f"{rows} rows; 1 to {MAX_ROWS} can be asked for")
        wanted: dict[Name, int] = {}
        for module in modules:
            name = (identity, adapter, module)
            wanted[name] = wanted.get(name, 0) + rows
        with self._lock:
            if self._take(wanted):
                return
            refilling = self._refilling.setdefault((identity, adapter), threading.Lock())
        # One refill at a time for an identity: its threads share the leases of one, instead of each taking its own.
        with refilling:
            self._refill_and_take(wanted)

    def require_rows_left(self, identity: str, adapter: str) -> None:
        """Returns if a row of some site of ``adapter`` may still be allowed.

        Raises ``BudgetExceededError`` if none ever will be, ``RefusedError`` if the database fails.
        """
        with self._lock:
            limits = {name: site.limit for (owner, name), site in self._sites.items() if owner == adapter}
            refilling = self._refilling.setdefault((identity, adapter), threading.Lock())
        if not limits or None in limits.values():
            return
        with refilling:  # else the last lease could be on record already, and not yet among the balances
            spent = self._leases.spent(identity, adapter)
            with self._lock:
                if any(
                    spent.get(site, 0) < (limit or 0) or self._balances.get((identity, adapter, site), 0)
                    for site, limit in limits.items()
                ):
                    return
        raise BudgetExceededError(f"the row budget of adapter {adapter!r} is spent at every layer")

    def accounts(self) -> list[Account]:
        """Every account, without the rows that this gate has leased and not allowed yet.

        Rows that other servers hold count as spent. Raises ``RefusedError`` if the database fails.
        """
        found = accounts(self._leases.database)
        with self._lock:
            # A lease that was added since is in both of these, or in neither.
            return [
                replace(account, rows=max(account.rows, self._spent.get(name, 0)) - self._balances.get(name, 0))
                for account in found
                for name in [(account.identity, account.adapter, account.site)]
            ]

    def _take(self, wanted: Mapping[Name, int]) -> bool:
        """Counts down all balances, if all suffice. The lock is held."""
        balances = self._balances
        for name, rows in wanted.items():
            if balances.get(name, 0) < rows:
                return False
        for name, rows in wanted.items():
            balances[name] -= rows
        return True

    def _refill_and_take(self, wanted: Mapping[Name, int]) -> None:
        with self._lock:
            if self._take(wanted):
                return
            facts = {name: self._site(name) for name in wanted}
            # What there is, is set aside, so that nobody else counts on it while the database is asked for the rest.
            held = {name: min(rows, self._balances.get(name, 0)) for name, rows in wanted.items()}
            for name, rows in wanted.items():
                # Totals only grow, so what was too much before is too much now: a client that keeps asking past its
                # limit never reaches the database.
                _refuse_past(name, facts[name], self._spent.get(name, 0), rows, held[name])
            short = {name: rows - held[name] for name, rows in wanted.items() if rows > held[name]}
            claims = [
                self._claim(name, facts[name], rows, max(rows, _lease_rows(facts[name])))
                for name, rows in short.items()
            ] + self._top_ups(wanted)
            for name, rows in held.items():
                self._change(name, -rows)
        allowed = False
        grants: list[Grant] = []
        try:
            allowed, grants = self._leases.append(claims, self._clock.now())
        finally:
            with self._lock:
                self._settle(claims, grants)
                if not allowed:
                    for name, rows in held.items():
                        # Where something else was declared meanwhile, leases were forfeited, and these are of them.
                        if self._sites.get(name[1:]) == facts[name]:
                            self._change(name, rows)
        if not allowed:
            for claim, grant in zip(claims, grants, strict=True):
                if claim.needed:
                    _refuse_past(claim.name, facts[claim.name], grant.spent, wanted[claim.name], held[claim.name])

    def _top_ups(self, wanted: Mapping[Name, int]) -> list[Claim]:
        """Claims for the client's other sites that run low. The lock is held.

        All sites of an adapter are asked for as many rows, so their leases end together; a single wait for the disk
        then renews them all. Only sites that the client has asked for are charged.
        """
        identity, adapter, _ = next(iter(wanted))
        claims = []
        for site in self._used.get((identity, adapter), ()):
            name, facts = (identity, adapter, site), self._sites.get((adapter, site))
            if name in wanted or facts is None:
                continue
            size = _lease_rows(facts)
            if 2 * self._balances.get(name, 0) < size and (facts.limit is None or self._spent[name] < facts.limit):
                claims.append(self._claim(name, facts, 0, size))
        return claims

    def _settle(self, claims: Sequence[Claim], grants: Sequence[Grant]) -> None:
        """Adds to the balances what was leased beyond the need, unless something else was declared meanwhile."""
        for claim, grant in zip(claims, grants, strict=True) if grants else ():
            name = claim.name
            self._spent[name] = max(grant.spent, self._spent.get(name, 0))
            if grant.rows and self._declared.get(name[1:]) == claim.declared:
                self._change(name, grant.rows - claim.needed)
                self._used.setdefault(name[:2], set()).add(name[2])

    def _claim(self, name: Name, site: Site, needed: int, wanted: int) -> Claim:
        """A claim as the site was declared. The lock is held."""
        return Claim(name, needed, wanted, site.limit, site.width, site.noise, self._declared[name[1:]])

    def _change(self, name: Name, rows: int) -> None:
        """Changes a balance. The lock is held."""
        self._balances[name] = self._balances.get(name, 0) + rows

    def _site(self, name: Name) -> Site:
        site = self._sites.get(name[1:])
        if site is None:
            raise RefusedError(f"this server meters no layer {name[2]!r} of adapter {name[1]!r}")
        return site

    def forked(self) -> None:
        """The leases are the parent's: were both to count them down, every row would be answered twice."""
        self._lock = threading.Lock()
        self._refilling = {}
        self._balances = {}
        self._leases = Leases(self._leases.database)


def _lease_rows(site: Site) -> int:
    rows = min(LEASE_ROWS, site.width // LEASES_A_WIDTH)
    return max(1, rows if site.limit is None else min(rows, site.limit // LEASES_A_LIMIT))


def _refuse_past(name: Name, site: Site, spent: int, asked: int, held: int) -> None:
    """Raises ``BudgetExceededError`` if ``asked`` rows, of which ``held`` are leased, are past the limit."""
    left = 0 if site.limit is None else max(0, site.limit - spent) + held
    if site.limit is not None and asked > left:
        raise BudgetExceededError(
            f"the row budget of layer {name[2]!r} of adapter {name[1]!r} is spent: {asked} rows were asked for, {left} "
            f"are left of {site.limit}; ask the vendor for more"
        )
