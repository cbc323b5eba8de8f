"""Errors of compilers and drivers, which may be of any type: in one line, and whether memory was exhausted."""

# Of XLA, of the driver, and of NVIDIA's libraries.
NO_MEMORY = "resource_exhausted", "out of memory", "out_of_memory", "alloc_failed"
# XLA has the same status for a kernel that needs more than a multiprocessor has.
NO_ROOM = "shared memory", "smem", "register allocation"


def first_line(error: BaseException) -> str:
    """An error in one line of at most 200 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def is_no_memory(error: Exception) -> bool:
    """Whether memory was exhausted. A kernel that needs too much shared memory, or too many registers, is refused."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        any(words in text for words in NO_MEMORY) and not any(words in text for words in NO_ROOM)
    )
