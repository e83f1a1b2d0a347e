"""`coterie.train`: a whole run, from the recipe to the report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import torch
from transformers import PreTrainedModel

from coterie.errors import RunFailedError, UserError
from coterie.fast import serve
from coterie.fast.kernels.build import why_missing
from coterie.fast.precision import with_precision
from coterie.fast.serve import make_engine
from coterie.models.adapters import num_in_experts
from coterie.models.heads import Scorer
from coterie.models.load import choose_device, quiet_transformers, start_model
from coterie.models.policy import Policy
from coterie.models.quantised import num_packed, num_weights
from coterie.recipe import DPO, GRPO, PPO, SFT, Recipe, RewardModel, find_recipe, load_recipe
from coterie.recipe.settings import ColdStart, DatasetTask, Reference
from coterie.rewards.load import closing_all
from coterie.runs.checkpoint import STAGES, Position, TrainState, load_checkpoint
from coterie.runs.console import Console
from coterie.runs.folder import RunFolder
from coterie.runs.outlet import outliving_console
from coterie.runs.profile import profile_table
from coterie.runs.report import write_report
from coterie.runs.writing import writing
from coterie.training.evaluation import evaluate_whole
from coterie.training.grpo import train_grpo
from coterie.training.ppo import train_ppo
from coterie.training.preferences import evaluate_pairs, train_dpo, train_reward_model
from coterie.training.problem import Problem
from coterie.training.profile import Profiler, product_rate
from coterie.training.reference import make_reference
from coterie.training.saved import save_model
from coterie.training.session import Session
from coterie.training.sft import train_sft
from coterie.training.step import make_optimiser
from coterie.training.summary import say_results, write_summary

_LARGE = 20_000_000  # bytes of a data file that is told of before it is read


@outliving_console()
def train(
    recipe: str | Recipe | None = None,
    *,
    overrides: Sequence[str] = (),
    resume: str | None = None,
    allow: Sequence[str] = (),
    out: str | None = None,
    stop_after: int | None = None,
    profile: bool = False,
) -> Session:
    """Train a recipe, or go on with an earlier run exactly where its newest checkpoint is.

    recipe: a file, the name of a bundled recipe, or a Recipe. overrides: `section.key=value`. out: the run folder; the
    default is runs/NAME. allow: settings and files that may differ from what a resumed run began with. stop_after: end after this many steps, cold start aside, saved, to be resumed later.
    profile: show where the time and the memory of a step go, and write it to profile.json. Returns the closed session, with the run's folder.
    Raises UserError for what the user can mend, before the model is loaded where that is possible.
    """
    console = Console()
    quiet_transformers()
    if resume is not None:
        home = RunFolder.reopen(resume, list(overrides), console, allow=allow)
    elif recipe is None:
        raise UserError(
            "train: name a recipe, or a run to go on with: coterie train equations, coterie train --resume RUN"
        )
    else:
        name = run_name(find_recipe(recipe)) if isinstance(recipe, str) else "run"
        loaded = console.warning_of(lambda: load_recipe(recipe, overrides)) if isinstance(recipe, str) else recipe
        loaded = loaded.model_copy(update={"made_with": {**(loaded.made_with or {}), "day": date.today().isoformat()}})
        _say_what_takes_long(loaded, console)
        problem = Problem.of(loaded)  # what is wrong with the recipe shows before there is a folder
        loaded = with_precision(loaded, console.say)  # a run keeps what it was begun in, wherever it goes on
        home = RunFolder.create(loaded, name, out, console)
    run = Session(home, stop_after=stop_after)
    try:
        if profile:
            device = choose_device(run.recipe.device)
            run.profiler = Profiler(run.folder, device, product_rate(run.recipe, device))
        problem = Problem.of(run.recipe) if resume is not None else problem
        home.begin()
        with run.stoppable(), closing_all(problem.rewards), memory_explained(run):
            _train(run, problem)
        if profile:
            console.table(*profile_table(run.folder))
    finally:
        run.close()
    return run


@contextmanager
def memory_explained(run: Session) -> Iterator[None]:
    """RunFailedError that names the step, the micro-batch and what to lower, where memory runs out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        words = str(error)
        where = "".join(f", {note}" for note in getattr(error, "__notes__", ()))
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and "allocate memory" not in words and "bad_alloc" not in words:
            raise
        optimiser, sampling = run.recipe.optimiser, run.recipe.sampling
        raise RunFailedError(
            f"out of memory in step {run.step}{where}: {words.splitlines()[0] if words else type(error).__name__}\nWhere it was in "
            f"training, lower optimiser.micro_batch_tokens (it is {optimiser.micro_batch_tokens}) or set "
            f"optimiser.activation_checkpointing=true; where it was in sampling, lower sampling.max_cache_megabytes (it is "
            f"{sampling.max_cache_megabytes:g}) or sampling.max_rows ({sampling.max_rows}). The newest checkpoint stands: "
            f"coterie train --resume {run.folder}"
        ) from error


def _say_what_takes_long(recipe: Recipe, console: Console) -> None:
    """Reading a million rows takes most of a minute."""
    path = Path(recipe.task.data) if isinstance(recipe.task, DatasetTask) else None
    if path is not None and path.is_file() and path.stat().st_size > _LARGE:
        console.say(f"reading {path}, {path.stat().st_size / 1e6:,.0f} MB")


def run_name(recipe: Path) -> str:
    """A run is called like its recipe's file, or like the folder of a file that is just called recipe."""
    return recipe.resolve().parent.name if recipe.stem == "recipe" else recipe.stem


def _train(run: Session, problem: Problem) -> None:
    recipe = run.recipe
    ends = [run.folder / name for name in ("summary.json", "report.html")]  # in the order in which they are written
    if run.position and run.position.step >= recipe.steps and all(path.is_file() for path in ends):
        run.console.say(f"{run.folder} is finished; its report is {run.folder / 'report.html'}")
        return
    policy = _start(run, problem)
    if not (run.position and run.position.stage == "train"):
        if recipe.cold_start is not None:
            _cold_start(run, recipe.cold_start, problem, policy)
            if run.stopped:
                run.say_how_to_resume()
                return
        if not isinstance(recipe, RewardModel):
            evaluate_whole(run, problem, policy, 0, "before")
    _stand_at_start(run, "train", policy)
    policy = as_trained(policy, recipe, run.console)
    is_grpo = isinstance(recipe, GRPO)  # the others make a value model or a scorer of it, or read it alone
    start = make_reference(policy, recipe.reference if isinstance(recipe, GRPO) else Reference(), only_read=is_grpo)
    trained = _train_method(run, problem, policy, start)
    if run.stopped:
        run.say_how_to_resume()
        return
    if not isinstance(recipe, RewardModel):
        evaluate_whole(run, problem, policy, recipe.steps, "after")
    if trained.adapter is not None:
        trained.adapter.merge()
    with writing(run.folder):
        run.store.settle()  # the report reads the file
        save_model(run.folder / "model", trained.model, problem.codec)
        summary = write_summary(run)
        write_report(run.folder)
    say_results(run, summary)


def _start(run: Session, problem: Problem) -> Policy:
    """The model that the recipe begins with, as a policy, and what has to be known of it and of the problem said."""
    recipe, console, device = run.recipe, run.console, choose_device(run.recipe.device)
    model = start_model(recipe, problem.codec, device)
    policy = tried_policy(model, console, recipe)
    console.say(f"run {run.folder}: {type(model).__name__}, {num_weights(model):,} parameters, on {device}")
    if device.type == "cpu" and (why := why_missing(torch.float32)) is not None:
        console.say(f"{why}: tensor operations do what compiled loops would do, more slowly")
    console.say(recipe.in_short())
    for note in problem.task.notes:
        console.warn(note.text)
        run.store.event(STAGES[0], 0, note.kind, note.text)
    for report in filter(None, (reward.sandbox_report for reward in problem.rewards)):
        console.say(f"sandbox {report}")
        run.store.event(STAGES[0], 0, "sandbox", report)
    policy = policy.recomputing() if recipe.optimiser.activation_checkpointing else policy
    if recipe.scores:
        Scorer.check(policy)  # an architecture that has no form with a score is refused before anything is trained
    return policy


def _cold_start(run: Session, settings: ColdStart, problem: Problem, policy: Policy) -> None:
    """Supervised fine-tuning first: of all weights, or through an adapter that becomes a part of them."""
    learner = policy
    if run.recipe.cold_start_adapts:
        _stand_at_start(run, "cold_start", policy)
        learner = as_trained(policy, run.recipe, run.console)
    train_sft(run, problem, learner, stage="cold_start", settings=settings)
    if learner.adapter is not None:
        learner.adapter.merge()


def _stand_at_start(run: Session, stage: str, policy: Policy) -> None:
    """Save the weights that a stage begins with, whole, or where the run is inside of the stage read them back."""
    if not (run.position and run.position.stage == stage):
        model = policy.model
        run.checkpoint(stage, 0, TrainState({"model": model}, {"optimiser": (model, make_optimiser(model))}), last=True)
    start = run.folder / "checkpoints" / Position(stage, 0).name
    load_checkpoint(start, TrainState({"model": policy.model}))


def tried_policy(model: PreTrainedModel, console: Console, recipe: Recipe | None = None) -> Policy:
    """The model as a policy, in a recipe's precision, once it has been tried on a few tokens in training and in sampling, with what is to be
    known of it."""
    policy = console.warning_of(lambda: serve.Policy.of(model))
    if recipe is not None and recipe.precision == "mixed":
        policy = policy.in_mixed_precision()
    console.warning_of(lambda: make_engine(policy))
    config = model.config.get_text_config()
    weight = getattr(config, "router_aux_loss_coef", None)
    if weight and getattr(config, "output_router_logits", False):
        console.warn(
            f"model: its configuration asks for an auxiliary loss of the router (router_aux_loss_coef: {weight:g}), which is not "
            "added: what is learned is the recipe's loss alone"
        )
    return policy


def as_trained(policy: Policy, recipe: Recipe, console: Console) -> Policy:
    """The policy as a stage trains it: all of it, or through an adapter that is put into its model."""
    if recipe.lora is None:
        return policy
    policy = policy.with_adapter(recipe.lora, recipe.seed)
    num_trained = sum(parameter.numel() for _, parameter in policy.named_parameters())
    num_left = num_in_experts(policy.model)
    left = f"; the {num_left:,} in stacks of experts stay as they are" if num_left else ""
    console.say(
        f"lora: rank {recipe.lora.rank}, {', '.join(recipe.lora.targets)}: {num_trained:,} parameters are trained{left}"
    )
    if (packed := num_packed(policy.model))[0]:
        console.say(f"lora.base: {packed[0]:,} weights are kept in {recipe.lora.base}, {packed[1] / 1e6:,.1f} MB")
    return policy


def _train_method(run: Session, problem: Problem, policy: Policy, start: Policy) -> Policy | Scorer:
    """The loop that the recipe names, from weights that may be a checkpoint's. `start` is frozen. Returns what it trained."""
    recipe = run.recipe
    if isinstance(recipe, RewardModel):
        scorer = Scorer.from_policy(start)
        if not (run.position and run.position.stage == "train" and run.position.step > 0):
            run.recorder.record_evaluation("train", 0, evaluate_pairs(scorer, problem.task, recipe))
        train_reward_model(run, problem, scorer)
        if not run.stopped:
            run.recorder.record_evaluation("train", recipe.steps, evaluate_pairs(scorer, problem.task, recipe))
        return scorer
    if isinstance(recipe, SFT):
        train_sft(run, problem, policy, stage="train", settings=_as_sft(recipe))
    else:
        loop = {GRPO: train_grpo, PPO: train_ppo, DPO: train_dpo}[type(recipe)]
        loop(run, problem, policy, start, make_engine(policy))
    return policy


def _as_sft(recipe: Recipe) -> ColdStart:
    """SFT as a method of its own takes its steps and learning rate from where every method has them."""
    optimiser = recipe.optimiser
    return ColdStart(
        steps=recipe.steps,
        rows_per_step=recipe.prompts_per_step,
        learning_rate=optimiser.learning_rate,
        warmup_steps=optimiser.warmup_steps,
        schedule=optimiser.schedule,
    )
