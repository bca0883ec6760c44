"""``stillhouse doctor``, with what real clusters answer."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import support
import yaml

from workflow_scripts.errors import ConfigError
from workflow_scripts.operations import doctor
from workflow_scripts.operations.doctor import Check
from workflow_scripts.recipes import GPU_STAGES

PARTITIONS = """\
gpu|2-00:00:00|8|64|512000|gpu:h100:4(S:0-1)
gpu|2-00:00:00|2|48|256000+|gpu:a100:8,shard:16
cpu|1:00:00|20|32|128000|(null)
free|infinite|3|16|64000|(null)
"""
ANSWERS = {
    "sbatch --version": (0, "slurm 24.11.1"),
    "scontrol ping": (0, "Slurmctld(primary) at head is UP"),
    "scontrol show config": (0, "Configuration data\nMinJobAge = 300 sec\nPreemptMode = REQUEUE\nKillWait = 30 sec"),
    "sinfo -h": (0, PARTITIONS),
    "sacct -X": (0, ""),
    "sacctmgr -n": (0, "lab|normal,long"),
}
DISABLED = (1, "Slurm accounting storage is disabled")


def answering(**changes: tuple[int, str]) -> Callable[..., tuple[int, str]]:
    """A machine that gives ANSWERS, with those to some commands changed; names have _ for a blank."""
    answers = ANSWERS | {name.replace("__", " -").replace("_", " "): answer for name, answer in changes.items()}

    def ask(*command: str) -> tuple[int, str]:
        said = " ".join(command)
        found = [answer for prefix, answer in answers.items() if said.startswith(prefix)]
        if found:
            return found[-1]
        return (0, "slurm 24.11.1") if said.endswith("--version") and "sacct" not in command[0] else (127, "")

    return ask


@pytest.fixture
def look(plan_site: Callable[..., support.Site], tmp_path: Path) -> Callable[..., dict[str, Check]]:
    """Examine the planning site with a profile, and return the checks by name."""
    site = plan_site()

    def look(ask: Callable[..., tuple[int, str]], **profile: object) -> dict[str, Check]:
        shipped = yaml.safe_load((support.ROOT / "slurm_profile" / "config.yaml").read_text())
        (tmp_path / "profile").mkdir(exist_ok=True)
        merged = doctor_profile(shipped, profile)
        (tmp_path / "profile" / "config.yaml").write_text(yaml.safe_dump(merged))
        return {check.check: check for check in doctor.examine(site.config, tmp_path / "profile", ask)}

    return look


def doctor_profile(shipped: dict[str, object], changes: dict[str, object]) -> dict[str, object]:
    from workflow_scripts.config import merge

    merged: dict[str, object] = merge(shipped, {key.replace("__", "-"): value for key, value in changes.items()})
    return merged


Look = Callable[..., dict[str, Check]]


def test_the_profile_knows_every_rule() -> None:
    profile = yaml.safe_load((support.ROOT / "slurm_profile" / "config.yaml").read_text())
    rules = {path.stem for path in (support.ROOT / "rules").glob("*.smk")} - {"common"}
    assert set(profile["set-resources"]) == set(profile["set-threads"]) == rules
    partitions = {rule: own.get("slurm_partition") for rule, own in profile["set-resources"].items()}
    assert partitions == {rule: "gpu" if rule in GPU_STAGES else None for rule in rules}


def test_a_cluster_with_slurmdbd(look: Look) -> None:
    found = look(answering())
    assert found["slurm status command"].status == "ok"
    assert "slurm-status-command: sacct" in found["slurm status command"].remedy
    assert "gpu: 10 nodes of 64 CPUs, 512 GB, 48 h" in found["slurm partitions"].found
    assert "free: 3 nodes of 16 CPUs, 64 GB, no limit" in found["slurm partitions"].found
    assert found["slurm gpus"].found == "a100 (gpu: 8 per node), h100 (gpu: 4 per node)"
    assert found["slurm account"].found == "lab with QOS normal,long"
    assert found["weights"].status == "ok"
    assert found["results"].status in ("ok", "warn")
    assert not [check for check in found.values() if check.status == "fail" and check.check.startswith("slurm")]


def test_a_cluster_without_slurmdbd_takes_squeue(look: Look) -> None:
    assert look(answering(sacct__X=DISABLED))["slurm status command"].status == "ok", "as the profile is shipped"
    found = look(answering(sacct__X=DISABLED), slurm__status__command="sacct")["slurm status command"]
    assert found.status == "fail"
    assert "for ever" in found.found
    assert "slurm-status-command: squeue" in found.remedy


def test_jobs_that_slurm_forgets_too_soon(look: Look) -> None:
    config = (0, "MinJobAge = 60 sec")
    found = look(answering(sacct__X=DISABLED, scontrol_show_config=config))["slurm MinJobAge"]
    assert found.status == "fail"
    assert "slurm-init-seconds-before-status-checks: 20" in found.remedy
    assert "slurm MinJobAge" not in look(answering(scontrol_show_config=config)), "sacct does not forget"


def test_a_profile_that_asks_for_what_is_not_there(look: Look) -> None:
    found = look(answering(), set__resources={"encode": {"slurm_partition": "gpus"}})
    assert found["profile partitions"].status == "fail"
    assert "gpus: not on this cluster" in found["profile partitions"].found
    found = look(answering(), set__resources={"sample": {"gpu_model": "h200"}, "invert": {"slurm_partition": "free"}})
    assert "asks for a GPU h200 in partition gpu, which has a100, h100" in found["profile sample"].found
    assert "which has none" in found["profile invert"].found


def test_time_limits(look: Look) -> None:
    """The partition cpu has an hour."""
    found = look(answering(), set__resources={"cluster": {"minutes_fixed": 90, "seconds_per_item": 0}})
    assert found["profile cluster"].status == "fail"
    assert "asks for 90 minutes, the partition allows 60" in found["profile cluster"].found
    found = look(answering())
    assert found["profile cluster"].status == "warn", "with attempts it asks for more than an hour"
    assert "minutes_max: 60" in found["profile cluster"].remedy
    found = look(answering(), default__resources={"minutes_max": 60})
    assert "profile cluster" not in found


def test_jobs_that_want_more_gpus_than_a_node_has(plan_site: Callable[..., support.Site], tmp_path: Path) -> None:
    """The partition gpu has nodes with 8 a100 or 4 h100."""
    site = plan_site()
    profile = yaml.safe_load((support.ROOT / "slurm_profile" / "config.yaml").read_text())

    def found(gpus: int, model: str | None = None, nodes: int = 1) -> dict[str, Check]:
        own = {"gpu_model": model} if model else {}
        (tmp_path / "config.yaml").write_text(
            yaml.safe_dump(doctor_profile(profile, {"set__resources": {"evaluate": own}}))
        )
        students = {
            "evaluation.architectures": [{"name": "convnet"}, {"name": "resnet101", "gpus": gpus, "nodes": nodes}]
        }
        checks = doctor.examine(lambda: site.config(students), tmp_path, answering())
        return {check.check: check for check in checks}

    assert "profile evaluate gpus" not in found(8)
    assert found(16)["profile evaluate gpus"].status == "fail"
    assert "among 8 GPUs of one node, partition gpu has 4" in found(8, "h100")["profile evaluate gpus"].found
    assert "profile evaluate gpus" not in found(8, "h100", nodes=2)


def test_preemption_that_cancels(look: Look) -> None:
    found = look(answering(scontrol_show_config=(0, "PreemptMode = GANG,CANCEL")))
    assert found["slurm preemption"].status == "warn"


def test_a_machine_without_slurm(look: Look) -> None:
    found = look(lambda *command: (127, ""))
    assert found["slurm"].status == "warn"
    assert "--cores all" in found["slurm"].remedy
    assert "slurm partitions" not in found


def test_a_controller_that_does_not_answer(look: Look) -> None:
    found = look(answering(scontrol_ping=(1, "Slurmctld(primary) at head is DOWN")))
    assert found["slurm"].status == "fail"


def test_a_driver_that_does_not_fit(look: Look) -> None:
    found = look(answering(**{"nvidia-smi": (0, "NVIDIA H100, 81559 MiB, 470.57")}))
    assert found["cuda"].status in ("fail", "warn")
    assert "470.57" in found["cuda"].found or "without CUDA" in found["cuda"].found


def test_a_configuration_that_is_wrong_is_one_of_the_findings(tmp_path: Path) -> None:
    def wrong() -> None:
        raise ConfigError("run: there is no run named 'x'")

    found = {check.check: check for check in doctor.examine(wrong, tmp_path, lambda *command: (127, ""))}  # type: ignore[arg-type]
    assert found["run"].status == "fail"
    assert found["python"].status == "ok"


def test_results_that_cannot_be_written(look: Look, plan_site: Callable[..., support.Site], tmp_path: Path) -> None:
    site = plan_site(name="other")
    site.results.write_text("a file")
    found = {c.check: c for c in doctor.examine(site.config, tmp_path, lambda *command: (127, ""))}
    assert found["results"].status == "fail"


def test_missing_weights(plan_site: Callable[..., support.Site], tmp_path: Path) -> None:
    site = plan_site(name="bare")
    (site.backbone / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    found = {c.check: c for c in doctor.examine(site.config, tmp_path, lambda *command: (127, ""))}
    assert found["weights"].status == "fail"


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    checks = [Check("python", "ok", "3.12"), Check("cuda", "fail", "driver too old", "update it")]
    doctor.show(checks, as_json=False)
    printed = capsys.readouterr().out
    assert "fail cuda: driver too old\n       -> update it" in printed
    assert "1 ok, 0 to know of, 1 to mend." in printed
    doctor.show(checks, as_json=True)
    assert json.loads(capsys.readouterr().out)["checks"][1]["remedy"] == "update it"
