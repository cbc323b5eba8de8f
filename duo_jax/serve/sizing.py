"""How much can be served at a time in so much memory: rows, pages and snapshots. Nothing is allocated."""

from dataclasses import replace

from duo_jax.arguments import whole_number
from duo_jax.cache.spec import CacheSpec
from duo_jax.plan import Plan
from duo_jax.serve.model_device import page_bytes, ring_bytes
from duo_jax.serve.scheduler import Sizes
from duo_jax.sizes import size_text
from pallas_kernels.xla import K_BLOCK, Q_BLOCK

# Of the memory that weights, activations and rows leave, the part that copies of rings may take; pages get the rest.
# With half of the heads streaming with 320 tokens, this is one copy for every 3700 tokens.
SNAPSHOT_SHARE = 0.08
MOST_SNAPSHOTS = 1024
# Arrays of float32 [rows, vocabulary] that a step needs at a time: logits, sorted, their order, sums. The compiler
# counts 11 with SmolLM2; as many again leave room for the blocks of attention, which matter in small models.
CHOICE_ARRAYS = 20
# Copies of a row's rings while a chunk of its prompt is computed, by compilation.
RING_COPIES = 4
# Arrays of float32 with the scores of a block of queries and a block of keys, where a CPU computes attention.
SCORE_ARRAYS = 3
# Numbers of a row besides its text: sampling settings, random key, newest token and what was chosen with it.
ROW_BYTES = 512


def plan_sizes(
    plan: Plan,
    memory: int,
    *,
    rows: int = 8,
    page_size: int = 128,
    max_context: int | None = None,
    queue: int = 1024,
    reuse_replies: bool = True,
) -> tuple[Sizes, CacheSpec]:
    """The sizes of a server, and its cache.

    Args:
        plan: the model, its pattern and data types, and `chunk_size`, the tokens of a prompt computed at a time.
        memory: bytes for all of it on each device: weights, activations, the cache, snapshots.
        rows: sequences that decode together.
        page_size: tokens of a page.
        max_context: most tokens of a request, prompt and reply; by default those that the model was trained for, or
            as many as there are pages for.
        queue: most requests that wait.
        reuse_replies: see `Sizes`.

    Raises:
        ValueError: memory too small for one request of a chunk, or sizes that contradict each other.
    """
    rows, page_size = whole_number("rows", rows, 1), whole_number("page_size", page_size, 1)
    config = plan.config
    longest = config.room(max_context or config.trained_positions)
    one = plan.cache(longest)
    spec = replace(one, batch_size=rows, page_size=page_size, num_pages=1)
    page, ring = page_bytes(spec), ring_bytes(spec)
    row_pages = -(-longest // page_size)
    last = config.embed_dim * 4
    # Of each token of the vocabulary, a row knows whether it has seen it, and how often it generated it.
    row = ring + last + 5 * config.vocab_size + ROW_BYTES + 8 * row_pages
    left = memory - plan.weights - temporaries(plan, rows, longest) - rows * row - (ring + last)
    least = -(-plan.chunk_size // page_size) + 1
    if left < least * page:
        needed = memory - left + least * page
        raise ValueError(
            f"serving {rows} requests at a time needs at least {size_text(needed)} ({size_text(plan.weights)} of "
            f"weights), but there are {size_text(memory)}: serve fewer rows, stream more heads, or give more memory"
        )
    snapshots = min(MOST_SNAPSHOTS, int(left * SNAPSHOT_SHARE) // (ring + last))
    # Pages without retrieval heads take nothing.
    pages = (left - snapshots * (ring + last)) // page if page else MOST_SNAPSHOTS * row_pages
    sizes = Sizes(
        rows=rows,
        pages=pages,
        page_size=page_size,
        chunk_size=plan.chunk_size,
        row_pages=min(row_pages, pages),
        snapshots=snapshots,
        queue=queue,
        reuse_replies=reuse_replies,
    )
    return sizes, replace(spec, max_length=sizes.row_pages * page_size, num_pages=pages)


def temporaries(plan: Plan, rows: int, longest: int) -> int:
    """Bytes that the largest program takes besides weights, cache and rows: a chunk of a prompt, or a step.

    Args:
        plan: as in `plan_sizes`.
        rows: sequences that decode together.
        longest: most tokens of a request.
    """
    config = plan.config
    ring = ring_bytes(replace(plan.cache(longest), page_size=1, num_pages=1))
    queries = min(Q_BLOCK, plan.chunk_size) * (config.num_heads // config.num_kv_heads)
    scores = 4 * SCORE_ARRAYS * queries * min(K_BLOCK, longest)
    return max(plan.activations + RING_COPIES * ring + scores, 4 * CHOICE_ARRAYS * rows * config.vocab_size)
