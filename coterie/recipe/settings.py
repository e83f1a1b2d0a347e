"""The sections of a recipe: every setting below the first level and its default.

Each section is frozen and refuses keys that it does not know. Nothing here imports torch, so a wrong recipe is refused at once.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, field_validator

from coterie.recipe.kinds import SET, Idle, Settings


def _not_bool(value: Any) -> Any:
    """YAML reads `yes` as true, and Python takes true for 1."""
    if isinstance(value, bool):
        raise ValueError(f"{value!r} is not a number")
    return value


def _as_list(value: Any) -> Any:
    """One name may stand without the brackets of a list."""
    return [value] if isinstance(value, str) else value


ALL_LINEAR = "all-linear"
Number = Annotated[float, BeforeValidator(_not_bool)]
Whole = Annotated[int, BeforeValidator(_not_bool), Field(lt=2**31)]
Share = Annotated[Number, Field(ge=0, le=1)]
NonNegative = Annotated[Number, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[Number, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[Number, Field(allow_inf_nan=False)]
PositiveInt = Annotated[Whole, Field(gt=0)]
Schedule = Literal["constant", "linear", "cosine"]
Preset = Literal[
    "grpo", "dr_grpo", "dapo", "gspo", "dcpo", "cispo", "sapo", "gmpo", "gdpo", "rloo", "reinforce++",
    "reinforce++_baseline", "anchored", "ppo", "dpo", "reward_model", "sft",
]  # fmt: skip


class ModelShape(Settings):
    """A fresh model with random weights, from a transformers configuration."""

    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())

    type: str = Field(description="transformers' model_type: qwen3, llama, gpt2, ...")


class DatasetTask(Settings):
    """Prompts from the user's own file or hub data set."""

    data: str = Field(description="a .jsonl or .parquet file, or a hub data set id")
    prompt: str = Field("prompt", description="the column that holds the prompt: text, or a list of chat messages")
    chat: bool = Field(False, description="a text is what a user says in a chat: it goes through the chat template")
    answer: str | None = Field(None, description="the column with the answer to learn, for sft and a cold start")
    chosen: str | None = Field(None, description="the column with the preferred answer, for dpo and reward_model")
    rejected: str | None = Field(None, description="the column with the other answer of the pair")
    split: str = Field("train", description="which split of a hub data set")
    heldout: Annotated[Share, Idle(("task.evaluation", SET))] = Field(
        0.1, description="share of the rows kept for evaluation, chosen by content"
    )
    evaluation: str | None = Field(
        None, description="rows to evaluate on in place of those: a .jsonl or .parquet file, or a hub data set id"
    )
    evaluation_split: Annotated[str, Idle(("task.evaluation", None))] = Field(
        "test", description="of evaluation: which split of a hub data set"
    )
    lenient: bool = Field(
        False, description="leave out rows that can't be used, counted by reason, in place of refusing them"
    )
    max_left_out: Share = Field(
        0.05, description="of lenient: share of the rows above which the data is refused after all"
    )
    correct_above: Annotated[Finite | None, Idle(("method", "reward_model")), Idle(("rewards", ()))] = Field(
        None, description="total reward above which a completion counts as correct"
    )


class ReasoningTask(Settings):
    """Problems of reasoning-gym's generators, which the reward `reasoning_gym` scores with their own verifiers."""

    reasoning_gym: dict[str, dict[str, Any]] = Field(
        min_length=1,
        description="a generator, a list of them, or each with its own settings and `weight`, its share of the problems",
    )
    num_problems: PositiveInt = Field(2000, description="problems to train on, of all generators together")
    num_heldout: PositiveInt = Field(200, description="other problems, kept for evaluation")
    seed: Whole = Field(0, ge=0, lt=2**31, description="what the generators draw their problems by")

    @field_validator("reasoning_gym", mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        names = [given] if isinstance(given, str) else given
        if isinstance(names, list) and all(isinstance(name, str) for name in names):
            return {name: {} for name in names}
        return {name: own or {} for name, own in given.items()} if isinstance(given, dict) else given

    @field_validator("reasoning_gym")
    @classmethod
    def _weighted(cls, given: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        for name, own in given.items():
            weight = own.get("weight", 1)
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
                raise ValueError(f"{name}.weight: {weight!r:.80} is no number above 0")
        return given


class RewardSpec(Settings):
    """One reward function and its weight in the sum."""

    function: str = Field(description="a built-in reward, or your own as module:function or file.py:function")
    weight: Finite = Field(1.0, description="what its values are multiplied by in the sum")
    name: str = Field("", description="how it is called in metrics; the function's name if empty")
    options: dict[str, Any] = Field({}, description="further keyword arguments of the function")
    where: dict[str, Any] = Field(
        {}, description="only prompts whose columns hold these values, or one of a list; the others abstain"
    )
    timeout: Positive | None = Field(
        None, description="seconds that a call may take; 30 for your own functions, a built-in reward keeps its own"
    )
    workers: Whole = Field(
        0, ge=0, description="processes of their own for your function, killed at the timeout; 0 for none"
    )


class ColdStart(Settings):
    """Supervised fine-tuning on the task's demonstrations before reinforcement learning."""

    steps: PositiveInt = Field(600, description="updates")
    rows_per_step: PositiveInt = Field(64, description="demonstrations in each")
    learning_rate: Positive = Field(1e-3, description="at its highest")
    warmup_steps: Whole = Field(20, ge=0, description="steps over which the learning rate rises")
    schedule: Schedule = Field("cosine", description="of the learning rate after that")


class Sampling(Settings):
    """How completions are drawn. Temperature 0 is greedy, for evaluation only."""

    max_new_tokens: PositiveInt = Field(256, description="tokens of a completion at most")
    temperature: NonNegative = Field(1.0, description="what logits are divided by")
    top_k: Whole = Field(0, ge=0, description="keep the k likeliest tokens; 0 keeps all")
    top_p: Annotated[Number, Field(gt=0, le=1)] = Field(
        1.0, description="keep the likeliest tokens that together have this probability; 1 keeps all"
    )
    min_p: Share = Field(0.0, description="keep tokens at least this share as likely as the likeliest; 0 keeps all")
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        (), description="texts that end a completion; they are learned, and no part of its text"
    )
    max_rows: PositiveInt = Field(256, description="completions decoded at the same time")
    max_cache_megabytes: Positive = Field(4000, description="their keys and values together; more of them wait")

    @property
    def truncates(self) -> bool:
        """Whether some tokens can't be drawn."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1 or self.min_p > 0)


class Advantage(Settings):
    """How rewards become advantages inside a group."""

    function: str | None = Field(None, description="your own, file.py:function, in place of all that follows")
    baseline: Literal["group", "leave_one_out", "batch", "none"] = Field(
        "group", description="what a reward is compared with: its group's mean, its siblings', the batch's, or nothing"
    )
    scale: Literal["sample", "population", "none", "batch", "batch_differences"] = Field(
        "sample",
        description="what the difference is divided by: std of the group (over n - 1, or n), nothing, std of the batch's rewards, or of its differences",
    )
    combine: Annotated[Literal["sum", "each"], Idle(("advantage.function", SET))] = Field(
        "sum", description="rewards summed, then normalised; or each normalised first"
    )
    epsilon: Annotated[
        Positive,
        Idle(("advantage.scale", "none"), ("advantage.combine", "sum"), ("advantage.function", None)),
    ] = Field(1e-6, description="added to what the difference is divided by")


class KL(Settings):
    """How the KL divergence to the reference is measured, where it acts, and whether its weight adapts."""

    estimator: Literal["k1", "k2", "k3", "exact"] = Field("k3", description="exact sums over the vocabulary")
    place: Literal["loss", "reward"] = Field("loss", description="a term of the loss, or taken from the reward")
    target: Positive | None = Field(None, description="nats per token that the weight adapts to; fixed if empty")
    adapt_rate: Annotated[Number, Field(gt=0, lt=1), Idle(("kl.target", None))] = 0.1


class Entropy(Settings):
    """A bonus for the policy's entropy."""

    weight: NonNegative = Field(0.0, description="of the bonus; 0 for none")
    target: Positive | None = Field(None, description="nats per token that the weight adapts to; fixed if empty")
    adapt_rate: Annotated[Positive, Idle(("entropy.target", None))] = Field(
        1e-3, description="how much the weight grows a step and a nat below the target"
    )


class Reference(Settings):
    """What the KL and the anchor are measured against."""

    kind: Literal["frozen", "moving", "replaced"] = Field(
        "frozen", description="the start, an average that follows the policy, or a copy that is renewed"
    )
    decay: Annotated[Number, Field(ge=0, lt=1), Idle(("reference.kind", ("frozen", "replaced")))] = Field(
        0.99, description="of moving: share of itself it keeps a step"
    )
    every: Annotated[PositiveInt, Idle(("reference.kind", ("frozen", "moving")))] = Field(
        50, description="of replaced: steps between two copies of the policy"
    )

    @property
    def moves(self) -> bool:
        return self.kind != "frozen"

    def share(self, step: int) -> float:
        """How much of the way to the policy it goes after a step."""
        shares = {"frozen": 0.0, "moving": 1 - self.decay, "replaced": 0.0 if step % self.every else 1.0}
        return shares[self.kind]


class Correction(Settings):
    """Importance weights for samples that another engine or an older policy made."""

    kind: Literal["none", "truncate", "mask"] = Field(
        "none", description="bound the weights, or leave out what is above the limit"
    )
    level: Annotated[Literal["token", "sequence"], Idle(("correction.kind", "none"))] = Field(
        "token", description="a weight for each token, or for a whole completion"
    )
    limit: Annotated[Number, Field(gt=1, allow_inf_nan=False), Idle(("correction.kind", "none"))] = Field(
        2.0, description="the largest weight"
    )

    @property
    def acts(self) -> bool:
        return self.kind != "none"


class DynamicSampling(Settings):
    """Groups without signal are dropped, and new prompts drawn in their place."""

    rounds: Annotated[Whole, Idle(("group_size", 1))] = Field(
        0, ge=0, le=100, description="how often at most; 0 keeps every group"
    )


class Overlong(Settings):
    """What becomes of completions that reach the length limit."""

    treatment: Literal["keep", "leave_out", "punish"] = Field(
        "keep", description="as others, out of the loss, or with a lower reward"
    )
    margin: Annotated[Share, Idle(("overlong.treatment", ("keep", "leave_out")))] = Field(
        0.1, description="of punish: the last share of the limit, over which it grows"
    )
    penalty: Annotated[Positive, Idle(("overlong.treatment", ("keep", "leave_out")))] = Field(
        1.0, description="of punish: what a completion loses that is cut"
    )

    @property
    def punishes(self) -> bool:
        return self.treatment == "punish"


class Value(Settings):
    """PPO's value model: a copy of the start with one output in place of the vocabulary."""

    learning_rate: Positive = Field(1e-5, description="the value model's")
    clip: Positive = Field(0.2, description="how far a value may move from the one at sampling")
    discount: Annotated[Number, Field(gt=0, le=1)] = Field(1.0, description="gamma of generalised advantage estimation")
    gae_lambda: Share = Field(0.95, description="lambda of generalised advantage estimation")
    warmup_steps: Whole = Field(0, ge=0, description="first steps in which only the value model learns")


class Lora(Settings):
    """LoRA: low-rank matrices beside the linear layers are trained, in place of the model's own weights."""

    rank: PositiveInt = Field(16, description="the matrices' small side")
    alpha: Positive = Field(32.0, description="the matrices' product counts alpha / rank")
    targets: Annotated[tuple[str, ...], BeforeValidator(_as_list)] = Field(
        (ALL_LINEAR,),
        description="the layers' names, as q_proj or layers.0.mlp.up_proj; all-linear for every one below the head",
    )
    base: Literal["float32", "int8", "int4"] = Field(
        "float32",
        description="what the frozen weights of linear layers are kept in: floats, 8 bits with a scale for each output, or 4 bits with a "
        "scale and a lowest value for each 32 weights",
    )

    @field_validator("targets")
    @classmethod
    def _some(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        if not targets or not all(targets):
            raise ValueError(f"{list(targets)} names no layer; leave it out for {ALL_LINEAR}")
        if len(targets) > 1 and ALL_LINEAR in targets:
            raise ValueError(f"{ALL_LINEAR} holds the others; name it alone, or leave it out")
        return targets


class Preference(Settings):
    """DPO."""

    beta: Positive = Field(0.1, description="how strongly the policy is held to the reference")
    label_smoothing: Annotated[Number, Field(ge=0, lt=0.5)] = Field(
        0.0, description="share of the pairs that are taken to be the wrong way round"
    )


class Optimiser(Settings):
    """AdamW, its learning-rate schedule, and how a batch is cut to fit."""

    learning_rate: Positive = Field(1e-6, description="at its highest")
    warmup_steps: Whole = Field(0, ge=0, description="steps over which the learning rate rises")
    schedule: Schedule = Field("constant", description="of the learning rate after that")
    final_share: Annotated[Share, Idle(("optimiser.schedule", "constant")), Idle(("method", "sft"))] = Field(
        0.0, description="share of the learning rate left at the end of the schedule"
    )
    weight_decay: NonNegative = Field(0.0, description="of AdamW")
    beta1: Annotated[Number, Field(ge=0, lt=1)] = Field(0.9, description="of AdamW")
    beta2: Annotated[Number, Field(ge=0, lt=1)] = Field(0.99, description="of AdamW")
    max_grad_norm: Positive = Field(1.0, description="a longer gradient is scaled down to it")
    updates_per_batch: Annotated[PositiveInt, Idle(("method", ("dpo", "sft", "reward_model")))] = Field(
        1, description="optimiser steps on each batch of samples"
    )
    micro_batch_tokens: PositiveInt = Field(16384, description="stream tokens per forward and backward pass")
    activation_checkpointing: bool = Field(
        False, description="keep only the inputs of each layer for the backward pass, and compute the rest again there"
    )


class Evaluation(Settings):
    """Held-out evaluation before, during and after training."""

    prompts: PositiveInt = Field(512, description="held-out prompts used before and after; all if there are fewer")
    samples: Annotated[PositiveInt, Idle(("method", "reward_model"))] = Field(
        2, description="sampled completions of each"
    )
    every: Annotated[Whole, Idle(("method", "sft"))] = Field(
        0, ge=0, description="steps between evaluations on the way; 0 for none"
    )


class Checkpoint(Settings):
    """When the run is saved, and how many of the saves are kept."""

    every: PositiveInt = Field(50, description="steps between two saves")
    keep_last: PositiveInt = Field(2, description="of the newest")
    keep_best: Annotated[Whole, Idle(("method", "sft")), Idle(("evaluation.every", 0))] = Field(
        0, ge=0, description="further ones kept for the highest held-out accuracy on the way, or reward"
    )


class Record(Settings):
    """What run.db keeps of each step."""

    max_megabytes_per_step: Positive = Field(
        4.0, description="of completions; whole groups beyond it are left out, and counted"
    )


class Limits(Settings):
    """Figures past which a step is an event in the run, and those among them that end it."""

    grad_norm_times: Positive = Field(
        20.0,
        description="the gradient's norm over the median of the last 50 steps with a signal, or of the first 50 if larger",
    )
    ratio: Positive = Field(100.0, description="of the policy to the one that sampled, for a single token or sequence")
    sampler_gap: Positive | None = Field(
        None,
        description="nats between the sampler's log-probability of a token and the trainer's; what rounding explains if empty",
    )
    kl: Positive | None = Field(None, description="nats a token to the reference; no limit if empty")
    entropy: NonNegative = Field(
        0.005, description="nats a token, below which a policy that does not get about the best reward has collapsed"
    )
    stop_on: tuple[Literal["grad_norm_times", "ratio", "sampler_gap", "kl", "entropy"], ...] = Field(
        ("sampler_gap",), description="which of these end the run; the newest checkpoint stands"
    )
    skipped_steps: PositiveInt = Field(
        5, description="steps in a row that teach nothing, having no finite loss or no reward, which end the run"
    )
    step_seconds: Positive = Field(3600.0, description="what a step may take; then the run ends and says where it hung")
