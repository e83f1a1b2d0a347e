"""The native engine: the trainer's own weights, one prefill per prompt for its whole group, rows that come and go.

Legend: P prompts, G completions per prompt, Q prompts that are let in together, R slots for rows, V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from coterie.fast.decoder import Decoder
from coterie.fast.grid import DecodeLayout, Grid, PrefillLayout
from coterie.fast.half import weights_rounded
from coterie.fast.replay import ROOM, Pool, Replayer
from coterie.fast.tiles import plain_head
from coterie.fast.transcript import Transcript
from coterie.models.policy import Policy
from coterie.rollouts.engine import Ends, Engine, Job, SampledTokens, sample_tokens
from coterie.sections import section
from coterie.stopping import may_stop
from coterie.types import Completion

# Without compiled loops, prompts up to this length are copied to their rows, which then attend in one product
_COPIED_PROMPT = 32
_STEPS, _STEPS_BETWEEN = 64, 8  # that compiled loops decode at a time, and while others wait for a place
_PATIENCE = 1.5  # steps' worth of ended rows that are carried along before the grid is built anew, which costs as much
_LOOK_EVERY = {"cpu": 1, "cuda": 16}  # steps between looks at which rows have ended: a look waits for a GPU


class NativeEngine(Engine):
    """Samples from a policy that serves the packed stream."""

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy)
        self.replays = policy.device.type == "cuda"  # whether steps are in static shapes, recorded and replayed
        self.recordings = Pool()
        self._bytes_per_token: int | None = None  # of keys and values

    def sample(self, job: Job) -> list[list[Completion]]:
        made: dict[int, list[Completion]] = {}
        own_layers = self.policy.mixed and self.policy.body is None
        with weights_rounded(self.policy.model, plain_head(self.policy)) if own_layers else nullcontext():
            for chosen in self.policy.lengths.alike([len(prompt) for prompt in job.prompts]):
                made |= dict(zip(chosen, _Sampling(self, _part(job, chosen)).run(), strict=True))
        return [made[number] for number in range(len(job.prompts))]

    def kv_bytes(self, token: int) -> int:
        """The bytes of one token's keys and values, found by running one."""
        if self._bytes_per_token is None:
            recorder, device = PrefillLayout([1], self.policy.device), self.policy.device
            self.policy.run(torch.tensor([token], device=device), torch.tensor([0], device=device), recorder)
            self._bytes_per_token = sum(x.numel() * x.element_size() for pair in recorder.stored.values() for x in pair)
        return self._bytes_per_token


def _part(job: Job, chosen: Sequence[int]) -> Job:
    """The job of some of the prompts, by their numbers."""
    whole_done = job.done

    def done(number: int, completions: list[Completion]) -> None:
        assert whole_done is not None
        whole_done(chosen[number], completions)

    prompts = [job.prompts[number] for number in chosen]
    return replace(job, prompts=prompts, keys=job.keys[chosen], done=done if whole_done is not None else None)


class _Sampling:
    """A job under way whose prompts may be run together: the rows in the grid, those that wait, and what was drawn."""

    def __init__(self, engine: NativeEngine, job: Job) -> None:
        longest, device = max(map(len, job.prompts)), engine.policy.device
        self._engine, self._policy, self._job = engine, engine.policy, job
        self._ends, self._transcript = Ends(job), Transcript()
        self._decoder = Decoder.of(self._policy, longest + job.sampling.max_new_tokens)
        self._replayer = Replayer(self._policy, engine.recordings) if engine.replays and self._decoder is None else None
        # Whether compiled loops draw the tokens too, many at a time
        self._draws = self._decoder is not None and not self._ends.reads_text and not job.sampling.truncates
        self._look_every = 1 if self._draws else _LOOK_EVERY[device.type]
        copies = self._decoder is None and (job.num_completions == 1 or longest <= _COPIED_PROMPT)
        self._queue = _Queue.of(job, engine.kv_bytes(job.prompts[0][0]), copies)
        self._made: dict[int, list[Completion]] = {}
        self._grid: Grid | None = None
        self._num_live = 0
        self._carried = 0.0  # work on rows that have ended, in steps

    def run(self) -> list[list[Completion]]:
        num_steps = 0
        while self._queue.waiting or self._grid is not None:
            may_stop()
            if num_steps % self._look_every == 0:
                self._admit()
            grid = self._grid
            assert grid is not None
            tokens = self._draw(grid)
            num_steps += 1
            if num_steps % self._look_every == 0:
                self._num_live = int(grid.live.sum())
                if not self._num_live:
                    self._grid = None
                    continue
            if tokens is not None:
                self._feed(grid, tokens)
        self._hand_over()
        return [self._made[prompt] for prompt in range(len(self._job.prompts))]

    def _admit(self) -> None:
        """Now that it is known which rows are live: hand over what is whole, and let others in."""
        if self._job.done is not None:
            self._hand_over()
        admitted = self._queue.admit(self._num_live)
        if admitted:
            new = self._prefill(admitted)
            self._grid, self._carried = new if self._grid is None else self._grid.joined(new), 0.0
            self._num_live += sum(share.count for share in admitted)
        elif self._grid is not None and self._carried >= _PATIENCE:
            self._grid, self._carried = self._grid.compacted(), 0.0

    def _hand_over(self) -> None:
        """Sort into completions what was drawn for prompts that have no row waiting or under way."""
        busy = {share.prompt for share in self._queue.waiting}
        if self._grid is not None:
            busy.update((self._grid.rows[self._grid.live] // self._job.num_completions).tolist())
        ready = [prompt for prompt in range(len(self._job.prompts)) if prompt not in self._made and prompt not in busy]
        if ready:
            self._made.update(zip(ready, self._transcript.completions(ready, self._job.num_completions), strict=True))
        if self._job.done is not None:
            for prompt in ready:
                self._job.done(prompt, self._made[prompt])

    @section("sample/prefill")
    def _prefill(self, admitted: Sequence[_Share]) -> Grid:
        """Run each admitted prompt once and open slots for its completions."""
        device, prompts = self._policy.device, [self._job.prompts[share.prompt] for share in admitted]
        recorder = PrefillLayout([len(prompt) for prompt in prompts], device)
        tokens = torch.tensor([token for prompt in prompts for token in prompt], device=device)
        positions = torch.cat([torch.arange(len(prompt)) for prompt in prompts]).to(device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)  # [Q]
        logits = self._policy.logits(self._policy.run(tokens, positions, recorder, lengths.cumsum(0) - 1))  # [Q, V]
        member = torch.arange(max(share.count for share in admitted))
        firsts = torch.tensor([share.prompt * self._job.num_completions + share.first for share in admitted])
        live = member < torch.tensor([[share.count] for share in admitted])  # [Q, W]
        rows = (firsts[:, None] + member).where(live, 0)
        return Grid.of(recorder.stored, lengths, logits, rows.to(device), live.to(device), self._queue.copies_prompts)

    def _draw(self, grid: Grid) -> Tensor | None:
        """A token for each row, [R], which is still to be fed; or several, where compiled loops draw them and feed them."""
        sampling = self._job.sampling
        keys, written = self._job.keys.flatten()[grid.rows], grid.num_written
        if self._draws:
            self._draw_compiled(grid, keys, sampling.max_new_tokens - int(written[grid.live].min()))
            return None
        sampled = sample_tokens(grid.logits, keys, written, sampling)
        ended = self._ends.reached(grid.rows, grid.live, sampled.tokens)
        self._transcript.add(grid.rows, grid.live, ended, sampled)
        grid.live = grid.live & ~ended & (written + 1 < sampling.max_new_tokens)
        return sampled.tokens

    @section("sample/decode")
    def _draw_compiled(self, grid: Grid, keys: Tensor, most: int) -> None:
        """Draw and run tokens for each row until it ends, or for some steps."""
        assert self._decoder is not None
        steps = min(_STEPS_BETWEEN if self._queue.waiting or self._job.done is not None else _STEPS, most)
        grid.make_room(steps)
        live, ended, sampled = self._decoder.draw(grid, keys, self._job.sampling, self._job.end_tokens, steps)
        tokens, logprobs, entropies = (x.flatten() for x in (sampled.tokens, sampled.logprobs, sampled.entropies))
        flat = SampledTokens(tokens, logprobs, entropies)
        self._transcript.add(grid.rows.repeat(steps), live.flatten(), ended.flatten(), flat)
        grid.now += int(live.any(1).sum())

    @section("sample/decode")
    def _feed(self, grid: Grid, tokens: Tensor) -> None:
        """Run for each row the token it drew, [R], and put the logits that follow in the grid."""
        self._carried += 1 - self._num_live / grid.num_slots
        grid.make_room(1, ROOM if self._replayer is not None else 0)
        if self._decoder is not None:
            self._decoder.feed(grid, tokens)
        else:
            grid.logits = self._logits_after(grid, tokens)
        grid.now += 1

    def _logits_after(self, grid: Grid, tokens: Tensor) -> Tensor:
        """The next logits, by tensor operations: [R, V]."""
        positions = (grid.prompt_lengths + grid.num_written) * grid.live  # an ended row's would run past the last one
        if self._replayer is None:
            return self._policy.logits(self._policy.run(tokens, positions, DecodeLayout(grid)))
        logits = self._replayer.feed(grid, tokens, positions)
        self._engine.replays = self._replayer.usable
        return logits


@dataclass(frozen=True)
class _Share:
    """Completions first .. first + count of a prompt, sampled from one prefill."""

    prompt: int
    first: int
    count: int


@dataclass
class _Queue:
    """The completions that wait for a place, and how much fits: rows by number, keys and values by bytes at their longest.

    A group is admitted whole, unless it would not fit alone.
    """

    waiting: deque[_Share]
    max_rows: int
    max_bytes: float
    row_bytes: int
    prompt_bytes: int
    copies_prompts: bool

    @classmethod
    def of(cls, job: Job, token_bytes: int, copies_prompts: bool) -> _Queue:
        """All completions of a job, whose prompts are copied to each row or kept once for all."""
        sampling, longest = job.sampling, max(map(len, job.prompts))
        row_bytes = token_bytes * (sampling.max_new_tokens + (longest if copies_prompts else 0))
        prompt_bytes = 0 if copies_prompts else token_bytes * longest
        max_bytes = sampling.max_cache_megabytes * 1e6
        fitting = max(1, min(sampling.max_rows, int((max_bytes - prompt_bytes) / row_bytes)))
        shares = [
            _Share(prompt, first, min(fitting, job.num_completions - first))
            for prompt in range(len(job.prompts))
            for first in range(0, job.num_completions, fitting)
        ]
        return cls(deque(shares), fitting, max_bytes, row_bytes, prompt_bytes, copies_prompts)

    def admit(self, num_live: int) -> list[_Share]:
        """Take the next ones, if there is room for a good part of them. A live row is counted with a prompt of its own."""
        if not self.waiting or (num_live and self.max_rows - num_live < max(self.waiting[0].count, self.max_rows // 4)):
            return []
        free_rows = self.max_rows - num_live
        free_bytes = self.max_bytes - num_live * (self.row_bytes + self.prompt_bytes)
        admitted: list[_Share] = []
        while self.waiting:
            share = self.waiting[0]
            free_rows -= share.count
            free_bytes -= share.count * self.row_bytes + self.prompt_bytes
            if (free_rows < 0 or free_bytes < 0) and (admitted or num_live):
                break
            admitted.append(self.waiting.popleft())
        return admitted
