"""What a sweep tries, before anything is trained."""
from __future__ import annotations

import pytest

from pipelines.settings import RunSettings, UserError, override_settings
from pipelines.sweep import _combinations, _present


def test_the_present_settings_come_first_and_no_two_trials_are_alike():
    settings = RunSettings()
    present = _present(settings)
    trials = _combinations(settings.sweep.space, present, 12, seed=0)
    assert trials[0] == present and len(trials) == 12
    assert len({tuple(sorted(t.items())) for t in trials}) == 12
    assert trials == _combinations(settings.sweep.space, present, 12, seed=0)
    for trial in trials:
        override_settings(settings, trial)


def test_a_small_space_is_tried_whole():
    space = {"loss.cost_class": [2.0, 1.0]}
    assert len(_combinations(space, {"loss.cost_class": 2.0}, 10, 0)) == 2


@pytest.mark.parametrize(
    ("key", "words"),
    [("loss.cost_clas", "did you mean 'loss.cost_class'"), ("loss", "'loss'"), ("los.cost_class", "'loss'")],
)
def test_a_misspelt_setting_in_the_space_is_one_sentence(key, words):
    settings = override_settings(RunSettings(), {"sweep.space": {key: [1.0]}})
    with pytest.raises(UserError, match=words):
        _present(settings)
