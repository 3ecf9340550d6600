"""A sample of fuzz_files.py; by hand it ran a hundred thousand."""

from fuzz_files import run


def test_damaged_files_are_merged_or_refused_and_leave_nothing() -> None:
    outcomes = run(300)
    assert sum(outcomes.values()) == 300
    assert outcomes["merged"] > 10 and outcomes["OPLoRAFileError"] > 10 and outcomes["OPLoRAValueError"] > 10
