"""A question as tokens: in the model's chat template or plain, with the first words of its answer.

Knows no task: what is asked is text that comes from elsewhere.
"""

from transformers import PreTrainedTokenizerBase

from train.needles import HOLE, beginning, chat, encode


def frame(tokenizer: PreTrainedTokenizerBase, *, use_chat: bool) -> tuple[list[int], str | None]:
    """What comes before a user's message, as tokens, and after it, as text; None after it where there is no template.

    Raises:
        ValueError: a chat template that does not show a message once.
    """
    if not (use_chat and tokenizer.chat_template):
        return beginning(tokenizer), None
    parts = chat(tokenizer, [{"role": "user", "content": HOLE}], add_generation_prompt=True).split(HOLE)
    if len(parts) != 2:
        raise ValueError("this model's chat template does not show a message once: ask without it, by --no-chat")
    return encode(tokenizer, parts[0]), parts[1]


def prompt(
    tokenizer: PreTrainedTokenizerBase, text: str, answer: str = "", *, use_chat: bool, joint: str = "\n"
) -> list[int]:
    """The tokens of a question; `answer` is what its answer begins with, after `joint` where there is no template."""
    before, after = frame(tokenizer, use_chat=use_chat)
    return before + encode(tokenizer, text + (joint if after is None else after) + answer)
