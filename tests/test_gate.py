"""The gate: limits, baselines with their spread, refusals, and what CI reads of them."""

import json
from dataclasses import replace
from xml.etree import ElementTree

import pytest
import yaml
from typer.testing import CliRunner

import compressor
from compressor import Recipe
from compressor.cli import app
from compressor.errors import ComparisonError, DataError, RecipeError, RegressionError
from compressor.gate import against_baseline, against_limits, as_json, as_junit, compare, every_line
from compressor.page import write
from compressor.recipe import GateSection
from compressor.report import GateLine, Report, Timing
from tests.conftest import ROOT
from tests.test_report import example


def changed(report: Report, role: str = "student", **changes) -> Report:
    """A report in which the row in that role has other figures."""
    rows = tuple(replace(row, **changes) if row.role == role else row for row in report.rows)
    return replace(report, rows=rows)


def invoke(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"perplexity_ratio": 1.25}, [("perplexity_ratio", 1.25, 1.25, True)]),
        ({"perplexity_ratio": 1.24}, [("perplexity_ratio", 1.24, 1.25, False)]),
        ({"bytes": "10%", "decode": "0.38x"}, [("bytes", 50e6, 50e6, True), ("decode", 13.3, 14, True)]),
        ({"bytes": "49MB", "prefill": "389ms"}, [("bytes", 49e6, 50e6, False), ("prefill", 389, 400, False)]),
        ({"prefill": "391ms", "decode": "12ms"}, [("prefill", 391, 400, True), ("decode", 12, 14, False)]),
    ],
)
def test_limits_are_those_of_the_recipe_and_of_a_time_the_lower_end_counts(limits, expected):
    lines = against_limits(example().rows, GateSection.model_validate(limits))
    assert [(line.name, pytest.approx(line.limit), line.measured, line.passed) for line in lines] == expected


def test_nothing_is_lost_against_itself_and_a_tolerance_allows_what_it_says():
    report = example()
    assert all(line.passed for line in against_baseline(report, report))
    worse = changed(report, perplexity=25.4, size_bytes=50_400_000)
    lines = {line.name: line for line in against_baseline(worse, report)}
    assert not lines["perplexity_ratio"].passed and not lines["bytes"].passed and lines["decode"].passed
    assert lines["perplexity_ratio"].baseline == 1.25 and lines["bytes"].limit == 50_000_000
    allowed = {"perplexity_ratio": 0.02, "bytes": 0.01}
    assert all(line.passed for line in against_baseline(worse, report, allowed))
    better = changed(report, perplexity=21.0, size_bytes=40_000_000)
    assert all(line.passed for line in against_baseline(better, report))


def test_times_are_carried_over_by_the_fp32_exports_and_their_spread_is_allowed():
    """A machine twice as slow moves both; a student that alone got slower is seen, unless the rounds are as wide as that."""
    report = example()
    slow = changed(report, prefill_ms=Timing(800, 780, 820), decode_ms=Timing(28, 26, 30))
    slow = changed(slow, "reference", prefill_ms=Timing(1000, 980, 1020), decode_ms=Timing(70, 68, 72))
    assert all(line.passed for line in against_baseline(slow, report))
    lines = {line.name: line for line in against_baseline(changed(report, prefill_ms=Timing(520, 510, 530)), report)}
    assert not lines["prefill"].passed and lines["prefill"].baseline == 400
    spread = 10 / 520 + 10 / 500 + 10 / 400 + 10 / 500
    assert lines["prefill"].limit == pytest.approx(400 * (1.1 + spread))
    noisy = changed(report, prefill_ms=Timing(520, 420, 620))
    assert all(line.passed for line in against_baseline(noisy, report))
    assert {line.name for line in against_baseline(report, report, times=False)} == {"perplexity_ratio", "bytes"}


def test_what_was_measured_otherwise_is_not_compared():
    report = example()
    for other, match in [
        (replace(report, protocol="Windows of 256 tokens."), "protocol: 'Windows of 512 tokens.'"),
        (replace(report, environment=replace(report.environment, cpu="Another")), "cpu: A Processor against Another"),
        (replace(report, environment=replace(report.environment, threads=8)), "threads: 2 against 8"),
        (changed(report, "teacher", perplexity=21.0), "the teacher's perplexity: 20.0 against 21.0"),
        (replace(report, rows=report.rows[:2]), "expected a student"),
    ]:
        with pytest.raises(ComparisonError, match=match):
            against_baseline(report, other)
    elsewhere = replace(
        report, environment=replace(report.environment, cpu="Another", provider="CUDAExecutionProvider")
    )
    assert len(against_baseline(elsewhere, report, times=False)) == 2
    other = replace(report, protocol="Windows of 512 tokens. Prefill: 64 tokens.")
    here = replace(report, protocol="Windows of 512 tokens. Prefill: 128 tokens.")
    with pytest.raises(ComparisonError, match=r"protocol: 'Prefill: 128 tokens.' against 'Prefill: 64.*--no-times"):
        against_baseline(here, other)
    assert len(against_baseline(here, other, times=False)) == 2
    newer = replace(report, environment=replace(report.environment, versions={"torch": "3"}))
    assert len(against_baseline(newer, report)) == 4


def test_without_times_the_gates_own_lines_of_the_device_are_left_out():
    missed = [GateLine(name, 1.0, 2.0, False) for name in ("kl", "prefill", "decode", "memory")]
    report = replace(example(), gate=tuple(missed))
    assert [line.name for line in every_line(report)] == ["kl", "prefill", "decode", "memory"]
    assert [line.name for line in every_line(report, times=False)] == ["kl"]
    assert [line.name for line in every_line(report, times=False, limits={"memory": "1MB"})] == ["kl", "memory"]


def test_check_raises_with_a_table_of_what_missed_and_by_how_much(tmp_path):
    report = example()
    assert report.check() == report.gate
    assert len(report.check(baseline=report)) == 5
    worse = changed(report, perplexity=27.5)
    write(report, tmp_path)
    with pytest.raises(RegressionError) as caught:
        worse.check(baseline=tmp_path)
    error = caught.value
    assert [line.name for line in error.missed] == ["perplexity_ratio"] and error.report is worse
    assert "1 of 5 checks missed" in str(error)
    assert "| perplexity, student / teacher | 1.25 | 1.26 | 1.38 | +8.9% | **missed** |" in str(error)
    assert worse.check(baseline=tmp_path / "report.json", tolerance={"perplexity_ratio": 0.1})
    failed = replace(report, parity=replace(report.parity, relative_error=0.5))
    with pytest.raises(RegressionError, match="export parity: expected a relative error of at most 0.001"):
        failed.check()
    told = json.loads(as_json(failed.gate, failed))
    assert not told["passed"] and told["parity"] is False and all(check["passed"] for check in told["checks"])
    with pytest.raises(RecipeError, match="tolerance bytes = 0.1: expected a baseline"):
        report.check(tolerance={"bytes": 0.1})


def test_figures_without_end_are_no_json_numbers():
    report = example()
    told = json.loads(as_json([GateLine("accuracy_ratio", 1.0, float("inf"), False)], report))
    assert told["checks"][0]["measured"] is None and not told["passed"]


def test_further_limits_are_checked_without_running_anything_again():
    report = example()  # of 50 MB, KL 0.5 and 300 MB of memory
    assert len(report.check(limits={"bytes": "60MB", "kl": 0.6, "memory": "310 MB"})) == len(report.gate) + 3
    with pytest.raises(RegressionError) as caught:
        report.check(limits={"bytes": "9%", "kl": 0.4, "memory": "300MB"})
    assert [line.name for line in caught.value.missed] == ["kl", "bytes"]
    with pytest.raises(ComparisonError, match="a figure that the report does not have"):  # memory of the fp32 export
        report.check(limits={"memory": "50%"})
    with pytest.raises(RecipeError, match="tolerance perplexity = 0.02: expected a share"):
        report.check(baseline=report, tolerance={"perplexity": 0.02})


def test_what_a_check_is_given_takes_the_place_of_the_recipes(tmp_path):
    own = (
        GateLine("bytes", 4e7, 5e7, False),
        GateLine("decode", 1.0, 14.0, False, 1.0),
        GateLine("kl", 1.0, 0.5, True),
    )
    report = replace(example(), gate=own)
    found = [(line.name, line.limit) for line in every_line(report, limits={"bytes": "60MB"})]
    assert found == [("decode", 1.0), ("kl", 1.0), ("bytes", 6e7)]
    lines = every_line(report, example())
    assert [line.name for line in lines if line.baseline is None] == ["bytes", "kl"] and len(lines) == 6
    with pytest.raises(RecipeError, match="tolerance decod = 0.1"):
        every_line(report, tolerance={"decod": 0.1})


def test_a_name_that_is_checked_twice_is_two_cases():
    report = replace(example(), gate=(GateLine("bytes", 6e7, 5e7, True),))
    suite = ElementTree.fromstring(as_junit(report.check(baseline=report), report))
    cases = [(case.get("classname"), case.get("name")) for case in suite]
    assert (
        len(set(cases)) == len(cases)
        and ("compress.limit", "bytes") in cases
        and ("compress.baseline", "bytes") in cases
    )


def test_check_on_the_command_line(tmp_path):
    report = example()
    write(report, tmp_path / "old")
    write(changed(report, decode_ms=Timing(19, 18.9, 19.1), size_bytes=50_100_000), tmp_path / "new")
    result = invoke("check", tmp_path / "old")
    assert result.exit_code == 0 and "| perplexity, student / teacher | – | 1.50 | 1.25 |" in result.stdout
    files = {name: tmp_path / name for name in ("checks.json", "checks.xml", "figures.json")}
    options = [f"--{key}={path}" for key, path in zip(("json", "junit", "benchmark"), files.values())]
    result = invoke("check", tmp_path / "new", "--baseline", tmp_path / "old", "--tolerance", "bytes=1%", *options)
    assert result.exit_code == 3 and "1 of 5 checks missed" in result.stderr and "Traceback" not in result.output
    told = json.loads(files["checks.json"].read_text())
    assert not told["passed"] and [c["name"] for c in told["checks"] if not c["passed"]] == ["decode"]
    suite = ElementTree.parse(files["checks.xml"]).getroot()
    assert (suite.get("tests"), suite.get("failures")) == ("6", "1")
    assert [case.get("name") for case in suite if case.find("failure") is not None] == ["decode"]
    figures = {entry["name"]: entry for entry in json.loads(files["figures.json"].read_text())}
    assert figures["decode"] == {"name": "decode", "unit": "ms", "value": 19, "range": "± 0.1"}
    assert figures["size"]["value"] == 50_100_000
    result = invoke(
        "check", tmp_path / "new", "--baseline", tmp_path / "old", "--tolerance", "bytes=0.01", "--no-times"
    )
    assert result.exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["nowhere"], "expected the report of a run"),
        (["old", "--baseline", "nowhere"], "expected the report of a run"),
        (
            ["old", "--baseline", "old", "--tolerance", "speed=1%"],
            "expected a share of at least 0 of one of perplexity_ratio",
        ),
        (["old", "--baseline", "old", "--tolerance", "decode=much"], "expected a share such as decode=15%"),
        (["old", "--baseline", "old", "--tolerance", "decode"], "expected --tolerance NAME=VALUE, such as decode=15%"),
        (["old", "--baseline", "old", "--tolerance", "decode=-1%"], "expected a share of at least 0"),
        (["old", "--limit", "speed=1"], "limit speed: expected one of perplexity_ratio, kl"),
        (["old", "--limit", "bytes=small"], "gate.bytes = 'small': expected a size such as 60MB"),
    ],
)
def test_bad_arguments_are_one_message(tmp_path, monkeypatch, arguments, match):
    monkeypatch.chdir(tmp_path)
    write(example(), tmp_path / "old")
    result = invoke("check", *arguments)
    assert result.exit_code in (1, 2) and match in result.stderr and "Traceback" not in result.output


def test_two_runs_side_by_side(tmp_path):
    report = example()
    other = changed(replace(report, environment=replace(report.environment, cpu="Another")), size_bytes=25_000_000)
    write(report, tmp_path / "a")
    page = compare(tmp_path / "a", other)
    assert "| student: size | 50.0 MB | 25.0 MB | 2.000× |" in page and "Not the same measurement: cpu" in page
    write(other, tmp_path / "b")
    assert invoke("compare", tmp_path / "a", tmp_path / "b").stdout.strip() == page
    with pytest.raises(DataError, match="expected a report that this version writes"):
        (tmp_path / "b" / "report.json").write_text('{"rows": 1}')
        compare(tmp_path / "a", tmp_path / "b")


def test_a_report_from_the_file_is_the_report(tmp_path):
    report = replace(example(), gate=(GateLine("bytes", 1.0, 2.0, False, 0.5),))
    write(report, tmp_path)
    assert compressor.Report.load(tmp_path) == report


def test_public_names():
    assert {"CompressorError", "Recipe", "Report", "compare", "compress", "dry_run", "load"} < set(compressor.__all__)
    assert all(getattr(compressor, name) for name in (*compressor.__all__, "__version__"))
    assert set(compressor.__all__) <= set(dir(compressor))
    with pytest.raises(AttributeError):
        compressor.nothing  # noqa: B018


def commands(text: str) -> list[list[str]]:
    return [
        line.split("||")[0].split("compress ", 1)[1].split()
        for line in text.splitlines()
        if line.strip(" -").startswith("compress ")
    ]


@pytest.mark.parametrize("name", ["github.yml", "gitlab.yml"])
def test_the_ci_examples_are_yaml_and_their_commands_are_ours(name, tmp_path, monkeypatch):
    """Every command is parsed as typed; the checks run on two reports."""
    text = (ROOT / "recipes" / "ci" / name).read_text()
    assert yaml.safe_load(text)
    found = commands(text)
    assert [command[0] for command in found] == ["recipe.yaml", "check"]
    (run,) = [command for command in found if command[0] != "check"]
    options = dict(zip(run[1::2], run[2::2], strict=True))
    assert options.keys() <= {"--out"}
    monkeypatch.chdir(tmp_path)
    write(example(), tmp_path / options["--out"])
    baseline = next(part for part in found[1] if part.endswith(".json") and "baseline" in part)
    (tmp_path / baseline).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / baseline).write_text((tmp_path / options["--out"] / "report.json").read_text())
    assert invoke(*found[1]).exit_code == 0


def test_the_fixture_for_other_peoples_suites(pytester, monkeypatch, tmp_path):
    """A suite of somebody else's: one test passes, one names a regression. What ran once, missed gate or not, runs once."""
    made = []

    def compress(recipe, out, **_):
        made.append(recipe)
        if recipe == "missed.yaml":
            raise RegressionError("1 of 1 checks missed")
        return example()

    monkeypatch.setattr(compressor, "compress", compress, raising=False)
    monkeypatch.setattr(Recipe, "load", lambda path, overrides=(): path)
    pytester.makepyfile(
        """
        def test_small(compressed):
            assert compressed("recipe.yaml").row("student").size_bytes < 60e6

        def test_better(compressed):
            from dataclasses import replace
            report = compressed("recipe.yaml")
            rows = tuple(replace(row, size_bytes=1) if row.role == "student" else row for row in report.rows)
            report.check(baseline=replace(report, rows=rows))

        def test_missed(compressed):
            compressed("missed.yaml")

        def test_missed_again(compressed):
            compressed("missed.yaml")

        def test_another_worker_is_waited_for(compressed, tmp_path):
            import time
            from threading import Event, Thread
            from filelock import FileLock
            held, done = Event(), []

            def work():
                with FileLock(tmp_path / ".session.lock"):
                    held.set()
                    time.sleep(0.3)
                    done.append(True)

            Thread(target=work).start()
            held.wait()
            compressed("recipe.yaml", out=tmp_path)
            assert done
        """
    )
    result = pytester.runpytest_inprocess("-p", "no:cacheprovider")
    result.assert_outcomes(passed=2, failed=3)
    assert made == ["recipe.yaml", "missed.yaml", "recipe.yaml"]
    result.stdout.fnmatch_lines(["*RegressionError: 1 of 5 checks missed*"])
