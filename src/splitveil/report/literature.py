"""What others have published about inversion: other models, data and attackers. Never a ranking with ours."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Reference:
    """One published figure with the setting that it belongs to."""

    work: str
    figure: str
    setting: str


REFERENCES = (
    Reference(
        "Luo et al., CCS 2025",
        "0.81 – 0.98 token accuracy",
        "per-position inverter trained on shifted shadow data; Phi-3.5, Llama-3.2, GPT-2, BERT",
    ),
    Reference(
        "Luo et al., CCS 2025",
        "0.11 – 0.34 token accuracy",
        "vec2text adapted to the same task, as their baseline",
    ),
    Reference(
        "SipIt, 2025",
        "1.00 of the tokens, 28 s per 20-token prompt",
        "exact search with the device half's weights; GPT-2 small",
    ),
    Reference(
        "Dong et al., USENIX Security 2025",
        "86.9 token F1",
        "prompts of 4,112 tokens",
    ),
    Reference("PIDI, 2026", "0.87 – 0.89", "split fine-tuning, not inference"),
    Reference(
        "RevertLM, arXiv 2501.05965",
        "38 – 75 % attack score",
        "the two-stage attack, over various scenarios; what is counted as its score is not restated here",
    ),
)
