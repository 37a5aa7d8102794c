"""How fast the sampler, the loss and the update are, as ratios to the real libraries.

    python scripts/bench.py                    all rows; half an hour on two cores
    python scripts/bench.py loss sampling      some of them
    python scripts/bench.py --render           docs/performance.md from docs/benchmarks.jsonl

Both sides of a ratio run in turns, one warm-up and five rounds each; what counts is the ratio of
the medians. The products of matrices are timed before and after: where they differ by more than
10 %, or something else kept the machine busy, the row counts for nothing. Each row is added to
docs/benchmarks.jsonl and the table in docs/performance.md is written anew.

`--shape 0.5b|1.5b` measures the loss and the sampler on a model of random weights, for GPUs;
nothing is downloaded for that.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from constrained_ft.cli.settings import settings

settings.prepare_libraries()

import torch  # noqa: E402  # after the libraries' settings
from bench_ratio import Ratio, Work  # noqa: E402
from bench_runs import history_rows, overlap_rows, scoring_rows, service_rows  # noqa: E402
from torch import Tensor  # noqa: E402
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM  # noqa: E402

from constrained_ft import equations  # noqa: E402
from constrained_ft.compose import compose  # noqa: E402
from constrained_ft.config import Config  # noqa: E402
from constrained_ft.decoding import decode  # noqa: E402
from constrained_ft.distributed import StopRequest, default_device  # noqa: E402
from constrained_ft.finetune import backward_of_step, update_llm, with_fresh_reference  # noqa: E402
from constrained_ft.fused import Head, Tilt, chunk_rows_for, fused_losses  # noqa: E402
from constrained_ft.llm import LLM  # noqa: E402
from constrained_ft.loading import load_llm, load_tokenizer, plain_config  # noqa: E402
from constrained_ft.machine import processor  # noqa: E402
from constrained_ft.memory import held_memory, peak_during  # noqa: E402
from constrained_ft.optimization import build_optimization  # noqa: E402
from constrained_ft.parts import Parts, build_parts  # noqa: E402
from constrained_ft.progress import Silent  # noqa: E402
from constrained_ft.target import Target, learn_target  # noqa: E402
from constrained_ft.tiny import byte_tokenizer  # noqa: E402
from constrained_ft.tryout import tried_out  # noqa: E402

ROUNDS = 5
LARGEST_DRIFT = 0.1  # of the ceilings
OTHERS_LOAD = 0.5  # processes that may be running beside this one's threads
ROOT = Path(__file__).parents[1]
ROWS_FILE, PAGE = ROOT / "docs" / "benchmarks.jsonl", ROOT / "docs" / "performance.md"
MARKS = "<!-- rows -->", "<!-- end of rows -->"
PROMPTS, SAMPLES, NEW_TOKENS = 16, 16, 20
SHAPES = {
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28},
}  # of Qwen2
VOCABULARY = 151_936
DEVICE = default_device()


def main() -> None:
    """Measure what was asked for, then write it down."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("groups", nargs="*", help=f"of {', '.join(GROUPS)}; all when left out")
    parser.add_argument("--render", action="store_true", help="write the page and measure nothing")
    parser.add_argument("--shape", choices=SHAPES, help="a random model of this size")
    parser.add_argument("--peak", choices=["fused", "dense"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        print(_peak_here(options.peak))
        return
    there_are = RANDOM if options.shape else tuple(GROUPS)
    unknown = set(options.groups) - set(there_are)
    if unknown:
        parser.error(f"no group {', '.join(sorted(unknown))}; there are {', '.join(there_are)}")
    if not options.render:
        for group in options.groups or there_are:
            for ratio in GROUPS[group](options.shape):
                row = measure(ratio, options.shape)
                print(json.dumps(row), flush=True)
                with ROWS_FILE.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    render()


def measure(ratio: Ratio, shape: str | None) -> dict[str, Any]:
    """Run both sides in turns; a row for the file."""
    before, load = ceilings(), os.getloadavg()[0]
    row: dict[str, Any] = {"name": ratio.name, "must": ratio.must, "aim": ratio.aim}
    if ratio.value is not None:
        row |= {"ratio": round(ratio.value(), 4)}
    else:
        assert ratio.ours is not None
        assert ratio.theirs is not None
        times: tuple[list[float], list[float]] = [], []
        for number in range(ROUNDS + 1):
            for side, work in zip(times, (ratio.ours, ratio.theirs), strict=True):
                seconds = timed(work)
                if number > 0:  # the first warms up
                    side.append(seconds)
        ours, theirs = map(statistics.median, times)
        pairs = [a / b for a, b in zip(*times, strict=True)]
        row |= {
            "ratio": round(ours / theirs, 4),
            "lowest": round(min(pairs), 4),
            "highest": round(max(pairs), 4),
            "seconds": round(ours, 4),
            "other_seconds": round(theirs, 4),
        }
    after = ceilings()
    drift = max(abs(after[name] / before[name] - 1) for name in before)
    load = max(load, os.getloadavg()[0])
    return row | {
        # A neighbour that runs all the while leaves no drift.
        "rejected": drift > LARGEST_DRIFT
        or (load > torch.get_num_threads() + OTHERS_LOAD and not ratio.own_load),
        "drift": round(drift, 3),
        "gflops": {name: round(value) for name, value in after.items()},
        "load": round(load, 2),
        "machine": machine(),
        "shape": shape or "SmolLM2-135M",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def timed(work: Work) -> float:
    """Seconds, the device's queue included."""
    started = time.perf_counter()
    work()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def ceilings() -> dict[str, float]:
    """Products of square matrices a second, in 10^9 floating-point operations; best of ten."""
    found = {}
    size = 2048 if DEVICE.type == "cpu" else 8192
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        a, b = torch.randn(2, size, size, device=DEVICE).to(dtype)
        best = min(timed(lambda a=a, b=b: a @ b) for _ in range(10))  # type: ignore[misc]
        found[name] = 2 * size**3 / best / 1e9
    return found


def machine() -> str:
    """The device in words."""
    if DEVICE.type == "cuda":
        return torch.cuda.get_device_name()
    return processor()


# The loss.


def loss_inputs(rows: int, size: int, width: int, rank: int) -> tuple[Tensor, Head, Tilt]:
    """Random hidden states, a frozen head, and a target of another model and a low-rank R."""
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(DEVICE)

    hidden = some(rows, width).requires_grad_()
    head = Head(weight_VD=some(size, width, scale=0.1), bias_V=None, bf16_valued=False)
    tilt = Tilt(
        hidden_MD=hidden.detach() + some(rows, width, scale=0.05),
        head=head,
        factors_MJR=some(rows, 1, rank),
        offset_MJ=some(rows, 1) + 3,
        tokens_JVR=some(1, size, rank, scale=0.1),
        prior_JV=-some(1, size).abs(),
        limit=15.0,
        floor_M=None,
        weights_M=torch.rand(rows, generator=generator).to(DEVICE),
    )
    return hidden, head, tilt


def fused(hidden: Tensor, head: Head, tilt: Tilt) -> None:
    """This package's loss, forward and backward."""
    hidden.grad = None
    fused_losses(hidden, head, tilt=tilt).loss.backward()


def dense(hidden: Tensor, head: Head, tilt: Tilt) -> None:
    """The same as the equations say it, by autograd."""
    hidden.grad = None
    with torch.no_grad():
        evidence = torch.addmm(tilt.prior_JV[0], tilt.factors_MJR[:, 0], tilt.tokens_JVR[0].T)
        evidence += tilt.offset_MJ
        log_q = equations.target_logprobs(head(tilt.hidden_MD), evidence.clamp(-15, 15))
    kl = equations.kl_to_target(log_q, head(hidden))
    (kl * tilt.weights_M).sum().backward()


def products(hidden: Tensor, head: Head, tilt: Tilt) -> None:
    """The four products alone, on the same chunks."""
    rows, size = chunk_rows_for(len(head.weight_VD), DEVICE), len(head.weight_VD)
    buffers = [torch.empty(min(rows, len(hidden)), size, device=DEVICE) for _ in range(3)]
    gradient = torch.empty_like(hidden)
    states, other = hidden.detach(), tilt.hidden_MD
    for start in range(0, len(hidden), rows):
        part = slice(start, start + rows)
        count = len(states[part])
        z, t, u = (buffer[:count] for buffer in buffers)
        torch.mm(states[part], head.weight_VD.T, out=z)
        torch.mm(other[part], head.weight_VD.T, out=t)
        torch.mm(tilt.factors_MJR[part, 0], tilt.tokens_JVR[0].T, out=u)
        torch.mm(z, head.weight_VD, out=gradient[part])


def loss_rows(shape: str | None) -> list[Ratio]:
    """Fused against dense, against its products, and their memory."""
    size, width = (VOCABULARY, SHAPES[shape]["hidden_size"]) if shape else (49_152, 768)
    inputs = loss_inputs(1024, size, width, 64)
    return [
        Ratio(
            name="loss / autograd on dense logits",
            ours=lambda: fused(*inputs),
            theirs=lambda: dense(*inputs),
            must=0.85,
            aim=0.65,
        ),
        Ratio(
            name="loss / its products alone",
            ours=lambda: fused(*inputs),
            theirs=lambda: products(*inputs),
            must=1.30,
            aim=1.12,
        ),
        Ratio(
            name="peak memory of the loss / of dense logits (4,096 rows, 50,257 tokens)",
            ours=None,
            theirs=None,
            value=lambda: _peak("fused") / _peak("dense"),
            must=1 / 12,
            aim=1 / 20,
        ),
    ]


def _peak(which: str) -> float:
    """Bytes that a process of its own needs for one loss."""
    command = [sys.executable, __file__, "--peak", which]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _peak_here(which: str) -> int:
    inputs = loss_inputs(4096, 50_257, 768, 64)
    work = {"fused": fused, "dense": dense}[which]
    held, peak = held_memory(DEVICE), peak_during(lambda: work(*inputs), DEVICE)
    if held is None or peak is None:
        raise SystemExit("this system does not tell how much memory a process takes")
    return peak - held


# The sampler.


def random_model(shape: str, config: Config, *, precision: str) -> LLM:
    """Random weights of a known size."""
    sizes = {"num_attention_heads": 14 if shape == "0.5b" else 12, "num_key_value_heads": 2}
    settings_ = Qwen2Config(**SHAPES[shape], **sizes, vocab_size=VOCABULARY)
    module = Qwen2ForCausalLM(settings_).to(torch.bfloat16).to(DEVICE)  # type: ignore[arg-type]
    module.requires_grad_(requires_grad=False)
    bf16 = precision == "bf16"
    llm = LLM(module, byte_tokenizer(), config=config.llm, peft_model=None, bf16=bf16)
    return tried_out(llm)


def sampling_rows(shape: str | None) -> list[Ratio]:
    """Against `generate` in float32 and in bfloat16."""
    rows = []
    for precision, name, must, aim in (
        ("fp32", "float32", 0.45, 0.33),
        ("bf16", "bfloat16", 0.7, 0.5),
    ):
        config = compose([f"trainer.precision={precision if shape is None else 'bf16'}"])
        parts = None if shape else build_parts(config, Silent(), StopRequest())
        if parts is not None:
            texts = [prompt.token_ids for prompt in parts.prompts.training[:PROMPTS]]
        else:
            texts = [tuple(range(100, 120 + i % 5)) for i in range(PROMPTS)]
        # Ours is what a run does on this machine; the other is asked for its own precision.
        own = compose([])
        llm = (
            random_model(shape, own, precision="bf16")
            if shape
            else load_llm(own.llm, load_tokenizer(own.llm), precision="auto", seed=0)
        ).frozen()
        other = _bare(config, shape, name)
        uniforms = torch.rand(len(texts) * SAMPLES, NEW_TOKENS, dtype=torch.float64).to(DEVICE)
        rows.append(
            Ratio(
                name=f"sampling / generate in {name} (16 prompts x 16, 20 tokens)",
                ours=lambda llm=llm, texts=texts, u=uniforms: decode(llm, texts, u),  # type: ignore[misc]
                theirs=lambda other=other, texts=texts: generate(other, texts, SAMPLES),  # type: ignore[misc]
                must=must,
                aim=aim,
            )
        )
    return rows


def _bare(config: Config, shape: str | None, dtype: str) -> PreTrainedModel:
    """A model as transformers loads it."""
    if shape:
        return random_model(shape, config, precision="bf16").module.to(getattr(torch, dtype))  # type: ignore[no-any-return]
    from transformers import AutoModelForCausalLM

    from constrained_ft.resources import resolve_model

    path = resolve_model(config.llm.model_name_or_path, None)
    module: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype)
    )
    return module.eval()


@torch.no_grad()
def generate(module: PreTrainedModel, prompts: Sequence[Sequence[int]], samples: int) -> Tensor:
    """transformers' own sampling, to the full length."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in prompts], device=DEVICE)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=DEVICE)
    found: Tensor = module.generate(  # type: ignore[operator]
        ids,
        attention_mask=mask,
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        num_return_sequences=samples,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=0,
    )
    return found


# The update, and a whole iteration.


def step_rows(_: str | None) -> list[Ratio]:
    """One optimizer step of the default run, the padding of an iteration's, and one iteration."""
    config = compose([])
    parts = build_parts(config, Silent(), StopRequest())
    target = learn_target(parts, config, parts.llm.frozen(), 1)
    rows = torch.arange(config.trainer.rollouts_per_step)
    batch = parts.corpus.batch(0, config.trainer.per_device_train_batch_size, config.seed)
    prompts = target.num_prompts / config.trainer.steps_per_iteration

    def ours() -> None:
        parts.optimization.optimizer.zero_grad()
        with parts.llm.training():
            backward_of_step(parts.llm, target, rows, [[batch]], config.trainer, prompts)
        parts.optimization.optimizer.step()

    def computed(work: Work) -> tuple[int, int]:
        """Tokens and places of the trunk's passes."""
        slots = parts.llm.slots
        used, total = slots.used, slots.total
        work()
        return slots.used - used, slots.total - total

    tokens, _ = computed(ours)
    all_tokens, all_places = computed(lambda: update_llm(parts, target, config, 1))
    bare = build_parts(compose(["llm.attn_implementation=sdpa"]), Silent(), StopRequest())
    ids = torch.arange(tokens // 64 * 64, device=DEVICE).remainder(4000).view(-1, 64) + 100

    def theirs() -> None:
        bare.optimization.optimizer.zero_grad()
        bare.llm.module.train()
        with bare.llm.autocast():
            bare.llm.module(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        bare.optimization.optimizer.step()

    return [
        Ratio(
            name="update step / bare forward, backward and AdamW on as many tokens",
            ours=ours,
            theirs=theirs,
            must=1.35,
            aim=1.15,
        ),
        Ratio(
            name="padding of an update step",
            ours=None,
            theirs=None,
            value=lambda: 1 - all_tokens / all_places,
            must=0.05,
            aim=0.02,
        ),
        _iteration_row(parts, config, target),
    ]


def _iteration_row(parts: Parts, config: Config, target: Target) -> Ratio:
    """An alternating iteration against bare generation and bare training, in float32."""
    parts.optimization = build_optimization(parts.llm, config.trainer)
    fp32 = compose(["trainer.precision=fp32", "llm.attn_implementation=sdpa"])
    bare = build_parts(fp32, Silent(), StopRequest())
    plain = _bare(plain_fp32(config), None, "float32")
    texts = [prompt.token_ids for prompt in target.rollouts.prompts]
    number = [0]

    def ours() -> None:
        number[0] += 1
        learned = learn_target(parts, config, parts.llm.frozen(), number[0])
        learned = with_fresh_reference(parts, learned, config, number[0])
        update_llm(parts, learned, config, number[0])

    rollouts = config.trainer.rollouts_per_step
    prompt = max(map(len, texts))
    said = torch.full((rollouts, prompt + NEW_TOKENS), 100, device=DEVICE)
    rows = [
        parts.corpus.batch(i, config.trainer.per_device_train_batch_size, config.seed)
        for i in range(config.trainer.steps_per_iteration)
    ]
    corpus = [torch.full((len(batch), max(len(r.token_ids) for r in batch)), 100) for batch in rows]

    def theirs() -> None:
        samples = config.prompts.samples_per_prompt
        per_batch = config.sampler.batch_size // samples
        for start in range(0, len(texts), per_batch):
            generate(plain, texts[start : start + per_batch], samples)
        bare.llm.module.train()
        for batch in corpus:
            bare.optimization.optimizer.zero_grad()
            for ids in (said, batch.to(DEVICE)):
                bare.llm.module(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            bare.optimization.optimizer.step()

    return Ratio(
        name="alternating iteration / bare generate, forward and backward in float32",
        ours=ours,
        theirs=theirs,
        must=0.70,
        aim=0.50,
    )


def plain_fp32(config: Config) -> Config:
    """The model without an adapter."""
    return config.model_copy(update={"llm": plain_config(config.llm.model_name_or_path)})


GROUPS: dict[str, Callable[[str | None], list[Ratio]]] = {
    "loss": loss_rows,
    "sampling": sampling_rows,
    "step": step_rows,
    "scoring": scoring_rows,
    "overlap": overlap_rows,
    "service": service_rows,
    "history": history_rows,
}
RANDOM = ("loss", "sampling")
"""Groups that a model of random weights is enough for."""


def render() -> None:
    """Write the newest row of each ratio, machine and shape into the page."""
    newest: dict[tuple[str, str, str], dict[str, Any]] = {}
    for line in ROWS_FILE.read_text().splitlines():
        row = json.loads(line)
        if not row["rejected"]:
            newest[row["name"], row["machine"], row["shape"]] = row
    lines = ["| what | ratio | spread | must | aim | machine | date |", "| --- " * 7 + "|"]
    for (name, where, shape), row in newest.items():
        spread = f"{row['lowest']:.3g}–{row['highest']:.3g}" if "lowest" in row else "–"
        lines.append(
            f"| {name} | **{row['ratio']:.3g}** | {spread} | {row['must']:.3g} | {row['aim']:.3g} "
            f"| {where}, {shape}, torch {row['torch']} | {row['date']} |"
        )
    page = PAGE.read_text()
    before, _, rest = page.partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    PAGE.write_text("\n".join([before + MARKS[0], "", *lines, "", MARKS[1] + after]))


if __name__ == "__main__":
    main()
