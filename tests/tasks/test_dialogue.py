"""The dialogue task: disjoint halves, answers with and without flaws, pairs, and rules that know one from the other."""

import json
import math
from collections import Counter

import pytest
import torch

import coterie
from coterie.models.codec import Codec
from coterie.recipe import load_recipe
from coterie.tasks.dialogue import FLAWS, HELDOUT_SHARE, QUALITIES, Dialogue, is_heldout, make_tokenizer
from coterie.tasks.phrases import (
    CLOSERS,
    CONTENTS,
    LANGUAGES,
    NUM_PHRASES,
    OPENERS,
    RUDE_CLOSERS,
    RUDE_OPENERS,
    SUBJECTS,
    all_sentences,
    details_of,
    is_in_language,
    is_on_topic,
    is_polite,
    is_well_formed,
    things_of,
)
from coterie.types import Completion, Group, Prompt, Scored

CODEC = Codec.of(make_tokenizer())
TASK = Dialogue(CODEC)
AGAIN = Dialogue(CODEC)  # as a resumed run makes it
PROMPT_OF = {tuple(prompt.tokens): prompt for prompt in (*TASK.train, *TASK.heldout)}
RULES = ("polite", "on_topic", "same_language")


def judged(prompt, text):
    """Every count of an evaluation for one answer."""
    zero = torch.zeros(1)
    group = Group(prompt, [Completion([1], zero, zero, "stop", text)])
    return {name: value for name, (value,) in TASK.judge(Scored([group], torch.zeros(1, 1), {}, [])).items()}


def asked(text):
    return Prompt(0, text, [1], TASK.columns_of(text))


def content_of(prompt):
    return tuple(prompt.columns[name] for name in ("subject", "thing", "detail"))


# Questions


def test_both_languages_have_thousands_of_different_questions():
    texts = [prompt.text for prompt in (*TASK.train, *TASK.heldout)]
    assert len(texts) == len(set(texts)) == 2 * NUM_PHRASES * len(CONTENTS) == 2304
    assert Counter(prompt.columns["language"] for prompt in TASK.train)["zh"] == len(TASK.train) / 2


def test_train_and_heldout_share_no_content_in_any_language():
    train, heldout = ({content_of(prompt) for prompt in prompts} for prompts in (TASK.train, TASK.heldout))
    assert not train & heldout
    assert len(train) + len(heldout) == len(CONTENTS)
    assert len(TASK.heldout) == len(heldout) * len(LANGUAGES) * NUM_PHRASES


def test_about_the_named_share_is_held_out():
    n, p = len(CONTENTS), HELDOUT_SHARE
    assert abs(sum(map(is_heldout, CONTENTS)) - n * p) < 3 * math.sqrt(n * p * (1 - p)) + 2


def test_the_examples_are_held_out_and_in_both_languages():
    assert [prompt.text for prompt in TASK.examples] == [
        "What is the weather like in Paris tomorrow?",
        "巴黎明天天气怎么样？",
        "How do I make dumplings for supper?",
        "晚餐用的饺子怎么做？",
    ]
    assert not {content_of(prompt) for prompt in TASK.examples} & {content_of(prompt) for prompt in TASK.train}


def test_held_out_things_and_details_are_trained_on_apart():
    trained = {(subject, name) for prompt in TASK.train for subject, *names in [content_of(prompt)] for name in names}
    for prompt in TASK.heldout:
        subject, thing, detail = content_of(prompt)
        assert {(subject, thing), (subject, detail)} <= trained


# Phrases


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_phrase_names_its_thing_and_is_neither_polite_nor_rude(language):
    for content in CONTENTS:
        for which in range(NUM_PHRASES):
            for text in (content.question(language, which), content.sentence(language, which)):
                assert is_on_topic(text, content.thing, content.detail), text
                assert is_in_language(text, language), text
            sentence = content.sentence(language, which)
            assert not is_polite(sentence), sentence
            assert is_polite(OPENERS[language][0] + sentence), sentence  # so it has no rude word either
            assert is_well_formed(sentence)


@pytest.mark.parametrize("language", LANGUAGES)
def test_courtesy_and_rudeness_are_known_and_name_nothing(language):
    polite, rude = (
        [phrase for phrase in (*before[language], *after[language]) if phrase]
        for before, after in ((OPENERS, CLOSERS), (RUDE_OPENERS, RUDE_CLOSERS))
    )
    assert all(map(is_polite, polite))
    for phrase in rude:
        assert not is_polite(f"{polite[0]} {phrase}"), phrase
    for phrase in (*polite, *rude):
        assert not things_of(phrase)
        assert not details_of(phrase)


def test_each_subject_has_all_its_phrases_in_both_languages():
    for subject in SUBJECTS.values():
        for phrases in (subject.questions, subject.answers):
            assert {language: len(set(phrases[language])) for language in LANGUAGES} == dict.fromkeys(
                LANGUAGES, NUM_PHRASES
            )


# Demonstrations and pairs


def flaw_of(prompt, text):
    verdicts = judged(prompt, text)
    broken = [name for name in RULES if not verdicts[name]]
    return broken[0] if len(broken) == 1 else "good" if not broken else tuple(broken)


def test_demonstrations_mix_good_answers_and_flaws_as_named():
    pairs = TASK.demonstrations(2000, seed=0, step=1)
    counts = Counter(flaw_of(PROMPT_OF[tuple(prompt)], CODEC.decode(answer)) for prompt, answer in pairs)
    shares = {
        "good": QUALITIES["good"],
        "polite": QUALITIES["rude"] + QUALITIES["curt"],
        "on_topic": QUALITIES["off_topic"],
        "same_language": QUALITIES["other_language"],
    }
    assert sum(shares.values()) == pytest.approx(1)
    assert set(counts) == set(shares)
    for name, share in shares.items():
        assert abs(counts[name] / 2000 - share) < 4 * math.sqrt(share * (1 - share) / 2000), name


def test_demonstrations_and_pairs_never_show_a_held_out_content():
    heldout = {content_of(prompt)[1:] for prompt in TASK.heldout}
    shown = [answer for _, answer in TASK.demonstrations(500, seed=3, step=2)]
    shown += [answer for _, *answers in TASK.preferences(500, seed=3, step=2) for answer in answers]
    for answer in shown:
        text = CODEC.decode(answer)
        (thing,), (detail,) = things_of(text), details_of(text)
        assert (thing, detail) not in heldout, text


@pytest.mark.parametrize("heldout", [False, True])
def test_a_pair_is_a_good_answer_and_one_that_breaks_one_rule(heldout):
    pairs = TASK.heldout_preferences(600, seed=1) if heldout else TASK.preferences(600, seed=1, step=1)
    side = {tuple(prompt.tokens) for prompt in (TASK.heldout if heldout else TASK.train)}
    broken = Counter()
    for prompt, chosen, rejected in pairs:
        assert tuple(prompt) in side
        asked_for = PROMPT_OF[tuple(prompt)]
        assert flaw_of(asked_for, CODEC.decode(chosen)) == "good"
        broken[flaw_of(asked_for, CODEC.decode(rejected))] += 1
        assert is_well_formed(CODEC.decode(chosen))
        assert is_well_formed(CODEC.decode(rejected))
    assert set(broken) == set(RULES)
    shares = {
        "polite": FLAWS["rude"] + FLAWS["curt"],
        "on_topic": FLAWS["off_topic"],
        "same_language": FLAWS["other_language"],
    }
    assert sum(shares.values()) == pytest.approx(1)
    for name, share in shares.items():
        assert abs(broken[name] / 600 - share) < 4 * math.sqrt(share * (1 - share) / 600), name


def test_off_topic_answers_differ_in_thing_detail_or_subject():
    """Half-right answers are among the rejected, or a reward model would not look at the whole of them."""
    kinds = Counter()
    for prompt, chosen, rejected in TASK.preferences(800, seed=0, step=5):
        columns, text = PROMPT_OF[tuple(prompt)].columns, CODEC.decode(rejected)
        (thing,), (detail,) = things_of(text), details_of(text)
        if (thing, detail) == (columns["thing"], columns["detail"]):
            continue
        near = thing in SUBJECTS[columns["subject"]].things
        kinds["detail" if thing == columns["thing"] else "thing" if near else "subject"] += 1
        if near:  # the names are all that differs, or the rest would be a hint
            assert blanked(text) == blanked(CODEC.decode(chosen))
    assert set(kinds) == {"detail", "thing", "subject"}
    assert min(kinds.values()) > 0.2 * kinds.total()


def blanked(text):
    """A text without the names of things and details."""
    for subject in SUBJECTS.values():
        for names in (*subject.things.items(), *subject.details.items()):
            for spelled in names:
                text = text.replace(spelled, "_")
    return text


def test_demonstrations_and_pairs_depend_on_seed_and_step_only():
    for drawn in (lambda task, seed, step: task.demonstrations(20, seed=seed, step=step),
                  lambda task, seed, step: task.preferences(20, seed=seed, step=step)):  # fmt: skip
        assert drawn(TASK, 1, 2) == drawn(AGAIN, 1, 2)
        assert len({str(drawn(TASK, seed, step)) for seed in (1, 2) for step in (1, 2)}) == 4
    assert TASK.heldout_preferences(20, seed=1) == AGAIN.heldout_preferences(20, seed=1)


# The rules


@pytest.mark.parametrize(
    ("question", "answer", "broken"),
    [
        ("Will it rain in Paris tomorrow?", "Of course! It will be sunny in Paris tomorrow. Have a nice day!", []),
        ("Will it rain in Paris tomorrow?", "It will be sunny in Paris tomorrow.", ["polite"]),
        ("Will it rain in Paris tomorrow?", "Go away! It will be sunny in Paris tomorrow.", ["polite"]),
        ("Will it rain in Paris tomorrow?", "Gladly! It will be sunny in Paris tomorrow. Find out yourself.", ["polite"]),
        ("Will it rain in Paris tomorrow?", "Of course! It will be sunny in Rome tomorrow.", ["on_topic"]),
        ("Will it rain in Paris tomorrow?", "Of course! It will be sunny in Paris today.", ["on_topic"]),
        ("Will it rain in Paris tomorrow?", "Of course! In Paris tomorrow, not in Rome.", ["on_topic"]),
        ("Will it rain in Paris tomorrow?", "Of course! Have a nice day!", ["on_topic"]),
        ("Will it rain in Paris tomorrow?", "当然可以！巴黎明天是晴天。", ["same_language"]),
        ("Will it rain in Paris tomorrow?", "Of course! 巴黎明天是晴天。", ["same_language"]),
        ("Will it rain in Paris tomorrow?", "", ["polite", "on_topic", "same_language"]),
        ("What about Paris?", "Gladly! It will be sunny in Paris on Sunday.", []),
        ("What about PARIS?", "Gladly! Rome.", ["on_topic"]),
        ("巴黎明天会下雨吗？", "非常乐意！巴黎明天有小雨。祝您愉快！", []),
        ("巴黎明天会下雨吗？", "巴黎明天有小雨。", ["polite"]),
        ("巴黎明天会下雨吗？", "真无聊！巴黎明天有小雨。祝您愉快！", ["polite"]),
        ("巴黎明天会下雨吗？", "非常乐意！罗马明天有小雨。", ["on_topic"]),
        ("巴黎明天会下雨吗？", "非常乐意！巴黎今天有小雨。", ["on_topic"]),
        ("巴黎明天会下雨吗？", "With pleasure! There will be light rain in Paris tomorrow.", ["same_language"]),
        ("巴黎明天会下雨吗？", "别再烦我。", ["polite", "on_topic"]),
    ],
)  # fmt: skip
def test_answers_are_judged_by_the_three_rules(question, answer, broken):
    verdicts = judged(asked(question), answer)
    assert [name for name in RULES if not verdicts[name]] == broken
    assert verdicts["accuracy"] == (not broken)


@pytest.mark.parametrize(
    ("answer", "well_formed"),
    [
        ("Of course! It will be sunny in Paris tomorrow.", True),
        ("It will be sunny in Paris tomorrow", False),
        ("Of course! Of course! It will be sunny in Paris tomorrow.", False),
        ("Of course! Paris tomorrow Paris tomorrow.", False),
        ("Of course! Use fresh ginger in Paris tomorrow.", False),
        ("当然可以！巴黎明天是晴天。", True),
        ("当然可以！巴黎巴黎明天是晴天。", False),
        ("", False),
    ],
)
def test_what_is_no_sentence_of_the_grammar_is_not_well_formed(answer, well_formed):
    assert judged(asked("Will it rain in Paris tomorrow?"), answer)["well_formed"] == well_formed


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("How is Cairo tonight?", {"subject": "weather", "thing": "Cairo", "detail": "tonight", "language": "en"}),
        ("Tell me about chess", {"subject": "sport", "thing": "chess", "detail": "", "language": "en"}),
        ("我想吃饺子", {"subject": "food", "thing": "dumplings", "detail": "", "language": "zh"}),
        ("the price of a map", {"subject": "thanks", "thing": "map", "detail": "", "language": "en"}),
        ("Cairo or Rome?", None),
        ("Hello", None),
        ("", None),
    ],
)
def test_a_typed_question_is_known_by_the_thing_that_it_names(text, columns):
    assert TASK.columns_of(text) == columns


def test_every_question_of_the_task_is_known_when_typed():
    assert all(TASK.columns_of(prompt.text) == prompt.columns for prompt in TASK.heldout)


def test_judging_goes_over_groups_and_completions_in_order():
    zero = torch.zeros(1)
    texts = ["Gladly! It will be sunny in Paris tomorrow.", "当然可以！巴黎明天是晴天。"]
    groups = [Group(p, [Completion([1], zero, zero, "stop", text) for text in texts]) for p in TASK.examples[:2]]
    assert TASK.judge(Scored(groups, torch.zeros(2, 2), {}, [])) == {
        "accuracy": [True, False, False, True],
        "polite": [True] * 4,
        "on_topic": [True] * 4,
        "same_language": [True, False, False, True],
        "well_formed": [True] * 4,
    }


# The tokenizer


def test_every_sentence_survives_the_tokenizer_in_few_tokens():
    unknown = CODEC.tokenizer.unk_token_id
    for prompt in (*TASK.train, *TASK.heldout):
        assert CODEC.decode(prompt.tokens) == prompt.text + "\n"
        assert unknown not in prompt.tokens
        assert len(prompt.tokens) <= 20
    for sentence in sorted(all_sentences()):
        tokens = CODEC.encode_answer(sentence)
        assert CODEC.decode(tokens) == sentence
        assert unknown not in tokens
        assert tokens[-1] == CODEC.tokenizer.eos_token_id


def test_the_longest_answer_fits_the_recipe():
    answers = [answer for _, answer in TASK.demonstrations(3000, seed=5, step=1)]
    assert max(map(len, answers)) <= load_recipe("dialogue").sampling.max_new_tokens


# Learning


@pytest.mark.slow
def test_a_reward_model_of_the_pairs_teaches_a_policy_courtesy(tmp_path):
    """Both recipes, shortened: what the policy gains is counted by the rules, which the reward model never sees."""
    trained = coterie.train(
        "dialogue_reward_model",
        overrides=["steps=100", "prompts_per_step=16", "evaluation={prompts: 200}"],
        out=str(tmp_path / "reward_model"),
    )
    pairs = json.loads((trained.folder / "summary.json").read_text(encoding="utf-8"))["after"]
    assert pairs["pairs_accuracy_interval"][0] > 0.55
    run = coterie.train(
        "dialogue",
        overrides=[
            f"rewards=[{{function: reward_model, options: {{model: {trained.folder}}}}}]",
            "cold_start={steps: 90, rows_per_step: 32, learning_rate: 3.0e-3}",
            "steps=20",
            "optimiser={learning_rate: 4.0e-4, warmup_steps: 2}",
            "evaluation={prompts: 60, samples: 2, every: 0}",
        ],
        out=str(tmp_path / "run"),
    )
    summary = json.loads((run.folder / "summary.json").read_text(encoding="utf-8"))
    before, after = summary["before"], summary["after"]
    for name in ("reward", "polite"):
        assert after[f"{name}_interval"][0] > before[f"{name}_interval"][1], name
