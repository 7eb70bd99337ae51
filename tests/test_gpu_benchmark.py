"""benchmarks/gpu.sh, which measures on a machine with a GPU: its code runs here on a CPU, on tiny models."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "gpu.sh"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable, "TRITON_INTERPRET": "1"}
    return subprocess.run(["bash", str(SCRIPT), *arguments], capture_output=True, text=True, env=environment)


def test_the_stages_run_on_a_cpu_and_go_on_where_they_stopped(tmp_path):
    output = ["--smoke", "--device", "cpu", "--output", str(tmp_path)]
    (tmp_path / "numerics.json").write_text(
        '{"rows": {"RoBERTa: lora, fp32": {"ours": {"logits": 0.125}, "ok": true}}}'
    )
    done = run(*output)
    assert done.returncode == 0, done.stdout + done.stderr
    numerics, speed = (json.loads((tmp_path / f"{stage}.json").read_text())["rows"] for stage in ("numerics", "speed"))
    assert numerics["RoBERTa: lora, fp32"]["ours"] == {"logits": 0.125}  # not measured again
    assert all(row["ok"] for row in numerics.values())
    assert 0 < numerics["DeBERTa-v2: lora, bf16"]["peer"]["gradients"] < 0.01
    assert speed["time tiny deberta mnli-like B2 fp32"]["times_as_fast"]["median"] > 0
    assert speed["counts tiny roberta sst2 B4 bf16"]["ours"]["waits"] == 0
    same = json.loads((tmp_path / "graphs.json").read_text())["rows"]["same tiny deberta sst2 B4 fp32 dropout 0"]
    assert same["fixed"] == {"loss": 0.0, "parameters": 0.0} and same["plain"]["parameters"] < 1e-6
    if importlib.util.find_spec("triton"):
        attention = json.loads((tmp_path / "attention.json").read_text())["rows"]
        assert attention["equal fp32, heads of 16, c2p|p2c table, dropout 0.1, all tokens"]["ok"]
        assert attention["step tiny deberta sst2 B2 fp32"]["graphed packed"]["ms"]["median"] > 0
    table = (tmp_path / "gpu.md").read_text()
    assert "| RoBERTa: lora, fp32 | 1.2e-01 |" in table and "| tiny deberta | mnli-like | 2 | fp32 |" in table
