"""Which steps wait for which."""

import itertools

import pytest

from eco_optax.fused import order


@pytest.mark.parametrize(
  ("paths", "expected"),
  [
    ((), []),
    (("",), [[[""]]]),
    (("head/kernel", "embedding"), [[["embedding"]], [["head/kernel"]]]),
    (("l2/a", "l10/a", "l1/a"), [[["l10/a"], ["l2/a"], ["l1/a"]]]),
    (("encoder_1/a", "decoder_1/a"), [[["decoder_1/a"]], [["encoder_1/a"]]]),
    (("b/0/c2", "b/0/c10", "b/1/c1"), [[["b/1/c1"], ["b/0/c10", "b/0/c2"]]]),
    (("0", "1"), [[["1"], ["0"]]]),
  ],
)
def test_later_layers_come_first(paths, expected):
  for given in itertools.islice(itertools.permutations(paths), 6):
    found = order.stacks(given)
    assert sorted([[sorted(layer) for layer in stack] for stack in found]) == expected
