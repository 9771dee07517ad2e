"""The table of tasks agrees with the flag, with the families and with what clients are told."""

from __future__ import annotations

from sensorium.checkpoint.families import FAMILIES
from sensorium.cli.flags import flags_of
from sensorium.config import LoadConfig
from sensorium.serving.tasks import TASK_FLAGS, TASKS


def test_every_value_of_the_flag_has_a_row() -> None:
    flag = next(flag for flag in flags_of(LoadConfig) if flag.field == "task")
    assert set(flag.choices or ()) == set(TASK_FLAGS)


def test_rows_name_tasks_and_families_that_exist() -> None:
    assert {task for row in TASK_FLAGS.values() for task in row.tasks} == set(TASKS)
    known = {task for family in FAMILIES.values() for task in family.tasks}
    every = set(TASK_FLAGS["auto"].families)
    assert known <= every
    assert all(set(row.families) <= every for row in TASK_FLAGS.values())
    assert set(TASK_FLAGS["pooling"].families) == every - {"generate", "transcribe"}
