"""Cross-validation: no record is judged by a model that was trained on it."""

from types import SimpleNamespace

import torch

import train_rm


def test_cross_validate_judges_every_record_once_by_a_model_that_never_saw_it(monkeypatch):
    """Ten records in three folds; the second call a fold is on records trained on ("train_...")."""
    trained, judged = [], []
    monkeypatch.setattr(train_rm, "new_model", lambda config, device, frozen: torch.nn.Identity())
    monkeypatch.setattr(train_rm, "fit", lambda model, examples, *rest: trained.append(examples))
    monkeypatch.setattr(train_rm, "judge_preferences",
                        lambda model, records, examples, tokenizer: judged.append(records) or [])
    monkeypatch.setattr(train_rm, "reward_table", lambda judged: {})
    records = list(range(10))
    config = train_rm.Config(data="", model="", out="", folds=3)
    train_rm.cross_validate(config, records, records, None,
                            SimpleNamespace(log=lambda *line: None), "cpu")
    held_out, fitted = judged[0::2], judged[1::2]
    assert sorted(sum(held_out, [])) == records and len(trained) == 3
    for inside, outside, again in zip(trained, held_out, fitted):
        assert sorted(inside + outside) == records
        assert set(again) <= set(inside) and len(again) == len(outside)
