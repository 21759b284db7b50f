from __future__ import annotations

import json
from pathlib import Path

from tests.bench.expert_parallel import WAYS, main


def test_the_script_measures_every_way(tmp_path: Path) -> None:
    main([str(tmp_path / "report.json"), "--device", "cpu", "--ranks", "2"])
    report = json.loads((tmp_path / "report.json").read_text())
    rows = report["rows"]
    assert [row["tokens"] for row in rows] == [1] * len(WAYS) + [5] * len(WAYS)
    assert all(row["us"] > 0 for row in rows)
    gather, routed, average, fp8, routes = rows[len(WAYS) :]
    # 5 tokens of 128 columns, 3 routes: 512 bytes and 24; a message's row has 256 + 16 + 16, FP8 128 + 16 + 16 + 16.
    assert gather["sent_bytes"] == 5 * (512 + 24)
    assert routed["sent_bytes"] == 5 * (288 + 256)
    assert (average["capacity"], average["sent_bytes"]) == (6, 6 * (288 + 256))
    assert fp8["sent_bytes"] == 6 * (176 + 256)
    assert (routes["capacity"], routes["sent_bytes"]) == (10, 10 * (288 + 256))
    assert all(row["dropped_rows_of_all_calls"] == 0 for row in (gather, routed, average))
