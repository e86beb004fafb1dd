"""``revert``: the two-stage attack. States are projected into an embedding space, and a generative model makes text.

After arXiv 2501.05965. Stage 1 reads the whole crossing at once, as later states tell about earlier tokens too; it
ends in the embedding space of the public base, where distance is likeness of words. Stage 2 writes the text from left
to right: it sees the noisy embeddings, the states, and what it has written so far, and corrects them.

A second reader sees one state at a time and learns by itself. What stage 2 writes is judged by both: they err on
different words, above all where the victims' text is unlike the attacker's.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from splitveil.attacks.attack import Effort, Progress, Recovery
from splitveil.attacks.knowledge import Access, Knowledge
from splitveil.attacks.learning import Curve, batch_rows, cross_entropy, learn, packed, unpacked
from splitveil.attacks.networks import Block, Pasts
from splitveil.attacks.ridge import unit
from splitveil.attacks.samples import Samples, Scale
from splitveil.split import Crossing

WIDTH = 256
DEPTH = 2
HIDDEN = 1024
SAY = 0.5
"""The weight of the reader of single states, beside 1 for stage 2."""
EMBEDDING = 256
"""The most dimensions of the embedding space that are kept."""
PROMPTS = 64
"""Victims generated at a time."""
RIDGE_BATCHES = 24
PENALTY = 1e-3


class Revert:
    """The two-stage attack. Both stages learn together, on the same batches."""

    name = "revert"
    version = 1
    needs = frozenset({Access.QUERIES, Access.SHADOW, Access.EMBEDDINGS})
    source = "arXiv 2501.05965 (two stages: projection, generation)"
    summary = "projects what crosses into an embedding space, then lets a generative model write the text"
    curve: Curve
    """Of the validations while learning."""
    net: "Inverter"
    """Once it has learnt."""

    def fit(self, knowledge: Knowledge, effort: Effort, progress: Progress) -> None:
        torch.manual_seed(effort.seed)
        samples = Samples(knowledge, effort.seed)
        net = self.net = Inverter(knowledge.width, reduced(knowledge.embeddings))
        net.begin(samples)
        rows = batch_rows(samples.length, knowledge.vocabulary)
        validation, crossing = samples.validation()

        def loss(tokens: Tensor, batch: Crossing) -> Tensor:
            projected = net.project(batch.hidden)
            written = net.write(batch.hidden, projected, tokens)
            # Scores of a whole vocabulary are most of the work. Stage 2 starts from stage 1's points and teaches them
            # too, so that a few positions do for stage 1 by itself.
            few, half = positions(samples.length, 4), positions(samples.length, 2)
            return (
                cross_entropy(net.scores(written), tokens)
                + cross_entropy(net.scores(projected[1][:, few]), tokens[:, few])
                + cross_entropy(net.alone(batch.hidden[:, half]), tokens[:, half])
            )

        def validate() -> float:
            return (net.generate(crossing) == validation).float().mean().item()

        self.curve = learn(net, lambda: samples.batch(rows), loss, validate, effort, progress)

    def recover(self, crossing: Crossing, progress: Progress) -> Recovery:
        found = []
        prompts = len(crossing.mask)
        for start in range(0, prompts, PROMPTS):
            found.append(self.net.generate(crossing.rows(start, start + PROMPTS)))
            progress(min(1.0, (start + PROMPTS) / prompts), "")
        return Recovery(torch.cat(found).masked_fill(~crossing.text, -1))

    def state(self) -> dict[str, Tensor]:
        return packed(self.net, self.curve)

    def restore(self, state: Mapping[str, Tensor], knowledge: Knowledge) -> None:
        self.net = Inverter(knowledge.width, reduced(knowledge.embeddings))
        self.curve = unpacked(self.net, state)


class Inverter(nn.Module):
    """Both stages, and the embedding space between them."""

    def __init__(self, states: int, embeddings: Tensor) -> None:
        super().__init__()
        vocabulary, space = embeddings.shape
        self.embeddings = nn.Parameter(embeddings.clone())
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        self.sharpness = nn.Parameter(torch.tensor(2.7))
        self.scale = Scale(states)

        # Stage 1. What one linear map can do is there from the start, in closed form; the rest learns what is left.
        self.linear = nn.Linear(states, space)
        self.enter = nn.Linear(states, WIDTH)
        self.widen = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
        )
        self.readers = nn.ModuleList(Block(WIDTH, causal=False) for _ in range(DEPTH))
        self.read_norm, self.to_space = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, space)

        # Stage 2.
        self.begin_token = nn.Parameter(torch.zeros(space))
        self.from_token, self.from_space = nn.Linear(space, WIDTH), nn.Linear(space, WIDTH)
        self.from_state, self.from_reader = nn.Linear(states, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.writers = nn.ModuleList(Block(WIDTH, causal=True) for _ in range(DEPTH))
        self.write_norm, self.correction = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, space)

        # The reader of single states.
        self.each = nn.Sequential(nn.Linear(states, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, HIDDEN), nn.GELU())
        self.each_to_space = nn.Linear(HIDDEN, space)
        self.each_embeddings, self.each_bias = nn.Parameter(embeddings.clone()), nn.Parameter(torch.zeros(vocabulary))
        for last in (self.to_space, self.correction):
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    @torch.no_grad()
    def begin(self, samples: Samples) -> None:
        """Measures the states, and sets the linear map by ridge regression onto the embeddings."""
        pairs = [samples.batch(64) if i % 3 else samples.random(64) for i in range(RIDGE_BATCHES)]
        self.scale.measure(torch.cat([crossing.hidden for _, crossing in pairs]))
        states = torch.cat([self.scale(crossing.hidden).flatten(0, 1) for _, crossing in pairs]).double()
        states = torch.cat([states, states.new_ones(len(states), 1)], 1)
        target = self.embeddings[torch.cat([tokens.flatten() for tokens, _ in pairs])].double()
        gram = states.T @ states + PENALTY * len(states) * torch.eye(states.shape[1], dtype=torch.float64)
        solution = torch.linalg.solve(gram, states.T @ target).float()
        self.linear.weight.copy_(solution[:-1].T)
        self.linear.bias.copy_(solution[-1])

    def project(self, hidden: Tensor, text: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Stage 1: what was read (batch, position, WIDTH), and points (batch, position, space) where words are."""
        states = self.scale(hidden)
        x = self.enter(states)
        x = x + self.widen(x)
        for block in self.readers:
            x = block(x, text)
        x = self.read_norm(x)
        return x, functional.normalize(self.linear(states) + self.to_space(x), dim=-1) * self.sharpness.exp()

    def scores(self, points: Tensor) -> Tensor:
        """Logits (…, vocabulary) of points in the embedding space."""
        return points @ self.embeddings.T + self.bias

    def alone(self, hidden: Tensor) -> Tensor:
        """Logits (batch, position, vocabulary) of the reader that sees one state at a time."""
        points = self.each_to_space(self.each(self.scale(hidden)))
        return points @ self.each_embeddings.T + self.each_bias  # type: ignore[no-any-return]

    def write(self, hidden: Tensor, projected: tuple[Tensor, Tensor], tokens: Tensor) -> Tensor:
        """Stage 2, given the text (for learning): points (batch, position, space) that see earlier tokens only."""
        before = torch.cat([self.begin_token.expand(len(tokens), 1, -1), self.embeddings[tokens[:, :-1]]], 1)
        return self._next(before, self._evidence(hidden, projected), projected[1], None)

    @torch.no_grad()
    def generate(self, crossing: Crossing, say: float = SAY) -> Tensor:
        """(batch, position) token ids, each the likeliest after those before it.

        ``say`` is the weight of the reader of single states; with 0, stage 2 writes on its own.
        """
        text = None if bool(crossing.text.all()) else crossing.text
        projected = self.project(crossing.hidden, text)
        evidence = self._evidence(crossing.hidden, projected)
        before = self.begin_token.expand(len(crossing.mask), 1, -1)
        pasts, found = Pasts.of(self.writers), []
        for position in range(crossing.hidden.shape[1]):
            here = slice(position, position + 1)
            points = self._next(before, evidence[:, here], projected[1][:, here], pasts)
            together, alone = self.scores(points), self.alone(crossing.hidden[:, here])
            found.append((together.log_softmax(-1) + say * alone.log_softmax(-1)).argmax(-1))
            before = self.embeddings[found[-1]]
        return torch.cat(found, 1)

    def _evidence(self, hidden: Tensor, projected: tuple[Tensor, Tensor]) -> Tensor:
        """What stage 2 knows about each position before it writes: (batch, position, WIDTH)."""
        read, points = projected
        direction = functional.normalize(points, dim=-1)
        evidence: Tensor = self.from_state(self.scale(hidden)) + self.from_space(direction) + self.from_reader(read)
        return evidence

    def _next(self, before: Tensor, evidence: Tensor, points: Tensor, pasts: Pasts | None) -> Tensor:
        x = self.from_token(before) + evidence
        for index, block in enumerate(self.writers):
            x = block(x, None, None if pasts is None else pasts.blocks[index])
        return points + self.sharpness.exp() * self.correction(self.write_norm(x))  # type: ignore[no-any-return]


def positions(length: int, share: int) -> Tensor:
    """One position in ``share``, at random."""
    return torch.randperm(length)[: max(1, length // share)]


def reduced(embeddings: Tensor) -> Tensor:
    """Embeddings of length 1, (vocabulary, at most ``EMBEDDING``): wide ones along their principal directions."""
    if embeddings.shape[1] <= EMBEDDING:
        return unit(embeddings)
    centred = embeddings.float() - embeddings.float().mean(0)
    _, directions = torch.linalg.eigh(centred.T @ centred)
    return functional.normalize(centred @ directions[:, -EMBEDDING:], dim=-1)
