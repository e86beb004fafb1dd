"""``splitveil convert``."""

from pathlib import Path

import click

from splitveil.errors import ConfigurationError


@click.command()
@click.argument("source", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("target", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--base",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="DIR",
    help="For an adapter: the model that it is for, converted or not.",
)
def convert(source: Path, target: Path, base: Path | None) -> None:
    """Convert a ChatGLM2 or ChatGLM3 checkpoint, or a PEFT adapter for one, so that no remote code is needed.

    SOURCE is a folder with the original names; TARGET, a new folder, becomes one for transformers' GlmForCausalLM.
    An adapter on query_key_value becomes three that share A: they are served as one. The tokenizer is not converted.

    \b
    splitveil convert ./chatglm2-6b ./chatglm2-6b-glm
    splitveil convert ./my-lora ./my-lora-glm --base ./chatglm2-6b
    """
    from rich.console import Console
    from rich.progress import Progress

    from splitveil.checkpoints import CONFIG, convert_adapter, convert_model

    if (source / "adapter_config.json").is_file():
        if base is None:
            raise ConfigurationError(f"{source} is an adapter: --base DIR must name the model that it is for")
        convert_adapter(source, target, base)
    elif (source / CONFIG).is_file():
        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("converting")
            convert_model(source, target, lambda done, total: bar.update(task, completed=done, total=total))
    else:
        raise ConfigurationError(f"{source} holds neither a model (config.json) nor an adapter (adapter_config.json)")
    click.echo(f"wrote {target}")
