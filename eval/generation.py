"""What generated text looks like, from its tokens alone.

Sources: distinct-n, Li et al. 2016, "A Diversity-Promoting Objective Function"; repetition (seq-rep-n), Welleck et al. 2020,
"Neural Text Generation with Unlikelihood Training".
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence


def distinct(tokens: Sequence[int], n: int = 2) -> float:
    """Different n-grams over all n-grams, in (0, 1]; 1 for a text shorter than n."""
    grams = _grams(tokens, n)
    return len(set(grams)) / len(grams) if grams else 1.0


def repetition(tokens: Sequence[int], n: int = 4) -> float:
    """Share of the n-grams that were there before, in [0, 1): one less distinct-n, at the n that tells loops."""
    return 1 - distinct(tokens, n)


def entropy(tokens: Sequence[int]) -> float:
    """Entropy of a text's own token frequencies over that of as many different tokens, in [0, 1]; 1 below two tokens."""
    if len(tokens) < 2:
        return 1.0
    shares = [count / len(tokens) for count in Counter(tokens).values()]
    return -sum(share * math.log(share) for share in shares) / math.log(len(tokens))


def _grams(tokens: Sequence[int], n: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
