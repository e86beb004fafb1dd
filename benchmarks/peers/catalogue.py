"""Who is measured: name, worker, package and pin, licence, and what each hides and publishes."""

from dataclasses import dataclass

UNPROTECTED = "nothing by design; its noise is not drowned"


@dataclass(frozen=True)
class Peer:
    """One row of the table."""

    name: str
    worker: str
    """File in workers/."""
    package: str
    licence: str
    variant: str = ""
    pin: str | None = None
    """Version for an environment of its own; None runs in ours."""
    module: str | None = None
    """What must be importable; None: nothing beyond Splitveil's own requirements."""
    pythons: tuple[str, ...] = ()
    """Interpreters to prefer for the environment, where they exist."""
    hides_prompt: bool = True
    publishes: str = UNPROTECTED
    """Of the weights, beyond what the answers say."""


_BASIS = "span(B)"
_CONCRETE = ("concrete-ml-extensions", "BSD-3-Clause-Clear, no patent grant")

PEERS = (
    Peer("plaintext", "with_numpy.py", "numpy", "BSD-3-Clause", hides_prompt=False, publishes="nothing"),
    Peer("Splitveil lattice", "with_splitveil.py", "splitveil", "Apache-2.0", "lattice", publishes=f"{_BASIS}, hints"),
    Peer(
        "Splitveil sealed", "with_splitveil.py", "splitveil", "Apache-2.0", "sealed", None, "seal", (), True, "a size"
    ),
    Peer("seal-python", "with_seal.py", "seal-python", "MIT", "", None, "seal"),
    Peer(
        "seal-python, core",
        "with_seal.py",
        "seal-python",
        "MIT",
        "core",
        None,
        "seal",
        publishes=f"{_BASIS}; its noise is not drowned",
    ),
    Peer("TenSEAL, mm", "with_tenseal.py", "tenseal", "Apache-2.0", "mm", "0.3.18", "tenseal"),
    Peer("TenSEAL, dot", "with_tenseal.py", "tenseal", "Apache-2.0", "dot", "0.3.18", "tenseal"),
    Peer("Concrete ML ext., merged", "with_concrete.py", *_CONCRETE, "merged", "0.2.0", "concrete_ml_extensions"),
    Peer(
        "Concrete ML ext., core",
        "with_concrete.py",
        *_CONCRETE,
        "core",
        "0.2.0",
        "concrete_ml_extensions",
        publishes=f"{_BASIS}; its noise is not drowned",
    ),
    # The wheels hold a module for CPython 3.10 and for no other, whatever pip installs them into.
    Peer("OpenFHE", "with_openfhe.py", "openfhe", "BSD-2-Clause", "", "1.6.1.0.22.4", "openfhe", ("python3.10",)),
)
REFERENCE = "Splitveil lattice"
"""What the ratios are to."""

SHAPES = {
    "gpt2": ("GPT-2, c_attn", 768, 2304, 8),
    "qwen": ("Qwen2.5-0.5B, q_proj", 896, 896, 8),
    "llama": ("Llama-3.2-1B, q_proj", 2048, 2048, 8),
    "chatglm": ("ChatGLM2-6B, query_key_value", 4096, 4608, 8),
}
"""(model and module, d_in, d_out, rank)"""
