"""What an iteration asks of each rank: operations, bytes, messages. Arithmetic, no tensors.

Of every phase a `Demand`, in the order in which `train` runs them. Ranks share prompts, rollouts
and rows evenly. `prediction.py` makes seconds of it; docs/scaling.md has the formulas on a page,
and how far they were off.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Literal

Sharding = Literal["none", "fsdp2"]
Number = int | float  # what is counted may be a mean

_LAYER_CALLS = 45  # operations that one layer starts in a forward pass, by torch's profiler
_ADAPTER_CALLS = 5  # and one adapter
_LAYER_PASSES = 16  # times that a layer's float32 states are read or written, beside its products
_OUTPUT_PASSES = 3  # the same of what its products give
_SAMPLED, _TARGET, _KL, _CE = 8, 26, 41, 8  # the same of the logits of a row, by what is done
_STEP_BYTES = 40  # that AdamW and clipping read and write of a trained number
_FIT_PASSES = 8  # times that a step of R reads or writes the hidden states of its batch
_R_CALLS = 150  # operations that one step of R starts
_SETTLING = 25  # passes over 1,024 examples that find R's scalars before the first step
_SETTLED_ROWS = 1024


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A model in numbers; what is trained of it, too."""

    parameters: int
    """All weights of the base; a tied head counts once."""
    products: int
    """Those of the linear layers of the trunk, which every token is multiplied by."""
    outputs: int
    """Numbers that these layers give for a token, all together."""
    linears: int
    """How many these layers are."""
    layers: int
    hidden: int
    vocabulary: int
    heads: int
    """Query heads of a layer."""
    queries: int
    """Numbers of all query heads of a layer, for a token."""
    keys: int
    """Numbers of all key heads of a layer, for a token."""
    adapters: int = 0
    """Weights of the adapters; 0 trains all weights."""
    adapted: Number = 1.0
    """Share of the layers that a backward pass goes through: all from the first adapted one on."""

    @property
    def trained(self) -> int:
        """Numbers that the optimizer moves."""
        return self.adapters or self.parameters


@dataclass(frozen=True, kw_only=True)
class Work:
    """One iteration, of all ranks."""

    prompts: int
    samples: int
    prompt_tokens: Number
    """Mean tokens of a prompt."""
    new_tokens: Number
    """Mean tokens of a completion."""
    row_tokens: Number
    """Mean tokens of a corpus row."""
    rows: int
    """Corpus rows of a step."""
    pass_rows: int
    """Corpus rows of one forward and backward pass of a rank."""
    steps: int
    rollouts_per_step: int
    batch: int
    """Completions sampled at once."""
    scored_share: Number = 1.0
    """Of the completions; R is fitted to these."""
    candidates: int = 1
    reference: Literal["fresh", "matched", "live"] = "fresh"
    learns: bool = True
    """Whether the update reads a target; else the corpus is all."""
    rank: int = 64
    """Of R."""
    epochs: int = 4
    fit_batch: int = 64
    examples: Number = 1.0
    """What R is fitted to, in iterations: this one and those that are replayed."""
    kept: int = 1
    """Iterations whose rollouts are in memory."""
    score_seconds: Number = 0.0
    """Of one text; 0 where it is not known."""
    bf16: bool = True
    """Whether the trunk multiplies in bfloat16."""
    wide_head: bool = True
    """Whether products with the vocabulary run in float32."""
    checkpoints: bool = False
    """Whether backward passes compute activations again."""
    keeps_below: bool = False
    """Whether sampling keeps what frozen layers say for the update of one process."""
    keeps_prompts: bool = False
    """Whether mining keeps what frozen layers say of prompts, which come up again soon."""
    capacity: int = 256
    """Most tokens of a packed row."""

    def passes(self, ranks: int) -> int:
        """Forward and backward passes of a step, where so many ranks share it."""
        return max(1, math.ceil(self.rows / ranks / self.pass_rows))

    @property
    def rollouts(self) -> int:
        """Completions that are sampled."""
        return self.prompts * self.samples

    @property
    def used(self) -> int:
        """Completions that the update reads."""
        return min(self.rollouts, self.steps * self.rollouts_per_step) if self.learns else 0

    @property
    def state_bytes(self) -> int:
        """Of one number of a hidden state."""
        return 2 if self.bf16 else 4


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Who does what."""

    ranks: int = 1
    peers: int = 0
    """Ranks that learn the target while the others update; 0: all do both."""
    overlapped: bool = False
    sharding: Sharding = "none"
    gloo: bool = False
    """Between CPUs: what is summed into shards is summed everywhere first, and sent twice."""

    @property
    def learners(self) -> int:
        """Ranks that share stage 1."""
        return self.peers or self.ranks

    @property
    def updaters(self) -> int:
        """Ranks that share stage 2."""
        return self.ranks - self.peers


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What one phase asks of one rank."""

    trunk: Number = 0.0
    """Floating-point operations in the precision of the trunk."""
    wide: Number = 0.0
    """Floating-point operations in float32."""
    read: Number = 0.0
    """Bytes of weights and keys that products read; hidden where they compute for longer."""
    moved: Number = 0.0
    """Bytes read and written between the products."""
    calls: Number = 0.0
    """Operations started."""
    sent: Number = 0.0
    """Bytes sent between devices."""
    spread: Number = 0.0
    """The same of weights and gradients of which each rank has a part."""
    told: Number = 0.0
    """Bytes sent between CPUs."""
    meetings: Number = 0.0
    """Times that all ranks of a group wait for each other."""
    waited: Number = 0.0
    """Seconds that something else takes, such as a scorer."""

    def __add__(self, other: "Demand") -> "Demand":
        """Both, one after the other."""
        return Demand(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in _PARTS})

    def times(self, count: Number) -> "Demand":
        """The same so many times."""
        return Demand(**{f.name: count * getattr(self, f.name) for f in _PARTS})


_PARTS = fields(Demand)
NOTHING = Demand()


# What the passes ask for.


def forward(shape: Shape, work: Work, tokens: Number, context: Number, passes: Number) -> Demand:
    """Forward passes of the trunk.

    Args:
        shape: the model.
        work: its precision.
        tokens: of all passes.
        context: positions that each token attends to.
        passes: how many.
    """
    attention = 4 * shape.queries * shape.layers * context
    weights = shape.products + shape.adapters
    linears = shape.linears * shape.adapted * (shape.adapters > 0)
    adapted = 1 + 2 * shape.adapted * (shape.adapters > 0)
    bytes_ = work.state_bytes
    return Demand(
        trunk=tokens * (2 * weights + attention),
        read=passes * weights * bytes_,
        moved=tokens
        * (
            _LAYER_PASSES * 4 * shape.layers * shape.hidden
            + _OUTPUT_PASSES * bytes_ * shape.outputs * adapted
        ),
        calls=passes * (_LAYER_CALLS * shape.layers + _ADAPTER_CALLS * linears),
    )


def backward(shape: Shape, work: Work, tokens: Number, context: Number, passes: Number) -> Demand:
    """Backward passes of the trunk: twice the products, but those of frozen weights once.

    Takes what `forward` takes.
    """
    share = shape.adapted
    attention = 8 * shape.queries * shape.layers * context * share
    weights = 4 * shape.adapters + (2 if shape.adapters else 4) * shape.products * share
    once = forward(shape, work, tokens, context, passes)
    again = once.times(share) if work.checkpoints else NOTHING
    twice = once.times(2 * share)
    return again + Demand(
        trunk=tokens * (weights + attention), read=twice.read, moved=twice.moved, calls=twice.calls
    )


def vocabulary(shape: Shape, work: Work, rows: Number, *, products: int, passes: int) -> Demand:
    """Products with the head, and what is done to the logits.

    Args:
        shape: the model.
        work: the precision of the head.
        rows: positions whose logits are needed.
        products: of [hidden, vocabulary] for each row.
        passes: times that the logits are read or written.
    """
    operations = 2.0 * rows * products * shape.hidden * shape.vocabulary
    moved = 4.0 * rows * passes * shape.vocabulary
    if work.wide_head:
        return Demand(wide=operations, moved=moved)
    return Demand(trunk=operations, moved=moved)


def evidence(shape: Shape, work: Work, rows: Number) -> Demand:
    """R over the vocabulary."""
    return Demand(wide=2.0 * rows * work.rank * shape.vocabulary)


def _ring(volume: Number, ranks: int) -> Number:
    """Bytes that each rank sends until all have the sum: twice a pass around the ring."""
    return 2 * volume * (ranks - 1) / ranks


def row_of(work: Work, tokens: Number, row: Number) -> Number:
    """Positions that a token attends to: masked ones of its packed row are computed too."""
    return max(row, min(tokens, work.capacity))


def above(shape: Shape) -> Shape:
    """The layers from the first adapted one on."""
    return replace(_some_layers(shape, shape.adapted), adapters=shape.adapters)


def below(shape: Shape) -> Shape:
    """The frozen layers below the first adapted one."""
    return _some_layers(shape, 1 - shape.adapted)


def _some_layers(shape: Shape, share: Number) -> Shape:
    return replace(
        shape,
        products=round(share * shape.products),
        outputs=round(share * shape.outputs),
        linears=round(share * shape.linears),
        layers=round(share * shape.layers),
        adapters=0,
        adapted=1.0,
    )


def _begins_above(work: Work, layout: Layout) -> bool:
    """Whether the update reads what the same process sampled, in the same iteration."""
    return work.keeps_below and layout.ranks == 1 and not layout.overlapped


# The phases.


def mining(shape: Shape, work: Work, layout: Layout) -> Demand:
    """The first rank reads the candidates; the others wait.

    What frozen layers make of prompts that come up often is known since an earlier iteration.
    """
    if work.candidates == 1:
        return NOTHING
    count = work.candidates * work.prompts
    tokens = count * work.prompt_tokens
    whole = layout.peers > 0 or shards(layout) == 1
    read = above(shape) if work.keeps_prompts and whole else shape
    return (
        forward(read, work, tokens, row_of(work, tokens, work.prompt_tokens), math.ceil(count / 64))
        + vocabulary(shape, work, count, products=1, passes=_TARGET)
        + evidence(shape, work, count)
    )


def sampling(shape: Shape, work: Work, layout: Layout) -> Demand:
    """Prompts are read once, then one token of each completion at a time; all get all."""
    ranks, prompts = layout.learners, math.ceil(work.prompts / layout.learners)
    rows = prompts * work.samples
    batches = math.ceil(prompts / max(1, work.batch // work.samples))
    tokens = prompts * work.prompt_tokens
    context = work.prompt_tokens + work.new_tokens / 2
    steps = batches * (work.new_tokens - 1)
    cache = 2.0 * shape.keys * shape.layers * context * work.state_bytes
    found = (
        forward(shape, work, tokens, row_of(work, tokens, work.prompt_tokens), batches)
        + forward(shape, work, rows * (work.new_tokens - 1), context, steps)
        + vocabulary(shape, work, rows * work.new_tokens, products=1, passes=_SAMPLED)
        + Demand(read=rows * (work.new_tokens - 1) * cache)
        + (NOTHING if layout.peers else _fetched(layout, copy_bytes(shape, work)))
    )
    if ranks == 1:
        return found
    return found + Demand(told=(ranks - 1) / ranks * packet(shape, work), meetings=1)


def packet(shape: Shape, work: Work) -> Number:
    """Bytes of all rollouts: hidden states, tokens, masks."""
    return work.rollouts * work.new_tokens * (shape.hidden * work.state_bytes + 9)


def shards(layout: Layout) -> int:
    """Among how many ranks weights and what trains them are divided: those that update."""
    return layout.updaters if layout.sharding == "fsdp2" else 1


def _fetched(layout: Layout, volume: Number) -> Demand:
    """Bytes that are divided among the ranks, sent to all of them."""
    count = shards(layout)
    return Demand(spread=volume * (count - 1) / count)


def stored(shape: Shape, work: Work) -> int:
    """Bytes of a weight: frozen ones are kept as they are multiplied."""
    return work.state_bytes if shape.adapters else 4


def copy_bytes(shape: Shape, work: Work) -> Number:
    """Bytes of a copy of all weights that is not trained."""
    rest = shape.parameters - shape.products
    return work.state_bytes * shape.products + stored(shape, work) * rest


def scoring(work: Work, layout: Layout) -> Demand:
    """Each rank its own completions, one after the other."""
    own = math.ceil(work.scored_share * work.rollouts / layout.learners)
    return Demand(waited=own * work.score_seconds, meetings=2 * (layout.learners > 1))


def auxiliary(shape: Shape, work: Work, layout: Layout) -> Demand:
    """Steps of R over all examples, epoch by epoch."""
    ranks, examples = layout.learners, work.scored_share * work.rollouts * work.examples
    steps = work.epochs * math.ceil(examples / work.fit_batch)
    positions = work.fit_batch * work.new_tokens / ranks
    weights = 2 * shape.hidden * work.rank

    def step(count: Number) -> Demand:
        return Demand(
            wide=4.0 * count * weights,
            moved=4.0 * count * shape.hidden * _FIT_PASSES + _STEP_BYTES * weights,
            calls=_R_CALLS,
        )

    settling = step(min(examples, _SETTLED_ROWS) * work.new_tokens).times(_SETTLING / 2)
    shared = Demand(sent=_ring(4 * weights, ranks), meetings=1) if ranks > 1 else NOTHING
    return settling + (step(positions) + shared).times(steps)


def target(shape: Shape, work: Work, layout: Layout) -> Demand:
    """q* at every prefix: the KL that each rollout carries."""
    rows = (work.rollouts * work.new_tokens + work.prompts) / layout.learners
    whole = vocabulary(shape, work, rows, products=1, passes=_TARGET)
    return whole + evidence(shape, work, rows) + Demand(meetings=4 * (layout.learners > 1))


def reference(shape: Shape, work: Work, layout: Layout) -> Demand:
    """The states of a frozen LLM at the prefixes that the update reads.

    In float32 they are those that sampling left, unless the LLM has moved on since.
    """
    fresh = work.reference == "fresh"
    at_hand = not work.bf16 and not (fresh and layout.overlapped)
    if not work.learns or work.reference == "live" or at_hand:
        return NOTHING
    ranks = layout.updaters if fresh else layout.learners
    read = work.used * ((work.steps - 1) / work.steps if fresh else 1)
    own = read / ranks
    layers = above(shape) if _begins_above(work, layout) else shape
    found = forward(layers, work, *tree_tokens(work, own), math.ceil(own / 32))
    if fresh or not layout.peers:  # peers have whole weights
        found += _fetched(layout, copy_bytes(shape, work))
    if fresh or ranks == 1:
        return found
    return found + Demand(told=(ranks - 1) / ranks * packet(shape, work), meetings=1)


def tree_tokens(work: Work, rollouts: Number) -> tuple[Number, Number]:
    """Tokens of some rollouts, those of a prompt behind it, and what each of them attends to."""
    tree = work.prompt_tokens + work.samples * (work.new_tokens - 1)
    tokens = rollouts / work.samples * tree
    return tokens, row_of(work, tokens, tree)


def update(shape: Shape, work: Work, layout: Layout) -> Demand:
    """All steps of an iteration: both losses forward and backward, gradients summed, AdamW."""
    ranks = layout.updaters
    rollouts = work.used / work.steps / ranks
    said, context = tree_tokens(work, rollouts)
    corpus = work.rows * work.row_tokens / ranks
    tokens = said + corpus
    context = max(context, row_of(work, tokens, work.row_tokens))
    trains_head = int(shape.adapters == 0)
    kl_rows = rollouts * work.new_tokens
    passes = work.passes(ranks)
    if _begins_above(work, layout):
        read = forward(above(shape), work, tokens, context, passes)
        read += forward(below(shape), work, corpus, row_of(work, corpus, work.row_tokens), passes)
    else:
        read = forward(shape, work, tokens, context, passes)
    step = (
        read
        + backward(shape, work, tokens, context, passes)
        + vocabulary(shape, work, corpus, products=2 + trains_head, passes=_CE)
        + vocabulary(shape, work, kl_rows, products=2 + trains_head, passes=_KL)
        + evidence(shape, work, kl_rows)
        + Demand(moved=_STEP_BYTES * shape.trained / shards(layout))
    )
    first = work.reference == "live"
    others = work.steps if not first else 0
    others -= work.reference == "fresh"
    own = vocabulary(shape, work, kl_rows, products=1, passes=0)
    return step.times(work.steps) + own.times(max(others, 0)) + _exchange(shape, work, layout)


def _exchange(shape: Shape, work: Work, layout: Layout) -> Demand:
    """Gradients of all steps, summed over the ranks; with shards, the weights of each pass too."""
    ranks = layout.updaters
    if ranks == 1:
        return NOTHING
    share = 4.0 * shape.trained
    if layout.sharding == "none":
        each = Demand(sent=_ring(share, ranks), meetings=2)
    else:
        passes, weights = work.passes(ranks), stored(shape, work) * shape.parameters
        summed = (2 if layout.gloo else 1) * share
        each = _fetched(layout, passes * (summed + 2 * weights)) + Demand(meetings=2)
    return each.times(work.steps)


def hand_over(shape: Shape, work: Work, layout: Layout) -> Demand:
    """With peers: the LLM to them, the target back."""
    if not layout.peers:
        return NOTHING
    states = 4.0 * (2 * shape.hidden * work.rank + shape.vocabulary)
    over = Demand(sent=4.0 * shape.trained, told=packet(shape, work) + states, meetings=4)
    return over + _fetched(layout, 4.0 * shape.trained)
