"""``opustomo doctor``: what it says of machines that lack something, and that it leaves nothing behind."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from opustomo import cli, machine
from opustomo.data.findings import Finding
from opustomo.doctor import compute, host, packages, verb
from opustomo.machine import Cores

GB = 1_000_000_000


def raising(error: BaseException) -> Callable[..., Any]:
    def function(*args: object, **keywords: object) -> Any:
        raise error

    return function


# ------------------------------------------------------------------------------------------------ as a whole


def test_this_machine_can_run_the_tests(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every section says something, nothing is an error where tests run, and the folder is left as it was."""
    start = time.monotonic()
    assert cli.main(["doctor", str(tmp_path), "--json"]) == 0
    assert time.monotonic() - start < 10
    document = json.loads(capsys.readouterr().out)
    assert document["folder"] == str(tmp_path) and document["errors"] == 0 and "star" not in document
    sections = {finding["section"] for finding in document["findings"]}
    assert sections == {"programs", "GPU", "cores", "memory", "processes", "disk"}
    topics = {finding["topic"]: finding["values"] for finding in document["findings"]}
    assert topics["torch"]["version"] == str(torch.__version__)
    assert topics["speed"]["write_bytes_per_second"] > 0 and topics["cores"]["usable"] >= 1
    assert list(tmp_path.iterdir()) == []


def test_every_problem_says_what_to_do_and_an_error_is_the_status(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(packages, "program_findings", list)
    monkeypatch.setattr(host, "process_findings", list)
    missing = tmp_path / "none such"
    assert cli.main(["doctor", str(missing)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("  error    folder") and f"mkdir -p '{missing}'" in line for line in lines)
    assert lines[-1] == f"mend the errors, then: opustomo doctor '{missing}'"
    assert all(" -> " in line for line in lines if line.startswith(("  error", "  warning")))


def test_a_machine_without_torch_is_told_so() -> None:
    """The one program that must work then: no traceback, the rest of the report, status 1."""
    code = """if True:
        import sys
        class Without:
            def find_spec(self, name, path=None, target=None):
                if name == "torch":
                    raise ModuleNotFoundError("No module named 'torch'", name="torch")
        sys.meta_path.insert(0, Without())
        from opustomo import cli
        sys.exit(cli.main(["doctor"]))"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stderr) == (1, "")
    assert "error    torch" in result.stdout and "pip install" in result.stdout
    assert "ok       processes" in result.stdout and "\nGPU\n" not in result.stdout


def test_a_torch_that_does_not_fit_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = OSError("libcudart.so.12: cannot open shared object file\nmore")
    monkeypatch.setattr("importlib.import_module", raising(broken))
    loaded, [finding] = packages.load_torch()
    assert loaded is None and finding.level == "error"
    assert "libcudart.so.12" in finding.found and "more" not in finding.found


# ------------------------------------------------------------------------------------------------ packages


def test_what_is_missing_or_too_old_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = ["torch>=2.6", "numpy>=99", "nonesuch>=1", 'gemmi>=0.7; extra == "atoms"', 'pytest>=99; extra == "dev"']
    monkeypatch.setattr(metadata, "requires", lambda name: needed)
    finding = packages.program_findings()[-1]
    assert finding.level == "error"
    assert finding.found == "missing: nonesuch>=1; too old: numpy>=99"
    assert finding.action == "pip install 'nonesuch>=1' 'numpy>=99'"
    monkeypatch.setattr(metadata, "requires", lambda name: needed[:1])
    assert packages.program_findings()[-1].level == "ok"


def test_the_programs_own_requirements_are_read() -> None:
    """None of them is passed over because it is written in a way that is not understood."""
    read = {(name, extra) for name, _, extra in packages._requirements()}
    stated = [line for line in metadata.requires("opustomo") or () if "dev" not in line]
    assert len([extra for _, extra in read if extra != "dev"]) == len(stated) > 10


@pytest.mark.parametrize(
    ("version", "least", "older"),
    [("2.6.0+cpu", "2.6", False), ("2.10.1", "2.9", False), ("2.5.1", "2.6", True), ("10.0.0", "10", False)],
)
def test_versions_are_compared_by_number(version: str, least: str, older: bool) -> None:
    assert packages._older(version, least) is older


def test_umap_without_a_folder_for_what_it_compiles(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    assert packages._umap_cache().values["numba_cache"] == str(tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    finding = packages._umap_cache()
    assert finding.level == "warning" and "NUMBA_CACHE_DIR" in finding.action


# ------------------------------------------------------------------------------------------------ GPU


def fake_torch(
    cuda: str | None = "12.4",
    gpus: int = 0,
    capability: tuple[int, int] = (9, 0),
    free: float = 70 * GB,
    built: tuple[str, ...] = ("sm_80", "sm_90", "compute_90"),
) -> Any:
    """A torch with so many GPUs, as far as the doctor looks."""
    gpu = SimpleNamespace(
        device_count=lambda: gpus,
        get_device_name=lambda i: "NVIDIA H100",
        get_device_capability=lambda i: capability,
        mem_get_info=lambda i: (free, 80 * GB),
        get_arch_list=lambda: list(built),
    )
    return SimpleNamespace(
        version=SimpleNamespace(cuda=cuda, hip=None),
        cuda=gpu,
        device=lambda *a: a,
        distributed=SimpleNamespace(is_nccl_available=lambda: True),
    )


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A kernel driver of CUDA 12.4 is here, and no variable hides GPUs."""
    path = tmp_path / "version"
    path.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5\nGCC version: 12\n")
    monkeypatch.setattr(compute, "DRIVER", path)
    monkeypatch.setattr(compute, "driver_cuda", lambda: (12, 4))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(compute, "convolution_error", lambda torch, device: 1e-6)
    return path


def test_no_gpu_is_no_fault(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.unlink()
    monkeypatch.setattr(compute, "driver_cuda", lambda: None)
    for build in (None, "12.4"):
        [finding] = compute.gpu_findings(fake_torch(build))
        assert finding.level == "note" and "CPU" in finding.action


def test_a_driver_that_is_seen_by_its_library_alone(driver: Path) -> None:
    driver.unlink()  # as under WSL
    [finding] = compute.gpu_findings(fake_torch(None))
    assert finding.level == "warning" and "CPU build" in finding.found


def test_a_driver_that_torch_makes_nothing_of(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run would silently take the CPU: why, and what to install or start otherwise."""
    [finding] = compute.gpu_findings(fake_torch(None))
    assert finding.level == "warning" and "550.54.15" in finding.found and "CPU build" in finding.found
    assert "pip install" in finding.action
    [finding] = compute.gpu_findings(fake_torch("13.0"))
    assert "up to 12.4, this torch is built for 13.0" in finding.found and "update the driver" in finding.action
    [finding] = compute.gpu_findings(fake_torch("12.8"))  # within a major version older drivers do
    assert "nvidia-smi" in finding.action
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    [finding] = compute.gpu_findings(fake_torch())
    assert "CUDA_VISIBLE_DEVICES=''" in finding.found


def test_a_gpu_that_works(driver: Path) -> None:
    [finding] = compute.gpu_findings(fake_torch(gpus=1))
    assert finding.level == "ok" and "80 GB of memory" in finding.found and "9.0" in finding.found
    several = compute.gpu_findings(fake_torch(gpus=2))
    assert [f.topic for f in several] == ["GPU 0", "GPU 1", "several"]
    assert several[-1].action == "opustomo train --num-gpus 2 --multigpu"
    [finding] = compute.gpu_findings(fake_torch(gpus=1, free=GB))
    assert finding.level == "warning" and "CUDA_VISIBLE_DEVICES" in finding.action


def test_a_gpu_that_a_run_would_choose_and_fail_on(driver: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [finding] = compute.gpu_findings(fake_torch(gpus=1, capability=(6, 1)))
    assert finding.level == "error" and "sm_80, sm_90" in finding.found and "--device cpu" in finding.action
    for wrong in (0.3, float("nan")):
        monkeypatch.setattr(compute, "convolution_error", lambda torch, device, wrong=wrong: wrong)
        [finding] = compute.gpu_findings(fake_torch(gpus=1))
        assert finding.level == "error" and "wrong by" in finding.found
    monkeypatch.setattr(compute, "convolution_error", raising(RuntimeError("CUDNN_STATUS_NOT_INITIALIZED\nmore")))
    [finding] = compute.gpu_findings(fake_torch(gpus=1))
    assert finding.level == "error" and "CUDNN_STATUS_NOT_INITIALIZED)" in finding.found
    old = fake_torch("13.0", gpus=1)  # the driver lists the GPU, CUDA cannot be started
    old.cuda.mem_get_info = raising(RuntimeError("The NVIDIA driver on your system is too old"))
    [finding] = compute.gpu_findings(old)
    assert finding.level == "error" and "update the driver or install an older build" in finding.action


@pytest.mark.parametrize(
    ("capability", "built", "runs"),
    [
        ((8, 6), ["sm_80"], True),  # machine code of the same major version
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80", "sm_86"], False),
        ((9, 0), ["sm_80", "compute_80"], True),  # translated
        ((9, 0), ["sm_90a"], True),
        ((10, 0), ["sm_90", "sm_90a"], False),
        ((12, 0), ["sm_100", "sm_120"], True),
        ((12, 1), ["compute_121"], True),
        ((6, 1), ["compute_75"], False),
    ],
)
def test_which_gpus_a_build_has_code_for(capability: tuple[int, int], built: list[str], runs: bool) -> None:
    assert compute.runs_on(capability, built) is runs


def test_the_convolution_notices_wrong_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compute.convolution_error(torch, torch.device("cpu")) == 0
    right, calls = torch.nn.functional.conv3d, []

    def second_is_wrong(*args: Any, **keywords: Any) -> torch.Tensor:
        calls.append(1)
        return right(*args, **keywords) * (1.1 if len(calls) == 2 else 1.0)

    monkeypatch.setattr(torch.nn.functional, "conv3d", second_is_wrong)
    assert compute.convolution_error(torch, torch.device("cpu")) > 0.09


# ------------------------------------------------------------------------------------------------ cores


@pytest.mark.parametrize(
    ("group", "files", "quota"),
    [
        ("0::/job/step\n", {"job/step/cpu.max": "max 100000\n", "job/cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("4:cpu,cpuacct:/job\n0::/\n", {"cpu,cpuacct/job/cpu.cfs_quota_us": "200000\n",
                                        "cpu,cpuacct/job/cpu.cfs_period_us": "100000\n"}, 2.0),
        ("4:cpu,cpuacct:/\n", {"cpu,cpuacct/cpu.cfs_quota_us": "-1\n", "cpu,cpuacct/cpu.cfs_period_us": "1\n"}, None),
    ],
)  # fmt: skip
def test_quotas_of_containers_and_batch_systems_count(
    group: str, files: dict[str, str], quota: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The narrowest limit of the process's own group and those above it, in both versions of cgroups."""
    texts = {str(tmp_path / name): text for name, text in files.items()} | {"/proc/self/cgroup": group}

    def read_text(path: Path) -> str:
        if str(path) not in texts:
            raise FileNotFoundError(path)
        return texts[str(path)]

    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(Path, "read_text", read_text)
    assert machine.cores().quota == quota


def test_threads_that_can_be_kept_busy() -> None:
    counts = [(64, 8, None), (64, 64, 1.0), (64, 64, 1.5), (4, 4, 16.0), (8, 8, 0.1)]
    assert [Cores(*count).usable for count in counts] == [8, 1, 2, 4, 1]


def threads_of(
    monkeypatch: pytest.MonkeyPatch, found: Cores, used: int, speedup: float = 1.9, stated: str | None = None
) -> Finding:
    monkeypatch.setattr(compute, "cores", lambda: found)
    monkeypatch.setattr(compute, "product_seconds", lambda torch, count: 1.0 if count == 1 else 1.0 / speedup)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if stated is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", stated)
    [finding] = compute.thread_findings(SimpleNamespace(get_num_threads=lambda: used))
    return finding


def test_a_quota_of_one_core_on_a_large_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = Cores(64, 64, 1.0)
    monkeypatch.setattr(host, "cores", lambda: narrow)
    finding = host.core_finding()
    assert finding.level == "warning" and finding.found == "1 of 64 may be used (quota 1)"
    finding = threads_of(monkeypatch, narrow, used=64)
    assert finding.level == "warning" and "OMP_NUM_THREADS=1" in finding.action


def test_threads_are_judged_by_what_they_bring(monkeypatch: pytest.MonkeyPatch) -> None:
    eight = Cores(8, 8)
    assert threads_of(monkeypatch, eight, used=8).level == "ok"
    finding = threads_of(monkeypatch, eight, used=16)
    assert finding.level == "warning" and "OMP_NUM_THREADS=8" in finding.action
    finding = threads_of(monkeypatch, eight, used=8, speedup=0.8)
    assert finding.level == "warning" and "--workers 1" in finding.action
    finding = threads_of(monkeypatch, eight, used=1, stated="1")
    assert finding.level == "note" and "OMP_NUM_THREADS=1: " in finding.found and "--workers 8" in finding.action


def test_the_product_leaves_the_number_of_threads_as_it_was() -> None:
    assert compute.product_seconds(torch, 2) > 0
    assert torch.get_num_threads() == 1


# ------------------------------------------------------------------------------------------------ memory, processes


def test_memory_that_is_too_little(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = []
    for free in (0.1 * GB, GB, 8 * GB):
        monkeypatch.setattr(host, "free_memory", lambda free=free: free)
        levels.append(host.memory_findings()[0].level)
    assert levels == ["error", "warning", "ok"]
    monkeypatch.setattr("shutil.disk_usage", lambda path: (64_000_000, 0, 64_000_000))  # of a container
    shared = host.memory_findings()[1]
    assert shared.level == "warning" and "--shm-size" in shared.action


def test_processes_that_cannot_be_started_stop_no_run_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "SharedMemory", raising(PermissionError(errno.EACCES, "Permission denied", "/psm_1")))
    [finding] = host.process_findings()
    assert finding.level == "warning" and "Permission denied" in finding.found and "--multigpu" in finding.action


# ------------------------------------------------------------------------------------------------ disk


def with_space(monkeypatch: pytest.MonkeyPatch, free: float, files: int = 1000) -> None:
    disk = SimpleNamespace(f_bavail=int(free), f_frsize=1, f_blocks=100 * GB, f_files=1000, f_favail=files)
    monkeypatch.setattr(os, "statvfs", lambda path: disk)


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "full"), (errno.EROFS, "read-only"), (errno.EACCES, "may not be written")]
)
def test_a_folder_that_takes_no_file(number: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.TemporaryFile", raising(OSError(number, os.strerror(number))))
    [finding] = host.disk_findings(tmp_path)
    assert finding.level == "error" and words in finding.found and "another folder" in finding.action


def test_a_disk_that_fills_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_fill", raising(OSError(errno.ENOSPC, "No space left on device")))
    [finding] = host.disk_findings(tmp_path)
    assert finding.level == "error" and "the disk is full" in finding.found
    assert list(tmp_path.iterdir()) == []


def test_space_that_is_too_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_space(monkeypatch, 0)
    [finding] = host.disk_findings(tmp_path)  # nothing is written there
    assert finding.level == "error" and finding.topic == "space"
    with_space(monkeypatch, 50 * GB, files=0)
    assert "inodes" in host.disk_findings(tmp_path)[0].found
    with_space(monkeypatch, GB)
    assert host.disk_findings(tmp_path)[0].level == "warning"


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    [finding] = host.disk_findings(tmp_path / "file")
    assert finding.level == "error" and "is a file" in finding.found


def test_a_disk_that_is_slow_or_gives_other_bytes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "PROBE", host.BLOCK)
    monkeypatch.setattr(host, "SLOW", 1e15)
    finding = host.disk_findings(tmp_path)[1]
    assert finding.level == "warning" and "--cache" in finding.action
    monkeypatch.setattr(host, "_read", lambda file: b"other")
    assert host.disk_findings(tmp_path)[1].level == "error"


def test_a_disk_is_measured_by_what_reaches_it_and_for_seconds_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every block waits for the disk, not for the memory in front of it: a slow one ends the probe early."""
    waits: list[int] = []

    def slow(descriptor: int) -> None:
        waits.append(descriptor)
        time.sleep(0.05)

    monkeypatch.setattr(os, "fsync", slow)
    monkeypatch.setattr(host, "WRITE_SECONDS", 0.12)
    values = host.disk_findings(tmp_path)[1].values
    assert values["bytes"] == len(waits) * host.BLOCK < host.PROBE
    assert values["write_bytes_per_second"] < host.BLOCK / 0.05


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "PROBE", host.BLOCK)
    assert host.disk_findings(tmp_path)[-1].level == "ok"
    monkeypatch.setattr("fcntl.flock", raising(OSError(errno.ENOLCK, "No locks available")))
    assert host.disk_findings(tmp_path)[-1].level == "note"


def test_the_report_names_the_folder_in_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for module, name in ((host, "process_findings"), (compute, "gpu_findings"), (compute, "thread_findings")):
        monkeypatch.setattr(module, name, lambda *args: [])
    monkeypatch.setattr(host, "PROBE", host.BLOCK)
    assert verb.examine(Path()).text().splitlines()[0] == str(tmp_path)
