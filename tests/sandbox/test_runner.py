"""What a program returns leaves the sandbox as plain data."""

import pytest

from coterie.sandbox.inside.runner import _MAX_DEPTH, plain


def nested(depth, wrap):
    value = 1
    for _ in range(depth):
        value = wrap(value)
    return value


WRAPS = {
    "lists": lambda x: [x],
    "tuples": lambda x: (x,),
    "sets": lambda x: frozenset([x]),
    "values": lambda x: {0: x},
    "keys": lambda x: (x,),
}


@pytest.mark.parametrize("kind", WRAPS)
def test_values_are_plain_up_to_a_depth(kind):
    """Whatever they are nested in: each container counts once, and so does the dictionary around a key."""

    def give(depth):
        return plain({nested(depth - 1, WRAPS[kind]): 0} if kind == "keys" else nested(depth, WRAPS[kind]), 0)

    assert give(_MAX_DEPTH)
    with pytest.raises(ValueError, match="nested too deeply"):
        give(_MAX_DEPTH + 1)
