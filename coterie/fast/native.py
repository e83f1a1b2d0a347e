"""The native engine: the trainer's own weights, one prefill per prompt for its whole group, rows that come and go.

Legend: P prompts, G completions per prompt, R slots for rows, S longest prompt, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.fast.decoder import Decoder
from coterie.fast.grid import DecodeLayout, Grid, PrefillLayout, copied, empty
from coterie.fast.replay import ROOM, Replayer
from coterie.models.policy import Policy
from coterie.recipe.settings import Sampling
from coterie.rollouts.engine import Done, History, Sampled, StopStrings, sample_tokens
from coterie.sections import section
from coterie.stopping import may_stop
from coterie.types import Completion

_COPIED_PROMPT = (
    32  # without compiled loops, prompts up to this length are copied to their rows, which then attend in one product
)
_STEPS, _STEPS_BETWEEN = 64, 8  # that compiled loops decode at a time, and while others wait for a place
_PATIENCE = 1.5  # steps' worth of ended rows that are carried along before the grid is built anew, which costs as much
_LOOK_EVERY = {"cpu": 1}  # steps between looks at which rows have ended; elsewhere a look waits for the device
_LOOK_EVERY_ELSEWHERE = 16


class NativeEngine:
    """Samples from a policy that serves the packed stream. It holds no weights of its own, so there is nothing to load."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.replays = policy.device.type == "cuda"  # whether steps are in static shapes, recorded and replayed
        self._bytes_per_token: int | None = None  # of keys and values

    def load_weights(self, policy: Policy, version: int) -> None:
        self.policy = policy

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        keys: Tensor,
        sampling: Sampling,
        end_tokens: Sequence[int],
        decode: Callable[[Sequence[int]], str] | None = None,
        done: Done | None = None,
    ) -> list[list[Completion]]:
        """Sample G completions of each prompt: keys [P, G] -> P lists of G. See `Engine`.

        Raises UserError where a sequence's positions could change while it is sampled."""
        lengths = self.policy.lengths
        for prompt in prompts:
            lengths.check(len(prompt), sampling.max_new_tokens)
        made: dict[int, list[Completion]] = {}
        for chosen in lengths.alike([len(prompt) for prompt in prompts]):
            finish = (lambda i, of, chosen=chosen: done(chosen[i], of)) if done is not None else None
            of_part = [prompts[i] for i in chosen]
            found = self._generate(of_part, keys[chosen], sampling, end_tokens, decode, finish)
            made |= dict(zip(chosen, found, strict=True))
        return [made[number] for number in range(len(prompts))]

    def _generate(
        self,
        prompts: Sequence[Sequence[int]],
        keys: Tensor,
        sampling: Sampling,
        end_tokens: Sequence[int],
        decode: Callable[[Sequence[int]], str] | None,
        done: Done | None,
    ) -> list[list[Completion]]:
        """Prompts that may be run together."""
        num_completions, device = keys.shape[1], self.policy.device
        keys = keys.to(device).flatten()
        ends = torch.tensor(list(end_tokens), device=device)
        stops = StopStrings.of(sampling, decode)
        look_every = _LOOK_EVERY.get(device.type, _LOOK_EVERY_ELSEWHERE)
        decoder = Decoder.of(self.policy, max(map(len, prompts)) + sampling.max_new_tokens)
        replayer = Replayer(self.policy) if self.replays and decoder is None else None
        draws = decoder is not None and stops is None and not sampling.truncates
        copies_prompts = decoder is None and (num_completions == 1 or max(map(len, prompts)) <= _COPIED_PROMPT)
        queue = _Queue.of(prompts, num_completions, sampling, self._kv_bytes(prompts[0]), copies_prompts)
        history = History()
        made: dict[int, list[Completion]] = {}
        grid: Grid | None = None
        num_live = num_steps = 0
        carried = 0.0  # work on rows that have ended, in steps

        def hand_over() -> None:
            """Sort into completions what was drawn for prompts that have no row waiting or under way."""
            busy = {job.prompt for job in queue.waiting}
            if grid is not None:
                busy.update((grid.rows[grid.live] // num_completions).tolist())
            ready = [prompt for prompt in range(len(prompts)) if prompt not in made and prompt not in busy]
            if ready:
                made.update(zip(ready, history.completions(ready, num_completions), strict=True))
            if done is not None:
                for prompt in ready:
                    done(prompt, made[prompt])

        while queue.waiting or grid is not None:
            may_stop()
            looked = draws or num_steps % look_every == 0  # only then is it known how many rows are live
            if looked and done is not None:
                hand_over()
            admitted = queue.admit(num_live) if looked else []
            if admitted:
                new = self._prefill(prompts, admitted, num_completions, queue.copies_prompts)
                grid, carried = new if grid is None else grid.joined(new), 0.0
                num_live += sum(job.count for job in admitted)
            elif grid is not None and looked and carried >= _PATIENCE:
                grid, carried = grid.compacted(), 0.0
            assert grid is not None
            if draws and decoder is not None:
                steps = _STEPS_BETWEEN if queue.waiting or done is not None else _STEPS
                self._draw(decoder, grid, keys, sampling, ends, history, steps)
                num_live = int(grid.live.sum())
                grid = grid if num_live else None
                continue
            written = grid.num_written
            sampled = sample_tokens(grid.logits, keys[grid.rows], written, sampling)
            ended = torch.isin(sampled.tokens, ends)
            if stops is not None:
                ended |= stops.completed(grid.rows, grid.live, sampled.tokens)
            history.add(grid.rows, grid.live, ended, sampled)
            grid.live = grid.live & ~ended & (written + 1 < sampling.max_new_tokens)
            num_steps += 1
            if num_steps % look_every == 0:
                num_live = int(grid.live.sum())
                if num_live == 0:
                    grid = None
                    continue
            carried += 1 - num_live / grid.num_slots
            self._feed(grid, sampled.tokens, decoder, replayer)
            if replayer is not None:
                self.replays = replayer.usable
        hand_over()
        return [made[prompt] for prompt in range(len(prompts))]

    @section("sample/prefill")
    def _prefill(
        self, prompts: Sequence[Sequence[int]], admitted: Sequence[_Job], num_completions: int, copies_prompts: bool
    ) -> Grid:
        """Run each admitted prompt once and open slots for its completions."""
        device = self.policy.device
        chosen = [prompts[job.prompt] for job in admitted]
        recorder = PrefillLayout([len(prompt) for prompt in chosen], device)
        tokens = torch.tensor([token for prompt in chosen for token in prompt], device=device)
        positions = torch.cat([torch.arange(len(prompt)) for prompt in chosen]).to(device)
        lengths = torch.tensor([len(prompt) for prompt in chosen], device=device)  # [Q]
        logits = self.policy.logits(self.policy.run(tokens, positions, recorder, lengths.cumsum(0) - 1))  # [Q, V]

        width = max(job.count for job in admitted)
        member = torch.arange(width)
        rows = torch.stack([job.prompt * num_completions + job.first + member for job in admitted])  # [Q, W]
        live = member < torch.tensor([[job.count] for job in admitted])
        which = torch.arange(len(admitted))[:, None].expand_as(live)
        if copies_prompts:
            which, rows, live = which[live], rows[live], live[live]  # no empty slots where no rectangle is needed
        which, rows, live = (x.flatten().to(device) for x in (which, rows.where(live, 0), live))
        start = int(lengths.max()) if copies_prompts else 0
        stored = recorder.stored
        return Grid(
            rows=rows,
            live=live,
            firsts=start - lengths[which] if copies_prompts else torch.zeros_like(rows),
            starts=torch.full_like(rows, start),
            prompt_lengths=lengths[which],
            logits=logits[which],
            now=start,
            width=1 if copies_prompts else width,
            prompt_kv={} if copies_prompts else stored,
            own_kv=copied(stored, lengths, which) if copies_prompts else empty(stored, len(rows)),
        )

    @section("sample/decode")
    def _feed(self, grid: Grid, tokens: Tensor, decoder: Decoder | None, replayer: Replayer | None) -> None:
        """Run for each row the token it drew, [R], and put the logits that follow in the grid."""
        grid.make_room(1, ROOM if replayer is not None else 0)
        if decoder is not None:
            decoder.feed(grid.cached_rows(), tokens)
        else:
            positions = grid.prompt_lengths + grid.num_written
            positions *= grid.live  # those of ended rows would run past the model's last one
            if replayer is not None:
                grid.logits = replayer.feed(grid, tokens, positions)
            else:
                grid.logits = self.policy.logits(self.policy.run(tokens, positions, DecodeLayout(grid)))
        grid.now += 1

    @section("sample/decode")
    def _draw(
        self, decoder: Decoder, grid: Grid, keys: Tensor, sampling: Sampling, ends: Tensor, history: History, steps: int
    ) -> None:
        """Draw and run tokens for each row until it ends, or for so many steps."""
        fewest = int(grid.num_written[grid.live].min())
        steps = min(steps, sampling.max_new_tokens - fewest)
        grid.make_room(steps)
        drawn = decoder.draw(grid.cached_rows(), keys[grid.rows], sampling, ends, steps)
        of_each = (drawn.live, drawn.ended, drawn.tokens, drawn.logprobs, drawn.entropies)
        live, ended, tokens, logprobs, entropies = (x.flatten() for x in of_each)
        history.add(grid.rows.repeat(steps), live, ended, Sampled(tokens, logprobs, entropies, None))
        grid.now += drawn.num_steps

    def _kv_bytes(self, prompt: Sequence[int]) -> int:
        """What one token's keys and values take, found by running one."""
        if self._bytes_per_token is None:
            recorder, device = PrefillLayout([1], self.policy.device), self.policy.device
            self.policy.run(
                torch.tensor(prompt[:1], device=device), torch.zeros(1, dtype=torch.long, device=device), recorder
            )
            self._bytes_per_token = sum(x.numel() * x.element_size() for pair in recorder.stored.values() for x in pair)
        return self._bytes_per_token


@dataclass(frozen=True)
class _Job:
    """Completions first .. first + count of a prompt, sampled from one prefill."""

    prompt: int
    first: int
    count: int


@dataclass
class _Queue:
    """What waits for a place, and how much fits: rows by number, keys and values by bytes at their longest.

    A group is admitted whole, unless it would not fit alone.
    """

    waiting: deque[_Job]
    max_rows: int
    max_bytes: float
    row_bytes: int
    prompt_bytes: int
    copies_prompts: bool

    @classmethod
    def of(
        cls,
        prompts: Sequence[Sequence[int]],
        num_completions: int,
        sampling: Sampling,
        token_bytes: int,
        copies: bool,
    ) -> _Queue:
        longest = max(map(len, prompts))
        row_bytes = token_bytes * (sampling.max_new_tokens + (longest if copies else 0))
        prompt_bytes = 0 if copies else token_bytes * longest
        max_bytes = sampling.max_cache_megabytes * 1e6
        fitting = max(1, min(sampling.max_rows, int((max_bytes - prompt_bytes) / row_bytes)))
        jobs = [
            _Job(prompt, first, min(fitting, num_completions - first))
            for prompt in range(len(prompts))
            for first in range(0, num_completions, fitting)
        ]
        return cls(deque(jobs), fitting, max_bytes, row_bytes, prompt_bytes, copies)

    def admit(self, num_live: int) -> list[_Job]:
        """Take the next jobs, if there is room for a good part of them. A live row is counted with a prompt of its own."""
        if not self.waiting or (num_live and self.max_rows - num_live < max(self.waiting[0].count, self.max_rows // 4)):
            return []
        free_rows = self.max_rows - num_live
        free_bytes = self.max_bytes - num_live * (self.row_bytes + self.prompt_bytes)
        admitted: list[_Job] = []
        while self.waiting:
            job = self.waiting[0]
            free_rows -= job.count
            free_bytes -= job.count * self.row_bytes + self.prompt_bytes
            if (free_rows < 0 or free_bytes < 0) and (admitted or num_live):
                break
            admitted.append(self.waiting.popleft())
        return admitted
