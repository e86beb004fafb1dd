"""An audit that never was: rows and texts of a likely shape and size, for the tests of what a report shows."""

import math
import random
from collections.abc import Sequence
from typing import Any

MODEL = "stories3M"
BLOCKS = 6
CUTS = (1, 3, 6)
FLOOR = 0.031
# Attack → what it needs, and token accuracy at the cuts on the unprotected crossing.
ATTACKS: dict[str, tuple[list[str], tuple[float, float, float]]] = {
    "lens": (["the output head"], (0.048, 0.112, 0.402)),
    "nearest": (["queries to the device half"], (0.871, 0.402, 0.181)),
    "ridge": (["queries to the device half", "shadow text"], (0.912, 0.604, 0.345)),
    "mlp": (["queries to the device half", "shadow text"], (0.984, 0.915, 0.746)),
    "pooled": (["queries to the device half", "shadow text"], (0.312, 0.287, 0.241)),
    "revert": (["queries to the device half", "shadow text"], (0.991, 0.952, 0.874)),
    "search": (["queries to the device half", "shadow text", "the device half's weights"], (1.0, 1.0, 0.9996)),
    "optimise": (["the device half's weights"], (0.966, 0.713, math.nan)),
}
# Defence → its parameters, and the share of an attack's success that is left.
DEFENCES: dict[str, tuple[dict[str, float | int], float]] = {
    "none": ({}, 1.0),
    "gaussian": ({"sigma": 0.1}, 0.71),
    "int8": ({"bits": 8}, 0.99),
    "encrypted": ({"rank": 8}, 0.0),
}
TEXTS = {
    "doctor-patient talk": [
        (
            "Doctor: Good morning, what brings you in today? Patient: I am Maria Keller, I have had a fever of 39.2 "
            "since Tuesday, and my left knee is swollen. My number is 0171 5550 182.",
            {"Maria Keller": "NAME", "0171 5550 182": "PHONE"},
        ),
        ("Doctor: Any allergies? Patient: Only penicillin, as far as I know.", {}),
        ("Patient: The tablets make me dizzy.\nDoctor: Then we halve them until 4 March.", {"4 March": "DATE"}),
    ],
    "personal data": [
        (
            "Please send the contract to Oluwaseun Adeyemi, 14 Harbour Lane, Bristol BS1 4QA, before Friday, and "
            "charge it to the card ending 4417.",
            {"Oluwaseun Adeyemi": "NAME", "14 Harbour Lane, Bristol BS1 4QA": "ADDRESS", "4417": "CARD"},
        ),
        ("My name is Jonas Wirth and I live in Graz.", {"Jonas Wirth": "NAME", "Graz": "CITY"}),
    ],
}
# Estimator → bits after the embeddings, and how many each block takes away.
ESTIMATORS = {
    "matrix Rényi": (6.4, 0.42),
    "InfoNCE": (4.9, 0.11),
    "bounded reader": (7.1, 0.55),
    "usable-text": (19.0, 1.2),
}
MARKUP = '<script>document.title="taken"</script><img src=x onerror="document.title=1">"\'&'
METRICS = ("token_accuracy", "rouge_l", "bleu", "exact_match", "cosine", "personal_recall")


def rows(prompts: int = 64, seed: int = 1) -> list[dict[str, Any]]:
    """Rows of 2 data sets × 3 cuts × 4 defences, with controls, an information profile and a few failures."""
    draw = random.Random(seed)
    out: list[dict[str, Any]] = []
    for number, data in enumerate(TEXTS):
        for place, cut in enumerate(CUTS):
            for defence, (params, left) in DEFENCES.items():
                where = {"data": data, "cut": cut, "defence": defence, "defence_params": params}
                out.append(row(where, "oracle", "token_accuracy", 1.0, 1.0, 1.0, prompts))
                out.append(row(where, "floor", "token_accuracy", FLOOR, FLOOR - 0.004, FLOOR + 0.004, prompts))
                for attack, (_, scores) in ATTACKS.items():
                    if math.isnan(scores[place]) or (attack, defence, cut) == ("nearest", "int8", 3):
                        reason = "no convergence in 540 s" if attack == "optimise" else "MemoryError: 4.1 GB asked for"
                        out.append(row(where, attack, "token_accuracy", None, None, None, 0, error=reason))
                        continue
                    base = scores[place] - 0.02 * number * (1 - scores[place])
                    value = FLOOR + (base - FLOOR) * left + (draw.uniform(-0.002, 0.002) if left == 0 else 0)
                    out.extend(_metrics(where, attack, value, prompts))
                    if attack == "search" and left > 0:
                        for name, spent in (("median", 1.0), ("mean", 1.3 + 8 * (1 - left)), ("p99", 11)):
                            out.append(row(where, attack, f"evaluations_{name}", spent, None, None, prompts))
                        out.append(row(where, attack, "certified", 0.998 * left, None, None, prompts))
        for block in range(BLOCKS + 1):
            where = {"data": data, "cut": block, "defence": "none", "defence_params": {}}
            for name, (start, fall) in ESTIMATORS.items():
                bits = start - fall * block
                out.append(row(where, f"information:{name}", "bits", bits, bits - 0.15, bits + 0.15, 4096))
                out.append(row(where, f"information:{name}", "bits_floor", 0.08, 0.05, 0.11, 4096))
    return out


def _metrics(where: dict[str, Any], attack: str, value: float, prompts: int) -> list[dict[str, Any]]:
    out = []
    for metric in METRICS:
        if metric == "personal_recall" and where["data"] != "personal data":
            out.append(row(where, attack, metric, None, None, None, prompts))
            continue
        score = {"exact_match": value**30, "bleu": value**1.6, "personal_recall": value**1.3}.get(metric, value)
        half = 1.96 * math.sqrt(max(score * (1 - score), 1e-6) / (prompts * 40)) + 0.0005
        out.append(row(where, attack, metric, score, max(score - half, 0), min(score + half, 1), prompts))
    return out


def row(
    where: dict[str, Any],
    attack: str,
    metric: str | None,
    value: float | None,
    low: float | None,
    high: float | None,
    prompts: int,
    error: str | None = None,
) -> dict[str, Any]:
    """One row as ``rows.jsonl`` holds it."""
    key = f"{attack}-{metric}-{where['data']}-{where['cut']}-{where['defence']}"
    figures = {"metric": metric, "value": value, "low": low, "high": high, "prompts": prompts}
    return {"key": key, "model": MODEL, "attack": attack, "seed": 0, **where, **figures, "seconds": 3.5, "error": error}


def texts(seed: int = 1) -> list[dict[str, Any]]:
    """What a few attacks made of the prompts at the last cut, without a defence and under encryption."""
    draw = random.Random(seed)
    out = []
    for data, prompts in TEXTS.items():
        for index, (text, marks) in enumerate(prompts):
            for attack, share, defence in (
                ("pooled", 0.24, "none"),
                ("mlp", 0.75, "none"),
                ("revert", 0.87, "none"),
                ("search", 1.0, "none"),
                ("search", 0.03, "encrypted"),
            ):
                out.append(item(data, index, text, marks, attack, defence, share, draw))
    return out


def item(
    data: str,
    index: int,
    text: str,
    marks: dict[str, str],
    attack: str,
    defence: str,
    share: float,
    draw: random.Random,
) -> dict[str, Any]:
    """One text as an attack with token accuracy ``share`` might recover it."""
    tokens = split(text)
    starts = [sum(map(len, tokens[:i])) for i in range(len(tokens) + 1)]
    spans = []
    for mark, kind in marks.items():
        first, last = text.index(mark), text.index(mark) + len(mark)
        inside = [i for i in range(len(tokens)) if starts[i] < last and first < starts[i + 1]]
        spans.append({"start": inside[0], "end": inside[-1] + 1, "type": kind})
    personal = [any(s["start"] <= i < s["end"] for s in spans) for i in range(len(tokens))]
    wrong = [" the", " little", " went", ".", " and", " happy", "ing", "", "\n", " Tim"]
    recovered = [token if draw.random() < share else draw.choice(wrong) for token in tokens]
    return {
        "data": data,
        "prompt_index": index,
        "cut": CUTS[-1],
        "attack": attack,
        "defence": defence,
        "original": tokens,
        "recovered": recovered,
        "correct": [a == b for a, b in zip(tokens, recovered, strict=True)],
        "personal": personal,
        "spans": spans,
    }


def split(text: str) -> list[str]:
    """Pieces of up to four letters with the space before them, much as a tokenizer cuts."""
    out: list[str] = []
    for character in text:
        if out and character not in " \n" and len(out[-1].strip()) < 4 and out[-1] != "\n":
            out[-1] += character
        else:
            out.append(character)
    return out


def prices() -> dict[str, dict[str, Any]]:
    """What those defences cost; what int8 costs in perplexity at the second cut is missing."""
    undefended = 21.4
    found: dict[str, dict[str, Any]] = {}
    for name, (size, factor, microseconds) in {
        "none": (192.0, 1.0, 0.01),
        "gaussian:0.1": (192.0, 1.31, 4.2),
        "int8": (52.0, 1.0, 1.9),
        "encrypted": (4288.0, 1.0, 14.0),
    }.items():
        points = [
            {
                "data": "",
                "cut": cut,
                "perplexity": undefended * factor,
                "undefended": undefended,
                "microseconds": microseconds,
                "reason": "",
            }
            for cut in CUTS
        ]
        found[name] = {"bytes_a_token": size, "whole_model": name == "encrypted", "points": points}
    found["int8"]["points"][1].update(perplexity=None, reason="MemoryError: 2.0 GB asked for")
    return found


def learning() -> list[dict[str, Any]]:
    """How some of the attackers learnt: in time, too slowly, without steps, and in a run that kept less."""
    nothing = dict.fromkeys(("steps", "validation", "halfway", "plateau", "rising"))
    learnt = {"steps": 1234, "validation": 0.991, "halfway": 0.989, "plateau": True, "rising": False}
    slow = {"steps": 321, "validation": 0.875, "halfway": 0.814, "plateau": False, "rising": True}
    found = {
        ("nearest", 1): nothing,
        ("mlp", 1): learnt,
        ("mlp", 6): slow,
        ("revert", 1): learnt | {"validation": 1.0, "plateau": False},
        ("revert", 3): learnt | {"halfway": None, "plateau": None},
        ("revert", 6): slow,
    }
    about = {"defence": "none", "seconds": 540.3}
    queries = {"nearest": 4356, "mlp": 79104, "revert": None}
    return [
        {"attack": name, "cut": cut, "queries": queries[name]} | about | facts for (name, cut), facts in found.items()
    ]


def meta(**changes: Any) -> dict[str, Any]:
    """The circumstances of that audit."""
    words = {"lens": "logit lens", "revert": "two stages: a projector into embedding space, then a generative model"}
    return {
        "title": "Inversion audit of stories3M",
        "model": MODEL,
        "blocks": BLOCKS,
        "date": "2026-02-03",
        "data": {"doctor-patient talk": "transcripts of consultations", "personal data": "sentences with marked spans"},
        "shadow": "maths questions and encyclopaedia articles, 6,000 windows of 48 tokens; no document of the victims'",
        "estimators": {
            "information:InfoNCE": {"applies": "up to log₂ of the number of pairs", "source": "van den Oord et al."}
        },
        "seed": 0,
        "budget_seconds": 540.0,
        "versions": {"splitveil": "0.1.0", "torch": "2.13.0", "transformers": "5.1.0"},
        "digests": {"model": "7d0f" * 16, "shadow text": "91ac" * 16},
        "command": "splitveil audit --model models/stories3M --data talk.csv --column dialogue --cut 1,3,6 "
        "--attack lens,nearest,ridge,mlp,pooled,revert,search,optimise "
        "--defence none,gaussian:0.1,int8,encrypted --out audit",
        "invalid": [],
        "attacks": {
            name: {"summary": words.get(name, f"what {name} does"), "needs": needs, "source": "a paper", "version": 1}
            for name, (needs, _) in ATTACKS.items()
        },
        "defences": {
            "gaussian:0.1": "Gaussian noise, its standard deviation a tenth of each position's root mean square",
            "int8": "8-bit integers, symmetric, one scale a position",
            "encrypted": "the private layer's encrypted query: each position under a lattice mask of its own",
        },
        "prices": prices(),
        "learning": learning(),
        "correlation": [
            {
                "estimator": "bounded reader",
                "rho": 0.96,
                "low": 0.81,
                "high": 1.0,
                "p_value": 0.01,
                "points": 9,
                "reason": "",
            },
            {"estimator": "InfoNCE", "rho": None, "low": None, "high": None, "points": 2, "reason": "two points"},
        ],
        **changes,
    }


# Specification → share of an attack's success that is left, perplexity, microseconds and bytes a token.
MANY: dict[str, tuple[float, float, float, float]] = {
    "none": (1.0, 1.0, 0.003, 1152),
    "gaussian:0.1": (0.995, 1.02, 4, 1152),
    "gaussian:0.3": (0.93, 1.35, 4.1, 1152),
    "gaussian:1.0": (0.41, 7.9, 4.2, 1152),
    "gaussian:3.0": (0.05, 240, 4.2, 1152),
    "dchi:20.0": (0.97, 1.05, 22, 1152),
    "dchi:5.0": (0.52, 3.4, 22, 1152),
    "int8": (1, 1.0, 2, 292),
    "int4": (0.96, 1.04, 2.1, 148),
    "topk:0.5": (0.985, 1.03, 7, 868),
    "topk:0.25": (0.94, 1.3, 6, 436),
    "topk:0.1": (0.7, 3.8, 6, 178),
    "permutation": (0.999, 19000, 1.1, 1152),
    "encrypted": (0, 1, 41, 5248),
    "regularised:runs/dcor-0.1": (0.98, 1.01, 0.003, 1152),
    "regularised:runs/dcor-1": (0.9, 1.08, 0.003, 1152),
    "regularised:runs/dcor-10": (0.8, 1.6, 0.003, 1152),
}


def crowded() -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """One cut under many defences; the best attack failed under one of them."""
    found: list[dict[str, Any]] = []
    costs = {}
    for spec, (left, ratio, microseconds, size) in MANY.items():
        where = {"data": "personal data", "cut": 3, "defence": spec, "defence_params": {}}
        found.append(row(where, "oracle", "token_accuracy", 1.0, 1.0, 1.0, 100))
        found.append(row(where, "floor", "token_accuracy", FLOOR, FLOOR - 0.003, FLOOR + 0.003, 100))
        for attack in ("ridge", "mlp", "revert"):
            if (spec, attack) == ("topk:0.1", "revert"):
                found.append(row(where, attack, "token_accuracy", None, None, None, 0, error="out of memory"))
                continue
            value = FLOOR + (ATTACKS[attack][1][1] - FLOOR) * left
            half = 0.01 if left else 0.002
            found.append(row(where, attack, "token_accuracy", value, value - half, value + half, 100))
        point = {"data": "", "cut": 3, "perplexity": 21 * ratio, "undefended": 21.0, "microseconds": microseconds}
        costs[spec] = {"bytes_a_token": size, "whole_model": spec == "encrypted", "points": [point]}
    return found, [], meta(prices=costs)


def poisoned(invalid: Sequence[str] = ()) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, Any]]:
    """The example with markup in every place where text can be, keys included."""

    def poison(value: Any) -> Any:
        if isinstance(value, str):
            return value + MARKUP
        if isinstance(value, list):
            return [poison(v) for v in value]
        if isinstance(value, dict):
            return {k + MARKUP: poison(v) for k, v in value.items()}
        return value

    kept = ("metric", "defence_params")
    poisoned_rows = [{k: v if k in kept else poison(v) for k, v in r.items()} for r in rows()]
    for row, plain_row in zip(poisoned_rows, rows(), strict=True):
        if plain_row["attack"] in {"oracle", "floor"}:
            row["attack"] = plain_row["attack"]
        if plain_row["defence"] == "none":
            row["defence"] = "none"
    items = [{k: poison(v) if k != "spans" else v for k, v in t.items()} for t in texts()]
    for text in items:
        text["spans"] = [{"start": s["start"], "end": s["end"] + 900, "type": MARKUP} for s in text["spans"]]
    about = meta(invalid=list(invalid))
    special = {"attacks", "correlation", "learning", "blocks", "prices"}
    open_ = {k: v for k, v in about.items() if k not in special}
    return (
        poisoned_rows,
        items,
        {k: poison(v) for k, v in open_.items()}
        | {
            "attacks": {k + MARKUP: {f: poison(w) for f, w in v.items()} for k, v in about["attacks"].items()},
            **{
                part: [{k: poison(v) for k, v in c.items()} for c in about[part]]
                for part in ("correlation", "learning")
            },
            "prices": {
                (name if name == "none" else f"{name}{MARKUP}"): price
                | {"points": [point | {"reason": MARKUP} for point in price["points"]]}
                for name, price in about["prices"].items()
            },
        },
    )
