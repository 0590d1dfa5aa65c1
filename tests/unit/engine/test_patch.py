"""What is replaced must be there, in the known form, and is listed."""

from __future__ import annotations

from importlib.metadata import version
from types import SimpleNamespace

import pytest

from megatron_btx.common.errors import MegatronVersionError
from megatron_btx.engine import patch


def owner() -> SimpleNamespace:
    return SimpleNamespace(__name__="megatron.some.module", add=lambda left, right: left + right, switch=False)


def test_wrap_and_replace() -> None:
    """Values that are false count as there; both are listed."""
    module = owner()
    patch.replace(module, "switch", True)
    patch.wrap(module, "add", lambda add: lambda left, right: add(left, right) * 10)
    assert module.switch and module.add(1, 2) == 30
    assert patch.list_replaced()[-2:] == ["megatron.some.module.switch", "megatron.some.module.add"]


def test_around_a_function_and_a_method() -> None:
    """The original comes first, then what the call gave; the name and the parameters stay the original's."""
    module = owner()
    patch.around(module, "add", lambda add, left, right: add(left, right) * 10, ["left"])
    patch.around(module, "add", lambda add, *given, **named: add(*given, **named) + 1, ["left", "right"])
    assert module.add(1, right=2) == 31

    class Router:
        topk = 2

        def route(self, tokens: int) -> int:
            return self.topk * tokens

    patch.around(Router, "route", lambda route, router, tokens: route(router, tokens) + router.topk)
    assert Router().route(3) == 8 and Router.route.__name__ == "route"


@pytest.mark.parametrize(
    "change",
    [
        lambda module: patch.expect(module, "add", "subtract"),
        lambda module: patch.replace(module, "subtract", None),
        lambda module: patch.wrap(module, "subtract", lambda original: original),
        lambda module: patch.expect_parameters(module, "subtract", []),
    ],
    ids=["expect", "replace", "wrap", "parameters"],
)
def test_what_is_missing(change) -> None:
    """Named with the versions, and nothing is put in its place."""
    module = owner()
    with pytest.raises(MegatronVersionError) as caught:
        change(module)
    text = str(caught.value)
    assert text.startswith(
        "megatron.some.module.subtract does not exist: this is written for megatron-core 0.19, found "
    )
    assert version("megatron-core") in text and version("torch") in text
    assert not hasattr(module, "subtract")


def test_wrap_looks_at_the_first_parameters() -> None:
    """Of Megatron's loop, say, whose parameters are passed on by name and place."""
    module = owner()
    with pytest.raises(MegatronVersionError, match=r"add takes \['left', 'right'\], expected \['right'\]"):
        patch.wrap(module, "add", lambda add: None, ["right"])
    patch.wrap(module, "add", lambda add: lambda left, right: -add(left, right), ["left"])
    assert module.add(1, 2) == -3


def test_an_object_is_named_by_its_class() -> None:
    class Router:
        topk = 2

    router = Router()
    patch.replace(router, "topk", 3)
    assert router.topk == 3 and Router.topk == 2 and patch.list_replaced()[-1].endswith("Router().topk")


def test_another_signature() -> None:
    """What was found, and what was expected."""
    patch.expect_parameters(owner(), "add", ["left"], only_first=1)
    with pytest.raises(MegatronVersionError, match=r"add takes \['left', 'right'\], expected \['left', 'other'\]"):
        patch.expect_parameters(owner(), "add", ["left", "other"])
