"""The demonstration on one screen. It prints what was measured and says what it means, favourable or not."""

from rich.columns import Columns
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table

from splitveil.demo.noise_test import NoiseTest
from splitveil.demo.run import Demonstration


def show(d: Demonstration, console: Console) -> None:
    """Prints the demonstration; about forty lines at 100 columns."""
    console.print(f"[bold]A patient asks:[/bold] {escape(d.question)}")
    half = max(30, console.width // 2 - 1)
    console.print(
        Columns(
            [
                Panel(escape(_shortened(d.base.text)), title="open base model alone", width=half),
                Panel(escape(_shortened(d.private.text)), title="with the private clinic adapter", width=half),
            ]
        )
    )
    console.print("[dim]Words of a model of five million parameters, decoded greedily. No medical advice.[/dim]")
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for name, text in _facts(d):
        table.add_row(name, text)
    console.print(table)
    leak = d.plain_split
    console.print(
        f"[bold]Without encryption[/bold], split after block {leak.cut} of {leak.blocks}, whoever runs the upper half "
        f"reads in {leak.seconds:.0f} s from the hidden states:"
    )
    console.print(Panel(escape(leak.recovered), title=f"{leak.accuracy:.0%} of the tokens right", width=console.width))
    console.print(
        f"{leak.certified:.0%} of them certain, with {leak.tries:.0f} tries a token out of {leak.vocabulary:,}. "
        f"Report: {escape(leak.report)}",
        soft_wrap=True,
    )


def _facts(d: Demonstration) -> list[tuple[str, str]]:
    same = sum(a == b for a, b in zip(d.private.tokens, d.plaintext.tokens, strict=False))
    ratio = d.plaintext.tokens_per_second / d.private.tokens_per_second
    verdict = "[green]identical[/green]" if d.identical else "[red]different[/red]"
    return [
        ("same answer?", f"{verdict}: {same} of {len(d.plaintext.tokens)} tokens equal those of plaintext PEFT"),
        (
            "speed",
            f"{d.private.tokens_per_second:.0f} tokens/s private, {d.plaintext.tokens_per_second:.0f} plaintext PEFT: "
            f"{ratio:.2f} × its time ({d.queries_per_token:.0f} round trips a token weigh most on so small a model)",
        ),
        (
            "traffic",
            f"{d.bytes_sent_per_token:,.0f} bytes up and {d.bytes_received_per_token:,.0f} down a token",
        ),
        ("the server saw", f"{_hex(d.first_words)} …   {_verdict(d.seen)}"),
        ("unencrypted", f"{_hex(d.plain_words)} …   {_verdict(d.plain)}"),
        (
            "published",
            f"{d.published_bytes:,} bytes: hints and span(B) of {d.published_rows} rows ({', '.join(d.modules)})",
        ),
        (
            "never left",
            f"the vendor's process: {d.adapter_parameters:,} private numbers; this process: the question, every "
            "activation, the answer",
        ),
        (
            "rows used",
            f"this conversation: {d.rows_used} of d = {d.width} (prompt {d.prompt_tokens}, answer "
            f"{len(d.private.tokens)}); this session: {d.rows_in_all}"
            + (", [red]past d[/red]" if d.rows_in_all >= d.width else ""),
        ),
        (
            "",
            "A linear layer can be learned from d of its answers, however they are encrypted. On a model as narrow as "
            f"this, {_conversations(d)} enough; at d = 4096 it takes 4096 tokens. See SECURITY.md.",
        ),
    ]


def _conversations(d: Demonstration) -> str:
    needed = -(-d.width // max(1, d.rows_used))
    return "one such conversation is" if needed == 1 else f"{needed} such conversations are"


def _verdict(test: NoiseTest) -> str:
    p = min(test.bytes_p, test.pairs_p)
    size = f"{test.size / 1e6:.1f} MB"
    if test.looks_like_noise:
        return f"[green]not told from noise[/green] ({size}, p = {p:.2f})"
    return f"[red]told from noise at once[/red] ({size}, p {'< 1e-300' if p == 0 else f'= {p:.0e}'})"


def _hex(words: list[int]) -> str:
    return " ".join(f"{word:08x}" for word in words[:4])


def _shortened(text: str, limit: int = 420) -> str:
    return text if len(text) <= limit else text[:limit].rsplit(" ", 1)[0] + " …"
