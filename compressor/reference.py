"""docs/recipe.md: every key of a recipe, from the schema itself (`compress schema --markdown`); and a first recipe."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from compressor.recipe import Recipe, Section, TextSource, section_in

TEXTS = """
```yaml
data:
  calibration: [notes.txt, {file: chats.jsonl, column: messages}]
  evaluation: [{dataset: HuggingFaceH4/ultrachat_200k, split: test_sft, column: messages}]
```
""".strip()

LIMITS = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}


FIRST = """\
# Every key: docs/recipe.md, or `compress schema`. First `compress THIS_FILE --dry-run`, which says what it takes.
model:
  path: {model}
data:
  calibration: {calibration}   # {{generated: 16384}} among them is text of all kinds that the model writes itself
  evaluation: {evaluation}   # seen by nothing before the end
target:
  device: auto
  workload: {{prefill: 128, context: 128}}   # tokens of the prompt that is timed, and in the cache
budget:                  # one or more of
  bytes: 25%             # of the fp32 export's, or 60MB
  # prefill: 60%         # or 120ms
  # decode: 50%          # or 12ms a token
# search:
#   evaluations: 16      # more is better; each is a pass over search.tokens tokens
# distill:
#   steps: 50            # training behind the reconstruction
# gate:
#   perplexity_ratio: 1.1   # exit code 3 if missed
"""

WIKITEXT = "{{dataset: Salesforce/wikitext, config: wikitext-2-raw-v1, split: {split}}}"


def first_recipe(model: str, calibration: Sequence[str] = (), evaluation: Sequence[str] = ()) -> str:
    """A recipe for a model, in YAML. calibration, evaluation: text files; of WikiText on the hub where there are none."""
    texts = {
        name: json.dumps(list(files)) if files else f"[{WIKITEXT.format(split=split)}]"
        for name, files, split in (("calibration", calibration, "train"), ("evaluation", evaluation, "test"))
    }
    return FIRST.format(model=json.dumps(model), **texts)


def recipe_reference() -> str:
    """The reference as Markdown, a table for each section."""
    parts = [
        "# The recipe",
        "Made by `compress schema --markdown`. Unknown keys are refused; paths are relative to the recipe's folder, or to "
        "the current one if something is only there. Sizes "
        "are written as `60MB`, `60MiB` or `25%`, times as `12ms`, `1.5s` or `50%`; a share is one of the teacher's, "
        "exported in fp32.",
        *_section(Recipe, ""),
        *_section(TextSource, ""),
        TEXTS,
    ]
    return "\n\n".join(parts) + "\n"


def _section(section: type[Section], path: str) -> list[str]:
    """Its table, then those of the sections inside it."""
    schema = section.model_json_schema()
    properties = schema.get("anyOf", [schema])[-1]["properties"]  # a text may be a string, too
    rows, inner = [], []
    for name, field in section.model_fields.items():
        found, described = section_in(field.annotation), " ".join((field.description or "").split())
        if found and found is not TextSource:
            inner += _section(found, f"{path}{name}.")
            continue
        default = "**needed**" if field.is_required() else _code(field.get_default())
        rows.append(f"| `{path}{name}` | {_kind(properties[name], schema)} | {default} | {_cell(described)} |")
    title = path.rstrip(".") or ("a text" if section is TextSource else "")
    head = f"## {title}\n\n{' '.join((section.__doc__ or '').split())}" if title else ""
    table = "\n".join(["| key | values | default | meaning |", "| --- | --- | --- | --- |", *rows]) if rows else ""
    return [part for part in (head, table) if part] + inner


def _kind(schema: dict[str, Any], whole: dict[str, Any]) -> str:
    """What values a key takes, in words."""
    if "$ref" in schema:
        schema = whole["$defs"][schema["$ref"].rsplit("/", 1)[1]]
    if "anyOf" in schema:
        kinds = [_kind(option, whole) for option in schema["anyOf"] if option.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if schema.get("type") == "array":
        return f"list of {_kind(schema['items'], whole)}"
    if schema.get("type") == "object":
        return "mapping"
    bounds = [f"{word} {schema[key]:g}" for key, word in LIMITS.items() if key in schema]
    kind = {"integer": "whole number", "boolean": "true, false", "string": "text"}.get(schema["type"], schema["type"])
    return f"{kind}, {', '.join(bounds)}" if bounds else kind


def _code(default: Any) -> str:
    if default is None:
        return "–"
    return f"`{json.dumps(default)}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
