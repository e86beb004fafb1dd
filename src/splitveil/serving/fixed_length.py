"""``fixed_length``: generations whose number of messages, and whose end, say nothing about the text.

Without it the server sees when a generation stops, and a malicious one can steer that through its answers and learn
bits of the text from it (protocol design, section 6). With it ``model.generate`` always takes as many steps as it was
asked for at most: the stopping criteria only take notes, the model goes on in the very loop that it was in, and what
came after the end is cut off. The steps that follow the end are therefore the same computation, with the same pauses
between messages. What the server does wrong meanwhile (a refusal, an answer of the wrong length) is told afterwards.

Still visible: the length of the prompt, the number of steps asked for, and a connection that breaks.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from splitveil.errors import ConfigurationError, SplitveilError

Failures = list[SplitveilError]


class FixedLength:
    """Stands before a model's ``generate`` until ``remove``. Safe for several threads.

    ``defer`` tells the model's hooks to go on with zeros where an answer fails in this thread: it is given the list in
    which they leave the errors, and None when errors are to be raised at once again.

    Raises ``ConfigurationError`` for a model that does not generate as Hugging Face models do.
    """

    def __init__(self, model: Any, defer: Callable[[Failures | None], None]) -> None:
        if not callable(getattr(model, "generate", None)) or not hasattr(model, "_get_stopping_criteria"):
            raise ConfigurationError(
                f"fixed_length needs a model that generates by Hugging Face's generate(); {type(model).__name__} does "
                "not; connect without it"
            )
        self._model = model
        self._defer = defer
        self._local = threading.local()
        self._generate = self._model.generate
        self._criteria = self._model._get_stopping_criteria
        self._model.generate = self.generate
        self._model._get_stopping_criteria = self._prepared

    def remove(self) -> None:
        """The model generates as before."""
        del self._model.generate, self._model._get_stopping_criteria

    def generate(self, *args: Any, streamer: Any = None, **kwargs: Any) -> Tensor:
        """``generate`` of the model, for as many steps as it may take. Token ids, as without ``fixed_length``.

        A streamer gets the text after the last step: showing it takes time, and would stop where the text does.

        Raises ``ConfigurationError`` for what has no fixed schedule: several beams, drafts by another model, outputs
        other than token ids. What else fails on the way is raised after the last step.
        """
        if kwargs.get("assistant_model") is not None or kwargs.get("custom_generate") is not None:
            raise ConfigurationError("fixed_length generates greedily or by sampling, without assistant_model")
        ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
        if not isinstance(ids, Tensor):
            raise ConfigurationError("fixed_length needs the prompt as input_ids")
        failures: Failures = []
        run = self._local.run = _Run(self._model, ids, failures)
        self._defer(failures)
        finished = False
        try:
            shown = None if streamer is None else _Shown(run.notes)
            tokens = self._generate(*args, streamer=shown, **kwargs)
            finished = True
        finally:
            try:
                # An error on this side, or Ctrl-C, is no reason to tell the server where it happened.
                if not finished:
                    run.pad()
            finally:
                run.end()
                self._local.run = None
                self._defer(None)
        if shown is not None:
            shown.give(streamer)
        if failures:
            raise type(failures[0])(*failures[0].args)
        return run.notes.cut(tokens)

    def _prepared(self, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        """Called by the loop before its first step: the model's own stopping criteria, made to take notes only."""
        found = self._criteria(generation_config, *args, **kwargs)
        run: _Run | None = getattr(self._local, "run", None)
        if run is None:
            return found
        _check(generation_config)
        bounds = [criterion for criterion in found if hasattr(criterion, "max_length")]
        if not bounds:
            raise ConfigurationError("fixed_length needs a number of steps: pass max_new_tokens")
        run.length = min(int(criterion.max_length) for criterion in bounds)
        run.notes.of([criterion for criterion in found if not hasattr(criterion, "max_length")], generation_config)
        return type(found)([*bounds, run.notes])


def _check(config: Any) -> None:
    mode = config.get_generation_mode().value
    if mode not in ("greedy_search", "sample"):
        raise ConfigurationError(f"fixed_length generates greedily or by sampling, not by {mode.replace('_', ' ')}")
    if config.return_dict_in_generate:
        raise ConfigurationError("fixed_length returns token ids only: pass return_dict_in_generate=False")
    if config.prefill_chunk_size is not None:
        raise ConfigurationError("fixed_length reads the prompt in one pass: pass prefill_chunk_size=None")


class _Run:
    """One generation in one thread: how far it came, and what is missing."""

    def __init__(self, model: Any, prompt: Tensor, failures: Failures) -> None:
        self.notes = _Notes(failures)
        self.length: int | None = None
        """Of the sequences in the end, prompt included; None until the loop has begun."""
        self._model = model
        self._rows, self._prompt = prompt.shape
        self._passes = 0
        self._thread = threading.get_ident()
        self._handle = model.register_forward_pre_hook(self._saw, with_kwargs=True)

    def pad(self) -> None:
        """The missing passes, on a token of no meaning, without a memory of the text: faster than real ones at most.

        Only where the loop itself broke; its regular end needs none. A pass that broke half-way stays visible.
        """
        if self.length is None:
            return
        token = torch.zeros((self._rows, 1), dtype=torch.long, device=self._model.device)
        with torch.no_grad():
            while self._passes < self.length - self._prompt:
                self._model(input_ids=token, use_cache=False)

    def end(self) -> None:
        """Counts no longer."""
        self._handle.remove()

    def _saw(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == self._thread:
            self._passes += 1
            ids = kwargs.get("input_ids", args[0] if args else None)
            if isinstance(ids, Tensor):
                self._rows = ids.shape[0]  # more than prompts, where several answers to each were asked for


class _Notes:
    """A stopping criterion that never stops: it writes down where the others would have."""

    def __init__(self, failures: Failures) -> None:
        self._failures = failures
        self._others: Sequence[Any] = ()
        self._pad = 0
        self._ends: list[int] = []
        self._seen = 0

    @property
    def over(self) -> bool:
        """Whether nothing that comes now is part of the answer."""
        return bool(self._failures) or (bool(self._ends) and all(end < self._seen for end in self._ends))

    def of(self, others: Sequence[Any], config: Any) -> None:
        """What would have stopped the generation, and the configuration that names the padding."""
        self._others = others
        self._pad = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)

    def __call__(self, ids: Tensor, scores: Any, **more: Any) -> Tensor:
        rows, self._seen = ids.shape
        if not self._ends:
            self._ends = [_NEVER] * rows
        for criterion in self._others:
            for row, stops in enumerate(criterion(ids, scores, **more).tolist()):
                if stops:
                    self._ends[row] = min(self._ends[row], self._seen)
        return torch.zeros(rows, dtype=torch.bool, device=ids.device)

    def cut(self, tokens: Tensor) -> Tensor:
        """What generation would have returned if it had been stopped: (batch, length of the longest)."""
        length = min(max(self._ends, default=_NEVER), tokens.shape[1])
        tokens = tokens[:, :length].clone()
        for row, end in enumerate(self._ends):
            tokens[row, end:] = self._pad
        return tokens


_NEVER = 1 << 62


class _Shown:
    """Keeps for a streamer what belongs to the answer; every step costs the same, whether it does or not."""

    def __init__(self, notes: _Notes) -> None:
        self._notes = notes
        self._kept: list[tuple[Tensor, bool]] = []

    def put(self, tokens: Tensor) -> None:
        self._kept.append((tokens, self._notes.over))

    def end(self) -> None:
        """Of the schedule; the streamer is told later."""

    def give(self, streamer: Any) -> None:
        """All of it at once."""
        for tokens, over in self._kept:
            if not over:
                streamer.put(tokens)
        streamer.end()
