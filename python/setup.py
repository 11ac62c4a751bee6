"""Builds the native part: compiles csrc/module.cpp against the installed torch and bundles libffreduce.so.

Environment:
    FIREFLY_LIB_DIR   folder that holds libffreduce.so; without it cargo builds the library
    FIREFLY_PROFILE   cargo profile for that build: "release" (default) or "dev"
    CARGO_TARGET_DIR  as usual for cargo
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LIBRARY = "libffreduce.so"

# Asked of a fresh interpreter without PYTHONPATH, because pip's build isolation hides the torch of
# the environment that we are being installed into. Importing torch is slow and not needed.
ASK_TORCH = """
import importlib.util, json, os, sysconfig
spec = importlib.util.find_spec("torch")
if spec is None:
    raise SystemExit(3)
version = {}
exec(open(os.path.join(os.path.dirname(spec.origin), "version.py")).read(), version)
print(json.dumps({"root": os.path.dirname(spec.origin), "version": str(version["__version__"])}))
"""


def find_torch() -> dict:
    asked = subprocess.run([sys.executable, "-I", "-c", ASK_TORCH], capture_output=True, text=True)
    if asked.returncode == 3:
        sys.exit(
            "firefly: torch is not installed in this environment, and the backend is compiled against it.\n"
            "Install torch first (pip install torch), then run pip install again."
        )
    if asked.returncode != 0:
        sys.exit(f"firefly: could not look for torch:\n{asked.stderr}")
    return json.loads(asked.stdout)


def find_library() -> Path:
    given = os.environ.get("FIREFLY_LIB_DIR")
    if given:
        path = Path(given) / LIBRARY
        if not path.is_file():
            sys.exit(f"firefly: FIREFLY_LIB_DIR={given} holds no {LIBRARY}; build it with: cargo build -p firefly-reduce-ffi")
        return path
    profile = os.environ.get("FIREFLY_PROFILE", "release")
    command = ["cargo", "build", "--profile", profile, "-p", "firefly-reduce-ffi", "--message-format=json-render-diagnostics"]
    if shutil.which("cargo") is None:
        sys.exit(f"firefly: cargo is not installed, and FIREFLY_LIB_DIR does not say where {LIBRARY} is")
    built = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if built.returncode != 0:
        sys.exit(f"firefly: `{' '.join(command)}` failed")
    for line in built.stdout.splitlines():
        for name in json.loads(line).get("filenames", []):
            if Path(name).name == LIBRARY:
                return Path(name)
    sys.exit(f"firefly: cargo built no {LIBRARY}")


class BuildShim(build_ext):
    """Compiles when something changed; copies the library always."""

    def build_extension(self, ext: Extension) -> None:
        torch = find_torch()
        root = Path(torch["root"])
        library = find_library()
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        bundled = output.with_name(LIBRARY)
        # A new file, not new bytes in the old one: running programs may have it mapped.
        bundled.unlink(missing_ok=True)
        shutil.copy2(library, bundled)

        header = ROOT / "reduce" / "ffi" / "include"
        command = [
            os.environ.get("CXX", "c++"),
            *["-shared", "-fPIC", "-std=c++20", "-O2", "-g0", "-Wall", "-Wno-sign-compare"],
            # The Python headers and torch's are not ours to warn about.
            *[f"-isystem{root / 'include'}", f"-isystem{root / 'include/torch/csrc/api/include'}"],
            *[f"-isystem{sysconfig.get_path('include')}", f"-I{header}"],
            *["-DTORCH_EXTENSION_NAME=_C", "-fvisibility=hidden", str(HERE / "csrc" / "module.cpp")],
            *["-o", str(output)],
            *[f"-L{root / 'lib'}", f"-L{bundled.parent}", "-lffreduce"],
            *["-ltorch_python", "-ltorch_cpu", "-ltorch", "-lc10"],
            "-Wl,-rpath,$ORIGIN",
        ]
        inputs = [*sorted((HERE / "csrc").iterdir()), header / "ffreduce.h"]
        stamp = Path(self.build_temp) / "shim.json"
        state = {"command": command, "torch": torch, "inputs": {str(p): p.read_text() for p in inputs}}
        if output.exists() and stamp.exists() and json.loads(stamp.read_text()) == state:
            print("firefly: the shim is up to date")
        else:
            subprocess.run(command, check=True)
            stamp.parent.mkdir(parents=True, exist_ok=True)
            stamp.write_text(json.dumps(state))
        info = f'"""Written by setup.py."""\n\nTORCH_VERSION = {torch["version"]!r}\n'
        output.with_name("_build.py").write_text(info)


setup(
    ext_modules=[Extension("firefly._C", ["csrc/module.cpp"])],
    cmdclass={"build_ext": BuildShim},
)
