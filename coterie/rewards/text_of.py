"""The text of what rewards are given. Nothing here imports torch, so workers may use it."""

from collections.abc import Mapping, Sequence

Chat = Sequence[Mapping[str, str]]


def completion_text(completion: str | Chat) -> str:
    """The text of a completion, which is a list of one message where the prompt was a chat."""
    return completion if isinstance(completion, str) else "".join(message["content"] for message in completion)


def prompt_text(prompt: str | Chat) -> str:
    """The text of a prompt: of a chat, what the user said last."""
    if isinstance(prompt, str):
        return prompt
    asked = [message["content"] for message in prompt if message["role"] == "user"]
    return asked[-1] if asked else prompt[-1]["content"]
