# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""test_resume.py has the whole run; here are the rules about folders."""

import pytest
import torch

from hf_flowdistill.errors import UserError
from hf_flowdistill.training import checkpointing
from hf_flowdistill.training.checkpointing import (
    check_same_run,
    find_resume,
    latest_checkpoint,
    load_checkpoint,
    read_run,
    read_state,
    remove_unfinished,
    save_checkpoint,
    write_run,
)


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


def test_rotation_waits_for_the_new_one(tmp_path, monkeypatch):
    for images_seen in (4, 8, 12):
        save(tmp_path, images_seen, total_limit=2)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-8", "checkpoint-12"}
    monkeypatch.setattr(checkpointing.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save(tmp_path, 16, total_limit=1)
    assert latest_checkpoint(tmp_path).name == "checkpoint-12"
    assert (tmp_path / "checkpoint-8").is_dir()
    remove_unfinished(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-8", "checkpoint-12"}


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


@pytest.mark.parametrize("damage", ["generator.safetensors", "generator_optimizer.pt"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_a_damaged_checkpoint_is_named(damage, how, tmp_path):
    file = save(tmp_path, 8) / damage
    content = file.read_bytes()
    file.unlink() if how == "gone" else file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"checkpoint-8 cannot be read \(.+\): resume from an earlier one"):
        load_checkpoint(tmp_path / "checkpoint-8", **trained())


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
