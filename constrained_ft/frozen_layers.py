"""The layers below the first trained one: what they make of a text is the same all through a run.

Sampling runs them for every token. Whoever reads those tokens again can begin above them.

Shape suffixes:  B rows, L slots of a row, S all slots, D hidden width.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from constrained_ft.packing import Packed, Tree

_Ids = tuple[int, ...]

_COMES_UP = 8  # iterations within which a prompt is looked at again, if states of all are kept
_MOST_KEPT = 2**28  # bytes of these states


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

    def alone(self, run: Callable[[], object]) -> Float[Tensor, "B L D"]:
        """What these give in a pass, which ends with them.

        Args:
            run: the pass.

        Raises:
            LookupError: when the pass did not come to the first of the other layers.
        """

        def end(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _SeenError(_states(args, kwargs))

        handle = self._others[0].register_forward_pre_hook(end, with_kwargs=True)
        try:
            run()
        except _SeenError as seen:
            return seen.states_BLD
        finally:
            handle.remove()
        raise LookupError("the pass left the first trained layer out")

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


class _SeenError(Exception):
    """Ends a pass."""

    def __init__(self, states_BLD: Tensor) -> None:
        super().__init__()
        self.states_BLD = states_BLD


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

    def clear(self) -> None:
        """Forget all."""
        self._stems.clear()
        self._branches.clear()

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
                path = next(paths)
                if packed.apart:  # behind a copy of the stem
                    states.append(self._stems[tree.stem])
                    slots.append(torch.arange(len(stem)) + path[0] + 1 - len(stem))
                states.append(self._branches[tree.stem, branch])
                slots.append(path[1:])
        states_ND = torch.cat(states)
        found_SD = states_ND.new_zeros(packed.ids_BL.numel(), states_ND.shape[1])
        found_SD[torch.cat(slots).to(states_ND.device)] = states_ND
        return found_SD


_STATES = "hidden_states"  # what layers call their input, where it is not simply the first


def kept_bytes(lengths: Sequence[int], looked_at: int, width: int) -> int:
    """Bytes of the states of all prompts; 0 where keeping them between iterations does not pay.

    Args:
        lengths: of the prompts, in tokens.
        looked_at: prompts that an iteration reads.
        width: D.
    """
    count = 4 * width * sum(lengths)
    return count if len(lengths) <= _COMES_UP * looked_at and count <= _MOST_KEPT else 0


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
