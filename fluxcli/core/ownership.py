"""Whose a place on the disk is. What is read as code, or as a key, must lie where no other user could have put it."""

import grp
import os
import pwd
import stat
from pathlib import Path

_GROUP_WRITES, _OTHERS_WRITE = stat.S_IWGRP, stat.S_IWOTH


def open_to_others(path: Path) -> str | None:
    """Why another user could change what is at `path`, or swap a directory on the way to it; None where none could.

    What does not exist yet is nobody's, and links are followed as the system does, each held to the same. Root is
    trusted. In a directory like /tmp, whose sticky bit keeps entries to their owners, an entry of our own is ours.
    """
    return _open_to_others(Path(os.path.abspath(path)), set())


def make_private(directory: Path) -> None:
    """Makes a directory, and those above it that are missing, with access for this user alone."""
    for place in (*reversed(directory.parents), directory):
        if not place.is_dir():
            place.mkdir(mode=0o700, exist_ok=True)


def _open_to_others(path: Path, followed: set[Path]) -> str | None:
    for place in (*reversed(path.parents), path):
        try:
            about = place.lstat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        if about.st_uid not in _trusted():
            return f"{place} belongs to another user"
        if stat.S_ISLNK(about.st_mode):
            if place not in followed:
                followed.add(place)
                target = os.path.abspath(Path(os.path.realpath(place.parent)) / os.readlink(place))
                if reason := _open_to_others(Path(target), followed):
                    return reason
        elif _others_write(about) and (place == path or not about.st_mode & stat.S_ISVTX):
            return f"{place} can be written by other users"
    return None


def _others_write(about: os.stat_result) -> bool:
    if about.st_mode & _OTHERS_WRITE:
        return True
    return bool(about.st_mode & _GROUP_WRITES) and not _group_of_one(about.st_gid)


def _group_of_one(gid: int) -> bool:
    """Whether it is the group that many systems give to one user alone, and let write by default."""
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return gid == user.pw_gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


def _trusted() -> set[int]:
    """Root, and this user. In a container that maps only its user, root's directories show as those of nobody."""
    try:
        ranges = [[int(number) for number in line.split()] for line in _lines("/proc/self/uid_map")]
        if ranges and not any(start <= 0 < start + length for start, _, length in ranges):
            return {0, os.geteuid(), int(_lines("/proc/sys/kernel/overflowuid")[0])}
    except (OSError, ValueError):
        pass
    return {0, os.geteuid()}


def _lines(file: str) -> list[str]:
    return Path(file).read_text().splitlines()
