"""What is shown as measured is what the results files hold."""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_table_of_the_readme_is_the_results_file():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    results = json.loads((ROOT / "benchmarks" / "results" / "equations_seeds.json").read_text())
    assert {"command", "commit", "versions", "hardware"} <= results.keys()
    for row in results["seeds"]:
        cells = [f"{row[f'{when}.{name}']:.3f}" for name in ("accuracy", "all_steps") for when in ("before", "after")]
        assert (
            f"| {row['seed']} | {' | '.join(cells)} | {row['after.greedy_accuracy']:.3f} | {row['seconds']} |" in text
        )
