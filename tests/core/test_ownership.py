"""Whose a place is: what another user could change is found, wherever on the way it is open."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fluxcli.core.ownership import make_private, open_to_others


@pytest.fixture
def place(tmp_path: Path) -> Path:
    made = tmp_path / "home" / "cache"
    make_private(made)
    (made / "code").write_bytes(b"")
    return made


def elsewhere(place: Path) -> Path:
    """A directory anyone may write into, with one in it that only its owner may."""
    (place.parent / "shared").mkdir()
    (place.parent / "shared").chmod(0o777)
    (place.parent / "shared" / "inner").mkdir(mode=0o700)
    return place.parent / "shared" / "inner"


OPEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "itself": (lambda place: place.chmod(0o777), "cache can be written"),
    "itself, though sticky": (lambda place: place.chmod(0o1777), "cache can be written"),
    "a directory above": (lambda place: place.parent.chmod(0o707), "home can be written"),
    "another group": (lambda place: (os.chown(place, -1, 12345), place.chmod(0o770)), "cache can be written"),
    "another owner": (lambda place: os.chown(place, 12345, -1), "cache belongs to another user"),
    "another owner above": (lambda place: os.chown(place.parent, 12345, -1), "home belongs to another user"),
    "where a link leads": (
        lambda place: (there := elsewhere(place), place.rename(there / "cache"), place.symlink_to(there / "cache")),
        "shared can be written",
    ),
    "another's link": (
        lambda place: (
            place.rename(place.with_name("real")),
            place.symlink_to("real"),
            os.chown(place, 12345, -1, follow_symlinks=False),
        ),
        "cache belongs to another user",
    ),
    "a link on the way of a link": (
        lambda place: (
            there := elsewhere(place),
            place.rename(place.with_name("real")),
            (there.parent / "second").symlink_to(place.with_name("real")),
            place.symlink_to(there.parent / "second"),
        ),
        "shared can be written",
    ),
}
AS_ROOT = {"another group", "another owner", "another owner above", "another's link"}


@pytest.mark.parametrize("case", OPEN)
def test_what_others_could_change_is_named(case: str, place: Path) -> None:
    if case in AS_ROOT and os.geteuid():
        pytest.skip("only root can give a file away")
    change, reason = OPEN[case]
    change(place)
    assert reason in str(open_to_others(place))
    if "sticky" not in case:  # there, what is in it is still this user's
        assert reason in str(open_to_others(place / "code"))


CLOSED: dict[str, Callable[[Path], object]] = {
    "as it was made": lambda place: None,
    "read by all": lambda place: place.chmod(0o755),
    "an entry of a sticky directory": lambda place: place.parent.chmod(0o1777),
    "written by the user's own group": lambda place: place.chmod(0o775),
    "a link to a place of ours": lambda place: (place.rename(place.with_name("real")), place.symlink_to("real")),
    "missing": lambda place: place.rename(place.with_name("gone")),
    "a link to itself": lambda place: (place.rename(place.with_name("gone")), place.symlink_to("cache")),
}


@pytest.mark.parametrize("case", CLOSED)
def test_what_only_this_user_can_change_is_trusted(case: str, place: Path) -> None:
    if case == "written by the user's own group":
        import grp
        import pwd

        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(place.stat().st_gid)
        if user.pw_gid != group.gr_gid or group.gr_name != user.pw_name or set(group.gr_mem) - {user.pw_name}:
            pytest.skip("this user's group has others in it")
    CLOSED[case](place)
    assert open_to_others(place) is None


def test_in_a_sticky_directory_what_somebody_else_made_is_not_ours(place: Path) -> None:
    if os.geteuid():
        pytest.skip("only root can give a file away")
    place.parent.chmod(0o1777)
    os.chown(place, 12345, -1)
    assert "belongs to another user" in str(open_to_others(place))


def test_what_is_made_is_for_this_user_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        make_private(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    assert [path.stat().st_mode & 0o777 for path in (tmp_path / "a", tmp_path / "a" / "b")] == [0o700, 0o700]
