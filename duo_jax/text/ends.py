"""What ends a reply: the ends of the model, the tokenizer and the chat template, and a caller's stop strings.

The one place that decides this, for `LM`, the commands and the evaluations.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from duo_jax.model.config import ModelConfig
from duo_jax.text.template import end_of_turn
from duo_jax.text.tokenizer import TextTokenizer, special_id
from duo_jax.text.tokens import check_text, special_tokens


@dataclass(frozen=True)
class Ends:
    """What ends a reply.

    Attributes:
        eos_ids: tokens that end a text, a turn or a message to a tool.
        stop_ids: special tokens that the caller named as stop strings.
        strings: stop strings that the text is searched for.
    """

    eos_ids: tuple[int, ...] = ()
    stop_ids: tuple[int, ...] = ()
    strings: tuple[str, ...] = ()

    @property
    def ids(self) -> tuple[int, ...]:
        """All tokens that end a reply."""
        return tuple(dict.fromkeys((*self.eos_ids, *self.stop_ids)))


def eos_ids_of(config: ModelConfig, tokenizer: TextTokenizer) -> tuple[int, ...]:
    """Tokens that end a text or a turn.

    They are those of the model (in a GGUF file eos, eot and eom; otherwise generation_config.json, or config.json), the
    tokenizer's EOS, and the special token that the chat template writes after an assistant's message.
    """
    others = (special_id(tokenizer, "eos_token"), end_of_turn(tokenizer))
    # A token without a logit is never generated.
    known = [index for index in others if index is not None and 0 <= index < config.vocab_size]
    return tuple(dict.fromkeys((*config.eos_ids, *known)))


def stop_ends(tokenizer: TextTokenizer, vocab_size: int, eos_ids: Sequence[int], stop: object) -> Ends:
    """The ends of one reply: tokens, and the stop strings of a caller.

    A stop string that is a special token ends the reply as a token: decoded text does not have special tokens.

    Raises:
        ValueError: an argument that is not a list of non-empty strings, or a string with a special token and other
            text.
    """
    if isinstance(stop, str) or not isinstance(stop, Sequence) or not all(isinstance(x, str) and x for x in stop):
        raise ValueError(f"stop must be a list of strings, none of them empty, got {stop!r}")
    specials = special_tokens(tokenizer) if stop else {}
    for text in stop:
        inside = next((token for token in specials if token in check_text(text, "a stop string")), text)
        if inside != text:
            raise ValueError(
                f"the stop string {text!r} never appears: decoded text has no special tokens such as {inside!r}; give "
                "the token alone, or the rest of the string"
            )
    named = [specials[text] for text in stop if text in specials]
    strings = tuple(text for text in stop if text not in specials)
    return Ends(tuple(eos_ids), tuple(index for index in named if index < vocab_size), strings)
