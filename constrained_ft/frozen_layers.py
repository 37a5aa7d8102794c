"""The layers below the first trained one: what they make of a text is the same all through a run.

Sampling runs them for every token. Whoever reads those tokens again can begin above them.

Shape suffixes:  B rows, L slots of a row, S all slots, D hidden width.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from constrained_ft.packing import Packed, Tree

_Ids = tuple[int, ...]


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
    def watched(self) -> Iterator[list[Float[Tensor, "B L D"]]]:
        """Run all layers; what these give is put into the list, pass by pass."""
        found: list[Tensor] = []
        handle = self._others[0].register_forward_pre_hook(
            lambda _, args, kwargs: found.append(_states(args, kwargs)), with_kwargs=True
        )
        try:
            yield found
        finally:
            handle.remove()

    @contextmanager
    def alone(self) -> Iterator[list[Float[Tensor, "B L D"]]]:
        """The same without the other layers."""
        with self.watched() as found, _passed_over(self._others):
            yield found

    @contextmanager
    def replaced_by(self, states_BLD: Float[Tensor, "B L D"]) -> Iterator[None]:
        """Run the other layers on what these would give."""

        def put(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            states = states_BLD.to(_states(args, kwargs).dtype)
            if args:
                return (states, *args[1:]), kwargs
            return args, kwargs | {_STATES: states}

        handle = self._others[0].register_forward_pre_hook(put, with_kwargs=True)
        try:
            with _passed_over(self._below):
                yield
        finally:
            handle.remove()


class StatesBelow:
    """What frozen layers made of prompts and completions: the input of the first trained layer."""

    def __init__(self) -> None:
        self._stems: dict[_Ids, Tensor] = {}
        self._branches: dict[tuple[_Ids, _Ids], Tensor] = {}

    def __len__(self) -> int:
        """Prompts."""
        return len(self._stems)

    def keep(self, stem: _Ids, states_LD: Float[Tensor, "L D"]) -> None:
        """Keep a prompt's."""
        self._stems[stem] = states_LD

    def keep_branch(self, stem: _Ids, branch: _Ids, states_LD: Float[Tensor, "L D"]) -> None:
        """Keep those of a completion of a prompt, for the completion's own tokens."""
        self._branches[stem, branch] = states_LD

    def laid_out(self, trees: Sequence[Tree], packed: Packed) -> Float[Tensor, "S D"]:
        """The states at the slots that trees have in a batch, which begins with them; 0 elsewhere.

        Raises:
            KeyError: where those of a prompt or a completion were not kept.
        """
        paths = iter(packed.paths)
        states: list[Tensor] = []
        slots: list[Tensor] = []
        for tree, stem in zip(trees, packed.stems, strict=False):
            states.append(self._stems[tree.stem])
            slots.append(stem)
            for branch in tree.branches:
                states.append(self._branches[tree.stem, branch])
                slots.append(next(paths)[1:])
        states_ND = torch.cat(states)
        found_SD = states_ND.new_zeros(packed.ids_BL.numel(), states_ND.shape[1])
        found_SD[torch.cat(slots).to(states_ND.device)] = states_ND
        return found_SD


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
        layer.forward = _same  # hides the class's own until it is deleted
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _same(hidden_states: Tensor, *_: object, **__: object) -> Tensor:
    return hidden_states
