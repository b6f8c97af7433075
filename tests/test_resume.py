"""A run that is killed again and again, at any moment, ends as one that was left alone."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest

from compressor import pipeline
from compressor.report import Report
from tests.conftest import ROOT
from tests.test_pipeline import recipe

KILLS = 50

SCRIPT = (
    "import json, sys\nfrom pathlib import Path\nfrom compressor import Recipe, compress\n"
    "compress(Recipe.from_dict(json.loads(Path(sys.argv[1]).read_text())), Path(sys.argv[2]),"
    " progress=lambda p: print(p.stage, flush=True))"
)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_fifty_kills_at_random_moments(tiny_folder, tmp_path):
    """SIGKILL at random times over all stages; whenever a run gets through, its result is that of the undisturbed one."""
    wanted = recipe(tiny_folder, distill={"method": "on_policy", "batch_tokens": 128, "rollouts": {"new_tokens": 8}})
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(wanted.to_dict()))
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    began = time.monotonic()
    expected = pipeline.compress(wanted, undisturbed)
    length = time.monotonic() - began
    weights = (undisturbed / "onnx" / "model.onnx_data").read_bytes()
    rng, kills, finished, stages = random.Random(0), 0, 0, set()
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    while kills < KILLS or not finished:
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(path), str(killed)], stdout=subprocess.PIPE, text=True, env=environment
        )
        seen = [process.stdout.readline().strip()]  # the imports are over
        reader = threading.Thread(target=lambda lines=process.stdout, seen=seen: seen.extend(map(str.strip, lines)))
        reader.start()
        with suppress(subprocess.TimeoutExpired):
            process.wait(rng.uniform(0, length))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
            reader.join()
            kills, stages = kills + 1, stages | {seen[-1]}
            continue
        assert process.returncode == 0
        finished += 1
        found = Report.from_json((killed / "report.json").read_text())
        assert found.plan == expected.plan and found.recovery == expected.recovery
        assert [trial.kl for trial in found.trials] == [trial.kl for trial in expected.trials]
        assert (killed / "onnx" / "model.onnx_data").read_bytes() == weights
        shutil.rmtree(killed)
    assert len(stages) > 5, stages
    print(f"{kills} kills in {sorted(stages)}; {finished} runs got through")
