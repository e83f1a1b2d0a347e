"""The native engine samples what a plain loop samples, whatever shares its batch."""

import copy
from dataclasses import replace

import pytest
import torch
from architectures import tiny_model
from conftest import SHAPES, some_quick
from tokenizers import Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from coterie.fast import native
from coterie.fast.decoder import Decoder
from coterie.fast.kernels import calls
from coterie.fast.native import NativeEngine
from coterie.fast.serve import _ALLOWED_GAP, Policy, _decoding_gap, make_engine
from coterie.models.codec import Codec
from coterie.models.logprobs import token_logprobs
from coterie.noise import key, mix, uniform
from coterie.recipe.settings import ALL_LINEAR, Lora, Sampling
from coterie.rollouts.collect import collect
from coterie.rollouts.engine import Ends, Job
from coterie.rollouts.pack import Row, make_stream
from coterie.rollouts.padded import PaddedEngine
from coterie.tasks.equations import make_tokenizer
from coterie.types import Prompt

pytestmark = pytest.mark.usefixtures("each_way")
ENDS = (1, 2)
SAMPLINGS = {
    "plain": Sampling(max_new_tokens=24),
    "truncated": Sampling(max_new_tokens=24, temperature=0.7, top_p=0.9),
    "top_k": Sampling(max_new_tokens=24, top_k=5),
    "min_p": Sampling(max_new_tokens=24, temperature=1.3, min_p=0.3, top_k=20),
    "few_rows": Sampling(max_new_tokens=24, max_rows=8),
}


def some_prompts(count=6):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(61, (3 + 4 * i,), generator=generator).tolist() for i in range(count)]


def some_keys(num_prompts, num_completions):
    return mix(mix(torch.tensor(key("test")), torch.arange(num_prompts))[:, None], torch.arange(num_completions))


def job_of(prompts, num_completions, sampling, decode=None):
    none = torch.tensor([], dtype=torch.long)
    return Job(prompts, some_keys(len(prompts), num_completions), sampling, none, decode, None)


@torch.no_grad()
def plain_completion(model, prompt, noise_key, sampling):
    """One row, the whole sequence run again for every token: (tokens, log-probabilities)."""
    tokens, logprobs = [], []
    while len(tokens) < sampling.max_new_tokens and not (tokens and tokens[-1] in ENDS):
        logits = model(torch.tensor([prompt + tokens]), use_cache=False).logits[0, -1].double() / sampling.temperature
        probabilities = logits.softmax(0)
        ranked = sorted(range(len(logits)), key=lambda i: -probabilities[i].item())
        kept, mass = [], 0.0
        for token in ranked[: sampling.top_k or None]:
            if mass < sampling.top_p:
                kept.append(token)
            mass += probabilities[token].item() / (
                sum(probabilities[t].item() for t in ranked[: sampling.top_k or None]) if sampling.top_k else 1.0
            )
        kept = [t for t in kept if probabilities[t] >= sampling.min_p * probabilities.max()]
        total = sum(probabilities[token].item() for token in kept)
        threshold = uniform(mix(noise_key, torch.tensor(len(tokens)))).item() * total
        below = 0.0
        for token in sorted(kept):
            below += probabilities[token].item()
            if below > threshold:
                break
        tokens.append(token)
        logprobs.append((probabilities[token] / total).log().item())
    return tokens, logprobs


@pytest.mark.parametrize("architecture", some_quick(["qwen3", "gpt2", "mistral", "gemma2", "gpt_oss"], "qwen3"))
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.filterwarnings("ignore:.*share prompts")
def test_equals_a_plain_loop_token_for_token(make_model, architecture, sampling):
    model, prompts, keys = make_model(architecture), some_prompts(3), some_keys(3, 3)
    groups = make_engine(Policy.of(model)).generate(prompts, keys, sampling, ENDS)
    for prompt, group, of_group in zip(prompts, groups, keys, strict=True):
        for completion, noise_key in zip(group, of_group, strict=True):
            tokens, logprobs = plain_completion(model, prompt, noise_key, sampling)
            assert completion.tokens == tokens
            torch.testing.assert_close(completion.logprobs, torch.tensor(logprobs), rtol=0, atol=2e-5)
            assert completion.ended == ("stop" if tokens[-1] in ENDS else "length")


@pytest.mark.parametrize(
    "architecture", some_quick([name for name in SHAPES if name not in ("gpt_oss", "doge")], "qwen3", "gpt2")
)
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_one_prompt_alone_and_in_a_batch_get_the_same_tokens(make_model, architecture, sampling):
    engine, prompts, keys = NativeEngine(Policy.of(make_model(architecture))), some_prompts(), some_keys(6, 4)
    together = engine.generate(prompts, keys, sampling, ENDS)
    for i, prompt in enumerate(prompts):
        alone = engine.generate([prompt], keys[i : i + 1], sampling, ENDS)[0]
        assert [c.tokens for c in alone] == [c.tokens for c in together[i]]


@pytest.mark.parametrize("targets", [(ALL_LINEAR,), ("q_proj", "down_proj")])
@pytest.mark.parametrize("architecture", ["qwen3", "qwen2"])
def test_lora_s_matrices_give_what_their_product_gives_in_the_weights(make_model, architecture, targets):
    """The set that acts and no other: the policy's, another one's, none; tokens and log-probabilities of a merged model."""
    policy = Policy.of(make_model(architecture)).with_adapter(Lora(rank=3, targets=targets), seed=0)
    other = replace(policy, adapter=policy.adapter.added("other"))
    generator, prompts, keys = torch.Generator().manual_seed(4), some_prompts(2), some_keys(2, 3)
    for one in (policy, other):
        for _, parameter in one.named_parameters():
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    written = []
    for one in (policy, other, replace(policy, adapter=policy.adapter.off())):
        assert (Decoder.of(one, 99) is None) == (calls.library(torch.float32) is None)
        merged = copy.deepcopy(one)
        merged.adapter.merge()
        groups = NativeEngine(one).generate(prompts, keys, SAMPLINGS["plain"], ENDS)
        completions = [completion for group in groups for completion in group]
        for number, completion in enumerate(completions):
            row = prompts[number // 3], keys.flatten()[number]
            tokens, logprobs = plain_completion(merged.model, *row, SAMPLINGS["plain"])
            assert completion.tokens == tokens
            torch.testing.assert_close(completion.logprobs, torch.tensor(logprobs), rtol=0, atol=2e-5)
        written.append([completion.tokens for completion in completions])
    assert written[0] != written[1] != written[2] != written[0]


def test_rows_come_and_go_without_changing_any(make_model):
    """With room for 8 rows, 40 completions are decoded in turns; the tokens are those of one large batch."""
    engine, prompts, keys = NativeEngine(Policy.of(make_model("qwen3"))), some_prompts(10), some_keys(10, 4)
    few, many = (engine.generate(prompts, keys, Sampling(max_new_tokens=40, max_rows=rows), ENDS) for rows in (8, 1000))
    lengths = {len(c.tokens) for group in many for c in group}
    assert len(lengths) > 5, "the rows should end at different times for this to mean anything"
    assert [[c.tokens for c in g] for g in few] == [[c.tokens for c in g] for g in many]


def test_rows_that_have_ended_give_up_their_slots(make_model, monkeypatch, without_kernels):
    """Tensor operations compute every slot of a grid, whether its row has ended or not."""
    engine, prompts, keys = NativeEngine(Policy.of(make_model("qwen3"))), some_prompts(10), some_keys(10, 4)
    slots, feed = [], native._Sampling._feed

    def watched(self, grid, tokens):
        slots.append(grid.num_slots)
        feed(self, grid, tokens)

    monkeypatch.setattr(native._Sampling, "_feed", watched)
    made = engine.generate(prompts, keys, Sampling(max_new_tokens=40), ENDS)
    at_the_end = sum(len(completion.tokens) == 40 for group in made for completion in group)
    assert slots[0] == 40
    assert at_the_end <= slots[-1] < slots[0]


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_sampler_and_trainer_agree_on_the_logprobs(make_model, sampling):
    policy, prompts = Policy.of(make_model("qwen3")), some_prompts()
    groups = NativeEngine(policy).generate(prompts, some_keys(6, 4), sampling, ENDS)
    rows = [
        (p, [Row(c.tokens, c.logprobs, support=c.support) for c in g]) for p, g in zip(prompts, groups, strict=True)
    ]
    stream = make_stream(rows)
    with torch.no_grad():
        trainer = token_logprobs(policy, stream, temperature=sampling.temperature)
    torch.testing.assert_close(trainer, stream.sampler_logprobs, rtol=0, atol=1e-5)


def test_samples_follow_the_distribution(make_model):
    """4000 first tokens against the model's own probabilities, by a chi-square that 1 run in a million would exceed."""
    model = make_model("qwen3")
    prompt = [5, 6, 7]
    groups = NativeEngine(Policy.of(model)).generate(
        [prompt], some_keys(1, 4000), Sampling(max_new_tokens=1, max_rows=4000), ENDS
    )
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1].softmax(0) * 4000
    seen = torch.bincount(torch.tensor([c.tokens[0] for c in groups[0]]), minlength=61)
    often = expected > 5
    chi_square = ((seen - expected).square() / expected)[often].sum().item()
    assert chi_square < 61 + 5 * (2 * 61) ** 0.5


def test_greedy_takes_the_likeliest_and_needs_no_noise(make_model):
    engine = NativeEngine(Policy.of(make_model("llama")))
    greedy = Sampling(max_new_tokens=12, temperature=0.0)
    first, second = (engine.generate(some_prompts(2), some_keys(2, 2) + shift, greedy, ENDS) for shift in (0, 99))
    assert [[c.tokens for c in g] for g in first] == [[c.tokens for c in g] for g in second]
    assert first[0][0].tokens == first[0][1].tokens


@pytest.mark.parametrize("copied", [0, 1000])
@pytest.mark.parametrize("architecture", ["qwen3", "mistral", "gemma2"])
def test_copied_and_shared_prompts_give_the_same_tokens(make_model, monkeypatch, architecture, copied):
    """With room for few rows, so that rows of different ages share a grid both ways."""
    engine, prompts, keys = NativeEngine(Policy.of(make_model(architecture))), some_prompts(9), some_keys(9, 3)
    sampling = Sampling(max_new_tokens=40, max_rows=10)
    expected = engine.generate(prompts, keys, sampling, ENDS)
    monkeypatch.setattr(native, "_COPIED_PROMPT", copied)
    found = engine.generate(prompts, keys, sampling, ENDS)
    assert [[c.tokens for c in g] for g in found] == [[c.tokens for c in g] for g in expected]


@pytest.mark.parametrize("copied", [0, 1000])
def test_keys_and_values_stay_within_their_budget(make_model, monkeypatch, copied):
    monkeypatch.setattr(native, "_COPIED_PROMPT", copied)
    engine, prompts, keys = NativeEngine(Policy.of(make_model("qwen3"))), some_prompts(7), some_keys(7, 4)
    longest = max(map(len, prompts))
    token_bytes, limit = 2 * 2 * 2 * 8 * 4, 24  # layers, keys and values, heads, width, float32
    used, num_live = [], []
    make_room = native.Grid.make_room

    def watched(grid, num_columns, spare=0):
        rows = grid.rows[grid.live]
        num_live.append(len(rows))
        num_prompts = len((rows // 4).unique()) if grid.prompt_kv else len(rows)
        used.append(len(rows) * limit + num_prompts * longest)
        make_room(grid, num_columns, spare)

    monkeypatch.setattr(native.Grid, "make_room", watched)
    whole = engine.generate(prompts, keys, Sampling(max_new_tokens=limit), ENDS)
    assert max(num_live) > 20
    used.clear()
    tokens = 2 * limit + 2 * longest  # a group of four does not fit at once
    sampling = Sampling(max_new_tokens=limit, max_cache_megabytes=tokens * token_bytes / 1e6)
    few = engine.generate(prompts, keys, sampling, ENDS)
    assert limit + longest < max(used) <= tokens
    assert [[c.tokens for c in g] for g in few] == [[c.tokens for c in g] for g in whole]


@pytest.mark.parametrize("copied", [0, 1000])
@pytest.mark.parametrize("look_every", [5, 16])
def test_looking_now_and_then_for_ended_rows_changes_no_token(make_model, monkeypatch, copied, look_every):
    """As on a GPU: between two looks all rows may end, and ended ones are carried along."""
    monkeypatch.setattr(native, "_COPIED_PROMPT", copied)
    engine, prompts, keys = NativeEngine(Policy.of(make_model("qwen3"))), some_prompts(9), some_keys(9, 3)
    for sampling in (Sampling(max_new_tokens=40, max_rows=10), Sampling(max_new_tokens=40)):
        expected = engine.generate(prompts, keys, sampling, ENDS)
        with monkeypatch.context() as patch:
            patch.setitem(native._LOOK_EVERY, "cpu", look_every)
            found = engine.generate(prompts, keys, sampling, ENDS)
        assert [[c.tokens for c in g] for g in found] == [[c.tokens for c in g] for g in expected]


@pytest.mark.parametrize("architecture", ["qwen3", "gpt_oss"])
@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.filterwarnings("ignore:.*share prompts")
def test_groups_are_handed_over_as_they_end_and_are_the_same(make_model, architecture, sampling):
    engine, prompts, keys = make_engine(Policy.of(make_model(architecture))), some_prompts(9), some_keys(9, 3)
    expected = engine.generate(prompts, keys, sampling, ENDS)
    order, early = [], {}

    def done(number, completions):
        order.append(number)
        early[number] = completions

    found = engine.generate(prompts, keys, sampling, ENDS, done=done)
    assert sorted(order) == list(range(9))
    for number in range(9):
        assert early[number] is found[number]
        for one, other in zip(found[number], expected[number], strict=True):
            assert (one.tokens, one.ended) == (other.tokens, other.ended)
            assert torch.equal(one.logprobs, other.logprobs)
            assert torch.equal(one.entropies, other.entropies)
            if sampling.truncates:
                assert [ids.tolist() for ids in one.support] == [ids.tolist() for ids in other.support]


def test_the_first_groups_are_handed_over_while_others_wait(make_model, monkeypatch):
    engine, prompts, keys = NativeEngine(Policy.of(make_model("qwen3"))), some_prompts(9), some_keys(9, 3)
    events = []
    prefill = native._Sampling._prefill

    def watched(self, admitted):
        events.append("prefill")
        return prefill(self, admitted)

    monkeypatch.setattr(native._Sampling, "_prefill", watched)
    sampling = Sampling(max_new_tokens=40, max_rows=6)
    engine.generate(prompts, keys, sampling, ENDS, done=lambda number, completions: events.append("done"))
    assert events.count("done") == 9
    assert "done" in events[: len(events) - events[::-1].index("prefill")]


def test_rows_that_have_ended_do_not_run_past_the_last_position(make_model):
    """Learned positions end where the longest prompt's completions may end; its rows are carried along while others go on."""
    prompts, keys = some_prompts(12)[::-1], some_keys(12, 4)
    model = make_model("gpt2", n_positions=len(prompts[0]) + 30)
    engine = NativeEngine(Policy.of(model))
    few, many = (engine.generate(prompts, keys, Sampling(max_new_tokens=30, max_rows=n), ENDS) for n in (12, 1000))
    assert [[c.tokens for c in g] for g in few] == [[c.tokens for c in g] for g in many]


def decode(tokens):
    """Every token is two letters, so that a stop string may begin or end within one."""
    return "".join(chr(97 + token % 7) + chr(97 + token % 5) for token in tokens)


@pytest.mark.parametrize("architecture", ["qwen3", "gpt_oss"])
@pytest.mark.filterwarnings("ignore:.*share prompts")
def test_a_stop_string_ends_a_completion_at_its_last_token(make_model, architecture):
    engine, prompts, keys = make_engine(Policy.of(make_model(architecture))), some_prompts(3), some_keys(3, 4)
    free = engine.generate(prompts, keys, Sampling(max_new_tokens=30), ENDS)
    strings = ("ab", "edc")
    stopped = engine.generate(prompts, keys, Sampling(max_new_tokens=30, stop=strings), ENDS, decode)
    num_stopped = 0
    for before, after in zip([c for g in free for c in g], [c for g in stopped for c in g], strict=True):
        texts = [decode(before.tokens[: n + 1]) for n in range(len(before.tokens))]
        holding = [n + 1 for n, text in enumerate(texts) if any(string in text for string in strings)]
        assert after.tokens == (before.tokens[: holding[0]] if holding else before.tokens)
        assert after.ended == ("stop" if holding else before.ended)
        num_stopped += bool(holding)
    assert 0 < num_stopped < 12


def test_the_text_of_a_completion_leaves_out_what_ended_it(make_model):
    tokenizer = make_tokenizer()
    codec = Codec.of(tokenizer)
    model = make_model("qwen3", vocab_size=len(tokenizer))
    prompts = [Prompt(0, "x", [3, 4, 5], {}, "")]
    sampling = Sampling(max_new_tokens=40, stop=("1", "x"))
    groups = collect(make_engine(Policy.of(model)), prompts, codec, sampling, num_completions=12, noise=(0, "test"))
    ends = {"string": 0, "token": 0}
    for completion in groups[0].completions:
        whole = codec.decode(completion.tokens)
        if completion.tokens[-1] in codec.end_tokens:
            ends["token"] += 1
            assert completion.text == whole
        elif completion.ended == "stop":
            ends["string"] += 1
            assert whole.startswith(completion.text)
            assert whole[len(completion.text)] in "1x"
        assert not set(completion.text) & {"1", "x"}
    assert ends["string"] > 3


def test_of_stop_strings_that_a_token_completes_the_first_counts(make_model):
    """A token may write two of them at once, in either order of the list."""
    pieces = ["<b><a>.", *(f"{i} " for i in range(60))]
    words = Tokenizer(WordLevel({piece: token for token, piece in enumerate(pieces)}))
    words.decoder = Fuse()
    codec = Codec.of(PreTrainedTokenizerFast(tokenizer_object=words, eos_token=pieces[-1]))
    model = make_model("qwen3")
    with torch.no_grad():
        model.lm_head.weight[0] *= 3
    for stop in (("<a>", "<b>"), ("<b>", "<a>")):
        sampling = Sampling(max_new_tokens=40, stop=stop)
        prompts = [Prompt(0, "x", [3, 4, 5], {}, "")]
        (group,) = collect(
            make_engine(Policy.of(model)), prompts, codec, sampling, num_completions=48, noise=(0, "test")
        )
        stopped = [c for c in group.completions if c.ended == "stop" and c.tokens[-1] not in codec.end_tokens]
        assert len(stopped) > 2
        for completion in stopped:
            assert completion.tokens[-1] == 0
            assert completion.text == "".join(pieces[t] for t in completion.tokens[:-1])


@pytest.mark.parametrize("string", ["。", "答案。完", "ab"])
def test_a_stop_string_is_found_though_every_byte_is_a_token(string):
    text = ("x" * 9 + string).encode()
    sampling = Sampling(max_new_tokens=40, stop=(string,))
    ends = Ends(job_of([[1]], 1, sampling, lambda tokens: bytes(tokens).decode(errors="replace")))
    row, live = torch.tensor([0]), torch.tensor([True])
    found = [ends.reached(row, live, torch.tensor([byte])).item() for byte in text]
    assert found == [False] * (len(text) - 1) + [True]


def test_live_rows_and_prompts_stay_within_the_cache_s_limit():
    """A live row may be the last of its prompt: it is counted with a prompt of its own, and what waits waits on."""
    prompts, token_bytes = [[1] * 90] * 10, 1000
    sampling = Sampling(max_new_tokens=10, max_cache_megabytes=0.5)
    queue = native._Queue.of(job_of(prompts, 2, sampling), token_bytes, False)
    first = sum(share.count for share in queue.admit(0))
    assert first * 10_000 + first / 2 * 90_000 <= 500_000
    for live in range(1, first):
        room = 500_000 - live * (10_000 + 90_000)
        waiting = list(queue.waiting)
        admitted = queue.admit(live)
        assert sum(share.count * 10_000 + 90_000 for share in admitted) <= max(0, room)
        queue.waiting = type(queue.waiting)(waiting)


def test_a_model_that_decoding_changes_keeps_its_own_cache():
    """Its convolutions read the token before, which stands elsewhere in the stream."""
    model = tiny_model("lfm2", grown=True)
    with pytest.warns(UserWarning, match="Lfm2ForCausalLM can't be decoded natively"):
        engine = make_engine(Policy(model, "stream", dict.fromkeys(range(model.config.num_hidden_layers))))
    assert isinstance(engine, PaddedEngine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_rounding_may_change_depends_on_the_precision(make_model, dtype):
    """In half precision what the trials of rounding show may be beyond what is allowed in single precision."""
    gap, allowed = _decoding_gap(NativeEngine(Policy.of(make_model("qwen3").to(dtype))))
    assert gap <= allowed
    assert (allowed == _ALLOWED_GAP) == (dtype == torch.float32)
