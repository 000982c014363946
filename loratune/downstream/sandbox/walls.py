"""The walls around an untrusted process, each one Linux call or a few: namespaces, Landlock, limits, privileges.

Runs in the sandbox's own processes (`processes.py`), which start without site-packages: the standard library only,
and nothing of loratune. Every function raises OSError when the kernel says no.
"""

import contextlib
import ctypes
import os
import platform
import resource
import stat
import struct
from collections.abc import Iterator
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_KEEPCAPS, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 8, 24, 36, 38
CAP_DAC_READ_SEARCH = 1 << 2
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = (
    0x20000,
    0x4000000,
    0x8000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 4096, 16384, 1 << 18, 2
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV, AT_RECURSIVE = 1, 2, 4, 0x8000
SYS_LANDLOCK_CREATE, SYS_LANDLOCK_ADD, SYS_LANDLOCK_RESTRICT, SYS_MOUNT_SETATTR = 444, 445, 446, 442  # the same on every architecture
SYS_PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}


def _call(what: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def prctl(option: int, *values: int) -> None:
    padded = [ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:4]]
    _call(f"prctl {option}", _libc.prctl(option, *padded))


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    encoded = [text.encode() if text is not None else None for text in (source, target, kind)]
    result = _libc.mount(*encoded, ctypes.c_ulong(flags), options.encode() if options is not None else None)
    _call(f"mount {target}", result)


def _seal(path: str, *, recursive: bool = True) -> None:
    """Make a mount read-only, without set-uid programs and devices."""
    attributes = struct.pack("QQQQ", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    flags = AT_RECURSIVE if recursive else 0
    _call(f"mount_setattr {path}", _libc.syscall(SYS_MOUNT_SETATTR, -100, path.encode(), flags, attributes, len(attributes)))


def enter_namespaces(readable: list[str], *, owner: int, scratch_bytes: int) -> None:
    """Give this process and its children a world of their own.

    Mounts: a root that holds `readable` (files and folders, at their own paths, read-only) and /tmp, an own file system
    in memory of at most `scratch_bytes`, owned by user `owner`, who starts in an empty folder of it; nothing else of the
    machine's files, and no /proc.
    Network: none, not even a loopback that is up. Processes: children of this one live in a fresh PID namespace whose
    first process takes all others with it. Also own System V IPC, message queues and host name.
    """
    spaces = CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        _call("unshare", _libc.unshare(spaces))
    else:
        _call("unshare", _libc.unshare(spaces | CLONE_NEWUSER))
        for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    _mount("none", "/", None, MS_REC | MS_PRIVATE)  # else the mounts below would appear outside
    root = "/proc"  # any folder that exists everywhere and is not needed; covered in this namespace only
    _mount("root", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    os.mkdir(f"{root}/tmp")
    _mount("scratch", f"{root}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, f"size={scratch_bytes},nr_inodes=1024,mode=700,uid={owner}")
    os.mkdir(f"{root}/tmp/empty", mode=0o700)
    if os.geteuid() != owner:
        os.chown(f"{root}/tmp/empty", owner, -1)
    for path in readable:  # after the scratch folder: Python itself may be installed below /tmp
        _show(path, root)
    _seal(root, recursive=False)
    os.chdir(root)
    _call("pivot_root", _libc.syscall(SYS_PIVOT_ROOT[platform.machine()], b".", b"."))
    _call("umount2", _libc.umount2(b".", MNT_DETACH))
    os.chdir("/tmp/empty")  # not /tmp, where such a Python shows


def _show(path: str, root: str) -> None:
    """Let a folder or file appear below the new root, read-only; a link becomes what it points to."""
    target = root + path
    if os.path.lexists(target) or not os.path.exists(path):
        return  # already there as part of another one, or not on this machine
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.isdir(path):
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    _mount(path, target, None, MS_BIND | MS_REC)
    _seal(target)


def landlock_version() -> int:
    """Of the kernel's Landlock; 0: it has none, or it is switched off."""
    return max(0, int(_libc.syscall(SYS_LANDLOCK_CREATE, None, 0, 1)))


def landlock(readable: list[str], scratch: str) -> int:
    """Confine this process and its descendants by Landlock; returns its version, 0 where there is none.

    Files: read and execute `readable`, everything below `scratch`, write /dev/null; nothing else. Besides, no tracing of
    processes outside (all versions), no TCP (from version 4), no signals and no abstract UNIX sockets to the outside (from 6).
    Source: the kernel's userspace-api/landlock.
    """
    version = landlock_version()
    if not version:
        return 0
    prctl(PR_SET_NO_NEW_PRIVS, 1)  # the kernel asks for it
    every = (1 << (13 + (version >= 2) + (version >= 3) + (version >= 5))) - 1
    on_files, reading = 0b1_00000000_00000111 | (version >= 3) << 14, 0b1101
    scoped = 0b11 if version >= 6 else 0
    attributes = struct.pack("QQQ", every, 0b11 if version >= 4 else 0, scoped)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    ruleset = _call("landlock", _libc.syscall(SYS_LANDLOCK_CREATE, attributes, len(attributes), 0))
    allowed = [(path, reading) for path in readable] + [(scratch, every), ("/dev/null", 0b110)]
    for path, access in allowed:
        if not os.path.exists(path):
            continue
        place = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if not stat.S_ISDIR(os.fstat(place).st_mode):
            access &= on_files
        rule = struct.pack("=Qi", access & every, place)
        _call(f"landlock {path}", _libc.syscall(SYS_LANDLOCK_ADD, ruleset, 1, rule, 0))
        os.close(place)
    _call("landlock", _libc.syscall(SYS_LANDLOCK_RESTRICT, ruleset, 0))
    os.close(ruleset)
    return version


def drop_privileges(user: int, *, keep_reading: bool) -> None:
    """Become `user` (when root), give up capabilities for good, and let no program being executed add any.

    keep_reading: under root, keep the one capability that reads whatever a file's mode says, for a Python below /root;
    only where other walls (Landlock) decide what may be read.
    """
    reading = CAP_DAC_READ_SEARCH if keep_reading and os.geteuid() == 0 else 0
    for capability in range(64):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError:
            break  # past the last one, or not ours to drop
    if os.geteuid() == 0:
        prctl(PR_SET_KEEPCAPS, bool(reading))
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    header, kept = struct.pack("Ii", 0x20080522, 0), struct.pack("6I", reading, reading, 0, 0, 0, 0)
    _call("capset", _libc.capset(header, kept))
    prctl(PR_SET_NO_NEW_PRIVS, 1)


@contextlib.contextmanager
def acting_as(user: int) -> Iterator[None]:
    """Under root, have files, and the files in /proc, opened as by `user`; nothing else changes."""
    if os.geteuid() != 0:
        yield
        return
    _libc.setfsgid(user)
    _libc.setfsuid(user)
    try:
        yield
    finally:
        _libc.setfsuid(0)
        _libc.setfsgid(os.getegid())


def limit_resources(limits: dict[str, Any]) -> None:
    """Limits that hold for each process on its own: address space, CPU time, size of a file, open files, no core dumps."""
    seconds = int(limits["timeout"]) + 1
    for kind, value in (
        (resource.RLIMIT_AS, limits["memory_bytes"]),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, limits["scratch_bytes"]),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_SIGPENDING, 64),  # counted per user: the user's other processes queue signals too
    ):
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def limit_processes(count: int) -> None:
    """At most `count` processes and threads of this user (of this user in this user namespace, from Linux 5.14)."""
    _, hard = resource.getrlimit(resource.RLIMIT_NPROC)
    count = count if hard == resource.RLIM_INFINITY else min(count, hard)
    resource.setrlimit(resource.RLIMIT_NPROC, (count, count))


def tasks_of_user() -> int:
    """Processes and threads that run under this process's user now."""
    number = 0
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                if os.stat(f"/proc/{name}").st_uid == os.geteuid():
                    number += len(os.listdir(f"/proc/{name}/task"))
            except OSError:
                pass  # it ended while we looked
    return number
