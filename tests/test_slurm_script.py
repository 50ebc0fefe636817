"""The worked example for Slurm, with stand-ins for Slurm's programs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from opt import REPOSITORY

SCRIPT = REPOSITORY / "configs/cluster/slurm_array.sh"
SRUN = '#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n'
SCONTROL = '#!/bin/bash\necho "scontrol $*"\n'


@pytest.fixture
def submit(tmp_path):
    """submit(python, *arguments): the script as job 3 of an array 1-4, its output and exit code."""

    def go(python: str, *arguments: str, **more: str) -> subprocess.CompletedProcess:
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
            executable(tmp_path / "bin" / name, text)
        array = {"JOB_ID": "7", "TASK_ID": "3", "TASK_MIN": "1", "TASK_MAX": "4", "TASK_COUNT": "4", **more}
        environment = {f"SLURM_ARRAY_{key}": value for key, value in array.items()}
        environment |= {"SLURM_CPUS_PER_TASK": "8", "NERF_PYTHON": python}
        environment |= {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        command = ["bash", str(SCRIPT), *arguments]
        return subprocess.run(
            command, env=os.environ | environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=120
        )

    return go


def executable(path: Path, text: str) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return str(path)


def test_a_job_of_the_array_runs_its_part_of_the_sweep(submit, tmp_path):
    data = REPOSITORY / "tests/golden/scenes"
    more = ["--datasets", "syn,nsvf", "--seed", "1", "--seeds", "3", "--data_folder", str(data)]
    done = submit(sys.executable, *more, "--save_dir", str(tmp_path), "--dry_run")
    assert (done.returncode, done.stderr) == (0, "")
    runs = [line.split()[0] for line in done.stdout.splitlines()[:-1]]
    assert runs == ["syn/tiny/full/seed3"]


@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_only_a_stopped_job_goes_back_into_the_queue(submit, tmp_path, code):
    done = submit(executable(tmp_path / "python", f'#!/bin/bash\necho "$*"\nexit {code}\n'), "--seeds", "3")
    assert done.returncode == code
    told = ["run.py --seeds 3 --shard 2/4"] + (["scontrol requeue 7_3"] if code == 75 else [])
    assert done.stdout.splitlines() == told


def test_outside_of_an_array_the_script_says_how_to_submit_it():
    outside = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    done = subprocess.run(["bash", str(SCRIPT)], env=outside, cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode != 0, done.stdout) == (True, "")
    assert "submit this with sbatch --array=0-7" in done.stderr


def test_a_stepped_array_gets_all_parts(submit, tmp_path):
    program = executable(tmp_path / "python", '#!/bin/bash\necho "$*"\n')
    array = {"TASK_MIN": "0", "TASK_MAX": "6", "TASK_STEP": "2"}
    parts = [submit(program, **array, TASK_ID=number).stdout.split()[-1] for number in "0246"]
    assert parts == ["0/4", "1/4", "2/4", "3/4"]
