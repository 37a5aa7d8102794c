"""Which operations the default run spends its time on, by torch's profiler.

    python scripts/profile_phases.py [KEY=VALUE ...]

One batch of sampling and one step of the LLM update, each after a warm-up, on the CPU. Let nothing
else run meanwhile.
"""

import sys
import time
from collections.abc import Callable

from constrained_ft.cli.settings import settings

settings.prepare_libraries()

import torch  # noqa: E402
from torch.profiler import ProfilerActivity, profile  # noqa: E402

from constrained_ft.compose import compose  # noqa: E402
from constrained_ft.decoding import decode  # noqa: E402
from constrained_ft.distributed import StopRequest  # noqa: E402
from constrained_ft.finetune import backward_of_step  # noqa: E402
from constrained_ft.parts import build_parts  # noqa: E402
from constrained_ft.progress import Silent  # noqa: E402
from constrained_ft.target import learn_target  # noqa: E402

SHOWN = 15


def main() -> None:
    """Print both tables."""
    config = compose(sys.argv[1:])
    parts = build_parts(config, Silent(), StopRequest())
    llm, size = parts.llm.frozen(), config.prompts
    prompts = parts.prompts.of_iteration(1, size.prompts_per_iteration, config.seed)
    token_ids = [prompt.token_ids for prompt in prompts]
    generator = torch.Generator().manual_seed(config.seed)
    rows = len(prompts) * size.samples_per_prompt
    uniforms_BT = torch.rand(rows, size.max_new_tokens, generator=generator, dtype=torch.float64)
    show(f"sampling, {rows} rows", lambda: decode(llm, token_ids, uniforms_BT))

    target = learn_target(parts, config, llm, 1).with_reference(llm)
    rows_N = torch.arange(min(config.trainer.rollouts_per_step, len(target.share_N)))
    batch = parts.corpus.batch(0, config.trainer.per_device_train_batch_size, config.seed)

    def step() -> None:
        parts.optimization.optimizer.zero_grad()
        with parts.llm.training():
            backward_of_step(parts.llm, target, rows_N, [[batch]], config.trainer, len(rows_N))
        parts.optimization.optimizer.step()

    show(f"update, {len(rows_N)} rollouts and {len(batch)} corpus rows", step)


def show(name: str, work: Callable[[], object]) -> None:
    """Time without the profiler, then the operations."""
    work()
    started = time.perf_counter()
    work()
    print(f"{name}: {time.perf_counter() - started:.2f} s, {torch.get_num_threads()} threads")
    with profile(activities=[ProfilerActivity.CPU]) as found:
        work()
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=SHOWN))


main()
