import pytest

from constrained_ft import equations, selfcheck


def test_every_claim_holds_on_this_machine() -> None:
    for seed in (0, 1):
        for check in selfcheck.equation_checks(seed):
            assert check.passed, check


def test_a_target_towards_violation_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = equations.target_logprobs
    monkeypatch.setattr(equations, "target_logprobs", lambda p, u, floor=0.0: right(p, -u, floor))
    failed = [check.claim for check in selfcheck.equation_checks() if not check.passed]
    assert len(failed) >= 5


def test_an_error_that_is_no_number_does_not_pass() -> None:
    assert not selfcheck.Check(claim="anything", tolerance=1.0, error=float("nan")).passed
