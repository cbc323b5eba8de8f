"""Checkpoints of a training run, written by Orbax: all of one or, if anything fails, none of it."""

import logging
from pathlib import Path
from typing import Any

CHECKPOINTS = "checkpoints"


class Checkpoints:
    """The numbered checkpoints in a run's folder; the last `keep` are kept."""

    def __init__(self, folder: Path, *, keep: int) -> None:
        import orbax.checkpoint as ocp  # Takes a second, which recipes that train nothing need not wait for.

        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
        )
        self.manager = ocp.CheckpointManager((folder / CHECKPOINTS).absolute(), options=options)
        self.args = ocp.args

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *error: object) -> None:
        self.manager.close()

    @property
    def latest(self) -> int | None:
        """The step of the last checkpoint."""
        return self.manager.latest_step()

    def restore(self, like: Any) -> Any:
        """The last checkpoint, on the devices of `like`."""
        return self.manager.restore(self.latest, args=self.args.StandardRestore(like))

    def save(self, step: int, state: Any, *, force: bool) -> None:
        """Write a checkpoint.

        Raises:
            OSError: it could not be written, for example to a full disk; the earlier ones are kept.
        """
        latest = self.latest
        log = logging.getLogger("absl")
        level = log.level
        try:
            log.setLevel(logging.CRITICAL)  # Orbax would log the traceback of the error that it raises.
            self.manager.save(step, args=self.args.StandardSave(state), force=force)
        except Exception as error:  # Different layers of Orbax raise different errors for the same full disk.
            kept = "there is none before it" if latest is None else f"that of step {latest} is kept"
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise OSError(f"could not save the checkpoint of step {step} ({kept}): {reason}") from error
        finally:
            log.setLevel(level)
