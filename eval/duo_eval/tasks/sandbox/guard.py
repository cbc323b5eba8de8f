"""Inside the sandbox: sets limits on this process, gives up its rights, runs the program.

Started by `sandbox.py` as a script without site packages: it may import only the standard library. Its right to change
files, to start processes and to use a network is given up to the kernel (Landlock and seccomp), for good.
"""

import ctypes
import errno
import json
import os
import resource
import signal
import sys
from typing import Any

# Landlock's access rights to files, as of its third version (Linux 6.2).
ALL_RIGHTS = (1 << 15) - 1
WRITE_FILE, READ_FILE, READ_FOLDER = 1 << 1, 1 << 2, 1 << 3
# Even the working folder gets no devices, sockets or folders: deep ones could not be removed.
UNNEEDED = 1 << 6 | 1 << 7 | 1 << 9 | 1 << 11
# From its sixth version on: all use of TCP; signals and abstract sockets to other processes.
NETWORK, SCOPES = 0b11, 0b11
# Landlock's system calls have the same numbers on every architecture; the C library has no functions for them.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
# All that a program may read, besides Python itself: no home, no other process.
SYSTEM = ("/usr", "/lib", "/lib64", "/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/zero", "/dev/urandom")
# System calls that no solution needs: Landlock knows no modes, owners and times of files, and little of processes.
REFUSED = (
    "fork", "vfork", "execve", "execveat", "unshare", "setns", "socket", "io_uring_setup", "bpf", "kill", "tkill",
    "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo", "pidfd_open", "pidfd_send_signal", "ptrace", "setpriority",
    "ioprio_set", "sched_setaffinity", "sched_setscheduler", "sched_setparam", "sched_setattr", "setrlimit", "chmod",
    "fchmod", "fchmodat", "fchmodat2", "chown", "lchown", "fchown", "fchownat", "utime", "utimes", "futimesat",
    "utimensat", "setxattr", "lsetxattr", "fsetxattr", "setxattrat", "removexattr", "lremovexattr", "fremovexattr",
    "removexattrat", "file_setattr", "shmget", "msgget", "semget", "mq_open", "add_key", "keyctl", "request_key",
)  # fmt: skip
ALLOW, REFUSE = 0x7FFF0000, 0x00050000
NOT_EQUAL, MASKED_EQUAL = 1, 7
CLONE_THREAD = 0x10000
SET_PARENT_DEATH_SIGNAL, SET_NO_NEW_PRIVILEGES = 1, 38
CAPABILITIES_VERSION = 0x20080522


class Compared(ctypes.Structure):
    """libseccomp's `scmp_arg_cmp`: which argument of a call is compared, how, and with what."""

    _fields_ = [
        ("argument", ctypes.c_uint),
        ("operator", ctypes.c_int),
        ("first", ctypes.c_uint64),
        ("second", ctypes.c_uint64),
    ]


def main() -> None:
    """Read the request, run the program, print the completion token."""
    order = json.load(sys.stdin)
    voice = os.dup(1)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    program, word = compile_program(order["program"]), order["word"]
    limit(order["limits"])
    try:
        if order["isolated"]:
            isolate(os.getcwd())
        if isinstance(program, str):
            os.write(voice, program.encode())
            return
        exec(program, {"__name__": "__main__"})
    except BaseException as error:  # SystemExit too: a program that leaves early has not passed.
        os.write(voice, f"{type(error).__name__}: {error}"[:500].encode(errors="replace"))
        return
    os.write(voice, word.encode())


def compile_program(text: str) -> Any:
    """The program's code, or an error message."""
    try:
        return compile(text, "<program>", "exec")
    except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError) as error:
        return f"{type(error).__name__}: {error}"


def limit(sizes: dict[str, Any]) -> None:
    """Limits that only root could raise again."""
    seconds = int(sizes["seconds"]) + 1
    for kind, most in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, int(sizes["memory"])),
        (resource.RLIMIT_FSIZE, int(sizes["file_size"])),
        (resource.RLIMIT_NOFILE, int(sizes["open_files"])),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (most, most))


def isolate(folder: str) -> None:
    """Give up the right to change files outside a folder, to read those of users, to start processes, to connect.

    Raises:
        OSError: a kernel without Landlock or seccomp, or no libseccomp.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    call(libc.prctl, SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    call(libc.prctl, SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    # Root becomes a user like any other.
    call(libc.capset, (ctypes.c_uint32 * 2)(CAPABILITIES_VERSION, 0), (ctypes.c_uint32 * 6)())
    confine_files(libc, folder)
    refuse_calls()


def confine_files(libc: Any, folder: str) -> None:
    """Landlock: what no rule allows is refused."""
    version = call(libc.syscall, CREATE_RULESET, None, 0, 1)
    handled = (ctypes.c_uint64 * 3)(ALL_RIGHTS, NETWORK, SCOPES)
    size = ctypes.sizeof(handled) if version >= 6 else 8
    rules = call(libc.syscall, CREATE_RULESET, handled, size, 0)
    rights = dict.fromkeys([*SYSTEM, sys.base_prefix, sys.base_exec_prefix, *sys.path], READ_FILE | READ_FOLDER)
    rights |= {folder: ALL_RIGHTS & ~UNNEEDED, os.devnull: READ_FILE | WRITE_FILE}
    for path, allowed in rights.items():
        if not os.path.isdir(path):
            allowed &= ~READ_FOLDER  # Of a file, a right to folders would be an error.
        if os.path.exists(path):
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rule = allowed.to_bytes(8, sys.byteorder) + opened.to_bytes(4, sys.byteorder)
            call(libc.syscall, ADD_RULE, rules, 1, rule, 0)
            os.close(opened)
    call(libc.syscall, RESTRICT_SELF, rules, 0)
    os.close(rules)


def refuse_calls() -> None:
    """Seccomp: refused calls fail, as they do for a user without the right."""
    lib = ctypes.CDLL("libseccomp.so.2")
    lib.seccomp_init.restype = ctypes.c_void_p
    lib.seccomp_init.argtypes = [ctypes.c_uint32]
    lib.seccomp_rule_add_array.argtypes = [
        ctypes.c_void_p,
        ctypes.c_uint32,
        ctypes.c_int,
        ctypes.c_uint,
        ctypes.c_void_p,
    ]
    lib.seccomp_load.argtypes = [ctypes.c_void_p]
    rules = lib.seccomp_init(ALLOW)

    def refuse(system_call: str, error: int, *compared: Compared) -> None:
        number = lib.seccomp_syscall_resolve_name(system_call.encode())
        if number != -1:  # Unknown to this version of the library.
            array = (Compared * len(compared))(*compared)
            checked(lib.seccomp_rule_add_array(rules, REFUSE | error, number, len(compared), array))

    for each in REFUSED:
        refuse(each, errno.EPERM)
    # Threads are allowed. The flags of clone3 are in memory, where seccomp cannot look: the C library then uses clone.
    refuse("clone3", errno.ENOSYS)
    refuse("clone", errno.EPERM, Compared(0, MASKED_EQUAL, CLONE_THREAD, 0))
    refuse("prlimit64", errno.EPERM, Compared(2, NOT_EQUAL, 0, 0))  # It may read its limits.
    checked(lib.seccomp_load(rules))


def call(function: Any, *arguments: Any) -> int:
    """The result of a function of the C library; OSError if it failed."""
    result = int(function(*(ctypes.c_long(each) if isinstance(each, int) else each for each in arguments)))
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def checked(result: int) -> None:
    """OSError if a function of libseccomp failed."""
    if result < 0:
        raise OSError(-result, os.strerror(-result))


if __name__ == "__main__":
    main()
