import errno
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from services.learner.checkpoint import CheckpointError, Checkpoints, Manifest


def manifest(version: int) -> Manifest:
    return Manifest(version=version, next_task=10 * version, seed=1, world_size=1, zero_stage=2, dtype="float32")


def write(folder: Path) -> None:
    (folder / "actor").mkdir()
    (folder / "actor" / "weights").write_bytes(b"x" * 100)


def test_the_newest_is_found_with_its_manifest(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "c", keep=5)
    assert checkpoints.latest() is None
    for version in (2, 10, 9):
        checkpoints.save(manifest(version), write)
    found = checkpoints.latest()
    assert found is not None and found[1].version == 10 and found[1].next_task == 100
    assert (found[0] / "actor" / "weights").read_bytes() == b"x" * 100


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for version in range(1, 5):
        checkpoints.save(manifest(version), write)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v00000003", "v00000004"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("write failed")])
def test_a_full_disk_is_a_clear_error_and_leaves_the_previous_checkpoint(tmp_path: Path, error: Exception) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.save(manifest(1), write)

    def fail(folder: Path) -> None:
        write(folder)
        raise error

    with pytest.raises(CheckpointError, match=r"checkpoint 2 .* earlier ones intact"):
        checkpoints.save(manifest(2), fail)
    found = checkpoints.latest()
    assert found is not None and found[1].version == 1
    assert [path.name for path in tmp_path.iterdir()] == ["v00000001"]


def test_lack_of_space_is_noticed_before_writing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="MiB are free"):
        Checkpoints(tmp_path, keep=1).save(manifest(1), write, need_bytes=1 << 60)


def test_a_checkpoint_that_was_never_finished_is_ignored_and_cleared(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.save(manifest(1), write)
    write(checkpoints.begin(2, need_bytes=0))  # killed here
    found = checkpoints.latest()
    assert found is not None and found[1].version == 1
    checkpoints.save(manifest(3), write)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v00000001", "v00000003"]


def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    for version in (1, 2, 3):
        checkpoints.save(manifest(version), write)
    (tmp_path / "v00000003" / "actor" / "weights").write_bytes(b"x")
    (tmp_path / "v00000002" / "manifest.json").write_text("{")
    found = checkpoints.latest()
    assert found is not None and found[1].version == 1


def test_the_same_version_can_be_saved_again(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=3)
    checkpoints.save(manifest(1), write)
    checkpoints.save(manifest(1), write)
    assert checkpoints.latest() is not None


def test_the_best_by_the_metric_stays_and_has_a_link(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=1, metric="reward")
    for version, score in ((1, 0.2), (2, 0.9), (3, 0.1), (4, 0.3)):
        checkpoints.save(msgspec.structs.replace(manifest(version), metric="reward", score=score), write)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "v00000002", "v00000004"]
    assert (tmp_path / "best").resolve().name == "v00000002"
    checkpoints = Checkpoints(tmp_path, keep=1, metric="accuracy_last")  # another metric: those scores say nothing
    checkpoints.save(msgspec.structs.replace(manifest(5), metric="accuracy_last", score=0.0), write)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "v00000005"]


def test_damaged_checkpoints_take_no_place_of_those_that_are_kept(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for version in (1, 2):
        checkpoints.save(manifest(version), write)
    (tmp_path / "v00000002" / "actor" / "weights").unlink()
    checkpoints.save(manifest(3), write)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["v00000001", "v00000003"]


KILLED_AT_EVERY_STEP = """
import os, shutil, signal, sys
from pathlib import Path
from services.learner.checkpoint import Checkpoints, Manifest

root = Path(sys.argv[1])
EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.symlink", "shutil.rmtree"}

def save(folder, version):
    def write(target):
        (target / "actor").mkdir()
        for name in ("weights", "moments"):
            (target / "actor" / name).write_bytes(name.encode() * version)
    manifest = Manifest(version=version, next_task=0, seed=0, world_size=1, zero_stage=0, dtype="float32",
                        metric="reward", score=float(version))
    Checkpoints(folder, keep=1, metric="reward").save(manifest, write)

def save_until(moment, folder, version):
    happened = 0
    def hook(event, arguments):
        nonlocal happened
        if event in EVENTS and any(str(argument).startswith(str(folder)) for argument in arguments):
            if happened == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            happened += 1
    if (child := os.fork()) == 0:
        sys.addaudithook(hook)
        save(folder, version)
        os._exit(0)
    return os.waitpid(child, 0)[1] == signal.SIGKILL

moment, newest = 0, 1
while newest == 1 or was_killed:
    folder = root / str(moment)
    save(folder, 1)
    was_killed = save_until(moment, folder, 2)
    path, manifest = Checkpoints(folder, keep=1).latest()
    assert newest <= manifest.version <= 2, "a later kill left less"
    newest = manifest.version
    assert (path / "actor" / "weights").read_bytes() == b"weights" * newest
    assert (path / "actor" / "moments").read_bytes() == b"moments" * newest
    Checkpoints(folder, keep=1).tidy()  # as the next start does
    assert {entry.name for entry in folder.iterdir()} <= {"best", "v00000001", "v00000002"}
    save(folder, 3)
    assert {entry.name for entry in folder.iterdir()} == {"best", "v00000003"}
    moment += 1
print(moment - 1)
"""


def test_killed_at_any_moment_a_save_leaves_the_previous_or_the_new_one(tmp_path: Path) -> None:
    """SIGKILL before each file-system call of a save in turn."""
    done = subprocess.run([sys.executable, "-c", KILLED_AT_EVERY_STEP, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20  # kills
