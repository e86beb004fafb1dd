"""The report in a real browser: legible at both widths, silent, and alone."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import report_example as example
from auditing_support import SHADOW, tiny_model, tiny_tokenizer

from browser.chromium import EXECUTABLE, Browser, browser
from splitveil.attacks.catalogue import create
from splitveil.attacks.search import Search
from splitveil.auditing.audit import audit
from splitveil.auditing.data import Span, Text
from splitveil.auditing.meta import Names
from splitveil.report import write_report
from splitveil.report.page import POLICY

pytestmark = pytest.mark.skipif(EXECUTABLE is None, reason="no chromium on PATH (Debian: apt-get install chromium)")
WIDTHS = (1280, 390)
# Elements that stick out of the page, or hide text that does not fit, apart from what scrolls in its own frame.
STICKING_OUT = """
[...document.querySelectorAll("body *")].filter(e => {
  const box = e.getBoundingClientRect();
  return !e.closest(".scroll, svg, pre") && (box.right > innerWidth + 0.5 || box.left < -0.5);
}).map(e => e.outerHTML.slice(0, 100))
"""
# Contrast of every text with what is behind it (WCAG 2), where it is below 4.5 to 1.
PALE = """
(() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const rgba = color => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].map((v, i) => i < 3 ? v : v / 255);
  };
  const over = (top, under) => [0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3])).concat(1);
  const behind = e => {
    const own = rgba(getComputedStyle(e).backgroundColor);
    return own[3] === 1 || !e.parentElement ? own : over(own, behind(e.parentElement));
  };
  const light = c => [0.2126, 0.7152, 0.0722].reduce((sum, w, i) => {
    const v = c[i] / 255;
    return sum + w * (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  }, 0);
  return [...document.querySelectorAll("body *")].filter(e => e.checkVisibility() &&
    !["SCRIPT", "TITLE", "title", "desc", "style"].includes(e.tagName) && !e.classList.contains("number") &&
    [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim())).map(e => {
      const under = behind(e), style = getComputedStyle(e);
      const ink = over(rgba(e.closest("svg") ? style.fill : style.color), under);
      const [a, b] = [light(ink), light(under)].sort((x, y) => y - x);
      return [(a + 0.05) / (b + 0.05), e.outerHTML.slice(0, 90)];
    }).filter(([ratio]) => ratio < 4.5);
})()
"""


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(example.rows(), example.texts(), example.meta(), tmp_path_factory.mktemp("report"))


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a real audit, small as it is: two cuts, three defences, attackers that know more and less."""
    names = ("Ann", "Bo", "Cy", "Dee", "Eve")
    texts = [
        Text(f"Nurse {name} of room {room} calls for help", (Span(6, 6 + len(name), "PERSON"),))
        for room in range(10, 16)
        for name in names
    ]
    measured = audit(
        tiny_model(), tiny_tokenizer(), texts, SHADOW, (1, 2), ("lens", "nearest", "mlp", "search"),
        ("none", "int8", "encrypted"), tokens=14, windows=40, steps=4,
        # Under encryption no candidate is the right one: eight show that as well as all of them.
        create_attack=lambda name: Search(patience=8) if name == "search" else create(name),
        names=Names("tiny", "notes of a hospital's night shift", "splitveil audit --model tiny --cut 1,2"),
    )  # fmt: skip
    assert measured.valid
    assert not measured.summary()["failed"]
    return measured.to_html(tmp_path_factory.mktemp("audited"))


@pytest.fixture(params=["report", "audited"])
def either(request: pytest.FixtureRequest) -> Path:
    """The example, which has something of everything, and what an audit writes."""
    found: Path = request.getfixturevalue(request.param)
    return found


def without_policy(page: Path) -> Path:
    """A copy whose browser would run scripts and fetch things: what escaping alone is worth."""
    text = page.read_text()
    policy = f'<meta http-equiv="Content-Security-Policy" content="{POLICY.replace(chr(39), "&#39;")}">'
    assert policy in text
    copy = page.with_name("open.html")
    copy.write_text(text.replace(policy, ""))
    return copy


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_is_silent_and_asks_for_nothing(chromium: Browser, either: Path, width: int, dark: bool) -> None:
    for page in (either, *([] if dark else [without_policy(either)])):
        chromium.open(page, width, dark=dark)
        assert chromium.value("innerWidth") == width
        assert chromium.value("document.documentElement.scrollWidth") <= width
        assert chromium.value(STICKING_OUT) == []
        assert chromium.requests() == [page.resolve().as_uri()]
        assert chromium.complaints() == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_is_legible(chromium: Browser, either: Path, dark: bool) -> None:
    chromium.open(either, 390, dark=dark)
    chromium.value("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert chromium.value(PALE) == []
    body = chromium.value("getComputedStyle(document.body).backgroundColor")
    assert ("19, 22, 26" in body) is dark
    # Letters of plots are scaled with them; 10 pixels is the least on a small screen.
    scale = chromium.value("document.querySelector('svg').getBoundingClientRect().width / 400")
    assert 12 * scale >= 10


# Names in the frontier's plots that stand on each other, as they are drawn, and plots with letters below 10 pixels.
COVERED = """
[...document.querySelectorAll("svg.plot")].filter(e => e.id.startsWith("frontier") ||
  e.querySelector("[id^=frontier]")).flatMap(plot => {
    const boxes = [...plot.querySelectorAll(".name")].map(e => [e.textContent, e.getBoundingClientRect()]);
    const frame = plot.getBoundingClientRect();
    const outside = boxes.filter(([, b]) => b.left < frame.left || b.right > frame.right);
    const pairs = boxes.flatMap(([a, x], i) => boxes.slice(i + 1).filter(([, y]) =>
      x.left < y.right && y.left < x.right && x.top + 2 < y.bottom && y.top + 2 < x.bottom).map(([b]) => [a, b]));
    return [...outside.map(([a]) => a), ...pairs, ...(12 * frame.width / 400 < 10 ? [frame.width] : [])];
  })
"""
NAMES = "document.querySelectorAll('.pairs svg .name').length"


@pytest.mark.parametrize("width", WIDTHS)
def test_names_of_defences_cover_nothing(chromium: Browser, tmp_path: Path, width: int) -> None:
    page = write_report(*example.crowded(), tmp_path)
    chromium.open(page, width)
    assert chromium.value(NAMES) == 3 * 17
    assert chromium.value(COVERED) == []
    chromium.value("document.querySelectorAll('.pairs svg .name').forEach(e => e.setAttribute('y', 60))")
    assert len(chromium.value(COVERED)) > 10  # the check can fail


@pytest.mark.parametrize("width", WIDTHS)
def test_verdict_and_controls_are_on_the_first_screen(chromium: Browser, either: Path, width: int) -> None:
    height = 844 if width == 390 else 800
    chromium.open(either, width, height)
    for selector in (".checked", "#verdict", ".lead", ".answers dt", *([".answers", "#controls"] * (width > 600))):
        bottom = chromium.value(f"document.querySelector('{selector}').getBoundingClientRect().bottom")
        assert 0 < bottom <= height, selector
    # Not all answers fit on a small screen: the sentences above them say where, to whom, and what to do.
    lead = chromium.value("document.querySelector('.lead').textContent")
    assert re.fullmatch(r"After block 1, 100\s% of the tokens of .+ are recovered by anyone .+ \(\w+\)\. Send .+", lead)


def test_an_invalid_report_says_so_before_anything_else(chromium: Browser, tmp_path: Path) -> None:
    page = write_report(example.rows(), [], example.meta(invalid=["the truth scored 0.98"]), tmp_path)
    chromium.open(page, 390, 844)
    assert chromium.value("document.querySelector('.invalid').getBoundingClientRect().bottom") < 844
    assert chromium.value("parseFloat(getComputedStyle(document.querySelector('#invalid')).fontSize)") > 24


def test_prompts_cannot_act_even_without_the_policy(chromium: Browser, tmp_path: Path) -> None:
    rows, texts, meta = example.poisoned()
    page = write_report(rows, texts, meta, tmp_path)
    chromium.open(without_policy(page), 1280)
    assert chromium.value("document.title") == meta["title"]
    assert chromium.value("document.querySelectorAll('script, img').length") == 0
    assert len(chromium.requests()) == 1
    assert chromium.complaints() == []


def test_the_checks_of_this_file_can_fail(chromium: Browser, report: Path) -> None:
    bad: dict[str, Any] = {
        "wide": '<p style="width:3000px">wide</p>',
        "pale": '<p style="color:#ccc;background:#fff">pale</p>',
        "loud": '<script>console.error("loud")</script>',
        "asks": '<img src="other.png" alt="">',
        "acts": example.MARKUP,
    }
    page = without_policy(report).with_name("bad.html")
    page.write_text(without_policy(report).read_text().replace("</main>", "".join(bad.values()) + "</main>"))
    chromium.open(page, 390)
    assert len(chromium.value(STICKING_OUT)) == 1
    assert [pale[1] for pale in chromium.value(PALE)] == [bad["pale"]]
    assert any("loud" in message for message in chromium.complaints())
    assert any(address.endswith("other.png") for address in chromium.requests())
    assert chromium.value("document.title") in {"taken", "1"}
    page.write_text(report.read_text().replace("</main>", "".join(bad.values()) + "</main>"))
    chromium.open(page, 390)
    assert chromium.value("document.title") == "Inversion audit of stories3M"  # the policy is a second wall


def test_it_prints_whole(chromium: Browser, either: Path) -> None:
    chromium.open(either, 794)  # the width of A4
    chromium("Emulation.setEmulatedMedia", media="print")
    assert chromium.value("getComputedStyle(document.querySelector('nav')).display") == "none"
    assert chromium.value("document.documentElement.scrollWidth") <= 794
    folded = "[...document.querySelectorAll('details:not([open]) table')].map(e => e.getBoundingClientRect().height)"
    assert min(chromium.value(folded)) > 20
