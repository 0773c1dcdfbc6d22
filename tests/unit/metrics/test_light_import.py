import subprocess
import sys


def test_what_reports_need_is_loaded_only_by_reports():
    heavy = "{'matplotlib', 'jinja2', 'tensorboardX', 'wandb', 'trackio', 'mlflow'}"
    code = f"import sys, rlhf_jax.metrics; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
