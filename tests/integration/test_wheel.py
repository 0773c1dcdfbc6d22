"""The wheel builds, holds everything it needs, and imports outside the checkout."""

import pathlib
import subprocess
import sys
import zipfile

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_wheel_builds_and_imports_elsewhere(tmp_path):
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", str(ROOT), "-w", str(tmp_path)]
    subprocess.run(build, check=True, cwd=tmp_path)
    (wheel,) = tmp_path.glob("rlhf_jax-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    program = (
        "import rlhf_jax, rlhf_jax.losses, rlhf_jax.models, rlhf_jax.algorithms.ppo, rlhf_jax.training\n"
        "from rlhf_jax.metrics import write_report\n"
        "print(rlhf_jax.__file__)\n"
        "write_report('.')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "site") in done.stdout
    assert (tmp_path / "report.html").exists()
