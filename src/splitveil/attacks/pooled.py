"""``pooled``: one vector for the whole text, and a decoder that writes from it."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from splitveil.attacks.attack import Effort, Progress, Recovery
from splitveil.attacks.knowledge import Access, Knowledge
from splitveil.attacks.learning import Curve, batch_rows, cross_entropy, learn, packed, unpacked
from splitveil.attacks.networks import Block, Pasts
from splitveil.attacks.revert import reduced
from splitveil.attacks.samples import Samples, Scale
from splitveil.split import Crossing

WIDTH = 256
DEPTH = 4
"""As many blocks as both stages of ``revert`` together."""
PROMPTS = 64


class Pooled:
    """Sentence-embedding inversion: the earlier state of the art that ``revert`` is measured against.

    The vector is the mean of the states and the last state side by side; the decoder gets it at every position.
    """

    name = "pooled"
    version = 2
    needs = frozenset({Access.QUERIES, Access.SHADOW, Access.EMBEDDINGS})
    source = "GEIA (Li et al. 2023), vec2text (Morris et al. 2023) without its correction rounds"
    summary = "squeezes the crossing into one sentence vector and lets a decoder write from it"
    curve: Curve
    """Of the validations while learning."""

    def fit(self, knowledge: Knowledge, effort: Effort, progress: Progress) -> None:
        torch.manual_seed(effort.seed)
        # Real text only: no vector can hold random words, and a decoder that is shown them learns to guess.
        samples = Samples(knowledge, effort.seed, untouched=1.0)
        net = self._net = Decoder(knowledge.width, reduced(knowledge.embeddings))
        rows = batch_rows(samples.length, knowledge.vocabulary)
        net.scale.measure(net.pool(samples.batch(rows)[1]))
        validation, crossing = samples.validation()

        def loss(tokens: Tensor, batch: Crossing) -> Tensor:
            return cross_entropy(net(net.pool(batch), tokens), tokens)

        def validate() -> float:
            return (net.generate(crossing) == validation).float().mean().item()

        self.curve = learn(net, lambda: samples.batch(rows), loss, validate, effort, progress)

    def recover(self, crossing: Crossing, progress: Progress) -> Recovery:
        found = []
        prompts = len(crossing.mask)
        for start in range(0, prompts, PROMPTS):
            found.append(self._net.generate(crossing.rows(start, start + PROMPTS)))
            progress(min(1.0, (start + PROMPTS) / prompts), "")
        return Recovery(torch.cat(found).masked_fill(~crossing.text, -1))

    def state(self) -> dict[str, Tensor]:
        return packed(self._net, self.curve)

    def restore(self, state: Mapping[str, Tensor], knowledge: Knowledge) -> None:
        self._net = Decoder(knowledge.width, reduced(knowledge.embeddings))
        self.curve = unpacked(self._net, state)


class Decoder(nn.Module):
    """A causal transformer that is told one vector."""

    def __init__(self, states: int, embeddings: Tensor) -> None:
        super().__init__()
        vocabulary, space = embeddings.shape
        self.embeddings = nn.Parameter(embeddings.clone())
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        self.scale = Scale(2 * states)
        self.begin_token = nn.Parameter(torch.zeros(space))
        self.from_token = nn.Linear(space, WIDTH)
        self.enter = nn.Sequential(nn.Linear(2 * states, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.blocks = nn.ModuleList(Block(WIDTH, causal=True) for _ in range(DEPTH))
        self.norm, self.to_space = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, space)

    @staticmethod
    def pool(crossing: Crossing) -> Tensor:
        """(batch, 2 × width): the mean over the text, and the state of its last position."""
        hidden, text = crossing.hidden.float(), crossing.text
        mean = (hidden * text[..., None]).sum(1) / text.sum(1, keepdim=True).clamp(min=1)
        places = torch.arange(text.shape[1], device=text.device)
        last = (places * text).argmax(1)
        return torch.cat([mean, hidden[torch.arange(len(hidden)), last]], 1)

    def forward(self, pooled: Tensor, tokens: Tensor) -> Tensor:
        """Logits (batch, position, vocabulary) that see the vector and earlier tokens only."""
        before = torch.cat([self.begin_token.expand(len(tokens), 1, -1), self.embeddings[tokens[:, :-1]]], 1)
        return self._next(before, pooled, None)

    @torch.no_grad()
    def generate(self, crossing: Crossing) -> Tensor:
        """(batch, position) token ids, each the likeliest after those before it; padding on the left is skipped."""
        pooled = self.pool(crossing)
        before = self.begin_token.expand(len(pooled), 1, -1)
        pasts, found = Pasts.of(self.blocks), []
        for _ in range(crossing.hidden.shape[1]):
            found.append(self._next(before, pooled, pasts).argmax(-1))
            before = self.embeddings[found[-1]]
        return torch.cat(found, 1)

    def _next(self, before: Tensor, pooled: Tensor, pasts: Pasts | None) -> Tensor:
        x = self.from_token(before) + self.enter(self.scale(pooled))[:, None]
        for index, block in enumerate(self.blocks):
            x = block(x, None, None if pasts is None else pasts.blocks[index])
        return self.to_space(self.norm(x)) @ self.embeddings.T + self.bias  # type: ignore[no-any-return]
