"""How much there is to read of one step, from drawing a prompt to the row in run.db: each file and its lines.

`python benchmarks/reading_path.py` prints the tables of docs/architecture.md; `--write` puts them there. What a recipe may leave out,
what is said of a step, and what only makes it faster are counted apart: they may be left shut. Whatever else a file of the path
imports is in `KNOWN`, a sentence each, so the path leads nowhere else.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"
PATH = (
    ("training/grpo.py", "the loop"),
    ("types.py", "what travels between all these"),
    ("training/session.py", "which steps are left; when a run is saved; what a signal does"),
    ("training/sample.py", "draw, sample and score the groups"),
    ("tasks/draw.py", "which prompts a step draws"),
    ("rollouts/collect.py", "prompts to groups, with keyed noise"),
    ("rollouts/engine.py", "one token for each row, and where a row ends"),
    ("rollouts/padded.py", "the plain engine: group by group, through the model's own cache"),
    ("rewards/base.py", "what a reward is"),
    ("rewards/score.py", "rewards, abstentions, failures"),
    ("algorithms/advantages.py", "rewards to advantages"),
    ("rollouts/pack.py", "groups to streams, micro-batches"),
    ("models/policy.py", "a transformers model as a policy"),
    ("models/logprobs.py", "log-probabilities, entropy and exact KL in chunks"),
    ("training/watch.py", "where policy and reference are compared"),
    ("algorithms/ratios.py", "the policy against pi_old"),
    ("algorithms/clip.py", "the clipped objective: the loss of each token"),
    ("algorithms/kl.py", "the KL to the reference"),
    ("algorithms/aggregate.py", "losses of tokens to one number"),
    ("training/policy_update.py", "objective, correction, KL, entropy: the loss of a micro-batch"),
    ("training/step.py", "backward over micro-batches, clip, step; the learning rate"),
    ("runs/recorder.py", "a step in one transaction"),
    ("runs/store.py", "the tables of run.db, and who writes them"),
)
OPTIONAL = (
    (
        "training/formulas.py",
        "at set-up: `group_advantages` and `clip` with their settings, or others, or functions of your own",
    ),
    ("algorithms/normalised.py", "`advantage.combine`: each reward's own advantages, summed"),
    ("rollouts/truncation.py", "`sampling.top_k`, `top_p`, `min_p`: which tokens may be sampled"),
    ("training/dynamic_sampling.py", "`dynamic_sampling`: groups without signal are drawn again"),
    ("training/stages.py", "`overlong`, `kl.place`: what length and the KL take off a reward"),
    ("algorithms/objectives.py", "`loss.objective`: the others, and the table of all"),
    ("training/correction.py", "`correction`: losses weighed for another sampler"),
    ("algorithms/correction.py", "how much each token or row weighs"),
    ("training/reference.py", "`reference`: one that moves after the policy"),
    ("training/loss_weights.py", "`kl.target`, `entropy.target`: which weights act in a step"),
    ("algorithms/controllers.py", "how a weight moves towards its target"),
    ("training/evaluation.py", "`evaluation.every`: held-out accuracy on the way"),
    ("rewards/arguments.py", "what a reward is handed"),
    ("rewards/check.py", "a reward of your own: whether it fits its data"),
    ("rewards/alone.py", "a reward of your own: after a call that failed, each completion asked about alone"),
    ("rewards/copies.py", "a reward of your own: what it is handed is its to change"),
    ("models/attention.py", "without `fast/`: attention handed to a layout"),
    ("models/layout.py", "without `fast/`: attention over the stream in dense blocks"),
)
FIGURES = (
    ("training/metrics.py", "sums and counts, and the clock"),
    ("training/step_metrics.py", "what a step was like, and the line that a person reads"),
    ("training/gap.py", "how far rounding alone moves the worst token"),
)
FAST = (
    ("fast/serve.py", "which of it serves: its policy overrides the plain one's forward pass"),
    ("fast/native.py", "prefill, decode, which rows are let in"),
    ("fast/grid.py", "the rows under way, their keys and values"),
    ("fast/transcript.py", "what was drawn, sorted into completions"),
    ("fast/replay.py", "a GPU's steps of decoding, recorded and replayed"),
    ("fast/decoder.py", "sampling in compiled loops"),
    ("fast/body.py", "a forward pass of our own"),
    ("fast/compiled.py", "norm, rope, gate and attention in compiled loops"),
    ("fast/half.py", "mixed precision on a CPU: bfloat16 copies of weights"),
    ("fast/half_body.py", "its forward pass"),
    ("fast/half_head.py", "its log-probabilities"),
    ("fast/stream.py", "which attention serves on the stream"),
    ("fast/cascade.py", "attention in parts that are merged, in half precision"),
    ("fast/flex.py", "FlexAttention over the stream"),
    ("fast/tiles.py", "logits of a plain head in tiles"),
    ("fast/kernels/calls.py", "how a compiled loop is called"),
    ("fast/kernels/layers.c", "norm, rope and gate"),
    ("fast/kernels/half_layers.c", "the same in mixed precision"),
    ("fast/kernels/half.c", "products of bfloat16 numbers"),
    ("fast/kernels/attention.c", "attention over the stream"),
    ("fast/kernels/decode.c", "rows from token to token"),
    ("fast/kernels/kernels.h", "what these loops share: vectors, exp, softmax"),
)
KNOWN = (  # files, or whole folders, and the sentence that is enough of them
    (
        ("recipe/",),
        "settings, as fields of frozen classes, each with its default; `GRPO` is the recipe of the loop, `Sampled` what it shares with PPO's",
    ),
    (
        ("noise.py",),
        "numbers that depend on a key alone, such as (seed, step, prompt, completion, token), and on nothing that was drawn before",
    ),
    (("sections.py",), "`section(name)` says what a step's time goes to, and changes nothing"),
    (
        ("stopping.py", "deadline.py"),
        "`may_stop()` gives the step up if a signal asked for it and no weight has moved yet (`weights_move()`); a step that takes too long ends the process",
    ),
    (("distributed/reduce.py",), "sums over processes; with one process, what they are given"),
    (
        ("errors.py", "redact.py", "user_code.py", "rewards/time_limit.py"),
        "what a person is told, with keys hidden; a person's function, awaited and within its time",
    ),
    (
        ("training/problem.py", "tasks/base.py", "models/codec.py"),
        "made at set-up: a list of prompts, the rewards, and what stands between text and tokens",
    ),
    (
        ("models/gate.py", "models/adapters.py", "models/recompute.py", "models/lengths.py", "rollouts/memory.py"),
        "tried or chosen at set-up: how a model is served, LoRA, activation checkpointing, positions that depend on a sequence's length, whether a model keeps keys and values",
    ),
    (
        ("runs/", "evals/", "training/profile.py"),
        "the rest of a run's folder: checkpoints, written beside the training; `run.db` as it is read; what listens to a recorded step; held-out evaluation; the profile",
    ),
)
KNOWN_FILES = {name for names, _ in KNOWN for name in names}


def lines_of(name: str) -> int:
    return len((ROOT / "coterie" / name).read_text(encoding="utf-8").splitlines())


def lines_of_code(name: str) -> int:
    """Without blank lines, comments and texts that stand alone, as docstrings do."""
    found: set[int] = set()
    alone = True
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER}
    for token in tokenize.generate_tokens(io.StringIO((ROOT / "coterie" / name).read_text(encoding="utf-8")).readline):
        if token.type == tokenize.NEWLINE:
            alone = True
        elif token.type not in skipped:
            if not (alone and token.type == tokenize.STRING):
                found.update(range(token.start[0], token.end[0] + 1))
            alone = False
    return len(found)


def leads_out() -> list[str]:
    """What a file of the path imports that stands neither in a table nor in `KNOWN`."""
    named = {name for table in (PATH, OPTIONAL, FIGURES, FAST) for name, _ in table}
    found = {(name, file) for name, _ in PATH for file in imported(name) if file not in named}
    return [
        f"{name}: {file}" for name, file in sorted(found) if not any(start in KNOWN_FILES for start in parents(file))
    ]


def imported(name: str) -> list[str]:
    """The files of the package that a file of it imports."""
    files = []
    for node in ast.walk(ast.parse((ROOT / "coterie" / name).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "coterie":
            base = "/".join((node.module or "").split(".")[1:])
            for one in node.names:
                tried = [f"{base}.py", f"{base}/{one.name}.py".lstrip("/"), f"{base}/__init__.py"]
                files.append(next(file for file in tried if (ROOT / "coterie" / file).is_file()))
    return files


def parents(file: str) -> tuple[str, str]:
    """A file's own name, and its folder's."""
    return file, f"{file.partition('/')[0]}/"


def table(files: Sequence[tuple[str, str]]) -> str:
    rows = "".join(f"| `{name}` | {what} | {lines_of(name)} |\n" for name, what in files)
    return f"| file | what it does in the step | lines |\n|---|---|---|\n{rows}"


def lines_in(files: Sequence[tuple[str, str]]) -> str:
    return f"{sum(lines_of(name) for name, _ in files):,} lines in {len(files)} files"


def text() -> str:
    code = sum(lines_of_code(name) for name, _ in PATH)
    known = "".join(f"- {', '.join(f'`{name}`' for name in names)}: {what}\n" for names, what in KNOWN)
    return (
        f"Read these in order, from drawing a prompt to the row in `run.db`: {lines_in(PATH)}, of which {code:,} are code and "
        "the rest docstrings, comments and blank lines. Every import of theirs leads to one of them, to a table below, or to one of "
        f"these, of which a sentence is enough:\n\n{known}\n{table(PATH)}\n"
        "Called where a recipe asks for it, or where a model or a reward needs it, and counted apart, "
        f"{lines_in(OPTIONAL)}:\n\n{table(OPTIONAL)}\n"
        f"What is measured of a step and said of it, {lines_in(FIGURES)}:\n\n{table(FIGURES)}\n"
        f"What stands in `fast/` computes the same, faster, {lines_in(FAST)} that a reader may leave shut:\n\n{table(FAST)}"
    )


def page() -> str:
    """The architecture page with the table as it is now."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition("<!-- path -->\n")
    return f"{before}<!-- path -->\n{text()}<!-- end -->{rest.partition('<!-- end -->')[2]}"


if __name__ == "__main__":
    if "--write" in sys.argv:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(text())
