"""The processes of one sandboxed program: the warden, the judge, and the program itself.

    loratune ── warden ── judge ── program (and whatever it starts)
                           walls around these

The *warden* stands outside: it sets the walls up, watches the clock and the output, and ends everything. The *judge* is
the first process inside; it runs the test code and calls the program's function through a pipe. The *program* answers
calls; it holds neither the tests nor a way to the verdict, which only the judge sends and only the warden reads.

Started by `runner.py` without site-packages, so: the standard library and its three sibling files only.
"""

import contextlib
import os
import resource
import select
import signal
import stat
import sys
import time
from typing import Any, NoReturn

from loratune.downstream.sandbox import walls as walls
from loratune.downstream.sandbox.system_calls import seccomp
from loratune.downstream.sandbox.values import NotPlainError, decode, encode, receive, send

CALLS, ANSWERS = 3, 4  # the program's ends of its two pipes to the judge
FIRST_USER = 1 << 30  # under root a program gets a user of its own: this + the warden's process id


class ProgramError(Exception):
    """What the program did instead of returning a value. `kind` is the verdict's."""

    def __init__(self, kind: str, why: str) -> None:
        super().__init__(why)
        self.kind = kind


def warden() -> NoReturn:
    """Read the order from standard input, have it carried out, write what happened to standard output."""
    walls.prctl(walls.PR_SET_PDEATHSIG, signal.SIGKILL)  # loratune killed: everything below goes too
    order, program = receive(0), receive(0)
    limits, user = order["limits"], FIRST_USER + os.getpid()
    sys.path += order["packages"]
    crowd = 0 if order["namespaces"] or os.geteuid() == 0 else walls.tasks_of_user()
    try:
        if order["namespaces"]:
            walls.enter_namespaces(
                order["readable"], owner=user if os.geteuid() == 0 else os.geteuid(), scratch_bytes=limits["scratch_bytes"]
            )
        else:
            walls.prctl(walls.PR_SET_CHILD_SUBREAPER, 1)
            os.chdir(order["scratch"])
            if os.geteuid() == 0:
                os.chown(order["scratch"], user, user)
    except OSError as error:
        send(1, {"kind": "setup", "why": str(error)})
        os._exit(0)
    output, output_end = os.pipe()
    verdict, verdict_end = os.pipe()
    judge = os.fork()
    if judge == 0:
        try:
            os.close(output)
            os.close(verdict)
            _judge(order, program, user, crowd, output_end, verdict_end)
        except BaseException as error:  # a wall that could not be built; no program ran
            send(verdict_end, {"kind": "setup", "why": f"{type(error).__name__}: {error}"})
        finally:
            os._exit(0)
    walls.prctl(walls.PR_SET_DUMPABLE, 0)
    os.close(output_end)
    os.close(verdict_end)
    began = time.monotonic()
    ran = _watch(output, verdict, began + limits["timeout"], limits, "" if order["namespaces"] else order["scratch"], user)
    ran["seconds"] = time.monotonic() - began
    with contextlib.suppress(ProcessLookupError):
        os.kill(judge, signal.SIGKILL)  # inside a PID namespace: ends every process in it
    if not order["namespaces"]:
        _end_descendants(user)
    os.waitpid(judge, 0) if order["namespaces"] else None  # returns when the namespace is empty
    send(1, ran)
    os._exit(0)


def _watch(output: int, verdict: int, deadline: float, limits: dict[str, Any], scratch: str, user: int) -> dict[str, Any]:
    """Drain the output and wait for the verdict, the end of time, or too much output.

    scratch: a folder on the disk, of which nothing but a look now and then limits the total; "" for one in memory.
    """
    printed, said, open_ends, look = 0, b"", [output, verdict], 0.0
    while verdict in open_ends:
        now = time.monotonic()
        if now > deadline:
            return {"kind": "timeout", "why": "not done in time"}
        if scratch and now > look:
            if _used(scratch, limits["scratch_bytes"]) + _nameless(user) > limits["scratch_bytes"]:
                return {"kind": "output", "why": f"wrote more than {limits['scratch_bytes']} bytes"}
            look = time.monotonic() + 0.1
        ready, _, _ = select.select(open_ends, [], [], min(deadline - now, 0.1) if scratch else deadline - now)
        for pipe in ready:
            piece = os.read(pipe, 1 << 16)
            if not piece:
                open_ends.remove(pipe)
            elif pipe == output:
                printed += len(piece)
            else:
                said += piece
        if printed > limits["output_bytes"]:
            return {"kind": "output", "why": f"printed more than {limits['output_bytes']} bytes"}
    source, sink = os.pipe()
    os.write(sink, said[:65536])
    os.close(sink)
    try:
        return dict(receive(source))
    except EOFError:
        return {"kind": "killed", "why": "the judge was killed"}


def _used(folder: str, enough: int) -> int:
    """Bytes on disk below `folder`, an empty file counted as 4 KiB; stops counting beyond `enough`."""
    used = 0
    for place, folders, files in os.walk(folder):
        for name in [*folders, *files]:
            with contextlib.suppress(OSError):
                used += max(4096, os.lstat(os.path.join(place, name)).st_blocks * 512)
        if used > enough:
            break
    return used


def _nameless(user: int) -> int:
    """Bytes of the files that descendants hold open and no folder names any more: on a file system in memory, memory without a limit."""
    sizes: dict[tuple[int, int], int] = {}
    with walls.acting_as(user):  # a root without CAP_SYS_PTRACE, as in containers, may not look either
        for process in _children():
            with contextlib.suppress(OSError):
                for thread in os.listdir(f"/proc/{process}/task"):
                    for name in os.listdir(f"/proc/{process}/task/{thread}/fd"):
                        with contextlib.suppress(OSError):
                            found = os.stat(f"/proc/{process}/task/{thread}/fd/{name}")
                            if stat.S_ISREG(found.st_mode) and not found.st_nlink:
                                sizes[found.st_dev, found.st_ino] = found.st_blocks * 512
    return sum(sizes.values())


def _end_descendants(user: int) -> None:
    """Without a PID namespace: kill whatever the program started, orphans included (they become children of the warden)."""
    if os.geteuid() == 0:
        killer = os.fork()
        if killer == 0:
            os.setresuid(user, user, user)
            with contextlib.suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)  # all of that user's processes at one stroke
            os._exit(0)
    while True:
        for process in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.001)


def _children() -> list[int]:
    """The living descendants of this process, nearest first."""
    parents: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as file:
                state, parent = file.read().rpartition(")")[2].split()[:2]
                if state not in "ZX":
                    parents.setdefault(int(parent), []).append(int(name))
    found = [os.getpid()]
    for process in found:
        found += parents.get(process, [])
    return found[1:]


def _judge(order: dict[str, Any], program: str, user: int, crowd: int, output: int, verdict: int) -> None:
    """Build the inner walls, start the program behind them, run the test code, send the verdict."""
    limits = order["limits"]
    os.setsid()
    os.umask(0o077)
    nothing = os.open("/dev/null", os.O_RDWR)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    walls.limit_resources(limits)
    confined = not order["namespaces"] and walls.landlock(order["readable"], order["scratch"]) > 0
    walls.drop_privileges(user, keep_reading=confined)
    os.listdir(os.path.dirname(os.__file__))  # else every import would fail, and with it good programs
    walls.prctl(walls.PR_SET_PDEATHSIG, signal.SIGKILL)  # after the change of user, which clears it
    walls.prctl(walls.PR_SET_DUMPABLE, 0)  # nobody of the same user traces this process or reads its memory
    seccomp(alone=order["namespaces"])
    calls, calls_end = os.pipe()
    answers, answers_end = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            for source in (nothing, output, calls, answers_end):  # out of the way of the numbers they get
                os.dup2(source, source + 32)
            for source, number in ((nothing, 0), (output, 1), (output, 2), (calls, CALLS), (answers_end, ANSWERS)):
                os.dup2(source + 32, number)
            os.closerange(ANSWERS + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
            if confined:
                walls.prctl(walls.PR_SET_DUMPABLE, 1)  # the warden sees its open files; its neighbours, behind Landlock, see nothing
            walls.limit_processes(crowd + limits["processes"])
            _serve(program, order["entry_point"])
        finally:
            os._exit(0)
    for pipe in (output, calls, answers_end):
        os.close(pipe)
    tests = receive(0)  # only now: the program's memory never held them
    ended: list[int] = []

    def alive() -> bool:
        if not ended:
            done, status = os.waitpid(process, os.WNOHANG)
            ended.extend([status] if done else [])
        return not ended

    def ask(message: Any) -> Any:
        try:
            send(calls_end, message)
            kind, value = receive(answers, alive=alive)
        except (EOFError, BrokenPipeError):
            raise ProgramError(*_how_it_ended(ended, alive)) from None
        except (NotPlainError, TypeError, ValueError, RecursionError):
            raise ProgramError("failed", "answered with no plain value") from None
        if kind == "value":
            try:
                return decode(value)
            except RecursionError:
                raise ProgramError("failed", "answered with a value nested too deep") from None
        raise ProgramError("memory" if kind == "memory" else "failed", str(value))

    def candidate(*values: Any, **named: Any) -> Any:
        return ask([encode(values), encode(named)])

    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    result = {"kind": "ok", "why": ""}
    try:
        ask(None)  # the program's own text has run
        exec(compile(tests, "<tests>", "exec"), {"__name__": "tests", "candidate": candidate})
    except ProgramError as error:
        result = {"kind": error.kind, "why": str(error)}
    except BaseException as error:
        result = {"kind": "failed", "why": f"{type(error).__name__}: {error}"}
    result["why"] = "".join(letter if letter.isprintable() else " " for letter in result["why"][:300]).rstrip(" :")
    send(verdict, result)
    os._exit(0)


def _how_it_ended(ended: list[int], alive: Any) -> tuple[str, str]:
    """Kind and reason when the program stopped answering."""
    for _ in range(20):
        if not alive():
            break
        time.sleep(0.01)
    else:
        return "failed", "closed its channel to the judge"
    if not os.WIFSIGNALED(ended[0]):
        return "failed", f"ended by itself (exit status {os.waitstatus_to_exitcode(ended[0])})"
    number = os.WTERMSIG(ended[0])
    if number == signal.SIGXCPU:
        return "timeout", "used up its CPU time"
    return "killed", f"ended by {signal.Signals(number).name}"


def _serve(program: str, entry_point: str) -> None:
    """The program's process: run its text, then answer calls of its function until killed."""
    for name in [name for name in sys.modules if name.startswith("loratune")]:
        del sys.modules[name]
    sys.argv = ["program"]
    space: dict[str, Any] = {"__name__": "program"}
    running = False
    while True:
        message = receive(CALLS)
        try:
            if running:
                values, named = map(decode, message)
                answer = ["value", encode(space[entry_point](*values, **named))]
            else:
                exec(compile(program, "<program>", "exec"), space)
                if not callable(space.get(entry_point)):
                    raise NameError(f"the program defines no function {entry_point!r}")
                running, answer = True, ["value", None]
        except MemoryError:
            answer = ["memory", "ran out of its memory"]
        except BaseException as error:  # SystemExit too: leaving is not passing
            answer = ["raised", f"{type(error).__name__}: {error}"[:300]]
        send(ANSWERS, answer)
