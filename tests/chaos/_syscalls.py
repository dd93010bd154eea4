"""A forked process whose system calls on files are counted, and of which one can be made its last, or fail.

The kernel hands every call of the set to the parent before it is carried out (a seccomp filter with
SECCOMP_RET_USER_NOTIF, see seccomp_unotify(2)). So calls are counted over all threads in the order in which they begin,
and only those on files in one directory count.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import platform
import select
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, NoReturn

Answer = Callable[[Any], None]
"""Tells the parent what the caller was told: from then on it must be true."""

LIMIT_S = 60.0

# From asm/unistd_64.h; and where in its arguments a call has its file: a descriptor, or (directory, path) pairs.
_BY_DESCRIPTOR = {
    1: "write", 18: "pwrite64", 20: "writev", 296: "pwritev", 328: "pwritev2", 74: "fsync", 75: "fdatasync",
}  # fmt: skip
_BY_PATH: dict[int, tuple[str, tuple[tuple[int | None, int], ...]]] = {
    82: ("rename", ((None, 0), (None, 1))), 264: ("renameat", ((0, 1), (2, 3))), 316: ("renameat2", ((0, 1), (2, 3))),
    86: ("link", ((None, 0), (None, 1))), 265: ("linkat", ((0, 1), (2, 3))),
    87: ("unlink", ((None, 0),)), 263: ("unlinkat", ((0, 1),)), 84: ("rmdir", ((None, 0),)),
    83: ("mkdir", ((None, 0),)), 258: ("mkdirat", ((0, 1),)),
}  # fmt: skip

# linux/seccomp.h, linux/filter.h, linux/prctl.h; libseccomp is not needed for so little.
_SYS_SECCOMP, _SET_MODE_FILTER, _NEW_LISTENER, _NO_NEW_PRIVS = 317, 1, 8, 38
_ALLOW, _NOTIFY, _CONTINUE = 0x7FFF0000, 0x7FC00000, 1
_LOAD_NUMBER, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_NOTIFICATION, _REPLY = struct.Struct("=QIIiIQ6Q"), struct.Struct("=QqiI")
_AT_FDCWD = -100


class Fault(StrEnum):
    """What befalls one call; or, with a full disk, that call and all after it that need room."""

    KILL = "kill"
    ENOSPC = "ENOSPC"
    EIO = "EIO"
    FULL_DISK = "full disk"


@dataclass(frozen=True)
class Call:
    """A call as it begins; `paths` are relative to the watched directory."""

    name: str
    paths: tuple[str, ...]

    @property
    def needs_room(self) -> bool:
        """Whether it takes up room on a disk."""
        return self.name.startswith(("write", "pwrite", "mkdir", "link"))

    def __str__(self) -> str:
        return f"{self.name}({', '.join(self.paths)})"


ANSWERED = Call("answer", ())
"""Stands in the calls where the answer was given."""


@dataclass
class Run:
    """How a process went."""

    calls: list[Call] = field(default_factory=list)
    hit: Call | None = None
    """The first call that the fault befell"""
    answer: Any = None
    error: str | None = None
    """What it raised, if it did not answer"""
    killed: bool = False
    """Before it answered or raised"""


def why_not() -> str | None:
    """Why processes cannot be watched here; None where they can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "system calls are watched on Linux on x86-64 only"
    try:
        watch(lambda answer: answer(True), Path("/nowhere"))
    except OSError as error:
        return f"the kernel does not let system calls be watched (seccomp user notification): {error}"
    return None


def watch(act: Callable[[Answer], None], directory: Path, fault: Fault | None = None, at: int = 0) -> Run:
    """Run `act` in a fork whose calls on files in `directory` are recorded; the fault befalls the `at`-th, from 1.

    One that does not end within a minute is killed, fault or not.

    Raises:
        OSError: the kernel does not allow it.
    """
    control, theirs = socket.socketpair()
    told, tell = os.pipe()
    pid = _fork(lambda: _watched(act, theirs, tell))
    os.close(tell)
    theirs.close()
    try:
        number, listeners, *_ = socket.recv_fds(control, 4, 1)
        if not listeners:
            code = int.from_bytes(number, "little")
            raise OSError(code, os.strerror(code))
        run = Run()
        try:
            _attend(listeners[0], pid, run, str(directory.resolve()), _link(os.getpid(), f"fd/{told}"), fault, at)
        finally:
            os.close(listeners[0])
        for line in _read_all(told).splitlines():
            for name, value in json.loads(line).items():
                setattr(run, name, value)
        run.killed = run.answer is None and run.error is None
        return run
    finally:
        os.close(told)
        control.close()
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def in_fork(function: Callable[[], Any]) -> Any:
    """What `function` returns, as JSON, from a process of its own: the caller stays without threads and open files.

    Raises:
        RuntimeError: it raised, or died.
    """
    told, tell = os.pipe()

    def run() -> None:
        try:
            message = {"value": function()}
        except BaseException:
            message = {"error": traceback.format_exc()}
        _write_all(tell, json.dumps(message).encode())

    pid = _fork(run)
    os.close(tell)
    content = _read_all(told)
    os.close(told)
    _, status = os.waitpid(pid, 0)
    if not content:
        raise RuntimeError(f"the process ended with status {status} and said nothing")
    message = json.loads(content)
    if "error" in message:
        raise RuntimeError(message["error"])
    return message["value"]


def _fork(run: Callable[[], object]) -> int:
    # A lock that a thread holds stays locked in the child for ever.
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a process with threads cannot be forked safely"
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    _end_after(run)


def _end_after(run: Callable[[], object]) -> NoReturn:
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the parent's reader wants the parent's lines only
        run()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _watched(act: Callable[[Answer], None], control: socket.socket, tell: int) -> None:
    listener, code = _listen()
    socket.send_fds(control, [code.to_bytes(4, "little")], [listener] if listener >= 0 else [])
    control.close()
    if listener < 0:
        return
    os.close(listener)
    answered = False

    def answer(value: Any) -> None:
        nonlocal answered
        answered = True
        _write_all(tell, json.dumps({"answer": value}).encode() + b"\n")

    try:
        act(answer)
    except BaseException as error:
        if not answered:
            _write_all(tell, json.dumps({"error": f"{type(error).__name__}: {error}"}).encode() + b"\n")


def _listen() -> tuple[int, int]:
    """A descriptor from which this process's calls are read, or -1 and the error's number."""
    numbers = [*_BY_DESCRIPTOR, *_BY_PATH]
    code = struct.pack("=HBBI", _LOAD_NUMBER, 0, 0, 0)
    for index, number in enumerate(numbers):
        code += struct.pack("=HBBI", _EQUAL, len(numbers) - index, 0, number)
    code += struct.pack("=HBBI", _RETURN, 0, 0, _ALLOW) + struct.pack("=HBBI", _RETURN, 0, 0, _NOTIFY)
    instructions = ctypes.create_string_buffer(code, len(code))
    program = ctypes.create_string_buffer(struct.pack("@HP", len(code) // 8, ctypes.addressof(instructions)))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0)
    listener = libc.syscall(_SYS_SECCOMP, _SET_MODE_FILTER, _NEW_LISTENER, program)
    return listener, ctypes.get_errno()


def _attend(listener: int, pid: int, run: Run, root: str, answers: str, fault: Fault | None, at: int) -> None:
    """Let the process's calls pass, but for one, until it has ended."""
    deadline = time.monotonic() + LIMIT_S
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    while True:
        ready = poll.poll(1000)
        if not ready:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
            continue
        if not ready[0][1] & select.POLLIN:
            return  # no process is left that the filter applies to
        content = bytearray(_NOTIFICATION.size)
        try:
            fcntl.ioctl(listener, _RECEIVE, content)
        except OSError as error:
            if error.errno == errno.ENOENT:
                continue  # the thread died meanwhile
            raise
        identity, thread, _, number, _, _, *arguments = _NOTIFICATION.unpack(content)
        paths = _paths(thread, number, arguments)
        reply = _REPLY.pack(identity, 0, 0, _CONTINUE)
        if paths == (answers,):
            run.calls.append(ANSWERED)
        elif call := _call_in(root, _name(number), paths):
            run.calls.append(call)
            if fault and _befalls(fault, at, run.calls):
                run.hit = run.hit or call
                if fault is Fault.KILL:
                    os.kill(pid, signal.SIGKILL)
                    continue
                reply = _REPLY.pack(identity, 0, -errno.EIO if fault is Fault.EIO else -errno.ENOSPC, 0)
        with suppress(FileNotFoundError):  # ENOENT: the thread died meanwhile
            fcntl.ioctl(listener, _SEND, reply)


def _befalls(fault: Fault, at: int, calls: list[Call]) -> bool:
    """Whether the last of the calls is one that the fault befalls."""
    number = sum(call is not ANSWERED for call in calls)
    if fault is Fault.FULL_DISK:
        return number >= at and calls[-1].needs_room
    return number == at


def _name(number: int) -> str:
    return _BY_DESCRIPTOR.get(number) or _BY_PATH[number][0]


def _call_in(root: str, name: str, paths: tuple[str, ...]) -> Call | None:
    """The call, if it is about files in `root` and does something."""
    if not any(f"{path}/".startswith(f"{root}/") for path in paths):
        return None
    if name.startswith("mkdir") and Path(paths[0]).exists():
        return None
    return Call(name, tuple(os.path.relpath(path, root) for path in paths))


def _paths(thread: int, number: int, arguments: list[int]) -> tuple[str, ...]:
    """The absolute paths of the files that a call is about."""
    if number in _BY_DESCRIPTOR:
        return (_link(thread, f"fd/{ctypes.c_int(arguments[0]).value}"),)
    found = []
    for directory, path in _BY_PATH[number][1]:
        descriptor = _AT_FDCWD if directory is None else ctypes.c_int(arguments[directory]).value
        base = _link(thread, "cwd" if descriptor == _AT_FDCWD else f"fd/{descriptor}")
        found.append(os.path.normpath(os.path.join(base, _text(thread, arguments[path]))))  # noqa: PTH118
    return tuple(found)


def _link(thread: int, name: str) -> str:
    try:
        return str(Path(f"/proc/{thread}/{name}").readlink())
    except FileNotFoundError:
        return ""  # a descriptor that is not open


def _text(thread: int, address: int) -> str:
    with open(f"/proc/{thread}/mem", "rb", buffering=0) as memory:  # noqa: PTH123
        memory.seek(address)
        return os.fsdecode(memory.read(os.pathconf("/", "PC_PATH_MAX")).split(b"\0", 1)[0])


def _read_all(descriptor: int) -> bytes:
    with open(descriptor, "rb", closefd=False) as file:
        return file.read()


def _write_all(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]
