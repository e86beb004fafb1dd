"""``splitveil split``: a model in two halves over a network, and personal training of it."""

import click

from splitveil.cli.split_generate import generate
from splitveil.cli.split_serve import serve
from splitveil.cli.split_train import train


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def split() -> None:
    """Use and personally train a model whose lower blocks are here and whose upper blocks are in the cloud.

    WHAT CROSSES CAN BE READ. The cloud gets the hidden states of every token, in training their gradients, too; in the
    straight shape it also gets the labels, and labels are the text. `splitveil audit` measures how much of a prompt
    comes back from such states: without a defence, often all of it. TLS protects the way, not from the cloud.

    For an adapter of a vendor's on a prompt that stays private, see `splitveil serve` and `splitveil generate`.

    \b
    splitveil split serve --model embedded:base --cut 2 --state ./cloud --train lora &
    splitveil split train --base embedded:base --server 127.0.0.1:7435 --cut 2 \\
        --data notes.csv --column note --steps 200 --out ./mine
    splitveil split generate --base embedded:base --server 127.0.0.1:7435 \\
        --personal ./mine --prompt "Question: What is anemia?"
    """


for _command in (serve, train, generate):
    split.add_command(_command)
