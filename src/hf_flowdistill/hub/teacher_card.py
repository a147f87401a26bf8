# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What a student inherits from the card of its teacher: the licence, and the gate before it."""

import re
from pathlib import Path

from hf_flowdistill.errors import UserError


ADDRESS = "https://huggingface.co"
NON_COMMERCIAL = re.compile(r"non-?commercial|(^|-)nc(-|$)", re.IGNORECASE)


def is_hub_id(name) -> bool:
    """Whether `name` can only be meant as organisation/name on the Hub."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)) and not Path(name).exists()


def check_repo(repo) -> None:
    """Raise `UserError` if there is no folder at `repo`, and it cannot be an id on the Hub either."""
    if not Path(repo).is_dir() and not is_hub_id(str(repo)):
        raise UserError(f"{repo} is neither a folder nor an id on the Hub: give organisation/name.")


def check_shared_components(shared_components, teacher) -> None:
    """Refuse to refer to components of a teacher that nobody else can load."""
    if shared_components == "referenced" and not is_hub_id(str(teacher)):
        raise UserError(f"components of {teacher} cannot be referenced, since it is not on the Hub: copy them.")


def read_teacher_card(teacher, revision=None) -> dict:
    """What the teacher's card says of its licence and its gate, as far as it can be read. Nothing is raised.

    Args:
        teacher: a folder, or an id on the Hub, which is then asked.

    Returns:
        Any of "license", "license_name", "license_link" (an address), "extra_gated_..." (the Hub's names), and "gated"
        ("auto" or "manual") of a repository that has to be asked for.
    """
    from huggingface_hub import HfApi, ModelCard  # here, since what is above needs no client

    teacher, found = str(teacher), {}
    try:
        if is_hub_id(teacher):
            api = HfApi()
            found["gated"] = api.model_info(teacher, revision=revision).gated
            card = ModelCard.load(api.hf_hub_download(teacher, "README.md", revision=revision))
        else:
            card = ModelCard.load(Path(teacher, "README.md"))
        data = card.data.to_dict()
        found |= {name: value for name, value in data.items() if name.startswith(("license", "extra_gated_"))}
    except Exception:  # No network, no card, no YAML in it: no reason to lose a finished training.
        pass
    link = found.get("license_link")
    if link and not str(link).startswith("http"):
        found["license_link"] = f"{ADDRESS}/{teacher}/blob/main/{link}" if is_hub_id(teacher) else None
    return {name: value for name, value in found.items() if value}


def is_non_commercial(teacher_card) -> bool:
    """Whether the licence says so in its name."""
    names = (str(teacher_card.get(name, "")) for name in ("license", "license_name"))
    return any(NON_COMMERCIAL.search(name) for name in names)
