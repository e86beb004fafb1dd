"""``splitveil.audit``: what a model leaks of its prompts where it is split, in one call."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from splitveil.attacks import catalogue as attack_catalogue
from splitveil.auditing.data import Text, as_texts
from splitveil.auditing.grid import CreateAttack, CreateDefence, Grid, Step, Watch
from splitveil.auditing.information import Profile, profile_blocks
from splitveil.auditing.meta import Names, describe
from splitveil.auditing.outcome import Report
from splitveil.auditing.prepare import Sizes, attackers_text, setting_of
from splitveil.auditing.prices import prices
from splitveil.auditing.rows import Store
from splitveil.auditing.windows import check_length, check_vocabulary, take_victims
from splitveil.defences import catalogue as defence_catalogue
from splitveil.errors import ConfigurationError
from splitveil.split import cut


def silent(step: Step) -> None:
    """Shows nothing."""


def audit(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str | Text],
    shadow: Sequence[str | Text] | None = None,
    cuts: Sequence[int] = (1, 3),
    attacks: Sequence[str] = ("revert", "search"),
    defences: Sequence[str] = ("none",),
    *,
    out: str | Path | None = None,
    prompts: int = Sizes.prompts,
    tokens: int = Sizes.tokens,
    windows: int = Sizes.windows,
    budget: float = Sizes.budget,
    seed: int = Sizes.seed,
    information: bool = False,
    names: Names | None = None,
    watch: Watch = silent,
    create_attack: CreateAttack = attack_catalogue.create,
    create_defence: CreateDefence = defence_catalogue.create,
) -> Report:
    """Attacks what crosses when ``model`` is split after each of ``cuts`` blocks, and scores what comes back.

    Attacked are the first ``tokens`` tokens of ``prompts`` of the ``texts``. The attackers learn for at most ``budget``
    seconds each, from ``windows`` windows of ``shadow`` text, which must not overlap with ``texts``; without any, from
    text sampled from the model itself and uniformly random tokens. ``defences`` are names such as ``gaussian:0.1``;
    attackers know them and adapt. The controls, ``floor`` and ``oracle``, always run. ``information`` adds estimates of
    how many bits about its token each position carries, block by block, without a defence.

    With ``out``, rows are kept in that folder as they are measured, and those that are there are not measured again;
    the report covers all rows there of this model, data and shadow text. The model is neither changed nor copied.

    Raises ``ConfigurationError`` for an unknown attack, defence or cut, ``DataError`` for texts that cannot be used,
    both before anything is measured. An attack that fails later has a row with its error.
    """
    sizes = Sizes(prompts, tokens, windows, budget, seed)
    names = names or Names()
    found, own = as_texts(texts), None if shadow is None else as_texts(shadow)
    if not cuts or not defences:
        raise ConfigurationError("an audit takes at least one cut, and at least one defence ('none' is one)")
    with _evaluating(model):
        blocks = [cut(model, block).blocks for block in cuts].pop()
        check_length(model, tokenizer, tokens)
        victims = take_victims(tokenizer, found, prompts=prompts, tokens=tokens, seed=seed)
        check_vocabulary(model, victims.tokens)
        setting = setting_of(model, victims, names.of(model), names.data, sizes)
        Grid.check(create_attack, create_defence, attacks, defences)
        with _store(out) as store:
            already = store.rows()
            attacked = [found[index].text for index in victims.indices]
            attacker = attackers_text(model, tokenizer, own, attacked, setting, sizes, store.folder, watch)
            check_vocabulary(model, attacker.train)
            setting = setting.knowing(attacker)
            grid = Grid(model, tokenizer, victims, attacker, setting, create_attack, create_defence)
            units = grid.plan(cuts, attacks, defences)
            missing = grid.missing(units, already)
            grid.run(missing, store, watch)
            profile = profile_blocks(grid, store, blocks, watch) if information else Profile()
            rows = [row for row in store.rows() if grid.owns(row)]
            keys = {row.key for row in rows}
            kept = {(text["key"], text["prompt_index"]): text for text in store.texts() if text["key"] in keys}
        meta = describe(grid, sizes, names, blocks, rows, given=len(found), profile=profile)
        meta["prices"] = prices(grid, units)
        meta["units"] = {"asked": len(units), "measured": len(missing)}
    return Report(tuple(rows), tuple(kept.values()), meta, None if out is None else Path(out))


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Without dropout and the like, as a served model runs; afterwards it is as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def _store(out: str | Path | None) -> Iterator[Store]:
    """The folder of the rows, held against other runs; a temporary one where none is given."""
    with tempfile.TemporaryDirectory() as temporary:
        store = Store(Path(temporary if out is None else out))
        with store.locked():
            yield store
