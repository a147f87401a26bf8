# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Students that others have published as a bare transformer, or with a pipeline of their own.

The authors of SiD-DiT published theirs so (https://huggingface.co/YGu1998), to be sampled with pipelines that have to
be told the guidance (1) and the network's time at sigma = 1: 1000, but 1 for SANA-Sprint's. Both follow from the
teacher, whose network the student's is a copy of: its pipeline feeds the right time, and its contract tells what
guidance is and how to turn it off.
"""

import inspect
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, snapshot_download

from hf_flowdistill.errors import UserError, first_line
from hf_flowdistill.hub.checksums import PICKLES, files_of
from hf_flowdistill.hub.client_errors import persistently, reason
from hf_flowdistill.hub.teacher_card import check_repo
from hf_flowdistill.networks.loading import load_pipeline


WEIGHTS = "diffusion_pytorch_model"


def load_published(repo, *, teacher=None, revision=None, cache_dir=None, dtype):
    """The teacher's pipeline with the published student's transformer in it, which has the teacher's configuration.

    Args:
        repo: id on the Hub, or folder, with a transformer in safetensors: in transformer/ or at the top.
        teacher: id or folder of the pipeline it was distilled from; default: `base_model` of the repository's card.

    Returns:
        The pipeline; the teacher's id or path; sentences about what the student's configuration says otherwise.

    Raises:
        UserError: if the repository cannot be seen, has its weights as pickles only or none at all, does not say what
            its teacher is, or has another network than the teacher.
    """
    subfolder = _where_weights_are(repo, _names_of(repo, revision))
    folder = _download(repo, subfolder, revision, cache_dir)
    teacher = teacher or _base_model(folder)
    if teacher is None:
        raise UserError(f"{repo} does not say what it was distilled from: give the --teacher.")
    pipeline = load_pipeline(teacher, dtype=dtype, cache_dir=cache_dir)
    network = type(pipeline.transformer)
    theirs = network.load_config(folder, subfolder=subfolder)
    defaults = {name: p.default for name, p in inspect.signature(network.__init__).parameters.items()}
    other = {
        name: value
        for name, value in pipeline.transformer.config.items()
        if not name.startswith("_") and _plain(theirs.get(name, defaults.get(name))) != _plain(value)
    }
    try:
        transformer, loaded = network.from_pretrained(
            folder, subfolder=subfolder, dtype=dtype, use_safetensors=True, output_loading_info=True, **other
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{repo} is no student of {teacher}: {first_line(error)}.") from error
    strange = sorted([*loaded["missing_keys"], *loaded["unexpected_keys"]])
    if strange:
        raise UserError(
            f"{repo} is no student of {teacher}: {len(strange)} weights differ, {strange[0]} for instance."
        )
    pipeline.register_modules(transformer=transformer.eval())
    told = [f"{name} is {value}, as its teacher's, and not {theirs.get(name)}" for name, value in other.items()]
    return pipeline, teacher, told


def _names_of(repo, revision) -> list[str]:
    if Path(repo).is_dir():
        return list(files_of(repo))
    check_repo(repo)
    try:
        return persistently(HfApi().list_repo_files, repo, revision=revision)
    except Exception as error:  # of the client, or of the HTTP library that it is built on
        raise UserError(f"{repo} cannot be read: {reason(error)}.") from error


def _where_weights_are(repo, names) -> str | None:
    """The subfolder of the transformer; None is the top."""
    for subfolder in ("transformer/", ""):
        ours = [name for name in names if name.startswith(subfolder + WEIGHTS)]
        if any(name.endswith(".safetensors") for name in ours) and f"{subfolder}config.json" in names:
            return subfolder.rstrip("/") or None
    if any(name.endswith(PICKLES) for name in names):
        raise UserError(
            f"{repo} has the weights of its transformer as pickles only, which can run any code when they are loaded: "
            "ask its authors for safetensors."
        )
    raise UserError(f"{repo} has no transformer in safetensors, neither in transformer/ nor at the top.")


def _download(repo, subfolder, revision, cache_dir) -> Path:
    if Path(repo).is_dir():
        return Path(repo)
    wanted = [f"{subfolder}/*" if subfolder else "*", "README.md"]
    ignored = [f"*{ending}" for ending in PICKLES] + ([] if subfolder else ["*/*"])
    where = {"revision": revision, "cache_dir": cache_dir}
    try:
        return Path(persistently(snapshot_download, repo, allow_patterns=wanted, ignore_patterns=ignored, **where))
    except Exception as error:  # of the client, of the HTTP library that it is built on, of the operating system
        raise UserError(f"{repo} cannot be downloaded: {reason(error)}.") from error


def _base_model(folder) -> str | None:
    try:
        base_model = ModelCard.load(folder / "README.md").data.get("base_model")
    except (OSError, TypeError, ValueError):
        return None
    names = [base_model] if isinstance(base_model, str) else base_model or []
    return names[0] if len(names) == 1 else None


def _plain(value):
    return list(value) if isinstance(value, tuple) else value
