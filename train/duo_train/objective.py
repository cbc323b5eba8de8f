"""The interface of the training loop: parameters that give gates, their loss, and their optimizer."""

import abc
from typing import Any, ClassVar

import optax
from jaxtyping import Array, Float, Int32, PRNGKeyArray

from duo_jax.model.model import Model
from duo_train.data.batches import Batch
from duo_train.gated import GatedModel

Params = Any  # a pytree of arrays
Metrics = dict[str, Float[Array, ""]]


class Objective(abc.ABC):
    """A frozen, hashable value: it is a static argument of the jitted step."""

    # The name of the mean loss over the label tokens in the metrics.
    loss_name: ClassVar[str]

    steps: int
    batch_size: int
    accumulate: int
    pad_multiple: int
    seed: int

    @abc.abstractmethod
    def schedule(self, step: Int32[Array, ""]) -> Float[Array, ""]:
        """The learning rate of a step, counted from 0."""

    @abc.abstractmethod
    def init(self, start: Float[Array, "L K"]) -> Params:
        """The initial parameters, given the initial gates."""

    @abc.abstractmethod
    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer of the parameters."""

    @abc.abstractmethod
    def gates(self, params: Params) -> Float[Array, "L K"]:
        """The gates of the parameters, as they are saved."""

    def targets(self, attention: GatedModel, model: Model, batch: Batch) -> Float[Array, "B M D"] | None:
        """Values at each label that the loss needs and that depend on the sample only, so they are computed once."""
        return None

    @abc.abstractmethod
    def losses(
        self,
        attention: GatedModel,
        model: Model,
        params: Params,
        batch: Batch,
        targets: Float[Array, "B M D"] | None,
        key: PRNGKeyArray,
    ) -> Float[Array, "B M"]:
        """Loss of each label token of one micro-batch (no accumulation axis); values at padding are ignored."""

    @abc.abstractmethod
    def penalty(self, params: Params, step: Int32[Array, ""]) -> tuple[Float[Array, ""], Metrics]:
        """A term that is added to the mean loss once per step, and further metrics."""

    def project(self, params: Params) -> Params:
        """Project the parameters into their allowed range, after each step."""
        return params
