"""From texts to windows of tokens. Knows tokenizers and data sets, not models."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise, zip_longest
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from compressor.errors import DataError
from compressor.recipe import TextSource


def around(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that a tokenizer puts in front of a text and behind it."""
    inner = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    at = next((i for i in range(len(whole)) if whole[i : i + len(inner)] == inner), 0)
    return tuple(whole[:at]), tuple(whole[at + len(inner) :])


@dataclass(frozen=True)
class Beginning:
    """Makes windows of a decoder whose tokenizer puts special tokens in front of a text: these, then the text."""

    before: tuple[int, ...]

    @property
    def added(self) -> int:
        """Special tokens in a window."""
        return len(self.before)

    def __call__(self, ids: list[int]) -> list[int]:
        """Text of a window -> the window."""
        return [*self.before, *ids]


@dataclass(frozen=True)
class Masking:
    """Makes windows of a masked language model: special tokens around the text, and some of it masked, always the same.

    A masked token is written as ~id, which is negative: the model reads the mask token in its place (`Network.seen`), and the
    id is what it is to predict (`predictions`).
    """

    before: tuple[int, ...]
    behind: tuple[int, ...]
    share: float = 0.15

    @classmethod
    def of(cls, tokenizer: Any) -> Masking:
        """With the special tokens that the tokenizer puts around a text."""
        return cls(*around(tokenizer))

    @property
    def added(self) -> int:
        """Special tokens in a window."""
        return len(self.before) + len(self.behind)

    def __call__(self, ids: list[int]) -> list[int]:
        """Text of a window -> the window, at least one token of it masked."""
        random = Random(str(ids))
        masked = set(random.sample(range(len(ids)), max(1, round(self.share * len(ids)))))
        return [*self.before, *(~token if i in masked else token for i, token in enumerate(ids)), *self.behind]


@dataclass(frozen=True)
class Labelling:
    """Makes windows of a classifier or an embedder, one a text: special tokens around as much of it as fits, padding behind.

    In place of the first token, where the class is predicted, stands ~class, as of masked tokens (`Masking`).
    classes: number by name; None are an embedder's, whose texts have ~0 there until it says which other one is the nearest.
    """

    before: tuple[int, ...]
    behind: tuple[int, ...]
    padding: int
    classes: Mapping[str, int] | None

    @classmethod
    def of(cls, tokenizer: Any, classes: Mapping[str, int] | None) -> Labelling:
        """With the special tokens that the tokenizer puts around a text."""
        return cls(*around(tokenizer), tokenizer.pad_token_id, classes)

    def __call__(self, ids: list[int], label: int, length: int) -> list[int]:
        """A text of a class -> its window."""
        most = length - len(self.before) - len(self.behind)
        window = [~label, *self.before[1:], *ids[:most], *self.behind]
        return padded(window, self.padding, length)

    def number(self, label: Any, where: str) -> int:
        """Of a class as a text's source gives it, by number or name.

        Raises:
            DataError: there is no such class.
        """
        assert self.classes is not None
        known = isinstance(label, int) and not isinstance(label, bool) and label in self.classes.values()
        if not known and not (isinstance(label, str) and label in self.classes):
            raise DataError(
                f"{where}: expected the class of the text, its number or one of {', '.join(self.classes)}; got "
                f"{str(label)[:60]!r}"
            )
        return label if known else self.classes[label]


@dataclass(frozen=True)
class Spans:
    """Makes windows of an encoder-decoder out of plain text: spans of it are masked, always the same ones, and it is to be
    restored. A window is what the encoder reads, then what is to be said, written as ~id (see `Masking`), then padding.

    T5 reads a sentinel in the place of a span and says every sentinel and what it stands for (Raffel et al. 2020, section
    3.1.4); BART reads a mask token and says the whole text (Lewis et al. 2020, section 2.2).

    length: of a window. before, behind: special tokens around a text. marks: tokens that stand for spans, in their order, the
    last one for all that follow. whole: whether all of the text is said. share: of the tokens that are masked. width: mean
    length of a span.
    """

    length: int
    before: tuple[int, ...]
    behind: tuple[int, ...]
    marks: tuple[int, ...]
    whole: bool
    pad: int
    share: float = 0.15
    width: int = 3

    @classmethod
    def of(cls, tokenizer: Any, length: int) -> Spans:
        """With the tokenizer's sentinels, `<extra_id_0>` and so on, or with its mask token.

        Raises:
            DataError: it has neither.
        """
        before, behind = around(tokenizer)
        found = tokenizer.convert_tokens_to_ids([f"<extra_id_{i}>" for i in range(100)])
        marks = tuple(token for token in found if token not in (None, tokenizer.unk_token_id))
        whole = not marks
        if whole and tokenizer.mask_token_id is None:
            raise DataError(
                "expected sentinels <extra_id_0> or a mask token in the tokenizer, to make tasks of plain text; give pairs "
                "of texts instead: a file or data set with a column and a target"
            )
        spans = cls(length, before, behind, marks or (tokenizer.mask_token_id,), whole, tokenizer.pad_token_id)
        if spans._total(1) > length:
            raise DataError(
                f"data.sequence_length = {length}: expected at least {spans._total(1)}, for source and target"
            )
        return spans

    @property
    def added(self) -> int:
        """Tokens of a window beside those of the text that it is made of."""
        return self.length - next(n for n in range(self.length, 0, -1) if self._total(n) <= self.length)

    def __call__(self, ids: list[int]) -> list[int]:
        """Text of a window -> the window."""
        source, target = [], []
        for number, (shown, hidden) in enumerate(self._cut(ids)):
            mark = self.marks[min(number, len(self.marks) - 1)]
            source += [*shown, mark]
            target += [*shown, *hidden] if self.whole else [mark, *hidden]
        source, target = ([*self.before, *side, *self.behind] for side in (source, target))
        window = [*source, *(~token for token in target)]
        return padded(window, self.pad, self.length)

    def _cut(self, ids: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        """(tokens that are shown, those behind them that are masked), from the beginning to the end."""
        masked, spans = self._counts(len(ids))
        random, start = Random(str(ids)), 0
        for shown, hidden in zip(_parts(random, len(ids) - masked, spans), _parts(random, masked, spans), strict=True):
            middle, end = start + shown, start + shown + hidden
            yield ids[start:middle], ids[middle:end]
            start = end

    def _counts(self, tokens: int) -> tuple[int, int]:
        """(tokens that are masked, spans of them) of so many."""
        masked = max(1, round(self.share * tokens))
        return masked, max(1, min(round(masked / self.width), tokens - masked))

    def _total(self, tokens: int) -> int:
        """Length of the window that so many tokens make."""
        masked, spans = self._counts(tokens)
        said = tokens if self.whole else masked + spans
        return tokens - masked + spans + said + 2 * (len(self.before) + len(self.behind))


def _parts(random: Random, total: int, count: int) -> list[int]:
    """`total` as a sum of `count` numbers, at least 1 each as far as that goes."""
    cuts = [0, *sorted(random.sample(range(1, total), count - 1)), total] if count > 1 else [0, total]
    return [end - start for start, end in pairwise(cuts)]


def padded(ids: list[int], pad: int, length: int) -> list[int]:
    return ids + [pad] * (length - len(ids))


def plain(ids: Tensor) -> Tensor:
    """Token ids, those too that are written as ~id."""
    return torch.maximum(ids, ~ids)


Marking = Beginning | Masking | Labelling | Spans
"""What is done to texts, beyond cutting them into windows."""


def predictions(ids_L: Tensor) -> tuple[Tensor, Tensor]:
    """(positions at which something is predicted, token ids or the class that are), [P] each, of a window: where tokens are
    masked or of a target, these; else every token but the first, at the position in front of it."""
    if (masked_L := ids_L < 0).any():
        (where_P,) = masked_L.nonzero(as_tuple=True)
        return where_P, ~ids_L[where_P]
    return torch.arange(len(ids_L) - 1, device=ids_L.device), ids_L[1:]


def compared(ids_L: Tensor) -> Tensor | slice:
    """Positions of a window at which a student's distribution counts in training and search: those that are masked, or of a
    target, or else all, the last one too."""
    masked_L = ids_L < 0
    return masked_L if masked_L.any() else slice(None)


CHUNK = 1 << 16
"""Characters that are tokenized at a time, so that a long text is read only as far as it is needed."""
REACH, MOST = 16, 1 << 20
"""A source is read as far as `REACH` times what is taken of it, and not beyond `MOST` tokens unless more are taken."""


def load_tokens(
    sources: Sequence[TextSource],
    tokenizer: Any,
    tokens: int,
    sequence_length: int,
    spared_NL: Tensor | None = None,
    marking: Marking | None = None,
    target_length: int = 0,
    asked: str = "the number of tokens",
    generated: Sequence[list[int]] = (),
) -> Tensor:
    """Windows of tokens, [N, L] int64 with L = `sequence_length` and N = `tokens` // L.

    Every source is cut into consecutive windows that don't overlap, and what is taken of them is spread evenly over as
    much as is read (`REACH`): a text often begins with one long article. The windows come in an order in which any first
    part, and any part that follows, is spread over the text as well, the sources in turns; one that ends drops out. No
    special tokens are added but by `marking`. With a `Labelling` every text of a source is a window, a line of a plain one.
    So is every row of a source with a target: its text, cut to what is left of the window, and `target_length` tokens of its
    target (see `Spans`), both with special tokens.

    asked: what is to be lowered where texts are too short. generated: the windows of the source that the teacher generates.
    spared_NL: windows of the same sources that are not taken again. Where it is given, what there is will do: fewer than N
    windows may come back, even none.

    Raises:
        DataError: a source cannot be read, or all together hold fewer than N windows.
    """
    if len({source.target is None for source in sources}) > 1:
        raise DataError(f"{', '.join(map(str, sources))}: expected a target of all texts or of none; give them apart")
    wanted = tokens // sequence_length
    if wanted < 1:
        raise DataError(f"tokens = {tokens}: expected at least one window of {sequence_length}; ask for more tokens")
    spared = set() if spared_NL is None else set(map(tuple, spared_NL.tolist()))
    reach = max(min(REACH * -(-wanted // len(sources)), MOST // sequence_length), wanted + len(spared))

    def windows_of(source: TextSource) -> Iterable[list[int]]:
        return generated if source.generated else _windows(source, tokenizer, sequence_length, marking, target_length)

    read = [
        [window for window in islice(windows_of(source), reach) if tuple(window) not in spared] for source in sources
    ]
    found = sum(map(len, read))
    if spared_NL is not None:
        wanted = min(wanted, found)
    if found < wanted:
        raise DataError(
            f"{', '.join(map(str, sources))}: expected {wanted} windows of {sequence_length} tokens, found "
            f"{found}; give more text, or lower {asked}"
        )
    turns = zip_longest(*(_spread(windows, count) for windows, count in zip(read, _shares(read, wanted), strict=True)))
    windows = [window for turn in turns for window in turn if window is not None]
    return torch.tensor(windows, dtype=torch.int64).view(-1, sequence_length)


def load_prompts(file: str, tokenizer: Any, most: int) -> list[Tensor]:
    """The prompts [P] of a file, JSON lines: {"prompt": text}, or {"messages": [...]} for the tokenizer's chat template; of a
    longer prompt the last `most` tokens, special tokens in front of a text beside.

    Raises:
        DataError: the file cannot be read, or a line is neither.
    """
    prompts, begin = [], list(around(tokenizer)[0])
    for where, entry in _json_lines(TextSource(file=file)):
        if isinstance(entry, dict) and isinstance(entry.get("prompt"), str):
            text, before = entry["prompt"], begin
        elif isinstance(entry, dict) and isinstance(entry.get("messages"), list):
            text, before = chat_text(entry["messages"], tokenizer, where, add_generation_prompt=True), []  # has them
        else:
            raise DataError(f'{where}: expected {{"prompt": text}} or {{"messages": [...]}}, got {str(entry)[:60]}')
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise DataError(f"{where}: expected at least one token; give some text")
        prompts.append(torch.tensor([*before, *ids[-most:]]))
    return prompts


def prompts_of(windows_NL: Tensor, prompt_tokens: int, new_tokens: int) -> list[Tensor]:
    """Prompts [P] out of windows, cut such that what follows them there is in no other."""
    length = prompt_tokens + new_tokens
    return list(windows_NL.unfold(1, length, length)[..., :prompt_tokens].flatten(0, 1))


def _shares(read: list[list[list[int]]], wanted: int) -> list[int]:
    """How many windows each source gives: as equal as their lengths allow, the first ones more by one."""
    turns = (i for turn in range(wanted) for i, windows in enumerate(read) if turn < len(windows))
    counts = Counter(islice(turns, wanted))
    return [counts[i] for i in range(len(read))]


def _spread(windows: list[list[int]], count: int) -> list[list[int]]:
    """`count` windows at even distances, in the order of their number's bits reversed (van der Corput's sequence)."""
    bits = max(count - 1, 1).bit_length()
    order = (int(f"{i:0{bits}b}"[::-1], 2) for i in range(1 << bits))
    return [windows[i * len(windows) // count] for i in order if i < count]


def tokens_digest(tokens_NL: Tensor) -> str:
    """Sixteen hex digits that name these windows: SHA-256 of the shape and of the ids as int64."""
    data = tokens_NL.to("cpu", torch.int64).contiguous()
    return hashlib.sha256(str(tuple(data.shape)).encode() + data.numpy().astype("<i8").tobytes()).hexdigest()[:16]


def _windows(
    source: TextSource, tokenizer: Any, sequence_length: int, marking: Marking | None, target_length: int
) -> Iterator[list[int]]:
    classes = marking.classes if isinstance(marking, Labelling) else None
    if source.label is not None and classes is None:
        raise DataError(f"{source}: expected a classifier of texts, this model is none; leave label out")
    if isinstance(marking, Labelling):
        for text, label in _whole_texts(source, tokenizer, marking):
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            yield marking(ids, label, sequence_length)
        return
    if source.target:
        yield from _pairs(source, tokenizer, sequence_length - target_length, target_length)
        return
    ids = []
    length = sequence_length - (marking.added if marking else 0)
    for chunk in _chunks(_pieces(source, tokenizer)):
        ids += tokenizer(chunk, add_special_tokens=False, verbose=False)["input_ids"]
        whole = len(ids) - len(ids) % length
        windows = (ids[i : i + length] for i in range(0, whole, length))
        yield from map(marking, windows) if marking else windows
        ids = ids[whole:]


def _whole_texts(source: TextSource, tokenizer: Any, marking: Labelling) -> Iterator[tuple[str, int]]:
    """Texts of a source and their classes, 0 where there are none."""
    if marking.classes is None:
        texts = (row[source.column] for _, row in _rows(source, tokenizer)) if source.rows else _file_lines(source)
        yield from ((text, 0) for text in map(str.strip, texts) if text)
        return
    if source.label is None:
        raise DataError(f"{source}: expected the classes of its texts; name the column that holds them as label")
    for where, row in _rows(source, tokenizer):
        yield row[source.column], marking.number(row[source.label], where)


def _pairs(source: TextSource, tokenizer: Any, source_length: int, target_length: int) -> Iterator[list[int]]:
    """Windows of texts and their targets, as of `Spans`."""
    pad = tokenizer.pad_token_id
    for _, row in _rows(source, tokenizer):
        text, target = (row[column] for column in source.columns)
        read = tokenizer(text, truncation=True, max_length=source_length)["input_ids"]
        said = tokenizer(text_target=target, truncation=True, max_length=target_length)["input_ids"]
        yield padded(read, pad, source_length) + padded([~token for token in said], pad, target_length)


def _pieces(source: TextSource, tokenizer: Any) -> Iterator[str]:
    """A text's lines, or the texts of rows, a blank line between two."""
    if source.rows:
        yield from (f"{row[source.column]}\n\n" for _, row in _rows(source, tokenizer))
    else:
        yield from _file_lines(source)


def _chunks(pieces: Iterator[str]) -> Iterator[str]:
    """Joins pieces to chunks of some `CHUNK` characters. A chunk ends where a piece does, so no word is cut."""
    held: list[str] = []
    size = 0
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        if size >= CHUNK:
            yield "".join(held)
            held, size = [], 0
    if held:
        yield "".join(held)


def _file_lines(source: TextSource) -> Iterator[str]:
    assert source.file is not None
    try:
        with Path(source.file).open(encoding="utf-8") as lines:
            yield from lines
    except OSError as error:
        raise DataError(f"{source}: expected a text file, {error.strerror}; check the path") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{source}: expected UTF-8, found byte {error.object[error.start]:#x}; convert it") from None


def _json_lines(source: TextSource) -> Iterator[tuple[str, Any]]:
    """(where it stands, value) of every line that is not empty."""
    for number, line in enumerate(_file_lines(source), 1):
        if line.strip():
            try:
                yield f"{source}, line {number}", json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{source}, line {number}: expected JSON, {error.msg}; write one object a line"
                ) from None


def _rows(source: TextSource, tokenizer: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(where it stands, row with its text and, where asked for, its target or label), of JSON lines or of a data set; a
    conversation is the text that the tokenizer's chat template makes of it."""
    for where, row in _json_lines(source) if source.file else _dataset_rows(source):
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected an object with a text, got {str(row)[:60]}")
        for asked, column in (("column", source.column), ("target", source.target), ("label", source.label)):
            if column is not None and column not in row:
                raise DataError(f"{where}: expected {column!r}, found {', '.join(row)}; name one of these as {asked}")
        yield where, row | {column: _text(row[column], tokenizer, f"{where}, {column}") for column in source.columns}


def _text(value: Any, tokenizer: Any, where: str) -> str:
    if isinstance(value, list):
        return chat_text(value, tokenizer, where)
    if not isinstance(value, str):
        raise DataError(f"{where}: expected a text, or messages for the chat template, got {str(value)[:60]}")
    return value


def chat_text(messages: list, tokenizer: Any, where: str, **options: bool) -> str:
    """What a tokenizer's chat template makes of a conversation.

    Raises:
        DataError: it does not take these messages.
    """
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # templates are programs of their own: anything may come out
        raise DataError(
            f"{where}: expected messages that the tokenizer's chat template takes; {error}; give a text instead"
        ) from None


def _dataset_rows(source: TextSource) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import datasets  # type: ignore[import-untyped]

    try:
        for row in datasets.load_dataset(source.dataset, source.config, split=source.split, streaming=True):
            yield str(source), row
    except Exception as error:  # the hub, the network and the builders each have their own tree of errors
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{source}: expected a data set that loads; {reason}; check its name, config and split"
        ) from error
