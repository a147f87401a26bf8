# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What every method's script has before its loop and after it: networks, optimizers, resume, the student.

How a script uses it, with its own loop in between:

    accelerator = launch(args)
    prompts = read_training_prompts(args, of_images=method.takes_images)
    identity = identify(args, method, accelerator, prompts)
    run = prepare(args, method, accelerator, prompts, identity)
    ...
    finish(run)
"""

import functools
import logging
import math
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from hf_flowdistill.errors import UserError
from hf_flowdistill.flow.draws import draw_bucket, global_indices, sample_noise, stream_seed
from hf_flowdistill.flow.rollout import Sampler
from hf_flowdistill.hub.export import CardContent, TeacherSource, TrainingRecord, export_student
from hf_flowdistill.hub.push import push_student
from hf_flowdistill.hub.student import sampler_change
from hf_flowdistill.methods.method import Method, Samples, Size
from hf_flowdistill.methods.phases import last_begun, method_of, not_reached
from hf_flowdistill.networks.adapters import save_lora
from hf_flowdistill.networks.loading import configuration, weights_digest
from hf_flowdistill.networks.placement import streamed
from hf_flowdistill.networks.roles import Networks, check_gradient_checkpointing, role_settings
from hf_flowdistill.teachers import learn_low_precision
from hf_flowdistill.training import checkpointing, monitors
from hf_flowdistill.training.ema import EMA
from hf_flowdistill.training.folders import read_state, write_run
from hf_flowdistill.training.initial_weights import load_weights
from hf_flowdistill.training.launch import Identity, find_checkpoint
from hf_flowdistill.training.optimizers import build_optimizer, learning_rate_factor
from hf_flowdistill.training.teacher import Teacher, load_teacher
from hf_flowdistill.training.texts import Texts, open_images, open_pairs, open_prompt_parts


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Run:
    """A training that is ready to begin, or to go on.

    Attributes:
        state: JSON, what a checkpoint keeps besides tensors: "images_seen", "step" and "skipped_updates", the "turns"
            of each network that took a step and that did not, the run's "settings" as they were asked for, of them
            what was "used" otherwise, the monitors' "averages", "teacher" for each image size.
    """

    args: Any
    accelerator: Accelerator
    method: Method
    teacher: Teacher
    texts: Texts
    networks: Networks
    ema: EMA
    optimizers: dict[str, torch.optim.Optimizer]
    state: dict

    @property
    def images_per_update(self) -> int:
        return self.state["settings"]["images_per_update"]

    @property
    def sampler(self) -> Sampler:
        """The student's as it is now: that of the last update, and not one that it has yet to be trained at."""
        return self.method.sampler(last_begun(self.state["settings"], self.state["images_seen"]))

    @property
    def saved(self) -> dict:
        """The tensors of a checkpoint."""
        return {"networks": {**self.networks.trained(), "ema": self.ema.model}, "optimizers": self.optimizers}

    def draw_size(self) -> tuple[int, Size]:
        """Which of the image sizes this update has, and its number."""
        number = draw_bucket(self.args.seed, self.state["step"], len(self.texts.sizes))
        return number, self.texts.sizes[number]

    def samples(self, size: Size, micro_batch: int) -> Samples:
        """This process's samples in a micro-batch of this update."""
        accelerator = self.accelerator
        indices = global_indices(
            micro_batch,
            self.args.train_batch_size,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
        )
        return self._samples(size, self.state["step"], self.state["images_seen"], indices, micro_batch)

    def fixed_samples(self, size: Size, indices: range) -> Samples:
        """Samples that are the same at any time of the training."""
        return self._samples(size, 0, 0, indices, 0)

    def _samples(self, size: Size, step: int, images_seen: int, indices: range, number: int) -> Samples:
        return Samples(
            seed=self.args.seed,
            step=step,
            images_seen=images_seen,
            images_per_update=self.images_per_update,
            indices=indices,
            number=number,
            size=size,
            prompts=self.texts.prompts,
            pairs=self.texts.pairs,
            device=self.accelerator.device,
        )

    def learning_rates(self) -> dict[str, float]:
        """Name of the network -> its learning rate in this update."""
        args = self.args
        factor = learning_rate_factor(
            args.lr_scheduler,
            self.state["images_seen"],
            batch_size=self.images_per_update,
            warmup=args.lr_warmup_images,
            end=args.max_train_images,
        )
        return {"fake_score": factor * args.fake_score_learning_rate, "generator": factor * args.learning_rate}

    def is_due(self, interval: int) -> bool:
        """Whether the last update passed a multiple of `interval` images, or was the last of all. 0 is never."""
        seen = self.state["images_seen"]
        passed = interval and seen // interval > (seen - self.images_per_update) // interval
        return bool(passed or (interval and seen >= self.args.max_train_images))

    def save_checkpoint(self) -> Path | None:
        """A checkpoint of now; None if it could not be written, which the log then says."""
        limit = self.args.checkpoints_total_limit
        return checkpointing.save_checkpoint(
            self.args.output_dir, state=self.state | self.texts.state, total_limit=limit, **self.saved
        )


def prepare(args, method: Method, accelerator: Accelerator, prompts: list[str], identity: Identity) -> Run:
    """Everything before the first update: the teacher and its contract, all texts, networks, optimizers, resume.

    Raises:
        UserError: on all processes; the teacher is none, a prompt cannot be encoded, the run is another one.
    """
    find_checkpoint(args, accelerator, identity)
    checkpoint = identity.checkpoint
    resumed = read_state(checkpoint) if checkpoint else {}
    dataset = open_images(args) if method.takes_images else None
    teacher = load_teacher(args, accelerator.device)
    roles, transformer = role_settings(args), teacher.pipeline.transformer
    with teacher.on_device():
        method.settle(teacher.pipeline, teacher.contracts[0])
    roles.layers(transformer)  # which refuses unknown names, while that is early
    identity.check(teacher_weights=weights_digest(transformer), teacher_config=configuration(teacher.pipeline))
    transformer = teacher.sharding.release(teacher.pipeline, getattr(torch, args.weight_dtype))
    teacher = in_precision(teacher, transformer, accelerator)
    logger.info(f"the teacher's contract:\n{teacher.contracts[0].describe()}")

    pairs = open_pairs(args, accelerator, teacher, dataset, resumed.get("images")) if method.takes_images else None
    identity.check(**({} if pairs is None else {"dataset": pairs.identity}))
    if accelerator.is_main_process:  # before anything else is written there
        write_run(args.output_dir, identity.settings)
    texts = Texts(args, accelerator, teacher, pairs or open_prompt_parts(args, accelerator))
    texts.take(prompts, resumed.get("images_seen", 0))

    networks = build_networks(args, method, teacher, transformer, texts.sizes[0], accelerator)
    if checkpoint is None and getattr(args, "student_model_name_or_path", None):
        start_as_student(args, method, networks, teacher)
    method.equip(networks, teacher.sharding.add)
    ema = EMA(networks.generator, args.ema_half_life_images, copy=teacher.sharding.copy)
    optimizers = {name: build_adam(args, name, network) for name, network in networks.trained().items()}
    state = {"images_seen": 0, "step": 0, "skipped_updates": 0, "turns": {}}
    state |= {"settings": identity.settings, "averages": {}}
    run = Run(args, accelerator, method, teacher, texts, networks, ema, optimizers, state)
    if checkpoint is None:
        state["teacher"] = [measure(run, size) for size in texts.sizes]
    else:
        # of settings, those of now: the teacher may have moved
        state |= checkpointing.load_checkpoint(checkpoint, **run.saved) | {"settings": identity.settings}
        state["turns"] = state["turns"] or {"generator": [state["step"], 0]}  # earlier versions did not count them
        checkpointing.set_aside_later(args.output_dir, state["images_seen"])
        logger.info(f"going on from {checkpoint}, {state['images_seen']} of {args.max_train_images} images")
    state |= {"used": method.used | used_roles(args), "hardware": monitors.add_hardware(state, accelerator)}
    logger.info(
        f"{texts.prompts.count} prompts ({len(texts.prompts.distinct)} distinct), {run.images_per_update} images "
        f"per update: {accelerator.num_processes} processes x {args.gradient_accumulation_steps} micro-batches x "
        f"{args.train_batch_size}"
    )
    return run


def in_precision(teacher: Teacher, transformer, accelerator: Accelerator) -> Teacher:
    """`teacher` with contracts for its `transformer` in the precision of the training."""
    with teacher.on_device(), streamed([transformer], accelerator.device), accelerator.autocast():
        contracts = [learn_low_precision(teacher.pipeline, one, transformer) for one in teacher.contracts]
    return replace(teacher, contracts=contracts)


def build_networks(args, method: Method, teacher: Teacher, transformer, size: Size, accelerator) -> Networks:
    """The networks that all start as the teacher's `transformer`, in the roles that the arguments name."""
    device = accelerator.device
    if args.gradient_checkpointing:
        with streamed([transformer], device):
            check_gradient_checkpointing(transformer, functools.partial(predict_once, size, accelerator))
    networks = Networks.from_teacher(
        transformer,
        getattr(torch, args.weight_dtype),
        role_settings(args),
        copy=teacher.sharding.copy,
        trains=method.trains,
        device=device if args.sharding == "none" else None,
        seed=args.seed,
    )
    if args.gradient_checkpointing:
        networks.enable_gradient_checkpointing(args.gradient_checkpointing)
    return networks


def predict_once(size: Size, accelerator, network, *, sigma: float = 0.5, device=None) -> torch.Tensor:
    """One prediction of `network`: the velocity at `sigma` of what the first prompt's noise is there."""
    device = device or accelerator.device
    x_t = sample_noise(size.contract.latent_shape, seed=0, step=0, purpose="check", indices=[0], device=device)
    with accelerator.autocast():
        return size.contract.velocity(network, x_t, x_t.new_full((1,), sigma), size.conditional[[0]].to(device))


def predict_from_noise(run: Run, network) -> torch.Tensor:
    """`predict_once` at sigma 1, where `network` is."""
    device = next(network.parameters()).device
    return predict_once(run.texts.sizes[0], run.accelerator, network, sigma=1.0, device=device)


def start_as_student(args, method: Method, networks: Networks, teacher: Teacher) -> None:
    """Give the generator the weights of the student that it goes on with."""
    path = args.student_model_name_or_path
    load_weights(path, networks.generator, teacher.pipeline.transformer, teacher.sharding, cache_dir=args.cache_dir)
    if changed := sampler_change(path, *astuple(method.sampler(0)), cache_dir=args.cache_dir):
        logger.warning(changed)


def build_adam(args, name: str, network) -> torch.optim.Optimizer:
    return build_optimizer(
        network,
        betas=(args.adam_beta1, args.adam_beta2),
        epsilon=args.adam_epsilon,
        rounding=args.bf16_rounding,
        use_8bit_adam=args.use_8bit_adam,
        seed=stream_seed(args.seed, name),
    )


@torch.no_grad()
def measure(run: Run, size: Size) -> dict[str, float]:
    """What the method shows its records beside, on up to 16 prompts.

    Raises:
        UserError: the teacher overflows in this precision.
    """
    with run.accelerator.autocast():
        found = run.method.measure(run.networks, run.fixed_samples(size, range(min(16, run.texts.prompts.count))))
    broken = next((name for name, value in found.items() if not math.isfinite(value)), None)
    if broken:
        how = f"{run.args.weight_dtype} weights, autocast {run.accelerator.mixed_precision}"
        raise UserError(
            f"the teacher's own latents are not finite as it runs here ({broken}; {how}): use --weight_dtype float32 "
            "and --mixed_precision no, or less guidance."
        )
    return found


def finish(run: Run) -> None:
    """The averaged generator as an ordinary diffusers folder, with its LoRA file, and on the Hub if asked for.

    Raises:
        UserError: the generator has taken no step, or its weights are not finite.
    """
    args, state = run.args, run.state
    monitors.check_trained(state)
    if state["skipped_updates"]:
        logger.warning(f"updates left out, since a loss or gradient was not finite: {monitors.left_out(state)}")
    run.accelerator.wait_for_everyone()
    student = run.teacher.sharding.gather(run.ema.model)
    if not run.accelerator.is_main_process:
        return
    student_dir = export_student(
        run.teacher.pipeline,
        Path(args.output_dir, "student"),
        run.sampler,
        transformer=run.method.published(student, functools.partial(predict_from_noise, run)),
        contract=run.teacher.contracts[0],
        pipeline_kwargs=args.pipeline_kwargs | {"height": args.height, "width": args.width},
        teacher=TeacherSource(args.pretrained_model_name_or_path, args.revision),
        training=TrainingRecord(
            arguments=used_arguments(run),
            measured=monitors.training_facts(args.output_dir, state),
            method=method_of(state["settings"], state["images_seen"]),
            not_reached=list(not_reached(state["settings"], state["images_seen"]).values()),
        ),
        card=CardContent(
            repo_id=args.hub_model_id,
            example_prompt=(args.validation_prompts or run.texts.prompts.distinct)[0],
            grid=monitors.last_sheet(args.output_dir, state),
            grid_prompts=args.validation_prompts,
        ),
    )
    lora = save_lora(run.teacher.pipeline, student, student_dir)
    logger.info(f"the student is in {student_dir}" + (f", its LoRA in {lora.name}" if lora else ""))
    if args.push_to_hub:
        push_student(student_dir, args.hub_model_id, token=args.hub_token, private=args.hub_private_repo)


def used_roles(args) -> dict:
    """The arguments of LoRAs as they are used, where that is not as they were given."""
    return {} if args.networks == "full" else {"lora_alpha": role_settings(args).alpha}


def used_arguments(run: Run) -> dict:
    """The arguments as they were used, not as they were asked for: what `training_args.json` records."""
    state = run.state
    of_now = {"sigmas": run.sampler.sigmas, "images_seen": state["images_seen"]}
    return {**vars(run.args), **state["settings"], **state["used"], **of_now}
