"""What the engine needs of a device, and of each token that it chose."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol, runtime_checkable

from duo_jax.serve.jobs import Action, Job
from duo_jax.serve.requests import Likely


class Chosen(NamedTuple):
    """The token that was chosen for a job.

    Attributes:
        job: the job.
        token: the token.
        logprob: its log-probability.
        top: the most likely tokens, the best first.
        is_finite: False where a logit was NaN or infinite; the token is then meaningless.
    """

    job: Job
    token: int
    logprob: float
    top: tuple[Likely, ...] = ()
    is_finite: bool = True


@runtime_checkable
class Device(Protocol):
    """Carries out actions. The owner of each job is a `duo_jax.serve.engine.Running`.

    Attention reads nothing of a page or a ring but what its row has written: pages are not cleared between jobs.
    """

    @property
    def dtype(self) -> Any:
        """Data type of the activations."""

    @property
    def page_bytes(self) -> int:
        """Bytes of keys and values of a page."""

    @property
    def ring_bytes(self) -> int:
        """Bytes of keys and values of a row's rings, or of a snapshot."""

    @property
    def full_bytes(self) -> int:
        """Bytes of keys and values of a token where all heads keep it, at the same precision."""

    def compile(self) -> Iterator[str]:
        """Compile all programs; the name of each, before it is compiled."""

    def do(self, action: Action) -> list[Chosen]:
        """Carry out an action, and wait for the tokens that it chooses."""

    def reset(self) -> None:
        """Make all rows, pages and snapshots anew, after memory ran out: what they had is lost."""
