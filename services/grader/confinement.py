"""What a worker process may not do, set once before it reads a hostile text.

Limits of memory and CPU, and no core dumps. An audit hook in Python refuses to compile or run text, and programs,
sockets and changes of files. On Linux the kernel refuses the same (seccomp, where it may be installed), and the worker
dies with its parent. None of this is needed for a right verdict; all of it costs nothing.
"""

import contextlib
import ctypes
import os
import platform
import resource
import signal
import struct
import sys
from types import FrameType
from typing import Any

BLOCKS = 8  # no single block of memory may be larger than this share of a worker's limit
CPU_SLACK_S = 5  # beyond the deadline the kernel ends a worker that its parent has forgotten

_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_SECCOMP_MODE_FILTER = 2
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | 1, 0x80000000  # refuse: the call fails with EPERM
_LOAD, _EQUAL, _GREATER, _ANY_BIT, _RETURN = 0x20, 0x15, 0x25, 0x45, 0x06  # classic BPF
_X32 = 0x40000000  # the bit of x86's second set of numbers
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

_REFUSED_EVENTS = (
    "socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.kill", "os.remove",
    "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown", "os.utime",
    "os.setxattr", "shutil.", "pty.", "ctypes.dlopen",
)  # fmt: skip

# Per machine: its audit number and the numbers of its system calls (the kernel's unistd.h).
_MACHINES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_MMAP = {"x86_64": 9, "aarch64": 222}
_MREMAP = {"x86_64": 25, "aarch64": 216}
_OPEN = {"x86_64": ((2, 1), (257, 2)), "aarch64": ((56, 2),)}  # open, openat: number and which argument has the flags
_REFUSED = {
    "x86_64": {
        "socket": 41, "socketpair": 53, "clone": 56, "fork": 57, "vfork": 58, "execve": 59, "kill": 62,
        "truncate": 76, "rename": 82, "mkdir": 83, "rmdir": 84, "creat": 85, "link": 86, "unlink": 87, "symlink": 88,
        "chmod": 90, "chown": 92, "ptrace": 101, "mknod": 133, "mount": 165, "setxattr": 188, "tkill": 200,
        "tgkill": 234, "mkdirat": 258, "mknodat": 259, "fchownat": 260, "unlinkat": 263, "renameat": 264,
        "linkat": 265, "symlinkat": 266, "fchmodat": 268, "renameat2": 316, "memfd_create": 319, "bpf": 321,
        "execveat": 322, "process_vm_writev": 311, "pidfd_send_signal": 424, "io_uring_setup": 425, "clone3": 435,
        "openat2": 437,
    },
    "aarch64": {
        "socket": 198, "socketpair": 199, "clone": 220, "execve": 221, "kill": 129, "truncate": 45, "ptrace": 117,
        "mknodat": 33, "mkdirat": 34, "unlinkat": 35, "symlinkat": 36, "linkat": 37, "renameat": 38, "mount": 40,
        "setxattr": 5, "fchmodat": 53, "fchownat": 54, "tkill": 130, "tgkill": 131, "renameat2": 276,
        "memfd_create": 279, "bpf": 280, "execveat": 281, "process_vm_writev": 271, "pidfd_send_signal": 424,
        "io_uring_setup": 425, "clone3": 435, "openat2": 437,
    },
}  # fmt: skip


class MemoryWatch:
    """Tells afterwards whether memory ran out, though a library caught the MemoryError and went on.

    An allocation fails in two ways. A block beyond `limit / BLOCKS` ends the process (seccomp: SIGSYS, exit status of
    a memory failure). Any other can only fail when that much or less is left, and the peak of the address space tells.
    """

    def __init__(self, *, limit_bytes: int) -> None:
        self._full_bytes = limit_bytes - limit_bytes // BLOCKS
        self._status: int | None = None
        with contextlib.suppress(FileNotFoundError):  # no /proc: then only a MemoryError that comes through is seen
            self._status = os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)

    def is_exhausted(self) -> bool:
        """Whether this process has ever been so near its limit that an allocation may have failed."""
        if self._status is None:
            return False
        fields = os.pread(self._status, 4_096, 0).partition(b"VmPeak:")[2].split(maxsplit=1)
        return int(fields[0]) * 1_024 > self._full_bytes


def die_with_parent(parent: int) -> None:
    """Ask the kernel to end this process with its parent: a hanging one never sees the end of its input."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit("the process that started this worker is gone")


def confine(*, memory_bytes: int) -> MemoryWatch:
    """Confine this process for good."""
    watch = MemoryWatch(limit_bytes=memory_bytes)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    if sys.platform == "linux" and platform.machine() in _MACHINES:
        _install(_program(platform.machine(), max_block_bytes=memory_bytes // BLOCKS))
    sys.addaudithook(_refuse)
    return watch


def allow_cpu(seconds: float) -> None:
    """Let this process compute that much longer, and a little; then the kernel ends it, whatever its parent does."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    until_s = int(usage.ru_utime + usage.ru_stime + seconds) + CPU_SLACK_S
    most_s = resource.getrlimit(resource.RLIMIT_CPU)[1]
    if most_s == resource.RLIM_INFINITY or until_s <= most_s:
        resource.setrlimit(resource.RLIMIT_CPU, (until_s, most_s))


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook. Modules that are being imported may run text (dataclasses do), and one of sympy's, see below."""
    if event == "compile":
        source, filename = arguments
        is_refused = source is not None and not os.fsdecode(filename or b"?").startswith("/")
    elif event == "exec":
        filename = arguments[0].co_filename
        is_refused = filename.startswith("<") and not filename.startswith("<frozen ")
    elif event == "open":
        is_refused = bool(arguments[2] & _WRITING)
    else:
        is_refused = event.startswith(_REFUSED_EVENTS)
    if is_refused and not (event in ("compile", "exec") and is_text_of_a_library(sys._getframe(1))):
        raise PermissionError(f"refused in a worker: {event}")


def is_text_of_a_library(frame: FrameType) -> bool:
    """Whether the text that `frame` is about to run comes from a library's own file, not from an answer.

    Beside imports that is sympy's generator of functions on monomials: their code depends on the number of letters.
    """
    if frame.f_code.co_filename.endswith("/sympy/polys/monomials.py"):
        return True
    caller: FrameType | None = frame
    while caller is not None and caller.f_code.co_filename != "<frozen importlib._bootstrap>":
        caller = caller.f_back
    return caller is not None


def _program(machine: str, *, max_block_bytes: int) -> bytes:
    """The filter as BPF: kill for a huge block of memory, refuse what is forbidden, allow all else."""
    steps = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, _MACHINES[machine]), (_RETURN, 0, 0, _KILL)]
    steps += [(_LOAD, 0, 0, _NUMBER), (_ANY_BIT, 0, 1, _X32), (_RETURN, 0, 0, _KILL)]
    for number in _REFUSED[machine].values():
        steps += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _REFUSE)]
    for number, flags in _OPEN[machine]:
        steps += [
            (_EQUAL, 0, 4, number),
            (_LOAD, 0, 0, _ARGUMENTS + 8 * flags),
            (_ANY_BIT, 0, 1, _WRITING),
            (_RETURN, 0, 0, _REFUSE),
            (_RETURN, 0, 0, _ALLOW),
        ]
    for number, length in ((_MMAP[machine], 1), (_MREMAP[machine], 2)):
        steps += [
            (_EQUAL, 0, 7, number),
            (_LOAD, 0, 0, _ARGUMENTS + 8 * length + 4),  # the upper half: both machines are little-endian
            (_EQUAL, 1, 0, 0),
            (_RETURN, 0, 0, _KILL),
            (_LOAD, 0, 0, _ARGUMENTS + 8 * length),
            (_GREATER, 0, 1, min(max_block_bytes, 2**32 - 1)),
            (_RETURN, 0, 0, _KILL),
            (_RETURN, 0, 0, _ALLOW),
        ]
    steps.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("HBBI", *step) for step in steps)


class _Filter(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_char_p))


def _install(program: bytes) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    # A kernel or a container without seccomp says no; the limits above still hold.
    libc.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.byref(_Filter(len(program) // 8, program)), 0, 0)
