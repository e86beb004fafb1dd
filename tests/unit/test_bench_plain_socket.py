"""The plain socket that the benchmarks put in gRPC's place."""

from collections.abc import Sequence

from splitveil.bench.plain_socket import plain_socket


class Kept:
    """Stands in for a session: the answer says which query it is to."""

    def __init__(self) -> None:
        self.asked: list[tuple[int, ...]] = []

    def submit(self, layers: Sequence[int], rows: int, data: bytes) -> int:
        self.asked.append((*layers, rows))
        return len(self.asked)

    def result(self, ticket: int) -> bytes:
        return b"answer %d" % ticket


def test_every_message_crosses_and_the_server_is_asked_once_for_each_kind() -> None:
    session = Kept()
    with plain_socket(session) as asked:
        first = [asked.submit([0], 1, b"x" * 100_000), asked.submit([1, 2], 3, b"y" * 7_000)]
        assert [asked.result(ticket) for ticket in first] == [b"answer 1", b"answer 2"]
        assert asked.result(asked.submit([0], 1, b"z" * 100)) == b"answer 1"
    assert session.asked == [(0, 1), (1, 2, 3)]
