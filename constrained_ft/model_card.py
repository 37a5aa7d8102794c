"""The model card of a finished run: what it was trained on, towards what, and what came out.

It names no folder and no date, so that the same run writes the same card anywhere.
"""

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from constrained_ft import results
from constrained_ft.config import Config, SourceConfig, TrainerConfig
from constrained_ft.loading import TINY
from constrained_ft.resources import WHEEL
from constrained_ft.results import Evaluation
from constrained_ft.run_folder import write_atomically
from constrained_ft.sources import sources_of

_PACKAGES = ("constrained-ft", "torch", "transformers", "peft")
_TOO_LONG = 80  # characters of a source's name
_DIVERGENCES = {
    "forward_kl": "KL",
    "reverse_kl": "reverse KL",
    "jsd": "Jensen-Shannon divergence",
    "tv": "total variation distance",
}


def write_cards(folders: Sequence[Path], evaluations: Sequence[Evaluation], config: Config) -> None:
    """Write the card into the folders of the model that are there."""
    text = model_card(evaluations, config)
    for folder in folders:
        if folder.is_dir():
            write_atomically(folder / "README.md", text)


def model_card(
    evaluations: Sequence[Evaluation],
    config: Config,
    *,
    form: Literal["merged", "adapter"] | None = None,
) -> str:
    """Markdown with the metadata that a hub reads.

    Args:
        evaluations: the base model and the fine-tuned one.
        config: of the run.
        form: of an export, which has its auxiliary with it: the card then says how to load both.
    """
    trainer, constraint, tuned = config.trainer, config.constraint, evaluations[-1]
    columns, rows = results.table(evaluations)
    weights = "all weights" if config.llm.lora is None else f"LoRA of rank {config.llm.lora.r}"
    steps = trainer.iterations * trainer.steps_per_iteration
    asked = [
        f"- {name}: {term.scorer.kind}, satisfied at {term.satisfied_at:g}, asked for in "
        f"{term.threshold:.0%} of completions, {term.labels} labels"
        for name, term in constraint.all_terms().items()
    ]
    judges = [f"- judge: {one}" for one in tuned.judges.values()] or ["- no judge"]
    prompts = (
        ["openings of the corpus"]
        if config.prompts.from_corpus
        else _sources(sources_of(config.prompts, "prompts"))
    )
    lines = [
        *_metadata(config, "peft" if form == "adapter" else "transformers"),
        f"# {config.name}",
        "",
        f"{_short(config.llm.model_name_or_path)}, fine-tuned under a constraint ({weights}).",
        _aim(trainer),
        "",
        *([] if form is None else _use(config, form)),
        "## Data",
        "",
        "The corpus:",
        "",
        *(f"- {one}" for one in _sources(sources_of(config.data, "corpus"))),
        "",
        "Prompts that completions were sampled for:",
        "",
        *(f"- {one}" for one in prompts),
        "",
        *_labels(config),
        "## Constraint",
        "",
        *asked,
        f"- scorer: {tuned.scorer}",
        *judges,
        "",
        "## Results",
        "",
        "On prompts and text that training never saw; 95 % bootstrap intervals over prompts.",
        "",
        "| " + " | ".join(columns) + " |",
        "| --- " * len(columns) + "|",
        *("| " + " | ".join(cell.strip() for cell in row) + " |" for row in rows),
        "",
        "## Limits",
        "",
        "- The constraint is what its scorer says. What the scorer does not see, training did not "
        "lower; a judge of another kind shows some of it.",
        "- The rates are those of these prompts, sampled at temperature 1 with top-p "
        f"{config.evaluation.top_p:g}, completions of at most {config.prompts.max_new_tokens} "
        "tokens. Other prompts, longer texts and attacks were not measured.",
        "- It is no guarantee for any single completion.",
        "",
        "## Reproduce",
        "",
        f"{steps:,} optimizer steps, seed {config.seed}; "
        + ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
        + ". The run's `config.yaml` holds every setting, its `command.sh` the command.",
        "",
    ]
    return "\n".join(lines)


def _aim(trainer: TrainerConfig) -> str:
    """What pulled on the model."""
    filtered = " Corpus rows that violate the constraint were left out." * trainer.filter_corpus
    if trainer.is_plain:
        return f"Nothing but the corpus pulled on it; the constraint was only measured.{filtered}"
    if trainer.trl is not None:
        return (
            f"Beside the corpus, {trainer.trl.algorithm.upper()} of TRL trained it towards the "
            f"constraint (weight {trainer.trl.weight:g}, beta {trainer.trl.beta:g}).{filtered}"
        )
    facts = f"lambda {trainer.kl_weight:g}, {trainer.schedule}"
    if trainer.divergence == "accepted":
        return (
            "Beside the corpus, it was trained on completions of its own in proportion to their "
            f"labels (rejection sampling; {facts}).{filtered}"
        )
    return (
        f"Beside the corpus, the {_DIVERGENCES[trainer.divergence]} to the closest distribution "
        f"that satisfies the constraint was lowered ({facts}; Meng et al. 2024, "
        f"arXiv:2410.05559).{filtered}"
    )


def base_on_a_hub(config: Config) -> str | None:
    """The hub id of the model that was fine-tuned; None where it came from elsewhere."""
    base = config.llm.model_name_or_path
    elsewhere = "://" in base or base.startswith(TINY) or Path(base).expanduser().exists()
    return None if elsewhere else base


def _use(config: Config, form: Literal["merged", "adapter"]) -> list[str]:
    """How to load it, in Python."""
    hub_id = base_on_a_hub(config)
    base = "folder" if form == "merged" else json.dumps(hub_id or "PATH_OF_THE_BASE_MODEL")
    lines = [
        "## Use",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'folder = "PATH"  # this repository, downloaded: huggingface_hub.snapshot_download(ID)',
        *([f"base = {base}"] if form == "adapter" else []),
        f"model = AutoModelForCausalLM.from_pretrained({'folder' if form == 'merged' else 'base'})",
        f"tokenizer = AutoTokenizer.from_pretrained({'folder' if form == 'merged' else 'base'})",
    ]
    if form == "adapter":
        lines += [
            "",
            "from peft import PeftModel",
            "",
            "model = PeftModel.from_pretrained(model, folder)",
        ]
    lines += [
        "```",
        "",
        "With guided decoding, which weighs every token by the auxiliary R in `auxiliary/` as well",
        "(`pip install constrained-ft`):",
        "",
        "```python",
        "from constrained_ft.logits_processor import AuxiliaryLogitsProcessor",
        "",
        "guide = AuxiliaryLogitsProcessor(model, tokenizer, folder)",
        'tokens = tokenizer("The weather today", return_tensors="pt")',
        "said = model.generate(**tokens, do_sample=True, top_k=0, logits_processor=[guide],",
        f"                      max_new_tokens={config.prompts.max_new_tokens})",
        "print(tokenizer.decode(said[0]))",
        "```",
        "",
    ]
    reference = config.llm.model_name_or_path
    if form == "adapter" and reference.startswith(WHEEL):
        lines += [
            "The base comes out of a package; its folder is",
            f'`constrained_ft.resources.resolve_model("{reference}", None)`.',
            "",
        ]
    return lines


def _labels(config: Config) -> list[str]:
    """What the classification head tells, where there is one."""
    if not config.data.has_class_head:
        return []
    asked = [
        f"- whether `{one.label}` is at least {one.positive_from:g}, after "
        f"`{json.dumps(one.template, ensure_ascii=False)}`"
        for source in config.data.sources.values()
        if (one := source.question) is not None and one.by == "head"
    ]
    return [
        "## Labels",
        "",
        "`class_head.safetensors` holds the `weight` of a classification head: the `score.weight`",
        "of transformers' `AutoModelForSequenceClassification` with two labels, the positive one",
        "second. It tells, after the last token:",
        "",
        *dict.fromkeys(asked),
        "",
    ]


def _metadata(config: Config, library: str) -> list[str]:
    named = base_on_a_hub(config)
    return [
        "---",
        f"library_name: {library}",
        "pipeline_tag: text-generation",
        *([f"base_model: {json.dumps(named)}"] if named is not None else []),
        "tags:",
        "- constrained-fine-tuning",
        "- cft",
        "---",
        "",
    ]


def _sources(sources: dict[str, SourceConfig]) -> list[str]:
    return [
        f"{group}: {_short(str(source.path or source.name))}" for group, source in sources.items()
    ]


def _short(name: str) -> str:
    """Without the hash of a wheel; of a path the last part: the rest says nothing elsewhere."""
    name = name.partition("#")[0]
    if "://" not in name and Path(name).is_absolute():
        name = Path(name).name
    return name if len(name) <= _TOO_LONG else f"{name[: _TOO_LONG - 3]}..."
