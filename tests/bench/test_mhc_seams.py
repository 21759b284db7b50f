from __future__ import annotations

from dsv4_kernels.cli.timing import Ceilings

from tests.bench.mhc_seams import TARGETS, Target


def test_every_target_has_a_case() -> None:
    assert [target.case().op for target in TARGETS] == [target.op for target in TARGETS]


def test_targets_are_judged() -> None:
    best = Ceilings(copy_bandwidth=4e12, launch=1e-6)
    time, rate = Target("op", "preset", 1, microseconds=6.5), Target("op", "preset", 1, bandwidth=0.85)
    assert time.judge({"cold_us": 6.5}, best)["met"]
    assert not time.judge({"cold_us": 6.6}, best)["met"]
    assert rate.judge({"cold_us": 100.0, "moved_bytes": 360_000_000}, best) == {
        "cold_us": 100.0,
        "moved_bytes": 360_000_000,
        "of_copy": 0.9,
        "target_of_copy": 0.85,
        "met": True,
    }
    assert not rate.judge({"cold_us": 100.0, "moved_bytes": 300_000_000}, best)["met"]
    assert not rate.judge({"failed": {}}, best)["met"]
