# Copyright 2026 The hf_flowdistill authors.
# Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The recipes of FreeFlow hold the numbers of its Table 6, which the script reads; its defaults are them too."""

import pytest
import yaml
from score_distillation import train_freeflow
from training_helpers import SCRIPT

from hf_flowdistill.training.ema import ema_decay


RECIPES = {path.stem: path for path in SCRIPT.parent.joinpath("recipes", "freeflow").iterdir()}
BATCH = 256
PAPER = {  # resolution, iterations, jumps, guidance interval, alpha, iterations of its decay
    "sit_xl_2_256": (256, 1_500_000, (0, 1), 0.4, 0.3, None),
    "sit_xl_2_512": (512, 1_000_000, (0, 1), 0.5, 0.3, None),
    "sit_xl_2_repa_256": (256, 1_500_000, (-0.4, 1.2), 0.3, 0.6, 25_000),
    "sit_xl_2_repa_512": (512, 1_000_000, (-0.4, 1.2), 0.3, 0.6, 25_000),
}


def parsed(*words):
    words = ("--pretrained_model_name_or_path=a/b", "--prompt_file=x", "--report_to=none", *words)
    return train_freeflow.parse_args(list(words))


def test_there_is_a_recipe_for_every_row():
    assert RECIPES.keys() == PAPER.keys()


@pytest.mark.parametrize("name", PAPER)
def test_the_script_reads_the_papers_numbers(name):
    resolution, iterations, jumps, interval, alpha, decay = PAPER[name]
    args = parsed(f"--config={RECIPES[name]}")
    assert (args.height, args.width, args.max_train_images) == (resolution, resolution, BATCH * iterations)
    assert 8 * args.train_batch_size * args.gradient_accumulation_steps == BATCH
    assert (args.learning_rate, args.fake_score_learning_rate, args.lr_scheduler) == (3e-5, 1e-4, "constant")
    assert (args.adam_beta1, args.adam_beta2, args.adam_epsilon, args.max_grad_norm) == (0.9, 0.99, 1e-8, None)
    decay_per_step = ema_decay(BATCH, BATCH * iterations, args.ema_half_life_images)
    assert decay_per_step == pytest.approx(0.9999, abs=1e-7)
    assert (args.derivative, args.num_jumps, args.solver, args.prediction_decay) == ("difference", 8, "heun", 1)
    assert (args.jump_mean, args.jump_std, args.jump_zeros) == (*jumps, 0.1)
    assert (args.correction_sigma_mean, args.correction_sigma_std, args.guidance_interval) == (0.8, 1.6, interval)
    assert (args.correction_share, args.correction_weight, args.guidance_range) == (0.25, alpha, [1, 2])
    for name in ("confident_warmup_images", "correction_delay_images", "correction_warmup_images"):
        assert getattr(args, name) == BATCH * 10_000
    assert args.correction_decay_images == (decay and BATCH * decay)


def test_the_defaults_are_the_papers_but_for_the_length():
    own = parsed("--max_train_images", str(BATCH * 1_500_000), "--guidance_interval=0.4")
    recipe = yaml.safe_load(RECIPES["sit_xl_2_256"].read_text())
    of_size = {"resolution", "train_batch_size", "gradient_accumulation_steps"}
    for name in recipe.keys() - of_size:
        assert getattr(own, name) == recipe[name], name
