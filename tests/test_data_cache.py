# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What is read from the cache is what the pipeline computed, whoever wrote it and however often it was killed."""

import copy
import json
import runpy
import shutil
import threading

import pytest
import tiny_pipelines
import torch
from safetensors.torch import save_file
from teacher_cases import TEACHERS, learned
from tiny_pipelines import HEIGHT, WIDTH
from training_helpers import ROOT, run_command

from hf_flowdistill.data import cache as cache_module
from hf_flowdistill.data.cache import cached_conditioning
from hf_flowdistill.data.keys import encoder_key
from hf_flowdistill.errors import UserError
from hf_flowdistill.teachers import Conditioning, encode_batch, encode_prompts, learn_contract


SD3 = {"max_sequence_length": 16}
TEXTS = [f"{i} cats" for i in range(150)]  # three shards
KEY = {"encoder": "a", "size": 1}


def code(text):
    """Rows of a length of their own, so that nothing hides behind a fixed one."""
    values = torch.tensor([float(ord(character)) for character in text])
    return {"words": values.reshape(1, -1, 1), "mask": torch.ones(1, len(text), dtype=torch.bool)}


class Encoder:
    """Counts what it is given. As with real ones, the last digit depends on what is encoded together."""

    def __init__(self):
        self.texts = []

    def __call__(self, texts):
        assert len(texts) <= 16
        self.texts += texts
        rows = Conditioning.cat(Conditioning(code(text)) for text in texts)
        return Conditioning({**rows.tensors, "words": rows.tensors["words"] * (1 + 1e-6 * len(texts))})


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def shards_in(folder):
    return sorted(folder.glob("shard-*.safetensors"))


def assert_same(a, b):
    assert a.tensors.keys() == b.tensors.keys()
    assert all(torch.equal(a.tensors[name], b.tensors[name]) for name in a.tensors)


@pytest.mark.parametrize("name", TEACHERS)
def test_rows_are_the_pipelines_own_bit_for_bit(name, tmp_path):
    """Of every teacher; texts of three lengths, in two batches."""
    teacher = learned(name)
    pipeline, contract = teacher.pipeline, teacher.contract
    texts = [*TEXTS[:17], "a red cat on two blue dogs"]

    def encode(texts):
        return encode_batch(pipeline, contract, texts)

    cached = cached_conditioning(tmp_path, encoder_key(pipeline, contract), texts, encode)
    direct, _ = encode_prompts(pipeline, contract, texts)
    assert len(cached) == 18 and len(shards_in(tmp_path)) == 1
    assert_same(cached[:], direct)
    for index in (3, [17, 0, 0], torch.tensor([5, 16])):
        rows, expected = cached[index], direct[index]
        x_t = torch.randn(len(rows), *contract.latent_shape, generator=torch.Generator().manual_seed(0))
        sigma = torch.full((len(rows),), 0.7)
        with torch.no_grad():
            velocities = [contract.velocity(pipeline.transformer, x_t, sigma, c) for c in (rows, expected)]
        assert torch.equal(*velocities)


def test_every_text_is_encoded_once(tmp_path):
    first, second = Encoder(), Encoder()
    cached = cached_conditioning(tmp_path, KEY, ["b", "a", "b"], first)
    assert first.texts == ["b", "a"] and len(cached) == 3
    assert_same(cached[2], cached[0])
    cached = cached_conditioning(tmp_path, KEY, ["c", "a"], second)
    assert second.texts == ["c"]
    negative = cached_conditioning(tmp_path, KEY, ["a"], second, role="negative prompt")
    assert second.texts == ["c", "a"] and len(shards_in(tmp_path)) == 3
    assert cached[1].tensors["words"].item() != negative[0].tensors["words"].item()


def test_rows_of_different_lengths_are_filled_up_to_the_longest_asked_for(tmp_path):
    cached = cached_conditioning(tmp_path, KEY, ["abc", *TEXTS[:20], "a longer one"], Encoder())
    assert cached[[0, 1]].tensors["words"].shape == (2, 7, 1)  # as long as what it was encoded with
    both = cached[[0, 21]].tensors
    assert both["words"].shape == (2, 12, 1)
    assert both["mask"].sum(1).tolist() == [3, 12] and not both["words"][0, 3:].any()


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_shares_make_the_same_cache_as_one_process(world_size, tmp_path):
    alone = Encoder()
    cached = cached_conditioning(tmp_path / "one", KEY, TEXTS, alone)
    barrier, encoders, results = threading.Barrier(world_size), [Encoder() for _ in range(world_size)], {}

    def process(rank):
        share = {"rank": rank, "world_size": world_size, "wait": lambda: barrier.wait(30)}
        results[rank] = cached_conditioning(tmp_path / "several", KEY, TEXTS, encoders[rank], **share)

    threads = [threading.Thread(target=process, args=[rank]) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert contents(tmp_path / "one") == contents(tmp_path / "several")
    assert sorted(sum((encoder.texts for encoder in encoders), [])) == sorted(alone.texts)
    assert sum(bool(encoder.texts) for encoder in encoders) == min(world_size, 3)
    for rank in range(world_size):
        assert_same(results[rank][:], cached[:])


def test_what_a_crash_left_is_cleared(tmp_path):
    cached_conditioning(tmp_path / "whole", KEY, TEXTS, Encoder())
    shutil.copytree(tmp_path / "whole", tmp_path / "crashed")
    shards_in(tmp_path / "crashed")[1].rename(tmp_path / "crashed" / "unfinished-7.tmp")
    again = Encoder()
    cached_conditioning(tmp_path / "crashed", KEY, TEXTS, again)
    assert contents(tmp_path / "whole") == contents(tmp_path / "crashed")
    assert len(again.texts) in (22, 64)


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)


SPOILED = {
    "a flipped bit": flip,
    "half of it": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "nothing": lambda path: path.write_bytes(b""),
    "another shard's": lambda path: path.write_bytes(shards_in(path.parent)[0].read_bytes()),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_corrupt_shard_is_refused_by_name_and_deleting_it_mends(case, tmp_path):
    cached_conditioning(tmp_path, KEY, TEXTS, Encoder())
    whole, victim = contents(tmp_path), shards_in(tmp_path)[1]
    SPOILED[case](victim)
    with pytest.raises(UserError, match=f"the shard {victim} is corrupt .*: delete it, and what it holds is") as error:
        cached_conditioning(tmp_path, KEY, TEXTS, Encoder())
    assert "\n" not in str(error.value)
    victim.unlink()
    cached_conditioning(tmp_path, KEY, TEXTS, Encoder())
    assert contents(tmp_path) == whole


def test_a_changed_byte_is_noticed_wherever_it_is(tmp_path):
    cached_conditioning(tmp_path, KEY, TEXTS[:20], Encoder())
    (shard,) = shards_in(tmp_path)
    whole = shard.read_bytes()
    for place in [*range(0, 1200, 13), *range(1200, len(whole), 501)]:
        shard.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match=f"the shard {shard} is (corrupt|foreign)"):
            cached_conditioning(tmp_path, KEY, TEXTS[:20], Encoder())


def test_a_foreign_shard_is_refused_by_name(tmp_path):
    cached_conditioning(tmp_path / "own", KEY, TEXTS[:3], Encoder())
    cached_conditioning(tmp_path / "other", {**KEY, "encoder": "b"}, TEXTS[:3], Encoder())
    (foreign,) = shards_in(tmp_path / "other")
    shutil.copy(foreign, tmp_path / "own")
    with pytest.raises(UserError, match=f"the shard {tmp_path}/own/{foreign.name} is foreign"):
        cached_conditioning(tmp_path / "own", KEY, TEXTS[:3], Encoder())
    (tmp_path / "own" / foreign.name).unlink()
    save_file({"a": torch.ones(1)}, tmp_path / "own" / "shard-0.safetensors")
    with pytest.raises(UserError, match="shard-0.safetensors is foreign"):
        cached_conditioning(tmp_path / "own", KEY, TEXTS[:3], Encoder())


def test_a_cache_of_another_encoder_is_refused(tmp_path):
    cached_conditioning(tmp_path, KEY, TEXTS[:3], Encoder())
    with pytest.raises(UserError, match=f"{tmp_path} is from another encoder, which differs in encoder: give"):
        cached_conditioning(tmp_path, {**KEY, "encoder": "b"}, TEXTS[:3], Encoder())
    with pytest.raises(UserError, match="differs in new"):
        cached_conditioning(tmp_path, {**KEY, "new": 1}, TEXTS[:3], Encoder())
    for text in ("[1, 2]", "{", "7"):
        (tmp_path / "index.json").write_text(text)
        with pytest.raises(UserError, match="index.json is not the index of a conditioning cache"):
            cached_conditioning(tmp_path, KEY, TEXTS[:3], Encoder())


def test_a_second_run_waits_for_the_first(tmp_path, caplog):
    encoding, second = threading.Event(), Encoder()

    def slow(texts):
        encoding.set()
        while "waiting for it" not in caplog.text:
            threading.Event().wait(0.01)
        return Encoder()(texts)

    thread = threading.Thread(target=cached_conditioning, args=[tmp_path, KEY, TEXTS[:3], slow])
    thread.start()
    assert encoding.wait(30)
    cached_conditioning(tmp_path, KEY, TEXTS[:5], second)
    thread.join()
    assert second.texts == TEXTS[3:5]


def test_a_disk_that_is_not_shared(tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "_write", lambda *args, **kwargs: None)
    with pytest.raises(UserError, match="put it on a disk that all machines share"):
        cached_conditioning(tmp_path, KEY, TEXTS[:3], Encoder())


def test_the_benchmark_measures(tmp_path):
    measure = runpy.run_path(str(ROOT / "benchmarks" / "conditioning.py"))["measure"]
    teacher = learned("flux")
    name, size, on_disk, *rates = measure(teacher.pipeline, teacher.contract, 20)
    assert name == "FluxPipeline" and size == 4 * (16 * 32 + 16 + 1) and size < on_disk < 2 * size
    assert len(rates) == 3 and min(rates) > 0


def change_weight(pipeline, name):
    with torch.no_grad():
        next(getattr(pipeline, name).parameters())[0, 0] += 1e-3


CHANGES = {
    "text_encoder_2": lambda pipeline: change_weight(pipeline, "text_encoder_2"),
    "text_encoder_3": lambda pipeline: pipeline.text_encoder_3.to(torch.bfloat16),
    "tokenizer": lambda pipeline: setattr(pipeline.tokenizer, "model_max_length", 12),
    "tokenizer_3": lambda pipeline: pipeline.tokenizer_3.add_tokens(["cat"]),
    "": lambda pipeline: (change_weight(pipeline, "transformer"), pipeline(["a"], height=HEIGHT, width=WIDTH)),
}


def test_the_key_changes_with_everything_that_rows_depend_on():
    original = tiny_pipelines.stable_diffusion_3()
    contract = learn_contract(original, height=HEIGHT, width=WIDTH, pipeline_kwargs=SD3)
    key = encoder_key(original, contract)
    assert json.loads(json.dumps(key)) == key
    for name, change in CHANGES.items():
        pipeline = copy.deepcopy(original)
        change(pipeline)
        changed = encoder_key(pipeline, contract)
        assert [n for n in key if key[n] != changed[n] and n != "fed"] == ([name] if name else [])
    longer = learn_contract(original, height=HEIGHT, width=WIDTH, pipeline_kwargs={"max_sequence_length": 8})
    other = encoder_key(original, longer)
    assert [n for n in key if key[n] != other[n] and n != "fed"] == ["pipeline_kwargs"]


KILLED = """
import json, os, random, signal, sys, threading, time
from pathlib import Path
import tiny_pipelines
from hf_flowdistill.data import cache, keys
from hf_flowdistill.teachers import encode_batch, learn_contract

folder, texts = Path(sys.argv[1]), [f"{i} cats" for i in range(320)]
cache.PROMPTS_PER_SHARD = 16
pipeline = tiny_pipelines.stable_diffusion_3()
contract = learn_contract(pipeline, height=32, width=32, pipeline_kwargs={"max_sequence_length": 16})
key = keys.encoder_key(pipeline, contract)

def start(name):
    pid = os.fork()
    if pid:
        return pid
    cache.tqdm.set_lock(threading.RLock())  # the usual one is shared with the others and dies with one that holds it
    encoded = []
    encode = lambda texts: encoded.append(len(texts)) or encode_batch(pipeline, contract, texts)
    cache.cached_conditioning(folder / name, key, texts, encode)
    Path(folder, name + ".encoded").write_text(str(sum(encoded)))
    os._exit(0)

begin = time.perf_counter()
assert os.waitpid(start("uninterrupted"), 0)[1] == 0
longest, draw, left = time.perf_counter() - begin, random.Random(0), []
while len(left) < 10:
    name = f"killed-{len(left)}"
    pid = start(name)
    time.sleep(draw.uniform(0, longest))
    os.kill(pid, signal.SIGKILL)
    if not os.WIFSIGNALED(os.waitpid(pid, 0)[1]):  # it was done before
        os.rename(folder / name, folder / f"too-late-{time.time()}")
        longest *= 0.9
        continue
    left.append(len(list((folder / name).glob("shard-*"))))
    assert os.waitpid(start(name), 0)[1] == 0
print(json.dumps(left))
"""


def test_what_a_kill_left_unfinished_goes(tmp_path):
    def encode(texts):
        return [Conditioning({"embeds": torch.zeros(1, 2)}) for _ in texts]

    cached_conditioning(tmp_path, KEY, ["a"], encode)
    whole = contents(tmp_path)
    for name in ("unfinished-0.tmp", ".tmpA1b2C3"):  # ours, and what safetensors renames to it
        (tmp_path / name).write_bytes(b"half")
    cached_conditioning(tmp_path, KEY, ["a"], encode)
    assert contents(tmp_path) == whole


def test_a_folder_of_something_else_is_refused_as_it_is(tmp_path):
    (tmp_path / ".tmp-notes").write_text("mine")
    with pytest.raises(UserError, match="no conditioning cache: give a new or empty folder as --conditioning_cache_d"):
        cached_conditioning(tmp_path, KEY, TEXTS[:3], Encoder())
    assert contents(tmp_path) == {".tmp-notes": b"mine"}


def test_killed_at_ten_random_moments(tmp_path):
    """Each time one run is killed and a second one goes on: the same bytes as without, and nothing encoded twice."""
    left = json.loads(run_command("-c", KILLED, tmp_path).stdout.splitlines()[-1])
    assert len(left) == 10 and sum(0 < shards < 20 for shards in left) >= 3
    uninterrupted = contents(tmp_path / "uninterrupted")
    assert len(uninterrupted) == 21
    for i, shards in enumerate(left):
        assert contents(tmp_path / f"killed-{i}") == uninterrupted
        assert int((tmp_path / f"killed-{i}.encoded").read_text()) == 320 - 16 * shards
