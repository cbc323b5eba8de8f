"""`make fuzz`: random files for each reader, for a time; each is read, or refused as documented, in bounds.

    python -m tests.hostile.fuzz --seconds 600 gguf json

Ends with 1 if an example failed; hypothesis prints the smallest one that fails in the same way.
"""

import argparse
import faulthandler
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jaxtyping
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from hypothesis.errors import HypothesisException

from duo_jax.cli import USER_ERRORS
from duo_jax.sizes import read_kilobytes
from tests.hostile.readers import READERS, Reader

# What an example may take: CPU seconds of all threads; seconds until the process is ended, for loops outside Python;
# and memory, on top of what the process has taken before.
MOST_SECONDS, MOST_WAIT, MOST_BYTES = 20, 120, 3 << 30
BATCH = 100
# Characters of a line of a report: values may be long.
MOST_SHOWN = 300


class TooSlowError(BaseException):
    """An example that took too long."""


def fuzz(name: str, reader: Reader, seconds: float, first: int | None) -> int:
    """Try examples for a time, print their number, and return that of different failures."""
    counts, known, end = [0, 0], set[str](), time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix=f"fuzz-{name}-") as folder:
        reader.prepare(Path(folder))
        test = _test(reader.example, Path(folder), counts, known)
        number = random.randrange(2**32) if first is None else first
        while time.monotonic() < end:
            print(f"{name}: seed {number}, {counts[0]} examples so far", file=sys.stderr, flush=True)
            try:
                seed(number)(test)()
            except HypothesisException:
                raise  # A strategy is wrong.
            except Exception as error:
                known.add(_place(error))
                print(f"{name}: FAILED with seed {number}")
                for line in "".join(traceback.format_exception(error)).splitlines():
                    print(line[:MOST_SHOWN], flush=True)
            number += 1
    seconds += time.monotonic() - end
    failed = f", {len(known)} different failures in {counts[1] + len(known)}" if known else ""
    print(f"{name}: {counts[0]} examples in {seconds:.0f} s{failed}", flush=True)
    return len(known)


def _test(
    example: Callable[[st.DataObject, Path], None], folder: Path, counts: list[int], known: set[str]
) -> Callable[[], Any]:
    """A test of hypothesis that passes over failures that are known."""

    @settings(
        max_examples=BATCH,
        deadline=None,
        database=None,
        report_multiple_bugs=False,
        derandomize=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(data=st.data())
    def test(data: st.DataObject) -> None:
        counts[0] += 1
        faulthandler.dump_traceback_later(MOST_WAIT, exit=True)
        signal.setitimer(signal.ITIMER_PROF, MOST_SECONDS)
        try:
            example(data, folder)
        except (Exception, TooSlowError) as error:
            if type(error).__module__.startswith("hypothesis"):
                raise
            if _place(error) in known:
                counts[1] += 1
                return
            if isinstance(error, TooSlowError):
                raise AssertionError(f"more than {MOST_SECONDS} CPU seconds") from error
            raise
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # Of a library in Rust.
                raise
            raise AssertionError(f"{error!r:.300}") from error
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            faulthandler.cancel_dump_traceback_later()

    return test


def _place(error: BaseException) -> str:
    """What tells failures apart: the type, and where it was raised; for our own checks, the words too."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if re.search(r"/(duo_jax|duo_eval|duo_train|readers)", frame.filename)]
    line = f"{own[-1].filename}:{own[-1].lineno}" if own else ""
    is_check = isinstance(error, (AssertionError, *USER_ERRORS))
    words = re.sub(r"\d+|'[^']*'|\"[^\"]*\"", "", str(error).partition("\n")[0])[:60] if is_check else ""
    return f"{type(error).__name__} {line} {words}"


def _too_slow(*args: object) -> None:
    raise TooSlowError


def main() -> None:
    """Fuzz the readers that were named, or all, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", help=f"of {', '.join(READERS)}; all by default")
    parser.add_argument("--seconds", type=float, default=600, help="for each reader")
    parser.add_argument("--seed", type=int, help="of the first examples: that of a failure gives it again")
    args = parser.parse_args()
    if unknown := set(args.readers) - set(READERS):
        parser.error(f"no reader {', '.join(sorted(unknown))}; there are {', '.join(READERS)}")
    # Values of a wrong type must reach the project's own checks.
    jaxtyping.config.update("jaxtyping_disable", True)
    signal.signal(signal.SIGPROF, _too_slow)
    taken = read_kilobytes(Path("/proc/self/status"), "VmSize:")
    failures = 0
    for name in args.readers or READERS:
        if taken is not None:
            limit = (read_kilobytes(Path("/proc/self/status"), "VmSize:") or taken) + MOST_BYTES
            resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))
        failures += fuzz(name, READERS[name], args.seconds, args.seed)
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
