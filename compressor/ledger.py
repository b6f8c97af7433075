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

from compressor.plan import ActionMenu, Plan, Score

WORST_KL = 1e6
"""Stands for a KL that is not finite, which a journal cannot hold."""


class Ledger:
    """Scores of one policy in one search, in the order in which they were told.

    Args:
        path: the journal file; other studies in it are left alone.
        study: name of this policy and search.
        menu: the actions of every site.
    """

    def __init__(self, path: Path, study: str, menu: ActionMenu):
        path.parent.mkdir(parents=True, exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            storage = JournalStorage(JournalFileBackend(str(path)))
        self._study = optuna.create_study(study_name=study, storage=storage, direction="minimize", load_if_exists=True)
        self._actions = {name: {str(action): action for action in actions} for name, actions in menu.items()}
        self._distributions: dict[str, BaseDistribution] = {
            name: CategoricalDistribution(list(labels)) for name, labels in self._actions.items()
        }

    def entries(self) -> list[tuple[Plan, Score]]:
        """Everything that was added, first to last."""
        found = []
        for trial in self._study.get_trials(deepcopy=False):
            plan = Plan(tuple((name, labels[trial.params[name]]) for name, labels in self._actions.items()))
            found.append((plan, Score(**trial.user_attrs["score"])))
        return found

    def add(self, plan: Plan, score: Score) -> None:
        """Append one scored plan; on disk when this returns."""
        trial = optuna.trial.create_trial(
            params={name: str(action) for name, action in plan.items()},
            distributions=self._distributions,
            value=min(score.kl, WORST_KL),
            user_attrs={"score": asdict(score)},
        )
        self._study.add_trial(trial)
