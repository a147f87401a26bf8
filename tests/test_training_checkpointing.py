# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""test_resume.py has the whole run; here are the rules about folders."""

import resource
import subprocess

import pytest
import torch

from hf_flowdistill.errors import UserError
from hf_flowdistill.training import checkpointing
from hf_flowdistill.training.checkpoint_files import tensors_of
from hf_flowdistill.training.checkpointing import (
    check_same_run,
    find_resume,
    load_checkpoint,
    remove_unfinished,
    save_checkpoint,
    set_aside_later,
)
from hf_flowdistill.training.distributed import whole
from hf_flowdistill.training.folders import checkpoints, latest_checkpoint, read_run, read_state, write_run
from hf_flowdistill.training.sharding import Sharding


def trained(seed=0):
    """A network and its optimizer after one step, as `save_checkpoint` takes them."""
    torch.manual_seed(seed)
    network = torch.nn.Linear(3, 3)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    network(torch.randn(3)).sum().backward()
    optimizer.step()
    return {"networks": {"generator": network}, "optimizers": {"generator": optimizer}}


def save(folder, images_seen, seed=0, **more):
    return save_checkpoint(folder, **trained(seed), state={"images_seen": images_seen}, **more)


def test_what_is_saved_comes_back(tmp_path):
    path = save(tmp_path, 8)
    assert path == tmp_path / "checkpoint-8"
    other = trained(seed=1)
    assert load_checkpoint(path, **other) == {"images_seen": 8}
    network = trained()["networks"]["generator"]
    assert torch.equal(other["networks"]["generator"].weight, network.weight)
    saved, loaded = trained()["optimizers"]["generator"].state_dict(), other["optimizers"]["generator"].state_dict()
    assert torch.equal(saved["state"][0]["exp_avg_sq"], loaded["state"][0]["exp_avg_sq"])


def test_the_latest_is_the_one_with_most_images(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    for images_seen in (8, 100, 20):
        save(tmp_path, images_seen)
    (tmp_path / "checkpoint-200.tmp").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    assert latest_checkpoint(tmp_path).name == "checkpoint-100"


def test_rotation_waits_for_the_new_one(tmp_path, monkeypatch, caplog):
    for images_seen in (4, 8, 12):
        save(tmp_path, images_seen, total_limit=2)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-8", "checkpoint-12"}
    monkeypatch.setattr(checkpointing.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no more")))
    assert save(tmp_path, 16, total_limit=1) is None
    assert "checkpoint-16 could not be written, the earlier checkpoints are kept: no more" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-8", "checkpoint-12"}


def test_a_full_disk_costs_one_checkpoint(tmp_path, caplog):
    """The limit is the kernel's, on the size of a file: every way of writing one meets it as it would a full disk."""
    save(tmp_path, 4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (1, 300, 1500):  # in the networks' files, in the optimizers', after them
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            assert save(tmp_path, 8, total_limit=1) is None
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]
        assert find_resume(tmp_path, "latest").name == "checkpoint-4"
    assert caplog.text.count("checkpoint-8 could not be written") == 3
    assert save(tmp_path, 8, total_limit=1) == find_resume(tmp_path, "latest")


def test_a_later_branch_replaces_the_earlier_one(tmp_path):
    save(tmp_path, 8, seed=0)
    path = save(tmp_path, 8, seed=1)
    loaded = trained(seed=2)
    load_checkpoint(path, **loaded)
    assert torch.equal(loaded["networks"]["generator"].weight, trained(seed=1)["networks"]["generator"].weight)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-8"]


def test_where_a_run_starts(tmp_path):
    run = tmp_path / "run"
    assert find_resume(run, None) is None and find_resume(run, "latest") is None
    run.mkdir()
    assert find_resume(run, None) is None
    path = save(run, 8)
    assert find_resume(run, "latest") == path
    assert find_resume(run, "checkpoint-8") == path and find_resume(tmp_path, str(path)) == path
    with pytest.raises(UserError, match="no checkpoint checkpoint-9: .* holds checkpoint-8"):
        find_resume(run, "checkpoint-9")
    with pytest.raises(UserError, match="not a checkpoint of this script"):
        read_state(tmp_path)


@pytest.mark.parametrize("damage", ["generator.safetensors", "generator_optimizer.pt", "state.json", "SHA256SUMS"])
@pytest.mark.parametrize("how", ["cut", "altered", "gone"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_serves(damage, how, tmp_path, caplog):
    save(tmp_path, 4)
    file = save(tmp_path, 8) / damage
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink() if how == "gone" else file.write_bytes(content if how == "altered" else content[: len(content) // 2])
    for path in ("checkpoint-8", str(tmp_path / "checkpoint-8")):
        with pytest.raises(UserError, match=r"checkpoint-8 cannot be read \(.+\): resume from an earlier one"):
            find_resume(tmp_path, path)
    assert find_resume(tmp_path, "latest") == tmp_path / "checkpoint-4"
    assert "checkpoint-8 is damaged (" in caplog.text and "checkpoint-4 serves instead" in caplog.text
    assert damage in caplog.text or damage == "SHA256SUMS"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-8.damaged"]
    save(tmp_path, 8)
    assert find_resume(tmp_path, "latest") == tmp_path / "checkpoint-8"


def test_checksums_are_those_of_sha256sum(tmp_path):
    folder = save(tmp_path, 8)
    checked = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=folder, capture_output=True)
    assert checked.returncode == 0 and len(checked.stdout.splitlines()) == len(list(folder.iterdir())) - 1 == 3


def test_without_any_whole_checkpoint_nothing_is_renamed(tmp_path):
    """Starting anew in its place would lose it without a word."""
    (save(tmp_path, 8) / "state.json").unlink()
    with pytest.raises(UserError, match=r"checkpoint-8 cannot be read \(state.json: No such file"):
        find_resume(tmp_path, "latest")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-8"]


def test_networks_of_another_kind_are_refused(tmp_path):
    path, other = save(tmp_path, 8), {"networks": {"generator": torch.nn.Linear(4, 4)}, "optimizers": {}}
    with pytest.raises(UserError, match=r"checkpoint-8 cannot be read \(.+\): resume from an earlier one"):
        load_checkpoint(path, **other)


@pytest.fixture
def one_shard():
    yield Sharding("full", "cpu")
    torch.distributed.destroy_process_group()


def shard(sharding, run):
    """What `trained` gives, sharded, with the same optimizer state."""
    network = sharding.copy(sharding.shard(run["networks"]["generator"]), torch.float32)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    return {"networks": {"generator": network}, "optimizers": {"generator": optimizer}}


def plain(run):
    """Every number of a network and its optimizer."""
    network, optimizer = run["networks"]["generator"], run["optimizers"]["generator"]
    moments = [whole(value) for state in optimizer.state_dict()["state"].values() for value in state.values()]
    return [*(whole(tensor) for tensor in tensors_of(network).values()), *moments]


def test_shards_and_whole_files_are_read_into_each_other(one_shard, tmp_path):
    """And so are names with tensors, as adapters are kept."""
    run = trained()
    expected = plain(run)
    assert len(expected) == 2 + 2 * 3
    save(tmp_path, 8)
    sharded = shard(one_shard, trained(seed=1))
    load_checkpoint(tmp_path / "checkpoint-8", **sharded)
    assert all(map(torch.equal, plain(sharded), expected))
    save_checkpoint(tmp_path, **sharded, state={"images_seen": 16})
    assert (tmp_path / "checkpoint-16" / ".metadata").exists()
    again, back = shard(one_shard, trained(seed=2)), trained(seed=3)
    for target in (again, back):
        load_checkpoint(tmp_path / "checkpoint-16", **target)
        assert all(map(torch.equal, plain(target), expected))

    mapping = dict(run["networks"]["generator"].named_parameters())
    adapters = {"networks": {"generator": mapping}, "optimizers": run["optimizers"]}
    save_checkpoint(tmp_path, **adapters, state={"images_seen": 24})
    load_checkpoint(tmp_path / "checkpoint-24", **sharded)
    for images_seen in (8, 16):
        with torch.no_grad():
            mapping["weight"].zero_()
        load_checkpoint(tmp_path / f"checkpoint-{images_seen}", **adapters)
        assert all(map(torch.equal, plain(adapters), expected))


@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_damaged_shard_is_named(how, one_shard, tmp_path):
    run = shard(one_shard, trained())
    file = save_checkpoint(tmp_path, **run, state={"images_seen": 8}) / "__0_0.distcp"
    file.unlink() if how == "gone" else file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"checkpoint-8 cannot be read \(__0_0.distcp.+\): resume from an earlier one"):
        find_resume(tmp_path, "latest")
    with pytest.raises(UserError, match=r"checkpoint-8 cannot be read \(.+\): resume from an earlier one"):
        load_checkpoint(tmp_path / "checkpoint-8", **run)


def test_shards_on_a_full_disk(one_shard, tmp_path, caplog):
    run = shard(one_shard, trained())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        assert save_checkpoint(tmp_path, **run, state={"images_seen": 8}) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "checkpoint-8 could not be written" in caplog.text and not any(tmp_path.iterdir())


def test_other_settings_are_named():
    check_same_run({"alpha": 1.0, "seed": 0}, {"alpha": 1.0, "seed": 0})
    with pytest.raises(UserError, match=r"alpha \(was 1.0, now 1.2\), new \(was None, now 1\): use those"):
        check_same_run({"alpha": 1.0, "seed": 0}, {"alpha": 1.2, "seed": 0, "new": 1})


def test_a_folder_belongs_to_one_run(tmp_path):
    assert read_run(tmp_path / "new", resume=False) == read_run(tmp_path, resume=True) == []
    (tmp_path / "thesis.txt").write_text("years of work")
    for resume in (False, True):
        with pytest.raises(UserError, match="is not empty"):
            read_run(tmp_path, resume=resume)
    write_run(tmp_path / "new", {"alpha": 1.0})
    write_run(tmp_path / "new", {"alpha": 2.0})  # the run that was there first keeps it
    assert read_run(tmp_path / "new", resume=True) == [{"alpha": 1.0}]
    with pytest.raises(UserError, match="is not empty"):
        read_run(tmp_path / "new", resume=False)


def test_a_kill_while_one_checkpoint_makes_way_for_another_loses_neither(tmp_path, monkeypatch):
    save(tmp_path, 8, seed=0)
    replace, calls = checkpointing.os.replace, []

    def killed_the_second_time(source, target):
        calls.append(source)
        if len(calls) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(checkpointing.os, "replace", killed_the_second_time)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 8, seed=1)
    monkeypatch.undo()
    assert latest_checkpoint(tmp_path) is None
    remove_unfinished(tmp_path)
    loaded = trained(seed=2)
    load_checkpoint(latest_checkpoint(tmp_path), **loaded)
    assert torch.equal(loaded["networks"]["generator"].weight, trained(seed=0)["networks"]["generator"].weight)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-8"]


def test_a_kill_while_the_oldest_is_deleted_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    save(tmp_path, 8)

    def killed(path, **kwargs):
        if checkpointing.Path(path).exists():
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpointing.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 12, total_limit=1)
    assert [path.name for path in checkpointing.checkpoints(tmp_path)] == ["checkpoint-12"]


def test_a_run_that_goes_on_from_an_earlier_checkpoint_sets_the_later_ones_aside(tmp_path):
    """Else the limit would delete the new way's first checkpoint, and "latest" would be on the old way."""
    for images in (100, 200, 300):
        save(tmp_path, images)
    set_aside_later(tmp_path, 100)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-100"]
    path = save(tmp_path, 150, total_limit=1)
    assert find_resume(tmp_path, "latest") == path
    names = {"checkpoint-150", "checkpoint-200.abandoned", "checkpoint-300.abandoned"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_a_record_that_could_not_be_written_whole_is_none(tmp_path, monkeypatch):
    """A full disk or a kill while run.json is written leaves a folder where the same command starts again."""

    def half(path, text):
        with open(path, "w") as file:
            file.write(text[:5])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(type(tmp_path), "write_text", half)
        with pytest.raises(OSError, match="No space"):
            write_run(tmp_path, {"seed": 0})
    assert [path.name for path in tmp_path.iterdir()] == ["run.json.tmp"]
    assert read_run(tmp_path, resume=True) == read_run(tmp_path, resume=False) == []
    write_run(tmp_path, {"seed": 0})
    assert read_run(tmp_path, resume=True) == [{"seed": 0}]
