"""A language model that is a table, so that everything about it can be enumerated.

It has a row of logits for every prefix of a completion, behind the interface of transformers: the
sampler, the auxiliary and the update treat it like any other model. `selfcheck` trains it.

Shape suffixes:  B sequences, L token positions, H prefixes, V vocabulary, D hidden width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast

from constrained_ft.config import Config, LLMConfig
from constrained_ft.corpus import corpus_of
from constrained_ft.distributed import StopRequest, World, default_device
from constrained_ft.encoding import Row
from constrained_ft.llm import LLM
from constrained_ft.optimization import build_optimization
from constrained_ft.packing import pad_right
from constrained_ft.parts import Parts, build_auxiliary
from constrained_ft.phases import Phases
from constrained_ft.progress import Silent
from constrained_ft.prompts import Prompt, Prompts
from constrained_ft.randomness import generator_for
from constrained_ft.rollouts import Rollouts
from constrained_ft.scorers import build_scorer
from constrained_ft.tryout import tried_out

_MARK = 4.0  # how much a prefix's mark stands out beside its logits


class TableConfig(PreTrainedConfig):
    """The shape of a table."""

    model_type = "constrained_ft_table"

    def __init__(self, vocab_size: int = 4, length: int = 4, **kwargs: Any) -> None:
        """A table of `length` levels.

        Args:
            vocab_size: number of tokens.
            length: longest completion, in tokens.
            kwargs: as in transformers.
        """
        super().__init__(**kwargs)
        self.vocab_size = vocab_size
        self.length = length
        self.num_prefixes = sum(vocab_size**t for t in range(length + 1))


@dataclass
class _Cache:
    """The row of each sequence so far."""

    row_B: Int[Tensor, " B"]

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.row_B = self.row_B.repeat_interleave(repeats)


@dataclass
class _Output:
    """What a trunk returns."""

    last_hidden_state: Tensor
    past_key_values: _Cache | None


class _Table(nn.Module):
    """Everything below the output head.

    The hidden state is the prefix's row of logits, which is trained, and a mark that no other
    prefix has, by which the auxiliary can tell prefixes apart.
    """

    def __init__(self, config: TableConfig) -> None:
        super().__init__()
        size, prefixes = config.vocab_size, config.num_prefixes
        self.logits = nn.Embedding(prefixes, size)
        self.tokens = nn.Embedding.from_pretrained(torch.eye(size, size + prefixes))
        self.register_buffer("marks_HH", _MARK * torch.eye(prefixes), persistent=False)
        self.marks_HH: Tensor

    def forward(
        self,
        input_ids: Int[Tensor, "B L"],
        past_key_values: _Cache | None = None,
        use_cache: bool | None = None,  # noqa: FBT001  # the interface of transformers
        **_: Any,
    ) -> _Output:
        """Hidden states; the first token of a sequence is its prompt, whichever it is."""
        rows = []
        if past_key_values is None:
            past_key_values = _Cache(torch.zeros_like(input_ids[:, 0]))
            rows, input_ids = [past_key_values.row_B], input_ids[:, 1:]
        for token_B in input_ids.unbind(1):
            # Rows lie like the nodes of a heap: the children of row h follow one another.
            children_B = past_key_values.row_B * self.logits.embedding_dim + 1
            past_key_values.row_B = children_B + token_B
            rows.append(past_key_values.row_B)
        row_BL = torch.stack(rows, dim=1)
        return _Output(
            last_hidden_state=torch.cat([self.logits(row_BL), self.marks_HH[row_BL]], -1),
            past_key_values=past_key_values if use_cache else None,
        )


class TableForCausalLM(PreTrainedModel):
    """A table as a causal language model: the head picks the logits out of the hidden state."""

    config_class = TableConfig
    base_model_prefix = "table"

    def __init__(self, config: TableConfig) -> None:
        super().__init__(config)
        size = config.vocab_size
        self.table = _Table(config)
        self.head = nn.Linear(size + config.num_prefixes, size, bias=False)
        self.head.weight = nn.Parameter(
            torch.eye(size, size + config.num_prefixes), requires_grad=False
        )

    def get_input_embeddings(self) -> nn.Module:
        """What the auxiliary knows tokens by."""
        tokens: nn.Module = self.table.tokens
        return tokens

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.head

    def forward(self, **inputs: Any) -> CausalLMOutputWithPast:
        """Next-token logits."""
        hidden = self.table(**inputs).last_hidden_state
        return CausalLMOutputWithPast(logits=self.head(hidden))


def table_tokenizer(letters: str) -> PreTrainedTokenizerFast:
    """One token a letter; the first one ends the text."""
    backend = Tokenizer(models.WordLevel({letter: i for i, letter in enumerate(letters)}))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=letters[0], clean_up_tokenization_spaces=False
    )


def table_llm(
    letters: str, length: int, config: LLMConfig, *, seed: int, spread: float = 1.0
) -> LLM:
    """A random table, all of it trained.

    Args:
        letters: the vocabulary, at least four; the first one ends the text.
        length: longest completion, in tokens.
        config: kept with the LLM; nothing of it is read.
        seed: of the logits.
        spread: standard deviation of the logits.
    """
    module = TableForCausalLM(TableConfig(vocab_size=len(letters), length=length))
    logits_HV: Float[Tensor, "H V"] = torch.randn(
        module.table.logits.weight.shape, generator=generator_for(seed, "table")
    )
    with torch.no_grad():
        module.table.logits.weight.copy_(spread * logits_HV)
    module.to(default_device())  # type: ignore[arg-type]  # transformers types `to` loosely
    llm = LLM(module, table_tokenizer(letters), config=config, peft_model=None, bf16=False)
    return tried_out(llm)


def table_parts(letters: str, length: int, config: Config, rows: Sequence[Row] = ()) -> Parts:
    """The parts of a run on a random table; the prompts differ in nothing but their id.

    Args:
        letters: as in `table_llm`.
        length: longest completion, and longest row behind its prompt, in tokens.
        config: of the run; of its LLM, corpus and prompts only the number of prompts is read.
        rows: the corpus.
    """
    llm = table_llm(letters, length, config.llm, seed=config.seed)
    terms = config.constraint.all_terms().values()
    scorers = tuple(build_scorer(term.scorer) for term in terms)
    prompts = tuple(
        Prompt(id=str(i), text="", group="prompts", token_ids=(0,))
        for i in range(config.prompts.prompts_per_iteration)
    )
    return Parts(
        llm=llm,
        auxiliary=build_auxiliary(config, llm, llm.tokenizer, scorers),
        optimization=build_optimization(llm, config.trainer),
        scorers=scorers,
        judges={},
        prompts=Prompts(training=prompts, held_out=()),
        corpus=corpus_of(rows),
        questions=None,
        display=Silent(),
        stop=StopRequest(),
        phases=Phases(llm.slots),
        server=None,
        world=World.alone(),
        everyone=World.alone(),
        kl_weight=0.0 if config.trainer.is_plain else config.trainer.kl_weight,
    )


def every_completion(llm: LLM, length: int) -> Rollouts:
    """All that a table can say, each once, after one prompt; without hidden states."""
    end, size = llm.tokenizer.eos_token_id, len(llm.tokenizer)
    completions: list[list[int]] = []
    open_: list[list[int]] = [[]]
    for _ in range(length):
        longer = [[*prefix, token] for prefix in open_ for token in range(size)]
        completions += [prefix for prefix in longer if prefix[-1] == end]
        open_ = [prefix for prefix in longer if prefix[-1] != end]
    completions += open_
    ids_NT, lengths_N = pad_right(completions, 0, llm.device)
    texts = [str(llm.tokenizer.decode([t for t in row if t != end])) for row in completions]
    return Rollouts(
        prompts=(Prompt(id="", text="", group="", token_ids=(0,)),),
        prompt_N=torch.zeros_like(lengths_N),
        ids_NT=ids_NT,
        mask_NT=torch.arange(length, device=llm.device) < lengths_N[:, None],
        hidden_NTD=torch.zeros(*ids_NT.shape, 0, device=llm.device),
        texts=tuple(texts),
        guided_N=torch.zeros_like(lengths_N),
        iteration=0,
        sampled_by="every completion",
    )
