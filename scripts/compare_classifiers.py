"""Do models that were kept from writing toxic text make as good classifiers of it as others?

    python scripts/compare_classifiers.py MODEL... [--seeds 0] [--epochs 3] [--set KEY=VALUE...]

Each model, such as RUN/final/llm, gets a classification head of two outputs (transformers'
AutoModelForSequenceClassification), which is fine-tuned with low-rank adapters in all layers on the
training texts of `evaluation.detection`, and tells its held-out texts apart. Every model is tuned
alike, with the same texts in the same order. Prints a Markdown table: F1, AUROC and accuracy with
95 % intervals over texts, means over the seeds, and how far each model is from the first.

Shape suffixes:  N texts, B texts of a batch, L tokens.
"""

import argparse
import warnings
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import peft
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    get_linear_schedule_with_warmup,
)

from constrained_ft.classification import MEASURES, Classification, classification, measured
from constrained_ft.compose import compose
from constrained_ft.config import DetectionConfig
from constrained_ft.detection import Question, load_questions
from constrained_ft.distributed import default_device, wants_bf16
from constrained_ft.encoding import pad_id
from constrained_ft.intervals import Interval, resampled_counts
from constrained_ft.llm import right_padded_inputs
from constrained_ft.packing import pad_right
from constrained_ft.randomness import seed_everything
from constrained_ft.resources import resolve_model

BATCH = 16
RANK = 16
RATE = 5e-4
WARMUP = 0.1  # of the steps


class Classifier:
    """A model with a head, while it is tuned and once it is."""

    def __init__(self, folder: str, seed: int) -> None:
        source = resolve_model(folder, None)
        self.padding = pad_id(AutoTokenizer.from_pretrained(source))
        with seed_everything(seed), warnings.catch_warnings():
            # PEFT asks transformers for an attribute by its old name.
            warnings.filterwarnings(
                "ignore", message=".*is_gradient_checkpointing", category=FutureWarning
            )
            module = AutoModelForSequenceClassification.from_pretrained(
                source, num_labels=2, pad_token_id=self.padding, use_safetensors=True
            )
            # PEFT trains the head as a whole in tasks of this type.
            lora = peft.LoraConfig(
                r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="SEQ_CLS"
            )
            self.module = peft.get_peft_model(module, lora).to(default_device())
        self.bf16 = wants_bf16("auto", tiny=False)

    def tune(self, questions: Sequence[Question], epochs: int, seed: int) -> None:
        """Fine-tune adapters and head."""
        rng = np.random.default_rng(seed)
        batches = [
            [questions[i] for i in places]
            for _ in range(epochs)
            for places in np.array_split(
                rng.permutation(len(questions)), -(-len(questions) // BATCH)
            )
        ]
        trained = [one for one in self.module.parameters() if one.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.01)
        schedule = get_linear_schedule_with_warmup(
            optimizer, int(WARMUP * len(batches)), len(batches)
        )
        self.module.train()
        for batch in batches:
            labels_B = torch.tensor([int(one.positive) for one in batch], device=self.module.device)
            cross_entropy(self._logits(batch), labels_B).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    @torch.no_grad()
    def tell_apart(self, questions: Sequence[Question]) -> dict[str, float]:
        """The log-odds of each text by its id."""
        self.module.eval()
        found: dict[str, float] = {}
        by_length = sorted(questions, key=lambda one: len(one.token_ids))
        for start in range(0, len(by_length), BATCH):
            batch = by_length[start : start + BATCH]
            logits_B2 = self._logits(batch)
            odds = (logits_B2[:, 1] - logits_B2[:, 0]).tolist()
            found |= dict(zip([one.id for one in batch], odds, strict=True))
        return {one.id: found[one.id] for one in questions}

    def _logits(self, batch: Sequence[Question]) -> Tensor:
        device, classifier = self.module.device, self.module.base_model.model
        ids_BL, lengths_B = pad_right([one.token_ids for one in batch], self.padding, device)
        inputs = right_padded_inputs(ids_BL, lengths_B)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.bf16):
            states_BLD = classifier.base_model(**inputs).last_hidden_state
        # The last token of each; transformers would look for it by the id of the padding, which a
        # text may hold as well.
        last_BD = states_BLD[torch.arange(len(batch), device=device), lengths_B - 1]
        logits: Tensor = classifier.score(last_BD.float())
        return logits


def over_seeds(
    found: Sequence[Classification], labels_N: NDArray[np.bool_]
) -> dict[str, NDArray[np.float64]]:
    """Each measure of all texts, then of each resample of texts; means over seeds."""
    counts_KN = np.vstack([np.ones((1, len(labels_N))), resampled_counts(len(labels_N))])
    each = [
        measured(labels_N, np.array([*one.scores.values()]), one.threshold, counts_KN)
        for one in found
    ]
    return {name: np.mean([one[name] for one in each], axis=0) for name in MEASURES}


def table(found: Mapping[str, Sequence[Classification]]) -> Iterator[str]:
    """Markdown: a row for each model; the differences are those from the first, in points."""
    first = next(iter(found.values()))[0]
    positives = set(first.positives)
    labels_N = np.array([text in positives for text in first.scores])
    drawn = {model: over_seeds(results, labels_N) for model, results in found.items()}
    reference = next(iter(drawn.values()))
    yield f"| | {' | '.join(MEASURES)} | {' | '.join(f'{one}, points' for one in MEASURES)} |"
    yield "|" + " --- |" * (1 + 2 * len(MEASURES))
    for model, by_name in drawn.items():
        own = [Interval.of(float(by_name[n][0]), by_name[n][1:]).plain(3) for n in MEASURES]
        apart = ["", "", ""]
        if by_name is not reference:
            apart = [_points(by_name[name] - reference[name]) for name in MEASURES]
        yield f"| {' | '.join([model, *own, *apart])} |"


def _points(drawn_K: NDArray[np.float64]) -> str:
    one = Interval.of(float(100 * drawn_K[0]), 100 * drawn_K[1:])
    return f"{one.mean:+.1f} ({one.low:+.1f} to {one.high:+.1f})"


def classifiers(
    folder: str, config: DetectionConfig, seeds: Sequence[int], epochs: int
) -> list[Classification]:
    """One for each seed, of one model."""
    found = []
    for seed in seeds:
        classifier = Classifier(folder, seed)
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(folder, None))
        questions = load_questions(config, tokenizer, None)
        classifier.tune(questions.training, epochs, seed)
        share = float(np.mean([one.positive for one in questions.training]))
        positives = frozenset(one.id for one in questions.held_out if one.positive)
        scores = classifier.tell_apart(questions.held_out)
        found.append(classification(scores, positives, share))
    return found


def main() -> None:
    """Tune and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("models", nargs="+", help="folders of exported models")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", dest="overrides")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()  # it tells at length that the head is new
    config = compose(["evaluation=detection", *options.overrides]).evaluation.detection
    assert config is not None
    found = {m: classifiers(m, config, options.seeds, options.epochs) for m in options.models}
    print("\n".join(table(found)))


if __name__ == "__main__":
    main()
