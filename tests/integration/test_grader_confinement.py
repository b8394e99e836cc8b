"""What a confined process cannot do, asked of a real one that is not hindered by anything else."""

import subprocess
import sys
from pathlib import Path

import pytest

PRELUDE = """
import contextlib, ctypes, os, resource, signal, socket, subprocess, sys, time
from services.grader import confinement
libc = ctypes.CDLL(None, use_errno=True)
watch = confinement.confine(memory_bytes=512 * 2**20)
"""
KERNEL = "sys.platform == 'linux'"


def run(code: str, directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PRELUDE + code], cwd=directory, capture_output=True, text=True, timeout=30, check=False,
        env={"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip


PAYLOADS = {
    "a file": "open('mark', 'w')",
    "a file by the system call": "os.open('mark', os.O_CREAT | os.O_WRONLY)",
    "a file through pathlib": "__import__('pathlib').Path('mark').write_text('x')",
    "append": "open('there', 'a')",
    "truncate": "os.truncate('there', 0)",
    "remove": "os.remove('there')",
    "rename": "os.rename('there', 'mark')",
    "a folder": "os.mkdir('mark')",
    "a link": "os.symlink('there', 'mark')",
    "the mode": "os.chmod('there', 0o777)",
    "a shell": "os.system('touch mark')",
    "a program": "subprocess.run(['touch', 'mark'])",
    "another program instead": "os.execv('/bin/touch', ['touch', 'mark'])",
    "a fork": "os.fork() or open('mark', 'w')",
    "a socket": "socket.socket()",
    "a connection": "socket.create_connection(('127.0.0.1', 9))",
    "a signal": "os.kill(os.getppid(), signal.SIGTERM)",
    "eval": "eval('1+1')",
    "exec": "exec('x=1')",
    "compile": "compile('1', '<string>', 'eval')",
    "sympify": "__import__('sympy').sympify('2*x')",
}


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
def test_a_confined_process_is_refused(payload: str, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("untouched")
    done = run(payload, tmp_path)
    assert done.returncode == 1 and "PermissionError" in done.stderr, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
    assert (tmp_path / "there").read_text() == "untouched"


SYSTEM_CALLS = {
    "open": "libc.open(b'mark', os.O_CREAT | os.O_WRONLY, 0o600)",
    "creat": "libc.creat(b'mark', 0o600)",
    "mkdir": "libc.mkdir(b'mark', 0o700)",
    "unlink": "libc.unlink(b'there')",
    "rename": "libc.rename(b'there', b'mark')",
    "truncate": "libc.truncate(b'there', 0)",
    "symlink": "libc.symlink(b'there', b'mark')",
    "socket": "libc.socket(2, 1, 0)",
    "fork": "libc.fork()",
    "vfork": "libc.syscall(58 if os.uname().machine == 'x86_64' else 220)",
    "execve": "libc.execve(b'/bin/true', None, None)",
    "kill": "libc.kill(os.getppid(), 15)",
    "ptrace": "libc.ptrace(16, os.getppid(), None, None)",
}


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's filter is Linux's")
@pytest.mark.parametrize("call", SYSTEM_CALLS.values(), ids=SYSTEM_CALLS)
def test_the_kernel_refuses_what_goes_around_python(call: str, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("untouched")
    done = run(f"result = {call}; os.write(1, b'%d %d' % (result, ctypes.get_errno())); os._exit(0)", tmp_path)
    assert (done.returncode, done.stdout) == (0, "-1 1"), done.stderr  # EPERM
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_reading_and_importing_go_on(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("readable")
    code = "import dataclasses, colorsys, statistics; print(open('there').read(), os.listdir('.'))"
    assert run(code, tmp_path).stdout == "readable ['there']\n"


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's filter is Linux's")
@pytest.mark.parametrize("code", ["bytearray(200 * 2**20)", "[0] * 10**8", "10 ** (3 * 10**8) if 0 else 1 << 10**9"])
def test_a_block_beyond_its_share_ends_the_process_with_a_signal_of_its_own(code: str, tmp_path: Path) -> None:
    assert run(code, tmp_path).returncode == -31  # SIGSYS


def test_memory_that_ran_out_is_seen_afterwards(tmp_path: Path) -> None:
    fill = "with contextlib.suppress(MemoryError): [bytearray(2**20) for _ in range({n})]\n"
    assert run(fill.format(n=2_000) + "print(watch.is_exhausted())", tmp_path).stdout == "True\n"
    assert run(fill.format(n=100) + "print(watch.is_exhausted())", tmp_path).stdout == "False\n"


def test_the_kernel_ends_what_its_parent_has_forgotten(tmp_path: Path) -> None:
    code = "confinement.CPU_SLACK_S = 0; confinement.allow_cpu(1.0)\nwhile True: pass"
    assert run(code, tmp_path).returncode == -24  # SIGXCPU
