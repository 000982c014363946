"""Signals: a command ends when it is asked to, wherever it is stuck, and `--json` prints one object at each of its ends."""

import json
import signal
import subprocess
import sys
from typing import Any

import pytest

# A command that prints "ready" on standard error, then does `work`.
COMMAND = """
import ctypes, os, signal, sys, time
from loratune.cli import interrupt, main
import loratune.cli.schema as command
def ready():
    print("ready", file=sys.stderr, flush=True)
def work(args):
{work}
command.main = work
sys.exit(main(["schema", *sys.argv[1:]]))
"""
SAMPLER = """
    with interrupt.Interrupt(patience={patience}):
        ready()
        while True:
            sum(range(1000))
"""
# What a database's library does: it waits in C, without the interpreter's lock, and comes back to no handler in Python.
LIBRARY = """
    with interrupt.Interrupt(patience={patience}):
        c, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
        c.pthread_mutex_lock(mutex)
        ready()
        c.pthread_mutex_lock(mutex)
"""
# asyncio, where it handles signals itself, takes the place of whoever listened, and leaves it empty.
TAKEN = """
    import asyncio
    async def once():
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, ready)
    with interrupt.Interrupt(patience={patience}):
        asyncio.run(once())
        ready()
        while True:
            sum(range(1000))
"""
LOADING = """
    ready()
    time.sleep(60)
"""
CLEANING = """
    try:
        ready()
        time.sleep(60)
    finally:
        ready()
        time.sleep(60)
"""


def ended(work: str, signals: list[int], *flags: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of the command, to which each signal is sent when it has spoken."""
    code = COMMAND.format(work=work.strip("\n"))
    process = subprocess.Popen(
        [sys.executable, "-c", code, *flags], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    words = ""
    try:
        assert process.stderr is not None
        for number in signals:
            words += process.stderr.readline()
            process.send_signal(number)
        out, err = process.communicate(timeout=20)
    finally:
        process.kill()
    return process.returncode, out, words + err


def error(out: str) -> dict[str, Any]:
    return dict(json.loads(out)["error"])


@pytest.mark.parametrize(
    ("work", "signals"),
    [
        (SAMPLER.format(patience=0.3), [signal.SIGTERM]),
        (SAMPLER.format(patience=60), [signal.SIGTERM, signal.SIGTERM]),
        (SAMPLER.format(patience=60), [signal.SIGINT, signal.SIGTERM]),
        (LIBRARY.format(patience=0.3), [signal.SIGTERM]),
        (LIBRARY.format(patience=60), [signal.SIGTERM, signal.SIGTERM]),
        (TAKEN.format(patience=0.3), [signal.SIGTERM]),
        (LOADING, [signal.SIGTERM]),
        (LOADING, [signal.SIGINT]),
        (CLEANING, [signal.SIGTERM, signal.SIGTERM]),
    ],
    ids=[
        "sampler, time",
        "sampler, twice",
        "sampler, Ctrl-C first",
        "library, time",
        "library, twice",
        "taken",
        "loading",
        "Ctrl-C",
        "cleaning",
    ],
)
def test_a_stuck_command_ends_with_one_object(work: str, signals: list[int]) -> None:
    code, out, err = ended(work, signals, "--json")
    assert code == 130, err
    assert error(out)["kind"] == "Interrupted"
    assert "the same command" in error(out)["message"]
    assert "Traceback" not in err


def test_without_json_the_output_is_for_people() -> None:
    code, out, err = ended(SAMPLER.format(patience=0.3), [signal.SIGTERM])
    assert (code, out) == (130, "Stopping after the running steps. Press Ctrl-C again to stop at once.\n")
    assert "not stopped within 0.3 s; ended at once. Nothing that was computed is lost" in err
    assert ended(LOADING, [signal.SIGTERM])[:2] == (130, "")


def test_a_command_that_stops_in_time_says_how_to_go_on() -> None:
    work = """
    with interrupt.Interrupt() as asked:
        ready()
        asked.stop.wait(20)
    return interrupt.stopped(args)
"""
    code, out, _ = ended(work, [signal.SIGTERM], "--json")
    assert code == 130
    assert error(out) == {"kind": "Interrupted", "message": "Stopped; nothing is lost. To continue: loratune schema --json"}


def test_a_forked_process_has_its_own_signals() -> None:
    """As a library's pool has them: ending such a process must neither fail nor stop the command."""
    work = """
    with interrupt.Interrupt() as asked:
        child = os.fork()
        if not child:
            time.sleep(60)
        os.kill(child, signal.SIGTERM)
        args.facts = {"status": os.waitpid(child, 0)[1], "stop": asked.stop.is_set()}
    return 0
"""
    code, out, err = ended(work, [], "--json")
    assert (code, json.loads(out)) == (0, {"status": signal.SIGTERM, "stop": False}), err
