"""Seconds, bytes and memory of an iteration, from what it asks for and what a device has.

A phase takes each resource's amount over its ceiling, added up, over the share of the ceilings that
phases of its kind reach. Where operations are started while earlier ones compute, starting them
costs what is not hidden.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from constrained_ft import cost
from constrained_ft.cost import Demand, Layout, Number, Shape, Sharding, Work

# Numbers kept for each one of a layer's states: its norms frozen, or trained. For each one that its
# products give: in float32, or in bfloat16.
_NORMS, _COPIES = (4, 6), (1.5, 1.95)
_MOMENTS = 2  # float32 numbers for each trained one; its gradient comes to them in an update
_LAID_OUT = 2  # reading and writing weights, for reading them
_SAMPLING_BUFFERS = 4  # float32 logits of a batch at once
# Of the loss: float32 logits of a chunk, those of R on GPUs alone; its least rows on CPUs and GPUs.
_CHUNK_BYTES, _LOSS_BUFFERS, _FEWEST_ROWS = 3 * 2**26, (2, 3), (128, 512)


@dataclass(frozen=True, kw_only=True)
class Device:
    """What one rank computes with, and what connects it; 10^9 bytes are a gigabyte."""

    name: str
    products: Number
    """Floating-point operations a second of bfloat16 products."""
    wide: Number
    """The same of float32 products."""
    memory_speed: Number
    """Bytes a second that are read or written."""
    elementwise: Number
    """The same where a nonlinear function of each number is computed."""
    memory: Number
    """Bytes."""
    call: Number
    """Seconds to start one operation."""
    asynchronous: bool
    """Whether operations are started while earlier ones compute."""
    link: Number
    """Bytes a second that a rank sends to another one of its node."""
    network: Number
    """Bytes a second that a node sends to another."""
    host_link: Number
    """Bytes a second that a rank sends through its CPU (gloo)."""
    per_node: int
    meeting: Number
    """Seconds for each rank of a group until all have agreed to exchange something."""
    shard_link: Number = math.inf
    """Bytes a second that a rank sends of shards, at most: CPUs copy them several times."""
    libraries: Number = 0.0
    """Bytes of a process that computes nothing."""
    unused: Number = 0.0
    """What an allocator leaves unused, as a share of what the passes take."""
    efficiency: Mapping[str, Number] = field(default_factory=dict)
    """By phase, the share of these ceilings that is reached; 1 where none is named."""

    def bus(self, ranks: int) -> Number:
        """Bytes a second that each rank of a ring sends."""
        return self.link if ranks <= self.per_node else min(self.link, self.network)


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One phase in seconds."""

    seconds: Mapping[str, Number]
    """By resource; they add up."""
    sent: Number
    """Bytes that each rank sends."""

    @property
    def total(self) -> Number:
        """Seconds of it all."""
        return sum(self.seconds.values())


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """One iteration of one layout."""

    layout: Layout
    phases: Mapping[str, Phase]
    seconds: Number
    """Of the iteration; less than all phases together where they overlap."""
    memory: Mapping[str, Number]
    """Bytes on a rank at the peak, by what takes them; those of stage 1 or 2, whichever is more."""
    fits: bool
    """Whether the device has that much."""
    bottleneck: tuple[str, str]
    """Phase and resource that take longest."""

    @property
    def sent(self) -> Number:
        """Bytes that the busiest rank sends in an iteration."""
        return sum(phase.sent for phase in self.phases.values())

    @property
    def peak(self) -> Number:
        """Bytes on a rank at the peak."""
        return sum(self.memory.values())


def spend(demand: Demand, device: Device, work: Work, phase: str, ranks: int) -> Phase:
    """A demand in seconds, by resource.

    Args:
        demand: of one rank.
        device: what it has.
        work: the trunk's precision.
        phase: its name, under which the efficiency stands.
        ranks: of the group that exchanges something.
    """
    reached = device.efficiency.get(phase, 1.0)
    trunk = demand.trunk / (device.products if work.bf16 else device.wide)
    computed = trunk + demand.wide / device.wide
    weights = demand.read / device.memory_speed
    # A CPU's library first lays the weights out anew, for each product; a GPU reads them meanwhile.
    weights = max(weights - computed, 0.0) if device.asynchronous else _LAID_OUT * weights
    parts = {
        "trunk": trunk / reached,
        "wide": demand.wide / device.wide / reached,
        "weights": weights / reached,
        "memory": demand.moved / device.elementwise / reached,
    }
    calls = demand.calls * device.call
    parts["calls"] = max(calls - sum(parts.values()), 0.0) if device.asynchronous else calls
    bus = device.bus(ranks)
    parts |= {
        "link": demand.sent / bus + demand.spread / min(bus, device.shard_link),
        "host": demand.told / device.host_link,
        "meetings": demand.meetings * ranks * device.meeting,
        "service": demand.waited,
    }
    seconds = {name: value for name, value in parts.items() if value > 0}
    return Phase(seconds=seconds, sent=demand.sent + demand.spread + demand.told)


def predict(shape: Shape, work: Work, layout: Layout, device: Device) -> Prediction:
    """One iteration.

    Raises:
        ValueError: when no rank is left to update the LLM.
    """
    if not 0 <= layout.peers < layout.ranks:
        raise ValueError(f"{layout.peers} peers of {layout.ranks} ranks leave none to update")
    learning, updating, between = _demands(shape, work, layout)

    def spent(demands: Mapping[str, Demand], ranks: int) -> dict[str, Phase]:
        found = {n: spend(d, device, work, n, ranks) for n, d in demands.items()}
        return {n: phase for n, phase in found.items() if phase.seconds}

    first, second = spent(learning, layout.learners), spent(updating, layout.updaters)
    over = spent(between, layout.ranks)
    sides = [sum(phase.total for phase in side.values()) for side in (first, second)]
    both_at_once = layout.overlapped and layout.peers > 0
    critical = first | second
    if both_at_once:
        critical = first if sides[0] > sides[1] else second
    seconds = max(sides) if both_at_once else sum(sides)
    held = memory(shape, work, layout, device)
    return Prediction(
        layout=layout,
        phases=first | second | over,
        seconds=seconds + sum(phase.total for phase in over.values()),
        memory=held,
        fits=sum(held.values()) <= device.memory,
        bottleneck=_largest(critical | over),
    )


def _demands(
    shape: Shape, work: Work, layout: Layout
) -> tuple[dict[str, Demand], dict[str, Demand], dict[str, Demand]]:
    """Of stage 1, of stage 2, and between them."""
    learning = {
        "mining": cost.mining(shape, work, layout),
        "sampling": cost.sampling(shape, work, layout),
        "scoring": cost.scoring(work, layout),
        "auxiliary": cost.auxiliary(shape, work, layout),
        "target": cost.target(shape, work, layout),
    }
    updating = {"update": cost.update(shape, work, layout)}
    states = {"reference": cost.reference(shape, work, layout)}
    if work.reference == "fresh":  # the update brings its own
        updating = states | updating
    else:
        learning |= states
    return learning, updating, {"hand over": cost.hand_over(shape, work, layout)}


def _largest(phases: Mapping[str, Phase]) -> tuple[str, str]:
    found = [(s, name, part) for name, one in phases.items() for part, s in one.seconds.items()]
    _, phase, resource = max(found)
    return phase, resource


def best_layout(
    shape: Shape, work: Work, device: Device, ranks: int, sharding: Sharding = "none"
) -> Prediction:
    """The fastest of all splits: together in turns, or so many peers meanwhile."""
    counts = range(ranks) if sharding == "none" else range(1)
    found = [
        predict(
            shape,
            work,
            Layout(ranks=ranks, peers=peers, overlapped=peers > 0, sharding=sharding),
            device,
        )
        for peers in counts
    ]
    return min(found, key=preference)


def preference(found: Prediction) -> tuple[bool, Number]:
    """Orders layouts: the fastest of those that fit, else the one that lacks least."""
    return (not found.fits, found.seconds if found.fits else found.peak)


def activations(shape: Shape, work: Work, context: Number) -> Number:
    """Bytes that a token keeps for the backward pass, all layers together.

    Of each layer from the first adapted one on: float32 copies around its norms, what its products
    give, some of it in two precisions, and attention's probabilities. With checkpoints one layer,
    and every layer's input.

    Args:
        shape: the model.
        work: its precision.
        context: positions that probabilities are kept for; 0 where the kernel keeps none.
    """
    bytes_ = work.state_bytes
    norms = _NORMS[shape.adapters == 0] * shape.hidden
    copies = _COPIES[work.bf16] * bytes_ * shape.outputs / shape.layers
    layer = 4 * norms + copies + 4 * shape.heads * context
    if work.checkpoints:
        return layer + shape.layers * shape.hidden * bytes_
    return layer * shape.layers * shape.adapted


def memory(shape: Shape, work: Work, layout: Layout, device: Device) -> dict[str, Number]:
    """Bytes at the peak of a rank that updates, by what takes them."""
    shards = cost.shards(layout)
    base = cost.stored(shape, work)
    size, width = shape.vocabulary, shape.hidden
    head = 4.0 * size * width * (base == 2)
    rollouts = work.kept * cost.packet(shape, work)
    said, tree = cost.tree_tokens(work, work.used / work.steps / layout.updaters)
    corpus = work.rows * work.row_tokens / layout.updaters
    tokens = (said + corpus) / work.passes(layout.updaters)
    # Of a GPU's kernels, attention keeps no probabilities.
    seen = 0 if device.asynchronous else max(tree, cost.row_of(work, tokens, work.row_tokens))
    chunk = max(_CHUNK_BYTES // (8 * size), _FEWEST_ROWS[device.asynchronous])
    updating = {
        # Weights that are not stored in bfloat16 are kept in it from the forward pass on.
        "cast weights": 2.0 * shape.products * (work.bf16 and base == 4),
        "activations": tokens * activations(shape, work, seen),
        "logits": 4.0 * _LOSS_BUFFERS[device.asynchronous] * chunk * size,
    }
    rows = min(work.batch, math.ceil(work.rollouts / layout.learners))
    places = rows * (work.prompt_tokens + 2 * work.new_tokens)
    sampled = {
        "keys and values": 2.0 * places * shape.layers * shape.keys * work.state_bytes,
        "logits": 4.0 * _SAMPLING_BUFFERS * rows * size,
    }
    for passes in (updating, sampled):
        passes["unused"] = device.unused * sum(passes.values())
    # The reference keeps a copy of a head that is trained; what samples is a copy of all. Shards
    # are fetched instead.
    updating["gradients"] = 4.0 * shape.trained / shards
    # What is no layer, and one layer: whole weights, and gradients before and while they are sent.
    fetched = shape.parameters - shape.products * (1 - 1 / shape.layers)
    updating["fetched"] = (base + 8.0 * (shape.adapters == 0)) * fetched * (shards > 1)
    updating["reference's head"] = 4.0 * size * width * (shape.adapters == 0)
    copied = cost.copy_bytes(shape, work)
    own = work.state_bytes * shape.adapters if shape.adapters and shards == 1 else copied
    sampled["frozen copy"] = own
    last = max((updating, sampled), key=lambda one: sum(one.values()))
    kept = {
        "libraries": device.libraries,
        "weights": base * shape.parameters / shards + head,
        "moments": 4.0 * _MOMENTS * shape.trained / shards,
        "rollouts": rollouts,
        "auxiliary": 4.0 * size * (width + 3 * work.rank),
    }
    return {name: value for name, value in (kept | last).items() if value > 0}


# What a table says.

WORDS = {
    "trunk": "products of the trunk",
    "wide": "float32 products with the vocabulary",
    "weights": "reading weights and keys for few tokens",
    "memory": "reading and writing between the products",
    "calls": "starting operations one by one",
    "link": "sending between devices",
    "host": "sending rollouts between CPUs",
    "meetings": "waiting until all ranks agree",
    "service": "waiting for scores",
}
"""Resources, for people."""


def sentence(found: Prediction) -> str:
    """What an iteration takes longest over, and whether it fits."""
    phase, resource = found.bottleneck
    part = found.phases[phase].seconds[resource] / max(found.seconds, 1e-12)
    words = f"bottleneck: {WORDS[resource]} in {phase}, {part:.0%} of the iteration"
    return words if found.fits else f"{words}; it does not fit into the memory"


# Devices on paper: data sheets; links at 80 % of them. `wide` is float32 without TensorFloat-32,
# as torch multiplies unless told otherwise. What is reached of the ceilings is assumed: published
# training in this precision reaches 33 to 45 % of the products.

_ASSUMED = {
    "mining": 0.4,
    "sampling": 0.5,
    "auxiliary": 0.3,
    "target": 0.4,
    "reference": 0.5,
    "update": 0.4,
}

DEVICES = {
    "h100": Device(
        name="H100 SXM 80GB",
        products=989e12,
        wide=67e12,
        memory_speed=3.35e12,
        elementwise=3.35e12,
        memory=80e9,
        call=8e-6,
        asynchronous=True,
        link=0.8 * 450e9,
        network=0.8 * 8 * 50e9,
        host_link=2.5e9,
        per_node=8,
        meeting=3e-4,
        unused=0.1,
        efficiency=_ASSUMED,
    ),
    "a100": Device(
        name="A100 SXM 80GB",
        products=312e12,
        wide=19.5e12,
        memory_speed=2.04e12,
        elementwise=2.04e12,
        memory=80e9,
        call=8e-6,
        asynchronous=True,
        link=0.8 * 300e9,
        network=0.8 * 8 * 25e9,
        host_link=2.5e9,
        per_node=8,
        meeting=3e-4,
        unused=0.1,
        efficiency=_ASSUMED,
    ),
}
"""By name. Nothing was run on them."""
