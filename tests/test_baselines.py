"""The methods under comparison: each rule of eviction against a dense statement of it, and what all methods share."""

import numpy as np
import pytest

from eval.baselines.eviction import EvictedState
from eval.methods import method
from tests.dense_rules import RULES, dense

LENGTH, NEW, BLOCK = 50, 7, 16
TOKENS = np.random.default_rng(5).integers(3, 61, LENGTH + NEW).astype(np.int32)


def held(state: EvictedState) -> list[list[list[int]]]:
    """Positions held, by layer and head."""
    return [[sorted(int(p) for p in head if p >= 0) for head in np.asarray(layer.position)] for layer in state.layers]


@pytest.mark.parametrize("budget", [0.3, 0.5])
@pytest.mark.parametrize("name", RULES)
def test_a_rule_holds_the_tokens_and_gives_the_logits_of_its_dense_statement(tiny, name, budget):
    rule = method(name, block=BLOCK)
    starts = range(0, LENGTH, BLOCK)
    blocks = [(first, min(first + BLOCK, LENGTH)) for first in starts] + [
        (p, p + 1) for p in range(LENGTH, LENGTH + NEW)
    ]
    limits = [int(budget * max(LENGTH, last)) for _, last in blocks]
    expected, layers = dense(tiny, TOKENS, blocks, limits, RULES[name])

    logits, state = rule.begin(tiny, TOKENS[:LENGTH], room=NEW, budget=budget)
    assert held(state) == [layer.held[len(starts) - 1] for layer in layers]
    np.testing.assert_allclose(logits, expected[LENGTH - 1], rtol=0, atol=1e-4)
    for position in range(LENGTH, LENGTH + NEW):
        logits, state = rule.step(tiny, int(TOKENS[position]), state)
        assert held(state) == [layer.held[len(starts) + position - LENGTH] for layer in layers]
        np.testing.assert_allclose(logits, expected[position], rtol=0, atol=1e-4)
