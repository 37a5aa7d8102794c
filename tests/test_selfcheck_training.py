"""The training half of the selfcheck holds, and would not if the training were wrong."""

from collections.abc import Sequence

import pytest
import torch
from small import LENGTH, LETTERS, TABLE

from constrained_ft import selfcheck
from constrained_ft.compose import compose
from constrained_ft.progress import Silent
from constrained_ft.tabular import every_completion, table_parts
from constrained_ft.target import states_of

LESS = ("prompts.samples_per_prompt=32", "auxiliary.max_epochs=10")
HALF = ("prompts.samples_per_prompt=256", "auxiliary.patience=3")


class Table(Silent):
    def __init__(self) -> None:
        self.rows: Sequence[Sequence[str]] = []

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        self.rows = rows


def kl_after_training(schedule: str) -> float:
    return selfcheck.training_checks(schedule, Silent())[1].error


def test_the_table_says_what_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    # Little data: R is off, and the LLM does not get to the target.
    monkeypatch.setattr(selfcheck, "_TRAINING", (*selfcheck._TRAINING, *LESS))
    shown = Table()
    assert not selfcheck.selfcheck(shown)
    holds = {claim: verdict for claim, _, _, verdict in shown.rows}
    assert len(holds) == len(shown.rows) == 17
    failed = [claim for claim, verdict in holds.items() if verdict == "NO"]
    assert failed
    assert all("rollouts" in claim or "without a corpus" in claim for claim in failed)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["alternating", "overlapped"])
def test_the_real_training_reaches_what_enumeration_says(schedule: str) -> None:
    for check in selfcheck.training_checks(schedule, Silent()):
        assert check.passed, check


@pytest.mark.slow
def test_a_stale_r_on_a_fresh_reference_asks_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "_TRAINING", (*selfcheck._TRAINING, *HALF))
    matched = kl_after_training("overlapped")
    update = selfcheck.update_llm

    def fresh(parts, target, config, iteration):
        if target.iteration < iteration:
            target = target.with_reference(parts.llm.frozen())
        return update(parts, target, config, iteration)

    monkeypatch.setattr(selfcheck, "update_llm", fresh)
    assert kl_after_training("overlapped") > 5 * matched


def test_a_table_says_every_completion_once_with_probabilities_that_sum_to_one() -> None:
    parts = table_parts(LETTERS, LENGTH, compose([*TABLE]))
    every = every_completion(parts.llm, LENGTH)
    assert len(set(every.texts)) == len(every.texts) == 1 + 3 + 9 + 27
    assert float(selfcheck._probs(parts.llm, every).sum()) == pytest.approx(1, abs=1e-6)
    # The state of a prefix says which one it is.
    hidden_NTD = states_of(parts.llm.frozen(), every)
    marks = hidden_NTD[every.mask_NT][:, 4:]
    rows = torch.cat([hidden_NTD[every.mask_NT][:, :4], marks.argmax(-1, keepdim=True)], -1)
    assert len(rows.unique(dim=0)) == len(marks.unique(dim=0)) == 1 + 3 + 9
