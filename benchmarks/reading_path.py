"""How much there is to read of one step, from drawing a prompt to the row in run.db: each file and its lines.

`python benchmarks/reading_path.py` prints the table of docs/architecture.md; `--write` puts it there. What only makes a step faster is
counted apart: it may be left shut.
"""

from __future__ import annotations

import io
import sys
import tokenize
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"
PATH = (
    ("training/grpo.py", "the loop"),
    ("types.py", "what travels between all these"),
    ("training/session.py", "which steps are left; when a run is saved; what a signal does"),
    ("training/sample.py", "draw, sample and score the groups"),
    ("tasks/base.py", "which prompts a step draws"),
    ("rollouts/collect.py", "prompts to groups, with keyed noise"),
    ("rollouts/engine.py", "one token for each row: temperature, top-k, top-p, min-p"),
    ("rollouts/padded.py", "the plain engine: group by group, through the model's own cache"),
    ("rewards/base.py", "what a reward is"),
    ("rewards/score.py", "rewards, abstentions, failures"),
    ("training/advantages.py", "which advantages"),
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
    ("training/dynamic_sampling.py", "`dynamic_sampling`: groups without signal are drawn again"),
    ("training/stages.py", "`overlong`, `kl.place`: what length and the KL take off a reward"),
    ("algorithms/objectives.py", "`loss.objective`: the others, and the table of all"),
    ("training/own_functions.py", "`advantage.function`, `loss.objective`: a function of your own"),
    ("training/correction.py", "`correction`: losses weighed for another sampler"),
    ("algorithms/correction.py", "how much each token or row weighs"),
    ("training/reference.py", "`reference`: one that moves after the policy"),
    ("training/loss_weights.py", "`kl.target`, `entropy.target`: which weights act in a step"),
    ("algorithms/controllers.py", "how a weight moves towards its target"),
    ("training/evaluation.py", "`evaluation.every`: held-out accuracy on the way"),
    ("training/metrics.py", "figures: sums and counts, and the clock"),
    ("training/step_metrics.py", "figures: what a step was like, and the line that a person reads"),
    ("training/gap.py", "figures: how far rounding alone moves the worst token"),
    ("rewards/arguments.py", "what a reward is handed"),
    ("models/attention.py", "attention handed to a layout"),
    ("models/layout.py", "attention over the stream in dense blocks"),
)  # fmt: skip
FAST = (
    ("fast/serve.py", "which of it serves: its policy overrides the plain one's forward pass"),
    ("fast/native.py", "prefill, decode, which rows are let in"),
    ("fast/grid.py", "the rows under way, their keys and values"),
    ("fast/transcript.py", "what was drawn, sorted into completions"),
    ("fast/replay.py", "a GPU's steps of decoding, recorded and replayed"),
    ("fast/decoder.py", "sampling in compiled loops"),
    ("fast/body.py", "a forward pass of our own"),
    ("fast/compiled.py", "norm, rope, gate and attention in compiled loops"),
    ("fast/stream.py", "which attention serves on the stream"),
    ("fast/cascade.py", "attention in parts that are merged, in half precision"),
    ("fast/flex.py", "FlexAttention over the stream"),
    ("fast/tiles.py", "logits of a plain head in tiles"),
    ("fast/kernels/calls.py", "how a compiled loop is called"),
    ("fast/kernels/layers.c", "norm, rope and gate"),
    ("fast/kernels/attention.c", "attention over the stream"),
    ("fast/kernels/decode.c", "rows from token to token"),
    ("fast/kernels/kernels.h", "what these loops share: vectors, exp, softmax"),
)


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


def text() -> str:
    total = sum(lines_of(name) for name, _ in PATH)
    code = sum(lines_of_code(name) for name, _ in PATH)
    fast = sum(lines_of(name) for name, _ in FAST)
    head = "| file | what it does in the step | lines |\n|---|---|---|\n"
    rows = lambda files: "".join(f"| `{name}` | {what} | {lines_of(name)} |\n" for name, what in files)  # noqa: E731
    return (
        f"Read these in order, from drawing a prompt to the row in `run.db`: {total:,} lines in {len(PATH)} files, of which {code:,} are code and "
        "the rest docstrings, comments and blank lines. Left out is what only some architectures need (`models/alibi.py`, `models/lengths.py`) and "
        "what decides how a model is served (`models/gate.py`, `models/observe.py`, `rollouts/memory.py`).\n\n"
        f"{head}{rows(PATH)}\n"
        f"What stands in `fast/` computes the same, faster: {fast:,} lines that a reader may leave shut.\n\n{head}{rows(FAST)}"
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
