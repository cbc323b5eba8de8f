"""A question as tokens: in the model's chat template or plain, with the first words of its answer.

A prompt may be known in two steps, its text before its question. Knows no task.
"""

from collections.abc import Sequence
from typing import Annotated

import tyro
from duo_train.data.needles import DATE, beginning
from transformers import PreTrainedTokenizerBase

from duo_jax.text.template import common, has_template, split
from duo_jax.text.tokens import encode, encode_inside

# The setting of every task with a long text and a question about it.
QuestionLater = Annotated[
    bool,
    tyro.conf.arg(
        help="Take in the text first and the question token by token afterwards, as with a stored document: a method "
        "evicts without knowing the question, and budgets are fractions of the text's bytes."
    ),
]


def later_setting(question_later: bool) -> dict[str, bool]:
    """The setting in the head of a file: only if it is set, as older files lack it. Their prompts had the question."""
    return {"question_later": True} if question_later else {}


def frame(tokenizer: PreTrainedTokenizerBase, *, use_chat: bool) -> tuple[str, str] | None:
    """The text before and after a user's message; None where there is no template.

    Raises:
        ValueError: a chat template that does not show a message once.
    """
    if not (use_chat and has_template(tokenizer)):
        return None
    return split(tokenizer, date_string=DATE, way_out="leave the template out with --no-chat")


def prompt(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    answer: str = "",
    *,
    use_chat: bool,
    joint: str = "\n",
    limit: int | None = None,
) -> list[int]:
    """The tokens of a question.

    Args:
        tokenizer: the model's.
        text: the question.
        answer: the beginning of its answer.
        use_chat: ask in the chat template, where there is one.
        joint: text before `answer` where there is no template.
        limit: most tokens. A longer text loses its middle, as in LongBench: the question is at its ends.

    Raises:
        ValueError: a limit that leaves no room for any text.
    """
    around = frame(tokenizer, use_chat=use_chat)
    before, after = around or ("", joint)
    head, ending = encode(tokenizer, before) if around else beginning(tokenizer), after + answer
    # In one go: SentencePiece would put a space before a text of its own.
    tokens = encode(tokenizer, before + text + ending) if around else head + encode(tokenizer, text + ending)
    if limit is None or len(tokens) <= limit:
        return tokens
    body, tail = (encode_inside if around else encode)(tokenizer, text), encode_inside(tokenizer, ending)
    room = limit - len(head) - len(tail)
    if room < 2:
        raise ValueError(f"{limit} tokens leave {room} for the text: its frame needs {len(head) + len(tail)}")
    return [*head, *body[: room - room // 2], *body[len(body) - room // 2 :], *tail]


def known_tokens(tokenizer: PreTrainedTokenizerBase, context: str, tokens: Sequence[int], *, use_chat: bool) -> int:
    """How many tokens of a prompt, as `prompt` makes it, are known from its text up to the end of `context`.

    Tokens that the question may be joined with come later, so that none of the known ones depends on it.
    """
    around = frame(tokenizer, use_chat=use_chat)
    begin = encode(tokenizer, around[0] + context) if around else beginning(tokenizer) + encode(tokenizer, context)
    return common(begin, tokens)
