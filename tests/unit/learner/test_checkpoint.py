import errno
from pathlib import Path

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
