"""The recipe: what is read, what is refused and in which words; the actions made from it."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from compressor.actions import kept_units, menu
from compressor.errors import RecipeError
from compressor.plan import DROP, Action, Matrix, Site
from compressor.recipe import (
    SIZE_UNITS,
    SIZE_WANTED,
    TIME_UNITS,
    TIME_WANTED,
    Limit,
    Recipe,
    Section,
    parse_limit,
    recipe_schema,
    section_in,
)
from compressor.recipe import SearchSection as Search

SMALL = {
    "model": {"path": "teacher"},
    "data": {"calibration": ["a.txt"], "evaluation": ["b.txt"]},
    "budget": {"bytes": "25%"},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text("{}")
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("text")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(SMALL))
    return tmp_path


def refused(data: dict) -> str:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict({**SMALL, **data})
    return str(caught.value)


def test_defaults_and_paths_relative_to_the_recipe(folder, monkeypatch):
    monkeypatch.chdir("/")
    recipe = Recipe.load(folder / "recipe.yaml")
    recipe.check_files()
    assert recipe.model.path == str(folder / "teacher") and recipe.model.is_local
    assert [source.file for source in recipe.data.calibration] == [str(folder / "a.txt")]
    assert recipe.budget.bytes == Limit(0.25, True)
    assert recipe.search.searches == (("uniform", 0), ("dynamic_programming", 0), ("actor_critic", 0))
    assert recipe.distill.steps == 0


def test_hub_id_stays_a_hub_id(folder):
    recipe = Recipe.load(folder / "recipe.yaml", ["model.path=HuggingFaceTB/SmolLM2-135M"])
    assert recipe.model.path == "HuggingFaceTB/SmolLM2-135M" and not recipe.model.is_local
    recipe.check_files()


def test_round_trip(folder):
    overrides = ["budget={bytes: 60MiB, prefill: 120ms, decode: 33.3%}", "data.evaluation=[{dataset: x, split: test}]"]
    recipe = Recipe.load(folder / "recipe.yaml", overrides)
    assert Recipe.from_dict(yaml.safe_load(yaml.safe_dump(recipe.to_dict()))) == recipe
    assert recipe.to_dict()["data"]["evaluation"] == [{"dataset": "x", "split": "test", "column": "text"}]
    generated = Recipe.load(folder / "recipe.yaml", ["data.calibration=[{generated: 1024}]"]).to_dict()
    assert generated["data"]["calibration"] == [{"generated": 1024}]
    assert (
        Recipe.from_dict(generated).data.generated_windows == 1024 // Recipe.from_dict(generated).data.sequence_length
    )


@pytest.mark.parametrize(
    ("text", "limit"),
    [
        ("60MB", Limit(60e6, False)),
        ("60 MiB", Limit(60 * 2**20, False)),
        (60000000, Limit(60e6, False)),
        ("25%", Limit(0.25, True)),
        ("0.25x", Limit(0.25, True)),
        (".5x", Limit(0.5, True)),
    ],
)
def test_sizes(text, limit):
    assert parse_limit(text, SIZE_UNITS, SIZE_WANTED) == limit


@pytest.mark.parametrize(("text", "value"), [("120ms", 120), ("1.5 s", 1500), ("900us", 0.9)])
def test_times(text, value):
    assert parse_limit(text, TIME_UNITS, TIME_WANTED) == Limit(pytest.approx(value), False)


@pytest.mark.parametrize("text", ["", "MB", "-3MB", "0%", "0", "60ms", 0.25, True, None, "1e999MB", "3 4MB"])
def test_sizes_refused(text):
    with pytest.raises(ValueError, match="expected a size"):
        parse_limit(text, SIZE_UNITS, SIZE_WANTED)


def test_a_time_needs_its_unit():
    with pytest.raises(ValueError, match="write the unit, 120ms"):
        parse_limit(120, TIME_UNITS, TIME_WANTED)


def test_limits_resolve():
    assert Limit(0.25, True).resolve(400) == 100
    assert Limit(60, False).resolve(400) == 60


def test_every_problem_in_one_message():
    message = refused(
        {
            "serach": {},
            "budget": {"bytes": 0.25, "prefil": "3ms"},
            "search": {"formats": ["w4", "w7"], "evaluations": 0, "policy": "annealing", "attention_keep": [1.5]},
            "data": {"calibration": [{"dataset": "x", "spilt": "train"}], "evaluation": []},
            "target": {"threads": "two"},
        }
    )
    assert "\n  serach = {}: unknown key; did you mean search?" in message
    assert "\n  budget.prefil = '3ms': unknown key; did you mean prefill?" in message
    assert "for a fraction write 0.25x" in message
    assert "\n  search.formats[1] = 'w7': " in message and "expected 2, 3, 4, 5, 6 or 8 bits, got 7" in message
    assert "\n  search.evaluations = 0: expected greater than or equal to 1" in message
    assert "\n  search.policy = 'annealing': expected 'uniform'" in message
    assert "\n  search.attention_keep[0] = 1.5: expected less than or equal to 1" in message
    assert "\n  data.calibration[0].spilt = 'train': unknown key; did you mean split?" in message
    assert "\n  target.threads = 'two': expected a valid integer" in message
    problems = message.splitlines()
    assert problems[0] == f"recipe: {len(problems) - 1} problems"
    assert len(problems) - 1 == 10, message  # those nine and the empty data.evaluation, nothing twice


def test_a_missing_key_says_what_it_means():
    assert "model.path: expected it, found nothing; add it: Hugging Face hub id" in refused({"model": {}})


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"budget": {}}, "budget = {}: expected at least one limit among bytes, prefill, decode"),
        ({"search": {"tokens": 20000}}, "search.tokens = 20000: expected at most data.calibration_tokens = 16384"),
        ({"search": {"tokens": 100}}, "search.tokens = 100: expected at least data.sequence_length = 512"),
        (
            {"search": {"tokens": 12}, "data": {"calibration": ["a"], "evaluation": ["b"], "sequence_length": 8}},
            "search.tokens = 12: expected at least 16, two for each of 8 parts",
        ),
        (
            {"search": {"embedding_formats": ["int8"]}},
            "search.embedding_formats = ['int8']: int8 quantizes activations",
        ),
        (
            {"search": {"embedding_formats": ["w4", "w4a8b64"]}},
            "search.embedding_formats = ['w4', 'w4a8b64']: w4a8b64 quantizes activations",
        ),
        (
            {"search": {"embedding_formats": ["w4+w8"]}},
            "search.embedding_formats = ['w4+w8']: an embedding is one matrix",
        ),
        (
            {"search": {"formats": ["w4a8+w8", "int8+w8"]}},
            "search.formats = ['w4a8+w8', 'int8+w8']: only one format of w4a8+w8 quantizes",
        ),
        (
            {"search": {"formats": ["w4a8+int8row"]}},
            "search.formats[0] = 'w4a8+int8row': format 'w4a8+int8row': none and int8row stand alone",
        ),
        (
            {"search": {"formats": ["w4+w7"]}},
            "search.formats[0] = 'w4+w7': format 'w7': expected 2, 3, 4, 5, 6 or 8 bits",
        ),
        ({"search": {"formats": ["none"]}}, "search.formats[0] = 'none': a sub-layer is dropped by the fraction 0"),
        (
            {"data": {"calibration": ["a"], "evaluation": ["b", "a"]}},
            "data.evaluation[1] = a: expected text that isn't",
        ),
        (
            {"data": {"calibration": ["a"], "evaluation": ["b/x.txt", "c/x.txt"]}},
            "data.evaluation[1] = c/x.txt: expected a file name that no other text has",
        ),
        (
            {"data": {"calibration": ["a"], "evaluation": ["b", "c"], "evaluation_tokens": 600}},
            "data.evaluation_tokens = 600: expected at least a window of 512 for each of 2 texts",
        ),
        ({"data": {"calibration": [{"dataset": "x"}], "evaluation": ["b"]}}, "expected a split beside the data set"),
        (
            {"data": {"calibration": [{"file": "a", "generated": 512}], "evaluation": ["b"]}},
            "{generated: TOKENS}, one of the three",
        ),
        (
            {"data": {"calibration": ["a", {"generated": 500}], "evaluation": ["b"]}},
            "data.calibration: generated = 500: expected at least a window of data.sequence_length = 512",
        ),
        (
            {"data": {"calibration": [{"generated": 1024}, {"generated": 512}], "evaluation": ["b"]}},
            "data.calibration: generated = [1024, 512]: expected it once; give the sum of them",
        ),
        (
            {"data": {"calibration": ["a"], "evaluation": ["b", {"generated": 512}]}},
            "data.evaluation[1]: generated = 512: expected text that the teacher did not generate",
        ),
        ({"distill": {"steps": 1, "kl_weight": 0}}, "expected kl_weight, hidden_weight or attention_weight above 0"),
        (
            {"distill": {"top_k": 8, "hidden_weight": 0.1}},
            "distill.hidden_weight = 0.1: expected 0 beside distill.top_k = 8",
        ),
        (
            {"distill": {"top_k": 8, "attention_weight": 2}},
            "distill.attention_weight = 2.0: expected 0 beside distill.top_k = 8",
        ),
        (
            {"distill": {"top_k": 8, "method": "rl", "steps": 1}},
            "distill.top_k = 8: expected distill.method = kd, rl asks",
        ),
        ({"distill": {"learning_rate": float("nan")}}, "distill.learning_rate = nan: expected a finite number"),
        ({"export": {"folder": "../x"}}, "export.folder = '../x'"),
    ],
)
def test_contradictions(data, said):
    assert said in refused(data)


def test_missing_files_are_all_named(folder):
    (folder / "a.txt").unlink()
    (folder / "teacher" / "config.json").unlink()
    recipe = Recipe.load(folder / "recipe.yaml", ["data.evaluation=[c.txt]"])
    with pytest.raises(RecipeError) as caught:
        recipe.check_files()
    message = str(caught.value)
    assert message.startswith("recipe: 3 problems")
    assert f"data.calibration[0] = {folder / 'a.txt'}: expected a text file" in message
    assert f"data.evaluation[0] = {folder / 'c.txt'}" in message and "no config.json" in message


def test_missing_gguf_names_those_there(folder):
    (folder / "teacher" / "q8.gguf").touch()
    recipe = Recipe.load(folder / "recipe.yaml", ["model.gguf=q4.gguf"])
    with pytest.raises(RecipeError, match=r"model\.gguf = q4\.gguf: .* it holds q8\.gguf"):
        recipe.check_files()


def test_what_is_only_where_one_is_is_found_there(folder, tmp_path, monkeypatch):
    """As a folder that is named on the command line; what is in neither place is looked for beside the recipe."""
    (tmp_path / "elsewhere" / "runs" / "old").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    for given, found in (
        ("runs/old", tmp_path / "elsewhere" / "runs" / "old"),
        ("runs/none", folder / "runs" / "none"),
    ):
        assert Recipe.load(folder / "recipe.yaml", [f"search.reuse={given}"]).search.reuse == str(found)
    (folder / "runs" / "old").mkdir(parents=True)
    assert Recipe.load(folder / "recipe.yaml", ["search.reuse=runs/old"]).search.reuse == str(folder / "runs" / "old")


def test_unreadable_recipes(tmp_path):
    path = tmp_path / "r.yaml"
    with pytest.raises(RecipeError, match="check the path"):
        Recipe.load(path)
    path.write_text("search:\n  seed: 1\n  seed: 2\n")
    with pytest.raises(RecipeError, match="key 'seed' is written twice"):
        Recipe.load(path)
    path.write_text("- a\n")
    with pytest.raises(RecipeError, match="expected a mapping with the keys model, data"):
        Recipe.load(path)
    path.write_text("a: [")
    with pytest.raises(RecipeError, match="expected YAML"):
        Recipe.load(path)


def test_overrides(folder):
    overrides = ["search.evaluations=8", "search.rivals=[]", "gate.perplexity_ratio=1.5", "distill.learning_rate=1e-5"]
    recipe = Recipe.load(folder / "recipe.yaml", overrides)
    assert (recipe.search.evaluations, recipe.search.rivals) == (8, ())
    assert (recipe.gate.perplexity_ratio, recipe.distill.learning_rate) == (1.5, 1e-5)
    for bad in ("search.evaluations", "=3", "search..a=3", "model.path.x=3", "search.seed=[", "search.sede=3"):
        with pytest.raises(RecipeError):
            Recipe.load(folder / "recipe.yaml", [bad])


BAD_VALUES = ["", "x" * 200, -1, 0, 1e400, float("nan"), True, [], ["x"], [[]], {}, {"x": 1}, "../..", "12 parsecs"]


def _leaves(section: type[Section], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, field in section.model_fields.items():
        inner = section_in(field.annotation)
        yield (*path, name)
        if inner and inner.__name__ != "TextSource":
            yield from _leaves(inner, (*path, name))


def test_every_key_with_every_bad_value_is_either_fine_or_one_clear_line(tmp_path):
    """Hundreds of bad recipes: each problem names its key and what was expected, or that the key is unknown."""
    refused = 0
    for path in [*_leaves(Recipe), ("serach",), ("search", "polcy"), ("gate", "tolerance", "speed")]:
        for value in BAD_VALUES:
            data: dict = json.loads(json.dumps(SMALL))
            at = data
            for key in path[:-1]:
                at = at.setdefault(key, {})
            at[path[-1]] = value
            try:
                Recipe.from_dict(data)
            except RecipeError as error:
                refused += 1
                first, *problems = str(error).splitlines()
                assert first.startswith("recipe: ") and problems
                for problem in problems:
                    assert problem.startswith("  ") and ("expected" in problem or "unknown key" in problem), problem
                assert any(path[-1] in problem or path[0] in problem for problem in problems), (path, value, problems)
    assert refused > 400


def test_a_rival_that_is_the_policy_runs_once():
    assert Search(policy="dynamic_programming", seed=7, seeds=2).searches == (
        ("uniform", 7),
        ("dynamic_programming", 7),
        ("dynamic_programming", 8),
    )


def test_recipe_cannot_be_changed():
    recipe = Recipe.from_dict(SMALL)
    with pytest.raises(ValueError, match="frozen"):
        recipe.search.seed = 3


def test_schema_describes_every_key():
    schema = recipe_schema()
    assert set(schema["required"]) == {"model", "data", "budget"}
    sections = {"Recipe": schema, **schema["$defs"]}
    text, mapping = sections["TextSource"]["anyOf"]
    assert text == {"type": "string"}
    sections["TextSource"] = mapping
    for name, section in sections.items():
        assert section["additionalProperties"] is False
        for key, value in section["properties"].items():
            # pydantic leaves it out where it equals the section's own
            assert value.get("description") or sections[value["$ref"].rsplit("/")[-1]]["description"], f"{name}.{key}"


# From fractions to actions

ATTENTION = Site("layers.0.attention", "attention", 0, 3, (Matrix("o", 64, 96, "columns"),))
FFN = Site("layers.0.ffn", "ffn", 0, 1536, (Matrix("down", 64, 1536, "columns"),))
EMBEDDING = Site("embedding", "embedding", None, 1, (Matrix("embedding", 100, 64, "neither"),))


def test_units_kept():
    assert kept_units(Search(), ATTENTION) == {3, 2, 1, 0}
    assert kept_units(Search(attention_keep=[1, 0.67, 0.01]), ATTENTION) == {3, 2, 1}
    assert kept_units(Search(), FFN) == {1536, 1344, 1152, 960, 768, 384, 0}
    assert kept_units(Search(ffn_keep=[1, 0.01, 0.99], ffn_multiple=1000), FFN) == {1536, 1000}
    assert kept_units(Search(ffn_keep=[0.5], ffn_multiple=5000), FFN) == {1536}


def test_menu():
    search = Search(formats=["w4", "fp32"], ffn_keep=[0.5, 1, 0.499, 0], attention_keep=[1.0])
    actions = menu(search, (EMBEDDING, ATTENTION, FFN))
    assert list(actions) == ["embedding", "layers.0.attention", "layers.0.ffn"]
    assert actions["embedding"] == tuple(Action(1, name) for name in ("fp32", "w8", "w4"))
    assert actions["layers.0.attention"] == (Action(3, "fp32"), Action(3, "w4"))
    halves = (Action(768, "fp32"), Action(1536, "w4"), Action(768, "w4"))
    assert actions["layers.0.ffn"] == (Action(1536, "fp32"), *halves, DROP)


def test_attentions_have_no_format_that_splits_their_input():
    actions = menu(Search(formats=["w4a8+w8", "w4a8"], ffn_keep=[1], attention_keep=[1]), (ATTENTION, FFN))
    assert [action.format for action in actions["layers.0.attention"]] == ["w4a8"]
    assert [action.format for action in actions["layers.0.ffn"]] == ["w4a8+w8", "w4a8"]


def test_menu_goes_from_large_to_small_and_has_no_doubles():
    for site in (EMBEDDING, ATTENTION, FFN):
        names = ["w2", "w4b32", "w4", "int8", "w4b32+w8", "w4+w8", "w2+w2b32", "w2+w8", "w4a8", "w4a8+int8"]
        (actions,) = menu(Search(formats=names), [site]).values()
        sizes = [site.size_bytes(action) for action in actions]
        assert sizes == sorted(sizes, reverse=True) and len(set(actions)) == len(actions)
