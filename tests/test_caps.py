from __future__ import annotations

import functools
import pickle
import re
from typing import Any

import pytest
from models import Delta

from gift_core import Cap, Caps, FineTuningStrategy
from gift_core.caps import describe
from gift_core.errors import GiftError, StrategyError
from gift_core.factories import is_instance, keep_trainable, reparameterize


def check(*site: object) -> bool:
    """Want everything."""
    return True


def action(*site: object, **params: object) -> None:
    """Do nothing."""


STRATEGY = FineTuningStrategy(module_caps=[(check, action)])


def test_a_cap_is_a_tuple_of_three() -> None:
    """A cap unpacks into check, action and params, and params default to none."""
    assert Cap(check, action, {"rank": 2}) == (check, action, {"rank": 2})
    assert Cap(check, action) == (check, action, {})


def test_plain_tuples_become_caps() -> None:
    """A tuple of two or three is accepted wherever a cap is, and equal to it."""
    caps = Caps([(check, action), (check, action, {"a": 1}), Cap(check, action)])

    assert all(isinstance(cap, Cap) for cap in caps)
    assert caps == (Cap(check, action), Cap(check, action, {"a": 1}), Cap(check, action))


def test_the_order_is_kept() -> None:
    """Caps stay in the order in which they were given, from any iterable."""
    given = [(check, action, {"at": position}) for position in range(5)]

    assert [cap.params["at"] for cap in Caps(iter(given))] == list(range(5))


def test_params_are_the_caps_own() -> None:
    """Changing the dictionary that was given does not change the cap, and no default is shared."""
    params = {"rank": 2}
    cap, other = Cap(check, action, params), Cap(check, action)

    params["rank"] = 3

    assert cap.params == {"rank": 2}
    assert other.params is not Cap(check, action).params


@pytest.mark.parametrize(
    ("item", "says"),
    [
        ((), "()"),
        ((check,), "check"),
        ((check, action, {}, 1), "(check, action, params)"),
        ([check, action], "tuple"),
        (check, "tuple"),
        (None, "None"),
        ("ab", "'ab'"),
        ({check: action}, "tuple"),
        (("conv", action), "check"),
        ((None, action), "None"),
        ((check, None), "action"),
        ((check, "train"), "'train'"),
        ((check, action, 3), "params"),
        ((check, action, [("rank", 1)]), "params"),
        ((check, action, {1: 2}), "{1: 2}"),
        ((check, STRATEGY, {"rank": 1}), "rank"),
    ],
)
def test_a_malformed_cap_is_refused_when_it_is_written(item: Any, says: str) -> None:
    """The error comes from the strategy's construction, gives the position and shows the value."""
    with pytest.raises(StrategyError, match=re.escape(says)) as caught:
        FineTuningStrategy(module_caps=[(check, action), item])

    assert "cap 1" in str(caught.value)
    assert isinstance(caught.value, GiftError)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(StrategyError):
        FineTuningStrategy(para_caps=[item])


@pytest.mark.parametrize("caps", [None, 3, Cap(check, action)])
def test_caps_come_as_a_list(caps: Any) -> None:
    """What cannot be a list of caps is refused, a single cap too."""
    with pytest.raises(StrategyError, match="list"):
        Caps(caps)


def test_a_single_plain_cap_is_no_list_of_caps() -> None:
    """The forgotten brackets are an error that shows the first item."""
    with pytest.raises(StrategyError, match="cap 0"):
        Caps((check, action))  # type: ignore[arg-type]


def test_a_strategy_may_be_an_action() -> None:
    """A nested strategy is taken as it is."""
    assert Caps([(check, STRATEGY)])[0].action is STRATEGY


def test_a_cap_reads_as_a_rule() -> None:
    """Its repr says where, what and with which parameters."""
    cap = Cap(is_instance("Linear"), reparameterize(Delta), {"start": 1.0})

    assert repr(cap) == "is_instance(Linear) -> reparameterize(Delta), start=1.0"


def test_a_callable_is_described_as_its_author_knows_it() -> None:
    """Functions by name, data by its repr, other objects by their class."""

    class Odd:
        def __call__(self) -> None: ...

    assert describe(check) == "check"
    assert describe(keep_trainable()) == "keep_trainable()"
    assert describe(Odd()).endswith("Odd")
    assert "check" in describe(functools.partial(check, 1))


def test_caps_can_be_pickled() -> None:
    """A copy through pickle is equal and of the same types."""
    caps = Caps([(check, action, {"rank": 2})])

    copy = pickle.loads(pickle.dumps(caps))

    assert copy == caps
    assert (type(copy), type(copy[0])) == (Caps, Cap)
