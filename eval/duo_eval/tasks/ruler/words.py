"""English words that RULER draws from: those of the package wonderwords, which comes with the `eval` extra."""

from functools import cache

from duo_jax.extras import require


@cache
def nouns() -> list[str]:
    """In alphabetical order."""
    return _words("nouns")


@cache
def adjectives() -> list[str]:
    """In alphabetical order."""
    return _words("adjectives")


@cache
def all_words() -> list[str]:
    """Nouns, adjectives and verbs, each once, in alphabetical order."""
    return sorted({*nouns(), *adjectives(), *_words("verbs")})


def _words(category: str) -> list[str]:
    require("RULER", ("wonderwords",))
    from wonderwords import RandomWord

    return sorted(set(RandomWord().filter(include_categories=[category])))
