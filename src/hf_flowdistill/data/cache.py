# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Conditioning on disk: encoded once, by all processes together, and read row by row from memory-mapped files.

A cache is a folder that belongs to one encoder, which its index.json describes. Its shards never change: each is
written under a temporary name and then named after the checksum of its bytes, so that a crash costs unfinished ones
only, and several runs can share the folder.
"""

import contextlib
import dataclasses
import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tqdm.auto import tqdm

from hf_flowdistill.data.shards import (
    check_shard,
    claim,
    corrupt,
    json_digest,
    one_run_at_a_time,
    read_about,
    write_shard,
)
from hf_flowdistill.errors import UserError
from hf_flowdistill.networks.loading import weights_digest
from hf_flowdistill.teachers.conditioning import Conditioning


PROMPTS_PER_BATCH = 16
PROMPTS_PER_SHARD = 64  # what a crash can cost each process; a multiple of the batch
TOKENIZED = "A photo of 2 CATS (8k), naïve café — 猫 🐈\n  don't"


def encoder_key(pipeline, contract) -> dict[str, Any]:
    """Everything that a prompt's conditioning depends on besides its text, as JSON.

    That is the weights of the text encoders, the tokenizers, the source code of the pipeline (its prompt
    template), its arguments (maximum length), the image size, the kind of guidance, and the dtypes.
    """
    guidance = {**dataclasses.asdict(contract.guidance), "embedded": contract.embedded_guidance}
    components = {
        name: _component_digest(component)
        for name, component in sorted(pipeline.components.items())
        if component is not None and name not in ("transformer", "vae", "scheduler")
    }
    key = {
        "pipeline": type(pipeline).__name__,
        "pipeline_source": _source_digest(type(pipeline)),
        "pipeline_kwargs": contract.pipeline_kwargs,
        "size": [contract.height, contract.width],
        "dtypes": {str(name): str(dtype) for name, dtype in contract.dtypes.items()},
        "guidance": guidance,
        **components,
    }
    return json.loads(json.dumps(key, default=str))


class CachedConditioning:
    """The rows of some texts in a cache: like a `Conditioning` to index, but they stay on the disk until then.

    Rows of different lengths are filled up to the longest that is asked for, as by `Conditioning.cat`.
    """

    def __init__(self, shards: list[Path], places: torch.Tensor):
        self.shards = shards
        self.places = places  # [n, 2]: which shard, which row in it

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int | slice | Sequence[int] | torch.Tensor) -> Conditioning:
        """Rows, on the CPU, always with the batch dimension kept: an integer gives one row."""
        places = self.places[index].reshape(-1, 2).tolist()
        return Conditioning.cat(_read_row(self.shards[shard], row) for shard, row in places)


def cached_conditioning(
    folder,
    key: dict[str, Any],
    texts: Sequence[str],
    encode: Callable[[list[str]], Conditioning],
    *,
    role: str = "prompt",
    rank: int = 0,
    world_size: int = 1,
    wait: Callable[[], None] = lambda: None,
) -> CachedConditioning:
    """The conditioning of `texts`, of which what `folder` does not hold yet is encoded and added to it.

    Every process calls this and encodes its share. What is encoded together, and so every bit, depends on `texts` and
    on what the folder held, not on the number of processes or on interruptions.

    Args:
        key: of the encoder, from `encoder_key`.
        texts: one that is repeated is encoded once.
        encode: texts -> one row each; it gets at most 16 at a time.
        role: texts of another role are others, e.g. negative prompts, which some pipelines encode in their own way.
        wait: returns when all processes have called it.

    Raises:
        UserError: the cache belongs to another encoder, or a shard is corrupt or foreign; the message names it.
    """
    folder, names = Path(folder), [_text_digest(role, text) for text in texts]
    wanted = dict(zip(names, texts))
    folder.mkdir(parents=True, exist_ok=True)
    with one_run_at_a_time(folder, "conditioning") if rank == 0 else contextlib.nullcontext():
        if rank == 0:
            claim(folder, key, "conditioning", "encoder", "--conditioning_cache_dir")
        wait()
        found, holding = _find(folder, json_digest(key), wanted)
        for path in holding[rank::world_size]:
            check_shard(path)
        wait()  # everyone has looked before anyone writes
        _encode_share(folder, json_digest(key), wanted, found, encode, rank, world_size)
        wait()
        found, holding = _find(folder, json_digest(key), wanted)
    if len(found) < len(wanted):
        raise UserError(
            f"the conditioning cache {folder} does not show this process what others wrote there: put it on a disk "
            "that all machines share."
        )
    number = {path: i for i, path in enumerate(holding)}
    return CachedConditioning(holding, torch.tensor([(number[found[name][0]], found[name][1]) for name in names]))


def _encode_share(folder, key, wanted, found, encode, rank, world_size) -> None:
    """Encode and write this process's part of what is `wanted` and not `found`: every `world_size`-th block of it."""
    names = list(wanted)
    blocks = [names[start : start + PROMPTS_PER_SHARD] for start in range(0, len(names), PROMPTS_PER_SHARD)]
    blocks = [[name for name in block if name not in found] for block in blocks]
    share = list(filter(None, blocks))[rank::world_size]
    total = sum(map(len, share))
    with tqdm(total=total, unit="prompt", desc="encoding", disable=rank > 0 or total == 0) as progress:
        for block in share:
            rows = []
            for start in range(0, len(block), PROMPTS_PER_BATCH):
                batch = block[start : start + PROMPTS_PER_BATCH]
                encoded = encode([wanted[name] for name in batch])
                rows += [encoded[row] for row in range(len(batch))]
                progress.update(len(batch))
            _write(folder, key, block, rows, unfinished=f"unfinished-{rank}.tmp")


def _find(folder: Path, key: str, wanted: dict[str, str]) -> tuple[dict[str, tuple[Path, int]], list[Path]]:
    """Where (shard, row) those `wanted` texts are that are there already, and the shards that hold any."""
    found, holding = {}, []
    for path in sorted(folder.glob("shard-*.safetensors")):
        about = read_about(path, "conditioning")
        texts = about.get("texts")
        if about.get("key") != key:
            raise UserError(
                f"the shard {path} is foreign, it was not written by this encoder: take it away, or give another "
                "--conditioning_cache_dir."
            )
        if not isinstance(texts, list):
            raise corrupt(path, "it does not say which prompts it holds")
        rows = {name: (path, row) for row, name in enumerate(texts) if name in wanted}
        if rows:
            holding.append(path)
            found.update(rows)
    return found, holding


def _write(folder: Path, key: str, names: list[str], rows: list[Conditioning], *, unfinished: str) -> None:
    """One shard, whole or not at all. Rows are tensors of their own, because their lengths may differ."""
    tensors = {f"{i}.{name}": tensor.clone() for i, row in enumerate(rows) for name, tensor in row.tensors.items()}
    about = {"conditioning": json.dumps({"key": key, "texts": names})}
    write_shard(folder, tensors, about, unfinished=unfinished)


def _read_row(path: Path, row: int) -> Conditioning:
    with safe_open(path, "pt") as shard:
        prefix = f"{row}."
        names = [name for name in shard.keys() if name.startswith(prefix)]
        return Conditioning({name.removeprefix(prefix): shard.get_tensor(name) for name in names})


def _text_digest(role: str, text: str) -> str:
    return hashlib.sha256(f"{role}\0{text}".encode()).hexdigest()[:32]


def _source_digest(cls: type) -> str:
    """Of the file that defines `cls`; a class typed into an interpreter has none."""
    try:
        return hashlib.sha256(inspect.getsource(inspect.getmodule(cls)).encode()).hexdigest()[:16]
    except (OSError, TypeError):
        return ""


def _component_digest(component) -> str:
    """Of a text encoder's weights, or of how a tokenizer (or a processor's) cuts text; else the name of the class.

    Not of a tokenizer's files: they also hold where it came from and how it was called last.
    """
    if isinstance(component, torch.nn.Module):
        return weights_digest(component)
    tokenizer = getattr(component, "tokenizer", component)
    if not hasattr(tokenizer, "get_vocab"):
        return type(component).__name__
    parts = {
        "vocabulary": tokenizer.get_vocab(),
        "example": tokenizer(TOKENIZED)["input_ids"],
        "chat_template": getattr(component, "chat_template", None),
        "model_max_length": tokenizer.model_max_length,
    }
    return json_digest(parts)[:16]
