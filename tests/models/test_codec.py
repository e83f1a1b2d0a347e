"""What a turn is: prompts and rows as the chat template renders them, to the token; where completions end; text as it was written."""

import json
import time

import pytest
from chat_families import CHATS, FAMILIES, Family
from tokenizers import Regex, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from coterie.errors import UserError
from coterie.models.codec import Codec
from coterie.models.load import codec_of, make_byte_tokenizer
from coterie.models.template import Chat
from coterie.recipe.settings import DatasetTask
from coterie.tasks.dataset import Dataset
from coterie.tasks.words import make_word_tokenizer

QUESTION = {"role": "user", "content": "What is 3 + 4?"}
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}, QUESTION]
ANSWERS = ("It is 7.", "<think>\n3 + 4\n</think>\n\nIt is 7.", "It is 8.\n\nSorry")


def chats_of(family: Family):
    return [chat for chat in ([QUESTION], TURNS, [SYSTEM, QUESTION]) if chat[0]["role"] not in family.refuses]


def rendered(tokenizer, messages, **how):
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **how)


def ids(tokenizer, *tokens):
    return {tokenizer.convert_tokens_to_ids(token) for token in tokens}


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture(params=CHATS)
def chat_family(request):
    return FAMILIES[request.param]


def codec_for(family, **settings):
    tokenizer = family.tokenizer()
    return Codec.of(tokenizer, sorted(ids(tokenizer, *family.stated)), **settings)


def test_a_prompt_is_what_the_template_renders(chat_family):
    codec = codec_for(chat_family)
    for chat in chats_of(chat_family):
        assert codec.encode_prompt(chat) == rendered(codec.tokenizer, chat, add_generation_prompt=True)


def test_a_chat_that_ends_with_the_assistant_is_continued(chat_family):
    codec = codec_for(chat_family)
    for chat in chats_of(chat_family):
        begun = [*chat, {"role": "assistant", "content": "It is"}]
        tokens = codec.encode_prompt(begun)
        assert tokens == rendered(codec.tokenizer, begun, continue_final_message=True)
        assert codec.tokenizer.decode(tokens).endswith("It is")


def test_a_turn_s_end_is_that_of_template_tokenizer_and_files(family):
    codec = codec_for(family)
    assert set(codec.end_tokens) == ids(codec.tokenizer, family.eos, family.end, *family.stated)
    assert ids(codec.tokenizer, family.end) == {codec.turn_end}


def assert_row(codec, family, chat, answer, prompt, learned):
    """Prompt and answer together are the rendered chat, up to the token that ends the turn, which is learned."""
    whole = rendered(codec.tokenizer, [*chat, {"role": "assistant", "content": answer}])
    row = [*prompt, *learned]
    assert {row[-1]} == ids(codec.tokenizer, family.end)
    if row[-1] not in whole[len(row) - 1 :]:  # the template writes nothing after the last answer
        assert row[:-1] == whole
        return
    assert row == whole[: len(row)]
    after = codec.tokenizer.decode(whole[len(row) :], skip_special_tokens=True)
    assert not after.strip()


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_row_to_learn_is_what_the_template_renders(chat_family, answer):
    codec = codec_for(chat_family)
    for chat in chats_of(chat_family):
        prompt, learned = codec.encode_rows(chat, answer)
        assert_row(codec, chat_family, chat, answer, prompt, learned)
        opened = codec.encode_prompt(chat)
        assert prompt == opened[: len(prompt)]
        assert len(opened) - len(prompt) <= 2, "all of the prompt but what the template opens a thought with"


def test_pairs_of_a_data_set_are_what_the_template_renders(chat_family, tmp_path):
    """What SFT, DPO and a reward model learn from, and what a reward model scores."""
    codec = codec_for(chat_family)
    chats = chats_of(chat_family)
    rows = [
        {"prompt": chat, "good": ANSWERS[0], "bad": [{"role": "assistant", "content": ANSWERS[2]}]} for chat in chats
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = DatasetTask(data=f"{tmp_path}/rows.jsonl", answer="good", chosen="good", rejected="bad", heldout=0)
    task = Dataset(settings, codec)
    by_prompt = {tuple(prompt.tokens): prompt.content for prompt in task.train}
    for prompt, learned in task.demonstrations(len(rows), seed=0, step=1):
        (chat,) = [by_prompt[tokens] for tokens in by_prompt if tokens[: len(prompt)] == tuple(prompt)]
        assert_row(codec, chat_family, chat, ANSWERS[0], prompt, learned)
    for prompt, chosen, rejected in task.preferences(len(rows), seed=0, step=1):
        (chat,) = [by_prompt[tokens] for tokens in by_prompt if tokens[: len(prompt)] == tuple(prompt)]
        assert_row(codec, chat_family, chat, ANSWERS[0], prompt, chosen)
        assert_row(codec, chat_family, chat, ANSWERS[2], prompt, rejected)


def test_an_answer_continues_a_chat_that_ends_with_the_assistant(chat_family):
    codec = codec_for(chat_family)
    prompt, learned = codec.encode_rows([QUESTION, {"role": "assistant", "content": "It"}], " is 7.")
    assert_row(codec, chat_family, [QUESTION], "It is 7.", prompt, learned)


def test_an_empty_think_block_of_the_template_is_learned():
    codec = codec_for(FAMILIES["qwen3"])
    _, learned = codec.encode_rows([QUESTION], "It is 7.")
    assert codec.tokenizer.decode(learned) == "<think>\n\n</think>\n\nIt is 7.<|im_end|>"
    quiet = codec_for(FAMILIES["qwen3"], chat=Chat(variables={"enable_thinking": False}))
    prompt, learned = quiet.encode_rows([QUESTION], "It is 7.")
    assert quiet.tokenizer.decode(learned) == "It is 7.<|im_end|>"
    assert prompt == rendered(quiet.tokenizer, [QUESTION], add_generation_prompt=True, enable_thinking=False)


def test_whatever_an_answers_message_holds_reaches_the_template(tmp_path):
    message = {"role": "assistant", "content": "7", "reasoning_content": "3 + 4", "thinking": "3 + 4"}
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": [QUESTION], "answer": [message]}) + "\n")
    for name in ("qwen3", "gpt_oss"):
        codec = codec_for(FAMILIES[name])
        task = Dataset(DatasetTask(data=f"{tmp_path}/rows.jsonl", answer="answer", heldout=0), codec)
        ((prompt, learned),) = task.demonstrations(1, seed=0, step=1)
        whole = rendered(codec.tokenizer, [QUESTION, message])
        assert [*prompt, *learned] == whole[: len(prompt) + len(learned)]
        assert "3 + 4" in codec.tokenizer.decode(learned)


def test_the_text_of_a_completion_is_as_it_was_written(family):
    """Special tokens by name, and only what ends the turn cut off."""
    codec = codec_for(family)
    names = [*family.special, *family.plain]
    written = "".join(f"{name}3 + 4 = 7 , n't{name}" for name in names) or "3 + 4 = 7 ."
    tokens = codec.tokenizer(written, add_special_tokens=False)["input_ids"]
    for end in codec.end_tokens:
        assert codec.decode([*tokens, end]) == written
    assert codec.decode(tokens) == written


def test_a_text_begins_once_and_does_not_end():
    tokenizer = FAMILIES["none"].tokenizer()
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<s> $A <eos>", special_tokens=[("<s>", bos), ("<eos>", eos)]
    )
    assert tokenizer("x")["input_ids"] == [bos, *tokenizer("x", add_special_tokens=False)["input_ids"], eos]
    codec = Codec.of(tokenizer)
    plain = tokenizer("2 + 2 =", add_special_tokens=False)["input_ids"]
    assert codec.encode_prompt("2 + 2 =") == codec.encode_prompt("<s>2 + 2 =") == [bos, *plain]
    answer = tokenizer(" 4", add_special_tokens=False)["input_ids"]
    assert codec.encode_rows("2 + 2 =", " 4") == ([bos, *plain], [*answer, eos])
    assert codec.encode_rows("2 + 2 =", " 4<eos>") == ([bos, *plain], [*answer, eos])


def test_a_small_vocabulary_without_an_unknown_token_will_do():
    """It can take neither an a nor a line break, and says so where a text holds one."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(
        models.WordLevel({word: place for place, word in enumerate(("<s>", "</s>", "<|end|>", "2", "+", "4"))})
    )
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %} {{ m.content }} <|end|> {% endfor %}"
    codec = Codec.of(tokenizer)
    assert codec.end_tokens == (1, 2)
    assert codec.encode_prompt("2 + 2") == codec.encode_prompt("<s> 2 + 2") == [0, 3, 4, 3]
    assert codec.encode_rows([{"role": "user", "content": "2 + 2"}], "4") == ([3, 4, 3, 2], [5, 2])
    with pytest.raises(UserError, match="fails on this text"):
        codec.encode_prompt("3 + 3")


def test_a_text_and_its_answer_are_the_text_of_both():
    """A tokenizer that begins every text with a space, as SentencePiece does, must not put one between them."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(("<unk>", "</s>", "▁2", "+2", "=", "4", "▁4", "▁"))}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    split = pre_tokenizers.Split(Regex("▁?[0-9]|[+]2|="), "isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(split=False), split])
    core.decoder = decoders.Metaspace()
    codec = Codec.of(PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="</s>"))
    prompt, learned = codec.encode_rows("2+2=", "4")
    assert codec.decode([*prompt, *learned]) == "2+2=4"
    assert learned == [words["4"], words["</s>"]]


def folder_of(tmp_path, family, *, config=None, generation=None, name="model"):
    """A model folder whose tokenizer knows one end token, and whose files may name others."""
    tokenizer = family.tokenizer()
    shape = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
             "num_attention_heads": 1, "num_key_value_heads": 1, "bos_token_id": None, "pad_token_id": None}  # fmt: skip
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", eos_token_id=config, **shape))
    model.generation_config = GenerationConfig()
    model.save_pretrained(tmp_path / name)
    (tmp_path / name / "generation_config.json").unlink()
    if generation is not None:
        GenerationConfig(eos_token_id=generation).save_pretrained(tmp_path / name)
    tokenizer.save_pretrained(tmp_path / name)
    return str(tmp_path / name)


def test_end_tokens_are_those_of_both_configs_and_the_tokenizer(tmp_path):
    plain = Family(None, ("<a>", "<b>", "<c>"))
    a, b, c, eos = (plain.tokenizer().convert_tokens_to_ids(token) for token in ("<a>", "<b>", "<c>", "<eos>"))
    assert codec_of(folder_of(tmp_path, plain, config=a, name="1")).end_tokens == tuple(sorted((eos, a)))
    assert codec_of(folder_of(tmp_path, plain, generation=[b], name="2")).end_tokens == tuple(sorted((eos, b)))
    both = folder_of(tmp_path, plain, config=[a, b], generation=c, name="3")
    assert codec_of(both).end_tokens == tuple(sorted((eos, a, b, c)))
    elsewhere = folder_of(tmp_path, plain, name="tokenizer")
    (tmp_path / "tokenizer" / "config.json").unlink()
    assert codec_of(elsewhere, both).end_tokens == tuple(sorted((eos, a, b, c)))


def test_answers_that_the_template_cuts_are_counted(tmp_path):
    rows = [{"prompt": [QUESTION], "answer": answer} for answer in ANSWERS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, expected in (("deepseek_r1", [f"{tmp_path}/rows.jsonl:2"]), ("qwen3", []), ("gemma", [])):
        task = Dataset(
            DatasetTask(data=f"{tmp_path}/rows.jsonl", answer="answer", heldout=0), codec_for(FAMILIES[name])
        )
        task.check_answers(None)
        assert [note.kind for note in task.notes] == ["answers_shortened"] * len(expected)
        assert all(
            f"1 answers, the first at {place};" in note.text for note, place in zip(task.notes, expected, strict=True)
        )


@pytest.mark.parametrize("kind", ["special", "added", "word"])
def test_the_template_says_which_token_ends_a_turn(kind):
    tokenizer = make_word_tokenizer(map(chr, range(32, 127)), ("<|end|>",) if kind == "word" else ())
    if kind != "word":
        tokenizer.add_tokens(["<|end|>"], special_tokens=kind == "special")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>\n{% endfor %}"
    end, eos = tokenizer.convert_tokens_to_ids("<|end|>"), tokenizer.eos_token_id
    codec = Codec.of(tokenizer)
    assert set(codec.end_tokens) == {end, eos}
    assert codec.encode_rows([QUESTION], "It is 7.")[1][-1] == end
    tokenizer.eos_token = None
    assert codec_of(tokenizer).end_tokens == (end,)


def test_where_a_template_has_no_end_the_tokenizer_s_is_taken():
    tokenizer = make_byte_tokenizer()
    for tail in ("", "\n", "\n\n"):
        tokenizer.chat_template = (
            "{% for m in messages %}### " + "{{ m.role }}: {{ m.content }}" + tail + "{% endfor %}"
        )
        prompt, learned = Codec.of(tokenizer).encode_rows([QUESTION], "It is 7.")
        assert (
            tokenizer.decode([*prompt, *learned]) == f"### user: What is 3 + 4?{tail}### assistant: It is 7.{tail}<end>"
        )
    tokenizer.chat_template = "{% for m in messages %}### {{ m.role }}: {{ m.content }}\n{% endfor %}### assistant: "
    prompt, learned = Codec.of(tokenizer).encode_rows([QUESTION], "It is 7.")
    assert prompt == Codec.of(tokenizer).encode_prompt([QUESTION])
    assert tokenizer.decode(learned) == "It is 7.\n<end>"


def test_chat_settings_reach_the_template_on_a_fixed_day():
    codec = codec_for(FAMILIES["llama3"], chat=Chat(system="Be brief.", day="2024-07-26"))
    text = codec.tokenizer.decode(codec.encode_prompt([QUESTION]))
    assert "Today is 26 Jul 2024. Be brief." in text
    other = {"role": "system", "content": "Be long."}
    assert "Be brief." not in codec.tokenizer.decode(codec.encode_prompt([other, QUESTION]))
    effort = codec_for(FAMILIES["gpt_oss"], chat=Chat(variables={"reasoning_effort": "high"}, day="2024-07-26"))
    assert "Today: 2024-07-26. Effort: high" in effort.tokenizer.decode(effort.encode_prompt([QUESTION]))


def refused(family, **settings):
    with pytest.raises(UserError) as error:
        codec_for(family, **settings).encode_prompt([QUESTION])
    return str(error.value)


def test_settings_of_a_chat_without_effect_are_refused_by_name():
    assert "system_prompt" in refused(FAMILIES["gemma"], chat=Chat(system="Be brief."))
    assert "system_prompt" in refused(FAMILIES["none"], chat=Chat(system="Be brief."))
    deaf = Family("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}")
    assert "system_prompt: has no effect" in refused(deaf, chat=Chat(system="Be brief."))
    wrong = refused(FAMILIES["qwen3"], chat=Chat(variables={"enable_thinkin": False}))
    assert "chat_template_kwargs.enable_thinkin: has no effect" in wrong


def test_a_template_that_fails_is_named_in_a_paragraph():
    raising = Family("{{ raise_exception('roles must alternate') }}")
    assert "refuses these messages: roles must alternate" in refused(raising)
    parts = "{% for m in messages %}<{{ m.role }}>{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}"
    assert "leaves out what messages say" in refused(Family(parts))
    assert "renders nothing" in refused(Family("{% for m in messages %}{% endfor %}"))
    assert "refuses these messages" in refused(Family("{% for m in %}"))
    assert "no chat template" in refused(FAMILIES["none"])


def test_a_template_that_never_ends_is_refused(monkeypatch):
    monkeypatch.setattr("coterie.models.template._SECONDS", 0.2)
    started = time.process_time()
    endless = Family("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")
    assert "does not come to an end" in refused(endless)
    assert time.process_time() - started < 5


def test_a_tokenizer_whose_expression_explodes_is_named():
    tokenizer = make_byte_tokenizer()
    split = pre_tokenizers.Split(Regex(r"(z+)+y"), "isolated")
    tokenizer._tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(use_regex=False)])
    codec = Codec.of(tokenizer)
    with pytest.raises(UserError, match="fails on this text"):
        codec.encode_prompt("z" * 60)


def test_a_token_that_the_model_does_not_know_is_named():
    known = make_byte_tokenizer()("x")["input_ids"]
    assert Codec.of(make_byte_tokenizer(), vocabulary_size=257).encode_prompt("x") == known
    with pytest.raises(UserError, match=r"token 257, '<a>', is none of the model's 257 tokens"):
        Codec.of(Family(None, ("<a>",)).tokenizer(), 0, vocabulary_size=257).encode_prompt("x<a>")
    with pytest.raises(UserError, match="outside of the model's 10 tokens"):
        Codec.of(FAMILIES["none"].tokenizer(), vocabulary_size=10)


def test_a_saved_model_generates_as_far_as_a_completion_goes(tmp_path):
    """Also one that came with settings which transformers itself refuses to save."""
    family = FAMILIES["chatml"]
    folder = folder_of(tmp_path, family, config=3)
    codec = codec_of(folder)
    for settings in (GenerationConfig(), GenerationConfig(temperature=0.6, top_p=0.9)):
        model = AutoModelForCausalLM.from_pretrained(folder)
        model.generation_config = settings
        codec.save(tmp_path / "saved", model)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert sorted(loaded.generation_config.eos_token_id) == list(codec.end_tokens)
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
        assert rendered(tokenizer, [QUESTION]) == rendered(codec.tokenizer, [QUESTION])


@pytest.mark.parametrize("name", ["../../elsewhere", "/tmp/elsewhere", "a/b", "..", "", "x\0"])
def test_a_template_s_name_that_leads_elsewhere_is_refused(name):
    tokenizer = FAMILIES["chatml"].tokenizer()
    tokenizer.chat_template = {"default": tokenizer.chat_template, name: "{{ messages }}"}
    with pytest.raises(UserError, match="is no name of a template"):
        Codec.of(tokenizer)


@pytest.mark.timed
def test_a_template_that_makes_millions_of_characters_is_refused():
    tokenizer = FAMILIES["chatml"].tokenizer()
    tokenizer.chat_template += "{{ 'ab' * 3000000 }}"
    start = time.perf_counter()
    with pytest.raises(UserError, match=r"makes 6,000,0\d\d characters of a chat"):
        Codec.of(tokenizer).encode_prompt([QUESTION])
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("drawn", ["{{ ['a', 'b'] | random }}", "{{ ['a', 'b']|random }}", "{{ lipsum() }}"])
def test_a_template_that_draws_lots_is_refused(drawn):
    tokenizer = FAMILIES["chatml"].tokenizer()
    tokenizer.chat_template = drawn + tokenizer.chat_template
    with pytest.raises(UserError, match="something random"):
        Codec.of(tokenizer)
