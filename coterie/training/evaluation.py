"""Held-out evaluations of a run: before training, on the way, and after."""

from __future__ import annotations

from coterie.evals.evaluate import answer_examples, evaluate, example_prompts, heldout_prompts
from coterie.fast.serve import make_engine
from coterie.models.policy import Policy
from coterie.rollouts.engine import Engine
from coterie.training.problem import Problem
from coterie.training.session import Session


def evaluate_on_the_way(run: Session, problem: Problem, engine: Engine, step: int) -> None:
    """Held-out accuracy between the start and the end, if it is time to."""
    recipe, settings = run.recipe, run.recipe.evaluation
    if not settings.every or step % settings.every or step >= recipe.steps:
        return
    heldout = heldout_prompts(problem.task, settings.prompts, seed=recipe.seed)
    if heldout:
        evaluation = evaluate(
            engine,
            problem.task,
            heldout,
            problem.rewards,
            problem.codec,
            recipe.sampling,
            num_samples=1,
            seed=recipe.seed,
            greedy=False,
        )
        run.recorder.record_evaluation("train", step, evaluation)


def evaluate_whole(run: Session, problem: Problem, policy: Policy, step: int, when: str) -> None:
    """The whole held-out evaluation, and the answers to the task's examples."""
    recipe, engine = run.recipe, make_engine(policy)
    prompts = heldout_prompts(problem.task, recipe.evaluation.prompts, seed=recipe.seed)
    if not prompts:
        return
    run.console.say(f"evaluating {when} training: {len(prompts)} held-out prompts")
    evaluation = evaluate(
        engine,
        problem.task,
        prompts,
        problem.rewards,
        problem.codec,
        recipe.sampling,
        num_samples=recipe.evaluation.samples,
        seed=recipe.seed,
    )
    shown = example_prompts(problem.task, seed=recipe.seed)
    examples = answer_examples(engine, problem.task, shown, problem.rewards, problem.codec, recipe.sampling)
    run.recorder.record_evaluation("train", step, evaluation, examples)
