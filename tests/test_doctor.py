"""oplora doctor and the rest of the command line that concerns the installation."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

import oplora
from oplora import doctor
from oplora.__main__ import main


def test_doctor_is_content_with_this_installation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "step on cpu    trains" in said and said.endswith("All is well.\n")
    assert torch.__version__ in said and oplora.__version__ in said


def test_doctor_says_how_to_mend_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "NEEDED", ("torch", "no-such-package"))
    assert main(["doctor"]) == 2
    assert "no-such-package: oplora needs it: pip install no-such-package" in capsys.readouterr().out


def test_doctor_says_which_version_is_too_old(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "version", lambda name: "0.9.1" if name == "peft" else version(name))
    assert main(["doctor"]) == 2
    assert "peft: oplora needs peft>=0.20: pip install 'peft>=0.20'" in capsys.readouterr().out


def test_check_that_fails_keeps_no_other_from_being_made(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> list[doctor.Finding]:
        raise OSError("liboplora_torch.so: undefined symbol")

    monkeypatch.setattr(doctor, "_ops", broken)
    assert not doctor.report()
    said = capsys.readouterr().out
    assert "step on cpu    trains" in said and "OSError: liboplora_torch.so: undefined symbol" in said


def test_gpu_without_kernels_is_told_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr("oplora.kernels.has_kernels", lambda: False)
    kernels, gpu = doctor._gpu()
    assert kernels.trouble and "install a wheel" in kernels.trouble
    assert "a GPU, sm_90" in gpu.found and gpu.trouble is None


def test_cuda_library_that_does_not_load_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "liboplora_cuda.so"
    broken.write_text("no library")
    monkeypatch.setenv("OPLORA_CUDA_LIBRARY", str(broken))
    (finding,) = doctor._guarded(doctor._gpu)
    assert finding.trouble and "liboplora_cuda.so" in finding.trouble


def test_command_without_arguments_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "merge" in (said := capsys.readouterr().err) and "--version" in said


@pytest.mark.parametrize("command", [["--version"], ["--help"]])
def test_command_answers_without_torch(command: list[str]) -> None:
    code = f"import sys; from oplora.__main__ import main\ntry: main({command})\nexcept SystemExit: pass\n"
    code += "sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "oplora" in done.stdout


@pytest.mark.parametrize("command", ["export", "plot"])
def test_path_that_cannot_be_looked_at_is_told_in_a_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["out", "--format", "plain"] if command == "export" else []
    assert main([command, 300 * "a", *more]) == 2
    assert capsys.readouterr().err.startswith("oplora: [Errno 36] File name too long: 'aaa")


@pytest.mark.parametrize("full", [False, True])
def test_report_that_nobody_can_read_ends_without_a_traceback(full: bool) -> None:
    code = "import sys; from oplora import __main__, doctor\ndoctor.report = lambda: print(10**6 * 'x') or True\n"
    code += "sys.exit(__main__.main(['doctor']))"
    with Path("/dev/full").open("w") as file:
        stdout = file if full else subprocess.PIPE
        with subprocess.Popen(
            [sys.executable, "-c", code], stdout=stdout, stderr=subprocess.PIPE, text=True
        ) as process:
            if process.stdout is not None:
                process.stdout.close()
            assert process.stderr is not None
            said = process.stderr.read()
    assert process.returncode == (2 if full else 141)
    assert said == ("oplora: [Errno 28] No space left on device.\n" if full else "")


def test_version_stands_in_one_place() -> None:
    root = Path(__file__).parents[1]
    assert 'dynamic = ["version"]' in (root / "pyproject.toml").read_text()
    done = subprocess.run([sys.executable, "-m", "oplora", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"oplora {oplora.__version__}"
