"""What may have been meant by a name that is not known: a near one, or what other tools call it."""

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path

from constrained_ft.keys import ANY_NAME, keys_of_schema

# What other tools call it. The value is our key, or a sentence where there is no such key.
FOREIGN_NAMES = {
    "base_model": "llm.model_name_or_path",
    "model": "llm.model_name_or_path",
    "model_path": "llm.model_name_or_path",
    "model_name": "llm.model_name_or_path",
    "pretrained_model_name_or_path": "llm.model_name_or_path",
    "checkpoint_dir": "llm.model_name_or_path",
    "torch_dtype": "llm.dtype",
    "model_dtype": "llm.dtype",
    "flash_attention": "llm.attn_implementation",
    "flash_attn": "llm.attn_implementation",
    "enable_gradient_checkpointing": "llm.gradient_checkpointing",
    "enable_activation_checkpointing": "llm.gradient_checkpointing",
    "peft": "llm.lora",
    "use_peft": "llm.lora (null trains all weights)",
    "lora_r": "llm.lora.r",
    "lora_rank": "llm.lora.r",
    "lora_alpha": "llm.lora.alpha",
    "lora_dropout": "llm.lora.dropout",
    "lora_target": "llm.lora.target_modules",
    "lora_target_modules": "llm.lora.target_modules",
    "lora_target_linear": "llm.lora.target_modules=all-linear",
    "lr": "trainer.learning_rate",
    "wd": "trainer.weight_decay",
    "batch_size": "trainer.per_device_train_batch_size",
    "micro_batch_size": "trainer.per_device_train_batch_size",
    "micro_batch_size_per_gpu": "trainer.per_device_train_batch_size",
    "train_batch_size": "trainer.per_device_train_batch_size",
    "grad_accum": "trainer.gradient_accumulation_steps",
    "accumulate_grad_batches": "trainer.gradient_accumulation_steps",
    "lr_scheduler_type": "trainer.lr_scheduler",
    "lr_warmup_steps": "trainer.warmup_steps",
    "num_warmup_steps": "trainer.warmup_steps",
    "warmup_ratio": "trainer.warmup_steps (a number of steps)",
    "max_norm": "trainer.max_grad_norm",
    "clip_grad": "trainer.max_grad_norm",
    "clip_grad_norm": "trainer.max_grad_norm",
    "gradient_clip_val": "trainer.max_grad_norm",
    "bf16": "trainer.precision=bf16",
    "fp16": "trainer.precision (bf16 or fp32)",
    "mixed_precision": "trainer.precision",
    "lambda": "trainer.kl_weight",
    "kl_coef": "trainer.kl_weight",
    "kl_loss_coef": "trainer.kl_weight",
    "init_kl_coef": "trainer.kl_weight",
    "beta": "trainer.kl_weight, the weight of the KL (constraint.beta is the tilt)",
    "max_steps": "trainer.iterations times trainer.steps_per_iteration",
    "num_train_epochs": "trainer.iterations times trainer.steps_per_iteration",
    "num_epochs": "trainer.iterations times trainer.steps_per_iteration",
    "epochs": "trainer.iterations times trainer.steps_per_iteration",
    "sequence_len": "data.max_length",
    "cutoff_len": "data.max_length",
    "max_seq_len": "data.max_length",
    "max_seq_length": "data.max_length",
    "block_size": "data.max_length",
    "dataset": "data.path (a file) or data.name (a hub dataset)",
    "datasets": "data.sources",
    "dataset_name": "data.name",
    "dataset_path": "data.path",
    "train_file": "data.path",
    "train_files": "data.path",
    "val_set_size": "data.validation_share",
    "max_completion_length": "prompts.max_new_tokens",
    "response_length": "prompts.max_new_tokens",
    "max_response_length": "prompts.max_new_tokens",
    "num_generations": "prompts.samples_per_prompt",
    "rollout_n": "prompts.samples_per_prompt",
    "num_return_sequences": "prompts.samples_per_prompt",
    "reward_model": "constraint.scorer",
    "reward_funcs": "constraint.scorer (kind=function, path=FILE.py:FUNCTION)",
    "reward_function": "constraint.scorer (kind=function, path=FILE.py:FUNCTION)",
    "delta": "constraint.threshold",
    "output": "output_dir",
    "out_dir": "output_dir",
    "run_name": "name",
    "experiment_name": "name",
    "random_seed": "seed",
    "target_kl": "guard.kl_limit",
}


def unknown_key(path: str, config_dirs: Sequence[Path] = ()) -> str:
    """The message about a key that the schema does not know: where it is set, what was meant."""
    places = [
        str(f)
        for folder in config_dirs
        for f in sorted(folder.rglob("*.yaml"))
        if _sets(f, folder, path)
    ]
    where = f" (in {', '.join(places)})" if places else ""
    return f"unknown key {path}{where}; {_suggestion(path)}"


def _suggestion(path: str) -> str:
    """What may have been meant by a path that the schema does not know."""
    *parents, leaf = path.split(".")
    beside = closest(leaf, _siblings(parents))
    if beside is not None:
        return f"did you mean {'.'.join([*parents, beside])}?"
    foreign = closest(leaf.lower(), FOREIGN_NAMES)
    if foreign is not None:
        return f"here it is called {FOREIGN_NAMES[foreign]}"
    keys = [key for key in keys_of_schema() if not path.startswith(key + ".")]
    same_leaf = [key for key in keys if key.rsplit(".", 1)[-1] == leaf and ANY_NAME not in key]
    if same_leaf:
        return f"did you mean {' or '.join(same_leaf[:3])}?"
    by_leaf = {key.rsplit(".", 1)[-1]: key for key in reversed(keys)}
    near = closest(path, keys) or by_leaf.get(closest(leaf, by_leaf) or "")
    return f"did you mean {near}?" if near else "`cft config list` shows every key"


def _siblings(parents: list[str]) -> list[str]:
    prefix = "".join(part + "." for part in parents)
    return [
        key.removeprefix(prefix)
        for key in keys_of_schema()
        if key.startswith(prefix) and "." not in key.removeprefix(prefix)
    ]


def closest(word: str, words: Sequence[str] | Mapping[str, object]) -> str | None:
    """The word nearest to a misspelt one, if any is near."""
    found = difflib.get_close_matches(word, [*words], n=1, cutoff=0.7)
    return found[0] if found else None


def _sets(file: Path, folder: Path, path: str) -> bool:
    """Whether a YAML file of the user's sets a key."""
    from omegaconf import DictConfig, OmegaConf

    group = ".".join(file.relative_to(folder).parts[:-1])
    is_global = "@package _global_" in file.read_text().partition("\n")[0]
    tree = OmegaConf.load(file)
    inside = path if is_global or not group else path.removeprefix(f"{group}.")
    return (
        isinstance(tree, DictConfig)
        and OmegaConf.select(tree, inside, throw_on_missing=False) is not None
    )
