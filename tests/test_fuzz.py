"""The first cases of the fuzzer; `make fuzz MINUTES=60` draws on."""

import fuzz
import pytest

pytestmark = pytest.mark.standard_promotion  # Optax compares an int32 count with Python floats.


# Those behind the first found faults that the first did not: a frozen leaf that was set to zero
# (17), a schedule's count that `reduce_on_plateau` hid (28), a frozen leaf that switched the probe
# off (118).
@pytest.mark.parametrize("seed", [*range(7), 17, 28, 118])
def test_random_compositions_are_right_or_refused_by_name(seed):
  case = fuzz.draw(seed)
  assert not fuzz.fault(case), case.parts


@pytest.mark.parametrize("seed", [*range(9), 369])
def test_states_of_other_compositions_are_refused(seed):
  assert not fuzz.foreign_state(seed), fuzz.draw(seed).parts


def test_the_fuzzer_sees_arithmetic_on_codes():
  """A weight that is off by a few steps of its grid is a fault."""
  case = fuzz.draw(0)
  wrong = case._replace(stock=lambda: fuzz.optax.chain(case.stock(), fuzz.optax.scale(3.0)))
  assert "of the limit" in fuzz.fault(wrong)
