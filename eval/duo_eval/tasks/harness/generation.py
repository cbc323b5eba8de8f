"""Texts that go on from contexts, in batches that share what they begin with. Knows no task."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from duo_eval.tasks.harness.batches import Prefiller, Tokens, plan, width
from duo_jax import LM, TextStream


def continuations(
    lm: LM, prefiller: Prefiller, contexts: Sequence[Tokens], options: Mapping[str, Any], *, batch_size: int
) -> Iterator[tuple[int, str]]:
    """Continue every context; yields a context's index and its text, batch by batch.

    Args:
        lm: the tokenizer; model and pattern are the prefiller's.
        prefiller: puts contexts into caches.
        contexts: token ids, at least one each.
        options: of `duo_jax.TextStream`, with `max_new_tokens`; each batch adds its number to `seed`.
        batch_size: most rows of a batch.
    """
    extra = [options["max_new_tokens"]] * len(contexts)
    for number, batch in enumerate(plan(contexts, extra, [1] * len(contexts), batch_size)):
        cache, rests = prefiller.open(batch, contexts)
        running = TextStream(
            lm,
            [list(rest) for rest in rests],
            cache=cache,
            history=contexts[batch.rows[0]][: batch.shared],
            chunk_size=width(max(map(len, rests)), len(rests)),
            backend=prefiller.backend,
            **{**options, "seed": options.get("seed", 0) + number},
        )
        for _ in running:
            pass
        yield from zip(batch.rows, map(str, running.replies), strict=True)
