"""Generated files are up to date with the configuration and the list of metrics, and the generator would notice if they were not."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
from pydantic.fields import FieldInfo

from touchline_server import Config
from touchline_server.config.sections import RingConfig

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "server" / "generate_configuration.py"
OF_KEYS = ["cfg/default.toml", "server/src/touchline_server/config/default.toml", "docs/configuration.md", "docker-compose.yml"]
OF_METRICS = ["docs/metrics.md"]
FILES = OF_KEYS + OF_METRICS


@pytest.fixture
def generator(tmp_path: Path) -> ModuleType:
    """The script, on a copy of the files that it writes."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    spec = importlib.util.spec_from_file_location("generate_configuration", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.ROOT = tmp_path  # type: ignore[attr-defined]
    return module


def run(generator: ModuleType, monkeypatch: pytest.MonkeyPatch, *options: str) -> int:
    monkeypatch.setattr(sys, "argv", ["generate_configuration.py", *options])
    with pytest.raises(SystemExit) as ended:
        generator.main()
    assert isinstance(ended.value.code, int)
    return ended.value.code


def test_generated_files_are_up_to_date() -> None:
    result = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True, check=False)

    assert (result.stdout, result.stderr, result.returncode) == ("", "", 0)


@pytest.mark.parametrize("name", FILES)
def test_file_that_was_edited_by_hand_is_found_and_written_anew(
    name: str, generator: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = generator.ROOT / name
    right = file.read_text("utf-8")
    file.write_text(right.replace("ring_bytes", "rong_bytes").replace("RING_BYTES", "RONG_BYTES"), "utf-8")

    assert run(generator, monkeypatch, "--check") == 1
    assert capsys.readouterr().out == f"{name}: out of date, run make configuration\n"
    assert run(generator, monkeypatch) == 0
    assert file.read_text("utf-8") == right


def test_new_key_is_missed_in_every_file(
    generator: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(RingConfig.model_fields, "planted", FieldInfo(default=7, annotation=int, description="Planted."))

    assert run(generator, monkeypatch, "--check") == 1
    assert [line.partition(":")[0] for line in capsys.readouterr().out.splitlines()] == OF_KEYS
    assert run(generator, monkeypatch) == 0
    assert "# Planted.\nplanted = 7\n" in (generator.ROOT / "cfg/default.toml").read_text("utf-8")
    assert "| `ring.planted` | `7` | Planted. |\n" in (generator.ROOT / "docs/configuration.md").read_text("utf-8")
    assert "      - TOUCHLINE_RING__PLANTED\n" in (generator.ROOT / "docker-compose.yml").read_text("utf-8")


def test_file_without_its_marks_is_an_error(generator: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    (generator.ROOT / "docker-compose.yml").write_text("services: {}\n", "utf-8")
    monkeypatch.setattr(sys, "argv", ["generate_configuration.py"])

    with pytest.raises(SystemExit, match=r"docker-compose\.yml: 0 pairs of marks, expected one"):
        generator.main()


# Independent of the generator


def test_tables_have_every_key_with_its_default() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text("utf-8")
    found = re.findall(r"^\| `(\w+)\.(\w+)` \| (?:`(.+?)`|unset) \| .+ \|$", text, re.MULTILINE)

    tables: dict[str, dict[str, object]] = {}
    for section, key, default in found:
        tables.setdefault(section, {})[key] = tomllib.loads(f"value = {default}")["value"] if default else None

    assert tables == Config().model_dump(exclude={"tables"})


def test_keys_that_compose_does_not_pass_on_are_set_by_the_image(generator: ModuleType) -> None:
    passed_on = re.findall(r"^ +- TOUCHLINE_([A-Z]+)__([A-Z_]+)", (ROOT / "docker-compose.yml").read_text("utf-8"), re.MULTILINE)
    every_key = {f"{section}.{key}" for section, keys in Config().model_dump().items() for key in keys}

    missing = every_key - {f"{section}.{key}".lower() for section, key in passed_on}

    assert missing == generator.FIXED_BY_THE_IMAGE
    set_by_the_image = re.findall(r"\bTOUCHLINE_([A-Z]+)__([A-Z_]+)=", (ROOT / "Dockerfile").read_text("utf-8"))
    assert {f"{section}.{key}".lower() for section, key in set_by_the_image} == missing - {"server.unix_socket"}
