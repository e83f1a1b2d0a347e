"""Problems of reasoning-gym: drawn by weight, held out, and scored by their own verifiers, which are handed nothing that could do harm."""

import inspect
import re

import pytest
import torch

from coterie.errors import UserError
from coterie.models.load import codec_of, make_byte_tokenizer
from coterie.recipe import make_recipe
from coterie.recipe.settings import ReasoningTask
from coterie.rewards.reasoning import ReasoningGym as Reward
from coterie.tasks.reasoning import ReasoningGym
from coterie.types import Completion, Group, Scored

factory = pytest.importorskip("reasoning_gym.factory")
verifiers = pytest.importorskip("coterie.rewards.verifiers")

# Of these no answer is known, or it can be written in several lines only.
WITHOUT_ANSWER = {"boxnet", "composite", "graph_color", "propositional_logic", "rubiks_cube", "rush_hour"}
TAKES_ANYTHING = {"game_of_life_halting"}  # where False is right, its verifier takes whatever is not True for it


def made(**settings):
    return ReasoningGym(ReasoningTask(**settings), codec_of(make_byte_tokenizer()))


@pytest.fixture
def reward():
    one = Reward(workers=1)
    yield one
    one.close()


def test_generators_have_their_share_and_none_of_the_held_out_is_trained_on():
    task = made(reasoning_gym={"chain_sum": {"weight": 3}, "leg_counting": {}}, num_problems=80, num_heldout=20)
    of = [prompt.columns["generator"] for prompt in task.train]
    assert (of.count("chain_sum"), of.count("leg_counting")) == (60, 20)
    assert len(task.heldout) == 20
    assert not {prompt.text for prompt in task.train} & {prompt.text for prompt in task.heldout}
    assert [p.text for p in made(reasoning_gym=["chain_sum"], num_problems=5).train] == [
        p.text for p in made(reasoning_gym="chain_sum", num_problems=5).train
    ]


def test_a_generator_has_its_own_settings():
    task = made(
        reasoning_gym={"chain_sum": {"min_terms": 2, "max_terms": 2, "max_digits": 1}}, num_problems=30, num_heldout=5
    )
    assert all(len(re.findall(r"\d", prompt.text)) == 2 for prompt in task.train)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("chain_sums", "there is no generator 'chain_sums'; did you mean 'chain_sum'"),
        ({"chain_sum": {"min_term": 2}}, "chain_sum has no setting 'min_term'; did you mean 'min_terms'"),
        ({"chain_sum": {"seed": 2}}, "chain_sum has no setting 'seed'"),
        ({"chain_sum": {"min_terms": 9, "max_terms": 2}}, "chain_sum refuses these settings"),
        ({"simple_equations": {"operators": ["+"]}}, "simple_equations refuses these settings: The number of weights"),
    ],
)
def test_a_wrong_generator_or_setting_is_named(given, words):
    with pytest.raises(UserError, match=re.escape(words)):
        made(reasoning_gym=given)


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (
            {"reasoning_gym": {"chain_sum": {"weight": 0}}},
            "task.reasoning_gym: chain_sum.weight: 0 is no number above 0",
        ),
        (
            {"reasoning_gym": "chain_sum", "num_problem": 3},
            "task.num_problem: there is no such setting; did you mean 'num_problems'",
        ),
        ({"reasoning_gym": {}}, "task.reasoning_gym"),
    ],
)
def test_a_recipe_says_what_is_wrong_with_the_task(task, words):
    with pytest.raises(UserError, match=re.escape(words)):
        make_recipe({"model": {"type": "llama"}, "tokenizer": "bytes", "rewards": "reasoning_gym", "task": task})


def test_what_learns_from_given_answers_is_refused():
    values = {"model": {"type": "llama"}, "tokenizer": "bytes", "task": {"reasoning_gym": "chain_sum"}}
    with pytest.raises(UserError, match="method sft learns from answers that are given"):
        make_recipe({**values, "preset": "sft"})
    with pytest.raises(UserError, match="cold_start: learns from answers"):
        make_recipe({**values, "rewards": "reasoning_gym", "cold_start": {"steps": 2}})


@pytest.mark.parametrize("name", sorted(set(factory.DATASETS) - WITHOUT_ANSWER))
def test_the_right_answer_between_tags_is_right(name):
    entry = factory.create_dataset(name, size=1, seed=3)[0]
    text = f"Let me see. 12 and 7.\n<answer>{entry['answer']}</answer>"
    readings = Reward()._readings(text)
    assert verifiers.verify(entry, readings) == 1
    if name not in TAKES_ANYTHING:
        assert verifiers.verify(entry, Reward()._readings("qqq")) < 1


def test_an_answer_is_found_in_prose(reward):
    entry = factory.create_dataset("chain_sum", size=1, seed=3)[0]
    right, wrong = entry["answer"], str(int(entry["answer"]) + 1)
    texts = [
        f"First 1 and 2. The answer is {right}.",
        f"so it is\n{right}",
        rf"\boxed{{{right}}}",
        f"<answer>{wrong}</answer> no, {right}",
    ]
    found = reward(texts, entry=[entry] * len(texts))
    assert found[:3] == [1, 1, 1]
    assert found[3] < 0.5


def test_what_a_verifier_evaluates_holds_no_code(tmp_path):
    """Verifiers with eval or parse_expr are handed arithmetic alone; a file that such an answer would write is never there."""
    file = tmp_path / "written"
    hostile = f"__import__('pathlib').Path('{file}').write_text('x')"
    for name in factory.DATASETS:
        if name in WITHOUT_ANSWER:
            continue
        entry = factory.create_dataset(name, size=1, seed=3)[0]
        verifiers.verify(entry, [hostile, f"[{hostile}]", f"sqrt({hostile})", f"({hostile}) or 1"])
    assert not file.exists()
    for text in (
        "(1).__class__",
        "f(2)",
        "x[0]",
        "lambda: 1",
        "sin('2')",
        "a.b",
        "[x for x in (1,)]",
        "1 if 2 else 3",
        "5!",
    ):
        assert not verifiers.is_arithmetic(text), text
    for text in ("1+2*3", "[[1, 2], [3, 4]]", "sqrt(2)*x**2 + C", "-3/4"):
        assert verifiers.is_arithmetic(text), text


def test_every_verifier_that_evaluates_answers_is_known():
    """Of a new version's code that evaluates something, somebody has to look whether it is an answer."""
    known = {"binary_matrix", "countdown", "intermediate_integration", "n_queens", "polynomial_multiplication", "puzzle24",
             "simple_integration", "spiral_matrix", "string_insertion"}  # fmt: skip
    of_problems = {"basic_arithmetic", "bitwise_arithmetic", "codeio", "number_sorting", "propositional_logic"}
    evaluate = re.compile(r"\beval\(|\bexec\(|parse_expr\(|sympify\(")
    found = {
        name
        for name, (kind, _) in factory.DATASETS.items()
        if evaluate.search(inspect.getsource(inspect.getmodule(kind)))
    }
    assert {name for name, (kind, _) in factory.DATASETS.items() if verifiers.evaluates_answers(kind)} == known
    assert found == known | of_problems


def test_an_answer_that_takes_for_ever_scores_nothing(reward):
    entry = factory.create_dataset("countdown", size=1, seed=3)[0]
    quick = Reward(workers=1, seconds=3.0)
    assert quick(["<answer>9**9**9**9</answer>", f"<answer>{entry['answer']}</answer>"], entry=[entry] * 2) == [
        0.0,
        1.0,
    ]
    quick.close()


def test_accuracy_is_told_for_each_generator():
    task = made(reasoning_gym=["chain_sum", "leg_counting"], num_problems=10, num_heldout=6)
    first = next(p for p in task.heldout if p.columns["generator"] == "chain_sum")
    other = next(p for p in task.heldout if p.columns["generator"] == "leg_counting")
    groups = [Group(p, [Completion([1], torch.zeros(1), torch.zeros(1), "stop", "")]) for p in (first, other)]
    values = torch.tensor([[1.0], [0.5]])
    judged = task.judge(Scored(groups, values, {"reasoning_gym": values}, []))
    assert judged == {
        "accuracy": [True, False],
        "accuracy_chain_sum": [True, None],
        "accuracy_leg_counting": [None, False],
    }
