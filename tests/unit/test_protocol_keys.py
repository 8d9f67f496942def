"""Keys and token: made once, renewed with an overlap, and plain words when they can't be used."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from elasticmoe_protocol import keys
from elasticmoe_protocol.keys import (
    COORDINATOR_FILE,
    SIDECAR_FILE,
    TOKEN_FILE,
    KeysError,
    ensure_keys,
    finish,
    load_coordinator,
    load_sidecar,
    load_token,
    rotate,
    token_is_valid,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.pod import Secret

FILES = (COORDINATOR_FILE, SIDECAR_FILE, TOKEN_FILE)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "config" / "keys"
    ensure_keys(made)
    return made


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def line_of(error: pytest.ExceptionInfo[KeysError]) -> str:
    """What a user reads."""
    line = str(error.value)
    assert line
    assert "\n" not in line
    assert "Errno" not in line
    return line


# --- made on first use ---------------------------------------------------------------------------


def test_nobody_else_can_read_what_was_made(folder: Path):
    before = os.umask(0)
    try:
        other = folder.parent / "other"
        ensure_keys(other)
        for made in (folder, other):
            assert mode(made) == 0o700
            assert {path.name: mode(path) for path in made.iterdir()} == dict.fromkeys(
                (*FILES, ".lock"), 0o600
            )
    finally:
        os.umask(before)


def test_both_sides_fit_each_other(folder: Path):
    coordinator, sidecar = load_coordinator(folder), load_sidecar(folder)
    assert sidecar.server == coordinator.pair.public
    assert coordinator.clients == (sidecar.pair.public,)
    assert coordinator.tokens == ()
    assert sidecar.pair.secret not in (folder / COORDINATOR_FILE).read_text()
    assert coordinator.pair.secret not in (folder / SIDECAR_FILE).read_text()
    assert len(load_token(folder)) >= 43  # 32 random bytes


def test_made_a_second_time_nothing_changes(folder: Path):
    before = contents(folder)
    ensure_keys(folder)
    assert contents(folder) == before


def test_two_folders_share_nothing(folder: Path, tmp_path: Path):
    ensure_keys(tmp_path / "other")
    assert not set(contents(folder).values()) & set(contents(tmp_path / "other").values())


def test_only_what_is_missing_is_made(folder: Path):
    before = contents(folder)
    (folder / TOKEN_FILE).unlink()
    ensure_keys(folder)
    after = contents(folder)
    assert after[TOKEN_FILE] != before[TOKEN_FILE]
    assert after[COORDINATOR_FILE] == before[COORDINATOR_FILE]
    assert after[SIDECAR_FILE] == before[SIDECAR_FILE]


def test_a_coordinator_needs_no_sidecar_keys_beside_its_own(folder: Path):
    """They may have been moved to where sidecars run."""
    before = (folder / COORDINATOR_FILE).read_bytes()
    (folder / SIDECAR_FILE).unlink()
    ensure_keys(folder)
    assert (folder / COORDINATOR_FILE).read_bytes() == before
    assert not (folder / SIDECAR_FILE).exists()


def test_processes_that_make_them_at_once_agree(tmp_path: Path):
    made = tmp_path / "keys"
    program = (
        "import sys; from pathlib import Path; from elasticmoe_protocol import keys as k;"
        "print('loaded', flush=True); sys.stdin.read();"
        "f = Path(sys.argv[1]); k.ensure_keys(f);"
        "print(k.load_coordinator(f).pair.public, k.load_sidecar(f).pair.public,"
        " k.load_sidecar(f).server, k.load_token(f))"
    )
    several = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(made)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for one in several:
        assert one.stdout is not None
        assert one.stdout.readline() == "loaded\n"
    for one in several:  # now they begin together
        assert one.stdin is not None
        one.stdin.close()
    told = []
    for one in several:
        assert one.stdout is not None
        told.append(one.stdout.read())
        one.stdout.close()
        assert one.wait(timeout=30) == 0
    assert len(set(told)) == 1
    server, client, known, token = told[0].split()
    assert known == server
    assert load_coordinator(made).clients == (client,)
    assert load_token(made) == token


def test_a_crash_between_two_files_is_mended(folder: Path):
    """The sidecars' file comes first: without the coordinator's, both are made anew."""
    before = contents(folder)
    (folder / COORDINATOR_FILE).unlink()
    ensure_keys(folder)
    assert contents(folder)[SIDECAR_FILE] != before[SIDECAR_FILE]
    assert load_sidecar(folder).server == load_coordinator(folder).pair.public


def test_a_folder_that_has_all_is_not_written_to(folder: Path):
    """A secret that is mounted can't be."""
    (folder / ".lock").unlink()
    before = folder.stat().st_mtime_ns
    ensure_keys(folder)
    assert folder.stat().st_mtime_ns == before
    assert not (folder / ".lock").exists()


# --- rotation ------------------------------------------------------------------------------------


def test_in_a_rotation_old_and_new_are_taken(folder: Path):
    old_client, old_token = load_sidecar(folder).pair.public, load_token(folder)
    server = load_coordinator(folder).pair
    rotate(folder)
    new_client, new_token = load_sidecar(folder).pair.public, load_token(folder)
    assert new_client != old_client
    assert new_token != old_token
    assert set(load_coordinator(folder).clients) == {old_client, new_client}
    assert token_is_valid(folder, old_token)
    assert token_is_valid(folder, new_token)
    # A sidecar that has the old file still knows the coordinator.
    assert load_coordinator(folder).pair == server
    assert load_sidecar(folder).server == server.public


def test_after_it_is_finished_only_the_new_ones_are(folder: Path):
    old_token = load_token(folder)
    rotate(folder)
    finish(folder)
    assert load_coordinator(folder).clients == (load_sidecar(folder).pair.public,)
    assert not token_is_valid(folder, old_token)
    assert token_is_valid(folder, load_token(folder))


def test_rotated_twice_before_it_is_finished_all_three_are_taken(folder: Path):
    known = [(load_sidecar(folder).pair.public, load_token(folder))]
    for _ in range(2):
        rotate(folder)
        known.append((load_sidecar(folder).pair.public, load_token(folder)))
    clients = load_coordinator(folder).clients
    assert all(client in clients and token_is_valid(folder, token) for client, token in known)
    finish(folder)
    assert load_coordinator(folder).clients == (known[-1][0],)
    assert [token_is_valid(folder, token) for _, token in known] == [False, False, True]


def test_finish_without_a_rotation_changes_nothing(folder: Path):
    before = contents(folder)
    finish(folder)
    assert contents(folder) == before


@pytest.mark.parametrize("written", [COORDINATOR_FILE, SIDECAR_FILE])
def test_a_rotation_that_broke_off_locks_nobody_out(
    folder: Path, monkeypatch: pytest.MonkeyPatch, written: str
):
    """And run again it is whole."""
    old_client, old_token = load_sidecar(folder).pair.public, load_token(folder)
    whole = keys._write

    def broken(where: Path, name: str, text: str) -> None:
        whole(where, name, text)
        if name == written:
            raise KeyboardInterrupt

    monkeypatch.setattr(keys, "_write", broken)
    with pytest.raises(KeyboardInterrupt):
        rotate(folder)
    monkeypatch.undo()
    for again in (False, True):
        if again:
            rotate(folder)
        clients = load_coordinator(folder).clients
        assert load_sidecar(folder).pair.public in clients
        assert old_client in clients
        assert token_is_valid(folder, old_token)
        assert token_is_valid(folder, load_token(folder))


def test_files_keep_their_mode_in_a_rotation(folder: Path):
    rotate(folder)
    finish(folder)
    assert {mode(folder / name) for name in FILES} == {0o600}
    assert sorted(path.name for path in folder.iterdir()) == sorted((*FILES, ".lock"))


# --- without a folder ----------------------------------------------------------------------------


def put(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def test_files_without_a_folder_are_as_those_in_one(tmp_path: Path):
    made = keys.make()
    assert sorted(made) == sorted(FILES)
    folder = put(tmp_path / "keys", made)
    ensure_keys(folder)
    assert {name: (folder / name).read_text() for name in FILES} == made
    assert load_sidecar(folder).server == load_coordinator(folder).pair.public
    both = keys.rotated(made)
    put(folder, both)
    assert set(load_coordinator(folder).clients) == {
        load_sidecar(folder).pair.public,
        load_sidecar(put(tmp_path / "old", made)).pair.public,
    }
    assert token_is_valid(folder, made[TOKEN_FILE].strip())
    assert token_is_valid(folder, both[TOKEN_FILE].strip())
    put(folder, keys.finished(both))
    assert load_coordinator(folder).clients == (load_sidecar(folder).pair.public,)
    assert not token_is_valid(folder, made[TOKEN_FILE].strip())


def test_what_else_is_among_the_files_stays(tmp_path: Path):
    files = {**keys.make(), "other": "x"}
    assert keys.rotated(files)["other"] == keys.finished(files)["other"] == "x"
    assert keys.finished(files) == files


@pytest.mark.parametrize("change", [keys.rotated, keys.finished])
@pytest.mark.parametrize("content", ["", "{}", "[]", '{"pair": 1}', "\udcff"])
@pytest.mark.parametrize("name", [COORDINATOR_FILE, SIDECAR_FILE, TOKEN_FILE])
def test_files_that_are_no_keys_are_named(
    change: Callable[[dict[str, str]], dict[str, str]], content: str, name: str
):
    needed = {COORDINATOR_FILE, TOKEN_FILE if change is keys.rotated else SIDECAR_FILE}
    if name not in needed or (name == TOKEN_FILE and content):
        return
    with pytest.raises(KeysError) as error:
        change({**keys.make(), name: content})
    assert line_of(error).startswith(f"{name} is ")


def test_a_missing_file_is_named():
    files = keys.make()
    del files[COORDINATOR_FILE]
    with pytest.raises(KeysError) as error:
        keys.rotated(files)
    assert line_of(error).startswith(f"there is no {COORDINATOR_FILE} among the keys")


def test_a_mounted_secret_is_read_and_not_written(tmp_path: Path):
    files = keys.make()
    secret = Secret(tmp_path / "keys", files)
    before = {path: path.lstat().st_mtime_ns for path in secret.path.rglob("*")}
    ensure_keys(secret.path)
    assert token_is_valid(secret.path, files[TOKEN_FILE].strip())
    assert {path: path.lstat().st_mtime_ns for path in secret.path.rglob("*")} == before
    both = keys.rotated(files)
    secret.update(both)
    assert token_is_valid(secret.path, both[TOKEN_FILE].strip())
    secret.update(keys.finished(both))
    assert not token_is_valid(secret.path, files[TOKEN_FILE].strip())


# --- the token -----------------------------------------------------------------------------------


@given(st.text() | st.text(alphabet="abcABC-_0", max_size=60))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nothing_but_the_token_is_valid(folder: Path, given: str):
    assert not token_is_valid(folder, given)


def test_nearly_the_token_is_not_valid(folder: Path):
    token = load_token(folder)
    assert token_is_valid(folder, token)
    for other in ("", token[:-1], token + "x", token + "\n", token.swapcase(), f" {token}"):
        assert not token_is_valid(folder, other)


# --- errors --------------------------------------------------------------------------------------

LOADERS: dict[str, Callable[[Path], object]] = {
    COORDINATOR_FILE: load_coordinator,
    SIDECAR_FILE: load_sidecar,
    TOKEN_FILE: load_token,
}


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_to_be_copied(folder: Path, name: str):
    (folder / name).unlink()
    with pytest.raises(KeysError) as error:
        LOADERS[name](folder)
    assert str(folder / name) in line_of(error)
    assert "copy it from where the coordinator made its keys" in line_of(error)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_belongs_to_somebody_else_is_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    def forbidden(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", forbidden)  # root would read it
    with pytest.raises(KeysError) as error:
        LOADERS[name](folder)
    assert "check its owner" in line_of(error)


@pytest.mark.parametrize("name", FILES)
def test_a_folder_in_the_place_of_a_file_is_named(folder: Path, name: str):
    (folder / name).unlink()
    (folder / name).mkdir()
    with pytest.raises(KeysError) as error:
        LOADERS[name](folder)
    assert str(folder / name) in line_of(error)


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda text: text[:20], id="cut"),
        pytest.param(lambda text: "", id="empty"),
        pytest.param(lambda text: "[]", id="a list"),
        pytest.param(lambda text: "key = 1\n", id="no JSON"),
        pytest.param(lambda text: text.replace('"public":"', '"public":"#', 1), id="a longer key"),
        pytest.param(lambda text: text.replace("secret", "hidden"), id="no secret"),
    ],
)
@pytest.mark.parametrize("name", [COORDINATOR_FILE, SIDECAR_FILE])
def test_a_damaged_key_file_is_to_be_made_anew(
    folder: Path, name: str, damage: Callable[[str], str]
):
    path = folder / name
    path.write_text(damage(path.read_text()))
    with pytest.raises(KeysError) as error:
        LOADERS[name](folder)
    assert f"{path} is not a key file" in line_of(error)
    assert "make new ones" in line_of(error)


@pytest.mark.parametrize(
    "key",
    ["", "short", "#" * 40, "é" * 40, "'" * 40, "0" * 45],
    ids=["empty", "short", "too large a number", "no ASCII", "no Z85", "long"],
)
def test_a_key_that_is_none_is_found_before_it_is_used(folder: Path, key: str):
    sidecar, coordinator = load_sidecar(folder), load_coordinator(folder)
    for name, known in (
        (SIDECAR_FILE, sidecar.server),
        (SIDECAR_FILE, sidecar.pair.secret),
        (COORDINATOR_FILE, coordinator.clients[0]),
    ):
        path = folder / name
        before = path.read_bytes()
        path.write_bytes(before.replace(known.encode(), key.encode()))
        with pytest.raises(KeysError) as error:
            LOADERS[name](folder)
        assert "not a CURVE key" in line_of(error)
        path.write_bytes(before)


@pytest.mark.parametrize("name", [COORDINATOR_FILE, SIDECAR_FILE])
def test_bytes_that_are_no_text_are_no_key_file(folder: Path, name: str):
    (folder / name).write_bytes(b'{"pair":"\xff"}')
    with pytest.raises(KeysError) as error:
        LOADERS[name](folder)
    assert "is not a key file" in line_of(error)


@pytest.mark.parametrize("content", [b"", b"\n", b"  \n"])
def test_an_empty_token_lets_nobody_in(folder: Path, content: bytes):
    (folder / TOKEN_FILE).write_bytes(content)
    with pytest.raises(KeysError) as error:
        token_is_valid(folder, "")
    assert "is empty: delete it and start again" in line_of(error)


@pytest.mark.parametrize("change", [rotate, finish])
def test_there_must_be_keys_to_rotate(tmp_path: Path, change: Callable[[Path], None]):
    with pytest.raises(KeysError) as error:
        change(tmp_path / "none")
    assert "make them first" in line_of(error)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("change", [ensure_keys, rotate, finish])
def test_a_file_where_the_folder_should_be_is_named(tmp_path: Path, change: Callable[[Path], None]):
    (tmp_path / "keys").write_text("")
    with pytest.raises(KeysError) as error:
        change(tmp_path / "keys")
    assert f"{tmp_path / 'keys'} can't be written" in line_of(error)
    assert "choose another folder" in line_of(error)


def test_a_full_disk_leaves_the_keys_as_they_were(folder: Path, monkeypatch: pytest.MonkeyPatch):
    before = contents(folder)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(KeysError) as error:
        rotate(folder)
    assert "No space left on device" in line_of(error)
    assert contents(folder) == before
