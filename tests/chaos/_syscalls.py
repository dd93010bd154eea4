"""Fault injection into the system calls of a forked process: kill it at the n-th call on a file, or let the call fail.

The kernel reports every watched call to the parent before it runs (a seccomp filter with SECCOMP_RET_USER_NOTIF, see
seccomp_unotify(2)). Calls of all threads are counted in the order in which they begin; only calls on files in one
directory count.
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
"""Reports to the parent what the product answered to its caller, and must hold from then on"""

LIMIT_S = 60.0

# Numbers from asm/unistd_64.h. The file is the first argument, a descriptor, or (directory, path) arguments.
_BY_DESCRIPTOR = {
    1: "write", 18: "pwrite64", 20: "writev", 296: "pwritev", 328: "pwritev2", 74: "fsync", 75: "fdatasync",
}  # fmt: skip
_BY_PATH: dict[int, tuple[str, tuple[tuple[int | None, int], ...]]] = {
    82: ("rename", ((None, 0), (None, 1))), 264: ("renameat", ((0, 1), (2, 3))), 316: ("renameat2", ((0, 1), (2, 3))),
    86: ("link", ((None, 0), (None, 1))), 265: ("linkat", ((0, 1), (2, 3))),
    87: ("unlink", ((None, 0),)), 263: ("unlinkat", ((0, 1),)), 84: ("rmdir", ((None, 0),)),
    83: ("mkdir", ((None, 0),)), 258: ("mkdirat", ((0, 1),)),
}  # fmt: skip

# From linux/seccomp.h, linux/filter.h and linux/prctl.h, without a dependency on libseccomp.
_SYS_SECCOMP, _SET_MODE_FILTER, _NEW_LISTENER, _NO_NEW_PRIVS = 317, 1, 8, 38
_ALLOW, _NOTIFY, _CONTINUE = 0x7FFF0000, 0x7FC00000, 1
_LOAD_NUMBER, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_RECEIVE, _SEND = 0xC0502100, 0xC0182101
_NOTIFICATION, _REPLY = struct.Struct("=QIIiIQ6Q"), struct.Struct("=QqiI")
_AT_FDCWD = -100


class Fault(StrEnum):
    """A fault in one call, or with FULL_DISK in that call and all later ones that need disk space."""

    KILL = "kill"
    ENOSPC = "ENOSPC"
    EIO = "EIO"
    FULL_DISK = "full disk"


@dataclass(frozen=True)
class Call:
    """A call on files; `paths` are relative to the watched directory."""

    name: str
    paths: tuple[str, ...]

    @property
    def needs_room(self) -> bool:
        """Whether the call needs disk space."""
        return self.name.startswith(("write", "pwrite", "mkdir", "link"))

    def __str__(self) -> str:
        return f"{self.name}({', '.join(self.paths)})"


ANSWERED = Call("answer", ())
"""Marks the answer among the calls"""


@dataclass
class Run:
    """Calls and outcome of a watched process."""

    calls: list[Call] = field(default_factory=list)
    hit: Call | None = None
    """The first call with the fault"""
    answer: Any = None
    error: str | None = None
    """The exception, if the process did not answer"""
    killed: bool = False
    """The process neither answered nor raised"""


def why_unsupported() -> str | None:
    """Why processes cannot be watched on this machine; None if they can."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return "system calls are watched on Linux on x86-64 only"
    try:
        watch(lambda answer: answer(True), Path("/nowhere"))
    except OSError as error:
        return f"the kernel does not let system calls be watched (seccomp user notification): {error}"
    return None


def watch(act: Callable[[Answer], None], directory: Path, fault: Fault | None = None, at: int = 0) -> Run:
    """Runs `act` in a fork and records its calls on files in `directory`; the `at`-th call, from 1, gets the fault.

    A fork that does not end within `LIMIT_S` is killed.

    Raises:
        OSError: the kernel does not allow it.
    """
    control, child_control = socket.socketpair()
    results, child_results = os.pipe()
    pid = _fork(lambda: _run_watched(act, child_control, child_results))
    os.close(child_results)
    child_control.close()
    try:
        number, listeners, *_ = socket.recv_fds(control, 4, 1)
        if not listeners:
            code = int.from_bytes(number, "little")
            raise OSError(code, os.strerror(code))
        run = Run()
        try:
            results_pipe = _link(os.getpid(), f"fd/{results}")
            _answer_notifications(listeners[0], pid, run, str(directory.resolve()), results_pipe, fault, at)
        finally:
            os.close(listeners[0])
        for line in _read_all(results).splitlines():
            for name, value in json.loads(line).items():
                setattr(run, name, value)
        run.killed = run.answer is None and run.error is None
        return run
    finally:
        os.close(results)
        control.close()
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def in_fork(function: Callable[[], Any]) -> Any:
    """The result of `function` in a forked process, as JSON: the caller stays without threads and open files.

    Raises:
        RuntimeError: the function raised, or its process died.
    """
    results, child_results = os.pipe()

    def run() -> None:
        try:
            message = {"value": function()}
        except BaseException:
            message = {"error": traceback.format_exc()}
        _write_all(child_results, json.dumps(message).encode())

    pid = _fork(run)
    os.close(child_results)
    content = _read_all(results)
    os.close(results)
    _, status = os.waitpid(pid, 0)
    if not content:
        raise RuntimeError(f"the process ended with status {status} and without a result")
    message = json.loads(content)
    if "error" in message:
        raise RuntimeError(message["error"])
    return message["value"]


def _fork(run: Callable[[], object]) -> int:
    # A lock that another thread holds would stay locked in the child.
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a process with threads cannot be forked safely"
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    _run_and_exit(run)


def _run_and_exit(run: Callable[[], object]) -> NoReturn:
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # only the parent may print
        run()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def _run_watched(act: Callable[[Answer], None], control: socket.socket, results: int) -> None:
    """Sends the listener of this process's calls over `control`, runs `act`, and writes its outcome to `results`."""
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
        _write_all(results, json.dumps({"answer": value}).encode() + b"\n")

    try:
        act(answer)
    except BaseException as error:
        if not answered:
            _write_all(results, json.dumps({"error": f"{type(error).__name__}: {error}"}).encode() + b"\n")


def _listen() -> tuple[int, int]:
    """A descriptor that reports this process's calls, and errno; the descriptor is -1 if the kernel refuses."""
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


def _answer_notifications(
    listener: int, pid: int, run: Run, root: str, results_pipe: str, fault: Fault | None, at: int
) -> None:
    """Records the process's calls and lets them pass, except those with the fault, until the process has ended."""
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
            return  # no process with the filter is left
        content = bytearray(_NOTIFICATION.size)
        try:
            fcntl.ioctl(listener, _RECEIVE, content)
        except OSError as error:
            if error.errno == errno.ENOENT:
                continue  # the thread has died
            raise
        identity, thread, _, number, _, _, *arguments = _NOTIFICATION.unpack(content)
        paths = _paths(thread, number, arguments)
        reply = _REPLY.pack(identity, 0, 0, _CONTINUE)
        if paths == (results_pipe,):
            run.calls.append(ANSWERED)
        elif call := _call_in(root, _name(number), paths):
            run.calls.append(call)
            if fault and _hits(fault, at, run.calls):
                run.hit = run.hit or call
                if fault is Fault.KILL:
                    os.kill(pid, signal.SIGKILL)
                    continue
                reply = _REPLY.pack(identity, 0, -errno.EIO if fault is Fault.EIO else -errno.ENOSPC, 0)
        with suppress(FileNotFoundError):  # ENOENT: the thread has died
            fcntl.ioctl(listener, _SEND, reply)


def _hits(fault: Fault, at: int, calls: list[Call]) -> bool:
    """Whether the last of the calls gets the fault."""
    number = sum(call is not ANSWERED for call in calls)
    if fault is Fault.FULL_DISK:
        return number >= at and calls[-1].needs_room
    return number == at


def _name(number: int) -> str:
    return _BY_DESCRIPTOR.get(number) or _BY_PATH[number][0]


def _call_in(root: str, name: str, paths: tuple[str, ...]) -> Call | None:
    """The call, if it changes or flushes files in `root`."""
    if not any(f"{path}/".startswith(f"{root}/") for path in paths):
        return None
    if name.startswith("mkdir") and Path(paths[0]).exists():
        return None
    return Call(name, tuple(os.path.relpath(path, root) for path in paths))


def _paths(thread: int, number: int, arguments: list[int]) -> tuple[str, ...]:
    """The absolute paths of a call's files."""
    if number in _BY_DESCRIPTOR:
        return (_link(thread, f"fd/{ctypes.c_int(arguments[0]).value}"),)
    paths = []
    for directory, path in _BY_PATH[number][1]:
        descriptor = _AT_FDCWD if directory is None else ctypes.c_int(arguments[directory]).value
        base = _link(thread, "cwd" if descriptor == _AT_FDCWD else f"fd/{descriptor}")
        paths.append(os.path.normpath(os.path.join(base, _text(thread, arguments[path]))))  # noqa: PTH118
    return tuple(paths)


def _link(thread: int, name: str) -> str:
    """The target of a link in the thread's /proc directory."""
    try:
        return str(Path(f"/proc/{thread}/{name}").readlink())
    except FileNotFoundError:
        return ""  # a descriptor that is not open


def _text(thread: int, address: int) -> str:
    """The path at this address in the thread's memory."""
    with open(f"/proc/{thread}/mem", "rb", buffering=0) as memory:  # noqa: PTH123
        memory.seek(address)
        return os.fsdecode(memory.read(os.pathconf("/", "PC_PATH_MAX")).split(b"\0", 1)[0])


def _read_all(descriptor: int) -> bytes:
    with open(descriptor, "rb", closefd=False) as file:
        return file.read()


def _write_all(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]
