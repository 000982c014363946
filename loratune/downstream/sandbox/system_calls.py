"""The system calls that an untrusted process may make: a seccomp filter, by name, for x86-64 and AArch64.

A list of what is allowed, not of what is denied, so that a call nobody thought of, or that a later kernel brings, is denied. Left out
are the calls that reach the user's other processes (prlimit64, setpriority, ioprio_set, sched_set*, ptrace, process_vm_*, kcmp,
pidfd_*), memory that no limit counts (memfd_create, shmget, F_SETPIPE_SZ, vmsplice, descriptors in flight by sendmsg), counters that
the user has once for all processes (keys, inotify, POSIX timers, message queues), namespaces, mounts, sockets, and the kernel's large
interfaces (bpf, io_uring, perf_event_open, userfaultfd).

Sources: linux/seccomp.h, linux/filter.h, asm/unistd_64.h, asm-generic/unistd.h.
"""

import ctypes
import os
import platform
import struct

_libc = ctypes.CDLL(None, use_errno=True)

PR_SET_SECCOMP, PR_SET_DUMPABLE = 22, 4
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

Numbers = dict[str, tuple[int | None, int | None]]  # name -> (x86_64, aarch64); None: it does not exist there

ALLOWED: Numbers = {
    "read": (0, 63), "write": (1, 64), "open": (2, None), "openat": (257, 56), "openat2": (437, 437), "close": (3, 57),
    "close_range": (436, 436), "creat": (85, None), "stat": (4, None), "fstat": (5, 80), "lstat": (6, None), "newfstatat": (262, 79),
    "statx": (332, 291), "statfs": (137, 43), "fstatfs": (138, 44), "poll": (7, None), "ppoll": (271, 73), "select": (23, None),
    "pselect6": (270, 72), "lseek": (8, 62), "pread64": (17, 67), "pwrite64": (18, 68), "readv": (19, 65), "writev": (20, 66),
    "preadv": (295, 69), "pwritev": (296, 70), "preadv2": (327, 286), "pwritev2": (328, 287), "access": (21, None),
    "faccessat": (269, 48), "faccessat2": (439, 439), "pipe": (22, None), "pipe2": (293, 59), "dup": (32, 23), "dup2": (33, None),
    "dup3": (292, 24), "epoll_create": (213, None), "epoll_create1": (291, 20), "epoll_ctl": (233, 21), "epoll_wait": (232, None),
    "epoll_pwait": (281, 22), "epoll_pwait2": (441, 441), "eventfd": (284, None), "eventfd2": (290, 19), "timerfd_create": (283, 85),
    "timerfd_settime": (286, 86), "timerfd_gettime": (287, 87), "signalfd": (282, None), "signalfd4": (289, 74), "flock": (73, 32),
    "fsync": (74, 82), "fdatasync": (75, 83), "sync_file_range": (277, 84), "ftruncate": (77, 46), "fallocate": (285, 47),
    "fadvise64": (221, 223), "readahead": (187, 213), "sendfile": (40, 71), "copy_file_range": (326, 285), "getdents": (78, None),
    "getdents64": (217, 61), "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50), "rename": (82, None), "renameat": (264, 38),
    "renameat2": (316, 276), "mkdir": (83, None), "mkdirat": (258, 34), "rmdir": (84, None), "link": (86, None), "linkat": (265, 37),
    "unlink": (87, None), "unlinkat": (263, 35), "symlink": (88, None), "symlinkat": (266, 36), "readlink": (89, None),
    "readlinkat": (267, 78), "mknod": (133, None), "mknodat": (259, 33), "umask": (95, 166), "getxattr": (191, 8), "lgetxattr": (192, 9),
    "fgetxattr": (193, 10), "listxattr": (194, 11), "llistxattr": (195, 12), "flistxattr": (196, 13), "mmap": (9, 222),
    "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214), "mremap": (25, 216), "msync": (26, 227), "mincore": (27, 232),
    "madvise": (28, 233), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132), "pause": (34, None),
    "restart_syscall": (219, 128), "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "gettimeofday": (96, 169), "time": (201, None), "times": (100, 153), "getitimer": (36, 102),
    "setitimer": (38, 103), "alarm": (37, None), "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281),
    "exit": (60, 93), "exit_group": (231, 94), "wait4": (61, 260), "waitid": (247, 95), "set_tid_address": (218, 96),
    "set_robust_list": (273, 99), "futex": (202, 98), "futex_waitv": (449, 449), "rseq": (334, 293), "arch_prctl": (158, None),
    "sched_yield": (24, 124), "getcpu": (309, 168), "sched_getaffinity": (204, 123), "sched_getparam": (143, 121),
    "sched_getscheduler": (145, 120), "sched_get_priority_max": (146, 125), "sched_get_priority_min": (147, 126),
    "getpriority": (140, 141), "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getpgrp": (111, None),
    "getpgid": (121, 155), "setpgid": (109, 154), "getsid": (124, 156), "setsid": (112, 157), "getuid": (102, 174), "geteuid": (107, 175),
    "getgid": (104, 176), "getegid": (108, 177), "getresuid": (118, 148), "getresgid": (120, 150), "getgroups": (115, 158),
    "capget": (125, 90), "getrlimit": (97, 163), "setrlimit": (160, 164), "getrusage": (98, 165), "uname": (63, 160),
    "sysinfo": (99, 179), "getrandom": (318, 278), "sendto": (44, 206), "recvfrom": (45, 207), "shutdown": (48, 210),
    "getsockname": (51, 204), "getpeername": (52, 205), "getsockopt": (55, 209),
}  # fmt: skip
# Only where processes outside have no number: nothing else keeps a signal from the user's other processes on every kernel.
SIGNALLING: Numbers = {"kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131)}
# By path, on whatever this user owns: Landlock does not cover mode, owner and time of a file, nor truncate before version 3.
ATTRIBUTES: Numbers = {
    "chmod": (90, None), "fchmod": (91, 52), "fchmodat": (268, 53), "fchmodat2": (452, 452), "chown": (92, None), "lchown": (94, None),
    "fchown": (93, 55), "fchownat": (260, 54), "utime": (132, None), "utimes": (235, None), "futimesat": (261, None),
    "utimensat": (280, 88),
}  # fmt: skip
TRUNCATE: Numbers = {"truncate": (76, 45)}
FCNTL, IOCTL, PRCTL, PRLIMIT, CLONE, SOCKETPAIR = (72, 25), (16, 29), (157, 167), (302, 261), (56, 220), (53, 199)
CLONE3 = 435
_FIRST_NEW = 424  # numbers from here on are the same everywhere; a C library knows what to do where one is missing

# F_DUPFD to F_SETLKW, F_OFD_*, F_DUPFD_CLOEXEC, F_GETPIPE_SZ. Not F_SETOWN and F_SETSIG, by which a pipe sends any signal to any process
# of the user, F_SETLEASE, which holds up whoever opens the file, nor F_SETPIPE_SZ.
_FCNTL = (*range(8), 36, 37, 38, 1030, 1032)
_IOCTL = (0x5401, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451, 0x802C542A)  # TCGETS, TIOCGWINSZ, FIONREAD, FIONBIO, FIO(N)CLEX, TCGETS2
_PRCTL = (1, 2, 3, 15, 16, 21, 23, 38, 39)  # PDEATHSIG, GET_DUMPABLE, NAME, GET_SECCOMP, CAPBSET_READ, NO_NEW_PRIVS
_CLONE_NEW = 0x7E020000  # every kind of namespace
_AF_UNIX = 1

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # BPF opcodes
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_PRETEND, _EPERM, _ENOTTY, _ENOSYS = _ERRNO, _ERRNO | 1, _ERRNO | 25, _ERRNO | 38  # errno 0: the caller sees success
_Code = list[tuple[int, int, int, int]]


def seccomp(*, alone: bool) -> None:
    """Allow ALLOWED and nothing else, for good, here and in descendants. Raises OSError.

    alone: in namespaces of its own, where signals, and modes and times of files, reach nothing outside. Otherwise signals are denied, and a
    change of a file's mode, owner or times has no effect, though it seems to succeed, for good programs copy files.
    On a processor other than x86-64 and AArch64 nothing is denied where `alone`, and OSError is raised elsewhere.
    """
    machine = platform.machine()
    if machine not in AUDIT_ARCH:
        if not alone:
            raise OSError(38, f"the weaker walls need a list of system calls, and there is none for {machine}")
        return
    code = _filter(machine, alone)
    steps = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in code))
    program = struct.pack("HxxxxxxP", len(code), ctypes.addressof(steps))
    if _libc.prctl(PR_SET_SECCOMP, ctypes.c_ulong(2), ctypes.c_char_p(program), ctypes.c_ulong(0), ctypes.c_ulong(0)):
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp: {os.strerror(number)}")


def _filter(machine: str, alone: bool) -> _Code:
    column = list(AUDIT_ARCH).index(machine)
    code: _Code = [
        (_LOAD, 0, 0, 4),  # seccomp_data.arch
        (_EQUAL, 1, 0, AUDIT_ARCH[machine]),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),  # seccomp_data.nr
        (_AT_LEAST, 0, 1, 0x40000000),  # the x32 numbers of x86-64
        (_RETURN, 0, 0, _EPERM),
    ]

    def rule(number: int | None, answer: _Code) -> None:
        if number is not None:
            code.extend([(_EQUAL, 0, len(answer), number), *answer])

    rule(CLONE3, _answer(_ENOSYS))  # its flags lie behind a pointer; the C library falls back to clone
    rule(FCNTL[column], _one_of(1, _FCNTL, _EPERM))
    rule(IOCTL[column], _one_of(1, _IOCTL, _ENOTTY))
    rule(PRLIMIT[column], _one_of(0, (0,), _EPERM))  # process 0: the caller's own
    rule(SOCKETPAIR[column], _one_of(0, (_AF_UNIX,), _EPERM))  # what asyncio wakes itself with
    # The warden looks at open files, so a process stays readable for it: PR_SET_DUMPABLE 1, never 0.
    dumpable = [(_EQUAL, 0, 3, PR_SET_DUMPABLE), *_argument(1), (_EQUAL, 0, 1, 1), *_answer(_ALLOW)]
    rule(PRCTL[column], [*_one_of(0, _PRCTL, None), *dumpable, *_answer(_EPERM)])
    rule(CLONE[column], [*_argument(0), (_ANY_BIT, 0, 1, _CLONE_NEW), *_answer(_EPERM), *_answer(_ALLOW)])
    for numbers in ATTRIBUTES.values():
        rule(numbers[column], _answer(_ALLOW if alone else _PRETEND))
    for numbers in {**ALLOWED, **(SIGNALLING | TRUNCATE if alone else {})}.values():
        rule(numbers[column], _answer(_ALLOW))
    return [*code, (_AT_LEAST, 0, 1, _FIRST_NEW), *_answer(_ENOSYS), *_answer(_EPERM)]


def _answer(what: int) -> _Code:
    return [(_RETURN, 0, 0, what)]


def _argument(index: int) -> _Code:
    """Load an argument's lower half; the kernel reads no more of those that are asked about here."""
    return [(_LOAD, 0, 0, 16 + 8 * index)]


def _one_of(index: int, values: tuple[int, ...], otherwise: int | None) -> _Code:
    code = _argument(index)
    for value in values:
        code += [(_EQUAL, 0, 1, value), *_answer(_ALLOW)]
    return code if otherwise is None else [*code, *_answer(otherwise)]
