"""Numbers as the report writes them. NaN is "not measured", never 0."""

import math

NOT_MEASURED = "not measured"
THIN = "\u202f"  # narrow no-break space, between a number and its unit


def percent(value: float, digits: int = 1) -> str:
    """A share as a percentage; one below 1 never reads as 100 %, nor one above 0 as 0 %: it is rounded to the next."""
    if math.isnan(value):
        return NOT_MEASURED
    rounded, least = round(100 * value, digits), 10.0**-digits
    if rounded == 100 and value < 1:
        rounded = 100 - least
    if rounded == 0 and value > 0:
        rounded = least
    return _share(rounded, digits) + f"{THIN}%"


def in_prose(value: float) -> str:
    """A share as a sentence gives it: whole percents in the middle, one digit near the ends."""
    return percent(value, 0 if 0.0995 <= value < 0.985 else 1)


def percent_range(low: float, high: float) -> str:
    """An interval of shares, as "92.8 – 95.3"; empty if there is none."""
    if math.isnan(low) or math.isnan(high):
        return ""
    return f"{_share(100 * low, 1)}{THIN}–{THIN}{_share(100 * high, 1)}"


def _share(percents: float, digits: int) -> str:
    return f"{percents:.0f}" if percents in (0.0, 100.0) else f"{percents:.{digits}f}"


def plain(value: float) -> str:
    """A number with about three figures."""
    if math.isnan(value):
        return NOT_MEASURED
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    size = abs(value)
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 0.1 or size == 0 else 3
    if 0 < size < 0.0005:
        return f"{value:.1e}"
    return f"{value:,.{digits}f}".replace(",", THIN).replace("-", "−")


def plain_range(low: float, high: float) -> str:
    """An interval of numbers; empty if there is none."""
    if math.isnan(low) or math.isnan(high):
        return ""
    return f"{plain(low)}{THIN}–{THIN}{plain(high)}"


def listed(words: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def counted(count: int, singular: str, plural: str = "") -> str:
    """ "1 prompt", "12 prompts"."""
    return f"{count:,}".replace(",", THIN) + " " + (singular if count == 1 else plural or singular + "s")
