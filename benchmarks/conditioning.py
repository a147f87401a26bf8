# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What conditioning costs: bytes and time per prompt, through the cache that training uses, as a table.

Of the tests' tiny teachers, or of any other with `--pretrained_model_name_or_path`; its transformer runs a few times,
to learn its contract.
"""

import sys
import tempfile
import time
from pathlib import Path

import torch


ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "tests")]

from teacher_cases import TEACHERS, learned  # noqa: E402

from hf_flowdistill.cli import ArgumentParser, json_object, silence_libraries  # noqa: E402
from hf_flowdistill.data.cache import cached_conditioning  # noqa: E402
from hf_flowdistill.data.keys import encoder_key  # noqa: E402
from hf_flowdistill.errors import exit_on_user_error  # noqa: E402
from hf_flowdistill.networks.loading import load_pipeline  # noqa: E402
from hf_flowdistill.teachers import bytes_per_prompt, encode_batch, learn_contract  # noqa: E402


def measure(pipeline, contract, prompts):
    """(class, bytes per prompt, on the disk, prompts encoded per second, found again per second, read per second)."""
    key, texts = encoder_key(pipeline, contract), [f"{number} cats" for number in range(prompts)]
    rates = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in ("encode", "find again"):
            begin = time.perf_counter()
            cached = cached_conditioning(folder, key, texts, lambda texts: encode_batch(pipeline, contract, texts))
            rates.append(prompts / (time.perf_counter() - begin))
        size = sum(path.stat().st_size for path in Path(folder).glob("shard-*"))
        rows = torch.randint(prompts, (100, 16), generator=torch.Generator().manual_seed(0))
        begin = time.perf_counter()
        for batch in rows:
            cached[batch]
        rates.append(rows.numel() / (time.perf_counter() - begin))
    return type(pipeline).__name__, bytes_per_prompt(pipeline, contract), round(size / prompts), *map(round, rates)


def main():
    parser = ArgumentParser(prog="conditioning.py", description=__doc__)
    parser.add_argument("--pretrained_model_name_or_path", metavar="PATH", help="instead of the tiny teachers")
    parser.add_argument("--resolution", type=int, default=1024, metavar="PIXELS", help="of that pipeline's images")
    parser.add_argument("--pipeline_kwargs", type=json_object, default={}, metavar="JSON", help="of its call")
    parser.add_argument("--prompts", type=int, default=256, metavar="N", help="how many are encoded")
    args = parser.parse_args()
    silence_libraries()
    if args.pretrained_model_name_or_path:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
        pipeline = load_pipeline(args.pretrained_model_name_or_path).to(device)
        size = {"height": args.resolution, "width": args.resolution}
        contract = learn_contract(pipeline, **size, pipeline_kwargs=args.pipeline_kwargs)
        results = [measure(pipeline, contract, args.prompts)]
    else:
        teachers = map(learned, TEACHERS)
        results = [measure(teacher.pipeline, teacher.contract, args.prompts) for teacher in teachers]
    print("| Pipeline | Bytes a prompt | On the disk | Encoded a second | Found again a second | Read a second |")
    print("| --- " * 6 + "|")
    for row in results:
        print("|", " | ".join(f"{value:,}" if isinstance(value, int) else value for value in row), "|")


if __name__ == "__main__":
    exit_on_user_error(main)()
