"""GPUs by name and from files, and calibrations in files."""

from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from internevo.errors import UsageError
from internevo.planner import hardware
from internevo.planner.calibration import VERSION, Calibration
from internevo.planner.hardware import GPU, GPUS, find


def toml(values: dict[str, object]) -> str:
    return "\n".join(f"{key} = {value!r}".replace("'", '"') for key, value in values.items())


@pytest.mark.parametrize("gpu", GPUS.values(), ids=list(GPUS))
def test_a_file_says_all_that_a_name_says(gpu: GPU, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(toml(asdict(gpu)))
    assert find(str(path)) == gpu == find(gpu.name.upper())


def test_the_format_that_messages_show_is_right(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(hardware.EXAMPLE)
    assert find(str(path)) == replace(GPUS["h100"], name="my-h100")


def test_a_file_may_change_a_known_gpu(tmp_path: Path) -> None:
    path = tmp_path / "slow.toml"
    path.write_text('based_on = "h100"\nnetwork_gb_per_s = 12.5\n')
    assert find(str(path)) == replace(GPUS["h100"], network_gb_per_s=12.5)


def test_an_unknown_name_names_the_nearest_and_the_format() -> None:
    with pytest.raises(UsageError, match=r"(?s)unknown GPU 'h10'.*did you mean h100.*bf16_tflops = "):
        find("h10")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("bf16_tflops", None, "bf16_tflops is missing"),
        ("bf16_tflops", "fast", "bf16_tflops = 'fast' must be a number from 1e-06 to 1e\\+09"),
        ("memory_gib", 0, "memory_gib = 0 must be a number from 1e-06"),
        ("memory_gib", True, "memory_gib = True must be"),
        ("watts", -1, "watts = -1 must be a number from 0"),
        ("gpus_per_node", 7.5, "gpus_per_node = 7.5 must be a whole number"),
        ("based_on", "h10", "based_on = 'h10' must be one of a100"),
        ("memory_gib", 1e300, r"memory_gib = 1e\+300 must be a number"),
        ("network_gb_per_s", 1e-300, "network_gb_per_s = 1e-300 must be a number"),
        ("gpus_per_node", 10**400, r"gpus_per_node = 1000\d*\.\.\.0* must be a whole number from 1"),
        ("watts", 10**400, "watts = 1000"),
        ("name", 3, "name = 3 must be a text"),
        ("name", "h1\nimport os", r"name = 'h1\\nimport os' must be a text in one line"),
        ("name", "", "name = '' must be a text"),
        ("memory_gigs", 80, "unknown key memory_gigs; did you mean memory_gib"),
    ],
)
def test_a_wrong_file_is_explained(key: str, value: object, message: str, tmp_path: Path) -> None:
    path, values = tmp_path / "mine.toml", {**asdict(GPUS["a100"]), key: value}
    path.write_text(toml({k: v for k, v in values.items() if v is not None}).replace("True", "true"))
    with pytest.raises(UsageError, match=f"(?s)mine.toml.*{message}.*The format is"):
        find(str(path))


@pytest.mark.parametrize(
    "content",
    [b"a = [", b"\xff\xfe", None, b"a = " + 9999 * b"[", b"a = " + 9999 * b"1"],
    ids=["no TOML", "no text", "no file", "nested", "long number"],
)
def test_a_file_that_cannot_be_read_is_named(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"mine\.toml cannot be read"):
        find(str(path))
    with pytest.raises(UsageError, match=r"mine\.toml cannot be read"):
        Calibration.load(path)


def test_a_precision_that_a_gpu_does_not_have() -> None:
    assert GPUS["h100"].peak("fp8") == pytest.approx(2 * GPUS["h100"].peak("bf16"), rel=1e-3)
    with pytest.raises(UsageError, match="a100 does not compute in fp8"):
        GPUS["a100"].peak("fp8")


def test_a_calibration_comes_back_from_its_file(tmp_path: Path) -> None:
    path, calibration = tmp_path / "c.toml", Calibration(products=0.61, step=0.0)
    calibration.save(path, "measured on a bench")
    assert Calibration.load(path) == calibration and path.read_text().startswith("# measured on a bench\n")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (f"version = {VERSION}", f"version = {VERSION + 1}", f"is of version {VERSION + 1}; this is version {VERSION}"),
        (f"version = {VERSION}", "", "has no version"),
        ("overlap = ", "overlay = ", "(?s)overlap is missing.*unknown key overlay; did you mean overlap"),
        ("attention = 0.55", "attention = 1.2", "attention = 1.2 must be a number from 1e-06 to 1"),
        ("attention = 0.55", "attention = 0", "attention = 0 must be a number from 1e-06"),
        ("step = 0.005", "step = -1.0", "step = -1.0 must be a number from 0"),
        ("step = 0.005", "step = nan", "step = nan must be a number"),
        ("step = 0.005", "step = true", "step = True must be a number"),
        ("step = 0.005", f"step = 1{'0' * 400}", "step = 1000"),
        ("memory = 0.7", "memory = 1e-300", "memory = 1e-300 must be a number"),
    ],
)
def test_a_calibration_that_does_not_fit_is_refused(old: str, new: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "c.toml"
    Calibration().save(path)
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(UsageError, match=message):
        Calibration.load(path)


def test_a_calibration_has_few_numbers() -> None:
    assert len(fields(Calibration)) <= 12
