# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Conditioning on disk: encoded once, by all processes together, and read row by row from memory-mapped files.

A cache is a folder that belongs to one encoder, which its index.json describes. Its shards never change: each is
written under a temporary name and then named after the checksum of its bytes, so that a crash costs unfinished ones
only, and several runs can share the folder.
"""

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
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
from hf_flowdistill.teachers.conditioning import Conditioning
from hf_flowdistill.teachers.tokens import TextTokens


PROMPTS_PER_BATCH = 16
PROMPTS_PER_SHARD = 64  # what a crash can cost each process; a multiple of the batch
SHOWN = 60  # letters of a prompt, in a message


def unwatched(texts: Sequence[str]):
    """For encoders whose tokenizers are not looked at."""
    return contextlib.nullcontext([TextTokens() for _ in texts])


class CachedConditioning:
    """The rows of some texts in a cache: like a `Conditioning` to index, but they stay on the disk until then.

    Rows of different lengths are filled up to the longest that is asked for, as by `Conditioning.cat`.

    Attributes:
        shards: the files.
        places: [n, 2], of each row: which shard, which row in it.
        encoded: how many distinct rows were not there before.
    """

    def __init__(self, shards: list[Path], places: torch.Tensor, encoded: int = 0):
        self.shards, self.places, self.encoded = shards, places, encoded

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int | slice | Sequence[int] | torch.Tensor) -> Conditioning:
        """Rows, on the CPU, always with the batch dimension kept: an integer gives one row."""
        places = self.places[index].reshape(-1, 2).tolist()
        return Conditioning.cat(_read_row(self.shards[shard], row) for shard, row in places)

    def notes(self) -> Iterator[tuple[str, str, dict[str, list[int]]]]:
        """Of each row in turn: digest of its tensors, digest of its tokens ("" if not known), and what was cut, as in
        `TextTokens`."""
        about = [read_about(path, "conditioning")["rows"] for path in self.shards]
        return (tuple(about[shard][row]) for shard, row in self.places.tolist())

    def origin(self) -> str:
        """In words, how many rows were read and how many encoded."""
        folder, read = self.shards[0].parent, len(self.places.unique(dim=0)) - self.encoded
        parts = [f"{read} prompts are read from {folder}"] * bool(read)
        parts += [f"{self.encoded} are encoded" if read else f"{self.encoded} prompts are encoded"] * bool(
            self.encoded
        )
        return ", ".join(parts)

    def losses(self, texts: Sequence[str], kind: str = "prompts") -> str:
        """A sentence on those of `texts`, one for each row, that were cut or are alike once they are encoded; "" if
        there are none."""
        cut, limits, longest, seen, alike = Counter(), {}, (0, ""), set(), 0
        several = 0
        for text, (row, tokens, lengths) in dict(zip(texts, self.notes())).items():
            several += bool(lengths)
            for name, (length, limit) in lengths.items():
                cut[name] += 1
                limits[name] = limit
                longest = max(longest, (length, text))
            mine = {row, tokens} - {""}
            alike += bool(mine & seen)
            seen |= mine
        parts = []
        if several:
            by = ", ".join(f"{count} by {name} to {limits[name]} tokens" for name, count in sorted(cut.items()))
            shown = longest[1] if len(longest[1]) <= SHOWN else longest[1][:SHOWN] + "..."
            parts.append(
                f"{several} of {len(texts)} {kind} are longer than the teacher takes and are cut, {by}: the longest "
                f"has {longest[0]}, {shown!r}"
            )
        if alike:
            parts.append(f"{alike} of {len(texts)} {kind} have the same conditioning as another one")
        return "; ".join(parts)


def cached_conditioning(
    folder,
    key: dict[str, Any],
    texts: Sequence[str],
    encode: Callable[[list[str]], Conditioning],
    *,
    role: str = "prompt",
    watched: Callable[[list[str]], contextlib.AbstractContextManager[list[TextTokens]]] = unwatched,
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
        watched: what tokenizers do with texts that are encoded inside, from `teachers.tokens.watched_tokenizers`.
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
        missing = len(wanted) - len(found)
        _encode_share(folder, json_digest(key), wanted, found, encode, watched, rank, world_size)
        wait()
        found, holding = _find(folder, json_digest(key), wanted)
    if len(found) < len(wanted):
        raise UserError(
            f"the conditioning cache {folder} does not show this process what others wrote there: put it on a disk "
            "that all machines share."
        )
    number = {path: i for i, path in enumerate(holding)}
    places = torch.tensor([(number[found[name][0]], found[name][1]) for name in names])
    return CachedConditioning(holding, places, missing)


def _encode_share(folder, key, wanted, found, encode, watched, rank, world_size) -> None:
    """Encode and write this process's part of what is `wanted` and not `found`: every `world_size`-th block of it."""
    names = list(wanted)
    blocks = [names[start : start + PROMPTS_PER_SHARD] for start in range(0, len(names), PROMPTS_PER_SHARD)]
    blocks = [[name for name in block if name not in found] for block in blocks]
    share = list(filter(None, blocks))[rank::world_size]
    total = sum(map(len, share))
    with tqdm(total=total, unit="prompt", desc="encoding", disable=rank > 0 or total <= PROMPTS_PER_BATCH) as progress:
        for block in share:
            rows, tokens = [], []
            for start in range(0, len(block), PROMPTS_PER_BATCH):
                batch = block[start : start + PROMPTS_PER_BATCH]
                texts = [wanted[name] for name in batch]
                with watched(texts) as made:
                    encoded = encode(texts)
                tokens += made
                rows += [encoded[row] for row in range(len(batch))]
                progress.update(len(batch))
            _write(folder, key, block, rows, tokens, unfinished=f"unfinished-{rank}.tmp")


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


def _write(
    folder: Path,
    key: str,
    names: list[str],
    rows: list[Conditioning],
    tokens: list[TextTokens],
    *,
    unfinished: str,
) -> None:
    """One shard, whole or not at all. Rows are tensors of their own, because their lengths may differ."""
    tensors = {f"{i}.{name}": tensor.clone() for i, row in enumerate(rows) for name, tensor in row.tensors.items()}
    notes = [(_row_digest(row), made.digest, made.cut) for row, made in zip(rows, tokens)]
    about = {"conditioning": json.dumps({"key": key, "texts": names, "rows": notes})}
    write_shard(folder, tensors, about, unfinished=unfinished)


def _read_row(path: Path, row: int) -> Conditioning:
    with safe_open(path, "pt") as shard:
        prefix = f"{row}."
        names = [name for name in shard.keys() if name.startswith(prefix)]
        return Conditioning({name.removeprefix(prefix): shard.get_tensor(name) for name in names})


def _text_digest(role: str, text: str) -> str:
    return hashlib.sha256(f"{role}\0{text}".encode()).hexdigest()[:32]


def _row_digest(row: Conditioning) -> str:
    digest = hashlib.blake2b(digest_size=6)
    for name, tensor in sorted(row.tensors.items()):
        digest.update(f"{name} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
