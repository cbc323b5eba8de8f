"""A question as tokens: in the model's chat template or plain, with the first words of its answer.

Knows no task: what is asked is text that comes from elsewhere.
"""

from duo_train.data.needles import DATE, beginning
from transformers import PreTrainedTokenizerBase

from duo_jax.text.template import encode, has_template, split


def frame(tokenizer: PreTrainedTokenizerBase, *, use_chat: bool) -> tuple[list[int], str | None]:
    """What comes before a user's message, as tokens, and after it, as text; None after it where there is no template.

    Raises:
        ValueError: a chat template that does not show a message once.
    """
    if not (use_chat and has_template(tokenizer)):
        return beginning(tokenizer), None
    before, after = split(tokenizer, date_string=DATE, way_out="leave the template out with --no-chat")
    return encode(tokenizer, before), after


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
        text: what is asked.
        answer: what its answer begins with.
        use_chat: ask in the chat template, where there is one.
        joint: comes before `answer` where there is none.
        limit: most tokens. Of a longer text the middle is left out, as LongBench does: what is asked is at its ends.

    Raises:
        ValueError: a limit that leaves no room for any text.
    """
    before, after = frame(tokenizer, use_chat=use_chat)
    ending = (joint if after is None else after) + answer
    tokens = before + encode(tokenizer, text + ending)
    if limit is None or len(tokens) <= limit:
        return tokens
    body, tail = encode(tokenizer, text), encode(tokenizer, ending)
    room = limit - len(before) - len(tail)
    if room < 2:
        raise ValueError(f"{limit} tokens leave {room} for a text beside {len(before) + len(tail)} of its frame")
    return [*before, *body[: room - room // 2], *body[len(body) - room // 2 :], *tail]
