"""The seccomp filter, call by call, on both processors, whichever this machine has."""

import struct

import pytest

from loratune.downstream.sandbox.system_calls import AUDIT_ARCH, _filter


def answer(machine: str, alone: bool, number: int, *arguments: int, arch: int | None = None) -> int | str:
    """What the kernel would do with the call: "allow", "kill", or the errno. Interprets the filter as linux/filter.h says."""
    data = struct.pack("=iIQ6Q", number, AUDIT_ARCH[machine] if arch is None else arch, 0, *(*arguments, 0, 0, 0, 0, 0, 0)[:6])
    code, place, held = _filter(machine, alone), 0, 0
    assert len(code) < 4096  # the kernel's limit
    while True:
        opcode, true, false, value = code[place]
        assert max(true, false) < 256
        place += 1
        match opcode:
            case 0x20:
                (held,) = struct.unpack_from("=I", data, value)
            case 0x15 | 0x35 | 0x45:
                holds = {0x15: held == value, 0x35: held >= value, 0x45: bool(held & value)}[opcode]
                place += true if holds else false
            case 0x06:
                return {0x7FFF0000: "allow", 0x80000000: "kill"}.get(value, value & 0xFFFF)
            case _:
                raise AssertionError(f"no such instruction: {opcode:#x}")


@pytest.mark.parametrize("machine", AUDIT_ARCH)
@pytest.mark.parametrize("alone", [True, False])
def test_what_the_filter_answers(machine: str, alone: bool) -> None:
    """On both processors, whichever this machine has. Numbers: asm/unistd_64.h, asm-generic/unistd.h."""
    column = list(AUDIT_ARCH).index(machine)
    allow, eperm, enotty, enosys = "allow", 1, 25, 38
    for numbers, arguments, expected in (
        ((0, 63), (), allow),  # read
        ((302, 261), (0, 3), allow),  # prlimit64 of the caller
        ((302, 261), (77, 0, 1), eperm),  # of another
        ((302, 261), (1 << 32, 0, 1), allow),  # the kernel reads the lower half
        ((319, 279), (), eperm),  # memfd_create
        ((41, 198), (1, 1), eperm),  # socket
        ((53, 199), (1, 1), allow),  # socketpair, AF_UNIX
        ((53, 199), (2, 1), eperm),
        ((72, 25), (3, 1), allow),  # fcntl F_GETFD
        ((72, 25), (3, 8, 77), eperm),  # F_SETOWN
        ((72, 25), (3, 1024), eperm),  # F_SETLEASE
        ((16, 29), (3, 0x5421), allow),  # ioctl FIONBIO
        ((16, 29), (3, 0x8901), enotty),  # FIOSETOWN
        ((157, 167), (4, 1), allow),  # prctl PR_SET_DUMPABLE 1
        ((157, 167), (4, 0), eperm),
        ((157, 167), (62, 2, 77), eperm),  # PR_SCHED_CORE
        ((56, 220), (17,), allow),  # clone, as fork does
        ((56, 220), (0x10000000 | 17,), eperm),  # CLONE_NEWUSER
        ((435, 435), (), enosys),  # clone3
        ((425, 425), (), enosys),  # io_uring_setup
        ((9999, 9999), (), enosys),  # of a kernel to come
        ((62, 129), (77, 9), allow if alone else eperm),  # kill
        ((91, 52), (), allow if alone else 0),  # fchmod
        ((76, 45), (), allow if alone else eperm),  # truncate
        ((134, 180), (), eperm),  # uselib, mq_open
    ):
        assert answer(machine, alone, numbers[column], *arguments) == expected, (numbers, arguments)
    assert answer(machine, alone, 0x40000000 + 302, 0) == eperm  # x32
    assert answer(machine, alone, 0, arch=0x40000003) == "kill"  # 32-bit calls have other numbers
