"""``splitveil.audit``: what a model leaks of its prompts where it is split, in one call."""

import errno
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from splitveil.attacks import catalogue as attack_catalogue
from splitveil.auditing.cluster import joined
from splitveil.auditing.data import Text, as_texts
from splitveil.auditing.device import Devices, Knows
from splitveil.auditing.distributed import run_on
from splitveil.auditing.grid import CreateAttack, CreateDefence, Grid, Step, Watch
from splitveil.auditing.information import Profile, profile_blocks
from splitveil.auditing.learnt import learning
from splitveil.auditing.meta import Names, describe
from splitveil.auditing.outcome import Report, scores
from splitveil.auditing.prepare import Sizes, attackers_text, setting_of
from splitveil.auditing.prices import prices
from splitveil.auditing.rows import Store
from splitveil.auditing.windows import check_length, check_vocabulary, take_victims
from splitveil.defences import catalogue as defence_catalogue
from splitveil.errors import ConfigurationError, DataError
from splitveil.split import cut

_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.ENOLCK}
"""What a disk refuses with."""


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
    steps: int | None = Sizes.steps,
    plateau: bool = Sizes.plateau,
    information: bool = False,
    personal: str | Path | None = None,
    attacker_knows: str = Knows.BASE,
    training: bool = False,
    ray: str | None = None,
    ray_cpus: int = 1,
    names: Names | None = None,
    watch: Watch = silent,
    create_attack: CreateAttack = attack_catalogue.create,
    create_defence: CreateDefence = defence_catalogue.create,
) -> Report:
    """Attacks what crosses when ``model`` is split after each of ``cuts`` blocks, and scores what comes back.

    Attacked are the first ``tokens`` tokens of ``prompts`` of the ``texts``. The attackers learn for at most ``budget``
    seconds each, or ``steps`` gradient steps, which do not depend on how busy a machine is, and less where their
    validation score flattens, unless ``plateau`` is False. They learn from ``windows`` windows of ``shadow`` text,
    which must not overlap with ``texts``; without any, from text sampled from the model itself and uniformly random
    tokens. ``defences`` are names such as ``gaussian:0.1``; attackers know them and adapt. The controls, ``floor`` and
    ``oracle``, always run. ``information`` adds estimates of how many bits about its token each position carries, block
    by block, without a defence.

    ``personal`` is the folder of a personal part: the victims' device half is ``model`` with it in place. Attackers
    know ``model`` alone, or with ``attacker_knows="personal"`` the personalised device as well. With ``training``, the
    texts are trained on while they are attacked, in the U shape: gradients cross too, which no defence changes.

    ``ray`` measures on a Ray cluster (``local``, ``auto``, ``HOST:PORT``, ``ray://HOST:PORT``), each attack in a task
    with ``ray_cpus`` processors. The model, the prompts and the shadow text travel to its workers.

    With ``out``, rows are kept in that folder as they are measured, and those that are there are not measured again;
    the report covers all rows there of this model, data and shadow text. The model is neither changed nor copied.

    Raises ``ConfigurationError`` for an unknown attack, defence or cut, ``DataError`` for texts that cannot be used,
    both before anything is measured, and what ``joined`` raises for a cluster that cannot be used. An attack that fails
    later has a row with its error.
    """
    sizes = Sizes(prompts, tokens, windows, budget, seed, steps, plateau)
    names = names or Names()
    found, own = as_texts(texts), None if shadow is None else as_texts(shadow)
    if not cuts or not defences:
        raise ConfigurationError("an audit takes at least one cut, and at least one defence ('none' is one)")
    with _evaluating(model):
        blocks = [cut(model, block).blocks for block in cuts].pop()
        check_length(model, tokenizer, tokens)
        victims = take_victims(tokenizer, found, prompts=prompts, tokens=tokens, seed=seed)
        check_vocabulary(model, victims.tokens)
        Grid.check(create_attack, create_defence, attacks, defences)
        devices = Devices.of(model, personal, attacker_knows, training)
        setting = setting_of(devices, victims, names.of(model), names.data, sizes)
        with _store(out) as store, joined(ray, ray_cpus) as cluster:
            already = store.rows()
            attacked = [found[index].text for index in victims.indices]
            attacker = attackers_text(model, tokenizer, own, attacked, setting, sizes, store.folder, watch)
            check_vocabulary(model, attacker.train)
            setting = setting.knowing(attacker)
            audited = model if devices.personal is None else devices.personal
            grid = Grid(audited, tokenizer, victims, attacker, setting, create_attack, create_defence, devices)
            units = grid.plan(cuts, attacks, defences)
            missing = grid.missing(units, already)
            if cluster is None:
                grid.run(missing, store, watch)
            else:
                run_on(cluster, grid, missing, store, watch)
            profile = profile_blocks(grid, store, blocks, watch) if information else Profile()
            rows = [row for row in store.rows() if grid.owns(row)]
            keys = {row.key for row in rows}
            learnt = learning(setting, create_attack, store.folder, [*scores(rows)])
            kept = {(text["key"], text["prompt_index"]): text for text in store.texts() if text["key"] in keys}
        meta = describe(grid, sizes, names, blocks, rows, given=len(found), profile=profile)
        meta["learning"] = learnt
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
    """The folder of the rows, held against other runs; a temporary one where none is given.

    Raises ``DataError`` where the disk refuses. Rows are whole or not there, so what was measured stays.
    """
    with tempfile.TemporaryDirectory() as temporary:
        store = Store(Path(temporary if out is None else out))
        try:
            with store.locked():
                yield store
        except OSError as error:
            if error.errno not in _DISK:
                raise
            raise DataError(
                f"{error.filename or store.folder} cannot be written: {error.strerror}; what was measured before is "
                "kept, and the same command goes on from there"
            ) from None
