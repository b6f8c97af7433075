"""The report: its numbers survive the file, its page says them, its pictures are drawn."""

import base64
import html
import json
import math
import re
import shutil
import stat
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import yaml
from matplotlib import pyplot

from compressor.files import write_json_atomic, write_text_atomic
from compressor.page import card, headline, markdown, write
from compressor.pictures import figures
from compressor.progress import LineProgress, Progress, duration
from compressor.report import (
    CORRECTED,
    BudgetLine,
    Environment,
    GateLine,
    Parity,
    PlanEntry,
    Recovery,
    Report,
    Row,
    Sample,
    TextQuality,
    Timing,
    Training,
    TrainingPoint,
    Trial,
    best_so_far,
)


def trained(method: str, decides: str, kept: int, held_out: list[float | None], **others: float) -> Training:
    """A training of as many steps as held-out measures but the first."""
    points = [
        TrainingPoint(i, {"loss": 1 / (1 + i)} if i else {}, {"kl": kl, **others} if kl else None)
        for i, kl in enumerate(held_out)
    ]
    return Training(method, decides, kept, tuple(points))


def example() -> Report:
    kls = {"uniform": [2.0], "random": [4.0, 3.0, 5.0, 2.5], "actor_critic": [1.8, math.inf, 1.1, 1.2]}
    trials = [
        Trial(policy, i, kl, 20.0, 79_000_000 + i, 400.0 + i, 10.0 + i, f"{i:016x}")
        for policy, curve in kls.items()
        for i, kl in enumerate(curve, 1)
    ]
    plan = [PlanEntry("embedding", "embedding", None, 1, 1, "w8", 30_000_000, 0.01)]
    for layer in range(3):
        plan.append(PlanEntry(f"layers.{layer}.attention", "attention", layer, 2, 3, "int8", 800_000, 0.1))
        plan.append(PlanEntry(f"layers.{layer}.ffn", "ffn", layer, 0, 1536, "none", 0))
    plan.append(PlanEntry("head", "head", None, 1, 1, "w4", 15_000_000))
    return Report(
        Environment("Linux x86_64", "A Processor", 2, "CPUExecutionProvider", {"torch": "2.13"}),
        {"model": {"path": "org/teacher"}, "search": {"policy": "actor_critic", "evaluations": 4}},
        "Windows of 512 tokens.",
        (
            Row("teacher, torch", "teacher", 20.0, None, 538_000_000),
            Row("fp32 ONNX", "reference", 20.0, 1e-7, 500_000_000, Timing(500, 490, 510), Timing(35, 34, 36)),
            Row("uniform", "rival", 60.0, 1.5, 80_000_000, Timing(600, 590, 610), Timing(10, 9, 11)),
            Row("student", "student", 25.0, 0.5, 50_000_000, Timing(400, 390, 410), Timing(14, 13, 15), 300_000_000),
        ),
        (BudgetLine("bytes", 60e6, 49.9e6, 50e6, True), BudgetLine("decode", 15.0, 13.0, 14.0, True, 0.26)),
        tuple(trials),
        tuple(plan),
        Recovery(1.6, 1.4, 0.7, trained("kd", "kl", 20, [1.4, *[None] * 19, 0.7])),
        Parity(1e-5, True, 0.001, 0.02),
        (Sample("Once upon", "a # time\nthere", "a time"),),
        {"bank": 10.0, "search": 20.5},
        (GateLine("perplexity_ratio", 1.5, 1.25, True),),
    )


def test_json_round_trip(tmp_path):
    report = example()
    write(report, tmp_path)
    text = (tmp_path / "report.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert Report.from_json(text) == report


def test_headline():
    assert headline(example()) == (
        "The student is 10.00× smaller (500.0 MB → 50.0 MB), 1.25× faster at prefill (500 ms → 400 ms), "
        "2.50× faster at decoding (35 ms → 14 ms); perplexity 20.0 → 25.0 (KL 0.500)."
    )
    rows = example().rows
    slow = replace(example(), rows=(*rows[:3], replace(rows[3], prefill_ms=Timing(1000, 990, 1010))))
    assert "2.00× slower at prefill (500 ms → 1.00 s)" in headline(slow)


def test_page():
    page = markdown(example())
    assert page.startswith("# org/teacher, compressed\n\n**The student is 10.00× smaller")
    assert "It is within the budget. The gate passed." in page
    assert "| **student** | 25.0 | 0.500 | 50.0 MB (0.10×) | 400 ms (0.80×) | 14 ms (0.40×) | 300.0 MB |" in page
    assert "| fp32 ONNX | 20.0 | 1e-07 | 500.0 MB | 500 ms | 35 ms | – |" in page
    assert "| decode per token | 15 ms | 13 ms ± 2.0% | 14 ms | +7.7% | yes |" in page
    assert "Dropped sub-layers: layers.0.ffn, layers.1.ffn, layers.2.ffn." in page
    assert "| actor_critic | 4 | 1.80 | 1.80 | 1.10 | 1.00× | 3 |" in page
    assert "| random | 4 | 4.00 | 3.00 | 2.50 | 2.27× | 4 |" in page
    assert "variants have 1.60; reconstruction gives 1.40; 20 steps of distillation 0.700 (-56% in all)" in page
    assert "> a \\# time" in page
    assert "| **all** | **30.5 s** |" in page


def test_a_search_that_went_on_is_told_apart():
    report = example()
    assert "went on" not in markdown(report)
    more = replace(report.trials[0], policy=f"actor_critic{CORRECTED}", kl=1.2)
    page = markdown(replace(report, trials=(*report.trials, more), stage_seconds={"search-on-1": 3.0}))
    assert "| actor_critic, with corrected times | 1 | 1.20 |" in page
    assert "*with corrected times*: the best plans turned out too slow as whole models, so the search went on" in page
    assert "| search, going on with corrected times, 1 | 3.0 s |" in page


def test_several_texts_stand_side_by_side():
    texts = {"wiki": TextQuality(20.0, 0.4, 1.25), "novel": TextQuality(31.0, 0.6)}
    rows = tuple(replace(row, texts=texts) for row in example().rows)
    page = markdown(replace(example(), rows=rows))
    assert "| model | wiki | novel |" in page and "| student | 20.0, 0.400, 1.25 | 31.0, 0.600, – |" in page
    assert "By text" not in markdown(example())


def test_what_failed_is_said_at_the_top():
    report = example()
    bad = replace(
        report,
        budget=(replace(report.budget[0], measured=62e6, fits=False),),
        gate=(replace(report.gate[0], measured=1.6, passed=False),),
        parity=Parity(0.2, False, 0.001, 0.02),
        recovery=Recovery(1.4, 1.5, 1.4, trained("kd", "kl", 0, [1.4, 2.0])),
    )
    page = markdown(bad)
    first = page.split("\n\n")[1]
    assert "The budget is **missed** in bytes." in first
    assert "The gate **failed**: perplexity_ratio, parity." in first
    assert page.count("**not kept**") == 2 and "tokens are not the same" in page


def test_a_training_on_own_text_is_told_by_its_own_measures():
    training = trained("rl", "cost", 1, [1.4, 1.5, 1.6], cost=-0.25, reward=0.75, distinct_2=0.9)
    report = replace(example(), recovery=Recovery(1.6, 1.4, 1.5, training))
    page = markdown(report)
    assert "The student of step 1 was kept: least cost." in page and "steps of distillation" not in page
    assert "| behind held-out prompts | step 0 | step 1 | step 2 |" in page
    assert "| distinct 2 | 0.900 | 0.900 | 0.900 |" in page
    assert "distillation.png" in figures(report)


class Reader(HTMLParser):
    """What a page shows, and what it would fetch."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.words, self.sources = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.sources += [value for key, value in attributes if key in ("src", "href")]

    def handle_data(self, data):
        self.words.append(data)


PROBE = """<script>
const loaded = performance.getEntriesByType("resource").filter(entry => !entry.name.startsWith("data:"));
const pictures = [...document.images], width = document.documentElement.scrollWidth;
document.title = JSON.stringify({wide: width > innerWidth, loaded: loaded.length, pictures: pictures.length,
    drawn: pictures.filter(picture => picture.complete && picture.naturalWidth > 100).length,
    small: pictures.filter(picture => picture.getBoundingClientRect().width > innerWidth).length});
</script>"""
"""Tells in the title how a page looks."""


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs Chromium")
@pytest.mark.parametrize("width", [1280, 400])
def test_the_html_page_looks_right_in_a_browser(tmp_path, width):
    """Nothing is loaded, nothing stands out of the window, pictures are drawn, nothing is complained about."""
    write(example(), tmp_path)
    probed = tmp_path / "probed.html"
    probed.write_text((tmp_path / "report.html").read_text() + PROBE)
    chromium = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    chromium += ["--enable-logging=stderr", "--hide-scrollbars", f"--window-size={width},3000"]
    picture = tmp_path / "seen.png"
    shown = subprocess.run(
        [*chromium, "--dump-dom", probed.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    title = json.loads(html.unescape(re.search("<title>(.*?)</title>", shown.stdout)[1]))
    assert title == {"wide": False, "loaded": 0, "pictures": title["drawn"], "drawn": title["drawn"], "small": 0}
    assert title["drawn"] >= 3 and "CONSOLE" not in shown.stderr
    subprocess.run(
        [*chromium, f"--screenshot={picture}", probed.as_uri()], capture_output=True, timeout=120, check=True
    )
    seen = pyplot.imread(picture)[..., :3]
    assert seen.shape[1] == width and (seen.mean(-1) < 0.9).mean() > 0.02  # there is something on it


def test_the_html_page_is_whole_in_itself(tmp_path):
    hostile = Sample("<script>alert(1)</script>", "a <b>teacher</b>", "student & co")
    write(replace(example(), samples=(hostile,)), tmp_path)
    page = Reader((tmp_path / "report.html").read_text())
    pictures = figures(example())
    assert len(page.sources) == len(pictures) and all(s.startswith("data:image/png;base64,") for s in page.sources)
    assert base64.b64decode(page.sources[0].split(",")[1]).startswith(b"\x89PNG")
    assert {"script", "b", "link"}.isdisjoint(page.tags) and {"details", "table", "h1"} <= set(page.tags)
    text = " ".join(page.words)
    assert "<script>alert(1)</script>" in text and "a <b>teacher</b>" in text and "layers.2.ffn" in text
    for row in example().rows:
        assert row.name in text


def test_a_notebook_shows_the_beginning_of_the_page():
    shown = example()._repr_markdown_()
    assert markdown(example()).startswith(shown) and headline(example()) in shown and "](" not in shown


def test_the_card_says_what_the_folder_holds():
    report = example()
    front, text = card(report).removeprefix("---\n").split("---\n", 1)
    assert yaml.safe_load(front)["base_model"] == "org/teacher"
    assert headline(report) in text and "| w8 | 1 | 30.0 MB |" in text and "plan.png" not in text
    local = replace(report, recipe={**report.recipe, "model": {"path": "/home/me/models/teacher"}})
    assert "/home/me" not in card(local) and card(local).count("base_model") == 0


def test_every_picture_that_the_page_shows_is_written(tmp_path):
    page = write(example(), tmp_path).read_text()
    shown = {part.split(")")[0] for part in page.split("](")[1:]}
    assert shown == {"plan.png", "search.png", "quality.png", "distillation.png"}
    for name in shown:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == shown | {
        "report.md",
        "report.html",
        "report.json",
    }  # no temporary file is left


def test_little_to_say(tmp_path):
    report = example()
    bare = Report(report.environment, {}, "", (report.rows[3],), (), (), ())
    assert figures(bare) == {}
    page = write(bare, tmp_path).read_text()
    assert "](" not in page and "## The search" not in page


def test_zero_and_infinite_kl_are_drawn(tmp_path):
    trials = (
        Trial("random", 1, math.inf, math.inf, 1, None, None, "a"),
        Trial("random", 2, 0.0, 1.0, 1, None, None, "b"),
    )
    write(replace(example(), trials=trials), tmp_path)


def test_best_so_far_orders_by_index_and_skips_nan():
    trials = [Trial("p", i, kl, 1.0, 1, None, None, "d") for i, kl in ((3, 0.5), (1, math.nan), (2, 2.0), (4, 1.0))]
    trials.append(Trial("p", 2, 0.1, 1.0, 1, None, None, "d", share=0.125))
    assert best_so_far(trials) == {"p": [math.inf, 2.0, 0.5, 0.5]}


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "deep" / "a.json"
    write_json_atomic(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json_atomic(path, {"a": math.nan})
    with pytest.raises(UnicodeEncodeError):
        write_text_atomic(path, "\ud800")
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in path.parent.iterdir()] == ["a.json"]
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


class Log:
    def __init__(self):
        self.lines = []

    def write(self, text):
        self.lines += [line for line in text.split("\n") if line]

    def flush(self):
        pass


def test_progress_in_a_log_says_little_and_how_long():
    now = [0.0]
    log = Log()
    show = LineProgress(log, interval=10, clock=lambda: now[0])
    for done in range(101):
        now[0] = done * 0.5
        show(Progress("search", done, 100, "KL 1.2"))
    show(Progress("search", 100, 100))
    show(Progress("export", 1, 1))
    assert log.lines[0] == "search  0/100  0s  KL 1.2"
    assert log.lines[1] == "search  20/100  10s, 40s left  KL 1.2"
    assert log.lines[-2:] == ["search  100/100  50s  KL 1.2", "export  1/1  0s"]
    assert len(log.lines) == 7


def test_time_left_counts_from_where_a_resumed_stage_began():
    now = [0.0]
    show = LineProgress(Log(), clock=lambda: now[0])
    show(Progress("search", 50, 100))
    now[0] = 10.0
    assert show.seconds_left(Progress("search", 60, 100), now[0]) == pytest.approx(40)


def test_durations():
    assert [duration(s) for s in (0.4, 59.6, 75, 4000)] == ["0s", "1m00s", "1m15s", "1h06m"]
