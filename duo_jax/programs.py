"""Compiled programs on disk: a program is compiled once on a machine, not once in every process."""

import contextlib
import os

import jax

from pallas_kernels.user_cache import cache_folder


def keep_programs() -> None:
    """Let jax store compiled programs in `compiled` of the cache folder, unless the user has chosen a folder.

    `JAX_ENABLE_COMPILATION_CACHE=0` turns this off, `JAX_COMPILATION_CACHE_DIR` is a folder of one's own; so are the
    jax settings of these names. `load_model` calls this.
    """
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    with contextlib.suppress(OSError):  # Without a home folder, or with one that is read-only, every process compiles.
        folder = cache_folder() / "compiled"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            jax.config.update("jax_compilation_cache_dir", str(folder))
            # Small programs too, of which a process compiles dozens.
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
