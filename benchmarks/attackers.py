"""The attackers that inversion.py keeps in its --out, and the crossings that they meet: nothing is learnt here."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from splitveil.attacks import catalogue as attack_catalogue
from splitveil.attacks.attack import Attack
from splitveil.auditing.audit import silent
from splitveil.auditing.data import Text
from splitveil.auditing.device import Devices, Knows
from splitveil.auditing.fitted import kept, place
from splitveil.auditing.grid import Grid
from splitveil.auditing.prepare import Sizes, attackers_text, setting_of
from splitveil.auditing.stage import Stage
from splitveil.auditing.windows import Victims, take_victims
from splitveil.defences import catalogue as defence_catalogue

Counts = NDArray[np.int64]


def grid_of(
    model: Any, tokenizer: Any, name: str, data: str, texts: list[Text], shadow: list[Text], sizes: Sizes, folder: Path
) -> Grid:
    """The grid that ``splitveil.audit`` measures when it is asked with these arguments."""
    victims = take_victims(tokenizer, texts, prompts=sizes.prompts, tokens=sizes.tokens, seed=sizes.seed)
    devices = Devices.of(model, None, Knows.BASE, False)
    setting = setting_of(devices, victims, name, data, sizes)
    attacked = [texts[index].text for index in victims.indices]
    text = attackers_text(model, tokenizer, shadow, attacked, setting, sizes, folder, silent)
    create = attack_catalogue.create, defence_catalogue.create
    return Grid(model, tokenizer, victims, text, setting.knowing(text), *create, devices)


def restored(grid: Grid, folder: Path, cut: int, names: Sequence[str]) -> tuple[Stage, dict[str, Attack]]:
    """What crosses at ``cut``, undefended, and the attackers ``names`` that ``folder`` keeps for it.

    Ends the program where there is one that it does not keep.
    """
    units = {unit.attack: unit for unit in grid.plan((cut,), names, ("none",))}
    stage = grid.stage(cut, units[names[0]].defence)
    found = {}
    for name in names:
        state = kept(place(folder, units[name].fit_key))
        if state is None:
            raise SystemExit(
                f"{folder} has no {name} for cut {cut}, learnt with these options: run inversion.py with them first"
            )
        attack = found[name] = grid.create_attack(name)
        attack.restore(state[0], stage.knowledge().restricted(attack.needs))
    return stage, found


def hits(tokens: Tensor, victims: Victims) -> tuple[Counts, Counts]:
    """Of each prompt: how many tokens are right, and how many count."""
    right = (tokens == victims.tokens) & victims.scored
    return right.sum(1).numpy(), victims.scored.sum(1).numpy()
