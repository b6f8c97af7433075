"""Windows of tokens: exact, spread over the text, in turns."""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers

from compressor import text
from compressor.errors import DataError
from compressor.model import Teacher
from compressor.recipe import TextSource
from compressor.results import _tokens_a_byte
from compressor.text import load_tokens, tokens_digest


def words(chunk, add_special_tokens, verbose):
    """A tokenizer: every word is a number."""
    assert not add_special_tokens
    return {"input_ids": [int(word) for word in chunk.split()]}


def source(tmp_path, first, count, name="a.txt"):
    (tmp_path / name).write_text("\n".join(str(i) for i in range(first, first + count)))
    return TextSource(file=str(tmp_path / name))


@pytest.mark.parametrize("chunk", [1, 7, 1 << 16])
def test_windows_are_cut_without_overlap(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(text, "CHUNK", chunk)
    tokens = load_tokens([source(tmp_path, 0, 39)], words, 33, 10)
    assert tokens.dtype == torch.int64
    assert torch.equal(tokens, torch.tensor([0, 20, 10])[:, None] + torch.arange(10))


@pytest.mark.parametrize("windows", [1, 2, 5, 16, 23])
def test_windows_are_spread_and_so_is_every_first_part(tmp_path, windows):
    starts = load_tokens([source(tmp_path, 0, 3000)], words, 10 * windows, 10)[:, 0]
    reach = min(16 * windows * 10, 3000)
    assert starts.unique().numel() == windows
    for count in range(2, windows + 1):
        gaps = torch.cat([starts[:count].sort().values, torch.tensor([reach])]).diff()
        assert gaps.max() <= 2.5 * reach / count + 10


def test_sources_take_turns_and_drop_out(tmp_path):
    sources = [source(tmp_path, 0, 45, "a"), source(tmp_path, 100, 19, "b"), source(tmp_path, 200, 9, "c")]
    assert load_tokens(sources, words, 50, 10)[:, 0].tolist() == [0, 100, 20, 10, 30]
    sources = [source(tmp_path, 1000 * i, 900, str(i)) for i in range(3)]
    assert (load_tokens(sources, words, 80, 10)[:, 0] // 1000).tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


def test_generated_windows_are_a_source_like_others(tmp_path):
    sources = [source(tmp_path, 0, 45), TextSource(generated=30)]
    generated = [list(range(1000 * i, 1000 * i + 10)) for i in (1, 2, 3)]
    windows = load_tokens(sources, words, 70, 10, generated=generated)
    assert windows[:, 0].tolist() == [0, 1000, 20, 3000, 10, 2000, 30]
    others = load_tokens(sources, words, 70, 10, windows[:3], generated=generated)
    assert sorted(others[:, 0].tolist()) == [10, 30, 2000, 3000]
    with pytest.raises(DataError, match="a.txt, generated = 30: expected 8 windows of 10 tokens, found 7"):
        load_tokens(sources, words, 80, 10, generated=generated)


def test_json_lines_are_texts_with_a_blank_line_between(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"text": "1 2 3", "id": 0}, {"text": "4 5 6"}]
    path.write_text("\n\n".join(map(json.dumps, rows)))
    assert load_tokens([TextSource(file=str(path))], words, 6, 6).tolist() == [[1, 2, 3, 4, 5, 6]]
    path.write_text(json.dumps({"body": "7 8"}))
    named = TextSource(file=str(path), column="body")
    assert load_tokens([named], words, 2, 2).tolist() == [[7, 8]]
    assert TextSource.model_validate(named.model_dump()) == named


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{", "line 2: expected JSON"),
        ("[1]", r"line 2: expected an object with a text, got \[1\]"),
        ('{"body": "a"}', "line 2: expected 'text', found body; name one of these as column"),
        ('{"text": null}', "line 2, text: expected a text, or messages for the chat template, got None"),
        ('{"text": [1]}', "line 2, text: expected messages that the tokenizer's chat template takes"),
    ],
)
def test_lines_that_hold_no_text(tmp_path, line, match):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "1"}\n' + line)
    with pytest.raises(DataError, match=match):
        load_tokens([TextSource(file=str(path))], words, 10, 10)


def test_too_short_says_how_many(tmp_path):
    with pytest.raises(DataError, match="expected 4 windows of 10 tokens, found 3; .*or lower the number of tokens"):
        load_tokens([source(tmp_path, 0, 39)], words, 40, 10)
    with pytest.raises(DataError, match="at least one window of 10"):
        load_tokens([source(tmp_path, 0, 39)], words, 9, 10)


def test_spared_windows_are_not_taken_again(tmp_path):
    sources = [source(tmp_path, 0, 90)]
    first = load_tokens(sources, words, 40, 10)
    others = load_tokens(sources, words, 30, 10, first)
    assert len(others) == 3 and not set(first[:, 0].tolist()) & set(others[:, 0].tolist())
    every = load_tokens(sources, words, 90, 10)
    assert load_tokens(sources, words, 40, 10, every[2:]).shape == (2, 10)
    assert load_tokens(sources, words, 40, 10, every).shape == (0, 10)


def test_no_more_is_read_than_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "CHUNK", 10)
    monkeypatch.setattr(text, "REACH", 3)
    path = tmp_path / "a.txt"
    path.write_text("1 2 3 4 5\n" * 6 + "not a number\n")
    assert load_tokens([TextSource(file=str(path))], words, 10, 5).shape == (2, 5)
    with pytest.raises(ValueError, match="not"):
        load_tokens([TextSource(file=str(path))], words, 15, 5)


def test_other_scripts(tiny, tiny_folder, tmp_path):
    """Texts of letters of two and three bytes, which windows of single bytes cut in two, and what they take a byte."""
    lines = ["今天天气很好，我们去公园散步。", "في البدء كانت الكلمة", "Съешь же ещё этих мягких булок"]
    path = tmp_path / "scripts.jsonl"
    path.write_text("".join(json.dumps({"said": line * 9}, ensure_ascii=False) + "\n" for line in lines), "utf-8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    windows_NL = load_tokens([TextSource(file=str(path), column="said")], tokenizer, 8 * 64, 64)
    found = "".join(tokenizer.batch_decode(windows_NL))
    assert "天气很好" in found and "كانت" in found and "булок" in found and "\ufffd" in found
    run = SimpleNamespace(teacher=Teacher(tiny, tokenizer, str(tiny_folder)))
    assert _tokens_a_byte(run, windows_NL) == pytest.approx(1.0, rel=0.02)


def test_unreadable_files(tmp_path):
    with pytest.raises(DataError, match="No such file"):
        load_tokens([TextSource(file=str(tmp_path / "none"))], words, 10, 10)
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match="expected UTF-8, found byte 0xe9"):
        load_tokens([TextSource(file=str(tmp_path / "latin"))], words, 10, 10)


def test_datasets(tmp_path):
    pytest.importorskip("datasets")
    rows = "".join(json.dumps({"words": f"{i} {i + 1}"}) + "\n" for i in range(0, 20, 2))
    (tmp_path / "train.jsonl").write_text(rows)
    found = TextSource(dataset=str(tmp_path), split="train", column="words")
    assert load_tokens([found], words, 20, 5).flatten().sort().values.tolist() == list(range(20))
    with pytest.raises(DataError, match="expected 'text', found words; name one of these as column"):
        load_tokens([TextSource(dataset=str(tmp_path), split="train")], words, 20, 5)
    with pytest.raises(DataError, match="check its name, config and split"):
        load_tokens([TextSource(dataset=str(tmp_path), split="dev")], words, 20, 5)


def test_conversations_go_through_the_chat_template(tmp_path):
    class Chatting:
        def __call__(self, text, **_):
            return words(text, False, False)

        def apply_chat_template(self, messages, tokenize):
            return " ".join(message["content"] for message in messages)

    path = tmp_path / "chats.jsonl"
    path.write_text(
        json.dumps({"messages": [{"role": "user", "content": "1 2"}, {"role": "assistant", "content": "3"}]})
    )
    found = load_tokens([TextSource(file=str(path), column="messages")], Chatting(), 3, 3)
    assert found.tolist() == [[1, 2, 3]]


def test_digest_names_shape_and_ids():
    tokens = torch.arange(12).view(3, 4)
    assert tokens_digest(tokens) == tokens_digest(tokens.clone().to(torch.int32)) == tokens_digest(tokens.t().t())
    changed = tokens.clone()
    changed[2, 3] += 1
    assert len({tokens_digest(t) for t in (tokens, changed, tokens.view(4, 3), tokens[:2])}) == 4
    assert len(tokens_digest(tokens)) == 16
