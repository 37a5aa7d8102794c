"""Guided decoding in transformers' own `generate`.

    model = AutoModelForCausalLM.from_pretrained("RUN/final/llm")
    tokenizer = AutoTokenizer.from_pretrained("RUN/final/llm")
    guide = AuxiliaryLogitsProcessor(model, tokenizer, "RUN")
    model.generate(**tokenizer("The weather", return_tensors="pt"), logits_processor=[guide])

Shape suffixes:  B rows, L token positions, T completion positions, D hidden width, V vocabulary.
"""

import weakref
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from constrained_ft.auxiliary import FrozenAuxiliary
from constrained_ft.errors import ConfigError, ModelError
from constrained_ft.run_folder import RunFolder


class AuxiliaryLogitsProcessor(LogitsProcessor):
    """Adds log R of every next token to the logits: samples come from q ∝ p R.

    The auxiliary reads the hidden states that the model computes anyway, taken where they enter the
    output head. Sampling, greedy search and beams work, with prompts padded on the left; tokens
    that the tokenizer does not know, of a head that is padded, are never said. The same as
    `cft generate --guided`, up to the precision that the model was loaded in.
    """

    def __init__(
        self,
        model: PreTrainedModel | nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        folder: str | Path,
    ) -> None:
        """Load the auxiliary onto the model's device.

        Args:
            model: the one that the auxiliary belongs to, merged or with its PEFT adapter.
            tokenizer: the model's.
            folder: a run folder, what `cft export` wrote, or the folder of an auxiliary.

        Raises:
            CheckpointError: when there is no readable auxiliary.
            ModelError: when the auxiliary belongs to another model.
        """
        head = model.get_output_embeddings()  # type: ignore[operator]  # PEFT forwards it
        weight = head.weight
        auxiliary = FrozenAuxiliary.load(_auxiliary_in(Path(folder)), weight.device)
        tokens = auxiliary.vocabulary
        if (tokens, auxiliary.hidden_size) != tuple(weight.shape):
            raise ModelError(
                f"the auxiliary in {folder} is for a model of {tokens:,} tokens and hidden size "
                f"{auxiliary.hidden_size}, but this one has {weight.shape[0]:,} and "
                f"{weight.shape[1]}: load the model of the same run"
            )
        self._usable = len(tokenizer)
        self._guide = auxiliary.guide()
        self._hidden_BTD = weight.new_zeros(0, 0, weight.shape[1])
        self._ids_BL = torch.zeros(0, 0, dtype=torch.long)
        seen: list[Tensor] = []
        handle = head.register_forward_pre_hook(lambda _, inputs: _remember(seen, inputs))
        # The model outlives this object; the hook must not.
        weakref.finalize(self, handle.remove)
        self._seen = seen

    @torch.no_grad()
    def __call__(
        self, input_ids: Int[Tensor, "B L"], scores: Float[Tensor, "B V"]
    ) -> Float[Tensor, "B V"]:
        """Guided scores.

        Args:
            input_ids: prompts, padded on the left, and the completions so far.
            scores: log-probabilities up to a constant, of all tokens.

        Raises:
            ConfigError: when `generate` calls in an order that cannot be followed.
        """
        if not self._seen or len(self._seen[0]) != len(input_ids):
            raise ConfigError(
                "AuxiliaryLogitsProcessor has not seen the hidden states of these rows: call "
                "`generate` of the model that it was made with, without assisted decoding"
            )
        last_BD = self._seen.pop()
        rows_B = self._rows_before(input_ids)
        past_BTD = last_BD.new_zeros(len(last_BD), 0, last_BD.shape[1])
        if rows_B is not None:
            past_BTD = self._hidden_BTD[rows_B]
        self._hidden_BTD = torch.cat([past_BTD, last_BD[:, None]], 1)
        self._ids_BL = input_ids.clone()
        said = self._hidden_BTD.shape[1] - 1
        said_BT = input_ids[:, input_ids.shape[1] - said :]
        guided_BV = scores + self._guide(self._hidden_BTD, said_BT)
        guided_BV[:, self._usable :] = -torch.inf
        return guided_BV

    def _rows_before(self, ids_BL: Int[Tensor, "B L"]) -> Int[Tensor, " B"] | None:
        """Which row of the call before each row goes on with; None where a generation begins.

        Beams change places; a row that stayed where it was is preferred to one with equal tokens.
        """
        before_BL = self._ids_BL
        if (len(before_BL), before_BL.shape[1] + 1) != tuple(ids_BL.shape):
            return None
        equal_BB = (ids_BL[:, None, :-1] == before_BL[None]).all(-1)
        if not bool(equal_BB.any(1).all()):
            return None
        stayed_B = equal_BB.diagonal()
        first_B = equal_BB.int().argmax(1)
        return torch.where(stayed_B, torch.arange(len(ids_BL), device=ids_BL.device), first_B)


def _remember(seen: list[Tensor], inputs: tuple[Any, ...]) -> None:
    """Keep what predicts the next token: the last position of what enters the head."""
    seen[:] = [inputs[0][:, -1].detach()]


def _auxiliary_in(folder: Path) -> Path:
    """The auxiliary's own folder, whichever of the three was named."""
    for inner in (RunFolder(folder).final_auxiliary, folder / "auxiliary"):
        if inner.is_dir():
            return inner
    return folder
