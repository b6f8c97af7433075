"""The ledger: every plan that was ever scored, in an Optuna journal that optuna-dashboard opens.

One study a policy and search; one trial a score: its parameters are the sites' actions, its value the KL.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from compressor.plan import Action, ActionMenu, Plan, Score

WORST_KL = 1e6
"""Stands for a KL that is not finite, which a journal cannot hold."""


class Ledger:
    """Scores of one policy in one search, in the order in which they were told.

    Args:
        path: the journal file; other studies in it are left alone.
        study: name of this policy and search.
        menu: the actions of every site.
        comparable: a key of what the scores depend on beside the plan: teacher, texts, menu.
    """

    def __init__(self, path: Path, study: str, menu: ActionMenu, comparable: str = ""):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._study = optuna.create_study(
            study_name=study, storage=_storage(path), direction="minimize", load_if_exists=True
        )
        self._study.set_user_attr("comparable", comparable)
        self._actions = _labels(menu)
        self._distributions: dict[str, BaseDistribution] = {
            name: CategoricalDistribution(list(labels)) for name, labels in self._actions.items()
        }

    def entries(self) -> list[tuple[Plan, Score]]:
        """Everything that was added, first to last."""
        return _entries(self._study, self._actions)

    def add(self, plan: Plan, score: Score) -> None:
        """Append one scored plan; on disk when this returns."""
        trial = optuna.trial.create_trial(
            params={name: str(action) for name, action in plan.items()},
            distributions=self._distributions,
            value=score.kl if score.kl < WORST_KL else WORST_KL,
            user_attrs={"score": asdict(score)},
        )
        self._study.add_trial(trial)


def comparable_entries(path: Path, menu: ActionMenu, comparable: str) -> list[tuple[Plan, Score]]:
    """Every score of all studies in a journal that were made with the same key, each once."""
    storage = _storage(path)
    found: dict[tuple[Plan, int | None], Score] = {}
    for name in optuna.get_all_study_names(storage):
        study = optuna.load_study(study_name=name, storage=storage)
        if study.user_attrs.get("comparable") == comparable:
            found |= {(plan, score.part): score for plan, score in _entries(study, _labels(menu))}
    return [(plan, score) for (plan, _), score in found.items()]


def _storage(path: Path) -> JournalStorage:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return JournalStorage(JournalFileBackend(str(path)))


def _labels(menu: ActionMenu) -> dict[str, dict[str, Action]]:
    return {name: {str(action): action for action in actions} for name, actions in menu.items()}


def _entries(study: optuna.Study, actions: dict[str, dict[str, Action]]) -> list[tuple[Plan, Score]]:
    found = []
    for trial in study.get_trials(deepcopy=False):
        plan = Plan(tuple((name, labels[trial.params[name]]) for name, labels in actions.items()))
        score = trial.user_attrs["score"]
        found.append((plan, Score(**score | {"by_part": tuple(score["by_part"])})))
    return found
