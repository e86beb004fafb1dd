"""One attack at one number of rows and one noise, and what came of it: the error of ΔW, and its worth."""

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from splitveil.errors import ConfigurationError
from splitveil.extraction.chosen import chosen, confirm
from splitveil.extraction.directed import ask_along, initial_first, main_directions
from splitveil.extraction.guessed import Guesses, Recognised, recognise
from splitveil.extraction.hint import attack_layer
from splitveil.extraction.honest import converse, regress
from splitveil.extraction.known import known_rows, row_space
from splitveil.extraction.prior import Plan, informed, root_of_prior, root_of_weight
from splitveil.extraction.span import outside, span
from splitveil.extraction.target import Target, errors
from splitveil.extraction.through import served
from splitveil.extraction.worth import Perplexity, Text, activations, attached, perplexity
from splitveil.private.columns import peak_ratio
from splitveil.private.core import core_rms
from splitveil.private.directions import ByLayer, along

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
Figure = tuple[float, float, float]
"""A value with its interval; NaN where there is none."""
Measured = dict[str, Figure]
"""Metric to figure. ``error`` is ‖ΔŴ − ΔW‖/‖ΔW‖ of all modules together, ``error:MODULE`` that of one;
``error on text`` is the same on activations of held-out text; ``exact`` the share of layers whose integer core the
attacker recovered and confirmed; ``surprise`` what the best guess at the initial A leaves unexplained, beside that of a
wrong one; ``perplexity`` is of held-out text."""
_JUDGED_ROWS = 1024
DIRECTED_TOKENS = 4096


class Judge:
    """Knows the truth and the held-out text. Windows are the attacker's and the judge's in turn."""

    def __init__(self, model: Any, target: Target, text: Text | None, guesses: Guesses | None = None) -> None:
        self.model = model
        self.target = target
        self.text = text
        self.guesses = guesses

    @cached_property
    def _halves(self) -> tuple[Text, Text]:
        if self.text is None:
            raise ConfigurationError("this attack reads real text; give --data")
        return self.text.halves()

    @cached_property
    def _names(self) -> list[str]:
        """One module of every layer: those of one layer read the same tensor."""
        return [layer.outputs[0][0] for layer in self.target.publication.layers]

    def seen(self, rows: int) -> dict[int, F32]:
        """What a client's own text makes the layers' inputs, with the adapter at work: layer → (rows, d).

        Raises ``ConfigurationError`` where the text has fewer tokens.
        """
        mine, _ = self._halves
        if mine.tokens < rows:
            raise ConfigurationError(f"the attacker's half of the text has {mine.tokens} tokens, {rows} are needed")
        with attached(self.model, self.target.truth):
            found = activations(self.model, mine, self._names, rows)
        return {index: found[name] for index, name in enumerate(self._names)}

    def foreseen(self, rows: int) -> dict[int, F32]:
        """What the layers' inputs are without the adapter, which takes no server: layer → (rows or fewer, d)."""
        mine, _ = self._halves
        found = activations(self.model, mine, self._names, rows)
        return {index: found[name] for index, name in enumerate(self._names)}

    @cached_property
    def main_directions(self) -> dict[int, F64]:
        """Of the layers' inputs without the adapter, all of them, the one that holds most first: layer → (k, d)."""
        return {index: main_directions(inputs) for index, inputs in self.foreseen(DIRECTED_TOKENS).items()}

    @cached_property
    def recognised(self) -> Recognised:
        """The best of the attacker's guesses at the initial A, found once: the same serves every number of rows."""
        if self.guesses is None:
            raise ConfigurationError("this attack needs a guess at the initial A; give --initial")
        return recognise(self.target.client(), self.guesses)

    @cached_property
    def _held_out(self) -> dict[str, F32]:
        _, theirs = self._halves
        with attached(self.model, self.target.truth):
            return activations(self.model, theirs, self._names, _JUDGED_ROWS)

    def base(self) -> Measured:
        """Perplexity without an adapter."""
        return {"perplexity": _figure(perplexity(self.model, self._halves[1]))}

    def adapter(self) -> Measured:
        """Perplexity with the true adapter, through the protocol under the noise in force."""
        with served(self.model, self.target):
            return {"perplexity": _figure(perplexity(self.model, self._halves[1]))}

    def judged(self, cores: Mapping[int, F64]) -> Measured:
        """How close the clone of these cores is, and what it is worth."""
        clone = self.target.clone(cores)
        found = {
            f"error:{name}" if name else "error": (value, math.nan, math.nan)
            for name, value in errors(clone, self.target.truth).items()
        }
        if self.text is not None:
            wrong, right = 0.0, 0.0
            for index, name in enumerate(self._names):
                x = self._held_out[name].astype(np.float64)
                true, step = self.target.core(index), self.target.publication.layers[index].step
                right += float(np.linalg.norm(x @ true.T) ** 2) * step**2
                wrong += float(np.linalg.norm(x @ (cores[index] - true).T) ** 2) * step**2
            found["error on text"] = (math.sqrt(wrong / right) if right else math.nan, math.nan, math.nan)
            with attached(self.model, clone):
                found["perplexity"] = _figure(perplexity(self.model, self._halves[1]))
        return found


def chosen_queries(judge: Judge, rows: int) -> Measured:
    """(a) The attacker is taken to have guessed the peak of each core, a single number, right to a quarter.

    What it confirms is confirmed with 16 rows beyond ``rows``.
    """
    target = judge.target
    client = target.client()
    cores, exact = {}, []
    for index in range(len(target.publication.layers)):
        found = chosen(client, index, rows, peak_ratio=peak_ratio([target.core(index)]))
        complete = bool(found.seen.all()) and confirm(client, index, found.integers)
        cores[index] = found.integers.astype(np.float64) if complete else found.values
        exact.append(complete)
    return {**judge.judged(cores), "exact": (sum(exact) / len(exact), math.nan, math.nan)}


def honest_text(judge: Judge, rows: int) -> Measured:
    """(b) The client's own code, on real text."""
    target, cores = judge.target, {}
    for index, inputs in judge.seen(rows).items():
        (transcript,) = converse(target.publication, target.served.half.answer, [index], inputs)
        cores[index] = regress(transcript, target.publication.layers[index].step)
    return judge.judged(cores)


def directed_queries(judge: Judge, rows: int) -> Measured:
    """(a') Chosen queries along the directions in which the base model's activations vary most, the largest first.

    As in (a) the attacker is taken to have guessed one number of each core. Raises ``ConfigurationError`` without text.
    """
    target = judge.target
    client, cores = target.client(), {}
    for index, basis in judge.main_directions.items():
        largest = float(np.abs(target.core(index) @ basis.T).max()) / core_rms(len(basis))
        cores[index] = ask_along(client, index, rows, basis, max(largest, 0.25))
    return judge.judged(cores)


def initial_known(judge: Judge) -> Recognised | None:
    """The initial A, if the guesses have it among them; None, too, where no seed alone gives one."""
    if judge.guesses is None:
        return None
    try:
        return judge.recognised if judge.recognised.sure else None
    except ConfigurationError:
        return None


def worth_of_directions(judge: Judge) -> ByLayer:
    """What directions are worth to an attacker, by the name of a layer's first module: the vendor's to measure.

    In the order of the base model's activations, and, where the judge's guesses have the initial A among them, in that
    of ``initial_first``. Raises ``ConfigurationError`` without text, and for less of it than a layer has inputs: then
    some directions would come in no order at all.
    """
    widest = max(layer.width for layer in judge.target.publication.layers)
    known = initial_known(judge)
    found = {}
    # One basis at a time: of a wide model's layers all of them would not fit into memory.
    for index, inputs in judge.foreseen(max(DIRECTED_TOKENS, 2 * widest)).items():
        if len(inputs) < inputs.shape[1]:
            raise ConfigurationError(
                f"the attacker's half of the text has {len(inputs)} tokens, and a layer {inputs.shape[1]} inputs: give "
                "more text, and more --tokens"
            )
        basis = main_directions(inputs)
        name, core = judge.target.publication.layers[index].outputs[0][0], judge.target.core(index)
        curves = [along(core, basis)]
        if known is not None:
            initial = row_space(known.rows[name])
            order = initial_first(initial, basis)
            expected = np.linalg.norm(order @ root_of_prior(initial, known.outside), axis=1)
            curves.append(along(core, order, expected))
        found[name] = tuple(curves)
    return found


def trained_rows(judge: Judge, rows: int) -> Measured:
    """(c) With the row space of the trained A: where it was frozen or published, or is another adapter's as well."""
    target = judge.target
    client = target.client()
    cores = {
        index: known_rows(client, index, rows, row_space(module.A)).values for index, module in target.first.items()
    }
    return judge.judged(cores)


def initial_rows(judge: Judge, rows: int) -> Measured:
    """(c') With A as PEFT drew it, which training has moved since: a prior on where the core's rows lie, and no more.

    As in (a) the attacker is taken to have guessed one number of each core. Text, where there is some, says which
    errors count. To recognise the guess takes r + 16 rows of every layer beyond ``rows``, once. Raises
    ``ConfigurationError`` where no guess is recognised: then there is nothing to go by.
    """
    target, known = judge.target, judge.recognised
    if not known.sure:
        raise ConfigurationError(
            f"no initial A is recognised: the best guess, {known.name}, has a surprise of {known.surprise:.3f}; "
            f"{known.certain:.3f} or less would do, and a wrong one has {known.chance:.3f}"
        )
    client, cores = target.client(), {}
    seen = {} if judge.text is None else judge.foreseen(DIRECTED_TOKENS)
    for index, layer in enumerate(target.publication.layers):
        prior = root_of_prior(row_space(known.rows[layer.outputs[0][0]]), known.outside)
        plan = Plan.of(prior, root_of_weight(layer.width, seen.get(index)))
        cores[index] = informed(client, index, rows, plan, max(plan.peak_ratio(target.core(index)), 0.25))
    surprises = {"surprise": known.surprise, "surprise of a wrong guess": known.chance}
    return {**judge.judged(cores), **{name: (value, math.nan, math.nan) for name, value in surprises.items()}}


def span_of_b(judge: Judge, rows: int) -> Measured:
    """(e) From ΔW·x of the first rows of real text, which any engine delivers: the share of span(B) still unknown."""
    target, missing = judge.target, []
    for index, inputs in judge.seen(rows).items():
        (transcript,) = converse(target.publication, target.served.half.answer, [index], inputs)
        q = target.publication.layers[index].Q
        outputs = transcript.outputs if q is None else transcript.outputs @ q.T.astype(np.float64)
        basis = span(outputs, target.publication.layers[index].rank)
        stacked = np.vstack([delta.left for delta in target.parts(index)]).astype(np.float32)
        missing.append(outside(basis, stacked))
    return {"span unknown": (float(np.mean(missing)), float(np.min(missing)), float(np.max(missing)))}


def published_half(judge: Judge, rows: int) -> Measured:
    """(d) Lattice reduction on the hints of the narrowest layer. Raises ``ConfigurationError`` if that is too large."""
    target = judge.target
    layers = target.publication.layers
    narrowest = min(range(len(layers)), key=lambda index: layers[index].width)
    found = attack_layer(target.publication, narrowest)
    return {"error": (0.0 if found is not None else 1.0, math.nan, math.nan)}


def _figure(found: Perplexity) -> Figure:
    return (found.value, found.low, found.high)
