"""Checkpoints of a training run, written by Orbax: all of one or, if anything fails, none of it."""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

CHECKPOINTS = "checkpoints"


class Checkpoints:
    """The numbered checkpoints in a run's folder; the last `keep` are kept."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        import orbax.checkpoint as ocp  # Takes a second, which recipes that train nothing need not wait for.

        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self.folder = folder / CHECKPOINTS
        self.manager = ocp.CheckpointManager(self.folder.absolute(), options=options)
        self.args, self.reader = ocp.args, ocp.StandardCheckpointer

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self.manager.close()

    @property
    def latest(self) -> int | None:
        """The step of the last checkpoint."""
        return self.manager.latest_step()

    def restore(self, like: Any) -> Any:
        """The last checkpoint, on the devices of `like`.

        Raises:
            ValueError: it is incomplete or was altered, or is not of this run: other names, shapes or data types.
        """
        step = self.latest
        try:
            with _quiet():
                # Orbax would convert other data types without a word.
                if wrong := _difference(like, self._stored(step)):
                    raise ValueError(wrong)
                return self.manager.restore(step, args=self.args.StandardRestore(like))
        except Exception as error:  # Different layers of Orbax raise different errors for the same damage.
            others = [other for other in self.manager.all_steps() if other != step]
            way_out = f"to resume from step {max(others)}" if others else "to start from the beginning"
            raise ValueError(
                f"the checkpoint of step {step} cannot be read: remove {self.folder / str(step)} {way_out} "
                f"({first_line(error)})"
            ) from None

    def _stored(self, step: int | None) -> Any:
        """The names, shapes and data types of a checkpoint, without its arrays."""
        with self.reader() as reader:
            stored = reader.metadata((self.folder / str(step) / "default").absolute()).item_metadata
        if stored is None:
            raise ValueError("its description is missing or damaged")
        return stored.tree

    def save(self, step: int, state: Any, *, force: bool) -> None:
        """Write a checkpoint.

        Raises:
            OSError: it could not be written, for example to a full disk; the earlier ones are kept.
        """
        latest = self.latest
        try:
            with _quiet():
                self.manager.save(step, args=self.args.StandardSave(state), force=force)
        except Exception as error:  # Different layers of Orbax raise different errors for the same full disk.
            kept = "there is none before it" if latest is None else f"that of step {latest} is kept"
            raise OSError(
                f"could not save the checkpoint of step {step} to {self.folder} ({kept}): {first_line(error)}"
            ) from error


def first_line(error: Exception) -> str:
    """The beginning of an error's message; some have a page."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the tracebacks that Orbax and tensorstore print of errors that Orbax raises too."""
    log, policy = logging.getLogger("absl"), asyncio.get_event_loop_policy()
    level = log.level
    try:
        log.setLevel(logging.CRITICAL)
        asyncio.set_event_loop_policy(_WaitingLoops())
        yield
    finally:
        asyncio.set_event_loop_policy(policy)
        log.setLevel(level)


class _WaitingLoop(asyncio.SelectorEventLoop):
    """Waits for all its tasks before it closes.

    Orbax closes its loop as soon as one of several reads fails, and tensorstore's threads then print for each of the
    others that the loop is closed.
    """

    def close(self) -> None:
        if not self.is_closed():
            self.run_until_complete(_end(asyncio.all_tasks(self)))
        super().close()


async def _end(tasks: set[asyncio.Task[Any]]) -> None:
    await asyncio.gather(*tasks, return_exceptions=True)


class _WaitingLoops(asyncio.DefaultEventLoopPolicy):
    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        return _WaitingLoop()


def _difference(like: Any, stored: Any) -> str:
    """How a stored tree differs from the expected one; empty if it does not."""
    expected, found = (
        {
            jax.tree_util.keystr(path, simple=True, separator="."): (x.shape, str(x.dtype))
            for path, x in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (like, stored)
    )
    wrong = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    return f"{wrong[0]} is {found.get(wrong[0])}, expected {expected.get(wrong[0])}" if wrong else ""
