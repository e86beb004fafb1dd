"""A server that knows its clients and counts their rows: who may not have an answer gets none, and it costs nothing."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch

from abuse.support import (
    ADAPTER,
    RANK,
    WIDTHS,
    RawClient,
    attention_adapter,
    clear_error,
    hello,
    served_layers,
    tiny_llama,
)
from splitveil import connect, disconnect
from splitveil.errors import BudgetExceededError, ConfigurationError, KeyRejectedError, RefusedError
from splitveil.lattice.parameters import INSECURE_TEST
from splitveil.metering import Database, Keyring, accounts
from splitveil.metering import keys as metering_keys
from splitveil.serving.publishing import ServedAdapter
from splitveil.serving.serve import metered, serve
from splitveil.serving.server import Server
from splitveil.serving.session import Session

LIMIT = 40


class Counting:
    """A served half that counts what it computes."""

    def __init__(self, adapter: ServedAdapter) -> None:
        self._half = adapter.half
        self.rows = 0

    def check(self, layers: Sequence[int], rows: int, size: int) -> None:
        self._half.check(layers, rows, size)

    def answer(self, layers: Sequence[int], rows: int, query: bytes) -> bytes:
        self.rows += rows
        return self._half.answer(layers, rows, query)


class Vendor:
    """A metered server of two adapters, its keyring, and the clock that the keyring reads."""

    def __init__(self, url: str) -> None:
        self.now = 1_000_000.0
        self.database = Database(url)
        self.keyring = Keyring(self.database, clock=metering_keys.Clock(self.database, lambda: self.now))
        adapter = served_layers()
        self.half = Counting(adapter)
        adapters = {ADAPTER: replace(adapter, half=self.half), "law": adapter}
        gate = metered(adapters, self.database, LIMIT)
        self.server = Server(adapters, "127.0.0.1:0", gate=gate, keys=self.keyring)

    def session(self, key: str, adapter: str = ADAPTER) -> Session:
        return Session(self.server.address, adapter, key=key, allow_insecure=True)

    def spent(self, identity: str) -> dict[str, int]:
        return {account.site: account.rows for account in accounts(self.database) if account.identity == identity}


@pytest.fixture
def vendor(tmp_path: Path) -> Iterator[Vendor]:
    made = Vendor(f"sqlite:///{tmp_path / 'ledger.sqlite'}")
    with made.server:
        yield made
    made.database.close()


@pytest.fixture
def key(vendor: Vendor) -> str:
    return vendor.keyring.create("acme")[0]


def ask(session: Session, layers: Sequence[int], rows: int) -> bytes:
    size = 4 * rows * INSECURE_TEST.query_width(WIDTHS[layers[0]])
    return session.result(session.submit(layers, rows, bytes(size)))


def test_rows_are_answered_up_to_the_limit_and_not_beyond(vendor: Vendor, key: str) -> None:
    session = vendor.session(key)
    for _ in range(4):
        assert len(ask(session, [0, 1], 10)) == 10 * 2 * RANK * 4
    computed = vendor.half.rows
    for _ in range(3):
        with pytest.raises(BudgetExceededError, match=r"row budget of layer 'm0\.linear'.*0 are left of 40"):
            ask(session, [0], 1)
    assert vendor.half.rows == computed, "something was computed for a client past its limit"
    assert ask(session, [2], 10), "another layer has a budget of its own"
    session.close()
    assert max(vendor.spent("acme").values()) <= LIMIT
    with pytest.raises(BudgetExceededError):  # a new session is not a new budget
        ask(vendor.session(key), [0], 1)


def test_a_query_that_one_layer_refuses_costs_the_others_nothing(vendor: Vendor, key: str) -> None:
    session = vendor.session(key)
    for _ in range(4):
        ask(session, [1], 10)
    with pytest.raises(BudgetExceededError, match=r"m1\.linear"):
        ask(session, [0, 1], 10)
    for _ in range(4):
        ask(session, [0], 10)
    session.close()


def spend_everything(vendor: Vendor, key: str) -> None:
    session = vendor.session(key)
    for layers in ([0, 1], [2, 3]):
        for _ in range(LIMIT // 10):
            ask(session, layers, 10)
    session.close()


def test_a_client_without_any_rows_left_opens_no_session(vendor: Vendor, key: str) -> None:
    """RESOURCE_EXHAUSTED, which is also what a full server says: the two are told apart, here and in what is raised."""
    open_before = vendor.session(key)
    spend_everything(vendor, key)
    assert vendor.spent("acme") == dict.fromkeys(vendor.spent("acme"), LIMIT)
    for _ in range(2):
        with clear_error(BudgetExceededError, match="refuses: this client's row budget is spent at every layer"):
            vendor.session(key)
    with RawClient(vendor.server.address, hello(key=key)) as raw:
        code, details = raw.ending()
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "ask the vendor for more" in details
    for _ in range(2):  # in band: the session stays open
        with pytest.raises(BudgetExceededError, match=r"refused a query.*0 are left"):
            ask(open_before, [0], 1)
    open_before.close()
    vendor.session(key, "law").close()  # another adapter has a budget of its own
    vendor.session(vendor.keyring.create("bolt")[0]).close()  # and so has another client


def test_rows_of_a_lease_that_is_held_still_open_a_session(vendor: Vendor, key: str) -> None:
    """All is on record as spent, and some of it was not answered yet."""
    session = vendor.session(key)
    for layers in ([0, 1], [2, 3]):
        ask(session, layers, LIMIT - 2)
        ask(session, layers, 1)  # of a lease of two
    session.close()
    assert set(vendor.spent("acme").values()) == {LIMIT}
    session = vendor.session(key)
    assert ask(session, [3], 1)
    session.close()


def test_a_full_server_is_not_taken_for_a_spent_budget(
    vendor: Vendor, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vendor.server._visits, "_most", 0)
    with pytest.raises(RefusedError, match="too many sessions open") as caught:
        vendor.session(key)
    assert not isinstance(caught.value, BudgetExceededError)


def test_who_has_no_key_does_not_learn_whose_budget_is_spent(vendor: Vendor, key: str) -> None:
    told: dict[str, set[str]] = {"left": set(), "spent": set()}
    for state, words in told.items():
        for shown in ("", "secret", key[:-4] + "AAAA"):
            with pytest.raises(KeyRejectedError) as caught:
                vendor.session(shown)
            words.add(str(caught.value))
        if state == "left":
            spend_everything(vendor, key)
    assert told["left"] == told["spent"]


def test_a_budget_that_cannot_be_read_opens_no_session(
    vendor: Vendor, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RefusedError("the ledger cannot be used")

    monkeypatch.setattr(vendor.server._service._gate._leases, "spent", broken)
    with clear_error(RefusedError, match="ledger cannot be used"):
        vendor.session(key)


def test_a_generation_whose_budget_ends_takes_all_its_steps(tmp_path: Path) -> None:
    """``fixed_length`` over the ledger: refused in band to the last step; only the next session is not begun."""
    base, queries = tiny_llama(), []
    adapter = attention_adapter()
    with Database(f"sqlite:///{tmp_path / 'ledger.sqlite'}") as database:
        keyring = Keyring(database)
        key = keyring.create("acme")[0]
        gate = metered({ADAPTER: adapter}, database, 12)
        tokens = torch.tensor([[3, 5, 7]])
        with Server(
            {ADAPTER: adapter}, "127.0.0.1:0", gate=gate, keys=keyring, on_query=lambda _, query: queries.append(query)
        ) as server:
            how: dict[str, Any] = {"api_key": key, "fixed_length": True, "allow_insecure": True}
            connect(base, server.address, ADAPTER, **how)
            base.generate(tokens, max_new_tokens=2, do_sample=False)
            queries.clear()
            with pytest.raises(BudgetExceededError, match="refused a query"):
                base.generate(tokens, max_new_tokens=16, do_sample=False)
            assert len(queries) == 2 * 16
            disconnect(base)
            with pytest.raises(BudgetExceededError, match="at every layer"):
                connect(base, server.address, ADAPTER, **how)


def test_two_sessions_of_one_client_share_its_budget(vendor: Vendor, key: str) -> None:
    other = vendor.keyring.create("acme")[0]  # renewed: the same client
    sessions = [vendor.session(key), vendor.session(other)]
    answered = 0
    for turn in range(20):
        try:
            ask(sessions[turn % 2], [0], 5)
            answered += 5
        except BudgetExceededError:
            continue
    assert answered == LIMIT
    for session in sessions:
        session.close()


WRONG: dict[str, tuple[Callable[[Vendor, str], str], str, str]] = {
    "none": (lambda vendor, key: "", ADAPTER, "asks for an API key"),
    "no key at all": (lambda vendor, key: "secret", ADAPTER, "API key"),
    "another secret": (lambda vendor, key: key[:-4] + "AAAA", ADAPTER, "API key"),
    "revoked": (lambda vendor, key: vendor.keyring.revoke("acme") and key, ADAPTER, "revoked"),
    "of another adapter": (
        lambda vendor, key: vendor.keyring.create("bolt", adapters=["law"])[0],
        ADAPTER,
        "not for adapter 'clinic'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_keys_are_refused_and_nothing_is_computed(vendor: Vendor, key: str, case: str) -> None:
    given, adapter, reason = WRONG[case]
    shown = given(vendor, key)
    with pytest.raises(KeyRejectedError, match=reason) as caught:
        vendor.session(shown, adapter)
    assert vendor.half.rows == 0
    if shown:
        assert shown not in str(caught.value)


def test_who_has_no_key_does_not_learn_which_adapters_there_are(vendor: Vendor) -> None:
    messages = set()
    for adapter in (ADAPTER, "no such adapter"):
        with pytest.raises(KeyRejectedError) as caught:
            vendor.session("", adapter)
        messages.add(str(caught.value))
    assert len(messages) == 1


def test_an_expired_key_stays_expired_when_the_clock_is_set_back(vendor: Vendor) -> None:
    key = vendor.keyring.create("acme", days=1)[0]
    vendor.session(key).close()
    vendor.now += 2 * 86_400
    with pytest.raises(KeyRejectedError, match="expired"):
        vendor.session(key)
    vendor.now -= 3 * 86_400
    with pytest.raises(KeyRejectedError, match="expired"):
        vendor.session(key)


def test_a_key_that_expires_ends_its_session(vendor: Vendor) -> None:
    session = vendor.session(vendor.keyring.create("acme", days=1)[0])
    ask(session, [0], 1)
    computed = vendor.half.rows
    vendor.now += 2 * 86_400
    with pytest.raises(KeyRejectedError, match="expired"):
        ask(session, [0], 1)
    assert vendor.half.rows == computed
    session.close()


def test_a_revoked_key_ends_its_session(vendor: Vendor, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metering_keys, "RECHECK_SECONDS", 0.0)
    session, other = vendor.session(key), vendor.session(vendor.keyring.create("bolt")[0])
    ask(session, [0], 1)
    vendor.keyring.revoke("acme")
    with pytest.raises(KeyRejectedError, match="revoked"):
        ask(session, [0], 1)
    assert ask(other, [0], 1), "other clients go on"
    session.close()
    other.close()


def test_a_ledger_that_fails_answers_nothing(vendor: Vendor, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    session = vendor.session(key)

    def broken(*_: object) -> None:
        raise RefusedError("the ledger cannot be used")

    monkeypatch.setattr(vendor.server._service._gate._leases, "append", broken)
    with pytest.raises(RefusedError, match="ledger cannot be used"):
        ask(session, [0], 1)
    assert vendor.half.rows == 0
    session.close()


def test_a_model_says_so_when_the_budget_ends_in_the_middle_of_a_text(tmp_path: Path) -> None:
    """From serve() to generate(): one error of ours, and the model works again without the adapter."""
    from peft import LoraConfig, get_peft_model

    base = tiny_llama()
    peft = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    peft.save_pretrained(tmp_path / "adapter")
    url = f"sqlite:///{tmp_path / 'ledger.sqlite'}"
    with Database(url) as database:
        key = Keyring(database).create("acme")[0]
    tokens = torch.tensor([[3, 5, 7]])
    with serve({"clinic": tmp_path / "adapter"}, "127.0.0.1:0", ledger=url, limit=10) as server:
        with pytest.raises(KeyRejectedError):
            connect(base, server.address, "clinic")
        connect(base, server.address, "clinic", api_key=key)
        assert base.generate(tokens, max_new_tokens=4, do_sample=False).shape == (1, 7)
        with pytest.raises(BudgetExceededError, match="are left of 10"):
            base.generate(tokens, max_new_tokens=16, do_sample=False)
        disconnect(base)
    assert base.generate(tokens, max_new_tokens=4, do_sample=False).shape == (1, 7)


def test_a_ledger_that_cannot_be_opened_is_an_error_before_anything_is_served(tmp_path: Path) -> None:
    from splitveil.embedded import folder

    with pytest.raises(ConfigurationError):
        serve({"clinic": folder("clinic")}, "127.0.0.1:0", ledger="mysql://nowhere/ledger")
