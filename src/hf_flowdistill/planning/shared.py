# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Rehearsals of one teacher that share what they have in common: the same peaks as those of `rehearsal.rehearse`."""

import contextlib
import gc
from dataclasses import replace

import torch

from hf_flowdistill.networks.roles import ROLES, TRAINED
from hf_flowdistill.planning.actors import Actor, Update, measure_update
from hf_flowdistill.planning.calls import Call, record
from hf_flowdistill.planning.few_blocks import KEPT, block_rows, extrapolated, shortened
from hf_flowdistill.planning.memory_tracker import Peak
from hf_flowdistill.planning.passes import Asked, Frame, assemble
from hf_flowdistill.planning.rehearsal import BUFFERS, LORA, WHEN


class Unknown(Exception):
    """Of a call that has to be recorded before: the `Asked`."""


class Rehearsals:
    """What is rehearsed of a teacher, and kept.

    Args:
        transformer: on the meta device; it is left as it is.
        contract, config: as for `rehearse`.
    """

    def __init__(self, transformer, contract, config):
        rows = [length for *_, length in block_rows(transformer)]
        self.longer = {(row, 1): length - KEPT for row, length in enumerate(rows) if length > KEPT}
        self.transformer = shortened(transformer, [min(length, KEPT + 1) for length in rows])
        self.contract, self.config = contract, config
        self.actors, self.calls, self.frames, self.cut, self.updates, self.sizes = ({} for _ in range(6))

    def peaks(self, case, views) -> list[Peak]:
        """For each of `views`, as for `rehearse`, the peak of a `cases.Case`.

        Raises:
            NotAlike: the networks' calls do not come apart; they have to be rehearsed as they are.
        """
        every = frozenset(self.longer)
        with _uncollected():
            base = self._rehearsed(case, views, every)
            added = [(times, self._rehearsed(case, views, every - {block})) for block, times in self.longer.items()]
        return extrapolated(base, added)

    def _rehearsed(self, case, views, left_out: frozenset) -> list[dict[tuple, Peak]]:
        frame, calls = self._passes(case)
        names = {role: "teacher" if _is_role(case, role) else role for role in ROLES}
        taken = assemble(frame, [self._cut(call, left_out) for call in calls], names)
        updates = {role: self._update(case, role, left_out) for role in TRAINED}
        marks = {role: _mark(case, role) for role in TRAINED}
        kept = self._values(case, left_out)
        for role in TRAINED:
            kept |= {f"{what}{marks[role]}": 0 for what in ("gradients", "update")}
            moments = f"Adam's moments{marks[role]}"
            kept[moments] = kept.get(moments, 0) + updates[role].moments
        found = [{} for _ in views]
        for (turn, part, place), activations in taken.items():
            update, when = updates[turn], WHEN[part].format(turn.replace("_", " "))
            parts = {**kept, f"gradients{marks[turn]}": update.gradients, "activations": activations}
            if part == "update":
                if update.taken is None:
                    continue
                parts[f"update{marks[turn]}"] = update.taken
            for view, peaks in zip(views, found):
                shares = {name: size * view(name) for name, size in parts.items()}
                if any(shares.values()):
                    peaks[when, place] = Peak(when, {name: size for name, size in shares.items() if size})
        return found

    def _passes(self, case) -> tuple[Frame, list[Call]]:
        """What is around the networks, and the calls in it."""
        dtypes = {role: self._actor(case, role).input_dtype for role in ROLES}
        precision = case.precision
        key = *dtypes.values(), precision.autocast, case.batch_size, case.share_rollout

        def find(asked):
            if (known := self.calls.get(self._kind(case, asked))) is None:
                raise Unknown(asked)
            return known

        while True:
            try:
                for frame in self.frames.get(key, ()):
                    calls = [find(place.asked) for place in frame.places]
                    if frame.faces == [call.face for call in calls]:
                        return frame, calls
                frame = Frame(
                    find,
                    dtypes,
                    self.contract,
                    self.config,
                    batch_size=case.batch_size,
                    autocast=case.autocast,
                    share_rollout=case.share_rollout,
                )
                self.frames.setdefault(key, []).append(frame)
            except Unknown as error:
                (asked,) = error.args
                self._record(case, asked)

    def _record(self, case, asked: Asked) -> None:
        _, _, plain, trained, checkpointed, *_ = kind = self._kind(case, asked)
        actor = self._actor(case, asked.role)
        with actor.ready(plain, trained, checkpointed) as network:
            call = record(network, asked.given, asked.grad, case.autocast, asked.gradients, actor)
        self.calls[kind] = self.calls[(*kind[:-1], call.forms)] = call

    def _kind(self, case, asked: Asked) -> tuple:
        """What a call depends on."""
        plain = asked.role == "teacher" and _is_role(case, "teacher")
        trained = asked.trained and asked.grad
        checkpointed = asked.grad and asked.role in case.checkpointed
        cached = case.precision.autocast and trained and case.cached
        return (
            *self._actor_key(case, asked.role),
            plain,
            trained,
            checkpointed,
            cached,
            case.precision.autocast,
            asked.grad,
            asked.given.key,
            asked.gradients,
        )

    def _actor_key(self, case, role: str) -> tuple:
        return case.precision.dtype, replace(case.roles, networks="lora") if _is_role(case, role) else None

    def _actor(self, case, role: str) -> Actor:
        dtype, settings = key = self._actor_key(case, role)
        if key not in self.actors:
            self.actors[key] = Actor(self.transformer, dtype, settings)
        return self.actors[key]

    def _cut(self, call: Call, left_out: frozenset) -> Call:
        key = id(call), left_out  # calls are kept
        if key not in self.cut:
            self.cut[key] = call.without(left_out)
        return self.cut[key]

    def _update(self, case, role: str, left_out: frozenset) -> Update:
        key = self._actor_key(case, role), case.precision.rounding, case.use_8bit_adam, left_out
        if key not in self.updates:
            self.updates[key] = self._measured(case, self._actor(case, role).trained(left_out))
        return self.updates[key]

    def _measured(self, case, parameters) -> Update:
        """Of any network with parameters of these shapes."""
        forms = tuple((parameter.shape, parameter.dtype) for parameter in parameters)
        rounds = case.precision.rounding if torch.bfloat16 in {dtype for _, dtype in forms} else None
        key = forms, rounds, case.use_8bit_adam
        if key not in self.updates:
            self.updates[key] = measure_update(parameters, case.build_optimizer)
        return self.updates[key]

    def _values(self, case, left_out: frozenset) -> dict[str, int]:
        """Component -> bytes of all networks."""
        key = *(self._actor_key(case, role) for role in ROLES), left_out
        if key not in self.sizes:
            sizes, average = {}, "average of the generator"
            for name, role in (("generator", "generator"), ("fake score", "fake_score"), (average, "generator")):
                actor = self._actor(case, role)
                if _is_role(case, role):
                    sizes[name + LORA] = sum(p.numel() * p.element_size() for p in actor.trained(left_out))
                else:
                    sizes[name], sizes[name + BUFFERS] = actor.sizes(left_out, name == average)
            sizes["teacher"], sizes["teacher" + BUFFERS] = self._actor(case, "teacher").sizes(left_out)
            self.sizes[key] = sizes
        return dict(self.sizes[key])


@contextlib.contextmanager
def _uncollected():
    """Without the garbage collector, which would look through all that is imported again and again."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def _is_role(case, role: str) -> bool:
    """Whether the network in this role is one on the teacher."""
    return case.roles.networks == "lora" or case.roles.networks == "lora_fake" and role != "generator"


def _mark(case, role: str) -> str:
    return LORA if _is_role(case, role) else ""
