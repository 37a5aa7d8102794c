"""Is the prediction of `cft train --dry-run` right? Predicted and measured iterations side by side.

    python scripts/check_cost.py               all cases; about ten minutes on two idle cores
    python scripts/check_cost.py default long  some of them
    python scripts/check_cost.py --render      the page from docs/scaling.jsonl, and the plan

Each case runs three iterations with one thread a process and counts the last two. What is reached
of the machine's ceilings is taken from the case `default` alone; all others test it. Lengths of
texts are those that were met. Ceilings are measured by the same processes, before, between the two
iterations and after: machines slow down for minutes, and the best of the three is what counts.

--clock cpu counts the processor time of the process, where something else keeps the machine busy;
it says nothing of waiting, so cases of two processes need the other clock and an idle machine.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from constrained_ft.cli.settings import settings

settings.prepare_libraries()

import torch  # noqa: E402  # after the libraries' settings

from constrained_ft import sizing  # noqa: E402
from constrained_ft.compose import compose  # noqa: E402
from constrained_ft.cost import Layout, Shape, Work  # noqa: E402
from constrained_ft.distributed import StopRequest, World, join  # noqa: E402
from constrained_ft.finetune import corpus_rows, update_llm, with_fresh_reference  # noqa: E402
from constrained_ft.machine import processor, release_freed  # noqa: E402
from constrained_ft.memory import forget_peak, recent_peak  # noqa: E402
from constrained_ft.parts import build_parts, shard_llm  # noqa: E402
from constrained_ft.phases import Phases  # noqa: E402
from constrained_ft.prediction import (  # noqa: E402
    DEVICES,
    Prediction,
    best_layout,
    predict,
    preference,
    sentence,
)
from constrained_ft.progress import Silent  # noqa: E402
from constrained_ft.randomness import seed_everything  # noqa: E402
from constrained_ft.sizing import Lengths, ceilings, shape_from, shape_of, work_of  # noqa: E402
from constrained_ft.target import learn_target  # noqa: E402

ROOT = Path(__file__).parents[1]
ROWS_FILE, PAGE = ROOT / "docs" / "scaling.jsonl", ROOT / "docs" / "scaling.md"
WARM, MEASURED = 1, 2
FITTED = "default"
KINDS = {True: "With bfloat16 products", False: "Without"}
PHASES = ("mining", "sampling", "auxiliary", "target", "reference", "update")
CLOCKS = {"wall": time.monotonic, "cpu": time.process_time}

SHORT = (
    "auxiliary.patience=4",  # all epochs, so that their number is known
    "trainer.iterations=8",
    "trainer.warmup_steps=1",
)
SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 384,
    "intermediate_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 1024,
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One configuration."""

    overrides: tuple[str, ...] = ()
    ranks: int = 1
    small: bool = False
    """A random model of 40 million parameters in the place of SmolLM2-135M."""


CASES = {
    FITTED: Case(),
    "long": Case(
        overrides=(
            "prompts.max_new_tokens=48",
            "prompts.prompts_per_iteration=16",
            "prompts.samples_per_prompt=4",
            "trainer.rollouts_per_step=32",
            "data.max_length=64",
        )
    ),
    "large": Case(
        overrides=(
            "prompts.prompts_per_iteration=64",
            "prompts.samples_per_prompt=4",
            "prompts.candidates=1",
            "trainer.rollouts_per_step=64",
            "trainer.per_device_train_batch_size=8",
        )
    ),
    "all weights": Case(overrides=("llm.lora=null", "trainer.learning_rate=1e-4")),
    "small": Case(overrides=("llm.lora.first_layer=6",), small=True),
    "two processes": Case(ranks=2),
    "two processes, all weights": Case(
        overrides=("llm.lora=null", "trainer.learning_rate=1e-4"), ranks=2
    ),
    "two processes, shards": Case(
        overrides=("llm.lora=null", "trainer.learning_rate=1e-4", "trainer.sharding=fsdp2"), ranks=2
    ),
    "two processes, small": Case(overrides=("llm.lora.first_layer=6",), small=True, ranks=2),
}

LLAMAS = {
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "70B": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
}
GPUS = (8, 64, 512)
PLANNED = Work(
    prompts=1024,
    samples=8,
    prompt_tokens=32,
    new_tokens=64,
    row_tokens=512,
    rows=512,
    pass_rows=4,
    steps=4,
    rollouts_per_step=1024,
    batch=512,
    fit_batch=512,
    examples=0.8 * 2,
    kept=3,
)


def main() -> None:
    """Measure what was asked for, then write it down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(CASES)}; all when left out")
    parser.add_argument("--render", action="store_true", help="write the page, measure nothing")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--child", nargs=2, metavar=("CASE", "MODEL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(run_case(*options.child, options.clock)))
        return
    unknown = set(options.cases) - set(CASES)
    if unknown:
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    if not options.render:
        with small_model() as folder:
            for name in options.cases or CASES:
                row = measure(name, folder, options.clock)
                print(json.dumps(row["phases"]), flush=True)
                with ROWS_FILE.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    render()


# Measuring.


@contextmanager
def small_model() -> Iterator[str]:
    """A folder with a model of random weights and the tokenizer of the default one."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from constrained_ft.loading import load_tokenizer

    config = compose([])
    tokenizer = load_tokenizer(config.llm)
    with tempfile.TemporaryDirectory() as folder:
        ids = {"bos_token_id": 1, "eos_token_id": tokenizer.eos_token_id}
        with seed_everything(0):
            module = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL, **ids))
        module.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        yield folder


def measure(name: str, small: str, clock: str) -> dict[str, Any]:
    """Run a case in processes of its own; a row for the file."""
    case, load = CASES[name], os.getloadavg()[0]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, __file__, "--clock", clock, "--child", name, small]
    children = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(os.environ)
            | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(case.ranks)},
        )
        for rank in range(case.ranks)
    ]
    said = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        raise SystemExit(f"{name} failed")
    row: dict[str, Any] = json.loads(said[0].splitlines()[-1])
    return row | {
        "name": name,
        "clock": clock,
        "load": round(max(load, os.getloadavg()[0]), 2),
        "machine": processor(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def run_case(name: str, small: str, clock: str) -> dict[str, Any]:
    """A few iterations in this process, and what the prediction needs to know of them."""
    case, ticks = CASES[name], CLOCKS[clock]
    model = ("llm=pretrained", f"llm.model_name_or_path={small}") if case.small else ()
    config = compose([*model, *SHORT, *case.overrides])
    stop, device = StopRequest(), torch.device("cpu")
    world = join(stop, 600, 600) if case.ranks > 1 else World.alone()
    parts = build_parts(config, Silent(), stop, world=world)
    shard_llm(parts, config)
    look = partial(ceilings, device, size=1024, megabytes=64, clock=ticks)
    before, between = look(), {}
    forget_peak(device)
    met: list[tuple[float, float, float]] = []
    sent = 0.0
    for iteration in range(1, WARM + MEASURED + 1):
        if iteration == WARM + 1:
            parts.phases, sent = Phases(parts.llm.slots, ticks), loopback_bytes()
        elif iteration > WARM:
            between = look()
        target = learn_target(parts, config, parts.llm.frozen(), iteration)
        target = with_fresh_reference(parts, target, config, iteration)
        with parts.phases.during("update"):
            update_llm(parts, target, config, iteration)
        said = parts.replay[0].rollouts
        rows = [r for rank in corpus_rows(parts, config, iteration) for p in rank for r in p]
        release_freed()
        met.append(
            (
                statistics.mean(len(prompt.token_ids) for prompt in said.prompts),
                float(said.mask_NT.sum() / len(said.mask_NT)),
                statistics.mean(len(row.token_ids) for row in rows),
            )
        )
    world.agree()
    sent = (loopback_bytes() - sent) / case.ranks / MEASURED
    peak, spent = recent_peak(device), parts.phases.spent()
    after = look()
    prompt, completion, row = map(statistics.mean, zip(*met[WARM:], strict=True))
    seen = statistics.mean(range(WARM + 1, WARM + MEASURED + 1))
    work = replace(
        work_of(config, Lengths(prompt=prompt, completion=completion, row=row), case.ranks),
        examples=(1 - config.auxiliary.validation_share) * seen,
        kept=WARM + MEASURED,
        keeps_prompts=False,  # in the first iterations none comes up again
    )
    world.leave()
    return {
        "phases": {n: spent[n].seconds / MEASURED if n in spent else 0.0 for n in PHASES},
        "peak": peak,
        "sent": round(sent),
        "shape": asdict(shape_of(config.llm)),
        "work": asdict(work),
        "ranks": case.ranks,
        "sharding": config.trainer.sharding,
        "before": before,
        "between": between,
        "after": after,
    }


def loopback_bytes() -> int:
    """What this machine has sent to itself so far."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    (own,) = (line.split(":")[1] for line in lines if line.strip().startswith("lo:"))
    return int(own.split()[8])


# Comparing.


def rows_of_file(*, bf16: bool) -> dict[str, dict[str, Any]]:
    """The newest row of each case on processors of a kind."""
    lines = ROWS_FILE.read_text().splitlines() if ROWS_FILE.exists() else []
    rows = map(json.loads, lines)
    return {row["name"]: row for row in rows if row["work"]["bf16"] == bf16}


def predicted(
    row: Mapping[str, Any], reached: Mapping[str, float], unused: float = 0.0
) -> Prediction:
    """What the cost model says of a row's iteration, with the ceilings measured around it."""
    looks = [row[when] for when in ("before", "between", "after") if when in row]
    found = {
        name: (max if name != "call" else min)(look[name] for look in looks) for name in looks[0]
    }
    device = sizing.cpu(found, row["ranks"], reached, unused)
    layout = Layout(ranks=row["ranks"], sharding=row.get("sharding", "none"), gloo=True)
    return predict(Shape(**row["shape"]), Work(**row["work"]), layout, device)


def reached_by(row: Mapping[str, Any]) -> dict[str, float]:
    """By phase, the share of the ceilings that a measured iteration reached."""
    whole = predicted(row, {})
    found = {}
    for name in set(PHASES) & whole.phases.keys():
        parts = whole.phases[name].seconds
        fixed = sum(parts.get(part, 0.0) for part in sizing.FIXED)
        bound = sum(parts.values()) - fixed
        found[name] = round(bound / max(row["phases"][name] - fixed, 1e-9), 3)
    # Where no reference is read, for want of its own: mining is a forward pass as well.
    found.setdefault("reference", found["mining"])
    return {name: found[name] for name in PHASES}


def unused_by(row: Mapping[str, Any]) -> float:
    """What an allocator left unused, as a share of what the passes were predicted to take."""
    none, all_of_it = (predicted(row, {}, share).peak for share in (0.0, 1.0))
    return round((row["peak"] - none) / (all_of_it - none), 3)


def render() -> None:
    """Write the check and the plan into the page."""
    print("sizing:", *fitted())
    parts = {"plan": plan_table(), "check": check_tables()}
    text = PAGE.read_text()
    for name, table in parts.items():
        begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
        head, rest = text.split(begin)
        text = f"{head}{begin}\n\n{table}\n\n{end}{rest.split(end)[1]}"
    PAGE.write_text(text)


def fitted() -> tuple[dict[bool, dict[str, float]], dict[bool, float]]:
    """What `sizing.REACHED` and `sizing.UNUSED` have to be."""
    rows = {bf16: rows_of_file(bf16=bf16).get(FITTED) for bf16 in KINDS}
    return (
        {bf16: reached_by(row) for bf16, row in rows.items() if row},
        {bf16: unused_by(row) for bf16, row in rows.items() if row},
    )


def check_tables() -> str:
    """Each kind of processor by itself."""
    reached, unused = fitted()
    tables = [
        f"{KINDS[bf16]}:\n\n{check_table(rows_of_file(bf16=bf16), reached[bf16], unused[bf16])}"
        for bf16 in reached
    ]
    return "\n\n".join(tables)


def check_table(
    rows: Mapping[str, Mapping[str, Any]], reached: Mapping[str, float], unused: float
) -> str:
    """Seconds of each phase, predicted / measured, memory, and what a process sends."""
    lines = [
        f"| case | {' | '.join(PHASES)} | iteration | off by | memory, GiB | off by | sent, MiB | "
        "off by |",
        "| --- |" + " --- |" * (len(PHASES) + 6),
    ]
    for name in CASES:
        if name not in rows:
            continue
        row, found = rows[name], predicted(rows[name], reached, unused)
        cells = []
        for phase in PHASES:
            said = found.phases[phase].total if phase in found.phases else 0.0
            cells.append(f"{said:.2f} / {row['phases'][phase]:.2f}")
        took, said = sum(row["phases"].values()), sum(p.total for p in found.phases.values())
        cells += [f"{said:.2f} / {took:.2f}", off(said, took)]
        cells += [f"{found.peak / 2**30:.2f} / {row['peak'] / 2**30:.2f}"]
        cells += [off(found.peak, row["peak"])]
        cells += (
            [f"{found.sent / 2**20:.0f} / {row['sent'] / 2**20:.0f}", off(found.sent, row["sent"])]
            if row["ranks"] > 1 and "sent" in row
            else ["–", "–"]
        )
        fitted = " (fitted)" if name == FITTED else ""
        lines.append(f"| {name}{fitted} | {' | '.join(cells)} |")
    one = rows[FITTED]
    clock = "processor time" if one["clock"] == "cpu" else "wall-clock time"
    drifts = [
        max(abs(row["after"][n] / row["before"][n] - 1) for n in ("bfloat16", "float32"))
        for row in rows.values()
    ]
    load = max(row["load"] for row in rows.values())
    lines += [
        "",
        f"{one['machine']}, torch {one['torch']}, {one['date']}, seconds of {clock}, predicted / "
        f"measured; the load of the machine was up to {load:.1f}, and its products changed by up "
        f"to {max(drifts):.0%} within a case.",
    ]
    return "\n".join(lines)


def off(said: float, took: float) -> str:
    """How far a prediction is off; bold where by more than 15 %."""
    share = said / took - 1
    words = f"{share:+.0%}"
    return f"**{words}**" if abs(share) > 0.15 else words


# Planning.


def planned_shape(name: str, *, lora: bool) -> Shape:
    """A model on paper."""
    facts: dict[str, Any] = LLAMAS[name] | {"model_type": "llama", "vocab_size": 128256}
    adapters = compose(["llm=pretrained", "llm.model_name_or_path=x"]).llm.lora if lora else None
    return shape_from(facts, llama_tensors(facts), adapters)


def llama_tensors(facts: Mapping[str, Any]) -> dict[str, Sequence[int]]:
    """Shapes of the weights of a Llama, biases and norms left out."""
    width, inner = facts["hidden_size"], facts["intermediate_size"]
    keys = width // facts["num_attention_heads"] * facts["num_key_value_heads"]
    layer = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
    }
    ends = ["model.embed_tokens", *["lm_head"] * (not facts["tie_word_embeddings"])]
    return {f"{name}.weight": (facts["vocab_size"], width) for name in ends} | {
        f"model.layers.{number}.{name}.weight": size
        for number in range(facts["num_hidden_layers"])
        for name, size in layer.items()
    }


def plan_table() -> str:
    """The best layout of every model on every number of GPUs."""
    lines = [
        "| model | trained | GPUs | layout | seconds | of 8 GPUs' speed-up | memory, GB | sent, GB "
        "| bottleneck |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in LLAMAS:
        for lora in (True, False):
            shape, first = planned_shape(name, lora=lora), 0.0
            for gpus in GPUS:
                found = best_of(shape, gpus)
                first = first or found.seconds * GPUS[0]
                words = sentence(found).removeprefix("bottleneck: ")
                lines.append(
                    f"| {name} | {'LoRA' if lora else 'all'} | {gpus} | {layout_words(found)} "
                    f"| {found.seconds:.1f} | {first / found.seconds / GPUS[0]:.1f} "
                    f"of {gpus / GPUS[0]:.0f} | {found.peak / 1e9:.0f} | {found.sent / 1e9:.1f} "
                    f"| {words} |"
                )
    return "\n".join(lines)


def best_of(shape: Shape, gpus: int) -> Prediction:
    """The fastest layout that fits: with or without shards and computing activations twice."""
    found = [
        best_layout(shape, replace(PLANNED, checkpoints=again), DEVICES["h100"], gpus, sharding)
        for sharding in ("none", "fsdp2")
        for again in (False, True)
    ]
    return min(found, key=preference)


def layout_words(found: Prediction) -> str:
    """Who does what."""
    layout = found.layout
    sharded = ", fsdp2" if layout.sharding == "fsdp2" else ""
    if layout.peers:
        return f"overlapped, {layout.updaters} update, {layout.peers} learn{sharded}"
    return f"alternating, all together{sharded}"


if __name__ == "__main__":
    main()
