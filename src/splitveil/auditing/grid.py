"""The grid: every attack on every cut under every defence, each measured once, failures kept as what they are.

What an attack may fail with, and leave an error row: an error of ours (undeclared knowledge, an answer of the wrong
shape, a state that is not finite), and what torch and the machine raise (``RuntimeError`` such as out of memory,
``MemoryError``, ``ArithmeticError``). Anything else is a defect in the code, and stops the run; the rows so far stay.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from splitveil.attacks.attack import Attack, BuiltOn, Effort, Progress, learner_of
from splitveil.attacks.catalogue import CONTROLS
from splitveil.attacks.knowledge import Access, Shadow
from splitveil.auditing.device import Devices
from splitveil.auditing.draws import drawn_again
from splitveil.auditing.fitted import keep, kept, place
from splitveil.auditing.intervals import UNMEASURED, Figure
from splitveil.auditing.learnt import facts_of_learning
from splitveil.auditing.metrics import METRICS, check_recovery, describe_facts, score
from splitveil.auditing.outcome import ORACLE
from splitveil.auditing.rows import INFORMATION, Row, Store
from splitveil.auditing.setting import Setting
from splitveil.auditing.shown import side_by_side
from splitveil.auditing.stage import Stage, public_embeddings
from splitveil.auditing.windows import Victims
from splitveil.defences.defence import Defence
from splitveil.errors import ConfigurationError, SplitveilError

FAILURES = (SplitveilError, RuntimeError, MemoryError, ArithmeticError)


@dataclass(frozen=True)
class Step:
    """How far a run is: the unit, and how far that is."""

    unit: int
    units: int
    label: str
    """Which cut, attack and defence, and what is being done."""
    done: float
    note: str


Watch = Callable[[Step], None]
CreateAttack = Callable[[str], Attack]
CreateDefence = Callable[[str, int], Defence]
"""From a specification such as ``gaussian:0.1``, and a seed for what is random in it."""
Tell = Callable[[str], Progress]


@dataclass(frozen=True)
class Unit:
    """One attack on one cut under one defence: the rows that are appended together."""

    cut: int
    spec: str
    defence: Defence
    attack: str
    version: int
    fit_key: str
    learnt_key: str
    """Under which what it learnt is kept: the same for attacks that learn the same."""

    @property
    def label(self) -> str:
        return f"cut {self.cut}, {self.attack}" + (f", {self.spec}" if self.spec != "none" else "")


@dataclass(frozen=True)
class Grid:
    """What is to be measured. Creating the plan refuses unknown names before anything is measured."""

    model: Any
    tokenizer: Any
    victims: Victims
    shadow: Shadow
    setting: Setting
    create_attack: CreateAttack
    create_defence: CreateDefence
    devices: Devices | None = None
    """Whose device is attacked, where ``model`` is not all there is to say: ``model`` is the victims' undefended."""

    @staticmethod
    def check(
        create_attack: CreateAttack, create_defence: CreateDefence, attacks: Sequence[str], defences: Sequence[str]
    ) -> dict[str, int]:
        """Versions by name of all attacks to run, the controls first.

        Raises ``ConfigurationError`` for an unknown name, and for an attack other than the control that declares
        ``Access.TRUTH``.
        """
        versions = {}
        for name in dict.fromkeys((*CONTROLS, *attacks)):
            attack = create_attack(name)
            if Access.TRUTH in attack.needs and name != ORACLE:
                raise ConfigurationError(f"attack {name!r} declares that it needs the prompts; only {ORACLE!r} may")
            versions[name] = attack.version
        for spec in defences:
            create_defence(spec, 0)
        return versions

    def plan(self, cuts: Sequence[int], attacks: Sequence[str], defences: Sequence[str]) -> list[Unit]:
        """All units in the order of their measuring, which is by cut and defence. Raises as ``check`` does."""
        versions = self.check(self.create_attack, self.create_defence, attacks, defences)
        learners = {name: learner_of(self.create_attack(name)) for name in versions}
        units = []
        for block, spec in itertools.product(dict.fromkeys(cuts), dict.fromkeys(defences)):
            defence = self.create_defence(spec, self.setting.derived_seed("defence", block, spec))
            for name, version in versions.items():
                fit_key = self.setting.fit_key(block, name, version, spec, defence.params)
                of = learners[name]
                learnt_key = self.setting.fit_key(block, of.name, of.version, spec, defence.params)
                units.append(Unit(block, spec, defence, name, version, fit_key, learnt_key))
        return units

    def missing(self, units: Sequence[Unit], rows: Sequence[Row]) -> list[Unit]:
        """The units that have no rows yet, or failed."""
        done = {row.key for row in rows if row.error is None}
        return [unit for unit in units if self.setting.row_key(unit.fit_key, METRICS[-1]) not in done]

    def owns(self, row: Row) -> bool:
        """Whether a kept row was measured in this setting, by today's version of its attack or estimator."""
        if row.attack.startswith(INFORMATION):
            return row.key == self.setting.information_key(row.cut, row.attack, row.metric)
        try:
            version = self.create_attack(row.attack).version
        except ConfigurationError:  # an attack that is no longer there, or came from elsewhere
            return False
        params = row.defence_params
        try:
            # What a folder held then is no longer this defence if it holds something else now.
            params = self.create_defence(row.defence, 0).params if "digest" in params else params
        except ConfigurationError:
            return False
        fit_key = self.setting.fit_key(row.cut, row.attack, version, row.defence, params)
        return row.key == self.setting.row_key(fit_key, row.metric)

    def run(self, units: Sequence[Unit], store: Store, watch: Watch) -> None:
        """Measures ``units``, and keeps the rows of each as soon as it has them."""
        at: tuple[int, str] | None = None
        stage: Stage | Exception
        for number, unit in enumerate(units):
            if at != (unit.cut, unit.spec):
                at, stage = (unit.cut, unit.spec), self.prepared(unit)
            store.append(*self.measure(unit, stage, store, _within(watch, number, len(units), unit)))

    def measure(
        self, unit: Unit, stage: Stage | Exception, store: Store, tell: Tell
    ) -> tuple[list[Row], list[dict[str, Any]]]:
        """Rows and texts of one unit, or the row that says why there are none. Only what was learnt is kept here."""
        begun = time.perf_counter()
        try:
            if isinstance(stage, BaseException):
                raise stage
            with drawn_again(stage.defence):
                return self._measure(unit, stage, store, tell)
        except FAILURES as error:
            return [self.failed(unit, error, time.perf_counter() - begun)], []

    def victims_model(self, defence: Defence) -> Any:
        """The model that the victims run under ``defence``, cut or not."""
        return self._devices.victims(defence)

    def stage(self, block: int, defence: Defence) -> Stage:
        """What crosses there, and what the attackers may know."""
        model, devices = self.victims_model(defence), self._devices
        return Stage(
            model,
            block,
            defence,
            self.victims,
            self.shadow,
            attackers=devices.attackers(defence, model),
            public=devices.public,
            training=devices.training,
        )

    @property
    def _devices(self) -> Devices:
        return self.devices or Devices(self.model)

    def prepared(self, unit: Unit) -> Stage | Exception:
        """What crosses there, or why nothing does: then no attack can be measured, and each has a row to say so."""
        try:
            return self.stage(unit.cut, unit.defence)
        except FAILURES as error:
            return error

    def _measure(self, unit: Unit, stage: Stage, store: Store, tell: Tell) -> tuple[list[Row], list[dict[str, Any]]]:
        attack = self.create_attack(unit.attack)
        known = stage.knowledge().restricted(attack.needs)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.setting.derived_seed("attack", unit.fit_key))
            seconds = self._learn(unit, attack, known, store, tell)
            begun = time.perf_counter()
            recovery = attack.recover(stage.crossing, tell("recovering"))
            seconds += time.perf_counter() - begun
        vocabulary = public_embeddings(self.model).shape[0]
        tokens = recovery.tokens.cpu()
        check_recovery(tokens, self.victims, vocabulary)
        facts = {name: values.cpu() for name, values in recovery.facts.items()}
        embeddings = public_embeddings(self.model).cpu()
        figures = describe_facts(facts, self.victims, self.setting.seed)
        figures |= score(tokens, self.victims, self._decode, embeddings, self.setting.seed)
        rows = [self.row(unit, metric, figure, seconds) for metric, figure in figures.items()]
        shown = [] if unit.attack == ORACLE else list(side_by_side(self.tokenizer, self.victims, tokens))
        return rows, [self.about(unit) | one for one in shown]

    def _learn(self, unit: Unit, attack: Attack, known: Any, store: Store, tell: Tell) -> float:
        """Seconds that learning took, now or in the run that it is kept from."""
        path, learner = self.learnt(store, unit), learner_of(attack)
        found = kept(path)
        if found is not None:
            state, facts = found
            learner.restore(state, known.restricted(learner.needs))
            seconds = float(facts["seconds"])
        else:
            begun = time.perf_counter()
            told = self.setting
            effort = Effort(seconds=told.budget, steps=told.steps, seed=told.seed, plateau=told.plateau)
            learner.fit(known.restricted(learner.needs), effort, tell("learning"))
            seconds = time.perf_counter() - begun
            # Of the learner alone, whichever attack was the first to need it.
            facts = {"seconds": repr(seconds), "attack": unit.label} | facts_of_learning(learner, known)
            keep(path, learner.state(), facts)
        if isinstance(attack, BuiltOn):
            begun = time.perf_counter()
            attack.prepare(known)
            seconds += time.perf_counter() - begun
        return seconds

    @staticmethod
    def learnt(store: Store, unit: Unit) -> Path:
        """Where what the unit's attacker learnt is kept."""
        return place(store.folder, unit.learnt_key)

    def about(self, unit: Unit) -> dict[str, Any]:
        """What each of a unit's texts begins with."""
        return {
            "key": self.setting.row_key(unit.fit_key, METRICS[-1]),
            "data": self.setting.data,
            "cut": unit.cut,
            "attack": unit.attack,
            "defence": unit.spec,
        }

    def _decode(self, ids: Sequence[int]) -> str:
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def row(self, unit: Unit, metric: str, figure: Figure, seconds: float, error: str | None = None) -> Row:
        """One measurement of the unit."""
        return Row(
            key=self.setting.row_key(unit.fit_key, metric),
            model=self.setting.model,
            data=self.setting.data,
            cut=unit.cut,
            attack=unit.attack,
            defence=unit.spec,
            defence_params=dict(unit.defence.params),
            seed=self.setting.seed,
            metric=metric,
            value=figure.value,
            low=figure.low,
            high=figure.high,
            prompts=figure.prompts,
            seconds=seconds,
            error=error,
        )

    def failed(self, unit: Unit, error: BaseException, seconds: float) -> Row:
        """The row of a unit that has no other."""
        return self.row(unit, METRICS[-1], UNMEASURED, seconds, one_line(error))


def one_line(error: BaseException) -> str:
    """An error for a row: its kind, and the first line of what it says."""
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def _within(watch: Watch, number: int, units: int, unit: Unit) -> Tell:
    def tell(doing: str) -> Progress:
        def progress(done: float, note: str) -> None:
            watch(Step(number, units, f"{unit.label}: {doing}", done, note))

        progress(0.0, "")
        return progress

    return tell
