"""After a call of a reward that failed: each completion is asked about alone, so that only those abstain for which it fails."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from coterie.errors import RewardError, UserError
from coterie.rewards.base import Reward
from coterie.rewards.time_limit import TookTooLong
from coterie.stopping import may_stop
from coterie.user_code import in_place


class CountError(UserError):
    """A function gave too few or too many values."""

    def __init__(self, name: str, num_values: int, num_completions: int) -> None:
        plural = "" if num_completions == 1 else "s"
        self.reason = f"returned {num_values} values for {num_completions} completion{plural}"
        super().__init__(f"reward {name}: {self.reason}")


def one_by_one(
    reward: Reward, call: Callable[[Sequence[int]], list[Any]], whole: Sequence[int], max_late: float
) -> list[Any]:
    """What it says of each completion alone; an exception where it says nothing."""
    answers: list[Any] = []
    num_late = 0
    for index in whole:
        may_stop()  # what asked for a stop may have ended what the reward had started: it hangs, or raises
        if num_late > max_late:  # the step is lost, and each of the others may take as long
            late = RewardError("not tried, too many had taken too long")
            answers += [late] * (len(whole) - len(answers))
            break
        try:
            answers += call([index])
        except CountError as error:
            answers.append(RewardError(error.reason))
        except UserError:
            raise
        except Exception as error:
            answers.append(error)
        except SystemExit as error:
            answers.append(RewardError(f"called sys.exit({error.code}){in_place(error)}"))
        except TookTooLong as error:
            answers.append(RewardError(f"took longer than {reward.timeout:g} s{in_place(error)}"))
            num_late += 1
    return answers
