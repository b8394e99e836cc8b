"""Replicas that join: weights from the newest file, on shared storage or over HTTP; no task before they are right."""

import httpx
import pytest
import torch
from transfers import DictEngine, Policy, Site

from services.contracts.config import RunConfig
from services.contracts.registry import Published, Registry
from services.contracts.settings import RolloutSection, WeightsSection
from services.contracts.weights.staging import Received
from services.learner.snapshot import Snapshot
from services.learner.weight_files import WeightFiles
from services.rollout.newcomer import Newcomer
from services.rollout.weight_control import WeightControl

pytestmark = pytest.mark.integration
TOKEN = "secret"


@pytest.fixture
def snapshot():
    policy = Policy()
    made = Snapshot(policy, bucket_bytes=1 << 20)
    made.begin()
    made.fill(policy)
    return made


@pytest.fixture
def files(tmp_path):
    made = WeightFiles(tmp_path / "weights")
    yield made
    made.close()


def put(files, snapshot, version):
    return files.put(snapshot.arena, Received(snapshot.plan, snapshot.fingerprint(), 0.0), version=version)


def newcomer(redis, how, *, token=TOKEN):
    config = RunConfig(weights=WeightsSection(newcomers=how), rollout=RolloutSection(control_token=token))
    engine = DictEngine()
    return Newcomer(config, Registry(redis, run="r"), WeightControl(engine)), engine


@pytest.mark.parametrize("how", ["storage", "http"])
async def test_a_newcomer_loads_the_newest_file_and_may_claim_at_once(redis, files, snapshot, how):
    if how == "http":
        files.serve("127.0.0.1", 0, token=TOKEN)
    file = put(files, snapshot, 4)
    await Registry(redis, run="r").publish(Published(version=4, fingerprint=file.fingerprint, file=file))
    one, engine = newcomer(redis, how)
    await one.load_file()
    await one.look()
    assert one.may_claim and engine.version == 4
    assert all(torch.equal(engine.weights[name], tensor) for name, tensor in snapshot.arena.tensors(snapshot.plan))


async def test_weights_of_another_version_or_content_are_not_enough(redis, files, snapshot):
    registry = Registry(redis, run="r")
    file = put(files, snapshot, 4)
    one, _ = newcomer(redis, "storage")
    for published in (
        Published(version=5, fingerprint=file.fingerprint, file=file),
        Published(version=4, fingerprint="0" * 16, file=file),
        Published(version=4, fingerprint="", file=file),
    ):
        await registry.publish(published)
        await one.load_file()
        await one.look()
        assert not one.may_claim


@pytest.mark.parametrize("damage", ["gone", "bytes", "token"])
async def test_without_a_good_file_it_waits_for_a_transfer(redis, files, snapshot, damage):
    files.serve("127.0.0.1", 0, token=TOKEN)
    file = put(files, snapshot, 4)
    path = next(files.folder.glob("*.safetensors"))
    if damage == "gone":
        path.unlink()
    elif damage == "bytes":
        data = bytearray(path.read_bytes())
        data[-9] ^= 4
        path.write_bytes(data)
    await Registry(redis, run="r").publish(Published(version=4, fingerprint=file.fingerprint, file=file))
    one, engine = newcomer(redis, "http", token="wrong" if damage == "token" else TOKEN)
    await one.load_file()
    await one.look()
    assert not one.may_claim and engine.version == 0 and not engine.broken and not engine.weights


async def test_where_no_learner_ever_came_there_is_nothing_to_wait_for(redis):
    one, _ = newcomer(redis, "sync")
    assert not one.may_claim  # before it has looked
    await one.look()
    assert one.may_claim


async def test_old_files_go_and_no_other_file_is_handed_out(files, snapshot, tmp_path):
    files.serve("127.0.0.1", 0, token=TOKEN)
    (tmp_path / "secret.txt").write_text("secret")
    where = [put(files, snapshot, version).where for version in (1, 2, 3)]
    headers = {"Authorization": f"Bearer {TOKEN}"}
    found = [httpx.get(url, headers=headers).status_code for url in where]
    assert found == [404, 200, 200]
    root = where[0].rpartition("/")[0]
    for name in ("..%2fsecret.txt", "../secret.txt", ".partial-x", ""):
        assert httpx.get(f"{root}/{name}", headers=headers).status_code == 404
    assert httpx.get(where[2]).status_code == 401


async def test_the_learner_publishes_files_and_a_full_disk_does_not_end_it(tmp_path):
    site = Site(1, newcomers="storage", folder=tmp_path / "shared", publish_every=2)
    for version in (1, 2, 3):
        await site.publisher.publish(version)
    await site.publisher._written()
    assert [told.file.version for told in site.registry.told if told.file] == [1, 1, 2, 2]
    (tmp_path / "shared").rename(tmp_path / "moved")
    (tmp_path / "shared").write_text("not a folder")
    report = await site.publisher.publish(4)
    await site.publisher.close()
    assert report.updated == ["replica-0"] and site.registry.told[-1].file.version == 2
