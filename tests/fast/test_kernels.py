"""The compiled loops give, in float64, what tensor operations give; in float32 they are as exact as those."""

import ctypes
import subprocess
import sys

import pytest
import torch

from coterie.fast.compiled import attend, rms_norm, rope, swiglu
from coterie.fast.decoder import Decoder
from coterie.fast.grid import Grid
from coterie.fast.kernels import build, calls, structs
from coterie.fast.native import NativeEngine
from coterie.fast.serve import Policy
from coterie.fast.stream import StreamLayout
from coterie.models.attention import AttentionSettings
from coterie.models.layout import DenseLayout
from coterie.noise import key, mix, uniform
from coterie.recipe.settings import Sampling
from coterie.rollouts.engine import sample_tokens

SEGMENTS = [(5, (4, 17, 1)), (11, (2, 3)), (3, (9,)), (1, (6, 30, 8, 2)), (23, (5, 5)), (7, ())]
NUM_TOKENS = sum(prompt + sum(lengths) for prompt, lengths in SEGMENTS)


def randoms(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_() for shape in shapes]


def with_gradients(function, inputs):
    """The output, and the gradient of each input for one random direction."""
    out = function(*inputs)
    direction = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad((out * direction).sum(), inputs)]


def plain_norm(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def plain_turn(x, cos, sin, weight=None):
    heads = x.view(len(x), -1, cos.shape[1])
    heads = plain_norm(heads, weight) if weight is not None else heads
    return (heads * cos[:, None] + heads.roll(cos.shape[1] // 2, 2) * sin[:, None]).flatten(1)


@pytest.mark.parametrize("shape", [(1, 8), (7, 24), (300, 130)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_norms_and_gates_and_their_gradients(shape, dtype):
    tolerance = 1e-12 if dtype == torch.float64 else 3e-5
    x, weight, gate, up = (z.detach().to(dtype).requires_grad_() for z in randoms(shape, shape[1:], shape, shape))
    assert calls.served(x, weight)
    exact = [z.detach().double().requires_grad_() for z in (x, weight, gate * 20, up)]
    steep = (gate * 20).detach().requires_grad_()  # where the gate is shut, too
    pairs = [
        (lambda a, b: rms_norm(a, b, 1e-6), plain_norm, [x, weight], exact[:2]),
        (swiglu, lambda a, b: torch.nn.functional.silu(a) * b, [steep, up], exact[2:]),
    ]
    for ours, plain, inputs, exact_inputs in pairs:
        for mine, theirs in zip(with_gradients(ours, inputs), with_gradients(plain, exact_inputs), strict=True):
            scale = theirs.abs().max().item()
            torch.testing.assert_close(mine.double(), theirs, rtol=tolerance, atol=tolerance * scale)


@pytest.mark.parametrize("normed", [True, False])
def test_heads_normalised_and_turned(normed):
    x, weight, cos, sin = randoms((40, 48), (16,), (40, 16), (40, 16))
    cos, sin = cos.detach(), sin.detach()
    inputs = [x, weight] if normed else [x]
    ours = with_gradients(lambda a, w=None: rope(a, w, 1e-6, cos, sin), inputs)
    plain = with_gradients(lambda a, w=None: plain_turn(a, cos, sin, w), inputs)
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("width", [8, 24, 64])
@pytest.mark.parametrize("window", [None, 1, 3, 20])
def test_attention_over_a_stream_and_its_gradients(heads, width, window):
    inputs = randoms(*((NUM_TOKENS, n, width) for n in (heads[0], heads[1], heads[1])))
    settings = AttentionSettings(0.3, window, None)

    def through(layout):
        return lambda q, k, v: layout.attend(0, *(x.transpose(0, 1)[None] for x in (q, k, v)), settings)[0]

    ours = with_gradients(through(StreamLayout(SEGMENTS)), inputs)
    plain = with_gradients(through(DenseLayout(SEGMENTS)), inputs)
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


def test_attention_stays_exact_where_scores_are_far_apart():
    inputs = [(60 * x).detach().float().requires_grad_() for x in randoms(*[(NUM_TOKENS, 2, 8)] * 2)]
    inputs.append(randoms((NUM_TOKENS, 2, 8), seed=1)[0].detach().float().requires_grad_())
    groups = calls.Groups.of(SEGMENTS)
    ours = with_gradients(lambda q, k, v: attend(q, k, v, groups, 1.0, None), inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    settings = AttentionSettings(1.0, None, None)
    plain = with_gradients(
        lambda *x: DenseLayout(SEGMENTS).attend(0, *(y.transpose(0, 1)[None] for y in x), settings)[0], exact
    )
    for mine, theirs in zip(ours, plain, strict=True):
        assert mine.isfinite().all()
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-3, atol=2e-3)


def test_equal_inputs_give_equal_bits_with_any_number_of_threads():
    x, weight, grad = (z.detach().float() for z in randoms((900, 64), (64,), (900, 64)))
    inputs = [x.requires_grad_(), weight.requires_grad_()]

    def gradients():
        return torch.autograd.grad(rms_norm(*inputs, 1e-6), inputs, grad)

    first, again = (gradients() for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3 if before != 3 else 2)
        other = gradients()
    finally:
        torch.set_num_threads(before)
    for a, b in zip(first, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.6, 0.0])
@pytest.mark.parametrize("architecture", ["qwen3", "qwen2", "mistral"])
def test_drawing_in_one_call_is_drawing_from_the_model_s_logits(make_model, architecture, temperature):
    """Tokens, log-probabilities and entropies of a decoder in float64 beside `sample_tokens` on the plain model's logits."""
    model = make_model(architecture).double()
    policy = Policy.of(model)
    sampling = Sampling(max_new_tokens=9, temperature=temperature)
    num_rows, ends = 5, torch.tensor([3, 40])
    kv_heads, width = model.config.num_key_value_heads, model.model.layers[0].self_attn.head_dim
    keys = mix(torch.tensor(key("draw")), torch.arange(num_rows))
    decoder = Decoder.of(policy, 16)
    assert decoder is not None
    zeros = torch.zeros(num_rows, dtype=torch.long)
    first_logits = randoms((num_rows, 61), seed=3)[0].detach()
    layers = range(model.config.num_hidden_layers)
    grid = Grid(
        rows=zeros, now=0, width=1, firsts=zeros, starts=zeros, prompt_lengths=zeros,
        live=torch.ones(num_rows, dtype=torch.bool), logits=first_logits.clone(), prompt_kv={},
        own_kv={i: (torch.full((num_rows, kv_heads, width, 16), torch.nan, dtype=torch.float64),
                 torch.full((num_rows, kv_heads, 16, width), torch.nan, dtype=torch.float64)) for i in layers},
    )  # fmt: skip
    live, ended, drawn = decoder.draw(grid, keys, sampling, ends, 9)
    for row in range(num_rows):
        logits, tokens = first_logits[row], []
        for step in range(9):
            expected = sample_tokens(logits[None], keys[row : row + 1], torch.tensor([step]), sampling)
            assert live[step, row]
            assert drawn.tokens[step, row] == expected.tokens[0]
            torch.testing.assert_close(drawn.logprobs[step, row].float(), expected.logprobs[0], rtol=1e-5, atol=2e-6)
            torch.testing.assert_close(drawn.entropies[step, row].float(), expected.entropies[0], rtol=1e-5, atol=2e-6)
            tokens.append(int(expected.tokens[0]))
            assert ended[step, row] == (tokens[-1] in (3, 40))
            if tokens[-1] in (3, 40):
                assert not live[step + 1 :, row].any()
                break
            with torch.no_grad():
                logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
    assert not grid.live.any()


@pytest.mark.parametrize("vocabulary", [511, 1500, 2048])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_token_of_a_large_vocabulary_is_where_the_noise_falls(make_model, vocabulary, dtype):
    """Also where probabilities are 0: the token's place among the sums of exact probabilities, and its log-probability."""
    policy = Policy.of(make_model("qwen3", vocab_size=vocabulary).to(dtype))
    logits = 3 * torch.randn(300, vocabulary, dtype=dtype, generator=torch.Generator().manual_seed(5))
    logits[:40, : vocabulary // 2] = -torch.inf
    logits[40:80, vocabulary // 3 :] = -torch.inf
    logits[80:90] = -torch.inf
    logits[80:90, vocabulary - 3] = 7.0
    keys, sampling = mix(torch.tensor(key("large")), torch.arange(300)), Sampling(max_new_tokens=1, temperature=0.7)
    zeros, decoder = torch.zeros(300, dtype=torch.long), Decoder.of(policy, 16)
    assert decoder is not None
    empty = {i: (torch.zeros(300, 2, 8, 16, dtype=dtype), torch.zeros(300, 2, 16, 8, dtype=dtype)) for i in range(2)}
    live = torch.ones(300, dtype=torch.bool)
    grid = Grid(zeros, live, zeros, zeros, zeros, logits.clone(), 0, 1, {}, empty)
    _, _, drawn = decoder.draw(grid, keys, sampling, zeros[:0], 1)
    exact = (logits.double() / 0.7).log_softmax(1)
    at = drawn.tokens[0, :, None]
    above = exact.exp().cumsum(1).gather(1, at)[:, 0]
    noise, below = uniform(mix(keys, zeros)), above - exact.exp().gather(1, at)[:, 0]
    assert ((below - 1e-6 <= noise) & (noise <= above + 1e-6)).all()
    assert len(drawn.tokens.unique()) > 100
    torch.testing.assert_close(drawn.logprobs[0].double(), exact.gather(1, at)[:, 0], rtol=1e-5, atol=2e-6)
    entropies = -(exact.exp() * exact.masked_fill(exact == -torch.inf, 0.0)).sum(1)
    torch.testing.assert_close(drawn.entropies[0].double(), entropies, rtol=1e-5, atol=2e-6)


def test_the_widest_heads_are_turned():
    width = calls.MOST_WIDTH
    x, weight, cos, sin = randoms((6, 2 * width), (width,), (6, width), (6, width))
    cos, sin = cos.detach(), sin.detach()
    ours = with_gradients(lambda a, w: rope(a, w, 1e-6, cos, sin), [x, weight])
    plain = with_gradients(lambda a, w: plain_turn(a, cos, sin, w), [x, weight])
    for mine, theirs in zip(ours, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-11)


@pytest.mark.parametrize("width", [514, 7])
def test_the_loops_refuse_a_head_that_they_have_no_room_for(width):
    x, cos = torch.zeros(2, width), torch.zeros(2, width)
    with pytest.raises(AssertionError, match="no room"):
        rope(x, None, 0.0, cos, cos)
    with pytest.raises(AssertionError, match="no room"):
        calls.call("rope_backward", x, x, None, cos, cos, None, x, None, x, 2, 1, width)


@pytest.mark.parametrize("width", [512, 520])
def test_a_model_with_wide_heads_samples_what_it_is(make_model, width):
    """With 512 through the decoder, above through its own layers, and both as the plain model."""
    model = make_model("qwen3", head_dim=width)
    policy = Policy.of(model)
    assert (Decoder.of(policy, 16) is not None) == (width == 512)
    keys = mix(torch.tensor(key("wide")), torch.arange(3))[None]
    (group,) = NativeEngine(policy).generate([[5, 6, 7]], keys, Sampling(max_new_tokens=6), [])
    for completion in group:
        row = torch.tensor([[5, 6, 7, *completion.tokens]])
        with torch.no_grad():
            logprobs = model(row, use_cache=False).logits[0, 2:-1].log_softmax(1)
        found = logprobs.gather(1, row[0, 3:, None])[:, 0]
        torch.testing.assert_close(found, completion.logprobs, rtol=0, atol=1e-5)


def test_memory_that_is_not_there_is_an_error_and_no_crash():
    q = torch.zeros(NUM_TOKENS, 2, 8, requires_grad=True)
    groups = calls.Groups(calls.Groups.of(SEGMENTS).tensors, longest=1 << 44)
    with pytest.raises(MemoryError, match="allocate memory"):
        attend(q, q, q, groups, 1.0, None)
    attended = attend(q, q, q, calls.Groups.of(SEGMENTS), 1.0, None)
    attended.grad_fn.about.longest = 1 << 44
    with pytest.raises(MemoryError, match="allocate memory"):
        attended.sum().backward()
    ones, live = torch.ones(1, dtype=torch.int64), torch.ones(1, dtype=torch.bool)
    step = {"rows": 1, "heads": 1, "kv_heads": 1, "head_width": 8, "num_steps": 1, "positions": 9, "columns": 16}
    step |= {name: ones.data_ptr() for name in ("starts", "prompts", "firsts")} | {"live": live.data_ptr()}
    decode = build.library(torch.float32).decode
    with pytest.raises(MemoryError, match="allocate memory"):
        calls.run(decode, ctypes.byref(structs.Decoding(**step, vocabulary=1 << 44)), None, None)
    for little in ({"columns": 0}, {"positions": 0}, {"head_width": 514}):
        with pytest.raises(AssertionError, match="no room"):
            calls.run(decode, ctypes.byref(structs.Decoding(**{**step, **little})), None, None)


@pytest.mark.parametrize("struct", ["Attention", "LayerWeights", "LayerCache", "Decoding"])
def test_python_fills_a_struct_in_where_the_compiler_reads_it(tmp_path, struct):
    fields = getattr(structs, struct)._fields_
    asked = ", ".join(f"offsetof({struct}, {name}), sizeof((({struct} *)0)->{name})" for name, _ in fields)
    source, header = tmp_path / "places.c", structs.__file__.replace(".py", ".h")
    source.write_text(
        f'#include <stddef.h>\n#include <stdio.h>\n#include "{header}"\nlong places[] = {{{asked}, sizeof({struct})}};\n'
        'int main(void) { for (long i = 0; i < sizeof places / sizeof *places; i++) printf("%ld ", places[i]); }\n'
    )
    subprocess.run(["cc", "-w", source, "-o", tmp_path / "places"], check=True)
    found = subprocess.run([tmp_path / "places"], capture_output=True, text=True, check=True).stdout
    ours = [getattr(structs, struct).__dict__[name] for name, _ in fields]
    expected = [number for field in ours for number in (field.offset, field.size)]
    assert list(map(int, found.split())) == [*expected, ctypes.sizeof(getattr(structs, struct))]


@pytest.fixture
def fresh_cache(monkeypatch, tmp_path):
    """A folder of its own for what is compiled, and nothing loaded yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.library.cache_clear()
    yield tmp_path / "coterie"
    build.library.cache_clear()


CHANGES = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "flipped": lambda content: content[:5000] + bytes([content[5000] ^ 1]) + content[5001:],
    "text": lambda content: b"not a library",
}


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_a_damaged_build_is_built_again(fresh_cache, change):
    """In a process of its own, where the damage would be a signal."""
    code = (
        "import torch; from coterie.fast.compiled import rms_norm; x = torch.ones(9, 8)\n"
        "print(rms_norm(x, x[0], 0.0).sum().item())"
    )

    def used():
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout

    assert used() == "72.0\n"
    (built,) = fresh_cache.iterdir()
    whole = built.read_bytes()
    built.write_bytes(CHANGES[change](whole))
    assert used() == "72.0\n"
    (again,) = fresh_cache.iterdir()
    assert again.stem.endswith(build._hash(again))


def test_each_reason_to_do_without_is_said(fresh_cache, monkeypatch, tmp_path):
    def reason(**patches):
        build.library.cache_clear()
        with monkeypatch.context() as patched:
            for name, value in patches.items():
                patched.setattr(build, name, value)
            assert build.library(torch.float32) is None
            return build.why_missing(torch.float32)

    trial = tmp_path / "trial.py"
    trial.write_text("import os, signal; os.kill(os.getpid(), signal.SIGBUS)")
    assert "dies of SIGBUS" in reason(_TRIAL=trial)
    trial.write_text("assert False, 'norm'")
    assert "does not pass its trial: AssertionError: norm" in reason(_TRIAL=trial)
    assert "the C compiler (cc, which needs OpenMP) failed" in reason(_FLAGS=("-no-such-flag",))
    assert list(fresh_cache.iterdir()) == []
    monkeypatch.setenv(build.SWITCH, "off")
    assert reason() == "COTERIE_KERNELS is off"
    monkeypatch.delenv(build.SWITCH)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert reason() == "no C compiler (cc) was found"


def test_without_a_compiler_or_an_own_folder_nothing_breaks(monkeypatch, tmp_path):
    build.library.cache_clear()
    try:
        with monkeypatch.context() as patched:
            patched.setattr(build, "_FLAGS", ("-no-such-flag",))
            assert build.library(torch.float32) is None
        build.library.cache_clear()
        with monkeypatch.context() as patched:
            patched.setattr(build.shutil, "which", lambda name: None)
            assert build.library(torch.float32) is None
        build.library.cache_clear()
        shared = tmp_path / "coterie"
        shared.mkdir()
        shared.chmod(0o777)  # somebody else could put a library there
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert isinstance(build.library(torch.float32), ctypes.CDLL)
        assert list(shared.iterdir()) == []
    finally:
        build.library.cache_clear()


def test_what_was_compiled_is_kept_for_the_next_process(tmp_path):
    code = "import torch; from coterie.fast.kernels.build import library; print(library(torch.float32)._name)"
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    found = [
        subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert found[0] == found[1]
    assert len(list((tmp_path / "coterie").iterdir())) == 1
