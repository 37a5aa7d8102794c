"""The layers below the first trained one: what they make of a text is the same all through a run.

Shape suffixes:  B rows, L slots of a row, S all slots, D hidden width.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from jaxtyping import Float
from torch import Tensor, nn


class FrozenLayers:
    """A model's layers, those below the first trained one and the others.

    Either part can be passed over for the length of a call. The model is not changed otherwise, so
    this is for every architecture that hands one hidden state from layer to layer; whether a model
    is like that, its owner has to try out.
    """

    def __init__(self, below: Sequence[nn.Module], others: Sequence[nn.Module]) -> None:
        self._below = below
        self._others = others

    @contextmanager
    def alone(self) -> Iterator[list[Float[Tensor, "B L D"]]]:
        """Run these layers and no others; what they give is put into the list."""
        found: list[Tensor] = []
        handle = self._others[0].register_forward_pre_hook(
            lambda _, args, kwargs: found.append(_states(args, kwargs)), with_kwargs=True
        )
        try:
            with _passed_over(self._others):
                yield found
        finally:
            handle.remove()

    @contextmanager
    def replaced_by(self, states_BLD: Float[Tensor, "B L D"]) -> Iterator[None]:
        """Run the other layers on what these would give."""

        def put(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if args:
                return (states_BLD, *args[1:]), kwargs
            return args, kwargs | {_STATES: states_BLD}

        handle = self._others[0].register_forward_pre_hook(put, with_kwargs=True)
        try:
            with _passed_over(self._below):
                yield
        finally:
            handle.remove()


_STATES = "hidden_states"  # what layers call their input, where it is not simply the first


def frozen_layers(trunk: nn.Module) -> FrozenLayers | None:
    """The layers below the first trained one; None where that is the first, or no layer is."""
    trained = [name for name, weight in trunk.named_parameters() if weight.requires_grad]
    for name, part in trunk.named_modules():
        if not isinstance(part, nn.ModuleList) or not trained:
            continue
        inside = [one.removeprefix(f"{name}.") for one in trained if one.startswith(f"{name}.")]
        if len(inside) < len(trained):
            continue
        first = min(int(one.partition(".")[0]) for one in inside)
        layers = list(part)
        return FrozenLayers(layers[:first], layers[first:]) if first > 0 else None
    return None


def _states(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    return cast("Tensor", args[0] if args else kwargs[_STATES])


@contextmanager
def _passed_over(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Let layers give what they are given."""
    for layer in layers:
        layer.forward = _same  # type: ignore[method-assign]  # hides the class's own until deleted
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _same(hidden_states: Tensor, *_: object, **__: object) -> Tensor:
    return hidden_states
