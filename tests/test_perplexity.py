"""Perplexity and KL against a plain loop over predictions, under the protocol of `eval.perplexity`."""

import math

import numpy as np
import pytest

from eval.perplexity import compare

VOCABULARY = 7


def model(seed: int):
    """Logits that depend on the position and on all tokens up to it."""
    table = np.random.default_rng(seed).normal(size=(VOCABULARY, VOCABULARY)).astype(np.float32)
    return lambda ids: 2 * np.cumsum(table[ids], 0) / np.arange(1, len(ids) + 1, dtype=np.float32)[:, None]


def softmax(logits):
    weights = [math.exp(z) for z in logits.tolist()]
    return [w / sum(weights) for w in weights]


def test_compare_is_the_plain_loop():
    windows = np.random.default_rng(0).integers(VOCABULARY, size=(3, 9))
    teacher, student = model(1), model(2)
    losses, divergences = {"teacher": [], "student": []}, []
    for ids in windows:
        for i in range(len(ids) - 1):
            p, q = softmax(teacher(ids)[i]), softmax(student(ids)[i])
            losses["teacher"].append(-math.log(p[ids[i + 1]]))
            losses["student"].append(-math.log(q[ids[i + 1]]))
            divergences.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)))
    found = compare(teacher, {"student": student}, windows)
    for name, values in losses.items():
        assert found[name].perplexity == pytest.approx(math.exp(sum(values) / len(values)), rel=1e-5)
    assert found["student"].kl == pytest.approx(sum(divergences) / len(divergences), rel=1e-5)
    assert found["teacher"].kl == 0


def test_the_first_token_of_a_window_is_not_predicted():
    windows = np.random.default_rng(3).integers(VOCABULARY, size=(1, 2))
    (quality,) = compare(model(1), {}, windows).values()
    assert quality.perplexity == pytest.approx(1 / softmax(model(1)(windows[0])[0])[windows[0, 1]], rel=1e-5)


def test_a_destroyed_model_overflows_nothing():
    windows = np.zeros((1, 4), int)
    sure_of_another = lambda ids: np.tile(np.array([0, 1e6], np.float32), (len(ids), 1))  # noqa: E731
    found = compare(lambda ids: np.zeros((len(ids), 2), np.float32), {"student": sure_of_another}, windows)
    assert math.isfinite(found["student"].perplexity) and found["student"].kl == pytest.approx(5e5, rel=1e-3)
