"""The rewards that a recipe names: built-in ones, and a user's functions, in processes of their own where it asks for them."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from coterie.errors import UserError
from coterie.recipe.settings import RewardSpec
from coterie.rewards.base import Reward
from coterie.rewards.builtin import make_builtin
from coterie.rewards.workers.isolated import Isolated
from coterie.user_code import load_function

OWN_TIMEOUT = 30.0  # seconds that a call of a user's function may take


def load_rewards(specs: Sequence[RewardSpec]) -> list[Reward]:
    """The functions that a recipe names. Raises UserError where a module, file or function is missing or fails to load."""
    return [_load(spec) for spec in specs]


@contextmanager
def closing_all(rewards: Sequence[Reward]) -> Iterator[None]:
    """End the processes and connections of the rewards with the block, all of them whatever one of them raises."""
    with ExitStack() as stack:
        for reward in rewards:
            stack.callback(reward.close)
        yield


def _load(spec: RewardSpec) -> Reward:
    if ":" not in spec.function:
        if spec.workers:
            raise UserError(
                f"rewards: {spec.name} is built in and has processes where it needs them; leave out workers"
            )
        made = make_builtin(spec.function, spec.options)
        return Reward(spec.name, made, spec.weight, {}, spec.where, spec.timeout)
    function = load_function(spec.function, "rewards")
    seconds = spec.timeout or OWN_TIMEOUT
    if spec.workers:  # which keep the time of each completion's call themselves
        isolated = Isolated(spec.function, function, spec.workers, seconds, options=tuple(spec.options))
        return Reward(spec.name, isolated, spec.weight, spec.options, spec.where)
    return Reward(spec.name, function, spec.weight, spec.options, spec.where, seconds)
